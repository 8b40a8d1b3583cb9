# SPDX-License-Identifier: Apache-2.0
"""Weights of feature networks: published files are converted to one form of .npz.

This module knows the names that published files give their layers, converts them to
this package's form and reads that form. The networks are in `trunks.py`,
`inception.py` and `mobilenet.py`, the containers in `torch_files.py` and
`tfjs_files.py`.

The form is an .npz without pickled objects. It has one float32 array per parameter,
keyed by its path in the Linen tree ("fire2/squeeze/kernel", kernels HWIO), and two
strings, `network` (the name) and `preprocessing` (see the network). Files with
PyTorch's names and layouts (OIHW) are read as well, and Keras's MobileNetV2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from semlic_jax.arrays_file import as_tree, read_arrays_file
from semlic_jax.objectives.tfjs_files import read_tfjs_file
from semlic_jax.objectives.torch_files import read_torch_file
from semlic_jax.objectives.trunks import VGG16_CONVS

# First bytes of PyTorch's files: those of pickles, and of zip archives.
_PICKLE, _ZIP = b"\x80", b"PK"
# Types of numbers, and of the strings that name a network and its preprocessing.
_DTYPES = ("<f", "<i", "<u", "|i", "|u", "|b", "<U")
_BATCH_NORM_EPS = 1e-3  # of Inception-v3 and MobileNetV2; no other network has norms
_LPIPS_CHANNELS = {
    "alex": (64, 192, 384, 256, 256),
    "vgg": (64, 128, 256, 512, 512),
    "squeeze": (64, 128, 256, 384, 384, 512, 512),
}
DISTS_CHANNELS = (3, 64, 128, 256, 512, 512)

# torchvision's index of each layer in `features`.
_SQUEEZENET_INDEX = {
    "squeezenet1_0": (0, 3, 4, 5, 7, 8, 9, 10, 12),
    "squeezenet1_1": (0, 3, 4, 6, 7, 9, 10, 11, 12),
}
# Names of convolutions that are not part of the feature maps start with these.
_OUTER_LAYERS = ("classifier.", "AuxLogits.")
_VGG16_INDEX = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
_ALEXNET_INDEX = (0, 3, 6, 8, 10)
_KERAS_NORMS = {"Conv1": "bn_Conv1", "Conv_1": "Conv_1_bn"}  # all others: NAME_BN
_DEEP_COMPRESSION_PARTS = {
    "conv1x1_1": "squeeze",
    "conv1x1_2": "expand1x1",
    "conv3x3_2": "expand3x3",
}


def _squeezenet_names(name: str) -> Callable[[str], str | None]:
    index = {str(i): n + 1 for n, i in enumerate(_SQUEEZENET_INDEX[name])}

    def rename(layer: str) -> str | None:
        if layer.startswith("fire"):
            fire, _, part = layer.partition(".")
            return f"{fire}/{_DEEP_COMPRESSION_PARTS.get(part, part)}"
        if layer == "conv1":
            return layer
        match = re.fullmatch(r"features\.(\d+)(?:\.(\w+))?", layer)
        if not match or match[1] not in index:
            return None
        number, part = index[match[1]], match[2]
        if number == 1:
            return "conv1"
        return f"fire{number}/{part}" if part else None

    return rename


def _sequential_names(
    index: tuple[int, ...], names: tuple[str, ...]
) -> Callable[[str], str | None]:
    table = {f"features.{i}": n for i, n in zip(index, names, strict=True)}
    return lambda layer: layer if layer in names else table.get(layer)


def _inception_names(layer: str) -> str | None:
    if not layer.endswith(".conv"):
        return None
    return layer.removesuffix(".conv").replace(".", "/")


_RENAME: dict[str, Callable[[str], str | None]] = {
    "squeezenet1_0": _squeezenet_names("squeezenet1_0"),
    "squeezenet1_1": _squeezenet_names("squeezenet1_1"),
    "vgg16": _sequential_names(_VGG16_INDEX, VGG16_CONVS),
    "alexnet": _sequential_names(
        _ALEXNET_INDEX, ("conv1", "conv2", "conv3", "conv4", "conv5")
    ),
    "inception_v3": _inception_names,
}
_KERAS = "mobilenet_v2"
CONVERTED = (*sorted(_RENAME), _KERAS)  # networks that `convert_network` knows


def recognise(arrays: Mapping[str, Any], file_name: str) -> str:
    """Recognise published weights by the names and shapes of their arrays.

    Args:
        arrays: the weights by name.
        file_name: where they came from, for messages.

    Returns:
        a name that `features.convert_features` takes. The weights may be incomplete.

    Raises:
        ValueError: this package does not know the weights, or they are converted
            already.
    """
    if "network" in arrays:
        raise ValueError(
            f"expected published weights, found {file_name}, which is already "
            f"converted ({arrays['network']})"
        )
    if {"alpha", "beta"} <= arrays.keys():
        return "dists"
    if "block_1_expand/kernel" in arrays:
        return _KERAS
    heads = [key for key in arrays if re.fullmatch(r"lin\d+\.model\.1\.weight", key)]
    if heads:
        channels = tuple(np.size(arrays[key]) for key in sorted(heads))
        for trunk, wanted in _LPIPS_CHANNELS.items():
            if channels == wanted:
                return f"lpips_{trunk}"
        raise ValueError(
            f"expected LPIPS heads of {', '.join(_LPIPS_CHANNELS)}, found "
            f"{file_name} with heads of {channels} channels"
        )
    layers = [
        key.removesuffix(".weight")
        for key, value in arrays.items()
        if key.endswith(".weight") and np.ndim(value) == 4
    ]
    inner = [name for name in layers if not name.startswith(_OUTER_LAYERS)]
    matches = {
        name: sum(rename(layer) is not None for layer in inner)
        for name, rename in _RENAME.items()
    }
    best = max(matches, key=lambda name: matches[name])
    if 2 * matches[best] <= len(inner):
        found = ", ".join(list(arrays)[:3]) or "nothing"
        raise ValueError(
            f"expected weights of {', '.join(CONVERTED)}, LPIPS heads or DISTS, found "
            f"none of them in {file_name} ({len(arrays)} arrays: {found}, ...)"
        )
    return best


def convert_network(state: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Convert a published state dict to this package's form.

    Args:
        state: arrays by PyTorch name: torchvision's SqueezeNets, VGG-16 and AlexNet,
            pytorch-fid's or torch-fidelity's Inception-v3, or SqueezeNet 1.0 as Deep
            Compression names it; or MobileNetV2 by Keras's names. Classifier layers
            are left out.
        name: name of the network.

    Returns:
        arrays to write with `numpy.savez`, `network` and `preprocessing` among them.

    Raises:
        ValueError: the network is unknown, none of its layers is among the names,
            arrays of a norm are missing, an array has a wrong shape or values that are
            not finite floats, or the Inception-v3 is torchvision's.
    """
    if name not in CONVERTED:
        raise ValueError(
            f"no rule to convert weights of {name}: expected those of "
            f"{', '.join(CONVERTED)}"
        )
    if name == _KERAS:
        return _convert_keras(state)
    if name == "inception_v3" and _is_torchvisions_inception(state):
        raise ValueError(
            "expected FID's Inception-v3 (pytorch-fid, torch-fidelity), found "
            "torchvision's, whose distances are not FID"
        )
    rename = _RENAME[name]
    arrays: dict[str, Any] = {}
    for key, value in state.items():
        layer, _, kind = key.rpartition(".")
        target = rename(layer)
        if target is None or kind not in ("weight", "bias"):
            continue
        if kind == "bias":
            arrays[f"{target}/bias"] = finite_floats(value, key)
            continue
        if np.ndim(value) != 4:
            raise ValueError(
                f"weight {key} should be a convolution kernel [O, I, h, w], "
                f"found shape {np.shape(value)}"
            )
        kernel = finite_floats(value, key).astype(np.float64).transpose(2, 3, 1, 0)
        norm = layer.removesuffix(".conv") + ".bn"
        if f"{norm}.running_var" in state:
            parts = ("running_mean", "running_var", "weight", "bias")
            kernel, arrays[f"{target}/bias"] = _fold_batch_norm(
                kernel, state, [f"{norm}.{part}" for part in parts]
            )
        arrays[f"{target}/kernel"] = kernel.astype(np.float32)
    if not arrays:
        raise ValueError(f"found no layer of {name} among the {len(state)} arrays")
    arrays["network"] = np.asarray(name)
    caffe = any(".conv1x1_1." in key for key in state)
    form = "torch_fidelity" if name == "inception_v3" else "imagenet"
    arrays["preprocessing"] = np.asarray("caffe" if caffe else form)
    return arrays


