# SPDX-License-Identifier: Apache-2.0
"""Random crops of photographs, as a pure function of the step.

Example `e` of batch `s` depends only on (seed, s, e) and on the source. So a resumed
run sees exactly the batches that an unbroken one would have seen, there is no iterator
to save, and each process makes its own share of a batch without talking to the
others.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from semlic_jax.training.sources import Source, UnusableImage, decoder_threads

SMALL_IMAGES = ("skip", "reflect")
_PREFETCH_BATCHES = 4
# Unusable images in a row before giving up: with one usable in a hundred, no example of
# a long run gets there. Those that are known to be unusable cost a look-up.
_MOST_DRAWS = 10_000
_MOST_NAMED = 5


class Photographs:
    """Random crops of the photographs of a source.

    Attributes:
        skipped: the images left out so far: index to name and reason.
        padded: indices of the images that were padded so far.
    """

    def __init__(
        self,
        source: Source,
        *,
        crop: int,
        small_images: str = "skip",
        smallest_scale: float = 1.0,
        largest_scale: float = 2.0,
        cache_bytes: int = 2**31,
    ) -> None:
        """Check the arguments; no image is read yet.

        Args:
            source: the images.
            crop: side of the crops in pixels.
            small_images: whether images with a side under `crop` are left out (`skip`)
                or padded by reflection (`reflect`).
            smallest_scale: at most 1; if below, images are also scaled up, by up to its
                inverse, so that small photographs teach the smoothness of large ones.
            largest_scale: images are scaled down by a random factor of up to this, as
                far as a crop still fits, which removes their JPEG artefacts.
            cache_bytes: memory for decoded images.

        Raises:
            ValueError: the source is empty, or another argument is out of range.
        """
        if not len(source):
            raise ValueError("expected photographs to train on, found none")
        if small_images not in SMALL_IMAGES:
            raise ValueError(
                f"config.data.small_images must be {' or '.join(SMALL_IMAGES)}, "
                f"found {small_images!r}"
            )
        if not 0 < smallest_scale <= 1 <= largest_scale:
            raise ValueError(
                "config.data needs 0 < smallest_scale <= 1 <= largest_scale, found "
                f"{smallest_scale} and {largest_scale}"
            )
        self.crop = crop
        self.skipped: dict[int, str] = {}
        self.padded: set[int] = set()
        self._source = source
        self._small_images = small_images
        self._smallest_scale = smallest_scale
        self._largest_scale = largest_scale
        self._cache: dict[int, np.ndarray] = {}
        self._cache_bytes = cache_bytes
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._source)

    def image(self, index: int) -> np.ndarray | None:
        """Image uint8 [H, W, 3], no side under the crop; None if it is left out."""
        image = self._cache.get(index)
        if image is not None or index in self.skipped:
            return image
        try:
            image = self._usable(index, self._source[index])
        except UnusableImage as error:
            with self._lock:
                if index not in self.skipped:
                    self.skipped[index] = str(error)
                    self._tell()
            return None
        with self._lock:
            if index not in self._cache and image.nbytes <= self._cache_bytes:
                self._cache_bytes -= image.nbytes
                self._cache[index] = image
        return image

    def _usable(self, index: int, image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        missing = [max(self.crop - side, 0) for side in (height, width)]
        if not any(missing):
            return image
        if self._small_images == "skip":
            raise UnusableImage(
                f"image {index} ({width}x{height}, smaller than the crop)"
            )
        self.padded.add(index)
        # "symmetric" repeats the edge, so it works even for an image of one pixel.
        mode = "reflect" if min(height, width) > max(missing) else "symmetric"
        return np.pad(image, ((0, missing[0]), (0, missing[1]), (0, 0)), mode)

    def _tell(self) -> None:
        # Report each of the first few, then only when the count has doubled.
        count = len(self.skipped)
        if count <= _MOST_NAMED or count & (count - 1) == 0:
            last = next(reversed(self.skipped.values()))
            logging.warning("left out %d images so far; the last: %s", count, last)

    def sample(self, count: int) -> Iterator[np.ndarray]:
        """Yield up to `count` usable images, evenly spread over the source.

        Raises:
            ValueError: none of them is usable.
        """
        found = False
        for index in np.unique(np.linspace(0, len(self) - 1, count).astype(int)):
            image = self.image(int(index))
            if image is not None:
                found = True
                yield image
        if not found:
            raise self._none_is_usable()

    def example(self, step: int, index: int, *, seed: int) -> np.ndarray:
        """A crop, float32 [crop, crop, 3] in [0, 1]; a function of (seed, step, index).

        Raises:
            ValueError: none of very many images drawn was usable, or none is at all.
        """
        rng = np.random.default_rng((seed, step, index))
        for _ in range(_MOST_DRAWS):
            if len(self.skipped) == len(self):
                break
            image = self.image(int(rng.integers(len(self))))
            if image is not None:
                return self._crop(rng, image)
        raise self._none_is_usable()

    def _none_is_usable(self) -> ValueError:
        named = "; ".join(list(self.skipped.values())[:_MOST_NAMED])
        return ValueError(
            f"expected photographs of at least {self.crop} pixels a side, found none "
            f"that is usable ({len(self.skipped)} of {len(self)} left out): {named}"
        )

    def _crop(self, rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        crop = self.crop
        largest = min(min(height, width) / crop, self._largest_scale)
        # Scales are ratios, so 1.2 is as likely as 1 / 1.2.
        factor = np.exp(rng.uniform(np.log(self._smallest_scale), np.log(largest)))
        side = crop * factor
        left = rng.uniform(0, width - side)
        top = rng.uniform(0, height - side)
        if abs(factor - 1) < 0.02:  # too little to be worth a resampling
            row, column = min(int(top), height - crop), min(int(left), width - crop)
            pixels = image[row : row + crop, column : column + crop]
        else:
            window = image[
                int(top) : int(np.ceil(top + side)),
                int(left) : int(np.ceil(left + side)),
            ]
            x, y = left - int(left), top - int(top)
            box = (
                x,
                y,
                min(x + side, window.shape[1]),
                min(y + side, window.shape[0]),
            )
            pixels = np.asarray(
                Image.fromarray(window).resize(
                    (crop, crop), Image.Resampling.LANCZOS, box=box
                )
            )
        if rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        return pixels.astype(np.float32) / 255

    def batches(
        self,
        start: int,
        stop: int,
        *,
        seed: int,
        examples: Sequence[int],
        threads: int = 0,
    ) -> Iterator[np.ndarray]:
        """Yield batches start..stop-1 in order, made ahead of time on other threads.

        Args:
            start, stop: the first step and the one after the last.
            seed: see `example`.
            examples: this process's part of each batch.
            threads: number of threads; 0 for `decoder_threads`.

        Yields:
            float32 [len(examples), crop, crop, 3].
        """
        workers = threads or decoder_threads()
        with ThreadPoolExecutor(workers, "batches") as pool:

            def submit(step: int) -> list:
                return [
                    pool.submit(self.example, step, index, seed=seed)
                    for index in examples
                ]

            ahead = min(start + _PREFETCH_BATCHES, stop)
            waiting = [submit(step) for step in range(start, ahead)]
            try:
                for step in range(start, stop):
                    if step + _PREFETCH_BATCHES < stop:
                        waiting.append(submit(step + _PREFETCH_BATCHES))
                    yield np.stack([future.result() for future in waiting.pop(0)])
            finally:
                for futures in waiting:
                    for future in futures:
                        future.cancel()
