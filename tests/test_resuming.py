# SPDX-License-Identifier: Apache-2.0
"""What may change when a run goes on, and what is refused."""

from __future__ import annotations

import logging

import pytest
from etils import epath
from mini_config import get_config

from semlic_jax.training import resuming
from semlic_jax.training.resuming import check_resumed
from semlic_jax.training.settings import read_settings
from semlic_jax.training.train import train

ALL = ("labeller", "rate_distortion", "perceptual", "integer")


def config_with(changes=None):
    config = get_config()
    config.stages = ALL
    config.perceptual.adversary.binary = False
    config.update_from_flattened_dict(changes or {})
    return config


def check(workdir, changes=None):
    config = config_with(changes)
    check_resumed(
        epath.Path(workdir), read_settings(config), config.to_json_best_effort()
    )


@pytest.fixture
def workdir(tmp_path):
    """The labeller, `rate_distortion` and a part of `perceptual` are done."""
    (tmp_path / "config.json").write_text(config_with().to_json_best_effort())
    for stage, step in (("labeller", 40), ("rate_distortion", 8), ("perceptual", 9)):
        (tmp_path / stage / str(step)).mkdir(parents=True)
    return tmp_path


ALLOWED = [
    {},
    {"perceptual.steps": 100},  # the last that began goes on for longer
    {"rate_distortion.steps": 5},  # it has more than that
    {"integer.steps": 100},
    {"data.train": ("moved/photos",)},
    {"stages": ("labeller", "rate_distortion", "perceptual")},
    # From a stage before it, named by hand.
    {"stages": ("labeller", "perceptual"), "init_from": "."},
]


@pytest.mark.parametrize("changes", ALLOWED)
def test_what_may_change_is_logged(workdir, caplog, changes):
    with caplog.at_level(logging.WARNING):
        check(workdir, changes)
    assert len(caplog.messages) == len(changes)
    for key, message in zip(sorted(changes), caplog.messages, strict=True):
        assert message.startswith(f"config.{key} was "), message


REFUSED = [
    ({"seed": 1}, "config.seed is 1, but the checkpoints in .* are of a run with 0: "),
    ({"init_from": "."}, "init_from is '.', .* with '': .* change it in .*config.json"),
    (
        {"rate_distortion.steps": 20},
        "rate_distortion has done 8 of 20 steps, but perceptual has begun after it: "
        "choose another --workdir, or delete .*/perceptual$",
    ),
    ({"labeller.steps": 50}, "labeller has done 40 of 50 .* delete .*/perceptual$"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_no_single_configuration_tells_is_refused(workdir, changes, message):
    with pytest.raises(ValueError, match=message):
        check(workdir, changes)
    before = (workdir / "config.json").read_text()
    with pytest.raises(ValueError, match=message):
        train(config_with(changes), workdir)
    assert (workdir / "config.json").read_text() == before


def test_all_that_was_made_from_a_stage_is_named(workdir):
    (workdir / "integer" / "8").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"delete .*/perceptual and .*/integer$"):
        check(workdir, {"rate_distortion.steps": 20})
    # What the labeller is made for is the adversary alone.
    done = {"perceptual.adversary.binary": True, "perceptual.steps": 9}
    check(workdir, {"labeller.steps": 50, **done})


@pytest.mark.parametrize("record", [None, "", '{"seed": ', "[]", "{}"])
def test_a_record_that_says_nothing_refuses_nothing(workdir, record):
    if record is None:
        (workdir / "config.json").unlink()
    else:
        (workdir / "config.json").write_text(record)
    check(workdir, {"seed": 1})


def test_a_run_without_a_checkpoint_may_change_in_everything(workdir):
    for stage in workdir.iterdir():
        if stage.is_dir():
            (stage / next(stage.iterdir()).name).rmdir()
    check(workdir, {"seed": 1, "rate_distortion.steps": 20})


def test_a_bucket_that_cannot_be_read_is_refused(workdir, monkeypatch):
    def fail(folder):
        raise RuntimeError("no access, 403")  # as libraries of buckets do

    monkeypatch.setattr(resuming, "last_step", fail)
    with pytest.raises(ValueError, match="--workdir must be .*: no access, 403"):
        check(workdir)