def _is_torchvisions_inception(state: Mapping[str, Any]) -> bool:
    """Whether the weights are torchvision's Inception-v3.

    It has an auxiliary classifier and 1000 classes; FID's has no such classifier and
    1008 classes.
    """
    auxiliary = any(key.startswith("AuxLogits.") for key in state)
    return auxiliary or np.shape(state.get("fc.weight", ()))[:1] == (1000,)


def _convert_keras(state: Mapping[str, Any]) -> dict[str, Any]:
    """Convert MobileNetV2 from Keras: kernels are HWIO, depthwise ones [h, w, C, 1]."""
    arrays: dict[str, Any] = {}
    for key, value in state.items():
        layer, _, kind = key.rpartition("/")
        if kind not in ("kernel", "depthwise_kernel") or np.ndim(value) != 4:
            continue  # norms, and the classifier, whose kernels are matrices
        kernel = finite_floats(value, key).astype(np.float64)
        if kind == "depthwise_kernel":
            kernel = kernel.transpose(0, 1, 3, 2)
        norm = _KERAS_NORMS.get(layer, f"{layer}_BN")
        parts = ("moving_mean", "moving_variance", "gamma", "beta")
        kernel, arrays[f"{layer}/bias"] = _fold_batch_norm(
            kernel, state, [f"{norm}/{part}" for part in parts]
        )
        arrays[f"{layer}/kernel"] = kernel.astype(np.float32)
    if not arrays:
        raise ValueError(f"found no layer of {_KERAS} among the {len(state)} arrays")
    arrays["network"] = np.asarray(_KERAS)
    # keras.applications takes pixels in [-1, 1], nsfwjs (five classes) in [0, 1].
    unit = np.size(state.get("dense_3/bias", ())) == 5
    arrays["preprocessing"] = np.asarray("unit" if unit else "signed")
    return arrays


