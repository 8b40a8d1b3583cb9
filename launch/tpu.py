# SPDX-License-Identifier: Apache-2.0
"""A TPU slice: asks for it, installs, runs on all workers, and again if preempted.

The slice is a queued resource with the given name; one that exists already is used as
it is. After the task it stays, unless `--delete` is given. Programs run under `flock`,
so that a second run on the same slice is refused.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence

from launch.tasks import ROOT, SKIPPED_STATUS, Task, run_tool, shown, worth_restarting

_ZONE = re.compile(r"[a-z]+-[a-z]+\d+-[a-z]")
_TYPE = re.compile(r"(v\d+[a-z]*)-\d+")
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,60}[a-z0-9])?")
# Runtime versions of the virtual machines, by generation.
_RUNTIMES = {
    "v2": "tpu-ubuntu2204-base",
    "v3": "tpu-ubuntu2204-base",
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
# States of a queued resource that never becomes active again.
_OVER = ("FAILED", "SUSPENDED", "SUSPENDING", "DELETING")
_BUSY_STATUS = 74
_FOLDER = "semlic_jax_run"
_ARCHIVE = "semlic_jax.tar.gz"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this target."""
    parser.add_argument("--name", required=True, help="name of the queued resource")
    parser.add_argument("--zone", required=True, help="zone, such as us-central2-b")
    parser.add_argument("--type", required=True, help="accelerator type, such as v4-32")
    parser.add_argument(
        "--project",
        help="Google Cloud project; default: GOOGLE_CLOUD_PROJECT or "
        "CLOUDSDK_CORE_PROJECT",
    )
    parser.add_argument(
        "--runtime", help="runtime version of the machines; default: that of --type"
    )
    parser.add_argument(
        "--spot",
        action="store_true",
        help="use a spot slice: cheaper, but it can be preempted",
    )
    parser.add_argument("--service-account", metavar="A")
    parser.add_argument(
        "--restarts",
        metavar="N",
        type=int,
        default=10,
        help="restarts after preemptions and killed processes; default 10",
    )
    parser.add_argument(
        "--poll",
        metavar="S",
        type=float,
        default=60.0,
        help="seconds between checks of the state of the slice; default 60",
    )
    parser.add_argument(
        "--before",
        metavar="COMMAND",
        help="shell command to run on every worker after installing",
    )
    parser.add_argument(
        "--delete", action="store_true", help="delete the slice when the task is done"
    )


def start(options: argparse.Namespace, task: Task) -> int:
    """Run the task to its end, through preemptions; return its exit status.

    Raises:
        ValueError: an argument is wrong, gcloud is missing or not logged in, or the
            task failed.
    """
    task.check_paths_shared("a TPU slice")
    slice_ = _Slice(options, task.shipped_config())
    if options.dry_run:
        slice_.show()
        return 0
    if shutil.which("gcloud") is None:
        raise ValueError("gcloud was not found: install the Google Cloud CLI")
    if not run_tool(
        ["gcloud", "auth", "list", "--filter=status:ACTIVE", "--format=value(account)"]
    ):
        raise ValueError("gcloud has no active account: run gcloud auth login")
    return slice_.run()


class _NoSliceError(ValueError):
    """A slice was requested, and the request came to nothing; the message says why."""


