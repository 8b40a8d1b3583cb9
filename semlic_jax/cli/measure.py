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
    check_not_input,
    names,
    positive_float,
    positive_int,
    rates,
    read_input,
    unit_float,
)
from semlic_jax.cli.terminal import SKIPPED, say
from semlic_jax.terminal import progress_line


def add_demo(commands: Commands) -> None:
    sub = add_command(
        commands, "demo", _demo, "compare one photograph with JPEG, WebP and AVIF"
    )
    sub.add_argument("input", metavar="IMAGE", type=Path, nargs="?")
    sub.add_argument(
        "--out", metavar="DIR", type=Path, default=Path("demo"), help="default demo"
    )
    sub.add_argument("--bpp", type=positive_float, default=0.15, help="default 0.15")
    add_model(sub)
    add_background(sub)
    add_force(sub)


def _demo(options: argparse.Namespace) -> None:
    from semlic_jax.evaluation import demo
    from semlic_jax.images import check_outputs

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
    print(f"the file          {outputs.file}")
    print(f"decoded from it   {outputs.decoded}")
    print(f"side by side      {outputs.comparison}")


def add_bench(commands: Commands) -> None:
    sub = add_command(
        commands, "bench", _bench, "measure speed beside JPEG, WebP and AVIF"
    )
    sub.add_argument("input", metavar="IMAGE", type=Path, nargs="?")
    sub.add_argument("--quality", type=unit_float, default=0.5, help="default 0.5")
    sub.add_argument("--repeats", type=positive_int, default=5, help="default 5")
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
    sub.add_argument("inputs", metavar="IMAGES", type=Path, nargs="+")
    sub.add_argument(
        "--codecs",
        metavar="C,...",
        type=names,
        default=["semlic", "avif", "webp", "jpeg"],
        help="semlic, semlic:MODEL, semlic+refine:PRESET, avif, webp, jxl, jpeg, "
        "jpeg2000; default semlic,avif,webp,jpeg",
    )
    sub.add_argument(
        "--bpp",
        metavar="B,...",
        type=rates,
        default=[0.1, 0.15, 0.2, 0.3, 0.45],
        help="default 0.1,0.15,0.2,0.3,0.45",
    )
    sub.add_argument(
        "--metrics", metavar="M,...", type=names, help="default: what is here"
    )
    sub.add_argument(
        "--out", metavar="DIR", type=Path, default=Path("eval"), help="default eval"
    )
    add_model(sub)
    sub.add_argument(
        "--anchor",
        metavar="C",
        help="codec that BD-rates are against; default avif, else the first of others",
    )
    sub.add_argument("--weights", metavar="DIR", type=Path, help="of feature networks")
    sub.add_argument(
        "--patch", metavar="N", type=positive_int, default=256, help="default 256"
    )
    sub.add_argument(
        "--published", metavar="SET", help="draw published curves; kodak is recognised"
    )
    sub.add_argument(
        "--jobs",
        metavar="N",
        type=positive_int,
        help="threads that encode; 1 for exact timings",
    )
    sub.add_argument(
        "--remeasure", action="store_true", help="take all metrics anew from the files"
    )
    add_background(sub)


def _eval(options: argparse.Namespace) -> int:
    from semlic_jax.evaluation import evaluate, tables

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
    skipped = report.summary.results.skipped
    for each in skipped:
        say(f"skipped {each.name}: {each.reason}")
    return SKIPPED if skipped else 0


def add_compare(commands: Commands) -> None:
    sub = add_command(
        commands, "compare", _compare, "show one photograph by several codecs in a page"
    )
    sub.add_argument("input", metavar="IMAGE", type=Path)
    sub.add_argument("--bpp", type=positive_float, default=0.15, help="default 0.15")
    sub.add_argument("--out", metavar="PAGE", type=Path, help="default IMAGE.html")
    sub.add_argument(
        "--codecs",
        metavar="C,...",
        type=names,
        default=["semlic", "avif", "webp", "jpeg"],
        help="as in eval; the others get the bytes of the first one's file",
    )
    sub.add_argument(
        "--metrics", metavar="M,...", type=names, help="default: what is here"
    )
    sub.add_argument("--weights", metavar="DIR", type=Path, help="of feature networks")
    add_model(sub)
    add_background(sub)
    add_force(sub)


def _compare(options: argparse.Namespace) -> None:
    from semlic_jax.evaluation import compare
    from semlic_jax.evaluation.entrants import entrants
    from semlic_jax.evaluation.measures import Measures, default_metrics
    from semlic_jax.images import check_outputs, write_file
    from semlic_jax.objectives.metrics import IMAGE_METRICS

    output = options.out or options.input.with_suffix(".html")
    photograph = read_input(options)
    check_not_input(options, output)
    check_outputs([output], force=options.force)
    metrics = options.metrics
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
    # A name that is no UTF-8 is shown with question marks: the page is all UTF-8.
    write_file(output, page.encode(errors="replace"), force=options.force)
    print(compare.table(shown, measures))
    print()
    print(output)
