# SPDX-License-Identifier: Apache-2.0
"""Pixels of any kind that Pillow reads, made 8-bit RGB.

In: samples of other numbers of bits, transparency, palettes, other colour spaces. What
changes values says so in a note; what has no 8-bit RGB meaning is refused.

May import NumPy and Pillow, and nothing of this package.
"""

from __future__ import annotations

import io
from typing import NamedTuple, TypeGuard

import numpy as np
from PIL import Image, ImageCms

_TIFF_BITS = 258  # the tag BitsPerSample
_TIFF_PHOTOMETRIC = 262
_WHITE_IS_ZERO = 0
_WIDE = ("I;16", "I;16L", "I;16B", "I;16N", "I")  # modes of 16-bit grey
DAMAGED_PROFILE = "its ICC profile is damaged and was dropped"
_MAX_PROFILE_BYTES = 2**24  # of a chunk of the file format
_ROUNDED = "16-bit samples were rounded to 8 bits"
_GRID_LEVELS = 18  # of each colour, to compare profiles
# The gamma that PNG files of sRGB colours have, and how far off it may be, as a share.
_SRGB_GAMMA, _MOST_OFF = 1 / 2.2, 0.05
# Code points of ITU-T H.273 that are those of sRGB, nearly so, or unspecified.
_NEAR_SRGB = {
    "color_primaries": (1, 2),
    "transfer_characteristics": (1, 2, 4, 6, 13, 14, 15),
}


class Samples(NamedTuple):
    """What the head of a file says of its samples, and a mode of Pillow does not.

    Attributes:
      bits: of each.
      inverted: 0 is white, which Pillow sees to in 8 bits only.
      note: what Pillow does to them when it reads them; empty for nothing.
    """

    bits: int = 8
    inverted: bool = False
    note: str = ""


def samples_of(image: Image.Image) -> Samples:
    """Of an image that was opened and not loaded yet."""
    tags = getattr(image, "tag_v2", {})
    wide = image.mode in _WIDE
    bits, note = 8, "16-bit samples were truncated to 8 bits"
    of_tiff = tags.get(_TIFF_BITS)
    if isinstance(of_tiff, tuple):  # whatever else a damaged file has there
        bits = max((each for each in of_tiff if isinstance(each, int)), default=8)
    else:
        for decoder, _, _, args in getattr(image, "tile", None) or ():
            for arg in args if isinstance(args, tuple | list) else (args,):
                if isinstance(arg, str) and ";16" in arg:
                    bits = 16
                elif arg in ("L;2", "L;4"):
                    bits = int(arg[-1])
                elif decoder.startswith("ppm") and isinstance(arg, int) and arg > 255:
                    bits, note = 16, _ROUNDED
    of_heic = image.info.get("bit_depth")
    if image.format == "HEIF" and isinstance(of_heic, int) and of_heic > 8:
        return Samples(8, False, f"{of_heic}-bit samples were reduced to 8 bits")
    inverted = wide and tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO
    return Samples(bits, inverted, note if bits == 16 and not wide else "")


def note_of_colours(image: Image.Image) -> str:
    """A note that the file states other colours than sRGB, which are ignored.

    HEIC files can state them by code points of H.273 instead of a profile, PNG files by
    a gamma. Empty where they are those of sRGB or nearly so.
    """
    gamma = image.info.get("gamma")
    if image.format == "PNG" and "srgb" not in image.info and _is_positive(gamma):
        near = abs(gamma / _SRGB_GAMMA - 1) < _MOST_OFF
        of_png = f"its gamma of {gamma:g} was taken for that of sRGB"
        return "" if near else of_png
    found = image.info.get("nclx_profile")
    if not isinstance(found, dict):
        return ""
    codes = {name: found.get(name, 2) for name in _NEAR_SRGB}
    if all(codes[name] in near for name, near in _NEAR_SRGB.items()):
        return ""
    primaries, transfer = codes.values()
    return (
        "it has no ICC profile, and its colours were taken for sRGB (their code points "
        f"in H.273: primaries {primaries}, transfer {transfer})"
    )


