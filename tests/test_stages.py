# SPDX-License-Identifier: Apache-2.0
"""Stages: what they train, and by how much."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mini_config import get_config

from semlic_jax.model.compression import CompressionModel
from semlic_jax.objectives.losses import LossWeights, RateTarget
from semlic_jax.training import checkpoints
from semlic_jax.training.data import Photographs
from semlic_jax.training.programs import (
    codec_program,
    labeller_program,
    make_run,
)
from semlic_jax.training.settings import read_settings
from semlic_jax.training.sharding import make_mesh
from semlic_jax.training.sources import open_sources
from semlic_jax.training.stages import PARTS, Optimizer, Stage
from semlic_jax.training.steps import (
    Learner,
    codec_update,
    limited_sum,
    sample_quality,
)
from semlic_jax.training.train import initial_params

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def photographs(settings) -> Photographs:
    return Photographs(open_sources(settings.data.train), crop=settings.data.crop)


def test_stages_see_other_crops_than_each_other():
    settings = read_settings(get_config())
    seeds = [settings.stage_seed(name) for name in ("integer", "perceptual", "")]
    other = dataclasses.replace(settings, seed=1)
    seeds += [other.stage_seed(name) for name in ("integer", "perceptual", "")]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**31 for s in seeds)
    assert settings.stage_seed("integer") == 2065097007  # of every run and machine
    source = photographs(settings)
    first, second = (
        next(source.batches(0, 1, seed=seed, examples=range(2))) for seed in seeds[:2]
    )
    assert (first != second).any()


def test_a_model_without_texture_starts_without_its_layers(tmp_path, monkeypatch):
    """What they left behind would be exported, and refused by the loader."""
    config = get_config()
    config.init_from = str(tmp_path)
    config.architecture.texture_channels = 0
    plain = read_settings(config)
    config.architecture.texture_channels = 2
    textured = read_settings(config)
    init = CompressionModel(textured.model_config).init
    key, x = jax.random.key(0), jnp.zeros((1, 64, 64, 3))
    shapes = jax.eval_shape(init, key, x, jnp.zeros(1), key)["params"]
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    monkeypatch.setattr(checkpoints, "read_params", lambda folder: params)
    assert any(name.startswith("texture_") for name in params["g_s"])
    found = initial_params(plain, photographs(plain))
    assert not any(name.startswith("texture_") for name in found["g_s"])
    assert set(found["g_s"]) < set(params["g_s"])
    params["g_s"]["stray"] = np.zeros(3)
    with pytest.raises(
        ValueError, match="it has g_s/stray, which the model does not have"
    ):
        initial_params(plain, photographs(plain))


def test_the_learning_rate_warms_up_and_decays():
    optimizer = Optimizer(lr=1.0, warmup_steps=4, decay_steps=10, final_rate=0.1)
    rates = [float(optimizer.rate(jnp.asarray(step), 30)) for step in range(31)]
    np.testing.assert_allclose(rates[:5], [0.25, 0.5, 0.75, 1.0, 1.0])
    np.testing.assert_allclose(rates[25], 0.1 + 0.9 * 0.5, rtol=1e-5)
    np.testing.assert_allclose(rates[30], 0.1, rtol=1e-5)


def test_each_batch_covers_the_range_of_qualities():
    stage = Stage(name="x", steps=1, quality_low=0.2, quality_high=0.6)
    quality = np.asarray(sample_quality(stage, jax.random.key(1), 8))
    edges = 0.2 + 0.4 * np.arange(9) / 8
    assert (quality >= edges[:-1] - 1 / 255).all()
    assert (quality <= edges[1:] + 1 / 255).all()
    np.testing.assert_allclose(quality * 255, np.round(quality * 255), atol=1e-4)


@pytest.fixture(scope="module")
def adversarial():
    """A stage with all of its networks, and its state before and after a step."""
    config = get_config()
    config.perceptual.adversary.update(binary=False, split_batch=True)
    config.stages = ("labeller", "perceptual")
    settings = read_settings(config)
    run = make_run(settings, make_mesh(1, 1), None)
    stage = settings.records[1]
    params = initial_params(settings, photographs(settings))
    labeller = labeller_program(run, settings.records[0]).start()["params"]
    program = codec_program(run, stage, lambda: params, labeller)
    images = next(photographs(settings).batches(0, 1, seed=0, examples=range(4)))
    before = jax.tree.map(np.array, program.start())
    after, metrics = program.update(program.start(), 0, jnp.asarray(images))
    made = (program, images, run, labeller)
    return stage, before, jax.tree.map(np.array, after), metrics, made


def differs(a, b) -> bool:
    return any(
        (x != y).any()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_only_the_chosen_parts_learn(adversarial):
    _, before, after, _, _ = adversarial
    for part in PARTS:
        changed = differs(before["params"][part], after["params"][part])
        assert changed == (part == "g_s"), part
        changed = differs(before["average"][part], after["average"][part])
        assert changed == (part == "g_s"), part
    assert differs(before["discriminator"]["params"], after["discriminator"]["params"])


def test_the_discriminator_cannot_tell_by_quality(adversarial):
    """Qualities rise along a batch; each half of what it is left has seen all of it."""
    stage, before, _, _, (_, images, run, labeller) = adversarial
    update = jax.jit(codec_update(run.networks, stage, 0))
    state = jax.tree.map(jnp.asarray, dict(before))
    others = (run.trunk, state.pop("discriminator")["params"], labeller)
    first_half = set()
    for step in range(16):
        _, _, fakes = update(Learner(**state), step, images, *others)
        order = [
            int(np.argmin(np.abs(images - image).sum((1, 2, 3))))
            for image in np.asarray(fakes.images)
        ]
        assert sorted(order) == list(range(len(images)))
        np.testing.assert_array_equal(fakes.images, images[np.array(order)])
        first_half |= set(order[: len(order) // 2])
    assert first_half == set(range(len(images)))


@pytest.mark.parametrize("share", [0.25, 50.0])
def test_the_adversary_pulls_no_harder_than_its_share(share):
    rng = np.random.default_rng(0)
    x_hat, image, slope = (
        rng.standard_normal((2, 4, 4, 3)).astype(np.float32) for _ in range(3)
    )
    slope[1] *= 1e-3  # well below any share
    weights = LossWeights(charbonnier=2.0, adversarial=3.0)

    def closeness(x):
        return {"charbonnier": jnp.sum(jnp.square(x - image), (1, 2, 3))}

    def realism(x):
        return {"adversarial": jnp.sum(slope * x, (1, 2, 3))}

    def total(x):
        value, terms, kept = limited_sum(closeness, realism, weights, x, share)
        return jnp.sum(value), (value, terms, kept)

    gradient, (value, terms, kept) = jax.grad(total, has_aux=True)(x_hat)
    close, real = 2 * 2 * (x_hat - image), 3 * slope
    expected = 2 * closeness(x_hat)["charbonnier"] + 3 * realism(x_hat)["adversarial"]
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert set(terms) == {"charbonnier", "adversarial"}
    for i in range(2):
        bound = share * np.linalg.norm(close[i]) / np.linalg.norm(real[i])
        assert kept[i] == pytest.approx(min(bound, 1), rel=1e-5)
        pull = gradient[i] - close[i]
        np.testing.assert_allclose(pull, min(bound, 1) * real[i], atol=2e-5)
    assert (kept < 1).tolist() == [share < 1, False]


def test_averages_follow_by_their_decay(adversarial):
    stage, before, after, _, _ = adversarial
    for name in ("average", "params"):
        assert jax.tree.structure(before[name]) == jax.tree.structure(after[name])
    for mean, old, new in zip(
        *(
            jax.tree.leaves(tree["g_s"])
            for tree in (after["average"], before["average"], after["params"])
        ),
        strict=True,
    ):
        decay = stage.optimizer.ema
        np.testing.assert_allclose(mean, decay * old + (1 - decay) * new, atol=1e-6)


def test_metrics_are_the_terms_with_a_weight(adversarial):
    stage, _, _, metrics, _ = adversarial
    values = {name: float(value) for name, value in metrics.items()}
    terms = {"charbonnier", "adversarial"}
    assert terms <= set(values)
    assert not {"perceptual", "style", "structural"} & set(values)
    # Encoder and entropy model are frozen: the rate is no part of the loss.
    expected = values["charbonnier"] + stage.weights.adversarial * values["adversarial"]
    assert values["loss"] == pytest.approx(expected, rel=1e-5)
    for name in ("d_code_accuracy", "d_real_accuracy", "d_fake_accuracy"):
        assert 0 <= values[name] <= 1
    assert values["d_loss"] > 0 and values["bpp_low"] > 0


def test_a_step_repeats_exactly_and_steps_differ(adversarial):
    _, _, after, _, (program, images, *_) = adversarial
    again, _ = program.update(program.start(), 0, jnp.asarray(images))
    assert not differs(after, jax.tree.map(np.array, again))
    other, _ = program.update(program.start(), 1, jnp.asarray(images))
    assert differs(after["params"], jax.tree.map(np.array, other["params"]))


def test_pictures_are_of_each_quality(adversarial):
    _, _, _, _, (program, images, *_) = adversarial
    shown = program.show(program.start(), jnp.asarray(images))
    assert [picture.shape for picture in shown] == [(4, 64, 64, 3)] * 3
    assert differs(shown[0], shown[2])


def test_the_labeller_learns_and_uses_its_codes():
    config = get_config()
    config.stages = ("labeller",)
    settings = read_settings(config)
    run = make_run(settings, make_mesh(1, 1), None)
    program = labeller_program(run, settings.records[0])
    state, rows = program.start(), []
    data = photographs(settings)
    for step, images in enumerate(data.batches(0, 40, seed=0, examples=range(4))):
        state, metrics = program.update(state, step, jnp.asarray(images))
        rows.append({name: float(value) for name, value in metrics.items()})
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    assert rows[0]["dead_codes"] == 8  # all are moved onto embeddings at first
    assert np.mean([row["perplexity"] for row in rows[-10:]]) > 3
    assert float(jnp.sum(state["usage"])) == pytest.approx(1, abs=0.2)


def test_a_rate_target_switches_on_rounded_rates():
    target = RateTarget(bpp=0.2, lmbda_high=2.0, lmbda_low=0.1, warm_up_steps=10)
    stage = read_settings(
        get_config().to_dict()
        | {
            "stages": ("rate_distortion",),
            "rate_distortion": {
                "steps": 3,
                "rate_target": {
                    "bpp": 0.2,
                    "lmbda_high": 2.0,
                    "lmbda_low": 0.1,
                    "warm_up_steps": 10,
                },
            },
        }
    ).records[0]
    assert stage.rate_target == target
    np.testing.assert_allclose(
        target.lmbda(jnp.asarray([0.1, 0.25, 0.4]), jnp.asarray(3)), [0.1, 0.1, 1.0]
    )
