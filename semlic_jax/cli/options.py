# SPDX-License-Identifier: Apache-2.0
"""Options that several commands have: how they are given and what they mean."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from semlic_jax.cli.terminal import say
from semlic_jax.option_kinds import positive_float, positive_int, unit_float

if TYPE_CHECKING:
    from semlic_jax.images import Photograph


DEFAULT_MODEL = "small"
DEBUG_HELP = "show the traceback of an error; default: a one-sentence message"

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
    command.set_defaults(run=run, command=command)
    command.add_argument("--debug", action="store_true", help=DEBUG_HELP)
    return command


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="MODEL",
        default=DEFAULT_MODEL,
        help="small or base (packaged), or the path of a model file, .npz; "
        f"default {DEFAULT_MODEL}",
    )


def add_rate(group: argparse._MutuallyExclusiveGroup) -> None:
    group.add_argument(
        "--quality",
        type=unit_float,
        metavar="Q",
        help="quality from 0 (smallest file) to 1 (best)",
    )
    group.add_argument(
        "--bpp",
        type=positive_float,
        metavar="BPP",
        help="upper limit on the bits per pixel of the file, such as 0.15",
    )
    group.add_argument(
        "--max-bytes",
        type=positive_int,
        metavar="N",
        help="upper limit on the bytes of the file; more than the best quality needs "
        "is allowed",
    )


def add_background(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--background",
        metavar="COLOUR",
        help="colour behind transparent pixels: a name such as white, or #rrggbb; "
        "default: images with transparent pixels are refused",
    )


def add_srgb(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--srgb",
        action="store_true",
        help="convert colours of another ICC profile to sRGB, and spend the bytes of "
        "the profile on the image; default: keep the profile",
    )


def add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace existing outputs; default: refuse to replace them",
    )


def add_json(
    parser: argparse.ArgumentParser, what: str = "print JSON, for programs to read"
) -> None:
    parser.add_argument("--json", action="store_true", help=what)


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


def check_not_inputs(inputs: Sequence[Path], outputs: Sequence[Path]) -> None:
    """Refuses an output that is one of the inputs, under whatever name."""
    # Not `Path.exists`, which raises where a folder is closed to us.
    known = {_identity(path) for path in inputs if os.path.exists(path)}
    for path in outputs:
        if os.path.exists(path) and _identity(path) in known:
            raise ValueError(f"the output {path} is also an input: give another name")


def _identity(path: Path) -> tuple[int, int]:
    """What of a file is the same under all of its names."""
    found = path.stat()
    return found.st_dev, found.st_ino


def note_folders_left_out(inputs: Sequence[Path], output: Path) -> None:
    """Says which folders inside those given are not looked into, but for the output."""
    from semlic_jax.evaluation.image_sets import folders_left_out

    for given in inputs:
        left_out = [
            path.name
            for path in folders_left_out(given)
            if not (output.exists() and path.samefile(output))
        ]
        if left_out:
            say(f"note: {given}: subfolders are not searched: {_some(left_out)}")


def _some(names: Sequence[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
