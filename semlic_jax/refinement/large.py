# SPDX-License-Identifier: Apache-2.0
"""Refines an image that is too large for a step to work on all of it at once.

A step of `newton` has two parts. The first walks the latents in the coding order, which
takes tens of bytes per pixel and is done for the whole image. The second decodes the
symbols and computes the gradient, which takes thousands of bytes per pixel. A latent
changes only what is near it, and the objective is a mean over places. So the gradient
with respect to the latents of a tile is that of the objective of a window, the tile
with a margin around it. The same holds for the curvature. There is one budget, one
multiplier of the rate and one set of symbols, and so no seam in the decoded image.

A refinement of the whole image at once differs in four ways: its latents see further
than the margin (`windows.py`), its style and lattice terms lie on a grid of the image
and not of a window, it may keep the best of its steps if there are no perceptual terms,
and it judges files by 1 - MS-SSIM and not by the sum of squares that stands for it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from semlic_jax.compilation import FloatProgram, float_program
from semlic_jax.model.transforms import STRIDE
from semlic_jax.refinement import fit, newton
from semlic_jax.refinement.batch import Batch, Refined
from semlic_jax.refinement.objective import (
    Frozen,
    Images,
    Terms,
    Weights,
    decoded_image,
    mean_powers,
    terms_of,
)
from semlic_jax.refinement.roi import Region
from semlic_jax.refinement.settings import Settings
from semlic_jax.refinement.steps import Problem, Target, rate_excess
from semlic_jax.refinement.symbols import Rounding
from semlic_jax.refinement.windows import (
    Tiling,
    Window,
    cut_image,
    latents_in,
    more_than_one_window,
    only_tile,
    placed,
    share,
    view,
)

if TYPE_CHECKING:
    from semlic_jax.codec import Codec

Array = jax.Array

# Images of more pixels are refined in tiles. So many pixels at once take 2.7 GB with
# `small` and 5.9 GB with `base`.
_MOST_PIXELS = 2**21
# Memory that is kept for a pixel of the whole image, relative to what a step takes for
# a pixel of a window.
_WHOLE_SHARE = 1 / 32


def can_go_in_tiles(bucket: tuple[int, int], settings: Settings) -> bool:
    """Whether images padded to this height and width can be refined in tiles."""
    return settings.method == "newton" and more_than_one_window(bucket)


def goes_in_tiles(bucket: tuple[int, int], settings: Settings) -> bool:
    """Whether images of this padded size go in tiles however much memory there is."""
    return can_go_in_tiles(bucket, settings) and math.prod(bucket) > _MOST_PIXELS


class LargeImage(Batch):
    """The refinement of one image, with steps that are made tile by tile.

    Attributes:
        tiling: how the image is cut.
        windows: the windows of its tiles.
    """

    def __init__(
        self,
        codec: Codec,
        settings: Settings,
        pixels: Sequence[np.ndarray],
        budgets: Sequence[int],
        regions: Sequence[Region | None],
        icc_profiles: Sequence[bytes | None],
        unrefined: Sequence[bytes],
    ) -> None:
        """Prepare the refinement; arguments and errors are those of `Batch`.

        There is one image. The latents are looked at after every step, because a step
        takes long.
        """
        features = settings.load_features()
        settings = dataclasses.replace(settings, chunk_steps=1, features=features)
        size = (pixels[0].shape[0], pixels[0].shape[1])
        self.tiling, self.windows = cut_image(
            size,
            codec.bucket(size),
            structure=features is not None and settings.structure > 0,
            lattice=features is not None and settings.lattice > 0,
            mesh=features is not None and settings.mesh > 0,
        )
        self._steps: Any = None  # the `_Steps` under way
        super().__init__(
            codec, settings, pixels, budgets, regions, icc_profiles, unrefined
        )

    def prepared(self, images: Images) -> Images:
        if getattr(self.frozen.static.config, "texture_channels", 0):
            images = images._replace(noise_origin=jnp.zeros((1, 2), jnp.int32))
        if not self.frozen.static.mean_style:
            return images
        powers = [
            _tile_powers(
                self.tiling,
                self.frozen,
                images,
                view(self.tiling, images, window),
                window,
            )
            for window in self.windows
        ]
        of_image = jax.tree.map(lambda *parts: jnp.sum(jnp.stack(parts), 0), *powers)
        return images._replace(mean_powers=of_image)

    def pixels_at_once(self) -> int:
        window = self.tiling.rows.window * self.tiling.columns.window * STRIDE**2
        return round(window + _WHOLE_SHARE * super().pixels_at_once())

    def score(self, latents: Any, images: Images, rounding: Rounding) -> Terms:
        bits, y_hat = fit.coded_latents(self.frozen, images, rounding, *latents)

        def shown(own: Images, window: Window) -> Array:
            part = latents_in(self.tiling, y_hat, window)
            return fit.shown_image(self.frozen, own, part)

        bpp: Any = np.asarray(bits) / math.prod(self.jobs[0].size)
        return self._sum(images, shown)._replace(bpp=bpp)

    def _sum(self, images: Images, shown: Callable[[Images, Window], Any]) -> Terms:
        """The terms of an image, without a rate; `shown` gives its part in a window."""
        found = []
        for window in self.windows:
            own = view(self.tiling, images, window)
            x_hat = shown(own, window)
            found.append(
                _tile_terms(
                    self.tiling,
                    self.frozen,
                    images,
                    own,
                    self.weights,
                    x_hat,
                    window,
                    np.int32(0),
                )
            )
        return jax.tree.map(lambda *terms: np.sum(terms, axis=0), *found)

    def keep_within_budget(self, state: newton.State) -> Terms:
        """Keep the last latents; return the terms that the last step saw."""
        self.best, self.best_rounding = state.latents, self._rounding(state)
        self.best_terms = self._steps.terms
        return self.best_terms

    def curvature(self, problem: Problem, y_hat: Array) -> Array:
        squares = jnp.zeros_like(y_hat)
        for i, window in enumerate(self.windows):
            own = view(self.tiling, problem.images, window)
            diagonal = newton.diagonal_of(
                problem.frozen,
                own,
                problem.weights,
                latents_in(self.tiling, y_hat, window),
                jax.vmap(partial(jax.random.fold_in, data=i))(problem.rng),
                self.settings.probes,
            )
            squares = placed(
                self.tiling, squares, diagonal, problem.images, own, window
            )
        return newton.smoothed(squares)

    def stepper(self) -> Any:
        self._steps = super().stepper()
        return self._steps

    def make_stepper(self, problem: Problem, log_beta: Array, curvature: Array) -> Any:
        state = newton.start_state(self.start, curvature, log_beta)
        schedule = newton.make_schedule(self.settings)
        return _Steps(problem, state, schedule, self.tiling, self.windows)

    def finish(self, steps: int) -> list[Refined]:
        self._steps = None  # which frees memory for making the files
        return super().finish(steps)

    def decoded_values(self, files: Sequence[Sequence[bytes]]) -> list[list[float]]:
        values = []
        for data in files[0]:
            x_hat = np.array(self.images.x)
            decoded = self.codec.decompress(data)
            height, width = decoded.shape[:2]
            x_hat[0, :height, :width] = decoded.astype(np.float32) / 255

            def shown(own: Images, window: Window, x_hat: np.ndarray = x_hat) -> Any:
                row, column = (STRIDE * place for place in window.start)
                height, width = own.x.shape[1:3]
                return x_hat[:, row : row + height, column : column + width]

            values.append(float(self._sum(self.images, shown).value[0]))
        return [values]


class _Steps:
    """A refinement under way, used like a `steps.Stepper`.

    Attributes:
        state: the state after the steps so far.
        terms: the terms that the last step saw.
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
        self.state = jax.tree.map(jnp.copy, state)  # a step overwrites its memory
        self.terms: Terms

    def __call__(self, count: int, target: Target) -> np.ndarray:
        """Make steps as `steps.Stepper` does, but only to the end of the schedule."""
        taken_bpp = []
        for _ in range(count):
            now = newton.Schedule(*(values[self._next] for values in self._schedule))
            self._step(now, target)
            self._next += 1
            taken_bpp.append(self.terms.bpp)
        return np.mean(taken_bpp, axis=0)

    def _step(self, now: newton.Schedule, target: Target) -> None:
        frozen, images, weights, _, rng = self._problem
        walked, pull_back = _walk(frozen, images, rng, self.state, now)
        canvas = jnp.zeros_like(walked.y_hat)
        found = []
        for window in self._windows:
            own = view(self._tiling, images, window)
            terms, gradient = _gradient(
                self._tiling,
                frozen,
                images,
                own,
                weights,
                latents_in(self._tiling, walked.y_hat, window),
                window,
                now.shift,
            )
            canvas = placed(self._tiling, canvas, gradient, images, own, window)
            found.append(terms)
        self.state, bpp = _move(
            images, target, self.state, now, walked, pull_back, canvas
        )
        terms = jax.tree.map(lambda *terms: np.sum(terms, axis=0), *found)
        taken_bpp: Any = np.asarray(bpp)
        self.terms = terms._replace(bpp=taken_bpp)

    def memory_bytes(self) -> int | None:
        """The bytes that a step takes besides its arguments, as the compiler plans.

        None if the compiler does not say.
        """
        frozen, images, weights, target, rng = self._problem
        now = newton.Schedule(*(values[0] for values in self._schedule))
        window = self._windows[0]
        own = view(self._tiling, images, window)
        part = latents_in(self._tiling, self.state.latents[0], window)
        tile = (self._tiling, frozen, images, own, weights, part, window, now.shift)
        walk = _walk.lower(frozen, images, rng, self.state, now)
        back = (*walk.out_info, self.state.latents[0])
        plans: list[Any] = [
            program.compile().memory_analysis()
            for program in (
                walk,
                _gradient.lower(*tile),
                _move.lower(images, target, self.state, now, *back),
            )
        ]
        if None in plans:
            return None
        most = max(plan.temp_size_in_bytes for plan in plans)
        return plans[0].output_size_in_bytes + most


