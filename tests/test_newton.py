# SPDX-License-Identifier: Apache-2.0
"""Refinement by Newton steps: budgets, curvature, choice of symbols, gradients."""

from __future__ import annotations

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageFilter
from small_trunk import load_small_trunk

from semlic_jax import cli, refinement
from semlic_jax.model.context import checkerboard
from semlic_jax.objectives import style_losses
from semlic_jax.objectives.lattice import lattice, repeated_part, visibility
from semlic_jax.objectives.similarity import ms_ssim
from semlic_jax.refinement import fit, newton
from semlic_jax.refinement.batch import Batch
from semlic_jax.refinement.objective import (
    decoded_image,
    equal_weights,
    image_terms,
    objective_residuals,
)
from semlic_jax.refinement.settings import METHODS
from semlic_jax.refinement.steps import Target, rate_excess
from semlic_jax.refinement.structure import (
    lattice_residuals,
    lattice_weights,
    structure_residuals,
    structure_weights,
)
from semlic_jax.refinement.symbols import Rounding, chosen_symbols, hard_latents

# One size for all: an image that does not fill its bucket, so that masks matter.
SIZE = (56, 64)
SETTINGS = refinement.preset(
    12, gamma=0.0, chunk_steps=4, method="newton", noise=0.5, probes=2
)
PERCEPTUAL = dataclasses.replace(
    SETTINGS,
    alpha=1e-4,
    gamma=1.0,
    structure=1.0,
    lattice=1.0,
    features=load_small_trunk(),
)


@pytest.fixture(scope="module")
def image(photograph):
    return photograph(*SIZE, seed=3)


@pytest.fixture(scope="module")
def refined(mini_codec, image):
    """A refinement that others are compared with."""
    return refinement.refine(mini_codec, image, quality=0.5, settings=SETTINGS)


def new_batch(codec, image, settings=SETTINGS, less_bytes=0):
    unrefined = codec.compress(image, quality=0.5)
    budget = len(unrefined) - less_bytes
    return Batch(codec, settings, [image], [budget], [None], [None], [unrefined])


@pytest.fixture(scope="module")
def batch(mini_codec, photograph):
    """Of an image without latents in the last row."""
    return new_batch(mini_codec, photograph(SIZE[0] - 16, SIZE[1], seed=3))


@pytest.fixture(scope="module")
def perceptual(mini_codec, photograph):
    """Of an image beside which the trunk sees something else."""
    return new_batch(mini_codec, photograph(SIZE[0], SIZE[1] - 10, seed=3), PERCEPTUAL)


terms_of_image = jax.jit(image_terms)
NO_BITS = jnp.zeros(1)


def fixed(made):
    """What the functions of a batch's objective take first."""
    return made.frozen, made.images, made.weights


# Whole refinements.


def test_files_are_better_at_no_more_bytes(mini_codec, image, refined):
    assert len(refined.data) <= len(refined.unrefined)
    assert refined.value < 0.99 * refined.unrefined_value
    decoded = mini_codec.decompress(refined.data).astype(float)
    mse = np.mean((decoded - image) ** 2)
    assert SETTINGS.alpha * mse == pytest.approx(refined.value, rel=1e-4)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0, 1.5])
def test_never_over_budget_and_never_worse(mini_codec, image, share, steps):
    """Also where the budget is not what a quality gives, and with hardly any steps."""
    smallest = len(mini_codec.compress(image, quality=0))
    largest = len(mini_codec.compress(image, quality=1))
    budget = round(smallest + share * (largest - smallest))
    settings = dataclasses.replace(SETTINGS, steps=steps)
    found = refinement.refine(mini_codec, image, max_bytes=budget, settings=settings)
    assert len(found.data) <= budget
    assert found.value <= found.unrefined_value


def test_harm_is_not_passed_on(mini_codec, image):
    """Steps that ruin the latents leave the file without refinement."""
    ruinous = dataclasses.replace(SETTINGS, kappa=1e-4, z_travel=300.0)
    found = refinement.refine(mini_codec, image, quality=0.5, settings=ruinous)
    assert found.value <= found.unrefined_value
    assert len(found.data) <= len(found.unrefined)


