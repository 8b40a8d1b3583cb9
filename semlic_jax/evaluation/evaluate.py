# SPDX-License-Identifier: Apache-2.0
"""`semlic eval` from images to tables and plots, in one call."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from semlic_jax.evaluation.entrants import entrants
from semlic_jax.evaluation.image_sets import list_images
from semlic_jax.evaluation.journal import alone_in
from semlic_jax.evaluation.measures import (
    PATCH_SIDE,
    SET_METRICS,
    Measures,
    default_metrics,
)
from semlic_jax.evaluation.plots import require_matplotlib, write_plots
from semlic_jax.evaluation.published import curves_beside, published_curves
from semlic_jax.evaluation.results import Results, read_results
from semlic_jax.evaluation.summary import Summary, summarise
from semlic_jax.evaluation.sweep import check_rates, run_sweep
from semlic_jax.evaluation.tables import markdown
from semlic_jax.images import write_file
from semlic_jax.objectives.metrics import IMAGE_METRICS


@dataclass(frozen=True)
class Report:
    """What `evaluate` found, and the files for people that it wrote.

    Attributes:
      summary: its tables.
      paths: the files.
      replaced: a sentence where tables of other images or codecs stood in the folder.
    """

    summary: Summary
    paths: tuple[Path, ...]
    replaced: str = ""


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
    require_matplotlib()
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
    with alone_in(out):
        earlier = _earlier(out)
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
            alone=True,
        )
        published = curves_beside(results, image_set)
        progress("BD-rates")
        summary = summarise(results, anchor, published=published)
        progress("plots")
        _remove_plots(out / "plots", earlier)
        plots = write_plots(results, out / "plots", published)
        tables = out / "summary.md"
        text = f"{markdown(summary)}\n".encode("utf-8", "surrogateescape")
        write_file(tables, text, force=True)
        facts = json.dumps(summary.facts(), indent=1).encode()
        write_file(out / "summary.json", facts, force=True)
    pictures = [path for path in plots if path.name == "rd_all.png"]
    replaced = _replaced(earlier, results, out)
    return Report(summary, (out / "results.csv", tables, *pictures), replaced)


def _earlier(out: Path) -> Results | None:
    """The results that a folder holds, if any can be read."""
    try:
        found = read_results(out)
        found.set_sha256(), set(found.codecs)
    except Exception:  # whatever it is that is damaged, it will be replaced
        return None
    return found


def _remove_plots(folder: Path, earlier: Results | None) -> None:
    """Remove the plots of earlier evaluations, which may be of other metrics."""
    known = [*IMAGE_METRICS, *SET_METRICS, *(earlier.metrics if earlier else ())]
    for name in {"all", *known}:
        for kind in ("png", "svg"):
            with contextlib.suppress(OSError, ValueError):  # no name of a file
                (folder / f"rd_{name}.{kind}").unlink()


def _replaced(earlier: Results | None, results: Results, out: Path) -> str:
    """Say that tables of other images, or of codecs that are now missing, are gone."""
    if earlier is None:
        return ""
    of = []
    if earlier.set_sha256() != results.set_sha256():
        of.append("another set of images")
    if set(earlier.codecs) - set(results.codecs):
        of.append("other codecs")
    if not of:
        return ""
    return f"tables of {' and '.join(of)} were replaced in {out}"
