# SPDX-License-Identifier: Apache-2.0
"""Divides an image into tiles, each with a margin around it: its window.

`large.py` refines large images with them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from semlic_jax.model.tiles import Cuts, cuts
from semlic_jax.model.transforms import HYPER_STRIDE, STRIDE
from semlic_jax.refinement.objective import Images
from semlic_jax.refinement.structure import (
    lattice_weights,
    mesh_weights,
    structure_weights,
)

Array = jax.Array
Place = tuple[Any, Any]  # row and column in latents

_WINDOW = 64  # most latents along a side of a window
# Latents around a tile. With this margin and windows of 16 latents, the objective of
# `default` with `small` came within 0.3 % of that of a refinement of the whole image,
# on four photographs at 0.2 bpp.
_MARGIN = 4
# Tiles start where patches of the mean style and cells of z do.
_UNIT = HYPER_STRIDE // STRIDE


class Window(NamedTuple):
    """The places of a window and its tile, as rows and columns of latents.

    Attributes:
        start: where the window starts in the image.
        tile: where the tile starts in the window.
        fresh: where, in the window, the part of the tile starts that no earlier tile
            covers; the last tile along a side may overlap the one before.
    """

    start: Place
    tile: Place
    fresh: Place


class Tiling(NamedTuple):
    """How an image is cut, and which terms need weights made from the originals.

    Attributes:
        rows, columns: how the two sides of the image are cut.
        structure, lattice, mesh: whether these terms have a weight.
    """

    rows: Cuts
    columns: Cuts
    structure: bool
    lattice: bool
    mesh: bool

    def windows(self, grid: Sequence[int]) -> list[Window]:
        """The windows of all tiles, for a grid of h x w latents."""
        sides = []
        for cut, side in zip(self[:2], grid, strict=True):
            starts = [max(first - _MARGIN, 0) for first in cut.firsts]
            starts = [min(start, side - cut.window) for start in starts]
            ends = [0, *(first + cut.core for first in cut.firsts[:-1])]
            sides.append(
                [
                    (start, first - start, end - start)
                    for start, first, end in zip(starts, cut.firsts, ends, strict=True)
                ]
            )
        return [
            Window(*zip(row, column, strict=True))
            for row, column in itertools.product(*sides)
        ]


def cut_image(
    size: tuple[int, int],
    padded: tuple[int, ...],
    *,
    structure: bool,
    lattice: bool,
    mesh: bool,
) -> tuple[Tiling, list[Window]]:
    """Decide how an image is cut; return this and its windows.

    Args:
        size: real height and width in pixels.
        padded: padded height and width in pixels.
        structure, lattice, mesh: see `Tiling`.
    """
    # The decoder's image is cut off where the real one ends, so latents beyond that and
    # outside every margin have no effect.
    grid = [
        min(_UNIT * -(-side // HYPER_STRIDE) + _MARGIN, most // STRIDE)
        for side, most in zip(size, padded, strict=True)
    ]
    sides = _cut_side(grid[0]), _cut_side(grid[1])
    tiling = Tiling(*sides, structure, lattice, mesh)
    return tiling, tiling.windows(grid)


def more_than_one_window(bucket: tuple[int, int]) -> bool:
    """Whether an image of this padded height and width may have several windows."""
    return max(bucket) > STRIDE * _WINDOW


def _cut_side(side: int) -> Cuts:
    """How one side of an image, of so many latents, is cut."""
    found = cuts(side // _UNIT, _WINDOW // _UNIT, _MARGIN // _UNIT)
    firsts = tuple(_UNIT * first for first in found.firsts)
    return Cuts(_UNIT * found.core, _UNIT * found.window, firsts)


def _cut(
    array: Array, start: Sequence[Any], lengths: Sequence[int], scale: int = 1
) -> Array:
    """A part [B, h * scale, w * scale, ...] of an array.

    Start (row, column) and lengths (h, w) are in latents.
    """
    rest = array.shape[3:]
    corner = (0, start[0] * scale, start[1] * scale, *(0 for _ in rest))
    sizes = (array.shape[0], lengths[0] * scale, lengths[1] * scale, *rest)
    return lax.dynamic_slice(array, corner, sizes)


@partial(jax.jit, static_argnums=0)
def latents_in(tiling: Tiling, latents: Array, window: Window) -> Array:
    """The latents [B, h, w, M] in a window."""
    return _cut(latents, window.start, (tiling.rows.window, tiling.columns.window))


@partial(jax.jit, static_argnums=0)
def view(tiling: Tiling, images: Images, window: Window) -> Images:
    """A window of the image, as an image of its own."""
    lengths = (tiling.rows.window, tiling.columns.window)
    x, weights, feature_weights = (
        _cut(array, window.start, lengths, STRIDE)
        for array in (images.x, images.weights, images.feature_weights)
    )
    start = jnp.stack([jnp.asarray(side, jnp.int32) for side in window.start])
    most = STRIDE * jnp.asarray(lengths)
    sizes = jnp.minimum(images.sizes - STRIDE * start, most)
    origin = images.noise_origin
    return images._replace(
        x=x,
        sizes=sizes,
        weights=weights,
        feature_weights=feature_weights,
        structure=structure_weights(x, weights, sizes) if tiling.structure else (),
        lattice=(lattice_weights(x, weights, sizes),) if tiling.lattice else (),
        mesh=(mesh_weights(weights, sizes),) if tiling.mesh else (),
        noise_origin=None if origin is None else origin + start,
    )


def share(images: Images, own: Images) -> Array:
    """The share of a window's objective in the image's: its share of the pixels."""
    of_window, of_image = (
        jnp.prod(sizes.astype(jnp.float32)) for sizes in (own.sizes, images.sizes)
    )
    return of_window / of_image


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def placed(
    tiling: Tiling,
    canvas: Array,
    part: Array,
    images: Images,
    own: Images,
    window: Window,
) -> Array:
    """Write the part of a window that its tile covers onto the canvas [B, h, w, M].

    `part` is the gradient or curvature of the window's objective with respect to its
    latents; what is written is that of the image's objective.
    """
    core = _cut(part, window.tile, (tiling.rows.core, tiling.columns.core))
    row, column = (
        start + tile for start, tile in zip(window.start, window.tile, strict=True)
    )
    return lax.dynamic_update_slice(
        canvas, core * share(images, own), (0, row, column, 0)
    )


def only_tile(tiling: Tiling, own: Images, window: Window) -> Images:
    """A window in which only its tile has weights, as far as no earlier tile covers it.

    The weights of the structure term stay, since its errors are 0 where the weight of a
    pixel is.
    """
    height, width = own.x.shape[1:3]
    rows, columns = (
        (place >= STRIDE * fresh) & (place < STRIDE * (tile + cut.core))
        for place, fresh, tile, cut in zip(
            (jnp.arange(height), jnp.arange(width)),
            window.fresh,
            window.tile,
            tiling[:2],
            strict=True,
        )
    )
    mask = (rows[:, None] & columns[None, :]).astype(jnp.float32)[None]
    weights = own.weights * mask
    return own._replace(
        weights=weights,
        feature_weights=own.feature_weights * mask,
        lattice=tuple(lattice_weights(own.x, weights, own.sizes) for _ in own.lattice),
        mesh=tuple(mesh_weights(weights, own.sizes) for _ in own.mesh),
    )