def test_the_same_seed_gives_the_same_file(mini_codec, image, refined):
    again = refinement.refine(mini_codec, image, quality=0.5, settings=SETTINGS)
    assert again.data == refined.data
    other = dataclasses.replace(SETTINGS, seed=1)
    found = refinement.refine(mini_codec, image, quality=0.5, settings=other)
    assert found.history != refined.history


def test_stopping_keeps_the_best_so_far(mini_codec, image, refined):
    seen = []

    def stop(now):
        seen.append(now)
        return False

    found = refinement.refine(
        mini_codec, image, quality=0.5, settings=SETTINGS, progress=stop
    )
    assert [now.step for now in seen] == [4] and seen[0].steps == 12
    assert found.steps == 4 and refined.steps == 12
    assert found.value <= found.unrefined_value
    assert len(found.data) <= len(found.unrefined)
    assert found.history == refined.history[:1]
    assert found.history[0]["value"] == pytest.approx(seen[0].value[0])


def test_perceptual_terms_count(mini_codec, image):
    found = refinement.refine(mini_codec, image, quality=0.5, settings=PERCEPTUAL)
    assert found.value < 0.99 * found.unrefined_value
    assert len(found.data) <= len(found.unrefined)


def test_budgets_of_hardly_any_payload(mini_codec, image):
    """What streams take besides their symbols leaves no rate below 0 to aim at."""
    usual = new_batch(mini_codec, image)
    less_bytes = int(usual.jobs[0].payload_bits / 8)
    made = new_batch(mini_codec, image, less_bytes=less_bytes)
    assert 0 <= made.jobs[0].payload_bits < 8
    stepper = made.stepper()
    stepper(2)
    for leaf in jax.tree.leaves(stepper.state._replace(best=None)):
        assert np.isfinite(np.asarray(leaf)).all()


@pytest.mark.slow
def test_images_of_a_batch_are_refined_as_alone(mini_codec, photograph):
    settings = dataclasses.replace(SETTINGS, z_travel=3.0)
    images = [photograph(*SIZE, seed=3), photograph(40, 50, seed=4)]
    budgets = [
        len(mini_codec.compress(image, quality=quality))
        for image, quality in zip(images, (0.4, 0.8), strict=True)
    ]
    together = refinement.refine_batch(
        mini_codec, images, max_bytes=budgets, settings=settings
    )
    for image, budget, found in zip(images, budgets, together, strict=True):
        alone = refinement.refine(
            mini_codec, image, max_bytes=budget, settings=settings
        )
        assert len(found.data) <= budget and found.unrefined == alone.unrefined
        assert found.value == pytest.approx(alone.value, rel=1e-3)
        for a, b in zip(found.history, alone.history, strict=True):
            assert a == pytest.approx(b, rel=1e-3)


def test_the_best_is_kept_as_it_was(batch, monkeypatch):
    """Each improvement is within the budget, and worth what the state says."""
    stepper, values = batch.stepper(), []
    for _ in range(SETTINGS.steps):
        stepper(1)
        best = stepper.state.best
        values.append(float(best.value[0]))
        if np.isfinite(values[-1]):
            rounding = Rounding(jnp.zeros(1), best.stiffness)
            terms, _ = fit.score(*fixed(batch), rounding, *best.latents)
            assert float(terms.value[0]) == pytest.approx(values[-1], rel=1e-5)
            assert terms.bpp[0] <= batch.target.bpp[0] * (1 + 1e-6)
    assert values[0] == np.inf  # noise in the choice of symbols
    assert values == sorted(values, reverse=True) and len(set(values)) > 2
    # Rounded as then, not as today's latents are; they give way where they are worse.
    state, (y, z) = stepper.state, stepper.state.latents
    kept = batch.keep_within_budget(state._replace(latents=(y + 0.5, z)))
    assert kept.value[0] == pytest.approx(values[-1], rel=1e-5)
    np.testing.assert_array_equal(batch.best[0], state.best.latents[0])
    np.testing.assert_array_equal(batch.best_rounding.stiffness, state.best.stiffness)
    # And an early one to later ones, even where these are just beyond the budget.
    bpp = batch.score(state.latents, batch.images, batch._rounding(state)).bpp
    near = batch.target._replace(bpp=bpp / 1.001)
    monkeypatch.setattr(batch, "target", near)
    early = state.best._replace(
        latents=batch.start, value=jnp.full(1, 1e9), stiffness=0.01 * state.curvature
    )
    batch.keep_within_budget(state._replace(best=early))
    np.testing.assert_array_equal(batch.best[0], y)