def _is_positive(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and value > 0


def without_transparency(
    image: Image.Image,
    name: str,
    samples: Samples,
    background: tuple[int, int, int] | None,
    notes: list[str],
) -> Image.Image:
    """Opaque: laid on the background, or as it was where nothing shows through.

    What is done is appended to `notes`.

    Raises:
      ValueError: it has transparent pixels, and there is no background; or as
        `with_alpha`.
    """
    if not image.has_transparency_data:
        return image
    grey = image.mode in ("L", "LA", "La", "1", "I;16", "I")
    rgba = with_alpha(image, name, samples, notes)
    if image.mode == "P":
        notes.append(_was_converted(image.mode))
    if rgba.getchannel("A").getextrema() == (255, 255):
        notes.append("an alpha channel that was opaque everywhere was dropped")
        return rgba.convert("L" if grey else "RGB")
    if background is None:
        raise ValueError(
            f"{name} has transparent pixels: give a background colour to lay them on "
            "(background='white', --background white)"
        )
    ground = Image.new("RGBA", rgba.size, (*background, 255))
    notes.append("transparent pixels were laid on the background colour")
    return Image.alpha_composite(ground, rgba).convert("RGB")


def with_alpha(
    image: Image.Image, name: str, samples: Samples, notes: list[str]
) -> Image.Image:
    """An image that has transparency as RGBA; what is rounded is appended to `notes`.

    Raises:
      ValueError: which pixels are transparent is lost with their lower bits, or samples
        are out of range.
    """
    key = image.info.get("transparency")
    if image.mode == "RGB" and samples.bits == 16:
        raise ValueError(
            f"{name} has a transparent colour of 16-bit samples: expected one of 8 "
            "bits, or an alpha channel"
        )
    if image.mode == "L" and samples.bits < 8 and isinstance(key, int):
        # Pillow scales the pixels, and leaves the key as it was stored.
        image = image.copy()
        image.info["transparency"] = key * 255 // (2**samples.bits - 1)
    if image.mode == "1" and isinstance(key, int):  # as Pillow does from 12.1 on
        image = image.copy()
        image.info["transparency"] = 255 if key else 0
    if image.mode != "I;16":
        return image.convert("RGBA")
    # The transparent grey value of a 16-bit PNG counts in 16 bits.
    wide = np.asarray(image)
    alpha = Image.fromarray(np.where(wide == key, 0, 255).astype(np.uint8))
    rgba = _narrow(image, name, samples, notes).convert("RGBA")
    rgba.putalpha(alpha)
    return rgba


def to_rgb(
    image: Image.Image,
    name: str,
    samples: Samples,
    icc_profile: bytes | None,
    notes: list[str],
    *,
    srgb: bool = False,
) -> tuple[Image.Image, bytes | None]:
    """An opaque image as RGB, and the RGB profile that it is in; None for sRGB.

    `srgb` asks for an image in sRGB, whatever the file has. What changes values or
    drops a profile is appended to `notes`.

    Raises:
      ValueError: its pixels have no 8-bit RGB meaning, or no way to sRGB.
    """
    image = at_most_8_bits(image, name, samples, notes)
    rgb, icc_profile = _as_rgb(image, name, icc_profile, notes)
    if icc_profile is None or not srgb:
        return rgb, icc_profile
    try:
        converted = _through_profile(rgb, icc_profile)
    except (ImageCms.PyCMSError, OSError):
        raise ValueError(
            f"{name} has an ICC profile from which there is no way to sRGB"
        ) from None
    notes.append("its colours were converted from its ICC profile to sRGB")
    return converted, None


def _as_rgb(
    image: Image.Image, name: str, icc_profile: bytes | None, notes: list[str]
) -> tuple[Image.Image, bytes | None]:
    space = icc_profile[16:20] if icc_profile else None
    # One of another space is only used to convert, and takes no bytes of a file.
    if icc_profile and space == b"RGB " and len(icc_profile) > _MAX_PROFILE_BYTES:
        notes.append(
            f"its ICC profile of {len(icc_profile):,} bytes is too large and was "
            "dropped"
        )
        icc_profile, space = None, None
    if icc_profile and space == b"RGB " and not _is_whole(icc_profile):
        notes.append(DAMAGED_PROFILE)
        icc_profile, space = None, None
    if icc_profile and space == b"RGB " and _is_srgb(icc_profile):
        icc_profile, space = None, None  # 3 kB that say what no profile says
    if image.mode == "RGB" and space in (None, b"RGB "):
        return image, icc_profile
    if image.mode != "RGB":
        notes.append(_was_converted(image.mode))
    if image.mode == "1":
        image = image.convert("L")
    if icc_profile and {b"GRAY": "L", b"CMYK": "CMYK"}.get(space or b"") == image.mode:
        try:
            return _through_profile(image, icc_profile), None
        except (ImageCms.PyCMSError, OSError):
            notes.append(DAMAGED_PROFILE)
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


def _was_converted(mode: str) -> str:
    kind = {
        "1": "a black-and-white image",
        "L": "a greyscale image",
        "P": "a palette image",
        "CMYK": "a CMYK image",
    }.get(mode, f"a {mode} image")
    return f"{kind} was converted to RGB"


def at_most_8_bits(
    image: Image.Image, name: str, samples: Samples, notes: list[str]
) -> Image.Image:
    """16-bit grey as 8-bit grey, others as they are.

    What is rounded is appended to `notes`.

    Raises:
      ValueError: samples are in floating point, or out of the range of their bits.
    """
    if image.mode == "F":
        raise ValueError(
            f"{name} has floating-point samples: expected 8 or 16 bits per sample"
        )
    if image.mode in _WIDE:
        return _narrow(image, name, samples, notes)
    return image


def _narrow(
    image: Image.Image, name: str, samples: Samples, notes: list[str]
) -> Image.Image:
    """Grey of 9 to 16 bits -> 8-bit, rounded."""
    bits = samples.bits if 8 < samples.bits < 16 else 16
    most = 2**bits - 1
    wide = np.asarray(image).astype(np.int32)
    if wide.size and (wide.min() < 0 or wide.max() > most):
        raise ValueError(
            f"{name} has samples from {wide.min()} to {wide.max()}: "
            f"expected {bits} bits per sample, 0 to {most}"
        )
    notes.append(_ROUNDED.replace("16", str(bits)))
    wide = most - wide if samples.inverted else wide
    return Image.fromarray(((wide * 255 + most // 2) // most).astype(np.uint8))


def _through_profile(image: Image.Image, icc_profile: bytes) -> Image.Image:
    converted = ImageCms.profileToProfile(
        image,
        ImageCms.ImageCmsProfile(io.BytesIO(icc_profile)),
        ImageCms.createProfile("sRGB"),
        outputMode="RGB",
    )
    assert converted is not None  # only an in-place conversion gives None
    return converted


def is_rgb_profile(icc_profile: bytes) -> bool:
    """Whether this is a whole ICC profile of RGB colours."""
    return icc_profile[16:20] == b"RGB " and _is_whole(icc_profile)


def _is_whole(icc_profile: bytes) -> bool:
    """Whether the head of a profile is there, and all that it announces.

    One that LittleCMS has no transform for may mean something elsewhere.
    """
    announced = int.from_bytes(icc_profile[:4], "big")
    return icc_profile[36:40] == b"acsp" and 128 <= announced <= len(icc_profile)


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
