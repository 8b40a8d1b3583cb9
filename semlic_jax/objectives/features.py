# SPDX-License-Identifier: Apache-2.0
"""Frozen feature networks: a network with its weights, and distances of features.

The module has `load_features`, the `FeatureNetwork` that it returns,
`convert_features`, and the channel-normalised distance of two sets of feature maps. The
networks themselves are in `trunks.py`, `inception.py` and `mobilenet.py`, the names and
layouts of published weights in `feature_weights.py`, losses and metrics in modules of
their own. Imports jax, flax, numpy and other modules of this package's objectives.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from semlic_jax.objectives.feature_weights import (
    convert_network,
    find_weights,
    finite_floats,
    load_dists_weights,
    load_lpips_heads,
    parameter_tree,
    read_arrays,
    recognise,
)
from semlic_jax.objectives.inception import InceptionV3
from semlic_jax.objectives.mobilenet import MobileNetV2
from semlic_jax.objectives.trunks import (
    LPIPS_TAPS,
    SQUEEZENET1_0_TAPS,
    VGG16,
    AlexNet,
    CompactTrunk,
    SqueezeNet,
)

__all__ = [
    "NETWORKS",
    "PACKAGED",
    "PACKAGED_FILE",
    "SQUEEZENET1_0_TAPS",
    "VGG16",
    "AlexNet",
    "CompactTrunk",
    "FeatureNetwork",
    "InceptionV3",
    "MobileNetV2",
    "SqueezeNet",
    "convert_features",
    "feature_distance",
    "load_features",
    "normalise_channels",
]

# The networks that `load_features` knows by name, with their default taps.
NETWORKS: dict[str, nn.Module] = {
    "squeezenet1_0": SqueezeNet("1.0"),
    "squeezenet1_1": SqueezeNet("1.1", LPIPS_TAPS["squeeze"]),
    "vgg16": VGG16(),
    "alexnet": AlexNet(),
    "inception_v3": InceptionV3(),
    "mobilenet_v2": MobileNetV2(),
    "compact": CompactTrunk(),
}
# The network whose weights come with the package: used where a user names none.
PACKAGED = "compact"
PACKAGED_FILE = Path(__file__).parents[1] / "pretrained" / "features" / "compact.npz"
_USUAL = "squeezenet1_0"  # assumed where neither user nor file names a network


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
    """A network with its weights: a pytree, so it can be an argument of `jax.jit`.

    If it is passed as an argument (not closed over), its weights are not baked into the
    compiled program as constants.

    Attributes:
        params: the Linen parameter tree, float32.
        module: the network, static, with fields `taps`, `preprocessing` and `dtype`.
    """

    params: Mapping[str, Any]
    module: Any = dataclasses.field(metadata={"static": True})

    @property
    def name(self) -> str:
        """Name in `NETWORKS`: distances of different networks must not be mixed."""

        def kind(module: Any) -> tuple[type, str]:
            return type(module), getattr(module, "version", "")

        names = {kind(module): name for name, module in NETWORKS.items()}
        return names.get(kind(self.module), type(self.module).__name__)

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the feature maps, in the order of `apply`."""
        return self.module.taps

    def apply(self, images: jax.Array) -> list[jax.Array]:
        """Feature maps [B, h, w, C] of float images [B, H, W, 3] in [0, 1], RGB."""
        found = self.module.apply({"params": self.params}, images)
        return [found[name] for name in self.taps]

    def embed(self, images: jax.Array) -> jax.Array:
        """The spatial mean of the last tap, float32 [B, C]: one vector per image."""
        return jnp.mean(self.apply(images)[-1].astype(jnp.float32), axis=(1, 2))

    def replace(self, **fields: Any) -> FeatureNetwork:
        """The same weights under other settings, such as `taps=("fire9",)`."""
        return FeatureNetwork(self.params, self.module.clone(**fields))


