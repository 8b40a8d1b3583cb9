# SPDX-License-Identifier: Apache-2.0
"""Launching on clusters, with stand-ins for their programs."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
from launching import GKE, REFINE, ROOT, SLICE, TPU, TRAIN, in_the_root, stand_in

from launch import tpu, worker
from launch.__main__ import main
from launch.tasks import LOST_STATUS

__all__ = ["in_the_root"]  # a fixture that every test here uses


# A cluster with one set, whose manifest and terminal state are in files.
KUBECTL_CALLS = """
cd {folder}
echo "$*" >> calls
case "$1" in
    get) cat state 2>/dev/null; exit 0 ;;
    delete) rm set state ;;
    apply)
        cat > new
        if [ -e refuse ]; then echo Forbidden >&2; exit 1; fi
        if [ -e set ] && ! cmp -s set new; then
            echo 'The JobSet "run" is invalid: field is immutable' >&2; exit 1
        fi
        mv new set ;;
esac
"""


def test_the_manifest_is_applied(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    stand_in(tmp_path, "kubectl", KUBECTL_CALLS.format(folder=tmp_path))
    arguments = [*GKE, *SLICE, *REFINE]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    arguments.remove("--dry-run")
    named = "jobsets.jobset.x-k8s.io run -n default"
    get = f"get {named} --ignore-not-found -o jsonpath={{.status.terminalState}}"
    delete = f"delete {named} --cascade=foreground"
    # No set of this name, or the same one, which runs: nothing is deleted.
    for _ in range(2):
        assert main(arguments) == 0
        calls = (tmp_path / "calls").read_text().splitlines()
        assert calls[1:] == [get, "apply -f -"]
        assert shown.endswith(f"<<'EOF'\n{(tmp_path / 'set').read_text()}EOF\n")
        (tmp_path / "calls").unlink()
    # One that has ended would stay as it is.
    for state in ("Failed", "Completed"):
        (tmp_path / "state").write_text(state)
        assert main(arguments) == 0
        calls = (tmp_path / "calls").read_text().splitlines()
        assert calls[1:] == [get, delete, "apply -f -"]
        assert f"the JobSet run is {state}: deleting it" in capsys.readouterr().err
        (tmp_path / "calls").unlink()
    # Another one runs.
    assert main([*arguments, "--force"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("launch: another JobSet run is running in the namespace")
    assert f"(kubectl {delete})" in error and error.count("\n") == 1
    assert "delete" not in (tmp_path / "calls").read_text()
    # Any other error is kubectl's own.
    (tmp_path / "refuse").touch()
    assert main(arguments) == 1
    assert "status 1: Forbidden" in capsys.readouterr().err


def submit(
    folder: Path,
    step: str,
    command: tuple[str, ...] = ("semlic", "train", "a b"),
    **variables: str,
) -> tuple[int, str]:
    """The job script, where `srun` is `step`; its status and the calls it made."""
    srun = f'echo "srun $*" >> {folder}/calls; echo $$ > {folder}/pid'
    stand_in(folder, "srun", f"{srun}\n{step}")
    stand_in(folder, "scontrol", f'echo "scontrol $*" >> {folder}/calls')
    # The signal is for the processes of the step, which are one here.
    stand_in(
        folder,
        "scancel",
        f'echo "scancel $*" >> {folder}/calls; kill -TERM $(cat {folder}/pid)',
    )
    calls = folder / "calls"
    calls.write_text("")
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "slurm.sbatch"), *command],
        cwd=folder,
        env=dict(
            os.environ,
            PATH=f"{folder}:{os.environ['PATH']}",
            SLURM_JOB_ID="77",
            **variables,
        ),
        capture_output=True,
        timeout=60,
    )
    return done.returncode, calls.read_text()


def test_the_job_script_goes_back_into_the_queue(tmp_path):
    step = "srun --kill-on-bad-exit=1 semlic train a b\n"
    requeue = "scontrol requeue 77\n"
    assert submit(tmp_path, "exit 0") == (0, step)
    assert submit(tmp_path, "exit 1") == (1, step)
    assert submit(tmp_path, f"exit {LOST_STATUS}") == (LOST_STATUS, step + requeue)
    # Restarts for the time of the job do not count.
    late = submit(tmp_path, "exit 137", SLURM_RESTART_COUNT="12")
    assert late == (137, step + requeue)
    assert submit(tmp_path, "exit 137") == (137, step + requeue)
    assert submit(tmp_path, "exit 137", SEMLIC_RESTARTS="4") == (137, step + requeue)
    counted = [file.name for file in tmp_path.glob("*.restarts")]
    assert counted == ["semlic-77.restarts"]
    assert submit(tmp_path, "exit 137", SEMLIC_RESTARTS="4") == (137, step)
    assert not [*tmp_path.glob("*.restarts")]
    text = (ROOT / "launch" / "slurm.sbatch").read_text()
    assert "#SBATCH --signal=B:USR1@" in text and "#SBATCH --requeue" in text


# A step that is running when the script gets the signal that the time is nearly over.
LATE = "kill -USR1 $PPID; for _ in {1..500}; do sleep 0.02; done"


def test_the_processes_save_before_the_time_is_over(tmp_path):
    step = "srun --kill-on-bad-exit=1 semlic train a b\n"
    late = "scancel --signal=TERM 77.0\n"
    requeue = "scontrol requeue 77\n"
    stand_in(tmp_path, "sleep", "exec /bin/sleep 0.05")
    saves = f"sleep 1; echo saved >> {tmp_path}/calls"
    assert submit(tmp_path, "exit 137") == (137, step + requeue)
    counted = (tmp_path / "semlic-77.restarts").read_text()
    for status in (LOST_STATUS, 143, 1):
        done = submit(tmp_path, f"trap '{saves}; exit {status}' TERM; {LATE}")
        assert done == (0, f"{step}{late}saved\n{requeue}")
    # Processes that know nothing of the signal.
    assert submit(tmp_path, LATE) == (0, step + late + requeue)
    # None of these counts as a killed process.
    assert (tmp_path / "semlic-77.restarts").read_text() == counted
    # A task that is finished needs no queue.
    done = submit(tmp_path, f"trap '{saves}; exit 0' TERM; {LATE}")
    assert done == (0, f"{step}{late}saved\n")
    assert not [*tmp_path.glob("*.restarts")]


def test_the_job_is_requeued_in_time_if_its_processes_stay(tmp_path):
    stand_in(tmp_path, "sleep", f"echo sleep >> {tmp_path}/sleeps")
    until = f"grep -q scontrol {tmp_path}/calls && exit; /bin/sleep 0.02"
    stays = f"trap '' TERM; kill -USR1 $PPID; for _ in {{1..2000}}; do {until}; done"
    status, calls = submit(tmp_path, stays)
    assert status == 0 and calls.endswith("77.0\nscontrol requeue 77\n")
    assert (tmp_path / "sleeps").read_text().count("sleep") == 90


def test_processes_get_the_cpus_of_the_job(tmp_path, monkeypatch):
    for name in ("SLURM_CPUS_PER_TASK", "SRUN_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    say = f'echo "${{SRUN_CPUS_PER_TASK:-unset}}" >> {tmp_path}/calls'
    assert submit(tmp_path, say)[1].endswith("\nunset\n")
    assert submit(tmp_path, say, SLURM_CPUS_PER_TASK="12")[1].endswith("\n12\n")


def test_a_share_that_fails_leaves_the_others_of_its_job(tmp_path):
    python = ("/env/bin/python", "-m", "semlic_jax.cli")
    worker_ = ("/env/bin/python", "launch/worker.py", "--auto")
    for command, kills in (
        ((*python, "train", "--config", "c"), 1),
        ((*python, "refine", "photos/train", "out"), 0),
        ((*worker_, "refine", "photos", "out"), 0),
    ):
        _, calls = submit(tmp_path, "exit 0", command)
        assert calls == f"srun --kill-on-bad-exit={kills} {' '.join(command)}\n"


@pytest.mark.parametrize(
    ("processes", "status", "expected"), [(8, 4, 0), (8, 1, 1), (1, 4, 4)]
)
def test_skipped_images_do_not_fail_a_share(monkeypatch, processes, status, expected):
    share = worker.Share(0, processes, {})
    monkeypatch.setattr(worker, "share_from_environment", lambda _: share)
    monkeypatch.setattr(worker, "run", lambda *_: status)
    monkeypatch.setattr(worker.signal, "signal", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["worker.py", "--auto", "refine", "in", "out"])
    assert worker.main() == expected


# A cloud with one slice: its state is in a file; the first task on it is preempted.
GCLOUD = """
cd {folder}
case "$*" in
    *auth*) echo someone; exit ;;
    *failedData.error.message*) echo "no quota for v4"; exit ;;
    *" describe "*)
        if [ -e state ]; then cat state; exit; fi
        echo "NOT_FOUND: no such resource" >&2; exit 1 ;;
