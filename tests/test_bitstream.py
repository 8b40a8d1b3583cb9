# SPDX-License-Identifier: Apache-2.0
"""The container: round trips, golden bytes, and every way to damage a file."""

import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semlic_jax.coding.bitstream import (
    BITSTREAM_VERSION,
    CODERS,
    MAGIC,
    MAX_CHUNK_BYTES,
    BitstreamError,
    Header,
    IncompatibleModelError,
    pack,
    unpack,
)

FINGERPRINT = bytes.fromhex("0123456789abcdef")
PLAIN = Header(768, 512, 42, FINGERPRINT)
CHUNKS = {b"ICCP": bytes(range(200)), b"EXIF": b""}


def seal(body: bytes) -> bytes:
    """`body` with a valid checksum: what an attacker can always make."""
    return body + zlib.crc32(body).to_bytes(4, "little")


def body_of(*, width: bytes = b"\x05", height: bytes = b"\x07", rest: bytes) -> bytes:
    return MAGIC + b"\x01" + FINGERPRINT[:4] + width + height + rest


def test_round_trip():
    header = Header(1, 65535, 255, FINGERPRINT, CHUNKS)
    assert unpack(pack(header, b"\x00payload")) == (header, b"\x00payload")
    assert unpack(pack(PLAIN, b"")) == (PLAIN, b"")
    assert list(unpack(pack(header, b""))[0].chunks) == [b"EXIF", b"ICCP"]


@settings(deadline=None, max_examples=200)
@given(
    width=st.integers(1, 65535),
    height=st.integers(1, 65535),
    quality=st.integers(0, 255),
    fingerprint=st.binary(min_size=4, max_size=32),
    chunks=st.dictionaries(
        st.from_regex(rb"[A-Za-z0-9]{4}", fullmatch=True),
        st.binary(max_size=300),
        max_size=16,
    ),
    index_check=st.just(b"") | st.binary(min_size=4, max_size=4),
    coder=st.sampled_from(CODERS),
    payload=st.binary(max_size=64),
)
def test_round_trip_of_anything(
    width, height, quality, fingerprint, chunks, index_check, coder, payload
):
    header = Header(width, height, quality, fingerprint, chunks, index_check, coder)
    data = pack(header, payload, max_pixels=2**32)
    assert unpack(data, max_pixels=2**32) == (header, payload)


def test_golden_bytes():
    """Version 1 never changes. Written by hand from the format document."""
    plain = bytes.fromhex("89534c43 01 01234567 8006 8004 2a 00")
    assert pack(PLAIN, b"payload") == seal(plain + b"payload")
    assert pack(PLAIN, b"payload")[-4:].hex() == "1b62893a"
    chunks = bytes.fromhex("02 45584946 00 49434350 c801") + bytes(range(200))
    full = bytes.fromhex("89534c43 01 01234567 8006 8004 2a 01") + chunks
    header = Header(768, 512, 42, FINGERPRINT, CHUNKS)
    assert pack(header, b"payload") == seal(full + b"payload")
    both = bytes.fromhex("89534c43 01 01234567 8006 8004 2a 03 c0ffee00") + chunks
    header = Header(768, 512, 42, FINGERPRINT, CHUNKS, b"\xc0\xff\xee\x00")
    assert pack(header, b"payload") == seal(both + b"payload")
    other = bytes.fromhex("89534c43 01 01234567 8006 8004 2a 04")
    header = Header(768, 512, 42, FINGERPRINT, coder="tfc")
    assert pack(header, b"payload") == seal(other + b"payload")


def test_overhead_of_a_plain_image():
    assert len(pack(PLAIN, b"x" * 9000)) - 9000 == 19
    assert len(pack(Header(511, 65535, 0, FINGERPRINT), b"")) == 20


SMALL_FILES = [
    pack(PLAIN, b"some payload \x00\xff"),
    pack(Header(1, 1, 0, FINGERPRINT), b""),
    pack(Header(65535, 3, 255, FINGERPRINT, CHUNKS), b"some payload"),
    pack(Header(9, 9, 0, FINGERPRINT, {}, b"\0\1\2\3"), b"some payload"),
]


@pytest.mark.parametrize("data", SMALL_FILES)
def test_every_flipped_bit_is_refused(data):
    for position in range(len(data)):
        for mask in (1, 2, 4, 8, 16, 32, 64, 128, 255):
            damaged = bytearray(data)
            damaged[position] ^= mask
            with pytest.raises(BitstreamError):
                unpack(bytes(damaged))


@pytest.mark.parametrize("data", SMALL_FILES)
def test_every_truncation_and_extension_is_refused(data):
    for size in range(len(data)):
        with pytest.raises(BitstreamError):
            unpack(data[:size])
        with pytest.raises(BitstreamError):
            unpack(data[len(data) - size :])
    for extra in (b"\x00", b"\n", b"\x00" * 4, data):
        with pytest.raises(BitstreamError):
            unpack(data + extra)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=80), st.booleans())