def load_features(
    path: str | Path | None = None,
    name: str | None = None,
    *,
    taps: Sequence[str] | None = None,
    dtype: Any = None,
) -> FeatureNetwork:
    """Load a feature network from an .npz file; no pickle is ever executed.

    Without any argument, it is the packaged network, unless the environment variable
    SEMLIC_FEATURES names a folder of others.

    Args:
        path: the file, or a folder that holds `<name>*.npz`; None takes the packaged
            file for the packaged network, and SEMLIC_FEATURES for others.
        name: one of `NETWORKS`; None takes the network that a file names, and from a
            folder SqueezeNet 1.0.
        taps: layers to return; None takes the network's own choice.
        dtype: compute type, such as jnp.bfloat16; None computes in float32.

    Raises:
        ValueError: the name or a tap is unknown, there is no such file, or its weights
            do not fit.
    """
    if name is not None and name not in NETWORKS:
        raise ValueError(
            f"unknown feature network {name!r}: expected one of "
            f"{', '.join(sorted(NETWORKS))}"
        )
    if path is None and name != PACKAGED:
        path = os.environ.get("SEMLIC_FEATURES") or None
    if path is None:
        if name not in (None, PACKAGED):
            raise ValueError(
                f"no weights given for the feature network {name}: pass a path, or "
                "set SEMLIC_FEATURES to the folder that holds them"
            )
        path, name = PACKAGED_FILE, PACKAGED
    file = find_weights(path, name or _USUAL)
    arrays = read_arrays(file)
    if name is None:
        name = str(arrays.get("network", _USUAL))
        if name not in NETWORKS:
            raise ValueError(f"{file.name} holds weights of {name}, an unknown network")
    if "network" not in arrays:
        arrays = convert_network(arrays, name)
    params, preprocessing = parameter_tree(arrays, name, file.name)
    settings: dict[str, Any] = {"dtype": dtype, "preprocessing": preprocessing}
    if taps is not None:
        settings["taps"] = tuple(taps)
    module = NETWORKS[name].clone(**settings)
    checked = _checked_params(params, module, file)
    return FeatureNetwork(jax.tree.map(jnp.asarray, checked), module)


