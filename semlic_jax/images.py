# SPDX-License-Identifier: Apache-2.0
"""Image files at the edge of the package: photographs in, pixels and files out.

Everything between two edges of this module is uint8 [H, W, 3] in the colour space that
the ICC profile beside it names (sRGB where there is none). What a file holds beyond
that is converted, and every conversion that changes values says so in a note; what
cannot be converted without a decision of the caller (transparency) is refused.

May import NumPy and Pillow, and of this package `image_modes` and `other_formats`.
"""

from __future__ import annotations

import contextlib
import io
import operator
import os
import re
import secrets
import stat
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import (
    ExifTags,
    Image,
    ImageChops,
    ImageColor,
    ImageOps,
    UnidentifiedImageError,
)

from semlic_jax.image_modes import (
    DAMAGED_PROFILE,
    Samples,
    at_most_8_bits,
    note_of_colours,
    samples_of,
    to_rgb,
    with_alpha,
    without_transparency,
)
from semlic_jax.other_formats import add_format_of

MAX_SIDE = 65535
# 134 megapixels: 400 MB of pixels. Pillow's own limit (179 megapixels) stays in force.
MAX_PIXELS = 2**27

_TIFF_SIDES = 256, 257  # the tags ImageWidth and ImageLength
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap the sides

# Formats that are refused: PostScript is a program, and IPTC records can hold a file of
# any format, PostScript included.
_NO_PHOTOGRAPHS = {
    "EPS": "a PostScript file",
    "IPTC": "a file of IPTC records",
}

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


# What is written without a profile even where there is one.
_WITHOUT_PROFILES = ("BMP", "PPM")

_DESCRIPTOR = re.compile(r"/dev/(stdout|stderr)|(?:/dev|/proc/self)/fd/(\d+)")
_LONGEST_SIDES = {"JPEG": 65500, "WEBP": 16383}


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
    """`white`, `#ff8800`, `rgb(1, 2, 3)` -> three values 0..255.

    Raises:
      ValueError: it names no colour, or one that is not opaque.
    """
    try:
        colour = ImageColor.getrgb(text)
    except ValueError:
        raise ValueError(
            f"unknown colour {text!r}: expected a name such as white, or #rrggbb"
        ) from None
    if len(colour) == 4 and colour[3] < 255:
        raise ValueError(f"expected an opaque colour, found {text!r}")
    return colour[0], colour[1], colour[2]


def checked_colour(given: Any) -> tuple[int, int, int]:
    """A colour as text, see `parse_colour`, or as three whole numbers 0..255.

    Raises:
      ValueError: it is neither.
    """
    if isinstance(given, str):
        return parse_colour(given)
    try:
        red, green, blue = (operator.index(value) for value in given)
    except (TypeError, ValueError):
        red = green = blue = -1
    if not all(0 <= value <= 255 for value in (red, green, blue)):
        raise ValueError(
            "expected a colour such as 'white' or three whole numbers from 0 to 255, "
            f"found {given!r}"
        )
    return red, green, blue


def read_photograph(
    source: str | os.PathLike | BinaryIO,
    *,
    background: tuple[int, int, int] | str | None = None,
    srgb: bool = False,
    max_pixels: int = MAX_PIXELS,
    catch_warnings: bool = True,
) -> Photograph:
    """Reads an image file that nobody has checked.

    Args:
      source: a path or a binary file.
      background: colour that transparent pixels are laid on, three values 0..255 or
        text (`parse_colour`); None refuses images with transparency.
      srgb: convert colours of another profile to sRGB, which needs none.
      max_pixels: larger images are refused from their header, before any memory is
        taken for them.
      catch_warnings: make the decoder's warnings notes. Pass False in threads:
        catching warnings changes the filters of the whole process.

    Raises:
      ValueError: not an image, damaged, too large, transparent without a background,
        of a kind that has no 8-bit RGB meaning, or the background is no colour. One
        sentence.
      OSError: the file cannot be opened at all.
    """
    name = _name_of(source)
    caught: list[warnings.WarningMessage] = []
    with contextlib.ExitStack() as stack:
        if catch_warnings:
            found = stack.enter_context(warnings.catch_warnings(record=True))
            assert found is not None  # it is recorded
            caught = found
            warnings.simplefilter("always")
            # Pillow reads a pipe into memory and leaves the closing of it to Python.
            warnings.simplefilter("ignore", ResourceWarning)
        image = _open(source, name)
        with image:
            _check_size(image.size, name, max_pixels)
            photograph = _convert(image, name, background, srgb)
    notes = [
        f"Pillow warns: {_one_line(warning.message)}"
        for warning in caught
        # Our own limit is the one that counts; see MAX_PIXELS.
        if not issubclass(warning.category, Image.DecompressionBombWarning)
    ]
    return replace(photograph, notes=(*photograph.notes, *dict.fromkeys(notes)))


