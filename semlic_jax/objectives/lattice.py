# SPDX-License-Identifier: Apache-2.0
"""The lattice term: how much the decoder repeats itself in every cell of the latents.

Training, refinement and metrics share this term and its parts. The other terms of the
loss are in `losses.py`. Imports jax only.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

LATTICE_PIXELS = 16  # side of a latent's cell, the period of what a decoder may repeat
LATTICE_TILES = 3
REFINED_TILES = 2  # side of a window in cells, in refinement
_CONTRAST = 4 / 255  # sensor noise, which hides a pattern even in a plain surface


def lattice(
    x: jax.Array,
    x_hat: jax.Array,
    *,
    period: int = LATTICE_PIXELS,
    tiles: int = LATTICE_TILES,
) -> jax.Array:
    """Strength of what repeats in every cell, relative to local contrast, float32 [B].

    A decoder repeats what it does in every cell of the latents, which shows as a weave
    on plain surfaces. Photographs have no such period: the error r = x_hat - x,
    averaged over neighbouring cells at equal places within the cell, is small unless
    the decoder repeats itself. With t[i, j] the mean of r at place (i, j) of the cells
    of a window, less the mean over all places, and v the variance of x in the window,
    the term is

        mean over windows of (mean of t^2) / (v + c^2)

    Errors that do not repeat count with 1/tiles^2 of their energy. This term is ours.

    Args:
        x, x_hat: float [B, H, W, C] in [0, 1]; no gradient flows to x. Rows and columns
            beyond whole cells are left out.
        period: side of a cell in pixels.
        tiles: side of a window in cells. Windows overlap: one starts at each cell.

    Raises:
        ValueError: a side has fewer than `tiles` cells.
    """
    x = jax.lax.stop_gradient(x.astype(jnp.float32))
    repeated = repeated_part(x_hat.astype(jnp.float32) - x, period=period, tiles=tiles)
    energy = jnp.mean(jnp.square(repeated), axis=(3, 4))
    return jnp.mean(energy * visibility(x, period=period, tiles=tiles), axis=(1, 2))


def repeated_part(error: jax.Array, *, period: int, tiles: int) -> jax.Array:
    """The repeated part t of `lattice`, [B, n, m, period^2, C] for n x m windows.

    Args:
        error: float32 [B, H, W, C].
        period, tiles: as in `lattice`.

    Raises:
        ValueError: a side has fewer than `tiles` cells.
    """
    repeated = window_means(error, period=period, tiles=tiles)
    return repeated - jnp.mean(repeated, axis=3, keepdims=True)


def visibility(x: jax.Array, *, period: int, tiles: int) -> jax.Array:
    """The factor 1 / (v + c^2) of `lattice`, float32 [B, n, m] for n x m windows.

    Args:
        x: float32 [B, H, W, C] in [0, 1].
        period, tiles: as in `lattice`.

    Raises:
        ValueError: a side has fewer than `tiles` cells.
    """
    means, squares = (
        jnp.mean(window_means(values, period=period, tiles=tiles), axis=3)
        for values in (x, jnp.square(x))
    )
    variance = jnp.mean(jnp.maximum(squares - jnp.square(means), 0.0), axis=-1)
    return 1 / (variance + _CONTRAST**2)


def window_means(image: jax.Array, *, period: int, tiles: int) -> jax.Array:
    """Means over the cells of each window, by place within the cell.

    Args:
        image: float32 [B, H, W, C].
        period, tiles: as in `lattice`.

    Returns:
        float32 [B, n, m, period^2, C] for n x m windows.

    Raises:
        ValueError: a side has fewer than `tiles` cells.
    """
    batch, height, width, channels = image.shape
    rows, columns = height // period, width // period
    if min(rows, columns) < tiles:
        raise ValueError(
            f"the lattice term needs sides of at least {period * tiles} pixels, "
            f"found {height} x {width}"
        )
    image = image[:, : rows * period, : columns * period]
    cells = image.reshape(batch, rows, period, columns, period, channels)
    cells = cells.transpose(0, 1, 3, 2, 4, 5)
    for axis, count in ((1, rows), (2, columns)):
        shifted = (
            jax.lax.slice_in_dim(cells, i, count - tiles + 1 + i, axis=axis)
            for i in range(tiles)
        )
        cells = sum(shifted, jnp.zeros(())) / tiles
    return cells.reshape(*cells.shape[:3], period**2, channels)