class _Slice:
    """The slice that the options describe, and the commands for it."""

    def __init__(self, options: argparse.Namespace, task: Task) -> None:
        project = (
            options.project
            or os.environ.get("GOOGLE_CLOUD_PROJECT")
            or os.environ.get("CLOUDSDK_CORE_PROJECT")
        )
        if not project:
            raise ValueError(
                "a TPU slice needs --project or the environment variable "
                "GOOGLE_CLOUD_PROJECT, found neither"
            )
        for name, pattern, example in (
            ("name", _NAME, "my-run-1"),
            ("zone", _ZONE, "us-central2-b"),
            ("type", _TYPE, "v4-32"),
        ):
            if not pattern.fullmatch(getattr(options, name)):
                raise ValueError(
                    f"expected --{name} such as {example}, found "
                    f"{getattr(options, name)!r}"
                )
        generation = options.type.partition("-")[0]
        runtime = options.runtime or _RUNTIMES.get(generation)
        if runtime is None:
            raise ValueError(
                f"--type {options.type} needs --runtime: without it, expected a type "
                f"of {', '.join(_RUNTIMES)}"
            )
        self._options, self._task = options, task
        self._place = [f"--project={project}", f"--zone={options.zone}"]
        self._queued = ["gcloud", "compute", "tpus", "queued-resources"]
        self._vm = ["gcloud", "compute", "tpus", "tpu-vm"]
        self._create = [
            *(*self._queued, "create", options.name, *self._place),
            f"--node-id={options.name}",
            f"--accelerator-type={options.type}",
            f"--runtime-version={runtime}",
        ]
        if options.spot:
            self._create.append("--spot")
        if options.service_account:
            self._create.append(f"--service-account={options.service_account}")

    def _named(self, *words: str) -> list[str]:
        return [*self._queued, words[0], self._options.name, *self._place, *words[1:]]

    @property
    def _describe(self) -> list[str]:
        return self._named("describe", "--format=value(state.state)")

    @property
    def _explain(self) -> list[str]:
        return self._named("describe", "--format=value(state.failedData.error.message)")

    @property
    def _remove(self) -> list[str]:
        return self._named("delete", "--force", "--quiet")

    def _ssh(self, line: str, worker: str = "all") -> list[str]:
        return [
            *(*self._vm, "ssh", self._options.name, *self._place),
            *(f"--worker={worker}", f"--command={line}"),
        ]

    @property
    def _archive(self) -> str:
        return f"{tempfile.gettempdir()}/{self._options.name}_{_ARCHIVE}"

    def _install(self) -> list[list[str]]:
        line = (
            f"mkdir -p {_FOLDER} && tar -xzf {_ARCHIVE} -C {_FOLDER} && "
            # The machines come with an older Python than we need.
            f"cd {_FOLDER} && python3 -m pip install --quiet uv && "
            "python3 -m uv venv --quiet --allow-existing --python 3.11 .venv && "
            "python3 -m uv pip install --quiet --python .venv/bin/python "
            "--editable '.[train,eval]' 'jax[tpu]' google-cloud-storage"
        )
        if self._options.before:
            line += f" && {self._options.before}"
        return [
            [
                *(*self._vm, "scp", self._archive, f"{self._options.name}:{_ARCHIVE}"),
                *(*self._place, "--worker=all"),
            ],
            self._ssh(line),
        ]

    def _program(self, *, replace: bool) -> list[str]:
        """The command of the task on its workers; `replace` ends an earlier attempt."""
        command = self._task.command(
            ".venv/bin/python",
            ".",
            distributed=("--distributed=auto",),
            auto=True,
        )
        lock = "/tmp/semlic_jax.lock"
        # Whatever holds the lock file open belongs to the earlier attempt.
        before = f"fuser -k {lock}; " if replace else ""
        wait = "--wait 60" if replace else "--nonblock"
        line = (
            f"cd {_FOLDER} && {{ {before}exec flock {wait} "
            f"--conflict-exit-code {_BUSY_STATUS} {lock} {shlex.join(command)}; }}"
        )
        return self._ssh(line, "0" if self._task.name == "eval" else "all")

    def show(self) -> None:
        """Print the commands in order."""
        parts: Sequence[tuple[str, list[list[str]]]] = (
            ("request the slice, unless it exists", [self._create]),
            ("repeat until it is ACTIVE", [self._describe]),
            (
                "if it is FAILED: why, and then as after a preemption",
                [self._explain],
            ),
            (f"pack what git lists in {ROOT}: {self._archive}", []),
            ("install on all workers", self._install()),
            ("run", [self._program(replace=False)]),
            (
                f"after a preemption, at most {self._options.restarts} times: this, "
                "then all of the above",
                [self._remove],
            ),
            (
                "after a killed process, as many times: this instead",
                [self._program(replace=True)],
            ),
        )
        for title, commands in parts:
            print(f"# {title}")
            for command in commands:
                print(shown(command))
        if self._options.delete:
            print(f"# at the end\n{shown(self._remove)}")

    def run(self) -> int:
        """Do everything, through preemptions; return the task's exit status."""
        _check_clone()
        installed, why = False, ""
        for attempt in range(self._options.restarts + 1):
            try:
                fresh = self._make_active()
            except _NoSliceError as error:
                installed, why = False, str(error)
                _say(why)
                continue
            if fresh or not installed:
                _pack(self._archive)
                try:
                    for command in self._install():
                        run_tool(command)
                except ValueError as error:
                    if not self._is_lost():
                        raise
                    installed, why = False, f"the slice was preempted ({error})"
                    _say(why)
                    continue
                installed = True
            program = self._program(replace=attempt > 0 and not fresh)
            status = subprocess.run(program).returncode
            if status in (0, SKIPPED_STATUS):
                if self._options.delete:
                    run_tool(self._remove)
                return status
            if status == _BUSY_STATUS:
                raise ValueError(
                    f"another run is using the slice {self._options.name}: wait for "
                    "its end or give another --name"
                )
            lost = self._is_lost()
            if not lost and not worth_restarting(status):
                raise ValueError(
                    f"the task ended with status {status}; the slice "
                    f"{self._options.name} still exists"
                )
            why = "the slice was preempted" if lost else "a process was killed"
            why += f" (status {status})"
            _say(why)
        raise ValueError(
            f"gave up after {self._options.restarts} restarts: {why}; the same command "
            "continues where it stopped"
        )

    def _state(self) -> str:
        """State of the queued resource, or "" where there is none."""
        try:
            return run_tool(self._describe)
        except ValueError as error:
            if "NOT_FOUND" in str(error) or "not found" in str(error):
                return ""
            raise

    def _is_lost(self) -> bool:
        # The state follows a preemption with a delay.
        for _ in range(3):
            if self._state() != "ACTIVE":
                return True
            time.sleep(self._options.poll)
        return False

    def _make_active(self) -> bool:
        """Wait for the slice, asking for it if need be; return whether it is new.

        Raises:
            _NoSliceError: it was requested here and did not become active.
        """
        fresh, said = False, ""
        while (state := self._state()) != "ACTIVE":
            if fresh and state in _OVER:
                text = f"the request for the slice {self._options.name} ended {state}"
                reason = run_tool(self._explain) if state == "FAILED" else ""
                raise _NoSliceError(": ".join(filter(None, (text, reason))))
            if state == "" or state in _OVER:
                if state:
                    _say(f"the slice {self._options.name} is {state}: deleting it")
                    run_tool(self._remove)
                _say(f"requesting the slice {self._options.name}")
                run_tool(self._create)
                fresh = True
            elif state != said:
                _say(f"the slice {self._options.name} is {state}")
                said = state
            time.sleep(self._options.poll)
        return fresh


def _check_clone() -> None:
    """Refuse a tree in which git lists no files, since the archive would be empty.

    Raises:
        ValueError: there is no git, no clone, or the clone is empty.
    """
    if shutil.which("git") is None:
        raise ValueError("git was not found: a TPU slice gets the files that git lists")
    if not _listed_files():
        raise ValueError(f"expected files listed by git in {ROOT}, found none")


def _listed_files() -> list[str]:
    """Names of the files of the tree as it is, without what git ignores."""
    names = run_tool(
        ["git", "-C", str(ROOT), "ls-files", "-z", "-co", "--exclude-standard"]
    )
    return [name for name in names.split("\0") if name]


def _pack(archive: str) -> None:
    with tarfile.open(archive, "w:gz") as packed:
        for name in _listed_files():
            if os.path.lexists(ROOT / name):  # git lists what was deleted, too
                packed.add(ROOT / name, name)


def _say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)
