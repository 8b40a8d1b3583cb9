# SPDX-License-Identifier: Apache-2.0
"""Image files at the edge of the package: photographs in, pixels and files out.

Everything between two edges of this module is uint8 [H, W, 3] in the colour space that
the ICC profile beside it names (sRGB where there is none). What a file holds beyond
that is converted, and every conversion that changes values says so in a note; what
cannot be converted without a decision of the caller (transparency) is refused.

May import NumPy and Pillow, and nothing of this package.
"""

from __future__ import annotations

import io
import os
import secrets
import stat
import struct
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import (
    ExifTags,
    Image,
    ImageChops,
    ImageCms,
    ImageColor,
    ImageOps,
    UnidentifiedImageError,
)

MAX_SIDE = 65535
# 134 megapixels: 400 MB of pixels. Pillow's own limit (179 megapixels) stays in force.
MAX_PIXELS = 2**27

_TIFF_SIDES = 256, 257  # the tags ImageWidth and ImageLength
_TIFF_BITS = 258  # the tag BitsPerSample
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap the sides
_GRID_LEVELS = 18  # of each colour, to compare profiles

# What Pillow's decoders raise on damaged data.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    RuntimeError,
    TypeError,
    ZeroDivisionError,
    Image.DecompressionBombError,
    struct.error,
    zlib.error,
)

