# SPDX-License-Identifier: Apache-2.0
"""Settings of refinement on crops: what each of them saves, and its time.

The command is `python -m semlic_jax.evaluation.refinement_study settings`.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import semlic_jax
from semlic_jax.evaluation.entrants import model_identity
from semlic_jax.evaluation.image_sets import list_images
from semlic_jax.evaluation.journal import Journal
from semlic_jax.evaluation.plots import new_figure, require_matplotlib, write_figure
from semlic_jax.evaluation.studies import Progress, csv_table
from semlic_jax.evaluation.tables import table
from semlic_jax.images import check_folder, read_photograph, write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from semlic_jax.codec import Codec
    from semlic_jax.refinement import Settings

# What is tried where nothing is named: the presets, and relaxed rounding.
USUAL_TRIES = ("fast", "default", "best", "default,method=sga")
# Qualities of the files without refinement that a refined one is compared with.
_LADDER = tuple(range(0, 256, 15))
_RECORD = ("bytes", "value", "unrefined_value", "step_s", "image_s")
_LEAST_VALUE = 1e-9  # of an image that is decoded exactly


@dataclass(frozen=True)
class Trial:
    """Settings on one crop.

    Attributes:
      settings, image: names.
      bpp: the budget of the file.
      saving_percent: of the bits that a file without refinement takes for the same
        objective. Where no such file is as good: of those of the best, so at least.
      value: the objective of the refined file as decoded, lower is better.
      value_ratio: to that of the unrefined file within the same budget.
      step_s, image_s: seconds of a step, all included, and of the whole refinement.
    """

    settings: str
    image: str
    bpp: float
    saving_percent: float
    value: float
    value_ratio: float
    step_s: float
    image_s: float


@dataclass(frozen=True)
class _Crop:
    name: str
    pixels: np.ndarray
    bpp: float

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.pixels.tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class _Mean:
    settings: str
    saving_percent: float
    value_ratio: float
    step_s: float
    image_s: float


def parse_try(text: str, **base: Any) -> Settings:
    """Settings as the command line names them, such as `best,noise=0`.

    Args:
      text: a preset, changes KEY=VALUE of the preset `default`, or a preset and
        changes, separated by commas.
      **base: fields of `Settings` that the text may change again; None: as they are.

    Raises:
      ValueError: there is no such preset or field, or a value does not fit it.
    """
    from semlic_jax import refinement

    name, *parts = text.split(",")
    if "=" in name:
        name, parts = "default", [name, *parts]
    _check_known(name, refinement.PRESETS, "a preset or KEY=VALUE")
    kinds = {f.name: str(f.type) for f in dataclasses.fields(refinement.Settings)}
    changes = dict(base)
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"expected KEY=VALUE, found {part!r} in {text!r}")
        _check_known(key, kinds, "a field of the refinement's settings")
        changes[key] = _value(key, kinds[key], value)
    return refinement.preset(name, **changes)


def _check_known(found: str, known: Collection[str], what: str) -> None:
    if found not in known:
        near = difflib.get_close_matches(found, known, n=1, cutoff=0.0)[0]
        raise ValueError(f"expected {what}, found {found!r}; the nearest is {near}")


def _value(key: str, kind: str, text: str) -> int | float | str:
    """The value of a field of this annotation."""
    numeric = {"int": int, "float": float, "float | None": float}
    try:
        return numeric.get(kind, str)(text)
    except ValueError:
        what = "a whole number" if kind == "int" else "a number"
        raise ValueError(f"expected {what} for {key}, found {text!r}") from None


def settings_study(
    images: Sequence[Path],
    out: Path,
    *,
    model: str,
    tries: Mapping[str, Settings],
    crop: int = 256,
    bpp: Sequence[float] = (0.2,),
    progress: Progress = lambda text: None,
) -> list[Path]:
    """Each of the settings on crops of the images.

    What settings save is measured under their own objective, in bytes of real files.

    Args:
      images: files and folders.
      out: folder, new or of an earlier run of this study.
      model: name or path.
      tries: settings by the names that the tables give them.
      crop: side of the crops, from the middle of the images, in pixels.
      bpp: rates, which the crops take in turn.
      progress: is told what is being done.

    Returns:
      the table of all trials, the table of their means, and a plot.
    """
    from semlic_jax.refinement.settings import REVISION

    require_matplotlib()
    check_folder(out, "for the results")
    objectives = {name: objective_name(settings) for name, settings in tries.items()}
    crops = [
        _Crop(path.name, _middle(path, crop), bpp[i % len(bpp)])
        for i, path in enumerate(list_images(images))
    ]
    progress(f"loading the model {model}")
    codec = semlic_jax.load(model)
    identity = model_identity(codec)
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out / "trials.jsonl")
    trials: list[Trial] = []
    # All settings on one crop after another: what slows the machine down for a while
    # slows all of them down.
    for own in crops:
        for name, settings in tries.items():
            done = f"{len(trials)}/{len(crops) * len(tries)}"
            image = f"{own.pixels.shape} {own.digest}"
            ladder_key = f"{identity} ladder {objectives[name]} {image}"
            ladder = journal.get(ladder_key, "bytes", "values")
            if ladder is None:
                progress(f"{done}: {own.name} without refinement")
                ladder = _ladder(codec, own.pixels, settings)
                journal.put(ladder_key, ladder)
            plain = dataclasses.replace(settings, features=None)
            made = f"{identity} refinement {REVISION} {plain}"
            key = f"{made} {objectives[name]} {own.bpp:g} {image}"
            record = journal.get(key, *_RECORD)
            if record is None:
                progress(f"{done}: {own.name} with {name}")
                record = _refine(codec, own, settings)
                journal.put(key, record)
            trials.append(_trial(name, own, record, ladder))
    header = tuple(Trial.__dataclass_fields__)
    rows = [tuple(getattr(trial, field) for field in header) for trial in trials]
    paths = [out / "trials.csv", out / "settings.md"]
    write_file(paths[0], csv_table(header, rows), force=True)
    means = [_mean(name, trials) for name in tries]
    heading = (
        f"{len(crops)} crops of {crop} x {crop} pixels at "
        f"{', '.join(f'{rate:g}' for rate in bpp)} bpp, refined for "
        f"{' and '.join(dict.fromkeys(objectives.values()))}. Means of the bits saved "
        "against real files without refinement of the same objective, and of the "
        "objective relative to that of the unrefined file of the same budget; medians "
        "of the times."
    )
    write_file(paths[1], _text(heading, means).encode(), force=True)
    return paths + write_figure(_draw_settings(means), out / "settings")


def objective_name(settings: Settings) -> str:
    """Names what is refined for, the weights of the feature network included."""
    import jax

    name = f"alpha {settings.alpha:g}, gamma {settings.gamma:g}"
    features = settings.load_features()
    if features is None:
        return name
    for weight in ("style", "mean_style", "structure", "lattice", "mesh"):
        if getattr(settings, weight):
            name += f", {weight} {getattr(settings, weight):g}"
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(features):
        digest.update(np.asarray(leaf).tobytes())
    return f"{name}, features {features.name} {digest.hexdigest()[:8]}"


def _ladder(codec: Codec, pixels: np.ndarray, settings: Settings) -> dict[str, Any]:
    """Bytes and objectives of files without refinement."""
    from semlic_jax.refinement.batch import Batch
    from semlic_jax.refinement.fit import decoded_values

    files = [codec.compress(pixels, quality=level / 255) for level in _LADDER]
    start = files[len(files) // 2]
    one = Batch(codec, settings, [pixels], [len(start)], [None], [None], [start])
    (values,) = decoded_values(codec, one.frozen, one.images, one.weights, [files])
    return {"bytes": [len(data) for data in files], "values": values}


def _refine(codec: Codec, crop: _Crop, settings: Settings) -> dict[str, float]:
    from semlic_jax import refinement

    begun_s = time.perf_counter()
    found = refinement.refine(codec, crop.pixels, bpp=crop.bpp, settings=settings)
    image_s = time.perf_counter() - begun_s
    return {
        "bytes": len(found.data),
        "value": found.value,
        "unrefined_value": found.unrefined_value,
        "step_s": image_s / found.steps,
        "image_s": image_s,
    }


def _trial(
    name: str, crop: _Crop, record: dict[str, float], ladder: dict[str, Any]
) -> Trial:
    # The bytes without refinement at this objective, between those of two qualities.
    values = np.maximum(ladder["values"], _LEAST_VALUE)
    order = np.argsort(values)
    log_bytes = np.interp(
        np.log(max(record["value"], _LEAST_VALUE)),
        np.log(values[order]),
        np.log(np.take(ladder["bytes"], order)),
    )
    unrefined_value = max(record["unrefined_value"], _LEAST_VALUE)
    return Trial(
        settings=name,
        image=crop.name,
        bpp=crop.bpp,
        saving_percent=float(100 * (1 - record["bytes"] / np.exp(log_bytes))),
        value=record["value"],
        value_ratio=record["value"] / unrefined_value,
        step_s=record["step_s"],
        image_s=record["image_s"],
    )


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


def _mean(name: str, trials: Sequence[Trial]) -> _Mean:
    own = [trial for trial in trials if trial.settings == name]
    return _Mean(
        name,
        float(np.mean([trial.saving_percent for trial in own])),
        float(np.mean([trial.value_ratio for trial in own])),
        float(np.median([trial.step_s for trial in own])),
        float(np.median([trial.image_s for trial in own])),
    )


def _text(heading: str, means: Sequence[_Mean]) -> str:
    rows = [
        [
            mean.settings,
            f"{mean.saving_percent:.2f} %",
            f"{mean.value_ratio:.4f}",
            f"{mean.step_s:.3f}",
            f"{mean.image_s:.1f}",
        ]
        for mean in means
    ]
    header = ["settings", "bits saved", "objective", "s per step", "s per image"]
    return "\n".join([heading, "", *table(header, rows)]) + "\n"


def _draw_settings(means: Sequence[_Mean]) -> Figure:
    figure = new_figure(figsize=(7.0, 1.2 + 0.28 * len(means)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(
        [mean.settings for mean in means],
        [mean.saving_percent for mean in means],
        color="#D55E00",
    )
    axes.invert_yaxis()
    axes.set_xlabel("bits saved at equal objective (%)")
    axes.grid(axis="x", color="#E4E4E4")
    return figure