def _fold_batch_norm(
    kernel: np.ndarray, state: Mapping[str, np.ndarray], names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Fold gamma * (w * x - mean) / sqrt(var + eps) + beta into one convolution.

    Args:
        kernel: w, float64 HWIO.
        state: arrays by name, those of the norm among them.
        names: names of the norm's mean, variance, gamma and beta.

    Returns:
        the kernel, float64 HWIO, and the bias, float32 [C].

    Raises:
        ValueError: an array of the norm is missing or not of the expected form.
    """
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(f"expected the arrays {', '.join(missing)}, found none")
    mean, variance, gamma, beta = (
        finite_floats(state[name], name).astype(np.float64) for name in names
    )
    if any(part.shape != kernel.shape[-1:] for part in (mean, variance, gamma, beta)):
        raise ValueError(
            f"expected {', '.join(names)} of {kernel.shape[-1]} channels each, found "
            f"shapes {mean.shape}, {variance.shape}, {gamma.shape}, {beta.shape}"
        )
    if variance.min() < 0:
        raise ValueError(f"expected variances of at least 0 in {names[1]}")
    scale = gamma / np.sqrt(variance + _BATCH_NORM_EPS)
    return kernel * scale, (beta - mean * scale).astype(np.float32)


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Read all arrays of an .npz, .pth, .pt or model.json file.

    No pickle is ever executed.

    Raises:
        ValueError: there is no such file, it is of another kind, or it is not a file of
            plain arrays.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"the weights file {path} does not exist")
    if path.suffix == ".json":
        return read_tfjs_file(path)
    if path.suffix != ".npz":
        with open(path, "rb") as stream:
            start = stream.read(2)
        if start[:1] != _PICKLE and start != _ZIP:
            raise ValueError(
                "expected weights in a .pth, .pt, .npz or model.json file, found "
                f"{path.name}, which is none of these"
            )
        return read_torch_file(path)
    try:
        return read_arrays_file(path, _DTYPES)
    except MemoryError:
        raise
    except Exception as error:  # zipfile, numpy and zlib raise errors of their own
        raise ValueError(f"{path} is not a readable .npz file: {error}") from error


def finite_floats(value: Any, label: str) -> np.ndarray:
    """Return the array as float32.

    Raises:
        ValueError: it holds anything but finite floats; the message has the label.
    """
    array = np.asarray(value)
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # gives infinity, which is refused
            array = array.astype(np.float32)
        if np.isfinite(array).all():
            return array
        raise ValueError(f"expected finite floats as {label}, found NaN or infinity")
    raise ValueError(f"expected finite floats as {label}, found {array.dtype}")


def find_weights(path: str | Path, name: str) -> Path:
    """Return the path itself if it is a file, else the `<name>*.npz` in the folder.

    Raises:
        ValueError: the path is neither a file nor a folder with such a file.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"the file or folder of feature weights {path} does not exist")
    found = [path / f"{name}.npz", *sorted(path.glob(f"{name}[_-]*.npz"))]
    for file in found:
        if file.is_file():
            return file
    raise ValueError(
        f"no {name}*.npz in the folder of feature weights {path}: make one from the "
        f"published file with `semlic convert features FILE {path}`"
    )


