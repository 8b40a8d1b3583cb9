# SPDX-License-Identifier: Apache-2.0
"""`semlic demo | bench | eval | compare`: beside other codecs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import semlic_jax
from semlic_jax.cli.options import (
    Commands,
    add_background,
    add_command,
    add_force,
    add_json,
    add_model,
    background_colour,
    check_not_inputs,
    note_folders_left_out,
    read_input,
)
from semlic_jax.cli.terminal import SKIPPED, say
from semlic_jax.option_kinds import (
    names,
    positive_float,
    positive_int,
    rates,
    some_names,
    unit_float,
)
from semlic_jax.terminal import progress_line

_CODECS = ["semlic", "avif", "webp", "jpeg"]
_CODECS_HELP = (
    "semlic, semlic:MODEL, semlic+refine:PRESET, avif, avif-slow, webp, jxl, jpeg or "
    f"jpeg2000; default {','.join(_CODECS)}"
)
_IMAGE_METRICS_HELP = (
    "psnr_db, ms_ssim, ssimulacra2, compact_distance, compact_mean_style, lattice, "
    "spectrum, mesh, with --weights also feature_distance, lpips_alex, lpips_vgg, "
    "lpips_squeeze, dists, mobilenet_distance"
)
_SET_METRICS_HELP = (
    "compact_frechet, compact_kernel, with --weights also frechet, kernel, "
    "mobilenet_frechet, mobilenet_kernel, mobilenet_last_frechet, "
    "mobilenet_last_kernel, fid, kid"
)
_METRICS_DEFAULT = (
    "default: psnr_db, ms_ssim, ssimulacra2 and compact_distance, or feature_distance "
    "with --weights"
)


def _add_sample(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "input",
        metavar="IMAGE",
        type=Path,
        nargs="?",
        help="an image file; default: the packaged photograph",
    )


def _add_weights(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--weights",
        metavar="DIR",
        type=Path,
        help="folder of feature network weights, made by `semlic convert features`; "
        "default: the folder that SEMLIC_FEATURES names, else the packaged network",
    )


def add_demo(commands: Commands) -> None:
    sub = add_command(
        commands,
        "demo",
        _demo,
        "compress one photograph and compare it with JPEG, WebP and AVIF",
    )
    _add_sample(sub)
    sub.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("demo"),
        help="output folder, created if missing; default demo",
    )
    sub.add_argument(
        "--bpp",
        metavar="BPP",
        type=positive_float,
        default=0.15,
        help="upper limit on the bits per pixel of the files; default 0.15",
    )
    add_model(sub)
    add_background(sub)
    add_force(sub)


def _demo(options: argparse.Namespace) -> None:
    from semlic_jax.evaluation import demo
    from semlic_jax.images import check_folder, check_outputs

    check_folder(options.out, "as --out")
    if options.input is None:
        photograph, stem = demo.packaged_photograph(), "photograph"
    else:
        photograph, stem = read_input(options), options.input.stem
    outputs = demo.Outputs.of(options.out, stem)
    if options.out.exists():
        check_outputs(outputs.paths(), force=options.force)
    with progress_line() as progress:
        progress(f"loading the model {options.model}")
        codec = semlic_jax.load(options.model)
        outputs, candidates = demo.run_demo(
            codec,
            photograph,
            stem,
            options.out,
            bpp=options.bpp,
            force=options.force,
            progress=progress,
            note=lambda text: say(f"note: {text}"),
        )
    print(demo.table(candidates))
    print()
    print(f"compressed file   {outputs.file}")
    print(f"decoded image     {outputs.decoded}")
    print(f"side by side      {outputs.comparison}")


def add_bench(commands: Commands) -> None:
    sub = add_command(
        commands, "bench", _bench, "measure speed, also of JPEG, WebP and AVIF"
    )
    _add_sample(sub)
    sub.add_argument(
        "--quality",
        metavar="Q",
        type=unit_float,
        default=0.5,
        help="quality of the semlic file, from 0 to 1; default 0.5",
    )
    sub.add_argument(
        "--repeats",
        metavar="N",
        type=positive_int,
        default=5,
        help="calls per measurement, of which the median is shown; default 5",
    )
    add_model(sub)
    add_background(sub)
    add_json(sub)


def _bench(options: argparse.Namespace) -> None:
    from semlic_jax.evaluation import benchmark

    if options.input is None:
        pixels = benchmark.packaged_pixels()
    else:
        pixels = read_input(options).pixels
    with progress_line() as progress:
        progress(f"loading the model {options.model}")
        codec = semlic_jax.load(options.model)
        report = benchmark.run_benchmark(
            codec,
            pixels,
            model=options.model,
            quality=options.quality,
            repeats=options.repeats,
            progress=progress,
        )
    print(json.dumps(report.facts(), indent=2) if options.json else report.table())


def add_eval(commands: Commands) -> None:
    sub = add_command(
        commands, "eval", _eval, "compare codecs over many images, rates and metrics"
    )
    sub.add_argument(
        "inputs",
        metavar="IMAGES",
        type=Path,
        nargs="+",
        help="image files and folders of image files; subfolders are not searched",
    )
    sub.add_argument(
        "--codecs",
        metavar="CODEC,...",
        type=names,
        default=_CODECS,
        help=_CODECS_HELP,
    )
    sub.add_argument(
        "--bpp",
        metavar="BPP,...",
        type=rates,
        default=[0.1, 0.15, 0.2, 0.3, 0.45],
        help="upper limits on the bits per pixel of the files; default "
        "0.1,0.15,0.2,0.3,0.45",
    )
    sub.add_argument(
        "--metrics",
        metavar="METRIC,...",
        type=some_names,
        help=f"of each image: {_IMAGE_METRICS_HELP}; over patches of all images: "
        f"{_SET_METRICS_HELP}; {_METRICS_DEFAULT}, and the patch distances of the same "
        "network",
    )
    sub.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("eval"),
        help="output folder, created if missing; an interrupted run resumes; for "
        "people: DIR/summary.md, for programs: DIR/summary.json; default eval",
    )
    add_model(sub)
    sub.add_argument(
        "--anchor",
        metavar="CODEC",
        help="codec that BD-rates are relative to; default: avif, else the first "
        "codec other than semlic",
    )
    _add_weights(sub)
    sub.add_argument(
        "--patch",
        metavar="N",
        type=positive_int,
        default=256,
        help="side in pixels of the patches for metrics over all images; default 256",
    )
    sub.add_argument(
        "--published",
        metavar="SET",
        help="image set whose published curves are drawn: kodak, clic2020 or div2k; "
        "default: kodak if the images are that set",
    )
    sub.add_argument(
        "--jobs",
        metavar="N",
        type=positive_int,
        help="encoding threads; 1 for exact timings; default: one per core",
    )
    sub.add_argument(
        "--remeasure",
        action="store_true",
        help="measure all metrics again; default: only those that are missing",
    )
    add_background(sub)


def _eval(options: argparse.Namespace) -> int:
    from semlic_jax.evaluation import evaluate, tables

    note_folders_left_out(options.inputs, options.out)
    with progress_line() as progress:
        report = evaluate.evaluate(
            options.inputs,
            options.codecs,
            options.bpp,
            options.out,
            metrics=options.metrics,
            model=options.model,
            anchor=options.anchor,
            weights=options.weights,
            patch_side=options.patch,
            image_set=options.published,
            jobs=options.jobs or 0,
            background=background_colour(options),
            remeasure=options.remeasure,
            progress=progress,
        )
    print(tables.markdown(report.summary))
    print()
    for path in report.paths:
        print(path)
    if report.replaced:
        say(f"note: {report.replaced}: give each evaluation a folder of its own")
    skipped = report.summary.results.skipped
    for each in skipped:
        say(f"skipped {each.name}: {each.reason}")
    return SKIPPED if skipped else 0


def add_compare(commands: Commands) -> None:
    sub = add_command(
        commands,
        "compare",
        _compare,
        "show one photograph in several codecs on an HTML page",
    )
    sub.add_argument("input", metavar="IMAGE", type=Path, help="an image file")
    sub.add_argument(
        "--bpp",
        metavar="BPP",
        type=positive_float,
        default=0.15,
        help="upper limit on the bits per pixel of the first codec's file; default "
        "0.15",
    )
    sub.add_argument(
        "--out",
        metavar="PAGE",
        type=Path,
        help="HTML page to write; default: IMAGE with the suffix .html",
    )
    sub.add_argument(
        "--codecs",
        metavar="CODEC,...",
        type=names,
        default=_CODECS,
        help=f"codecs to show, at the size of the first one's file: {_CODECS_HELP}",
    )
    sub.add_argument(
        "--metrics",
        metavar="METRIC,...",
        type=some_names,
        help=f"{_IMAGE_METRICS_HELP}; {_METRICS_DEFAULT}",
    )
    _add_weights(sub)
    add_model(sub)
    add_background(sub)
    add_force(sub)


def _compare(options: argparse.Namespace) -> None:
    from semlic_jax.evaluation import compare
    from semlic_jax.evaluation.entrants import entrants
    from semlic_jax.evaluation.measures import (
        SET_METRICS,
        Measures,
        default_metrics,
    )
    from semlic_jax.images import check_outputs, write_file
    from semlic_jax.objectives.metrics import IMAGE_METRICS

    output = options.out or options.input.with_suffix(".html")
    check_not_inputs([options.input], [output])
    a_file = output.is_file() or not output.exists()  # and no pipe or device
    if a_file and output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"expected an output named .html or .htm, found {output}")
    metrics = options.metrics
    of_sets = [name for name in metrics or () if name in SET_METRICS]
    if of_sets:
        raise ValueError(f"{of_sets[0]} is measured over many images: use semlic eval")
    photograph = read_input(options)
    check_outputs([output], force=options.force)
    if metrics is None:
        found, notes = default_metrics(options.weights)
        metrics = [name for name in found if name in IMAGE_METRICS]
        for note in notes:
            say(f"note: {note}")
    with progress_line() as progress:
        progress("loading codecs and metrics")
        contestants = entrants(options.codecs, model=options.model)
        measures = Measures(metrics, options.weights)
        shown = compare.compare(
            photograph.pixels, contestants, options.bpp, measures, progress=progress
        )
        progress("writing the page")
        page = compare.page(
            options.input.name,
            photograph.pixels,
            shown,
            measures,
            icc_profile=photograph.icc_profile,
        )
    for each in shown:
        if each.note:
            say(f"note: {each.label}: {each.note}")
    # A name that is no UTF-8 is shown with question marks: the page is all UTF-8.
    write_file(output, page.encode(errors="replace"), force=options.force)
    print(compare.table(shown, measures))
    print()
    print(output)
