# SPDX-License-Identifier: Apache-2.0
"""From latents to symbols: the coding order, the choice of symbols and their bits."""

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
    """How latents become whole numbers.

    Without stiffness, to the nearest one but for the zone. With it a symbol is chosen
    among the nearest number, its neighbour towards zero (or from zero towards v), and
    zero: that with the least

        stiffness / 2 * (symbol - v)^2 + bits of the symbol

    Attributes:
        zone: float32 [B]; by how much the threshold of the nearest number lies beyond
            1/2. Negative values round more away from zero.
        stiffness: float32 [B, h, w, M], in bits, or None.
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
    """Rounded latents and their payload with the tables of the coder.

    Args:
        y_scaled: float32 [B, h, w, M].
        z: float32 [B, h/4, w/4, N].

    Returns:
        bits, float32 [B], and y_hat_scaled [B, h, w, M] (the mean plus whole numbers).
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
    """Whole numbers of the least cost near v, see `Rounding`; float32 like v.

    Args:
        v: float32 [B, h, w, C], relative to the mean.
        index: of their tables.
        channels: which of the M these are.
        rounding: see there.
        y_bits: see `Frozen`.
        offset: float32 [B, h, w, M], added to the cost of the neighbour.
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
    """Residuals, table indexes and y_hat_scaled, each [B, h, w, M].

    Args:
        model: the twin, bound to its parameters.
        quality: [B] in [0, 1].
        masks: where the images are.
        y_scaled: [B, h, w, M].
        z_hat: [B, h/4, w/4, N], whole numbers.
        round_y: called as `round_y(v, index, channels)` for each pass, with v the
            latents of its channels relative to their means. Returns the residuals.
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
    """Bits of symbols [...] under the tables `index`, which broadcasts to them."""
    radius = (bits.shape[1] - 1) // 2
    column = jnp.clip(symbol, -radius, radius).astype(jnp.int32) + radius
    row = jnp.broadcast_to(index, column.shape).astype(jnp.int32)
    return bits[row, column]
