# SPDX-License-Identifier: Apache-2.0
"""`semlic eval` from images to tables and plots, in one call."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from semlic_jax.evaluation.entrants import entrants
from semlic_jax.evaluation.image_sets import list_images
from semlic_jax.evaluation.measures import PATCH_SIDE, Measures, default_metrics
from semlic_jax.evaluation.published import curves_beside, published_curves
from semlic_jax.evaluation.summary import Summary, summarise
from semlic_jax.evaluation.sweep import check_rates, run_sweep
from semlic_jax.evaluation.tables import markdown
from semlic_jax.images import write_file


@dataclass(frozen=True)
class Report:
    """What `evaluate` found, and the files for people that it wrote."""

    summary: Summary
    paths: tuple[Path, ...]


def evaluate(
    inputs: Sequence[Path],
    codecs: Sequence[str],
    rates: Sequence[float],
    out: Path,
    *,
    metrics: Sequence[str] | None = None,
    model: str = "small",
    anchor: str | None = None,
    weights: str | Path | None = None,
    patch_side: int = PATCH_SIDE,
    image_set: str | None = None,
    jobs: int = 0,
    background: tuple[int, int, int] | None = None,
    remeasure: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Run a sweep, or go on with one, and write its tables and plots into its folder.

    Args:
      inputs: image files and folders of them.
      codecs: names of codecs; see `entrants.py`.
      rates: bits per pixel.
      out: folder, new or of an earlier sweep.
      metrics: names of metrics; None: the default ones that can be computed here.
      model: name or path of the model of codecs that name none.
      anchor: codec that BD-rates are relative to; None: see `summarise`.
      weights: folder of feature weights; None: the environment's SEMLIC_FEATURES.
      patch_side: side of the patches for the metrics of the set, in pixels.
      image_set: name of the set, for published curves; None: found by its pixels.
      jobs, background, remeasure, progress: see `run_sweep`.

    Raises:
      ValueError: something that was asked for is unknown or missing here; raised before
        any work is done, where that is possible.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("plots need matplotlib: pip install 'semlic_jax[eval]'")
    from semlic_jax.evaluation.plots import write_plots

    paths = list_images(inputs)
    rates = check_rates(rates)
    if image_set is not None:
        published_curves(image_set)  # a wrong name is refused before the work
    notes: list[str] = []
    if metrics is None:
        metrics, notes = default_metrics(weights)
    progress("loading codecs and metrics")
    contestants = entrants(codecs, model=model)
    if anchor is not None and anchor not in [each.key for each in contestants]:
        raise ValueError(
            f"the anchor {anchor!r} is not among the codecs "
            f"{', '.join(each.key for each in contestants)}"
        )
    measures = Measures(metrics, weights, patch_side=patch_side)
    results = run_sweep(
        paths,
        contestants,
        rates,
        measures,
        out,
        jobs=jobs,
        background=background,
        remeasure=remeasure,
        notes=notes,
        progress=progress,
    )
    published = curves_beside(results, image_set)
    progress("BD-rates")
    summary = summarise(results, anchor, published=published)
    progress("plots")
    plots = write_plots(results, out / "plots", published)
    tables = out / "summary.md"
    text = f"{markdown(summary)}\n".encode("utf-8", "surrogateescape")
    write_file(tables, text, force=True)
    facts = json.dumps(summary.facts(), indent=1).encode()
    write_file(out / "summary.json", facts, force=True)
    pictures = [path for path in plots if path.name == "rd_all.png"]
    return Report(summary, (out / "results.csv", tables, *pictures))
