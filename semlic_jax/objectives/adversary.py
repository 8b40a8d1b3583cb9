# SPDX-License-Identifier: Apache-2.0
"""The non-binary adversary of MS-ILLM (arXiv:2301.11189): labeller and discriminator.

The labeller is the VQ-VAE whose codes label each 8 x 8 cell of an original. What its
training needs is here too: losses of its codebook, re-seeding of dead codes and the
perplexity. The discriminator is a U-Net that gives each cell C + 1 logits, of which
class 0 is "fake". The adversarial losses are in `losses.py`, optimisers and schedules
in `semlic_jax.training`.

By default, both networks have the reference's form and size. `patch` and narrower
`widths` make the small convolutional forms that train on a CPU. Everything is NHWC,
parameters are float32, and images are float [B, H, W, 3] in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from semlic_jax.model.layers import (
    ChannelNorm,
    Conv,
    depth_to_space,
    space_to_depth,
)
from semlic_jax.objectives.features import normalise_channels

Array = jax.Array

_NORMALISE_EPS = 1e-12
_SLOPE = 0.2  # slope of the discriminator's leaky ReLU
_TAP_SCALE = 4.0


class Quantised(NamedTuple):
    """The labeller's output for a batch.

    Attributes:
        x_hat: the reconstruction, float32 [B, H, W, 3], not clipped.
        codes: the code of each cell, int32 [B, H/8, W/8] in 0 ... C - 1.
        embeddings: unit vectors before quantisation, float32 [B, H/8, W/8, E].
        commitment: mean squared distance of embeddings and their codes, float32 scalar,
            with a gradient to the embeddings alone.
        embedding: mean squared distance of embeddings and their codes, float32 scalar,
            with a gradient to the codebook alone.
    """

    x_hat: Array
    codes: Array
    embeddings: Array
    commitment: Array
    embedding: Array


def upsample(x: Array, factor: int = 2) -> Array:
    """Upsample [B, H, W, C] by repeating each cell `factor` times along both sides."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(
        x[:, :, None, :, None], (batch, height, factor, width, factor, channels)
    )
    return x.reshape(batch, height * factor, width * factor, channels)


def _average_pool(x: Array) -> Array:
    """Mean over 2 x 2 cells; an odd last row or column is dropped."""
    height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    x = x[:, :height, :width]
    x = (x[:, ::2] + x[:, 1::2]) / 2
    return (x[:, :, ::2] + x[:, :, 1::2]) / 2


def _unit_vectors(x: Array, axis: int = -1) -> Array:
    square = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
    return x * lax.rsqrt(jnp.maximum(square, _NORMALISE_EPS))


class _SwishBlock(nn.Module):
    """VQGAN's residual block: twice norm, swish and convolution, beside a shortcut.

    The shortcut is a 1x1 convolution if the number of channels changes.
    """

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = Conv(self.features, dtype=self.dtype)(nn.swish(ChannelNorm()(x)))
        h = Conv(self.features, dtype=self.dtype)(nn.swish(ChannelNorm()(h)))
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, dtype=self.dtype, name="shortcut")(x)
        return x + h


