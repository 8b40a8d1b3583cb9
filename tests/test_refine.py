# SPDX-License-Identifier: Apache-2.0
"""Refinement: budgets, the guard, gradients, seeds, interruption, settings."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refining import RELAXED as SETTINGS
from refining import SIZE, new_batch, squared_error
from small_trunk import load_small_trunk

from semlic_jax import refinement
from semlic_jax.refinement import fit
from semlic_jax.refinement import steps as steps_module
from semlic_jax.refinement.batch import Batch
from semlic_jax.refinement.steps import Schedule, State, soft_terms
from semlic_jax.refinement.symbols import Rounding

PLAIN = Rounding(np.zeros(1, np.float32))


@pytest.fixture(scope="module")
def refined(mini_codec, image):
    """A refinement that others are compared with."""
    return refinement.refine(mini_codec, image, quality=0.5, settings=SETTINGS)


def test_files_are_better_at_no_more_bytes(mini_codec, image, refined):
    assert len(refined.data) <= len(refined.unrefined)
    assert refined.value < 0.99 * refined.unrefined_value
    for data, value in (
        (refined.data, refined.value),
        (refined.unrefined, refined.unrefined_value),
    ):
        mse = squared_error(mini_codec, data, image)
        assert SETTINGS.alpha * mse == pytest.approx(value, rel=1e-4)


def test_they_are_ordinary_files(mini_codec, refined):
    info = mini_codec.info(refined.data)
    assert (info["height"], info["width"]) == SIZE
    assert info["model"] == mini_codec.name


@pytest.mark.parametrize("share", [0.6, 0.85, 1.0, 1.5])
def test_never_over_budget_and_never_worse(mini_codec, image, share):
    """Also where the budget is not what a quality gives, and with hardly any steps."""
    smallest = len(mini_codec.compress(image, quality=0))
    largest = len(mini_codec.compress(image, quality=1))
    budget = round(smallest + share * (largest - smallest))
    settings = dataclasses.replace(SETTINGS, steps=3)
    found = refinement.refine(mini_codec, image, max_bytes=budget, settings=settings)
    assert len(found.data) <= budget
    assert found.value <= found.unrefined_value


def test_harm_is_not_passed_on(mini_codec, image):
    """Steps that ruin the latents leave the file without refinement."""
    ruinous = dataclasses.replace(SETTINGS, steps=10, learning_rate=30.0)
    found = refinement.refine(mini_codec, image, quality=0.5, settings=ruinous)
    assert found.value <= found.unrefined_value
    assert len(found.data) <= len(found.unrefined)


def test_the_same_seed_gives_the_same_file(mini_codec, image, refined):
    again = refinement.refine(mini_codec, image, quality=0.5, settings=SETTINGS)
    assert again.data == refined.data
    other = dataclasses.replace(SETTINGS, seed=1)
    found = refinement.refine(mini_codec, image, quality=0.5, settings=other)
    assert found.history != refined.history


def test_stopping_keeps_the_best_so_far(mini_codec, image, refined):
    seen = []

    def stop(now):
        seen.append(now)
        return False

    found = refinement.refine(
        mini_codec, image, quality=0.5, settings=SETTINGS, progress=stop
    )
    assert [now.step for now in seen] == [10] and seen[0].steps == 40
    assert found.steps == 10 and refined.steps == 40
    assert found.value <= found.unrefined_value
    assert len(found.data) <= len(found.unrefined)
    # What was shown is what the rounded latents cost and give.
    assert found.history == refined.history[:1]
    assert found.history[0]["bpp"] == pytest.approx(seen[0].bpp[0])


def test_the_front_door(mini_codec, image):
    data = mini_codec.compress(image, quality=0.5, refine=SETTINGS, roi=None)
    assert data == mini_codec.compress(image, quality=0.5, refine=SETTINGS)
    with pytest.raises(ValueError, match="needs refine"):
        mini_codec.compress(image, quality=0.5, roi="auto")
    with pytest.raises(ValueError, match="uint8"):
        mini_codec.compress(image / 255, quality=0.5, refine=SETTINGS, roi="auto")


def test_rates_in_the_scan_are_those_of_the_coder(codec, photograph):
    """With every context network, on latents that were moved off their places."""
    image = photograph(120, 128)
    settings = refinement.preset(1, gamma=0.0)
    unrefined = codec.compress(image, quality=0.9)
    made = Batch(
        codec, settings, [image], [len(unrefined)], [None], [None], [unrefined]
    )
    rng = np.random.default_rng(0)
    y_scaled, z = (
        x + 0.4 * rng.standard_normal(x.shape).astype(np.float32) for x in made.start
    )
    terms, y_hat = fit.score(made.frozen, made.images, made.weights, PLAIN, y_scaled, z)
    bits = float(terms.bpp[0]) * image.shape[0] * image.shape[1]
    level, size = made.jobs[0].level, made.jobs[0].size
    symbols = codec.entropy.symbols(
        np.asarray(y_hat[0]), np.round(np.asarray(z[0])), level, size
    )
    assert bits == pytest.approx(codec.entropy.ideal_bits(symbols, size), rel=1e-5)
    payload = codec.entropy.encode(symbols, size)
    assert 8 * len(payload) == pytest.approx(bits, rel=0.005)


@pytest.fixture(scope="module")
def settled(mini_codec, image):
    """A batch with its rounded latents and their terms."""
    made = new_batch(mini_codec, image, SETTINGS)
    terms, y_hat = fit.score(
        made.frozen,
        made.images,
        made.weights,
        PLAIN,
        *made.start,
    )
    return made, jnp.asarray(y_hat), jnp.round(made.start[1]), terms


def test_low_temperatures_recover_hard_rounding(settled):
    """At 0.2 from their values, latents settle on them; the density is the table."""
    made, y_hat, z_hat, hard = settled
    soft = jax.jit(soft_terms)(
        made.frozen,
        made.images,
        made.weights,
        y_hat + 0.2,
        z_hat - 0.2,
        made.rng,
        jnp.float32(0.01),
        jnp.int32(0),
    )
    np.testing.assert_allclose(soft.mse, hard.mse, rtol=1e-4)
    np.testing.assert_allclose(soft.bpp, hard.bpp, rtol=0.03)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_gradients_are_finite_on_the_grid(settled, temperature):
    """One real step from latents that are where the coder would put them."""
    made, y_hat, z_hat, _ = settled
    schedule = Schedule(
        np.zeros(1, np.int32),
        np.full(1, temperature, np.float32),
        np.full(1, 0.01, np.float32),
        np.zeros(1, np.int32),
    )
    gradients = []
    for offset in (0.0, 0.4):
        latents = (y_hat + offset, z_hat + offset)
        zeros = [jax.tree.map(jnp.zeros_like, latents) for _ in range(2)]
        state, terms = steps_module.run_steps(
            made.frozen,
            made.images,
            made.weights,
            made.target,
            made.rng,
            State(latents, *zeros, jnp.copy(made.log_beta)),
            schedule,
        )
        for leaf in jax.tree.leaves((state, terms)):
            assert np.isfinite(np.asarray(leaf)).all()
        gradients.append(max(np.abs(leaf).max() for leaf in state.first))
    # On the grid itself hardly anything moves, between its points everything does.
    assert gradients[1] > gradients[0]


def test_perceptual_terms_count(mini_codec, image):
    settings = refinement.preset(
        20, alpha=0.0, gamma=1.0, style=0.1, features=load_small_trunk()
    )
    found = refinement.refine(mini_codec, image, quality=0.5, settings=settings)
    assert found.value < found.unrefined_value
    assert len(found.data) <= len(found.unrefined)


def test_first_steps_of_adam_are_of_the_learning_rate():
    """Whatever the gradient's size: its moments start from 0, and this is undone."""
    y, z = jnp.zeros((1, 2, 2, 3)), jnp.zeros((1, 1, 1, 2))
    state = State((y, z), (y, z), (y, z), jnp.zeros(1))
    gradient = (y + 1e-3, z - 50.0)
    for step in range(3):
        now = Schedule(step, 0.5, 0.01, 0)
        latents, first, second = steps_module._adam(state, gradient, now)
        state = State(latents, first, second, state.log_beta)
        np.testing.assert_allclose(latents[0], -0.01 * (step + 1), rtol=1e-3)
        np.testing.assert_allclose(latents[1], 0.01 * (step + 1), rtol=1e-3)


