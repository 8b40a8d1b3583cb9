# SPDX-License-Identifier: Apache-2.0
"""Refines a folder of photographs in batches, by one process or many: `semlic refine`.

Images of one bucket are refined together. A CSV file beside the results has a row for
each image that is done, so that the same command goes on where it was killed: a file
counts as finished if its row says that the same pixels were refined in the same way,
and the file is still as it was written (`folder_table.py`).

Each of n processes takes every n-th image, ordered by bucket, and writes a CSV of its
own. They share nothing but the folder, so they may run on several machines that see it,
with batches of different sizes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
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
from semlic_jax.memory import is_out_of_memory
from semlic_jax.refinement.batch import Progress, Refined
from semlic_jax.refinement.folder_table import (
    Row,
    Table,
    is_as_written,
    known_rows,
    table_name,
)
from semlic_jax.refinement.large import goes_in_tiles
from semlic_jax.refinement.refine import refine_batch
from semlic_jax.refinement.settings import REVISION, Settings

if TYPE_CHECKING:
    from semlic_jax.codec import Codec

SUFFIX = ".semlic"


@dataclass
class Report:
    """The result of a run: the images that this process finished, and those left out.

    Attributes:
        rows: one row for each finished image, in the order of their names.
        skipped: name of each image that has no file, to the reason why.
        stopped: whether the run was stopped before the end.
    """

    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    stopped: bool = False


@dataclass(frozen=True)
class FolderProgress:
    """Where a run over a folder stands.

    Attributes:
        done: number of finished images, those of earlier runs included.
        images: number of images in this process's share.
        batch: where the current batch stands.
    """

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
    srgb: bool = False,
    force: bool = False,
    progress: Callable[[FolderProgress], bool | None] | None = None,
) -> Report:
    """Refine many photographs to a rate; go on where an earlier run stopped.

    Args:
        codec: the codec of the model.
        images: image files, no two of which may have the same stem.
        out: folder of the results; created if it is missing.
        bpp: most bits per pixel of each file.
        settings: the settings of the refinement.
        batch: largest number of images to refine together.
        process: number of this process, from 0; it does one share of the images.
        processes: number of all processes.
        background: RGB colour behind transparent pixels; None skips images that have
            such pixels.
        srgb: convert colours of another ICC profile to sRGB instead of keeping it.
        force: replace files that this command did not make, or made in another way.
        progress: called after each chunk of steps; returning False stops the run. The
            files of that batch are made from what was reached, and the next run refines
            these images again.

    Raises:
        ValueError: two images would have the same file, a file or a table exists that
            was not made like this, a number is out of range, or perceptual terms lack
            feature weights. An image that cannot be refined is no error, but listed in
            `Report.skipped`.
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
    read = partial(read_photograph, background=background, srgb=srgb)
    settings = replace(settings, features=settings.load_features())
    report = Report()
    # Not a share of the batches: how large these may be differs between machines.
    ordered = [path for (path,) in _batches(images, 1, codec, settings, report)]
    share = ordered[process::processes]
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
        read=read,
        force=force,
    )
    groups = _batches(waiting, batch, codec, settings, report)
    for ready in _ready(codec, groups, bpp, read, report):
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
        except MemoryError as error:  # all are of one size, so none fits
            for each in ready:
                report.skipped[each.path.name] = _reason(error)
            continue
        seconds = (time.perf_counter() - begun_s) / len(ready)
        for each, result in zip(ready, refined, strict=True):
            output = outputs[each.path]
            row = _row(each, output, result, seconds, task)
            # The row comes first, since a file without one would count as not ours.
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
    known: Mapping[str, Sequence[Row]],
    outputs: Mapping[Path, Path],
    report: Report,
    *,
    task: str,
    steps: int,
    read: Callable[[Path], Photograph],
    force: bool,
) -> list[Path]:
    """Report the images that earlier runs have done; return those to refine.

    Args:
        known: rows of earlier runs, by the name of the image.
        outputs: output file of each image.
        report: gets the rows of images that are done, and the images that cannot be
            read.
        task: this run's task, without an image; see `_task_of`.
        steps: number of steps of a refinement that was not stopped.
        read: reads a photograph.
        force: see `refine_folder`.

    Raises:
        ValueError: a file exists that was made in another way, without `force`.
    """
    waiting: list[Path] = []
    for path, output in outputs.items():
        rows = [row for row in known.get(path.name, ()) if is_as_written(row, output)]
        if rows:
            photograph = _attempt(read, path, report)
            if photograph is None:
                continue
            wanted = _task_of(task, photograph)
            # Runs with other settings may have written the very same file.
            ours = [row for row in rows if row.task == wanted]
            alike = bool(ours)
            finished = [row for row in ours if row.steps >= steps]
            if finished:
                report.rows.append(finished[0])
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
    """Passes on the progress of one batch, and says whether it was stopped.

    `refine_batch` does not call it again after that.
    """

    def __init__(
        self,
        progress: Callable[[FolderProgress], bool | None] | None,
        done: int,
        images: int,
    ) -> None:
        self._progress, self._done, self._images = progress, done, images
        self.stopped = False

    def __call__(self, now: Progress) -> bool:
        if self._progress is not None:
            answer = self._progress(FolderProgress(self._done, self._images, now))
            self.stopped = answer is False
        return not self.stopped


