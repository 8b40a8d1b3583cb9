# SPDX-License-Identifier: Apache-2.0
"""Refinement that chooses symbols of least cost and makes Newton steps between them.

Every step decodes whole numbers, as a decoder would. A latent y says where its symbol
should be. With the gradient g of the objective with respect to y_hat and the curvature
H, the local parabola has its minimum at y_hat - g / H, and y moves a part of the way
there, with g / H clipped to one step of the quantiser. The symbol is the whole number r
near v (see `symbols.Rounding`) with the least cost

    kappa / 2 * H * (r - v)^2 + beta * bits(r) / pixels,    v = y - mean

under the tables of the coder. g includes the rate of the symbols that are coded later,
through their means and scales; the rate of the symbol itself is part of its cost.

H is the diagonal of the Gauss-Newton matrix of the objective, which is a sum of squares
of residuals with Jacobian J: twice the mean of (J^T e)^2 over random signs e
(Hutchinson 1990). It is smoothed to a product of channel and position. z has few
symbols and follows the mean of its straight-through gradients, in units of their root
mean square over all of z (Adam with one second moment per image).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from semlic_jax.compilation import float_program
from semlic_jax.model.compression import image_masks
from semlic_jax.model.layers import round_straight_through
from semlic_jax.model.priors import gaussian_bits, scale_from_index
from semlic_jax.refinement.objective import (
    Frozen,
    Images,
    Network,
    Terms,
    Weights,
    apply_twin,
    decoded_image,
    objective_residuals,
    terms_of,
)
from semlic_jax.refinement.settings import Settings
from semlic_jax.refinement.steps import (
    ADAM_EPS,
    Latents,
    Target,
    pick,
    rate_excess,
    trunk_shifts,
)
from semlic_jax.refinement.symbols import Rounding, chosen_symbols, look_up, walk

Array = jax.Array

_B1, _B2 = 0.9, 0.99
_STEEPEST = 4.0  # largest move of z, in learning rates
_NOISY = 0.8  # share of the steps with noise
_FLATTEST = 1e-3  # added to the curvature, relative to its mean
# The smoothed curvature is far too small at some places. Without a bound, latents there
# ran away in the first steps and the other steps were spent on bringing them back: a
# few of the Kodak images gained nothing.
_FARTHEST = 1.0  # from a symbol to the minimum, in steps of the quantiser


class Schedule(NamedTuple):
    """The schedule of K steps: arrays [K], or scalars for a single step.

    Attributes:
        step: number of the step, from 0.
        kappa: factor of the curvature in the choice of symbols.
        temperature: scale in bits of the noise in the choice of symbols.
        trust: part of the way to the minimum that y moves.
        learning_rate: learning rate of z.
        shift: which of TRUNK_SHIFTS the trunk's input has.
    """

    step: Any
    kappa: Any
    temperature: Any
    trust: Any
    learning_rate: Any
    shift: Any


class Best(NamedTuple):
    """The best latents within the budget, and how they were rounded.

    With perceptual terms none are kept: the trunk sees another view in each step, so
    values of two steps cannot be compared, and the last latents are used instead.

    Attributes:
        value: objective of the latents, [B]; infinite before any are found.
        latents: y [B, h, w, M] and z [B, h/4, w/4, N].
        stiffness: stiffness with which y was rounded, [B, h, w, M].
    """

    value: Array
    latents: Latents
    stiffness: Array


class State(NamedTuple):
    """The state of a refinement between two steps.

    Attributes:
        latents: y [B, h, w, M] and z [B, h/4, w/4, N].
        first, second: Adam's moments of z, both shaped like z.
        curvature: H, [B, h, w, M]; it stays the same.
        log_beta: logarithm of the rate's multiplier, [B].
        best: the best latents so far; with perceptual terms those of the start.
    """

    latents: Latents
    first: Array
    second: Array
    curvature: Array
    log_beta: Array
    best: Best


def stiffness(
    curvature: Array, log_beta: Array, images: Images, kappa: Array | float
) -> Array:
    """kappa * H in bits, [B, h, w, M]; see `symbols.Rounding`.

    Args:
        curvature: H, [B, h, w, M].
        log_beta: logarithm of the rate's multiplier, per bit per pixel, [B].
        images: the batch, of which only the sizes are used.
        kappa: factor of the curvature, a scalar.
    """
    pixels = images.pixel_counts
    return kappa * curvature * (pixels * jnp.exp(-log_beta))[:, None, None, None]


def curvature_of(
    frozen: Frozen,
    images: Images,
    weights: Weights,
    y_hat: Array,
    rng: Array,
    probes: int,
) -> Array:
    """H at y_hat, float32 [B, h, w, M], above 0; for arguments see `diagonal_of`."""
    return smoothed(diagonal_of(frozen, images, weights, y_hat, rng, probes))


def diagonal_of(
    frozen: Frozen,
    images: Images,
    weights: Weights,
    y_hat: Array,
    rng: Array,
    probes: int,
) -> Array:
    """Estimate the diagonal of the Gauss-Newton matrix, float32 [B, h, w, M].

    The estimate has no bias, and its variance is at most 2 / probes times the square of
    the diagonal. The style terms are left out.

    Args:
        frozen, images, weights: those of the refinement, see `objective`.
        y_hat: y_hat_scaled, [B, h, w, M].
        rng: one key per image, [B].
        probes: number of arrays of random signs to take the mean over.
    """
    made, pull_back = _residuals(frozen, images, weights, y_hat)
    squares = jnp.zeros_like(y_hat)
    for probe in range(probes):
        squares = _add_square(squares, made, pull_back, rng, np.int32(probe))
    return 2 * squares / probes


# Two programs: within one, the compiler would see the backward pass once per probe.
@float_program()
def _residuals(
    frozen: Frozen, images: Images, weights: Weights, y_hat: Array
) -> tuple[tuple[Array, ...], Callable[..., Any]]:
    """Residuals of the objective at y_hat, and the product with J^T as a function.

    The function is a pytree, so it can be returned and be an argument.
    """

    def residuals(y: Array) -> tuple[Array, ...]:
        x_hat = decoded_image(frozen, images, y)
        return objective_residuals(frozen, images, weights, x_hat)

    return jax.vjp(residuals, y_hat)


@float_program(donate_argnums=0)
def _add_square(
    squares: Array,
    made: tuple[Array, ...],
    pull_back: Callable[..., Any],
    rng: Array,
    probe: Array,
) -> Array:
    """squares + (J^T e)^2 for the random signs e of a probe."""
    signs = tuple(
        _random_signs(rng, probe, part, values.shape)
        for part, values in enumerate(made)
    )
    return squares + jnp.square(pull_back(signs)[0])


def _random_signs(rng: Array, probe: Array, part: int, shape: tuple[int, ...]) -> Array:
    """Random numbers 1 or -1, float32 of this shape [B, ...].

    Those of an image depend on its key, the number of the probe and that of the
    residual alone.
    """

    def draw(key: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(key, probe), part)
        return jax.random.rademacher(key, shape[1:], jnp.float32)

    return jax.vmap(draw)(rng)


def smoothed(diagonal: Array) -> Array:
    """Approximate a diagonal [B, h, w, M] by a product of channel and position."""
    channel = jnp.mean(diagonal, (1, 2), keepdims=True)
    channel = channel + _FLATTEST * jnp.mean(channel, -1, keepdims=True)
    position = jnp.mean(diagonal / channel, -1, keepdims=True)
    return channel * (position + _FLATTEST)


class Walked(NamedTuple):
    """Latents as they would be coded, from `hard_walk`.

    Attributes:
        bits: bits of the symbols under the densities, float32 [B].
        coded_bits: bits of the symbols under the tables of the coder, float32 [B].
        y_hat: y_hat_scaled, [B, h, w, M].
    """

    bits: Array
    coded_bits: Array
    y_hat: Array


def hard_walk(
    frozen: Frozen,
    images: Images,
    y: Array,
    z: Array,
    rounding: Rounding,
    offset: Array,
) -> Walked:
    """Choose the symbols in the coding order, with gradients as the module describes.

    Args:
        y, z: latents, [B, h, w, M] and [B, h/4, w/4, N].
        rounding: how symbols of y are chosen, with a stiffness.
        offset: added to the cost of the neighbour, [B, h, w, M]; see
            `symbols.chosen_symbols`.
    """

    def round_y(v: Array, index: Array, channels: slice) -> Array:
        symbols = chosen_symbols(
            jax.lax.stop_gradient(v),
            jax.lax.stop_gradient(index),
            channels,
            rounding,
            frozen.y_bits,
            offset,
        )
        return v + jax.lax.stop_gradient(symbols - v)

    def forward(model: Network) -> Walked:
        masks = image_masks(images.sizes, (y.shape[1], y.shape[2]))
        z_hat = round_straight_through(z) * masks.z
        z_bits = jnp.sum(model.z_bits(z_hat) * masks.z, (1, 2, 3))
        residual, index, y_hat = walk(model, images.quality, masks, y, z_hat, round_y)
        coded = look_up(frozen.y_bits, index, residual)
        coded_bits = jnp.sum(coded * masks.y, (1, 2, 3))
        coded = look_up(frozen.z_bits, jnp.arange(z.shape[-1]), z_hat)
        coded_bits = coded_bits + jnp.sum(coded * masks.z, (1, 2, 3))
        # The bits have no gradient to a symbol itself, only to its mean and scale.
        residual = residual - (y - jax.lax.stop_gradient(y)) * masks.y
        y_bits = gaussian_bits(residual, scale_from_index(index))
        y_bits = jnp.sum(y_bits * masks.y, (1, 2, 3))
        return Walked(z_bits + y_bits, coded_bits, y_hat)

    return apply_twin(frozen, forward)


def hard_step_terms(
    frozen: Frozen,
    images: Images,
    weights: Weights,
    y: Array,
    z: Array,
    rounding: Rounding,
    offset: Array,
    shift: Array,
) -> tuple[Terms, Array, Array]:
    """The terms of the chosen symbols, with gradients as the module describes.

    Args:
        y, z, rounding, offset: as in `hard_walk`.
        shift: as in `steps.soft_terms`.

    Returns:
        the terms, whose rate is that of the densities; y_hat_scaled [B, h, w, M]; and
        the bits of the payload under the tables of the coder, [B].
    """
    walked = hard_walk(frozen, images, y, z, rounding, offset)
    x_hat = decoded_image(frozen, images, walked.y_hat)
    terms = terms_of(frozen, images, weights, walked.bits, x_hat, shift)
    return terms, walked.y_hat, walked.coded_bits


def step_choice(
    images: Images, rng: Array, state: State, now: Schedule
) -> tuple[Rounding, Array]:
    """How a step chooses symbols: the last two arguments of `hard_walk`.

    Args:
        images: the batch, of which only the sizes are used.
        rng: one key per image, [B].
        state: the state before the step.
        now: the schedule of this step, scalars.
    """
    keys = jax.vmap(lambda key: jax.random.fold_in(key, now.step))(rng)
    shape = state.latents[0].shape

    def noise(key: Array) -> Array:
        return jax.random.logistic(key, shape[1:]) * now.temperature

    stiff = stiffness(state.curvature, state.log_beta, images, now.kappa)
    return Rounding(jnp.zeros(shape[0]), stiff), jax.vmap(noise)(keys)


def moved(
    state: State,
    now: Schedule,
    gradients: Latents,
    y_hat: Array,
    excess: Array,
    integral: Array,
) -> State:
    """The state after a step, except that `best` is still that of the state before.

    Args:
        state: the state before the step.
        now: the schedule of this step, scalars.
        gradients: gradients of the value plus beta times the rate to y and z.
        y_hat: y_hat_scaled of the step's symbols, [B, h, w, M].
        excess: `rate_excess` of the step, [B].
        integral: gain of the dual ascent.
    """
    y, z = state.latents
    newton_step = gradients[0] / state.curvature
    goal = y_hat - jnp.clip(newton_step, -_FARTHEST, _FARTHEST)
    y = y + now.trust * (goal - y)
    first = _B1 * state.first + (1 - _B1) * gradients[1]
    second = _B2 * state.second + (1 - _B2) * jnp.square(gradients[1])
    time = now.step + 1
    move = first / (1 - _B1**time)
    square = jnp.mean(second / (1 - _B2**time), (1, 2, 3), keepdims=True)
    move = jnp.clip(move / (jnp.sqrt(square) + ADAM_EPS), -_STEEPEST, _STEEPEST)
    z = z - now.learning_rate * move
    log_beta = state.log_beta + integral * excess
    return State((y, z), first, second, state.curvature, log_beta, state.best)


@float_program(donate_argnums=5)
def run_steps(
    frozen: Frozen,
    images: Images,
    weights: Weights,
    target: Target,
    rng: Array,
    state: State,
    schedule: Schedule,
) -> tuple[State, Terms]:
    """Make the steps of a schedule; return the state and the mean of their terms.

    The rate in the terms is that of the coder's tables.
    """

    def step(state: State, now: Schedule) -> tuple[State, Terms]:
        rounding, offset = step_choice(images, rng, state, now)

        def loss(y: Array, z: Array) -> tuple[Array, tuple[Terms, Array]]:
            terms, y_hat, coded_bits = hard_step_terms(
                frozen, images, weights, y, z, rounding, offset, now.shift
            )
            beta = jnp.exp(state.log_beta)
            total = jnp.sum(terms.value + beta * terms.bpp)
            coded_bpp = coded_bits / images.pixel_counts
            return total, (terms._replace(bpp=coded_bpp), y_hat)

        gradients, (terms, y_hat) = jax.grad(loss, (0, 1), has_aux=True)(*state.latents)
        best = state.best
        if not frozen.static.perceptual:
            assert rounding.stiffness is not None
            allowed = (terms.bpp <= target.bpp) & (now.temperature == 0)
            found = Best(terms.value, state.latents, rounding.stiffness)
            best = pick(allowed & (terms.value < best.value), found, best)
        excess = rate_excess(terms.bpp, target)
        state = moved(state, now, gradients, y_hat, excess, target.integral)
        return state._replace(best=best), terms

    if len(schedule.step) == 1:  # no loop
        return step(state, jax.tree.map(lambda values: values[0], schedule))
    state, terms = jax.lax.scan(step, state, schedule)
    return state, jax.tree.map(lambda values: jnp.mean(values, 0), terms)


def start_state(start: Latents, curvature: Array, log_beta: Array) -> State:
    """The state before the first step."""
    zeros = jnp.zeros_like(start[1])
    best = Best(jnp.full(len(log_beta), jnp.inf), start, curvature)
    return State(start, zeros, zeros, curvature, log_beta, best)


def make_schedule(settings: Settings) -> Schedule:
    """The schedule of a refinement by Newton steps."""
    steps = settings.steps
    done = np.arange(steps) / max(steps - 1, 1)
    trust = settings.trust_start * (settings.trust_end / settings.trust_start) ** done
    rising = settings.trust_rise * steps
    if rising >= 2:  # a shorter rise would only waste the first step
        trust = trust * np.minimum(np.arange(steps) / rising, 1)
    cooling = np.clip(1 - done / _NOISY, 0, 1)
    mean = 0.5 if steps > 1 else 1.0  # of 1 - done
    return Schedule(
        np.arange(steps, dtype=np.int32),
        np.full(steps, settings.kappa, np.float32),
        (settings.noise * cooling).astype(np.float32),
        trust.astype(np.float32),
        (settings.z_travel / (mean * steps) * (1 - done)).astype(np.float32),
        trunk_shifts(settings).astype(np.int32),
    )
