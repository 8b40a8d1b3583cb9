# SPDX-License-Identifier: Apache-2.0
"""The terms of the objective: their weights, their pixels, and what the trunk sees."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_trunk import load_small_trunk

from semlic_jax.refinement import Region
from semlic_jax.refinement.objective import (
    TRUNK_SHIFTS,
    Frozen,
    Images,
    Static,
    Weights,
    equal_weights,
    mean_powers,
    objective_residuals,
    original_taps,
    pixel_weights,
    terms_of,
)
from semlic_jax.refinement.structure import lattice_weights, structure_weights

SIZE, PADDED = (50, 60), (64, 64)
STATIC = Static(
    config=None,
    method="newton",
    perceptual=True,
    style=True,
    mean_style=True,
    padded=True,
)
FROZEN = Frozen(
    params=None, y_bits=None, z_bits=None, features=load_small_trunk(), static=STATIC
)
NOTHING = Weights(*jnp.zeros(len(Weights._fields)))
NO_BITS = jnp.zeros(1)

pytestmark = pytest.mark.usefixtures("quick_to_compile")


@pytest.fixture(scope="module")
def images(photograph):
    """One image that does not fill its bucket, with weights that differ everywhere."""
    rng = np.random.default_rng(0)
    image = photograph(*SIZE, seed=3).astype(np.float32) / 255
    pads = [(0, padded - own) for padded, own in zip(PADDED, SIZE, strict=True)]
    x = np.pad(image, (*pads, (0, 0)), mode="edge")[None]
    inside = equal_weights(x, [SIZE])
    weights, feature_weights = (
        inside * rng.uniform(0.2, 3, inside.shape).astype(np.float32) for _ in range(2)
    )
    sizes = jnp.array([SIZE])
    found = Images(
        x=jnp.asarray(x),
        sizes=sizes,
        quality=jnp.ones(1),
        weights=jnp.asarray(weights),
        feature_weights=jnp.asarray(feature_weights),
        taps=jax.jit(original_taps)(FROZEN.features, x),
        structure=jax.jit(structure_weights)(x, weights, sizes),
        lattice=(jax.jit(lattice_weights)(x, weights, sizes),),
    )
    return found._replace(mean_powers=jax.jit(mean_powers)(FROZEN, found))


@pytest.fixture(scope="module")
def x_hat(images):
    rng = np.random.default_rng(1)
    noise = 0.1 * rng.standard_normal(images.x.shape)
    return jnp.clip(images.x + noise.astype(np.float32), 0, 1)


@pytest.fixture(scope="module")
def value():
    """Function (images, x_hat, shift=0, **weights) -> value; other weights are 0."""
    terms = jax.jit(terms_of)

    def found(images, x_hat, shift=0, **changes):
        weights = NOTHING._replace(
            **{name: jnp.float32(weight) for name, weight in changes.items()}
        )
        shift = jnp.int32(shift)
        return float(terms(FROZEN, images, weights, NO_BITS, x_hat, shift).value[0])

    return found


TERMS = ("style", "mean_style", "structure", "lattice")


@pytest.mark.parametrize("name", TERMS)
def test_terms_beside_the_distance_are_weighted_within_gamma(
    value, images, x_hat, name
):
    distance = value(images, x_hat, gamma=1.0)
    alone = value(images, x_hat, gamma=1.0, **{name: 1.0}) - distance
    assert alone > 1e-3 * distance > 0
    found = value(images, x_hat, alpha=0.01, gamma=0.3, **{name: 2.0})
    expected = 0.3 * (distance + 2 * alone) + value(images, x_hat, alpha=0.01)
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["gamma", "style", "mean_style"])
def test_features_count_by_the_weights_of_their_pixels(value, images, x_hat, name):
    """Roots of the weights go into the features such that the terms are linear."""

    def alone(images):
        found = value(
            images, x_hat, gamma=1.0, **({name: 1.0} if name in TERMS else {})
        )
        return found - (value(images, x_hat, gamma=1.0) if name in TERMS else 0)

    tripled = images._replace(feature_weights=3 * images.feature_weights)
    assert alone(tripled) == pytest.approx(3 * alone(images), rel=1e-3)


@pytest.mark.parametrize("shift", range(len(TRUNK_SHIFTS)))
def test_known_features_are_those_of_the_shift(value, images, x_hat, shift):
    weights = dict(gamma=1.0, style=1.0, mean_style=1.0)
    found = value(images, x_hat, shift, **weights)
    computed = value(images._replace(taps=()), x_hat, shift, **weights)
    assert found == pytest.approx(computed, rel=1e-5)
    assert value(images, images.x, shift, **weights) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("shift", range(len(TRUNK_SHIFTS)))
def test_weights_of_features_are_shifted_with_the_pixels(value, images, shift):
    """A change within what has no weight costs nothing, whatever the trunk's view."""
    changed = images.x.at[:, 20:30, 20:30].set(0.0)
    hidden = images.feature_weights.at[:, 20:30, 19:30].set(0.0)
    hidden = images._replace(feature_weights=hidden)
    assert value(hidden, changed, shift, gamma=1.0) == pytest.approx(0, abs=1e-7)
    assert value(images, changed, shift, gamma=1.0) > 1e-4