def photograph_of(
    image: Image.Image,
    *,
    background: tuple[int, int, int] | str | None = None,
    srgb: bool = False,
) -> Photograph:
    """The same conversions for a Pillow image that is open already.

    Raises:
      ValueError: as `read_photograph`.
    """
    _check_size(image.size, "the image", max_pixels=MAX_PIXELS)
    return _convert(image, "the image", background, srgb)


def photograph_size(source: str | os.PathLike | BinaryIO) -> tuple[int, int]:
    """Height and width of what `read_photograph` gives, from the head of the file.

    For the main thread: it catches warnings, see `read_photograph`.

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
            except MemoryError:
                raise
            except Exception:
                orientation = None
    return (width, height) if orientation in _TURNED else (height, width)


def read_brightness(source: str | os.PathLike | BinaryIO) -> np.ndarray:
    """uint8 [H, W] of an image file that nobody has checked, whatever its colours.

    Upright, as photographs are, and the darker the more transparent it is. What the
    decoder warns of is left to Python: threads come here.

    Raises:
      ValueError, OSError: as `read_photograph`, but for transparency.
    """
    name = _name_of(source)
    with _open(source, name) as image:
        _check_size(image.size, name, MAX_PIXELS)
        samples = samples_of(image)
        _load(image, name, samples)
        image = _upright(image, [])
        if image.has_transparency_data:
            image = with_alpha(image, name, samples, [])
            alpha = image.getchannel("A")
            return np.array(ImageChops.multiply(image.convert("L"), alpha))
        image = at_most_8_bits(image, name, samples, [])
        if image.mode == "LAB":  # Pillow knows no way from there to grey
            image = image.convert("RGB")
        return np.array(image.convert("L"))


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
    missing = add_format_of(source)
    try:
        image = Image.open(source)
    except UnidentifiedImageError:
        found = missing or "not an image in a known format"
        raise ValueError(f"{name} is {found}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is refused for its size: {error}") from None
    except MemoryError:
        raise
    except Exception as error:  # each of Pillow's decoders has errors of its own
        if isinstance(error, OSError) and error.filename is not None:
            raise  # of opening the file
        raise ValueError(
            f"{name} is not a readable image: {_one_line(error)}"
        ) from None
    if image.format in _NO_PHOTOGRAPHS:  # Pillow would have Ghostscript run them
        kind = _NO_PHOTOGRAPHS[image.format]
        image.close()
        raise ValueError(f"{name} is {kind}: expected a photograph")
    return image


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"{name} has no pixels: it is {width}x{height}")
    if max(width, height) > MAX_SIDE:
        raise ValueError(
            f"{name} is too large: it is {width}x{height}, "
            f"sides can have at most {MAX_SIDE} pixels"
        )
    if width * height > max_pixels:
        raise ValueError(
            f"{name} is too large: it is {width}x{height}, "
            f"at most {max_pixels / 1e6:.0f} megapixels are read"
        )


def _convert(
    image: Image.Image,
    name: str,
    background: tuple[int, int, int] | str | None,
    srgb: bool,
) -> Photograph:
    colour = None if background is None else checked_colour(background)
    samples = samples_of(image)
    notes = [samples.note] if samples.note else []
    _load(image, name, samples)
    icc_profile = image.info.get("icc_profile") or None
    if isinstance(icc_profile, bytearray):
        icc_profile = bytes(icc_profile)
    if not isinstance(icc_profile, bytes | None):  # a TIFF's can be of any type
        notes.append(DAMAGED_PROFILE)
        icc_profile = None
    if icc_profile is None and (of_colours := note_of_colours(image)):
        notes.append(of_colours)
    first = _upright(image, notes)
    first = without_transparency(first, name, samples, colour, notes)
    first, icc_profile = to_rgb(first, name, samples, icc_profile, notes, srgb=srgb)
    pixels = np.array(first, dtype=np.uint8)
    # Last, since it reads on in the file.
    frames = _count_frames(image)
    if frames > 1:
        number = image.tell() + 1
        which = "the first" if number == 1 else f"number {number}"
        if image.format == "HEIF":
            which = "the main one"
        notes.insert(0, f"only {which} of {frames} frames is used")
    return Photograph(pixels, icc_profile, tuple(dict.fromkeys(notes)))


def _load(image: Image.Image, name: str, samples: Samples) -> None:
    if image.mode == "I" and samples.bits > 16:
        raise ValueError(f"{name} has 32-bit samples: expected 8 or 16 bits per sample")
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{name} is damaged: {_one_line(error)}") from None


def _count_frames(image: Image.Image) -> int:
    """Of an animation; 1 where those after the first are damaged."""
    try:
        return getattr(image, "n_frames", 1)
    except MemoryError:
        raise
    except Exception:
        return 1


def _upright(image: Image.Image, notes: list[str]) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:
        notes.append("damaged EXIF data were ignored")
        return image


def _one_line(error: BaseException | str) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def check_suffix(suffix: str, size: tuple[int, ...] = (1, 1)) -> None:
    """Refuses kinds of image files that `encode_image` does not write.

    Args:
      suffix: of the file.
      size: height and width of the image.

    Raises:
      ValueError: the suffix is of another kind, or a side too long for its kind.
    """
    if suffix.lower() not in _SAVE_OPTIONS:
        raise ValueError(
            f"cannot write {suffix or 'a file without a suffix'}: "
            f"expected one of {' '.join(_SAVE_OPTIONS)}"
        )
    longest = _LONGEST_SIDES.get(_SAVE_OPTIONS[suffix.lower()][0], MAX_SIDE)
    if max(size[:2]) > longest:
        raise ValueError(
            f"expected sides of at most {longest} pixels for {suffix}, found "
            f"{size[1]}x{size[0]}: other formats allow larger images"
        )


def keeps_profile(suffix: str) -> bool:
    """Whether the kind of file that a suffix names has a place for an ICC profile."""
    return _SAVE_OPTIONS[suffix.lower()][0] not in _WITHOUT_PROFILES


def encode_image(
    pixels: np.ndarray, suffix: str, *, icc_profile: bytes | None = None
) -> bytes:
    """uint8 [H, W, 3] -> the bytes of an image file of the kind that `suffix` names.

    Kinds without a place for a profile go without, see `keeps_profile`.

    Raises:
      ValueError: see `check_suffix`.
    """
    check_suffix(suffix, pixels.shape)
    kind, options = _SAVE_OPTIONS[suffix.lower()]
    if icc_profile and keeps_profile(suffix):
        options = {**options, "icc_profile": icc_profile}
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format=kind, **options)
    return stream.getvalue()


def check_folder(path: Path, role: str) -> None:
    """Refuses a file that is given where files are to be written into a folder.

    Args:
      path: of a folder, which need not exist.
      role: what it is for, as part of the sentence.

    Raises:
      ValueError: it is a file.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"expected a folder {role}, found the file {path}")