def test_learning_rates_fall_at_the_end_alone():
    def rates(decay):
        settings = dataclasses.replace(SETTINGS, learning_rate=0.1, decay=decay)
        return settings.learning_rates()

    found = rates(0.3)  # of 40 steps: the last 12
    np.testing.assert_allclose(found[:28], 0.1, rtol=1e-6)
    assert (np.diff(found[27:]) < 0).all() and 0 < found[-1] < 0.001
    assert found[28:].mean() == pytest.approx(0.05, rel=1e-3)
    np.testing.assert_allclose(rates(0.0), 0.1, rtol=1e-6)


def test_whole_numbers_are_the_same_settings():
    assert repr(refinement.preset(gamma=0)) == repr(refinement.preset(gamma=0.0))
    assert type(refinement.preset(beta=np.float32(2)).beta) is float


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(steps=0), "steps of at least 1, found 0"),
        (dict(alpha=-1.0), "alpha of at least 0, found -1"),
        (dict(gamma=-0.5), "gamma of at least 0, found -0.5"),
        (dict(gamma=float("nan")), "gamma of at least 0, found nan"),
        (dict(beta=0.0), "beta above 0"),
        (dict(alpha=0.0, gamma=0.0), "alpha or gamma of at least 1e-12, found 0 and 0"),
        (dict(alpha=1e-46, gamma=0), "alpha or gamma of at least .* found 1e-46 and 0"),
        (
            dict(method="magic"),
            "unknown rounding method 'magic': expected one of .*newton",
        ),
        (dict(dtype="int8"), "float32 or bfloat16"),
        (dict(temperature_end=0.0), "temperature_end from 1e-06 to 1e"),
        (dict(temperature_end=1e-46), "temperature_end from .*, found 1e-46"),
        (dict(temperature_start=float("nan")), "temperature_start from .*, found nan"),
        (dict(probes=0), "probes of at least 1, found 0"),
        (dict(kappa=0.0), "kappa above 0, found 0"),
        (dict(kappa=float("inf")), "kappa from .* to .*, found inf"),
        (dict(trust_start=0.0), "trust_start above 0 and at most 1, found 0"),
        (dict(trust_end=1.5), "trust_end above 0 and at most 1, found 1.5"),
        (dict(trust_rise=-0.1), "trust_rise of at least 0, found -0.1"),
        (dict(trust_rise=1.5), "trust_rise of at most 1, found 1.5"),
        (dict(noise=-1.0), "noise of at least 0, found -1"),
        (dict(z_travel=-0.1), "z_travel of at least 0, found -0.1"),
        (dict(newton_integral=-1.0), "newton_integral of at least 0, found -1"),
        (dict(integral=-1.0), "integral of at least 0, found -1"),
        (dict(proportional=float("nan")), "proportional of at least 0, found nan"),
        (dict(alpha=1e39), r"alpha of at most 1e\+12, found 1e\+39"),
        (dict(kappa=1e39), r"kappa from .* to 1e\+12, found 1e\+39"),
        (dict(beta=1e-60), "beta from .* to .*, found 1e-60"),
        (dict(decay=1.5), "decay from 0 to 1, found 1.5"),
        (dict(decay=float("nan")), "decay from 0 to 1, found nan"),
        (dict(overshoot=-1.0), "overshoot above -1 and at most 10, found -1"),
        (dict(overshoot=float("inf")), "overshoot above -1 and at most 10, found inf"),
        (dict(gamma="0.5"), "a number as gamma, found '0.5'"),
        (dict(trust_end=[1, 2]), r"a number as trust_end, found \[1, 2\]"),
        (dict(gamma=10**400), "a number as gamma, found 1000"),
        (dict(steps=2.5), "a whole number as steps, found 2.5"),
        (dict(chunk_steps=float("nan")), "a whole number as chunk_steps, found nan"),
        (dict(probes=2.5), "a whole number as probes, found 2.5"),
        (dict(seed=1.5), "a whole number as seed, found 1.5"),
        (dict(seed=-1), "a seed from 0 to 4294967295, found -1"),
        (dict(seed=2**32), "a seed from 0 to 4294967295, found 4294967296"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        refinement.preset("default", **changes)


def test_presets():
    steps = [refinement.preset(name).steps for name in ("fast", "default", "best")]
    assert steps == sorted(steps) and len(set(steps)) == 3
    assert refinement.preset(7).steps == 7
    assert refinement.preset(np.int64(7)) == refinement.preset(7)
    with pytest.raises(ValueError, match="whole number as steps, found 7.5"):
        refinement.preset(7.5)
    # Relaxed rounding takes more steps, unless their number is said.
    relaxed = refinement.preset("fast", method="sga")
    assert relaxed.method == "sga" and relaxed.steps > 3 * steps[0]
    assert refinement.preset("fast", method="sga", steps=None) == relaxed
    assert refinement.preset("fast", method="newton").steps == steps[0]
    assert refinement.preset("fast", method="sga", steps=4).steps == 4
    assert refinement.preset(7, method="sga").steps == 7
    # Files of a relaxed rounding depend on how often it is looked at.
    for name in ("fast", 7):
        chunk = refinement.preset(name, method="sga").chunk_steps
        assert (
            chunk
            == refinement.Settings.chunk_steps
            > refinement.preset(name).chunk_steps
        )
    assert refinement.preset("fast", alpha=None) == refinement.preset("fast")
    with pytest.raises(ValueError, match=r"preset \(fast, default, best\).*'slow'"):
        refinement.preset("slow")


def test_unreachable_budgets_are_refused(mini_codec, image):
    with pytest.raises(ValueError, match="expected a budget from .* found 20 bytes"):
        refinement.refine(mini_codec, image, max_bytes=20, settings=SETTINGS)


def test_missing_feature_weights_are_refused(mini_codec, image, tmp_path):
    settings = refinement.preset(5, gamma=1.0, features=str(tmp_path))
    with pytest.raises(ValueError, match="feature weights.*gamma 0"):
        refinement.refine(mini_codec, image, quality=0.5, settings=settings)
