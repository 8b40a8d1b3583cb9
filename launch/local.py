# SPDX-License-Identifier: Apache-2.0
"""One machine: one or several processes, with the GPUs dealt out among them.

One process uses all GPUs that it sees, so several processes are needed only where they
must be separate: for shares of a refinement, or to try out what a pod will do.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TextIO

from launch.tasks import ROOT, SKIPPED_STATUS, Task, shown, worth_restarting

# Between SIGTERM and SIGKILL: for processes that cannot go on without one that is gone,
# and for those of a run that is told to stop, which save what they have.
_TERM_SECONDS = 10.0
_SAVE_SECONDS = 90.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this target."""
    parser.add_argument(
        "--processes",
        metavar="N",
        type=int,
        default=1,
        help="number of processes; default 1",
    )
    parser.add_argument(
        "--gpus",
        metavar="N",
        type=int,
        default=0,
        help="GPUs to divide among the processes; default: every process sees all GPUs",
    )
    parser.add_argument(
        "--port",
        metavar="P",
        type=int,
        default=0,
        help="port of process 0; default: a free one",
    )
    parser.add_argument(
        "--restarts",
        metavar="N",
        type=int,
        default=0,
        help="restarts after a process was killed; default 0",
    )
    parser.add_argument(
        "--grace",
        metavar="S",
        type=float,
        default=30.0,
        help="seconds that the other processes of a training get to stop by themselves "
        "when one has failed; default 30",
    )


def start(options: argparse.Namespace, task: Task) -> int:
    """Run the task to its end; return its exit status.

    Raises:
        ValueError: an argument is wrong, or a process failed; says which and how.
    """
    count = 1 if task.name == "eval" else options.processes
    if count < 1:
        raise ValueError(f"--processes must be at least 1, found {count}")
    if options.gpus and options.gpus % count:
        raise ValueError(
            f"--gpus must be a multiple of the {count} processes, found {options.gpus}"
        )
    if options.dry_run:
        for command, variables in _commands(options, task, count):
            print(shown(command, variables))
        return 0
    for restart in range(options.restarts + 1):
        ends = _run(options, task, count)
        failed = [end for end in ends if end.status]
        if all(end.status == SKIPPED_STATUS for end in failed):
            return SKIPPED_STATUS if failed else 0
        story = "; ".join(end.story() for end in failed)
        if not all(
            end.stopped or end.status == SKIPPED_STATUS or worth_restarting(end.status)
            for end in failed
        ):
            raise ValueError(story)
        if restart < options.restarts:
            print(f"launch: {story}; starting again", file=sys.stderr, flush=True)
    raise ValueError(f"{story}; the same command continues where it stopped")


class _End(NamedTuple):
    """How a process ended; `stopped` if we ended it because of another one."""

    process: int
    status: int
    stopped: bool

    def story(self) -> str:
        if self.stopped:
            return f"process {self.process} was stopped"
        if self.status < 0:
            name = signal.Signals(-self.status).name
            return f"process {self.process} was killed by {name}"
        return f"process {self.process} ended with status {self.status}"


def _commands(
    options: argparse.Namespace, task: Task, count: int
) -> list[tuple[list[str], dict[str, str]]]:
    port = options.port or _free_port()
    gpus = visible_gpus(os.environ, options.gpus)
    commands = []
    for process in range(count):
        distributed: Sequence[str] = ()
        if count > 1:
            distributed = (
                "--distributed=explicit",
                f"--coordinator=localhost:{port}",
                f"--processes={count}",
                f"--process={process}",
            )
        command = task.command(
            sys.executable,
            str(ROOT),
            distributed=distributed,
            process=process,
            processes=count,
        )
        variables = {}
        if options.gpus:
            each = options.gpus // count
            own = gpus[process * each : (process + 1) * each]
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        commands.append((command, variables))
    return commands


def visible_gpus(environment: Mapping[str, str], count: int) -> list[str]:
    """Names of `count` GPUs, of those that are ours if the environment says which.

    Raises:
        ValueError: fewer than `count` are ours.
    """
    own = environment.get("CUDA_VISIBLE_DEVICES")
    if own is None:
        return [str(gpu) for gpu in range(count)]
    names = [name for name in own.split(",") if name]
    if len(names) < count:
        raise ValueError(
            f"expected {count} GPUs in CUDA_VISIBLE_DEVICES, found {own!r}"
        )
    return names[:count]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _run(options: argparse.Namespace, task: Task, count: int) -> list[_End]:
    """Start all processes and wait for them to end.

    If they work as one and one fails, the others get a grace period in which to say
    what they saw.
    """
    # The handler only takes a note: an exception raised between starting a process and
    # listing it would leave that process running.
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    running: list[subprocess.Popen[str]] = []
    readers: list[threading.Thread] = []
    stopped: set[int] = set()
    seconds = _SAVE_SECONDS
    try:
        for process, (command, variables) in enumerate(_commands(options, task, count)):
            running.append(_start(command, variables))
            if count > 1:
                text = f"launch: process {process} has PID {running[-1].pid}"
                print(text, file=sys.stderr, flush=True)
            reader = threading.Thread(
                target=_copy_lines,
                args=(running[-1].stdout, f"[{process}] " if count > 1 else ""),
            )
            reader.start()
            readers.append(reader)
        until = float("inf")
        while not told and any(each.poll() is None for each in running):
            if task.as_one and any(each.poll() for each in running):
                until = min(until, time.monotonic() + options.grace)
            if time.monotonic() > until:
                break
            time.sleep(0.1)
        if told:
            sys.exit(128 + signal.SIGTERM)
        seconds = _TERM_SECONDS
    finally:
        try:
            stopped = _stop(running, seconds, told)
        finally:
            for reader in readers:
                reader.join()
            signal.signal(signal.SIGTERM, before)
    if told:  # while the others were being stopped
        sys.exit(128 + signal.SIGTERM)
    return [
        _End(process, each.returncode, process in stopped)
        for process, each in enumerate(running)
    ]


def _start(
    command: Sequence[str], variables: Mapping[str, str]
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=dict(os.environ, **variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def _copy_lines(source: TextIO, prefix: str) -> None:
    with source:
        for line in source:
            sys.stdout.write(f"{prefix}{line}")
            sys.stdout.flush()


def _stop(
    running: Sequence[subprocess.Popen[str]], seconds: float, told: Sequence[int]
) -> set[int]:
    """End the processes that are still running; return which they were.

    Those that are left after so many seconds are killed, and at once if there is one
    more signal in `told` or an interrupt.
    """
    left = {process for process, each in enumerate(running) if each.poll() is None}
    for process in left:
        running[process].terminate()
    until, before = time.monotonic() + seconds, len(told)
    try:
        while any(running[process].poll() is None for process in left):
            if time.monotonic() > until or len(told) > before:
                break
            time.sleep(0.1)
    finally:
        for process in left:
            running[process].kill()
            running[process].wait()
    return left
