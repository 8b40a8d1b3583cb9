# SPDX-License-Identifier: Apache-2.0
"""Launching: what would run, what is refused, and runs that lose a process."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ml_collections", reason="training needs the extra `train`")
pytest.importorskip("orbax.checkpoint", reason="training needs the extra `train`")

# ruff: noqa: E402
import jax
import yaml
from launching import (
    EVAL,
    GKE,
    LOCAL,
    REFINE,
    ROOT,
    SLICE,
    SLURM,
    TPU,
    TRAIN,
    environment,
    in_the_root,
    stand_in,
)

from launch import local
from launch.__main__ import main
from launch.tasks import LOST_STATUS, worth_restarting
from semlic_jax import cli
from semlic_jax.training import checkpoints, sharding

PYTHON = sys.executable
SEMLIC = f"{PYTHON} -m semlic_jax.cli"
WORKER = f"{ROOT}/launch/worker.py"

__all__ = ["in_the_root"]  # a fixture that every test here uses


def refuse_to_run(*arguments, **options):
    raise AssertionError(f"a dry run ran {arguments}")


@pytest.fixture
def dry(monkeypatch, capsys):
    """Function of arguments: the output of a dry run, which must run nothing."""
    monkeypatch.setattr(subprocess, "run", refuse_to_run)
    monkeypatch.setattr(subprocess, "Popen", refuse_to_run)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def run(*arguments: str) -> str:
        assert main(arguments) == 0
        return capsys.readouterr().out

    return run


# -------------------------------------------------------------------- dry runs


def test_local_dry_runs(dry, monkeypatch, capsys):
    assert dry(*LOCAL, *TRAIN, "runs/x", "--config.seed=3") == (
        f"{SEMLIC} train --config configs/tiny.py --workdir runs/x --config.seed=3\n"
    )
    options = ("--processes", "2", "--gpus", "4", "--port", "4321")
    common = f"{SEMLIC} train --config configs/tiny.py --workdir gs://b/x"
    explicit = "--distributed=explicit --coordinator=localhost:4321 --processes=2"
    assert dry(*LOCAL, *options, *TRAIN, "gs://b/x").splitlines() == [
        f"CUDA_VISIBLE_DEVICES=0,1 {common} {explicit} --process=0",
        f"CUDA_VISIBLE_DEVICES=2,3 {common} {explicit} --process=1",
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7,GPU-5a")
    lines = dry(*LOCAL, *options, *TRAIN, "x").splitlines()
    assert [line.split()[0] for line in lines] == [
        "CUDA_VISIBLE_DEVICES=4,6",
        "CUDA_VISIBLE_DEVICES=7,GPU-5a",
    ]
    assert main([*LOCAL, "--processes", "2", "--gpus", "8", *TRAIN, "x"]) == 1
    assert "expected 8 GPUs in CUDA_VISIBLE_DEVICES" in capsys.readouterr().err
    out = dry(*LOCAL, "--processes", "2", "refine", "tests", "a b", "--bpp", "0.2")
    assert out.splitlines() == [
        f"{SEMLIC} refine tests 'a b' --bpp 0.2 --processes=2 --process={process}"
        for process in range(2)
    ]
    staged = "gs://b/in gs://b/out --bpp 0.2 --steps 50"
    assert dry(*LOCAL, *REFINE) == f"{PYTHON} {WORKER} refine {staged}\n"
    out = dry(*LOCAL, "--processes", "2", "eval", "tests", "--out", "report")
    assert out == f"{SEMLIC} eval tests --out report\n"


def test_the_commands_are_ones_that_semlic_takes(dry, capsys):
    for task in (["refine", "launch", "out", "--bpp", "1"], ["eval", "launch"]):
        options = ["--out", "report"] if task[0] == "eval" else []
        out = dry(*LOCAL, "--processes", "2", *task, *options)
        for line in out.splitlines():
            command = shlex.split(line)
            assert command[:3] == SEMLIC.split()
            # Not wrong usage, which is 2: it gets as far as the images.
            assert cli.main(command[3:]) == 1
            assert "no image files in launch" in capsys.readouterr().err


def test_slurm_dry_runs(dry):
    nodes = ("--nodes", "2", "--gpus-per-node", "4", "--partition", "gpu")
    head = "SEMLIC_RESTARTS=3 sbatch --nodes={} --ntasks-per-node={}"
    script = f"{ROOT}/launch/slurm.sbatch"
    rest = "--cpus-per-task=8 --time=2:00:00 --partition=gpu"
    assert dry(*SLURM, *nodes, "--sbatch=--qos=high", *TRAIN, "runs/x") == (
        f"{head.format(2, 4)} --gpus-per-node=4 {rest} --qos=high {script} "
        f"{SEMLIC} train --config configs/tiny.py --workdir runs/x --distributed=auto\n"
    )
    assert dry(*SLURM, *nodes, *REFINE) == (
        f"{head.format(2, 4)} --gpus-per-node=4 {rest} {script} "
        f"{PYTHON} {WORKER} --auto refine gs://b/in gs://b/out --bpp 0.2 --steps 50\n"
    )
    assert dry(*SLURM, *nodes, "eval", "tests", "--out", "/shared/report") == (
        f"{head.format(1, 1)} --gpus-per-node=1 {rest} {script} "
        f"{SEMLIC} eval tests --out /shared/report\n"
    )
    none = ("--gpus-per-node", "0", "--cpus-per-gpu", "12")
    assert dry(*SLURM, *none, *TRAIN, "runs/x").startswith(
        "SEMLIC_RESTARTS=3 sbatch --nodes=1 --ntasks-per-node=1 --cpus-per-task=12 "
        f"--time=2:00:00 {script} {SEMLIC} train"
    )


def test_tpu_dry_runs(dry):
    options = ["--dry-run", "--project", "p", "--spot", "--delete", "--restarts", "7"]
    lines = dry(*TPU, *options, *TRAIN, "gs://b/x").splitlines()
    where = "--project=p --zone=us-central2-b"
    queued = "gcloud compute tpus queued-resources"
    archive = f"{tempfile.gettempdir()}/run_semlic_jax.tar.gz"
    ssh = f"gcloud compute tpus tpu-vm ssh run {where} --worker=all '--command="
    train = (
        ".venv/bin/python -m semlic_jax.cli train --config configs/tiny.py "
        "--workdir gs://b/x --distributed=auto; }'"
    )
    delete = f"{queued} delete run {where} --force --quiet"
    install = lines.pop(9)
    assert install.startswith(f"{ssh}mkdir -p semlic_jax_run && tar -xzf")
    assert ".[train,eval]" in install and "jax[tpu]" in install
    lock = "--conflict-exit-code 74 /tmp/semlic_jax.lock"
    assert lines == [
        "# request the slice, unless it exists",
        f"{queued} create run {where} --node-id=run --accelerator-type=v4-32 "
        "--runtime-version=tpu-ubuntu2204-base --spot",
        "# repeat until it is ACTIVE",
        f"{queued} describe run {where} '--format=value(state.state)'",
        "# if it is FAILED: why, and then as after a preemption",
        f"{queued} describe run {where} "
        "'--format=value(state.failedData.error.message)'",
        f"# pack what git lists in {ROOT}: {archive}",
        "# install on all workers",
        f"gcloud compute tpus tpu-vm scp {archive} run:semlic_jax.tar.gz {where} "
        "--worker=all",
        "# run",
        f"{ssh}cd semlic_jax_run && {{ exec flock --nonblock {lock} {train}",
        "# after a preemption, at most 7 times: this, then all of the above",
        delete,
        "# after a killed process, as many times: this instead",
        f"{ssh}cd semlic_jax_run && {{ fuser -k /tmp/semlic_jax.lock; "
        f"exec flock --wait 60 {lock} {train}",
        "# at the end",
        delete,
    ]
    refine = dry(*TPU, "--dry-run", "--project", "p", *REFINE)
    share = ".venv/bin/python ./launch/worker.py --auto"
    assert "--worker=all '--command=cd semlic_jax_run" in refine
    assert f"{share} refine gs://b/in gs://b/out --bpp 0.2 --steps 50; }}'" in refine
    evaluation = dry(*TPU, "--dry-run", "--project", "p", *EVAL)
    assert f"{lock} {share} eval gs://b/in --out gs://b/report" in evaluation
    assert "--worker=0 '--command=cd semlic_jax_run && { exec flock" in evaluation
    argument = dry(
        *TPU, "--dry-run", "--project", "p", "train", "--workdir", "/mnt/x",
        *("--config", f"{ROOT}/configs/ablations.py:without_style"),
    )  # fmt: skip
    assert " --config configs/ablations.py:without_style --workdir /mnt/x" in argument


KUBECTL = """\
# whether a set of this name has ended
kubectl get jobsets.jobset.x-k8s.io run -n default --ignore-not-found \
-o 'jsonpath={.status.terminalState}'
# if so
kubectl delete jobsets.jobset.x-k8s.io run -n default --cascade=foreground
# in any case
kubectl apply -f - <<'EOF'
"""


def manifest_of(output: str) -> dict:
    assert output.startswith(KUBECTL) and output.endswith("\nEOF\n")
    return yaml.safe_load(output.removeprefix(KUBECTL).removesuffix("EOF\n"))


def job_of(manifest: dict) -> tuple[dict, dict, dict]:
    (job,) = manifest["spec"]["replicatedJobs"]
    job = job["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    return job, pod, container


def test_gke_dry_runs(dry):
    manifest = manifest_of(
        dry(*GKE, *SLICE, "--spot", "--restarts", "5", *TRAIN, "gs://b/x")
    )
    assert manifest["kind"] == "JobSet" and manifest["metadata"]["name"] == "run"
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 5
    job, pod, container = job_of(manifest)
    assert job["completions"] == job["parallelism"] == 4
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] == 120
    # A lost process is worth a restart, a refusal is not.
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert not any(map(worth_restarting, rule["onExitCodes"]["values"]))
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v4-podslice",
        "cloud.google.com/gke-tpu-topology": "2x2x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert container["image"] == "registry/semlic:1"
    assert container["resources"] == {"limits": {"google.com/tpu": "4"}}
    train = ["python", "-m", "semlic_jax.cli", *TRAIN, "gs://b/x"]
    assert container["command"] == [*train, "--distributed=auto"]

    gpus = ["--gpu", "nvidia-h100-80gb", "--nodes", "2"]
    _, pod, container = job_of(manifest_of(dry(*GKE, *gpus, *TRAIN, "gs://b/x")))
    assert container["resources"] == {"limits": {"nvidia.com/gpu": "8"}}
    assert container["command"] == [
        *train,
        "--distributed=explicit",
        "--coordinator=run-workers-0-0.run:8476",
        "--processes=2",
        "--process=$(JOB_COMPLETION_INDEX)",
    ]
    _, _, container = job_of(manifest_of(dry(*GKE, *gpus, *REFINE)))
    assert container["command"] == [
        *("python", "/semlic_jax/launch/worker.py", "--auto", *REFINE)
    ]
    assert container["env"] == [{"name": "SEMLIC_PROCESSES", "value": "2"}]
    _, _, container = job_of(manifest_of(dry(*GKE, *gpus[:2], *EVAL)))
    assert container["command"] == ["python", "/semlic_jax/launch/worker.py", *EVAL]


# -------------------------------------------------------------------- refusals


REFUSED = [
    ([*LOCAL, "train", "--workdir", "x"], "train needs --config, found none"),
    ([*LOCAL, "train", "--config", "configs/tiny.py"], "needs --workdir, found none"),
    ([*LOCAL, *TRAIN, "x", "--debug"], "--config.key=value, found '--debug'"),
    ([*LOCAL, *TRAIN, "x", "--config.sead=1"], "no key 'sead'; did you mean seed?"),
    (
        [*LOCAL, "train", "--config", "no.py", "--workdir", "x"],
        "the file no.py does not exist",
    ),
    (
        [*LOCAL, "refine", "tests", "--bpp", "1"],
        "IN_DIR and OUT_DIR before its options",
    ),
    ([*LOCAL, "refine", "nothing", "out"], "nothing does not exist"),
    ([*LOCAL, "eval", "--out", "x"], "eval needs IMAGES before its options"),
    ([*LOCAL, "eval", "tests"], "eval needs --out DIR, found none"),
    ([*LOCAL, "--processes", "0", *REFINE], "--processes must be at least 1, found 0"),
    ([*LOCAL, "--processes", "2", "--gpus", "3", *REFINE], "the 2 processes, found 3"),
    ([*LOCAL, "--restarts", "-1", *REFINE], "--restarts must be at least 0, found -1"),
    (
        [*TPU, "--project", "p", "--restarts", "-1", *REFINE],
        "--restarts must be at least 0, found -1",
    ),
    ([*SLURM, "--restarts", "-1", *REFINE], "--restarts must be at least 0, found -1"),
    (
        [*GKE, *SLICE, "--restarts", "-1", *REFINE],
        "--restarts must be at least 0, found -1",
    ),
    ([*SLURM[:2], "--time", "soon", *REFINE], "such as 24:00:00, found 'soon'"),
    ([*SLURM, "--nodes", "0", *REFINE], "--nodes of at least 1"),
    ([*SLURM, "--cpus-per-gpu", "0", *REFINE], "must be at least 1, found 0"),
    (
        [*TPU, "--dry-run", *REFINE],
        "--project or the environment variable GOOGLE_CLOUD_PROJECT",
    ),
    ([*TPU, "--project", "p", *TRAIN, "runs/x"], "shared disk, found 'runs/x'"),
    (
        [*TPU, "--project", "p", "--zone", "moon", *REFINE],
        "us-central2-b, found 'moon'",
    ),
    ([*TPU, "--project", "p", "--type", "big", *REFINE], "such as v4-32, found 'big'"),
    ([*TPU, "--project", "p", "--type", "v9x-8", *REFINE], "v9x-8 needs --runtime"),
    (
        [*TPU, "--project", "p", "--name", "A_b", *REFINE],
        "such as my-run-1, found 'A_b'",
    ),
    ([*GKE, "--name", "Run", *SLICE, *REFINE], "digits and dashes, all lower case"),
    ([*GKE, *REFINE], "either --tpu with --topology or --gpu, found neither"),
    ([*GKE, *SLICE, "--gpu", "x", *REFINE], "found both"),
    ([*GKE, *SLICE[:2], *REFINE], "expected --topology such as 2x2x4, found None"),
    ([*GKE, *SLICE, "--chips-per-host", "3", *REFINE], "divide the 16 chips of 2x2x4"),
    ([*GKE, *SLICE, *EVAL], "eval runs on one host, found 4"),
    ([*GKE, *SLICE, *TRAIN, "runs/x"], "all its machines can reach"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_refusals(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", refuse_to_run)
    monkeypatch.setattr(subprocess, "Popen", refuse_to_run)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("launch: ") and error.count("\n") == 1, error
    assert message in error


def test_a_config_outside_of_the_repository_does_not_reach_a_slice(tmp_path, capsys):
    config = tmp_path / "own.py"
    config.write_text((ROOT / "configs" / "tiny.py").read_text())
    arguments = ["train", "--config", str(config), "--workdir", "gs://b/x"]
    assert main([*TPU, "--project", "p", "--dry-run", *arguments]) == 1
    assert "--config must be inside the repository" in capsys.readouterr().err


def test_missing_programs_and_credentials(tmp_path, monkeypatch, capsys):
    gpu = [*GKE, "--gpu", "x"]
    gpu.remove("--dry-run")
    monkeypatch.setenv("PATH", str(tmp_path))
    for arguments, message in (
        ([*TPU, "--project", "p", *REFINE], "launch: gcloud was not found"),
        (["slurm", "--time", "1:00:00", *REFINE], "launch: sbatch was not found"),
        ([*gpu, *REFINE], "launch: kubectl was not found"),
    ):
        assert main(arguments) == 1
        assert capsys.readouterr().err.startswith(message)
    stand_in(tmp_path, "gcloud", '[ "$1 $2" = "auth list" ]')
    assert main([*TPU, "--project", "p", *REFINE]) == 1
    assert "no active account: run gcloud auth login" in capsys.readouterr().err
    stand_in(tmp_path, "kubectl", "echo no; exit 1")
    assert main([*gpu, *REFINE]) == 1
    error = capsys.readouterr().err
    assert "launch: kubectl auth can-i create jobsets" in error and "1: no" in error


@pytest.mark.parametrize(
    "arguments", [[], ["moon"], ["local", "--processs", "2", "train"], ["tpu", "eval"]]
)
def test_wrong_usage_is_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("launch: ")
    assert error.count("\n") == 1


# ------------------------------------------------------------ processes, for real


class Launched:
    """`python -m launch local` with the mini config in two processes."""

    def __init__(self, workdir: Path, cache: Path, *options: str) -> None:
        self.log = workdir / "metrics.jsonl"
        self._output = workdir.with_suffix(".log").open("w+")
        self.process = subprocess.Popen(
            [
                *(PYTHON, "-m", "launch", "local", "--processes", "2", *options),
                *("train", "--config", str(ROOT / "tests" / "mini_config.py")),
                *("--workdir", str(workdir), "--config.stages=('labeller',)"),
                *(f"--config.labeller.steps={STEPS}", "--config.checkpoint_steps=4"),
            ],
            cwd=ROOT,
            env=environment(1, cache),
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )

    def kill(self, process: int, *, from_step: int) -> None:
        """Kills one of the two when so many steps are done."""
        until = time.monotonic() + 600
        while time.monotonic() < until and self.process.poll() is None:
            lines = self.log.read_text().splitlines() if self.log.exists() else []
            if len(lines) >= from_step:
                break
            time.sleep(0.005)
        found = re.findall(rf"process {process} has PID (\d+)", self.output)
        os.kill(int(found[-1]), signal.SIGKILL)

    @property
    def output(self) -> str:
        return Path(self._output.name).read_text()

    def finish(self) -> int:
        status = self.process.wait(timeout=900)
        self._output.close()
        return status


STEPS = 60


def states_of(workdir: Path) -> dict:
    parts = ("params", "average", "optimizer")
    folder = workdir / "labeller"
    return {which: checkpoints.read_params(folder, STEPS, which) for which in parts}


@pytest.mark.slow
def test_runs_that_lose_a_process_end_as_an_undisturbed_one(tmp_path):
    cache = tmp_path / "cache"
    undisturbed = Launched(tmp_path / "undisturbed", cache)
    assert undisturbed.finish() == 0, undisturbed.output[-3000:]

    # One is killed: the other says so and stops by itself, and so does the launcher.
    first = Launched(tmp_path / "run", cache, "--grace", "200")
    first.kill(1, from_step=6)
    assert first.finish() == 1
    assert (
        "[0] semlic: process 0 of 2 cannot continue without the others" in first.output
    )
    assert first.output.splitlines()[-1] == (
        f"launch: process 0 ended with status {LOST_STATUS}; process 1 was killed by "
        "SIGKILL; the same command continues where it stopped"
    )

    # The same command goes on, and starts again by itself when the leader is killed.
    second = Launched(tmp_path / "run", cache, "--restarts", "1")
    second.kill(0, from_step=25)
    assert second.finish() == 0, second.output[-3000:]
    assert "labeller continues from step" in second.output
    assert "process 0 was killed by SIGKILL" in second.output
    assert "; starting again\n" in second.output

    found, expected = states_of(tmp_path / "run"), states_of(tmp_path / "undisturbed")
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_statuses_are_those_of_the_training():
    assert LOST_STATUS == sharding.LOST_STATUS
    assert all(map(worth_restarting, (LOST_STATUS, -9, 137, 255)))
    assert not any(map(worth_restarting, (0, 1, 2, 3, 4)))


def test_shares_are_independent(tmp_path, monkeypatch, capsys):
    """A refinement that fails leaves the others alone; output is told apart."""
    program = tmp_path / "python"
    program.write_text(
        '#!/bin/sh\ncase "$*" in *process=0) echo failing; exit 1;; esac\n'
        "sleep 1\necho done\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    arguments = ["local", "--processes", "2", "refine", "tests", "out", "--bpp", "1"]
    assert main(arguments) == 1
    found = capsys.readouterr()
    assert set(found.out.splitlines()) == {"[0] failing", "[1] done"}
    assert found.err.splitlines()[-1] == "launch: process 0 ended with status 1"
    program.write_text("#!/bin/sh\nexit 4\n")  # all done, but some were skipped
    assert main(arguments) == 4


def test_a_killed_share_starts_again_beside_one_that_skipped(
    tmp_path, monkeypatch, capsys
):
    program = tmp_path / "python"
    program.write_text(
        '#!/bin/sh\ncase "$*" in *process=0) exit 4;; esac\n'
        f"[ -e {tmp_path}/again ] || {{ touch {tmp_path}/again; kill -9 $$; }}\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    options = ["local", "--processes", "2", "--restarts", "1"]
    assert main([*options, "refine", "tests", "out", "--bpp", "1"]) == 4
    assert "process 1 was killed by SIGKILL; starting again" in capsys.readouterr().err


def program_that(folder: Path, monkeypatch, script: str) -> list[str]:
    """Arguments for a task that is this shell script; its parent is the launcher."""
    stand_in(folder, "python", script)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    return ["local", "refine", "tests", "out", "--bpp", "1"]


def test_processes_that_are_told_to_stop_may_save(tmp_path, monkeypatch, capsys):
    # Not for this: the time of those that another one has left.
    monkeypatch.setattr(local, "_TERM_SECONDS", 0.0)
    arguments = program_that(
        tmp_path,
        monkeypatch,
        "trap 'sleep 0.2; echo saved; exit 75' TERM\n"
        "kill -TERM $PPID\nfor _ in {1..500}; do sleep 0.02; done",
    )
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().out == "saved\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_while_others_are_stopped_ends_the_launcher(
    tmp_path, monkeypatch, capsys
):
    """One process was lost, and the launcher would start all of them again."""
    stand_in(
        tmp_path,
        "python",
        f"if mkdir {tmp_path}/first 2>/dev/null; then sleep 0.5; exit 75; fi\n"
        "trap 'kill -TERM $PPID; exit 75' TERM\nfor _ in {1..500}; do sleep 0.02; done",
    )
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    train = ["train", "--config", "configs/tiny.py", "--workdir", str(tmp_path / "w")]
    options = ["local", "--processes", "2", "--restarts", "2", "--grace", "0.1"]
    with pytest.raises(SystemExit) as stop:
        main([*options, *train])
    assert stop.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err.count("process 0 has PID") == 1


def test_a_second_signal_ends_the_processes_at_once(tmp_path, monkeypatch, capsys):
    arguments = program_that(
        tmp_path,
        monkeypatch,
        f"trap 'kill -TERM $PPID' TERM\necho $$ > {tmp_path}/pid\n"
        "kill -TERM $PPID\nfor _ in {1..500}; do sleep 0.02; done; echo saved",
    )
    with pytest.raises(SystemExit):
        main(arguments)
    assert not capsys.readouterr().out
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


# ------------------------------------------------------------------- the image


def left_out(path: str) -> bool:
    """Whether `.dockerignore` leaves this path out."""
    patterns = (ROOT / ".dockerignore").read_text().splitlines()
    parts = Path(path).parts
    for pattern in patterns:
        anywhere = pattern.startswith("**/")
        pattern = pattern.removeprefix("**/")
        starts = range(len(parts)) if anywhere else range(1)
        for start in starts:
            for end in range(start + 1, len(parts) + 1):
                if Path(*parts[start:end]).match(pattern):
                    if anywhere or len(Path(pattern).parts) == end - start:
                        return True
    return False


def test_what_the_image_is_built_from():
    needed = ("pyproject.toml", "README.md", "LICENSE", "launch/worker.py")
    for path in (*needed, "configs/tiny.py", "semlic_jax/cli/__init__.py"):
        assert (ROOT / path).exists() and not left_out(path)
    # The history, and whatever git ignores.
    for line in [".git", *(ROOT / ".gitignore").read_text().splitlines()]:
        example = line.strip("/").replace("[cod]", "c").replace("*", "x")
        assert left_out(f"{example}/file"), line
        if not line.startswith("/") and line != ".git":
            assert left_out(f"semlic_jax/{example}"), line
