# SPDX-License-Identifier: Apache-2.0
"""The journal of a sweep: a line of JSON for each thing that was done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Journal:
    """A record of what was done so far: a file of JSON lines, kept across runs.

    Args:
      path: the file, read if it exists; a last line that was cut off is ignored.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                    self._known[record["key"]] = record
                except (json.JSONDecodeError, KeyError, TypeError):
                    continue
        # A line that was cut off must not swallow the next one.
        self._prefix = "\n" if path.exists() and path.stat().st_size else ""

    def get(self, key: str) -> dict[str, Any] | None:
        """The last record of this key, or None."""
        return self._known.get(key)

    def put(self, key: str, record: dict[str, Any]) -> None:
        """Add a record; it is on disk when this returns."""
        record = {"key": key, **record}
        self._known[key] = record
        with open(self._path, "a") as stream:
            stream.write(f"{self._prefix}{json.dumps(record)}\n")
        self._prefix = ""
