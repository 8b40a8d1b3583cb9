# SPDX-License-Identifier: Apache-2.0
"""Single Newton steps: what they keep, the choice of symbols, gradients, bounds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refining import NEWTON as SETTINGS
from refining import SIZE, fixed, new_batch

from semlic_jax.model.context import checkerboard
from semlic_jax.refinement import fit, newton
from semlic_jax.refinement.steps import Target, rate_excess
from semlic_jax.refinement.symbols import Rounding, chosen_symbols, hard_latents


@pytest.fixture(scope="module")
def batch(mini_codec, photograph):
    """Of an image without latents in the last row."""
    return new_batch(mini_codec, photograph(SIZE[0] - 16, SIZE[1], seed=3))


def test_the_best_is_kept_as_it_was(batch, monkeypatch):
    """Each improvement is within the budget, and worth what the state says."""
    stepper, values = batch.stepper(), []
    for _ in range(SETTINGS.steps):
        stepper(1)
        best = stepper.state.best
        values.append(float(best.value[0]))
        if np.isfinite(values[-1]):
            rounding = Rounding(jnp.zeros(1), best.stiffness)
            terms, _ = fit.score(*fixed(batch), rounding, *best.latents)
            assert float(terms.value[0]) == pytest.approx(values[-1], rel=1e-5)
            assert terms.bpp[0] <= batch.target.bpp[0] * (1 + 1e-6)
    assert values[0] == np.inf  # noise in the choice of symbols
    assert values == sorted(values, reverse=True) and len(set(values)) > 2
    # Rounded as then, not as today's latents are; they give way where they are worse.
    state, (y, z) = stepper.state, stepper.state.latents
    kept = batch.keep_within_budget(state._replace(latents=(y + 0.5, z)))
    assert kept.value[0] == pytest.approx(values[-1], rel=1e-5)
    np.testing.assert_array_equal(batch.best[0], state.best.latents[0])
    np.testing.assert_array_equal(batch.best_rounding.stiffness, state.best.stiffness)
    # And an early one to later ones, even where these are just beyond the budget.
    bpp = batch.score(state.latents, batch.images, batch._rounding(state)).bpp
    near = batch.target._replace(bpp=bpp / 1.001)
    monkeypatch.setattr(batch, "target", near)
    early = state.best._replace(
        latents=batch.start, value=jnp.full(1, 1e9), stiffness=0.01 * state.curvature
    )
    batch.keep_within_budget(state._replace(best=early))
    np.testing.assert_array_equal(batch.best[0], y)


# The choice of symbols.


@pytest.fixture(scope="module")
def latents():
    """Offsets from means, indexes of tables: each [1, 8, 8, 24]."""
    rng = np.random.default_rng(1)
    shape = (1, 8, 8, 24)
    v = rng.uniform(-2.45, 2.45, shape).astype(np.float32)
    return v, rng.integers(0, 64, shape).astype(np.float32)


def test_symbols_are_those_of_least_cost(batch, latents):
    """Within reach: up to 2 every whole number towards zero is a candidate."""
    v, index = latents
    y_bits = np.asarray(batch.frozen.y_bits)
    radius = y_bits.shape[1] // 2
    rng = np.random.default_rng(2)
    stiff = np.exp(rng.uniform(-2, 4, v.shape)).astype(np.float32)
    rounding = Rounding(jnp.zeros(1), jnp.asarray(stiff))
    parts = []
    for channels in (slice(0, 8), slice(8, 24)):
        part = v[..., channels], index[..., channels]
        made = chosen_symbols(*part, channels, rounding, batch.frozen.y_bits)
        assert made.dtype == np.float32
        parts.append(np.asarray(made))
    found = np.concatenate(parts, -1)
    every = np.arange(-radius, radius + 1)
    costs = stiff[..., None] / 2 * (every - v[..., None]) ** 2
    costs = costs + y_bits[index.astype(int)]
    least = every[np.argmin(costs, -1)]
    taken = np.take_along_axis(costs, (found[..., None] + radius).astype(int), -1)
    np.testing.assert_allclose(taken[..., 0], costs.min(-1), rtol=1e-5)
    assert (found == least).mean() > 0.999
    assert 0.1 < (found == np.round(v)).mean() < 0.9


def test_an_offset_is_the_cost_of_the_neighbour(batch, latents):
    v, index = latents
    rounding = Rounding(jnp.zeros(1), jnp.full(v.shape, 2.0))

    def choose(offset):
        return np.asarray(
            chosen_symbols(
                v,
                index,
                slice(None),
                rounding,
                batch.frozen.y_bits,
                jnp.full(v.shape, offset),
            )
        )

    plain = chosen_symbols(v, index, slice(None), rounding, batch.frozen.y_bits)
    np.testing.assert_array_equal(choose(0.0), plain)
    nearest = np.round(v)
    neighbour = nearest - np.where(nearest == 0, -np.sign(v), np.sign(nearest))
    np.testing.assert_array_equal(choose(-1e3), neighbour)
    # Zero costs what it costs.
    assert set(np.unique(choose(1e3) - nearest)) <= {-2, -1, 0, 1, 2}
    assert ((choose(1e3) == nearest) | (choose(1e3) == 0)).all()


@pytest.mark.parametrize("zone", [-0.2, 0.0, 0.3])
def test_without_stiffness_there_is_a_dead_zone(batch, latents, zone):
    v, index = latents
    found = chosen_symbols(
        v, index, slice(None), Rounding(jnp.full(1, zone)), batch.frozen.y_bits
    )
    whole, rest = np.divmod(np.abs(v), 1)
    wanted = np.sign(v) * (whole + (rest > 0.5 + zone))
    clear = np.abs(rest - 0.5 - zone) > 1e-4
    np.testing.assert_array_equal(np.asarray(found)[clear], wanted[clear])


def test_strictness_lowers_the_rate(batch):
    batch.run(None)
    rates = [
        float(
            fit.score(*fixed(batch), batch._rounding_at(np.array([s])), *batch.best)[
                0
            ].bpp[0]
        )
        for s in (-0.2, -0.1, 0.0, 0.1, 0.45)
    ]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.9 * rates[0]
    # At 0 they are as the refinement left them.
    assert rates[2] == pytest.approx(batch.history[-1]["bpp"][0], rel=1e-6)


# One step.


@pytest.fixture(scope="module")
def rounding(batch):
    y, _ = batch.start
    stiff = np.exp(np.random.default_rng(0).uniform(-1, 2, y.shape))
    return Rounding(jnp.zeros(1), jnp.asarray(stiff, jnp.float32))


hard_step_terms = jax.jit(newton.hard_step_terms)


def test_rates_in_the_step_are_those_of_the_coder(batch, rounding):
    y, z = batch.start
    terms, y_hat, bits = hard_step_terms(
        *fixed(batch), y, z, rounding, jnp.zeros_like(y), jnp.int32(0)
    )
    frozen, images, _ = fixed(batch)
    hard_bits, hard_y_hat = jax.jit(hard_latents)(frozen, images, rounding, y, z)
    np.testing.assert_allclose(y_hat, hard_y_hat, atol=1e-5)
    assert float(bits[0]) == pytest.approx(float(hard_bits[0]), rel=1e-6)
    hard, _ = fit.score(*fixed(batch), rounding, y, z)
    assert float(terms.value[0]) == pytest.approx(float(hard.value[0]), rel=1e-5)
    # The densities are about those of the tables.
    assert float(terms.bpp[0]) == pytest.approx(float(hard.bpp[0]), rel=0.05)


def test_latents_answer_for_the_bits_of_later_ones(batch, rounding):
    y, z = batch.start

    def rate(y, z):
        terms, _, _ = newton.hard_step_terms(
            *fixed(batch), y, z, rounding, jnp.zeros_like(y), jnp.int32(0)
        )
        return jnp.sum(terms.bpp)

    to_y, to_z = jax.jit(jax.grad(rate, (0, 1)))(y, z)
    start, stop = batch.codec.config.groups[0], y.shape[-1]
    to_y = np.asarray(to_y)[0]
    # What is coded last changes nothing but its own bits.
    second = checkerboard(*y.shape[1:3], 1)[..., 0]
    np.testing.assert_array_equal(to_y[second, start:stop], 0)
    inside = np.zeros(second.shape, bool)
    inside[:-1] = True
    assert (to_y[inside & ~second, :start] != 0).mean() > 0.9
    assert (to_y[inside & ~second, start:stop] != 0).mean() > 0.9
    np.testing.assert_array_equal(to_y[~inside], 0)
    assert (np.asarray(to_z) != 0).any()


@pytest.mark.parametrize("offset", [0.0, 0.4])
def test_steps_are_finite(batch, offset):
    """From latents that are where the coder would put them, and between."""
    plain = Rounding(jnp.zeros(1))
    _, y_hat = fit.score(*fixed(batch), plain, *batch.start)
    state = batch.stepper().state
    latents = (y_hat + offset, jnp.round(batch.start[1]) + offset)
    schedule = newton.make_schedule(SETTINGS)
    part = newton.Schedule(*(values[-1:] for values in schedule))
    target = batch.target._replace(bpp=batch.target.bpp / 2)
    log_beta = np.asarray(state.log_beta)
    made, terms = newton.run_steps(
        *fixed(batch), target, batch.rng, state._replace(latents=latents), part
    )
    for leaf in jax.tree.leaves((made._replace(best=made.best.latents), terms)):
        assert np.isfinite(np.asarray(leaf)).all()
    # Too many bits: they become dearer, and these latents are not kept.
    assert made.log_beta[0] > log_beta[0] + 0.1
    assert made.best.value[0] == np.inf


def test_steps_are_short_where_the_curvature_is_far_too_small(batch):
    state = batch.stepper().state
    state = state._replace(curvature=1e-4 * state.curvature)
    stiffness = newton.stiffness(
        state.curvature, state.log_beta, batch.images, SETTINGS.kappa
    )
    rounding = Rounding(jnp.zeros(1), stiffness)
    _, y_hat = fit.score(*fixed(batch), rounding, *state.latents)
    schedule = newton.make_schedule(SETTINGS)
    part = newton.Schedule(*(values[-1:] for values in schedule))
    part = part._replace(trust=np.ones(1, np.float32))
    assert part.temperature[0] == 0
    made, _ = newton.run_steps(*fixed(batch), batch.target, batch.rng, state, part)
    farthest = np.abs(np.asarray(made.latents[0] - y_hat))
    assert farthest.max() == pytest.approx(1.0, abs=1e-4)
    assert (farthest > 0.999).mean() > 0.1


def test_a_step_changes_multiplier_and_z_within_bounds():
    """The multiplier rises above the target and falls below; z moves by few rates."""
    y, z = jnp.zeros((3, 1, 1, 2)), jnp.zeros((3, 4, 5, 5))
    state = newton.State((y, z), z, z, jnp.ones_like(y), jnp.zeros(3), None)
    now = newton.Schedule(0, 1.0, 0.0, 0.5, 0.1, 0)
    target = Target(jnp.full(3, 2.0), jnp.ones(3), jnp.float32(3), jnp.float32(0))
    excess = rate_excess(jnp.array([2.2, 1.8, 20.0]), target)
    np.testing.assert_allclose(excess, [np.log(1.1), np.log(0.9), 0.3], rtol=1e-5)
    gradient = z.at[:, 0, 0, 0].set(7.0)  # ten times the root mean square
    found = newton.moved(state, now, (y, gradient), y, excess, target.integral)
    np.testing.assert_allclose(found.log_beta, 3 * np.asarray(excess), rtol=1e-5)
    np.testing.assert_allclose(found.latents[1][:, 0, 0, 0], -0.1 * 4.0, rtol=1e-5)
    assert np.count_nonzero(found.latents[1]) == 3
    even = newton.moved(state, now, (y, z + 7), y, excess, target.integral)
    np.testing.assert_allclose(even.latents[1], -0.1, rtol=1e-5)
