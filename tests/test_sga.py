# SPDX-License-Identifier: Apache-2.0
"""Relaxed rounding: limits, gradients, distributions, schedules."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semlic_jax.refinement.sga import (
    METHODS,
    draw_noise,
    relaxed_round,
    temperatures,
)

RANDOM = ("sga", "ssl", "linear", "cosine", "ssl3")
VALUES = jnp.concatenate(
    [jnp.linspace(-3.4, 3.4, 69), jnp.arange(-3.0, 4.0), jnp.array([1e-7, 0.49, 0.51])]
)


def sample(method, v, temperature, seed=0):
    keys = jax.random.split(jax.random.key(seed), 1)
    noise = draw_noise(method, keys, v.shape)[0]
    return relaxed_round(v, noise, jnp.float32(temperature), method)


@pytest.mark.parametrize("method", [*RANDOM, "ste", "deterministic"])
def test_low_temperatures_round(method):
    # At 0.3 or less from an integer the candidates' weights differ enough to win over
    # the noise at this temperature.
    v = jnp.arange(-2.0, 3.0)[:, None] + jnp.array([-0.3, -0.1, 0.0, 0.1, 0.3])
    np.testing.assert_allclose(sample(method, v, 0.02), jnp.round(v), atol=1e-3)


@pytest.mark.parametrize("method", RANDOM)
def test_high_temperatures_mix(method):
    """With equal weights a candidate is as likely as another, whatever its distance."""
    v = jnp.full((20_000,), 2.1)
    made = np.asarray(sample(method, v, 1e4))
    candidates = [1, 2, 3] if method == "ssl3" else [2, 3]
    # The mixture itself is even too.
    np.testing.assert_allclose(made, np.mean(candidates), atol=0.01)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("temperature", [0.02, 0.1, 1.0])
def test_gradients_are_finite(method, temperature):
    """Also where a value is an integer, where atanh and log have poles."""
    gradient = jax.grad(lambda v: jnp.sum(sample(method, v, temperature) ** 2))(VALUES)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("method", RANDOM)
def test_gradients_do_not_vanish(method):
    v = jnp.full((1000,), 0.4)
    gradient = jax.grad(lambda v: jnp.sum(sample(method, v, 0.5)))(v)
    assert float(jnp.mean(gradient)) > 0.1


@pytest.mark.parametrize("method", RANDOM)
def test_samples_stay_between_their_candidates(method):
    made = np.asarray(sample(method, VALUES, 0.5))
    reach = 1 if method == "ssl3" else 0
    low = np.round(VALUES) - 1 if reach else np.floor(VALUES)
    high = np.round(VALUES) + 1 if reach else np.floor(VALUES) + 1
    assert (made >= low - 1e-5).all() and (made <= high + 1e-5).all()


def weight(method, u):
    """The candidates' weights at temperature 1 as the papers write them."""
    a = 2.3
    return {
        "sga": np.exp(-np.arctanh(u)),
        "linear": 1 - u,
        "cosine": np.cos(np.pi * u / 2) ** 2,
        "ssl": 1 / (1 + np.exp(a * np.log(u / (1 - u)))),
    }[method]


@pytest.mark.parametrize("method", ["sga", "linear", "cosine", "ssl"])
@pytest.mark.parametrize("u", [0.1, 0.35, 0.8])
def test_candidates_are_as_likely_as_the_papers_say(method, u):
    """The share of samples nearer to the upper candidate, at temperature 1."""
    low, high = weight(method, u), weight(method, 1 - u)
    count = 40_000
    made = np.asarray(sample(method, jnp.full((count,), 5 + u), 1.0))
    share = (made > 5.5).mean()
    expected = high / (low + high)
    assert share == pytest.approx(expected, abs=4 * np.sqrt(0.25 / count))


