# SPDX-License-Identifier: Apache-2.0
"""Three of the four transforms of HiFiC (arXiv:2006.09965): g_a, g_s and h_a.

The fourth, h_s, works on integers and is in `model.context`. The caller chooses all
widths; with `patch=1` and `linear_skip=False` the transforms are those of HiFiC (with
the symmetric padding of PyTorch, as in MS-ILLM).

Two options let small models train in hours instead of weeks:

* `patch`: the first and last convolutions work on blocks of `patch x patch` pixels,
  which removes the full-resolution levels, the most expensive part of a narrow network.
* `linear_skip`: a trainable linear transform runs beside the network, whose last layers
  start at zero, so training starts from a working codec. The linear transform is
  lapped, so that no block borders show at the start: a filter across the borders of
  16 x 16 blocks (Malvar's LOT, written as a time-domain filter: Tran et al. 2003,
  "Lapped transform via time-domain pre- and post-filtering"), then a linear map of each
  block, which starts as the Karhunen-Loève transform of photographs (`training.klt`).
  The last layers of g_s also see the output of the linear part.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from semlic_jax.model.layers import (
    ChannelNorm,
    Conv,
    ConvTranspose,
    ResidualBlock,
    depth_to_space,
    space_to_depth,
)
from semlic_jax.model.texture import Texture
from semlic_jax.model.tiles import over_tiles

Array = jax.Array

STRIDE = 16  # pixels per latent
HYPER_STRIDE = 64  # pixels per hyper-latent
_MID_GREY = 0.5


def _halo(level_blocks: int) -> int:
    """The largest distance in latents that g_a or the fine levels of g_s can see.

    A step between levels and a residual block each reach one position of the coarser
    level, and each level is half as coarse as the one before; the other layers reach
    less than one latent.
    """
    return 2 * (1 + level_blocks) + 1


def lapping_matrix() -> np.ndarray:
    """The filter across a block border that turns a block DCT into the LOT.

    Returns:
        float64 [16, 16], orthonormal; it acts on the 16 samples around a border. Its
        transpose is its inverse.
    """
    half = STRIDE // 2
    k, i = np.mgrid[:half, :half]
    dct_2 = np.sqrt(2 / half) * np.cos(np.pi * (i + 0.5) * k / half)
    dct_2[0] /= np.sqrt(2)
    dct_4 = np.sqrt(2 / half) * np.cos(np.pi * (i + 0.5) * (k + 0.5) / half)
    eye = np.eye(half)
    flip = eye[::-1]
    butterfly = np.block([[eye, flip], [flip, -eye]])
    core = np.zeros((STRIDE, STRIDE))
    core[:half, :half] = eye
    core[half:, half:] = flip @ dct_2.T @ dct_4 @ flip
    return butterfly @ core @ butterfly / 2


def filter_borders(x: Any, matrix: Any) -> Any:
    """Apply a matrix to the 16 samples around each border of 16 x 16 blocks.

    Args:
        x: [B, H, W, C], JAX or NumPy, H and W multiples of 16. The outer 8 rows and
            columns touch no border and stay as they are.
        matrix: [16, 16], `out[j] = sum_k matrix[j, k] in[k]`; applied first across the
            borders between rows of blocks, then between columns.
    """
    xp: Any = np if isinstance(x, np.ndarray) else jnp
    half = STRIDE // 2
    batch, height, width, channels = x.shape
    if height > STRIDE:
        inner = x[:, half:-half].reshape(batch, -1, STRIDE, width * channels)
        inner = xp.einsum("bnkc,jk->bnjc", inner, matrix)
        inner = inner.reshape(batch, height - STRIDE, width, channels)
        x = xp.concatenate([x[:, :half], inner, x[:, -half:]], 1)
    if width > STRIDE:
        inner = x[:, :, half:-half].reshape(batch, height, -1, STRIDE, channels)
        inner = xp.einsum("bhnkc,jk->bhnjc", inner, matrix)
        inner = inner.reshape(batch, height, width - STRIDE, channels)
        x = xp.concatenate([x[:, :, :half], inner, x[:, :, -half:]], 2)
    return x


class AnalysisTransform(nn.Module):
    """g_a: image -> y.

    Attributes:
        widths: channels at each level, finest first; `log2(16 / patch) + 1` of them.
        latent_channels: channels of y.
        patch: side in pixels of the blocks on which the first layer works.
        linear_skip: whether to add the linear transform.
        level_blocks: residual blocks at each level but the last.
        block_remat: whether to recompute the residual blocks in the backward pass.
        dtype: the type of the computation.
        tile: largest number of latents along a side to compute at once (see `tiles`),
            for use once the parameters exist; 0 for no limit.
    """

    widths: tuple[int, ...]
    latent_channels: int
    patch: int = 1
    linear_skip: bool = False
    level_blocks: int = 0
    block_remat: bool = False
    dtype: Any = jnp.float32
    tile: int = 0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps float [B, H, W, 3] in [0, 1], H and W multiples of 16, to float32
        [B, H/16, W/16, M]."""
        grid = (x.shape[1] // STRIDE, x.shape[2] // STRIDE)
        if not self.tile or max(grid) <= self.tile:
            return self._latents(x)
        return over_tiles(
            self,
            lambda g_a, _, x: g_a._latents(x),
            [x],
            grid,
            self.tile,
            _halo(self.level_blocks),
            (1, self.latent_channels),
        )

    @nn.nowrap
    def _latents(self, x: Array) -> Array:
        kernel = 7 if self.patch == 1 else 5
        h = space_to_depth(x, self.patch)
        h = Conv(self.widths[0], kernel, dtype=self.dtype)(h)
        h = nn.relu(ChannelNorm()(h))
        block = nn.remat(ResidualBlock) if self.block_remat else ResidualBlock
        for level, width in enumerate(self.widths[1:]):
            for i in range(self.level_blocks):
                h = block(dtype=self.dtype, name=f"level_{level}_block_{i}")(h)
            h = nn.relu(ChannelNorm()(Conv(width, stride=2, dtype=self.dtype)(h)))
        init = Conv.kernel_init
        if self.linear_skip:
            init = nn.initializers.zeros
        y = Conv(self.latent_channels, dtype=self.dtype, kernel_init=init)(h)
        y = y.astype(jnp.float32)
        if self.linear_skip:
            lapping = self.param(
                "skip_lapping", lambda _: jnp.asarray(lapping_matrix())
            )
            lapped = filter_borders(x - _MID_GREY, lapping)
            blocks = space_to_depth(lapped, STRIDE)
            skip = nn.Dense(self.latent_channels, use_bias=False, name="skip")
            y = y + skip(blocks)
        return y


class SynthesisTransform(nn.Module):
    """g_s: y_hat -> image.

    Attributes:
        widths: as in `AnalysisTransform`.
        blocks: residual blocks at 1/16 resolution.
        patch, linear_skip, dtype: as in `AnalysisTransform`.
        head_norm: whether to apply ChannelNorm to y_hat, as HiFiC does; otherwise there
            is a learnt scale per channel. The latents of a linear transform carry
            information in their magnitude, which the norm would remove.
        texture_channels: noise channels after each upsampling step (see `texture`); 0
            for none.
        level_blocks: residual blocks after each upsampling step and its noise.
        block_remat: whether to recompute the residual blocks in the backward pass.
        tile: as in `AnalysisTransform`, for the levels finer than 1/16.
    """

    widths: tuple[int, ...]
    blocks: int
    patch: int = 1
    linear_skip: bool = False
    head_norm: bool = True
    texture_channels: int = 0
    level_blocks: int = 0
    block_remat: bool = False
    dtype: Any = jnp.float32
    tile: int = 0

    @nn.compact
    def __call__(
        self, y_hat: Array, quality: Array, noise_origin: Array | None = None
    ) -> Array:
        """Maps y_hat float32 [B, h, w, M] and quality [B] in [0, 1] to x_hat float32
        [B, 16h, 16w, 3], about [0, 1], not clipped. The latents start at
        `noise_origin`, int [B, 2], row and column, which determines the noise; None
        means (0, 0)."""
        h = self._coarse(y_hat, quality)
        grid = (y_hat.shape[1], y_hat.shape[2])
        if not self.tile or max(grid) <= self.tile:
            return self._fine(h, y_hat, noise_origin)
        origin = jnp.int32(0) if noise_origin is None else noise_origin
        return over_tiles(
            self,
            lambda g_s, start, h, y_hat: g_s._fine(h, y_hat, origin + start[None]),
            [h, y_hat],
            grid,
            self.tile,
            _halo(self.level_blocks),
            (STRIDE, 3),
        )

    @nn.nowrap
    def _coarse(self, y_hat: Array, quality: Array) -> Array:
        """The input of the finer levels, [B, h, w, C]."""
        channels = y_hat.shape[-1]
        if self.head_norm:
            h = ChannelNorm()(y_hat)
        else:
            scale = self.param("input_scale", nn.initializers.ones, (channels,))
            h = y_hat * scale
        h = Conv(self.widths[-1], dtype=self.dtype)(h)
        # This tells the decoder how coarsely the latents were quantised.
        features = jnp.stack([quality, quality**2], -1)
        shift = nn.Dense(
            self.widths[-1], kernel_init=nn.initializers.zeros, name="quality"
        )(features)
        h = h + shift[:, None, None, :].astype(h.dtype)
        head = h = ChannelNorm()(h)
        block = nn.remat(ResidualBlock) if self.block_remat else ResidualBlock
        for i in range(self.blocks):
            h = block(dtype=self.dtype, name=f"block_{i}")(h)
        return h + head

    @nn.nowrap
    def _fine(self, h: Array, y_hat: Array, noise_origin: Array | None) -> Array:
        """x_hat from the output h of the coarse level, and from y_hat linearly."""
        block = nn.remat(ResidualBlock) if self.block_remat else ResidualBlock
        for level, width in enumerate(self.widths[-2::-1]):
            h = nn.relu(ChannelNorm()(ConvTranspose(width, dtype=self.dtype)(h)))
            if self.texture_channels:
                texture = Texture(
                    self.texture_channels, level, self.dtype, name=f"texture_{level}"
                )
                origin = None
                if noise_origin is not None:
                    origin = noise_origin << (level + 1)
                h = texture(h, origin)
            for i in range(self.level_blocks):
                h = block(dtype=self.dtype, name=f"level_{level}_block_{i}")(h)
        kernel = 7 if self.patch == 1 else 5
        init = nn.initializers.zeros if self.linear_skip else Conv.kernel_init
        out = Conv(3 * self.patch**2, kernel, dtype=self.dtype, kernel_init=init)(h)
        x_hat = depth_to_space(out.astype(jnp.float32), self.patch)
        if self.linear_skip:
            skip = nn.Dense(3 * STRIDE**2, use_bias=False, name="skip")
            lapping = self.param(
                "skip_lapping", lambda _: jnp.asarray(lapping_matrix().T)
            )
            linear = filter_borders(depth_to_space(skip(y_hat), STRIDE), lapping)
            x_hat = x_hat + linear + _MID_GREY
            seen = space_to_depth(x_hat - _MID_GREY, self.patch).astype(self.dtype)
            h = jnp.concatenate([h, seen], -1)
            h = Conv(self.widths[0], dtype=self.dtype, name="repair_0")(h)
            h = nn.relu(ChannelNorm(name="repair_norm")(h))
            h = Conv(
                3 * self.patch**2,
                dtype=self.dtype,
                kernel_init=init,
                name="repair_1",
            )(h)
            x_hat = x_hat + depth_to_space(h.astype(jnp.float32), self.patch)
        return x_hat


class HyperAnalysis(nn.Module):
    """h_a: y -> z, HiFiC's three convolutions.

    Attributes:
        channels: number of channels of z and of the hidden layers.
        input_scale: whether to learn a scale per input channel (see
            `SynthesisTransform.head_norm`).
    """

    channels: int
    input_scale: bool = False

    @nn.compact
    def __call__(self, y: Array) -> Array:
        """Maps float32 [B, h, w, M], h and w multiples of 4, to [B, h/4, w/4, N]."""
        if self.input_scale:
            init = nn.initializers.ones
            y = y * self.param("input_scale", init, (y.shape[-1],))
        h = nn.relu(Conv(self.channels)(y))
        h = nn.relu(Conv(self.channels, 5, stride=2)(h))
        return Conv(self.channels, 5, stride=2)(h)
