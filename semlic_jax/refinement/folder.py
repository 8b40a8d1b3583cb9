# SPDX-License-Identifier: Apache-2.0
"""`semlic refine`: a folder of photographs, refined in batches, by one process or many.

Images of one bucket are refined together. What was done is kept in a CSV file beside
the results, one row per image, so that the same command goes on where it was killed:
a file counts as finished when its row says that the same pixels were refined in the
same way and the file is as it was written then.

Of n processes each takes every n-th batch and writes a CSV of its own; nothing else
is shared, so that they may run on machines that see the same folder.
"""

from __future__ import annotations

import csv
import hashlib
import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from semlic_jax.images import (
    Photograph,
    photograph_size,
    read_photograph,
    write_file,
)
from semlic_jax.refinement.batch import Progress, Refined
from semlic_jax.refinement.large import goes_in_tiles
from semlic_jax.refinement.refine import is_out_of_memory, refine_batch
from semlic_jax.refinement.settings import REVISION, Settings

SUFFIX = ".semlic"
_TABLE_NAME = "refine.csv"
_LONGEST_HEAD = 4096  # bytes that are read of the first line of a table
_AS_NAMED = "surrogateescape"  # names of files need not be UTF-8


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


@dataclass
class Report:
    """Of a run: a row per image of this process, and why others were left out.

    Attributes:
        rows: in the order of the names.
        skipped: name of an image to the reason why it has no file.
        stopped: whether it was stopped before the end.
    """

    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    stopped: bool = False


@dataclass(frozen=True)
class FolderProgress:
    """Where a run over a folder stands: images done, of these many, and the batch."""

    done: int
    images: int
    batch: Progress


def refine_folder(
    codec: Any,
    images: Sequence[Path],
    out: Path,
    *,
    bpp: float,
    settings: Settings,
    batch: int = 1,
    process: int = 0,
    processes: int = 1,
    background: tuple[int, int, int] | None = None,
    force: bool = False,
    progress: Callable[[FolderProgress], bool | None] | None = None,
) -> Report:
    """Refine many photographs to a rate; goes on where an earlier run stopped.

    Args:
        codec: a `semlic_jax.Codec`.
        images: image files, each with a stem of its own.
        out: folder of the results, made where it is not there.
        bpp: most bits per pixel of each file.
        settings: of the refinement.
        batch: images refined together, at most.
        process, processes: which share of the batches to do, and of how many.
        background: RGB that transparent pixels are laid on; None: such images are
            skipped.
        force: replace files that this command did not make, or made otherwise.
        progress: called after each chunk of steps; it stops the run by returning
            False, and the files of that batch are what is reached by then. They are
            refined again by the next run.

    Raises:
        ValueError: two images would have one file, a file or a table is there that was
            not made like this, or a number is out of range. One image that cannot be
            refined is in `Report.skipped` instead.
    """
    if batch < 1:
        raise ValueError(f"expected a batch of at least 1 image, found {batch}")
    if not 0 <= process < processes:
        raise ValueError(
            f"expected a process from 0 to {processes - 1} of {processes}, "
            f"found {process}"
        )
    if not bpp > 0:
        raise ValueError(f"expected bits per pixel above 0, found {bpp:g}")
    outputs = _outputs(images, out)
    settings = replace(settings, features=settings.load_features())
    report = Report()
    share = [
        path
        for group in _batches(images, batch, codec, settings, report)[
            process::processes
        ]
        for path in group
    ]
    out.mkdir(parents=True, exist_ok=True)
    task = f"{codec.fingerprint.hex()} {bpp!r} {background} {_as_text(settings)}"
    table = _Table(out / _table_name(process, processes))
    if not (force or table.is_ours()):
        raise ValueError(
            f"expected a table of refined files as {table.path}, found another file: "
            "give --force to replace it, or another folder"
        )
    known = _known_rows(out)
    waiting: list[Path] = []
    for path in share:
        row = known.get(path.name)
        if _is_ours(row, outputs[path]):
            assert row is not None
            photograph = _read(path, background, report)
            if photograph is None:
                continue
            alike = row.task == _task_of(task, photograph)
            if alike and row.steps >= settings.steps:
                report.rows.append(row)
                continue
        else:
            alike = not outputs[path].exists()
        if not (alike or force):
            raise ValueError(
                f"{outputs[path]} was not made from this image with these settings: "
                "give --force to replace it, or another folder"
            )
        waiting.append(path)
    groups = _batches(waiting, batch, codec, settings, report)
    for ready in _ready(codec, groups, bpp, background, report):
        listener = _Listener(progress, len(report.rows), len(share))
        begun_s = time.perf_counter()
        try:
            refined = refine_batch(
                codec,
                [each.photograph.pixels for each in ready],
                max_bytes=[each.budget_bytes for each in ready],
                settings=settings,
                icc_profiles=[each.photograph.icc_profile for each in ready],
                unrefined=[each.unrefined for each in ready],
                progress=listener,
            )
        except MemoryError as error:  # they are of one size
            for each in ready:
                report.skipped[each.path.name] = _reason(error)
            continue
        seconds = (time.perf_counter() - begun_s) / len(ready)
        for each, result in zip(ready, refined, strict=True):
            output = outputs[each.path]
            row = _row(each, output, result)
            row = replace(
                row, seconds=round(seconds, 3), task=_task_of(task, each.photograph)
            )
            # The row first: a file without its row would be taken for a stranger's.
            table.add(row)
            write_file(output, result.data, force=True)
            report.rows.append(row)
        if listener.stopped:
            report.stopped = True
            break
    report.rows.sort(key=lambda row: row.image)
    table.finish(report.rows)
    return report