def test_with_a_trunk_the_last_latents_count(mini_codec, image):
    """A view with low distances must not hold what later steps have bettered."""
    settings = dataclasses.replace(PERCEPTUAL, noise=0.0)
    batch = new_batch(mini_codec, image, settings)
    assert batch.run(None) == settings.steps
    stepper = batch.stepper()
    for _ in range(3):
        stepper(settings.steps // 3)
    for kept, last in zip(batch.best, stepper.state.latents, strict=True):
        np.testing.assert_array_equal(kept, last)


def test_regions_start_from_finer_quantisers(mini_codec, image):
    """The more so the more a pixel of the region weighs, and not where all weigh 1."""
    mask = np.zeros(SIZE, np.float32)
    mask[:, :16] = 1
    unrefined = mini_codec.compress(image, quality=0.4)
    weights = ((0.25, 0.75), (0.5, 0.5), (0.9, 0.1), (0.99, 0.01), (1.0, 0.0))
    regions = [None] + [refinement.Region(mask, *pair) for pair in weights]
    levels = [
        Batch(
            mini_codec,
            SETTINGS,
            [image],
            [len(unrefined)],
            [region],
            [None],
            [unrefined],
        )
        .jobs[0]
        .level
        for region in regions
    ]
    assert levels[0] == levels[1] < levels[2] < levels[3] == levels[4] == levels[5]


# The curvature.


@pytest.fixture(scope="module")
def blurred(perceptual):
    """x_hat near the image, other pixels beyond it too: float32 [1, 64, 64, 3]."""
    rng = np.random.default_rng(0)
    noise = 0.05 * rng.standard_normal(perceptual.images.x.shape)
    return jnp.clip(perceptual.images.x + noise.astype(np.float32), 0, 1)


def test_residuals_add_up_to_the_objective(perceptual, blurred):
    assert perceptual.frozen.static.padded and perceptual.frozen.static.perceptual
    assert perceptual.frozen.static.mean_style
    known = fixed(perceptual)[:-1]
    weights = perceptual.weights._replace(mean_style=jnp.float32(0))
    terms = terms_of_image(*known, weights, NO_BITS, blurred)
    parts = jax.jit(objective_residuals)(*known, weights, blurred)
    pixels, features, *scales, pattern = (float(jnp.sum(part**2)) for part in parts)
    structure = sum(scales)
    assert pixels == pytest.approx(PERCEPTUAL.alpha * float(terms.mse[0]), rel=1e-4)
    assert features == pytest.approx(float(terms.perceptual[0]), rel=1e-4)
    total = pixels + features + structure + pattern
    assert total == pytest.approx(float(terms.value[0]), rel=1e-4)
    assert 0.1 < features / pixels < 10 and 0.1 < structure / pixels < 10
    assert 0.01 < pattern / pixels < 10


def test_mean_style_is_in_the_objective_and_counts_where_pixels_do(perceptual, blurred):
    def value(images, weight):
        weights = perceptual.weights._replace(mean_style=jnp.float32(weight))
        frozen = perceptual.frozen
        found = terms_of_image(frozen, images, weights, NO_BITS, blurred)
        return float(found.value[0])

    images = perceptual.images
    whole = value(images, 3.0) - value(images, 0.0)
    height, width = SIZE[0], SIZE[1] - 10
    views = (image[:, :height, :width] for image in (images.x, blurred))
    taps = [perceptual.frozen.features.apply(view) for view in views]
    expected = 3 * float(style_losses.local_mean_style(*taps, (height, width))[0])
    assert whole == pytest.approx(expected, rel=0.1)  # views end elsewhere
    # The upper half is as in the original, and the lower one does not matter.
    upper = jnp.arange(images.x.shape[1])[None, :, None] < SIZE[0] // 2
    halved = images._replace(feature_weights=images.feature_weights * upper)
    mixed = jnp.where(upper[..., None], images.x, blurred)
    frozen, _, weights = fixed(perceptual)
    zero = jnp.float32(0)
    only = weights._replace(alpha=zero, structure=zero, lattice=zero)
    near = terms_of_image(frozen, halved, only, NO_BITS, mixed)
    far = terms_of_image(frozen, images, only, NO_BITS, mixed)
    assert near.value[0] - near.perceptual[0] < 0.1 * (far.value[0] - far.perceptual[0])


def test_structure_is_that_of_ms_ssim(photograph):
    """Of an image that does not fill its bucket: padding counts for nothing."""
    size, padded = (180, 170), (192, 192)
    image = photograph(*size, seed=5)
    softer = Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.8))
    rng = np.random.default_rng(0)
    noisy = image + 6 * rng.standard_normal(image.shape)
    pads = [(0, big - own) for big, own in zip(padded, size, strict=True)]
    x = np.pad(image, (*pads, (0, 0)), mode="edge")[None].astype(np.float32) / 255
    weights = equal_weights(x, [size])
    structure = jax.jit(structure_weights, static_argnums=2)(x, weights, (size,))
    residuals = jax.jit(structure_residuals)
    similarity = jax.jit(ms_ssim)
    for changed in (np.asarray(softer, float), noisy):
        x_hat = rng.random(x.shape, np.float32)  # beyond the image, anything
        x_hat[0, : size[0], : size[1]] = changed / 255
        parts = residuals(x, x_hat, weights, structure)
        found = sum(float(jnp.sum(part**2)) for part in parts)
        distance = 1 - float(similarity(image[None] / 255, changed[None] / 255)[0])
        assert found == pytest.approx(distance, rel=0.25)


