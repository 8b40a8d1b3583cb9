# SPDX-License-Identifier: Apache-2.0
"""Random crops of a folder of photographs, as a pure function of the step.

Batch `i` depends on the seed and on `i` alone, so a resumed run sees exactly the
batches that an unbroken one would have seen, and there is no iterator to save.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
_PREFETCH_BATCHES = 4


class Photographs:
    """Decoded photographs in memory.

    Attributes:
        images: uint8 [H, W, 3] each.
        skipped: paths of the files that could not be read.
    """

    def __init__(self, patterns: Sequence[str], *, smallest_side: int) -> None:
        """Reads all files that match the glob patterns (or lie in the folders).

        Args:
            patterns: globs of files or folders.
            smallest_side: images with a smaller side are left out.

        Raises:
            ValueError: no usable image is there.
        """
        paths = sorted({path for pattern in patterns for path in _expand(pattern)})
        self.skipped: list[str] = []
        with ThreadPoolExecutor(4) as pool:
            decoded = list(pool.map(_read, paths))
        self.images = []
        for path, image in zip(paths, decoded, strict=True):
            if image is None or min(image.shape[:2]) < smallest_side:
                self.skipped.append(path)
            else:
                self.images.append(image)
        if not self.images:
            raise ValueError(
                f"expected photographs of at least {smallest_side} pixels a side in "
                f"{', '.join(patterns)}, found {len(paths)} files, none usable"
            )
        if self.skipped:
            logging.warning(
                "left out %d of %d files (unreadable or under %d pixels): %s%s",
                len(self.skipped),
                len(paths),
                smallest_side,
                ", ".join(self.skipped[:5]),
                " ..." if len(self.skipped) > 5 else "",
            )

    def batch(self, step: int, *, seed: int, batch: int, crop: int) -> np.ndarray:
        """float32 [batch, crop, crop, 3] in [0, 1], a function of (seed, step)."""
        rng = np.random.default_rng((seed, step))
        return np.stack([self._crop(rng, crop) for _ in range(batch)])

    def _crop(self, rng: np.random.Generator, crop: int) -> np.ndarray:
        image = self.images[rng.integers(len(self.images))]
        height, width = image.shape[:2]
        # Scaling down takes JPEG artefacts of the source away; BSDS-sized images
        # allow it only as far as a crop still fits.
        largest = min(min(height, width) / crop, 2.0)
        factor = rng.uniform(1.0, largest)
        side = crop * factor
        left = rng.uniform(0, width - side)
        top = rng.uniform(0, height - side)
        if factor < 1.02:  # too little to be worth a resampling
            row, column = int(top), int(left)
            pixels = image[row : row + crop, column : column + crop]
        else:
            window = image[
                int(top) : int(np.ceil(top + side)),
                int(left) : int(np.ceil(left + side)),
            ]
            offset = (left - int(left), top - int(top))
            box = (*offset, offset[0] + side, offset[1] + side)
            box = (*box[:2], min(box[2], window.shape[1]), min(box[3], window.shape[0]))
            pixels = np.asarray(
                Image.fromarray(window).resize(
                    (crop, crop), Image.Resampling.LANCZOS, box=box
                )
            )
        if rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        return pixels.astype(np.float32) / 255

    def batches(
        self, start: int, stop: int, *, seed: int, batch: int, crop: int
    ) -> Iterator[np.ndarray]:
        """Batches start..stop-1 in order, made ahead of time on other threads."""
        with ThreadPoolExecutor(2) as pool:

            def submit(step: int):
                return pool.submit(self.batch, step, seed=seed, batch=batch, crop=crop)

            ahead = min(start + _PREFETCH_BATCHES, stop)
            waiting = [submit(step) for step in range(start, ahead)]
            for step in range(start, stop):
                if step + _PREFETCH_BATCHES < stop:
                    waiting.append(submit(step + _PREFETCH_BATCHES))
                yield waiting.pop(0).result()


def _expand(pattern: str) -> list[str]:
    if Path(pattern).is_dir():
        pattern = f"{pattern}/*"
    return [
        path
        for path in glob.glob(pattern, recursive=True)
        if Path(path).suffix.lower() in _SUFFIXES
    ]


def _read(path: str) -> np.ndarray | None:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError):
        return None
