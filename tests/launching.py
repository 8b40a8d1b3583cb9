# SPDX-License-Identifier: Apache-2.0
"""Commands, environments and stand-ins for programs, for the tests of launching."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LOCAL = ["local", "--dry-run"]
SLURM = ["slurm", "--dry-run", "--time", "2:00:00"]
TPU = ["tpu", "--name", "run", "--zone", "us-central2-b", "--type", "v4-32"]
GKE = ["gke", "--dry-run", "--name", "run", "--image", "registry/semlic:1"]
SLICE = ["--tpu", "tpu-v4-podslice", "--topology", "2x2x4"]
TRAIN = ["train", "--config", "configs/tiny.py", "--workdir"]
REFINE = ["refine", "gs://b/in", "gs://b/out", "--bpp", "0.2", "--steps", "50"]
EVAL = ["eval", "gs://b/in", "--out", "gs://b/report", "--codecs", "semlic,avif"]


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("GOOGLE_CLOUD_PROJECT", "CLOUDSDK_CORE_PROJECT"):
        monkeypatch.delenv(name, raising=False)


def stand_in(folder: Path, name: str, script: str) -> None:
    """A program of that name, first on the PATH that has the folder first."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


def environment(devices: int, cache: Path) -> dict[str, str]:
    return dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        JAX_COMPILATION_CACHE_DIR=str(cache),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",
        XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
        PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    )
