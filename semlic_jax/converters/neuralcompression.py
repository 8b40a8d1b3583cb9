# SPDX-License-Identifier: Apache-2.0
"""Converts checkpoints of facebookresearch/NeuralCompression: MS-ILLM and No-GAN.

This module knows the names, layouts and shapes of the tensors of these autoencoders.
`objectives.torch_files` reads the files; the network is in `model.mean_scale`.

It is the network of HiFiC, with symmetric padding and a mean-scale Gaussian for y. A
converted model differs from the original only outside of the network:

* z and y are coded with our tables and container, not with CompressAI's. A scale is the
  one of the table 0.11..64 that is nearest in log, not the next larger one of the table
  0.11..256.
* An image is padded to a multiple of 64 by repeating its edge, not by reflection, and
  latents outside of it are not coded.
* Other qualities than 128/255 scale the latents (`MeanScaleModel.gain`).

The published weights are under CC-BY-NC 4.0; a converted file stays under it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from semlic_jax.coding.symbol_tables import gaussian_tables
from semlic_jax.images import check_outputs, write_file
from semlic_jax.model.mean_scale import MeanScaleConfig
from semlic_jax.model.priors import FactorizedPrior, scale_table
from semlic_jax.objectives.torch_files import read_torch_file
from semlic_jax.weights import (
    FloatModelFile,
    check_params,
    model_bytes,
    prior_tables,
)

_LEVELS = 5
_MAX_NAME = 64
# Names of the autoencoder's tensors, and of no other file's, start with these.
_OWN_PARTS = ("encoder.blocks.", "decoder.block_0.", "hyper_analysis.")
# In place of `_matrix0` CompressAI 1.2.7 and later write `matrices.0`.
_NEW_PRIOR_NAMES = {"matrix": "matrices", "bias": "biases", "factor": "factors"}
_SHOWN = 5
# Other files that users may try, each known by a part of a name that only it has.
_OTHER_KINDS = {
    "bottleneck_op.": "its VQ-VAE labeller",
    "discriminator": "a discriminator",
    "g_a.": "a model of CompressAI",
    "features.": "a feature network (`semlic convert features`)",
    "lin0.": "LPIPS heads (`semlic convert features`)",
}


def convert_neuralcompression(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    force: bool = False,
) -> FloatModelFile:
    """Convert a published checkpoint to a model file.

    Args:
        checkpoint: a file such as `msillm_target_0.14bpp.ckpt`; it is read without
            executing any pickle.
        output: the model file, `.npz`.
        force: replace an existing file.

    Returns:
        the model that was written. Its files decode only on the machine that made them.

    Raises:
        ValueError: the checkpoint is unreadable or of another kind, tensors are missing
            (the message names them) or of another shape, or the output exists or cannot
            be written.
    """
    output = Path(output)
    if output.suffix != ".npz":
        raise ValueError(f"expected a model file, .npz, as output, found {output}")
    check_outputs([output], force=force)
    source = Path(checkpoint)
    if source.is_dir():
        raise ValueError(f"{source} is a folder: expected a checkpoint's file")
    model = convert_state(read_torch_file(source), output.stem, source.name)
    write_file(output, model_bytes(model), force=force)
    return model


def convert_state(
    state: Mapping[str, np.ndarray], name: str, file_name: str
) -> FloatModelFile:
    """Make the content of a model file from a state dict.

    Args:
        state: arrays by PyTorch name, maybe with a prefix before all names.
        name: name of the model.
        file_name: where the arrays came from, for messages.

    Raises:
        ValueError: see `convert_neuralcompression`.
    """
    state = _without_prefix(state, file_name)
    sources = _sources(state)
    missing = [source for source in sources.values() if source not in state]
    if missing:
        raise ValueError(
            f"expected the tensors of NeuralCompression's autoencoder in {file_name}, "
            f"found no {_listed(missing)}"
        )
    tree: dict[str, Any] = {}
    for path, source in sources.items():
        *parents, leaf = path.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = _array(state[source], path, source)
    config = _config(state, name, sources)
    width = config.widths[-1]
    # Their g_s knows only one rate, so the quality must not change its input.
    tree["g_s"]["quality"] = {
        "kernel": np.zeros((2, width), np.float32),
        "bias": np.zeros(width, np.float32),
    }
    check_params(config, tree, sources)
    prior, entropy = tree.pop("prior"), tree.pop("entropy")
    density = FactorizedPrior(config.hyper_channels, config.prior_filters)
    return FloatModelFile(
        config=config,
        transforms=tree,
        prior=prior,
        entropy=entropy,
        y_tables=gaussian_tables(scale_table()),
        z_tables=prior_tables(density, prior, entropy["median"]),
    )


def _without_prefix(
    state: Mapping[str, np.ndarray], file_name: str
) -> Mapping[str, np.ndarray]:
    """The tensors by the autoencoder's own names.

    In a checkpoint of a trainer, all names have a prefix such as `model.`.

    Raises:
        ValueError: the tensors are not those of such an autoencoder.
    """
    pattern = re.compile(rf"(|.*?\.)({'|'.join(map(re.escape, _OWN_PARTS))})")
    found = next(filter(None, map(pattern.match, state)), None)
    if found is None:
        kinds = (
            kind
            for marker, kind in _OTHER_KINDS.items()
            if any(marker in key for key in state)
        )
        raise ValueError(
            "expected an autoencoder of NeuralCompression (MS-ILLM or No-GAN), found "
            f"{next(kinds, 'something else')} in {file_name}: {_listed(list(state))}"
        )
    prefix = found[1]
    return {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix)
    }


def _sources(state: Mapping[str, np.ndarray]) -> dict[str, str]:
    """The tensor's name for each parameter of ours, whether it is there or not."""
    modules: dict[str, str] = {}

    def conv(path: str, source: str) -> None:
        for leaf, tensor in (("kernel", "weight"), ("bias", "bias")):
            modules[f"{path}/{leaf}"] = f"{source}.{tensor}"

    def norm(path: str, source: str) -> None:
        for leaf in ("gamma", "beta"):
            modules[f"{path}/{leaf}"] = f"{source}.{leaf}"

    for i in range(_LEVELS):
        conv(f"g_a/Conv_{i}", f"encoder.blocks.{i}.0")
        norm(f"g_a/ChannelNorm_{i}", f"encoder.blocks.{i}.1")
    conv(f"g_a/Conv_{_LEVELS}", f"encoder.blocks.{_LEVELS}")
    norm("g_s/ChannelNorm_0", "decoder.block_0.0")
    conv("g_s/Conv_0", "decoder.block_0.1")
    norm("g_s/ChannelNorm_1", "decoder.block_0.2")
    for i in range(_count(state, r"decoder\.resid_blocks\.(\d+)\.")):
        for j in range(2):
            block = f"decoder.resid_blocks.{i}.sequence"
            conv(f"g_s/block_{i}/Conv_{j}", f"{block}.{3 * j}")
            norm(f"g_s/block_{i}/ChannelNorm_{j}", f"{block}.{3 * j + 1}")
    for i in range(_LEVELS - 1):
        conv(f"g_s/ConvTranspose_{i}", f"decoder.blocks.{i}.0")
        norm(f"g_s/ChannelNorm_{i + 2}", f"decoder.blocks.{i}.1")
    conv("g_s/Conv_1", f"decoder.blocks.{_LEVELS - 1}")
    for i in range(3):
        conv(f"h_a/Conv_{i}", f"hyper_analysis.{2 * i}")
        for head in ("mean", "scale"):
            conv(f"entropy/{head}_{i}", f"hyper_synthesis_{head}.{2 * i}")
    new = "hyper_bottleneck.matrices.0" in state
    layers = _count(state, r"hyper_bottleneck\.(?:_matrix|matrices\.)(\d+)$")
    for kind, plural in _NEW_PRIOR_NAMES.items():
        for i in range(layers - (kind == "factor")):
            source = f"{plural}.{i}" if new else f"_{kind}{i}"
            modules[f"prior/{kind}_{i}"] = f"hyper_bottleneck.{source}"
    modules["entropy/median"] = "hyper_bottleneck.quantiles"
    return modules