def lattice_by_rows(x, x_hat):
    """The share of each row of windows in the lattice term of an image."""
    shape = {"period": 16, "tiles": 2}
    energy = jnp.mean(jnp.square(repeated_part(x_hat - x, **shape)), (3, 4))
    terms = (energy * visibility(x, **shape))[0]
    return np.asarray(jnp.sum(terms, 1) / terms.size, float)


def test_lattice_is_that_of_the_image(photograph):
    """Padding counts for nothing, and a region by its weight."""
    size, padded = (112, 100), (128, 128)
    image = photograph(*size, seed=5)
    pads = [(0, big - own) for big, own in zip(padded, size, strict=True)]
    x = np.pad(image, (*pads, (0, 0)), mode="edge")[None].astype(np.float32) / 255
    rng = np.random.default_rng(0)
    x_hat = rng.random(x.shape, np.float32)  # beyond the image, anything
    weave = np.tile(rng.normal(size=(16, 16, 3)) / 20, (8, 8, 1)).astype(np.float32)
    inside = np.s_[:, : size[0], : size[1]]
    x_hat[inside] = (x + weave)[inside]
    sizes = np.array([size])

    def found(weights):
        windows = jax.jit(lattice_weights)(x, weights, sizes)
        parts = jax.jit(lattice_residuals)(x, x_hat, windows)
        return float(jnp.sum(parts**2))

    equal = equal_weights(x, [size])
    whole = found(equal)
    assert whole == pytest.approx(
        float(lattice(x[inside], x_hat[inside], tiles=2)[0]), rel=1e-4
    )
    assert found(3 * equal) == pytest.approx(3 * whole, rel=1e-4)
    upper = equal * np.where(np.arange(padded[0]) < 48, 0.9, 0.1)[:, None]
    most = found(upper.astype(np.float32))
    rest = found((equal - upper).astype(np.float32))
    assert most + rest == pytest.approx(whole, rel=1e-4)
    # Two rows of windows lie in the upper part, one half, three below.
    image_rows = lattice_by_rows(x[inside], x_hat[inside])
    assert most == pytest.approx(image_rows @ [0.9, 0.9, 0.5, 0.1, 0.1, 0.1], rel=1e-3)
    # An image under a window has no such term.
    tiny = np.array([(31, 100)])
    assert float(jnp.sum(jax.jit(lattice_weights)(x, equal, tiny))) == 0


