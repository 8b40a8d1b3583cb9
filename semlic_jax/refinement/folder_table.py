# SPDX-License-Identifier: Apache-2.0
"""What a refinement of a folder has done: a CSV beside its files, a row per image.

A row is on disk before its file is, and a run that is killed may leave half of one.
Each of several processes has a table of its own; all of them are read.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from semlic_jax.images import write_file

_TABLE_NAME = "refine.csv"
_LONGEST_HEAD = 4096  # bytes that are read of the first line of a table
_AS_NAMED = "surrogateescape"  # names of files need not be UTF-8
_CONVERT: dict[str, Callable[[str], Any]] = {"str": str, "int": int, "float": float}


@dataclass(frozen=True)
class Row:
    """What became of one image.

    Attributes:
        image, file: names of the photograph and of its `.semlic` file.
        width, height: in pixels.
        bytes, bpp: of the file.
        budget_bytes: that it was refined to.
        unrefined_bytes: of the file without refinement within the budget.
        value, unrefined_value: objective of both as decoded; lower is better.
        steps: that were made.
        seconds: of the image's batch, divided by its images.
        task: names the pixels, their profile, the model, the budget and the settings.
        sha256: of the file.
    """

    image: str
    file: str
    width: int
    height: int
    bytes: int
    bpp: float
    budget_bytes: int
    unrefined_bytes: int
    value: float
    unrefined_value: float
    steps: int
    seconds: float
    task: str
    sha256: str


class Table:
    """A CSV of rows: added one by one, on disk at once; whole and sorted at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def is_ours(self) -> bool:
        """Whether nothing is there, or such a table, its end cut off or not."""
        if not self.path.exists():
            return True
        with open(self.path, "rb") as stream:
            head = stream.readline(_LONGEST_HEAD)
        columns = next(csv.reader([head.decode("utf-8", _AS_NAMED)]), [])
        ours = {entry.name for entry in fields(Row)} <= set(columns)
        return ours or to_csv([], header=True).startswith(head)

    def add(self, row: Row) -> None:
        """Appends a row, to a whole table: a killed run may have left half a line."""
        if not self._is_whole():
            self.finish([])
        with open(self.path, "ab") as stream:
            stream.write(to_csv([row], header=False))

    def finish(self, rows: Sequence[Row]) -> None:
        """Leaves one row per image: these, and those of images of other runs."""
        found = {row.image: row for row in _rows_in(self.path)}
        found |= {row.image: row for row in rows}
        kept = sorted(found.values(), key=lambda row: row.image)
        write_file(self.path, to_csv(kept, header=True), force=True)

    def _is_whole(self) -> bool:
        """Whether a line of ours can follow."""
        if not self.path.exists():
            return False
        data = self.path.read_bytes()
        return data.startswith(to_csv([], header=True)) and data.endswith(b"\n")


def to_csv(rows: Sequence[Row], *, header: bool) -> bytes:
    """Lines of a table, after that of the columns' names where it is wanted."""
    stream = io.StringIO()
    plain = csv.writer(stream, lineterminator="\n")
    quoted = csv.writer(stream, lineterminator="\n", quoting=csv.QUOTE_ALL)
    if header:
        plain.writerow(entry.name for entry in fields(Row))
    for row in rows:
        # Python before 3.13 quotes no carriage return by itself.
        writer = quoted if "\r" in row.image else plain
        writer.writerow(asdict(row).values())
    return stream.getvalue().encode("utf-8", _AS_NAMED)


def _rows_in(path: Path) -> Iterator[Row]:
    """Rows of a table; a line that was cut off is left out."""
    if not path.exists():
        return
    text = path.read_bytes().decode("utf-8", _AS_NAMED)
    for record in csv.DictReader(io.StringIO(text, newline="")):
        try:
            yield Row(
                **{
                    entry.name: _CONVERT[str(entry.type)](record[entry.name])
                    for entry in fields(Row)
                }
            )
        except (KeyError, TypeError, ValueError):
            continue


def known_rows(out: Path) -> dict[str, Row]:
    """Rows of earlier runs by any number of processes, by the image's name.

    Of two rows of one image, that of the file which is there; else the later one.
    """
    stem, suffix = _TABLE_NAME.split(".")
    found: dict[str, Row] = {}
    for path in sorted(out.glob(f"{stem}*.{suffix}")):
        for row in _rows_in(path):
            kept = found.get(row.image)
            if kept is None or not is_as_written(kept, out / kept.file):
                found[row.image] = row
    return found


def table_name(process: int, processes: int) -> str:
    """Of the table of one of so many processes."""
    if processes == 1:
        return _TABLE_NAME
    stem, suffix = _TABLE_NAME.split(".")
    return f"{stem}.{process}-of-{processes}.{suffix}"


def is_as_written(row: Row, output: Path) -> bool:
    """Whether the file is there, as it was when its row was written."""
    return (
        output.is_file()
        and hashlib.sha256(output.read_bytes()).hexdigest() == row.sha256
    )
