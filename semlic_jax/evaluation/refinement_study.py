# SPDX-License-Identifier: Apache-2.0
"""What refinement gains, image by image, each study one command.

    python -m semlic_jax.evaluation.refinement_study gain IMAGES --gamma 0
    python -m semlic_jax.evaluation.refinement_study settings IMAGES --try best,noise=0

`gain` compresses every image to every rate with and without refinement, in real bytes:
BD-rates per image under the objective that is refined for, under PSNR and under feature
distances, images that came out worse, and how much of each budget is used. With
`--gamma 0` it is the study of PSNR, without it that of the eye. `settings` tries
the presets and other settings, one with each `--try`, on crops, to choose the presets:
the bits that a file without refinement takes for the same objective, less those of the
refined one.

Both go on where they stopped and write CSV, Markdown and a plot into `--out`.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import semlic_jax
from semlic_jax.evaluation.entrants import (
    Entrant,
    RefinedEntrant,
    SemlicEntrant,
)
from semlic_jax.evaluation.image_sets import list_images
from semlic_jax.evaluation.measures import Measures
from semlic_jax.evaluation.plots import new_figure, require_matplotlib, write_figure
from semlic_jax.evaluation.results import MetricFacts, Results, Row, Skipped
from semlic_jax.evaluation.settings_study import (
    USUAL_TRIES,
    parse_try,
    settings_study,
)
from semlic_jax.evaluation.studies import (
    Progress,
    csv_table,
    run_study,
)
from semlic_jax.evaluation.sweep import run_sweep
from semlic_jax.evaluation.tables import table
from semlic_jax.images import write_file
from semlic_jax.objectives.bd_rates import LEAST_POINTS, RateCurve, bd_rate
from semlic_jax.option_kinds import numbers, positive_int, preset_or_steps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from semlic_jax.refinement import Settings

_PLAIN, _REFINED = "semlic", "refined"
_WEIGHTS = ("alpha", "gamma", "mean_style", "structure", "lattice", "mesh")
_OBJECTIVE = "objective_db"
_RATES = (0.1, 0.15, 0.25, 0.4)


@dataclass(frozen=True)
class ImageGain:
    """One image under one metric.

    Attributes:
      image, metric: names.
      bd_rate: percent of bits at equal metric, negative where refinement saves; None
        with a `gap`.
      worse: rates at which the refined file is worse than the other.
      gap: why there is no number.
    """

    image: str
    metric: str
    bd_rate: float | None
    worse: tuple[float, ...]
    gap: str = ""


def gain(
    images: Sequence[Path],
    out: Path,
    *,
    model: str,
    settings: Settings,
    rates: Sequence[float] = _RATES,
    weights: str | Path | None = None,
    key: str = _REFINED,
    progress: Progress = lambda text: None,
    skipped: list[Skipped] | None = None,
) -> list[Path]:
    """Files with and without refinement at equal rates.

    Args:
      images: files and folders.
      out: folder, new or of an earlier run of this study.
      model: name or path.
      settings: of the refinement.
      rates: bits per pixel; BD-rates need four.
      weights: folder of feature weights for SqueezeNet's feature distance; None: the
        environment's SEMLIC_FEATURES, or none.
      key: of the refined files in the cache of `out`. With the name that `semlic eval`
        gives a preset, files that it has made there are not made again.
      progress: is told what is being done.
      skipped: images that are left out are appended to it.

    Returns:
      the tables and the plot.
    """
    require_matplotlib()
    progress(f"loading the model {model}")
    codec = semlic_jax.load(model)
    metrics = ["psnr_db"]
    if settings.gamma and settings.features is None:
        metrics += ["ms_ssim", "compact_distance"]
        metrics += ["compact_mean_style"] if settings.mean_style else []
        metrics += [name for name in ("lattice", "mesh") if getattr(settings, name)]
    if weights is not None or os.environ.get("SEMLIC_FEATURES"):
        metrics.append("feature_distance")
    contestants: list[Entrant] = [
        SemlicEntrant(_PLAIN, codec),
        RefinedEntrant(key, codec, settings),
    ]
    results = run_sweep(
        list_images(images),
        contestants,
        rates,
        Measures(metrics, weights),
        out,
        jobs=1,  # each refinement takes all cores
        progress=progress,
    )
    if skipped is not None:
        skipped += results.skipped
    renamed = tuple(
        replace(row, codec=_REFINED) if row.codec == key else row
        for row in results.rows
    )
    results = with_objective(replace(results, rows=renamed), settings)
    gains = [
        image_gain(results, image.name, metric)
        for metric in results.image_metrics
        for image in results.images
    ]
    paths = [out / "gain.csv", out / "gain.md"]
    rows = [
        (g.image, g.metric, "" if g.bd_rate is None else f"{g.bd_rate:.3f}")
        + (" ".join(f"{rate:g}" for rate in g.worse), g.gap)
        for g in gains
    ]
    header = ("image", "metric", "bd_rate_percent", "worse_at_bpp", "gap")
    write_file(paths[0], csv_table(header, rows), force=True)
    write_file(paths[1], _gain_text(results, gains, settings).encode(), force=True)
    return paths + write_figure(_draw_gain(results, gains), out / "gain")


def with_objective(results: Results, settings: Settings) -> Results:
    """Adds `objective_db`: what the files were refined for, on the scale of PSNR.

    It is -10 log10 of

        alpha * D + gamma * (P + t * MeanStyle + s * (1 - MS-SSIM) + l * Lattice
            + m * Mesh)

    and differs from PSNR by a constant where gamma is 0. Refinement takes a sum of
    squares for 1 - MS-SSIM. It is left out where P is not of the packaged feature
    network, or where there is a style term of Gram matrices, which no metric measures.
    """
    perceptual = bool(settings.gamma)
    if perceptual and (settings.features is not None or settings.style):
        return results

    needed = {"psnr_db"}
    if perceptual:
        needed |= {"compact_distance"}
        needed |= {"ms_ssim"} if settings.structure else set()
        needed |= {"compact_mean_style"} if settings.mean_style else set()
        needed |= {name for name in ("lattice", "mesh") if getattr(settings, name)}

    def with_value(row: Row) -> Row:
        if not needed <= set(row.values):
            return row
        value = settings.alpha * 255**2 * 10 ** (-row.values["psnr_db"] / 10)
        if perceptual:
            distance = row.values["compact_distance"]
            if settings.structure:
                distance += settings.structure * (1 - row.values["ms_ssim"])
            if settings.mean_style:
                distance += settings.mean_style * row.values["compact_mean_style"]
            for name in ("lattice", "mesh"):
                if getattr(settings, name):
                    distance += getattr(settings, name) * row.values[name]
            value += settings.gamma * distance
        objective = {_OBJECTIVE: -10 * math.log10(max(value, 1e-9))}
        return replace(row, values=row.values | objective)

    facts = {_OBJECTIVE: MetricFacts("objective (dB)", True)}
    return replace(
        results,
        image_metrics=facts | results.image_metrics,
        rows=tuple(with_value(row) for row in results.rows),
    )


def image_gain(results: Results, image: str, metric: str) -> ImageGain:
    """BD-rate of one image's refined files against the others."""
    rows = {
        (row.codec, row.target_bpp): row
        for row in results.rows
        if row.image == image and row.bpp is not None and metric in row.values
    }
    both = [
        rate
        for rate in results.targets()
        if (_PLAIN, rate) in rows and (_REFINED, rate) in rows
    ]
    up = results.image_metrics[metric].higher_is_better

    def value(codec: str, rate: float) -> float:
        return rows[codec, rate].values[metric]

    worse = tuple(
        rate
        for rate in both
        if (value(_REFINED, rate) - value(_PLAIN, rate)) * (1 if up else -1) < 0
    )

    def curve(codec: str) -> RateCurve:
        return RateCurve(
            bpp=[_bpp(rows[codec, rate]) for rate in both],
            values=[value(codec, rate) for rate in both],
            metric=metric,
            name=codec,
        )

    try:
        percent = bd_rate(curve(_PLAIN), curve(_REFINED))
    except ValueError as error:
        return ImageGain(image, metric, None, worse, " ".join(str(error).split()))
    return ImageGain(image, metric, percent, worse)


