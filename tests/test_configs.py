# SPDX-License-Identifier: Apache-2.0
"""Configurations: complete, explained, and refused where they are wrong."""

from __future__ import annotations

import copy
import dataclasses
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from mini_config import get_config

from semlic_jax import cli
from semlic_jax.objectives.losses import LossWeights
from semlic_jax.training import checkpoints
from semlic_jax.training.programs import (
    initial_labeller,
    make_run,
)
from semlic_jax.training.settings import read_settings
from semlic_jax.training.sharding import make_mesh
from semlic_jax.training.stages import Stage
from semlic_jax.training.train import load_config, train

CONFIGS = Path(__file__).parents[1] / "configs"

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def load(name: str, *arguments):
    return runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"](*arguments)


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
    ({"seed": 2**64}, r"config.seed must be below 2\*\*32, found 18446744073709551616"),
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
    (
        {"networks.labeller.code_count": 0},
        "config.networks.labeller.code_count must be at least 1, found 0",
    ),
    ({"networks.labeller.blocks": -1}, "labeller.blocks must be at least 0, found -1"),
    (
        {"networks.labeller.widths": ()},
        r"labeller.widths must hold whole numbers of at least 1, found \(\)",
    ),
    (
        {"networks.discriminator.mix_widths": (8, 0)},
        r"discriminator.mix_widths must hold whole numbers .* found \(8, 0\)",
    ),
    (
        {"networks.discriminator.widths": ("a",)},
        r"discriminator.widths must hold whole numbers .* found \('a',\)",
    ),
    (
        {"networks.discriminator.up_widths": (8,) * 9},
        "discriminator must have no more up_widths than widths, found 9 and",
    ),
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


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("VALUE = 1", "the config file has no function get_config"),
        ("def get_config(:", "the config file cannot be loaded: invalid syntax"),
        ("import no_such_module", "cannot be loaded: No module named"),
        ("def get_config():\n    return 3", "expected a ConfigDict .* found int"),
    ],
)
def test_a_file_that_is_no_config_is_refused_in_one_sentence(tmp_path, text, reason):
    """In a process of its own: ml_collections would find the last one's get_config."""
    path = tmp_path / "other.py"
    path.write_text(f"{text}\n")
    code = (
        "import sys\n"
        "from semlic_jax.training.train import load_config\n"
        "try: load_config(sys.argv[1], [])\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=True
    )
    assert re.search(reason, done.stdout) and done.stdout.count("\n") == 1


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
        ("--bogus", "Unknown command line flag 'bogus'"),
        ("--config.data.crop=abc", "'abc'"),
        ("--config.data.train=('synthetic:²',)", "after 'synthetic:', found '²'"),
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
    command = ["train", "--config", f"{tiny}:more", "--workdir", str(tmp_path)]
    assert cli.main(command) == 1
    assert "the config takes no argument after a colon" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help"])
    assert stop.value.code == 0 and "--workdir DIR" in capsys.readouterr().out
