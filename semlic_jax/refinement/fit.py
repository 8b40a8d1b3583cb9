# SPDX-License-Identifier: Apache-2.0
"""From refined latents to files: the exact fit to the budget, and the guard.

How strictly the refined latents are rounded towards cheap symbols is found for each
image by bisection with the rate of the coder's tables, so that its size comes out just
below the budget. It changes those symbols first that the refinement left undecided.

The files are made by the real coder and judged as the real decoder shows them, the
unrefined file among them: refinement never returns a file that is worse under its own
objective, nor one above the budget. Steps take a sum of squares for 1 - MS-SSIM; here
it is MS-SSIM itself, where the image is large enough and has no region of interest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from semlic_jax.compilation import FloatProgram
from semlic_jax.objectives.similarity import MS_SSIM_LEAST_SIDE, ms_ssim_within
from semlic_jax.refinement.objective import (
    Frozen,
    Images,
    Static,
    Terms,
    Weights,
    decoded_image,
    image_terms,
    structure_distance,
)
from semlic_jax.refinement.symbols import Rounding, hard_latents

Array = jax.Array

_STRICTEST = 0.45
_LOOSEST = -0.2
_BISECTIONS = 9
_ROUNDS = 3
# What a stream takes beyond its ideal length differs by at most so many bits.
_STREAM_BITS = 8


class Fitted(NamedTuple):
    """The file of one image, with the objective of what it decodes to."""

    data: bytes
    value: float
    unrefined_value: float


class _Candidate(NamedTuple):
    data: bytes
    value: float


# Three programs in the place of one, since each is needed by itself too.
coded_latents = FloatProgram(hard_latents, static_argnums=0)
shown_image = FloatProgram(decoded_image, static_argnums=0)
_image_terms = FloatProgram(image_terms, static_argnums=0)
_structure_distance = FloatProgram(structure_distance)


def score(
    static: Static,
    frozen: Frozen,
    images: Images,
    weights: Weights,
    rounding: Rounding,
    y_scaled: Array,
    z: Array,
) -> tuple[Terms, Array]:
    """The terms of the rounded latents as the coder sees them, and y_hat_scaled.

    Args:
        static, frozen, images, weights: of the refinement.
        rounding, y_scaled, z: as in `symbols.hard_latents`.
    """
    bits, y_hat = coded_latents(static, frozen, images, rounding, y_scaled, z)
    x_hat = shown_image(static, frozen, images, y_hat)
    return _image_terms(static, frozen, images, weights, bits, x_hat), y_hat


def fit_files(
    codec: Any,
    static: Static,
    frozen: Frozen,
    images: Images,
    latents: tuple[Array, Array],
    rounding_at: Callable[[np.ndarray], Rounding],
    values_of: Callable[[Sequence[dict[bytes, None]]], list[dict[bytes, float]]],
    *,
    levels: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    budgets: Sequence[int],
    payload_bits: np.ndarray,
    icc_profiles: Sequence[bytes | None],
    unrefined: Sequence[bytes],
) -> list[Fitted]:
    """The best file of each image within its budget.

    Args:
        codec: a `semlic_jax.Codec`.
        static, frozen, images: of the refinement.
        latents: y_scaled [B, h, w, M] and z [B, h/4, w/4, N], refined.
        rounding_at: how they are rounded at a strictness [B] from -0.2 to 0.45: the
            rate falls with it, and 0 is how the refinement left them.
        values_of: gives the objectives of files, as `decoded_values`.
        levels, sizes, budgets: quality level, height and width, and most bytes of each
            image.
        payload_bits: float [B], what the budget leaves for symbols, about.
        icc_profiles, unrefined: of each image.
    """
    count = len(levels)
    y_scaled, z = latents
    z_symbols = np.round(np.asarray(z))
    files: list[dict[bytes, None]] = [{data: None} for data in unrefined]

    def rounded(strictness: np.ndarray) -> tuple[np.ndarray, Array]:
        bits, y_hat = coded_latents(
            static, frozen, images, rounding_at(strictness), y_scaled, z
        )
        return np.asarray(bits, np.float64), y_hat

    def encode(i: int, y_hat: np.ndarray) -> bytes:
        symbols = codec.entropy.symbols(y_hat, z_symbols[i], levels[i], sizes[i])
        return codec.encode_symbols(symbols, levels[i], sizes[i], icc_profiles[i])

    bits, y_hat = rounded(np.zeros(count))
    for i, y in enumerate(np.asarray(y_hat)):
        data = encode(i, y)
        if len(data) <= budgets[i]:
            files[i][data] = None
    target = payload_bits.copy()
    for _ in range(_ROUNDS):
        over = bits > target
        low = np.where(over, 0.0, _LOOSEST)  # too many bits here, if anywhere
        high = np.where(over, _STRICTEST, 0.0)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            found, _ = rounded(middle)
            low = np.where(found > target, middle, low)
            high = np.where(found > target, high, middle)
        _, y_hat = rounded(high)
        excess = np.zeros(count)
        for i, y in enumerate(np.asarray(y_hat)):
            data = encode(i, y)
            excess[i] = 8 * (len(data) - budgets[i])
            if excess[i] <= 0:
                files[i][data] = None
        if (excess <= 0).all():
            break
        target -= np.where(excess > 0, excess + _STREAM_BITS, 0)

    fitted = []
    for own in values_of(files):
        candidates = [_Candidate(*pair) for pair in own.items()]
        start = candidates[0]
        # The unrefined file is one of them, so that this is never worse.
        best = min(candidates, key=lambda candidate: candidate.value)
        fitted.append(Fitted(best.data, best.value, start.value))
    return fitted


def decoded_values(
    codec: Any,
    static: Static,
    frozen: Frozen,
    images: Images,
    weights: Weights,
    files: Sequence[dict[bytes, None]],
) -> list[dict[bytes, float]]:
    """The objective of what each file decodes to.

    Args:
        codec, static, frozen, images, weights: of the refinement.
        files: of each image, the keys of a dictionary.
    """
    values: list[dict[bytes, float]] = [{} for _ in files]
    queues = [list(own) for own in files]
    original = np.asarray(images.x)
    no_bits = np.zeros(len(files), np.float32)
    measurable = _with_ms_ssim(images)
    structure_weight = float(weights.gamma * weights.structure)
    while any(queues):
        x_hat = original.copy()
        now = [queue.pop(0) if queue else None for queue in queues]
        for image, data in zip(x_hat, now, strict=True):
            if data is not None:
                decoded = codec.decompress(data)
                height, width = decoded.shape[:2]
                image[:height, :width] = decoded.astype(np.float32) / 255
        terms = _image_terms(static, frozen, images, weights, no_bits, x_hat)
        value = np.asarray(terms.value)
        if measurable.any():
            distance = 1 - ms_ssim_within(original, x_hat, images.sizes)
            change = np.asarray(distance - _structure_distance(images, x_hat))
            value = value + structure_weight * np.where(measurable, change, 0)
        for own, data, found in zip(values, now, value, strict=True):
            if data is not None:
                own[data] = float(found)
    return values


def _with_ms_ssim(images: Images) -> np.ndarray:
    """Whose objective has a term that MS-SSIM can take the place of: bool [B]."""
    sizes = np.asarray(images.sizes)
    if not images.structure:
        return np.zeros(len(sizes), bool)
    pixels = zip(np.asarray(images.weights), sizes, strict=True)
    equal = [bool((own[:height, :width] == 1).all()) for own, (height, width) in pixels]
    return np.array(equal) & (sizes.min(axis=1) >= MS_SSIM_LEAST_SIDE)