class _Listener:
    """Progress of one batch within the folder; remembers whether it was stopped."""

    def __init__(
        self,
        progress: Callable[[FolderProgress], bool | None] | None,
        done: int,
        images: int,
    ) -> None:
        self._progress, self._done, self._images = progress, done, images
        self.stopped = False

    def __call__(self, now: Progress) -> bool:
        if self._progress is not None and not self.stopped:
            answer = self._progress(FolderProgress(self._done, self._images, now))
            self.stopped = answer is False
        return not self.stopped


class _Table:
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
        return ours or _csv([], header=True).startswith(head)

    def add(self, row: Row) -> None:
        """Appends a row, to a whole table: a killed run may have left half a line."""
        if not self._is_whole():
            self.finish([])
        with open(self.path, "ab") as stream:
            stream.write(_csv([row], header=False))

    def finish(self, rows: Sequence[Row]) -> None:
        """Leaves one row per image: these, and those of images of other runs."""
        found = {row.image: row for row in _rows_in(self.path)}
        found |= {row.image: row for row in rows}
        kept = sorted(found.values(), key=lambda row: row.image)
        write_file(self.path, _csv(kept, header=True), force=True)

    def _is_whole(self) -> bool:
        """Whether a line of ours can follow."""
        if not self.path.exists():
            return False
        data = self.path.read_bytes()
        return data.startswith(_csv([], header=True)) and data.endswith(b"\n")


def _csv(rows: Sequence[Row], *, header: bool) -> bytes:
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


def _known_rows(out: Path) -> dict[str, Row]:
    """Rows of earlier runs by any number of processes, by the image's name.

    Of two rows of one image, that of the file which is there; else the later one.
    """
    stem, suffix = _TABLE_NAME.split(".")
    found: dict[str, Row] = {}
    for path in sorted(out.glob(f"{stem}*.{suffix}")):
        for row in _rows_in(path):
            kept = found.get(row.image)
            if kept is None or not _is_ours(kept, out / kept.file):
                found[row.image] = row
    return found


_CONVERT: dict[str, Callable[[str], Any]] = {"str": str, "int": int, "float": float}


def _table_name(process: int, processes: int) -> str:
    if processes == 1:
        return _TABLE_NAME
    stem, suffix = _TABLE_NAME.split(".")
    return f"{stem}.{process}-of-{processes}.{suffix}"


def _outputs(images: Sequence[Path], out: Path) -> dict[Path, Path]:
    taken: dict[Path, Path] = {}
    for path in images:
        output = out / f"{path.stem}{SUFFIX}"
        if output in taken:
            raise ValueError(
                f"expected one image for each file, found {taken[output].name} and "
                f"{path.name} for {output.name}"
            )
        taken[output] = path
    return {path: output for output, path in taken.items()}


