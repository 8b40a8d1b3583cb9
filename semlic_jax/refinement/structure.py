# SPDX-License-Identifier: Apache-2.0
"""Terms of the objective that are weighted sums of squared errors.

One of them is nearly 1 - MS-SSIM (Wang et al. 2003). The contrast-structure part of
SSIM is exactly

    1 - var(x_hat - x) / (var(x) + var(x_hat) + c)

over a window. If var(x) stands for both variances, the mean of the error is not
subtracted and distances are small, 1 - MS-SSIM becomes a sum over five scales of
squared errors with weights that depend on x alone. On six photographs at 0.1 and
0.3 bpp, the sum was 0.86 to 1.25 times the true distance.

The other one is the lattice term (`objectives/lattice.py`) as it is, in windows of
2 x 2 cells, because refinement repeats itself over a few cells only.

Sums of squares have a Gauss-Newton matrix, which `newton.py` needs. The weights of the
mesh term are here too; it is no sum of squares and counts in gradients alone.
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
from semlic_jax.objectives.spectrum import (
    MESH_PIXELS,
    SPECTRUM_PIXELS,
    sliding_means,
)

Array = jax.Array

_MAX_LEVEL = 255.0
_WINDOW = 7
_CONTRAST = (0.03 * 255) ** 2  # c of SSIM, in 8-bit levels squared


def structure_weights(x: Array, weights: Array, sizes: Array) -> tuple[Array, ...]:
    """Weights of the squared errors at each scale s of MS-SSIM.

    There are as many scales as leave sides of a window, and MS-SSIM's weights of these
    scales are scaled to a sum of 1.

    Args:
        x: float32 [B, H, W, 3] in [0, 1].
        weights: weight of each pixel, [B, H, W]; 0 outside the image.
        sizes: real height and width of each image, [B, 2].

    Returns:
        for each scale float32 [B, H / 2^s, W / 2^s, 3].
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
    """Means over windows of 7 x 7 pixels, cut off at the border: [B, H, W, C]."""
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
    """Residuals at each scale whose squares add up to about 1 - MS-SSIM.

    Args:
        x, x_hat: float32 [B, H, W, 3] in [0, 1].
        weights: as in `structure_weights`.
        structure: the result of `structure_weights`; if empty, there are no residuals.

    Returns:
        for each scale float32 [B, H / 2^s, W / 2^s, 3].
    """
    # Errors beyond the image must not reach into cells that lie partly within it.
    error = jnp.where(weights[..., None] > 0, _MAX_LEVEL * (x_hat - x), 0.0)
    residuals = []
    for tolerance in structure:
        residuals.append(jnp.sqrt(tolerance) * error)
        error = halve(error)
    return residuals


def lattice_weights(x: Array, weights: Array, sizes: Array) -> Array:
    """Weights of the repeated parts in the windows of the lattice term.

    Windows that reach beyond the image have the weight 0. Without a region of interest,
    the term is that of `objectives.lattice.lattice` with `tiles=REFINED_TILES`.

    Args:
        x: float32 [B, H, W, 3] in [0, 1].
        weights: weight of each pixel, [B, H, W]; 0 outside the image.
        sizes: real height and width of each image, [B, 2].

    Returns:
        float32 [B, n, m] for n x m windows.

    Raises:
        ValueError: a side of x is smaller than a window.
    """
    shape = {"period": LATTICE_PIXELS, "tiles": REFINED_TILES}
    visible = visibility(x, **shape)
    side = LATTICE_PIXELS * REFINED_TILES
    inside = _inside(visible.shape[1:], LATTICE_PIXELS, side, sizes)
    means = jnp.mean(window_means(weights[..., None], **shape), axis=(3, 4))
    count = jnp.maximum(jnp.sum(inside, axis=(1, 2), keepdims=True), 1.0)
    return visible * means * inside / count


def lattice_residuals(x: Array, x_hat: Array, windows: Array) -> Array:
    """Residuals whose squares add up to the lattice term, [B, n, m, places, 3].

    Args:
        x, x_hat: float32 [B, H, W, 3] in [0, 1].
        windows: the result of `lattice_weights`.
    """
    repeated = repeated_part(x_hat - x, period=LATTICE_PIXELS, tiles=REFINED_TILES)
    size = repeated.shape[3] * repeated.shape[4]
    return jnp.sqrt(windows / size)[..., None, None] * repeated


def mesh_weights(weights: Array, sizes: Array) -> Array:
    """Weights of the patches of `objectives.spectrum.mesh_patches`, float32 [B, n, m].

    Patches that reach beyond the image have the weight 0. Without a region of interest,
    the weighted sum is `objectives.spectrum.mesh`.

    Args:
        weights: weight of each pixel, [B, H, W]; 0 outside the image.
        sizes: real height and width of each image, [B, 2].
    """
    batch, height, width = weights.shape
    step = SPECTRUM_PIXELS // 2
    cells = weights.reshape(batch, height // step, step, width // step, step)
    means = sliding_means(jnp.mean(cells, axis=(2, 4)), MESH_PIXELS // step)
    inside = _inside(means.shape[1:], step, MESH_PIXELS, sizes)
    pixels = jnp.prod(jnp.asarray(sizes).astype(jnp.float32), axis=1)
    return means * inside * (step**2 / pixels)[:, None, None]


def _inside(counts: Sequence[int], step: int, side: int, sizes: Array) -> Array:
    """1 for squares within the real image, else 0, float32 [B, n, m].

    Args:
        counts: n and m.
        step, side: distance and side of the squares, in pixels.
        sizes: real height and width of each image, [B, 2].
    """
    ends = (jnp.arange(count) * step + side for count in counts)
    rows, columns = (
        (end[None] <= sizes[:, axis, None]).astype(jnp.float32)
        for axis, end in enumerate(ends)
    )
    return rows[:, :, None] * columns[:, None, :]