esac
case "$*" in
    *" create "*) echo create; echo {create} > state ;;
    *" delete "*) echo delete; rm state ;;
    *" scp "*) echo scp ;;
    *mkdir*) echo install ;;
    *fuser*) echo again ;;
    *) echo run ;;
esac >> calls
case "$*" in
    *mkdir*) {install} ;;
    *flock*) echo x >> attempts; {task} ;;
esac
"""


def slice_with(
    folder: Path,
    monkeypatch,
    task: str,
    install: str = ":",
    create: str = "ACTIVE",
) -> list[str]:
    """Arguments for a slice on which task and installation are these shell lines.

    A request for it ends in the state `create`.
    """
    script = GCLOUD.format(folder=folder, task=task, install=install, create=create)
    stand_in(folder, "gcloud", script)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return [*TPU, "--project", "p", "--poll", "0", *TRAIN, "gs://b/x"]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a clone, for git")
def test_a_preempted_slice_is_asked_for_again(tmp_path, monkeypatch, capsys):
    preempted = (
        "if [ $(wc -l < attempts) = 1 ]; then echo SUSPENDED > state; exit 255; fi"
    )
    arguments = slice_with(tmp_path, monkeypatch, preempted)
    assert main([*arguments[:1], "--delete", *arguments[1:]]) == 0
    once = ["create", "scp", "install", "run"]
    calls = (tmp_path / "calls").read_text().split()
    assert calls == [*once, "delete", *once, "delete"]
    assert "the slice was preempted (status 255)" in capsys.readouterr().err
    with tarfile.open(tmp_path / "run_semlic_jax.tar.gz") as archive:
        names = archive.getnames()
    assert {"launch/worker.py", "configs/tiny.py", "pyproject.toml"} <= set(names)


def test_a_slice_that_is_preempted_while_installing(tmp_path, monkeypatch, capsys):
    tree = tmp_path / "tree"
    subprocess.run(["git", "init", "--quiet", str(tree)], check=True)
    (tree / "file").write_text("")
    (tree / "gone").write_text("")
    subprocess.run(["git", "-C", str(tree), "add", "gone"], check=True)
    (tree / "gone").unlink()
    monkeypatch.setattr(tpu, "ROOT", tree)
    preempted = (
        "if [ $(grep -c install calls) = 1 ]; then echo SUSPENDED > state; exit 1; fi"
    )
    assert main(slice_with(tmp_path, monkeypatch, ":", preempted)) == 0
    once = ["create", "scp", "install"]
    calls = (tmp_path / "calls").read_text().split()
    assert calls == [*once, "delete", *once, "run"]
    with tarfile.open(tmp_path / "run_semlic_jax.tar.gz") as archive:
        assert archive.getnames() == ["file"]
    assert "the slice was preempted (gcloud compute" in capsys.readouterr().err
    # On a slice that is still there it is an error.
    arguments = slice_with(tmp_path, monkeypatch, ":", "exit 1")
    (tmp_path / "state").unlink()
    assert main(arguments) == 1
    assert "ended with status 1" in capsys.readouterr().err


def test_no_slice_is_made_for_a_tree_that_git_does_not_know(
    tmp_path, monkeypatch, capsys
):
    arguments = slice_with(tmp_path, monkeypatch, ":")
    tree = tmp_path / "tree"
    tree.mkdir()
    monkeypatch.setattr(tpu, "ROOT", tree)
    assert main(arguments) == 1
    assert "ended with status 128" in capsys.readouterr().err
    subprocess.run(["git", "init", "--quiet", str(tree)], check=True)
    assert main(arguments) == 1
    assert f"listed by git in {tree}, found none" in capsys.readouterr().err
    assert not (tmp_path / "calls").exists()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a clone, for git")
def test_what_fails_on_a_slice(tmp_path, monkeypatch, capsys):
    arguments = slice_with(tmp_path, monkeypatch, "exit 1")
    assert main(arguments) == 1
    assert "task ended with status 1; the slice run still exists" in (
        capsys.readouterr().err
    )
    arguments = slice_with(tmp_path, monkeypatch, "exit 74")
    assert main(arguments) == 1
    assert "another run is using the slice run" in capsys.readouterr().err
    # A killed process: the slice is there, what is left on it is ended.
    (tmp_path / "calls").unlink()
    arguments = slice_with(tmp_path, monkeypatch, f"exit {LOST_STATUS}")
    assert main([*arguments[:1], "--restarts", "2", *arguments[1:]]) == 1
    assert "gave up after 2 restarts" in capsys.readouterr().err
    calls = (tmp_path / "calls").read_text().split()
    assert calls == ["scp", "install", "run", "again", "again"]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a clone, for git")
def test_a_slice_that_is_never_given(tmp_path, monkeypatch, capsys):
    arguments = slice_with(tmp_path, monkeypatch, ":", create="FAILED")
    (tmp_path / "state").write_text("FAILED")  # an earlier run's, which is not counted
    assert main([*arguments[:1], "--restarts", "2", *arguments[1:]]) == 1
    calls = (tmp_path / "calls").read_text().split()
    assert calls == ["delete", "create"] * 3
    *lines, last = capsys.readouterr().err.splitlines()
    why = "the request for the slice run ended FAILED: no quota for v4"
    assert lines.count(f"launch: {why}") == 3
    assert last == (
        f"launch: gave up after 2 restarts: {why}; the same command continues where "
        "it stopped"
    )
    # One that is taken away before its first use: not for ever either.
    arguments = slice_with(tmp_path, monkeypatch, ":", create="SUSPENDED")
    assert main([*arguments[:1], "--restarts", "0", *arguments[1:]]) == 1
    assert "the slice run ended SUSPENDED;" in capsys.readouterr().err


def test_shares_from_the_environment():
    slurm = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
    assert worker.share_from_environment(slurm) == (5, 8, {})
    slurm["SLURM_GPUS_ON_NODE"] = "4"
    share = worker.share_from_environment(slurm)
    assert share == (5, 8, {"CUDA_VISIBLE_DEVICES": "1"})
    for ours, expected in (("6,7", "7"), ("3", "3"), ("", "1")):
        slurm["CUDA_VISIBLE_DEVICES"] = ours
        share = worker.share_from_environment(slurm)
        assert share == (5, 8, {"CUDA_VISIBLE_DEVICES": expected})
    job = {"JOB_COMPLETION_INDEX": "2", "SEMLIC_PROCESSES": "4"}
    assert worker.share_from_environment(job) == (2, 4, {})
    share = worker.share_from_environment(job | {"TPU_WORKER_HOSTNAMES": "a,b,c,d"})
    assert share[:2] == (2, 4) and share.variables["TPU_PROCESS_BOUNDS"] == "1,1,1"
    with pytest.raises(ValueError, match="--auto needs SLURM"):
        worker.share_from_environment({"GCE_METADATA_IP": "localhost:1"})


def test_a_tree_is_packed_by_any_tar(tmp_path, monkeypatch):
    """That of macOS knows fewer options than GNU's."""
    stand_in(tmp_path / "bin", "tar", "exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert main(slice_with(tmp_path, monkeypatch, ":")) == 0
    assert (tmp_path / "run_semlic_jax.tar.gz").exists()


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    config = tmp_path / "own.py"
    config.write_text("import no_such_package")
    arguments = ["train", "--config", str(config), "--workdir", str(tmp_path / "x")]
    assert main(["local", "--dry-run", *arguments]) == 1
    reason = "the config file cannot be loaded: No module named 'no_such_package'"
    assert reason in capsys.readouterr().err
    # One of ours, with which the config would be checked.
    monkeypatch.setitem(sys.modules, "semlic_jax.training.train", None)
    assert main(["local", "--dry-run", *arguments]) == 1
    assert "cannot be checked here because a package is" in capsys.readouterr().err
