# SPDX-License-Identifier: Apache-2.0
"""Distortions of photographs: codecs, blur, noise, colours, lost resolution.

In: distortions of 8-bit images with a strength from 0 (slight) to 1 (strong). They make
the pairs on which a feature network is distilled and its distances are compared. Out:
the distillation (`distil.py`). All run on the host: NumPy, Pillow and this package's
codec.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from semlic_jax.codec import Codec

# uint8 [H, W, 3], strength in [0, 1] -> uint8 [H, W, 3].
Distortion = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]

_FILTERS = (
    Image.Resampling.NEAREST,
    Image.Resampling.BILINEAR,
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
)


def _coded(image: np.ndarray, **options: Any) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, **options)
    return np.asarray(Image.open(buffer).convert("RGB"))


def _geometric(low: float, high: float, strength: float) -> float:
    return low * (high / low) ** strength


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(pixels, 0, 255)).astype(np.uint8)


def jpeg(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """JPEG of quality 95 to 3, with colour at full or half resolution."""
    quality = round(95 - 92 * strength**0.5)
    return _coded(
        image, format="JPEG", quality=quality, subsampling=int(2 * rng.integers(2))
    )


def webp(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """WebP of quality 95 to 0."""
    return _coded(image, format="WEBP", quality=round(95 * (1 - strength)))


def avif(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """AVIF of quality 90 to 5; its fast speed has the artefacts of the slow ones."""
    return _coded(image, format="AVIF", quality=round(90 - 85 * strength), speed=8)


def blur(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian blur of 0.3 to 4 pixels."""
    radius = _geometric(0.3, 4.0, strength)
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def noise(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise of 1 to 40 grey levels: coloured or grey, white or coarse."""
    height, width = image.shape[:2]
    cell = int(rng.choice([1, 1, 2, 3]))
    shape = (-(-height // cell), -(-width // cell), int(rng.choice([1, 3])))
    grains = rng.standard_normal(shape).repeat(cell, axis=0).repeat(cell, axis=1)
    return _to_uint8(image + _geometric(1, 40, strength) * grains[:height, :width])


def colour(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Random gains and offsets of channels, saturation and gamma."""
    saturation = 1 + strength * rng.uniform(-0.9, 0.9)
    shifted = ImageEnhance.Color(Image.fromarray(image)).enhance(saturation)
    pixels = (np.asarray(shifted, np.float32) / 255) ** (
        2 ** (strength * rng.uniform(-0.7, 0.7))
    )
    gains = 1 + strength * rng.uniform(-0.25, 0.25, 3)
    offsets = strength * rng.uniform(-30, 30, 3)
    return _to_uint8(255 * pixels * gains + offsets)


def resample(
    image: np.ndarray, strength: float, rng: np.random.Generator
) -> np.ndarray:
    """Down-scaling by 1.2 to 6 and up-scaling back, with random filters."""
    height, width = image.shape[:2]
    factor = _geometric(1.2, 6.0, strength)
    small = (max(1, round(width / factor)), max(1, round(height / factor)))
    down, up = (_FILTERS[int(rng.integers(len(_FILTERS)))] for _ in range(2))
    resized = Image.fromarray(image).resize(small, down)
    return np.asarray(resized.resize((width, height), up))


def codec_distortion(codec: Codec) -> Distortion:
    """Return the distortion by a codec of this package, of quality 1 to 0."""

    def distort(
        image: np.ndarray, strength: float, rng: np.random.Generator
    ) -> np.ndarray:
        return codec.decompress(codec.compress(image, quality=1 - strength))

    return distort


# All but this package's own codec, whose model must be loaded first.
DISTORTIONS: dict[str, Distortion] = {
    "jpeg": jpeg,
    "webp": webp,
    "avif": avif,
    "blur": blur,
    "noise": noise,
    "colour": colour,
    "resample": resample,
}
OWN_CODEC = "semlic"


def all_distortions(codec: Codec) -> dict[str, Distortion]:
    """Every distortion by name, including `OWN_CODEC`."""
    return DISTORTIONS | {OWN_CODEC: codec_distortion(codec)}
