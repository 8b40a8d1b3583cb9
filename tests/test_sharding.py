# SPDX-License-Identifier: Apache-2.0
"""Several devices and several processes do what one does."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from launching import environment

from semlic_jax.training import checkpoints, sharding
from semlic_jax.training.sharding import (
    LOST_STATUS,
    global_batch,
    local_examples,
    make_mesh,
    start_processes,
    state_sharding,
)

ROOT = Path(__file__).parents[1]

# One step of everything that can learn, on meshes of several shapes.
STEPS = """
import sys
import time
import types
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
    # Two such processes would each train alone, in one folder.
    for given in (("", 2, -1), ("", 0, 1), ("localhost:1", 0, -1)):
        with pytest.raises(ValueError, match="need --distributed=explicit, found none"):
            start_processes("none", *given)
    mesh = make_mesh(1, 1)
    assert local_examples(mesh, 6) == tuple(range(6))


class Chip:
    """A TPU chip, as far as meshes are made of them; hosts have 2 x 2 chips."""

    platform, core_on_chip, slice_index = "tpu", 0, 0

    def __init__(self, number, kind, coords):
        x, y, z = self.coords = coords
        self.id, self.device_kind = number, kind
        self.process_index = (x // 2, y // 2, z)


def slice_of(kind, x, y, z):
    places = ((i, j, k) for k in range(z) for j in range(y) for i in range(x))
    return [Chip(number, kind, place) for number, place in enumerate(places)]


@pytest.mark.parametrize("model", [1, 2, 8])
@pytest.mark.parametrize(
    ("kind", "chips"),
    [
        ("TPU v4", (2, 2, 4)),
        ("TPU v4", (4, 4, 4)),
        ("TPU v5 lite", (8, 8, 1)),
        ("TPU v6 lite", (4, 4, 1)),
    ],
)
def test_tpu_slices_have_a_mesh(monkeypatch, kind, chips, model):
    devices = slice_of(kind, *chips)
    monkeypatch.setattr(jax, "devices", lambda: devices)
    mesh = make_mesh(0, model)
    assert dict(mesh.shape) == {"data": len(devices) // model, "model": model}
    assert set(mesh.devices.flat) == set(devices)
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)
    # Parts of one parameter are beside each other.
    for row in mesh.devices:
        spans = np.ptp([chip.coords for chip in row], axis=0)
        assert np.prod(spans + 1) == model


def test_devices_without_a_mesh_are_refused(monkeypatch):
    devices = slice_of("TPU v4", 4, 4, 2)[:-2]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with pytest.raises(
        ValueError,
        match=r"15 data x 2 model cannot be placed on 30 devices \(TPU v4\): ",
    ) as refusal:
        make_mesh(0, 2)
    assert "\n" not in str(refusal.value)


def test_a_process_makes_the_examples_of_its_rows_alone(monkeypatch):
    """The rows of a TPU host are not neighbours."""
    places = {0: (slice(0, 2),), 1: (slice(6, 8),), 2: (slice(6, 8),)}
    rows = types.SimpleNamespace(addressable_devices_indices_map=lambda _: places)
    monkeypatch.setattr(sharding, "batch_sharding", lambda mesh: rows)
    mesh = jax.sharding.AbstractMesh((4, 2), ("data", "model"))
    examples = local_examples(mesh, 8)
    assert examples == (0, 1, 6, 7)
    monkeypatch.setattr(
        jax,
        "make_array_from_callback",
        lambda shape, place, part: [part(index) for index in places.values()],
    )
    local = 10 * np.array(examples)[:, None]
    parts = global_batch(mesh, local, examples, 8)
    assert [part.ravel().tolist() for part in parts] == [[0, 10], [60, 70], [60, 70]]


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


def ends_of(running: list[subprocess.Popen]) -> list[str]:
    """What the processes print until all have ended; a process left over is killed."""
    try:
        return [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()


def start_together(
    workdir: Path, cache: Path, processes: int, *options: str
) -> list[subprocess.Popen]:
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
    return running


def run_together(workdir: Path, cache: Path, processes: int, *options: str) -> None:
    running = start_together(workdir, cache, processes, *options)
    for process, output in zip(running, ends_of(running), strict=True):
        assert process.returncode == 0, output[-3000:]


# Each of two processes has photographs of its own, as if each machine had a share.
START = """
import sys
import jax
import numpy as np
from etils import epath
from mini_config import get_config
from semlic_jax.objectives.features import load_features
from semlic_jax.training import feature_codes
from semlic_jax.training.data import Photographs
from semlic_jax.training.settings import read_settings
from semlic_jax.training.sharding import make_mesh, place, replicated, start_processes
from semlic_jax.training.sources import open_sources
from semlic_jax.training.train import initial_params

folder, port, process = sys.argv[1], sys.argv[2], int(sys.argv[3])
start_processes("explicit", f"localhost:{port}", 2, process)

# Codes are made by the first process alone, with a network that is on all devices.
jit, devices = jax.jit, set()

def watched(function, **options):
    program = jit(function, **options)
    def run(*arguments):
        found = program(*arguments)
        devices.update(found.devices())
        return found
    return run if function.__name__ == "features" else program

network = place(load_features(), replicated(make_mesh(0, 1)))
crops = Photographs(open_sources(("synthetic:2",)), crop=64)
jax.jit = watched
codes = feature_codes.kept_codes(
    epath.Path(folder) / "codes.npy", network, 0, crops, 4, seed=0
)
jax.jit = jit
assert devices == ({jax.local_devices()[0]} if process == 0 else set()), devices

config = get_config()
config.architecture.update(linear_skip=True, groups=(8,), context_shifts=(2,))
config.data.train = (f"synthetic:{8 + 4 * process}",)
settings = read_settings(config)
crops = Photographs(open_sources(settings.data.train), crop=64)
params = initial_params(settings, crops)
np.savez(f"{folder}/{process}.npz", *jax.tree.leaves(params), codes)
"""


@pytest.mark.slow
def test_processes_start_from_the_same_parameters_and_codes(tmp_path):
    port = free_port()
    running = [
        subprocess.Popen(
            [sys.executable, "-c", START, str(tmp_path), str(port), str(process)],
            cwd=ROOT,
            env=environment(1, tmp_path / "cache"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    for process, output in zip(running, ends_of(running), strict=True):
        assert process.returncode == 0, output[-3000:]
    first, second = (np.load(tmp_path / f"{process}.npz") for process in range(2))
    assert len(first) == len(second) > 20
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


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


@pytest.mark.slow
def test_a_signal_to_one_process_saves_and_stops_all(tmp_path):
    options = [
        f"--config.{key}=100000" for key in ("perceptual.steps", "keep_checkpoints")
    ]
    running = start_together(
        tmp_path, tmp_path / "cache", 2, *options, "--config.checkpoint_steps=100000"
    )
    log = tmp_path / "metrics.jsonl"
    while not (log.exists() and log.read_text()):
        assert all(process.poll() is None for process in running), ends_of(running)
        time.sleep(0.1)
    running[1].send_signal(signal.SIGTERM)
    outputs = ends_of(running)
    for number, (process, output) in enumerate(zip(running, outputs, strict=True)):
        assert process.returncode == LOST_STATUS, output[-3000:]
        assert f"process {number} of 2 was told to stop: the checkpoint of" in output
    (step,) = (int(path.name) for path in (tmp_path / "perceptual").iterdir())
    assert f"of step {step} of the stage perceptual is saved" in outputs[0]
    assert checkpoints.read_params(tmp_path / "perceptual", step)
    assert json.loads(log.read_text().splitlines()[-1])["step"] == step
