# SPDX-License-Identifier: Apache-2.0
"""The objective of Newton steps as a sum of squares, and its curvature."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageFilter
from refining import PERCEPTUAL, SIZE, fixed, new_batch

from semlic_jax.objectives import style_losses
from semlic_jax.objectives.lattice import lattice, repeated_part, visibility
from semlic_jax.objectives.similarity import ms_ssim
from semlic_jax.refinement import newton
from semlic_jax.refinement.objective import (
    decoded_image,
    equal_weights,
    image_terms,
    objective_residuals,
)
from semlic_jax.refinement.structure import (
    lattice_residuals,
    lattice_weights,
    structure_residuals,
    structure_weights,
)

terms_of_image = jax.jit(image_terms)
NO_BITS = jnp.zeros(1)


@pytest.fixture(scope="module")
def perceptual(mini_codec, photograph):
    """Of an image beside which the trunk sees something else."""
    return new_batch(mini_codec, photograph(SIZE[0], SIZE[1] - 10, seed=3), PERCEPTUAL)


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
