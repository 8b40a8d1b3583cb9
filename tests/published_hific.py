# SPDX-License-Identifier: Apache-2.0
"""NeuralCompression's autoencoder for tests: random weights, a reference, a file.

Written from the published description of the network (HiFiC, arXiv:2006.09965, as
MS-ILLM uses it) and its checkpoints: names, NCHW layouts, symmetric padding.
"""

from __future__ import annotations

import math
import struct
import zipfile

import numpy as np

REDUCED = {"widths": (4, 6, 8, 10, 12), "blocks": 2, "latent": 6, "hyper": 5}
FULL = {"widths": (60, 120, 240, 480, 960), "blocks": 9, "latent": 220, "hyper": 320}
FILTERS = (1, 3, 3, 3, 3, 1)


def published_state(widths, blocks, latent, hyper, seed=0):
    """float32 arrays by the names of the checkpoints, lively enough to code."""
    rng = np.random.default_rng(seed)
    state = {}

    def conv(name, out, into, side, *, transposed=False, gain=1.0):
        shape = (into, out, side, side) if transposed else (out, into, side, side)
        scale = gain / math.sqrt(into * side**2 / (4 if transposed else 1))
        state[f"{name}.weight"] = scale * rng.standard_normal(shape, np.float32)
        state[f"{name}.bias"] = 0.1 * rng.standard_normal(out, np.float32)

    def norm(name, channels):
        shape = (1, channels, 1, 1)
        state[f"{name}.gamma"] = 1 + 0.1 * rng.standard_normal(shape, np.float32)
        state[f"{name}.beta"] = 0.1 * rng.standard_normal(shape, np.float32)

    for i, (into, out) in enumerate(zip((3, *widths), widths, strict=False)):
        conv(f"encoder.blocks.{i}.0", out, into, 3 if i else 7)
        norm(f"encoder.blocks.{i}.1", out)
    conv("encoder.blocks.5", latent, widths[-1], 3, gain=4.0)
    norm("decoder.block_0.0", latent)
    conv("decoder.block_0.1", widths[-1], latent, 3)
    norm("decoder.block_0.2", widths[-1])
    for i in range(blocks):
        for j in (0, 3):
            name = f"decoder.resid_blocks.{i}.sequence"
            conv(f"{name}.{j}", widths[-1], widths[-1], 3)
            norm(f"{name}.{j + 1}", widths[-1])
    for i, (into, out) in enumerate(zip(widths[::-1], widths[-2::-1], strict=False)):
        conv(f"decoder.blocks.{i}.0", out, into, 3, transposed=True)
        norm(f"decoder.blocks.{i}.1", out)
    conv("decoder.blocks.4", 3, widths[0], 7, gain=0.3)
    for i, (into, side) in enumerate(((latent, 3), (hyper, 5), (hyper, 5))):
        conv(f"hyper_analysis.{2 * i}", hyper, into, side, gain=1.5)
    for head in ("mean", "scale"):
        name = f"hyper_synthesis_{head}"
        conv(f"{name}.0", hyper, hyper, 5, transposed=True)
        conv(f"{name}.2", hyper, hyper, 5, transposed=True)
        conv(f"{name}.4", latent, hyper, 3)
    state["hyper_synthesis_scale.4.bias"] += 3
    name = "hyper_bottleneck"
    for i, (into, out) in enumerate(zip(FILTERS, FILTERS[1:], strict=False)):
        noise = 0.3 * rng.standard_normal((hyper, out, into), np.float32)
        state[f"{name}._matrix{i}"] = noise - 1
        state[f"{name}._bias{i}"] = rng.standard_normal((hyper, out, 1), np.float32)
        if i < len(FILTERS) - 2:
            factor = rng.standard_normal((hyper, out, 1), np.float32)
            state[f"{name}._factor{i}"] = 0.3 * factor
    quantiles = np.zeros((hyper, 1, 3), np.float32) + [-10, 0, 10]
    quantiles += rng.standard_normal((hyper, 1, 1))
    state[f"{name}.quantiles"] = quantiles.astype(np.float32)
    # Buffers, which a converter leaves alone.
    state[f"{name}._offset"] = np.zeros(0, np.int32)
    state["latent_bottleneck.scale_table"] = np.zeros(0, np.float32)
    return state


class NumpyOps:
    """float64, by definition."""

    lib = np

    @staticmethod
    def array(value):
        return np.asarray(value, np.float64)

    @staticmethod
    def conv(x, weight, bias, stride, padding):
        side = weight.shape[2]
        x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (side, side), (2, 3))
        windows = windows[:, :, ::stride, ::stride]
        out = np.einsum("bihwkl,oikl->bohw", windows, weight, optimize=True)
        return out + bias[None, :, None, None]

    @classmethod
    def up(cls, x, weight, bias, padding):
        """Every input adds its multiple of the kernel to the output."""
        side = weight.shape[2]
        batch, channels, height, width = x.shape
        spread = np.zeros((batch, channels, 2 * height, 2 * width))
        spread[:, :, ::2, ::2] = x
        # The last row and column are the output padding.
        flipped = weight.transpose(1, 0, 2, 3)[:, :, ::-1, ::-1]
        return cls.conv(spread, flipped, bias, 1, side - 1 - padding)

    @staticmethod
    def erfc(x):
        return np.vectorize(math.erfc)(x)


class TorchOps:
    """float32 PyTorch."""

    def __init__(self, torch):
        self.lib = torch
        self.erfc = torch.erfc

    def array(self, value):
        return self.lib.from_numpy(np.ascontiguousarray(value))

    def conv(self, x, weight, bias, stride, padding):
        conv2d = self.lib.nn.functional.conv2d
        return conv2d(x, weight, bias, stride=stride, padding=padding)

    def up(self, x, weight, bias, padding):
        return self.lib.nn.functional.conv_transpose2d(
            x, weight, bias, stride=2, padding=padding, output_padding=1
        )


