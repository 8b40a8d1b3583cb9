# SPDX-License-Identifier: Apache-2.0
"""Distances of the statistics of features: how a texture looks, not where it lies.

These are distances of Gram matrices and of means, over whole maps and over patches, one
value per image, float32 [B]. The networks that the features come from are in
`features.py`, the other terms of the loss in `losses.py`. Imports jax only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

LOCAL_PATCH_PIXELS = 16
LOCAL_MEAN_PIXELS = 64


def gram_distance(features: jax.Array, features_hat: jax.Array) -> jax.Array:
    """Squared Frobenius distance of two normalised Gram matrices, float32 [...].

    || F^T F - G^T G ||^2 / (C N)^2 for F, G of N positions and C channels.

    With D = F - G and S = F + G, the difference is (D^T S + S^T D) / 2, which keeps its
    precision where the two are nearly equal. Its norm is taken from the [C, C] or the
    [N, N] products, whichever are smaller.

    Args:
        features, features_hat: float [..., N, C].
    """
    f, g = features.astype(jnp.float32), features_hat.astype(jnp.float32)
    # As a float, since for large maps the square does not fit 32 bits.
    return _gram_square(f, g) / float(f.shape[-1] * f.shape[-2]) ** 2


@jax.custom_vjp
def _gram_square(f: jax.Array, g: jax.Array) -> jax.Array:
    """|| F^T F - G^T G ||^2, float32 [...].

    The gradient is written by hand, since the products that it needs are symmetric or
    known already: for one of the arguments it takes one or two further products, where
    the automatic gradient takes two or six.
    """
    return _gram_square_forward(f, g)[0]


def _gram_square_forward(f: jax.Array, g: jax.Array) -> tuple[jax.Array, Any]:
    difference, total = f - g, f + g
    positions, channels = f.shape[-2:]
    if channels <= positions:
        product = jnp.einsum("...nc,...nd->...cd", difference, total)
        matrix = (product + jnp.swapaxes(product, -1, -2)) / 2
        return jnp.sum(jnp.square(matrix), axis=(-2, -1)), (f, g, (matrix,))
    # ||A + A^T||^2 / 4 = (tr(A A^T) + tr(A A)) / 2 for A = D^T S, by cyclic traces.
    dd, ss, sd = (
        jnp.einsum("...nc,...mc->...nm", a, b)
        for a, b in (
            (difference, difference),
            (total, total),
            (total, difference),
        )
    )
    square = jnp.sum(dd * ss + sd * jnp.swapaxes(sd, -1, -2), axis=(-2, -1)) / 2
    return square, (f, g, (dd, ss, sd))


def _gram_square_backward(residual: Any, gradient: jax.Array) -> tuple[jax.Array, ...]:
    f, g, products = residual
    scale = gradient[..., None, None]
    if len(products) == 1:
        # With M = F^T F - G^T G the gradients are 4 F M and -4 G M.
        matrix = 4 * scale * products[0]
        to_f = jnp.einsum("...nc,...cd->...nd", f, matrix)
        return to_f, -jnp.einsum("...nc,...cd->...nd", g, matrix)
    dd, ss, sd = products
    ds = jnp.swapaxes(sd, -1, -2)

    def along(of_difference: jax.Array, of_total: jax.Array) -> jax.Array:
        multiply = partial(jnp.einsum, "...nm,...mc->...nc")
        return multiply(of_difference * scale, f - g) + multiply(
            of_total * scale, f + g
        )

    return along(ss + ds, dd + sd), along(ds - ss, dd - sd)


_gram_square.defvjp(_gram_square_forward, _gram_square_backward)


def style(taps: Sequence[jax.Array], taps_hat: Sequence[jax.Array]) -> jax.Array:
    """Distance of Gram matrices over whole feature maps, float32 [B].

    sum_l || G_l(x) - G_l(x_hat) ||_F^2, G_l = F_l^T F_l / (C_l H_l W_l)
    (Gatys et al. 2016, normalised as in Johnson et al. 2016, arXiv:1603.08155).

    The distance grows with the fourth power of the features. After
    `features.normalise_channels`, its scale does not depend on the trunk.

    Args:
        taps, taps_hat: feature maps of each layer, [B, h, w, C].
    """
    distances = []
    for f, g in zip(taps, taps_hat, strict=True):
        shape = (f.shape[0], f.shape[1] * f.shape[2], f.shape[3])
        distances.append(gram_distance(f.reshape(shape), g.reshape(shape)))
    return sum(distances[1:], distances[0])


def local_style(
    taps: Sequence[jax.Array],
    taps_hat: Sequence[jax.Array],
    image_size: tuple[int, int],
    *,
    patch_pixels: int = LOCAL_PATCH_PIXELS,
) -> jax.Array:
    """Distance of Gram matrices over patches, averaged over patches, float32 [B].

    It keeps texture where it belongs, which whole-map statistics do not. The side of a
    patch in cells is patch_pixels / stride of the layer, rounded, and at least 1. Maps
    are filled up with zeros to whole patches.

    Args:
        taps, taps_hat: feature maps of each layer, [B, h, w, C].
        image_size: height and width of the images, from which each layer's stride
            follows.
        patch_pixels: side of a patch in pixels.
    """

    distances = []
    for f, g in zip(taps, taps_hat, strict=True):
        f, g = (_patches(tap, image_size, patch_pixels) for tap in (f, g))
        distances.append(jnp.mean(gram_distance(f, g), axis=-1))
    return sum(distances[1:], distances[0])


def _split(f: jax.Array, image_size: tuple[int, int], pixels: int) -> jax.Array:
    """Split a map [B, h, w, C] into patches [B, rows, side, columns, side, C]."""
    sides = [
        max(1, round(pixels * cells / side))
        for cells, side in zip(f.shape[1:3], image_size, strict=True)
    ]
    fill = [(0, -n % side) for n, side in zip(f.shape[1:3], sides, strict=True)]
    f = jnp.pad(f, ((0, 0), *fill, (0, 0)))
    batch, height, width, channels = f.shape
    rows, columns = height // sides[0], width // sides[1]
    return f.reshape(batch, rows, sides[0], columns, sides[1], channels)


def _patches(f: jax.Array, image_size: tuple[int, int], pixels: int) -> jax.Array:
    """The patches [B, patches, cells, C] of a map, see `local_style`."""
    f = _split(f, image_size, pixels)
    batch, rows, high, columns, wide, channels = f.shape
    return f.transpose(0, 1, 3, 2, 4, 5).reshape(
        batch, rows * columns, high * wide, channels
    )


def mean_style(taps: Sequence[jax.Array], taps_hat: Sequence[jax.Array]) -> jax.Array:
    """Relative distance of mean features over whole maps, float32 [B].

    sum_l |m_l(x) - m_l(x_hat)|^2 / (|m_l(x)|^2 + 1e-6), with m_l the mean of the
    features of layer l over its map: the first of the statistics that stand for style
    in Li et al. 2017 (arXiv:1701.01036). Unlike the Gram matrices of unit vectors, it
    sees how strong the features are, and blur weakens them.

    Args:
        taps, taps_hat: feature maps of each layer, [B, h, w, C], not normalised; no
            gradient flows to `taps`.
    """
    total = jnp.zeros(taps[0].shape[0], jnp.float32)
    for f, g in zip(taps, taps_hat, strict=True):
        mean, mean_hat = (
            jnp.mean(tap.astype(jnp.float32), axis=(1, 2))
            for tap in (jax.lax.stop_gradient(f), g)
        )
        square = jnp.sum(jnp.square(mean - mean_hat), axis=-1)
        total = total + square / (jnp.sum(jnp.square(mean), axis=-1) + 1e-6)
    return total


def local_mean_style(
    taps: Sequence[jax.Array],
    taps_hat: Sequence[jax.Array],
    image_size: tuple[int, int],
    *,
    patch_pixels: int = LOCAL_MEAN_PIXELS,
    powers: Sequence[jax.Array] | None = None,
) -> jax.Array:
    """Relative distance of mean features over patches, float32 [B].

    sum_l mean_p |m_lp(x) - m_lp(x_hat)|^2 / (mean_p |m_lp(x)|^2 + 1e-6), with m_lp the
    mean over patch p. This is `mean_style` where the texture is; plain patches count
    little.

    Args:
        taps, taps_hat: as in `mean_style`.
        image_size, patch_pixels: as in `local_style`.
        powers: replaces mean_p |m_lp(x)|^2 of each layer, [B]; that of the whole image
            if the taps are of a part of it.
    """
    if powers is None:
        powers = local_mean_powers(taps, image_size, patch_pixels=patch_pixels)
    total = jnp.zeros(taps[0].shape[0], jnp.float32)
    for f, g, power in zip(taps, taps_hat, powers, strict=True):
        mean, mean_hat = (
            _patch_means(tap, image_size, patch_pixels)
            for tap in (jax.lax.stop_gradient(f), g)
        )
        total = total + _mean_square(mean - mean_hat) / (power + 1e-6)
    return total


def local_mean_powers(
    taps: Sequence[jax.Array],
    image_size: tuple[int, int],
    *,
    patch_pixels: int = LOCAL_MEAN_PIXELS,
) -> list[jax.Array]:
    """The mean_p |m_lp(x)|^2 of `local_mean_style` for each layer, float32 [B]."""
    return [
        _mean_square(_patch_means(tap, image_size, patch_pixels))
        for tap in jax.lax.stop_gradient(list(taps))
    ]


def _patch_means(f: jax.Array, image_size: tuple[int, int], pixels: int) -> jax.Array:
    """Means over the patches of a map, float32 [B, rows, columns, C]."""
    f = _split(f.astype(jnp.float32), image_size, pixels)
    return jnp.mean(f, axis=(2, 4))


def _mean_square(means: jax.Array) -> jax.Array:
    return jnp.mean(jnp.sum(jnp.square(means), axis=-1), axis=(1, 2))