def test_the_temperature_enters_twice():
    """SGA: weights to the power 1/T, and softmax((log-weights / T + noise) / T)."""
    u, temperature, count = 0.3, 0.5, 40_000
    weights = np.array([weight("sga", u), weight("sga", 1 - u)]) ** (1 / temperature)
    gumbel = np.random.default_rng(0).gumbel(size=(count, 2))
    exponents = (np.log(weights) + gumbel) / temperature
    mixture = np.exp(exponents - exponents.max(-1, keepdims=True))
    expected = np.sort(mixture[:, 1] / mixture.sum(-1))
    made = np.sort(np.asarray(sample("sga", jnp.full((count,), u), temperature)))
    np.testing.assert_allclose(made, expected, atol=0.02)


def test_noise_is_uniform_over_a_bin():
    made = np.asarray(sample("noise", jnp.full((10_000,), 0.25), 1.0)) - 0.25
    assert -0.5 <= made.min() < -0.49 and 0.49 < made.max() <= 0.5


def test_images_have_their_own_noise():
    keys = jax.random.split(jax.random.key(0), 3)
    both = draw_noise("sga", keys, (4, 5))
    np.testing.assert_array_equal(both[1:2], draw_noise("sga", keys[1:2], (4, 5)))
    assert not np.allclose(both[0], both[1])


def test_temperatures_of_sga():
    """Yang et al.: min(0.5 exp(-(t - 700) / 1000), 0.5) for 2000 steps."""
    t = np.arange(2000)
    expected = np.minimum(0.5 * np.exp(-1e-3 * (t - 700)), 0.5)
    found = temperatures(2000, 0.5, float(expected[-1]), 0.35)
    np.testing.assert_allclose(found, expected, rtol=2e-3)


def test_temperatures_end_where_they_should():
    found = temperatures(10, 1.0, 0.1, 0.0)
    assert found.dtype == np.float32 and found.shape == (10,)
    assert found[0] == 1.0 and found[-1] == pytest.approx(0.1)
    assert (np.diff(found) < 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 0.0, 0.1, 0.0), "above 0"),
        ((10, 1.0, -1.0, 0.0), "above 0"),
        ((10, 1.0, 0.1, 1.5), "hold"),
    ],
)
def test_bad_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        temperatures(*arguments)


def test_unknown_methods_are_refused():
    keys = jax.random.split(jax.random.key(0), 1)
    with pytest.raises(ValueError, match=r"'magic'.*sga"):
        draw_noise("magic", keys, (1,))


@pytest.mark.parametrize("offset", [0.0, 0.2, -0.4])
def test_three_candidates_have_the_weights_of_their_paper(offset):
    """SGA+: sigmoid(-a logit(r d / 1.5))^n with a = 1.4, n = 1.5 and r = 0.98.

    With a temperature T, the mixture is softmax((n log sigmoid / T + noise) / T).
    """
    distance = 0.98 * np.abs(offset - np.array([-1, 0, 1]))
    share = np.clip(distance / 1.5, 1e-5, 1 - 1e-5)
    weights = (1 / (1 + (share / (1 - share)) ** 1.4)) ** 1.5
    noise = np.random.default_rng(0).gumbel(size=(5, 3)).astype(np.float32)
    for temperature in (1.0, 0.5):
        exponents = (np.log(weights) / temperature + noise) / temperature
        mixture = np.exp(exponents)
        expected = 4 + (mixture @ [-1, 0, 1]) / mixture.sum(-1)
        v = jnp.full((5,), 4 + offset, jnp.float32)
        found = relaxed_round(v, noise, jnp.float32(temperature), "ssl3")
        np.testing.assert_allclose(found, expected, atol=2e-3)


def test_without_noise_the_mixture_is_that_of_the_weights():
    u, temperature = 0.3, 0.5
    low, high = (weight("sga", x) ** (1 / temperature) for x in (u, 1 - u))
    found = sample("deterministic", jnp.full((1,), 7 + u), temperature)
    np.testing.assert_allclose(found, 7 + high / (low + high), rtol=1e-4)
