# SPDX-License-Identifier: Apache-2.0
"""Densities of the latents, in bits: p(z) and p(y | index, mean)."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from semlic_jax.model.layers import lower_bound

Array = jax.Array

SCALE_MIN = 0.11
SCALE_MAX = 64.0
NUM_SCALES = 64
_LOG_STEP = math.log(SCALE_MAX / SCALE_MIN) / (NUM_SCALES - 1)
_PROBABILITY_FLOOR = 1e-9


def scale_table() -> np.ndarray:
    """The 64 standard deviations of the tables of y, float64, log-spaced."""
    return SCALE_MIN * np.exp(_LOG_STEP * np.arange(NUM_SCALES))


def scale_from_index(index: Array) -> Array:
    """The standard deviation of a table index, which may be fractional."""
    return SCALE_MIN * jnp.exp(_LOG_STEP * index)


def index_from_scale(scale: np.ndarray | float) -> np.ndarray:
    """The fractional table index of a standard deviation, clipped to the table."""
    index = np.log(np.asarray(scale, np.float64) / SCALE_MIN) / _LOG_STEP
    return np.clip(index, 0, NUM_SCALES - 1)


def _upper_tail(x: Array) -> Array:
    """P(N(0, 1) > x)."""
    return 0.5 * lax.erfc(x * math.sqrt(0.5))


def gaussian_bits(residual: Array, scale: Array) -> Array:
    """Information content of residuals under a discretised Gaussian.

    `-log2[Phi((|r| + 1/2) / s) - Phi((|r| - 1/2) / s)]`, evaluated on the smaller
    tail (Ballé et al. 2018, arXiv:1802.01436, eq. 6 and appendix).

    Args:
        residual: float [...], `y - mean`, rounded or noisy.
        scale: float [...], positive standard deviation. Not clipped here.

    Returns:
        float [...], bits, at most 29.9. Gradients flow to both arguments.
    """
    distance = jnp.abs(residual)
    mass = _upper_tail((distance - 0.5) / scale) - _upper_tail((distance + 0.5) / scale)
    return -jnp.log2(lower_bound(mass, _PROBABILITY_FLOOR))


class FactorizedPrior(nn.Module):
    """Deep factorised density of z, one per channel (Ballé et al. 2018, 6.1).

    The cumulative is `sigmoid(f_K o ... o f_1)` with `f_k(x) = g_k(softplus(H_k) x +
    b_k)` and `g_k(x) = x + tanh(a_k) tanh(x)`; the last layer has no g.

    Attributes:
        channels: number of independent densities.
        filters: widths of the hidden layers.
        init_scale: standard deviation that the initial density roughly covers.
    """

    channels: int
    filters: tuple[int, ...] = (3, 3, 3)
    init_scale: float = 2.0

    def setup(self) -> None:
        widths = (1, *self.filters, 1)
        scale = self.init_scale ** (1 / (len(self.filters) + 1))
        matrices, biases, factors = [], [], []
        for i, (fan_in, fan_out) in enumerate(zip(widths, widths[1:], strict=False)):
            start = math.log(math.expm1(1 / scale / fan_out))
            shape = (self.channels, fan_out, fan_in)
            matrices.append(
                self.param(f"matrix_{i}", nn.initializers.constant(start), shape)
            )
            bias_shape = (self.channels, fan_out, 1)
            biases.append(
                self.param(
                    f"bias_{i}",
                    lambda key, shape: jax.random.uniform(
                        key, shape, minval=-0.5, maxval=0.5
                    ),
                    bias_shape,
                )
            )
            if i < len(self.filters):
                factors.append(
                    self.param(f"factor_{i}", nn.initializers.zeros, bias_shape)
                )
        self.matrices, self.biases, self.factors = matrices, biases, factors

    def _logits(self, x: Array) -> Array:
        """Logits of the cumulative; x is [C, 1, N]."""
        for i, (matrix, bias) in enumerate(
            zip(self.matrices, self.biases, strict=True)
        ):
            x = jnp.matmul(nn.softplus(matrix), x) + bias
            if i < len(self.factors):
                x = x + jnp.tanh(self.factors[i]) * jnp.tanh(x)
        return x

    def probability(self, z: Array) -> Array:
        """Mass of the unit bin around each value.

        Args:
            z: float [..., C].

        Returns:
            float [..., C] in [0, 1].
        """
        flat = jnp.moveaxis(z, -1, 0).reshape(self.channels, 1, -1)
        lower, upper = self._logits(flat - 0.5), self._logits(flat + 0.5)
        # Both sigmoids are taken on the side of the smaller tail, where they keep their
        # precision. jnp.sign would be 0 at the centre of a symmetric density, and the
        # mass with it.
        sign = jnp.where(lax.stop_gradient(lower + upper) > 0, -1.0, 1.0)
        mass = jnp.abs(nn.sigmoid(sign * upper) - nn.sigmoid(sign * lower))
        return jnp.moveaxis(mass.reshape(self.channels, *z.shape[:-1]), 0, -1)

    def bits(self, z: Array) -> Array:
        """Information content of each element of z [..., C], in bits."""
        return -jnp.log2(lower_bound(self.probability(z), _PROBABILITY_FLOOR))
