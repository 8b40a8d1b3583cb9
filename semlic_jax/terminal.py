# SPDX-License-Identifier: Apache-2.0
"""Progress of a program on a terminal, and the exit statuses of all programs."""

from __future__ import annotations

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
