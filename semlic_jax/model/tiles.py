# SPDX-License-Identifier: Apache-2.0
"""Convolutional networks over large images, a tile at a time.

The fine levels of g_a and g_s take hundreds of bytes per pixel. Every value depends
only on its neighbourhood, so these levels can run over overlapping tiles, one after the
other, which bounds their memory for images of any size. The result equals that of the
whole image up to rounding: the borders of the image remain borders, and each tile is
cropped to the part that its own edges do not affect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array


class Cuts(NamedTuple):
    """How one side of the image is divided into tiles; lengths in latents.

    Attributes:
        core: the part of the result that each tile provides.
        window: the part of the input that each tile sees.
        firsts: where each core starts; the last may overlap the one before.
    """

    core: int
    window: int
    firsts: tuple[int, ...]


def cuts(side: int, tile: int, halo: int) -> Cuts:
    """Tiles of equal size, at most `tile` with the halo at both ends."""
    if side <= tile:
        return Cuts(side, side, (0,))
    count = -(-side // (tile - 2 * halo))
    core = -(-side // count)
    firsts = tuple(min(i * core, side - core) for i in range(count))
    return Cuts(core, core + 2 * halo, firsts)


def over_tiles(
    module: nn.Module,
    function: Callable[..., Array],
    inputs: Sequence[Array],
    grid: tuple[int, int],
    tile: int,
    halo: int,
    shape: tuple[int, int],
) -> Array:
    """Call a module's function on tiles of its inputs and put the results together.

    Args:
        module: the module whose parameters the function uses, already initialised.
        function: called with the module, an int [2] with the row and the column of the
            window in latents, and a window of each input. For windows of h x w latents
            it returns float32 [B, h * s, w * s, C].
        inputs: [B, H * r, W * r, C], where r may differ between inputs.
        grid: H and W, in latents.
        tile: largest number of latents along each side of a window, more than
            `2 * halo`.
        halo: the distance in latents within which a value may depend on others.
        shape: s and C of the result.

    Returns:
        float32 [B, H * s, W * s, C].
    """
    sides = [cuts(side, tile, halo) for side in grid]
    stride, channels = shape
    batch = inputs[0].shape[0]
    scales = [array.shape[1] // grid[0] for array in inputs]
    # Explicit types: with JAX_ENABLE_X64, literals would make some indexes int64.
    last = jnp.array(
        [side - cut.window for side, cut in zip(grid, sides, strict=True)], jnp.int32
    )
    zero = jnp.int32(0)

    def part(array: Array, start: Array, lengths: list[int], scale: int) -> Array:
        sizes = (batch, *(length * scale for length in lengths), array.shape[3])
        return lax.dynamic_slice(
            array, (zero, start[0] * scale, start[1] * scale, zero), sizes
        )

    def step(module: nn.Module, canvas: Array, first: Array) -> tuple[Array, None]:
        start = jnp.clip(first - halo, 0, last)
        windows = [
            part(array, start, [cut.window for cut in sides], scale)
            for array, scale in zip(inputs, scales, strict=True)
        ]
        found = function(module, start, *windows)
        core = part(found, first - start, [cut.core for cut in sides], stride)
        place = (zero, first[0] * stride, first[1] * stride, zero)
        return lax.dynamic_update_slice(canvas, core, place), None

    firsts = np.stack(
        np.meshgrid(*(cut.firsts for cut in sides), indexing="ij"), -1
    ).reshape(-1, 2)
    canvas = jnp.zeros(
        (batch, grid[0] * stride, grid[1] * stride, channels), jnp.float32
    )
    scan = nn.scan(
        step, variable_broadcast="params", split_rngs={"params": False}, in_axes=0
    )
    return scan(module, canvas, jnp.asarray(firsts, jnp.int32))[0]
