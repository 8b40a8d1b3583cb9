# SPDX-License-Identifier: Apache-2.0
"""Make a larger model that starts where a smaller one ended.

    python -m semlic_jax.training.widen small start.npz --size base

The transforms of the larger size are twice as wide, and may have more residual blocks
at their finer levels. They start as the same function: every channel is duplicated, the
weights that read it are split between the two copies in unequal parts (with equal parts
the copies would stay equal for ever), and the gain of the last norm of a new block is
zero. (Chen et al. 2016, "Net2Net", arXiv:1511.05641; ChannelNorm's unbiased variance of
a doubled map is smaller by a factor of (2C - 2) / (2C - 1), for which its gain makes
up.)

The entropy networks and tables stay, and with them the fingerprint: until the larger
model is trained, it reads the files of the smaller one.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from semlic_jax.images import check_outputs, write_file
from semlic_jax.model.compression import SIZES, ModelConfig
from semlic_jax.model.layers import ResidualBlock
from semlic_jax.training.model_files import training_params
from semlic_jax.weights import ModelFile, load_model, model_bytes, to_dtype

Tree = Any

# How unequal the two parts of a weight are: 0.5 +- up to half of this.
_UNEQUAL = 0.5
# Layers that are doubled on one side only: at their output ("out") or at their input
# ("in").
_G_A_ENDS = {"Conv_0": "out"}
_G_S_ENDS = {"Conv_0": "out", "quality": "out", "Conv_1": "in", "repair_1": "in"}
_TEXTURE_ENDS = {"gate": "in", "mix": "out"}
_KEPT = ("skip", "skip_lapping", "input_scale")


def widened(
    params: Mapping[str, Tree], narrow: ModelConfig, wide: ModelConfig, *, seed: int = 0
) -> dict[str, Tree]:
    """Parameters with which the wide model computes what the narrow one does.

    Args:
        params: float32, the tree of the narrow `CompressionModel`; parts other than g_a
            and g_s are passed on.
        narrow, wide: the architectures. Both have a linear skip; the wide one has twice
            the `widths`, as many `level_blocks` or more, and all else the same.
        seed: seed of the unequal parts and of the new blocks' kernels.

    Returns:
        float32 NumPy arrays.

    Raises:
        ValueError: the architectures differ in another way, or have no linear skip.
    """
    doubled = dataclasses.replace(
        narrow,
        name=wide.name,
        widths=tuple(2 * width for width in narrow.widths),
        level_blocks=max(narrow.level_blocks, wide.level_blocks),
        linear_skip=True,
    )
    if doubled != wide or not narrow.linear_skip:
        raise ValueError(
            f"expected an architecture with twice the widths of {narrow.name}, "
            f"{doubled.widths}, a linear skip, at least its level_blocks and "
            f"everything else the same, found {wide.name}"
        )
    rng = np.random.default_rng(seed)
    last = {f"Conv_{len(narrow.widths)}": "in"}
    tree = {
        **params,
        "g_a": _wide_tree(params["g_a"], _G_A_ENDS | last, rng),
        "g_s": _wide_tree(params["g_s"], _G_S_ENDS, rng),
    }
    # The first repairing layer reads what Conv_1 reads, followed by the picture, whose
    # channels are not doubled.
    repair, split = params["g_s"]["repair_0"], narrow.widths[0]
    read = _twice_in(repair["kernel"][:, :, :split], 2, rng)
    kernel = np.concatenate([read, repair["kernel"][:, :, split:]], 2)
    tree["g_s"]["repair_0"] = _twice_out({**repair, "kernel": kernel})
    _add_blocks(tree, wide, seed)
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), tree)


def _wide_tree(
    tree: Mapping[str, Tree], ends: Mapping[str, str], rng: np.random.Generator
) -> dict[str, Tree]:
    """Widen a part of the model; `ends` names layers that are doubled on one side."""
    out: dict[str, Tree] = {}
    for name, part in tree.items():
        if name in _KEPT:
            out[name] = part
        elif "gamma" in part:
            channels = len(part["gamma"])
            gain = np.sqrt((2 * channels - 2) / (2 * channels - 1))
            out[name] = {
                "gamma": np.tile(part["gamma"] * gain, 2),
                "beta": np.tile(part["beta"], 2),
            }
        elif "kernel" not in part:
            # A residual block, or a texture layer with its two ends.
            inner = _TEXTURE_ENDS if name.startswith("texture") else {}
            out[name] = _wide_tree(part, inner, rng)
        elif name.startswith("ConvTranspose"):
            kernel = np.swapaxes(_twice_in(part["kernel"], 3, rng), 2, 3)
            wide = _twice_out({**part, "kernel": kernel})
            out[name] = {**wide, "kernel": np.swapaxes(wide["kernel"], 2, 3)}
        else:
            end = ends.get(name, "both")
            if end != "out":
                part = {**part, "kernel": _twice_in(part["kernel"], 2, rng)}
            out[name] = _twice_out(part) if end != "in" else part
    return out


def _twice_in(kernel: np.ndarray, axis: int, rng: np.random.Generator) -> np.ndarray:
    """Split a kernel between two copies of its input, in unequal parts; same sum."""
    part = 0.5 + _UNEQUAL / 2 * rng.uniform(-1, 1, kernel.shape)
    return np.concatenate([kernel * part, kernel * (1 - part)], axis)


def _twice_out(layer: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        "kernel": np.concatenate([layer["kernel"]] * 2, -1),
        "bias": np.tile(layer["bias"], 2),
    }


def _add_blocks(tree: dict[str, Tree], config: ModelConfig, seed: int) -> None:
    """Add residual blocks, as the identity, where the tree has none."""
    key = jax.random.key(seed)
    for part in ("g_a", "g_s"):
        for level in range(len(config.widths) - 1):
            # g_a goes from fine to coarse, g_s ends at the finest.
            widths = config.widths if part == "g_a" else config.widths[-2::-1]
            x = jnp.zeros((1, 4, 4, widths[level]))
            for i in range(config.level_blocks):
                name = f"level_{level}_block_{i}"
                key, own = jax.random.split(key)
                fresh = jax.tree.map(np.array, ResidualBlock().init(own, x)["params"])
                fresh["ChannelNorm_1"]["gamma"][:] = 0
                tree[part].setdefault(name, fresh)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m semlic_jax.training.widen",
        description=__doc__.splitlines()[0],
    )
    parser.add_argument("narrow", help="name or path of a model")
    parser.add_argument("output", type=Path, help="model file to write")
    parser.add_argument("--size", default="base", choices=sorted(SIZES))
    parser.add_argument(
        "--force", action="store_true", help="replace an existing OUTPUT"
    )
    options = parser.parse_args(argv)
    wide = SIZES[options.size]
    try:
        check_outputs([options.output], force=options.force)
        model = load_model(options.narrow)
        if not isinstance(model, ModelFile):
            raise ValueError(
                f"{options.narrow} is a converted model, which cannot be widened"
            )
        params = widened(training_params(model), model.config, wide)
        transforms = {
            name: to_dtype(name, params[name], np.float16) for name in model.transforms
        }
        model = dataclasses.replace(model, config=wide, transforms=transforms)
        write_file(options.output, model_bytes(model), force=options.force)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
