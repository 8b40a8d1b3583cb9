# SPDX-License-Identifier: Apache-2.0
"""What several test files share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Path of a model file of the smallest size with random weights."""
    import jax
    import jax.numpy as jnp

    from semlic_jax.model.compression import SIZES, CompressionModel
    from semlic_jax.weights import export_model, save_model

    config = SIZES["tiny"]
    key = jax.random.key(0)
    x = jnp.zeros((1, 64, 64, 3))
    params = jax.jit(CompressionModel(config).init)(key, x, jnp.zeros(1), key)["params"]
    path = tmp_path_factory.mktemp("models") / "tiny.npz"
    save_model(path, export_model(config, params))
    return path
