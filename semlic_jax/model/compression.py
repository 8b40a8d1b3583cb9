# SPDX-License-Identifier: Apache-2.0
"""The compression model, image -> latents -> bits -> image, in several sizes.

::

    x -> g_a -> y -> * gain(q) -> y_scaled -> h_a -> z -> round -> z_hat
                                     |                         |
                                     v                         v
                                  traverse <----- psi <------ h_s
                                     |
                                     v
    x_hat <- g_s <- / gain(q) <- y_hat_scaled

One model serves every rate: `gain(q)` scales each channel of y before rounding (Cui et
al. 2021, arXiv:2003.02012), by geometric interpolation between learnt anchors.
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

from semlic_jax.model.context import (
    MEAN_STEPS,
    EntropyModel,
    Masks,
    Pass,
    traverse,
)
from semlic_jax.model.layers import round_straight_through
from semlic_jax.model.priors import FactorizedPrior, gaussian_bits, scale_from_index
from semlic_jax.model.transforms import (
    HYPER_STRIDE,
    STRIDE,
    AnalysisTransform,
    HyperAnalysis,
    SynthesisTransform,
)

Array = jax.Array

QUALITY_LEVELS = 256
_LARGEST_GAIN = 6.0
_NOISE_ORIGINS = 2**20  # of a training crop, in latents along each axis


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that defines the architecture; it is stored with the weights.

    Attributes:
        name: the name of the size.
        patch: side in pixels of a block at the finest level, 1, 2 or 4.
        widths: channels of g_a and g_s per level, finest first.
        blocks: residual blocks of g_s.
        latent_channels: M, channels of y.
        groups: ELIC's uneven channel groups; they add up to M.
        hyper_channels: N, channels of z.
        psi_channels, context_channels, hidden_channels, context_shifts: see
            `EntropyModel`.
        linear_skip: whether a linear transform runs beside g_a and g_s.
        gain_anchors: number of learnt gain vectors, evenly spaced in q.
        texture_channels: noise channels at each level of g_s (see `texture`); 0 for
            none.
        level_blocks: residual blocks of g_a and g_s at each level finer than 1/16.
    """

    name: str
    patch: int
    widths: tuple[int, ...]
    blocks: int
    latent_channels: int
    groups: tuple[int, ...]
    hyper_channels: int
    psi_channels: int
    context_channels: int
    hidden_channels: int
    context_shifts: tuple[int, ...]
    linear_skip: bool = True
    gain_anchors: int = 6
    texture_channels: int = 0
    level_blocks: int = 0

    def __post_init__(self) -> None:
        """Check every field: a configuration may come from a hostile model file.

        Raises:
            ValueError: a field is of the wrong type, is out of range, or contradicts
                another field.
        """
        check_fields(self)
        if self.patch not in (1, 2, 4):
            raise ValueError(f"expected a patch of 1, 2 or 4, found {self.patch}")
        levels = int(math.log2(STRIDE // self.patch)) + 1
        if len(self.widths) != levels:
            raise ValueError(
                f"expected {levels} widths for a patch of {self.patch}, "
                f"found {len(self.widths)}"
            )
        if sum(self.groups) != self.latent_channels:
            raise ValueError(
                f"expected groups that add up to latent_channels "
                f"{self.latent_channels}, found {sum(self.groups)}"
            )
        if len(self.context_shifts) != len(self.groups):
            raise ValueError(
                f"expected a context shift for each of {len(self.groups)} groups, "
                f"found {len(self.context_shifts)}"
            )


# Smallest and largest value of the fields whose range is not 1 to 4096.
_FIELD_RANGES = {
    "widths": (2, 4096),  # ChannelNorm needs two
    "latent_channels": (2, 4096),
    "blocks": (0, 64),
    "texture_channels": (0, 256),
    "level_blocks": (0, 64),
    "context_shifts": (0, 15),
    "gain_anchors": (2, 256),
}


def check_fields(config: Any) -> None:
    """Check the types and ranges of a configuration's fields; turn lists into tuples.

    Raises:
        ValueError: a field is of the wrong type or out of range; the message names it.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if str(field.type).startswith("tuple"):
            if not isinstance(value, list | tuple) or not 1 <= len(value) <= 64:
                raise ValueError(
                    f"expected 1 to 64 numbers as {field.name}, found {value!r}"
                )
            object.__setattr__(config, field.name, tuple(value))
            for entry in value:
                _check_field(field.name, entry, "int")
        else:
            _check_field(field.name, value, str(field.type))


def _check_field(name: str, value: Any, kind: str) -> None:
    if kind == "int":
        low, high = _FIELD_RANGES.get(name, (1, 4096))
        # In Python a bool is an int, but not in the JSON that is fingerprinted.
        if type(value) is not int or not low <= value <= high:
            raise ValueError(
                f"expected whole numbers from {low} to {high} as {name}, "
                f"found {value!r}"
            )
    elif kind == "bool" and not isinstance(value, bool):
        raise ValueError(f"expected true or false as {name}, found {value!r}")
    elif kind == "str" and not (isinstance(value, str) and 1 <= len(value) <= 64):
        raise ValueError(f"expected 1 to 64 characters as {name}, found {value!r}")


SIZES = {
    "tiny": ModelConfig(
        name="tiny",
        patch=4,
        widths=(16, 24, 32),
        blocks=1,
        latent_channels=24,
        groups=(4, 8, 12),
        hyper_channels=8,
        psi_channels=16,
        context_channels=16,
        hidden_channels=24,
        context_shifts=(4, 2, 2),
    ),
    "small": ModelConfig(
        name="small",
        patch=2,
        widths=(32, 64, 128, 192),
        blocks=4,
        latent_channels=192,
        groups=(16, 16, 32, 64, 64),
        hyper_channels=64,
        psi_channels=96,
        context_channels=64,
        hidden_channels=128,
        context_shifts=(4, 2, 2, 2, 2),
        texture_channels=16,
    ),
    "base": ModelConfig(
        name="base",
        patch=2,
        widths=(64, 128, 256, 384),
        blocks=4,
        latent_channels=192,
        groups=(16, 16, 32, 64, 64),
        hyper_channels=64,
        psi_channels=96,
        context_channels=64,
        hidden_channels=128,
        context_shifts=(4, 2, 2, 2, 2),
        texture_channels=16,
        level_blocks=1,
    ),
    "hific": ModelConfig(
        name="hific",
        patch=1,
        widths=(60, 120, 240, 480, 960),
        blocks=9,
        latent_channels=220,
        groups=(16, 16, 32, 64, 92),
        hyper_channels=320,
        psi_channels=320,
        context_channels=128,
        hidden_channels=320,
        context_shifts=(2, 2, 2, 2, 2),
        linear_skip=False,
    ),
}


class Rate(NamedTuple):
    """Bits per image, float32 [B] each."""

    y_bits: Array
    z_bits: Array


class Forward(NamedTuple):
    """The result of a training pass over one batch.

    Attributes:
        x_hat: float32 [B, H, W, 3], not clipped.
        y_hat: float32 [B, H/16, W/16, M], scaled.
        rate: the rate of the noisy latents, which training minimises.
        rounded_rate: the rate of the rounded latents, which a file costs.
    """

    x_hat: Array
    y_hat: Array
    rate: Rate
    rounded_rate: Rate


def image_masks(
    sizes: np.ndarray | Array, grid: tuple[int, int], dtype: Any = jnp.float32
) -> Masks:
    """Masks of the positions that belong to the images of a padded batch.

    Args:
        sizes: int [B, 2], height and width of each image in pixels.
        grid: height and width of y of the padded batch, multiples of 4.
        dtype: the type of the masks.
    """
    sizes = jnp.asarray(sizes)

    def mask(stride: int) -> Array:
        shape = [side * STRIDE // stride for side in grid]
        valid = (sizes + stride - 1) // stride
        rows = jnp.arange(shape[0])[None, :, None] < valid[:, :1, None]
        columns = jnp.arange(shape[1])[None, None, :] < valid[:, None, 1:]
        return (rows & columns)[..., None].astype(dtype)

    return Masks(mask(HYPER_STRIDE), mask(2 * STRIDE), mask(STRIDE))


def full_masks(batch: int, grid: tuple[int, int]) -> Masks:
    """Masks of images without padding."""
    side = jnp.array([[grid[0] * STRIDE, grid[1] * STRIDE]] * batch)
    return image_masks(side, grid)


class CompressionModel(nn.Module):
    """The float model, with the entropy networks in floats as well.

    Attributes:
        config: the architecture.
        arithmetic: the float arithmetic of the entropy networks (see `model.context`).
        dtype: the type in which g_a and g_s compute.
        remat: whether to recompute the residual blocks in the backward pass.
        tile: largest number of latents along a side that the fine levels process at
            once; 0 for no limit.
    """

    config: ModelConfig
    arithmetic: str = "float"
    dtype: Any = jnp.float32
    remat: bool = False
    tile: int = 0

    def setup(self) -> None:
        config = self.config
        self.g_a = AnalysisTransform(
            config.widths,
            config.latent_channels,
            config.patch,
            config.linear_skip,
            config.level_blocks,
            self.remat,
            self.dtype,
            self.tile,
        )
        self.g_s = SynthesisTransform(
            config.widths,
            config.blocks,
            config.patch,
            config.linear_skip,
            head_norm=not config.linear_skip,
            texture_channels=config.texture_channels,
            level_blocks=config.level_blocks,
            block_remat=self.remat,
            dtype=self.dtype,
            tile=self.tile,
        )
        self.h_a = HyperAnalysis(config.hyper_channels, config.linear_skip)
        self.prior = FactorizedPrior(config.hyper_channels)
        self.entropy = entropy_model(config, self.arithmetic)
        self.log_gain = self.param(
            "log_gain",
            lambda key, shape: jnp.broadcast_to(
                jnp.linspace(0.0, math.log(_LARGEST_GAIN), shape[0])[:, None], shape
            ),
            (config.gain_anchors, config.latent_channels),
        )

    def gain(self, quality: Array) -> Array:
        """The gain of each channel, [B, 1, 1, M], for quality [B] in [0, 1]."""
        anchors = self.config.gain_anchors
        position = jnp.clip(quality, 0.0, 1.0) * (anchors - 1)
        low = jnp.clip(jnp.floor(position), 0, anchors - 2).astype(jnp.int32)
        weight = (position - low)[:, None]
        log_gain = (1 - weight) * self.log_gain[low] + weight * self.log_gain[low + 1]
        return jnp.exp(log_gain)[:, None, None, :]

    def analysis(self, x: Array) -> Array:
        """y = g_a(x): float32 [B, H, W, 3] in [0, 1] -> [B, H/16, W/16, M]."""
        return self.g_a(x)

    def hyper_analysis(self, y_scaled: Array) -> Array:
        """z = h_a(y * gain): [B, h, w, M] -> [B, h/4, w/4, N]."""
        return self.h_a(y_scaled)

    def scaled_latents(self, y: Array, quality: Array) -> tuple[Array, Array]:
        """y * gain and the z computed from it, for quality [B] in [0, 1]."""
        y_scaled = y * self.gain(quality)
        return y_scaled, self.hyper_analysis(y_scaled)

    def synthesis(
        self, y_hat_scaled: Array, quality: Array, noise_origin: Array | None = None
    ) -> Array:
        """x_hat = g_s(y_hat_scaled / gain), about [0, 1], not clipped.

        The latents start at `noise_origin`, int [B, 2], row and column, which
        determines the noise; None means (0, 0).
        """
        return self.g_s(y_hat_scaled / self.gain(quality), quality, noise_origin)

    def z_bits(self, z: Array) -> Array:
        """Bits of each element of z (noisy or rounded)."""
        return self.prior.bits(z)

    def z_probability(self, z: Array) -> Array:
        """Probability of the unit bin around each element of z."""
        return self.prior.probability(z)

    def traverse_latents(
        self,
        z_hat: Array,
        quality: Array,
        masks: Masks,
        visit: Callable[[Pass, Array, Array], Array],
    ) -> Array:
        """Go through the coding order with the float entropy networks.

        Args:
            z_hat: [B, h/4, w/4, N], whole numbers.
            quality: [B] in [0, 1].
            masks: the positions inside the images.
            visit: see `context.traverse`; index and mean are float32.

        Returns:
            y_hat_scaled [B, h, w, M].
        """
        level = jnp.round(quality * (QUALITY_LEVELS - 1))
        psi = self.entropy.hyper_synthesis(z_hat, level, masks)
        groups = traverse(
            self.config.groups,
            (psi.shape[1], psi.shape[2]),
            lambda pass_, y_hat: self.entropy.parameters(
                pass_, psi, y_hat, level, masks
            ),
            visit,
        )
        return jnp.concatenate(groups, -1) / MEAN_STEPS

    def __call__(self, x: Array, quality: Array, rng: Array) -> Forward:
        """Training pass with straight-through latents and the rate of noisy ones.

        For the contexts and the decoder, y is rounded about its predicted mean; for the
        rate, uniform noise is added to it instead (ELIC's training, section 1.5 of the
        re-implementations). z is treated likewise.

        Args:
            x: float32 [B, H, W, 3] in [0, 1], H and W multiples of 64.
            quality: [B] in [0, 1].
            rng: the random key for the noise.

        Returns:
            See `Forward`; under `jit`, what the caller does not use is not computed.
        """
        y = self.analysis(x)
        y_scaled = y * self.gain(quality)
        z = self.hyper_analysis(y_scaled)
        z_rng, y_rng = jax.random.split(rng)
        z_tilde = z + jax.random.uniform(z_rng, z.shape, minval=-0.5, maxval=0.5)
        z_bits = jnp.sum(self.z_bits(z_tilde), axis=(1, 2, 3))
        noise = jax.random.uniform(y_rng, y.shape, minval=-0.5, maxval=0.5)
        y_bits = y_bits_rounded = jnp.zeros_like(z_bits)

        def visit(pass_: Pass, index: Array, mean: Array) -> Array:
            nonlocal y_bits, y_bits_rounded
            channels = slice(pass_.start, pass_.stop)
            residual = y_scaled[..., channels] - mean / MEAN_STEPS
            rounded = round_straight_through(residual)
            scale = scale_from_index(index)
            rows, columns = jnp.ogrid[: index.shape[1], : index.shape[2]]
            ours = ((rows + columns) % 2 == pass_.parity)[None, ..., None]

            def bits_of(residual: Array) -> Array:
                bits = gaussian_bits(residual, scale)
                return jnp.sum(bits * ours, axis=(1, 2, 3))

            y_bits = y_bits + bits_of(residual + noise[..., channels])
            y_bits_rounded = y_bits_rounded + bits_of(rounded)
            return rounded * MEAN_STEPS + mean

        masks = full_masks(x.shape[0], (y.shape[1], y.shape[2]))
        z_hat = round_straight_through(z)
        y_hat = self.traverse_latents(z_hat, quality, masks, visit)
        origin = jax.random.randint(
            jax.random.fold_in(rng, 2), (x.shape[0], 2), 0, _NOISE_ORIGINS
        )
        x_hat = self.synthesis(y_hat, quality, origin)
        z_bits_rounded = jnp.sum(self.z_bits(z_hat), axis=(1, 2, 3))
        return Forward(
            x_hat, y_hat, Rate(y_bits, z_bits), Rate(y_bits_rounded, z_bits_rounded)
        )


def entropy_model(config: ModelConfig, arithmetic: str) -> EntropyModel:
    """The entropy networks of a model without the rest, as the coder uses them."""
    return EntropyModel(
        groups=config.groups,
        hyper_channels=config.hyper_channels,
        psi_channels=config.psi_channels,
        context_channels=config.context_channels,
        hidden_channels=config.hidden_channels,
        context_shifts=config.context_shifts,
        arithmetic=arithmetic,
    )