def parameter_tree(
    arrays: Mapping[str, Any], name: str, file_name: str
) -> tuple[dict[str, Any], str]:
    """Return the parameter tree and the preprocessing of arrays in this package's form.

    Args:
        arrays: what `convert_network` returns.
        name: the network whose weights they should be.
        file_name: where they came from, for messages.

    Raises:
        ValueError: the weights are of another network, or an array is where the tree
            has a folder.
    """
    network = str(arrays["network"])
    if network != name:
        raise ValueError(f"{file_name} holds weights of {network}, not of {name}")
    try:
        # Names without a folder are `network` and `preprocessing`.
        params = as_tree({key: arrays[key] for key in arrays if "/" in key})
    except ValueError as error:
        raise ValueError(f"{file_name}: {error}") from None
    return params, str(arrays.get("preprocessing", "imagenet"))


def load_lpips_heads(path: str | Path, trunk: str) -> list[np.ndarray]:
    """Load LPIPS v0.1's learnt channel weights, one float32 [C] per tap.

    Args:
        path: the file (.npz or LPIPS's own .pth), or a folder that holds
            `lpips_v0.1_<trunk>.npz`.
        trunk: "alex", "vgg" or "squeeze" (SqueezeNet 1.1).

    Raises:
        ValueError: the trunk is unknown, there is no such file, the heads are of
            another trunk, or values are not finite floats.
    """
    if trunk not in _LPIPS_CHANNELS:
        raise ValueError(f"LPIPS's trunk must be alex, vgg or squeeze, found {trunk!r}")
    path = Path(path)
    if path.is_dir():
        path = path / f"lpips_v0.1_{trunk}.npz"
    arrays = read_arrays(path)
    heads = []
    for index, channels in enumerate(_LPIPS_CHANNELS[trunk]):
        value = arrays.get(f"lin{index}.model.1.weight")
        if value is None or value.shape != (1, channels, 1, 1):
            raise ValueError(
                f"{path.name} should hold lin{index}.model.1.weight of shape "
                f"(1, {channels}, 1, 1) for {trunk}, "
                f"found {'none' if value is None else value.shape}"
            )
        label = f"lin{index}.model.1.weight of {path.name}"
        heads.append(finite_floats(value, label).reshape(channels))
    return heads


def load_dists_weights(
    path: str | Path,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Load DISTS's alpha and beta, each one float32 [C] for each of `DISTS_CHANNELS`.

    Args:
        path: the file (.npz or DISTS's own .pt), or a folder that holds
            `dists_alpha_beta.npz`.

    Raises:
        ValueError: there is no such file, the shapes differ, or values are not finite
            floats.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "dists_alpha_beta.npz"
    arrays = read_arrays(path)
    parts = []
    for key in ("alpha", "beta"):
        value = arrays.get(key)
        if value is None or value.size != sum(DISTS_CHANNELS):
            raise ValueError(
                f"{path.name} should hold {key} with {sum(DISTS_CHANNELS)} weights, "
                f"found {'none' if value is None else value.size}"
            )
        flat = finite_floats(value, f"{key} of {path.name}").reshape(-1)
        parts.append(np.split(flat, np.cumsum(DISTS_CHANNELS)[:-1]))
    return parts[0], parts[1]
