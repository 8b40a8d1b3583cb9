# SPDX-License-Identifier: Apache-2.0
"""Runs `semlic refine` or `semlic eval` on each machine; a self-contained script.

    python launch/worker.py [--process I --processes N | --auto] refine|eval ...

`--auto` finds out from the environment (SLURM, an indexed job of Kubernetes, or a TPU
VM) which process this is, and of how many. Each process works alone and sees only its
own devices. Folders in a bucket are first copied to the machine; what is new in the
output is copied back while the program runs, so that a preempted run goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from etils import epath

_COPIES = 16
_UPLOAD_SECONDS = 30.0
_PAUSES_S = (2, 10, 30)  # between the tries of the last upload
# Exit status of `semlic` if all is done except for inputs that were skipped.
_SKIPPED_STATUS = 4
# libtpu's names for the arrangement of a host's chips.
_CHIP_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}


class Share(NamedTuple):
    """This process's number, the number of all, and the variables of its program."""

    process: int
    processes: int
    variables: Mapping[str, str]


def share_from_environment(environment: Mapping[str, str]) -> Share:
    """This process's share of the work.

    Raises:
        ValueError: this is neither a SLURM step nor an indexed job nor a TPU VM.
    """
    if "SLURM_PROCID" in environment:
        variables = {}
        if environment.get("SLURM_GPUS_ON_NODE", "0") not in ("", "0"):
            local = int(environment["SLURM_LOCALID"])
            # The job's GPUs, if the node is shared; a single one is the step's own.
            own = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
            gpu = own[local % len(own)] or str(local)
            variables["CUDA_VISIBLE_DEVICES"] = gpu
        return Share(
            int(environment["SLURM_PROCID"]),
            int(environment["SLURM_NTASKS"]),
            variables,
        )
    if "JOB_COMPLETION_INDEX" in environment:
        count = int(environment["SEMLIC_PROCESSES"])
        variables = _alone(count) if "TPU_WORKER_HOSTNAMES" in environment else {}
        return Share(int(environment["JOB_COMPLETION_INDEX"]), count, variables)
    try:
        process = int(_metadata("agent-worker-number", environment))
        workers = _metadata("worker-network-endpoints", environment)
    except (OSError, ValueError) as error:
        raise ValueError(
            "--auto needs SLURM, an indexed Kubernetes job or a TPU VM, found none"
        ) from error
    count = len(workers.split(","))
    return Share(process, count, _alone(count))


def _metadata(key: str, environment: Mapping[str, str]) -> str:
    host = environment.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/attributes/{key}",
        headers={"Metadata-Flavor": "Google"},
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        return answer.read().decode()


def _alone(hosts: int) -> dict[str, str]:
    """Variables that make a TPU host use its own chips without awaiting the others."""
    if hosts == 1:
        return {}
    devices = Path("/dev")
    chips = len([*devices.glob("accel[0-9]*"), *devices.glob("vfio/[0-9]*")])
    return {
        "TPU_PROCESS_BOUNDS": "1,1,1",
        "TPU_CHIPS_PER_PROCESS_BOUNDS": _CHIP_BOUNDS.get(chips, f"{chips},1,1"),
        "TPU_VISIBLE_CHIPS": ",".join(map(str, range(chips))),
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "CLOUD_TPU_TASK_ID": "0",
    }


class Staged(NamedTuple):
    """A task's arguments with local paths, and its output if that is in a bucket."""

    arguments: list[str]
    output: Path | None
    remote: epath.Path | None


def stage(name: str, arguments: list[str], scratch: Path) -> Staged:
    """Copy what is in buckets to `scratch`.

    Raises:
        ValueError: an input does not exist, or `eval` has no `--out`.
    """
    arguments = [
        part
        for argument in arguments
        for part in (
            argument.split("=", 1) if argument.startswith("--out=") else [argument]
        )
    ]
    inputs = sum(1 for _ in itertools.takewhile(_is_no_option, arguments))
    if name == "eval" and "--out" not in arguments:
        raise ValueError("eval needs --out DIR, found none")
    out = 1 if name == "refine" else arguments.index("--out") + 1
    staged = Staged(list(arguments), None, None)
    for i, path in enumerate(arguments):
        if not path.startswith("gs://") or (i >= inputs and i != out):
            continue
        remote = epath.Path(path)
        local = scratch / str(i) / remote.name
        staged.arguments[i] = str(local)
        copy_here(remote, local, must_exist=i != out)
        if i == out:
            local.mkdir(parents=True, exist_ok=True)
            staged = staged._replace(output=local, remote=remote)
    return staged


def _is_no_option(argument: str) -> bool:
    return not argument.startswith("-")


