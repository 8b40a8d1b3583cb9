# SPDX-License-Identifier: Apache-2.0
"""Large images a tile at a time: the same numbers as all at once."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semlic_jax.model.mean_scale import network_of
from semlic_jax.model.tiles import cuts, over_tiles
from semlic_jax.model.transforms import AnalysisTransform, SynthesisTransform

# Of the transforms of `base` (texture, blocks at every level) and of HiFiC.
KINDS = {
    "base": (
        (6, 8, 8, 10),
        {"patch": 2, "linear_skip": True, "level_blocks": 1},
        {"head_norm": False, "texture_channels": 4},
    ),
    "small": (
        (6, 8, 8, 10),
        {"patch": 2, "linear_skip": True},
        {"head_norm": False, "texture_channels": 4},
    ),
    "hific": ((4, 6, 8, 8, 10), {"patch": 1}, {}),
}
LATENTS = 12


def lively(module, *inputs):
    """Parameters of which none is zero, as some are at the start of a training."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32), shapes
    )


@pytest.mark.parametrize("side, tile, halo", [(129, 128, 5), (400, 30, 3), (30, 30, 7)])
def test_cuts_cover_a_side_within_the_tile(side, tile, halo):
    cut = cuts(side, tile, halo)
    assert cut.window <= tile
    covered = {first + i for first in cut.firsts for i in range(cut.core)}
    assert covered == set(range(side))


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_give_what_the_whole_image_gives(kind):
    widths, shared, of_synthesis = KINDS[kind]
    rng = np.random.default_rng(0)
    # 3 tiles by 2 of g_a and g_s each, the last of the rows overlapping.
    x = jnp.asarray(rng.uniform(size=(1, 25 * 16, 16 * 16, 3)), jnp.float32)
    g_a = AnalysisTransform(widths, LATENTS, **shared)
    params = lively(g_a, x)
    whole = np.asarray(jax.jit(g_a.apply)(params, x))
    tiled = np.asarray(jax.jit(g_a.clone(tile=15).apply)(params, x))
    np.testing.assert_allclose(tiled, whole, rtol=0, atol=1e-5 * np.abs(whole).max())

    y_hat = jnp.asarray(rng.normal(size=(1, 25, 16, LATENTS)), jnp.float32)
    quality = jnp.array([0.5])
    g_s = SynthesisTransform(widths, 1, **shared, **of_synthesis)
    params = lively(g_s, y_hat, quality)
    whole = np.asarray(jax.jit(g_s.apply)(params, y_hat, quality))
    tiled = np.asarray(jax.jit(g_s.clone(tile=15).apply)(params, y_hat, quality))
    np.testing.assert_allclose(tiled, whole, rtol=0, atol=1e-5 * np.abs(whole).max())


def test_tiles_do_not_depend_on_jax_enable_x64():
    widths, shared, of_synthesis = KINDS["base"]
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(1, 25 * 16, 16 * 16, 3)).astype(np.float32)
    y_hat = rng.normal(size=(1, 25, 16, LATENTS)).astype(np.float32)
    quality = np.array([0.5], np.float32)
    g_a = AnalysisTransform(widths, LATENTS, **shared, tile=15)
    g_s = SynthesisTransform(widths, 1, **shared, **of_synthesis, tile=15)
    for module, inputs in ((g_a, (x,)), (g_s, (y_hat, quality))):
        params = lively(module.clone(tile=0), *inputs)
        expected = np.asarray(jax.jit(module.apply)(params, *inputs))
        with jax.enable_x64(True):
            found = np.asarray(jax.jit(module.apply)(params, *inputs))
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_a_window_has_the_noise_of_its_place():
    """With an origin in latents, alone and cut into tiles again."""
    widths, shared, of_synthesis = KINDS["base"]
    g_s = SynthesisTransform(widths, 1, **shared, **of_synthesis)
    y_hat = jnp.ones((1, 40, 30, LATENTS))  # whatever differs is noise
    quality = jnp.array([0.5])
    params = lively(g_s, y_hat, quality)
    whole = np.asarray(jax.jit(g_s.apply)(params, y_hat, quality))
    row, column, margin = 3, 6, 8
    part = y_hat[:, row : row + 30, column : column + 20]
    inner = np.s_[:, 16 * margin : -16 * margin, 16 * margin : -16 * margin]
    expected = whole[:, 16 * row : 16 * (row + 30), 16 * column : 16 * (column + 20)]
    origin = jnp.array([[row, column]])
    assert expected[inner].std((1, 2)).max() > 0.01
    for module in (g_s, g_s.clone(tile=15)):
        found = np.asarray(jax.jit(module.apply)(params, part, quality, origin))
        np.testing.assert_allclose(found[inner], expected[inner], rtol=0, atol=1e-4)
        elsewhere = np.asarray(jax.jit(module.apply)(params, part, quality))
        assert np.abs(elsewhere - expected)[inner].max() > 0.01


