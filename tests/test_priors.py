# SPDX-License-Identifier: Apache-2.0
"""Densities: they sum to one, reach their limits, and are the bits they say."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semlic_jax.coding.symbol_tables import gaussian_tables
from semlic_jax.model.priors import (
    NUM_SCALES,
    SCALE_MAX,
    SCALE_MIN,
    FactorizedPrior,
    gaussian_bits,
    index_from_scale,
    scale_from_index,
    scale_table,
)

INTEGERS = np.arange(-600, 601)


def gaussian_mass(residual, scale):
    """Mass of the unit bin, float64, on the smaller tail."""
    r = abs(residual)
    root = scale * math.sqrt(2)
    return 0.5 * (math.erfc((r - 0.5) / root) - math.erfc((r + 0.5) / root))


@pytest.mark.parametrize("scale", [SCALE_MIN, 0.5, 1.0, 7.3, SCALE_MAX])
def test_gaussian_bits_are_those_of_its_mass(scale):
    found = np.asarray(gaussian_bits(jnp.asarray(INTEGERS, jnp.float32), scale))
    wanted = np.array([gaussian_mass(r, scale) for r in INTEGERS])
    likely = wanted > 1e-6
    np.testing.assert_allclose(found[likely], -np.log2(wanted[likely]), atol=0.02)
    assert (2.0**-found)[likely].sum() == pytest.approx(1, abs=1e-4)


def test_gaussian_bits_at_any_mean_sum_to_one():
    for shift in (0.25, 0.5):
        bits = gaussian_bits(jnp.asarray(INTEGERS + shift, jnp.float32), 2.0)
        assert (2.0 ** -np.asarray(bits, np.float64)).sum() == pytest.approx(
            1, abs=1e-4
        )


def test_gaussian_bits_reach_their_limits():
    assert gaussian_bits(jnp.float32(0), 1e-3) == 0
    far = gaussian_bits(jnp.array([50.0, -50.0, 1e6]), 0.11)
    np.testing.assert_allclose(far, -math.log2(1e-9), rtol=1e-6)
    wide = gaussian_bits(jnp.float32(0), 1e6)
    assert wide == pytest.approx(math.log2(1e6 * math.sqrt(2 * math.pi)), abs=0.1)


def test_gaussian_bits_are_symmetric_and_differentiable():
    r = jnp.array([0.3, 2.0, 9.0, 300.0])
    np.testing.assert_array_equal(gaussian_bits(r, 1.5), gaussian_bits(-r, 1.5))
    slope, by_scale = jax.grad(lambda r, s: gaussian_bits(r, s).sum(), (0, 1))(r, 1.5)
    step = 1e-3
    for i in (0, 1):
        ends = [
            -math.log2(gaussian_mass(float(r[i]) + sign * step, 1.5))
            for sign in (-1, 1)
        ]
        assert slope[i] == pytest.approx((ends[1] - ends[0]) / (2 * step), rel=1e-2)
    assert np.isfinite(slope).all() and np.isfinite(by_scale)


def test_scale_table_is_log_spaced():
    table = scale_table()
    assert table.dtype == np.float64 and table.shape == (NUM_SCALES,) == (64,)
    assert table[0] == pytest.approx(0.11) and table[-1] == pytest.approx(64)
    np.testing.assert_allclose(np.diff(np.log(table)), math.log(64 / 0.11) / 63)


def test_scale_and_index_invert_each_other():
    index = np.linspace(0, 63, 127)
    scale = np.asarray(scale_from_index(jnp.asarray(index, jnp.float32)))
    np.testing.assert_allclose(index_from_scale(scale), index, atol=1e-4)
    np.testing.assert_allclose(scale[::2], scale_table(), rtol=1e-5)
    np.testing.assert_array_equal(index_from_scale(np.array([1e-9, 1e9])), [0, 63])


def test_tables_are_the_densities_of_training():
    """What training counts is what the coder writes, at every index."""
    tables = gaussian_tables(scale_table())
    for index in (0, 20, 40, 60):
        scale = scale_table()[index]
        # One shape for all: less to compile.
        symbols = np.unique(np.linspace(-3 * scale, 3 * scale, 9).astype(int))
        symbols = np.resize(symbols, 9)
        coded = [tables.ideal_bits([s], [index]) for s in symbols]
        trained = gaussian_bits(
            jnp.asarray(symbols, jnp.float32), scale_from_index(jnp.float32(index))
        )
        np.testing.assert_allclose(coded, trained, atol=0.02)  # float32


PRIOR = FactorizedPrior(3)


@pytest.fixture(scope="module")
def params():
    """Random parameters of `PRIOR`, which compiling its own would take long to make."""
    rng = np.random.default_rng(0)
    widths = (1, 3, 3, 3, 1)
    params = {}
    for i, (fan_in, fan_out) in enumerate(zip(widths, widths[1:], strict=False)):
        shapes = {"matrix": (3, fan_out, fan_in), "bias": (3, fan_out, 1)}
        if i < 3:
            shapes["factor"] = (3, fan_out, 1)
        for name, shape in shapes.items():
            array = 0.3 * rng.standard_normal(shape) - (name == "matrix")
            params[f"{name}_{i}"] = array.astype(np.float32)
    return params


@jax.jit
def mass_and_bits(params, z):
    return (
        PRIOR.apply({"params": params}, z, method="probability"),
        PRIOR.apply({"params": params}, z, method="bits"),
    )


def test_factorized_prior_has_the_parameters_that_training_starts_from(params):
    start = jax.eval_shape(
        lambda key: PRIOR.init(key, jnp.zeros((1, 3)), method="bits"),
        jax.random.key(0),
    )
    assert jax.tree.map(lambda a: a.shape, start["params"]) == jax.tree.map(
        lambda a: a.shape, params
    )


def cumulative(params, x):
    """Ballé et al. 2018, 6.1, channel by channel in float64."""
    p = {name: a.astype(np.float64) for name, a in params.items()}
    out = []
    for c in range(3):
        h = x[None]
        for i in range(4):
            h = np.logaddexp(0, p[f"matrix_{i}"][c]) @ h + p[f"bias_{i}"][c]
            if i < 3:
                h = h + np.tanh(p[f"factor_{i}"][c]) * np.tanh(h)
        out.append(1 / (1 + np.exp(-h[0])))
    return np.stack(out, -1)


def test_factorized_prior_is_the_difference_of_its_cumulative(params):
    z = np.random.default_rng(1).uniform(-8, 8, 50)
    wanted = cumulative(params, z + 0.5) - cumulative(params, z - 0.5)
    grid = np.repeat(z[:, None], 3, 1).astype(np.float32)
    mass, bits = mass_and_bits(params, grid)
    np.testing.assert_allclose(mass, wanted, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(bits, -np.log2(np.maximum(wanted, 1e-9)), atol=0.01)
    # Any leading shape, each channel with its own density.
    _, folded = mass_and_bits(params, grid.reshape(5, 10, 3))
    np.testing.assert_allclose(folded.reshape(50, 3), bits, rtol=1e-6)


def test_factorized_prior_sums_to_one(params):
    z = np.repeat(np.arange(-400, 401)[:, None], 3, 1).astype(np.float32)
    mass, _ = mass_and_bits(params, z)
    assert (np.asarray(mass) >= 0).all()
    np.testing.assert_allclose(np.asarray(mass, np.float64).sum(0), 1, atol=1e-4)


def test_factorized_prior_of_a_symmetric_density_knows_its_centre(params):
    """Both tails are equal there, so neither is the smaller one."""
    params = {
        name: np.zeros_like(array) if "bias" in name else array
        for name, array in params.items()
    }
    mass, _ = mass_and_bits(params, np.array([[0, 0, 0], [1e-3] * 3], np.float32))
    np.testing.assert_allclose(mass[0], mass[1], rtol=1e-4)


def test_factorized_prior_is_differentiable_far_out(params):
    z = np.array([[0.0, 1e3, -1e3]], np.float32)
    np.testing.assert_allclose(
        mass_and_bits(params, z)[1][0, 1:], -math.log2(1e-9), rtol=1e-6
    )
    gradient = jax.jit(jax.grad(lambda p: mass_and_bits(p, z)[1].sum()))(params)
    assert all(np.isfinite(a).all() for a in gradient.values())
    assert any(a.any() for a in gradient.values())
