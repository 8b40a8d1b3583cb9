# SPDX-License-Identifier: Apache-2.0
"""The codec's training step in PyTorch: the other side of `training.benchmark`.

The same networks from the same parameters, written as a PyTorch user would: NCHW
tensors in channels-last memory, autograd, `torch.optim.Adam` over all tensors at once.
For measurements and tests only; nothing else in the package needs PyTorch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from semlic_jax.model.compression import QUALITY_LEVELS, ModelConfig
from semlic_jax.model.context import (
    ACTIVATION_MAX,
    MEAN_LIMIT,
    MEAN_STEPS,
    UNIT,
    LayerSpec,
    coding_order,
)
from semlic_jax.model.priors import NUM_SCALES, SCALE_MAX, SCALE_MIN
from semlic_jax.model.texture import texture_noise
from semlic_jax.model.transforms import STRIDE
from semlic_jax.objectives.trunks import IMAGENET_MEAN, IMAGENET_STD

Params = Mapping[str, Any]


class _LowerBound(torch.autograd.Function):
    """`model.layers.lower_bound` in PyTorch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(x >= bound)
        return x.clamp(min=bound)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return gradient * (inside | (gradient < 0)), None


def _lower(x: Tensor, bound: float) -> Tensor:
    return _LowerBound.apply(x, bound)


def _clip(x: Tensor, low: float, high: float) -> Tensor:
    return -_lower(-_lower(x, low), -high)