def exact_diagonal(made, y_hat):
    """Twice the squares of the columns of the Jacobian, [h, w, M], one by one."""
    frozen, images, weights = fixed(made)

    @jax.jit
    def residuals(y):
        x_hat = decoded_image(frozen, images, y.reshape(y_hat.shape))
        return objective_residuals(frozen, images, weights, x_hat)

    made, pull_back = jax.vjp(residuals, y_hat.ravel())
    push = jax.jit(jax.linear_transpose(pull_back, made))

    def column(direction):
        (moved,) = push((direction,))
        return 2 * sum(np.sum(np.square(part)) for part in moved)

    columns = [column(row) for row in np.eye(y_hat.size, dtype=np.float32)]
    return np.array(columns).reshape(y_hat.shape[1:])


def test_the_curvature_is_that_of_the_objective(perceptual):
    """Many copies of an image, each with signs of its own."""
    copies = 64
    y_hat = jnp.round(perceptual.start[0])
    images = perceptual.images
    many = jax.tree.map(lambda x: jnp.repeat(x, copies, 0), images._replace(taps=()))
    many = many._replace(taps=tuple(jnp.repeat(t, copies, 1) for t in images.taps))
    keys = jax.random.split(jax.random.key(0), copies)
    frozen, _, weights = fixed(perceptual)
    found = newton.diagonal_of(
        frozen, many, weights, jnp.repeat(y_hat, copies, 0), keys, 2
    )
    assert len(np.unique(found, axis=0)) == copies
    mean = np.mean(found, 0)
    exact = exact_diagonal(perceptual, y_hat)
    assert mean.sum() == pytest.approx(exact.sum(), rel=0.03)
    inside = exact > 1e-3 * exact.mean()
    # The mean of 128 squares of about normal numbers deviates by 1/8.
    deviations = mean[inside] / exact[inside] - 1
    assert np.abs(deviations.mean()) < 0.03 and deviations.std() < 0.16
    assert inside.mean() > 0.8


def test_the_smoothed_curvature():
    rng = np.random.default_rng(0)
    diagonal = rng.gamma(0.5, size=(2, 3, 5, 4)).astype(np.float32)
    diagonal[1, 2] = 0  # beyond the image
    found = np.asarray(newton.smoothed(jnp.asarray(diagonal)))
    assert found.shape == diagonal.shape and (found > 0).all()
    for made, image in zip(found, diagonal, strict=True):
        # The matrix [positions, channels] has rank 1 and keeps the image's total.
        assert np.linalg.matrix_rank(made.reshape(-1, 4), tol=1e-4 * made.max()) == 1
        assert made.sum() == pytest.approx(image.sum(), rel=0.01)
    # What is a product already stays, but for what keeps it above 0.
    product = rng.gamma(2, size=(1, 3, 5, 1)) * rng.gamma(2, size=(1, 1, 1, 4))
    kept = newton.smoothed(jnp.asarray(product, jnp.float32))
    np.testing.assert_allclose(kept, product, rtol=0.05)


# The choice of symbols.


@pytest.fixture(scope="module")
def latents():
    """Offsets from means, indexes of tables: each [1, 8, 8, 24]."""
    rng = np.random.default_rng(1)
    shape = (1, 8, 8, 24)
    v = rng.uniform(-2.45, 2.45, shape).astype(np.float32)
    return v, rng.integers(0, 64, shape).astype(np.float32)


def test_symbols_are_those_of_least_cost(batch, latents):
    """Within reach: up to 2 every whole number towards zero is a candidate."""
    v, index = latents
    y_bits = np.asarray(batch.frozen.y_bits)
    radius = y_bits.shape[1] // 2
    rng = np.random.default_rng(2)
    stiff = np.exp(rng.uniform(-2, 4, v.shape)).astype(np.float32)
    rounding = Rounding(jnp.zeros(1), jnp.asarray(stiff))
    parts = []
    for channels in (slice(0, 8), slice(8, 24)):
        part = v[..., channels], index[..., channels]
        made = chosen_symbols(*part, channels, rounding, batch.frozen.y_bits)
        assert made.dtype == np.float32
        parts.append(np.asarray(made))
    found = np.concatenate(parts, -1)
    every = np.arange(-radius, radius + 1)
    costs = stiff[..., None] / 2 * (every - v[..., None]) ** 2
    costs = costs + y_bits[index.astype(int)]
    least = every[np.argmin(costs, -1)]
    taken = np.take_along_axis(costs, (found[..., None] + radius).astype(int), -1)
    np.testing.assert_allclose(taken[..., 0], costs.min(-1), rtol=1e-5)
    assert (found == least).mean() > 0.999
    assert 0.1 < (found == np.round(v)).mean() < 0.9


