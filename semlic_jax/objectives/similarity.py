# SPDX-License-Identifier: Apache-2.0
"""PSNR and MS-SSIM of images, and the pixels that all metrics start from.

Both metrics have the forms that are usual in the field. Losses and refinement build on
the parts of MS-SSIM, other metrics on `as_pair` and `exact`. Metrics that use networks,
and metrics by name, are in `metrics.py`. Imports jax and numpy only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Images = jax.Array | np.ndarray

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
MS_SSIM_LEAST_SIDE = 161  # 11 pixels at the fifth scale
_WINDOW_SIDE, _WINDOW_SIGMA = 11, 1.5


class ImageTooSmallError(ValueError):
    """The images are smaller than the metric is defined for."""


def as_pixels(images: Images) -> jax.Array:
    """Images as float32 [B, H, W, 3] in 0..255, unrounded.

    Args:
        images: uint8, or float in [0, 1]; [H, W, 3] or [B, H, W, 3].

    Raises:
        ValueError: the images are not of this form.
    """
    images = jnp.asarray(images)
    if images.ndim == 3:
        images = images[None]
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"images should be [H, W, 3] or [B, H, W, 3], found shape {images.shape}"
        )
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32)
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images.astype(jnp.float32) * 255
    raise ValueError(
        f"images should be uint8, or float in [0, 1], found {images.dtype}"
    )


def as_pair(reference: Images, image: Images) -> tuple[jax.Array, jax.Array]:
    """Both images as `as_pixels` gives them.

    Raises:
        ValueError: their shapes differ; see also `as_pixels`.
    """
    x, x_hat = as_pixels(reference), as_pixels(image)
    if x.shape != x_hat.shape:
        raise ValueError(
            "original and reconstruction should have one shape, "
            f"found {x.shape} and {x_hat.shape}"
        )
    return x, x_hat


def exact(function: Callable) -> Callable:
    """Compile a function by `jax.jit`, with full float32 products on any device."""
    compiled = jax.jit(function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return compiled(*args)

    return call


@exact
def psnr_db(reference: Images, image: Images) -> jax.Array:
    """Peak signal-to-noise ratio of 8-bit images in dB, float32 [B].

    10 log10(255^2 / mean of squared differences over pixels and channels), where float
    images are first rounded to 8 bits. It is infinite for equal images.
    """
    x, x_hat = as_pair(reference, image)
    x, x_hat = (jnp.clip(jnp.round(pixels), 0, 255) for pixels in (x, x_hat))
    mse = jnp.mean(jnp.square(x - x_hat), axis=(1, 2, 3))
    return 10 * jnp.log10(255.0**2 / mse)


def _blur(x: jax.Array) -> jax.Array:
    """Apply MS-SSIM's Gaussian window to rows and columns, without padding.

    It adds up shifted images: a depthwise convolution is many times slower on a CPU.
    """
    offsets = np.arange(_WINDOW_SIDE) - _WINDOW_SIDE // 2
    window = np.exp(-(offsets**2) / (2 * _WINDOW_SIGMA**2))
    window /= window.sum()
    for axis in (1, 2):
        length = x.shape[axis] - _WINDOW_SIDE + 1
        shifted = (
            weight * jax.lax.slice_in_dim(x, start, start + length, axis=axis)
            for start, weight in enumerate(window.astype(np.float32))
        )
        x = functools.reduce(jnp.add, shifted)
    return x


def ssim_terms(x: jax.Array, x_hat: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Means over pixels of SSIM and of its contrast-structure part, [B, 3] each.

    The arguments are pixels 0..255, shifted by -128.
    """
    ssim, contrast = _ssim_maps(x, x_hat)
    return jnp.mean(ssim, axis=(1, 2)), jnp.mean(contrast, axis=(1, 2))


def _ssim_maps(x: jax.Array, x_hat: jax.Array) -> tuple[jax.Array, jax.Array]:
    """SSIM and its contrast-structure part in each window, [B, H - 10, W - 10, 3].

    The arguments are pixels 0..255, shifted by -128: this does not change variances,
    and float32 keeps two more of their bits.
    """
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    maps = jnp.concatenate([x, x_hat, x * x + x_hat * x_hat, x * x_hat], axis=-1)
    mean, mean_hat, squares, products = jnp.split(_blur(maps), 4, axis=-1)
    variances = squares - mean * mean - mean_hat * mean_hat
    covariance = products - mean * mean_hat
    contrast = (2 * covariance + c2) / (variances + c2)
    mean, mean_hat = mean + 128, mean_hat + 128
    luminance = (2 * mean * mean_hat + c1) / (mean * mean + mean_hat * mean_hat + c1)
    return luminance * contrast, contrast


