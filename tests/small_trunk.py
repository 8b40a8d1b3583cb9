# SPDX-License-Identifier: Apache-2.0
"""Stands in for a feature network: three numbers of each patch, and no weights."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from semlic_jax.objectives.features import FeatureNetwork


class _Moments(nn.Module):
    """Mean, mean square and mean gradient, as a map with three channels."""

    taps: tuple = ("moments",)

    def __call__(self, images):
        edges = jnp.abs(jnp.diff(images, axis=2, append=images[:, :, -1:]))
        found = images, images**2, edges
        return {"moments": jnp.stack([x.mean(axis=-1) for x in found], axis=-1)}


def load_small_trunk(*args, **options) -> FeatureNetwork:
    """In the place of `load_features`."""
    return FeatureNetwork({}, _Moments())