def _bpp(row: Row) -> float:
    assert row.bpp is not None
    return row.bpp


def budget_use(results: Results, rate: float) -> tuple[int, int, float]:
    """Files at a rate, how many of them are over it, and the mean share that is used.

    The share is of the bytes of the budget that a whole file can take.
    """
    sizes = {image.name: image.width * image.height for image in results.images}
    uses = []
    for row in results.rows:
        if row.codec == _REFINED and row.target_bpp == rate and row.file_bytes:
            budget = semlic_jax.Codec.budget_bytes(rate, (1, sizes[row.image]))
            uses.append(row.file_bytes / budget)
    over = sum(use > 1 for use in uses)
    return len(uses), over, float(np.mean(uses)) if uses else float("nan")


def _gain_text(results: Results, gains: Sequence[ImageGain], settings: Settings) -> str:
    shown_weights = _WEIGHTS if settings.gamma else ("alpha", "gamma")
    weights = ", ".join(f"{name} {getattr(settings, name):g}" for name in shown_weights)
    lines = [
        f"Refinement of {len(results.images)} images: {settings.steps} steps of "
        f"`{settings.method}`, {weights}. "
        "Bits at equal metric against the same model without refinement (BD-rate per "
        "image, negative: fewer bits), real files.",
        "",
    ]
    metrics = list(results.image_metrics)
    shown: list[list[str]] = []
    for image in results.images:
        own = {g.metric: g for g in gains if g.image == image.name}
        shown.append([image.name, *(_percent(own[m].bd_rate) for m in metrics)])
    for name, of in (("mean", np.mean), ("median", np.median), ("worst", np.max)):
        cells = []
        for metric in metrics:
            found = [g.bd_rate for g in gains if g.metric == metric]
            known = [percent for percent in found if percent is not None]
            cells.append(_percent(float(of(known)) if known else None))
        shown.append([name, *cells])
    lines += table(["image", *metrics], shown)
    lines += ["", "Files worse than without refinement:", ""]
    for metric in metrics:
        worse = [
            (g.image, rate) for g in gains if g.metric == metric for rate in g.worse
        ]
        names = ", ".join(f"{image} at {rate:g}" for image, rate in worse)
        lines.append(f"* {metric}: {len(worse)}{': ' if worse else ''}{names}")
    lines += ["", "Budgets:", ""]
    uses = []
    for rate in results.targets():
        files, over, mean = budget_use(results, rate)
        uses.append([f"{rate:g} bpp", str(files), str(over), f"{100 * mean:.2f} %"])
    lines += table(["budget", "files", "over", "mean use"], uses)
    times = [
        (row.encode_s or 0.0) / settings.steps
        for row in results.rows
        if row.codec == _REFINED and row.encode_s
    ]
    if times:
        lines += ["", f"Median time of a step, all included: {np.median(times):.3f} s."]
    gaps = {g.gap for g in gains if g.gap}
    lines += [f"* {gap}" for gap in sorted(gaps)]
    return "\n".join(lines) + "\n"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f} %"


