# SPDX-License-Identifier: Apache-2.0
"""A model that is widened computes what it did, and can learn more."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semlic_jax.model.compression import SIZES, CompressionModel
from semlic_jax.training import widen
from semlic_jax.training.model_files import training_params
from semlic_jax.weights import load_model

NARROW = dataclasses.replace(SIZES["tiny"], texture_channels=4)
WIDE = dataclasses.replace(
    NARROW,
    name="wide",
    widths=tuple(2 * width for width in NARROW.widths),
    level_blocks=1,
)
KEY = jax.random.key(3)
IMAGES = jnp.asarray(np.random.default_rng(0).random((2, 64, 128, 3), np.float32))
Y_HAT = jnp.asarray(np.random.default_rng(2).standard_normal((2, 4, 8, 24), np.float32))
QUALITY = jnp.array([0.2, 0.8])


def analysis(config, params):
    return CompressionModel(config).apply({"params": params}, IMAGES, method="analysis")


def synthesis(config, params):
    return CompressionModel(config).apply(
        {"params": params}, Y_HAT, QUALITY, method="synthesis"
    )


@pytest.fixture(scope="module")
def narrow_params():
    """A narrow model none of whose layers is at zero."""
    model = CompressionModel(NARROW)
    shapes = jax.eval_shape(model.init, KEY, IMAGES, QUALITY, KEY)["params"]
    rng = np.random.default_rng(1)

    def leaf(path, shape):
        values = rng.standard_normal(shape.shape)
        if path[-1].key == "kernel":
            values = values / np.sqrt(np.prod(shape.shape[:-1]))
        return np.float32(values if path[-1].key == "kernel" else 1 + 0.1 * values)

    parts = {name: shapes[name] for name in ("g_a", "g_s", "log_gain")}
    return jax.tree_util.tree_map_with_path(leaf, parts)


@pytest.fixture(scope="module")
def wide_params(narrow_params):
    return widen.widened(narrow_params, NARROW, WIDE)


@pytest.mark.parametrize("function", [analysis, synthesis])
def test_the_function_is_the_same(narrow_params, wide_params, function):
    before = jax.jit(partial(function, NARROW))(narrow_params)
    after = jax.jit(partial(function, WIDE))(wide_params)
    assert np.std(before) > 0.1
    np.testing.assert_allclose(after, before, atol=1e-3 * np.std(before))


@pytest.mark.parametrize(
    "function, part, names",
    [
        (analysis, "g_a", ("Conv_0", "Conv_1")),
        (synthesis, "g_s", ("Conv_0", "ConvTranspose_0", "repair_0")),
    ],
)
def test_its_copies_come_apart(wide_params, function, part, names):
    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.mean(function(WIDE, params) ** 2)

    found = gradient(wide_params)[part]
    for name in names:
        first, second = np.split(np.asarray(found[name]["bias"]), 2)
        assert np.abs(first - second).max() > 0.01 * np.abs(first).max()
    assert np.abs(found["level_0_block_0"]["ChannelNorm_1"]["gamma"]).max() > 0


def test_it_fits_the_size(wide_params):
    model = CompressionModel(WIDE)
    wanted = jax.eval_shape(model.init, KEY, IMAGES, QUALITY, KEY)["params"]
    for part in ("g_a", "g_s"):
        assert jax.tree.map(np.shape, wide_params[part]) == jax.tree.map(
            lambda leaf: leaf.shape, wanted[part]
        )


@pytest.mark.parametrize("change", [{"widths": (64, 96, 128)}, {"blocks": 2}])
def test_another_architecture_is_refused(narrow_params, change):
    with pytest.raises(ValueError, match="twice the widths of tiny"):
        widen.widened(narrow_params, NARROW, dataclasses.replace(WIDE, **change))


def test_the_larger_model_reads_the_files_of_the_smaller(
    tiny_model, tmp_path, monkeypatch
):
    config = dataclasses.replace(WIDE, texture_channels=0)
    monkeypatch.setitem(SIZES, "wide", config)
    widen.main([str(tiny_model), str(tmp_path / "start.npz"), "--size", "wide"])
    tiny, start = load_model(tiny_model), load_model(tmp_path / "start.npz")
    assert start.config == config
    assert start.fingerprint() == tiny.fingerprint()
    pictures = [
        jax.jit(partial(synthesis, model.config))(training_params(model))
        for model in (tiny, start)
    ]
    assert np.std(pictures[0]) > 0.05
    np.testing.assert_allclose(pictures[1], pictures[0], atol=0.01)


def test_a_model_without_linear_skip_is_refused(narrow_params):
    narrow = dataclasses.replace(NARROW, linear_skip=False)
    with pytest.raises(ValueError, match="a linear skip"):
        widen.widened(narrow_params, narrow, WIDE)


def test_an_unknown_model_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        widen.main(["smal", str(tmp_path / "start.npz")])
    assert ended.value.code == 1
    assert "expected the name of a packaged model" in capsys.readouterr().err


def test_an_existing_file_is_kept(tmp_path, capsys):
    path = tmp_path / "start.npz"
    path.write_bytes(b"mine")
    with pytest.raises(SystemExit) as ended:
        widen.main(["small", str(path)])
    assert ended.value.code == 1 and path.read_bytes() == b"mine"
    assert "give --force" in capsys.readouterr().err


def test_a_size_that_does_not_fit_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        widen.main(["small", str(tmp_path / "start.npz"), "--size", "hific"])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert "twice the widths of small" in error and error.endswith("found hific\n")