def _count(state: Mapping[str, np.ndarray], pattern: str) -> int:
    """How many different numbers there are in the names, at least 1.

    The largest number is not used, since it could be anything. If there are gaps, one
    of the names that follow from this count is missing and will be reported.
    """
    found = (re.match(pattern, key) for key in state)
    return max(1, len({match[1] for match in found if match}))


def _config(
    state: Mapping[str, np.ndarray], name: str, sources: Mapping[str, str]
) -> MeanScaleConfig:
    """The architecture that the shapes of the tensors imply."""

    def outputs(path: str) -> int:
        return int(state[sources[path]].shape[0])

    matrices = [path for path in sources if path.startswith("prior/matrix_")]
    return MeanScaleConfig(
        name=name[:_MAX_NAME],
        widths=tuple(outputs(f"g_a/Conv_{i}/kernel") for i in range(_LEVELS)),
        blocks=sum(bool(re.match(r"g_s/block_\d+/Conv_1/bias", p)) for p in sources),
        latent_channels=outputs(f"g_a/Conv_{_LEVELS}/kernel"),
        hyper_channels=outputs("h_a/Conv_2/kernel"),
        prior_filters=tuple(state[sources[path]].shape[1] for path in matrices[:-1]),
    )


def _array(value: np.ndarray, path: str, source: str) -> np.ndarray:
    """A tensor in our layout, float32.

    Raises:
        ValueError: it is empty or has another number of axes than expected.
    """
    value = np.asarray(value, np.float32)
    ranks = {"kernel": 4, "gamma": 4, "beta": 4, "bias": 1}
    leaf = path.rpartition("/")[2]
    rank = ranks.get(leaf, 3)
    if value.ndim != rank or 0 in value.shape:
        raise ValueError(
            f"expected {rank} axes of the tensor {source}, none of them empty, found "
            f"shape {value.shape}"
        )
    if leaf == "kernel":
        # OIHW to HWIO. A transposed convolution is kept as the kernel of the
        # convolution that it transposes, in both: IOHW to HWOI.
        return value.transpose(2, 3, 1, 0)
    if leaf in ("gamma", "beta"):
        return value.reshape(-1)
    if leaf == "median":
        return value[:, 0, value.shape[2] // 2]
    return value


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    more = len(names) - _SHOWN
    return f"{shown} and {more} more" if more > 0 else shown or "nothing"
