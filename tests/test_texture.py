# SPDX-License-Identifier: Apache-2.0
"""The noise of the decoder: what it is, and that files decode to one picture."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import lively_params

from semlic_jax.model.compression import CompressionModel
from semlic_jax.model.texture import Texture, texture_noise


@pytest.fixture(scope="module")
def noise():
    return np.asarray(texture_noise((96, 128), 4, 1))[0]


def test_noise_is_uniform_of_variance_one(noise):
    assert noise.dtype == np.float32
    assert np.abs(noise).max() <= np.sqrt(3)
    counts = np.histogram(noise, 16, (-np.sqrt(3), np.sqrt(3)))[0]
    expected = noise.size / 16
    # Chi-squared of 15 degrees: a fair hash exceeds 45 once in ten thousand times.
    assert np.sum((counts - expected) ** 2 / expected) < 45


def test_neighbours_channels_and_levels_are_independent(noise):
    other = np.asarray(texture_noise((96, 128), 4, 2))[0]
    pairs = {
        "row below": (noise[1:], noise[:-1]),
        "column beside": (noise[:, 1:], noise[:, :-1]),
        "diagonal": (noise[1:, 1:], noise[:-1, :-1]),
        "16 rows below": (noise[16:], noise[:-16]),
        "channel": (noise[..., 1:], noise[..., :-1]),
        "level": (noise, other),
    }
    for name, (a, b) in pairs.items():
        correlation = np.mean(a * b)
        assert abs(correlation) < 4 / np.sqrt(a.size), name


def test_noise_belongs_to_the_place(noise):
    """A map that starts elsewhere is a part of the larger one."""
    origin = jnp.asarray([[0, 0], [5, 17]])
    parts = np.asarray(texture_noise((40, 30), 4, 1, origin))
    np.testing.assert_array_equal(parts[0], noise[:40, :30])
    np.testing.assert_array_equal(parts[1], noise[5:45, 17:47])


def test_noise_is_that_of_every_version():
    """Values of the first release: a decoder must not change its pictures silently."""
    found = np.asarray(texture_noise((2, 2), 2, 0))[0] / np.sqrt(12) + 0.5
    expected = np.array(
        [
            [_hashed(row, column, channel) for channel in (0, 1)]
            for row in (0, 1)
            for column in (0, 1)
        ]
    ).reshape(2, 2, 2)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def _hashed(row, column, channel):
    """The hash at level 0 in Python's whole numbers."""
    mask = 2**32 - 1
    bits = (
        row * 0x9E3779B1 + column * 0x85EBCA77 + channel * 0xC2B2AE3D + 0x27D4EB2F
    ) & mask
    bits = ((bits ^ (bits >> 16)) * 0x7FEB352D) & mask
    bits = ((bits ^ (bits >> 15)) * 0x846CA68B) & mask
    bits ^= bits >> 16
    return ((bits >> 8) + 0.5) / 2**24


def test_texture_starts_as_the_identity():
    h = jax.random.normal(jax.random.key(0), (1, 8, 8, 6))
    layer = Texture(4, 0)
    params = layer.init(jax.random.key(1), h)
    np.testing.assert_array_equal(layer.apply(params, h), h)
    params = jax.tree.map(lambda a: a + 0.1, params)
    assert np.abs(layer.apply(params, h) - h).max() > 0.01


def test_training_moves_the_noise_and_files_do_not(tiny_config):
    config = dataclasses.replace(tiny_config, texture_channels=4)
    model = CompressionModel(config)
    x = np.random.default_rng(0).random((1, 64, 64, 3)).astype(np.float32)
    quality = jnp.asarray([0.5])
    params = jax.tree.map(jnp.asarray, lively_params(config))

    @jax.jit
    def run(rng):
        forward = model.apply({"params": params}, x, quality, rng)
        decoded = model.apply(
            {"params": params}, forward.y_hat, quality, method="synthesis"
        )
        return forward.x_hat, decoded

    (first, decoded), (second, again) = run(jax.random.key(1)), run(jax.random.key(2))
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(decoded, again)


def test_a_picture_does_not_depend_on_its_padding(tiny_config):
    """Far from the padding, where the convolutions do not reach it."""
    config = dataclasses.replace(tiny_config, texture_channels=4)
    model = CompressionModel(config)
    y_hat = jax.random.normal(jax.random.key(0), (1, 4, 12, config.latent_channels))
    quality = jnp.asarray([0.5])
    params = jax.tree.map(jnp.asarray, lively_params(config))

    @jax.jit
    def decode(y_hat):
        return model.apply({"params": params}, y_hat, quality, method="synthesis")

    wide = decode(jnp.pad(y_hat, ((0, 0), (0, 0), (0, 8), (0, 0))))
    np.testing.assert_allclose(wide[:, :, :64], decode(y_hat)[:, :, :64], atol=1e-5)


def test_features_say_where_the_noise_goes():
    """h + mix(gate(h) * noise), each with a bias, at the place that the map has."""
    rng = np.random.default_rng(3)
    h = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    gate, mix = (
        {
            "kernel": rng.normal(size=(1, 1, *shape)).astype(np.float32),
            "bias": rng.normal(size=shape[1]).astype(np.float32),
        }
        for shape in ((5, 2), (2, 5))
    )
    origin = np.array([[0, 0], [7, 9]])
    found = Texture(2, 1).apply({"params": {"gate": gate, "mix": mix}}, h, origin)
    noise = np.asarray(texture_noise((3, 4), 2, 1, jnp.asarray(origin)))
    gated = (h @ gate["kernel"][0, 0] + gate["bias"]) * noise
    expected = h + gated @ mix["kernel"][0, 0] + mix["bias"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_noise_of_a_level_is_that_of_every_version():
    """The hash of a level adds a multiple of one number, which places cannot equal."""
    for level in (0, 1, 3):
        found = np.asarray(texture_noise((1, 1), 1, level)) / np.sqrt(12) + 0.5
        bits = ((level + 1) * 0x27D4EB2F) % 2**32
        bits = ((bits ^ (bits >> 16)) * 0x7FEB352D) % 2**32
        bits = ((bits ^ (bits >> 15)) * 0x846CA68B) % 2**32
        bits ^= bits >> 16
        np.testing.assert_allclose(found, ((bits >> 8) + 0.5) / 2**24, atol=1e-6)
