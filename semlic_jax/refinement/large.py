# SPDX-License-Identifier: Apache-2.0
"""Refinement of an image that is too large for its steps to be made at once.

A step of `newton` has two parts. One walks the latents in the order of coding, which
takes tens of bytes a pixel and is done for all of the image. The other shows what the
symbols decode to and asks for the gradient, which takes thousands. What a latent
changes is near it, and the objective is a mean over places, so the gradient to the
latents of a tile is that of the objective of a window, the tile with a margin. The same
holds for the curvature. There is one budget, one multiplier of the rate and one set of
symbols, and no seam that a decoder would show.

A refinement of the whole differs in this: its latents see further than the margin
(`_MARGIN`), its style and lattice terms have their places in the image and not in a
window, it may keep the best of its steps where there are no perceptual terms, and it
judges files by 1 - MS-SSIM and not by the sum of squares that stands for it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from semlic_jax.compilation import FloatProgram, float_program
from semlic_jax.model.tiles import Cuts, cuts
from semlic_jax.model.transforms import HYPER_STRIDE, STRIDE
from semlic_jax.refinement import newton
from semlic_jax.refinement.batch import Batch, Refined
from semlic_jax.refinement.objective import (
    Frozen,
    Images,
    Static,
    Terms,
    Weights,
    decoded_image,
    mean_powers,
    terms_of,
)
from semlic_jax.refinement.settings import Settings
from semlic_jax.refinement.steps import Problem, Target, rate_excess
from semlic_jax.refinement.structure import lattice_weights, structure_weights
from semlic_jax.refinement.symbols import Rounding, hard_latents

Array = jax.Array
Place = tuple[Any, Any]  # row and column in latents

# Larger images are refined in tiles. At once so many pixels take 2.7 GB with `small`
# and 5.9 GB with `base`.
_MOST_PIXELS = 2**21
_WINDOW = 64  # most latents along a side of a window
# Latents. In windows of 16 latents with this margin, `default` of `small` came to -0.3
# to +0.3 % of the objective of a refinement at once, on four photographs at 0.2 bpp.
_MARGIN = 4
# Tiles start where the patches of the mean style do, and the cells of z.
_UNIT = HYPER_STRIDE // STRIDE
# What is kept of a pixel of the whole image, over what a step takes of one of a window.
_WHOLE_SHARE = 1 / 32


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


def _cuts(side: int) -> Cuts:
    """How one side of so many latents is cut."""
    found = cuts(side // _UNIT, _WINDOW // _UNIT, _MARGIN // _UNIT)
    firsts = tuple(_UNIT * first for first in found.firsts)
    return Cuts(_UNIT * found.core, _UNIT * found.window, firsts)


def can_go_in_tiles(bucket: tuple[int, int], settings: Settings) -> bool:
    """Whether images padded to this height and width can be refined in tiles."""
    return settings.method == "newton" and max(bucket) > STRIDE * _WINDOW


def goes_in_tiles(bucket: tuple[int, int], settings: Settings) -> bool:
    """Whether they are, however much memory there is."""
    return can_go_in_tiles(bucket, settings) and math.prod(bucket) > _MOST_PIXELS


class LargeImage(Batch):
    """One image, from the first latents to the file, its steps made tile by tile."""

    def __init__(self, codec: Any, settings: Settings, *parts: Any) -> None:
        """The arguments are those of `Batch`, for one image.

        Between two looks at the latents is one step, since it takes long.
        """
        super().__init__(codec, dataclasses.replace(settings, chunk_steps=1), *parts)

    def _prepared(self, images: Images) -> Images:
        perceptual, settings = self.static.perceptual, self.settings
        # What the decoder shows ends with the image, so latents beyond it that are in
        # no margin matter to nothing.
        grid = [
            min(_UNIT * -(-side // HYPER_STRIDE) + _MARGIN, most // STRIDE)
            for side, most in zip(self.sizes[0], images.x.shape[1:3], strict=True)
        ]
        rows, columns = map(_cuts, grid)
        self._tiling = Tiling(
            rows,
            columns,
            structure=perceptual and settings.structure > 0,
            lattice=perceptual and settings.lattice > 0,
        )
        self._windows = self._tiling.windows(grid)
        if getattr(self.static.config, "texture_channels", 0):
            images = images._replace(noise_origin=jnp.zeros((1, 2), jnp.int32))
        if not self.static.mean_style:
            return images
        powers = [
            _tile_powers(
                self.static,
                self._tiling,
                self.frozen,
                images,
                _view(self._tiling, images, window),
                window,
            )
            for window in self._windows
        ]
        of_image = jax.tree.map(lambda *parts: jnp.sum(jnp.stack(parts), 0), *powers)
        return images._replace(mean_powers=of_image)

    def _pixels_at_once(self) -> int:
        window = self._tiling.rows.window * self._tiling.columns.window * STRIDE**2
        return round(window + _WHOLE_SHARE * super()._pixels_at_once())

    def _score(self, latents: Any, images: Images, rounding: Rounding) -> Terms:
        bits, y_hat = _hard_latents(
            self.static, self.frozen, images, rounding, *latents
        )

        def shown(own: Images, window: Window) -> Array:
            part = _part(self._tiling, y_hat, window)
            return _decoded_image(self.static, self.frozen, own, part)

        bpp: Any = np.asarray(bits) / math.prod(self.sizes[0])
        return self._sum(images, shown)._replace(bpp=bpp)

    def _sum(self, images: Images, shown: Callable[[Images, Window], Any]) -> Terms:
        """The terms, without a rate, of what is shown in each window."""
        found = []
        for window in self._windows:
            own = _view(self._tiling, images, window)
            x_hat = shown(own, window)
            found.append(
                _tile_terms(
                    self.static,
                    self._tiling,
                    self.frozen,
                    images,
                    own,
                    self.weights,
                    x_hat,
                    window,
                )
            )
        return jax.tree.map(lambda *terms: np.sum(terms, axis=0), *found)

    def _keep_within_budget(self, state: newton.State) -> Terms:
        """Keeps the last latents. The terms are those that the last step saw."""
        self.best, self.best_rounding = state.latents, self._rounding(state)
        self.best_terms = self._steps.terms
        return self.best_terms

    def _curvature(self, problem: Problem, y_hat: Array) -> Array:
        squares = jnp.zeros_like(y_hat)
        for i, window in enumerate(self._windows):
            own = _view(self._tiling, problem.images, window)
            diagonal = newton.diagonal_of(
                problem.static,
                problem.frozen,
                own,
                problem.weights,
                _part(self._tiling, y_hat, window),
                jax.vmap(partial(jax.random.fold_in, data=i))(problem.rng),
                self.settings.probes,
            )
            squares = _placed(
                self._tiling, squares, diagonal, problem.images, own, window
            )
        return newton.smoothed(squares)

    def stepper(self) -> Any:
        self._steps: Any = super().stepper()
        return self._steps

    def _stepper(self, problem: Problem, log_beta: Array, curvature: Array) -> Any:
        state = newton.start_state(self.start, curvature, log_beta)
        schedule = newton.make_schedule(self.settings)
        return _Steps(problem, state, schedule, self._tiling, self._windows)

    def finish(self, steps: int) -> list[Refined]:
        del self._steps  # its memory is of use to the files
        return super().finish(steps)

    def _decoded_values(
        self, files: Sequence[dict[bytes, None]]
    ) -> list[dict[bytes, float]]:
        values: dict[bytes, float] = {}
        for data in files[0]:
            x_hat = np.array(self.images.x)
            decoded = self.codec.decompress(data)
            height, width = decoded.shape[:2]
            x_hat[0, :height, :width] = decoded.astype(np.float32) / 255

            def shown(own: Images, window: Window, x_hat: np.ndarray = x_hat) -> Any:
                row, column = (STRIDE * place for place in window.start)
                height, width = own.x.shape[1:3]
                return x_hat[:, row : row + height, column : column + width]

            values[data] = float(self._sum(self.images, shown).value[0])
        return [values]


class _Steps:
    """A refinement under way, in the place of a `steps.Stepper`.

    Attributes:
        state: after the steps so far.
        terms: that the last step saw.
    """

    def __init__(
        self,
        problem: Problem,
        state: newton.State,
        schedule: newton.Schedule,
        tiling: Tiling,
        windows: Sequence[Window],
    ) -> None:
        self._problem = problem
        self._schedule = schedule
        self._tiling, self._windows = tiling, windows
        self._next = 0
        self.state = jax.tree.map(jnp.copy, state)  # a step takes its memory
        self.terms: Terms

    def __call__(self, count: int, target: Target) -> np.ndarray:
        """See `steps.Stepper`."""
        taken_bpp = []
        for _ in range(count):
            now = newton.Schedule(*(values[self._next] for values in self._schedule))
            self._step(now, target)
            self._next += 1
            taken_bpp.append(self.terms.bpp)
        return np.mean(taken_bpp, axis=0)

    def _step(self, now: newton.Schedule, target: Target) -> None:
        static, frozen, images, weights, _, rng = self._problem
        walked, pull_back = _walk(static, frozen, images, rng, self.state, now)
        canvas = jnp.zeros_like(walked.y_hat)
        found = []
        for window in self._windows:
            own = _view(self._tiling, images, window)
            terms, gradient = _gradient(
                static,
                self._tiling,
                frozen,
                images,
                own,
                weights,
                _part(self._tiling, walked.y_hat, window),
                window,
                now.shift,
            )
            canvas = _placed(self._tiling, canvas, gradient, images, own, window)
            found.append(terms)
        self.state, bpp = _move(
            images, target, self.state, now, walked, pull_back, canvas
        )
        terms = jax.tree.map(lambda *terms: np.sum(terms, axis=0), *found)
        self.terms = terms._replace(bpp=bpp)

    def memory_bytes(self) -> int | None:
        """What a step takes beside its arguments, as the compiler plans it."""
        static, frozen, images, weights, target, rng = self._problem
        now = newton.Schedule(*(values[0] for values in self._schedule))
        window = self._windows[0]
        own = _view(self._tiling, images, window)
        part = _part(self._tiling, self.state.latents[0], window)
        tile = (self._tiling, frozen, images, own, weights, part, window, now.shift)
        walk = _walk.lower(static, frozen, images, rng, self.state, now)
        back = (*walk.out_info, self.state.latents[0])
        plans: list[Any] = [
            program.compile().memory_analysis()
            for program in (
                walk,
                _gradient.lower(static, *tile),
                _move.lower(images, target, self.state, now, *back),
            )
        ]
        if None in plans:
            return None
        most = max(plan.temp_size_in_bytes for plan in plans)
        return plans[0].output_size_in_bytes + most


_hard_latents = FloatProgram(hard_latents, static_argnums=0)
_decoded_image = FloatProgram(decoded_image, static_argnums=0)


def _cut(
    array: Array, start: Sequence[Any], lengths: Sequence[int], scale: int = 1
) -> Array:
    """[B, h * scale, w * scale, ...] of an array; start and lengths h, w in latents."""
    rest = array.shape[3:]
    corner = (0, start[0] * scale, start[1] * scale, *(0 for _ in rest))
    sizes = (array.shape[0], lengths[0] * scale, lengths[1] * scale, *rest)
    return lax.dynamic_slice(array, corner, sizes)


@partial(jax.jit, static_argnums=0)
def _part(tiling: Tiling, latents: Array, window: Window) -> Array:
    """The latents in a window."""
    return _cut(latents, window.start, (tiling.rows.window, tiling.columns.window))


@partial(jax.jit, static_argnums=0)
def _view(tiling: Tiling, images: Images, window: Window) -> Images:
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


def _share(images: Images, own: Images) -> Array:
    """Of the objective of a window in that of the image: the share of the pixels."""
    of_window, of_image = (
        jnp.prod(sizes.astype(jnp.float32)) for sizes in (own.sizes, images.sizes)
    )
    return of_window / of_image


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _placed(
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
        canvas, core * _share(images, own), (0, row, column, 0)
    )


def _only_tile(tiling: Tiling, own: Images, window: Window) -> Images:
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


def _terms_of_tile(
    static: Static,
    tiling: Tiling,
    frozen: Frozen,
    images: Images,
    own: Images,
    weights: Weights,
    x_hat: Array,
    window: Window,
    shift: Array | int,
) -> Terms:
    """What a tile adds to the terms of the image, without a rate."""
    tile = _only_tile(tiling, own, window)
    no_bits = jnp.zeros(1)
    terms = terms_of(static, frozen, tile, weights, no_bits, x_hat, jnp.asarray(shift))
    return jax.tree.map(lambda term: term * _share(images, own), terms)


@float_program(static_argnums=(0, 1))
def _tile_powers(
    static: Static,
    tiling: Tiling,
    frozen: Frozen,
    images: Images,
    own: Images,
    window: Window,
) -> tuple[Array, ...]:
    """What a tile adds to `objective.mean_powers` of the image."""
    powers = mean_powers(static, frozen, _only_tile(tiling, own, window))
    return tuple(power * _share(images, own) for power in powers)


@float_program(static_argnums=(0, 1))
def _tile_terms(
    static: Static,
    tiling: Tiling,
    frozen: Frozen,
    images: Images,
    own: Images,
    weights: Weights,
    x_hat: Array,
    window: Window,
) -> Terms:
    """What a tile adds to the terms of the image, seen from the first corner."""
    return _terms_of_tile(
        static, tiling, frozen, images, own, weights, x_hat, window, 0
    )


@float_program(static_argnums=0)
def _walk(
    static: Static,
    frozen: Frozen,
    images: Images,
    rng: Array,
    state: newton.State,
    now: newton.Schedule,
) -> tuple[newton.Walked, Callable[..., Any]]:
    """The symbols of a step, and the way back from bits and y_hat to the latents."""
    rounding, offset = newton.step_choice(images, rng, state, now)

    def walked(y: Array, z: Array) -> tuple[tuple[Array, Array], newton.Walked]:
        found = newton.hard_walk(static, frozen, images, y, z, rounding, offset)
        return (found.bits, found.y_hat), found

    _, pull_back, found = jax.vjp(walked, *state.latents, has_aux=True)
    return found, pull_back


@float_program(static_argnums=(0, 1))
def _gradient(
    static: Static,
    tiling: Tiling,
    frozen: Frozen,
    images: Images,
    own: Images,
    weights: Weights,
    y_hat: Array,
    window: Window,
    shift: Array,
) -> tuple[Terms, Array]:
    """Terms of a tile, and the gradient of the window's objective to its y_hat."""

    def value(y_hat: Array) -> tuple[Array, Terms]:
        x_hat = decoded_image(static, frozen, own, y_hat)
        no_bits = jnp.zeros(1)
        terms = terms_of(static, frozen, own, weights, no_bits, x_hat, shift)
        return jnp.sum(terms.value), _terms_of_tile(
            static, tiling, frozen, images, own, weights, x_hat, window, shift
        )

    gradient, terms = jax.grad(value, has_aux=True)(y_hat)
    return terms, gradient


@partial(jax.jit, donate_argnums=2)
def _move(
    images: Images,
    target: Target,
    state: newton.State,
    now: newton.Schedule,
    walked: newton.Walked,
    pull_back: Callable[..., Any],
    gradient: Array,
) -> tuple[newton.State, Array]:
    """The state after a step, and the bits per pixel of its symbols, [B]."""
    pixels = jnp.prod(images.sizes.astype(jnp.float32), axis=1)
    gradients = pull_back((jnp.exp(state.log_beta) / pixels, gradient))
    bpp = walked.coded_bits / pixels
    excess = rate_excess(bpp, target)
    moved = newton.moved(state, now, gradients, walked.y_hat, excess, target.integral)
    return moved, bpp
