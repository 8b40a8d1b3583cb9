# SPDX-License-Identifier: Apache-2.0
"""Refinement by Newton steps: budgets, seeds, trunks, regions, schedules."""

from __future__ import annotations

import dataclasses
import os

import jax
import numpy as np
import pytest
from PIL import Image
from refining import NEWTON as SETTINGS
from refining import PERCEPTUAL, SIZE, new_batch

from semlic_jax import cli, refinement
from semlic_jax.refinement import newton
from semlic_jax.refinement.batch import Batch
from semlic_jax.refinement.settings import METHODS

# Whole refinements.


@pytest.fixture(scope="module")
def refined(mini_codec, image):
    """A refinement that others are compared with."""
    return refinement.refine(mini_codec, image, quality=0.5, settings=SETTINGS)


def test_files_are_better_at_no_more_bytes(mini_codec, image, refined):
    assert len(refined.data) <= len(refined.unrefined)
    assert refined.value < 0.99 * refined.unrefined_value
    decoded = mini_codec.decompress(refined.data).astype(float)
    mse = np.mean((decoded - image) ** 2)
    assert SETTINGS.alpha * mse == pytest.approx(refined.value, rel=1e-4)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0, 1.5])
def test_never_over_budget_and_never_worse(mini_codec, image, share, steps):
    """Also where the budget is not what a quality gives, and with hardly any steps."""
    smallest = len(mini_codec.compress(image, quality=0))
    largest = len(mini_codec.compress(image, quality=1))
    budget = round(smallest + share * (largest - smallest))
    settings = dataclasses.replace(SETTINGS, steps=steps)
    found = refinement.refine(mini_codec, image, max_bytes=budget, settings=settings)
    assert len(found.data) <= budget
    assert found.value <= found.unrefined_value


def test_harm_is_not_passed_on(mini_codec, image):
    """Steps that ruin the latents leave the file without refinement."""
    ruinous = dataclasses.replace(SETTINGS, kappa=1e-4, z_travel=300.0)
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
    assert [now.step for now in seen] == [4] and seen[0].steps == 12
    assert found.steps == 4 and refined.steps == 12
    assert found.value <= found.unrefined_value
    assert len(found.data) <= len(found.unrefined)
    assert found.history == refined.history[:1]
    assert found.history[0]["value"] == pytest.approx(seen[0].value[0])


def test_perceptual_terms_count(mini_codec, image):
    found = refinement.refine(mini_codec, image, quality=0.5, settings=PERCEPTUAL)
    assert found.value < 0.99 * found.unrefined_value
    assert len(found.data) <= len(found.unrefined)


def test_budgets_of_hardly_any_payload(mini_codec, image):
    """What streams take besides their symbols leaves no rate below 0 to aim at."""
    usual = new_batch(mini_codec, image)
    less_bytes = int(usual.jobs[0].payload_bits / 8)
    made = new_batch(mini_codec, image, less_bytes=less_bytes)
    assert 0 <= made.jobs[0].payload_bits < 8
    stepper = made.stepper()
    stepper(2)
    for leaf in jax.tree.leaves(stepper.state._replace(best=None)):
        assert np.isfinite(np.asarray(leaf)).all()


@pytest.mark.slow
def test_images_of_a_batch_are_refined_as_alone(mini_codec, photograph):
    settings = dataclasses.replace(SETTINGS, z_travel=3.0)
    images = [photograph(*SIZE, seed=3), photograph(40, 50, seed=4)]
    budgets = [
        len(mini_codec.compress(image, quality=quality))
        for image, quality in zip(images, (0.4, 0.8), strict=True)
    ]
    together = refinement.refine_batch(
        mini_codec, images, max_bytes=budgets, settings=settings
    )
    for image, budget, found in zip(images, budgets, together, strict=True):
        alone = refinement.refine(
            mini_codec, image, max_bytes=budget, settings=settings
        )
        assert len(found.data) <= budget and found.unrefined == alone.unrefined
        assert found.value == pytest.approx(alone.value, rel=1e-3)
        for a, b in zip(found.history, alone.history, strict=True):
            assert a == pytest.approx(b, rel=1e-3)


