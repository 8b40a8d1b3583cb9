# SPDX-License-Identifier: Apache-2.0
"""Classes for the non-binary adversary without a network that learns them.

MS-ILLM's classes are the codes of a VQ-VAE (arXiv:2301.11189), which takes a training
of its own. Groups of the features that a trained network has for each place of the
originals do the same: what is where, on a grid of 8 pixels.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from scipy.cluster.vq import kmeans2

from semlic_jax.objectives.features import FeatureNetwork, normalise_channels
from semlic_jax.training.data import Photographs

Array = jax.Array

_CROPS = 256
_VECTORS_PER_CROP = 128


def feature_codes(
    network: FeatureNetwork,
    tap: int,
    photographs: Photographs,
    count: int,
    *,
    seed: int,
) -> np.ndarray:
    """Centres of features of photographs, by k-means.

    Args:
        network: the frozen network.
        tap: which of its taps.
        photographs: of the training; the same ones and seed give the same codes.
        count: C.

    Returns:
        float32 [C, D], unit vectors.
    """
    rng = np.random.default_rng((seed, count))

    @partial(jax.jit, static_argnums=1)
    def features(network: FeatureNetwork, tap: int, image: Array) -> Array:
        return normalise_channels(network.apply(image[None])[tap][0])

    vectors = []
    for index in range(_CROPS):
        image = photographs.example(0, index, seed=seed)
        found = np.asarray(features(network, tap, image))
        found = found.reshape(-1, found.shape[-1])
        picked = rng.permutation(len(found))[:_VECTORS_PER_CROP]
        vectors.append(found[picked])
    centres, _ = kmeans2(np.concatenate(vectors), count, minit="++", rng=rng)
    length = np.linalg.norm(centres, axis=1, keepdims=True)
    return (centres / np.maximum(length, 1e-6)).astype(np.float32)


def nearest_codes(codes: Array, features: Array, grid: tuple[int, int]) -> Array:
    """The code of each cell: the largest cosine.

    Args:
        codes: float [C, D], see `feature_codes`.
        features: float [B, h, w, D] of originals.
        grid: height and width of the cells.

    Returns:
        int32 [B, *grid].
    """
    shape = (features.shape[0], *grid, features.shape[-1])
    features = jax.image.resize(normalise_channels(features), shape, "linear")
    return jnp.argmax(features @ codes.T, axis=-1).astype(jnp.int32)
