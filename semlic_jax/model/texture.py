# SPDX-License-Identifier: Apache-2.0
"""Noise from which a decoder makes texture.

Small files say little about sand, fur or grain, and a decoder that has to produce
texture without a source of randomness can only repeat the same pattern in each cell of
the latents. g_s can therefore have noise at each level of its upward path (as in
StyleGAN, arXiv:1812.04948), weighted by its features, which say where texture belongs
and of which kind.

The noise is a function of the place in the image: a hash of row, column, channel and
level. A file therefore always decodes to the same picture, however it is padded.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from semlic_jax.model.layers import Conv

Array = jax.Array

# How far apart the hash inputs of neighbours are in each direction; odd numbers.
_STEPS = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)
# The mixing function of Wellons ("Hash prospector", lowbias32): shifts and multipliers.
_MIX = ((16, 0x7FEB352D), (15, 0x846CA68B))
_LAST_SHIFT = 16


def texture_noise(
    size: tuple[int, int], channels: int, level: int, origin: Array | None = None
) -> Array:
    """Noise of mean 0 and variance 1, uniform between +-sqrt(3).

    Args:
        size: height and width of the map.
        channels: C; the channels are independent of each other.
        level: the level of the upward path; levels are independent of each other.
        origin: int [B, 2], the row and column at which the map starts. Training draws
            them at random, so that the noise at a given place varies, and a part of an
            image has its own position. None means (0, 0), as when a file is decoded.

    Returns:
        float32 [B, H, W, C], B = 1 without an origin.
    """
    if origin is None:
        origin = jnp.zeros((1, 2), jnp.int32)
    rows, columns = (
        (origin[:, axis, None] + jnp.arange(side)).astype(jnp.uint32)
        for axis, side in enumerate(size)
    )
    steps = [jnp.uint32(step) for step in _STEPS]
    bits = (
        (rows * steps[0])[:, :, None, None]
        + (columns * steps[1])[:, None, :, None]
        + jnp.arange(channels, dtype=jnp.uint32) * steps[2]
        + jnp.uint32(level + 1) * steps[3]
    )
    for shift, factor in _MIX:
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    bits = bits ^ (bits >> _LAST_SHIFT)
    # float32 holds whole numbers of 24 bits exactly.
    unit = ((bits >> 8).astype(jnp.float32) + 0.5) * 2.0**-24
    return (unit - 0.5) * 12**0.5


class Texture(nn.Module):
    """h + mix(gate(h) * noise), both 1x1 convolutions; the identity at the start.

    Attributes:
        channels: number of noise channels.
        level: see `texture_noise`.
        dtype: the type of the computation.
    """

    channels: int
    level: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h: Array, origin: Array | None = None) -> Array:
        """Maps [B, H, W, C] to the same shape; see `texture_noise` for the origin."""
        gate = Conv(self.channels, 1, dtype=self.dtype, name="gate")(h)
        size = (h.shape[1], h.shape[2])
        noise = texture_noise(size, self.channels, self.level, origin)
        mix = Conv(
            h.shape[-1],
            1,
            dtype=self.dtype,
            kernel_init=nn.initializers.zeros,
            name="mix",
        )
        return h + mix(gate * noise.astype(self.dtype))
