# SPDX-License-Identifier: Apache-2.0
"""What commands say and ask on the terminal, and their exit statuses."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from semlic_jax.memory import is_out_of_memory
from semlic_jax.terminal import REFUSED as REFUSED
from semlic_jax.terminal import SKIPPED as SKIPPED
from semlic_jax.terminal import clear_line

# In the place of a file: standard input or output. A file of that name is `./-`.
STREAM = "-"
_BAR_WIDTH = 24

_OF_CACHE = "persistent compilation cache"

USAGE, INTERNAL, INTERRUPTED = 2, 3, 130


def say(text: str) -> None:
    """A line on the error stream."""
    if sys.stderr is not None:  # closed by the caller; print would take stdout
        clear_line()
        print(text, file=sys.stderr)


def tell(text: str, output: str) -> None:
    """A line on the standard output, or beside it where that was the output file."""
    try:
        taken = output == STREAM or os.path.samestat(
            os.stat(output), os.fstat(sys.stdout.fileno())
        )
    except (AttributeError, OSError, ValueError):  # closed, or no file
        taken = False
    if taken:
        say(text)
    else:
        clear_line()
        print(text)


def reason_of(error: Exception) -> str:
    """What people are told of an error, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    if is_out_of_memory(error):
        return f"not enough memory: {text}"
    return text


def bar(done: int, of: int) -> str:
    """How much is done, drawn: `[######......]`."""
    filled = _BAR_WIDTH * done // of
    return f"[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}]"


@contextmanager
def stops_when_asked() -> Iterator[Callable[[], bool]]:
    """Makes the first Ctrl-C a question that the caller asks; a second one interrupts.

    Yields a function that says whether there was one. A program in the background of a
    shell, which ignores Ctrl-C, goes on ignoring it.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield lambda: False
        return
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        say("\nstopping with the result so far; press Ctrl-C again to stop at once")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def warnings_are_notes(note: Callable[[str], None] | None = None) -> Iterator[None]:
    """Shows warnings of refinement as notes, as they come; `note` is told them too."""
    from semlic_jax.refinement import RefinementWarning, RegionWarning

    kinds = (RefinementWarning, RegionWarning)
    with warnings.catch_warnings():
        for kind in kinds:
            warnings.simplefilter("always", kind)

        usual = warnings.showwarning

        def show(message: Warning | str, *rest: Any, **more: Any) -> None:
            if not isinstance(message, kinds):
                usual(message, *rest, **more)
                return
            say(f"note: {message}")
            if note is not None:
                note(str(message))

        warnings.showwarning = show
        yield


@contextmanager
def cache_warnings_are_notes() -> Iterator[None]:
    """Mends the cache of compiled programs where JAX warns of it; says so once."""
    with warnings.catch_warnings():
        usual, told = warnings.showwarning, set()

        def show(message: Warning | str, *rest: Any, **more: Any) -> None:
            text = None
            if _OF_CACHE in str(message):
                from semlic_jax.compilation import told_of_cache

                text = told_of_cache(str(message))
            if text is None:
                usual(message, *rest, **more)
            elif text not in told:
                told.add(text)
                say(f"note: {text}")

        warnings.showwarning = show
        yield
