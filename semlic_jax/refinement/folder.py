# SPDX-License-Identifier: Apache-2.0
"""`semlic refine`: a folder of photographs, refined in batches, by one process or many.

Images of one bucket are refined together. What was done is kept in a CSV file beside
the results, one row per image, so that the same command goes on where it was killed:
a file counts as finished when its row says that the same pixels were refined in the
same way and the file is as it was written then (`folder_table.py`).

Of n processes each takes every n-th batch and writes a CSV of its own; nothing else
is shared, so that they may run on machines that see the same folder.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from semlic_jax.images import (
    Photograph,
    photograph_size,
    read_photograph,
    write_file,
)
from semlic_jax.refinement.batch import Progress, Refined
from semlic_jax.refinement.folder_table import (
    Row,
    Table,
    is_as_written,
    known_rows,
    table_name,
)
from semlic_jax.refinement.large import goes_in_tiles
from semlic_jax.refinement.refine import is_out_of_memory, refine_batch
from semlic_jax.refinement.settings import REVISION, Settings

if TYPE_CHECKING:
    from semlic_jax.codec import Codec

SUFFIX = ".semlic"


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
    codec: Codec,
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
        codec: of the model.
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
    table = Table(out / table_name(process, processes))
    if not (force or table.is_ours()):
        raise ValueError(
            f"expected a table of refined files as {table.path}, found another file: "
            "give --force to replace it, or another folder"
        )
    waiting = _reuse(
        known_rows(out),
        {path: outputs[path] for path in share},
        report,
        task=task,
        steps=settings.steps,
        background=background,
        force=force,
    )
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
            row = _row(each, output, result, seconds, task)
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


def _reuse(
    known: Mapping[str, Row],
    outputs: Mapping[Path, Path],
    report: Report,
    *,
    task: str,
    steps: int,
    background: tuple[int, int, int] | None,
    force: bool,
) -> list[Path]:
    """Reports the images that an earlier run has done; returns those to refine.

    Args:
        known: rows of earlier runs, by the image's name.
        outputs: the file of each image.
        report: gets their rows, and why an image cannot be read.
        task: of this run, without an image; see `_task_of`.
        steps: that an image is refined in, unless it was stopped before.
        background, force: see `refine_folder`.

    Raises:
        ValueError: a file is there that was made otherwise, and is not to be replaced.
    """
    waiting: list[Path] = []
    for path, output in outputs.items():
        row = known.get(path.name)
        if row is not None and is_as_written(row, output):
            photograph = _read(path, background, report)
            if photograph is None:
                continue
            alike = row.task == _task_of(task, photograph)
            if alike and row.steps >= steps:
                report.rows.append(row)
                continue
        else:
            alike = not output.exists()
        if not (alike or force):
            raise ValueError(
                f"{output} was not made from this image with these settings: give "
                "--force to replace it, or another folder"
            )
        waiting.append(path)
    return waiting


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
    images: Sequence[Path], most: int, codec: Codec, settings: Settings, report: Report
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
    codec: Codec,
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
    codec: Codec,
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


def _row(
    image: _Ready, output: Path, result: Refined, seconds: float, task: str
) -> Row:
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
        seconds=round(seconds, 3),
        task=_task_of(task, image.photograph),
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
    """Names a photograph and a run's task, its model, budget and settings."""
    pixels = photograph.pixels
    digest = hashlib.sha256(f"{task} {pixels.shape} ".encode())
    digest.update(pixels.tobytes())
    digest.update(photograph.icc_profile or b"")
    return digest.hexdigest()[:16]