def _checked_params(
    params: Mapping[str, Any], module: nn.Module, file: Path
) -> dict[str, Any]:
    """Return those weights that a network has, float32.

    Raises:
        ValueError: a layer is missing, has another shape, or holds anything but finite
            floats.
    """
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    wanted = jax.eval_shape(module.init, jax.random.key(0), images)["params"]

    def check(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        node: Any = params
        keys = [entry.key for entry in path]
        for key in keys:
            node = node.get(key) if isinstance(node, Mapping) else None
        found = getattr(node, "shape", None)
        if found != leaf.shape:
            raise ValueError(
                f"{file.name} does not fit {type(module).__name__}: layer "
                f"{'/'.join(keys)} should have shape {leaf.shape}, "
                f"found {found or 'none'}"
            )
        return finite_floats(node, f"layer {'/'.join(keys)} of {file.name}")

    return jax.tree_util.tree_map_with_path(check, wanted)


def convert_features(path: str | Path, name: str | None = None) -> tuple[str, bytes]:
    """Convert a published file of weights to the form that this package loads.

    Args:
        path: a .pth, .pt or .npz file or a model.json of TensorFlow.js; nothing in it
            is executed.
        name: one of `NETWORKS`; "lpips_alex", "lpips_vgg" or "lpips_squeeze" for the
            heads of LPIPS; "dists" for alpha and beta of DISTS; None recognises what
            the file holds.

    Returns:
        the name that the file should have in a folder of weights, and the bytes of the
        .npz.

    Raises:
        ValueError: the name is unknown, the file cannot be read, or its weights do not
            fit.
    """
    path = Path(path)
    arrays: dict[str, Any] = read_arrays(path)
    name = name or recognise(arrays, path.name)
    if name in NETWORKS:
        arrays = convert_network(arrays, name)
        params, preprocessing = parameter_tree(arrays, name, path.name)
        module = NETWORKS[name].clone(preprocessing=preprocessing)
        _checked_params(params, module, path)
        file_name = f"{name}.npz"
    elif name.startswith("lpips_"):
        trunk = name.removeprefix("lpips_")
        heads = load_lpips_heads(path, trunk)
        arrays = {
            f"lin{index}.model.1.weight": head.reshape(1, -1, 1, 1)
            for index, head in enumerate(heads)
        }
        file_name = f"lpips_v0.1_{trunk}.npz"
    elif name == "dists":
        alpha, beta = (np.concatenate(part) for part in load_dists_weights(path))
        arrays = {"alpha": alpha, "beta": beta}
        file_name = "dists_alpha_beta.npz"
    else:
        known = [*sorted(NETWORKS), "lpips_alex", "lpips_vgg", "lpips_squeeze", "dists"]
        raise ValueError(
            f"unknown feature weights {name!r}: expected one of {', '.join(known)}"
        )
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return file_name, buffer.getvalue()


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _unit_length(features: jax.Array, eps: float) -> jax.Array:
    square = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
    return features * jax.lax.rsqrt(square + eps)


def _unit_length_forward(features: jax.Array, eps: float) -> tuple[jax.Array, Any]:
    return _unit_length(features, eps), features


def _unit_length_backward(
    eps: float, features: jax.Array, gradient: jax.Array
) -> tuple[jax.Array]:
    contract = functools.partial(
        jnp.einsum, "...c,...c->...", precision=jax.lax.Precision.HIGHEST
    )
    scale = jax.lax.rsqrt(contract(features, features) + eps)[..., None]
    along = contract(features, gradient)[..., None]
    return (scale * (gradient - features * (along * scale**2)),)


_unit_length.defvjp(_unit_length_forward, _unit_length_backward)


def normalise_channels(features: jax.Array, *, eps: float = 1e-8) -> jax.Array:
    """f / sqrt(sum_c f^2 + eps): unit length over channels, finite gradient at 0.

    The gradient is written by hand, because XLA:CPU sums the products of the automatic
    one number by number, which is many times slower than a contraction.
    """
    return _unit_length(features, eps)


def feature_distance(
    taps_a: Sequence[jax.Array],
    taps_b: Sequence[jax.Array],
    weights: Sequence[jax.Array] | None = None,
    *,
    eps: float = 1e-8,
    pixel_weights: jax.Array | None = None,
) -> jax.Array:
    """Distance of two sets of feature maps (the form of LPIPS, arXiv:1801.03924).

    sum_l mean_hw sum_c w_lc (a_lhwc - b_lhwc)^2, with a and b of unit length over
    channels.

    Args:
        taps_a, taps_b: feature maps of each tap, [B, h, w, C]; computed in float32.
        weights: channel weights w of each tap, [C]; None means that all are 1.
        eps: added inside the square root of the channel norm.
        pixel_weights: float [B, H, W] at the images' size. Resized to each tap, they
            multiply the squares before the mean; weights with a mean of 1 keep the
            scale.

    Returns:
        float32 [B].

    Raises:
        ValueError: the numbers of taps or weights differ.
    """
    counts = {len(taps_a), len(taps_b), len(taps_a if weights is None else weights)}
    if len(counts) > 1:
        raise ValueError(
            f"expected as many taps on both sides as weights, found {len(taps_a)} and "
            f"{len(taps_b)} taps and {'no' if weights is None else len(weights)} "
            "weights"
        )
    total = jnp.zeros(taps_a[0].shape[0], jnp.float32)
    for index, (a, b) in enumerate(zip(taps_a, taps_b, strict=True)):
        a = normalise_channels(a.astype(jnp.float32), eps=eps)
        b = normalise_channels(b.astype(jnp.float32), eps=eps)
        square = jnp.square(a - b)
        if weights is not None:
            square = square * weights[index]
        cells = jnp.sum(square, axis=-1)
        if pixel_weights is not None:
            cells = cells * jax.image.resize(pixel_weights, cells.shape, "linear")
        total = total + jnp.mean(cells, axis=(1, 2))
    return total
