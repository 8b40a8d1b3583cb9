# SPDX-License-Identifier: Apache-2.0
"""The spectrum terms: whether the decoder makes its texture of a few waves.

A decoder that upsamples in steps of two favours some spatial frequencies. What it adds
for fur, cloth or grain then lies in a few narrow peaks of the spectrum, which show as a
mesh of dots or as a weave, and which no mean of features and no pixel-wise error tells
from texture. `spectrum` and `spectral_power` judge a crop as a whole, for training;
`mesh` judges each place, for refinement. Imports jax and numpy only.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

SPECTRUM_PIXELS = 32  # side of a window
_STEP = SPECTRUM_PIXELS // 2
_NEIGHBOURS = 3  # windows along a side of a patch of `mesh`
MESH_PIXELS = SPECTRUM_PIXELS + (_NEIGHBOURS - 1) * _STEP  # side of such a patch
_LOWEST = 0.1  # cycles per pixel: below it are the shapes of things
_SMOOTHING = 2.5  # standard deviation in bins of what counts as the shape of a spectrum
_CONTRAST = 2 / 255  # windows plainer than this do not count for more
_NOISE = 0.3**0.5 / 512  # deviation of white noise that hides a peak
_FREE_RATIO = 1.0  # of peaks in `mesh`: up to e times the power is no mesh
# Luma and the two differences of colour of JPEG (ITU-T T.871).
_COMPONENTS = (
    (0.299, 0.587, 0.114),
    (-0.168736, -0.331264, 0.5),
    (0.5, -0.418688, -0.081312),
)


def spectrum(x: jax.Array, x_hat: jax.Array) -> jax.Array:
    """Peaks of the spectrum of x_hat that x has not, float32 [B].

    With P(f) the power at the spatial frequency f, a mean over Hann windows of 32 x 32
    pixels in which each window counts by how plain the original is there,

        d(f) = ln (P(f; x_hat) + e) / (P(f; x) + e)
        mean over |f| > 0.1 cycles per pixel of (d - s)^2

    where s is d smoothed over neighbouring frequencies and e hides what is under half a
    grey level; a mean over luma and both differences of colour. Blur and grain change d
    smoothly and count little; a wave is a narrow peak. Only the spectrum of the whole
    crop counts, not where a texture lies, so a decoder's random texture is no error.
    This term is ours.

    Args:
        x, x_hat: float [B, H, W, 3] in [0, 1]; no gradient flows to x. Rows and columns
            beyond whole steps of 16 pixels are left out.

    Raises:
        ValueError: a side is under 32 pixels.
    """
    ratio, smooth = _ratios(x, x_hat)
    return jnp.mean(_band_means(jnp.square(ratio - smooth)), axis=1)


def spectral_power(x: jax.Array, x_hat: jax.Array) -> jax.Array:
    """How far x_hat has too little or too much of all fine detail, float32 [B].

    The mean over |f| > 0.1 cycles per pixel of s^2, with s as in `spectrum`, of luma
    alone: grain of colours would be seen as noise. Where the peaks are taken away, this
    asks for as much texture as the original has. This term is ours.

    Args, Raises: as `spectrum`.
    """
    return _band_means(jnp.square(_ratios(x, x_hat)[1]))[:, 0]


def mesh(x: jax.Array, x_hat: jax.Array) -> jax.Array:
    """How much of x_hat is a mesh of a few waves that x has not there, float32 [B].

    The sum of `mesh_patches` over all patches, per 16 x 16 pixels of the image. This
    term is ours.

    Args, Raises: as `mesh_patches`.
    """
    cells = x.shape[1] * x.shape[2] / _STEP**2
    return jnp.sum(mesh_patches(x, x_hat), axis=(1, 2)) / cells


def mesh_patches(x: jax.Array, x_hat: jax.Array) -> jax.Array:
    """`mesh` of patches of 64 x 64 pixels, in steps of 16 pixels, float32 [B, n, m].

    With P(f) the power of luma at the spatial frequency f, a mean over 3 x 3 windows,

        d(f) = ln (P(f; x_hat) + e) / (P(f; x) + e)
        mean over |f| > 0.1 cycles per pixel of max(0, d - s - 1)^2

    where s is d smoothed over neighbouring frequencies and e is of noise of half a grey
    level. The spectrum of so few windows is uneven by chance: hence the 1, and only
    what is too strong counts.

    Args:
        x, x_hat: float [B, H, W, 3] in [0, 1]; no gradient flows to x. Rows and columns
            beyond whole steps of 16 pixels are left out.

    Raises:
        ValueError: a side is under 64 pixels.
    """
    if min(x.shape[1:3]) < MESH_PIXELS:
        raise ValueError(
            f"the mesh term needs sides of at least {MESH_PIXELS} pixels, found "
            f"{x.shape[1]} x {x.shape[2]}"
        )
    floor = (2 * _NOISE / SPECTRUM_PIXELS) ** 2
    levels, levels_hat = (
        jnp.log(sliding_means(_powers(each, _COMPONENTS[:1]), _NEIGHBOURS) + floor)
        for each in (jax.lax.stop_gradient(x), x_hat)
    )
    ratio = levels_hat - levels
    excess = jnp.maximum(ratio - _smooth(ratio) - _FREE_RATIO, 0.0)
    return jnp.sum(jnp.square(excess) * _band(), axis=(3, 4)) / np.sum(_band())


def sliding_means(values: jax.Array, side: int) -> jax.Array:
    """Means over side x side neighbours, [B, n - side + 1, m - side + 1, ...].

    Args:
        values: [B, n, m, ...].
        side: number of neighbours along axes 1 and 2, at most n and m.
    """
    for axis in (1, 2):
        count = values.shape[axis] - side + 1
        moved = (
            jax.lax.slice_in_dim(values, start, start + count, axis=axis)
            for start in range(side)
        )
        values = functools.reduce(jnp.add, moved) / side
    return values


def _ratios(x: jax.Array, x_hat: jax.Array) -> tuple[jax.Array, jax.Array]:
    """d and s of `spectrum`, [B * 3, 32, 32] each."""
    if min(x.shape[1:3]) < SPECTRUM_PIXELS:
        raise ValueError(
            f"the spectrum term needs sides of at least {SPECTRUM_PIXELS} pixels, "
            f"found {x.shape[1]} x {x.shape[2]}"
        )
    power, power_hat = (
        _powers(each, _COMPONENTS) for each in (jax.lax.stop_gradient(x), x_hat)
    )
    energy = jnp.sum(power * _band(), axis=(3, 4), keepdims=True)
    weights = 1 / (energy + _CONTRAST**2)
    floor = jnp.mean(weights, axis=(1, 2)) * (_NOISE / SPECTRUM_PIXELS) ** 2
    levels, levels_hat = (
        jnp.log(jnp.mean(each * weights, axis=(1, 2)) + floor)
        for each in (power, power_hat)
    )
    ratio = levels_hat - levels
    return ratio, _smooth(ratio)


def _smooth(ratio: jax.Array) -> jax.Array:
    """Values at the frequencies [..., 32, 32], smoothed over their neighbours."""
    return jnp.fft.ifft2(jnp.fft.fft2(ratio) * _response()).real


def _band_means(values: jax.Array) -> jax.Array:
    """Means over the band for each component, [B, 3], of [B * 3, 32, 32]."""
    means = jnp.sum(values * _band(), axis=(1, 2)) / np.sum(_band())
    return means.reshape(-1, len(_COMPONENTS))


def _powers(x: jax.Array, components: Sequence[Sequence[float]]) -> jax.Array:
    """Power in each window at each frequency, [B * K, n, m, 32, 32].

    The powers of a window add up to its mean square under the Hann window.

    Args:
        x: [B, H, W, 3].
        components: what colours add up to, K x 3.
    """
    factors = jnp.asarray(components, jnp.float32)
    planes = jnp.einsum("bhwc,kc->bkhw", x.astype(jnp.float32), factors)
    rows, columns = (side // _STEP for side in x.shape[1:3])
    planes = planes[:, :, : rows * _STEP, : columns * _STEP]
    cells = planes.reshape(-1, rows, _STEP, columns, _STEP).transpose(0, 1, 3, 2, 4)
    # A window is two neighbouring cells along each side.
    pairs = jnp.concatenate([cells[:, :-1], cells[:, 1:]], axis=3)
    windows = jnp.concatenate([pairs[:, :, :-1], pairs[:, :, 1:]], axis=4)
    windows = windows - jnp.mean(windows, axis=(3, 4), keepdims=True)
    found = jnp.fft.fft2(windows * _hann())
    return (jnp.square(found.real) + jnp.square(found.imag)) / SPECTRUM_PIXELS**4


def _hann() -> np.ndarray:
    """The Hann window, of mean square 1, float32 [32, 32]."""
    line = np.hanning(SPECTRUM_PIXELS + 1)[:-1]
    window = np.outer(line, line)
    return (window / np.sqrt(np.mean(window**2))).astype(np.float32)


def _band() -> np.ndarray:
    """1 at the frequencies that count, else 0, float32 [32, 32]."""
    line = np.fft.fftfreq(SPECTRUM_PIXELS)
    return (np.hypot(line[:, None], line) > _LOWEST).astype(np.float32)


def _response() -> np.ndarray:
    """The Fourier transform of the smoothing over frequencies, float32 [32, 32]."""
    bins = np.fft.fftfreq(SPECTRUM_PIXELS) * SPECTRUM_PIXELS
    bump = np.exp(-(bins[:, None] ** 2 + bins**2) / (2 * _SMOOTHING**2))
    return np.fft.fft2(bump / bump.sum()).real.astype(np.float32)
