# SPDX-License-Identifier: Apache-2.0
"""Several devices and several processes do what one does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from semlic_jax.training import checkpoints
from semlic_jax.training.sharding import (
    local_examples,
    make_mesh,
    start_processes,
    state_sharding,
)

ROOT = Path(__file__).parents[1]

# One step of everything that can learn, on meshes of several shapes.
STEPS = """
import sys
from pathlib import Path
import jax
import numpy as np
from mini_config import get_config
from semlic_jax.training.checkpoints import Checkpoints
from semlic_jax.training.data import Photographs
from semlic_jax.training.programs import codec_program, make_run
from semlic_jax.training.settings import read_settings
from semlic_jax.training.sharding import global_batch, local_examples, make_mesh
from semlic_jax.training.sources import open_sources
from semlic_jax.training.stages import PARTS
from semlic_jax.training.train import initial_params

folder = Path(sys.argv[1])
params = None
for data, model in ((1, 1), (8, 1), (4, 2)):
    config = get_config()
    config.data.batch = 8
    config.mesh.update(data=data, model=model, shard_from=64)
    config.perceptual.trained = PARTS
    settings = read_settings(config)
    photographs = Photographs(open_sources(settings.data.train), crop=64)
    if params is None:
        params = initial_params(settings, photographs)
    run = make_run(settings, make_mesh(data, model), None)
    program = codec_program(run, settings.records[0], lambda: params, None)
    images = next(photographs.batches(0, 1, seed=0, examples=range(8)))
    examples = local_examples(run.mesh, 8)
    state, metrics = program.update(
        program.start(), 0, global_batch(run.mesh, images, examples, 8)
    )
    places = {str(leaf.sharding.spec) for leaf in jax.tree.leaves(state)}
    assert any("model" in place for place in places) == (model > 1), places
    wanted = [leaf.sharding for leaf in jax.tree.leaves(program.shapes)]
    assert wanted == [leaf.sharding for leaf in jax.tree.leaves(state)]
    name = f"{data}x{model}"
    with Checkpoints(folder / name, 1) as manager:
        manager.save(1, state)
    leaves = {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    leaves |= {f"metric {name}": np.asarray(value) for name, value in metrics.items()}
    np.savez(folder / f"{name}.npz", **leaves)
"""


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


def test_the_rule_splits_large_kernels_alone():
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "model"))
    shapes = {
        "kernel": (3, 3, 16, 32),
        "transposed": (3, 3, 64, 32),
        "odd": (3, 3, 7, 9),
        "small": (1, 1, 4, 4),
        "bias": (4096,),
        "scalar": (),
    }
    tree = {name: jax.ShapeDtypeStruct(s, np.float32) for name, s in shapes.items()}
    found = state_sharding(mesh, tree, shard_from=100)
    assert {name: place.spec for name, place in found.items()} == {
        "kernel": P(None, None, None, "model"),
        "transposed": P(None, None, "model", None),
        "odd": P(None, None, None, None),
        "small": P(None, None, None, None),
        "bias": P(None),
        "scalar": P(),
    }
    alone = jax.sharding.AbstractMesh((8, 1), ("data", "model"))
    places = state_sharding(alone, tree, shard_from=100)
    assert all("model" not in str(place.spec) for place in places.values())


def test_refusals():
    with pytest.raises(ValueError, match="asks for 4096 devices"):
        make_mesh(4096, 1)
    with pytest.raises(ValueError, match="data >= 0 and model >= 1, found -1 and 1"):
        make_mesh(-1, 1)
    with pytest.raises(ValueError, match="none, auto or explicit, found 'both'"):
        start_processes("both")
    with pytest.raises(ValueError, match="explicit processes need --coordinator"):
        start_processes("explicit", "localhost:1", 2, 2)
    mesh = make_mesh(1, 1)
    assert local_examples(mesh, 6) == range(6)


@pytest.mark.slow
def test_eight_devices_do_the_step_of_one(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", STEPS, str(tmp_path)],
        cwd=ROOT,
        env=environment(8, tmp_path / "cache"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    single, *others = (
        dict(np.load(tmp_path / f"{name}.npz")) for name in ("1x1", "8x1", "4x2")
    )
    for other in others:
        assert set(other) == set(single)
        for name, expected in single.items():
            found = other[name]
            size = np.abs(expected).max() + 1e-12
            if "params" in name or "average" in name:
                # Adam's first step is the sign of the gradient, which may be about 0.
                close = np.isclose(found, expected, rtol=1e-4, atol=1e-5 * size)
                assert close.mean() > 0.98, name
            else:
                np.testing.assert_allclose(
                    found / size, expected / size, atol=2e-4, err_msg=name
                )
    # What 8 devices saved, 1 device reads.
    for which in ("params", "optimizer", "discriminator"):
        tree = checkpoints.read_params(tmp_path / "4x2", which=which)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            keys = jax.tree_util.keystr(path)
            matching = [
                name
                for name in others[1]
                if normal(name) == normal(f"['{which}']{keys}")
            ]
            assert matching, keys
            np.testing.assert_array_equal(leaf, others[1][matching[0]])


def normal(path: str) -> str:
    """Orbax gives named tuples back as dicts and tuples as lists."""
    return path.replace("'", "").replace("[", ".").replace("]", "").strip(".")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def run_together(workdir: Path, cache: Path, processes: int, *options: str) -> None:
    """`semlic train` in several processes of one device each."""
    port = free_port()
    running = []
    for process in range(processes):
        command = [
            *(sys.executable, "-m", "semlic_jax.training.train"),
            *("--config", str(ROOT / "tests" / "mini_config.py")),
            *("--workdir", str(workdir), *options),
        ]
        if processes > 1:
            command += [
                "--distributed=explicit",
                f"--coordinator=localhost:{port}",
                f"--processes={processes}",
                f"--process={process}",
            ]
        running.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(1, cache),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=900)[0] for process in running]
    for process, output in zip(running, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]


@pytest.mark.slow
def test_two_processes_train_save_and_resume_together(tmp_path):
    options = ("--config.image_steps=8",)
    alone, together = tmp_path / "alone", tmp_path / "together"
    run_together(alone, tmp_path / "cache1", 1, "--config.perceptual.steps=8", *options)
    run_together(
        together, tmp_path / "cache2", 2, "--config.perceptual.steps=5", *options
    )
    assert checkpoints.read_params(together / "perceptual", 5)
    run_together(
        together, tmp_path / "cache2", 2, "--config.perceptual.steps=8", *options
    )
    rows, expected = (
        [
            json.loads(line)
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (together, alone)
    )
    # Process 0 alone writes, and the second run goes on where the first stopped.
    assert [row["step"] for row in rows] == list(range(1, 9))
    for row, wanted in zip(rows, expected, strict=True):
        for name in ("loss", "charbonnier", "adversarial", "d_loss"):
            assert row[name] == pytest.approx(wanted[name], rel=2e-3), row["step"]
    assert len(list((together / "images").iterdir())) == 2
