# SPDX-License-Identifier: Apache-2.0
"""Refinement in tiles: what a refinement of the whole image finds, in less memory."""

from __future__ import annotations

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import lively_params
from PIL import Image
from small_trunk import load_small_trunk

from semlic_jax import memory, refinement
from semlic_jax.codec import Codec
from semlic_jax.refinement import folder, large, windows
from semlic_jax.refinement.batch import Batch
from semlic_jax.refinement.large import LargeImage
from semlic_jax.refinement.symbols import Rounding
from semlic_jax.weights import export_model

# Four tiles by three, the last column overlapping, in a bucket that is not filled.
SIZE = (470, 310)
WINDOW = 16
SETTINGS = refinement.preset(
    4,
    alpha=1e-4,
    gamma=1.0,
    structure=0.03,
    mean_style=30.0,
    probes=2,
    features=load_small_trunk(),
)
PLAIN = Rounding(np.zeros(1, np.float32))
NO_TERMS = {"structure": False, "lattice": False, "mesh": False}


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(windows, "_WINDOW", WINDOW)
    monkeypatch.setattr(large, "_MOST_PIXELS", 2**16)


@pytest.fixture(scope="module")
def image(photograph):
    return photograph(*SIZE, seed=3)


def made(kind, codec, image, settings=SETTINGS, region=None):
    unrefined = codec.compress(image, quality=0.5)
    budget = len(unrefined)
    return kind(codec, settings, [image], [budget], [region], [None], [unrefined])


