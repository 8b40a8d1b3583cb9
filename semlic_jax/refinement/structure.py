# SPDX-License-Identifier: Apache-2.0
"""Terms of the objective that are weighted sums of squared errors.

1 - MS-SSIM (Wang et al. 2003), nearly:

The contrast-structure part of SSIM is exactly

    1 - var(x_hat - x) / (var(x) + var(x_hat) + c)

over a window. With the variance of x for both, the mean of the window left in, and
small distances, 1 - MS-SSIM is a sum over five scales of squared errors with weights
that depend on x alone. On six photographs at 0.1 and 0.3 bpp it came to 0.86 to 1.25
times the true distance.

And the lattice term (`objectives/lattice.py`) as it is, in windows of 2 x 2 cells:
refinement repeats itself over a few cells only.

A sum of squares has a Gauss-Newton matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from semlic_jax.objectives.lattice import (
    LATTICE_PIXELS,
    REFINED_TILES,
    repeated_part,
    visibility,
    window_means,
)
from semlic_jax.objectives.similarity import MS_SSIM_WEIGHTS, halve

Array = jax.Array

_MAX_LEVEL = 255.0
_WINDOW = 7
_CONTRAST = (0.03 * 255) ** 2  # c of SSIM, in 8-bit levels squared


def structure_weights(x: Array, weights: Array, sizes: Array) -> tuple[Array, ...]:
    """Of squared errors at each scale of MS-SSIM: float32 [B, H / 2^s, W / 2^s, 3].

    As many scales as leave a window, their weights scaled to a sum of 1.

    Args:
        x: float32 [B, H, W, 3] in [0, 1].
        weights: of each pixel, [B, H, W]; 0 outside of the image.
        sizes: real height and width of each, [B, 2].
    """
    pixels = jnp.prod(jnp.asarray(sizes).astype(jnp.float32), axis=1)
    shares = np.array(MS_SSIM_WEIGHTS)
    shares = shares[
        : sum(min(x.shape[1:3]) >> s >= _WINDOW for s in range(len(shares)))
    ]
    x, weights = x * _MAX_LEVEL, weights[..., None]
    found = []
    for scale, share in enumerate(shares / shares.sum()):
        mean, square = _window_mean(x), _window_mean(jnp.square(x))
        variance = jnp.maximum(square - jnp.square(mean), 0.0)
        tolerance = _window_mean(1 / (2 * variance + _CONTRAST))
        factor = share * 4**scale / (3 * pixels)[:, None, None, None]
        found.append(factor * tolerance * weights)
        x, weights = halve(x), halve(weights)
    return tuple(found)


def _window_mean(x: Array) -> Array:
    """Means over windows of 7 x 7, those at the border smaller: [B, H, W, C]."""
    reach = _WINDOW // 2
    for axis in (1, 2):
        place = np.arange(x.shape[axis])
        count = np.minimum(place, reach) + np.minimum(place[::-1], reach) + 1
        pads = [(reach, reach) if i == axis else (0, 0) for i in range(4)]
        padded = jnp.pad(x, pads)
        shifted = (
            jax.lax.slice_in_dim(padded, start, start + x.shape[axis], axis=axis)
            for start in range(_WINDOW)
        )
        shape = [-1 if i == axis else 1 for i in range(4)]
        x = functools.reduce(jnp.add, shifted) / count.reshape(shape)
    return x


def structure_residuals(
    x: Array, x_hat: Array, weights: Array, structure: Sequence[Array]
) -> list[Array]:
    """Residuals at each scale, whose squares add up to about 1 - MS-SSIM.

    Args:
        x, x_hat: float32 [B, H, W, 3] in [0, 1].
        weights: as in `structure_weights`.
        structure: what that gave; empty for no residuals.
    """
    # What a decoder shows beyond the image must not reach into halved cells.
    error = jnp.where(weights[..., None] > 0, _MAX_LEVEL * (x_hat - x), 0.0)
    residuals = []
    for tolerance in structure:
        residuals.append(jnp.sqrt(tolerance) * error)
        error = halve(error)
    return residuals


def lattice_weights(x: Array, weights: Array, sizes: Array) -> Array:
    """Of what repeats in each window of the lattice term: float32 [B, n, m].

    Windows that reach beyond the image have none. Without a region of interest the
    term is `objectives.lattice.lattice` of the image.

    Args:
        x: float32 [B, H, W, 3] in [0, 1].
        weights: of each pixel, [B, H, W]; 0 outside of the image.
        sizes: real height and width of each, [B, 2].
    """
    shape = {"period": LATTICE_PIXELS, "tiles": REFINED_TILES}
    visible = visibility(x, **shape)
    side = LATTICE_PIXELS * REFINED_TILES
    ends = (jnp.arange(count) * LATTICE_PIXELS + side for count in visible.shape[1:])
    rows, columns = (
        (end[None] <= sizes[:, axis, None]).astype(jnp.float32)
        for axis, end in enumerate(ends)
    )
    inside = rows[:, :, None] * columns[:, None, :]
    means = jnp.mean(window_means(weights[..., None], **shape), axis=(3, 4))
    count = jnp.maximum(jnp.sum(inside, axis=(1, 2), keepdims=True), 1.0)
    return visible * means * inside / count


def lattice_residuals(x: Array, x_hat: Array, windows: Array) -> Array:
    """Residuals whose squares add up to the lattice term, [B, n, m, places, 3].

    Args:
        x, x_hat: float32 [B, H, W, 3] in [0, 1].
        windows: what `lattice_weights` gave.
    """
    repeated = repeated_part(x_hat - x, period=LATTICE_PIXELS, tiles=REFINED_TILES)
    size = repeated.shape[3] * repeated.shape[4]
    return jnp.sqrt(windows / size)[..., None, None] * repeated
