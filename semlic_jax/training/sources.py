# SPDX-License-Identifier: Apache-2.0
"""Sources of photographs: folders, array_record files, TFDS, or made-up images.

A source has a length and returns image `i` as uint8 [H, W, 3]; for an image that cannot
be read it raises an `UnusableImage` that names it. Images are decoded on access, on the
caller's thread. The libraries of each kind are imported when a source of that kind is
opened.

=====================  ==============================================================
pattern                images
=====================  ==============================================================
`photos`, `p/*.png`    files of a folder, or that match a glob
`x.array_record`       records, each an encoded image file (`semlic_jax.training.pack`)
`tfds:clic/train`      a TensorFlow Datasets set, prepared as array_record; the split
                       is `train` if not named; `tfds:clic/train?dir=PATH`
`synthetic:32`         this many images of coloured noise and edges
=====================  ==============================================================
"""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from semlic_jax.images import read_photograph
from semlic_jax.other_formats import OTHER_SUFFIXES

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif"}
_SUFFIXES |= OTHER_SUFFIXES
_SYNTHETIC_SIDE = 192
_MOST_OPENED = 64  # files at the same time
_MOST_THREADS = 16


class UnusableImage(Exception):
    """An image that cannot be trained on; the message says which one and why."""


class Source(Protocol):
    """Photographs by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray:
        """Image `index`, uint8 [H, W, 3]; raises `UnusableImage` if it is unusable."""
        ...


def open_sources(patterns: Sequence[str]) -> Source:
    """All images of all patterns as one source.

    Raises:
        ValueError: a pattern has no images, or needs a library that is not installed.
    """
    files: list[str] = []
    parts: list[Source] = []
    for pattern in patterns:
        if pattern.startswith("tfds:"):
            parts.append(TfdsSource(pattern.removeprefix("tfds:")))
        elif pattern.startswith("synthetic:"):
            parts.append(SyntheticSource(pattern.removeprefix("synthetic:")))
        else:
            records = _expand(pattern, {".array_record"})
            images = image_files(pattern)
            if records:
                parts.append(RecordSource(records))
            if not records and not images:
                raise ValueError(f"expected photographs in {pattern}, found none")
            files += images
    if files:
        parts.insert(0, FileSource(sorted(set(files))))
    return parts[0] if len(parts) == 1 else _Chain(parts)


def image_files(pattern: str) -> list[str]:
    """An image file, those in a folder, or that match a glob (`**` searches deeper)."""
    return _expand(pattern, _SUFFIXES)


def _expand(pattern: str, suffixes: set[str]) -> list[str]:
    if Path(pattern).is_file():  # whatever its name would match as a glob
        found = [pattern]
    else:
        if Path(pattern).is_dir():
            pattern = f"{glob.escape(pattern)}/*"
        found = glob.glob(pattern, recursive=True)
    return [path for path in found if Path(path).suffix.lower() in suffixes]


def decode(data: bytes | str, name: str) -> np.ndarray:
    """Decode an image, given as bytes or as a path, to uint8 [H, W, 3].

    The pixels are those that the codec would compress.

    Raises:
        UnusableImage: it cannot be decoded, or is transparent.
    """
    source = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        return read_photograph(source, catch_warnings=False).pixels
    except (OSError, ValueError) as error:
        raise UnusableImage(f"{name} ({error})") from error


def usable_cpus() -> int:
    """The CPUs that this process may use.

    Containers and job schedulers give a process a part of a machine's CPUs.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS and Windows


def decoder_threads() -> int:
    """One for each CPU that this process may use, at most 16."""
    return min(usable_cpus(), _MOST_THREADS)


