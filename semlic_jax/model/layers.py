# SPDX-License-Identifier: Apache-2.0
"""Layers shared by the transforms and the entropy networks.

All arrays are NHWC. Nothing here depends on images, rates or files.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
Initializer = Callable[..., Array]

CHANNEL_NORM_EPS = 1e-3
_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


@jax.custom_vjp
def lower_bound(x: Array, bound: Array | float) -> Array:
    """`max(x, bound)` with a gradient that can still raise `x` above the bound.

    The gradient passes where x >= bound and where a descent step would raise x
    (Ballé et al., as used by HiFiC and CompressAI).

    Args:
        x: float array of any shape.
        bound: scalar or an array that broadcasts to x. Receives no gradient.

    Returns:
        Same shape and dtype as x.
    """
    return jnp.maximum(x, bound)


def _lower_bound_forward(x: Array, bound: Array | float) -> tuple[Array, Any]:
    return jnp.maximum(x, bound), (x >= bound, bound)


def _lower_bound_backward(residual: Any, gradient: Array) -> tuple[Array, Any]:
    inside, bound = residual
    passed = jnp.where(inside | (gradient < 0), gradient, 0.0)
    return passed, jax.tree.map(jnp.zeros_like, bound)


lower_bound.defvjp(_lower_bound_forward, _lower_bound_backward)


def upper_bound(x: Array, bound: Array | float) -> Array:
    """`min(x, bound)`, the mirror image of `lower_bound`."""
    return -lower_bound(-x, -jnp.asarray(bound, x.dtype))


def round_straight_through(x: Array) -> Array:
    """Round half to even; the gradient is the identity."""
    return x + lax.stop_gradient(jnp.round(x) - x)


def _standardise(x: Array) -> tuple[Array, Array]:
    """Deviations from the mean over channels, and 1 / their standard deviation."""
    deviation = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.sum(deviation**2, axis=-1, keepdims=True) / (x.shape[-1] - 1)
    return deviation, lax.rsqrt(variance + CHANNEL_NORM_EPS)


@jax.custom_vjp
def channel_norm(x: Array, gamma: Array, beta: Array) -> Array:
    """`gamma * (x - m) / sqrt(v + 1e-3) + beta` with a gradient that is fast on CPU.

    XLA:CPU fuses the products of the automatic gradient into its sums over channels
    and then adds number by number, which is 5 to 10 times slower than contractions.

    Args:
        x: float32 [..., C].
        gamma, beta: float32 [C].

    Returns:
        float32 [..., C].
    """
    deviation, scale = _standardise(x)
    return deviation * scale * gamma + beta


def _channel_norm_forward(x: Array, gamma: Array, beta: Array) -> tuple[Array, Any]:
    return channel_norm(x, gamma, beta), (x, gamma)


def _channel_norm_backward(residual: Any, gradient: Array) -> tuple[Array, ...]:
    x, gamma = residual
    deviation, scale = _standardise(x)
    contract = partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    weighted = gradient * gamma
    mean = contract("...c,c->...", gradient, gamma / x.shape[-1])[..., None]
    slope = contract("...c,...c->...", weighted, deviation)[..., None]
    slope = slope * scale**2 / (x.shape[-1] - 1)
    return (
        scale * (weighted - mean - slope * deviation),
        contract("...c,...c->c", gradient, deviation * scale),
        contract("...c->c", gradient),
    )


channel_norm.defvjp(_channel_norm_forward, _channel_norm_backward)


class ChannelNorm(nn.Module):
    """HiFiC's ChannelNorm: per pixel, over channels, with unbiased variance.

    `gamma * (x - m) / sqrt(v + 1e-3) + beta`, where `v` divides by C - 1. Flax's
    LayerNorm divides by C and is not equivalent (arXiv:2006.09965, A.1).
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        if channels < 2:
            raise ValueError(f"ChannelNorm needs at least 2 channels, found {channels}")
        gamma = self.param("gamma", nn.initializers.ones, (channels,))
        beta = self.param("beta", nn.initializers.zeros, (channels,))
        # The statistics are in float32 even where the network runs in bfloat16.
        y = channel_norm(x.astype(jnp.float32), gamma, beta)
        return y.astype(x.dtype)


