# SPDX-License-Identifier: Apache-2.0
"""`python -m launch TARGET [OPTIONS] TASK [ARGUMENTS]`; see README.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from launch import gke, local, slurm, tpu
from launch.tasks import TASKS, Parser, read_task

_TARGETS = {
    "local": (local, "this machine, in one or several processes"),
    "slurm": (slurm, "a SLURM job on one or more nodes"),
    "tpu": (tpu, "a TPU slice, requested as a queued resource"),
    "gke": (gke, "a JobSet on Kubernetes, with TPUs or GPUs"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Start a task; return the exit status."""
    parser = Parser(
        prog="launch",
        description="Start training, batch refinement or evaluation; "
        "see launch/README.md.",
    )
    targets = parser.add_subparsers(metavar="TARGET", dest="target", required=True)
    for name, (target, text) in _TARGETS.items():
        sub = targets.add_parser(
            name, help=text, description=text[0].upper() + text[1:], allow_abbrev=False
        )
        sub.add_argument(
            "--dry-run",
            action="store_true",
            help="print the commands without running them",
        )
        target.add_options(sub)
        sub.add_argument("task", choices=TASKS, help="what to run")
        sub.add_argument(
            "arguments",
            nargs=argparse.REMAINDER,
            help="arguments of `semlic TASK`",
        )
    options = parser.parse_args(argv)
    try:
        if options.restarts < 0:  # every target has this option
            raise ValueError(f"--restarts must be at least 0, found {options.restarts}")
        task = read_task(options.task, options.arguments)
        return _TARGETS[options.target][0].start(options, task)
    except (ValueError, OSError) as error:
        print(f"launch: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("launch: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