def test_arbitrary_bytes_with_a_valid_checksum(tail, with_start):
    """Whatever passes the checksum is refused, or is what its header packs to."""
    start = MAGIC + bytes([BITSTREAM_VERSION]) if with_start else b""
    data = seal(start + tail)
    try:
        header, payload = unpack(data, max_pixels=2**32)
    except BitstreamError:
        return
    assert pack(header, payload, max_pixels=2**32) == data


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (body_of(width=b"\x00", rest=b"\x00\x00"), "width from 1 to 65535, found 0"),
        (body_of(height=b"\x80\x80\x04", rest=b"\x00\x00"), "height .* found 65536"),
        (body_of(width=b"\x85\x00", rest=b"\x00\x00"), "as few bytes as possible"),
        (body_of(width=b"\xff" * 5, rest=b"\x00\x00"), "at most 4 bytes"),
        (body_of(rest=b"\x00\x08"), "flags from 0 to 7, found 8"),
        (body_of(rest=b"\x00\x02abc"), "4 more bytes .* cut off"),
        (body_of(rest=b"\x00"), "cut off"),
        (body_of(rest=b"\x00\x01\x00"), "1 to 16 chunks, found 0"),
        (body_of(rest=b"\x00\x01\x11"), "1 to 16 chunks, found 17"),
        (body_of(rest=b"\x00\x01\x01ICCP\xff\xff\xff\x7f"), "268435455 more bytes"),
        (body_of(rest=b"\x00\x01\x01IC\x00P\x00"), "tag of 4 ASCII letters"),
        (body_of(rest=b"\x00\x01\x02ICCP\x00ICCP\x00"), "ascending order"),
        (body_of(rest=b"\x00\x01\x02ICCP\x00EXIF\x00"), "ascending order"),
        (MAGIC + b"\x02" + bytes(20), "format version 1, found 2"),
        (b"\x89PNG" + bytes(20), "found 89504e47"),
    ],
)
def test_hostile_files_with_a_valid_checksum(body, message):
    with pytest.raises(BitstreamError, match=message):
        unpack(seal(body))


def test_a_huge_image_is_refused_unless_allowed():
    header = Header(65535, 65535, 0, FINGERPRINT)
    with pytest.raises(ValueError, match="268435456 pixels, found 65535 x 65535"):
        pack(header, b"")
    data = pack(header, b"", max_pixels=2**32)
    with pytest.raises(BitstreamError, match="268435456 pixels, found 65535 x 65535"):
        unpack(data)
    assert unpack(data, max_pixels=65535**2) == (header, b"")
    with pytest.raises(BitstreamError, match="11 pixels, found 3 x 4"):
        unpack(pack(Header(3, 4, 0, FINGERPRINT), b""), max_pixels=11)


@pytest.mark.parametrize(
    "fields",
    [
        {"width": 0},
        {"width": 65536},
        {"height": -1},
        {"quality": 256},
        {"quality": -1},
        {"fingerprint": b"abc"},
        {"index_check": b"abc"},
        {"coder": "rans"},
        {"chunks": {b"ICC": b""}},
        {"chunks": {b"IC P": b""}},
        {"chunks": {"ICCP": b""}},
        {"chunks": {b"ICCP": bytes(2**24 + 1)}},
        {"chunks": {b"%04d" % i: b"" for i in range(17)}},
    ],
)
def test_a_header_refuses_what_the_format_cannot_hold(fields):
    values = {"width": 8, "height": 8, "quality": 0, "fingerprint": FINGERPRINT}
    with pytest.raises(ValueError, match="^expected .*, found "):
        Header(**(values | fields))


def test_equal_headers_have_the_same_hash():
    headers = [Header(8, 8, 0, FINGERPRINT, dict(CHUNKS)) for _ in range(2)]
    assert headers[0] == headers[1] and hash(headers[0]) == hash(headers[1])
    assert len({*headers, Header(8, 8, 1, FINGERPRINT, CHUNKS)}) == 2
    assert headers[0] != Header(8, 8, 0, FINGERPRINT)


def test_the_model_is_checked_by_fingerprint():
    header, _ = unpack(pack(PLAIN, b""))
    header.require_model(FINGERPRINT)
    with pytest.raises(IncompatibleModelError, match="01234567 .* ff234567"):
        header.require_model(b"\xff" + FINGERPRINT[1:])


def test_every_byte_of_the_fingerprint_counts():
    for position in range(4):
        other = bytearray(FINGERPRINT)
        other[position] ^= 1
        with pytest.raises(IncompatibleModelError, match="found the model"):
            PLAIN.require_model(bytes(other))


def test_a_chunk_may_be_as_large_as_the_format_says():
    header = Header(8, 8, 0, FINGERPRINT, {b"ICCP": bytes(MAX_CHUNK_BYTES)})
    assert unpack(pack(header, b"payload")) == (header, b"payload")


def test_the_profile_of_a_header():
    assert Header(8, 8, 0, FINGERPRINT, CHUNKS).icc_profile == CHUNKS[b"ICCP"]
    assert Header(8, 8, 0, FINGERPRINT).icc_profile is None


def test_one_byte_is_not_several():
    with pytest.raises(BitstreamError, match="expected 1 more byte at position 4"):
        unpack(MAGIC)
