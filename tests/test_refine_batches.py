# SPDX-License-Identifier: Apache-2.0
"""Refinement in batches: budgets of their own, memory, where each image starts."""

from __future__ import annotations

import dataclasses
import sys

import jax
import numpy as np
import pytest
from refining import RELAXED as SETTINGS
from refining import SIZE, squared_error

from semlic_jax import memory, refinement
from semlic_jax.refinement.batch import Batch


@pytest.mark.slow
def test_batches_have_budgets_of_their_own(mini_codec, photograph):
    images = [photograph(*SIZE, seed=3), photograph(64, 50, seed=4)]
    starts = [mini_codec.compress(images[0], quality=0.4)]
    starts += [mini_codec.compress(images[1], quality=0.8)]
    budgets = [len(start) for start in starts]
    found = refinement.refine_batch(
        mini_codec, images, max_bytes=budgets, settings=SETTINGS
    )
    for image, start, budget, each in zip(images, starts, budgets, found, strict=True):
        assert len(each.data) <= budget
        assert each.value < each.unrefined_value
        own = squared_error(mini_codec, each.data, image)
        assert own < squared_error(mini_codec, start, image)


def test_too_large_batches_are_halved(mini_codec, image, monkeypatch):
    """A device without room for more than one image at a time."""

    class Narrow(Batch):
        def __init__(self, codec, settings, pixels, *rest):
            if len(pixels) > 1:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
            super().__init__(codec, settings, pixels, *rest)

    # By its name: `refinement.refine` is the function.
    monkeypatch.setattr(sys.modules["semlic_jax.refinement.refine"], "Batch", Narrow)
    budgets = [len(mini_codec.compress(image, quality=q)) for q in (0.4, 0.5, 0.6)]
    settings = dataclasses.replace(SETTINGS, steps=2)
    with pytest.warns(refinement.RefinementWarning) as noted:
        found = refinement.refine_batch(
            mini_codec, [image] * 3, max_bytes=budgets, settings=settings
        )
    assert [str(note.message).partition("for ")[2] for note in noted] == [
        "a batch of 3: continuing with 2",
        "a batch of 2: continuing with 1",
    ]
    assert len(found) == 3
    assert all(len(f.data) <= b for f, b in zip(found, budgets, strict=True))


def test_a_stop_holds_for_all_parts_of_a_batch(mini_codec, image, monkeypatch):
    """A caller that says so once, and a batch that is halved."""
    monkeypatch.setattr(memory, "available_bytes", lambda: None)

    class Narrow(Batch):
        def __init__(self, codec, settings, pixels, *rest):
            if len(pixels) > 1:
                raise MemoryError("for one image alone")
            super().__init__(codec, settings, pixels, *rest)

    monkeypatch.setattr(sys.modules["semlic_jax.refinement.refine"], "Batch", Narrow)
    seen = []

    def stop_once(now):
        seen.append((now.step, now.bpp.shape))
        return len(seen) > 1

    with pytest.warns(refinement.RefinementWarning):
        found = refinement.refine_batch(
            mini_codec,
            [image] * 2,
            max_bytes=[len(mini_codec.compress(image, quality=0.5))] * 2,
            settings=dataclasses.replace(SETTINGS, chunk_steps=2),
            progress=stop_once,
        )
    assert [each.steps for each in found] == [2, 2] and seen == [(2, (1,))]


def test_batches_that_a_cpu_has_no_room_for_are_halved(mini_codec, image, monkeypatch):
    """A byte is left for two images, and enough for one."""
    left = iter([1, None, None])
    monkeypatch.setattr(memory, "available_bytes", lambda: next(left))
    budget = len(mini_codec.compress(image, quality=0.5))
    settings = dataclasses.replace(SETTINGS, steps=2)
    with pytest.warns(refinement.RefinementWarning, match="a batch of 2: continuing"):
        found = refinement.refine_batch(
            mini_codec, [image] * 2, max_bytes=[budget] * 2, settings=settings
        )
    assert len(found) == 2 and next(left, "none") == "none"


@pytest.mark.parametrize("method", ["newton", "sga"])
def test_an_image_that_a_cpu_has_no_room_for(mini_codec, image, monkeypatch, method):
    monkeypatch.setattr(memory, "available_bytes", lambda: 1)
    settings = dataclasses.replace(SETTINGS, method=method)
    with pytest.raises(MemoryError, match=r"refining \d+ pixels .* found 0.0 GiB"):
        refinement.refine(mini_codec, image, quality=0.5, settings=settings)


def test_enough_room_is_not_refused(monkeypatch):
    def not_asked():
        raise AssertionError("plenty is left")

    left = memory.available_bytes()
    if left is not None:
        assert 2**20 < left < 2**50
    memory.require_memory("refining", 1, not_asked)
    monkeypatch.setattr(memory, "available_bytes", lambda: 2000)
    memory.require_memory("refining", 1, lambda: 2000)
    memory.require_memory("refining", 1, lambda: None)
    with pytest.raises(MemoryError):
        memory.require_memory("refining", 1, lambda: 2001)


def test_batches_are_of_one_bucket(mini_codec, image, photograph):
    with pytest.raises(ValueError, match="one padded size"):
        refinement.refine_batch(
            mini_codec,
            [image, photograph(64, 100)],
            max_bytes=[200, 300],
            settings=SETTINGS,
        )


def test_neighbours_do_not_change_the_first_multiplier(mini_codec, image):
    """The coarsest file and the finest: one probes upwards, the other downwards."""
    files = [mini_codec.compress(image, quality=quality) for quality in (0.0, 1.0)]
    settings = dataclasses.replace(SETTINGS, overshoot=0.0)

    def start(*files):
        budgets, nothing = [len(data) for data in files], [None] * len(files)
        images = [image] * len(files)
        return Batch(mini_codec, settings, images, budgets, nothing, nothing, files)

    both = start(*files)
    levels = [job.level for job in both.jobs]
    assert levels[0] < 16 and levels[1] == 255
    alone = [start(data).log_beta[0] for data in files]
    np.testing.assert_allclose(both.log_beta, alone, rtol=1e-4)


def test_a_profile_does_not_change_where_an_image_starts(mini_codec, image):
    """However much of the file it takes."""

    def job(profile):
        data = mini_codec.compress(image, quality=0.5, icc_profile=profile)
        lists = [len(data)], [None], [profile], [data]
        return Batch(mini_codec, SETTINGS, [image], *lists).jobs[0]

    plain, profiled = job(None), job(3000 * b"p")
    # The head of the chunk that holds it is 7 of 202 bytes.
    assert plain.level < 200 and abs(profiled.level - plain.level) <= 2
    assert profiled.payload_bits == pytest.approx(plain.payload_bits, abs=16)


def test_unrefined_files_that_do_not_fit_are_refused(mini_codec, image, photograph):
    data = mini_codec.compress(image, quality=0.5)
    other = mini_codec.compress(photograph(50, 60), quality=0.2)
    for budget, start, message in (
        (len(data) - 1, data, f"at most {len(data) - 1} bytes, found {len(data)}"),
        (len(data), other, "unrefined file of 64 x 56 pixels, found 60 x 50"),
        (len(data), data, "more than 500 bytes, which the colour profile takes"),
    ):
        with pytest.raises(ValueError, match=message):
            refinement.refine_batch(
                mini_codec,
                [image],
                max_bytes=[budget],
                unrefined=[start],
                icc_profiles=[500 * b"p"],
                settings=SETTINGS,
            )
