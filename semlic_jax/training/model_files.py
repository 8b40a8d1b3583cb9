# SPDX-License-Identifier: Apache-2.0
"""Training that starts from a model file and ends in one.

Checkpoints are large and stay with those who trained; a model file is what everybody
has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from semlic_jax.coding.integer_networks import float_twin
from semlic_jax.model.compression import ModelConfig
from semlic_jax.weights import ModelFile, check_params, to_dtype


def with_decoder(
    model: ModelFile, config: ModelConfig, params: Mapping[str, Any]
) -> ModelFile:
    """The model with another g_s, which decodes the same files to other pictures.

    Args:
        model: the model that everything but g_s is taken from, and so the fingerprint.
        config: the architecture of g_s; only `texture_channels` may differ.
        params: those of `CompressionModel`, trained from this model with g_s alone.

    Raises:
        ValueError: the architectures differ, the gains differ (the decoder is for other
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
            "found one with different gains"
        )
    g_s = to_dtype("g_s", params["g_s"], np.float16)
    transforms = {**model.transforms, "g_s": g_s}
    check_params(config, {**transforms, "prior": model.prior})
    return dataclasses.replace(model, config=config, transforms=transforms)


def mean_decoder(
    models: Sequence[ModelFile], weights: Sequence[float] | None = None
) -> ModelFile:
    """The first model, with the mean of the g_s of all models.

    Checkpoints of one training run lie in one basin, where the mean of the weights is
    often better than any of them (Izmailov et al. 2018, arXiv:1803.05407).

    Args:
        models: models that differ only in g_s.
        weights: weight of each model, finite and at least 0, in any scale; None: equal
            weights.

    Raises:
        ValueError: there are no models, they differ in architecture or latents, or the
            weights are invalid.
    """
    shares = np.ones(len(models)) if weights is None else np.array(weights, np.float64)
    if not models or shares.shape != (len(models),):
        raise ValueError(
            f"expected a weight for each model, found {shares.size} for {len(models)}"
        )
    with np.errstate(over="ignore"):
        total = shares.sum()
    if not ((shares >= 0).all() and 0 < total < np.inf):
        raise ValueError(
            "expected finite weights of at least 0 and not all 0, found "
            + ", ".join(f"{share:g}" for share in shares)
        )
    first = models[0]
    for model in models[1:]:
        if model.config != first.config:
            raise ValueError(
                f"expected models of one architecture, found {first.config.name} and "
                f"{model.config.name} with different layers"
            )
        same = model.fingerprint() == first.fingerprint() and all(
            np.array_equal(one, other)
            for name in first.transforms
            if name != "g_s"
            for one, other in zip(
                jax.tree.leaves(first.transforms[name]),
                jax.tree.leaves(model.transforms[name]),
                strict=True,
            )
        )
        if not same:
            raise ValueError(
                "expected models that differ only in their decoder, found models that "
                "make different files"
            )
    shares /= total

    def mean(*arrays: np.ndarray) -> np.ndarray:
        parts = zip(shares, arrays, strict=True)
        summed = sum(share * np.asarray(array, np.float64) for share, array in parts)
        return np.asarray(summed, np.float32)

    g_s = jax.tree.map(mean, *(model.transforms["g_s"] for model in models))
    transforms = {**first.transforms, "g_s": to_dtype("g_s", g_s, np.float16)}
    return dataclasses.replace(first, transforms=transforms)


def training_params(model: ModelFile) -> dict[str, Any]:
    """The parameter tree of `CompressionModel` that a model file holds, in float32.

    Training can go on from it where the checkpoints are gone. The transforms have the
    precision of float16, the entropy networks the values of their integers.
    """
    entropy = float_twin(model.integers, model.config)
    tree = {**model.transforms, "prior": model.prior, "entropy": entropy}

    def as_float32(tree: Any) -> Any:
        if isinstance(tree, Mapping):
            return {name: as_float32(value) for name, value in tree.items()}
        return np.asarray(tree, np.float32)

    return as_float32(tree)
