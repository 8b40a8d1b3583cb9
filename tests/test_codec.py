# SPDX-License-Identifier: Apache-2.0
"""The front door: round trips, copies, what is said of a file, budgets."""

import copy
import dataclasses
import json
import pickle

import jax
import numpy as np
import pytest
from PIL import Image

import semlic_jax
from semlic_jax.codec import MAX_LEVEL, _checked_budget
from semlic_jax.coding.bitstream import unpack
from semlic_jax.model.mean_scale import network_of
from semlic_jax.weights import load_model

# Few buckets for all tests, since compiling their programs takes most of the time:
# 64 x 64, 128 x 64 and 128 x 192.
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


def test_a_used_codec_can_be_copied_and_sent(codec, photograph):
    image = photograph(64, 64)
    data = codec.compress(image, quality=0.7)
    decoded = codec.decompress(data)
    for own in (copy.deepcopy(codec), pickle.loads(pickle.dumps(codec))):
        assert own.compress(image, quality=0.7) == data
        np.testing.assert_array_equal(own.decompress(data), decoded)


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


def test_budgets_of_bits_per_pixel_are_exact():
    rng = np.random.default_rng(0)
    for _ in range(20_000):
        height, width = rng.integers(1, 5000, 2).tolist()
        bpp = int(rng.integers(1, 9999)) * 8 / (height * width)  # or a hair beside it
        bpp = float(rng.choice([bpp, np.nextafter(bpp, 0), np.nextafter(bpp, 99)]))
        budget = semlic_jax.Codec.budget_bytes(bpp, (height, width))
        over = (budget + 1) * 8 / (height * width)
        assert budget * 8 / (height * width) <= bpp < over, (height, width, bpp)


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
