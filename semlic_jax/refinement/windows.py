# SPDX-License-Identifier: Apache-2.0
"""Windows of an image: tiles that cover it once, each with a margin around it.

What they are used for is in `large.py`.
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
from semlic_jax.refinement.structure import lattice_weights, structure_weights

Array = jax.Array
Place = tuple[Any, Any]  # row and column in latents

_WINDOW = 64  # most latents along a side of a window
# Latents. In windows of 16 latents with this margin, `default` of `small` came to -0.3
# to +0.3 % of the objective of a refinement at once, on four photographs at 0.2 bpp.
_MARGIN = 4
# Tiles start where the patches of the mean style do, and the cells of z.
_UNIT = HYPER_STRIDE // STRIDE


class Window(NamedTuple):
    """Where a window is, and its tile.

    Attributes:
        start: of the window in the image.
        tile: start of the tile in the window.
        fresh: start in the window of what no tile before has; the last ones overlap.
    """

    start: Place
    tile: Place
    fresh: Place


class Tiling(NamedTuple):
    """How an image is cut, and which terms need weights of the originals."""

    rows: Cuts
    columns: Cuts
    structure: bool
    lattice: bool

    def windows(self, grid: Sequence[int]) -> list[Window]:
        """Of all tiles of a grid of latents."""
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
    size: tuple[int, int], padded: tuple[int, ...], *, structure: bool, lattice: bool
) -> tuple[Tiling, list[Window]]:
    """How an image is cut, and its windows.

    Args:
        size: real height and width.
        padded: height and width of its batch.
        structure, lattice: see `Tiling`.
    """
    # What the decoder shows ends with the image, so latents beyond it that are in no
    # margin matter to nothing.
    grid = [
        min(_UNIT * -(-side // HYPER_STRIDE) + _MARGIN, most // STRIDE)
        for side, most in zip(size, padded, strict=True)
    ]
    tiling = Tiling(_cut_side(grid[0]), _cut_side(grid[1]), structure, lattice)
    return tiling, tiling.windows(grid)


def more_than_one_window(bucket: tuple[int, int]) -> bool:
    """Whether an image of this padded height and width may have several."""
    return max(bucket) > STRIDE * _WINDOW


def _cut_side(side: int) -> Cuts:
    """How one side of so many latents is cut."""
    found = cuts(side // _UNIT, _WINDOW // _UNIT, _MARGIN // _UNIT)
    firsts = tuple(_UNIT * first for first in found.firsts)
    return Cuts(_UNIT * found.core, _UNIT * found.window, firsts)


def _cut(
    array: Array, start: Sequence[Any], lengths: Sequence[int], scale: int = 1
) -> Array:
    """[B, h * scale, w * scale, ...] of an array; start and lengths h, w in latents."""
    rest = array.shape[3:]
    corner = (0, start[0] * scale, start[1] * scale, *(0 for _ in rest))
    sizes = (array.shape[0], lengths[0] * scale, lengths[1] * scale, *rest)
    return lax.dynamic_slice(array, corner, sizes)


@partial(jax.jit, static_argnums=0)
def latents_in(tiling: Tiling, latents: Array, window: Window) -> Array:
    """The latents in a window."""
    return _cut(latents, window.start, (tiling.rows.window, tiling.columns.window))


@partial(jax.jit, static_argnums=0)
def view(tiling: Tiling, images: Images, window: Window) -> Images:
    """A window of the image as an image of its own."""
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
        noise_origin=None if origin is None else origin + start,
    )


def share(images: Images, own: Images) -> Array:
    """Of the objective of a window in that of the image: the share of the pixels."""
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
    """Writes what a window found for the latents of its tile onto the canvas.

    What it found is of the objective of the window, what is written of the image's.
    """
    core = _cut(part, window.tile, (tiling.rows.core, tiling.columns.core))
    row, column = (
        start + tile for start, tile in zip(window.start, window.tile, strict=True)
    )
    return lax.dynamic_update_slice(
        canvas, core * share(images, own), (0, row, column, 0)
    )


def only_tile(tiling: Tiling, own: Images, window: Window) -> Images:
    """A window in which nothing but its tile has a weight.

    The structure's own weights stay: its errors are those where pixels have a weight.
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
    )
