# SPDX-License-Identifier: Apache-2.0
"""Where a refinement starts: the quality of the first latents, and their budget."""

from __future__ import annotations

import numpy as np
import pytest

from semlic_jax.refinement import Region
from semlic_jax.refinement.jobs import _overshoot, plan_job

SIZE = (56, 64)


@pytest.fixture(scope="module")
def plan(mini_codec, photograph):
    """Function (quality, overshoot, profile) -> the job, and what it is made from."""
    image = photograph(*SIZE, seed=3)
    latents = mini_codec.analyse(image)

    def planned(quality, overshoot, profile=None, budget_bytes=None):
        unrefined = mini_codec.compress(image, quality=quality, icc_profile=profile)
        job = plan_job(
            mini_codec,
            latents,
            budget_bytes=len(unrefined) if budget_bytes is None else budget_bytes,
            region=None,
            icc_profile=profile,
            unrefined=unrefined,
            overshoot=overshoot,
        )
        return job, latents, unrefined

    return planned


@pytest.mark.parametrize("profile", [None, 1000 * b"p"])
@pytest.mark.parametrize(
    ("quality", "overshoot"), [(0.5, 0.15), (0.7, -0.15), (1.0, -0.15), (0.97, -0.1)]
)
def test_first_files_exceed_their_budgets_by_the_share_asked_for(
    plan, mini_codec, quality, overshoot, profile
):
    """A profile does not; near the finest level, slopes are measured below it."""
    job, latents, unrefined = plan(quality, overshoot, profile)
    first = mini_codec.encode(latents, job.level)
    wanted = (1 + overshoot) * (len(unrefined) - len(profile or b""))
    assert len(first) == pytest.approx(wanted, rel=0.13)
    assert abs(len(first) - len(unrefined)) > 0.05 * len(first)


@pytest.mark.parametrize(
    ("quality", "overshoot", "level"), [(0.0, -0.5, 0), (1.0, 0.5, 255)]
)
def test_first_files_have_a_quality_that_there_is(plan, quality, overshoot, level):
    job, _, _ = plan(quality, overshoot)
    assert job.level == level


@pytest.mark.parametrize("profile", [None, 1000 * b"p"])
def test_the_payload_of_a_budget_is_that_of_files_of_this_size(
    plan, mini_codec, profile
):
    job, latents, unrefined = plan(0.5, 0.0, profile)
    level = round(mini_codec.info(unrefined)["quality"] * 255)
    scaled = mini_codec.scaled(latents, level)
    symbols = mini_codec.entropy.symbols(*scaled, level, SIZE)
    expected = mini_codec.entropy.ideal_bits(symbols, SIZE)
    assert job.payload_bits == pytest.approx(expected, abs=16)


def test_budgets_that_a_profile_fills_are_refused(plan):
    message = "more than 500 bytes, which the colour profile takes, found 500"
    with pytest.raises(ValueError, match=message):
        plan(0.5, 0.0, 500 * b"p", budget_bytes=500)


def test_regions_raise_the_overshoot_by_how_much_their_weights_differ():
    """Whichever side weighs more; and never below what was asked for."""
    mask = np.zeros(SIZE, np.float32)
    mask[:, :32] = 1
    for weights, expected in (
        ((1.0, 0.0), 0.5),
        ((0.0, 1.0), 0.5),
        ((0.8, 0.08), 0.5),
        ((0.08, 0.8), 0.5),
        ((10**0.5, 1.0), 0.3),
        ((1.0, 10**0.5), 0.3),
        ((0.5, 0.5), 0.1),
    ):
        region = Region(mask, *weights)
        assert _overshoot(0.1, region) == pytest.approx(expected, abs=1e-4), weights
        assert _overshoot(0.8, region) == 0.8
    assert _overshoot(0.1, None) == 0.1
