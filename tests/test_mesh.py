# SPDX-License-Identifier: Apache-2.0
"""The mesh term sees waves where the original has none, and refinement avoids them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refining import PERCEPTUAL
from scipy.ndimage import gaussian_filter
from waves import grain, wave

from semlic_jax import refinement
from semlic_jax.objectives.spectrum import mesh, mesh_patches
from semlic_jax.refinement.objective import equal_weights
from semlic_jax.refinement.structure import mesh_weights

GRAIN = grain()

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def test_mesh_equals_its_equation():
    rng = np.random.default_rng(2)
    # Faint enough for the floor of noise to matter.
    x = rng.random((2, 100, 84, 3)).astype(np.float32) * 0.02 + 0.4
    x_hat = x + 0.002 * rng.normal(size=x.shape) + wave(5, 12, 0.01, 100)[:, :, :84]
    x_hat = np.float32(x_hat)
    hann = np.outer(*[0.5 - 0.5 * np.cos(2 * np.pi * np.arange(32) / 32)] * 2)
    hann /= np.sqrt((hann**2).mean())
    f = np.fft.fftfreq(32)
    band = np.hypot(f[:, None], f) > 0.1

    def level(pixels, image, row, column):
        powers = []
        for top in range(row, row + 33, 16):
            for left in range(column, column + 33, 16):
                plane = pixels[image, top : top + 32, left : left + 32]
                plane = plane.astype(np.float64) @ [0.299, 0.587, 0.114]
                tapered = (plane - plane.mean()) * hann
                powers.append(np.abs(np.fft.fft2(tapered)) ** 2 / 32**4)
        return np.log(np.mean(powers, 0) + 0.3 / 256**2 / 32**2)

    found = mesh_patches(x, x_hat)
    assert found.shape == (2, 3, 2)
    for image in range(2):
        for row in range(3):
            for column in range(2):
                place = (image, 16 * row, 16 * column)
                d = level(x_hat, *place) - level(x, *place)
                smooth = gaussian_filter(d, 2.5, mode="wrap", truncate=6.0)
                expected = np.mean(np.maximum(d - smooth - 1, 0)[band] ** 2)
                assert expected > 0.001
                assert found[image, row, column] == pytest.approx(expected, 2e-3)
    per_cell = np.sum(found, axis=(1, 2)) * 256 / (100 * 84)
    np.testing.assert_allclose(mesh(x, x_hat), per_cell, rtol=1e-5)


def test_a_wave_is_seen_where_the_original_has_none():
    half = np.where(np.arange(256)[:, None, None] < 128, 1, 0)
    waves = wave(5, 12, 0.04)
    seen = mesh_patches(GRAIN, GRAIN + half * waves)[0]
    assert float(seen[:4].min()) > 0.003
    assert float(seen[9:].max()) == 0
    # The whole image has this wave, but elsewhere.
    moved = mesh_patches(GRAIN + (1 - half) * waves, GRAIN + half * waves)[0]
    assert float(moved[:4].min()) > 0.003
    both = mesh_patches(GRAIN + waves, GRAIN + waves)
    assert float(both.max()) == 0


def test_grain_and_blur_are_no_mesh():
    seen = float(mesh(GRAIN, GRAIN + wave(5, 12, 0.04))[0])
    other = grain(seed=3)
    blurred = np.float32(gaussian_filter(GRAIN, (0, 0.7, 0.7, 0)))
    for harmless in (other, blurred, 0.2 + 0.7 * GRAIN, 2 * GRAIN - 0.5):
        assert float(mesh(GRAIN, harmless)[0]) < 0.02 * seen
    # What is too weak to be seen is none either.
    flat = np.full_like(GRAIN, 0.5)
    assert float(mesh(flat, flat + wave(5, 12, 0.0002))[0]) < 1e-3
    assert float(mesh(flat, flat + wave(5, 12, 0.01))[0]) > 0.01


def test_the_gradient_takes_the_mesh_away():
    made = jnp.asarray(GRAIN + wave(5, 12, 0.04))
    gradient = jax.grad(lambda v: mesh(GRAIN, v).sum())(made)
    assert np.isfinite(gradient).all()
    along = np.sum(np.asarray(gradient) * wave(5, 12, 1.0))
    across = np.sum(np.asarray(gradient) * wave(9, 7, 1.0))
    assert along > 5 * abs(across)
    of_original = jax.grad(lambda v: mesh(v, made).sum())(jnp.asarray(GRAIN))
    np.testing.assert_array_equal(of_original, np.zeros_like(GRAIN))
    flat = jnp.full((1, 64, 64, 3), 0.5)
    assert np.isfinite(jax.grad(lambda v: mesh(flat, v).sum())(flat)).all()


def test_images_under_a_patch_are_refused():
    small = np.zeros((1, 63, 64, 3), np.float32)
    with pytest.raises(ValueError, match="at least 64 pixels, found 63 x 64"):
        mesh(small, small)


def test_weights_are_those_of_the_image():
    """Padding counts for nothing, and a region by its weight."""
    size, padded = (150, 100), (192, 128)
    x = GRAIN[:, : padded[0], : padded[1]]
    x_hat = np.random.default_rng(0).random(x.shape, np.float32)  # beyond: anything
    inside = np.s_[:, : size[0], : size[1]]
    x_hat[inside] = (GRAIN + wave(5, 12, 0.04))[inside]
    sizes = np.array([size])
    patches = mesh_patches(x, x_hat)

    def found(weights):
        return float(jnp.sum(patches * mesh_weights(weights, sizes)))

    equal = equal_weights(x, [size])
    whole = found(equal)
    assert whole == pytest.approx(float(mesh(x[inside], x_hat[inside])[0]), rel=1e-4)
    assert found(3 * equal) == pytest.approx(3 * whole, rel=1e-4)
    upper = equal * np.where(np.arange(padded[0]) < 80, 0.9, 0.1)[:, None]
    # Rows of patches start at 0, 16, ..., 80; their share that lies in the upper part:
    share = np.array([1, 1, 0.75, 0.5, 0.25, 0])
    rows = np.asarray(jnp.sum(patches[0, :6, :3], 1)) * 256 / (size[0] * size[1])
    expected = rows @ (0.1 + 0.8 * share)
    assert found(upper.astype(np.float32)) == pytest.approx(expected, rel=1e-3)
    # An image under a patch has no such term.
    assert float(jnp.sum(mesh_weights(equal, np.array([(63, 100)])))) == 0


def test_refinement_makes_less_of_a_mesh(mini_codec, photograph):
    image = photograph(96, 80, seed=3)
    found = []
    for weight in (0.0, 1e5):
        settings = dataclasses.replace(
            PERCEPTUAL, mesh=weight, mean_style=0.0, structure=0.0, lattice=0.0
        )
        made = refinement.refine(mini_codec, image, quality=0.5, settings=settings)
        decoded = mini_codec.decompress(made.data)
        pair = [np.float32(pixels)[None] / 255 for pixels in (image, decoded)]
        found.append(float(mesh(*pair)[0]))
    assert found[1] < 0.8 * found[0]
