# SPDX-License-Identifier: Apache-2.0
"""Relaxed rounding, in which a real-valued latent stands for the integers around it.

Stochastic Gumbel annealing (Yang, Bamler, Mandt 2020, arXiv:2006.04240) replaces the
rounding of v by a random mixture of its candidates floor(v) and floor(v) + 1. Each
candidate has a weight that falls with its distance u from v; the mixture is a sample
of the Gumbel-softmax over those weights at a temperature that is lowered towards hard
rounding. The log-weight of a candidate before division by the temperature, by method:

===============  ======================================================================
`sga`            -atanh(u)
`linear`         log(1 - u)
`cosine`         log cos^2(pi u / 2)
`ssl`            log sigmoid(-a logit(u)), the sigmoid-scaled logit
`ssl3`           the same over three candidates, round(v) - 1, round(v), round(v) + 1
`deterministic`  -atanh(u), the mean of the mixture without noise
`ste`            hard rounding, straight-through gradient
`noise`          v + uniform noise of the width of a bin
===============  ======================================================================

`linear`, `cosine`, `ssl` and `ssl3` are SGA+ (Perugachi-Diaz et al. 2024,
arXiv:2401.17789). The temperature enters twice, as in both references: it divides the
log-weights, and again the sum of log-weights and Gumbel noise.

The grid is the integers; a caller whose grid is `mean + integers` passes
`v = y - mean`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from semlic_jax.model.layers import round_straight_through

Array = jax.Array

METHODS = (
    "sga",
    "ssl",
    "linear",
    "cosine",
    "ssl3",
    "ste",
    "noise",
    "deterministic",
)
_SSL_SLOPE = 2.3  # SGA+'s best for two candidates
_EDGE = 1e-5  # distances are kept this far from 0 and 1
# Three candidates: SGA+'s constants.
_SSL3_SLOPE = 1.4
_SSL3_POWER = 1.5
_SSL3_REACH = 0.98


def check_method(method: str, known: Sequence[str] = METHODS) -> None:
    """Raise ValueError for a method that is not among the known ones."""
    if method not in known:
        raise ValueError(
            f"unknown rounding method {method!r}: expected one of {', '.join(known)}"
        )


def temperatures(
    steps: int, start: float, end: float, hold: float = 0.35
) -> np.ndarray:
    """The temperature of each step: constant at first, then falling geometrically.

    SGA's own schedule, 0.5 for 700 of 2000 steps and then falling as exp(-step/1000),
    is `temperatures(2000, 0.5, 0.136, 0.35)`.

    Args:
        steps: number of steps.
        start: temperature of the constant part.
        end: temperature of the last step.
        hold: share of the steps before the fall.

    Returns:
        float32 [steps].

    Raises:
        ValueError: a temperature is not positive and finite, or `hold` is outside 0..1.
    """
    if not (start > 0 and end > 0 and math.isfinite(start) and math.isfinite(end)):
        raise ValueError(f"temperatures must be above 0, found {start} and {end}")
    if not 0 <= hold <= 1:
        raise ValueError(f"expected hold from 0 to 1, found {hold}")
    position = np.arange(steps) / max(steps - 1, 1)
    fall = np.clip((position - hold) / max(1 - hold, 1e-9), 0, 1)
    return np.asarray(start * (end / start) ** fall, np.float32)


def draw_noise(method: str, rng: Array, shape: tuple[int, ...]) -> Array:
    """Draw the random numbers that `relaxed_round` mixes in.

    Args:
        method: one of METHODS.
        rng: one key for each image, [B].
        shape: shape of the latents without the batch axis.

    Returns:
        float32 [B, *shape], or [B, *shape, 3] for `ssl3`; zeros for methods without
        noise.

    Raises:
        ValueError: the method is unknown.
    """
    check_method(method)
    if method in ("ste", "deterministic"):
        return jnp.zeros((rng.shape[0], *shape))
    if method == "ssl3":
        return jax.vmap(lambda key: jax.random.gumbel(key, (*shape, 3)))(rng)
    if method == "noise":
        return jax.vmap(
            lambda key: jax.random.uniform(key, shape, minval=-0.5, maxval=0.5)
        )(rng)
    # The difference of two Gumbel variables is logistic.
    return jax.vmap(lambda key: jax.random.logistic(key, shape))(rng)


def relaxed_round(v: Array, noise: Array, temperature: Array, method: str) -> Array:
    """Return a relaxed sample of round(v).

    Args:
        v: float32, any shape.
        noise: from `draw_noise`, or the part of it that belongs to v; ignored by `ste`
            and `deterministic`.
        temperature: positive; low temperatures give hard rounding.
        method: one of METHODS.

    Returns:
        float32 of the shape of v. Gradients are finite everywhere, even where v is an
        integer.
    """
    if method == "ste":
        return round_straight_through(v)
    if method == "noise":
        return v + noise
    if method == "ssl3":
        return _three_candidates(v, noise, temperature)
    low = lax.stop_gradient(jnp.floor(v))
    # Distance to the lower candidate; the upper one is 1 - u away.
    u = jnp.clip(v - low, _EDGE, 1 - _EDGE)
    logit = _upper_minus_lower(u, method) / temperature
    if method != "deterministic":
        logit = (logit + noise) / temperature
    return low + jax.nn.sigmoid(logit)


def _upper_minus_lower(u: Array, method: str) -> Array:
    """Log-weight of floor(v) + 1 minus that of floor(v), for v = floor(v) + u."""
    if method in ("sga", "deterministic"):
        # -atanh(1 - u) + atanh(u)
        return 0.5 * (jnp.log(u) - jnp.log(2 - u) + jnp.log1p(u) - jnp.log1p(-u))
    if method == "linear":
        return jnp.log(u) - jnp.log1p(-u)
    if method == "cosine":
        # log cos^2(pi (1-u) / 2) - log cos^2(pi u / 2)
        return 2 * jnp.log(jnp.tan(u * (math.pi / 2)))
    # log sigmoid(a x) - log sigmoid(-a x) = a x, for x = logit(u)
    return _SSL_SLOPE * (jnp.log(u) - jnp.log1p(-u))


def _three_candidates(v: Array, noise: Array, temperature: Array) -> Array:
    steps = jnp.arange(-1.0, 2.0)
    centre = lax.stop_gradient(jnp.round(v))
    distance = jnp.abs((v - centre)[..., None] - steps) * _SSL3_REACH
    share = jnp.clip(distance / 1.5, _EDGE, 1 - _EDGE)
    log_weight = _SSL3_POWER * jax.nn.log_sigmoid(
        -_SSL3_SLOPE * (jnp.log(share) - jnp.log1p(-share))
    )
    mixture = jax.nn.softmax((log_weight / temperature + noise) / temperature, -1)
    return centre + jnp.sum(mixture * steps, -1)
