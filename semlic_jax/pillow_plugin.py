# SPDX-License-Identifier: Apache-2.0
"""Pillow reads and writes `.semlic` after `import semlic_jax.pillow_plugin`.

    from PIL import Image
    import semlic_jax.pillow_plugin

    image = Image.open("photo.png")
    image.save("photo.semlic", bpp=0.15)  # or quality=0.5 (0 to 1), or max_bytes=9000
    again = Image.open("photo.semlic")  # size and mode are known, nothing is decoded
    again.thumbnail((256, 256))  # decoded here

Importing this is light; JAX and a model are loaded at the first pixel. Models are
loaded once and shared by all threads. `save` also takes `model`, `background` (a colour
as text or three values 0..255), `icc_profile` (None leaves it out; one that is not of
RGB colours is not kept), `srgb` (True converts the colours of the image's own profile
to sRGB and keeps none), and `refine` and `roi` as `Codec.compress` does.

Models that differ in their decoder alone can all decode a file. It is decoded by the
first that can, of those that `register_model` was given, the latest first; then of the
packaged models; then of those that were loaded to save.

What cannot be saved is refused with a ValueError. By then Pillow has opened the file,
and so has emptied one that was there, as with every format: where that matters, save to
an `io.BytesIO` first. A damaged file raises `DamagedFileError`, both a `BitstreamError`
and what Pillow raises for damaged files of its own formats.

Pillow itself loads no plugins of other packages (python-pillow/Pillow#6070). This one
is the entry point `semlic` of the group `pillow.plugins`, for programs that load what
is installed:

    for plugin in importlib.metadata.entry_points(group="pillow.plugins"):
        plugin.load()
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from PIL import Image, ImageFile, UnidentifiedImageError

import semlic_jax
from semlic_jax.coding.bitstream import MAGIC, BitstreamError, unpack
from semlic_jax.image_modes import is_rgb_profile
from semlic_jax.images import Photograph, photograph_of

if TYPE_CHECKING:
    from semlic_jax.codec import Codec

FORMAT = "SEMLIC"
EXTENSION = ".semlic"

DEFAULT_MODEL = "small"
DEFAULT_QUALITY = 0.5

_RATES = ("quality", "bpp", "max_bytes")
_REFINEMENT = ("refine", "roi")


class DamagedFileError(BitstreamError, UnidentifiedImageError):
    """A file that Pillow took for a `.semlic` file and that cannot be read as one."""


@contextmanager
def _as_pillow_raises_it() -> Iterator[None]:
    """For programs that expect an OSError of a damaged file, as of other formats."""
    try:
        yield
    except BitstreamError as error:
        raise DamagedFileError(str(error)) from error


class _Models:
    """Codecs by name and by fingerprint, each loaded once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loaded: dict[str, Codec] = {}
        self._registered: dict[str, Codec] = {}  # the latest last

    def named(self, name: str | os.PathLike) -> Codec:
        with self._lock:
            return self._load(_model_name(name))

    def register(self, name: str | os.PathLike) -> None:
        key = _model_name(name)
        with self._lock:
            codec = self._load(key)
            self._registered.pop(key, None)
            self._registered[key] = codec

    def _load(self, key: str) -> Codec:
        if key not in self._loaded:
            self._loaded[key] = semlic_jax.load(key)
        return self._loaded[key]

    def of_file(self, data: bytes) -> Codec:
        from semlic_jax.packaged import load_for, name_of_model

        header, _ = unpack(data)
        packaged = name_of_model(header.fingerprint)
        with self._lock:
            for codec in reversed(self._registered.values()):
                if codec.fingerprint.startswith(header.fingerprint):
                    return codec
            if packaged is not None:
                return self._load(packaged)
            for codec in self._loaded.values():
                if codec.fingerprint.startswith(header.fingerprint):
                    return codec
        return load_for(data)  # says which models there are


_models = _Models()


def register_model(name_or_path: str | os.PathLike) -> None:
    """Loads a model so that files that were made with it can be opened.

    Raises:
        ValueError: no such model, or not a valid model file.
    """
    _models.register(name_or_path)


def _model_name(given: Any) -> str:
    name = os.fspath(given) if isinstance(given, str | os.PathLike) else b""
    if not name or not isinstance(name, str):
        raise ValueError(f"expected a model's name or path as model, found {given!r}")
    return name


class SemlicImageFile(ImageFile.ImageFile):
    """A `.semlic` file, decoded when its pixels are first asked for."""

    format = FORMAT
    format_description = "semlic perceptual image"

    def _open(self) -> None:
        assert self.fp is not None
        self._data: bytes = self.fp.read()
        with _as_pillow_raises_it():
            header, _ = unpack(self._data)
        self._size = (header.width, header.height)
        self._mode = "RGB"
        if header.icc_profile is not None:
            self.info["icc_profile"] = header.icc_profile
        self.info["quality"] = header.quality / 255
        # Stands for pixels that are still to come; `load` replaces it.
        self.tile = [ImageFile._Tile("raw", (0, 0, *self.size), 0, "RGB")]
        self._loading = threading.Lock()

    def load(self) -> Image.core.PixelAccess | None:
        if not self.tile:  # decoded, or a copy, which has no lock
            return super().load()
        with self._loading:
            if self.tile:
                with _as_pillow_raises_it():
                    pixels = _models.of_file(self._data).decompress(self._data)
                if self.fp is not None and self._exclusive_fp:
                    self.fp.close()
                self.fp = io.BytesIO(pixels.tobytes())
                self._data = b""
            return super().load()

    def load_seek(self, pos: int) -> None:
        """Nothing to seek: `load` puts the pixels at the start of the stream."""


def _accept(prefix: bytes) -> bool:
    return prefix.startswith(MAGIC)


def _save(image: Image.Image, stream: IO[bytes], filename: str | bytes) -> None:
    options: dict[str, Any] = getattr(image, "encoderinfo", {})
    photograph = photograph_of(
        image,
        background=options.get("background"),
        srgb=bool(options.get("srgb", False)),
    )
    given = {name: value for name, value in options.items() if value is not None}
    rate = {name: given[name] for name in _RATES if name in given}
    data = _models.named(given.get("model", DEFAULT_MODEL)).compress(
        photograph.pixels,
        **(rate or {"quality": DEFAULT_QUALITY}),
        **{name: given[name] for name in _REFINEMENT if name in given},
        icc_profile=_profile_to_write(options, photograph),
    )
    stream.write(data)


def _profile_to_write(options: dict[str, Any], photograph: Photograph) -> bytes | None:
    """The profile that is given, also None; that of the pixels where none is.

    None of pixels that were converted to sRGB.
    """
    if options.get("srgb"):
        return None
    given = options.get("icc_profile", photograph.icc_profile)
    if given and isinstance(given, bytes) and not is_rgb_profile(given):
        # Programs hand on the profile of the CMYK image that they had.
        return photograph.icc_profile
    return given


Image.register_open(FORMAT, SemlicImageFile, _accept)
Image.register_save(FORMAT, _save)
Image.register_extension(FORMAT, EXTENSION)
Image.register_mime(FORMAT, "image/x-semlic")
