# SPDX-License-Identifier: Apache-2.0
"""Classical codecs behind one small interface, measured in real bytes.

Each codec is one class: a name, a file suffix, its settings as a range of integers
from the smallest file to the largest, `encode` and `decode`. `Ladder.fit` finds the
best setting whose file fits a number of bytes. To add a codec, write a class and name
it in `CODECS`. A sweep recognises a codec by the text of its class, docstring and
comments included (see `entrants.py`).

Sizes are those of whole files as the format's own encoder writes them, without
metadata. All codecs run at their best settings except `avif`, which runs at a speed
that people are willing to wait for (`avif-slow` is AVIF at its best), and `jxl`, which
has one effort above ours.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image, features

# Errors of a codec on one image. They leave a gap with their message and do not end the
# run: other images and codecs can still be done.
FAILURES = (ValueError, OSError, RuntimeError, MemoryError)


def reason_of(error: BaseException) -> str:
    """An error's message in one line."""
    return " ".join(str(error).split()) or type(error).__name__


class CodecUnavailableError(ValueError):
    """This machine lacks what a codec needs; the message says what."""


class ClassicalCodec(Protocol):
    """What `Ladder`, the demo, the benchmark and the sweeps need from a codec.

    Attributes:
      name: the name that tables and plots show.
      suffix: suffix of its files.
      settings: integers in the order of growing files and growing quality.
    """

    name: str
    suffix: str
    settings: range

    def encode(self, image: np.ndarray, setting: int) -> bytes:
        """uint8 [H, W, 3] -> the bytes of a whole file."""
        ...

    def decode(self, data: bytes) -> np.ndarray:
        """The bytes of a whole file -> uint8 [H, W, 3]."""
        ...


def _save(image: np.ndarray, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, **options)  # type: ignore[arg-type]
    return stream.getvalue()


