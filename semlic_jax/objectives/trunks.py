# SPDX-License-Identifier: Apache-2.0
"""The convolutional parts of SqueezeNet, VGG-16 and AlexNet, and our own compact trunk.

The module has the networks, with named taps, and the pooling and preprocessing that
they need. Their weights and the distances built on them are in `features.py`,
Inception-v3 in `inception.py` and MobileNetV2 in `mobilenet.py`. Imports jax, flax and
numpy only.

Every network takes NHWC float images in [0, 1], RGB, applies the preprocessing that
its weights were trained with, and returns `{tap: [B, h, w, C]}`. A tap carries the
name of its layer and holds that layer's output after its ReLU, if it has one. Nothing
beyond the deepest tap is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CAFFE_MEAN_BGR = (104.0, 117.0, 123.0)

SQUEEZENET1_0_TAPS = ("conv1", "fire3", "fire5", "fire7", "fire8")
# The taps of the compact trunk, one for each of the SqueezeNet 1.0 taps: its channels,
# and the squeeze and expand channels of the fire modules before it.
COMPACT_STAGES: dict[str, tuple[int, tuple[tuple[int, int], ...]]] = {
    "tap1": (48, ()),
    "tap2": (80, ((16, 48), (16, 48))),
    "tap3": (128, ((32, 96), (32, 96))),
    "tap4": (160, ((48, 112), (48, 112))),
    "tap5": (224, ((48, 112),)),
}
# Taps of LPIPS v0.1 (arXiv:1801.03924), one per learnt head.
LPIPS_TAPS = {
    "alex": ("conv1", "conv2", "conv3", "conv4", "conv5"),
    "vgg": ("conv1_2", "conv2_2", "conv3_3", "conv4_3", "conv5_3"),
    "squeeze": ("conv1", "fire3", "fire5", "fire6", "fire7", "fire8", "fire9"),
}
VGG16_CONVS = (
    *("conv1_1", "conv1_2", "conv2_1", "conv2_2", "conv3_1", "conv3_2", "conv3_3"),
    *("conv4_1", "conv4_2", "conv4_3", "conv5_1", "conv5_2", "conv5_3"),
)


def preprocess(images: jax.Array, form: str) -> jax.Array:
    """Map [0, 1] RGB images to what a network was trained on.

    Args:
        images: float [..., 3] in [0, 1], RGB.
        form: "imagenet" (torchvision: subtract mean, divide by deviation; LPIPS's
            own scaling of [-1, 1] images is the same map), "caffe" (BGR in 0..255
            minus (104, 117, 123)), "signed" ([-1, 1]) or "unit" ([0, 1], as it is).

    Raises:
        ValueError: the form is unknown.
    """
    if form == "imagenet":
        mean = jnp.asarray(IMAGENET_MEAN, images.dtype)
        return (images - mean) / jnp.asarray(IMAGENET_STD, images.dtype)
    if form == "caffe":
        return images[..., ::-1] * 255 - jnp.asarray(CAFFE_MEAN_BGR, images.dtype)
    if form in ("signed", "unit"):
        return 2 * images - 1 if form == "signed" else images
    raise ValueError(
        f'preprocessing must be "imagenet", "caffe", "signed" or "unit", found {form!r}'
    )


def max_pool(
    x: jax.Array, size: int, stride: int, *, padding: int = 0, ceil: bool = False
) -> jax.Array:
    """Max-pool by maxima of shifted slices, rows first, then columns.

    The values equal those of `lax.reduce_window`. The gradient is one of shifted
    additions, while that of reduce_window is a select-and-scatter, ten times slower on
    a CPU; equal maxima share the gradient, while a select gives it to the first.

    Args:
        x: float [B, H, W, C].
        size, stride, padding: lengths in cells, the same for both axes.
        ceil: whether the last window may hang over the bottom and right edges
            (PyTorch's ceil_mode=True, Caffe's only mode).
    """

    def along(axis: int, x: jax.Array) -> jax.Array:
        length = x.shape[axis] + 2 * padding
        steps = (length - size) / stride
        outputs = max(int(np.ceil(steps) if ceil else np.floor(steps)) + 1, 1)
        span = (outputs - 1) * stride + 1
        pads = [(0, 0, 0)] * x.ndim
        pads[axis] = (padding, span + size - 1 - padding - x.shape[axis], 0)
        x = jax.lax.pad(x, jnp.asarray(-jnp.inf, x.dtype), pads)
        result = jax.lax.slice_in_dim(x, 0, span, stride, axis)
        for start in range(1, size):
            shifted = jax.lax.slice_in_dim(x, start, start + span, stride, axis)
            result = jnp.maximum(result, shifted)
        return result

    return along(2, along(1, x))


def l2_pool(x: jax.Array) -> jax.Array:
    """DISTS's pooling: sqrt(Hann 3x3 * x^2 + 1e-12), stride 2 (arXiv:2004.07728)."""
    square = jnp.pad(jnp.square(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    for axis in (1, 2):
        outputs = (square.shape[axis] - 3) // 2 + 1
        span = (outputs - 1) * 2 + 1
        a, b, c = (
            jax.lax.slice_in_dim(square, start, start + span, 2, axis)
            for start in range(3)
        )
        square = (a + 2 * b + c) / 4  # the normalised Hann window (1/4, 1/2, 1/4)
    return jnp.sqrt(square + 1e-12)


def require_side(images: jax.Array, least: int, network: str) -> None:
    """Raise ValueError for images [..., H, W, C] with a side of less than `least`."""
    height, width = images.shape[-3:-1]
    if min(height, width) < least:
        raise ValueError(
            f"{network} needs images of at least {least}x{least} pixels, "
            f"found {width}x{height}"
        )


def require_taps(taps: tuple[str, ...], known: tuple[str, ...]) -> None:
    """Raise ValueError if there are no taps, or not all of them are known."""
    unknown = [name for name in taps if name not in known]
    if unknown or not taps:
        raise ValueError(
            f"taps must be among {', '.join(known)}; found {', '.join(unknown) or '-'}"
        )


class Fire(nn.Module):
    """SqueezeNet's fire module: 1x1 squeeze, then 1x1 and 3x3 expansions."""

    squeeze: int
    expand: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def conv(name: str, features: int, size: int, x: jax.Array) -> jax.Array:
            layer = nn.Conv(
                features, (size, size), padding=size // 2, dtype=self.dtype, name=name
            )
            return nn.relu(layer(x))

        x = conv("squeeze", self.squeeze, 1, x)
        left = conv("expand1x1", self.expand, 1, x)
        right = conv("expand3x3", self.expand, 3, x)
        return jnp.concatenate([left, right], axis=-1)


class SqueezeNet(nn.Module):
    """SqueezeNet's convolutional part (Iandola et al. 2016, arXiv:1602.07360).

    Attributes:
        version: "1.0" (conv1 7x7, 96 channels; pools after conv1, fire4, fire8)
            or "1.1" (conv1 3x3, 64 channels; pools after conv1, fire3, fire5).
        taps: layers to return, some of "conv1", "fire2" ... "fire9".
        preprocessing: see `preprocess`.
        dtype: compute type; None computes in the type of images and weights.
    """

    version: str = "1.0"
    taps: tuple[str, ...] = SQUEEZENET1_0_TAPS
    preprocessing: str = "imagenet"
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Map images float [B, H, W, 3] in [0, 1] to taps [B, h, w, C] by name.

        Raises:
            ValueError: the version or a tap is unknown, or the images are too small.
        """
        if self.version not in ("1.0", "1.1"):
            raise ValueError(f'version must be "1.0" or "1.1", found {self.version!r}')
        known = ("conv1", *(f"fire{index}" for index in range(2, 10)))
        require_taps(self.taps, known)
        channels, size = (96, 7) if self.version == "1.0" else (64, 3)
        pools = (1, 4, 8) if self.version == "1.0" else (1, 3, 5)
        require_side(images, size, f"SqueezeNet {self.version}")
        taps: dict[str, jax.Array] = {}
        x = preprocess(images, self.preprocessing)
        for index, name in enumerate(known, start=1):
            if index == 1:
                layer = nn.Conv(
                    channels,
                    (size, size),
                    strides=2,
                    padding="VALID",
                    dtype=self.dtype,
                    name=name,
                )
                x = nn.relu(layer(x))
            else:
                squeeze = 16 * (index // 2)
                x = Fire(squeeze, 4 * squeeze, dtype=self.dtype, name=name)(x)
            if name in self.taps:
                taps[name] = x
            if len(taps) == len(set(self.taps)):
                break
            if index in pools:
                x = max_pool(x, 3, 2, ceil=True)
        return {name: taps[name] for name in self.taps}


class VGG16(nn.Module):
    """VGG-16's convolutional part (Simonyan & Zisserman 2014, arXiv:1409.1556).

    Attributes:
        taps: layers to return, some of "conv1_1" ... "conv5_3".
        pooling: "max", or "l2" for DISTS.
        preprocessing, dtype: as in `SqueezeNet`.
    """

    taps: tuple[str, ...] = LPIPS_TAPS["vgg"]
    pooling: str = "max"
    preprocessing: str = "imagenet"
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Map images float [B, H, W, 3] in [0, 1] to taps [B, h, w, C] by name.

        Raises:
            ValueError: the pooling or a tap is unknown, or the images are too small.
        """
        pools: dict[str, Callable[[jax.Array], jax.Array]] = {
            "max": lambda x: max_pool(x, 2, 2),
            "l2": l2_pool,
        }
        if self.pooling not in pools:
            raise ValueError(f'pooling must be "max" or "l2", found {self.pooling!r}')
        require_taps(self.taps, VGG16_CONVS)
        require_side(images, 16, "VGG-16")
        taps: dict[str, jax.Array] = {}
        x = preprocess(images, self.preprocessing)
        for name in VGG16_CONVS:
            block, index = int(name[4]), int(name[6])
            if block > 1 and index == 1:
                x = pools[self.pooling](x)
            features = min(64 * 2 ** (block - 1), 512)
            layer = nn.Conv(features, (3, 3), padding=1, dtype=self.dtype, name=name)
            x = nn.relu(layer(x))
            if name in self.taps:
                taps[name] = x
            if len(taps) == len(set(self.taps)):
                break
        return {name: taps[name] for name in self.taps}


class AlexNet(nn.Module):
    """AlexNet's convolutional part, one column (Krizhevsky 2014, arXiv:1404.5997).

    Attributes:
        taps: layers to return, some of "conv1" ... "conv5".
        preprocessing, dtype: as in `SqueezeNet`.
    """

    taps: tuple[str, ...] = LPIPS_TAPS["alex"]
    preprocessing: str = "imagenet"
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Map images float [B, H, W, 3] in [0, 1] to taps [B, h, w, C] by name.

        Raises:
            ValueError: a tap is unknown, or the images are too small.
        """
        known = LPIPS_TAPS["alex"]
        require_taps(self.taps, known)
        require_side(images, 31, "AlexNet")
        # channels, kernel side, stride, padding
        layers = (
            *((64, 11, 4, 2), (192, 5, 1, 2), (384, 3, 1, 1)),
            *((256, 3, 1, 1), (256, 3, 1, 1)),
        )
        taps: dict[str, jax.Array] = {}
        x = preprocess(images, self.preprocessing)
        for name, (features, size, stride, padding) in zip(known, layers, strict=True):
            if name in ("conv2", "conv3"):
                x = max_pool(x, 3, 2)
            layer = nn.Conv(
                features,
                (size, size),
                strides=stride,
                padding=padding,
                dtype=self.dtype,
                name=name,
            )
            x = nn.relu(layer(x))
            if name in self.taps:
                taps[name] = x
            if len(taps) == len(set(self.taps)):
                break
        return {name: taps[name] for name in self.taps}


class CompactTrunk(nn.Module):
    """A narrow SqueezeNet with bypasses, distilled from SqueezeNet 1.0.

    Its weights come with the package and are made by `training/distil.py`. Its taps lie
    on the same grids as SQUEEZENET1_0_TAPS for images of every size. They are linear
    (1x1 convolutions without a ReLU) and meant to be brought to unit length, as by
    `features.feature_distance`: each then stands for the unit-length features of its
    SqueezeNet tap, projected on fewer channels, so that distances have nearly the same
    values. The taps take about 9,700 multiplications per pixel, those of SqueezeNet
    15,000.

    Attributes:
        taps: layers to return, some of "tap1" ... "tap5".
        preprocessing, dtype: as in `SqueezeNet`.
    """

    taps: tuple[str, ...] = tuple(COMPACT_STAGES)
    preprocessing: str = "imagenet"
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Map images float [B, H, W, 3] in [0, 1] to taps [B, h, w, C] by name.

        Raises:
            ValueError: a tap is unknown, or the images are too small.
        """
        require_taps(self.taps, tuple(COMPACT_STAGES))
        require_side(images, 7, "the compact trunk")
        taps: dict[str, jax.Array] = {}
        x = preprocess(images, self.preprocessing)
        stem = nn.Conv(48, (7, 7), 2, "VALID", dtype=self.dtype, name="conv1")
        x = nn.relu(stem(x))
        number = 2  # number of the next fire module, as in SqueezeNet
        for name, (features, modules) in COMPACT_STAGES.items():
            if name in ("tap2", "tap3"):
                x = max_pool(x, 3, 2, ceil=True)
            for squeeze, expand in modules:
                fire = Fire(squeeze, expand, dtype=self.dtype, name=f"fire{number}")
                y = fire(x)
                x = x + y if x.shape == y.shape else y
                number += 1
            if name in self.taps:
                taps[name] = nn.Conv(features, (1, 1), dtype=self.dtype, name=name)(x)
            if len(taps) == len(set(self.taps)):
                break
        return {name: taps[name] for name in self.taps}
