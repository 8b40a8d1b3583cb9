# SPDX-License-Identifier: Apache-2.0
"""Random parameters and images for feature networks, and the shapes of layers."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

RNG = np.random.default_rng(7)


def shared_folder(variable: str, name: str) -> Path:
    folder = Path(
        os.environ.get(variable) or Path(__file__).parents[2] / "shared" / name
    )
    if not folder.is_dir():
        pytest.skip(f"{variable} is not set: no folder of {name}")
    return folder


def lively_layers(module, side, seed=0):
    """Random parameters under which activations keep their size, NumPy arrays."""
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(seed)

    def numbers(leaf):
        noise = rng.standard_normal(leaf.shape, np.float32)
        fan_in = np.prod(leaf.shape[:-1])
        return noise * np.float32(0.1 if leaf.ndim == 1 else (2 / fan_in) ** 0.5)

    return jax.tree.map(numbers, shapes)


def kernels(params):
    """Shape of the kernel of each layer, by name."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = {".".join(key.key for key in path): leaf.shape for path, leaf in leaves}
    return {
        name.removesuffix(".kernel"): shape
        for name, shape in names.items()
        if name.endswith("kernel")
    }


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).random(shape, np.float32)


def kernel(out_channels, in_channels, height, width=None):
    width = width or height
    scale = np.sqrt(2 / (in_channels * height * width))
    shape = (out_channels, in_channels, height, width)
    return (RNG.normal(size=shape) * scale).astype(np.float32)


def bias(channels):
    return (RNG.normal(size=channels) * 0.1).astype(np.float32)
