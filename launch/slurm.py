# SPDX-License-Identifier: Apache-2.0
"""A SLURM job: one process per GPU, through `slurm.sbatch`.

The job runs in the folder and with the Python that it is submitted from: both must be
on a disk that the nodes share.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys

from launch.tasks import ROOT, Task, run_tool, shown

_SCRIPT = ROOT / "launch" / "slurm.sbatch"
_TIME = re.compile(r"(\d+-)?\d+(:\d{2}){0,2}")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this target."""
    parser.add_argument(
        "--nodes", metavar="N", type=int, default=1, help="number of nodes; default 1"
    )
    parser.add_argument(
        "--gpus-per-node",
        metavar="N",
        type=int,
        default=8,
        help="GPUs per node, or 0 for CPUs only; default 8",
    )
    parser.add_argument(
        "--cpus-per-gpu",
        metavar="N",
        type=int,
        default=8,
        help="CPUs of each process, of which there is one per GPU, or one per node "
        "without GPUs; default 8",
    )
    parser.add_argument(
        "--time", metavar="[D-]HH:MM:SS", required=True, help="time limit of the job"
    )
    parser.add_argument("--partition", metavar="P")
    parser.add_argument("--account", metavar="A")
    parser.add_argument(
        "--restarts",
        metavar="N",
        type=int,
        default=3,
        help="times that the job is requeued after a process was killed; default 3",
    )
    parser.add_argument(
        "--sbatch",
        metavar="OPTION",
        action="append",
        default=[],
        help="any other option of sbatch, such as --sbatch=--qos=high; repeatable",
    )


def start(options: argparse.Namespace, task: Task) -> int:
    """Submit the job.

    Raises:
        ValueError: an argument is wrong, or there is no SLURM here.
    """
    if options.nodes < 1 or options.gpus_per_node < 0:
        raise ValueError(
            "expected --nodes of at least 1 and --gpus-per-node of at least 0, found "
            f"{options.nodes} and {options.gpus_per_node}"
        )
    if options.cpus_per_gpu < 1:
        raise ValueError(
            f"--cpus-per-gpu must be at least 1, found {options.cpus_per_gpu}"
        )
    if not _TIME.fullmatch(options.time):
        raise ValueError(f"expected --time such as 24:00:00, found {options.time!r}")
    alone = task.name == "eval"
    nodes = 1 if alone else options.nodes
    tasks = 1 if alone else max(1, options.gpus_per_node)
    command = ["sbatch", f"--nodes={nodes}", f"--ntasks-per-node={tasks}"]
    if options.gpus_per_node:
        command.append(f"--gpus-per-node={1 if alone else options.gpus_per_node}")
    # There is one task per GPU, so that this is the same. SLURM's own --cpus-per-gpu
    # excludes --cpus-per-task, which --sbatch may give.
    command.append(f"--cpus-per-task={options.cpus_per_gpu}")
    command.append(f"--time={options.time}")
    for name in ("partition", "account"):
        if getattr(options, name):
            command.append(f"--{name}={getattr(options, name)}")
    together = nodes * tasks > 1
    command += [
        *options.sbatch,
        str(_SCRIPT),
        *task.command(
            sys.executable,
            str(ROOT),
            distributed=("--distributed=auto",) if together else (),
            auto=together,
        ),
    ]
    variables = {"SEMLIC_RESTARTS": str(options.restarts)}
    if options.dry_run:
        print(shown(command, variables))
        return 0
    if shutil.which("sbatch") is None:
        raise ValueError(
            "sbatch was not found: run this on a login node of the cluster"
        )
    os.environ.update(variables)
    print(run_tool(command))
    return 0
