# SPDX-License-Identifier: Apache-2.0
"""The front door: round trips, budgets, damaged files, wrong inputs, compilation."""

import copy
import dataclasses
import json
import logging
import os
import pickle

import jax
import numpy as np
import pytest
from PIL import Image

import semlic_jax
from semlic_jax import BitstreamError, IncompatibleModelError, memory
from semlic_jax.codec import (
    MAX_LEVEL,
    _checked_budget,
    _require_room,
    bucket_side,
)
from semlic_jax.coding import integer_networks
from semlic_jax.coding.bitstream import pack, unpack
from semlic_jax.compilation import use_disk_cache
from semlic_jax.evaluation import exactness
from semlic_jax.model.mean_scale import network_of
from semlic_jax.weights import export_model, load_model, save_model

# Few buckets for all tests, since compiling their programs takes most of the time:
# 64 x 64, 128 x 64 and 128 x 192, and one that only the test of compilation uses.
ODD_SIZES = [(1, 1), (1, 40), (63, 1), (16, 17), (64, 64), (65, 64), (100, 50)]


def psnr_db(a, b):
    return -10 * np.log10(np.mean((a / 255.0 - b / 255.0) ** 2))


@pytest.mark.parametrize("size", ODD_SIZES, ids=str)
def test_round_trip(codec, photograph, size):
    image = photograph(*size)
    data = codec.compress(image, quality=0.7)
    assert isinstance(data, bytes)
    decoded = codec.decompress(data)
    assert decoded.dtype == np.uint8 and decoded.shape == image.shape
    assert decoded.flags.writeable and decoded.flags.c_contiguous
    assert decoded.base is None  # not a view of the padded picture
    assert codec.compress(image, quality=0.7) == data
    # The latents that came out are those that went in.
    level = round(0.7 * MAX_LEVEL)
    latents = codec.analyse(image)
    scaled = codec.scaled(latents, level)
    symbols = codec.entropy.symbols(*scaled, level, size)
    header, y_hat = codec.decode_latents(data)
    rows, columns = -(-size[0] // 16), -(-size[1] // 16)
    assert y_hat.shape == (rows, columns, codec.config.latent_channels)
    wanted = (16 * symbols.y + symbols.mean_steps)[:rows, :columns] / 16
    np.testing.assert_array_equal(y_hat, wanted)
    assert header.quality == level
    assert codec.encode_symbols(symbols, level, size) == data


def test_quality_is_worth_its_bytes(codec, photograph):
    image = photograph(128, 192, seed=99)
    files = [codec.compress(image, quality=q) for q in (0, 0.5, 1)]
    sizes = [len(data) for data in files]
    assert sizes == sorted(sizes) and sizes[2] > 2 * sizes[0]
    fidelity = [psnr_db(codec.decompress(data), image) for data in files]
    assert fidelity == sorted(fidelity) and fidelity[0] > 15


def aligned(array):
    """A writable copy that a CPU device takes over without another copy."""
    buffer = np.zeros(array.nbytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    copy = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def test_a_codec_has_its_weights_to_itself(codec, tiny_file, photograph):
    integers = jax.tree.map(aligned, tiny_file.integers)
    own = semlic_jax.Codec(dataclasses.replace(tiny_file, integers=integers))
    image = photograph(64, 64)
    data = codec.compress(image, quality=0.7)
    assert own.compress(image, quality=0.7) == data
    twin = own.twin_params()["entropy"]
    for array in jax.tree.leaves(integers):
        array[...] = 0
    assert own.compress(image, quality=0.7) == data
    np.testing.assert_array_equal(own.decompress(data), codec.decompress(data))
    for before, after in zip(
        jax.tree.leaves(twin),
        jax.tree.leaves(own.twin_params()["entropy"]),
        strict=True,
    ):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    "name, value, usual",
    [
        ("jax_numpy_rank_promotion", "raise", "allow"),
        ("jax_numpy_dtype_promotion", "strict", "standard"),
        ("jax_transfer_guard", "disallow", None),
    ],
)
def test_a_strict_jax_is_none_of_the_codecs_concern(
    codec, tiny_model, photograph, name, value, usual
):
    image = photograph(64, 64)
    data = codec.compress(image, quality=0.7)
    wanted = codec.decompress(data)
    jax.clear_caches()  # what is compiled already would not be checked
    jax.config.update(name, value)
    try:
        strict = semlic_jax.load(tiny_model)
        assert strict.compress(image, bpp=8 * len(data) / 64**2)
        assert strict.compress(image, quality=0.7) == data
        found = strict.decompress(data)
    finally:
        jax.config.update(name, usual)
    np.testing.assert_array_equal(found, wanted)


def test_programs_of_each_bucket_are_accounted_for(codec, photograph, monkeypatch):
    entered = []
    monkeypatch.setattr(semlic_jax.codec, "enter_bucket", entered.append)
    data = codec.compress(photograph(65, 64), quality=0.7)
    codec.decompress(data)
    assert entered == [(codec.fingerprint, (128, 64))] * 2


def test_a_used_codec_can_be_copied_and_sent(codec, photograph):
    image = photograph(64, 64)
    data = codec.compress(image, quality=0.7)
    decoded = codec.decompress(data)
    for own in (copy.deepcopy(codec), pickle.loads(pickle.dumps(codec))):
        assert own.compress(image, quality=0.7) == data
        np.testing.assert_array_equal(own.decompress(data), decoded)


def test_parts_of_the_codec_refuse_what_they_cannot_take(codec, photograph):
    with pytest.raises(ValueError, match="expected sides of 1 to .*, found 5 x 0"):
        codec.analyse(np.zeros((0, 5, 3), np.uint8))
    latents = codec.analyse(photograph(64, 64))
    with pytest.raises(TypeError, match="float"):
        codec.encode(latents, 1.5)
    with pytest.raises(ValueError, match="a level from 0 to 255, found 256"):
        codec.encode(latents, 256)


def test_flat_and_extreme_images(codec):
    for value in (0, 255):
        image = np.full((40, 60, 3), value, np.uint8)
        assert codec.decompress(codec.compress(image, quality=1)).shape == image.shape
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert codec.decompress(codec.compress(stripes, quality=1)).shape == (64, 64, 3)


def test_any_memory_layout(codec, photograph):
    image = photograph(48, 64)
    expected = codec.compress(image, quality=0.3)
    for other in (
        np.asfortranarray(image),
        np.ascontiguousarray(image[::-1])[::-1],
        image.tolist() and np.array(image.tolist(), np.uint8),
        Image.fromarray(image),
    ):
        assert codec.compress(other, quality=0.3) == expected
    image.setflags(write=False)
    before = image.copy()
    codec.compress(image, quality=0.3)
    np.testing.assert_array_equal(image, before)


def test_sizes_are_close_to_the_ideal(codec, photograph):
    image = photograph(128, 192)
    latents = codec.analyse(image)
    for level in (0, 128, 255):
        symbols = codec.entropy.symbols(
            *codec.scaled(latents, level), level, latents.size
        )
        ideal_bytes = codec.entropy.ideal_bits(symbols, latents.size) / 8
        found = len(codec.encode(latents, level))
        assert ideal_bytes + 15 < found < 1.003 * ideal_bytes + 25


# Budgets


def test_budgets_are_kept_and_used(codec, photograph):
    image = photograph(128, 192)
    pixels = 128 * 192
    low, high = (len(codec.compress(image, quality=q)) for q in (0, 1))
    for budget in (*np.linspace(low, high, 7).astype(int), low + 1, high - 1):
        data = codec.compress(image, max_bytes=int(budget))
        assert 0.97 * budget <= len(data) <= budget
        # The same budget as a rate, although the division may round down.
        assert codec.compress(image, bpp=int(budget) * 8 / pixels) == data
        assert codec.compress(image, max_bytes=np.int64(budget)) == data
    for bpp in (low * 8 / pixels, high * 8 / pixels, 0.4321, np.float32(0.5)):
        used = len(codec.compress(image, bpp=bpp)) * 8 / pixels
        assert 0.97 * bpp <= used <= bpp


def test_a_rate_of_whole_bytes_is_that_many_bytes():
    """However its division and multiplication round."""
    for height, width in ((100, 50), (512, 768), (7, 13)):
        image = np.zeros((height, width, 3), np.uint8)
        for size in range(20, 9000, 7):
            bpp = size * 8 / (height * width)
            budget = _checked_budget(image, None, bpp, None)
            assert budget == size
            assert budget * 8 / (height * width) <= bpp


def test_the_search_is_short(codec, photograph, monkeypatch):
    image = photograph(128, 192)
    low, high = (len(codec.compress(image, quality=q)) for q in (0, 1))
    calls = []
    encode = codec.encode

    def counted(*arguments):
        calls.append(arguments[1])
        return encode(*arguments)

    monkeypatch.setattr(codec, "encode", counted)
    for budget in np.linspace(low, high, 9).astype(int):
        calls.clear()
        codec.compress(image, max_bytes=int(budget))
        assert len(calls) == len(set(calls)) <= 10

    def steep(latents, level, profile):
        """Nearly all sizes are the same: interpolation alone takes 200 steps."""
        calls.append(level)
        return bytes(100 + level // 4 if level < 252 else 10**6)

    monkeypatch.setattr(codec, "encode", steep)
    calls.clear()
    assert len(codec.compress(image, max_bytes=161)) == 161
    assert len(calls) < 30


def test_of_files_of_one_size_the_best_is_taken(codec, photograph, monkeypatch):
    monkeypatch.setattr(
        codec, "encode", lambda latents, level, profile: bytes([level]) * 50
    )
    assert codec.compress(photograph(16, 16), max_bytes=50)[0] == MAX_LEVEL
    monkeypatch.setattr(
        codec,
        "encode",
        lambda latents, level, profile: bytes([level]) * (50 + 9 * (level > 77)),
    )
    assert codec.compress(photograph(16, 16), max_bytes=55)[0] == 77


def test_unreachable_budgets_name_the_range(codec, photograph):
    image = photograph(96, 64)
    # Sizes dip: the smallest need not be the first.
    lowest = [len(codec.compress(image, quality=level / 255)) for level in range(4)]
    low, high = min(lowest), len(codec.compress(image, quality=1))
    with pytest.raises(ValueError, match=rf"{low} to {high} bytes .*found {low - 1} "):
        codec.compress(image, max_bytes=low - 1)
    message = rf"({low}|{lowest[0]}) to {high} bytes .* to {high * 8 / 6144:.4f} bpp"
    for bpp in (1e-9, (high + 1) * 8 / 6144, 1e300):
        with pytest.raises(ValueError, match=message):
            codec.compress(image, bpp=bpp)
    # More bytes than needed are no error: it is the most that they may be.
    assert len(codec.compress(image, max_bytes=10**30)) == high


def test_budgets_include_the_profile(codec, photograph):
    image, profile = photograph(128, 192), bytes(range(256)) * 2
    plain = codec.compress(image, quality=0.5)
    tagged = codec.compress(image, quality=0.5, icc_profile=profile)
    assert 512 <= len(tagged) - len(plain) <= 520
    assert codec.icc_profile(tagged) == profile
    assert codec.icc_profile(plain) is None
    np.testing.assert_array_equal(codec.decompress(tagged), codec.decompress(plain))
    assert len(codec.compress(image, max_bytes=2000, icc_profile=profile)) <= 2000
    with pytest.raises(ValueError, match="with its ICC profile of 512 bytes, found"):
        codec.compress(image, max_bytes=512, icc_profile=profile)


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


def test_pixels_beyond_the_readers_limit_are_refused(codec, small_file):
    assert codec.decompress(small_file, max_pixels=33 * 20).shape == (33, 20, 3)
    with pytest.raises(BitstreamError, match="at most 659 pixels, found 20 x 33"):
        codec.decompress(small_file, max_pixels=33 * 20 - 1)


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


def test_info(codec, photograph):
    data = codec.compress(photograph(50, 60), quality=0.2, icc_profile=b"profile")
    info = codec.info(data)
    assert info == {
        "width": 60,
        "height": 50,
        "bytes": len(data),
        "payload_bytes": len(unpack(data)[1]),
        "bpp": len(data) * 8 / 3000,
        "quality": 51 / 255,
        "fingerprint": codec.fingerprint[:4].hex(),
        "model": "tiny",
        "icc_profile_bytes": 7,
        "same_machine_only": False,
        "coder": "ans",
    }
    json.dumps(info)


def test_info_counts_bytes_whatever_the_items(codec, photograph):
    for length in range(4):
        profile = b"x" * (length + 1)
        data = codec.compress(photograph(64, 64), quality=0.2, icc_profile=profile)
        if len(data) % 4 == 0:
            assert codec.info(memoryview(data).cast("I")) == codec.info(data)
            return
    pytest.fail("no file of whole words")


# Buckets and compilation


def test_buckets():
    sides = np.arange(1, 65536)
    buckets = np.array([bucket_side(int(side)) for side in sides])
    needed = -(-sides // 64) * 64
    assert (buckets >= needed).all() and (buckets % 64 == 0).all()
    assert (buckets <= 1.125 * needed).all()
    assert len(np.unique(buckets)) < 70
    assert (np.diff(buckets) >= 0).all()
    for side in (64, 512, 768, 1024, 4096):
        assert bucket_side(side) == side


def compiled(caplog):
    return [r.message for r in caplog.records if r.message.startswith("Compiling")]


def test_budgets_of_bits_per_pixel_are_exact():
    rng = np.random.default_rng(0)
    for _ in range(20_000):
        height, width = rng.integers(1, 5000, 2).tolist()
        bpp = int(rng.integers(1, 9999)) * 8 / (height * width)  # or a hair beside it
        bpp = float(rng.choice([bpp, np.nextafter(bpp, 0), np.nextafter(bpp, 99)]))
        budget = semlic_jax.Codec.budget_bytes(bpp, (height, width))
        over = (budget + 1) * 8 / (height * width)
        assert budget * 8 / (height * width) <= bpp < over, (height, width, bpp)


def test_a_new_size_in_the_same_bucket_compiles_nothing(codec, photograph, caplog):
    # A bucket that no other test uses: its programs would be compiled already.
    sizes = [(200, 20), (256, 64), (230, 33)]
    assert len({tuple(map(bucket_side, size)) for size in sizes}) == 1
    caplog.set_level(logging.WARNING)
    with jax.log_compiles():
        codec.decompress(codec.compress(photograph(*sizes[0]), quality=0.4))
        # The test would see it; and the passes of a group share one in the decoder.
        passes = [text for text in compiled(caplog) if "_parameters" in text]
        assert len(passes) == len(codec.config.groups)
        caplog.clear()
        for size, quality in zip(sizes, (0.1, 0.9, 0.4), strict=True):
            data = codec.compress(photograph(*size, seed=5), quality=quality)
            codec.decompress(data)
            codec.compress(photograph(*size), max_bytes=len(data) + 99)
    assert compiled(caplog) == []


# The same latents everywhere


def test_files_decode_to_the_same_latents_elsewhere(tiny_model, photograph, tmp_path):
    """Other processes, threads, precisions and mathematics, as few as can be."""
    path = tmp_path / "photo.png"
    Image.fromarray(photograph(100, 50)).save(path)
    variants = {
        "one thread, bfloat16, fast mathematics": {
            "SEMLIC_EXACTNESS_CPUS": "1",
            "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
            "XLA_FLAGS": "--xla_cpu_enable_fast_math=true",
        },
        "two threads, tensorfloat32": {
            "SEMLIC_EXACTNESS_CPUS": "2",
            "JAX_DEFAULT_MATMUL_PRECISION": "tensorfloat32",
        },
        "highest, 64 bits": {
            "JAX_DEFAULT_MATMUL_PRECISION": "highest",
            "JAX_ENABLE_X64": "1",
        },
    }
    record = exactness.report(
        str(tiny_model), [path], qualities=(0.0, 0.5, 1.0), variants=variants
    )
    assert record["files"] == 3 and record["largest_excess_bytes"] <= 0
    for name, variant in record["variants"].items():
        assert variant["different"] == 0, name


def test_images_of_one_name_are_both_looked_at(tiny_model, photograph, tmp_path):
    paths = [tmp_path / "a" / "photo.png", tmp_path / "b" / "photo.png"]
    for seed, path in enumerate(paths):
        path.parent.mkdir()
        Image.fromarray(photograph(16, 16, seed)).save(path)
    written = exactness.write_files(str(tiny_model), paths, [0.5], tmp_path)
    assert len(set(written["digests"].values())) == 2
    assert exactness.decode_files(str(tiny_model), tmp_path) == written["digests"]


def test_a_different_decoder_is_found_out(
    tiny_model, photograph, tmp_path, monkeypatch
):
    """One index of one latent differs: some files do not even decode."""
    path = tmp_path / "photo.png"
    Image.fromarray(photograph(16, 16)).save(path)
    exact, digests = integer_networks._group_parameters, {}

    def other(network, pass_, *arguments):
        index, mean_steps = exact(network, pass_, *arguments)
        return index.at[0, 0, 0, 0].add(1 if pass_.group == 0 else 0), mean_steps

    def decode_elsewhere(model, folder, extra):
        with monkeypatch.context() as patch:
            patch.setattr(integer_networks, "_group_parameters", other)
            digests.update(exactness.decode_files(model, folder))
        return digests

    monkeypatch.setattr(exactness, "decode_elsewhere", decode_elsewhere)
    record = exactness.report(str(tiny_model), [path], variants={"other": {}})
    assert record["variants"]["other"]["different"] == 5
    assert any(text.startswith("not decoded: expected") for text in digests.values())


# The cache of compiled programs


@pytest.fixture
def cache_folder(monkeypatch):
    """Function: the folder that a codec would choose under these variables."""

    def choose(**variables):
        for name in ("SEMLIC_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        before = jax.config.jax_compilation_cache_dir
        jax.config.update("jax_compilation_cache_dir", None)
        use_disk_cache()
        found = jax.config.jax_compilation_cache_dir
        jax.config.update("jax_compilation_cache_dir", before)
        return found

    return choose


def test_place_of_the_cache(cache_folder, tmp_path):
    ours, file = str(tmp_path / "a" / "b"), tmp_path / "file"
    file.touch()
    assert cache_folder(SEMLIC_CACHE=ours) == ours and os.path.isdir(ours)
    assert cache_folder(XDG_CACHE_HOME=tmp_path) == f"{tmp_path}/semlic_jax"
    assert cache_folder(HOME=tmp_path) == f"{tmp_path}/.cache/semlic_jax"
    assert os.stat(f"{tmp_path}/.cache/semlic_jax").st_mode & 0o077 == 0
    assert cache_folder(SEMLIC_CACHE="") is None
    assert cache_folder(HOME=file) is None  # no folder can be made there
    assert cache_folder(XDG_CACHE_HOME="relative") is None


def test_who_has_chosen_what_is_cached_keeps_it(cache_folder, tmp_path):
    name = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[name]
    try:
        for chosen, kept in ((5.0, 5.0), (1.0, 0.1)):
            jax.config.update(name, chosen)
            assert cache_folder(SEMLIC_CACHE=tmp_path)
            assert jax.config.values[name] == kept
    finally:
        jax.config.update(name, before)


@pytest.mark.data
def test_a_kodak_photograph(kodak_paths, codec):
    with Image.open(kodak_paths[4]) as image:
        pixels = np.asarray(image.convert("RGB"))[100:228, 100:292]
    data = codec.compress(pixels, max_bytes=1200)
    assert 1164 <= len(data) <= 1200
    assert psnr_db(codec.decompress(data), pixels) > 12


def test_load_model_and_codec_agree(tiny_model, codec):
    assert load_model(tiny_model).fingerprint() == codec.fingerprint
    assert (codec.name, codec.config.name) == ("tiny", "tiny")


def test_a_quality_is_rounded_to_the_nearest_step(codec, photograph, monkeypatch):
    levels = []
    monkeypatch.setattr(codec, "analyse", lambda image: None)
    monkeypatch.setattr(
        codec, "encode", lambda latents, level, profile: levels.append(level)
    )
    for level in (1, 128, 254):
        for part in (-0.4, 0, 0.4):
            codec.compress(photograph(16, 16), quality=(level + part) / 255)
    assert levels == [1] * 3 + [128] * 3 + [254] * 3


def test_beyond_the_image_its_edge_is_repeated(codec, photograph):
    """By the encoder in pixels, by the decoder in latents."""
    image = photograph(40, 50)
    network, params = network_of(codec.config), {"params": codec.params}
    padded = np.pad(image, ((0, 24), (0, 14), (0, 0)), mode="edge")
    y = network.apply(params, padded[None] / np.float32(255), method="analysis")
    np.testing.assert_allclose(codec.analyse(image).y, y[0], rtol=0, atol=1e-4)

    data = codec.compress(image, quality=0.7)
    header, y_hat = codec.decode_latents(data)
    padded = np.pad(y_hat, ((0, 1), (0, 0), (0, 0)), mode="edge")
    quality = np.array([header.quality / 255], np.float32)
    x_hat = network.apply(params, padded[None], quality, method="synthesis")
    expected = np.round(np.clip(x_hat[0, :40, :50], 0, 1) * 255).astype(int)
    assert np.abs(codec.decompress(data).astype(int) - expected).max() <= 1


def test_the_readers_limit_may_be_above_the_usual_one(codec, small_file, monkeypatch):
    """400 megapixels are more than that; this payload is too short for them."""
    header, payload = unpack(small_file)
    large = dataclasses.replace(header, width=20_000, height=20_000)
    data = pack(large, payload, max_pixels=2**29)
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    with pytest.raises(BitstreamError, match="the end of the payload"):
        codec.decompress(data, max_pixels=2**29)


def test_parts_of_the_codec_work_under_a_strict_jax(codec, photograph):
    image, level = photograph(64, 64), 178
    data = codec.compress(image, quality=level / 255)
    with jax.transfer_guard("disallow"):
        latents = codec.analyse(image)
        codec.scaled(latents, level)
        assert codec.encode(latents, level) == data
        codec.decode_latents(data)
