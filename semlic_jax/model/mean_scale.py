# SPDX-License-Identifier: Apache-2.0
"""The published HiFiC autoencoder with a mean-scale Gaussian: float entropy networks.

::

    x -> g_a -> y -> h_a -> z - median -> round -> + median -> h_s -> mean, scale
                |                                                      |
                +-------- * gain(q) -> y_scaled -> round about mean * gain(q)

This is the network of HiFiC (arXiv:2006.09965) in the form for which MS-ILLM
(arXiv:2301.11189) published weights: one rate per model, no context, and an h_s of
transposed convolutions in floats. Float results differ between processors, so a file of
such a model decodes only where the tables come out as they did for the encoder
(`coding.float_networks`).

The model has the methods of `CompressionModel` that the codec and the refinement call.
Two things are our additions: `gain`, which lets a model of one rate meet any budget
(latents, means and scales are multiplied by one number, which is 1 at quality level
128), and z, which is measured from the medians of its density, so that the coded
symbols are whole numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from semlic_jax.model.compression import (
    QUALITY_LEVELS,
    CompressionModel,
    ModelConfig,
    check_fields,
)
from semlic_jax.model.context import MEAN_STEPS, Masks, Pass, traverse
from semlic_jax.model.layers import (
    Conv,
    ConvTranspose,
    lower_bound,
    round_straight_through,
)
from semlic_jax.model.priors import (
    NUM_SCALES,
    SCALE_MAX,
    SCALE_MIN,
    FactorizedPrior,
    gaussian_bits,
)
from semlic_jax.model.transforms import (
    AnalysisTransform,
    HyperAnalysis,
    SynthesisTransform,
)

Array = jax.Array

FAMILY = "mean_scale"
PUBLISHED_LEVEL = 128  # the quality level at which the model equals the published one
_LEVELS_PER_OCTAVE = 64  # gains from 1/4 to 3.96
_LEVELS = 5  # of g_a and g_s


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanScaleConfig:
    """Everything that defines the architecture; it is stored with the weights.

    Attributes:
        name: the name of the model.
        widths: channels of g_a and g_s per level, finest first; 5 of them.
        blocks: residual blocks of g_s.
        latent_channels: M, channels of y.
        hyper_channels: N, channels of z, h_a and h_s.
        prior_filters: hidden widths of the density of z.
        family: distinguishes this configuration from a `ModelConfig`.
    """

    name: str
    widths: tuple[int, ...]
    blocks: int
    latent_channels: int
    hyper_channels: int
    prior_filters: tuple[int, ...]
    family: str = FAMILY

    def __post_init__(self) -> None:
        """Check every field as `ModelConfig` does; raises ValueError."""
        check_fields(self)
        if self.family != FAMILY:
            raise ValueError(f"expected the family {FAMILY}, found {self.family}")
        if len(self.widths) != _LEVELS:
            raise ValueError(f"expected {_LEVELS} widths, found {len(self.widths)}")

    @property
    def groups(self) -> tuple[int, ...]:
        """One group: no latent is predicted from another."""
        return (self.latent_channels,)


class HyperSynthesis(nn.Module):
    """h_s: two separate stacks, one for the mean and one for the scale.

    Attributes:
        latent_channels: M.
        hyper_channels: N.
    """

    latent_channels: int
    hyper_channels: int

    def setup(self) -> None:
        self.median = self.param("median", nn.initializers.zeros, self.hyper_channels)
        for head in ("mean", "scale"):
            setattr(self, f"{head}_0", ConvTranspose(self.hyper_channels, 5))
            setattr(self, f"{head}_1", ConvTranspose(self.hyper_channels, 5))
            setattr(self, f"{head}_2", Conv(self.latent_channels))

    def __call__(self, z_symbols: Array, inside: Array) -> tuple[Array, Array]:
        """Mean and scale of y, float32 [B, 4h, 4w, M] each, scale at least 0.11.

        Args:
            z_symbols: float32 [B, h, w, N], z_hat minus its median.
            inside: float32 [B, h, w, 1], 1 at the positions of the image. Outside them
                every layer sees zeros, as it does outside a grid without padding.
        """
        z_hat = (z_symbols + self.median) * inside

        def stack(head: str) -> Array:
            h = z_hat
            for layer in ("0", "1"):
                h = nn.relu(getattr(self, f"{head}_{layer}")(h))
                scale = h.shape[1] // inside.shape[1]
                h = h * jnp.repeat(jnp.repeat(inside, scale, 1), scale, 2)
            out: Array = getattr(self, f"{head}_2")(h)
            return out

        return stack("mean"), lower_bound(stack("scale"), SCALE_MIN)


class Published(NamedTuple):
    """The evaluation pass of the published model, quality level 128.

    Attributes:
        y: float32 [B, H/16, W/16, M].
        z: float32 [B, H/64, W/64, N], the output of h_a.
        y_bits, z_bits: bits of each element of y_hat and z_hat, where the scales of y
            are not rounded to those of the tables.
        x_hat: float32 [B, H, W, 3], not clipped.
    """

    y: Array
    z: Array
    y_bits: Array
    z_bits: Array
    x_hat: Array


class MeanScaleModel(nn.Module):
    """See the module's docstring.

    Attributes:
        config: the architecture.
        dtype: the type in which g_a and g_s compute.
        tile: largest number of latents along a side that the fine levels process at
            once; 0 for no limit.
    """

    config: MeanScaleConfig
    dtype: Any = jnp.float32
    tile: int = 0

    def setup(self) -> None:
        config = self.config
        self.g_a = AnalysisTransform(
            config.widths, config.latent_channels, dtype=self.dtype, tile=self.tile
        )
        self.g_s = SynthesisTransform(
            config.widths, config.blocks, dtype=self.dtype, tile=self.tile
        )
        self.h_a = HyperAnalysis(config.hyper_channels)
        self.prior = FactorizedPrior(config.hyper_channels, config.prior_filters)
        self.entropy = HyperSynthesis(config.latent_channels, config.hyper_channels)

    def __call__(self, x: Array) -> Published:
        """The evaluation pass for x, float32 [B, H, W, 3], sides multiples of 64."""
        y = self.g_a(x)
        z = self.h_a(y)
        z_symbols = jnp.round(z - self.entropy.median)
        mean, scale = self.entropy(z_symbols, jnp.ones_like(z[..., :1]))
        residual = jnp.round(y - mean)
        quality = jnp.full(x.shape[0], PUBLISHED_LEVEL / (QUALITY_LEVELS - 1))
        return Published(
            y=y,
            z=z,
            y_bits=gaussian_bits(residual, scale),
            z_bits=self.z_bits(z_symbols),
            x_hat=self.synthesis(residual + mean, quality),
        )

    def gain(self, quality: Array) -> Array:
        """The gain of all channels, [B, 1, 1, 1], for quality [B] in [0, 1]."""
        levels = np.arange(QUALITY_LEVELS, dtype=np.float64)
        gains = np.exp2((levels - PUBLISHED_LEVEL) / _LEVELS_PER_OCTAVE)
        level = jnp.round(jnp.clip(quality, 0.0, 1.0) * (QUALITY_LEVELS - 1))
        table = jnp.asarray(gains.astype(np.float32))
        return table[level.astype(jnp.int32)][:, None, None, None]

    def analysis(self, x: Array) -> Array:
        """y = g_a(x): float32 [B, H, W, 3] in [0, 1] -> [B, H/16, W/16, M]."""
        return self.g_a(x)

    def scaled_latents(self, y: Array, quality: Array) -> tuple[Array, Array]:
        """y * gain, and z minus its median, which the gain does not change."""
        return y * self.gain(quality), self.h_a(y) - self.entropy.median

    def synthesis(self, y_hat_scaled: Array, quality: Array) -> Array:
        """x_hat = g_s(y_hat_scaled / gain), about [0, 1], not clipped."""
        # The published g_s does not depend on the quality: its layer for it is zero.
        return self.g_s(y_hat_scaled / self.gain(quality), quality)

    def z_bits(self, z: Array) -> Array:
        """Bits of each element of z minus its median (noisy or rounded)."""
        return self.prior.bits(z + self.entropy.median)

    def z_probability(self, z: Array) -> Array:
        """Probability of the unit bin around each element of z minus its median."""
        return self.prior.probability(z + self.entropy.median)

    def parameters(
        self, z_symbols: Array, quality: Array, inside: Array
    ) -> tuple[Array, Array]:
        """Table index and mean of y_scaled, [B, h, w, M] each, in 1/16 steps.

        Args:
            z_symbols: whole numbers, float32 [B, h/4, w/4, N].
            quality: [B] in [0, 1].
            inside: see `HyperSynthesis`.

        Returns:
            index, whole numbers in 0..63 (the nearest scale on a log axis, with a
            straight-through gradient), and mean * 16, any number.
        """
        gain = self.gain(quality)
        mean, scale = self.entropy(z_symbols, inside)
        per_step = (NUM_SCALES - 1) / math.log(SCALE_MAX / SCALE_MIN)
        index = per_step * jnp.log(scale * gain / SCALE_MIN)
        index = jnp.clip(round_straight_through(index), 0, NUM_SCALES - 1)
        return index, mean * gain * MEAN_STEPS

    def traverse_latents(
        self,
        z_hat: Array,
        quality: Array,
        masks: Masks,
        visit: Callable[[Pass, Array, Array], Array],
    ) -> Array:
        """As `CompressionModel.traverse_latents`, for z_hat minus its median."""
        found = self.parameters(z_hat, quality, masks.z)
        (y_hat,) = traverse(
            self.config.groups,
            (found[0].shape[1], found[0].shape[2]),
            lambda pass_, y_hat: found,
            visit,
        )
        return y_hat / MEAN_STEPS


Config = ModelConfig | MeanScaleConfig


def network_of(
    config: Config,
    arithmetic: str = "float",
    dtype: Any = jnp.float32,
    tile: int = 0,
) -> CompressionModel | MeanScaleModel:
    """The model of a configuration.

    Args:
        config: the architecture.
        arithmetic: that of integer entropy networks (see `CompressionModel`).
        dtype: the type in which g_a and g_s compute.
        tile: largest number of latents along a side that the fine levels process at
            once; 0 for no limit.
    """
    if isinstance(config, MeanScaleConfig):
        return MeanScaleModel(config, dtype, tile)
    return CompressionModel(config, arithmetic, dtype, tile=tile)
