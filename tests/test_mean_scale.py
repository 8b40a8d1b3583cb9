# SPDX-License-Identifier: Apache-2.0
"""The mean-scale model where its published form says nothing: our additions."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semlic_jax.model.compression import CompressionModel
from semlic_jax.model.mean_scale import MeanScaleConfig, MeanScaleModel, network_of

pytestmark = pytest.mark.usefixtures("quick_to_compile")

CONFIG = MeanScaleConfig(
    name="small",
    widths=(2, 2, 3, 3, 4),
    blocks=1,
    latent_channels=3,
    hyper_channels=2,
    prior_filters=(3, 3),
)
MODEL = MeanScaleModel(CONFIG)
INSIDE = np.ones((1, 1, 1, 1), np.float32)


@pytest.fixture(scope="module")
def params():
    """Of the entropy model alone, with medians that are no whole numbers."""
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), image)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32),
        {name: shapes[name] for name in ("entropy", "prior")},
    )
    params["entropy"]["median"] = np.float32([0.4, -2.3])
    return params


def with_scales(params, bias):
    """The scales of the three channels, whatever the hyper-latents are."""
    last = params["entropy"]["scale_2"]
    last = {"kernel": 0 * last["kernel"], "bias": np.float32(bias)}
    return params | {"entropy": params["entropy"] | {"scale_2": last}}


def table_indexes(params, level):
    quality = np.array([level / 255], np.float32)
    z = np.ones((1, 1, 1, 2), np.float32)
    index, _ = MODEL.apply({"params": params}, z, quality, INSIDE, method="parameters")
    return index


def test_scales_beyond_the_tables_take_the_outermost(params):
    """At a gain of 1/4 even the least of scales is below that of the first table."""
    extremes = with_scales(params, (-5, 0.11 * 4, 1e4))
    for level, expected in ((0, (0, 0, 63)), (255, (14, 27, 63))):
        found = np.asarray(table_indexes(extremes, level))
        assert found.shape == (1, 4, 4, 3)
        assert (found == expected).all()


def test_rounding_of_indexes_lets_the_gradient_through(params):
    """Of refinement, which moves the hyper-latents by the cost of the latents."""
    scaled = with_scales(params, (1.0, 2.0, 5.0))
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(table_indexes(params, 128))))(
        scaled
    )
    # d index / d scale = 63 / log(64 / 0.11) / scale, at each of 16 places.
    expected = 16 * 63 / np.log(64 / 0.11) / np.array([1.0, 2.0, 5.0])
    found = gradient["entropy"]["scale_2"]["bias"]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_probabilities_and_bits_of_z_are_about_the_median(params):
    """The tables of a file are of the one, rate estimates of the other."""
    z = np.random.default_rng(1).integers(-4, 5, (1, 2, 3, 2)).astype(np.float32)
    bits, probability = (
        MODEL.apply({"params": params}, z, method=method)
        for method in ("z_bits", "z_probability")
    )
    unmoved = params["entropy"] | {"median": np.zeros(2, np.float32)}
    far = MODEL.apply(
        {"params": params | {"entropy": unmoved}}, z, method="z_probability"
    )
    np.testing.assert_allclose(2.0**-bits, probability, rtol=1e-4, atol=1e-8)
    assert np.abs(probability - far).max() > 1e-3


def test_gains_are_those_of_whole_levels_within_the_range(params):
    quality = np.array([-1, 0, 127.6 / 255, 128.4 / 255, 1, 3], np.float32)
    gain = MODEL.apply({}, quality, method="gain")[:, 0, 0, 0]
    np.testing.assert_allclose(gain[:2], 0.25)
    np.testing.assert_allclose(gain[2:4], 1)
    np.testing.assert_allclose(gain[4:], 2 ** (127 / 64), rtol=1e-6)


def test_a_configuration_makes_the_network_of_its_family(tiny_config):
    made = network_of(CONFIG, dtype=jnp.bfloat16, tile=9)
    assert made == MeanScaleModel(CONFIG, jnp.bfloat16, 9)
    made = network_of(tiny_config, "exact", jnp.bfloat16, 9)
    assert made == CompressionModel(tiny_config, "exact", jnp.bfloat16, tile=9)


def test_both_transforms_process_tiles():
    image = jax.ShapeDtypeStruct((1, 16 * 12, 16, 3), jnp.float32)
    quality = jax.ShapeDtypeStruct((1,), jnp.float32)
    y_hat = jax.ShapeDtypeStruct((1, 12, 1, 3), jnp.float32)
    whole = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    params = jax.eval_shape(MODEL.init, jax.random.key(0), whole)
    for method, inputs in (("analysis", [image]), ("synthesis", [y_hat, quality])):
        for tile in (0, 9):
            apply = network_of(CONFIG, tile=tile).apply

            def run(params, *inputs, apply=apply, method=method):
                return apply(params, *inputs, method=method)

            program = str(jax.make_jaxpr(run)(params, *inputs))
            assert ("scan" in program) == bool(tile), method


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": (2, 2, 3, 4)}, "expected 5 widths, found 4"),
        ({"family": "other"}, "expected the family mean_scale, found other"),
        ({"latent_channels": 0}, "latent_channels"),
        ({"blocks": "1"}, "blocks"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
