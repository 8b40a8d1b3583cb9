# SPDX-License-Identifier: Apache-2.0
"""Stages: what they refuse, what they train, and that a killed run loses nothing."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mini_config import get_config

from semlic_jax import cli
from semlic_jax.model.compression import CompressionModel
from semlic_jax.objectives.losses import LossWeights, RateTarget
from semlic_jax.training import checkpoints, loop, plot
from semlic_jax.training.data import Photographs
from semlic_jax.training.loop import NotFiniteError, run_program
from semlic_jax.training.plot import read_log
from semlic_jax.training.programs import (
    Program,
    codec_program,
    initial_labeller,
    labeller_program,
    make_run,
)
from semlic_jax.training.settings import read_settings
from semlic_jax.training.sharding import Preempted, make_mesh, stops_at_sigterm
from semlic_jax.training.sources import open_sources
from semlic_jax.training.stages import PARTS, Optimizer, Stage
from semlic_jax.training.steps import (
    Learner,
    codec_update,
    limited_sum,
    sample_quality,
)
from semlic_jax.training.train import initial_params, load_config, train
from semlic_jax.training.writers import Writer

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"


pytestmark = pytest.mark.usefixtures("quick_to_compile")


def load(name: str, *arguments):
    return runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"](*arguments)


def photographs(settings) -> Photographs:
    return Photographs(open_sources(settings.data.train), crop=settings.data.crop)


# ---------------------------------------------------------------- configurations


@pytest.mark.parametrize("name", ["tiny", "small", "base", "hific", "labeller"])
def test_configs_are_complete_and_say_how_to_run_them(name, tmp_path):
    config = load(name).lock()
    if name == "hific":
        config.labeller_from = str(tmp_path)
    settings = read_settings(config)
    assert settings.records and settings.model_config
    text = (CONFIGS / f"{name}.py").read_text()
    assert f"semlic train --config configs/{name}.py" in text and "Expected:" in text


def test_ablations_change_one_stage_in_one_way():
    changes = runpy.run_path(str(CONFIGS / "ablations.py"))["ABLATIONS"]
    full, large = load("small").to_dict(), load("hific").to_dict()
    for name, change in changes.items():
        found = load("ablations", name).to_dict()
        read_settings(found)
        stage, architecture = found.pop("perceptual"), found.pop("architecture")
        expected = copy.deepcopy(full["perceptual"])
        changed = ("perceptual", "architecture")
        assert found == {k: v for k, v in full.items() if k not in changed}
        # One of the two, but for the config that changes nothing.
        assert (architecture != full["architecture"]) + bool(change) == (name != "full")
        for group, values in change.items():
            assert any(expected[group][key] != value for key, value in values.items())
            for key, value in values.items():
                everywhere = [base["perceptual"][group][key] for base in (full, large)]
                assert any(base_value != value for base_value in everywhere)
            expected[group].update(values)
        assert stage == expected
    assert set(changes) >= {
        *("without_style", "without_perceptual", "without_adversary"),
        *("binary_discriminator", "msillm", "without_noise", "without_mean_style"),
    }


def test_the_averages_of_tiny_leave_their_start():
    settings = read_settings(load("tiny"))
    for stage in settings.records:
        optimizers = [stage.optimizer]
        if isinstance(stage, Stage) and stage.weights.adversarial:
            optimizers.append(stage.adversary.optimizer)
        assert all(optimizer.ema**stage.steps < 0.15 for optimizer in optimizers)


LOSS_TERMS = [field.name for field in dataclasses.fields(LossWeights)]
REFUSED = [
    ({"sed": 1}, "config has no key 'sed'; did you mean seed?"),
    ({"data.cropp": 64}, "config.data has no key 'cropp'; did you mean crop?"),
    (
        {"perceptual.weights.adverserial": 1.0},
        "config.perceptual.weights has no key 'adverserial'; did you mean adversarial?",
    ),
    ({"percptual": {}}, "config has no key 'percptual'; did you mean perceptual?"),
    ({"stages": ("percptual",)}, "stages names 'percptual'"),
    ({"stages": ()}, "at least one stage"),
    (
        {"stages": ("integer", "perceptual", "integer")},
        "config.stages must name each stage once, found 'integer' 2 times",
    ),
    ({"seed": -1}, "config.seed must be at least 0, found -1"),
    ({"data.threads": -1}, "config.data.threads must be at least 0, found -1"),
    (
        {"integer.optimizer.decay_steps": 9},
        "integer.optimizer.decay_steps must be at most the 8 steps .* found 9",
    ),
    (
        {"labeller.optimizer.decay_steps": 41},
        "labeller.optimizer.decay_steps must be at most the 40 steps .* found 41",
    ),
    (
        {"perceptual.adversary.optimizer.decay_steps": 25},
        "perceptual.adversary.optimizer.decay_steps must be at most the 24 steps",
    ),
    (
        {"perceptual.zoom": 0.5, "perceptual.weights.perceptual": 0.0},
        "perceptual.zoom needs weights.perceptual above 0, found 0",
    ),
    ({"data.crop": 100}, "config.data.crop must be a multiple of 64, found 100"),
    ({"data.batch": 0}, "config.data.batch must be at least 1, found 0"),
    ({"perceptual.steps": 2.5}, "config.perceptual.steps must be of type int"),
    ({"perceptual.trained": ("decoder",)}, "must be some of entropy, .* found decoder"),
    ({"perceptual.arithmetic": "exact"}, "must be float or fake, found 'exact'"),
    ({"perceptual.weights.charbonnier": -1.0}, "must be at least 0, found -1.0"),
    ({"perceptual.quality_low": 2.0}, "needs 0 <= quality_low <= quality_high"),
    ({"perceptual.adversary.binary": False}, "needs a labeller: run the stage"),
    ({"networks.discriminator.up_widths": (8, 8)}, "must have the same stride"),
    ({"networks.labeller.width": (8,)}, "no key 'width'; did you mean widths?"),
    ({"architecture.width": 3}, "no key 'width'; did you mean widths?"),
    ({"model": "smal"}, "config.model must be one of .* found 'smal'"),
    ({"dtype": "float16"}, "config.dtype must be one of bfloat16, float32"),
    ({"init_from": "/no/such/folder"}, "the folder /no/such/folder does not exist"),
    ({"labeller_from": "small"}, "labeller_from: the folder small does not exist"),
    ({"data.train": ()}, "config.data.train must name at least one source .* none"),
    ({"data.train": (1,)}, "config.data.train must hold values of type str, found 1"),
    ({"data.train": 1}, "config.data.train must be of type tuple, found 1"),
    (
        {"networks.discriminator.patch": 0},
        "config.networks.discriminator.patch must be at least 1, found 0",
    ),
    ({"networks.labeller.patch": 0}, "networks.labeller.patch must be at least 1"),
    ({"log_steps": 0}, "config.log_steps must be at least 1, found 0"),
    ({"checkpoint_steps": 0}, "config.checkpoint_steps must be at least 1, found 0"),
    ({"keep_checkpoints": 0}, "config.keep_checkpoints must be at least 1, found 0"),
    ({"image_steps": -1}, "config.image_steps must be at least 0, found -1"),
    ({"perceptual.steps": 0}, "perceptual.steps must be at least 1, found 0"),
    ({"labeller.steps": 0}, "labeller.steps must be at least 1, found 0"),
    ({"perceptual.lmbda_low": 0.0}, "lmbda_low must be finite and above 0, found 0"),
    ({"perceptual.lmbda_high": -1.0}, "lmbda_high must be finite and above 0"),
    ({"perceptual.optimizer.lr": -1.0}, "lr must be finite and at least 0, found -1"),
    ({"perceptual.optimizer.warmup_steps": -1}, "warmup_steps must be at least 0"),
    ({"perceptual.optimizer.ema": 1.0}, "ema must be at least 0 and below 1, found 1"),
    ({"perceptual.optimizer.clip_norm": 0.0}, "clip_norm must be above 0, found 0"),
    (
        {"perceptual.weights": dict.fromkeys(LOSS_TERMS, 0.0)},
        "perceptual.weights must not all be 0",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_bad_settings_are_refused(change, message):
    config = get_config().to_dict()
    for path, value in change.items():
        node = config
        *parents, last = path.split(".")
        for key in parents:
            node = node[key]
        node[last] = value
    if "the same stride" in message:
        config["perceptual"]["adversary"]["binary"] = False
    with pytest.raises(ValueError, match=message) as refusal:
        read_settings(config)
    assert "\n" not in str(refusal.value)


def test_a_labeller_of_another_shape_is_refused_before_any_stage(tmp_path, monkeypatch):
    config = get_config()
    config.perceptual.adversary.binary = False
    config.labeller_from = str(tmp_path)
    run = make_run(read_settings(config), make_mesh(1, 1), None)
    params = jax.eval_shape(lambda: initial_labeller(run))
    monkeypatch.setattr(checkpoints, "read_params", lambda folder: params)
    config.networks.labeller.code_count += 1
    with pytest.raises(ValueError, match="does not fit this model: .* should have sha"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "perceptual").exists()


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


def test_refusals_that_need_the_devices_or_the_disk(tmp_path, monkeypatch):
    monkeypatch.delenv("SEMLIC_FEATURES", raising=False)
    cases = [
        ({"data.train": (str(tmp_path),)}, "expected photographs in"),
        ({"mesh.data": 64}, r"asks for 64 devices \(64 data x 1 model\), found"),
        ({"mesh.model": 7}, "config.mesh asks for 7 devices"),
        (
            {"perceptual.weights.style": 1.0, "trunk": "squeezenet1_0"},
            "config.features: .* SEMLIC_FEATURES",
        ),
        ({"init_from": str(tmp_path)}, "expected a checkpoint in"),
    ]
    for change, message in cases:
        config = get_config()
        config.update_from_flattened_dict(change)
        with pytest.raises(ValueError, match=message):
            train(config, tmp_path / "run")
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ValueError, match=r"--workdir must be a writable folder, found"):
        train(get_config(), blocked / "run")


def test_the_command_line_changes_keys_and_refuses_in_one_sentence(tmp_path, capsys):
    tiny = str(CONFIGS / "tiny.py")
    config = load_config(
        tiny,
        [
            "--config.perceptual.steps=7",
            "--config.data.train=('a', 'b')",
            "--config.perceptual.weights.style=2",
        ],
    )
    settings = read_settings(config)
    assert settings.data.train == ("a", "b")
    assert settings.records[2].steps == 7 and settings.records[2].weights.style == 2.0
    cases = [
        ("--config.perceptual.stepps=3", "no key 'stepps'; did you mean steps?"),
        ("--config.perceptual.steps=many", "--config.perceptual.steps=many"),
        ("--config.qqq=3", "the config has no key 'qqq'"),
        (
            "--config.architecture.texture_channels=4",
            "no key 'texture_channels'; give --config.architecture=\"{'texture_chann",
        ),
        ("stray", "--config.key=value, found 'stray'"),
        ("--config.mesh.data=64", "config.mesh asks for 64 devices"),
        ("--config.data.train=('/nowhere',)", "in /nowhere, found none"),
        ("--distributed=often", "none, auto or explicit, found 'often'"),
    ]
    for option, message in cases:
        arguments = ["--config", tiny, "--workdir", str(tmp_path), option]
        assert cli.main(["train", *arguments]) == 1
        error = capsys.readouterr().err
        assert error.startswith("semlic: ") and error.count("\n") == 1, error
        assert message in error
    assert cli.main(["train", "--config", "no.py", "--workdir", str(tmp_path)]) == 1
    assert "the file no.py does not exist" in capsys.readouterr().err
    ablation = str(CONFIGS / "ablations.py:nothing")
    assert cli.main(["train", "--config", ablation, "--workdir", str(tmp_path)]) == 1
    assert "semlic: expected one of the ablations full" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help"])
    assert stop.value.code == 0 and "--workdir DIR" in capsys.readouterr().out


# ---------------------------------------------------------------------- records


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


# ---------------------------------------------------------------------- updates


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


# --------------------------------------------------------------------- the loop


def counting_program(broken_step: int | None = None) -> Program:
    """A state that counts steps; one of its terms breaks at a step."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = {
        name: {"n": jax.ShapeDtypeStruct((), jnp.float32, sharding=place)}
        for name in ("params", "average", "optimizer")
    }

    def start():
        return {name: {"n": jnp.zeros(())} for name in shapes}

    def update(state, step, images):
        state = jax.tree.map(lambda n: n + 1, state)
        bad = step + 1 == broken_step
        metrics = {
            "loss": jnp.float32(step),
            "style": jnp.float32(np.nan if bad else 1),
        }
        return state, metrics

    return Program(shapes, start, update, lambda state, images: [images])


