# SPDX-License-Identifier: Apache-2.0
"""What the front door refuses: wrong inputs, damaged files, sizes without room."""

import dataclasses

import jax
import numpy as np
import pytest

import semlic_jax
from semlic_jax import BitstreamError, IncompatibleModelError, memory
from semlic_jax.codec import _require_room
from semlic_jax.coding.bitstream import pack, unpack
from semlic_jax.weights import export_model, save_model

# Wrong inputs


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((4, 4), np.uint8), r"found uint8 of shape \[4, 4\]"),
        (np.zeros((4, 4, 4), np.uint8), r"\[4, 4, 4\]"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"\[1, 4, 4, 3\]"),
        (np.zeros((4, 4, 3), np.float32), "found float32"),
        (np.zeros((4, 4, 3), np.int8), "found int8"),
        (np.zeros((0, 4, 3), np.uint8), "found 4 x 0"),
        (np.zeros((4, 0, 3), np.uint8), "found 0 x 4"),
        (np.broadcast_to(np.uint8(0), (1, 65536, 3)), "found 65536 x 1"),
        (np.broadcast_to(np.uint8(0), (65535, 65535, 3)), "at most .* pixels"),
        ("photo.png", "image of uint8"),
        (None, "image of uint8"),
    ],
    ids=str,
)
def test_wrong_images(codec, image, message):
    with pytest.raises(ValueError, match=message):
        codec.compress(image, quality=0.5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "found none"),
        ({"quality": 0.5, "bpp": 1.0}, "found quality, bpp"),
        ({"quality": 0.5, "bpp": 1, "max_bytes": 1}, "found quality, bpp, max_bytes"),
        ({"quality": -0.1}, "quality from 0 to 1, found -0.1"),
        ({"quality": 1.01}, "found 1.01"),
        ({"quality": float("nan")}, "found nan"),
        ({"quality": "0.5"}, "found '0.5'"),
        ({"quality": [0.5, 0.6]}, "found .0.5, 0.6"),
        ({"bpp": 0}, "positive bpp, found 0"),
        ({"bpp": -1.0}, "found -1.0"),
        ({"bpp": float("inf")}, "found inf"),
        ({"bpp": float("nan")}, "found nan"),
        ({"bpp": 10**400}, "positive bpp"),
        ({"bpp": "1"}, "found '1'"),
        ({"max_bytes": 0}, "positive whole number as max_bytes, found 0"),
        ({"max_bytes": -5}, "found -5"),
        ({"max_bytes": 99.5}, "found 99.5"),
        ({"max_bytes": float("nan")}, "found nan"),
        ({"max_bytes": "99"}, "found '99'"),
        ({"quality": 0.5, "icc_profile": "sRGB"}, "bytes as icc_profile, found str"),
        ({"quality": 0.5, "icc_profile": bytes(2**24 + 1)}, "chunk ICCP"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_budgets(codec, arguments, message):
    with pytest.raises(ValueError, match=message):
        codec.compress(np.zeros((16, 16, 3), np.uint8), **arguments)


def test_parts_of_the_codec_refuse_what_they_cannot_take(codec, photograph):
    with pytest.raises(ValueError, match="expected sides of 1 to .*, found 5 x 0"):
        codec.analyse(np.zeros((0, 5, 3), np.uint8))
    latents = codec.analyse(photograph(64, 64))
    with pytest.raises(TypeError, match="float"):
        codec.encode(latents, 1.5)
    with pytest.raises(ValueError, match="a level from 0 to 255, found 256"):
        codec.encode(latents, 256)


# Damaged and foreign files


@pytest.fixture(scope="module")
def small_file(codec, photograph):
    return codec.compress(photograph(33, 20), quality=0)


def refuse_all(codec, files):
    for data in files:
        for read in (codec.decompress, codec.info, codec.icc_profile):
            with pytest.raises(BitstreamError):
                read(data)


def test_every_flipped_byte_is_refused(codec, small_file):
    assert len(small_file) < 200
    rng = np.random.default_rng(0)
    masks = rng.integers(1, 256, len(small_file))
    files = []
    for position, mask in enumerate(masks):
        damaged = bytearray(small_file)
        damaged[position] ^= int(mask)
        files.append(bytes(damaged))
    refuse_all(codec, files)


def test_truncated_and_extended_files_are_refused(codec, small_file):
    refuse_all(codec, [small_file[:size] for size in range(len(small_file))])
    refuse_all(codec, [small_file + b"\0", small_file + small_file, b"\0" + small_file])


def test_what_is_not_even_bytes(codec):
    refuse_all(codec, [10**12, "file.semlic", None, np.zeros(3, np.uint8)])


def resealed(data, **header):
    """The file with another header and a checksum that fits."""
    found, payload = unpack(data)
    payload = header.pop("payload", payload)
    return pack(dataclasses.replace(found, **header), payload)


def test_forged_files_are_refused(codec, small_file):
    """The checksum fits, since an attacker can compute it; the stream does not."""
    payload = unpack(small_file)[1]
    changes = [
        {"width": 21 + 32},
        {"height": 70},
        {"width": 33, "height": 20},
        {"quality": 200},
        {"index_check": b"\0\0\0\0"},
        {"payload": b""},
        {"payload": payload[:-1]},
        {"payload": payload + b"\0"},
        {"payload": payload + b"\1"},
        {"payload": payload[4:]},
        {"payload": bytes(range(1, 256)) * 40},
        {"width": 16000, "height": 16000},
    ]
    for header in changes:
        with pytest.raises(BitstreamError):
            codec.decompress(resealed(small_file, **header))
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(payload)
        damaged[rng.integers(len(payload))] ^= 1 << rng.integers(8)
        with pytest.raises(BitstreamError):
            codec.decompress(resealed(small_file, payload=bytes(damaged)))


def test_files_of_another_model_name_both(
    codec, tiny_config, tiny_params, small_file, tmp_path
):
    params = dict(tiny_params)
    entropy = dict(params["entropy"])
    entropy["h_s_0"] = {name: 2 * array for name, array in entropy["h_s_0"].items()}
    path = tmp_path / "other.npz"
    save_model(path, export_model(tiny_config, params | {"entropy": entropy}))
    other = semlic_jax.load(path)
    assert other.fingerprint != codec.fingerprint
    with pytest.raises(IncompatibleModelError) as caught:
        other.decompress(small_file)
    for model in (codec, other):
        assert model.fingerprint[:4].hex() in str(caught.value)
    assert not issubclass(IncompatibleModelError, BitstreamError)
    assert other.info(small_file)["model"] is None
    # The decoder may be another one: that does not change what a file means.
    params["g_s"] = jax.tree.map(lambda array: 0.9 * array, params["g_s"])
    save_model(path, export_model(tiny_config, params))
    assert semlic_jax.load(path).decompress(small_file).shape == (33, 20, 3)


# Large images


def test_pixels_beyond_the_readers_limit_are_refused(codec, small_file):
    assert codec.decompress(small_file, max_pixels=33 * 20).shape == (33, 20, 3)
    with pytest.raises(BitstreamError, match="at most 659 pixels, found 20 x 33"):
        codec.decompress(small_file, max_pixels=33 * 20 - 1)


def test_the_readers_limit_may_be_above_the_usual_one(codec, small_file, monkeypatch):
    """400 megapixels are more than that; this payload is too short for them."""
    header, payload = unpack(small_file)
    large = dataclasses.replace(header, width=20_000, height=20_000)
    data = pack(large, payload, max_pixels=2**29)
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    with pytest.raises(BitstreamError, match="the end of the payload"):
        codec.decompress(data, max_pixels=2**29)


def test_what_has_no_room_is_refused_before_it_starts(codec, small_file, monkeypatch):
    """A file of a few bytes that claims 200 megapixels, and an image of 20."""
    claims = resealed(small_file, width=20_000, height=10_000)
    image = np.zeros((4000, 5000, 3), np.uint8)
    monkeypatch.setattr(memory, "available_bytes", lambda: 2**28)
    monkeypatch.setattr(codec, "entropy", None)  # nothing is decoded
    with pytest.raises(MemoryError, match="decoding 200000000 pixels .* found 0.2 GiB"):
        codec.decompress(claims)
    with pytest.raises(MemoryError, match="encoding 20000000 pixels"):
        codec.compress(image, quality=0.5)


@pytest.mark.parametrize(("work", "least"), [("encoding", 22), ("decoding", 30)])
def test_room_is_that_of_the_direction(monkeypatch, work, least):
    pixels = 2**25
    monkeypatch.setattr(memory, "available_bytes", lambda: least * pixels)
    _require_room(work, pixels)
    monkeypatch.setattr(memory, "available_bytes", lambda: least * pixels - 1)
    with pytest.raises(MemoryError, match=f"{work} {pixels} pixels"):
        _require_room(work, pixels)


def test_usual_sizes_are_not_asked_for_room(codec, small_file, monkeypatch):
    def not_asked():
        raise AssertionError("that is no large image")

    monkeypatch.setattr(memory, "available_bytes", not_asked)
    assert codec.decompress(small_file).shape == (33, 20, 3)