def copy_here(source: epath.Path, target: Path, *, must_exist: bool) -> None:
    """Copy a file, or a folder with everything in it.

    Raises:
        ValueError: it does not exist but must.
    """
    if source.is_dir():
        pairs = [(path, target / str(inner)) for inner, path in _files(source)]
    elif source.exists():
        pairs = [(source, target)]
    elif must_exist:
        raise ValueError(f"{source} does not exist")
    else:
        return

    def copy(pair: tuple[epath.Path, Path]) -> None:
        pair[1].parent.mkdir(parents=True, exist_ok=True)
        pair[1].write_bytes(pair[0].read_bytes())

    with ThreadPoolExecutor(_COPIES) as pool:
        list(pool.map(copy, pairs))


def _files(folder: epath.Path, inner: str = "") -> Iterator[tuple[str, epath.Path]]:
    for path in sorted(folder.iterdir()):
        name = f"{inner}{path.name}"
        if path.is_dir():
            yield from _files(path, f"{name}/")
        else:
            yield name, path


class Uploader:
    """Copies the files of a folder that are new or changed, each time it is called."""

    def __init__(self, folder: Path, remote: epath.Path) -> None:
        self._folder, self._remote = folder, remote
        self._seen = dict(self._now())

    def _now(self) -> Iterator[tuple[Path, tuple[int, int]]]:
        for path in sorted(self._folder.rglob("*")):
            # Names of files that are being written begin with a dot.
            if path.is_file() and not path.name.startswith("."):
                status = path.stat()
                yield path, (status.st_mtime_ns, status.st_size)

    def upload(self) -> int:
        """Copy the files; return how many they were."""
        changed = [(p, mark) for p, mark in self._now() if self._seen.get(p) != mark]

        def copy(entry: tuple[Path, tuple[int, int]]) -> None:
            path, mark = entry
            target = self._remote / path.relative_to(self._folder).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
            self._seen[path] = mark

        with ThreadPoolExecutor(_COPIES) as pool:
            list(pool.map(copy, changed))
        return len(changed)


def _try_to_upload(uploader: Uploader) -> int | None:
    """The number of files copied; None where the bucket fails, perhaps for a while."""
    try:
        return uploader.upload()
    except Exception as error:  # the libraries behind `epath` have their own
        print(f"launch: not copied yet: {_reason(error)}", file=sys.stderr, flush=True)
        return None


def _upload_at_last(uploader: Uploader) -> int:
    """The last upload, tried a few times; the number of files copied."""
    for pause_s in _PAUSES_S:
        count = _try_to_upload(uploader)
        if count is not None:
            return count
        time.sleep(pause_s)
    return uploader.upload()


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def run(name: str, arguments: list[str], share: Share) -> int:
    """Run the program; return its exit status.

    Raises:
        OSError: its results cannot be copied; they stay where they are.
    """
    scratch = Path(tempfile.mkdtemp(prefix="semlic_"))
    copied = True
    try:
        staged = stage(name, arguments, scratch)
        command = [sys.executable, "-m", "semlic_jax.cli", name, *staged.arguments]
        if name == "refine" and share.processes > 1:
            command += [f"--processes={share.processes}", f"--process={share.process}"]
        uploader = None
        if staged.output is not None and staged.remote is not None:
            uploader = Uploader(staged.output, staged.remote)
        program = subprocess.Popen(command, env={**os.environ, **share.variables})
        try:
            while program.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    program.wait(_UPLOAD_SECONDS)
                if uploader is not None:
                    _try_to_upload(uploader)
        finally:
            program.terminate()
            status = program.wait()
            if uploader is not None:
                begun_s = time.monotonic()
                try:
                    count = _upload_at_last(uploader)
                except Exception as error:
                    copied = False
                    raise OSError(
                        f"the results cannot be copied to {staged.remote}, and stay in "
                        f"{staged.output}: {_reason(error)}"
                    ) from error
                print(
                    f"copied {count} files to {staged.remote} in "
                    f"{time.monotonic() - begun_s:.0f} s",
                    file=sys.stderr,
                )
        return 128 - status if status < 0 else status
    finally:
        if copied:
            shutil.rmtree(scratch, ignore_errors=True)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="launch/worker.py", allow_abbrev=False)
    parser.add_argument("--auto", action="store_true")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("task", choices=("refine", "eval"))
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    # The machine may be about to go away: what is done is copied back first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        share = Share(options.process, options.processes, {})
        if options.auto:
            share = share_from_environment(os.environ)
        status = run(options.task, options.arguments, share)
        if options.auto and share.processes > 1 and status == _SKIPPED_STATUS:
            # Clusters take any other status for a failure; the names were printed.
            return 0
        return status
    except (ValueError, ImportError, OSError) as error:
        print(f"launch: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
