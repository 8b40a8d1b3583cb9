# SPDX-License-Identifier: Apache-2.0
"""Inception-v3 in the variant that FID is defined with, in Flax Linen.

This is the network of the TensorFlow graph of 2015-12-05 (Heusel et al. 2017,
arXiv:1706.08500), as pytorch-fid and torch-fidelity run it. It differs from the
Inception-v3 of torchvision: average pools leave their padding out of the mean, and
the last block's pool is a max-pool. Batch norms are folded into the convolutions
when weights are converted. Imports jax, flax and numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from semlic_jax.objectives.trunks import max_pool

# Feature depths that FID's literature calls 64, 192, 768 and 2048.
INCEPTION_TAPS = ("MaxPool_1", "MaxPool_2", "Mixed_6e", "Mixed_7c")
INPUT_SIDE = 299


def resize_bilinear(
    images: jax.Array, size: tuple[int, int], *, half_pixel: bool
) -> jax.Array:
    """Resize images bilinearly without antialiasing, as FID's networks do.

    Args:
        images: float [B, H, W, C].
        size: output height and width.
        half_pixel: whether the source position of pixel i is (i + 1/2) * scale - 1/2
            (PyTorch's align_corners=False) or i * scale (TensorFlow 1's default).
    """
    for axis, outputs in zip((1, 2), size, strict=True):
        length = images.shape[axis]
        position = np.arange(outputs, dtype=np.float64)
        scale = length / outputs
        position = (position + 0.5) * scale - 0.5 if half_pixel else position * scale
        position = np.clip(position, 0, length - 1)
        low = np.floor(position).astype(np.int32)
        high = np.minimum(low + 1, length - 1)
        shape = [1] * images.ndim
        shape[axis] = outputs
        weight = jnp.asarray((position - low).reshape(shape), images.dtype)
        below, above = (jnp.take(images, rows, axis=axis) for rows in (low, high))
        images = below + (above - below) * weight
    return images


def _average_pool(x: jax.Array) -> jax.Array:
    return nn.avg_pool(
        x, (3, 3), strides=(1, 1), padding="SAME", count_include_pad=False
    )


class _Block(nn.Module):
    """Base of the blocks, with a shorthand for named convolutions."""

    dtype: Any = None

    def conv(
        self,
        name: str,
        x: jax.Array,
        features: int,
        size: int | tuple[int, int] = 1,
        *,
        stride: int = 1,
    ) -> jax.Array:
        """Apply a convolution, with its norm folded in, and a ReLU.

        Stride 1 keeps the size, stride 2 pads nothing.
        """
        size = (size, size) if isinstance(size, int) else size
        padding = "SAME" if stride == 1 else "VALID"
        layer = nn.Conv(
            features, size, strides=stride, padding=padding, dtype=self.dtype, name=name
        )
        return nn.relu(layer(x))


class InceptionA(_Block):
    """Block on the 35x35 grid, with 1x1, 5x5, double 3x3 and pool branches."""

    pool_features: int = 32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        five = self.conv("branch5x5_1", x, 48)
        double = self.conv("branch3x3dbl_1", x, 64)
        double = self.conv("branch3x3dbl_2", double, 96, 3)
        branches = [
            self.conv("branch1x1", x, 64),
            self.conv("branch5x5_2", five, 64, 5),
            self.conv("branch3x3dbl_3", double, 96, 3),
            self.conv("branch_pool", _average_pool(x), self.pool_features),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionB(_Block):
    """Block from the 35x35 grid to the 17x17 grid."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        double = self.conv("branch3x3dbl_1", x, 64)
        double = self.conv("branch3x3dbl_2", double, 96, 3)
        branches = [
            self.conv("branch3x3", x, 384, 3, stride=2),
            self.conv("branch3x3dbl_3", double, 96, 3, stride=2),
            max_pool(x, 3, 2),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionC(_Block):
    """Block on the 17x17 grid, with 7x7 convolutions factored into 1x7 and 7x1."""

    channels_7x7: int = 128

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = self.channels_7x7
        seven = self.conv("branch7x7_1", x, width)
        seven = self.conv("branch7x7_2", seven, width, (1, 7))
        double = self.conv("branch7x7dbl_1", x, width)
        double = self.conv("branch7x7dbl_2", double, width, (7, 1))
        double = self.conv("branch7x7dbl_3", double, width, (1, 7))
        double = self.conv("branch7x7dbl_4", double, width, (7, 1))
        branches = [
            self.conv("branch1x1", x, 192),
            self.conv("branch7x7_3", seven, 192, (7, 1)),
            self.conv("branch7x7dbl_5", double, 192, (1, 7)),
            self.conv("branch_pool", _average_pool(x), 192),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionD(_Block):
    """Block from the 17x17 grid to the 8x8 grid."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = self.conv("branch3x3_1", x, 192)
        seven = self.conv("branch7x7x3_1", x, 192)
        seven = self.conv("branch7x7x3_2", seven, 192, (1, 7))
        seven = self.conv("branch7x7x3_3", seven, 192, (7, 1))
        branches = [
            self.conv("branch3x3_2", three, 320, 3, stride=2),
            self.conv("branch7x7x3_4", seven, 192, 3, stride=2),
            max_pool(x, 3, 2),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionE(_Block):
    """Block on the 8x8 grid, with 3x3 convolutions split into 1x3 beside 3x1."""

    last: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = self.conv("branch3x3_1", x, 384)
        double = self.conv("branch3x3dbl_1", x, 448)
        double = self.conv("branch3x3dbl_2", double, 384, 3)
        pooled = max_pool(x, 3, 1, padding=1) if self.last else _average_pool(x)
        branches = [
            self.conv("branch1x1", x, 320),
            self.conv("branch3x3_2a", three, 384, (1, 3)),
            self.conv("branch3x3_2b", three, 384, (3, 1)),
            self.conv("branch3x3dbl_3a", double, 384, (1, 3)),
            self.conv("branch3x3dbl_3b", double, 384, (3, 1)),
            self.conv("branch_pool", pooled, 192),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionV3(nn.Module):
    """FID's Inception-v3 up to its last convolutional block.

    Attributes:
        taps: layers to return, some of `INCEPTION_TAPS`; the spatial mean of
            "Mixed_7c" is the 2048-vector of FID and KID.
        preprocessing: "torch_fidelity" (TensorFlow 1's resizing to 299x299, then
            (255 x - 128) / 128; what published image-compression results use) or
            "pytorch_fid" (half-pixel resizing to 299x299, then 2 x - 1).
        dtype: compute type; None computes in the type of images and weights.
    """

    taps: tuple[str, ...] = ("Mixed_7c",)
    preprocessing: str = "torch_fidelity"
    dtype: Any = None

    def _prepare(self, images: jax.Array) -> jax.Array:
        size = (INPUT_SIDE, INPUT_SIDE)
        if self.preprocessing == "torch_fidelity":
            # That package resizes pixels in 0..255, where 8-bit values are exact.
            images = resize_bilinear(images * 255, size, half_pixel=False)
            return (images - 128) / 128
        if self.preprocessing == "pytorch_fid":
            return 2 * resize_bilinear(images, size, half_pixel=True) - 1
        raise ValueError(
            'preprocessing must be "torch_fidelity" or "pytorch_fid", '
            f"found {self.preprocessing!r}"
        )

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Map images float [B, H, W, 3] in [0, 1] to taps [B, h, w, C] by name.

        Raises:
            ValueError: a tap or the preprocessing is unknown.
        """
        unknown = set(self.taps) - set(INCEPTION_TAPS)
        if unknown or not self.taps:
            raise ValueError(
                f"taps must be among {', '.join(INCEPTION_TAPS)}; "
                f"found {', '.join(sorted(unknown)) or '-'}"
            )
        dtype = self.dtype

        def conv(
            name: str, x: jax.Array, features: int, size: int, stride: int, pad: int
        ) -> jax.Array:
            layer = nn.Conv(
                features, (size, size), stride, padding=pad, dtype=dtype, name=name
            )
            return nn.relu(layer(x))

        def stem(x: jax.Array) -> jax.Array:
            x = conv("Conv2d_1a_3x3", x, 32, 3, 2, 0)
            x = conv("Conv2d_2a_3x3", x, 32, 3, 1, 0)
            return max_pool(conv("Conv2d_2b_3x3", x, 64, 3, 1, 1), 3, 2)

        def stem2(x: jax.Array) -> jax.Array:
            x = conv("Conv2d_3b_1x1", x, 80, 1, 1, 0)
            return max_pool(conv("Conv2d_4a_3x3", x, 192, 3, 1, 0), 3, 2)

        def middle(x: jax.Array) -> jax.Array:
            for letter, features in zip("bcd", (32, 64, 64), strict=True):
                x = InceptionA(dtype, features, name=f"Mixed_5{letter}")(x)
            x = InceptionB(dtype, name="Mixed_6a")(x)
            for letter, width in zip("bcde", (128, 160, 160, 192), strict=True):
                x = InceptionC(dtype, width, name=f"Mixed_6{letter}")(x)
            return x

        def top(x: jax.Array) -> jax.Array:
            x = InceptionD(dtype, name="Mixed_7a")(x)
            x = InceptionE(dtype, name="Mixed_7b")(x)
            return InceptionE(dtype, last=True, name="Mixed_7c")(x)

        taps: dict[str, jax.Array] = {}
        x = self._prepare(images)
        stages: Sequence[Any] = (stem, stem2, middle, top)
        for name, stage in zip(INCEPTION_TAPS, stages, strict=True):
            x = stage(x)
            if name in self.taps:
                taps[name] = x
            if len(taps) == len(set(self.taps)):
                break
        return {name: taps[name] for name in self.taps}
