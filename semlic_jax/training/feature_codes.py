# SPDX-License-Identifier: Apache-2.0
"""Classes for the non-binary adversary, without training a network for them.

MS-ILLM's classes are the codes of a VQ-VAE (arXiv:2301.11189), which has to be trained
first. Clusters of the features that a trained network has at each place of the
originals serve as well: they say what is where, on a grid of 8 pixels.
"""

from __future__ import annotations

import io
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
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
    """Cluster centres of the features of photographs, by k-means.

    Args:
        network: the frozen network, of any dtype.
        tap: index of the tap whose features are clustered.
        photographs: those of the training; the same photographs and seed give the same
            codes.
        count: number of codes, C.
        seed: seed of the crops, of the features taken from them and of k-means.

    Returns:
        float32 [C, D], unit vectors.
    """
    rng = np.random.default_rng((seed, count))
    # It may be on the devices of all processes, and a program of theirs would wait for
    # the others, which do not call this.
    network = jax.device_put(jax.device_get(network), jax.local_devices()[0])

    @partial(jax.jit, static_argnums=1)
    def features(network: FeatureNetwork, tap: int, image: Array) -> Array:
        found = network.apply(image[None])[tap][0]
        return normalise_channels(found.astype(jnp.float32))

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


def kept_codes(
    path: epath.Path,
    network: FeatureNetwork,
    tap: int,
    photographs: Photographs,
    count: int,
    *,
    seed: int,
) -> np.ndarray:
    """`feature_codes`, made once and kept in a file, the same for all processes.

    Args:
        path: the file, which the first process writes if it is not there.
        network, tap, photographs, count, seed: as in `feature_codes`.

    Raises:
        ValueError: the file has codes of another shape, or cannot be read or written.
    """
    image = np.zeros((1, 64, 64, 3), np.float32)
    width = jax.eval_shape(network.apply, image)[tap].shape[-1]
    codes = np.zeros((count, width), np.float32)
    trouble = ""
    if jax.process_index() == 0:
        try:
            codes = _read_codes(path, codes.shape)
        except FileNotFoundError:
            codes = feature_codes(network, tap, photographs, count, seed=seed)
            trouble = _write_codes(path, codes)
        except ValueError as error:
            trouble = str(error)
    if jax.process_count() > 1:
        codes, failed = multihost_utils.broadcast_one_to_all((codes, bool(trouble)))
        trouble = trouble or ("the first process has no codes" if failed else "")
    if trouble:
        raise ValueError(trouble)
    return np.asarray(codes)


def _read_codes(path: epath.Path, shape: tuple[int, int]) -> np.ndarray:
    data = path.read_bytes()
    try:
        codes = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"expected codes in {path}, found no array") from error
    if codes.shape != shape or codes.dtype != np.float32:
        raise ValueError(
            f"expected codes of shape {shape} in {path}, found {codes.shape} "
            f"({codes.dtype}): the stage was started with another adversary"
        )
    return codes


def _write_codes(path: epath.Path, codes: np.ndarray) -> str:
    """Write the codes; return what went wrong, or "" if nothing did."""
    buffer = io.BytesIO()
    np.save(buffer, codes)
    unfinished = path.with_name(f".{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(buffer.getvalue())
        unfinished.replace(path)
    except Exception as error:  # bucket libraries raise errors of their own
        return f"cannot write {path}: {' '.join(str(error).split())[:300]}"
    return ""


def nearest_codes(codes: Array, features: Array, grid: tuple[int, int]) -> Array:
    """The code of each cell: the one with the largest cosine to its features.

    Args:
        codes: float [C, D], see `feature_codes`.
        features: float [B, h, w, D] of originals.
        grid: number of rows and of columns of cells.

    Returns:
        int32 [B, *grid].
    """
    shape = (features.shape[0], *grid, features.shape[-1])
    features = normalise_channels(features.astype(jnp.float32))
    features = jax.image.resize(features, shape, "linear")
    return jnp.argmax(features @ codes.T, axis=-1).astype(jnp.int32)
