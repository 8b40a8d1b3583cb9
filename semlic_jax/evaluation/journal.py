# SPDX-License-Identifier: Apache-2.0
"""The journal of a sweep: a line of JSON for each thing that was done.

While a sweep runs, its folder is locked.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from semlic_jax.images import check_folder

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

JOURNAL = "journal.jsonl"
# A file that nobody reads or writes: on SMB a locked file is closed to all others, even
# to another stream of the process that locked it.
_LOCK = ".lock"
_FINDERS = ".DS_Store"  # what macOS leaves in folders that were looked at


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other evaluations out of a folder, which is created if it is missing.

    The lock goes with the process, however that ends.

    Raises:
      ValueError: the folder holds something else, or another evaluation is running in
        it.
    """
    check_folder(folder, "for the results")
    folder.mkdir(parents=True, exist_ok=True)
    others = {path.name for path in folder.iterdir()} - {_LOCK, _FINDERS}
    if others and JOURNAL not in others:
        raise ValueError(
            f"expected {folder} to be empty or an earlier evaluation, found "
            f"{min(others)} in it"
        )
    with open(folder / _LOCK, "ab") as stream:
        if fcntl is not None:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise ValueError(f"another evaluation is running in {folder}") from None
            except OSError:  # a file system without locks
                pass
        (folder / JOURNAL).touch()
        yield


class Journal:
    """A record of what was done so far: a file of JSON lines, kept across runs.

    Args:
      path: the file, read if it exists; damaged lines are ignored, as is a last one
        that was cut off.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text("utf-8", errors="replace").splitlines():
                try:
                    record = json.loads(line)
                    self._known[record["key"]] = record
                # RecursionError: of brackets in brackets.
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue
        # A line that was cut off must not swallow the next one.
        self._prefix = "\n" if path.exists() and path.stat().st_size else ""

    def get(self, key: str, *needed: str) -> dict[str, Any] | None:
        """The last record of this key; None without one, or if it lacks an entry."""
        record = self._known.get(key)
        return record if record and record.keys() >= set(needed) else None

    def put(self, key: str, record: dict[str, Any]) -> None:
        """Add a record; it is in the file when this returns."""
        record = {"key": key, **record}
        self._known[key] = record
        with open(self._path, "a", encoding="utf-8") as stream:
            stream.write(f"{self._prefix}{json.dumps(record)}\n")
        self._prefix = ""


def is_number(value: Any) -> bool:
    """Whether a value of a record is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # JSON has integers of any size
        return False


def is_measured(record: dict[str, Any]) -> bool:
    """Whether what a journal says of a file's metrics has the form it is written in."""

    def is_table(given: Any, is_value: Callable[[Any], bool]) -> bool:
        return isinstance(given, dict) and all(
            isinstance(pair, list)
            and len(pair) == 2
            and isinstance(pair[0], str)
            and is_value(pair[1])
            for pair in given.values()
        )

    return (
        is_table(record.get("values"), is_number)
        and is_table(record.get("gaps"), lambda value: isinstance(value, str))
        and is_number(record.get("decode_s", 0))
    )
