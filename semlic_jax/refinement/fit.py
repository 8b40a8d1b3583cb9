# SPDX-License-Identifier: Apache-2.0
"""Makes files from refined latents, within the budget and never worse than unrefined.

For each image, a bisection with the rate of the coder's tables finds how strictly the
refined latents are rounded towards cheap symbols, so that the file's size comes out
just below the budget. This changes first those symbols that the refinement left
undecided.

The files are made by the real coder and judged by what the real decoder shows. The
unrefined file is among them, so refinement never returns a file that is worse under its
own objective, nor one above the budget. In the steps a sum of squares stands for
1 - MS-SSIM; here it is replaced by MS-SSIM itself if the image is large enough and has
no region of interest.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from semlic_jax.compilation import FloatProgram
from semlic_jax.objectives.similarity import MS_SSIM_LEAST_SIDE, ms_ssim_within
from semlic_jax.refinement.jobs import Job
from semlic_jax.refinement.objective import (
    Frozen,
    Images,
    Terms,
    Weights,
    decoded_image,
    image_terms,
    structure_distance,
)
from semlic_jax.refinement.symbols import Rounding, hard_latents

if TYPE_CHECKING:
    from semlic_jax.codec import Codec

Array = jax.Array

_STRICTEST = 0.45
_LOOSEST = -0.2
_BISECTIONS = 9
_ROUNDS = 3
# The bits that a stream takes beyond its ideal length vary by at most so much.
_STREAM_BITS = 8


class Fitted(NamedTuple):
    """The file of one image, with the objective of what it decodes to."""

    data: bytes
    value: float
    unrefined_value: float


# `score` runs three programs instead of one, since each is also needed by itself.
coded_latents = FloatProgram(hard_latents)
shown_image = FloatProgram(decoded_image)
_image_terms = FloatProgram(image_terms)
_structure_distance = FloatProgram(structure_distance)


def score(
    frozen: Frozen,
    images: Images,
    weights: Weights,
    rounding: Rounding,
    y_scaled: Array,
    z: Array,
) -> tuple[Terms, Array]:
    """Round latents and return their terms, with the coder's rate, and y_hat_scaled.

    Args:
        frozen, images, weights: those of the refinement, see `objective`.
        rounding, y_scaled, z: as in `symbols.hard_latents`.

    Returns:
        the terms, [B] each, and y_hat_scaled float32 [B, h, w, M].
    """
    bits, y_hat = coded_latents(frozen, images, rounding, y_scaled, z)
    x_hat = shown_image(frozen, images, y_hat)
    return _image_terms(frozen, images, weights, bits, x_hat), y_hat


def fit_files(
    codec: Codec,
    frozen: Frozen,
    images: Images,
    latents: tuple[Array, Array],
    rounding_at: Callable[[np.ndarray], Rounding],
    values_of: Callable[[Sequence[Sequence[bytes]]], list[list[float]]],
    jobs: Sequence[Job],
) -> list[Fitted]:
    """Make the best file of each image within its budget.

    Args:
        codec, frozen, images: those of the refinement.
        latents: the refined y_scaled [B, h, w, M] and z [B, h/4, w/4, N].
        rounding_at: gives the rounding of y_scaled at a strictness [B] from -0.2 to
            0.45. The rate falls with the strictness; at 0, the latents are rounded as
            in the refinement.
        values_of: gives the objectives of files, as `decoded_values` does.
        jobs: what the file of each image is made with.
    """
    count = len(jobs)
    y_scaled, z = latents
    z_symbols = np.round(np.asarray(z))
    # The candidates for each image. The unrefined file is the first of them, so that
    # the best is never worse.
    files = [[job.unrefined] for job in jobs]

    def rounded(strictness: np.ndarray) -> tuple[np.ndarray, Array]:
        bits, y_hat = coded_latents(
            frozen, images, rounding_at(strictness), y_scaled, z
        )
        return np.asarray(bits, np.float64), y_hat

    def make_files(y_hat: Array) -> np.ndarray:
        """Keep the files within their budgets; return the bits above these, [B]."""
        excess = np.zeros(count)
        for i, (job, y) in enumerate(zip(jobs, np.asarray(y_hat), strict=True)):
            symbols = codec.entropy.symbols(y, z_symbols[i], job.level, job.size)
            data = codec.encode_symbols(symbols, job.level, job.size, job.icc_profile)
            excess[i] = 8 * (len(data) - job.budget_bytes)
            if excess[i] <= 0 and data not in files[i]:
                files[i].append(data)
        return excess

    bits, y_hat = rounded(np.zeros(count))
    make_files(y_hat)
    target = np.array([job.payload_bits for job in jobs])
    for _ in range(_ROUNDS):
        over = bits > target
        low = np.where(over, 0.0, _LOOSEST)  # above the target, if any point is
        high = np.where(over, _STRICTEST, 0.0)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            found, _ = rounded(middle)
            low = np.where(found > target, middle, low)
            high = np.where(found > target, high, middle)
        _, y_hat = rounded(high)
        excess = make_files(y_hat)
        if (excess <= 0).all():
            break
        target -= np.where(excess > 0, excess + _STREAM_BITS, 0)

    fitted = []
    for candidates, values in zip(files, values_of(files), strict=True):
        value = min(values)
        fitted.append(Fitted(candidates[values.index(value)], value, values[0]))
    return fitted


def decoded_values(
    codec: Codec,
    frozen: Frozen,
    images: Images,
    weights: Weights,
    files: Sequence[Sequence[bytes]],
) -> list[list[float]]:
    """Return the objective of what each file decodes to.

    Args:
        codec, frozen, images, weights: those of the refinement.
        files: the files of each image; images may have different numbers of them.

    Returns:
        the values of each image's files, in the order of the files.
    """
    values: list[list[float]] = [[] for _ in files]
    original = np.asarray(images.x)
    no_bits = np.zeros(len(files), np.float32)
    measurable = _with_ms_ssim(images)
    structure_weight = float(weights.gamma * weights.structure)
    for now in itertools.zip_longest(*files):  # one file of each image, or None
        x_hat = original.copy()
        for image, data in zip(x_hat, now, strict=True):
            if data is not None:
                decoded = codec.decompress(data)
                height, width = decoded.shape[:2]
                image[:height, :width] = decoded.astype(np.float32) / 255
        terms = _image_terms(frozen, images, weights, no_bits, x_hat)
        value = np.asarray(terms.value)
        if measurable.any():
            distance = 1 - ms_ssim_within(original, x_hat, images.sizes)
            change = np.asarray(distance - _structure_distance(images, x_hat))
            value = value + structure_weight * np.where(measurable, change, 0)
        for own, data, found in zip(values, now, value, strict=True):
            if data is not None:
                own.append(float(found))
    return values


def _with_ms_ssim(images: Images) -> np.ndarray:
    """Whether MS-SSIM can stand in for the structure term of each image, bool [B]."""
    sizes = np.asarray(images.sizes)
    if not images.structure:
        return np.zeros(len(sizes), bool)
    pixels = zip(np.asarray(images.weights), sizes, strict=True)
    equal = [bool((own[:height, :width] == 1).all()) for own, (height, width) in pixels]
    return np.array(equal) & (sizes.min(axis=1) >= MS_SSIM_LEAST_SIDE)
