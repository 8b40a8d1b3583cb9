# SPDX-License-Identifier: Apache-2.0
"""THE coding order of the latents, and the networks that predict them.

This is ELIC's space-channel context (arXiv:2203.10886): the channels of y are split
into groups, and each group is coded in two checkerboard passes. Before every pass, the
networks below predict the table index and the mean of each latent of the pass::

    z_hat, q -> h_s -> psi ----------------------+
    groups coded before -> g_ch ----------------- g_ep -> index, mean (1/16 steps)
    anchors of this group -> g_sp (2nd pass) ----+

All of these networks run on whole numbers. An activation is an integer in 0..255
(unit 1/32), an input from the latents or from z is an integer in -128..127, and a
weight is an integer in -127..127 times a power of two. The same Linen modules run in
four arithmetics:

* `float`: nothing is rounded (first part of the training),
* `fake`: rounded forward, straight-through backward (end of the training); the values
  equal those of `exact`,
* `twin`: `fake` for weights that are already rounded (refinement),
* `exact`: the parameters are the exported integers (`coding.integer_networks`).

Every sum of products stays below 2**24, so float32 holds it exactly in any order of
summation, on any device (this is proved at export and at load). On accelerators,
convolutions are dot products over shifted slices, since convolution algorithms that
transform their input (Winograd, FFT) would not be exact; on CPU they are int8.
Positions outside the image are zeroed after every layer, so the result does not depend
on the padding of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from semlic_jax.model.layers import (
    depth_to_space,
    lower_bound,
    round_straight_through,
    upper_bound,
)
from semlic_jax.model.priors import NUM_SCALES

Array = jax.Array

ARITHMETICS = ("float", "fake", "twin", "exact")
_ROUNDED = ("fake", "twin")  # in floats
MEAN_STEPS = 16  # means are multiples of 1/16
MEAN_LIMIT = 4095  # in 1/16 steps
ACTIVATION_MAX = 255
WEIGHT_MAX = 127
ACCUMULATOR_LIMIT = 2**24
SHIFT_MAX = 14
UNIT = 32.0  # hidden activations are integers in units of 1/32
_KERNEL_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
_Z_SHIFT = 3  # z_hat enters h_s as clip(8 * z_hat, -128, 127)


class Pass(NamedTuple):
    """One step of the coding order: channels start:stop, one checkerboard colour."""

    group: int
    start: int
    stop: int
    parity: int  # 0: anchors, (row + column) even; 1: the others


def coding_order(groups: tuple[int, ...]) -> tuple[Pass, ...]:
    """The passes, first to last, for groups with these numbers of channels."""
    passes = []
    start = 0
    for group, channels in enumerate(groups):
        for parity in (0, 1):
            passes.append(Pass(group, start, start + channels, parity))
        start += channels
    return tuple(passes)


def checkerboard(height: int, width: int, parity: int) -> np.ndarray:
    """bool [height, width, 1], True where (row + column) % 2 == parity."""
    rows, columns = np.ogrid[:height, :width]
    return ((rows + columns) % 2 == parity)[..., None]


def pack_colour(x: Array, parity: int | Array) -> Array:
    """The positions of one colour of the checkerboard, [B, h, w, C] with an even w ->
    [B, h, w/2, C]."""
    batch, height, width, channels = x.shape
    pairs = x.reshape(batch, height, width // 2, 2, channels)
    second = ((np.arange(height) + parity) % 2 == 1)[:, None, None]
    return jnp.where(second, pairs[..., 1, :], pairs[..., 0, :])


def unpack_colour(x: Array) -> Array:
    """Undo `pack_colour`; the other positions get the value of the one beside them."""
    return jnp.repeat(x, 2, axis=2)


def traverse(
    groups: tuple[int, ...],
    grid: tuple[int, int],
    parameters: Callable[[Pass, tuple[Any, ...]], tuple[Any, Any]],
    visit: Callable[[Pass, Any, Any], Any],
) -> tuple[Any, ...]:
    """Go through the coding order once.

    Training, rate estimation, refinement, encoding and decoding all use this loop and
    differ only in `visit`. It works on JAX and on NumPy arrays.

    Args:
        groups: channels per group.
        grid: height and width of y.
        parameters: called as `parameters(pass_, y_hat)` with the groups known so far
            (in 1/16 steps; in the second pass of a group they include the group itself,
            with zeros where it is not known yet). Returns index and mean for all
            positions, each [B, h, w, stop - start].
        visit: called as `visit(pass_, index, mean)`. Returns y_hat in 1/16 steps,
            [B, h, w, stop - start]; only positions of the pass's parity are kept.

    Returns:
        y_hat of each group in 1/16 steps.
    """
    done: list[Any] = []
    for pass_ in coding_order(groups):
        index, mean = parameters(pass_, tuple(done))
        values = visit(pass_, index, mean) * checkerboard(*grid, pass_.parity)
        if pass_.parity == 0:
            done.append(values)
        else:
            done[-1] = done[-1] + values
    return tuple(done)


def _round_half_up(x: Array) -> Array:
    """floor(x + 1/2), as the integer shift rounds; the gradient is the identity."""
    return x + lax.stop_gradient(jnp.floor(x + 0.5) - x)


def weight_shift(kernel: Any, input_max: int) -> Any:
    """The number of bits after the binary point of each output channel's weights.

    This is the largest s in 1..14 for which the rounded weights `round(kernel * 2**s)`
    stay within +-127 and every partial sum of products within 2**24. Every operation is
    exact, so training, export and a `float_twin` find the same s everywhere. For
    weights that no s fits, s is 1 (`coding.integer_networks` refuses them).

    Args:
        kernel: float32 [k, k, C_in, C_out], a JAX or a NumPy array.
        input_max: largest magnitude of the layer's input.

    Returns:
        int32 [C_out], an array of the same library, without a gradient.
    """
    xp: Any = np if isinstance(kernel, np.ndarray) else jnp
    kernel = kernel if xp is np else lax.stop_gradient(kernel)
    axes = (0, 1, 2)
    mantissa, exponent = xp.frexp(xp.max(xp.abs(kernel), axis=axes))
    # 2**7 times a mantissa lies in [64, 128).
    shift = 7 - exponent - (mantissa * 128 > WEIGHT_MAX)
    shift = xp.clip(xp.where(mantissa == 0, SHIFT_MAX, shift), None, SHIFT_MAX)
    taps = kernel.shape[0] * kernel.shape[1] * kernel.shape[2]
    largest_sum = taps * WEIGHT_MAX
    while largest_sum * input_max >= ACCUMULATOR_LIMIT:
        # The sum of whole numbers below 2**24 is exact in float32 in any order.
        total = xp.sum(xp.abs(xp.round(xp.ldexp(kernel, shift))), axis=axes)
        shift = shift - (total > (ACCUMULATOR_LIMIT - 1) // input_max)
        # One bit less halves the weights; rounding moves each by at most 1/2.
        largest_sum = (largest_sum + taps) // 2
    return xp.maximum(shift, 1).astype(xp.int32)


def _integer_conv(x: Array, kernel: Array, signed: int) -> Array:
    """Convolution of stride 1 with zero padding, exact on every platform.

    Args:
        x: int32 [B, h, w, C_in]; the first `signed` channels are within -128..127, the
            others within 0..255.
        kernel: int8 [k, k, C_in, C_out].
        signed: see x.

    Returns:
        int32 [B, h, w, C_out].
    """
    pad = kernel.shape[0] // 2
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    return lax.platform_dependent(
        padded,
        kernel,
        cpu=lambda x, kernel: _int8_conv(x, kernel, signed),
        default=_shifted_dot,
    )


def _int8_conv(padded: Array, kernel: Array, signed: int) -> Array:
    """int8 x int8 -> int32, on XLA:CPU up to 4 times faster than float32.

    Inputs in 0..255 are lowered by 128 to fit int8, and the sum is corrected for it.
    """
    offset = np.where(np.arange(padded.shape[-1]) < signed, 0, 128).astype(np.int32)
    sums = lax.conv_general_dilated(
        (padded - offset).astype(jnp.int8),
        kernel,
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=jnp.int32,
    )
    # An explicit type, because with JAX_ENABLE_X64 the sum would be int64.
    moved = jnp.sum(
        kernel.astype(jnp.int32) * offset[:, None], axis=(0, 1, 2), dtype=jnp.int32
    )
    return sums + moved


def _shifted_dot(padded: Array, kernel: Array) -> Array:
    """One float32 dot product per tap; exact because all sums are below 2**24."""
    size = kernel.shape[0]
    height, width = padded.shape[1] - size + 1, padded.shape[2] - size + 1
    x, weights = padded.astype(jnp.float32), kernel.astype(jnp.float32)
    total: Any = 0.0
    for row in range(size):
        for column in range(size):
            total = total + lax.dot_general(
                x[:, row : row + height, column : column + width],
                weights[row, column],
                (((3,), (0,)), ((), ())),
                precision=lax.Precision.HIGHEST,
                preferred_element_type=jnp.float32,
            )
    return total.astype(jnp.int32)


class LayerSpec(NamedTuple):
    """The shape and the ranges of one integer layer.

    Attributes:
        inputs, features: input and output channels.
        kernel: side of the kernel, odd.
        signed: how many input channels, from the first, are within -128..127; the
            others are within 0..255.
        right: a further right shift of the output. Hidden units are 1/32, so a shift of
            2 gives units of 1/8, and 1 gives units of 1/16.
    """

    inputs: int
    features: int
    kernel: int
    signed: int = 0
    right: int = 0

    @property
    def input_max(self) -> int:
        """The largest magnitude of the input."""
        return 128 if self.signed == self.inputs else ACTIVATION_MAX


class IntegerConv(nn.Module):
    """Convolution of stride 1 on integers, requantised by a power of two.

    `out = floor((sum(w * a) + b + 2**(s-1)) / 2**s)`, to be clipped by the caller. In
    the `float` arithmetic it is `(sum(kernel * a) + 32 * bias) / 2**right`.

    Attributes:
        spec: the shape and the ranges.
        arithmetic: one of `ARITHMETICS`.
        kernel_init: the initialiser of the float kernel.
    """

    spec: LayerSpec
    arithmetic: str = "float"
    kernel_init: Callable[..., Array] = _KERNEL_INIT

    @nn.compact
    def __call__(self, x: Array) -> Array:
        spec = self.spec
        shape = (spec.kernel, spec.kernel, spec.inputs, spec.features)
        zeros = nn.initializers.zeros
        if self.arithmetic == "exact":
            weights = self.param("kernel", zeros, shape, jnp.int8)
            bias = self.param("bias", zeros, (spec.features,), jnp.int32)
            shift = self.param("shift", zeros, (spec.features,), jnp.int32)
            rounding = lax.shift_left(jnp.ones_like(shift), shift - 1)
            total = _integer_conv(x, weights, spec.signed) + (bias + rounding)
            return lax.shift_right_arithmetic(
                total, jnp.broadcast_to(shift, total.shape)
            )
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = self.param("bias", zeros, (spec.features,))
        rounded = self.arithmetic in _ROUNDED
        if self.arithmetic == "fake":
            # Not exp2, which is wrong in the last bit for some whole numbers.
            scale = jnp.ldexp(jnp.float32(1), weight_shift(kernel, spec.input_max))
            kernel = round_straight_through(kernel * scale) / scale
            bias = round_straight_through(bias * UNIT * scale) / (UNIT * scale)
        pad = spec.kernel // 2
        y = lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            ((pad, pad), (pad, pad)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=lax.Precision.HIGHEST if rounded else None,
        )
        y = (y + UNIT * bias) * 2.0**-spec.right
        return _round_half_up(y) if rounded else y


def _clip(x: Array, low: int, high: int) -> Array:
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jnp.clip(x, low, high)
    return upper_bound(lower_bound(x, float(low)), float(high))


def _activation(x: Array, mask: Array) -> Array:
    """Integer ReLU: clipped to 0..255 and zero outside the image."""
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jnp.clip(x, 0, ACTIVATION_MAX) * mask.astype(x.dtype)
    return upper_bound(nn.relu(x), float(ACTIVATION_MAX)) * mask


class Masks(NamedTuple):
    """1 inside the image and 0 outside, [B, h, w, 1] at 1/64, 1/32 and 1/16."""

    z: Array
    middle: Array
    y: Array


class EntropyModel(nn.Module):
    """The integer networks: z_hat and the decoded part of y -> index, mean.

    Attributes:
        groups: channels of y per group.
        hyper_channels: channels of z.
        psi_channels: width of h_s and of its output.
        context_channels: width of g_ch and g_sp.
        hidden_channels: width of g_ep.
        context_shifts: the right shift of each group from 1/16 steps to the 8 bits
            that the context networks read.
        arithmetic: one of `ARITHMETICS`.
    """

    groups: tuple[int, ...]
    hyper_channels: int
    psi_channels: int
    context_channels: int
    hidden_channels: int
    context_shifts: tuple[int, ...]
    arithmetic: str = "float"

    def setup(self) -> None:
        self.layers = {
            name: IntegerConv(
                spec,
                arithmetic=self.arithmetic,
                # At first the outputs are just their biases.
                kernel_init=nn.initializers.zeros if spec.right else _KERNEL_INIT,
                name=name,
            )
            for name, spec in self.layer_specs().items()
        }

    def layer_specs(self) -> dict[str, LayerSpec]:
        """Shape and ranges of every layer, by name, which an export must prove."""
        psi, context, hidden = (
            self.psi_channels,
            self.context_channels,
            self.hidden_channels,
        )
        specs = {
            "h_s_0": LayerSpec(self.hyper_channels + 1, psi, 3, self.hyper_channels),
            # Sub-pixel upsampling instead of HiFiC's transposed convolutions: it covers
            # the same class of functions, and every product is a plain dot product.
            "h_s_1": LayerSpec(psi, 4 * psi, 3),
            "h_s_2": LayerSpec(psi, 4 * psi, 3),
        }
        before = 0
        for k, channels in enumerate(self.groups):
            inputs = psi + 1 + context
            if k > 0:
                specs[f"g_ch_{k}_0"] = LayerSpec(before, context, 3, before)
                specs[f"g_ch_{k}_1"] = LayerSpec(context, context, 3)
                inputs += context
            specs[f"g_sp_{k}"] = LayerSpec(channels, context, 5, channels)
            specs[f"g_ep_{k}_0"] = LayerSpec(inputs, hidden, 1)
            specs[f"g_ep_{k}_1"] = LayerSpec(hidden, hidden, 1)
            specs[f"g_ep_{k}_index"] = LayerSpec(hidden + 1, channels, 1, right=2)
            specs[f"g_ep_{k}_mean"] = LayerSpec(hidden + 1, channels, 1, right=1)
            before += channels
        return specs

    def _requantise(self, y_hat: Array, shift: int) -> Array:
        """Convert 1/16 steps to the signed 8 bits that a context network reads."""
        if self.arithmetic == "exact":
            y = lax.shift_right_arithmetic(
                y_hat + (1 << shift >> 1), jnp.full_like(y_hat, shift)
            )
        else:
            y = y_hat * 2.0**-shift
            y = _round_half_up(y) if self.arithmetic in _ROUNDED else y
        return _clip(y, -128, 127)

    def hyper_synthesis(self, z_hat: Array, quality: Array, masks: Masks) -> Array:
        """h_s: integers z_hat [B, h/4, w/4, N] -> psi [B, h, w, P] in 0..255.

        Args:
            z_hat: whole numbers, float32 (int32 in the `exact` arithmetic).
            quality: [B], whole numbers in 0..255.
            masks: the positions inside the image.
        """
        z = _clip(z_hat * 2**_Z_SHIFT, -128, 127)
        plane = self._plane(quality, masks.z)
        z = z * masks.z.astype(z.dtype)
        h = _activation(self.layers["h_s_0"](jnp.concatenate([z, plane], -1)), masks.z)
        h = depth_to_space(self.layers["h_s_1"](h), 2)
        h = _activation(h, masks.middle)
        h = depth_to_space(self.layers["h_s_2"](h), 2)
        return _activation(h, masks.y)

    def _plane(self, quality: Array, mask: Array) -> Array:
        q = quality[:, None, None, None]
        return q * mask.astype(q.dtype)

    def parameters(
        self,
        pass_: Pass,
        psi: Array,
        y_hat: tuple[Array, ...],
        quality: Array,
        masks: Masks,
        second: Array | None = None,
    ) -> tuple[Array, Array]:
        """Table index and mean of one pass.

        Args:
            pass_: the pass; static.
            psi: [B, h, w, P] from `hyper_synthesis`.
            y_hat: the groups known so far in 1/16 steps, see `traverse`.
            quality: [B], whole numbers in 0..255.
            masks: the positions inside the image.
            second: int32 [], 1 in the second pass of the group and 0 in the first. It
                replaces the parity of `pass_`, so that one program serves both passes.
                In the first pass, `y_hat` must then contain the group as zeros.

        Returns:
            index [B, h, w, C] in 0..63 and mean [B, h, w, C] in 1/16 steps within
            +-4095 at the positions of the pass; the other positions have the values of
            the one beside them.
        """
        k = pass_.group
        context = [
            self._requantise(group, shift) * masks.y.astype(group.dtype)
            for group, shift in zip(y_hat, self.context_shifts, strict=False)
        ]
        features = [psi, self._plane(quality, masks.y).astype(psi.dtype)]
        nothing = jnp.zeros((*psi.shape[:-1], self.context_channels), psi.dtype)
        layers = self.layers
        if k > 0:
            h = layers[f"g_ch_{k}_0"](jnp.concatenate(context[:k], -1))
            h = layers[f"g_ch_{k}_1"](_activation(h, masks.y))
            features.append(_activation(h, masks.y))
        if second is None and pass_.parity == 0:
            features.append(nothing)
        else:
            h = _activation(layers[f"g_sp_{k}"](context[k]), masks.y)
            features.append(h if second is None else h * second)
        parity = pass_.parity if second is None else second
        # From here on all layers are 1x1, so the positions of the pass suffice.
        features = [pack_colour(part, parity) for part in features]
        mask = pack_colour(masks.y, parity)
        h = layers[f"g_ep_{k}_0"](jnp.concatenate(features, -1))
        h = layers[f"g_ep_{k}_1"](_activation(h, mask))
        # The output layers also see the quality, on which the scales depend strongly.
        h = jnp.concatenate([_activation(h, mask), features[1]], -1)
        index = _clip(layers[f"g_ep_{k}_index"](h), 0, NUM_SCALES - 1)
        mean = _clip(layers[f"g_ep_{k}_mean"](h), -MEAN_LIMIT, MEAN_LIMIT)
        return unpack_colour(index), unpack_colour(mean)
