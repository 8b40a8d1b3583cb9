# SPDX-License-Identifier: Apache-2.0
"""What all programs share: progress on a terminal, exit statuses, kinds of options."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

REFUSED, SKIPPED = 1, 4  # the second: all is done, but for some inputs


@contextmanager
def progress_line() -> Iterator[Callable[[str], None]]:
    """One line on the terminal that says what is being done; nothing elsewhere."""
    if not _is_terminal():
        yield lambda text: None
        return

    def show(text: str) -> None:
        clear_line()
        print(f"{text} ...", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        clear_line()


def clear_line() -> None:
    """Takes the line of the progress away, so that another text can stand there."""
    if _is_terminal():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()  # None: closed by the caller


def positive_int(text: str) -> int:
    """An option's value; argparse's own complaint does not say what fits."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(
            f"expected a whole number of at least 1, found {text!r}"
        )
    return number


def preset_or_steps(text: str) -> str | int:
    """The value of an option for refinement: a preset or a number of steps."""
    if text.isalpha():
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a preset or a number of steps, found {text!r}"
        ) from None