def test_an_offset_is_the_cost_of_the_neighbour(batch, latents):
    v, index = latents
    rounding = Rounding(jnp.zeros(1), jnp.full(v.shape, 2.0))

    def choose(offset):
        return np.asarray(
            chosen_symbols(
                v,
                index,
                slice(None),
                rounding,
                batch.frozen.y_bits,
                jnp.full(v.shape, offset),
            )
        )

    plain = chosen_symbols(v, index, slice(None), rounding, batch.frozen.y_bits)
    np.testing.assert_array_equal(choose(0.0), plain)
    nearest = np.round(v)
    neighbour = nearest - np.where(nearest == 0, -np.sign(v), np.sign(nearest))
    np.testing.assert_array_equal(choose(-1e3), neighbour)
    # Zero costs what it costs.
    assert set(np.unique(choose(1e3) - nearest)) <= {-2, -1, 0, 1, 2}
    assert ((choose(1e3) == nearest) | (choose(1e3) == 0)).all()


@pytest.mark.parametrize("zone", [-0.2, 0.0, 0.3])
def test_without_stiffness_there_is_a_dead_zone(batch, latents, zone):
    v, index = latents
    found = chosen_symbols(
        v, index, slice(None), Rounding(jnp.full(1, zone)), batch.frozen.y_bits
    )
    whole, rest = np.divmod(np.abs(v), 1)
    wanted = np.sign(v) * (whole + (rest > 0.5 + zone))
    clear = np.abs(rest - 0.5 - zone) > 1e-4
    np.testing.assert_array_equal(np.asarray(found)[clear], wanted[clear])


def test_strictness_lowers_the_rate(batch):
    batch.run(None)
    rates = [
        float(
            fit.score(*fixed(batch), batch._rounding_at(np.array([s])), *batch.best)[
                0
            ].bpp[0]
        )
        for s in (-0.2, -0.1, 0.0, 0.1, 0.45)
    ]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.9 * rates[0]
    # At 0 they are as the refinement left them.
    assert rates[2] == pytest.approx(batch.history[-1]["bpp"][0], rel=1e-6)


# One step.


@pytest.fixture(scope="module")
def rounding(batch):
    y, _ = batch.start
    stiff = np.exp(np.random.default_rng(0).uniform(-1, 2, y.shape))
    return Rounding(jnp.zeros(1), jnp.asarray(stiff, jnp.float32))


hard_step_terms = jax.jit(newton.hard_step_terms)


def test_rates_in_the_step_are_those_of_the_coder(batch, rounding):
    y, z = batch.start
    terms, y_hat, bits = hard_step_terms(
        *fixed(batch), y, z, rounding, jnp.zeros_like(y), jnp.int32(0)
    )
    frozen, images, _ = fixed(batch)
    hard_bits, hard_y_hat = jax.jit(hard_latents)(frozen, images, rounding, y, z)
    np.testing.assert_allclose(y_hat, hard_y_hat, atol=1e-5)
    assert float(bits[0]) == pytest.approx(float(hard_bits[0]), rel=1e-6)
    hard, _ = fit.score(*fixed(batch), rounding, y, z)
    assert float(terms.value[0]) == pytest.approx(float(hard.value[0]), rel=1e-5)
    # The densities are about those of the tables.
    assert float(terms.bpp[0]) == pytest.approx(float(hard.bpp[0]), rel=0.05)


