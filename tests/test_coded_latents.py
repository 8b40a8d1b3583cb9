# SPDX-License-Identifier: Apache-2.0
"""Latents that become files: what is coded and shown, and the search for a budget."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from semlic_jax.model.context import MEAN_STEPS
from semlic_jax.refinement import fit
from semlic_jax.refinement.fit import fit_files
from semlic_jax.refinement.jobs import Job
from semlic_jax.refinement.objective import Frozen, Images, Static, equal_weights
from semlic_jax.refinement.symbols import Rounding, look_up

LEVEL = 128
SIZE = (40, 30)  # 3 x 2 of the latents of its bucket, which has 4 x 4
PLAIN = Rounding(jnp.zeros(1))

pytestmark = pytest.mark.usefixtures("quick_to_compile")


@pytest.fixture(scope="module")
def frozen(mini_codec):
    static = Static(mini_codec.config, "newton", False, False, False, padded=True)
    tables = (mini_codec.entropy.y_tables, mini_codec.entropy.z_tables)
    bits = [jnp.asarray(table.bits_lookup()[0]) for table in tables]
    return Frozen(mini_codec.twin_params(), *bits, features=None, static=static)


def images_of(sizes, padded=(64, 64)):
    x = np.zeros((len(sizes), *padded, 3), np.float32)
    weights = jnp.asarray(equal_weights(x, sizes))
    quality = jnp.full(len(sizes), np.float32(LEVEL) / 255)
    return Images(x, jnp.array(sizes, jnp.int32), quality, weights, weights)


def test_only_latents_of_the_image_are_coded(mini_codec, frozen):
    """In a bucket with rows and columns of all latents to spare, as large ones have."""
    rng = np.random.default_rng(0)
    config = mini_codec.config
    y = 3 * rng.standard_normal((8, 8, config.groups[0] + config.groups[1]))
    z = 3 * rng.standard_normal((2, 2, config.hyper_channels))
    y, z = y.astype(np.float32), z.astype(np.float32)
    bits, y_hat = fit.coded_latents(
        frozen, images_of([SIZE], (128, 128)), PLAIN, y[None], z[None]
    )
    symbols = mini_codec.entropy.symbols(y, z, LEVEL, SIZE)
    ideal = mini_codec.entropy.ideal_bits(symbols, SIZE)
    assert float(bits[0]) == pytest.approx(ideal, rel=1e-5)
    expected = symbols.y + symbols.mean_steps / MEAN_STEPS
    inside = np.s_[:3, :2]
    np.testing.assert_allclose(y_hat[0][inside], expected[inside], atol=1e-5)


def test_what_is_shown_is_what_the_decoder_shows(mini_codec, frozen, photograph):
    """Up to the edge of the image, in colours beyond white and black too."""
    image = photograph(*SIZE, seed=3)
    image[:20] = 255
    image[20:, :12] = 0
    y, z = mini_codec.scaled(mini_codec.analyse(image), LEVEL)
    y = y + 0.5 * np.random.default_rng(0).standard_normal(y.shape).astype(np.float32)
    images = images_of([SIZE])
    _, y_hat = fit.coded_latents(frozen, images, PLAIN, y[None], z[None])
    shown = np.asarray(fit.shown_image(frozen, images, y_hat))
    symbols = mini_codec.entropy.symbols(y, z, LEVEL, SIZE)
    data = mini_codec.encode_symbols(symbols, LEVEL, SIZE)
    decoded = mini_codec.decompress(data).astype(np.float32)
    assert (decoded == 255).any() and (decoded == 0).any()
    found = 255 * shown[0, : SIZE[0], : SIZE[1]]
    np.testing.assert_allclose(found, decoded, atol=0.51)


def test_symbols_beyond_the_tables_cost_what_their_last_ones_do():
    bits = jnp.arange(10, dtype=jnp.float32).reshape(2, 5)  # of -2 to 2
    symbols = jnp.array([-9.0, -3.0, -2.0, 0.0, 2.0, 3.0, 1e6])
    np.testing.assert_array_equal(
        look_up(bits, jnp.float32(1), symbols), [5, 5, 5, 7, 9, 9, 9]
    )


# The search for the file of a budget.


@pytest.fixture(scope="module")
def search(mini_codec, frozen, photograph):
    """Function (changes of the budgets, claimed bytes) -> files, and those at first.

    It looks for the largest file of each of three images. Those at first are of a
    strictness of 0; budgets are changed from their sizes, and the first search aims at
    so many bytes more than a budget has room for.
    """
    sizes = [(56, 64), (50, 64), (56, 64)]
    pixels = [photograph(*size, seed=seed) for seed, size in enumerate(sizes)]
    profiles = [None, None, 300 * b"p"]
    latents = []
    for i, image in enumerate(pixels):
        y, z = mini_codec.scaled(mini_codec.analyse(image), LEVEL)
        latents.append((y, jnp.full_like(z, i)))  # z would be 0 everywhere
    start, overhead_bits = [], []
    for (y, z), size, profile in zip(latents, sizes, profiles, strict=True):
        symbols = mini_codec.entropy.symbols(y, z, LEVEL, size)
        start.append(mini_codec.encode_symbols(symbols, LEVEL, size, profile))
        ideal_bits = mini_codec.entropy.ideal_bits(symbols, size)
        overhead_bits.append(8 * len(start[-1]) - ideal_bits)
    latents = [jnp.stack(parts) for parts in zip(*latents, strict=True)]
    unrefined = [mini_codec.compress(image, quality=0.0) for image in pixels]

    def found(changes, claimed_bytes=0):
        budgets = np.add([len(data) for data in start], changes)
        jobs = [
            Job(
                size=size,
                level=LEVEL,
                budget_bytes=int(budget),
                payload_bits=8.0 * (budget + claimed_bytes) - bits,
                icc_profile=profile,
                unrefined=data,
            )
            for size, budget, bits, profile, data in zip(
                sizes, budgets, overhead_bits, profiles, unrefined, strict=True
            )
        ]
        fitted = fit_files(
            mini_codec,
            frozen,
            images_of(sizes),
            latents,
            lambda strictness: Rounding(jnp.asarray(strictness, jnp.float32)),
            lambda files: [[-float(len(data)) for data in own] for own in files],
            jobs,
        )
        for one, data in zip(fitted, unrefined, strict=True):
            assert (one.value, one.unrefined_value) == (-len(one.data), -len(data))
        return [one.data for one in fitted], start

    return found


def room(files, start, changes):
    """The bytes that files leave of their budgets."""
    sizes = ([len(data) for data in group] for group in (start, files))
    return np.subtract(*sizes) + changes


def test_files_fill_their_budgets_from_below(search, mini_codec):
    """Smaller than at first, as large, and larger; with a profile or without."""
    for changes in ([-12, -1, 8], [8, -12, -6], [-1, 6, -25]):
        files, start = search(changes)
        left = room(files, start, changes)
        assert (left >= 0).all() and (left <= 3).all(), (changes, left)
        assert [mini_codec.info(data)["icc_profile_bytes"] for data in files] == [
            0,
            0,
            300,
        ]


def test_budgets_may_be_spent_to_the_last_byte(search):
    files, start = search([0, 0, 0])
    assert [len(data) for data in files] == [len(data) for data in start]


def test_budgets_with_less_room_than_it_seemed_are_met(search):
    """What a stream takes besides its symbols is an estimate of another file's."""
    changes = [-12, -8, -10]
    files, start = search(changes, claimed_bytes=4)
    left = room(files, start, changes)
    assert (left >= 0).all() and (left <= 6).all(), left


def test_files_of_a_batch_have_the_latents_of_their_own_images(search, mini_codec):
    files, start = search([0, 0, 0])
    for found, expected in zip(files, start, strict=True):
        np.testing.assert_array_equal(*map(mini_codec.decompress, (found, expected)))