def evaluate(ops, state, image, blocks, **_):
    """The published evaluation pass.

    Args:
        ops: `NumpyOps` or `TorchOps`.
        state: arrays by name.
        image: float32 [B, H, W, 3] in [0, 1], sides multiples of 64.
        blocks: residual blocks.

    Returns:
        y, z, likelihoods of y and z, x_hat, all NumPy NHWC.
    """
    weights = {key: ops.array(value) for key, value in state.items()}
    lib = ops.lib

    def conv(name, x, stride=1):
        weight = weights[f"{name}.weight"]
        padding = weight.shape[2] // 2
        return ops.conv(x, weight, weights[f"{name}.bias"], stride, padding)

    def up(name, x):
        weight = weights[f"{name}.weight"]
        return ops.up(x, weight, weights[f"{name}.bias"], weight.shape[2] // 2)

    def norm(name, x):
        deviation = x - x.mean(axis=1, keepdims=True)
        variance = (deviation**2).sum(axis=1, keepdims=True) / (x.shape[1] - 1)
        unit = deviation / (variance + 1e-3) ** 0.5
        return weights[f"{name}.gamma"] * unit + weights[f"{name}.beta"]

    def relu(x):
        return x * (x > 0)

    def sigmoid(x):
        return 1 / (1 + lib.exp(-x))

    x = ops.array(image.transpose(0, 3, 1, 2))
    for i in range(5):
        h = conv(f"encoder.blocks.{i}.0", x, 2 if i else 1)
        x = relu(norm(f"encoder.blocks.{i}.1", h))
    y = conv("encoder.blocks.5", x)
    z = relu(conv("hyper_analysis.0", y))
    z = relu(conv("hyper_analysis.2", z, 2))
    z = conv("hyper_analysis.4", z, 2)

    median = weights["hyper_bottleneck.quantiles"][:, 0, 1].reshape(1, -1, 1, 1)
    z_hat = (z - median).round() + median

    def logits(v):
        v = v.swapaxes(0, 1).reshape(v.shape[1], 1, -1)
        for i in range(5):
            matrix = weights[f"hyper_bottleneck._matrix{i}"]
            v = lib.log1p(lib.exp(matrix)) @ v + weights[f"hyper_bottleneck._bias{i}"]
            if i < 4:
                factor = weights[f"hyper_bottleneck._factor{i}"]
                v = v + lib.tanh(factor) * lib.tanh(v)
        return v.reshape(z.shape[1], z.shape[0], *z.shape[2:]).swapaxes(0, 1)

    lower, upper = logits(z_hat - 0.5), logits(z_hat + 0.5)
    sign = -lib.sign(lower + upper)
    z_likelihood = abs(sigmoid(sign * upper) - sigmoid(sign * lower))

    def stack(head):
        h = relu(up(f"hyper_synthesis_{head}.0", z_hat))
        h = relu(up(f"hyper_synthesis_{head}.2", h))
        return conv(f"hyper_synthesis_{head}.4", h)

    mean, raw = stack("mean"), stack("scale")
    scale = raw * (raw > 0.11) + 0.11 * (raw <= 0.11)
    residual = (y - mean).round()

    def tail(v):
        return 0.5 * ops.erfc(v / scale * 2**-0.5)

    y_likelihood = tail(abs(residual) - 0.5) - tail(abs(residual) + 0.5)
    y_hat = residual + mean
    h = conv("decoder.block_0.1", norm("decoder.block_0.0", y_hat))
    head = h = norm("decoder.block_0.2", h)
    for i in range(blocks):
        name = f"decoder.resid_blocks.{i}.sequence"
        inner = relu(norm(f"{name}.1", conv(f"{name}.0", h)))
        h = h + norm(f"{name}.4", conv(f"{name}.3", inner))
    h = h + head
    for i in range(4):
        h = relu(norm(f"decoder.blocks.{i}.1", up(f"decoder.blocks.{i}.0", h)))
    x_hat = conv("decoder.blocks.4", h)
    found = (y, z, y_likelihood, z_likelihood, x_hat)
    return tuple(np.asarray(part).transpose(0, 2, 3, 1) for part in found)


def write_checkpoint(path, state):
    """A state dict as `torch.save` writes it, by hand; float32 and int32 only."""

    def text(value):
        raw = value.encode()
        return b"X" + struct.pack("<I", len(raw)) + raw

    def numbers(values):
        return b"(" + b"".join(b"J" + struct.pack("<i", v) for v in values) + b"t"

    types = {"<f4": b"FloatStorage", "<i4": b"IntStorage"}
    pickled = [b"\x80\x02ccollections\nOrderedDict\n)R("]
    with zipfile.ZipFile(path, "w") as archive:
        for key, (name, value) in enumerate(state.items()):
            strides = [s // value.itemsize for s in value.strides]
            pickled += [
                text(name),
                b"ctorch._utils\n_rebuild_tensor_v2\n((",
                text("storage"),
                b"ctorch\n" + types[value.dtype.str] + b"\n",
                text(str(key)),
                text("cpu"),
                b"J" + struct.pack("<i", value.size) + b"tQK\0",
                numbers(value.shape),
                numbers(strides),
                b"\x89ccollections\nOrderedDict\n)RtR",
            ]
            archive.writestr(f"archive/data/{key}", value.tobytes())
        archive.writestr("archive/data.pkl", b"".join(pickled) + b"u.")
    return path
