# SPDX-License-Identifier: Apache-2.0
"""The settings of a refinement, and presets that were chosen by measurements."""

from __future__ import annotations

import dataclasses
import operator
import os
from typing import Any

import numpy as np

from semlic_jax.objectives.features import PACKAGED, FeatureNetwork, load_features
from semlic_jax.refinement.sga import METHODS as RELAXED
from semlic_jax.refinement.sga import check_method, temperatures

METHODS = (*RELAXED, "newton")
# Goes up whenever the same settings come to give other files; part of what identifies a
# finished file in the table of a folder (`folder.py`).
REVISION = 10
_NOT_NEGATIVE = (
    "alpha",
    "gamma",
    "style",
    "mean_style",
    "structure",
    "lattice",
    "mesh",
    "learning_rate",
    "trust_rise",
    "noise",
    "z_travel",
    "newton_integral",
    "integral",
    "proportional",
)
_COUNTS = ("steps", "chunk_steps", "probes")
_SEEDS = 2**32  # both NumPy's and JAX's generators take so many
# The programs compute in float32: these leave room for products and squares.
_SMALLEST, _LARGEST = 1e-12, 1e12
_COLDEST, _HOTTEST = 1e-6, 1e6
_MOST_OVERSHOOT = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a refinement, usually made by `preset`.

    Attributes:
        steps: number of steps.
        method: `newton` (`newton.py`) or a relaxed rounding, one of `sga.METHODS`.
        alpha: weight of the mean squared error in 8-bit levels.
        gamma: weight of the perceptual terms, which include style, mean style,
            structure, lattice and mesh; 0 refines for PSNR.
        beta: multiplier of the rate (per bit per pixel) at the start, above 0; None
            takes the slope of the unrefined files.
        style: weight of the style within the perceptual terms.
        mean_style: weight of the mean style within the perceptual terms. Without it,
            refinement removes texture, because all other terms count any texture but
            the original one as an error.
        structure: weight of 1 - MS-SSIM, in the form of `structure.py`, within the
            perceptual terms. Without it, refinement removes faint contrast, which
            squared errors and features hardly see.
        lattice: weight, within the perceptual terms, of what repeats in every cell of
            the latents (`structure.py`).
        mesh: weight, within the perceptual terms, of waves that the image has not where
            they are (`objectives/spectrum.py`). Without it, refinement makes some
            texture of fur, cloth and wood from a mesh of dots.
        features: the trunk, or the path of its weights (see
            `objectives.features.load_features`); None takes the packaged one.
        learning_rate: with relaxed rounding, Adam's learning rate in steps of the
            quantiser.
        decay: with relaxed rounding, the share of the steps at the end over which the
            learning rate falls to 0.
        temperature_start, temperature_end, temperature_hold: with relaxed rounding, the
            arguments of `sga.temperatures`.
        overshoot: the refinement starts from the latents and the quality of an
            unrefined file that is larger than the budget by this share.
        integral, proportional: with relaxed rounding, the gains of the dual ascent.
        kappa: with `newton`, the factor of the curvature in the choice of symbols,
            above 0.
        trust_start, trust_end: with `newton`, the part of the way to the minimum that y
            moves in the first and in the last step, above 0 and at most 1.
        trust_rise: with `newton`, the share of the steps at the start over which the
            part that y moves rises from 0, at most 1; less than two steps are no rise.
            Without it, the second step makes the objective worse than it was, because
            it moves all latents at once by a diagonal curvature.
        noise: with `newton`, the scale in bits of the noise in the choice of symbols at
            the start.
        z_travel: with `newton`, the sum of the learning rates of z, which fall to 0.
        probes: with `newton`, how many arrays of random signs per image the curvature
            is estimated from.
        newton_integral: with `newton`, the gain of the dual ascent.
        chunk_steps: number of steps between two looks at the rounded latents. Progress
            is reported, and Ctrl-C takes effect, only then. A relaxed rounding keeps
            the best latents that are seen then, so its files depend on this number;
            those of `newton` do not.
        seed: seed of all random numbers, from 0 to 2^32 - 1. The same seed gives the
            same file on the same machine.
        dtype: type in which g_s computes, `float32` or `bfloat16`.

    Raises:
        ValueError: a value is out of range.
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
    mesh: float = 6.0
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
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if str(entry.type).startswith("float") and value is not None:
                object.__setattr__(self, entry.name, _number(entry.name, value))
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
        within = -1 < self.overshoot <= _MOST_OVERSHOOT
        wanted = f"overshoot above -1 and at most {_MOST_OVERSHOOT:g}"
        _require(within, wanted, self.overshoot)
        if max(self.alpha, self.gamma) < _SMALLEST:
            raise ValueError(
                f"expected alpha or gamma of at least {_SMALLEST:g}, found "
                f"{self.alpha:g} and {self.gamma:g}"
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"expected float32 or bfloat16, found {self.dtype!r}")
        for name in ("temperature_start", "temperature_end"):
            value = getattr(self, name)
            fits = _COLDEST <= value <= _HOTTEST
            _require(fits, f"{name} from {_COLDEST:g} to {_HOTTEST:g}", value)
        temperatures(
            1, self.temperature_start, self.temperature_end, self.temperature_hold
        )

    def learning_rates(self) -> np.ndarray:
        """The learning rate of each step, float32 [steps]: constant, then a cosine."""
        step = np.arange(self.steps) + 0.5
        falling = max(self.decay * self.steps, 1e-9)
        done = np.clip((step - (self.steps - falling)) / falling, 0, 1)
        rates = self.learning_rate * 0.5 * (1 + np.cos(np.pi * done))
        return rates.astype(np.float32)

    def load_features(self) -> FeatureNetwork | None:
        """Load the trunk; return None if the perceptual terms have no weight.

        Raises:
            ValueError: there are no such feature weights, or they do not fit.
        """
        if self.gamma == 0:
            return None
        if isinstance(self.features, FeatureNetwork):
            return self.features
        if self.features is None:  # even if the environment names another for metrics
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


def _number(name: str, value: Any) -> float:
    """A setting as a float, so that 0 and 0.0 are the same settings."""
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return float(value)
    except (TypeError, OverflowError):
        raise ValueError(f"expected a number as {name}, found {value!r}") from None


def _require(holds: bool, wanted: str, value: float) -> None:
    if not holds:
        found = f"{value:g}" if isinstance(value, float) else value
        raise ValueError(f"expected {wanted}, found {found}")


PRESETS: dict[str, Settings] = {
    # A mean style of 3 costs more than it gains in so few steps (refinement.md).
    "fast": Settings(steps=10, trust_end=0.1, mean_style=2.0, chunk_steps=5),
    "default": Settings(steps=20, chunk_steps=5),
    # A rise gave a better objective but not a better SSIMULACRA2 (refinement.md).
    "best": Settings(
        steps=120, noise=1.0, trust_end=0.1, trust_rise=0.0, mean_style=2.0
    ),
}


# Relaxed rounding needs more steps to gain less.
_RELAXED_STEPS = {"fast": 100, "default": 300, "best": 1000}


def preset(name: str | int | Settings = "default", **changes: Any) -> Settings:
    """Return the settings of a preset, with some of them changed.

    Args:
        name: `fast`, `default` or `best`; a number of steps, with the rest taken from
            `default`; or settings to change. A preset with another `method` than its
            own gets the number of steps that suits relaxed rounding.
        **changes: fields of `Settings`; those that are None stay as they are.

    Raises:
        ValueError: there is no such preset, or a value is out of range.
        TypeError: a change is not a field of `Settings`.
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