def _load(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"))


def _needs_feature(name: str, feature: str) -> None:
    if not features.check(feature):
        raise CodecUnavailableError(f"this Pillow was built without {name}")


class Jpeg:
    """Progressive JPEG with optimised Huffman tables and 4:2:0 colour."""

    name = "JPEG"
    suffix = ".jpg"
    settings = range(1, 101)

    def encode(self, image: np.ndarray, setting: int) -> bytes:
        return _save(
            image,
            format="JPEG",
            quality=setting,
            optimize=True,
            progressive=True,
            subsampling="4:2:0",
        )

    def decode(self, data: bytes) -> np.ndarray:
        return _load(data)


class WebP:
    """Lossy WebP at method 6, the slowest and best; always 4:2:0."""

    name = "WebP"
    suffix = ".webp"
    settings = range(0, 101)

    def __init__(self) -> None:
        _needs_feature(self.name, "webp")

    def encode(self, image: np.ndarray, setting: int) -> bytes:
        return _save(image, format="WEBP", quality=setting, method=6)

    def decode(self, data: bytes) -> np.ndarray:
        return _load(data)


class Avif:
    """AVIF (AV1 still pictures) at speed 4 with 4:2:0 colour.

    Two threads on any machine: libaom's files are others with one, by about 1 % in
    size, and the same with two or more.
    """

    name = "AVIF"
    suffix = ".avif"
    settings = range(0, 101)
    _speed = 4
    _tiles = True

    def __init__(self) -> None:
        _needs_feature(self.name, "avif")

    def encode(self, image: np.ndarray, setting: int) -> bytes:
        return _save(
            image,
            format="AVIF",
            quality=setting,
            speed=self._speed,
            subsampling="4:2:0",
            max_threads=2,
            autotiling=self._tiles,
        )

    def decode(self, data: bytes) -> np.ndarray:
        return _load(data)


class SlowAvif(Avif):
    """AVIF at speed 1 in one tile: smaller files for three times the time and more."""

    name = "AVIF slow"
    _speed = 1
    _tiles = False


class Jpeg2000:
    """JPEG 2000 with the 9/7 wavelet; the setting is a ladder of compression ratios."""

    name = "JPEG 2000"
    suffix = ".jp2"
    settings = range(0, 201)

    def __init__(self) -> None:
        _needs_feature(self.name, "jpg_2000")

    def encode(self, image: np.ndarray, setting: int) -> bytes:
        # 800:1 to 4:1 in steps of 2.7 %: 0.03 to 6 bits per pixel.
        ratio = 800.0 * (4.0 / 800.0) ** (setting / self.settings[-1])
        smallest_side = min(image.shape[:2])
        # OpenJPEG refuses more wavelet levels than the image has octaves.
        levels = max(1, min(6, smallest_side.bit_length()))
        return _save(
            image,
            format="JPEG2000",
            quality_mode="rates",
            quality_layers=[ratio],
            irreversible=True,
            num_resolutions=levels,
        )

    def decode(self, data: bytes) -> np.ndarray:
        return _load(data)


class JpegXl:
    """Lossy JPEG XL at effort 9, through the package pillow-jxl-plugin."""

    name = "JPEG XL"
    suffix = ".jxl"
    settings = range(1, 100)

    def __init__(self) -> None:
        try:
            importlib.import_module("pillow_jxl")  # registers the format
        except ImportError:
            raise CodecUnavailableError(
                "JPEG XL needs the package pillow-jxl-plugin"
            ) from None

    def encode(self, image: np.ndarray, setting: int) -> bytes:
        return _save(image, format="JXL", quality=setting, effort=9)

    def decode(self, data: bytes) -> np.ndarray:
        return _load(data)


CODECS: dict[str, Callable[[], ClassicalCodec]] = {
    "jpeg": Jpeg,
    "webp": WebP,
    "avif": Avif,
    "avif-slow": SlowAvif,
    "jpeg2000": Jpeg2000,
    "jxl": JpegXl,
}


def classical_codec(name: str) -> ClassicalCodec:
    """A codec by its short name.

    Raises:
      CodecUnavailableError: this machine lacks what it needs.
      ValueError: there is no codec of that name.
    """
    if name not in CODECS:
        raise ValueError(f"unknown codec {name!r}: expected one of {', '.join(CODECS)}")
    return CODECS[name]()


@dataclass(frozen=True)
class Fit:
    """The best file of one codec within a number of bytes."""

    setting: int
    data: bytes


class Ladder:
    """The files of one image by one codec at all its settings, made on demand.

    Args:
      codec: see `ClassicalCodec`.
      image: uint8 [H, W, 3].
    """

    # File sizes nearly always grow with the setting; because of the exceptions, this
    # many settings above the one that bisection finds are tried too.
    _lookahead = 2

    def __init__(self, codec: ClassicalCodec, image: np.ndarray) -> None:
        self.codec = codec
        self.image = image
        self._files: dict[int, bytes] = {}

    def encode(self, setting: int) -> bytes:
        """The file at a setting; it is made only once.

        Raises:
          ValueError: the codec has no such setting, or it cannot code the image.
        """
        if setting not in self.codec.settings:
            raise ValueError(
                f"{self.codec.name} has no setting {setting}: expected "
                f"{self.codec.settings[0]} to {self.codec.settings[-1]}"
            )
        if setting not in self._files:
            self._files[setting] = self.codec.encode(self.image, setting)
        return self._files[setting]

    def fit(self, max_bytes: int) -> Fit:
        """The highest setting whose file has at most `max_bytes` bytes.

        Where sizes do not grow with the setting, it is the highest near the place that
        a bisection finds: files that fit may lie above.

        Raises:
          ValueError: even the smallest file is larger; names its size.
        """
        settings = self.codec.settings
        low, high = 0, len(settings)  # settings below low fit, from high on do not
        while low < high:
            middle = (low + high) // 2
            if len(self.encode(settings[middle])) <= max_bytes:
                low = middle + 1
            else:
                high = middle
        for setting in reversed(settings[max(low - 1, 0) : low + self._lookahead]):
            data = self.encode(setting)
            if len(data) <= max_bytes:
                return Fit(setting, data)
        smallest_bytes = min(map(len, self._files.values()))
        height, width = self.image.shape[:2]
        raise ValueError(
            f"{self.codec.name} cannot make this {width}x{height} image smaller than "
            f"{smallest_bytes:,} bytes ({8 * smallest_bytes / (height * width):.3f} "
            f"bpp): at most {max_bytes:,} were asked for"
        )