def test_codec_uses_tiles_and_gives_the_same_picture(codec, photograph):
    """144 latents along a side are more than one tile."""
    image = photograph(2300, 64)
    padded = np.pad(image, ((0, 4), (0, 0), (0, 0)), mode="edge")
    network = network_of(codec.config)
    whole = network.apply(
        {"params": codec.params},
        padded[None].astype(np.float32) / 255,
        method="analysis",
    )
    found = codec.analyse(image).y
    np.testing.assert_allclose(found, whole[0], rtol=0, atol=1e-4)

    data = codec.compress(image, quality=0.5)
    header, y_hat = codec.decode_latents(data)
    x_hat = network.apply(
        {"params": codec.params},
        y_hat[None],
        np.array([header.quality / 255], np.float32),
        method="synthesis",
    )
    expected = np.round(np.clip(x_hat[0, :2300], 0, 1) * 255).astype(int)
    difference = np.abs(codec.decompress(data).astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


class Blur(nn.Module):
    """A 5 x 5 convolution of one input, beside the place and another input."""

    tile: int = 0

    @nn.compact
    def __call__(self, fine, coarse):
        if not self.tile:
            return self.at(jnp.zeros(2, jnp.int32), fine, coarse)
        grid = coarse.shape[1:3]
        return over_tiles(self, Blur.at, [fine, coarse], grid, self.tile, 2, (2, 3))

    @nn.nowrap
    def at(self, start, fine, coarse):
        mixed = nn.Conv(3, (5, 5), name="conv")(fine)
        rows, columns = (jnp.arange(side) for side in coarse.shape[1:3])
        place = 100 * (start[0] + rows)[:, None] + (start[1] + columns)
        coarse = coarse + place[None, :, :, None]
        return mixed + coarse.repeat(2, 1).repeat(2, 2)


@pytest.mark.parametrize("grid", [(5, 21), (21, 5), (17, 19)])
def test_every_image_of_a_batch_is_put_together_in_its_place(grid):
    """Of inputs on two grids; the second side may be the one that is cut, or both."""
    rng = np.random.default_rng(2)
    height, width = grid
    fine = rng.normal(size=(2, 2 * height, 2 * width, 4)).astype(np.float32)
    coarse = rng.normal(size=(2, height, width, 1)).astype(np.float32)
    params = lively(Blur(), fine, coarse)
    whole = jax.jit(Blur().apply)(params, fine, coarse)
    tiled = jax.jit(Blur(tile=9).apply)(params, fine, coarse)
    assert whole.shape == (2, 2 * height, 2 * width, 3)
    np.testing.assert_allclose(tiled, whole, rtol=0, atol=1e-3)


def test_a_side_of_one_tile_is_not_cut():
    assert cuts(30, 30, 7) == (30, 30, (0,))
    # One latent more: cores of equal size between halos.
    assert cuts(31, 30, 7) == (16, 30, (0, 15))
