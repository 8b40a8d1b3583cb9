# SPDX-License-Identifier: Apache-2.0
"""Turns latents into symbols: the coding order, the choice of symbols, their bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from semlic_jax.model.compression import image_masks
from semlic_jax.model.context import (
    MEAN_STEPS,
    Masks,
    Pass,
    checkerboard,
    coding_order,
)
from semlic_jax.refinement.objective import Frozen, Images, Network, apply_twin

Array = jax.Array


class Rounding(NamedTuple):
    """How latents v become whole numbers.

    Without stiffness, a symbol is the nearest whole number, but with the threshold that
    `zone` says. With stiffness, it is chosen among that number, its neighbour towards
    zero (or, from zero, towards v) and zero, as the one with the least cost

        stiffness / 2 * (symbol - v)^2 + bits of the symbol

    Attributes:
        zone: how far the threshold between two numbers lies beyond 1/2, float32 [B].
            Positive values round more towards zero, negative ones more away from it.
        stiffness: weight of the squared distance in bits, float32 [B, h, w, M], or
            None.
    """

    zone: Array
    stiffness: Array | None = None


def hard_latents(
    frozen: Frozen,
    images: Images,
    rounding: Rounding,
    y_scaled: Array,
    z: Array,
) -> tuple[Array, Array]:
    """Round the latents; return the bits of their payload and y_hat_scaled.

    Args:
        frozen, images: those of the refinement, see `objective`.
        rounding: how y is rounded; z goes to the nearest whole numbers.
        y_scaled: float32 [B, h, w, M].
        z: float32 [B, h/4, w/4, N].

    Returns:
        bits under the tables of the coder, float32 [B], and y_hat_scaled float32
        [B, h, w, M], the means plus whole numbers.
    """

    def forward(model: Network) -> tuple[Array, Array]:
        masks = image_masks(images.sizes, (y_scaled.shape[1], y_scaled.shape[2]))
        z_hat = jnp.round(z) * masks.z
        z_bits = look_up(frozen.z_bits, jnp.arange(z.shape[-1]), z_hat)
        z_bits = jnp.sum(z_bits * masks.z, (1, 2, 3))

        def round_y(v: Array, index: Array, channels: slice) -> Array:
            return chosen_symbols(v, index, channels, rounding, frozen.y_bits)

        residual, index, y_hat = walk(
            model, images.quality, masks, y_scaled, z_hat, round_y
        )
        y_bits = look_up(frozen.y_bits, index, residual)
        return z_bits + jnp.sum(y_bits * masks.y, (1, 2, 3)), y_hat

    return apply_twin(frozen, forward)


def chosen_symbols(
    v: Array,
    index: Array,
    channels: slice,
    rounding: Rounding,
    y_bits: Array,
    offset: Array | None = None,
) -> Array:
    """Choose the whole numbers of least cost near v, see `Rounding`; float32 like v.

    Args:
        v: latents relative to their means, float32 [B, h, w, C].
        index: table index of each latent, [B, h, w, C].
        channels: which of the M channels these are.
        rounding: how to choose, for all M channels.
        y_bits: see `Frozen`.
        offset: added to the cost of the neighbour, float32 [B, h, w, M].
    """
    zone = rounding.zone[:, None, None, None]
    best = jnp.sign(v) * jnp.maximum(jnp.ceil(jnp.abs(v) - 0.5 - zone), 0.0)
    if rounding.stiffness is None:
        return best
    stiffness = rounding.stiffness[..., channels]

    def cost(symbol: Array) -> Array:
        error = 0.5 * stiffness * jnp.square(symbol - v)
        return error + look_up(y_bits, index, symbol)

    other = best - jnp.where(best == 0, -jnp.sign(v), jnp.sign(best))
    least = cost(best)
    extra = 0.0 if offset is None else offset[..., channels]
    for candidate, handicap in ((other, extra), (jnp.zeros_like(best), 0.0)):
        found = cost(candidate) + handicap
        best = jnp.where(found < least, candidate, best)
        least = jnp.minimum(found, least)
    return best


def walk(
    model: Network,
    quality: Array,
    masks: Masks,
    y_scaled: Array,
    z_hat: Array,
    round_y: Callable[[Array, Array, slice], Array],
) -> tuple[Array, Array, Array]:
    """Go through the coding order and round y.

    Args:
        model: the differentiable twin, bound to its parameters.
        quality: [B] in [0, 1].
        masks: the positions inside the images.
        y_scaled: [B, h, w, M].
        z_hat: [B, h/4, w/4, N], rounded, maybe in a relaxed way.
        round_y: called as `round_y(v, index, channels)` for each pass, with the latents
            v of the pass's channels relative to their means. Returns the residuals.

    Returns:
        residuals, table indexes and y_hat_scaled, each [B, h, w, M].
    """
    grid = (y_scaled.shape[1], y_scaled.shape[2])
    residuals: list[Array] = []
    indexes: list[Array] = []

    def visit(pass_: Pass, index: Array, mean: Array) -> Array:
        channels = slice(pass_.start, pass_.stop)
        v = y_scaled[..., channels] - mean / MEAN_STEPS
        residual = round_y(v, index, channels) * masks.y
        residuals.append(residual)
        indexes.append(index)
        return residual * MEAN_STEPS + mean

    y_hat = model.traverse_latents(z_hat, quality, masks, visit)

    def joined(parts: list[Array]) -> Array:
        passes = coding_order(model.config.groups)
        groups = [
            jnp.where(checkerboard(*grid, first.parity), parts[i], parts[i + 1])
            for i, first in enumerate(passes)
            if i % 2 == 0
        ]
        return jnp.concatenate(groups, -1)

    return joined(residuals), joined(indexes), y_hat


def look_up(bits: Array, index: Array, symbol: Array) -> Array:
    """Bits of symbols under the tables `index`, which broadcasts to their shape."""
    radius = (bits.shape[1] - 1) // 2
    column = jnp.clip(symbol, -radius, radius).astype(jnp.int32) + radius
    row = jnp.broadcast_to(index, column.shape).astype(jnp.int32)
    return bits[row, column]
