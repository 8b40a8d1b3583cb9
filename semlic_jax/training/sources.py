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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from semlic_jax.images import read_photograph

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif"}
_SYNTHETIC_SIDE = 192


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
    """Image files in a folder, or that match a glob (`**` includes subfolders)."""
    return _expand(pattern, _SUFFIXES)


def _expand(pattern: str, suffixes: set[str]) -> list[str]:
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
        """Open the files; raises ValueError if the library is missing."""
        try:
            from array_record.python.array_record_data_source import (
                ArrayRecordDataSource,
            )
        except ImportError as error:
            raise ValueError(
                f"{paths[0]} needs the package array-record: "
                "pip install 'semlic_jax[train]'"
            ) from error
        self.paths = sorted(paths)
        self._records = ArrayRecordDataSource(self.paths)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> np.ndarray:
        return decode(self._records[index], f"{self.paths[0]}[{index}]")


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
        except StopIteration as error:
            raise ValueError(f"tfds:{base} has no image in its examples") from error
        except Exception as error:
            raise ValueError(
                f"cannot read the split {split} of tfds:{base} as array_record: "
                f"{' '.join(str(error).split())[:300]}"
            ) from error
        self.name = f"tfds:{base}/{split}"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> np.ndarray:
        return decode(self._records[index][self._key], f"{self.name}[{index}]")


class SyntheticSource:
    """Made-up images: coloured noise with the spectrum of a photograph, and edges."""

    def __init__(self, count: str) -> None:
        if not count.isdigit() or int(count) < 1:
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
        part = int(np.searchsorted(self._ends, index, side="right"))
        start = 0 if part == 0 else int(self._ends[part - 1])
        return self._parts[part][index - start]
