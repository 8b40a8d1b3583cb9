# SPDX-License-Identifier: Apache-2.0
"""The spectrum term sees waves that the original has not, and little else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from waves import grain, wave

from semlic_jax.objectives.spectrum import spectral_power, spectrum

GRAIN = grain()


def test_spectrum_equals_its_equation():
    rng = np.random.default_rng(2)
    x = rng.random((2, 60, 64, 3)).astype(np.float32) * 0.2 + 0.4
    x_hat = np.float32(x + 0.05 * rng.normal(size=x.shape)) * [[[[0.9, 1.1, 1.0]]]]
    hann = np.outer(*[0.5 - 0.5 * np.cos(2 * np.pi * np.arange(32) / 32)] * 2)
    hann /= np.sqrt((hann**2).mean())
    f = np.fft.fftfreq(32)
    band = np.hypot(f[:, None], f) > 0.1
    components = (
        (0.299, 0.587, 0.114),
        (-0.168736, -0.331264, 0.5),
        (0.5, -0.418688, -0.081312),
    )
    x_hat = np.float32(x_hat)
    found = zip(spectrum(x, x_hat), spectral_power(x, x_hat), strict=True)
    for image, values in enumerate(found):
        peaks, levels = [], []
        for component in components:
            powers, powers_hat, weights = [], [], []
            for top in range(0, 60 - 32 + 1, 16):
                for left in range(0, 64 - 32 + 1, 16):
                    pair = []
                    for pixels in (x, x_hat):
                        plane = pixels[image, top : top + 32, left : left + 32]
                        plane = plane.astype(np.float64) @ component
                        tapered = (plane - plane.mean()) * hann
                        pair.append(np.abs(np.fft.fft2(tapered)) ** 2 / 32**4)
                    weights.append(1 / (pair[0][band].sum() + (2 / 255) ** 2))
                    powers.append(pair[0] * weights[-1])
                    powers_hat.append(pair[1] * weights[-1])
            floor = np.mean(weights) * 0.3 / 512**2 / 32**2
            d = np.log(np.mean(powers_hat, 0) + floor)
            d -= np.log(np.mean(powers, 0) + floor)
            smooth = gaussian_filter(d, 2.5, mode="wrap", truncate=6.0)
            peaks.append(np.mean((d - smooth)[band] ** 2))
            levels.append(np.mean(smooth[band] ** 2))
        np.testing.assert_allclose(values, [np.mean(peaks), levels[0]], rtol=2e-3)


def test_waves_of_colour_are_seen():
    blue = wave(5, 12, 0.04) * np.float32([-0.1, -0.1, 0.8])
    assert abs(float(np.sum(blue[0, 3, 5] * [0.299, 0.587, 0.114]))) < 1e-3
    flat = np.full_like(GRAIN, 0.5)
    assert float(spectrum(flat, flat + blue)[0]) > 0.1


def test_a_wave_is_seen_and_grain_is_not():
    other = grain(seed=3)
    seen = float(spectrum(GRAIN, GRAIN + wave(5, 12, 0.04))[0])
    assert float(spectrum(GRAIN, other)[0]) < 0.1 * seen
    assert float(spectrum(GRAIN, GRAIN)[0]) < 1e-9
    # Stronger or weaker texture, and another brightness, are no peaks.
    assert float(spectrum(GRAIN, 0.2 + 0.7 * GRAIN)[0]) < 0.01 * seen
    # A wave that the original has too is none.
    both = spectrum(GRAIN + wave(5, 12, 0.04), other + wave(5, 12, 0.04))
    assert float(both[0]) < 0.1 * seen


def test_power_sees_texture_that_is_too_weak_or_too_strong_and_no_peaks():
    weak, strong = (0.5 + factor * (GRAIN - 0.5) for factor in (0.5, 2.0))
    expected = np.log(4) ** 2
    for made in (weak, strong):
        assert float(spectral_power(GRAIN, made)[0]) == pytest.approx(expected, 0.05)
    assert float(spectral_power(GRAIN, GRAIN + wave(5, 12, 0.04))[0]) < 0.1 * expected
    coloured = GRAIN + wave(3, 4, 0.04) * np.float32([-0.114, -0.114, 0.886])
    assert float(spectral_power(GRAIN, coloured)[0]) < 1e-4
    # The gradient makes weak texture stronger.
    gradient = jax.grad(lambda v: spectral_power(GRAIN, v).sum())(jnp.asarray(weak))
    assert float(np.sum(gradient * (weak - 0.5))) < 0


def test_blur_counts_less_than_a_wave():
    blurred = np.float32(gaussian_filter(GRAIN, (0, 0.7, 0.7, 0)))
    seen = float(spectrum(blurred, blurred + wave(5, 12, 0.02))[0])
    assert float(spectrum(GRAIN, blurred)[0]) < 0.2 * seen


def test_what_is_slow_or_under_half_a_grey_level_is_not_seen():
    flat = np.full((1, 64, 64, 3), 0.5, np.float32)
    strong = float(spectrum(flat, flat + wave(5, 12, 0.02, 64))[0])
    assert float(spectrum(flat, flat + wave(1, 2, 0.02, 64))[0]) < 0.2 * strong
    assert float(spectrum(flat, flat + wave(5, 12, 0.0002, 64))[0]) < 0.01 * strong


def test_the_gradient_takes_the_wave_away():
    made = jnp.asarray(GRAIN + wave(5, 12, 0.04))
    gradient = jax.grad(lambda v: spectrum(GRAIN, v).sum())(made)
    assert np.isfinite(gradient).all()
    along = np.sum(np.asarray(gradient) * wave(5, 12, 1.0))
    across = np.sum(np.asarray(gradient) * wave(9, 7, 1.0))
    assert along > 0
    assert along > 5 * abs(across)
    # Nothing is asked of the original, and a plain pair has a gradient as well.
    of_original = jax.grad(lambda v: spectrum(v, made).sum())(jnp.asarray(GRAIN))
    np.testing.assert_array_equal(of_original, np.zeros_like(GRAIN))
    flat = jnp.full((1, 32, 32, 3), 0.5)
    assert np.isfinite(jax.grad(lambda v: spectrum(flat, v).sum())(flat)).all()


def test_images_under_a_window_are_refused():
    small = np.zeros((1, 31, 64, 3), np.float32)
    with pytest.raises(ValueError, match="at least 32 pixels, found 31 x 64"):
        spectrum(small, small)
