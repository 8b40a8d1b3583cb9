# SPDX-License-Identifier: Apache-2.0
"""Frozen feature networks: images in, named feature maps out.

In: the networks, their exact preprocessing, loading of their weights, and the
distance of two sets of feature maps. Out: losses (`losses.py`) and metrics
(`metrics.py`), which are built on these. Imports jax, flax and numpy only.

Every network takes NHWC float images in [0, 1], RGB, and applies the
preprocessing that its weights were trained with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CAFFE_MEAN_BGR = (104.0, 117.0, 123.0)

SQUEEZENET1_0_TAPS = ("conv1", "fire3", "fire5", "fire7", "fire8")


def preprocess(images: jax.Array, form: str) -> jax.Array:
    """Map [0, 1] RGB images to what a network was trained on.

    Args:
        images: float [..., 3] in [0, 1], RGB.
        form: "imagenet" (torchvision: subtract mean, divide by deviation; LPIPS's
            own scaling of [-1, 1] images is the same map) or "caffe" (BGR in
            0..255 minus (104, 117, 123)).
    """
    if form == "imagenet":
        mean = jnp.asarray(IMAGENET_MEAN, images.dtype)
        return (images - mean) / jnp.asarray(IMAGENET_STD, images.dtype)
    if form == "caffe":
        return images[..., ::-1] * 255 - jnp.asarray(CAFFE_MEAN_BGR, images.dtype)
    raise ValueError(f'preprocessing must be "imagenet" or "caffe", found {form!r}')


def max_pool_ceil(x: jax.Array) -> jax.Array:
    """3x3 max-pool of stride 2, no left padding, sizes rounded up.

    The last window may hang over the right and bottom edges (PyTorch's
    ceil_mode=True, Caffe's only mode).
    """
    height, width = x.shape[-3:-1]
    overhang = [-(size - 3) % 2 if size >= 3 else 3 - size for size in (height, width)]
    return nn.max_pool(
        x, (3, 3), strides=(2, 2), padding=((0, overhang[0]), (0, overhang[1]))
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
        return jnp.concatenate(
            [
                conv("expand1x1", self.expand, 1, x),
                conv("expand3x3", self.expand, 3, x),
            ],
            axis=-1,
        )


class SqueezeNet(nn.Module):
    """SqueezeNet's convolutional part (Iandola et al. 2016, arXiv:1602.07360).

    Attributes:
        version: "1.0" (conv1 7x7, 96 channels; pools after conv1, fire4, fire8)
            or "1.1" (conv1 3x3, 64 channels; pools after conv1, fire3, fire5).
        taps: layers to return, of "conv1", "fire2" ... "fire9"; nothing beyond
            the deepest is computed.
        preprocessing: see `preprocess`.
        dtype: compute type; None computes in the type of images and weights.
    """

    version: str = "1.0"
    taps: tuple[str, ...] = SQUEEZENET1_0_TAPS
    preprocessing: str = "imagenet"
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Args: images float [B, H, W, 3] in [0, 1]. Returns taps [B, h, w, C]."""
        if self.version not in ("1.0", "1.1"):
            raise ValueError(f'version must be "1.0" or "1.1", found {self.version!r}')
        first = (96, 7) if self.version == "1.0" else (64, 3)
        pools = (1, 4, 8) if self.version == "1.0" else (1, 3, 5)
        wanted = set(self.taps)
        taps: dict[str, jax.Array] = {}
        x = preprocess(images, self.preprocessing)
        for index in range(1, 10):
            if index == 1:
                name = "conv1"
                layer = nn.Conv(
                    first[0],
                    (first[1], first[1]),
                    strides=2,
                    padding="VALID",
                    dtype=self.dtype,
                    name=name,
                )
                x = nn.relu(layer(x))
            else:
                name = f"fire{index}"
                squeeze = 16 * (index // 2)
                x = Fire(squeeze, 4 * squeeze, dtype=self.dtype, name=name)(x)
            if name in wanted:
                taps[name] = x
            if len(taps) == len(wanted):
                break
            if index in pools:
                x = max_pool_ceil(x)
        return {name: taps[name] for name in self.taps}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
    """A network with its weights: a pytree, so it can be an argument of jit.

    Attributes:
        params: the Linen parameter tree.
        module: the network; static.
    """

    params: Mapping[str, Any]
    module: Any = dataclasses.field(metadata={"static": True})

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the feature maps, in the order of `apply`."""
        return self.module.taps

    def apply(self, images: jax.Array) -> list[jax.Array]:
        """Feature maps [B, h, w, C] of float images [B, H, W, 3] in [0, 1]."""
        found = self.module.apply({"params": self.params}, images)
        return [found[name] for name in self.taps]


def normalise_channels(features: jax.Array, *, eps: float = 1e-8) -> jax.Array:
    """f / sqrt(sum_c f^2 + eps): unit length over channels, finite gradient at 0."""
    square = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
    return features * jax.lax.rsqrt(square + eps)


def feature_distance(
    taps_a: Sequence[jax.Array],
    taps_b: Sequence[jax.Array],
    weights: Sequence[jax.Array] | None = None,
    *,
    eps: float = 1e-8,
) -> jax.Array:
    """Distance of two sets of feature maps (the form of LPIPS, arXiv:1801.03924).

    sum_l mean_hw sum_c w_lc (a_lhwc - b_lhwc)^2, with a and b of unit length over
    channels; all weights are 1 where none are given.

    Args:
        taps_a, taps_b: per tap [B, h, w, C]; computed in float32.
        weights: per tap [C], or None.
        eps: inside the square root of the channel norm.

    Returns:
        float32 [B].
    """
    total = jnp.zeros(taps_a[0].shape[0], jnp.float32)
    for index, (a, b) in enumerate(zip(taps_a, taps_b, strict=True)):
        a = normalise_channels(a.astype(jnp.float32), eps=eps)
        b = normalise_channels(b.astype(jnp.float32), eps=eps)
        square = jnp.square(a - b)
        if weights is not None:
            square = square * weights[index]
        total = total + jnp.mean(jnp.sum(square, axis=-1), axis=(1, 2))
    return total


def load_features(
    path: str | Path, name: str = "squeezenet1_0", *, dtype: Any = None
) -> FeatureNetwork:
    """Load a feature network from an .npz file, without executing any pickle.

    Args:
        path: the file, or a folder that holds `<name>*.npz`.
        name: which network.
        dtype: compute type of the network, such as jnp.bfloat16; None: float32.

    Raises:
        ValueError: no such file, or weights that do not fit the network.
    """
    if name != "squeezenet1_0":
        raise ValueError(f"unknown feature network {name!r}, known: squeezenet1_0")
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob(f"{name}*.npz"))
        if not found:
            raise ValueError(f"no {name}*.npz in the folder of feature weights {path}")
        path = found[0]
    with np.load(path, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    module = SqueezeNet("1.0", preprocessing="caffe", dtype=dtype)
    return FeatureNetwork(_squeezenet_params(arrays), module)


def _squeezenet_params(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    parts = {"conv1x1_1": "squeeze", "conv1x1_2": "expand1x1", "conv3x3_2": "expand3x3"}
    params: dict[str, Any] = {}
    for key, value in arrays.items():
        *layer, kind = key.split(".")
        if layer[0] == "conv_final":
            continue
        node = params
        for part in layer:
            node = node.setdefault(parts.get(part, part), {})
        if kind == "weight":
            node["kernel"] = jnp.asarray(value.transpose(2, 3, 1, 0))  # OIHW -> HWIO
        else:
            node["bias"] = jnp.asarray(value)
    return params
