# SPDX-License-Identifier: Apache-2.0
"""Progress of a program on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_line() -> Iterator[Callable[[str], None]]:
    """One line on the terminal that says what is being done; nothing elsewhere."""
    if sys.stderr is None or not sys.stderr.isatty():  # None: closed by the caller
        yield lambda text: None
        return

    def show(text: str) -> None:
        print(f"\r\x1b[K{text} ...", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