def test_with_a_trunk_the_last_latents_count(mini_codec, image):
    """A view with low distances must not hold what later steps have bettered."""
    settings = dataclasses.replace(PERCEPTUAL, noise=0.0)
    batch = new_batch(mini_codec, image, settings)
    assert batch.run(None) == settings.steps
    stepper = batch.stepper()
    for _ in range(3):
        stepper(settings.steps // 3)
    for kept, last in zip(batch.best, stepper.state.latents, strict=True):
        np.testing.assert_array_equal(kept, last)


def test_regions_start_from_finer_quantisers(mini_codec, image):
    """The more so the more a pixel of the region weighs, and not where all weigh 1."""
    mask = np.zeros(SIZE, np.float32)
    mask[:, :16] = 1
    unrefined = mini_codec.compress(image, quality=0.4)
    weights = ((0.25, 0.75), (0.5, 0.5), (0.9, 0.1), (0.99, 0.01), (1.0, 0.0))
    regions = [None] + [refinement.Region(mask, *pair) for pair in weights]
    levels = [
        Batch(
            mini_codec,
            SETTINGS,
            [image],
            [len(unrefined)],
            [region],
            [None],
            [unrefined],
        )
        .jobs[0]
        .level
        for region in regions
    ]
    assert levels[0] == levels[1] < levels[2] < levels[3] == levels[4] == levels[5]


# Schedules.


def test_schedules_end_without_noise():
    schedule = newton.make_schedule(SETTINGS)
    assert schedule.temperature[0] == 0.5 and schedule.temperature[-1] == 0
    alone = newton.make_schedule(dataclasses.replace(SETTINGS, steps=1, noise=0.0))
    assert alone.temperature[0] == 0 and np.isfinite(np.array(alone)).all()


@pytest.mark.parametrize("steps", [1, 2, 20])
def test_rates_of_z_add_up_to_its_travel(steps):
    settings = dataclasses.replace(SETTINGS, steps=steps, z_travel=0.7)
    rates = newton.make_schedule(settings).learning_rate
    assert rates.sum() == pytest.approx(0.7) and (np.diff(rates) < 0).all()


@pytest.mark.parametrize("steps", [2, 12, 100])
def test_the_travel_of_z_is_the_sum_of_its_learning_rates(steps):
    settings = dataclasses.replace(SETTINGS, steps=steps, z_travel=0.6)
    rates = newton.make_schedule(settings).learning_rate
    assert rates.sum() == pytest.approx(0.6, rel=1e-5) and rates[-1] == 0
    assert (np.diff(rates) < 0).all()


@pytest.mark.parametrize(("steps", "rise", "rising"), [(20, 0.2, 4), (12, 0.25, 3)])
def test_trust_rises_and_then_falls(steps, rise, rising):
    settings = dataclasses.replace(SETTINGS, steps=steps, trust_rise=rise)
    trust = newton.make_schedule(settings).trust
    assert trust[0] == 0 and trust[-1] == pytest.approx(settings.trust_end)
    assert (np.diff(trust[: rising + 1]) > 0).all()
    assert (np.diff(trust[rising:]) < 0).all()
    # It is the same fall, and starts at once where nothing is to rise.
    falling = newton.make_schedule(dataclasses.replace(settings, trust_rise=0.0)).trust
    assert falling[0] == pytest.approx(settings.trust_start)
    np.testing.assert_array_equal(trust[rising:], falling[rising:])
    assert (trust[:rising] < falling[:rising]).all()


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 9])
def test_few_steps_are_all_taken(steps):
    trust = newton.make_schedule(dataclasses.replace(SETTINGS, steps=steps)).trust
    assert trust[0] == pytest.approx(SETTINGS.trust_start) and (trust > 0).all()


def test_more_steps_rise():
    trust = newton.make_schedule(dataclasses.replace(SETTINGS, steps=10)).trust
    assert trust[0] == 0 and 0 < trust[1] < trust[2]


# The command line.


def test_commands(mini_codec, mini_model, image, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkdir("in")
    Image.fromarray(image).save("in/a.png")
    model = ("--model", str(mini_model))
    options = ("--gamma", "0", "--method", "newton", *model)
    command = ["compress", "in/a.png", "a.semlic", "--quality", "0.5", "--refine", "2"]
    assert cli.main([*command, *options]) == 0
    settings = refinement.preset(2, gamma=0.0, method="newton")
    wanted = refinement.refine(mini_codec, image, quality=0.5, settings=settings)
    with open("a.semlic", "rb") as stream:
        assert stream.read() == wanted.data
    command = ["refine", "in", "out", "--bpp", "0.42", "--steps", "2"]
    assert cli.main([*command, *options]) == 0
    assert os.path.getsize("out/a.semlic") * 8 <= 0.42 * image.shape[0] * image.shape[1]
    capsys.readouterr()
    for command in ("compress", "refine"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        shown = capsys.readouterr().out.replace("\n", " ")
        assert all(method in shown for method in METHODS)