def _outputs(images: Sequence[Path], out: Path) -> dict[Path, Path]:
    taken: dict[Path, Path] = {}
    for path in images:
        output = out / f"{path.stem}{SUFFIX}"
        if output in taken:
            raise ValueError(
                f"expected one image for each output, found {taken[output].name} and "
                f"{path.name} for {output.name}"
            )
        taken[output] = path
    return {path: output for output, path in taken.items()}


def _batches(
    images: Sequence[Path], most: int, codec: Codec, settings: Settings, report: Report
) -> list[list[Path]]:
    """Groups of at most `most` images of one bucket.

    Images that are refined in tiles come one at a time, so that each is kept as soon as
    it is done. Images whose size cannot be read are skipped.
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
    """A photograph that can be refined, with its budget and its unrefined file."""

    path: Path
    photograph: Photograph
    budget_bytes: int
    unrefined: bytes


def _ready(
    codec: Codec,
    groups: Sequence[Sequence[Path]],
    bpp: float,
    read: Callable[[Path], Photograph],
    report: Report,
) -> Iterator[list[_Ready]]:
    """Yield the images of each group that are refined together.

    They are of one bucket once decoded; the head of a file may state another size.
    """
    for group in groups:
        buckets: dict[tuple[int, int], list[_Ready]] = {}
        for each in _compressed(codec, group, bpp, read, report):
            bucket = codec.bucket(each.photograph.pixels.shape[:2])
            buckets.setdefault(bucket, []).append(each)
        yield from buckets.values()


def _compressed(
    codec: Codec,
    paths: Sequence[Path],
    bpp: float,
    read: Callable[[Path], Photograph],
    report: Report,
) -> Iterator[_Ready]:
    """Yield the photographs that the codec can compress; the others are skipped."""
    for path in paths:
        photograph = _attempt(read, path, report)
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


def _attempt(
    read: Callable[[Path], Photograph], path: Path, report: Report
) -> Photograph | None:
    """Read a photograph; if it cannot be read, skip it and return None."""
    try:
        return read(path)
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
    """Settings and a digest of their feature network, the same in every process."""
    digest = hashlib.sha256()
    network = settings.load_features()
    if network is not None:
        digest.update(repr(network.module).encode())
        for leaf in jax.tree.leaves(network.params):
            digest.update(np.asarray(leaf).tobytes())
    return f"{REVISION} {replace(settings, features=None)} {digest.hexdigest()}"


def _task_of(task: str, photograph: Photograph) -> str:
    """A digest that names a photograph and what is done to it, 16 hexadecimal digits.

    Args:
        task: the model, the budget, the background and the settings, as text.
        photograph: its pixels and its colour profile count.
    """
    pixels = photograph.pixels
    digest = hashlib.sha256(f"{task} {pixels.shape} ".encode())
    digest.update(pixels.tobytes())
    digest.update(photograph.icc_profile or b"")
    return digest.hexdigest()[:16]
