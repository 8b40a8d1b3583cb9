# SPDX-License-Identifier: Apache-2.0
"""What a step of training minimises, and how a stage begins and ends."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from counting_run import counting_program, run_counting
from mini_config import get_config

from semlic_jax.objectives.losses import LossWeights, RateTarget
from semlic_jax.training import steps
from semlic_jax.training import train as training_program
from semlic_jax.training.stages import Optimizer, Stage, make_optimizer


def updates_of(optimizer, params, *gradients):
    """What each step adds to the parameters."""
    made = make_optimizer(optimizer, 100)
    state, found = made.init(params), []
    for gradient in gradients:
        updates, state = made.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        found.append(updates)
    return found


def test_steps_are_those_of_adam_with_clipped_gradients():
    optimizer = Optimizer(lr=0.1, warmup_steps=1, beta1=0.5, beta2=0.9, clip_norm=2.0)
    gradients = [np.array([0.3, 0.4]), np.array([30.0, 40.0])]
    found = updates_of(
        optimizer, {"w": jnp.ones(2)}, *({"w": jnp.asarray(g)} for g in gradients)
    )
    first = second = 0.0
    clipped = [gradients[0], gradients[1] * 2 / 50]
    for step, (gradient, update) in enumerate(zip(clipped, found, strict=True), 1):
        first = 0.5 * first + 0.5 * gradient
        second = 0.9 * second + 0.1 * gradient**2
        root = np.sqrt(second / (1 - 0.9**step))
        expected = -0.1 * first / (1 - 0.5**step) / root
        np.testing.assert_allclose(update["w"], expected, rtol=1e-4)


def test_parts_have_their_own_rates_and_weights_decay():
    params = {
        "log_gain": jnp.ones(()),
        "prior": {"a": jnp.ones(())},
        "g_a": {"skip": jnp.ones(()), "skip_lapping": jnp.ones(()), "c": jnp.ones(())},
    }
    options = dict(lr=0.01, warmup_steps=1)
    gradient = jax.tree.map(jnp.ones_like, params)
    [found] = updates_of(Optimizer(**options), params, gradient)
    of_network = found["g_a"]["c"]
    np.testing.assert_allclose(of_network, -0.01, rtol=1e-4)
    np.testing.assert_allclose(found["log_gain"], 4 * of_network, rtol=1e-4)
    np.testing.assert_allclose(found["prior"]["a"], 4 * of_network, rtol=1e-4)
    for name in ("skip", "skip_lapping"):
        np.testing.assert_allclose(found["g_a"][name], 0.05 * of_network, rtol=1e-4)
    none = jax.tree.map(jnp.zeros_like, params)
    [found] = updates_of(Optimizer(**options, weight_decay=0.5), params, none)
    np.testing.assert_allclose(found["g_a"]["c"], -0.01 * 0.5, rtol=1e-4)


# ---------------------------------------------------------------------- updates


class OneNumber:
    """A codec of two numbers: `b` bits for each image, and `w` times the image."""

    def __init__(self):
        self.arithmetics = []

    def clone(self, arithmetic):
        self.arithmetics.append(arithmetic)
        return self

    def apply(self, variables, images, quality, noise_rng):
        params = variables["params"]
        y_bits = jnp.full(len(images), 3.0) * params["prior"]["b"]
        rate = SimpleNamespace(y_bits=y_bits, z_bits=jnp.full(len(images), 1.0))
        rounded = SimpleNamespace(y_bits=jnp.array([3.0, 64.0, 3.0]), z_bits=0.0)
        return SimpleNamespace(
            x_hat=images * params["g_s"]["w"],
            y_hat=images,
            rate=rate,
            rounded_rate=rounded,
        )


def test_the_loss_is_the_balanced_sum_of_terms_and_bits_per_pixel(monkeypatch):
    zooms = []

    def terms(images, x_hat, weights, trunk, rng, zoom):
        zooms.append(zoom)
        return {"perceptual": jnp.mean((images - x_hat) ** 2, (1, 2, 3))}

    monkeypatch.setattr(steps, "reconstruction_terms", terms)
    stage = Stage(
        name="x",
        steps=10,
        arithmetic="fake",
        trained=("g_s", "prior"),
        lmbda_low=16.0,
        lmbda_high=1.0,
        balance=0.5,
        zoom=0.25,
        weights=LossWeights(charbonnier=0.0, perceptual=2.0),
    )
    model = OneNumber()
    networks = steps.Networks(model=model)
    params = {"g_s": {"w": jnp.array(0.5)}, "prior": {"b": jnp.array(1.0)}}
    learner = steps.new_learner(params, stage.optimizer, stage.steps)
    images = jnp.ones((3, 4, 8, 3))
    update = steps.codec_update(networks, stage, 0)
    _, metrics, fakes = update(learner, jnp.int32(0), images, None, None, None)
    quality_rng, *_ = jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 3)
    lmbda = 16.0 ** (1 - np.asarray(steps.sample_quality(stage, quality_rng, 3)))
    expected = (2 * 0.25 + lmbda * 4 / 32) * (lmbda / 4) ** -0.5
    assert float(metrics["loss"]) == pytest.approx(expected.mean(), rel=1e-5)
    assert float(metrics["z_bpp"]) == pytest.approx(1 / 32)
    assert fakes is None and zooms == [0.25] and model.arithmetics == ["fake"]


def test_a_rate_target_weights_each_image_by_its_rounded_rate():
    target = RateTarget(bpp=0.2, lmbda_high=2.0, lmbda_low=0.1, warm_up_steps=10)
    stage = Stage(name="x", steps=99, trained=("prior",), rate_target=target)
    networks = steps.Networks(model=OneNumber())
    params = {"g_s": {"w": jnp.array(1.0)}, "prior": {"b": jnp.array(1.0)}}
    learner = steps.new_learner(params, stage.optimizer, stage.steps, stage.trained)
    images = jnp.ones((3, 4, 8, 3))
    update = steps.codec_update(networks, stage, 0)
    _, metrics, _ = update(learner, jnp.int32(50), images, None, None, None)
    expected = float(metrics["charbonnier"]) + np.mean([0.1, 2.0, 0.1]) * 4 / 32
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)


def test_rows_tell_the_ends_of_the_range_of_qualities_apart():
    bits = jnp.array([1.0, 2.0, 3.0]) * 16
    images = jnp.zeros((3, 4, 4, 3))
    x_hat = images + jnp.array([3.0, 0.5, 0.1])[:, None, None, None]
    rate = SimpleNamespace(y_bits=bits, z_bits=0 * bits)
    found = steps._by_quality(images, SimpleNamespace(rate=rate, x_hat=x_hat))
    assert [float(found[f"bpp_{part}"]) for part in ("low", "mid", "high")] == [1, 2, 3]
    errors = [float(found[f"mse_{part}"]) for part in ("low", "mid", "high")]
    assert errors == pytest.approx([1.0, 0.25, 0.01])  # of pictures, which are clipped


def test_the_accuracies_of_the_discriminator():
    """Class 0 is fake; code c is class c + 1."""
    guesses = jnp.array([[[2, 2, 1, 0]], [[0, 0, 0, 1]]])  # of an original, of a fake
    discriminator = SimpleNamespace(
        feature_channels=0,
        apply=lambda variables, *_: (
            variables["params"]["w"] * jax.nn.one_hot(guesses, 3)
        ),
    )
    stage = Stage(name="x", steps=1, weights=LossWeights(adversarial=1.0))
    networks = steps.Networks(model=None, discriminator=discriminator)
    optimizer = stage.adversary.optimizer
    learner = steps.new_learner({"w": jnp.array(1.0)}, optimizer, 1)
    images = jnp.zeros((1, 8, 32, 3))
    fakes = steps.Fakes(images, images, images, jnp.array([[[1, 0, 0, 1]]]))
    after, metrics = steps.discriminator_update(networks, stage)(learner, fakes, None)
    assert float(metrics["d_code_accuracy"]) == 0.5
    assert float(metrics["d_real_accuracy"]) == 0.75
    assert float(metrics["d_fake_accuracy"]) == 0.75
    # It learns by its own optimizer: the first step of Adam is as long as its rate.
    moved = abs(float(after.params["w"]) - 1)
    assert moved == pytest.approx(float(optimizer.rate(0, 1)), rel=0.1)


# --------------------------------------------------------------------- the loop


def test_a_stage_ends_in_its_average_and_keeps_its_last_checkpoints(tmp_path):
    plain = counting_program()

    def update(state, step, images):
        state, metrics = plain.update(state, step, images)
        return {**state, "average": {"n": state["params"]["n"] / 2}}, metrics

    program = plain._replace(update=update)
    changes = {"checkpoint_steps": 2, "keep_checkpoints": 3}
    assert run_counting(tmp_path, program, **changes) == {"n": 5.0}
    kept = [path.name for path in (tmp_path / "perceptual").iterdir()]
    assert sorted(int(name) for name in kept if name.isdigit()) == [6, 8, 10]


def test_every_setting_of_the_data_is_taken(tmp_path, monkeypatch):
    taken = {}

    def stop(source, **options):
        taken.update(options)
        raise ValueError("stop here")

    monkeypatch.setattr(training_program, "Photographs", stop)
    config = get_config()
    config.data.update(
        train=("synthetic:3",),
        crop=128,
        small_images="reflect",
        smallest_scale=0.5,
        largest_scale=3.0,
        cache_mb=7,
    )
    with pytest.raises(ValueError, match="stop here"):
        training_program.train(config, tmp_path)
    assert taken == dict(
        crop=128,
        small_images="reflect",
        smallest_scale=0.5,
        largest_scale=3.0,
        cache_bytes=7 * 2**20,
    )


def test_each_stage_starts_where_the_one_before_ended(tmp_path, monkeypatch):
    started = []

    def codec_program(run, stage, begin, labeller):
        started.append(begin())
        return stage.name

    def run_program(run, stage, program, *rest):
        return f"the end of {program}"

    monkeypatch.setattr(training_program, "codec_program", codec_program)
    monkeypatch.setattr(training_program, "run_program", run_program)
    monkeypatch.setattr(training_program, "initial_params", lambda *_: "fresh")
    config = get_config()
    config.stages = ("perceptual", "integer")
    config.perceptual.weights.adversarial = 0.0
    trained = training_program.train(config, tmp_path)
    assert started == ["fresh", "the end of perceptual"]
    assert trained == {"codec": "the end of integer"}