def _terms_of_tile(
    tiling: Tiling,
    frozen: Frozen,
    images: Images,
    own: Images,
    weights: Weights,
    x_hat: Array,
    window: Window,
    shift: Array,
) -> Terms:
    """What a tile adds to the terms of the image, without a rate."""
    tile = only_tile(tiling, own, window)
    no_bits = jnp.zeros(1)
    terms = terms_of(frozen, tile, weights, no_bits, x_hat, shift)
    return jax.tree.map(lambda term: term * share(images, own), terms)


_tile_terms = FloatProgram(_terms_of_tile, static_argnums=0)


@float_program(static_argnums=0)
def _tile_powers(
    tiling: Tiling,
    frozen: Frozen,
    images: Images,
    own: Images,
    window: Window,
) -> tuple[Array, ...]:
    """What a tile adds to `objective.mean_powers` of the image."""
    powers = mean_powers(frozen, only_tile(tiling, own, window))
    return tuple(power * share(images, own) for power in powers)


@float_program()
def _walk(
    frozen: Frozen,
    images: Images,
    rng: Array,
    state: newton.State,
    now: newton.Schedule,
) -> tuple[newton.Walked, Callable[..., Any]]:
    """The symbols of a step, and a function from gradients to those of the latents.

    The function takes the gradients with respect to bits and y_hat.
    """
    rounding, offset = newton.step_choice(images, rng, state, now)

    def walked(y: Array, z: Array) -> tuple[tuple[Array, Array], newton.Walked]:
        found = newton.hard_walk(frozen, images, y, z, rounding, offset)
        return (found.bits, found.y_hat), found

    _, pull_back, found = jax.vjp(walked, *state.latents, has_aux=True)
    return found, pull_back


@float_program(static_argnums=0)
def _gradient(
    tiling: Tiling,
    frozen: Frozen,
    images: Images,
    own: Images,
    weights: Weights,
    y_hat: Array,
    window: Window,
    shift: Array,
) -> tuple[Terms, Array]:
    """Terms of a tile; gradient of its window's objective with respect to y_hat."""

    def value(y_hat: Array) -> tuple[Array, Terms]:
        x_hat = decoded_image(frozen, own, y_hat)
        no_bits = jnp.zeros(1)
        terms = terms_of(frozen, own, weights, no_bits, x_hat, shift)
        return jnp.sum(terms.value), _terms_of_tile(
            tiling, frozen, images, own, weights, x_hat, window, shift
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
    pixels = images.pixel_counts
    gradients = pull_back((jnp.exp(state.log_beta) / pixels, gradient))
    bpp = walked.coded_bits / pixels
    excess = rate_excess(bpp, target)
    moved = newton.moved(state, now, gradients, walked.y_hat, excess, target.integral)
    return moved, bpp
