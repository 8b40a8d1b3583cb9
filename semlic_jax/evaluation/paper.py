# SPDX-License-Identifier: Apache-2.0
"""The tables and figures of the paper (arXiv:2401.14007), each one command.

    python -m semlic_jax.evaluation.paper rd IMAGES --models small
    python -m semlic_jax.evaluation.paper ablation IMAGES --models full.npz other.npz
    python -m semlic_jax.evaluation.paper figure5 IMAGES --refine default
    python -m semlic_jax.evaluation.paper figure6 IMAGE --region auto

`rd` is the main figure: rate against FID, KID and DISTS. `ablation` is the table of the
loss's terms: BD-rates of models against the first. `figure5` refines with several
weights of the distortion (alpha) and of the perceptual terms (gamma) and draws PSNR
against the Fréchet distance. `figure6` refines with a region of interest, by both
variants of the loss and several weights of the foreground.

All run on any images; the paper's set is CLIC 2024's validation images. Where the
weights of FID, KID and DISTS are not there, distances of SqueezeNet take their place,
or of the packaged trunk where no weights are given at all.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import semlic_jax
from semlic_jax.evaluation.entrants import (
    Entrant,
    RefinedEntrant,
    SemlicEntrant,
    entrants,
)
from semlic_jax.evaluation.evaluate import Report, evaluate
from semlic_jax.evaluation.image_sets import list_images
from semlic_jax.evaluation.measures import PATCH_SIDE, Measures, feature_metrics
from semlic_jax.evaluation.plots import new_figure, require_matplotlib, write_figure
from semlic_jax.evaluation.region_figure import FOREGROUNDS, figure6
from semlic_jax.evaluation.results import Results, Skipped
from semlic_jax.evaluation.studies import (
    Progress,
    run_study,
)
from semlic_jax.evaluation.summary import curve
from semlic_jax.evaluation.sweep import run_sweep
from semlic_jax.evaluation.tables import bd_table
from semlic_jax.images import write_file
from semlic_jax.option_kinds import numbers, positive_int, preset_or_steps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from semlic_jax.refinement import Settings

_PAPER_METRICS = ("fid", "kid", "dists")
_RIVALS = ("avif", "webp", "jpeg")
_RATES = (0.1, 0.15, 0.2, 0.3, 0.45)
# Of figure 5, as factors of the preset's weights.
_FACTORS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)


def paper_metrics(weights: str | Path | None) -> tuple[str, ...]:
    """FID, KID and DISTS where their weights are, else distances of what there is."""
    try:
        Measures(_PAPER_METRICS, weights)
    except ValueError:
        distance, *of_sets = feature_metrics(weights)
        return *of_sets, distance
    return _PAPER_METRICS


def rd(
    images: Sequence[Path],
    models: Sequence[str],
    out: Path,
    *,
    rivals: Sequence[str] = _RIVALS,
    rates: Sequence[float] = _RATES,
    refine: str | None = None,
    weights: str | Path | None = None,
    patch_side: int = PATCH_SIDE,
    progress: Progress = lambda text: None,
) -> Report:
    """The main figure: rate against FID, KID and DISTS, and PSNR beside them.

    Args:
      images: files and folders.
      models: names and paths.
      out: folder of the evaluation.
      rivals: classical codecs.
      rates: bits per pixel.
      refine: preset; each model is shown with refinement too.
      weights: folder of feature weights; None: the environment's SEMLIC_FEATURES.
      patch_side: of the patches of FID and KID.
      progress: is told what is being done.
    """
    codecs = [f"semlic:{model}" for model in models]
    if refine is not None:
        codecs += [f"semlic:{model}+refine:{refine}" for model in models]
    return evaluate(
        images,
        [*codecs, *rivals],
        rates,
        out,
        metrics=[*paper_metrics(weights), "psnr_db"],
        weights=weights,
        patch_side=patch_side,
        progress=progress,
    )


def ablation(
    images: Sequence[Path],
    models: Sequence[str],
    out: Path,
    *,
    rates: Sequence[float] = _RATES,
    weights: str | Path | None = None,
    patch_side: int = PATCH_SIDE,
    progress: Progress = lambda text: None,
    skipped: list[Skipped] | None = None,
) -> Path:
    """The table of ablations: bits against the first model at equal metric.

    Args: see `rd`; images that are left out are appended to `skipped`.

    Returns:
      the table, in Markdown.

    Raises:
      ValueError: fewer than two models.
    """
    if len(models) < 2:
        raise ValueError(f"an ablation needs at least two models, found {len(models)}")
    names = [f"semlic:{Path(model).stem}" for model in models]
    report = evaluate(
        images,
        [f"semlic:{model}" for model in models],
        rates,
        out,
        metrics=[*paper_metrics(weights), "psnr_db"],
        anchor=names[0],
        weights=weights,
        patch_side=patch_side,
        progress=progress,
    )

    def title(codec: str) -> str:
        return codec.removeprefix("semlic:").replace("_", " ")

    count = len(report.summary.results.images)
    lines = [
        f"Bits against *{title(names[0])}* at equal metric (BD-rate, positive: more "
        f"bits), {count} images; in brackets the 95 % interval over images.",
        "",
        *bd_table(
            report.summary, report.summary.bd_rates, lambda found: title(found.codec)
        ),
    ]
    if skipped is not None:
        skipped += report.summary.results.skipped
    path = out / "ablation.md"
    write_file(path, ("\n".join(lines) + "\n").encode(), force=True)
    return path


def figure5(
    images: Sequence[Path],
    model: str,
    out: Path,
    *,
    bpp: float = 0.15,
    refine: str | int = "default",
    factors: Sequence[float] = _FACTORS,
    weights: str | Path | None = None,
    patch_side: int = PATCH_SIDE,
    progress: Progress = lambda text: None,
    skipped: list[Skipped] | None = None,
) -> list[Path]:
    """Refinement with several weights: PSNR against the Fréchet distance.

    Args:
      images, out, patch_side, progress: see `rd`.
      weights: see `rd`; where given, of the network that is refined for, too.
      model: name or path.
      bpp: rate of all files.
      refine: preset or steps, whose weights are varied.
      factors: of alpha with gamma as it is, and of gamma with alpha as it is.
      skipped: images that are left out are appended to it.

    Returns:
      the plot as PNG and SVG, and its numbers.
    """
    from semlic_jax import refinement

    require_matplotlib()
    progress(f"loading the model {model}")
    codec = semlic_jax.load(model)
    settings = refinement.preset(refine)
    if weights is not None:
        settings = replace(settings, features=os.fspath(weights))
    series = _weight_series(settings, factors)
    # The preset itself is in both series.
    points = {key: each for part in series.values() for key, each in part.items()}
    contestants: list[Entrant] = [SemlicEntrant("semlic", codec)]
    contestants += [RefinedEntrant(key, codec, each) for key, each in points.items()]
    metric = paper_metrics(weights)[0]
    results = run_sweep(
        list_images(images),
        contestants,
        [bpp],
        Measures([metric, "psnr_db"], weights, patch_side=patch_side),
        out,
        jobs=1,  # each refinement takes all cores
        progress=progress,
    )
    if skipped is not None:
        skipped += results.skipped
    figure = _draw_figure5(results, series, metric, bpp)
    return write_figure(figure, out / "figure5") + [out / "results.csv"]


def _weight_series(
    settings: Settings, factors: Sequence[float]
) -> dict[str, dict[str, Settings]]:
    """Which weight varies, to the name of each point, to its settings."""
    series: dict[str, dict[str, Settings]] = {}
    for weight in ("alpha", "gamma"):
        points = {}
        for factor in sorted(factors):
            varied = replace(settings, **{weight: factor * getattr(settings, weight)})
            points[f"alpha={varied.alpha:g} gamma={varied.gamma:g}"] = varied
        series[weight] = points
    return series


def _draw_figure5(
    results: Results, series: dict[str, dict[str, Settings]], metric: str, bpp: float
) -> Figure:
    def point(codec: str) -> tuple[float, float] | None:
        found = [curve(results, codec, m).points for m in ("psnr_db", metric)]
        return (found[0][0].value, found[1][0].value) if all(found) else None

    figure = new_figure(figsize=(7.0, 5.0), layout="constrained")
    axes = figure.add_subplot()
    # Points of both often fall together: labels of one above, of the other below.
    styles = {"alpha": ("#0072B2", "s", (5, 6)), "gamma": ("#D55E00", "o", (5, -14))}
    for weight, points in series.items():
        placed = [
            (found, getattr(settings, weight))
            for codec, settings in points.items()
            if (found := point(codec)) is not None
        ]
        colour, marker, offset = styles[weight]
        axes.plot(
            [found[0] for found, _ in placed],
            [found[1] for found, _ in placed],
            color=colour,
            marker=marker,
            label=f"{weight} varies",
        )
        for found, value in placed:
            axes.annotate(
                f"{value:g}", found, offset, textcoords="offset points", color=colour
            )
    unrefined = point("semlic")
    if unrefined is not None:
        axes.plot(*unrefined, "k*", markersize=12, label="not refined")
    axes.set_xlabel("PSNR (dB), higher is better")
    axes.set_ylabel(f"{results.metrics[metric].label}, lower is better")
    axes.set_title(
        f"Means over {len(results.images)} images at {bpp:g} bits per pixel",
        loc="left",
        fontsize=11,
    )
    axes.grid(color="#E4E4E4")
    axes.legend(frameon=False)
    return figure


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m semlic_jax.evaluation.paper",
        description="Make the tables and figures of the paper, over any images and "
        "models.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, allow_abbrev=False)
        sub.add_argument("--out", type=Path, default=Path(f"paper_{name}"))
        sub.add_argument("--weights", type=Path, help="folder of feature weights")
        return sub

    for name, text in (
        ("rd", "rate against FID, KID and DISTS"),
        ("ablation", "BD-rates of models against the first"),
    ):
        sub = command(name, text)
        sub.add_argument("images", type=Path, nargs="+")
        sub.add_argument("--models", nargs="+", default=["small"])
        sub.add_argument("--bpp", type=numbers, default=list(_RATES))
        sub.add_argument("--patch", type=positive_int, default=PATCH_SIDE)
        if name == "rd":
            sub.add_argument("--refine", metavar="PRESET")
    for name, text in (
        ("figure5", "PSNR against the Fréchet distance, by alpha and gamma"),
        ("figure6", "regions of interest, by variant and weight"),
    ):
        sub = command(name, text)
        if name == "figure5":
            sub.add_argument("images", type=Path, nargs="+")
            sub.add_argument("--patch", type=positive_int, default=PATCH_SIDE)
            sub.add_argument("--factors", type=numbers, default=list(_FACTORS))
        else:
            sub.add_argument("image", type=Path)
            sub.add_argument("--region", default="auto")
            sub.add_argument("--foregrounds", type=numbers, default=list(FOREGROUNDS))
        sub.add_argument("--model", default="small")
        sub.add_argument("--bpp", type=float, default=0.15)
        sub.add_argument("--refine", type=preset_or_steps, default="default")
    return parser


def _run(
    options: argparse.Namespace, skipped: list[Skipped], progress: Progress
) -> Sequence[Path]:
    if options.command == "rd":
        entrants(_RIVALS)  # one that is missing here is named before the work
        report = rd(
            options.images,
            options.models,
            options.out,
            rates=options.bpp,
            refine=options.refine,
            weights=options.weights,
            patch_side=options.patch,
            progress=progress,
        )
        skipped += report.summary.results.skipped
        return report.paths
    if options.command == "ablation":
        table = ablation(
            options.images,
            options.models,
            options.out,
            rates=options.bpp,
            weights=options.weights,
            patch_side=options.patch,
            progress=progress,
            skipped=skipped,
        )
        return [table]
    if options.command == "figure5":
        return figure5(
            options.images,
            options.model,
            options.out,
            bpp=options.bpp,
            refine=options.refine,
            factors=options.factors,
            weights=options.weights,
            patch_side=options.patch,
            progress=progress,
            skipped=skipped,
        )
    return figure6(
        options.image,
        options.model,
        options.out,
        region=options.region,
        bpp=options.bpp,
        refine=options.refine,
        foregrounds=options.foregrounds,
        features=options.weights,
        progress=progress,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status, see `run_study`."""
    options = _parser().parse_args(argv)
    skipped: list[Skipped] = []
    work = partial(_run, options, skipped)
    return run_study("paper", work, shown=["ablation.md"], skipped=skipped)


if __name__ == "__main__":
    sys.exit(main())
