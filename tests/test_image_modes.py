# SPDX-License-Identifier: Apache-2.0
"""Samples, transparency and profiles of files of kinds that are rare."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms
from png_files import png

from semlic_jax import images


@pytest.fixture
def pixels():
    return np.random.default_rng(7).integers(0, 256, (5, 7, 3), np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_greyscale_is_rounded(kind):
    wide = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    stream = io.BytesIO()
    Image.fromarray(wide).save(stream, kind)
    photograph = images.read_photograph(stream)
    expected = np.round(wide / 257).astype(np.uint8)
    np.testing.assert_array_equal(photograph.pixels[..., 1], expected)
    assert "16-bit samples were rounded to 8 bits" in photograph.notes


def test_16_bit_colour_is_noted():
    data = png(1, 1, 16, 2, b"\0" + struct.pack(">HHH", 65535, 0, 256))
    photograph = images.read_photograph(io.BytesIO(data))
    np.testing.assert_array_equal(photograph.pixels, [[[255, 0, 1]]])
    assert photograph.notes == ("16-bit samples were truncated to 8 bits",)
    data = b"P6 1 1 65535\n" + struct.pack(">HHH", 65535, 0, 255)
    photograph = images.read_photograph(io.BytesIO(data))
    np.testing.assert_array_equal(photograph.pixels, [[[255, 0, 1]]])
    assert photograph.notes == ("16-bit samples were rounded to 8 bits",)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_transparent_greys_of_few_bits(bits):
    """Two pixels, the lightest and the darkest; the lightest is transparent."""
    most = 2**bits - 1
    row = (most << (16 - bits)).to_bytes(2, "big") if bits < 8 else bytes([most, 0])
    key = struct.pack(">H", most)
    data = png(2, 1, bits, 0, b"\0" + row[: 2 if bits == 8 else 1], key=key)
    with pytest.raises(ValueError, match="transparent pixels"):
        images.read_photograph(io.BytesIO(data))
    laid = images.read_photograph(io.BytesIO(data), background=(9, 8, 7)).pixels
    np.testing.assert_array_equal(laid, [[[9, 8, 7], [0, 0, 0]]])


def test_a_transparent_colour_of_16_bits_is_refused():
    """Pillow keeps eight bits of the pixels: which of them were it is lost."""
    key = struct.pack(">HHH", 0x1234, 0x2345, 0x3456)
    data = png(1, 1, 16, 2, b"\0" + key, key=key)
    for background in (None, (0, 0, 0)):
        with pytest.raises(ValueError, match="transparent colour of 16-bit samples"):
            images.read_photograph(io.BytesIO(data), background=background)


def tiff(bits: int, photometric: int, row: bytes, extra=()) -> bytes:
    """A grey TIFF file of two pixels."""
    short, long = 3, 4
    tags = [
        (256, short, 2),
        (257, short, 1),
        (258, short, bits),
        (259, short, 1),
        (262, short, photometric),
        (273, long, 8 + 2 + 12 * (9 + len(extra)) + 4),
        (277, short, 1),
        (278, short, 1),
        (279, long, len(row)),
        *extra,
    ]
    body = b"".join(struct.pack("<HHII", tag, kind, 1, v) for tag, kind, v in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    return head + body + struct.pack("<I", 0) + row


@pytest.mark.parametrize(
    "bits, photometric, row",
    [
        (12, 1, b"\xff\xf0\x00"),
        (16, 1, b"\xff\xff\0\0"),
        (16, 0, b"\0\0\xff\xff"),
        (8, 0, b"\0\xff"),
    ],
)
def test_white_and_black_of_tiff_files(bits, photometric, row):
    photograph = images.read_photograph(io.BytesIO(tiff(bits, photometric, row)))
    np.testing.assert_array_equal(photograph.pixels[..., 0], [[255, 0]])
    assert bits == 8 or f"{bits}-bit samples were rounded to 8" in photograph.notes[0]


def test_profiles_that_are_no_bytes(pixels):
    number = tiff(8, 1, b"\xff\0", extra=[(34675, 4, 7)])
    photograph = images.read_photograph(io.BytesIO(number))
    assert photograph.icc_profile is None
    assert "its ICC profile is damaged and was dropped" in photograph.notes
    image = Image.fromarray(pixels)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.info["icc_profile"] = bytearray(srgb)
    assert images.photograph_of(image).notes == ()
