# SPDX-License-Identifier: Apache-2.0
"""The search for the settings of a codec that meet a rate."""

from __future__ import annotations

import numpy as np
import pytest
from sweeps import RATES

from semlic_jax.evaluation.codecs import classical_codec
from semlic_jax.evaluation.entrants import (
    RateSearch,
)


class Stairs:
    """A codec whose file sizes are given."""

    name, suffix = "stairs", ".st"

    def __init__(self, sizes):
        self.sizes, self.settings, self.calls = sizes, range(len(sizes)), []

    def encode(self, image, setting):
        self.calls.append(setting)
        return bytes(self.sizes[setting])

    def decode(self, data):
        raise NotImplementedError


IMAGE = np.zeros((80, 100, 3), np.uint8)  # 1,000 bytes are 1 bpp


@pytest.mark.parametrize("base", [1.02, 1.05, 1.2])
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3, 0.77, 1.0, 3.0])
def test_search_finds_the_highest_setting_that_fits(base, rate):
    sizes = [round(40 * base**i) for i in range(100)]
    codec = Stairs(sizes)
    budget = int(rate * 1000)
    fitting = [i for i, size in enumerate(sizes) if size <= budget]
    search = RateSearch(codec, IMAGE)
    if len(fitting) == len(sizes) and sizes[-1] < 0.97 * budget:
        with pytest.raises(ValueError, match=f"largest .* {sizes[-1] / 1000:.3f} bpp"):
            search.fit(rate)
    else:
        assert search.fit(rate).setting == str(fitting[-1])
        assert len(codec.calls) == len(set(codec.calls)) <= 11


def test_search_uses_every_byte_of_the_rate():
    """0.7 bpp of 180 x 240 are 3,780 bytes; the product is a hair less in floats."""
    assert 0.7 * 180 * 240 / 8 < 3780
    search = RateSearch(Stairs([3000, 3780, 3781]), np.zeros((180, 240, 3), np.uint8))
    assert search.fit(0.7).setting == "1"


def test_search_on_plateaus_and_cliffs():
    sizes = [100] * 20 + [500] * 30 + [501, 9000]
    search = RateSearch(Stairs(sizes), IMAGE)
    assert search.fit(0.1).setting == "19"
    assert search.fit(0.4).setting == "19"
    assert search.fit(0.5).setting == "49"
    assert search.fit(0.9).setting == "50"
    assert search.fit(9.0).setting == "51"


def test_search_never_breaks_the_budget_where_sizes_do_not_grow():
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = (40 * 1.06 ** np.arange(80) * rng.uniform(0.7, 1.4, 80)).astype(int)
        search = RateSearch(Stairs(list(sizes)), IMAGE)
        for rate in (0.1, 0.2, 0.4, 0.8):
            assert len(search.fit(rate).data) <= 1000 * rate


def test_search_says_how_small_it_gets():
    with pytest.raises(ValueError, match="smallest file of this image takes 0.200 bpp"):
        RateSearch(Stairs([200, 300]), IMAGE).fit(0.1)
    # A largest file just below the rate is what was asked for.
    assert RateSearch(Stairs([200, 980]), IMAGE).fit(1.0).setting == "1"


def test_files_of_one_rate_narrow_the_search_for_the_next():
    codec = Stairs([round(40 * 1.05**i) for i in range(100)])
    search = RateSearch(codec, IMAGE)
    for rate in (0.1, 0.15, 0.2, 0.3, 0.45):
        search.fit(rate)
    assert len(codec.calls) <= 20


def test_search_looks_beyond_the_first_that_does_not_fit():
    """As `Codec.compress` does, whose files a sweep is to measure."""
    sizes = [round(400 * 1.018**i) for i in range(100)]
    sizes[44] = sizes[42] - 1  # dips below the budget that 43 is above
    search = RateSearch(Stairs(sizes), IMAGE)
    assert search.fit(sizes[42] / 1000).setting == "42"
    assert search.fit((sizes[42] - 1) / 1000).setting == "44"


@pytest.mark.parametrize("key", ["jpeg", "webp"])
def test_search_agrees_with_trying_every_setting(key, photograph):
    image, codec = photograph(64, 80), classical_codec(key)
    sizes = {s: len(codec.encode(image, s)) for s in codec.settings}
    search = RateSearch(codec, image)
    for rate in RATES:
        found = search.fit(rate)
        budget = int(rate * 64 * 80 / 8)
        setting = int(found.setting)
        assert len(found.data) == sizes[setting] <= budget
        assert setting == codec.settings[-1] or sizes[setting + 1] > budget
        assert found.encode_s > 0
