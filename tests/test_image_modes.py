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


@pytest.mark.parametrize(
    ("gamma", "more", "noted"),
    [
        (45455, {}, False),  # that of sRGB
        (44000, {}, False),
        (100000, {}, True),  # linear
        (55556, {}, True),  # of old Macintoshes
        (100000, {"sRGB": b"\0"}, False),  # which goes before it
        (0, {}, False),
    ],
)
def test_a_gamma_that_is_not_that_of_srgb_is_noted(gamma, more, noted):
    chunks = {"gAMA": struct.pack(">I", gamma), **more}
    data = png(1, 1, 8, 2, b"\0\1\2\3", **chunks)
    notes = images.read_photograph(io.BytesIO(data)).notes
    said = f"its gamma of {gamma / 1e5:g} was taken for that of sRGB"
    assert notes == ((said,) if noted else ())


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


def grey_profile(gamma: float) -> bytes:
    """An ICC profile of a grey with this exponent."""

    def xyz(*values):
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in values))

    text = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"g\0" + bytes(8 + 3 + 67)
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    tags = {b"desc": text + bytes(-len(text) % 4), b"wtpt": xyz(0.9642, 1, 0.8249)}
    tags[b"kTRC"] = curve
    table, body = struct.pack(">I", len(tags)), b""
    for tag, data in tags.items():
        place = 128 + 4 + 12 * len(tags) + len(body)
        table += tag + struct.pack(">II", place, len(data))
        body += data
    head = struct.pack(
        ">I4x4s4s4s4s",
        132 + len(table) - 4 + len(body),
        b"\2\x40\0\0",
        b"mntr",
        b"GRAY",
        b"XYZ ",
    )
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + table + body


def test_a_grey_profile_is_applied():
    """Linear light: the middle value is a light grey of sRGB."""
    stream = io.BytesIO()
    grey = Image.fromarray(np.array([[0, 55, 128, 255]], np.uint8))
    grey.save(stream, "PNG", icc_profile=grey_profile(1.0))
    photograph = images.read_photograph(stream)
    np.testing.assert_allclose(photograph.pixels[0, :, 1], [0, 128, 188, 255], atol=1)
    assert photograph.icc_profile is None
    assert photograph.notes == ("a greyscale image was converted to RGB",)


def test_a_profile_that_is_nearly_srgb_is_kept(pixels):
    """The primaries of sRGB with an exponent of 2.2: up to some levels apart."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = with_exponent(srgb, 2.2)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", icc_profile=profile)
    assert images.read_photograph(stream).icc_profile == profile


def test_colours_are_converted_to_srgb_where_that_is_asked_for(other_profile):
    """The other profile has red and green exchanged."""
    colours = np.uint8([[[0, 200, 100], [90, 0, 255], [7, 7, 7]]])
    palette = Image.fromarray(colours).quantize(3)
    for image in (Image.fromarray(colours), palette):
        stream = io.BytesIO()
        image.save(stream, "PNG", icc_profile=other_profile)
        assert images.read_photograph(stream).icc_profile == other_profile
        photograph = images.read_photograph(stream, srgb=True)
        expected = colours[..., [1, 0, 2]]
        np.testing.assert_allclose(photograph.pixels, expected, atol=2)
        assert photograph.icc_profile is None
        note = "its colours were converted from its ICC profile to sRGB"
        assert photograph.notes[-1] == note
    plain = images.read_photograph(as_png(Image.fromarray(colours)), srgb=True)
    np.testing.assert_array_equal(plain.pixels, colours)
    assert plain.notes == ()
    foreign = other_profile.replace(b"TRC", b"???")
    with pytest.raises(ValueError, match="from which there is no way to sRGB"):
        images.read_photograph(
            as_png(Image.fromarray(colours), icc_profile=foreign), srgb=True
        )


def as_png(image: Image.Image, **options) -> io.BytesIO:
    stream = io.BytesIO()
    image.save(stream, "PNG", **options)
    return stream


def with_exponent(profile: bytes, gamma: float) -> bytes:
    """An RGB profile with another curve in the place of its own."""
    for entry in range(132, 132 + 12 * struct.unpack(">I", profile[128:132])[0], 12):
        tag, place, size = struct.unpack(">4sII", profile[entry : entry + 12])
        if tag in (b"rTRC", b"gTRC", b"bTRC"):
            curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
            assert size >= len(curve)
            profile = profile[:place] + curve + profile[place + len(curve) :]
    return profile


@pytest.mark.parametrize("order", ["<", ">"])
def test_wide_grey_in_both_orders_of_bytes(order):
    wide = np.array([[0, 129, 32768, 65535]], f"{order}u2")
    head = b"II*\0" if order == "<" else b"MM\0*"
    tags = [(256, 3, 4), (257, 3, 1), (258, 3, 16), (259, 3, 1), (262, 3, 1)]
    tags += [(273, 4, 8 + 2 + 12 * 9 + 4), (277, 3, 1), (278, 3, 1), (279, 4, 8)]
    body = b"".join(
        struct.pack(f"{order}HHI", tag, kind, 1)
        + (struct.pack(f"{order}Hxx" if kind == 3 else f"{order}I", value))
        for tag, kind, value in tags
    )
    data = head + struct.pack(f"{order}IH", 8, 9) + body + bytes(4) + wide.tobytes()
    photograph = images.read_photograph(io.BytesIO(data))
    np.testing.assert_array_equal(photograph.pixels[0, :, 1], [0, 1, 128, 255])
    assert "16-bit samples were rounded to 8 bits" in photograph.notes


@pytest.mark.parametrize("mode", ["RGB", "P"])
def test_a_grey_profile_of_colours_is_dropped(pixels, mode):
    """Kept, it would be written beside RGB pixels, where it is invalid."""
    image = Image.fromarray(pixels).convert(mode)
    image.info["icc_profile"] = grey_profile(1.0)
    photograph = images.photograph_of(image)
    assert photograph.icc_profile is None
    assert "an ICC profile of another colour space was dropped" in photograph.notes


def test_a_damaged_grey_profile_is_dropped(pixels):
    image = Image.fromarray(pixels[..., 0])
    image.info["icc_profile"] = grey_profile(1.0)[:140]
    photograph = images.photograph_of(image)
    np.testing.assert_array_equal(photograph.pixels[..., 0], pixels[..., 0])
    assert photograph.icc_profile is None
    assert "its ICC profile is damaged and was dropped" in photograph.notes


def test_samples_below_zero_are_refused():
    """Cast to 8 bits they would be nearly white."""
    with pytest.raises(ValueError, match="samples from -5 to -5: expected 16 bits"):
        images.photograph_of(Image.fromarray(np.full((2, 2), -5, np.int32)))


@pytest.mark.parametrize("space", [b"GRAY", b"CMYK"])
def test_an_rgb_image_is_not_said_to_be_converted(pixels, other_profile, space):
    image = Image.fromarray(pixels)
    image.info["icc_profile"] = other_profile[:16] + space + other_profile[20:]
    notes = images.photograph_of(image).notes
    assert notes == ("an ICC profile of another colour space was dropped",)


def test_an_opaque_palette_image_is_said_to_be_one():
    image = Image.fromarray(np.zeros((2, 2), np.uint8), "P")
    image.putpalette([10, 20, 30])
    stream = as_png(image, transparency=bytes([255]))
    assert images.read_photograph(stream).notes == (
        "a palette image was converted to RGB",
        "an alpha channel that was opaque everywhere was dropped",
    )