class CrossCovarianceAttention(nn.Module):
    """x + XCA(ChannelNorm(x)), one head (XCiT, arXiv:2106.09681).

    The attention map is channels x channels, so its cost is linear in the pixels. Its
    statistics span the image, so the codes of a crop depend on the crop.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, height, width, channels = x.shape
        h = ChannelNorm()(x).reshape(batch, height * width, channels)
        qkv = nn.Dense(3 * channels, dtype=self.dtype, name="qkv")(h)
        q, k, v = jnp.split(qkv.astype(jnp.float32), 3, axis=-1)
        q, k = _unit_vectors(q, axis=1), _unit_vectors(k, axis=1)
        temperature = self.param("temperature", nn.initializers.ones, ())
        attention = nn.softmax(temperature * jnp.einsum("bnc,bnd->bcd", q, k), axis=-1)
        h = jnp.einsum("bcd,bnd->bnc", attention, v)
        h = nn.Dense(channels, dtype=self.dtype, name="projection")(h)
        return x + h.reshape(x.shape).astype(x.dtype)


class Labeller(nn.Module):
    """The VQ-VAE whose codes are the discriminator's classes.

    The default is MS-ILLM's: a VQGAN-like network with cross-covariance attention at
    its coarsest level, stride 8, 1024 unit codes of 8 channels and 18.1 M parameters.

    Attributes:
        widths: channels per level, finest first; each further level halves the grid.
        blocks: residual blocks per level of the encoder; the decoder has one more.
        attention: whether there is attention at the coarsest level and in the middle.
        patch: side in pixels of the blocks that are the cells of the finest level.
        code_count: C, the number of codes.
        code_channels: E, the number of channels of a code.
        dtype: the type of the convolutions.
    """

    widths: tuple[int, ...] = (64, 128, 128, 256)
    blocks: int = 2
    attention: bool = True
    patch: int = 1
    code_count: int = 1024
    code_channels: int = 8
    dtype: Any = jnp.float32

    @property
    def stride(self) -> int:
        """Side in pixels of the cell that a code stands for."""
        return self.patch * 2 ** (len(self.widths) - 1)

    def setup(self) -> None:
        self.encoder = _LabellerEncoder(
            self.widths, self.blocks, self.attention, self.patch, self.dtype
        )
        self.decoder = _LabellerDecoder(
            self.widths, self.blocks, self.attention, self.patch, self.dtype
        )
        self.to_code = Conv(self.code_channels, 1)
        self.from_code = Conv(self.widths[-1], 1)
        self.codebook = self.param(
            "codebook",
            nn.initializers.normal(1.0),
            (self.code_count, self.code_channels),
        )

    def embed(self, images: Array) -> Array:
        """Unit vectors before quantisation, float32 [B, H/8, W/8, E] at stride 8.

        Raises:
            ValueError: a side of the images is not a multiple of the stride.
        """
        height, width = images.shape[1:3]
        if height % self.stride or width % self.stride:
            raise ValueError(
                f"the labeller needs sides that are multiples of {self.stride}, "
                f"found {width}x{height}"
            )
        h = self.encoder(images).astype(jnp.float32)
        return _unit_vectors(self.to_code(h))

    def nearest(self, embeddings: Array) -> Array:
        """The code of largest cosine for each unit vector [..., E], int32 [...]."""
        cosines = embeddings @ _unit_vectors(self.codebook).T
        return jnp.argmax(cosines, axis=-1).astype(jnp.int32)

    def labels(self, images: Array) -> Array:
        """Codes int32 [B, H/8, W/8] of originals; see `embed`."""
        return self.nearest(self.embed(images))

    def __call__(self, images: Array) -> Quantised:
        """Apply the whole auto-encoder, with straight-through gradients.

        Raises:
            ValueError: see `embed`.
        """
        embeddings = self.embed(images)
        codes = self.nearest(embeddings)
        chosen = _unit_vectors(self.codebook)[codes]
        commitment = jnp.mean(jnp.square(lax.stop_gradient(chosen) - embeddings))
        embedding = jnp.mean(jnp.square(chosen - lax.stop_gradient(embeddings)))
        passed = embeddings + lax.stop_gradient(chosen - embeddings)
        x_hat = self.decoder(self.from_code(passed))
        return Quantised(x_hat, codes, embeddings, commitment, embedding)


class _LabellerEncoder(nn.Module):
    widths: tuple[int, ...]
    blocks: int
    attention: bool
    patch: int
    dtype: Any

    @nn.compact
    def __call__(self, images: Array) -> Array:
        last = len(self.widths) - 1
        h = space_to_depth(images, self.patch)
        h = Conv(self.widths[0], dtype=self.dtype)(h)
        for level, width in enumerate(self.widths):
            for _ in range(self.blocks):
                h = _SwishBlock(width, self.dtype)(h)
                if self.attention and level == last:
                    h = CrossCovarianceAttention(self.dtype)(h)
            if level < last:
                # Padding at the bottom and right alone, as in VQGAN.
                padding = ((0, 1), (0, 1))
                conv = nn.Conv(width, (3, 3), 2, padding, dtype=self.dtype)
                h = conv(h)
        h = _middle(h, self.attention, self.dtype)
        return Conv(self.widths[-1], dtype=self.dtype)(nn.swish(ChannelNorm()(h)))


class _LabellerDecoder(nn.Module):
    widths: tuple[int, ...]
    blocks: int
    attention: bool
    patch: int
    dtype: Any

    @nn.compact
    def __call__(self, h: Array) -> Array:
        last = len(self.widths) - 1
        h = Conv(self.widths[-1], dtype=self.dtype)(h)
        h = _middle(h, self.attention, self.dtype)
        for level in range(last, -1, -1):
            for _ in range(self.blocks + 1):
                h = _SwishBlock(self.widths[level], self.dtype)(h)
                if self.attention and level == last:
                    h = CrossCovarianceAttention(self.dtype)(h)
            if level:
                h = Conv(self.widths[level], dtype=self.dtype)(upsample(h))
        h = nn.swish(ChannelNorm()(h))
        h = Conv(3 * self.patch**2, dtype=self.dtype)(h)
        return depth_to_space(h.astype(jnp.float32), self.patch)


def _middle(h: Array, attention: bool, dtype: Any) -> Array:
    h = _SwishBlock(h.shape[-1], dtype, name="middle_0")(h)
    if attention:
        h = CrossCovarianceAttention(dtype, name="middle_attention")(h)
    return _SwishBlock(h.shape[-1], dtype, name="middle_1")(h)


def code_frequencies(codes: Array, code_count: int) -> Array:
    """Share of each code in a batch, float32 [C], adding up to 1."""
    hits = jnp.zeros(code_count, jnp.float32).at[codes.reshape(-1)].add(1.0)
    return hits / codes.size


def perplexity(frequencies: Array) -> Array:
    """exp(entropy) of code frequencies [C]: how many codes are in use, 1 ... C."""
    log_p = jnp.log(jnp.maximum(frequencies, 1e-12))
    return jnp.exp(-jnp.sum(frequencies * log_p))


def diversity_loss(embeddings: Array, codebook: Array, temperature: float) -> Array:
    """log C minus the entropy of the mean soft assignment, a float32 scalar.

    It is 0 if all codes are used evenly, and spreads the embeddings of a batch over the
    codes, as in Yu et al. 2023 (arXiv:2310.05737). Their term for confident assignments
    is left out, since the commitment serves this purpose here.

    Args:
        embeddings: float32 [..., E], unit vectors.
        codebook: float32 [C, E].
        temperature: temperature of the softmax over cosines.
    """
    flat = embeddings.reshape(-1, codebook.shape[1])
    cosines = flat @ _unit_vectors(codebook).T
    frequencies = jnp.mean(nn.softmax(cosines / temperature, axis=-1), axis=0)
    return jnp.log(codebook.shape[0]) - jnp.log(perplexity(frequencies))


def reseed_dead_codes(
    codebook: Array, usage: Array, embeddings: Array, rng: Array, *, threshold: float
) -> tuple[Array, Array, Array]:
    """Move codes that are hardly used onto embeddings of the batch.

    A codebook that learns by gradients alone collapses: a code that is never the
    nearest never moves. (Dhariwal et al. 2020, arXiv:2005.00341, restart codes in the
    same way; the recipe of MS-ILLM's labeller is not published.)

    Args:
        codebook: float32 [C, E].
        usage: running mean of `code_frequencies`, float32 [C].
        embeddings: unit vectors of a batch, float32 [..., E].
        rng: random key that picks the embeddings.
        threshold: a code is dead if its usage is below this share of the even 1 / C.

    Returns:
        the codebook; the usage, which is 1 / C for moved codes; and whether each code
        moved, bool [C].
    """
    count = codebook.shape[0]
    flat = lax.stop_gradient(embeddings).reshape(-1, codebook.shape[1])
    dead = usage < threshold / count
    picks = jax.random.randint(rng, (count,), 0, flat.shape[0])
    codebook = jnp.where(dead[:, None], flat[picks], codebook)
    return codebook, jnp.where(dead, 1.0 / count, usage), dead


class Discriminator(nn.Module):
    """U-Net with C + 1 logits for each cell, given the latents as context.

    The default is MS-ILLM's, which has 17.9 M parameters with 220 latent channels and
    1024 codes. Despite its name, that network has no connections between the two paths,
    and its in-place activations reach the shortcuts; both are options here.

    Attributes:
        classes: C + 1, the number of logits; 2 for a binary discriminator.
        widths: channels of the levels of the downward path, finest first; each level
            halves the grid.
        up_widths: channels of the levels of the upward path, finest first; each level
            doubles the grid.
        context_channels: channels of a projection of the latents that is concatenated
            to the image; 0 for a discriminator that does not see the latents.
        context_log: whether the latents are first compressed to sign(y) * log(1 + |y|),
            for latents whose magnitude spans decades.
        patch: side in pixels of the blocks that are the cells of the input.
        lateral_skips: whether to concatenate the maps of the downward path to those of
            the upward path.
        feature_channels: channels of the projection of each tap of a frozen feature
            network that is concatenated to the last grid; 0 for no such taps.
        mix_widths: channels of 3x3 convolutions between the last grid and the logits.
        preactivated_shortcut: whether the shortcuts see the activated maps.
        remat: whether to recompute the levels in the backward pass.
        dtype: the type of the convolutions.
    """

    classes: int = 1025
    widths: tuple[int, ...] = (128, 128, 256, 256, 512, 512)
    up_widths: tuple[int, ...] = (64, 256, 512)
    context_channels: int = 16
    context_log: bool = False
    patch: int = 1
    lateral_skips: bool = False
    feature_channels: int = 0
    mix_widths: tuple[int, ...] = ()
    preactivated_shortcut: bool = True
    remat: bool = False
    dtype: Any = jnp.float32

    @property
    def stride(self) -> int:
        """Side in pixels of a cell of the output."""
        return self.patch * 2 ** (len(self.widths) - len(self.up_widths))

    @property
    def multiple(self) -> int:
        """The number whose multiples the sides of the images must be, in pixels."""
        return self.patch * 2 ** len(self.widths)

    @nn.compact
    def __call__(
        self, images: Array, y_hat: Array, taps: Sequence[Array] = ()
    ) -> Array:
        """Logits float32 [B, H/8, W/8, C + 1] at stride 8.

        Args:
            images: float [B, H, W, 3], unclamped; H and W multiples of `multiple`.
            y_hat: float [B, H/16, W/16, M]; no gradient reaches it.
            taps: feature maps [B, h, w, C] of the images, if there are
                `feature_channels`. A discriminator that starts from what a trained
                network sees learns in hundreds of steps (Sauer et al. 2021,
                arXiv:2111.01007).

        Raises:
            ValueError: a side is not a multiple of `multiple`, or there are taps
                without `feature_channels` or the other way round.
        """
        if bool(taps) != bool(self.feature_channels):
            raise ValueError(
                f"expected taps exactly if feature_channels is set, found {len(taps)} "
                f"taps and feature_channels {self.feature_channels}"
            )
        height, width = images.shape[1:3]
        if height % self.multiple or width % self.multiple:
            raise ValueError(
                f"the discriminator needs sides that are multiples of {self.multiple}, "
                f"found {width}x{height}"
            )
        h = space_to_depth(images, self.patch).astype(self.dtype)
        if self.context_channels:
            context = self._context(lax.stop_gradient(y_hat))
            context = upsample(context, h.shape[1] // context.shape[1])
            h = jnp.concatenate([h, context], axis=-1)
        down = nn.remat(_DownBlock) if self.remat else _DownBlock
        up = nn.remat(_UpBlock) if self.remat else _UpBlock
        maps = []
        for level, features in enumerate(self.widths):
            h = down(
                features,
                self.preactivated_shortcut,
                level > 0,
                self.dtype,
                name=f"down_{level}",
            )(h)
            maps.append(h)
        maps.pop()
        for level in range(len(self.up_widths) - 1, -1, -1):
            h = up(
                self.up_widths[level],
                self.preactivated_shortcut,
                self.dtype,
                name=f"up_{level}",
            )(h)
            if self.lateral_skips:
                h = jnp.concatenate([h, maps.pop()], axis=-1)
        if taps:
            seen = [self._seen(i, tap, h.shape[1:3]) for i, tap in enumerate(taps)]
            h = jnp.concatenate([_leaky_relu(h), *seen], axis=-1)
        for i, width in enumerate(self.mix_widths):
            h = _leaky_relu(Conv(width, dtype=self.dtype, name=f"mix_{i}")(h))
        return Conv(self.classes, 1, name="head")(h.astype(jnp.float32))

    def _seen(self, index: int, tap: Array, grid: tuple[int, ...]) -> Array:
        # Entries of unit vectors are about 1 / sqrt(C); the scale makes them about 1/3.
        tap = _TAP_SCALE * normalise_channels(tap).astype(self.dtype)
        conv = Conv(self.feature_channels, 1, dtype=self.dtype, name=f"tap_{index}")
        shape = (tap.shape[0], *grid, self.feature_channels)
        return jax.image.resize(conv(tap), shape, "linear")

    def _context(self, y_hat: Array) -> Array:
        if self.context_log:
            y_hat = jnp.sign(y_hat) * jnp.log1p(jnp.abs(y_hat))
        padded = jnp.pad(y_hat, ((0, 0), (1, 1), (1, 1), (0, 0)), "reflect")
        conv = nn.Conv(
            self.context_channels,
            (3, 3),
            padding="VALID",
            dtype=self.dtype,
            name="context",
        )
        return _leaky_relu(conv(padded))


def _leaky_relu(x: Array) -> Array:
    return nn.leaky_relu(x, _SLOPE)


class _DownBlock(nn.Module):
    features: int
    preactivated_shortcut: bool
    leading_activation: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = _leaky_relu(x) if self.leading_activation else x
        shortcut = h if self.preactivated_shortcut else x
        h = _leaky_relu(Conv(self.features, dtype=self.dtype)(h))
        h = Conv(self.features, dtype=self.dtype)(h)
        shortcut = _average_pool(shortcut)
        if shortcut.shape[-1] != self.features:
            conv = Conv(self.features, 1, dtype=self.dtype, name="shortcut")
            shortcut = conv(shortcut)
        return _average_pool(h) + shortcut


class _UpBlock(nn.Module):
    features: int
    preactivated_shortcut: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = _leaky_relu(x)
        shortcut = h if self.preactivated_shortcut else x
        h = _leaky_relu(Conv(self.features, dtype=self.dtype)(upsample(h)))
        h = Conv(self.features, dtype=self.dtype)(h)
        if shortcut.shape[-1] != self.features:
            conv = Conv(self.features, 1, dtype=self.dtype, name="shortcut")
            shortcut = conv(shortcut)
        return h + upsample(shortcut)