def test_latents_answer_for_the_bits_of_later_ones(batch, rounding):
    y, z = batch.start

    def rate(y, z):
        terms, _, _ = newton.hard_step_terms(
            *fixed(batch), y, z, rounding, jnp.zeros_like(y), jnp.int32(0)
        )
        return jnp.sum(terms.bpp)

    to_y, to_z = jax.jit(jax.grad(rate, (0, 1)))(y, z)
    start, stop = batch.codec.config.groups[0], y.shape[-1]
    to_y = np.asarray(to_y)[0]
    # What is coded last changes nothing but its own bits.
    second = checkerboard(*y.shape[1:3], 1)[..., 0]
    np.testing.assert_array_equal(to_y[second, start:stop], 0)
    inside = np.zeros(second.shape, bool)
    inside[:-1] = True
    assert (to_y[inside & ~second, :start] != 0).mean() > 0.9
    assert (to_y[inside & ~second, start:stop] != 0).mean() > 0.9
    np.testing.assert_array_equal(to_y[~inside], 0)
    assert (np.asarray(to_z) != 0).any()


@pytest.mark.parametrize("offset", [0.0, 0.4])
def test_steps_are_finite(batch, offset):
    """From latents that are where the coder would put them, and between."""
    plain = Rounding(jnp.zeros(1))
    _, y_hat = fit.score(*fixed(batch), plain, *batch.start)
    state = batch.stepper().state
    latents = (y_hat + offset, jnp.round(batch.start[1]) + offset)
    schedule = newton.make_schedule(SETTINGS)
    part = newton.Schedule(*(values[-1:] for values in schedule))
    target = batch.target._replace(bpp=batch.target.bpp / 2)
    log_beta = np.asarray(state.log_beta)
    made, terms = newton.run_steps(
        *fixed(batch), target, batch.rng, state._replace(latents=latents), part
    )
    for leaf in jax.tree.leaves((made._replace(best=made.best.latents), terms)):
        assert np.isfinite(np.asarray(leaf)).all()
    # Too many bits: they become dearer, and these latents are not kept.
    assert made.log_beta[0] > log_beta[0] + 0.1
    assert made.best.value[0] == np.inf


def test_steps_are_short_where_the_curvature_is_far_too_small(batch):
    state = batch.stepper().state
    state = state._replace(curvature=1e-4 * state.curvature)
    stiffness = newton.stiffness(
        state.curvature, state.log_beta, batch.images, SETTINGS.kappa
    )
    rounding = Rounding(jnp.zeros(1), stiffness)
    _, y_hat = fit.score(*fixed(batch), rounding, *state.latents)
    schedule = newton.make_schedule(SETTINGS)
    part = newton.Schedule(*(values[-1:] for values in schedule))
    part = part._replace(trust=np.ones(1, np.float32))
    assert part.temperature[0] == 0
    made, _ = newton.run_steps(*fixed(batch), batch.target, batch.rng, state, part)
    farthest = np.abs(np.asarray(made.latents[0] - y_hat))
    assert farthest.max() == pytest.approx(1.0, abs=1e-4)
    assert (farthest > 0.999).mean() > 0.1


def test_schedules_end_without_noise():
    schedule = newton.make_schedule(SETTINGS)
    assert schedule.temperature[0] == 0.5 and schedule.temperature[-1] == 0
    alone = newton.make_schedule(dataclasses.replace(SETTINGS, steps=1, noise=0.0))
    assert alone.temperature[0] == 0 and np.isfinite(np.array(alone)).all()


@pytest.mark.parametrize("steps", [1, 2, 20])
def test_rates_of_z_add_up_to_its_travel(steps):
    settings = dataclasses.replace(SETTINGS, steps=steps, z_travel=0.7)
    rates = newton.make_schedule(settings).learning_rate
    assert rates.sum() == pytest.approx(0.7) and (np.diff(rates) < 0).all()


@pytest.mark.parametrize(("steps", "rise", "rising"), [(20, 0.2, 4), (12, 0.25, 3)])
def test_trust_rises_and_then_falls(steps, rise, rising):
    settings = dataclasses.replace(SETTINGS, steps=steps, trust_rise=rise)
    trust = newton.make_schedule(settings).trust
    assert trust[0] == 0 and trust[-1] == pytest.approx(settings.trust_end)
    assert (np.diff(trust[: rising + 1]) > 0).all()
    assert (np.diff(trust[rising:]) < 0).all()
    # It is the same fall, and starts at once where nothing is to rise.
    falling = newton.make_schedule(dataclasses.replace(settings, trust_rise=0.0)).trust
    assert falling[0] == pytest.approx(settings.trust_start)
    np.testing.assert_array_equal(trust[rising:], falling[rising:])
    assert (trust[:rising] < falling[:rising]).all()


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 9])
def test_few_steps_are_all_taken(steps):
    trust = newton.make_schedule(dataclasses.replace(SETTINGS, steps=steps)).trust
    assert trust[0] == pytest.approx(SETTINGS.trust_start) and (trust > 0).all()


