# SPDX-License-Identifier: Apache-2.0
"""The search for the level that fills a budget, on made-up sizes."""

from __future__ import annotations

import math
import random

import pytest

from semlic_jax.level_search import best_level

LAST = 255


def rising_sizes(chance: random.Random) -> list[int]:
    """Sizes like those of images: nearly even in the logarithm, strictly rising."""
    first, rise = chance.choice([300, 3000, 300_000]), chance.uniform(0.008, 0.03)
    bend = chance.uniform(-0.3, 0.3)
    sizes: list[int] = []
    for level in range(LAST + 1):
        x = (level - 100) / 100
        size = int(first * math.exp(rise * (level - 100) + bend * x * x))
        sizes.append(max(size, sizes[-1] + 1 if sizes else 22))
    return sizes


def search(sizes: list[int], budget: int) -> tuple[int | None, int]:
    """The level found, and how many sizes were asked for, none of them twice."""
    asked: list[int] = []

    def size(level: int) -> int:
        assert level not in asked
        asked.append(level)
        return sizes[level]

    return best_level(size, budget, LAST), len(asked)


def test_the_best_level_is_found_in_few_looks():
    chance = random.Random(1)
    looks = []
    for _ in range(300):
        sizes = rising_sizes(chance)
        level = chance.randrange(LAST + 1)
        top = sizes[level + 1] - 1 if level < LAST else 2 * sizes[level]
        for budget in (sizes[level], top):
            found, count = search(sizes, budget)
            assert found == level
            looks.append(count)
    assert sum(looks) / len(looks) < 6 and max(looks) < 15


@pytest.mark.parametrize("budget", [10**400, 306, 305])
def test_more_than_enough_is_the_last_level(budget):
    assert search([50 + level for level in range(LAST + 1)], budget)[0] == LAST


def test_less_than_the_first_is_none():
    sizes = [50 + level for level in range(LAST + 1)]
    assert search(sizes, 50)[0] == 0
    assert search(sizes, 49)[0] is None
    assert search(sizes, 0)[0] is None


def test_sizes_that_do_not_rise_evenly_end_the_search_too():
    step = [50 + 9 * (level > 77) for level in range(LAST + 1)]
    assert search(step, 55)[0] == 77
    assert search([50] * (LAST + 1), 50)[0] == LAST
    cliff = [100 + level // 4 if level < 252 else 10**6 for level in range(LAST + 1)]
    found, count = search(cliff, 161)
    assert found == 247 and count < 30
    cliff[252:] = [200, 200, 200, 10**12]
    found, count = search(cliff, 250)
    assert found == 254 and count < 30


def test_a_dip_beyond_the_first_that_does_not_fit_is_seen():
    sizes = [1000 + 5 * level for level in range(LAST + 1)]
    sizes[102] = 1504  # between 1505 and 1515, both too large for the budget
    assert search(sizes, 1504)[0] == 102


@pytest.mark.parametrize("beyond", [1, 2, 3])
def test_a_dip_is_seen_behind_others_that_do_not_fit(beyond):
    sizes = [1000 + 5 * level for level in range(LAST + 1)]
    sizes[101 + beyond] = 1504  # level 101 is the first that does not fit
    assert search(sizes, 1504)[0] == 101 + beyond
