# SPDX-License-Identifier: Apache-2.0
"""The tasks: the one place where the command of a task is checked and built.

======================================  ===========================================
task                                    processes
======================================  ===========================================
`train --config F --workdir DIR ...`    work as one, on all their devices
`refine IN OUT ...`                     each takes its share of the images
`eval IMAGES... --out DIR ...`          one
======================================  ===========================================
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("train", "refine", "eval")

# Exit status of a process that lost another one of its run and found nothing else
# wrong: `semlic_jax.training.sharding.LOST_STATUS`, which is not imported because a
# launcher needs no JAX.
LOST_STATUS = 75
# Exit status of `semlic` if all is done except for inputs that were skipped.
SKIPPED_STATUS = 4


class Parser(argparse.ArgumentParser):
    """argparse, with its error messages in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"launch: {message}; see {self.prog} --help\n")


@dataclasses.dataclass(frozen=True)
class Task:
    """A task with its arguments, checked.

    Attributes:
        name: one of `TASKS`.
        arguments: the arguments of `semlic NAME`.
        paths: inputs and outputs among them.
        config: the config of a training, FILE[:ARGUMENT].
    """

    name: str
    arguments: tuple[str, ...]
    paths: tuple[str, ...]
    config: str = ""

    @property
    def as_one(self) -> bool:
        """Whether the processes work together and stop together."""
        return self.name == "train"

    def command(
        self,
        python: str,
        root: str,
        *,
        distributed: Sequence[str] = (),
        process: int = 0,
        processes: int = 1,
        auto: bool = False,
    ) -> list[str]:
        """The command that one process runs.

        Args:
            python: Python of the environment that semlic_jax is installed in.
            root: the repository's folder on the machine.
            distributed: options by which a training finds its other processes.
            process, processes: this process's share of a refinement.
            auto: whether share and devices are found out on the machine.
        """
        program = [python, "-m", "semlic_jax.cli", self.name]
        if self.name == "train":
            return [*program, *self.arguments, *distributed]
        share: list[str] = []
        if self.name == "refine" and processes > 1:
            share = [f"--processes={processes}", f"--process={process}"]
        if auto or any(path.startswith("gs://") for path in self.paths):
            worker = [python, f"{root}/launch/worker.py"]
            share = ["--auto"] if auto else share
            return [*worker, *share, self.name, *self.arguments]
        return [*program, *self.arguments, *share]

    def check_paths_shared(self, where: str) -> None:
        """Refuse paths that only this machine would know.

        Raises:
            ValueError: there is such a path; names the first.
        """
        for path in self.paths:
            if not path.startswith(("gs://", "/")):
                raise ValueError(
                    f"{where} needs paths that all its machines can reach, gs://... "
                    f"or absolute paths on a shared disk, found {path!r}"
                )

    def shipped_config(self) -> Task:
        """The same task, with the config's path relative to the repository.

        Raises:
            ValueError: the config is not in the repository, which is what the machines
                get a copy of.
        """
        if not self.config:
            return self
        file, colon, argument = self.config.partition(":")
        found = Path(file).resolve()
        if not found.is_relative_to(ROOT):
            raise ValueError(
                "--config must be inside the repository, which is copied to the "
                f"machines, found {file}"
            )
        config = f"{found.relative_to(ROOT).as_posix()}{colon}{argument}"
        place = self.arguments.index(self.config)
        arguments = (*self.arguments[:place], config, *self.arguments[place + 1 :])
        return dataclasses.replace(self, arguments=arguments, config=config)


def read_task(name: str, arguments: Sequence[str]) -> Task:
    """Check the arguments of a task.

    Raises:
        ValueError: something is missing or wrong; the message says what in one
            sentence.
    """
    arguments = list(arguments)
    if name == "train":
        return _read_train(arguments)
    given = _leading(arguments)
    if name == "refine":
        if len(given) != 2:
            raise ValueError(
                f"refine needs IN_DIR and OUT_DIR before its options, found "
                f"{shlex.join(given) or 'none'}"
            )
        _check_exists(given[0])
        return Task(name, tuple(arguments), tuple(given))
    if not given:
        raise ValueError("eval needs IMAGES before its options, found none")
    parser = Parser(prog="launch eval", add_help=False, allow_abbrev=False)
    parser.add_argument("--out")
    out = parser.parse_known_args(arguments)[0].out
    if not out:
        raise ValueError("eval needs --out DIR, found none")
    for path in given:
        _check_exists(path)
    return Task(name, tuple(arguments), (*given, out))


def _read_train(arguments: list[str]) -> Task:
    parser = Parser(prog="launch train", add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--workdir")
    options, overrides = parser.parse_known_args(arguments)
    for key in ("config", "workdir"):
        if not getattr(options, key):
            raise ValueError(f"train needs --{key}, found none")
    for override in overrides:
        if not override.startswith("--config."):
            raise ValueError(
                "train takes --config, --workdir and --config.key=value, found "
                f"{override!r}"
            )
    if not Path(options.config.partition(":")[0]).is_file():
        raise ValueError(
            f"--config: the file {options.config.partition(':')[0]} does not exist"
        )
    if importlib.util.find_spec("ml_collections") and importlib.util.find_spec("orbax"):
        # A wrong key is better found here than on a hundred machines.
        try:
            from semlic_jax.training.train import load_config
        except ImportError as error:
            raise ValueError(
                "the config cannot be checked here because a package is missing: "
                f"{error}"
            ) from error
        load_config(options.config, overrides)
    arguments = ["--config", options.config, "--workdir", options.workdir, *overrides]
    return Task("train", tuple(arguments), (options.workdir,), options.config)


def _leading(arguments: Sequence[str]) -> list[str]:
    leading = []
    for argument in arguments:
        if argument.startswith("-"):
            break
        leading.append(argument)
    return leading


def _check_exists(path: str) -> None:
    # What the machines mount need not be here.
    here = not path.startswith(("gs://", "/"))
    if here and not Path(path).exists():
        raise ValueError(f"{path} does not exist")


def shown(command: Sequence[str], variables: Mapping[str, str] | None = None) -> str:
    """A command in the form that a shell takes."""
    assignments = [
        f"{key}={shlex.quote(value)}" for key, value in (variables or {}).items()
    ]
    return " ".join([*assignments, shlex.join(command)])


def worth_restarting(status: int) -> bool:
    """Whether a process was killed or lost another one, and did not itself fail."""
    return status < 0 or status > 128 or status == LOST_STATUS


def run_tool(command: Sequence[str], *, stdin: str | None = None) -> str:
    """Run a command of a cloud or a cluster; return its output.

    Raises:
        ValueError: it failed; the message has the end of what it printed.
    """
    done = subprocess.run(command, input=stdin, capture_output=True, text=True)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[-400:]
        raise ValueError(
            f"{' '.join(command[:5])} ... ended with status {done.returncode}: {said}"
        )
    return done.stdout.strip()