def read_rows(workdir: Path) -> list[dict]:
    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def run_counting(workdir, program, steps=10, **changes):
    config = get_config()
    config.update_from_flattened_dict({"perceptual.steps": steps, **changes})
    settings = read_settings(config)
    run = make_run(settings, make_mesh(1, 1), None)
    writer = Writer(workdir, active=True, tensorboard=False)
    try:
        return run_program(
            *(run, settings.records[0], program, photographs(settings)),
            *(writer, workdir, config.to_json_best_effort()),
        )
    finally:
        writer.close()


def test_a_row_follows_the_part_of_one_that_a_killed_run_left(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"stage": "a", "step": 1}\n{"stage": "a", "st')
    writer = Writer(tmp_path, active=True, tensorboard=False)
    writer.scalars("a", 2, {"loss": 1.0})
    writer.close()
    assert [row["step"] for row in read_log(log)["a"]] == [1, 2]


def test_a_plot_without_a_log_is_refused_in_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        plot.main([str(tmp_path)])
    assert ended.value.code == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.endswith(f"{tmp_path / 'metrics.jsonl'}, does not exist")


def test_a_value_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(NotFiniteError, match="style is nan at step 8 of the stage"):
        run_counting(tmp_path, counting_program(8), log_steps=100)
    # The checkpoint of step 9 would have held it; that of 6 is the last.
    found = checkpoints.read_params(tmp_path / "perceptual")
    assert found == {"n": 6.0}
    assert run_counting(tmp_path, counting_program(), log_steps=100) == {"n": 10.0}


def test_a_run_that_is_told_to_stop_saves_first(tmp_path, monkeypatch):
    told = iter([False] * 3 + [True])
    monkeypatch.setattr(loop, "told_to_stop", lambda: next(told))
    with pytest.raises(Preempted, match="of step 4 of the stage perceptual is saved"):
        run_counting(tmp_path, counting_program(), checkpoint_steps=100)
    assert checkpoints.read_params(tmp_path / "perceptual", 4) == {"n": 4.0}
    monkeypatch.undo()
    assert run_counting(tmp_path, counting_program()) == {"n": 10.0}


def test_a_signal_to_a_run_by_itself_saves_first(tmp_path):
    before = signal.getsignal(signal.SIGTERM)

    def update(state, step, images):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
        return program.update(state, step, images)

    program = counting_program()
    with pytest.raises(Preempted, match="of step 4 of the stage"), stops_at_sigterm():
        run_counting(tmp_path, program._replace(update=update), checkpoint_steps=100)
    assert checkpoints.read_params(tmp_path / "perceptual", 4) == {"n": 4.0}
    # Nothing of it is left.
    assert signal.getsignal(signal.SIGTERM) is before
    assert run_counting(tmp_path, program) == {"n": 10.0}


@pytest.mark.parametrize(
    "error", [RuntimeError("Backend Error, 503"), ImportError("Please install gcsfs")]
)
def test_a_checkpoint_behind_other_errors_is_not_to_be_deleted(
    tmp_path, monkeypatch, error
):
    run_counting(tmp_path, counting_program())

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(checkpoints._Manager, "restore", fail)
    with pytest.raises(ValueError, match="cannot read the checkpoint .*") as refused:
        run_counting(tmp_path, counting_program(), steps=20)
    assert "delete" not in str(refused.value)


def test_rows_and_pictures(tmp_path):
    run_counting(tmp_path, counting_program(), log_steps=4, image_steps=5)
    rows = read_rows(tmp_path)
    assert [row["step"] for row in rows] == [4, 8, 10]
    assert [row["loss"] for row in rows] == [1.5, 5.5, 8.5]
    assert all(row["stage"] == "perceptual" for row in rows)
    assert rows[-1]["images_per_second"] > 0 and rows[-1]["skipped_images"] == 0
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names == ["perceptual_0000005.png", "perceptual_0000010.png"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run_counting(tmp_path, counting_program())
    other = counting_program()
    shapes = dict(other.shapes, average={"n": jax.ShapeDtypeStruct((3,), jnp.float32)})
    with pytest.raises(
        ValueError, match=r"average/n should have shape \(3,\), found \(\)"
    ):
        run_counting(tmp_path, other._replace(shapes=shapes))


def halve(paths):
    for path in paths:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "parsed": lambda step: halve(step.glob("default/_METADATA")),
    "is missing": lambda step: (step / "default" / "_METADATA").unlink(),
    "file is missing": lambda step: shutil.rmtree(step / "default"),
    "is too short": lambda step: halve(step.glob("default/d/*")),
    "are not those": lambda step: halve(step.glob("default/manifest.ocdbt")),
}


# Arrays are read at the same time, and tensorstore drops all errors but the first.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("reason", DAMAGES)
def test_a_damaged_checkpoint_says_what_to_delete(tmp_path, reason):
    run_counting(tmp_path, counting_program(), steps=4, checkpoint_steps=2)
    folder = tmp_path / "perceptual"
    DAMAGES[reason](folder / "4")
    message = (
        rf"the checkpoint {folder}/4 is damaged \([^()]*{reason}[^()]*\); delete it to "
    )
    for read in (
        lambda: run_counting(tmp_path, counting_program()),
        lambda: checkpoints.read_params(folder),
    ):
        with pytest.raises(ValueError, match=message + "continue from step 2$"):
            read()
    gc.collect()  # what was dropped, while it is expected
    shutil.rmtree(folder / "2")
    with pytest.raises(ValueError, match=message + "start again$"):
        checkpoints.read_params(folder)
    shutil.rmtree(folder / "4")
    assert run_counting(tmp_path, counting_program()) == {"n": 10.0}


def test_a_checkpoint_that_cannot_be_read_now_is_not_to_be_deleted(tmp_path):
    for error in (PermissionError("no"), ValueError("UNAVAILABLE: no network")):
        with (
            pytest.raises(
                ValueError, match=f"cannot read the checkpoint .*/3: {error}"
            ),
            checkpoints._naming_damage(tmp_path, 3),
        ):
            raise error


# -------------------------------------------------------------- whole processes


def start_training(workdir, cache, *options, launcher=("-m",)):
    """`semlic train` with the mini config in a process of its own."""
    environment = dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        JAX_COMPILATION_CACHE_DIR=str(cache),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",
    )
    return subprocess.Popen(
        [
            *(sys.executable, *launcher, "semlic_jax.training.train"),
            *("--config", str(ROOT / "tests" / "mini_config.py")),
            *("--workdir", str(workdir), *options),
        ],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-3000:]
    return output


