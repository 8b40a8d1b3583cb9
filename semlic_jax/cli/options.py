# SPDX-License-Identifier: Apache-2.0
"""Options that several commands have: how they are given and what they mean."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from semlic_jax.cli.terminal import say

if TYPE_CHECKING:
    from pathlib import Path

    from semlic_jax.images import Photograph


Commands: TypeAlias = "argparse._SubParsersAction[Any]"


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    text: str,
) -> argparse.ArgumentParser:
    """A command of which `run` does the work and returns the exit status."""
    # No abbreviations: a script must not break when an option is added.
    command = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:], allow_abbrev=False
    )
    command.set_defaults(run=run)
    command.add_argument(
        "--debug", action="store_true", help="show the traceback of an error"
    )
    return command


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="M",
        default="small",
        help="small, base or a path; default small",
    )


def add_rate(group: argparse._MutuallyExclusiveGroup) -> None:
    group.add_argument("--quality", type=unit_float, metavar="Q", help="0 to 1")
    group.add_argument("--bpp", type=positive_float, metavar="B", help="bits per pixel")
    group.add_argument(
        "--max-bytes", type=positive_int, metavar="N", help="largest size of the file"
    )


def add_background(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--background", metavar="COLOUR", help="what transparent pixels are laid on"
    )


def add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="replace existing outputs")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs to read")


def unit_float(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected 0 to 1, found {text}")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text}")
    return value


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {text}")
    return value


def preset_or_steps(text: str) -> str | int:
    return text if text.isalpha() else int(text)


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def rates(text: str) -> list[float]:
    return [positive_float(rate) for rate in names(text)]


# argparse names the type in "invalid ... value".
unit_float.__name__ = positive_float.__name__ = "number"
rates.__name__ = "list of numbers"
positive_int.__name__ = "whole number"
preset_or_steps.__name__ = "preset or number of steps"


def background_colour(options: argparse.Namespace) -> tuple[int, int, int] | None:
    from semlic_jax.images import parse_colour

    return None if options.background is None else parse_colour(options.background)


def read_input(options: argparse.Namespace) -> Photograph:
    """The photograph that the command is given; what was changed in it is noted."""
    from semlic_jax.images import read_photograph

    photograph = read_photograph(options.input, background=background_colour(options))
    for note in photograph.notes:
        say(f"note: {options.input.name}: {note}")
    return photograph


def check_not_input(options: argparse.Namespace, output: Path) -> None:
    if output.exists() and output.samefile(options.input):
        raise ValueError(f"the output {output} is the input: give another name")