def _symmetric_padding(kernel: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """PyTorch's `padding=kernel // 2`; `"SAME"` differs from it at a stride of 2."""
    return ((kernel // 2, kernel // 2),) * 2


class Conv(nn.Module):
    """Convolution with symmetric zero padding and float32 parameters.

    Attributes:
        features: output channels.
        kernel: side of the square kernel, odd.
        stride: 1 or 2.
        dtype: the type of the computation.
        kernel_init: the initialiser of the HWIO kernel.
    """

    features: int
    kernel: int = 3
    stride: int = 1
    dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.variance_scaling(
        1.0, "fan_in", "truncated_normal"
    )

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        y = lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (self.stride, self.stride),
            _symmetric_padding(self.kernel),
            dimension_numbers=_DIMENSIONS,
        )
        return y + bias.astype(self.dtype)


def _downsampling_conv(x: Array, kernel: Array) -> Array:
    """The strided convolution whose transpose is `conv_transpose`."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (2, 2),
        _symmetric_padding(kernel.shape[0]),
        dimension_numbers=_DIMENSIONS,
    )


@jax.custom_vjp
def conv_transpose(x: Array, kernel: Array) -> Array:
    """Transposed convolution of stride 2 with a weight gradient that is fast on CPU.

    It equals PyTorch's `ConvTranspose2d(stride=2, padding=k // 2,
    output_padding=1)`. XLA:CPU computes the weight gradient of
    `lax.conv_transpose` 30 to 50 times slower than anything else in the network.
    Written as the transpose of a strided convolution, it can use the weight
    gradient of that convolution instead.

    Args:
        x: [B, H, W, C_in].
        kernel: [k, k, C_out, C_in], the kernel of the convolution from output to
            input.

    Returns:
        [B, 2H, 2W, C_out].
    """
    batch, height, width, _ = x.shape
    shape = (batch, 2 * height, 2 * width, kernel.shape[2])
    output = jax.ShapeDtypeStruct(shape, x.dtype)
    transpose = jax.linear_transpose(lambda y: _downsampling_conv(y, kernel), output)
    return transpose(x)[0]


def _conv_transpose_forward(x: Array, kernel: Array) -> tuple[Array, Any]:
    return conv_transpose(x, kernel), (x, kernel)


def _conv_transpose_backward(residual: Any, gradient: Array) -> tuple[Array, Array]:
    x, kernel = residual
    x_gradient = _downsampling_conv(gradient, kernel)
    _, weight_vjp = jax.vjp(partial(_downsampling_conv, gradient), kernel)
    return x_gradient, weight_vjp(x)[0]


conv_transpose.defvjp(_conv_transpose_forward, _conv_transpose_backward)


class ConvTranspose(nn.Module):
    """`conv_transpose` with parameters, stride 2."""

    features: int
    kernel: int = 3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        # Only about a quarter of the taps contribute to each output pixel.
        init = nn.initializers.variance_scaling(
            4.0, "fan_in", "truncated_normal", in_axis=(0, 1, 3), out_axis=2
        )
        shape = (self.kernel, self.kernel, self.features, x.shape[-1])
        kernel = self.param("kernel", init, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        y = conv_transpose(x.astype(self.dtype), kernel.astype(self.dtype))
        return y + bias.astype(self.dtype)


def space_to_depth(x: Array, block: int) -> Array:
    """[B, H, W, C] -> [B, H/b, W/b, b*b*C], row-major inside the block."""
    batch, height, width, channels = x.shape
    x = x.reshape(
        batch, height // block, block, width // block, block, channels
    ).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height // block, width // block, block**2 * channels)


def depth_to_space(x: Array, block: int) -> Array:
    """Inverse of `space_to_depth`."""
    batch, height, width, channels = x.shape
    out = channels // block**2
    x = x.reshape(batch, height, width, block, block, out).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height * block, width * block, out)


class ResidualBlock(nn.Module):
    """HiFiC's residual block: conv, norm, ReLU, conv, norm, add."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        features = x.shape[-1]
        h = nn.relu(ChannelNorm()(Conv(features, dtype=self.dtype)(x)))
        return x + ChannelNorm()(Conv(features, dtype=self.dtype)(h))