def test_more_steps_rise():
    trust = newton.make_schedule(dataclasses.replace(SETTINGS, steps=10)).trust
    assert trust[0] == 0 and 0 < trust[1] < trust[2]


# The command line.


def test_commands(mini_codec, mini_model, image, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkdir("in")
    Image.fromarray(image).save("in/a.png")
    model = ("--model", str(mini_model))
    options = ("--gamma", "0", "--method", "newton", *model)
    command = ["compress", "in/a.png", "a.semlic", "--quality", "0.5", "--refine", "2"]
    assert cli.main([*command, *options]) == 0
    settings = refinement.preset(2, gamma=0.0, method="newton")
    wanted = refinement.refine(mini_codec, image, quality=0.5, settings=settings)
    with open("a.semlic", "rb") as stream:
        assert stream.read() == wanted.data
    command = ["refine", "in", "out", "--bpp", "0.42", "--steps", "2"]
    assert cli.main([*command, *options]) == 0
    assert os.path.getsize("out/a.semlic") * 8 <= 0.42 * image.shape[0] * image.shape[1]
    capsys.readouterr()
    for command in ("compress", "refine"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        shown = capsys.readouterr().out.replace("\n", " ")
        assert all(method in shown for method in METHODS)


def test_a_step_changes_multiplier_and_z_within_bounds():
    """The multiplier rises above the target and falls below; z moves by few rates."""
    y, z = jnp.zeros((3, 1, 1, 2)), jnp.zeros((3, 4, 5, 5))
    state = newton.State((y, z), z, z, jnp.ones_like(y), jnp.zeros(3), None)
    now = newton.Schedule(0, 1.0, 0.0, 0.5, 0.1, 0)
    target = Target(jnp.full(3, 2.0), jnp.ones(3), jnp.float32(3), jnp.float32(0))
    excess = rate_excess(jnp.array([2.2, 1.8, 20.0]), target)
    np.testing.assert_allclose(excess, [np.log(1.1), np.log(0.9), 0.3], rtol=1e-5)
    gradient = z.at[:, 0, 0, 0].set(7.0)  # ten times the root mean square
    found = newton.moved(state, now, (y, gradient), y, excess, target.integral)
    np.testing.assert_allclose(found.log_beta, 3 * np.asarray(excess), rtol=1e-5)
    np.testing.assert_allclose(found.latents[1][:, 0, 0, 0], -0.1 * 4.0, rtol=1e-5)
    assert np.count_nonzero(found.latents[1]) == 3
    even = newton.moved(state, now, (y, z + 7), y, excess, target.integral)
    np.testing.assert_allclose(even.latents[1], -0.1, rtol=1e-5)


@pytest.mark.parametrize("steps", [2, 12, 100])
def test_the_travel_of_z_is_the_sum_of_its_learning_rates(steps):
    settings = dataclasses.replace(SETTINGS, steps=steps, z_travel=0.6)
    rates = newton.make_schedule(settings).learning_rate
    assert rates.sum() == pytest.approx(0.6, rel=1e-5) and rates[-1] == 0
    assert (np.diff(rates) < 0).all()


def test_structure_of_small_images_has_fewer_scales_of_larger_weights(photograph):
    """So the term weighs as much beside the others as for any image."""
    size = (32, 32)
    x = photograph(*size, seed=5)[None].astype(np.float32) / 255
    weights = equal_weights(x, [size])
    found = structure_weights(x, weights, (size,))
    assert len(found) == 3  # of 32, 16 and 8 pixels
    flat = structure_weights(jnp.full_like(x, 0.5), weights, (size,))
    # Of a plain surface, all tolerances are 1 / c.
    total = sum(float(jnp.sum(part)) for part in flat)
    assert total == pytest.approx(1 / (0.03 * 255) ** 2, rel=1e-4)