class FileSource:
    """Image files."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        return decode(self.paths[index], self.paths[index])


class RecordSource:
    """Encoded images in array_record files."""

    def __init__(self, paths: Sequence[str]) -> None:
        """Open the files.

        Raises:
            ValueError: the library is missing, or a file is none of array_record.
        """
        try:
            from array_record.python.array_record_data_source import (
                ArrayRecordDataSource,
            )
        except ImportError as error:
            raise ValueError(
                f"{paths[0]} needs the package array-record: "
                "pip install 'semlic_jax[train]'"
            ) from error

        def opened(path: str) -> Any:
            try:
                return ArrayRecordDataSource([path])
            except Exception as error:  # the library has RuntimeErrors for everything
                raise ValueError(f"cannot read {path}: {_in_short(error)}") from error

        self.paths = sorted(paths)
        with ThreadPoolExecutor(min(len(paths), _MOST_OPENED)) as pool:
            self._files = list(pool.map(opened, self.paths))
        self._ends = np.cumsum([len(records) for records in self._files])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        file, position = _locate(self._ends, index)
        name = f"{self.paths[file]}[{position}]"
        return decode(_record(self._files[file], position, name), name)


def _record(records: Any, index: int, name: str) -> Any:
    try:
        return records[index]
    except MemoryError:
        raise
    except Exception as error:  # of array_record, and of what parses its records
        raise UnusableImage(f"{name} ({_in_short(error)})") from error


def _in_short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _locate(ends: np.ndarray, index: int) -> tuple[int, int]:
    """The part that has the index, and the index in it, by where each part ends."""
    part = int(np.searchsorted(ends, index, side="right"))
    return part, index - (int(ends[part - 1]) if part else 0)


class TfdsSource:
    """A TensorFlow Datasets data set with an image in each example.

    TensorFlow is not needed: the set must have been prepared as array_record.
    """

    def __init__(self, name: str) -> None:
        """Open `name`, of the form `set[/config][:version][/split][?dir=PATH]`.

        Raises:
            ValueError: the library, the set, the split or the image is missing.
        """
        name, _, query = name.partition("?")
        folder = query.removeprefix("dir=") or None
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise ValueError(
                f"tfds:{name} needs the package tensorflow-datasets: "
                "pip install 'semlic_jax[train]'"
            ) from error
        base, _, split = name.rpartition("/")
        base, split = (base, split) if base else (name, "train")
        try:
            builder = tfds.builder(base, data_dir=folder, file_format="array_record")
            features = builder.info.features
            self._key = next(
                key
                for key, feature in features.items()
                if isinstance(feature, tfds.features.Image)
            )
            self._records: Any = builder.as_data_source(
                split=split,
                decoders={self._key: tfds.decode.SkipDecoding()},
            )
            self._files = builder.info.splits[split].file_instructions
            self._ends = np.cumsum([file.take for file in self._files])
        except StopIteration as error:
            raise ValueError(f"tfds:{base} has no image in its examples") from error
        except Exception as error:
            raise ValueError(
                f"cannot read the split {split} of tfds:{base} as array_record: "
                f"{_in_short(error)}"
            ) from error

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> np.ndarray:
        file, position = _locate(self._ends, index)
        name = f"{self._files[file].filename}[{self._files[file].skip + position}]"
        return decode(_record(self._records, index, name)[self._key], name)


class SyntheticSource:
    """Made-up images: coloured noise with the spectrum of a photograph, and edges."""

    def __init__(self, count: str) -> None:
        if not (count.isascii() and count.isdigit()) or int(count) < 1:
            raise ValueError(
                f"expected a number of images after 'synthetic:', found {count!r}"
            )
        self._count = int(count)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> np.ndarray:
        rng = np.random.default_rng(index)
        side = _SYNTHETIC_SIDE
        frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.rfftfreq(side)))
        spectrum = np.fft.rfft2(rng.normal(size=(3, side, side)), axes=(1, 2))
        noise = np.fft.irfft2(spectrum / (frequency.T + 1 / side) ** 1.2, axes=(1, 2))
        noise /= noise.std()
        # An occluding edge: one texture in front of the mirror image of another.
        rows, columns = np.mgrid[:side, :side] - side / 2
        angle = rng.uniform(0, 2 * np.pi)
        front = rows * np.sin(angle) + columns * np.cos(angle) > rng.normal() * side / 8
        image = np.where(
            front, noise, noise[:, ::-1, ::-1] + rng.normal(size=(3, 1, 1))
        )
        luma = image.mean(0, keepdims=True)
        image = 0.5 + 0.15 * (luma + 0.3 * (image - luma))
        return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)


class _Chain:
    """Several sources as one, one after the other."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        part, position = _locate(self._ends, index)
        return self._parts[part][position]