def check_outputs(paths: Sequence[str | os.PathLike], *, force: bool) -> None:
    """Refuses outputs that cannot or must not be written, before any work is done.

    Raises:
      ValueError: one must not be written.
      OSError: no file can have that name, or its folder is closed to us.
    """
    for given in paths:
        path = Path(given)
        if path.is_dir():
            raise ValueError(f"the output {path} is a folder: expected a file name")
        if not path.parent.is_dir():
            raise ValueError(f"the folder {path.parent} for {path.name} does not exist")
        if not _is_regular(path):
            continue
        if os.path.lexists(path) and not force:
            raise ValueError(f"{path} exists: give --force to replace it")
        if not os.access(os.path.dirname(os.path.realpath(path)), os.W_OK | os.X_OK):
            raise ValueError(f"the folder of {path} cannot be written to")


def _descriptor_of(path: Path) -> int | None:
    """The open file of this process that a path such as /dev/stdout names."""
    found = _DESCRIPTOR.fullmatch(os.path.abspath(path))
    if found is None:
        return None
    return int(found[2] or {"stdout": 1, "stderr": 2}[found[1]])


def _is_regular(path: Path) -> bool:
    # What it leads to may be a file, to which a shell has us append.
    if _descriptor_of(path) is not None:
        return False
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:  # nothing there, or a link that leads nowhere
        return True


def write_file(path: str | os.PathLike, data: bytes, *, force: bool = False) -> None:
    """Writes a whole file or nothing: a temporary file in the same folder, renamed.

    A file that is already there stays as it was unless `force` is given, also if it
    appeared while we worked; the one that replaces it is open to the same users. A
    pipe, a device or what /dev/stdout stands for is written to directly.

    Raises:
      ValueError: see `check_outputs`.
      OSError: it cannot be written; it has the name of the file.
    """
    check_outputs([path], force=force)
    try:
        _write_checked(Path(path), data, force)
    except OSError as error:
        error.filename = os.fspath(path)  # not that of the temporary file, or none
        raise


def _write_checked(path: Path, data: bytes, force: bool) -> None:
    if not _is_regular(path):
        descriptor = _descriptor_of(path)
        # To open /dev/stdout again would empty a file that it leads to.
        known = path if descriptor is None else os.dup(descriptor)
        with open(known, "wb") as stream:
            stream.write(data)
        return
    target = Path(os.path.realpath(path))
    # Short, whatever the name: that may be as long as the file system allows.
    part = target.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with open(part, "xb") as stream:
            # On Windows a mode is little more than the read-only flag.
            if force and target.exists() and os.name != "nt":
                os.chmod(part, stat.S_IMODE(target.stat().st_mode))
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
        _link_or_rename(part, target)
    except FileExistsError:
        raise ValueError(f"{target} exists: give --force to replace it") from None


def _link_or_rename(part: Path, target: Path) -> None:
    try:
        os.link(part, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        # On Windows this fails, too, where the name is taken; elsewhere nothing does.
        os.rename(part, target)