def last_step(log) -> int:
    """The last step in a log that another process is writing, 0 where there is none."""
    # What follows the last line end is a row of which a part is written.
    rows = log.read_text().split("\n")[:-1] if log.exists() else []
    return json.loads(rows[-1])["step"] if rows else 0


def test_last_step_waits_for_the_whole_row(tmp_path):
    log = tmp_path / "metrics.jsonl"
    assert last_step(log) == 0
    log.write_text('{"step": 1}\n{"step": 2, "lo')
    assert last_step(log) == 1


def whole_state(workdir):
    names = ("params", "average", "optimizer", "discriminator")
    return {
        name: checkpoints.read_params(workdir / "perceptual", which=name)
        for name in names
    }


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run that nobody disturbs, and the cache of what it compiled."""
    folder = tmp_path_factory.mktemp("unbroken")
    finish(start_training(folder / "run", folder / "cache"))
    return folder


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bits(unbroken, tmp_path):
    rng = np.random.default_rng()
    kills = sorted(rng.integers(1, 22, 3).tolist())
    print("killed at steps", kills)
    log = tmp_path / "run" / "metrics.jsonl"
    for step in kills:
        process = start_training(tmp_path / "run", unbroken / "cache")
        try:
            until = time.monotonic() + 300
            while process.poll() is None and time.monotonic() < until:
                if last_step(log) >= step:
                    break
                time.sleep(0.005)
        finally:
            process.kill()
            process.communicate()
    finish(start_training(tmp_path / "run", unbroken / "cache"))
    found, expected = whole_state(tmp_path / "run"), whole_state(unbroken / "run")
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


# Writes of more than 40 kB fail from here on, as on a full disk.
SMALL_DISK = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
os.execv(sys.executable, [sys.executable, "-m", *sys.argv[1:]])
"""


@pytest.mark.slow
def test_a_full_disk_is_reported_and_the_last_checkpoint_stays(unbroken, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(unbroken / "run", run)
    shutil.rmtree(run / "perceptual" / "24")
    before = whole_state(run)
    process = start_training(run, unbroken / "cache", launcher=("-c", SMALL_DISK))
    output, _ = process.communicate(timeout=600)
    assert process.returncode != 0
    assert "cannot write a checkpoint" in output, output[-3000:]
    assert "the last complete one is that of step 21" in output
    assert not differs(before, whole_state(run))