@pytest.fixture(scope="module")
def pair(mini_codec, image):
    """The whole image and its tiles, with all terms that have places."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "_WINDOW", WINDOW)
        return made(Batch, mini_codec, image), made(LargeImage, mini_codec, image)


def test_tiles_cover_the_image_once(pair):
    whole, tiles = pair
    tiling = tiles.tiling
    assert (len(tiling.rows.firsts), len(tiling.columns.firsts)) == (4, 3)
    assert max(tiling.rows.window, tiling.columns.window) <= WINDOW
    times = np.zeros(whole.images.x.shape[1:3])
    ones = tiles.images._replace(weights=jnp.ones_like(tiles.images.weights))
    for window in tiles.windows:
        own = windows.view(tiling, ones, window)
        weights = np.asarray(windows.only_tile(tiling, own, window).weights[0])
        row, column = (16 * start for start in window.start)
        height, width = weights.shape
        times[row : row + height, column : column + width] += weights
    assert (times[: SIZE[0], : SIZE[1]] == 1).all()


def test_terms_of_tiles_add_up_to_those_of_the_image(pair):
    whole, tiles = pair
    expected = whole.score(whole.start, whole.images, PLAIN)
    found = tiles.score(tiles.start, tiles.images, PLAIN)
    for name, tolerance in (("bpp", 1e-6), ("mse", 1e-5), ("perceptual", 2e-2)):
        assert getattr(found, name) == pytest.approx(
            getattr(expected, name), rel=tolerance
        ), name
    assert found.value == pytest.approx(expected.value, rel=5e-3)
    # Not for want of the terms in question.
    for name in ("mean_style", "structure"):
        weights = whole.weights._replace(**{name: jnp.float32(0)})
        parts = whole.frozen, whole.images, weights
        without, _ = refinement.fit.score(*parts, PLAIN, *whole.start)
        assert without.value < 0.95 * expected.value, name


def test_mesh_terms_of_tiles_add_up_too(pair, mini_codec, image):
    parts = []
    for plain in pair:
        settings = dataclasses.replace(SETTINGS, mesh=0.0)
        other = made(type(plain), mini_codec, image, settings)
        with_mesh = plain.score(plain.start, plain.images, PLAIN)
        without = other.score(other.start, other.images, PLAIN)
        parts.append((with_mesh.value - without.value).item())
    assert parts[1] == pytest.approx(parts[0], rel=1e-3) and parts[0] > 0.1


def test_lattice_terms_of_tiles_add_up_too(pair, mini_codec, image):
    """As far as windows without those over their ends are as many of each size."""
    settings = dataclasses.replace(SETTINGS, lattice=0.03)
    parts = []
    for plain in pair:
        other = made(type(plain), mini_codec, image, settings)
        with_lattice = other.score(plain.start, other.images, PLAIN)
        without = plain.score(plain.start, plain.images, PLAIN)
        parts.append((with_lattice.value - without.value).item())
    assert 0.95 * parts[1] < parts[0] < parts[1] and parts[0] > 0.1


def test_a_window_has_what_lies_in_its_place(pair):
    _, tiles = pair
    rng = np.random.default_rng(0)
    images = tiles.images
    weights, feature_weights = (
        jnp.asarray(rng.random(images.weights.shape, np.float32)) for _ in range(2)
    )
    images = images._replace(weights=weights, feature_weights=feature_weights)
    for window in tiles.windows:
        own = windows.view(tiles.tiling, images, window)
        corner = [16 * start for start in window.start]
        side = [16 * cut.window for cut in tiles.tiling[:2]]
        part = tuple(
            slice(first, first + length)
            for first, length in zip(corner, side, strict=True)
        )
        for name in ("x", "weights", "feature_weights"):
            whole = getattr(images, name)
            np.testing.assert_array_equal(getattr(own, name), whole[:, *part], name)
        inside = [
            min(length, size - first)
            for length, size, first in zip(side, SIZE, corner, strict=True)
        ]
        np.testing.assert_array_equal(own.sizes, [inside])


def test_memory_is_asked_for_a_window_and_for_what_all_pixels_keep(pair):
    whole, tiles = pair
    pixels = [16 * cut.window for cut in tiles.tiling[:2]]
    kept = tiles.pixels_at_once() - pixels[0] * pixels[1]
    assert kept == pytest.approx(whole.pixels_at_once() / 32, abs=1)
    assert tiles.pixels_at_once() < 0.5 * whole.pixels_at_once()


def test_one_long_side_is_enough_for_tiles():
    side = 16 * WINDOW
    assert not windows.more_than_one_window((side, side))
    for bucket in ((64, side + 64), (side + 64, 64)):
        assert windows.more_than_one_window(bucket)
        assert large.can_go_in_tiles(bucket, SETTINGS)
        size = (bucket[0] - 10, bucket[1] - 10)
        _, found = windows.cut_image(size, bucket, **NO_TERMS)
        assert len(found) > 1


def test_a_step_moves_the_latents_as_for_the_whole_image(pair):
    whole, tiles = pair
    one, other = whole.stepper(), tiles.stepper()
    other.state = jax.tree.map(jnp.copy, one.state)
    one(1, whole.target)
    bpp = other(1, whole.target)
    assert other.terms.bpp == pytest.approx(bpp)
    for before, a, b in zip(
        whole.start, one.state.latents, other.state.latents, strict=True
    ):
        expected, found = (np.asarray(part - before) for part in (a, b))
        distance = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert distance < 0.02
    assert other.state.log_beta == pytest.approx(
        np.asarray(one.state.log_beta), abs=1e-4
    )
    # The next one is that of its place in the schedule, and shorter.
    starts = [jnp.copy(each.state.latents[0]) for each in (one, other)]
    one(1, whole.target)
    other(1, whole.target)
    expected, found = (
        np.asarray(each.state.latents[0] - start)
        for each, start in zip((one, other), starts, strict=True)
    )
    distance = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert distance < 0.3


def test_windows_have_the_noise_of_their_place(tiny_config, image):
    """Of a decoder that makes texture of it."""
    config = dataclasses.replace(tiny_config, texture_channels=4, blocks=0)
    codec = Codec(export_model(config, lively_params(config)))
    plain = dataclasses.replace(SETTINGS, gamma=0.0, features=None)
    whole, tiles = (made(kind, codec, image, plain) for kind in (Batch, LargeImage))
    expected = whole.score(whole.start, whole.images, PLAIN).mse
    found = tiles.score(tiles.start, tiles.images, PLAIN).mse
    elsewhere = tiles.images._replace(noise_origin=jnp.array([[3, 3]]))
    other = tiles.score(tiles.start, elsewhere, PLAIN).mse
    assert found == pytest.approx(expected, rel=1e-5)
    assert other != pytest.approx(expected, rel=1e-4)


def test_the_curvature_is_that_of_the_whole_image(pair):
    """It is estimated with other random signs."""
    whole, tiles = pair
    found = []
    for one in pair:
        problem = one._problem(one.target, one.rng)
        found.append(np.asarray(one.curvature(problem, jnp.round(one.start[0]))))
    expected, of_tiles = (np.mean(part[0], axis=2) for part in found)
    assert of_tiles.mean() == pytest.approx(expected.mean(), rel=0.05)
    rows, columns = (-(-side // 16) for side in SIZE)
    inside = np.s_[:rows, :columns]
    ratio = of_tiles[inside] / expected[inside]
    assert np.abs(np.log(ratio)).mean() < 0.5


def test_files_are_better_at_no_more_bytes(mini_codec, image):
    seen = []
    unrefined = mini_codec.compress(image, quality=0.5)
    found = refinement.refine(
        mini_codec, image, quality=0.5, settings=SETTINGS, progress=seen.append
    )
    assert len(found.data) <= len(unrefined)
    assert found.value < 0.99 * found.unrefined_value
    assert [now.step for now in seen] == [1, 2, 3, 4]
    assert mini_codec.decompress(found.data).shape == image.shape
    # Judged by the whole image it is better too.
    judge = made(Batch, mini_codec, image)
    ((better, start),) = judge.decoded_values([[found.data, unrefined]])
    assert better < 0.99 * start


def test_regions_count_in_tiles(mini_codec, image):
    mask = np.zeros(SIZE, np.float32)
    mask[280:] = 1
    region = refinement.Region(mask, foreground=0.95, background=0.05)
    settings = dataclasses.replace(SETTINGS, alpha=0.1)
    errors = []
    for own in (None, region):
        found = refinement.refine(
            mini_codec, image, quality=0.5, settings=settings, region=own
        )
        difference = mini_codec.decompress(found.data).astype(float) - image
        errors.append(np.mean(difference[280:] ** 2))
    assert errors[1] < 0.95 * errors[0]


def test_large_images_are_refined_one_by_one(mini_codec, image, monkeypatch):
    kinds = []

    def watched(batch, progress):
        kinds.append((type(batch), len(batch.jobs)))
        return [None] * len(batch.jobs)

    module = sys.modules["semlic_jax.refinement.refine"]  # the function hides it
    monkeypatch.setattr(module, "_refine_together", watched)
    settings = dataclasses.replace(SETTINGS, steps=1)
    budget = len(mini_codec.compress(image, quality=0.5))
    refinement.refine_batch(
        mini_codec, [image] * 2, max_bytes=[budget] * 2, settings=settings
    )
    assert kinds == [(LargeImage, 1)] * 2
    relaxed = dataclasses.replace(settings, method="sga")
    refinement.refine(mini_codec, image, quality=0.5, settings=relaxed)
    part = image[:256, :256]
    refinement.refine(mini_codec, part, quality=0.5, settings=settings)
    assert kinds[2:] == [(Batch, 1)] * 2


def test_without_room_for_all_at_once_it_goes_on_in_tiles(
    mini_codec, image, monkeypatch
):
    left = iter([1])
    monkeypatch.setattr(memory, "available_bytes", lambda: next(left, None))
    monkeypatch.setattr(large, "_MOST_PIXELS", 2**30)
    settings = dataclasses.replace(SETTINGS, steps=1)
    with pytest.warns(refinement.RefinementWarning, match="continuing in tiles"):
        found = refinement.refine(mini_codec, image, quality=0.5, settings=settings)
    assert found.steps == 1


def test_tiles_that_have_no_room_are_refused(mini_codec, image, monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "available_bytes", lambda: asked.append(1) or 1)
    with pytest.raises(MemoryError, match=r"refining \d+ pixels .* found 0.0 GiB"):
        refinement.refine(mini_codec, image, quality=0.5, settings=SETTINGS)
    assert len(asked) == 1  # it is large: not tried at once


def test_folders_keep_each_large_image_when_it_is_done(mini_codec, image, tmp_path):
    paths = [tmp_path / f"{name}.png" for name in "ab"]
    for path in paths:
        Image.fromarray(image).save(path)
    relaxed = dataclasses.replace(SETTINGS, method="sga")
    for settings, groups in ((SETTINGS, [[paths[0]], [paths[1]]]), (relaxed, [paths])):
        found = folder._batches(paths, 16, mini_codec, settings, folder.Report())
        assert found == groups