def test_nothing_beyond_the_image_counts(value, images, x_hat):
    """Also not to features of pixels at its edge, which see beyond it."""
    weights = dict(
        alpha=0.01, gamma=1.0, style=1.0, mean_style=1.0, structure=1.0, lattice=1.0
    )
    expected = value(images, x_hat, **weights)
    for beyond in (np.s_[:, SIZE[0] :, : SIZE[1]], np.s_[:, : SIZE[0], SIZE[1] :]):
        changed = x_hat.at[beyond].set(1 - x_hat[beyond])
        assert value(images, changed, **weights) == pytest.approx(expected, rel=1e-5)


def test_residuals_add_up_with_any_weights(value, images, x_hat):
    """Of pixels and of terms; curvature would otherwise be of another objective."""
    changes = dict(alpha=0.02, gamma=0.3, structure=2.0, lattice=5.0)
    weights = NOTHING._replace(
        **{name: jnp.float32(weight) for name, weight in changes.items()}
    )
    parts = jax.jit(objective_residuals)(FROZEN, images, weights, x_hat)
    sums = [float(jnp.sum(part**2)) for part in parts]
    assert len(parts) == 2 + len(images.structure) + 1 and min(sums) > 0
    assert sum(sums) == pytest.approx(value(images, x_hat, **changes), rel=1e-4)
    for found, own in (
        (sums[0], dict(alpha=0.02)),
        (sums[1], dict(gamma=0.3)),
    ):
        assert found == pytest.approx(value(images, x_hat, **own), rel=1e-4)


def test_regions_weight_features_in_one_variant_alone():
    """Each image of a batch by its own region, on the pixels that it has."""
    mask = np.zeros((6, 9), np.float32)
    mask[:2] = 1
    sizes = [(6, 9)] * 2 + [(9, 6)]
    regions = [Region(mask, 0.8, 0.2, variant) for variant in ("L1", "L2")]
    x = np.zeros((3, 10, 10, 3), np.float32)
    weights, feature_weights = pixel_weights(x, sizes, [*regions, None])
    equal = equal_weights(x, sizes)
    expected = np.zeros((10, 10), np.float32)
    expected[:6, :9] = regions[0].pixel_weights((6, 9))
    assert expected.max() > 2 * expected[:6, :9].min() > 0
    np.testing.assert_array_equal(weights, [expected, expected, equal[2]])
    np.testing.assert_array_equal(feature_weights, [equal[0], expected, equal[2]])
    assert equal[2, :9, :6].all() and equal.sum() == 3 * 54