def _batches(
    images: Sequence[Path], most: int, codec: Any, settings: Settings, report: Report
) -> list[list[Path]]:
    """Images of one bucket, at most so many at a time; those of no size are skipped.

    One at a time where they are refined in tiles, so that each is kept once it is done.
    """
    buckets: dict[tuple[int, int], list[Path]] = {}
    for path in sorted(images, key=lambda path: path.name):
        try:
            bucket = codec.bucket(photograph_size(path))
        except (OSError, ValueError, MemoryError) as error:
            report.skipped[path.name] = _reason(error)
            continue
        buckets.setdefault(bucket, []).append(path)
    batches = []
    for bucket, group in sorted(buckets.items()):
        count = 1 if goes_in_tiles(bucket, settings) else most
        batches += [group[i : i + count] for i in range(0, len(group), count)]
    return batches


class _Ready(NamedTuple):
    """A photograph that can be refined, with its budget and the file within it."""

    path: Path
    photograph: Photograph
    budget_bytes: int
    unrefined: bytes


def _ready(
    codec: Any,
    groups: Sequence[Sequence[Path]],
    bpp: float,
    background: tuple[int, int, int] | None,
    report: Report,
) -> Iterator[list[_Ready]]:
    """Of each group those to refine together.

    They are of one bucket as they were read: the head of a file may say another.
    """
    for group in groups:
        buckets: dict[tuple[int, int], list[_Ready]] = {}
        for each in _compressed(codec, group, bpp, background, report):
            bucket = codec.bucket(each.photograph.pixels.shape[:2])
            buckets.setdefault(bucket, []).append(each)
        yield from buckets.values()


def _compressed(
    codec: Any,
    paths: Sequence[Path],
    bpp: float,
    background: tuple[int, int, int] | None,
    report: Report,
) -> Iterator[_Ready]:
    """The photographs that the codec can compress; the others are skipped."""
    for path in paths:
        photograph = _read(path, background, report)
        if photograph is None:
            continue
        pixels, profile = photograph.pixels, photograph.icc_profile
        try:
            start = codec.compress(pixels, bpp=bpp, icc_profile=profile)
        except (ValueError, MemoryError, jax.errors.JaxRuntimeError) as error:
            if not (isinstance(error, ValueError) or is_out_of_memory(error)):
                raise
            report.skipped[path.name] = _reason(error)
            continue
        budget = codec.budget_bytes(bpp, pixels.shape[:2])
        yield _Ready(path, photograph, budget, start)


def _read(
    path: Path, background: tuple[int, int, int] | None, report: Report
) -> Photograph | None:
    """The photograph; None where it cannot be read, and then it is skipped."""
    try:
        return read_photograph(path, background=background)
    except (OSError, ValueError, MemoryError) as error:
        report.skipped[path.name] = _reason(error)
        return None


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return f"not enough memory: {text}" if is_out_of_memory(error) else text


def _row(image: _Ready, output: Path, result: Refined) -> Row:
    height, width = image.photograph.pixels.shape[:2]
    return Row(
        image=image.path.name,
        file=output.name,
        width=width,
        height=height,
        bytes=len(result.data),
        bpp=round(8 * len(result.data) / (height * width), 6),
        budget_bytes=image.budget_bytes,
        unrefined_bytes=len(result.unrefined),
        value=round(result.value, 6),
        unrefined_value=round(result.unrefined_value, 6),
        steps=result.steps,
        seconds=0.0,
        task="",
        sha256=hashlib.sha256(result.data).hexdigest(),
    )


def _as_text(settings: Settings) -> str:
    """Settings with the numbers of their feature network, the same in every process."""
    digest = hashlib.sha256()
    network = settings.load_features()
    if network is not None:
        digest.update(repr(network.module).encode())
        for leaf in jax.tree.leaves(network.params):
            digest.update(np.asarray(leaf).tobytes())
    return f"{REVISION} {replace(settings, features=None)} {digest.hexdigest()}"


def _task_of(task: str, photograph: Photograph) -> str:
    pixels = photograph.pixels
    digest = hashlib.sha256(f"{task} {pixels.shape} ".encode())
    digest.update(pixels.tobytes())
    digest.update(photograph.icc_profile or b"")
    return digest.hexdigest()[:16]


def _is_ours(row: Row | None, output: Path) -> bool:
    """Whether the file is there as the row says."""
    if row is None or not output.is_file():
        return False
    return hashlib.sha256(output.read_bytes()).hexdigest() == row.sha256