def _draw_gain(results: Results, gains: Sequence[ImageGain]) -> Figure:
    """Rate against each metric, with and without; below, BD-rates of the images."""
    metrics = list(results.image_metrics)
    figure = new_figure(figsize=(5.2 * len(metrics), 7.4), layout="constrained")
    styles = {
        _PLAIN: ("#56B4E9", "s", "without"),
        _REFINED: ("#D55E00", "o", "refined"),
    }
    for at, metric in enumerate(metrics):
        axes = figure.add_subplot(2, len(metrics), at + 1)
        for codec, (colour, marker, label) in styles.items():
            points = [
                np.mean(
                    [
                        (_bpp(row), row.values[metric])
                        for row in results.rows
                        if row.codec == codec
                        and row.target_bpp == rate
                        and metric in row.values
                    ]
                    or [(np.nan, np.nan)],
                    axis=0,
                )
                for rate in results.targets()
            ]
            bpp, values = np.transpose(points)
            axes.plot(bpp, values, color=colour, marker=marker, label=label)
        axes.set_xlabel("bits per pixel of the whole file")
        axes.set_ylabel(results.metrics[metric].label)
        axes.grid(color="#E4E4E4")
        axes.legend(frameon=False)
        axes = figure.add_subplot(2, len(metrics), len(metrics) + at + 1)
        found = sorted(
            g.bd_rate for g in gains if g.metric == metric and g.bd_rate is not None
        )
        axes.bar(range(len(found)), found, color="#D55E00")
        axes.set_xlabel("images, in order")
        axes.set_ylabel("BD-rate (%), lower is better")
        axes.grid(axis="y", color="#E4E4E4")
    return figure


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m semlic_jax.evaluation.refinement_study",
        description="Measure what refinement gains, image by image.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        (
            "gain",
            "BD-rates, use of budgets and files that get worse, over images and rates",
        ),
        ("settings", "presets and other settings, on crops"),
    ):
        sub = commands.add_parser(name, help=text, allow_abbrev=False)
        sub.add_argument("images", type=Path, nargs="+")
        sub.add_argument("--out", type=Path, default=Path(f"refinement_{name}"))
        sub.add_argument("--model", default="small")
        for weight in _WEIGHTS:
            sub.add_argument("--" + weight.replace("_", "-"), type=float)
        sub.add_argument("--weights", type=Path, help="folder of feature weights")
        if name == "gain":
            sub.add_argument("--refine", type=preset_or_steps, default="default")
            sub.add_argument("--bpp", type=numbers, default=list(_RATES))
            sub.add_argument("--method")
            continue
        sub.add_argument("--bpp", type=numbers, default=[0.2])
        sub.add_argument("--crop", type=positive_int, default=256)
        sub.add_argument(
            "--try",
            dest="tries",
            action="append",
            metavar="SETTINGS",
            help="settings to try: KEY=VALUE[,KEY=VALUE...], or a preset (fast, "
            "default or best) with such changes; repeatable (default: "
            f"{'; '.join(USUAL_TRIES)})",
        )
    return parser


