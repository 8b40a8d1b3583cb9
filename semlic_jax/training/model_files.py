# SPDX-License-Identifier: Apache-2.0
"""Training that starts from a model file, and goes back into one.

Checkpoints are large and stay with who trained; a model file is what everybody has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from semlic_jax.coding.integer_networks import float_twin
from semlic_jax.model.compression import ModelConfig
from semlic_jax.weights import ModelFile, check_params, to_dtype


def with_decoder(
    model: ModelFile, config: ModelConfig, params: Mapping[str, Any]
) -> ModelFile:
    """A model with another g_s: the same files, other pictures.

    Args:
        model: what to keep: everything but g_s, and so the fingerprint.
        config: of g_s; no more than `texture_channels` may differ.
        params: of `CompressionModel`, trained from this model with g_s alone.

    Raises:
        ValueError: the architectures differ, the gains do (the decoder is for other
            latents), or a parameter is not finite or beyond float16.
    """
    kept = dataclasses.replace(model.config, texture_channels=config.texture_channels)
    if kept != config:
        raise ValueError(
            f"expected a decoder for the architecture of {model.config.name}, found "
            f"that of {config.name}"
        )
    gains = to_dtype("log_gain", params["log_gain"], np.float16)
    if not np.array_equal(gains, model.transforms["log_gain"]):
        raise ValueError(
            "expected a decoder that was trained for the latents of this model, "
            "found other gains beside it"
        )
    g_s = to_dtype("g_s", params["g_s"], np.float16)
    transforms = {**model.transforms, "g_s": g_s}
    check_params(config, {**transforms, "prior": model.prior})
    return dataclasses.replace(model, config=config, transforms=transforms)


def training_params(model: ModelFile) -> dict[str, Any]:
    """The parameter tree of `CompressionModel` that a model file holds, in float32.

    What training goes on from where the checkpoints are gone: the transforms to
    float16's precision, the entropy networks as their integers.
    """
    entropy = float_twin(model.integers, model.config)
    tree = {**model.transforms, "prior": model.prior, "entropy": entropy}

    def as_float32(tree: Any) -> Any:
        if isinstance(tree, Mapping):
            return {name: as_float32(value) for name, value in tree.items()}
        return np.asarray(tree, np.float32)

    return as_float32(tree)
