# SPDX-License-Identifier: Apache-2.0
"""Refinement of the latents of one image, or of images of one bucket together.

refined = refine(codec, image, bpp=0.15)
refined.data  # an ordinary .semlic file, never larger than the budget
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from semlic_jax.compilation import own_settings
from semlic_jax.memory import is_out_of_memory
from semlic_jax.refinement.batch import Batch, Progress, Refined
from semlic_jax.refinement.large import LargeImage, can_go_in_tiles, goes_in_tiles
from semlic_jax.refinement.roi import Region
from semlic_jax.refinement.settings import Settings, preset

if TYPE_CHECKING:
    from semlic_jax.codec import Codec


class RefinementWarning(UserWarning):
    """Refinement goes on in another way than it was asked to."""


@own_settings()
def refine(
    codec: Codec,
    image: np.ndarray,
    *,
    quality: float | None = None,
    bpp: float | None = None,
    max_bytes: int | None = None,
    settings: Settings | None = None,
    region: Region | None = None,
    icc_profile: bytes | None = None,
    progress: Callable[[Progress], bool | None] | None = None,
) -> Refined:
    """Refine one image to a budget.

    Give exactly one of `quality`, `bpp` and `max_bytes`.

    Args:
        codec: the codec of the model.
        image: uint8 [H, W, 3].
        quality: quality of the unrefined file, whose size is then the budget.
        bpp: the budget in bits per pixel of the whole file.
        max_bytes: the budget in bytes.
        settings: the settings of the refinement; None means the preset `default`.
        region: what matters in the image; None means everything equally.
        icc_profile: ICC profile to store in the file.
        progress: called after each chunk of steps; returning False stops the
            refinement, and the file is made from what was reached.

    Raises:
        ValueError: as for `Codec.compress`; also if the region has another size than
            the image, or perceptual terms lack feature weights.
        MemoryError: the image is too large for this machine.
    """
    start = codec.compress(
        image,
        quality=quality,
        bpp=bpp,
        max_bytes=max_bytes,
        icc_profile=icc_profile,
    )
    if max_bytes is None:
        size = image.shape[:2]
        max_bytes = len(start) if bpp is None else codec.budget_bytes(bpp, size)
    return refine_batch(
        codec,
        [image],
        max_bytes=[max_bytes],
        settings=settings,
        regions=[region],
        icc_profiles=[icc_profile],
        unrefined=[start],
        progress=progress,
    )[0]


@own_settings()
def refine_batch(
    codec: Codec,
    images: Sequence[np.ndarray],
    *,
    max_bytes: Sequence[int],
    settings: Settings | None = None,
    regions: Sequence[Region | None] | None = None,
    icc_profiles: Sequence[bytes | None] | None = None,
    unrefined: Sequence[bytes] | None = None,
    progress: Callable[[Progress], bool | None] | None = None,
) -> list[Refined]:
    """Refine images of one bucket together, each to its own budget.

    The batch is split over the devices if its size is a multiple of their number. If
    the memory does not suffice, the batch is halved, with a RefinementWarning. If it
    does not suffice for one image, the method `newton` goes on in tiles, with the same
    warning. With `newton`, images of more than 2^21 pixels, padding included, are
    always refined in tiles and one by one.

    Args:
        codec, settings: as in `refine`.
        images: uint8 [H, W, 3] each, all of one bucket of the codec.
        max_bytes: the budget of each image in bytes.
        regions: region of interest of each image, or None.
        icc_profiles: ICC profile of each image, or None.
        unrefined: unrefined file of each image within its budget; None: they are made.
        progress: as in `refine`, called for the images that are refined at the time:
            for parts of the batch if it is split. After False it is not called again,
            and each part that is left makes one chunk of steps.

    Raises:
        ValueError: as for `refine`; also if the images are of several buckets, or an
            unrefined file exceeds its budget or is of another size than its image.
        MemoryError: an image is too large for this machine.
    """
    settings = settings or preset("default")
    count = len(images)
    regions = regions or [None] * count
    icc_profiles = icc_profiles or [None] * count
    if unrefined is None:
        unrefined = [
            codec.compress(image, max_bytes=budget, icc_profile=profile)
            for image, budget, profile in zip(
                images, max_bytes, icc_profiles, strict=True
            )
        ]
    for data, budget in zip(unrefined, max_bytes, strict=True):
        if len(data) > budget:
            raise ValueError(
                f"expected an unrefined file of at most {budget:,} bytes, found "
                f"{len(data):,}"
            )
    arguments = (images, max_bytes, regions, icc_profiles, unrefined)
    listener = progress if progress is None else _Listener(progress)

    def refined(kind: type[Batch]) -> list[Refined] | str:
        """Refine the images together; without enough memory, return what it says."""
        try:
            return _refine_together(kind(codec, settings, *arguments), listener)
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return str(error)

    buckets = {codec.bucket(image.shape[:2]) for image in images}
    bucket = buckets.pop() if len(buckets) == 1 else (0, 0)  # refused by the batch
    large = goes_in_tiles(bucket, settings)
    shares = [slice(i, i + 1) for i in range(count)]
    if count == 1 or not large:
        found = refined(LargeImage if large else Batch)
        if not isinstance(found, str):
            return found
        if count == 1 and not large and can_go_in_tiles(bucket, settings):
            _warn("not enough memory for the whole image: continuing in tiles")
            found = refined(LargeImage)
            if not isinstance(found, str):
                return found
        if count == 1:
            raise MemoryError(found)
        half = count // 2
        _warn(
            f"not enough memory for a batch of {count}: continuing with {count - half}"
        )
        shares = [slice(half), slice(half, count)]
    parts: list[Refined] = []
    for share in shares:
        parts += refine_batch(
            codec,
            images[share],
            max_bytes=max_bytes[share],
            settings=settings,
            regions=regions[share],
            icc_profiles=icc_profiles[share],
            unrefined=unrefined[share],
            progress=listener,
        )
    return parts


class _Listener:
    """Remembers that a refinement was stopped, for the parts that are still to come."""

    def __init__(self, progress: Callable[[Progress], bool | None]) -> None:
        self._progress = progress
        self._stopped = False

    def __call__(self, now: Progress) -> bool:
        if not self._stopped:
            self._stopped = self._progress(now) is False
        return not self._stopped


def _warn(text: str) -> None:
    warnings.warn(text, RefinementWarning, stacklevel=3)


def _refine_together(
    batch: Batch, progress: Callable[[Progress], bool | None] | None
) -> list[Refined]:
    # A function of its own, so that a batch that did not fit is freed when it returns.
    return batch.finish(batch.run(progress))
