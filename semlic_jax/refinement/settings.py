# SPDX-License-Identifier: Apache-2.0
"""How a refinement is done: its settings, and the presets that measurements chose."""

from __future__ import annotations

import dataclasses
import math
import operator
import os
from typing import Any

import numpy as np

from semlic_jax.objectives.features import PACKAGED, FeatureNetwork, load_features
from semlic_jax.refinement.sga import METHODS as RELAXED
from semlic_jax.refinement.sga import check_method, temperatures

METHODS = (*RELAXED, "newton")
# Counts up when the same settings give other files: kept files are named by it.
REVISION = 7
_NOT_NEGATIVE = (
    "alpha",
    "gamma",
    "style",
    "mean_style",
    "structure",
    "lattice",
    "learning_rate",
    "trust_rise",
    "noise",
    "z_travel",
    "newton_integral",
    "integral",
    "proportional",
)
_COUNTS = ("steps", "chunk_steps", "probes")
_SEEDS = 2**32  # of NumPy's and JAX's generators
_LARGEST = float(np.finfo(np.float32).max)  # what the programs compute in
_SMALLEST = float(np.finfo(np.float32).tiny)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Of a refinement; `preset` makes them.

    Attributes:
        steps: of the optimiser.
        method: of the relaxed rounding, see `sga.METHODS`, or `newton` (`newton.py`).
        alpha: weight of the mean squared error in 8-bit levels.
        gamma: weight of the perceptual terms, `style`, `mean_style`, `structure`
            and `lattice` among them; 0 refines for PSNR.
        beta: multiplier of the rate (per bit per pixel) to start with; None takes the
            slope of the unrefined files.
        style: weight of the style within the perceptual terms.
        mean_style: weight of the mean style within the perceptual terms. Without it
            refinement takes texture away: a texture that is not that of the original
            counts as an error everywhere else.
        structure: weight of 1 - MS-SSIM, in the form of `structure.py`, within the
            perceptual terms. Without it refinement takes faint contrast away, which
            squared errors and features hardly see.
        lattice: weight of what repeats in every cell of the latents, within the
            perceptual terms (`structure.py`). Without it refinement makes some of its
            texture of a mesh of dots; 30 takes most of that away, and with it part of
            what refinement gains in statistics of features.
        features: the trunk, or where its weights are (`load_features`); None takes the
            packaged one.
        learning_rate: Adam's, in steps of the quantiser.
        decay: share of the steps at the end over which the learning rate falls to 0.
        temperature_start, temperature_end, temperature_hold: see `sga.temperatures`.
        overshoot: how much larger than the budget the unrefined file is whose latents
            and quality the refinement starts from.
        integral, proportional: gains of the dual ascent.
        kappa: of `newton`, as all up to `newton_integral`: factor of the curvature in
            the choice of symbols, above 0.
        trust_start, trust_end: part of the way to the minimum that y goes: it falls
            from the one to the other, above 0 and at most 1.
        trust_rise: share of the steps at the start over which that part rises from 0,
            at most 1; there is none where that is less than two steps. Without it the
            second step, of all latents at once by a diagonal curvature, makes the
            objective worse than it was.
        noise: scale in bits of the noise in the choice of symbols at the start.
        z_travel: sum of the learning rates of z, which fall to 0.
        probes: random signs that the curvature is estimated with, per image.
        newton_integral: gain of the dual ascent, in the place of the two above.
        chunk_steps: steps between two looks at the rounded latents, between which
            nothing is reported and Ctrl-C has to wait. A relaxed rounding keeps the
            best that it sees then, so that its files depend on it; those of `newton`
            do not.
        seed: of the noise, from 0 to 2^32 - 1. The same seed gives the same file on
            the same machine.
        dtype: that g_s computes in.
    """

    steps: int = 20
    method: str = "newton"
    alpha: float = 0.003
    gamma: float = 0.5
    beta: float | None = None
    style: float = 0.0
    mean_style: float = 3.0
    structure: float = 50.0
    lattice: float = 0.0
    features: FeatureNetwork | str | os.PathLike[str] | None = None
    learning_rate: float = 0.01
    decay: float = 0.3
    temperature_start: float = 0.5
    temperature_end: float = 0.1
    temperature_hold: float = 0.0
    overshoot: float = 0.1
    integral: float = 0.03
    proportional: float = 1.0
    kappa: float = 1.5
    trust_start: float = 0.5
    trust_end: float = 0.05
    trust_rise: float = 0.2
    noise: float = 0.0
    z_travel: float = 0.3
    probes: int = 6
    newton_integral: float = 3.0
    chunk_steps: int = 10
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_method(self.method, METHODS)
        for name in (*_COUNTS, "seed"):
            object.__setattr__(self, name, _whole(name, getattr(self, name)))
        for name in _COUNTS:
            value = getattr(self, name)
            _require(value >= 1, f"{name} of at least 1", value)
        known = 0 <= self.seed < _SEEDS
        _require(known, f"a seed from 0 to {_SEEDS - 1}", self.seed)
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            _require(value >= 0, f"{name} of at least 0", value)
            _require(value <= _LARGEST, f"{name} of at most {_LARGEST:g}", value)
        for name in ("kappa",) if self.beta is None else ("kappa", "beta"):
            value = getattr(self, name)
            _require(value > 0, f"{name} above 0", value)
            fits = _SMALLEST <= value <= _LARGEST
            _require(fits, f"{name} from {_SMALLEST:g} to {_LARGEST:g}", value)
        for name in ("trust_start", "trust_end"):
            value = getattr(self, name)
            _require(0 < value <= 1, f"{name} above 0 and at most 1", value)
        _require(self.trust_rise <= 1, "trust_rise of at most 1", self.trust_rise)
        _require(0 <= self.decay <= 1, "decay from 0 to 1", self.decay)
        finite = -1 < self.overshoot < math.inf
        _require(finite, "a finite overshoot above -1", self.overshoot)
        if self.alpha == 0 and self.gamma == 0:
            raise ValueError("expected alpha or gamma above 0, found both 0")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"expected float32 or bfloat16, found {self.dtype!r}")
        temperatures(
            1, self.temperature_start, self.temperature_end, self.temperature_hold
        )

    def learning_rates(self) -> np.ndarray:
        """Of each step, float32 [steps]: constant, then a cosine to 0."""
        step = np.arange(self.steps) + 0.5
        falling = max(self.decay * self.steps, 1e-9)
        done = np.clip((step - (self.steps - falling)) / falling, 0, 1)
        rates = self.learning_rate * 0.5 * (1 + np.cos(np.pi * done))
        return rates.astype(np.float32)

    def load_features(self) -> FeatureNetwork | None:
        """The trunk; None where the perceptual terms have no weight.

        Raises:
            ValueError: no weights were found.
        """
        if self.gamma == 0:
            return None
        if isinstance(self.features, FeatureNetwork):
            return self.features
        if self.features is None:  # whatever the environment names for metrics
            return load_features(name=PACKAGED)
        try:
            return load_features(os.fspath(self.features))
        except ValueError as error:
            raise ValueError(
                f"{error}; or refine for PSNR alone, with gamma 0"
            ) from error


def _whole(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"expected a whole number as {name}, found {value}") from None


def _require(holds: bool, wanted: str, value: float) -> None:
    if not holds:
        found = f"{value:g}" if isinstance(value, float) else value
        raise ValueError(f"expected {wanted}, found {found}")


PRESETS: dict[str, Settings] = {
    # A mean style of 3 costs more than it gains in so few steps (refinement.md).
    "fast": Settings(steps=10, trust_end=0.1, mean_style=2.0, chunk_steps=5),
    "default": Settings(steps=20, chunk_steps=5),
    # The rise was better by its objective but not by SSIMULACRA2 (refinement.md).
    "best": Settings(
        steps=120, noise=1.0, trust_end=0.1, trust_rise=0.0, mean_style=2.0
    ),
}


# Relaxed rounding takes more steps for less.
_RELAXED_STEPS = {"fast": 100, "default": 300, "best": 1000}


def preset(name: str | int | Settings = "default", **changes: Any) -> Settings:
    """The settings of a preset with some of them changed.

    Args:
        name: `fast`, `default` or `best`; a number of steps, which takes the rest from
            `default`; or settings.
        **changes: fields of `Settings`; those that are None stay as they are.

    Raises:
        ValueError: no such preset, or a value out of range.
    """
    given = {key: value for key, value in changes.items() if value is not None}
    if isinstance(name, str):
        if name not in PRESETS:
            raise ValueError(
                f"expected a preset ({', '.join(PRESETS)}) or a number of steps, "
                f"found {name!r}"
            )
        settings = PRESETS[name]
        steps = _RELAXED_STEPS[name]
    elif isinstance(name, Settings):
        return dataclasses.replace(name, **given)
    else:
        settings = dataclasses.replace(PRESETS["default"], steps=name)
        steps = name
    if given.get("method", settings.method) != settings.method:
        given = {"steps": steps, "chunk_steps": Settings.chunk_steps} | given
    return dataclasses.replace(settings, **given)


__all__ = ["METHODS", "PRESETS", "Settings", "preset"]
