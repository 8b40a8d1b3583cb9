# SPDX-License-Identifier: Apache-2.0
"""Settings of refinement on crops: what each combination saves, and its time.

The command is `python -m semlic_jax.evaluation.refinement_study settings`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

import semlic_jax
from semlic_jax.evaluation.demo import psnr_db
from semlic_jax.evaluation.entrants import model_identity
from semlic_jax.evaluation.image_sets import list_images
from semlic_jax.evaluation.plots import write_figure
from semlic_jax.evaluation.studies import Progress, csv_table
from semlic_jax.evaluation.sweep import Journal
from semlic_jax.evaluation.tables import table
from semlic_jax.images import read_photograph, write_file

if TYPE_CHECKING:
    from semlic_jax.refinement import Settings

# Qualities of the files without refinement that a refined one is compared with.
_LADDER = tuple(range(0, 256, 15))


@dataclass(frozen=True)
class Trial:
    """Settings on one crop: bits saved at equal objective, in percent, and time."""

    method: str
    learning_rate: float
    temperature_start: float
    steps: int
    image: str
    saving_percent: float
    value_ratio: float
    step_s: float


def settings_study(
    images: Sequence[Path],
    out: Path,
    *,
    model: str,
    base: Settings,
    methods: Sequence[str],
    learning_rates: Sequence[float],
    temperatures: Sequence[float],
    steps: Sequence[int],
    crop: int = 256,
    bpp: float = 0.2,
    progress: Progress = lambda text: None,
) -> list[Path]:
    """All combinations of these settings on crops of the images.

    Args:
      images: files and folders.
      out: folder, new or of an earlier run of this study.
      model: name or path.
      base: the settings that are not tried.
      methods, learning_rates, temperatures, steps: to try; temperatures to start at.
      crop: side of the crops, from the middle of the images, in pixels.
      bpp: rate of all files.
      progress: is told what is being done.

    Returns:
      the table of all trials, the table of their means, and a plot.
    """
    progress(f"loading the model {model}")
    codec = semlic_jax.load(model)
    crops = {path.stem: _middle(path, crop) for path in list_images(images)}
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out / "trials.jsonl")
    identity = f"{model_identity(codec)} {crop} {bpp:g} {replace(base, features=None)}"
    combinations = list(
        itertools.product(steps, methods, learning_rates, temperatures, crops)
    )
    trials = []
    for done, (count, method, rate, start, name) in enumerate(combinations):
        tried = replace(
            base,
            steps=count,
            method=method,
            learning_rate=rate,
            temperature_start=start,
            temperature_end=min(base.temperature_end, start),
        )
        key = f"{identity} {count} {method} {rate:g} {start:g} {name}"
        record = journal.get(key)
        if record is None:
            progress(f"{done}/{len(combinations)}: {count} {method} {rate:g} {start:g}")
            record = _try(codec, crops[name], tried, bpp)
            journal.put(key, record)
        facts = {k: record[k] for k in ("saving_percent", "value_ratio", "step_s")}
        trials.append(Trial(method, rate, start, count, name, **facts))
    header = tuple(Trial.__dataclass_fields__)
    rows = [tuple(getattr(trial, field) for field in header) for trial in trials]
    paths = [out / "trials.csv", out / "settings.md"]
    write_file(paths[0], csv_table(header, rows), force=True)
    means = _means(trials)
    text = "\n".join(
        table(
            ["settings", "bits saved", "objective", "s per step"],
            [
                [name, f"{saving:.2f} %", f"{ratio:.4f}", f"{step_s:.3f}"]
                for name, saving, ratio, step_s in means
            ],
        )
    )
    write_file(paths[1], f"{text}\n".encode(), force=True)
    return paths + write_figure(_draw_settings(trials), out / "settings")


def _try(
    codec: Any, pixels: np.ndarray, settings: Settings, bpp: float
) -> dict[str, float]:
    from semlic_jax import refinement

    begun_s = time.perf_counter()
    found = refinement.refine(codec, pixels, bpp=bpp, settings=settings)
    wall_s = time.perf_counter() - begun_s
    reached_db = psnr_db(pixels, codec.decompress(found.data))
    # The bytes without refinement at this PSNR, between those of two qualities.
    ladder = [codec.compress(pixels, quality=level / 255) for level in _LADDER]
    values = [psnr_db(pixels, codec.decompress(file)) for file in ladder]
    order = np.argsort(values)
    log_bytes = np.interp(
        reached_db, np.take(values, order), np.log([len(ladder[i]) for i in order])
    )
    return {
        "saving_percent": float(100 * (1 - len(found.data) / np.exp(log_bytes))),
        "value_ratio": found.value / found.unrefined_value,
        "step_s": wall_s / settings.steps,
    }


def _middle(path: Path, side: int) -> np.ndarray:
    pixels = read_photograph(path).pixels
    height, width = pixels.shape[:2]
    if min(height, width) < side:
        raise ValueError(
            f"expected images of at least {side} x {side}, found {width} x {height} "
            f"in {path}"
        )
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


def _groups(trials: Sequence[Trial]) -> Iterator[tuple[Trial, list[Trial]]]:
    """Trials of the same settings, over all crops."""
    groups: dict[tuple[Any, ...], list[Trial]] = {}
    for trial in trials:
        key = (trial.steps, trial.method, trial.learning_rate, trial.temperature_start)
        groups.setdefault(key, []).append(trial)
    for group in groups.values():
        yield group[0], group


def _means(trials: Sequence[Trial]) -> list[tuple[str, float, float, float]]:
    """Name, saving, ratio of the objective, seconds; the best first of each length."""
    found = [
        (
            first.steps,
            -float(np.mean([trial.saving_percent for trial in group])),
            f"{first.steps} {first.method} lr {first.learning_rate:g} "
            f"T {first.temperature_start:g}",
            float(np.mean([trial.value_ratio for trial in group])),
            float(np.median([trial.step_s for trial in group])),
        )
        for first, group in _groups(trials)
    ]
    return [
        (name, -less, ratio, step_s) for _, less, name, ratio, step_s in sorted(found)
    ]


def _draw_settings(trials: Sequence[Trial]) -> Figure:
    means = _means(trials)[::-1]
    figure = Figure(figsize=(7.0, 1.2 + 0.28 * len(means)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh([name for name, *_ in means], [m[1] for m in means], color="#D55E00")
    axes.set_xlabel("bits saved at equal PSNR (%)")
    axes.grid(axis="x", color="#E4E4E4")
    return figure