def halve(x: jax.Array) -> jax.Array:
    """Means over 2 x 2 pixels [B, H, W, C] that are shifted by -128.

    An odd side gets a row of black at both ends, as is usual in the field; the one at
    the far end then makes no whole cell.
    """
    pads = [(n % 2, n % 2) for n in x.shape[1:3]]
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=-128.0)
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return jnp.mean(x, axis=(2, 4))


@exact
def ms_ssim(reference: Images, image: Images) -> jax.Array:
    """Multi-scale structural similarity, float32 [B], 1 for equal images.

    This is Wang et al. 2003 in the usual form (pytorch-msssim): a Gaussian window of 11
    pixels and sigma 1.5, five scales, a range of 255, and the mean over the channels.
    Negative factors count as 0.

    Raises:
        ImageTooSmallError: a side is under 161 pixels.
        ValueError: see `as_pair`.
    """
    x, x_hat = as_pair(reference, image)
    _require_side(x.shape, MS_SSIM_LEAST_SIDE, "MS-SSIM")
    x, x_hat = x - 128, x_hat - 128
    product = jnp.ones((x.shape[0], 3), jnp.float32)
    for scale, weight in enumerate(MS_SSIM_WEIGHTS):
        ssim, contrast = ssim_terms(x, x_hat)
        last = scale == len(MS_SSIM_WEIGHTS) - 1
        product = product * jnp.maximum(ssim if last else contrast, 0) ** weight
        if not last:
            x, x_hat = halve(x), halve(x_hat)
    return jnp.mean(product, axis=-1)


@exact
def ms_ssim_within(reference: Images, image: Images, sizes: jax.Array) -> jax.Array:
    """`ms_ssim` of the upper left part of each image, with one program for all sizes.

    Args:
        reference, image: [B, H, W, 3], see `ms_ssim`.
        sizes: height and width of each part, int [B, 2]. The result for a part with a
            side under 161 pixels means nothing.

    Raises:
        ImageTooSmallError: a side of the whole images is under 161 pixels.
        ValueError: see `as_pair`.
    """
    x, x_hat = as_pair(reference, image)
    _require_side(x.shape, MS_SSIM_LEAST_SIDE, "MS-SSIM")
    return jax.vmap(_ms_ssim_within)(x - 128, x_hat - 128, sizes)


def _ms_ssim_within(x: jax.Array, x_hat: jax.Array, size: jax.Array) -> jax.Array:
    """MS-SSIM of the upper left part of one pair, a scalar.

    Args:
        x, x_hat: pixels 0..255, shifted by -128, [H, W, 3].
        size: height and width of the part, int [2].
    """
    product = jnp.ones(3, jnp.float32)
    for scale, weight in enumerate(MS_SSIM_WEIGHTS):
        last = scale == len(MS_SSIM_WEIGHTS) - 1
        factors = _ssim_maps(x[None], x_hat[None])[0 if last else 1][0]
        windows = size - (_WINDOW_SIDE - 1)
        factors = jnp.where(_inside(factors, windows), factors, 0)
        factor = jnp.sum(factors, axis=(0, 1)) / jnp.prod(windows)
        product = product * jnp.maximum(factor, 0) ** weight
        if not last:
            x, x_hat = (_halve_within(pixels, size) for pixels in (x, x_hat))
            size = (size + 1) // 2
    return jnp.mean(product)


def _inside(x: jax.Array, size: jax.Array) -> jax.Array:
    """A mask of the upper left part, of this size [2], of x [H, W, C]: [H, W, 1]."""
    rows, columns = (jnp.arange(side) for side in x.shape[:2])
    return (rows[:, None] < size[0])[..., None] & (columns < size[1])[None, :, None]


def _halve_within(x: jax.Array, size: jax.Array) -> jax.Array:
    """Apply `halve` to the upper left part, of this size [2], of x [H, W, C]."""
    height, width, channels = x.shape
    even = (height + height % 2, width + width % 2, channels)
    pads = ((1, height % 2), (1, width % 2), (0, 0))
    x = jnp.pad(x, pads, constant_values=-128.0)
    # An odd side has a row of black before it; the one after it makes no whole cell.
    x = jax.lax.dynamic_slice(x, (1 - size[0] % 2, 1 - size[1] % 2, 0), even)
    return halve(x[None])[0]


def _require_side(shape: Sequence[int], least: int, metric: str) -> None:
    height, width = shape[-3:-1]
    if min(height, width) < least:
        raise ImageTooSmallError(
            f"{metric} needs images of at least {least}x{least} pixels, "
            f"found {width}x{height}"
        )
