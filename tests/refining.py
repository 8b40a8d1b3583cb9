# SPDX-License-Identifier: Apache-2.0
"""One size of image, settings and batches for the tests of refinement."""

from __future__ import annotations

import dataclasses

import numpy as np
from small_trunk import load_small_trunk

from semlic_jax import refinement
from semlic_jax.refinement.batch import Batch

# One size for all: an image that does not fill its bucket, so that masks matter.
SIZE = (56, 64)
RELAXED = refinement.preset(40, gamma=0.0, method="sga", chunk_steps=10)
NEWTON = refinement.preset(
    12, gamma=0.0, chunk_steps=4, method="newton", noise=0.5, probes=2
)
PERCEPTUAL = dataclasses.replace(
    NEWTON,
    alpha=1e-4,
    gamma=1.0,
    structure=1.0,
    lattice=1.0,
    features=load_small_trunk(),
)


def new_batch(codec, image, settings=NEWTON, less_bytes=0):
    unrefined = codec.compress(image, quality=0.5)
    budget = len(unrefined) - less_bytes
    return Batch(codec, settings, [image], [budget], [None], [None], [unrefined])


def fixed(made):
    """What the functions of a batch's objective take first."""
    return made.frozen, made.images, made.weights


def squared_error(codec, data, image):
    return np.mean((codec.decompress(data).astype(float) - image) ** 2)
