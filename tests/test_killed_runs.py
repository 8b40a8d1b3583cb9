# SPDX-License-Identifier: Apache-2.0
"""Training in processes that are killed, or run out of disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from semlic_jax.training import checkpoints

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.usefixtures("quick_to_compile")


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
    jax.tree.map(np.testing.assert_array_equal, before, whole_state(run))
