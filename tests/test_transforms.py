# SPDX-License-Identifier: Apache-2.0
"""The transforms: shapes of every size, the lapped transform, what g_s costs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import lively_params

from semlic_jax.model.compression import SIZES, CompressionModel, full_masks
from semlic_jax.model.transforms import filter_borders, lapping_matrix


@functools.cache
def shapes_of(config):
    """The parameters of a model as shapes."""
    key = jax.random.key(0)
    x = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    quality = jax.ShapeDtypeStruct((1,), np.float32)
    return jax.eval_shape(CompressionModel(config).init, key, x, quality, key)["params"]


@pytest.mark.parametrize("name", ["tiny", "hific"])  # with and without the skip
def test_shapes(name):
    config = SIZES[name]
    model = CompressionModel(config)
    key = jax.random.key(0)
    x = jax.ShapeDtypeStruct((2, 64, 128, 3), np.float32)
    quality = jax.ShapeDtypeStruct((2,), np.float32)
    params = shapes_of(config)
    assert set(params) == {"entropy", "g_a", "g_s", "h_a", "log_gain", "prior"}
    forward = jax.eval_shape(model.apply, {"params": params}, x, quality, key)
    assert forward.x_hat.shape == x.shape and forward.x_hat.dtype == np.float32
    assert forward.y_hat.shape == (2, 4, 8, config.latent_channels)
    assert forward.rate.y_bits.shape == forward.rate.z_bits.shape == (2,)
    assert all(a.dtype == np.float32 for a in jax.tree.leaves(params))


@pytest.mark.parametrize("name, most_kmacs", [("small", 40), ("base", 200)])
def test_what_the_decoder_costs(name, most_kmacs):
    """Multiplications of g_s per pixel: each kernel at the resolution it runs at."""
    config = SIZES[name]
    kmacs = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes_of(config)["g_s"]):
        names = [part.key for part in path]
        if "kernel" not in names or "quality" in names:
            continue
        stride = 16
        if names[0].startswith("ConvTranspose"):
            # Each input pixel meets each tap once.
            stride = 16 >> int(names[0].split("_")[1])
        elif names[0].startswith(("level", "texture")):
            stride = 8 >> int(names[0].split("_")[1])
        elif names[0].startswith("repair") or names[0] == "Conv_1":
            stride = config.patch
        kmacs += np.prod(leaf.shape) / stride**2 / 1000
    assert most_kmacs / 2 < kmacs <= most_kmacs


def test_lapping_matrix_is_orthonormal():
    matrix = lapping_matrix()
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(16), atol=1e-12)
    assert np.abs(matrix - np.eye(16)).max() > 0.1


@pytest.mark.parametrize("size", [(16, 16), (16, 48), (48, 16), (32, 64)])
def test_filter_borders_is_undone_by_its_transpose(size):
    x = np.random.default_rng(0).standard_normal((2, *size, 3))
    matrix = lapping_matrix()
    filtered = filter_borders(x, matrix)
    assert filtered.shape == x.shape
    np.testing.assert_allclose(filter_borders(filtered, matrix.T), x, atol=1e-12)
    np.testing.assert_array_equal(filtered[:, :8, :8], x[:, :8, :8])
    in_jax = filter_borders(jnp.asarray(x), jnp.asarray(matrix))
    np.testing.assert_allclose(in_jax, filtered, atol=1e-5)
    if size[0] > 16:  # the samples around the first border, in the first column
        column = matrix @ x[0, 8:24, 0, 1]
        np.testing.assert_allclose(filtered[0, 8:24, 0, 1], column, atol=1e-12)


def test_gain_interpolates_its_anchors(tiny_config, tiny_params):
    anchors = np.exp(tiny_params["log_gain"].astype(np.float64))
    quality = jnp.array([0.0, 0.2, 0.3, 0.9999, 1.0, 1.5, -1.0])
    found = CompressionModel(tiny_config).apply(
        {"params": tiny_params}, quality, method="gain"
    )
    assert found.shape == (7, 1, 1, 24)
    found = np.asarray(found)[:, 0, 0]
    np.testing.assert_allclose(found[0], anchors[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], anchors[1], rtol=1e-5)
    np.testing.assert_allclose(found[2], np.sqrt(anchors[1] * anchors[2]), rtol=1e-4)
    np.testing.assert_allclose(found[4], anchors[5], rtol=1e-5)
    np.testing.assert_array_equal(found[5:], found[[4, 0]])


def klt_start(config, photograph):
    """Parameters that are zero but for the KLT."""
    pytest.importorskip("optax")
    from semlic_jax.training.klt import block_covariance, start_from_klt

    zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes_of(config))
    photographs = [photograph(96, 96, seed) for seed in range(40)]
    return start_from_klt(zeros, config, block_covariance(photographs))


def test_all_components_of_the_klt_are_the_image(tiny_config, photograph):
    config = dataclasses.replace(
        tiny_config, latent_channels=768, groups=(768,), context_shifts=(2,)
    )
    params = klt_start(config, photograph)
    model = CompressionModel(config)
    x = photograph(64, 48, seed=7)[None] / np.float32(255)

    @jax.jit
    def there_and_back(x):
        y = model.apply({"params": params}, x, method="analysis")
        return y, model.apply({"params": params}, y, jnp.zeros(1), method="synthesis")

    y, x_hat = there_and_back(x)
    assert y.shape == (1, 4, 3, 768)
    np.testing.assert_allclose(x_hat, x, atol=1e-4)


def test_training_pass_measures_the_latents_it_rounds(tiny_config):
    """x_hat is that of y_hat, and y_hat is y rounded about some mean in 1/16."""
    config = dataclasses.replace(tiny_config, groups=(24,), context_shifts=(2,))
    model = CompressionModel(config, "fake")
    x = np.random.default_rng(0).random((2, 64, 64, 3)).astype(np.float32)
    quality = np.array([0.0, 0.8], np.float32)

    @jax.jit
    def run(params, x, quality):
        variables = {"params": params}
        forward = model.apply(variables, x, quality, jax.random.key(0))
        y = model.apply(variables, x, method="analysis")
        y = y * model.apply(variables, quality, method="gain")
        x_hat = model.apply(variables, forward.y_hat, quality, method="synthesis")
        return forward, y, x_hat

    forward, y, x_hat = run(lively_params(config), x, quality)
    np.testing.assert_allclose(forward.x_hat, x_hat, atol=1e-4)
    y_hat = np.asarray(forward.y_hat)
    assert np.abs(y_hat - y).max() <= 0.5 + 1e-4
    np.testing.assert_array_equal(16 * y_hat, np.rint(16 * y_hat))
    assert (y_hat != np.rint(y_hat)).any()
    assert (np.asarray(forward.rate.y_bits) > 100).all()
    assert full_masks(2, (4, 4)).y.all()


@pytest.mark.parametrize("remat", [False, True])
def test_remat_is_of_every_residual_block(remat):
    config = dataclasses.replace(SIZES["tiny"], level_blocks=2)
    model = CompressionModel(config, remat=remat)
    params = shapes_of(config)
    x = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    y = jax.ShapeDtypeStruct((1, 4, 4, config.latent_channels), np.float32)
    quality = jax.ShapeDtypeStruct((1,), np.float32)
    levels = len(config.widths) - 1
    for method, inputs, blocks in (
        ("analysis", (x,), 2 * levels),
        ("synthesis", (y, quality), 2 * levels + config.blocks),
    ):
        apply = functools.partial(model.apply, method=method)
        jaxpr = jax.make_jaxpr(apply)({"params": params}, *inputs)
        names = [equation.primitive.name for equation in jaxpr.eqns]
        found = sum("remat" in name or "checkpoint" in name for name in names)
        assert found == (blocks if remat else 0)