# Lossless where the format can be, so that a decoded photograph is not coded twice.
_SAVE_OPTIONS: dict[str, tuple[str, dict]] = {
    ".png": ("PNG", {}),
    ".tif": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    ".tiff": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    ".bmp": ("BMP", {}),
    ".ppm": ("PPM", {}),
    ".webp": ("WEBP", {"lossless": True}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
}


@dataclass(frozen=True)
class Photograph:
    """A photograph as the codec takes it.

    Attributes:
      pixels: uint8 [H, W, 3], upright: EXIF orientation is applied.
      icc_profile: the RGB profile that the pixels are in, or None for sRGB, also
        where the file has a profile that says sRGB.
      notes: one clause for each conversion that was made, for people to read.
    """

    pixels: np.ndarray
    icc_profile: bytes | None = None
    notes: tuple[str, ...] = ()


def parse_colour(text: str) -> tuple[int, int, int]:
    """`white`, `#ff8800`, `rgb(1, 2, 3)` -> three values 0..255."""
    try:
        colour = ImageColor.getrgb(text)
    except ValueError:
        raise ValueError(
            f"unknown colour {text!r}: expected a name such as white, or #rrggbb"
        ) from None
    return colour[0], colour[1], colour[2]


def read_photograph(
    source: str | os.PathLike | BinaryIO,
    *,
    background: tuple[int, int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Photograph:
    """Reads an image file that nobody has checked.

    Args:
      source: a path or a binary file.
      background: RGB 0..255 that transparent pixels are laid on; None refuses images
        with transparency.
      max_pixels: larger images are refused from their header, before any memory is
        taken for them.

    Raises:
      ValueError: not an image, damaged, too large, transparent without a background,
        or of a kind that has no 8-bit RGB meaning. One sentence.
      OSError: the file cannot be opened at all.
    """
    name = _name_of(source)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = _open(source, name)
        with image:
            _check_size(image.size, name, max_pixels)
            photograph = _convert(image, name, background)
    notes = [
        f"the reader warns: {_one_line(warning.message)}"
        for warning in caught
        # Our own limit is the one that counts; see MAX_PIXELS.
        if not issubclass(warning.category, Image.DecompressionBombWarning)
    ]
    return replace(photograph, notes=(*photograph.notes, *dict.fromkeys(notes)))


def photograph_of(
    image: Image.Image, *, background: tuple[int, int, int] | None = None
) -> Photograph:
    """The same conversions for a Pillow image that is open already."""
    _check_size(image.size, "the image", max_pixels=MAX_PIXELS)
    return _convert(image, "the image", background)


def photograph_size(source: str | os.PathLike | BinaryIO) -> tuple[int, int]:
    """Height and width of what `read_photograph` gives, from the head of the file.

    Raises:
      ValueError, OSError: as `read_photograph`, as far as the head says it.
    """
    name = _name_of(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again with the pixels
        with _open(source, name) as image:
            _check_size(image.size, name, MAX_PIXELS)
            width, height = _sides_as_stored(image)
            try:
                orientation = image.getexif().get(ExifTags.Base.Orientation)
            except _DECODE_ERRORS:
                orientation = None
    return (width, height) if orientation in _TURNED else (height, width)


def read_brightness(source: str | os.PathLike | BinaryIO) -> np.ndarray:
    """uint8 [H, W] of an image file that nobody has checked, whatever its colours.

    Upright, as photographs are, and the darker the more transparent it is.

    Raises:
      ValueError, OSError: as `read_photograph`, but for transparency.
    """
    name = _name_of(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _open(source, name) as image:
            _check_size(image.size, name, MAX_PIXELS)
            _load(image, name)
            image = _upright(image, [])
            if image.has_transparency_data:
                image = _with_alpha(image, name, [])
                alpha = image.getchannel("A")
                return np.array(ImageChops.multiply(image.convert("L"), alpha))
            return np.array(_at_most_8_bits(image, name, []).convert("L"))


def _sides_as_stored(image: Image.Image) -> tuple[int, int]:
    """Width and height before the orientation; Pillow has a TIFF's turned already."""
    tags = getattr(image, "tag_v2", {})
    width, height = (tags.get(tag) for tag in _TIFF_SIDES)
    return width or image.width, height or image.height


def _name_of(source: str | os.PathLike | BinaryIO) -> str:
    if isinstance(source, str | os.PathLike):
        return Path(source).name
    return "the input"


def _open(source: str | os.PathLike | BinaryIO, name: str) -> Image.Image:
    if isinstance(source, str | os.PathLike) and os.path.isdir(source):
        raise ValueError(f"{name} is a folder: expected an image file")
    try:
        return Image.open(source)
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not an image in a format known here") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is refused for its size: {error}") from None
    except (FileNotFoundError, PermissionError):
        raise
    except _DECODE_ERRORS as error:
        raise ValueError(
            f"{name} is not a readable image: {_one_line(error)}"
        ) from None


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"{name} has no pixels: it is {width}x{height}")
    if max(width, height) > MAX_SIDE:
        raise ValueError(
            f"{name} is too large: it is {width}x{height}, "
            f"the longest side possible is {MAX_SIDE}"
        )
    if width * height > max_pixels:
        raise ValueError(
            f"{name} is too large: it is {width}x{height}, "
            f"at most {max_pixels / 1e6:.0f} megapixels are read"
        )


def _convert(
    image: Image.Image, name: str, background: tuple[int, int, int] | None
) -> Photograph:
    notes = []
    if _raw_bits(image) == 16:
        notes.append("16-bit samples were rounded to 8 bits")
    _load(image, name)
    icc_profile = image.info.get("icc_profile") or None
    first = _upright(image, notes)
    first = _without_transparency(first, name, background, notes)
    first, icc_profile = _to_rgb(first, name, icc_profile, notes)
    pixels = np.array(first, dtype=np.uint8)
    # Last, since it reads on in the file.
    frames = _count_frames(image)
    if frames > 1:
        notes.insert(0, f"only the first of {frames} frames is used")
    return Photograph(pixels, icc_profile, tuple(dict.fromkeys(notes)))


def _load(image: Image.Image, name: str) -> None:
    if image.mode == "I" and _raw_bits(image) > 16:
        raise ValueError(f"{name} has 32-bit samples: expected 8 or 16 bits per sample")
    try:
        image.load()
    except _DECODE_ERRORS as error:
        raise ValueError(f"{name} is damaged: {_one_line(error)}") from None


def _count_frames(image: Image.Image) -> int:
    """Of an animation; 1 where those after the first are damaged."""
    try:
        return getattr(image, "n_frames", 1)
    except _DECODE_ERRORS:
        return 1


def _raw_bits(image: Image.Image) -> int:
    """Bits per sample in the file, where the image's mode does not say."""
    of_tiff = getattr(image, "tag_v2", {}).get(_TIFF_BITS)
    if isinstance(of_tiff, tuple):  # whatever else a damaged file has there
        return max((bits for bits in of_tiff if isinstance(bits, int)), default=8)
    tiles = getattr(image, "tile", None) or ()
    for tile in tiles:
        args = tile[3] if isinstance(tile[3], tuple | list) else (tile[3],)
        if any(isinstance(arg, str) and ";16" in arg for arg in args):
            return 16
    return 8


def _upright(image: Image.Image, notes: list[str]) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except _DECODE_ERRORS:
        notes.append("damaged EXIF data were ignored")
        return image


def _without_transparency(
    image: Image.Image,
    name: str,
    background: tuple[int, int, int] | None,
    notes: list[str],
) -> Image.Image:
    if not image.has_transparency_data:
        return image
    grey = image.mode in ("L", "LA", "La", "1", "I;16", "I")
    rgba = _with_alpha(image, name, notes)
    if rgba.getchannel("A").getextrema() == (255, 255):
        notes.append("an alpha channel that was opaque everywhere was dropped")
        return rgba.convert("L" if grey else "RGB")
    if background is None:
        raise ValueError(
            f"{name} has transparent pixels: give a background colour to lay it on"
        )
    ground = Image.new("RGBA", rgba.size, (*background, 255))
    notes.append("transparent pixels were laid on the background colour")
    return Image.alpha_composite(ground, rgba).convert("RGB")


def _with_alpha(image: Image.Image, name: str, notes: list[str]) -> Image.Image:
    """An image that has transparency as RGBA."""
    if image.mode != "I;16":
        return image.convert("RGBA")
    # The transparent grey value of a 16-bit PNG counts in 16 bits.
    key = image.info.get("transparency")
    wide = np.asarray(image)
    alpha = Image.fromarray(np.where(wide == key, 0, 255).astype(np.uint8))
    rgba = _narrow(image, name, notes).convert("RGBA")
    rgba.putalpha(alpha)
    return rgba


def _to_rgb(
    image: Image.Image, name: str, icc_profile: bytes | None, notes: list[str]
) -> tuple[Image.Image, bytes | None]:
    image = _at_most_8_bits(image, name, notes)
    space = icc_profile[16:20] if icc_profile else None
    if icc_profile and space == b"RGB " and _is_srgb(icc_profile):
        icc_profile, space = None, None  # 3 kB that say what no profile says
    if image.mode == "RGB" and space in (None, b"RGB "):
        return image, icc_profile
    kinds = {
        "1": "a black-and-white image",
        "L": "a greyscale image",
        "P": "a palette image",
        "CMYK": "a CMYK image",
    }
    notes.append(f"{kinds.get(image.mode, image.mode + ' pixels')} was made RGB")
    if image.mode == "1":
        image = image.convert("L")
    if icc_profile and {b"GRAY": "L", b"CMYK": "CMYK"}.get(space or b"") == image.mode:
        try:
            return _through_profile(image, icc_profile), None
        except (ImageCms.PyCMSError, OSError):
            notes.append("its ICC profile is damaged and was dropped")
            return image.convert("RGB"), None
    try:
        rgb = image.convert("RGB")
    except ValueError:
        raise ValueError(
            f"{name} has {image.mode} pixels: expected greyscale, RGB or CMYK"
        ) from None
    if icc_profile and space != b"RGB ":
        notes.append("an ICC profile of another colour space was dropped")
        icc_profile = None
    return rgb, icc_profile


def _at_most_8_bits(image: Image.Image, name: str, notes: list[str]) -> Image.Image:
    if image.mode == "F":
        raise ValueError(
            f"{name} has floating-point samples: expected 8 or 16 bits per sample"
        )
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I"):
        return _narrow(image, name, notes)
    return image


def _narrow(image: Image.Image, name: str, notes: list[str]) -> Image.Image:
    """16-bit greyscale -> 8-bit, rounded (65535 / 255 = 257)."""
    wide = np.asarray(image).astype(np.int64)
    if wide.size and (wide.min() < 0 or wide.max() > 65535):
        raise ValueError(
            f"{name} has samples from {wide.min()} to {wide.max()}: "
            "expected 16 bits per sample, 0 to 65535"
        )
    notes.append("16-bit samples were rounded to 8 bits")
    return Image.fromarray(((wide + 128) // 257).astype(np.uint8))


def _through_profile(image: Image.Image, icc_profile: bytes) -> Image.Image:
    converted = ImageCms.profileToProfile(
        image,
        ImageCms.ImageCmsProfile(io.BytesIO(icc_profile)),
        ImageCms.createProfile("sRGB"),
        outputMode="RGB",
    )
    assert converted is not None  # only an in-place conversion gives None
    return converted


def _is_srgb(icc_profile: bytes) -> bool:
    """Whether no colour of a grid differs from sRGB by more than one level."""
    levels = np.linspace(0, 255, _GRID_LEVELS).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), -1)
    grid = colours.reshape(_GRID_LEVELS, -1, 3)
    try:
        seen = _through_profile(Image.fromarray(grid), icc_profile)
    except (ImageCms.PyCMSError, OSError):
        return False
    return int(np.abs(np.asarray(seen, int) - grid).max()) <= 1


def _one_line(error: BaseException | str) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def check_suffix(suffix: str) -> None:
    """Refuses kinds of image files that `encode_image` does not write."""
    if suffix.lower() not in _SAVE_OPTIONS:
        raise ValueError(
            f"cannot write {suffix or 'a file without a suffix'}: "
            f"expected one of {' '.join(_SAVE_OPTIONS)}"
        )


def encode_image(
    pixels: np.ndarray, suffix: str, *, icc_profile: bytes | None = None
) -> bytes:
    """uint8 [H, W, 3] -> the bytes of an image file of the kind that `suffix` names."""
    check_suffix(suffix)
    kind, options = _SAVE_OPTIONS[suffix.lower()]
    if icc_profile and kind not in ("BMP", "PPM"):  # these have no place for it
        options = {**options, "icc_profile": icc_profile}
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format=kind, **options)
    return stream.getvalue()


def check_outputs(paths: Sequence[str | os.PathLike], *, force: bool) -> None:
    """Refuses outputs that cannot or must not be written, before any work is done."""
    for given in paths:
        path = Path(given)
        if path.is_dir():
            raise ValueError(f"the output {path} is a folder: expected a file name")
        if not path.parent.is_dir():
            raise ValueError(f"there is no folder {path.parent} to write {path.name}")
        if os.path.lexists(path) and not force and _is_regular(path):
            raise ValueError(f"{path} exists: give --force to replace it")


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:  # a link that leads nowhere
        return True


def write_file(path: str | os.PathLike, data: bytes, *, force: bool = False) -> None:
    """Writes a whole file or nothing: a temporary file in the same folder, renamed.

    A file that is already there stays as it was unless `force` is given, also if it
    appeared while we worked. A pipe or a device is written to directly.
    """
    check_outputs([path], force=force)
    target = Path(os.path.realpath(path))
    if target.exists() and not _is_regular(target):
        with open(target, "wb") as stream:
            stream.write(data)
        return
    # Short, whatever the name: that may be as long as the file system allows.
    part = target.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with open(part, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        if force:
            os.replace(part, target)
        else:
            _rename_to_free_name(part, target)
    finally:
        part.unlink(missing_ok=True)


def _rename_to_free_name(part: Path, target: Path) -> None:
    """A rename that fails where another process took the name since it was checked."""
    try:
        os.link(part, target)
    except FileExistsError:
        raise ValueError(f"{target} exists: give --force to replace it") from None
    except OSError:  # a file system without hard links
        os.replace(part, target)