def _round(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def convert(params: Params, device: str) -> dict[str, Any]:
    """The JAX parameter tree as leaf tensors of the same names.

    Convolution kernels become OIHW, those of transposed convolutions IOHW. Dense
    kernels stay as they are.
    """

    def leaf(array: Any) -> Tensor:
        array = np.asarray(array, np.float32)
        if array.ndim == 4:
            array = array.transpose(3, 2, 0, 1)
        tensor = torch.tensor(np.ascontiguousarray(array), device=device)
        if tensor.ndim == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor.requires_grad_()

    return {
        name: convert(value, device) if isinstance(value, Mapping) else leaf(value)
        for name, value in params.items()
    }


def leaves(tree: Params) -> list[Tensor]:
    """All tensors of a tree, in order."""
    found: list[Tensor] = []
    for value in tree.values():
        found += leaves(value) if isinstance(value, Mapping) else [value]
    return found


def space_to_depth(x: Tensor, block: int) -> Tensor:
    """As in `model.layers`, channels first."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // block, block, width // block, block)
    x = x.permute(0, 3, 5, 1, 2, 4)
    return x.reshape(batch, block**2 * channels, height // block, width // block)


def depth_to_space(x: Tensor, block: int) -> Tensor:
    """Inverse of `space_to_depth`."""
    batch, channels, height, width = x.shape
    out = channels // block**2
    x = x.reshape(batch, block, block, out, height, width).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(batch, out, height * block, width * block)


def conv(x: Tensor, p: Params, stride: int = 1) -> Tensor:
    kernel = p["kernel"]
    return F.conv2d(x, kernel, p["bias"], stride, kernel.shape[-1] // 2)


def conv_transpose(x: Tensor, p: Params) -> Tensor:
    kernel = p["kernel"]
    pad = kernel.shape[-1] // 2
    return F.conv_transpose2d(x, kernel, p["bias"], 2, pad, output_padding=1)


def channel_norm(x: Tensor, p: Params) -> Tensor:
    x32 = x.float()
    deviation = x32 - x32.mean(1, keepdim=True)
    variance = deviation.square().sum(1, keepdim=True) / (x.shape[1] - 1)
    gamma, beta = p["gamma"][:, None, None], p["beta"][:, None, None]
    return (deviation * torch.rsqrt(variance + 1e-3) * gamma + beta).to(x.dtype)


def residual_block(x: Tensor, p: Params) -> Tensor:
    h = F.relu(channel_norm(conv(x, p["Conv_0"]), p["ChannelNorm_0"]))
    return x + channel_norm(conv(h, p["Conv_1"]), p["ChannelNorm_1"])


def filter_borders(x: Tensor, matrix: Tensor) -> Tensor:
    """As in `model.transforms`, channels first."""
    half = STRIDE // 2
    batch, channels, height, width = x.shape
    inner = x[:, :, half:-half].reshape(batch, channels, -1, STRIDE, width)
    inner = torch.einsum("bcnkw,jk->bcnjw", inner, matrix)
    inner = inner.reshape(batch, channels, height - STRIDE, width)
    x = torch.cat([x[:, :, :half], inner, x[:, :, -half:]], 2)
    inner = x[..., half:-half].reshape(batch, channels, height, -1, STRIDE)
    inner = torch.einsum("bchnk,jk->bchnj", inner, matrix)
    inner = inner.reshape(batch, channels, height, width - STRIDE)
    return torch.cat([x[..., :half], inner, x[..., -half:]], 3)


def _dense(x: Tensor, kernel: Tensor) -> Tensor:
    return torch.einsum("bchw,cd->bdhw", x, kernel)


@functools.cache
def _noise(shape: tuple[int, ...], level: int) -> Tensor:
    noise = texture_noise((shape[2], shape[3]), shape[1], level)
    return torch.tensor(np.asarray(noise)).permute(0, 3, 1, 2)


class Twin:
    """The model with its parameters.

    Attributes:
        params: leaf tensors; see `convert`.
        autocast: the context that sets the dtype that g_a and g_s compute in.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        specs: Mapping[str, LayerSpec],
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`specs` are those of the entropy networks' layers."""
        self.config = config
        self.params = convert(params, device)
        self.specs = specs
        self.autocast = torch.autocast(device, dtype, enabled=dtype != torch.float32)

    def analysis(self, x: Tensor) -> Tensor:
        config, p = self.config, self.params["g_a"]
        with self.autocast:
            h = space_to_depth(x, config.patch)
            h = F.relu(channel_norm(conv(h, p["Conv_0"]), p["ChannelNorm_0"]))
            levels = len(config.widths)
            for i in range(1, levels):
                for j in range(config.level_blocks):
                    h = residual_block(h, p[f"level_{i - 1}_block_{j}"])
                h = conv(h, p[f"Conv_{i}"], 2)
                h = F.relu(channel_norm(h, p[f"ChannelNorm_{i}"]))
            y = conv(h, p[f"Conv_{levels}"]).float()
        if config.linear_skip:
            lapped = filter_borders(x - 0.5, p["skip_lapping"])
            y = y + _dense(space_to_depth(lapped, STRIDE), p["skip"]["kernel"])
        return y

    def synthesis(self, y_hat: Tensor, quality: Tensor) -> Tensor:
        config, p = self.config, self.params["g_s"]
        norms = iter(range(99))

        def norm(x: Tensor) -> Tensor:
            return channel_norm(x, p[f"ChannelNorm_{next(norms)}"])

        with self.autocast:
            if config.linear_skip:
                h = y_hat * p["input_scale"][:, None, None]
            else:
                h = norm(y_hat)
            h = conv(h, p["Conv_0"])
            features = torch.stack([quality, quality**2], -1)
            shift = features @ p["quality"]["kernel"] + p["quality"]["bias"]
            head = h = norm(h + shift[:, :, None, None].to(h.dtype))
            for i in range(config.blocks):
                h = residual_block(h, p[f"block_{i}"])
            h = h + head
            for i in range(len(config.widths) - 1):
                h = F.relu(norm(conv_transpose(h, p[f"ConvTranspose_{i}"])))
                if config.texture_channels:
                    gate = conv(h, p[f"texture_{i}"]["gate"])
                    noise = _noise(gate.shape, i).to(gate)
                    h = h + conv(gate * noise, p[f"texture_{i}"]["mix"])
                for j in range(config.level_blocks):
                    h = residual_block(h, p[f"level_{i}_block_{j}"])
            out = conv(h, p["Conv_1"])
        x_hat = depth_to_space(out.float(), config.patch)
        if not config.linear_skip:
            return x_hat
        linear = depth_to_space(_dense(y_hat, p["skip"]["kernel"]), STRIDE)
        linear = filter_borders(linear, p["skip_lapping"])
        x_hat = x_hat + linear + 0.5
        with self.autocast:
            seen = space_to_depth(x_hat - 0.5, config.patch).to(h.dtype)
            h = conv(torch.cat([h, seen], 1), p["repair_0"])
            h = conv(F.relu(channel_norm(h, p["repair_norm"])), p["repair_1"])
        return x_hat + depth_to_space(h.float(), config.patch)

    def hyper_analysis(self, y: Tensor) -> Tensor:
        p = self.params["h_a"]
        if self.config.linear_skip:
            y = y * p["input_scale"][:, None, None]
        h = F.relu(conv(y, p["Conv_0"]))
        h = F.relu(conv(h, p["Conv_1"], 2))
        return conv(h, p["Conv_2"], 2)

    def gain(self, quality: Tensor) -> Tensor:
        log_gain = self.params["log_gain"]
        anchors = self.config.gain_anchors
        position = quality.clamp(0, 1) * (anchors - 1)
        low = position.floor().clamp(0, anchors - 2).long()
        weight = (position - low)[:, None]
        mixed = (1 - weight) * log_gain[low] + weight * log_gain[low + 1]
        return mixed.exp()[:, :, None, None]

    def z_bits(self, z: Tensor) -> Tensor:
        """Bits of each image's z [B, N, h, w]."""
        p = self.params["prior"]
        flat = z.transpose(0, 1).reshape(z.shape[1], 1, -1)

        def logits(x: Tensor) -> Tensor:
            count = sum(name.startswith("matrix") for name in p)
            for i in range(count):
                x = F.softplus(p[f"matrix_{i}"]) @ x + p[f"bias_{i}"]
                if i < count - 1:
                    x = x + torch.tanh(p[f"factor_{i}"]) * torch.tanh(x)
            return x

        lower, upper = logits(flat - 0.5), logits(flat + 0.5)
        sign = -torch.sign(lower + upper).detach()
        mass = (torch.sigmoid(sign * upper) - torch.sigmoid(sign * lower)).abs()
        bits = -torch.log2(_lower(mass, 1e-9))
        return bits.reshape(z.shape[1], z.shape[0], -1).sum((0, 2))

    def _integer_conv(self, name: str, x: Tensor) -> Tensor:
        p, spec = self.params["entropy"][name], self.specs[name]
        y = F.conv2d(x, p["kernel"], UNIT * p["bias"], padding=spec.kernel // 2)
        return y * 2.0**-spec.right

    def _activation(self, x: Tensor) -> Tensor:
        return -_lower(-F.relu(x), -float(ACTIVATION_MAX))

    def forward(
        self, x: Tensor, quality: Tensor, z_noise: Tensor, y_noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`CompressionModel.__call__` in NCHW, with the noise as arguments.

        Returns:
            x_hat, bits of y and bits of z per image.
        """
        config = self.config
        y = self.analysis(x) * self.gain(quality)
        z = self.hyper_analysis(y)
        z_bits = self.z_bits(z + z_noise)
        level = (quality * (QUALITY_LEVELS - 1)).round()[:, None, None, None]
        # h_s
        z_hat = _clip(_round(z) * 8, -128, 127)
        plane = level.expand(-1, 1, *z.shape[2:])
        h = self._activation(self._integer_conv("h_s_0", torch.cat([z_hat, plane], 1)))
        h = self._activation(depth_to_space(self._integer_conv("h_s_1", h), 2))
        psi = self._activation(depth_to_space(self._integer_conv("h_s_2", h), 2))
        plane = level.expand(-1, 1, *y.shape[2:])
        rows = torch.arange(y.shape[2], device=x.device)[:, None]
        columns = torch.arange(y.shape[3], device=x.device)
        colours = [((rows + columns) % 2 == parity).float() for parity in (0, 1)]
        log_step = math.log(SCALE_MAX / SCALE_MIN) / (NUM_SCALES - 1)
        nothing = psi.new_zeros(psi.shape[0], config.context_channels, *psi.shape[2:])
        done: list[Tensor] = []
        y_bits = torch.zeros_like(z_bits)
        for pass_ in coding_order(config.groups):
            k = pass_.group
            context = [
                _clip(group * 2.0**-shift, -128, 127)
                for group, shift in zip(done, config.context_shifts, strict=False)
            ]
            features = [psi, plane]
            if k > 0:
                h = self._integer_conv(f"g_ch_{k}_0", torch.cat(context[:k], 1))
                h = self._integer_conv(f"g_ch_{k}_1", self._activation(h))
                features.append(self._activation(h))
            if pass_.parity == 1:
                h = self._integer_conv(f"g_sp_{k}", context[k])
                features.append(self._activation(h))
            else:
                features.append(nothing)
            h = self._integer_conv(f"g_ep_{k}_0", torch.cat(features, 1))
            h = self._integer_conv(f"g_ep_{k}_1", self._activation(h))
            h = torch.cat([self._activation(h), plane], 1)
            index = self._integer_conv(f"g_ep_{k}_index", h)
            scale = SCALE_MIN * torch.exp(log_step * _clip(index, 0, NUM_SCALES - 1))
            mean = self._integer_conv(f"g_ep_{k}_mean", h)
            mean = _clip(mean, -MEAN_LIMIT, MEAN_LIMIT)
            channels = slice(pass_.start, pass_.stop)
            residual = y[:, channels] - mean / MEAN_STEPS
            distance = (residual + y_noise[:, channels]).abs()
            root = math.sqrt(0.5)
            mass = 0.5 * (
                torch.erfc((distance - 0.5) / scale * root)
                - torch.erfc((distance + 0.5) / scale * root)
            )
            ours = colours[pass_.parity]
            bits = -torch.log2(_lower(mass, 1e-9)) * ours
            y_bits = y_bits + bits.sum((1, 2, 3))
            values = (_round(residual) * MEAN_STEPS + mean) * ours
            if pass_.parity == 0:
                done.append(values)
            else:
                done[-1] = done[-1] + values
        y_hat = torch.cat(done, 1) / MEAN_STEPS
        return self.synthesis(y_hat / self.gain(quality), quality), y_bits, z_bits


def squeezenet_distance(
    params: Params, x: Tensor, x_hat: Tensor, taps: Sequence[str]
) -> Tensor:
    """`feature_distance` under SqueezeNet 1.0, [B], of NCHW images in [0, 1]."""
    mean = x.new_tensor(IMAGENET_MEAN)[:, None, None]
    deviation = x.new_tensor(IMAGENET_STD)[:, None, None]

    def features(images: Tensor) -> list[Tensor]:
        h = (images - mean) / deviation
        found = []
        for index in range(1, 10):
            name = "conv1" if index == 1 else f"fire{index}"
            p = params[name]
            if index == 1:
                h = F.relu(F.conv2d(h, p["kernel"], p["bias"], 2))
            else:
                h = F.relu(conv(h, p["squeeze"]))
                h = torch.cat(
                    [
                        F.relu(conv(h, p["expand1x1"])),
                        F.relu(conv(h, p["expand3x3"])),
                    ],
                    1,
                )
            if name in taps:
                f = h.float()
                square = f.square().sum(1, keepdim=True)
                found.append(f * torch.rsqrt(square + 1e-8))
            if len(found) == len(taps):
                break
            if index in (1, 4, 8):
                h = F.max_pool2d(h, 3, 2, ceil_mode=True)
        return found

    with torch.no_grad():
        real = features(x)
    return sum(
        (a - b).square().sum(1).mean((1, 2))
        for a, b in zip(real, features(x_hat), strict=True)
    )


def make_step(
    twin: Twin, trunk: Params, taps: Sequence[str], *, lr: float
) -> Callable[[Tensor], Tensor]:
    """Return a training step like `steps.codec_update`: NCHW images -> loss."""
    tensors = leaves(twin.params)
    average = [tensor.detach().clone() for tensor in tensors]
    optimizer = torch.optim.Adam(tensors, lr=lr, betas=(0.9, 0.99))
    for tensor in leaves(trunk):
        tensor.requires_grad_(False)

    def step(x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        quality = (torch.arange(batch) + torch.rand(batch)).to(x.device) / batch
        quality = (quality * (QUALITY_LEVELS - 1)).round() / (QUALITY_LEVELS - 1)
        config = twin.config
        z_shape = (batch, config.hyper_channels, height // 64, width // 64)
        y_shape = (batch, config.latent_channels, height // 16, width // 16)
        x_hat, y_bits, z_bits = twin.forward(
            x,
            quality,
            torch.rand(z_shape, device=x.device) - 0.5,
            torch.rand(y_shape, device=x.device) - 0.5,
        )
        total = (((x - x_hat).square() + 1e-6).sqrt()).mean((1, 2, 3))
        total = total + torch.exp(-5 * quality) * (y_bits + z_bits) / (height * width)
        with twin.autocast:
            distance = squeezenet_distance(trunk, x, x_hat, taps)
        loss = (total + 0.02 * distance).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tensors, 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, tensors, 0.002)
        return loss.detach()

    return step
