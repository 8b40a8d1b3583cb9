# SPDX-License-Identifier: Apache-2.0
"""`semlic refine`, and what `semlic compress --refine` shares with it."""

from __future__ import annotations

import argparse
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
    background_colour,
    positive_float,
    positive_int,
    preset_or_steps,
    unit_float,
)
from semlic_jax.cli.terminal import (
    INTERRUPTED,
    SKIPPED,
    say,
    stops_when_asked,
    warnings_are_notes,
)
from semlic_jax.terminal import progress_line

if TYPE_CHECKING:
    import numpy as np

    from semlic_jax.codec import Codec
    from semlic_jax.refinement import Progress, Region, Settings

_BAR_WIDTH = 24


def add_refine(commands: Commands) -> None:
    sub = add_command(
        commands, "refine", _refine, "compress a folder of photographs, each refined"
    )
    sub.add_argument("input", metavar="IN_DIR", type=Path, help="images")
    sub.add_argument("output", metavar="OUT_DIR", type=Path, help="goes on where it is")
    add_model(sub)
    sub.add_argument(
        "--bpp", type=positive_float, metavar="B", required=True, help="bits per pixel"
    )
    sub.add_argument(
        "--steps",
        metavar="N",
        type=preset_or_steps,
        default="default",
        help="of the refinement, or a preset: fast, default, best",
    )
    sub.add_argument(
        "--batch",
        metavar="N",
        type=positive_int,
        help="images refined together; default 1 on a CPU, 16 elsewhere",
    )
    add_objective(sub)
    add_background(sub)
    add_force(sub)
    group = sub.add_argument_group("a share of the images, for several processes")
    group.add_argument(
        "--distributed",
        default="none",
        metavar="MODE",
        help="none, auto (TPU pods, SLURM) or explicit (with the three below); none "
        "with the last two needs no connection",
    )
    group.add_argument("--coordinator", default="", metavar="HOST:PORT")
    group.add_argument("--processes", default=0, type=int, metavar="N")
    group.add_argument("--process", default=-1, type=int, metavar="0..N-1")


def _refine(options: argparse.Namespace) -> int:
    from semlic_jax.evaluation.image_sets import list_images

    settings = settings_of(options, options.steps)
    assert settings is not None
    colour = background_colour(options)
    if options.output.exists() and not options.output.is_dir():
        raise ValueError(
            f"expected a folder as OUT_DIR, found the file {options.output}"
        )
    images = list_images([options.input])
    process, processes = _share(options)
    import jax

    from semlic_jax.refinement import FolderProgress, refine_folder

    batch = options.batch or (1 if jax.default_backend() == "cpu" else 16)
    with progress_line() as progress, warnings_are_notes(), stops_when_asked() as stop:
        progress(f"loading the model {options.model}")
        codec = semlic_jax.load(options.model)
        progress(f"refining {len(images)} images: compiling")

        def show(now: FolderProgress) -> bool:
            progress(f"{now.done}/{now.images} images: {_bar(now.batch)}")
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
    return SKIPPED if report.skipped else 0


def _share(options: argparse.Namespace) -> tuple[int, int]:
    """Which process this is, and of how many."""
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
    # They work apart: one that is done early, or dies, is no matter to the others.
    jax.distributed.shutdown()
    return share


def add_refinement(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--refine",
        metavar="N",
        type=preset_or_steps,
        help="steps, or a preset: fast, default, best",
    )
    add_objective(group)


def add_objective(group: argparse._ActionsContainer) -> None:
    """What a refinement minimises; each one as the preset has it where not given."""
    for name, text in (
        ("alpha", "weight of the squared error"),
        ("beta", "weight of the rate to start with"),
        ("gamma", "weight of the perceptual terms; 0 refines for PSNR"),
        ("mean-style", "weight of the strength of textures among the perceptual terms"),
        ("structure", "weight of 1 - MS-SSIM among the perceptual terms"),
        ("lattice", "weight of patterns of the latents' grid among them"),
    ):
        group.add_argument(f"--{name}", metavar="W", type=float, help=text)
    group.add_argument(
        "--method",
        metavar="M",
        help="newton, or of relaxed rounding: sga, ssl, linear, cosine, ssl3, ste, "
        "noise, deterministic",
    )
    group.add_argument(
        "--features", metavar="PATH", help="weights of another feature network"
    )
    group.add_argument("--seed", metavar="N", type=int, help="of the noise; default 0")


def add_region(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--roi", metavar="REGION", help="MASK.png, x,y,width,height or auto"
    )
    group.add_argument(
        "--roi-resize",
        action="store_true",
        default=None,
        help="resize a mask of another size",
    )
    group.add_argument(
        "--roi-weight",
        metavar="W",
        type=unit_float,
        help="share of the foreground in the error; default 0.8",
    )
    group.add_argument(
        "--roi-variant", metavar="V", help="L1: the error alone (default), or L2"
    )


def settings_of(
    options: argparse.Namespace, refine: str | int | None
) -> Settings | None:
    """How to refine; None where that was not asked for."""
    weights = ("alpha", "beta", "gamma", "mean_style", "structure", "lattice")
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
        for name in ("mean_style", "structure", "lattice", "features"):
            if changes[name] is not None:
                given = name.replace("_", "-")
                raise ValueError(f"expected --gamma above 0 with --{given}, found 0")
    return settings


def _refuse_without(option: str, others: dict[str, Any]) -> None:
    """Refuses options that do nothing without another one."""
    for name, value in others.items():
        if value is not None:
            given = name.replace("_", "-")
            raise ValueError(f"expected --{option} with --{given}, found none")


def refine_image(
    codec: Codec,
    pixels: np.ndarray,
    settings: Settings,
    options: argparse.Namespace,
    budget: dict[str, Any],
    progress: Callable[[str], None],
) -> tuple[bytes, int]:
    """The file of a refined image, and how many steps it took."""
    from semlic_jax import refinement

    region = _region(options, pixels)
    with warnings_are_notes(), stops_when_asked() as stop:
        progress(f"refining {options.input.name}: compiling")

        def show(now: Progress) -> bool:
            progress(f"refining {options.input.name}: {_bar(now)}")
            return not stop()

        result = refinement.refine(
            codec,
            pixels,
            settings=settings,
            region=region,
            progress=show,
            **budget,
        )
    return result.data, result.steps


def _region(options: argparse.Namespace, pixels: np.ndarray) -> Region | None:
    if options.roi is None:
        return None
    from semlic_jax.refinement import Region, parse_region

    mask = parse_region(options.roi, pixels, resize=bool(options.roi_resize))
    weights: dict[str, Any] = {}
    if options.roi_weight is not None:
        weights = dict(foreground=options.roi_weight, background=1 - options.roi_weight)
    if options.roi_variant is not None:
        weights["variant"] = options.roi_variant
    return Region(mask, **weights)


def _bar(now: Progress) -> str:
    """Steps as a bar, with the mean rate and loss of the images."""
    filled = _BAR_WIDTH * now.step // now.steps
    bar = "#" * filled + "." * (_BAR_WIDTH - filled)
    return (
        f"[{bar}] {now.step}/{now.steps}, {now.bpp.mean():.4f} bpp, "
        f"loss {now.value.mean():.4f}"
    )
