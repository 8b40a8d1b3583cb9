# SPDX-License-Identifier: Apache-2.0
"""`semlic refine`, and what `semlic compress --refine` shares with it."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import semlic_jax
from semlic_jax.cli.options import (
    Commands,
    add_background,
    add_command,
    add_force,
    add_model,
    add_srgb,
    background_colour,
    note_folders_left_out,
)
from semlic_jax.cli.terminal import (
    INTERRUPTED,
    REFUSED,
    SKIPPED,
    bar,
    say,
    stops_when_asked,
    warnings_are_notes,
)
from semlic_jax.option_kinds import (
    any_float,
    any_int,
    positive_float,
    positive_int,
    preset_or_steps,
    unit_float,
)
from semlic_jax.terminal import progress_line

if TYPE_CHECKING:
    import numpy as np

    from semlic_jax.codec import Codec
    from semlic_jax.refinement import Progress, Region, Settings

_STEPS = (
    "number of steps, or a preset: fast (10 steps), default (20) or best (120); with a "
    "--method of relaxed rounding they take 100, 300 and 1,000 steps"
)


def add_refine(commands: Commands) -> None:
    sub = add_command(
        commands, "refine", _refine, "compress a folder of photographs with refinement"
    )
    sub.add_argument(
        "input",
        metavar="IN_DIR",
        type=Path,
        help="folder of image files, or one image file; subfolders are not searched",
    )
    sub.add_argument(
        "output",
        metavar="OUT_DIR",
        type=Path,
        help="output folder, created if missing; an interrupted run resumes",
    )
    add_model(sub)
    sub.add_argument(
        "--bpp",
        type=positive_float,
        metavar="BPP",
        required=True,
        help="upper limit on the bits per pixel of each file, such as 0.15",
    )
    sub.add_argument(
        "--steps",
        metavar="STEPS",
        type=preset_or_steps,
        default="default",
        help=f"{_STEPS}; default: the preset default",
    )
    sub.add_argument(
        "--batch",
        metavar="N",
        type=positive_int,
        help="images refined at once; default 1 on a CPU, 16 elsewhere",
    )
    add_objective(sub)
    add_background(sub)
    add_srgb(sub)
    add_force(sub)
    group = sub.add_argument_group("sharing the images among several processes")
    group.add_argument(
        "--distributed",
        default="none",
        metavar="MODE",
        help="how a process finds its share: auto (TPU pods, SLURM), explicit (the "
        "three options below) or none (the last two alone, without a connection); "
        "default none",
    )
    group.add_argument(
        "--coordinator",
        default="",
        metavar="HOST:PORT",
        help="address of process 0, required by explicit; default: none",
    )
    group.add_argument(
        "--processes",
        default=0,
        type=any_int,
        metavar="N",
        help="number of processes; default 1",
    )
    group.add_argument(
        "--process",
        default=-1,
        type=any_int,
        metavar="0..N-1",
        help="number of this process; default 0",
    )


def _refine(options: argparse.Namespace) -> int:
    from semlic_jax.evaluation.image_sets import list_images
    from semlic_jax.images import check_folder

    settings = settings_of(options, options.steps)
    assert settings is not None
    colour = background_colour(options)
    check_folder(options.output, "as OUT_DIR")
    if options.output.suffix == ".semlic" and not options.output.exists():
        raise ValueError(
            f"expected a folder as OUT_DIR, found {options.output}: for one photograph "
            "there is semlic compress --refine"
        )
    images = list_images([options.input])
    note_folders_left_out([options.input], options.output)
    process, processes = _share(options)
    import jax

    from semlic_jax.refinement import FolderProgress, refine_folder

    batch = options.batch or (1 if jax.default_backend() == "cpu" else 16)
    with progress_line() as progress, warnings_are_notes(), stops_when_asked() as stop:
        progress(f"loading the model {options.model}")
        codec = semlic_jax.load(options.model)
        progress(f"refining {len(images)} images: compiling and first steps")

        def show(now: FolderProgress) -> bool:
            progress(f"{now.done}/{now.images} images: {_state(now.batch)}")
            return not stop()

        report = refine_folder(
            codec,
            images,
            options.output,
            bpp=options.bpp,
            settings=settings,
            batch=batch,
            process=process,
            processes=processes,
            background=colour,
            srgb=options.srgb,
            force=options.force,
            progress=show,
        )
    for row in report.rows:
        print(
            f"{row.file}: {row.bytes:,} of {row.budget_bytes:,} bytes, loss "
            f"{row.value:.4f}, unrefined {row.unrefined_value:.4f}"
        )
    for name, reason in report.skipped.items():
        say(f"skipped {name}: {reason}")
    if report.stopped:
        return INTERRUPTED
    if not report.skipped:
        return 0
    # A share of several may well consist of nothing else.
    return SKIPPED if report.rows or processes > 1 else REFUSED


def _share(options: argparse.Namespace) -> tuple[int, int]:
    """Which process this is, and of how many."""
    if options.coordinator and options.distributed != "explicit":
        raise ValueError("--coordinator needs --distributed explicit")
    if options.distributed == "none":
        if options.processes == 0 and options.process == -1:
            return 0, 1
        if not 0 <= options.process < options.processes:
            raise ValueError(
                "expected --processes=N with --process=0..N-1, found "
                f"{options.processes} and {options.process}"
            )
        return options.process, options.processes
    import jax

    from semlic_jax.training.sharding import start_processes

    start_processes(
        options.distributed, options.coordinator, options.processes, options.process
    )
    share = jax.process_index(), jax.process_count()
    # The processes do not depend on each other: one that ends early or dies does not
    # affect the rest.
    jax.distributed.shutdown()
    return share


def add_refinement(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--refine",
        metavar="STEPS",
        type=preset_or_steps,
        help=f"improve the file within its budget: {_STEPS}; default: no refinement",
    )
    add_objective(group)


def add_objective(group: argparse._ActionsContainer) -> None:
    """What a refinement minimises; each one as the preset has it where not given."""
    for name, text in (
        ("alpha", "weight of the squared error, in 8-bit levels; default 0.003"),
        (
            "beta",
            "weight of one bit per pixel at the start; default: the rate-distortion "
            "slope of the unrefined files",
        ),
        ("gamma", "weight of the perceptual terms; 0 refines for PSNR; default 0.5"),
        (
            "mean-style",
            "weight of the strength of textures among the perceptual terms; default 3, "
            "or 2 with the presets fast and best",
        ),
        ("structure", "weight of 1 - MS-SSIM among the perceptual terms; default 50"),
        (
            "lattice",
            "weight of patterns that repeat with the latents' grid of 16 pixels, among "
            "the perceptual terms; default 0",
        ),
        (
            "mesh",
            "weight, among the perceptual terms, of a mesh of dots where the image has "
            "none; default 6",
        ),
    ):
        group.add_argument(f"--{name}", metavar="W", type=any_float, help=text)
    group.add_argument(
        "--method",
        metavar="METHOD",
        help="newton, or one of relaxed rounding: sga, ssl, linear, cosine, ssl3, ste, "
        "noise, deterministic; default newton",
    )
    group.add_argument(
        "--features",
        metavar="PATH",
        help="weights of another feature network, a folder or .npz file made by "
        "`semlic convert features`; default: the packaged network",
    )
    group.add_argument(
        "--seed",
        metavar="N",
        type=any_int,
        help="seed of the noise, a whole number of at least 0; default 0",
    )


def add_region(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--roi",
        metavar="REGION",
        help="region that matters: the path of a mask, white where the image matters; "
        "boxes in pixels, x,y,width,height, separated by semicolons; or auto for what "
        "stands out; default: the whole image",
    )
    group.add_argument(
        "--roi-resize",
        action="store_true",
        default=None,
        help="resize a mask of another size; default: refuse it",
    )
    group.add_argument(
        "--roi-weight",
        metavar="W",
        type=unit_float,
        help="the region's share of the error, from 0 to 1; default 0.8",
    )
    group.add_argument(
        "--roi-variant",
        metavar="V",
        help="what the region weights: L1 (the squared error alone) or L2 (the "
        "perceptual terms too); default L1",
    )


def settings_of(
    options: argparse.Namespace, refine: str | int | None
) -> Settings | None:
    """How to refine; None where that was not asked for."""
    weights = ("alpha", "beta", "gamma", "mean_style", "structure", "lattice", "mesh")
    of_settings = (*weights, "method", "features", "seed")
    changes = {name: getattr(options, name) for name in of_settings}
    # `semlic refine` has none of these.
    of_region = ("roi", "roi_weight", "roi_variant", "roi_resize")
    region = {name: getattr(options, name, None) for name in of_region}
    if refine is None:
        _refuse_without("refine", changes | region)
        return None
    if region.pop("roi") is None:
        _refuse_without("roi", region)
    from semlic_jax import refinement

    settings = refinement.preset(refine, **changes)
    if settings.gamma == 0:
        for name in ("mean_style", "structure", "lattice", "mesh", "features"):
            if changes[name] is not None:
                given = name.replace("_", "-")
                raise ValueError(f"expected --gamma above 0 with --{given}, found 0")
        if region["roi_variant"] == "L2":
            raise ValueError("expected --gamma above 0 with --roi-variant L2, found 0")
    return settings


def _refuse_without(option: str, others: dict[str, Any]) -> None:
    """Refuses options that do nothing without another one."""
    for name, value in others.items():
        if value is not None:
            given = name.replace("_", "-")
            raise ValueError(f"--{given} needs --{option}")


def refine_image(
    codec: Codec,
    pixels: np.ndarray,
    settings: Settings,
    region: Region | None,
    budget: dict[str, Any],
    name: str,
    progress: Callable[[str], None],
    note: Callable[[str], None],
) -> tuple[bytes, int, bool]:
    """Refine an image, until the end or Ctrl-C.

    Args:
      codec: of the file.
      pixels: uint8 [H, W, 3].
      settings: of the refinement.
      region: what matters in the image.
      budget: `quality`, `bpp`, `max_bytes` and `icc_profile` of `refinement.refine`.
      name: of the image, for people.
      progress: is told what is being done.
      note: is told what people are warned of.

    Returns:
      the file, the number of steps that were made, and whether there was a Ctrl-C.
    """
    from semlic_jax import refinement

    with warnings_are_notes(note), stops_when_asked() as stop:
        progress(f"refining {name}: compiling and first steps")

        def show(now: Progress) -> bool:
            progress(f"refining {name}: {_state(now)}")
            return not stop()

        result = refinement.refine(
            codec,
            pixels,
            settings=settings,
            region=region,
            progress=show,
            **budget,
        )
        return result.data, result.steps, stop()


def region_of(
    options: argparse.Namespace, pixels: np.ndarray, note: Callable[[str], None]
) -> Region | None:
    """The region that `--roi` and its options name in an image; None without them.

    Args:
      options: of the command.
      pixels: uint8 [H, W, 3].
      note: is told what people are warned of.

    Raises:
      ValueError: there is no such region in the image.
    """
    if options.roi is None:
        return None
    from semlic_jax.refinement import Region, parse_region

    with warnings_are_notes(note):
        # What Pillow warns of in the mask; the filters come back after this block.
        warnings.filterwarnings("ignore", module=r"PIL\b")
        mask = parse_region(options.roi, pixels, resize=bool(options.roi_resize))
    weights: dict[str, Any] = {}
    if options.roi_weight is not None:
        weights = dict(foreground=options.roi_weight, background=1 - options.roi_weight)
    if options.roi_variant is not None:
        weights["variant"] = options.roi_variant
    return Region(mask, **weights)


def _state(now: Progress) -> str:
    """Steps as a bar, with the mean rate and loss of the images."""
    return (
        f"{bar(now.step, now.steps)} {now.step}/{now.steps}, {now.bpp.mean():.4f} bpp, "
        f"loss {now.value.mean():.4f}"
    )
