# SPDX-License-Identifier: Apache-2.0
"""The classical codecs and the search for a file of a given size."""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import pytest

from semlic_jax.evaluation import codecs
from semlic_jax.evaluation.demo import packaged_photograph, psnr_db

NAMES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name == "jxl" and importlib.util.find_spec("pillow_jxl") is None,
            reason="pillow-jxl-plugin is not installed",
        ),
    )
    for name in codecs.CODECS
]

# What the first bytes of each kind of file must be: whole files, not bare streams.
MAGIC = {
    "jpeg": b"\xff\xd8\xff",
    "webp": b"RIFF",
    "avif": b"\0\0\0",
    "avif-slow": b"\0\0\0",
    "jpeg2000": b"\0\0\0\x0cjP",
    "jxl": (b"\xff\x0a", b"\0\0\0\x0cJXL"),
}


@pytest.fixture(scope="module")
def image():
    return packaged_photograph().pixels[100:196, 200:328]


@pytest.mark.parametrize("name", NAMES)
def test_files_grow_and_get_better_with_the_setting(name, image):
    codec = codecs.classical_codec(name)
    settings = codec.settings
    sizes, qualities = [], []
    for setting in (settings[0], settings[len(settings) // 2], settings[-1]):
        data = codec.encode(image, setting)
        assert data.startswith(MAGIC[name])
        decoded = codec.decode(data)
        assert decoded.shape == image.shape and decoded.dtype == np.uint8
        sizes.append(len(data))
        qualities.append(psnr_db(image, decoded))
    assert sizes == sorted(set(sizes))
    assert qualities == sorted(set(qualities))
    assert qualities[-1] > 30


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (5, 1), (3, 3), (17, 2)])
def test_small_and_odd_sizes(name, shape):
    codec = codecs.classical_codec(name)
    tiny = np.full((*shape, 3), (200, 100, 50), np.uint8)
    decoded = codec.decode(codec.encode(tiny, codec.settings[-1]))
    np.testing.assert_allclose(decoded.astype(int), tiny, atol=12)


@pytest.mark.parametrize("name", NAMES)
def test_fit_finds_the_best_file_that_fits(name, image):
    codec = codecs.classical_codec(name)
    ladder = codecs.Ladder(codec, image)
    fit = ladder.fit(2000)
    assert len(fit.data) <= 2000
    assert fit.data == codec.encode(image, fit.setting)
    # The next two settings are too large: there is no better one near.
    for setting in codec.settings:
        if fit.setting < setting <= fit.setting + 2:
            assert len(ladder.encode(setting)) > 2000


@pytest.mark.skipif(
    len(getattr(os, "sched_getaffinity", lambda pid: [0])(0)) < 2,
    reason="one core here, or no way to choose one",
)
@pytest.mark.parametrize("name", NAMES)
def test_files_do_not_depend_on_the_number_of_cores(name):
    image = packaged_photograph().pixels  # large enough for several threads
    codec = codecs.classical_codec(name)
    setting = codec.settings[len(codec.settings) // 3]
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})
        alone = codec.encode(image, setting)
    finally:
        os.sched_setaffinity(0, cores)
    assert codec.encode(image, setting) == alone


def test_settings_show_in_the_file(image):
    """4:2:0 and progressive scans: what makes each codec its best at low rates."""
    data = codecs.Jpeg().encode(image, 50)
    assert b"\xff\xc2" in data  # a progressive frame
    frame = data[data.index(b"\xff\xc2") :]
    assert frame[11] == 0x22  # luma sampled twice as often both ways


def test_slow_avif_searches_longer(image):
    setting = 40
    quick, slow = codecs.Avif(), codecs.SlowAvif()
    assert quick.encode(image, setting) != slow.encode(image, setting)


class Steps:
    """A codec with known file sizes that counts how often it is asked."""

    name = "steps"
    suffix = ".steps"

    def __init__(self, sizes):
        self.sizes = sizes
        self.settings = range(10, 10 + len(sizes))
        self.calls = []

    def encode(self, image, setting):
        self.calls.append(setting)
        return bytes(self.sizes[setting - 10])

    def decode(self, data):
        raise AssertionError("the search decodes nothing")


BLACK = np.zeros((4, 4, 3), np.uint8)


@pytest.mark.parametrize("budget", range(0, 70))
def test_search_agrees_with_trying_all(budget):
    codec = Steps([3, 5, 8, 13, 21, 21, 34, 40, 41, 50, 60])
    fitting = [i for i, size in enumerate(codec.sizes) if size <= budget]
    ladder = codecs.Ladder(codec, BLACK)
    if fitting:
        assert ladder.fit(budget).setting == codec.settings[fitting[-1]]
    else:
        with pytest.raises(ValueError, match="3 bytes"):
            ladder.fit(budget)
    assert len(codec.calls) == len(set(codec.calls)) <= 6


def test_search_looks_past_a_dent():
    codec = Steps([3, 5, 6, 9, 8, 21])  # bisection meets the 9 first
    assert codecs.Ladder(codec, BLACK).fit(8).setting == 14


def test_search_reuses_files():
    codec = Steps(list(range(1, 101)))
    ladder = codecs.Ladder(codec, BLACK)
    ladder.fit(50)
    calls = len(codec.calls)
    ladder.fit(50)
    assert len(codec.calls) == calls < 12


def test_unreachable_budget_names_what_is_possible(image):
    ladder = codecs.Ladder(codecs.Jpeg(), image)
    smallest = len(ladder.encode(1))
    with pytest.raises(ValueError, match=f"JPEG .*{smallest:,} bytes .*at most 10 "):
        ladder.fit(10)


def test_unknown_setting_and_codec(image):
    with pytest.raises(ValueError, match="1 to 100"):
        codecs.Ladder(codecs.Jpeg(), image).encode(101)
    with pytest.raises(ValueError, match="'gif'"):
        codecs.classical_codec("gif")


def test_missing_support_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(codecs.features, "check", lambda feature: False)
    with pytest.raises(codecs.CodecUnavailableError, match="AVIF"):
        codecs.classical_codec("avif")
    monkeypatch.setattr(codecs.importlib, "import_module", _not_there)
    with pytest.raises(codecs.CodecUnavailableError, match="pillow-jxl-plugin"):
        codecs.classical_codec("jxl")


def _not_there(name):
    raise ImportError(name)