def _run(
    options: argparse.Namespace, skipped: list[Skipped], progress: Progress
) -> list[Path]:
    from semlic_jax import refinement

    changes = {name: getattr(options, name) for name in _WEIGHTS}
    if options.command == "gain":
        changes["method"] = options.method
        key = _REFINED
        if isinstance(options.refine, str) and not any(
            change is not None for change in changes.values()
        ):
            key = f"{_PLAIN}+refine:{options.refine}"
        if len(options.bpp) < LEAST_POINTS:
            print(
                f"note: BD-rates need at least {LEAST_POINTS} rates, found "
                f"{len(options.bpp)}",
                file=sys.stderr,
            )
        return gain(
            options.images,
            options.out,
            model=options.model,
            settings=refinement.preset(options.refine, **changes),
            key=key,
            rates=options.bpp,
            weights=options.weights,
            progress=progress,
            skipped=skipped,
        )
    features = None if options.weights is None else os.fspath(options.weights)
    tries = options.tries or USUAL_TRIES
    return settings_study(
        options.images,
        options.out,
        model=options.model,
        tries={text: parse_try(text, features=features, **changes) for text in tries},
        crop=options.crop,
        bpp=options.bpp,
        progress=progress,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one study; returns the exit status, see `run_study`."""
    options = _parser().parse_args(argv)
    skipped: list[Skipped] = []
    work = partial(_run, options, skipped)
    tables = ["gain.md", "settings.md"]
    return run_study("refinement_study", work, shown=tables, skipped=skipped)


if __name__ == "__main__":
    sys.exit(main())
