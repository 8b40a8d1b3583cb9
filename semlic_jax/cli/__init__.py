# SPDX-License-Identifier: Apache-2.0
"""The command line: `semlic compress | decompress | refine | info | demo | models |
bench | eval | compare | convert | train | pack`.

Options may stand before, between and after the names of files. Where `compress`,
`decompress` and `info` take a file, `-` is the standard input or output.

Each command imports what it needs when it runs, so that `semlic --help` and `semlic
info` answer at once. A refusal is one sentence on the error stream and exit status 1;
wrong usage is status 2; an error of ours is status 3 (`--debug` shows the traceback);
status 4 says that the work is done, but for some inputs that were skipped.
Results go to the standard output; notes and progress to the error stream, progress only
where that is a terminal.
"""

from __future__ import annotations

import argparse
import codecs
import io
import itertools
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import semlic_jax
from semlic_jax.cli import files, measure, models, refine
from semlic_jax.cli.terminal import (
    INTERNAL,
    INTERRUPTED,
    REFUSED,
    STREAM,
    USAGE,
    cache_warnings_are_notes,
    reason_of,
    say,
)
from semlic_jax.memory import is_out_of_memory


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files need not be UTF-8: they come out as the bytes that they are,
        # and what another encoding lacks comes out as its number.
        utf8 = codecs.lookup(sys.stdout.encoding).name == "utf-8"
        errors = "surrogateescape" if utf8 else "backslashreplace"
        sys.stdout.reconfigure(errors=errors)
    if "program" in options:
        options.rest = rest
    elif rest:
        options.command.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        with cache_warnings_are_notes():
            status = options.run(options)
        if sys.stdout is not None:  # closed by the caller
            sys.stdout.flush()
        return status or 0
    except BrokenPipeError:
        # The reader went away. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return REFUSED
    except KeyboardInterrupt:
        say("semlic: interrupted")
        return INTERRUPTED
    except Exception as error:
        if options.debug:
            raise
        message, status = _explain(error)
        say(f"semlic: {message}")
        return status


def _explain(error: Exception) -> tuple[str, int]:
    """One sentence for people, and the exit status."""
    text = reason_of(error)
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {text}"
    if isinstance(error, ValueError | OSError) or is_out_of_memory(error):
        return text, REFUSED
    kind = type(error).__name__
    return f"internal error, {kind}: {text} (--debug shows the traceback)", INTERNAL


class _Parser(argparse.ArgumentParser):
    """argparse, with options among the files and its complaints in one line."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # Left to itself, argparse gives `IN --bpp 0.2 OUT` no OUT: one that may be
        # missing is taken to be missing where the first option comes. (Its own way
        # around that, parse_known_intermixed_args, takes no file after `--`.)
        takes_files = self._subparsers is None and self._get_positional_actions()
        if takes_files and args is not None:
            args = self._options_first(args)
        return super().parse_known_args(args, namespace)

    def _options_first(self, args: Sequence[str]) -> list[str]:
        """The same arguments with the options before all others."""
        options: list[str] = []
        others: list[str] = []
        waiting = iter(args)
        for arg in waiting:
            if arg == "--":
                others += waiting
            elif arg.startswith("-") and arg != STREAM:
                options.append(arg)
                action = self._option_string_actions.get(arg)
                if action is not None and action.nargs is None:  # a value follows
                    options += itertools.islice(waiting, 1)
            else:
                others.append(arg)
        return [*options, "--", *others] if others else options

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"semlic: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="semlic",
        description="A perceptual image codec: small files that look real.",
    )
    parser.add_argument(
        "--version", action="version", version=f"semlic_jax {semlic_jax.__version__}"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (
        files.add_compress,
        files.add_decompress,
        refine.add_refine,
        files.add_info,
        measure.add_demo,
        models.add_models,
        measure.add_bench,
        models.add_programs,
        measure.add_eval,
        measure.add_compare,
        models.add_convert,
    ):
        add(commands)
    return parser
