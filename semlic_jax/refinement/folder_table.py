# SPDX-License-Identifier: Apache-2.0
"""The table of what a folder's refinement has done: a CSV with one row per image.

It lies beside the files. A row is written before its file, and a killed run may leave
half of a row. Each of several processes has its own table; all of them are read.
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
_LONGEST_HEAD = 4096  # most bytes that are read of a table's first line
_AS_NAMED = "surrogateescape"  # file names need not be UTF-8
_CONVERT: dict[str, Callable[[str], Any]] = {"str": str, "int": int, "float": float}


@dataclass(frozen=True)
class Row:
    """The result of refining one image.

    Attributes:
        image: name of the photograph.
        file: name of its `.semlic` file.
        width, height: size of the image in pixels.
        bytes, bpp: size of the file in bytes and in bits per pixel.
        budget_bytes: the most bytes that the file was allowed.
        unrefined_bytes: size of the unrefined file within the budget.
        value: objective of the image that the file decodes to; lower is better.
        unrefined_value: objective of the image that the unrefined file decodes to.
        steps: number of steps that were made.
        seconds: time that the image's batch took, divided by its number of images.
        task: digest of the pixels, their colour profile, the model, the budget, the
            background and the settings.
        sha256: SHA-256 digest of the file.
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
    """A CSV of rows, each on disk once it is added; they are sorted at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def is_ours(self) -> bool:
        """Whether the file does not exist or is such a table, if only its beginning."""
        if not self.path.exists():
            return True
        with open(self.path, "rb") as stream:
            head = stream.readline(_LONGEST_HEAD)
        try:
            columns = next(csv.reader([head.decode("utf-8", _AS_NAMED)]), [])
        except csv.Error:
            return False
        ours = {entry.name for entry in fields(Row)} <= set(columns)
        return ours or to_csv([], header=True).startswith(head)

    def add(self, row: Row) -> None:
        """Append a row; if a killed run left half a line, repair the table first."""
        if not self._is_whole():
            self.finish([])
        with open(self.path, "ab") as stream:
            stream.write(to_csv([row], header=False))

    def finish(self, rows: Sequence[Row]) -> None:
        """Write one row per image: these rows, and the table's rows of other images."""
        found = {row.image: row for row in _rows_in(self.path)}
        found |= {row.image: row for row in rows}
        kept = sorted(found.values(), key=lambda row: row.image)
        write_file(self.path, to_csv(kept, header=True), force=True)

    def _is_whole(self) -> bool:
        """Whether the table exists and ends with a whole line, so a row can follow."""
        if not self.path.exists():
            return False
        data = self.path.read_bytes()
        return data.startswith(to_csv([], header=True)) and data.endswith(b"\n")


def to_csv(rows: Sequence[Row], *, header: bool) -> bytes:
    """Lines of a table; with `header`, the first one names the columns."""
    stream = io.StringIO()
    plain = csv.writer(stream, lineterminator="\n")
    quoted = csv.writer(stream, lineterminator="\n", quoting=csv.QUOTE_ALL)
    if header:
        plain.writerow(entry.name for entry in fields(Row))
    for row in rows:
        # Python before 3.13 does not quote a carriage return by itself.
        writer = quoted if "\r" in row.image else plain
        writer.writerow(asdict(row).values())
    return stream.getvalue().encode("utf-8", _AS_NAMED)


def _rows_in(path: Path) -> Iterator[Row]:
    """Yield the rows of a table; a line that was cut off is left out."""
    if not path.exists():
        return
    text = path.read_bytes().decode("utf-8", _AS_NAMED)
    for record in _records(text):
        try:
            yield Row(
                **{
                    entry.name: _CONVERT[str(entry.type)](record[entry.name])
                    for entry in fields(Row)
                }
            )
        except (KeyError, TypeError, ValueError):
            continue


def _records(text: str) -> Iterator[dict[str, str]]:
    """Yield the records of a CSV up to the first that cannot be one of ours."""
    try:
        yield from csv.DictReader(io.StringIO(text, newline=""))
    except csv.Error:  # such as a field of more than 128 KiB
        return


def known_rows(out: Path) -> dict[str, list[Row]]:
    """All rows of earlier runs by any number of processes, by the name of the image."""
    stem, suffix = _TABLE_NAME.split(".")
    found: dict[str, list[Row]] = {}
    for path in sorted(out.glob(f"{stem}*.{suffix}")):
        for row in _rows_in(path):
            found.setdefault(row.image, []).append(row)
    return found


def table_name(process: int, processes: int) -> str:
    """The file name of the table of process number `process` among `processes`."""
    if processes == 1:
        return _TABLE_NAME
    stem, suffix = _TABLE_NAME.split(".")
    return f"{stem}.{process}-of-{processes}.{suffix}"


def is_as_written(row: Row, output: Path) -> bool:
    """Whether the file exists and is as it was when its row was written."""
    return (
        output.is_file()
        and hashlib.sha256(output.read_bytes()).hexdigest() == row.sha256
    )
