# SPDX-License-Identifier: Apache-2.0
"""Refines a batch of images of one bucket, from the first latents to the files.

The weights of the model stay as they are. The steps move y and z of each image to lower

    alpha * D + gamma * (Perceptual and the terms beside it, see `objective.py`)

with a rate R within the budget, which is computed by the differentiable twin of the
entropy networks. They are steps of Adam through a relaxed rounding (`steps.py`,
`sga.py`) or Newton steps between whole numbers (`newton.py`). The multiplier of the
rate follows by dual ascent: it rises while an image takes more than its budget and
falls while it takes less. After each chunk of steps, the rounded latents are scored
with the coder's tables. With a relaxed rounding, the best latents are kept; with Newton
steps the last ones or, when refining for PSNR, the best ones within the budget if they
are better. `fit.py` then makes the files with the real coder.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from semlic_jax.compilation import FloatProgram
from semlic_jax.memory import require_memory
from semlic_jax.refinement import fit, newton
from semlic_jax.refinement import steps as relaxed
from semlic_jax.refinement.jobs import LEVEL_PROBE, MAX_LEVEL, plan_job
from semlic_jax.refinement.objective import (
    Frozen,
    Images,
    Static,
    Terms,
    Weights,
    original_taps,
    pixel_weights,
)
from semlic_jax.refinement.roi import Region
from semlic_jax.refinement.settings import Settings
from semlic_jax.refinement.steps import (
    Latents,
    Problem,
    Stepper,
    Target,
    pick,
    placement,
)
from semlic_jax.refinement.structure import (
    lattice_weights,
    mesh_weights,
    structure_weights,
)
from semlic_jax.refinement.symbols import Rounding

if TYPE_CHECKING:
    from semlic_jax.codec import Codec
    from semlic_jax.codec import Latents as Analysed

Array = jax.Array

# The relaxed rate is steered to slightly above the budget, since `fit.py` can cut off a
# small excess better than it can make use of bits that are left over.
_AIM = 1.003
# Newton steps aim so many bits below the budget, since a stream takes a few bits more
# than its ideal length; but never less than half of a tiny payload.
_SPARE_BITS = 12
# A strictness s of the rounding multiplies the stiffness by exp(-_SOFTENING * s).
_SOFTENING = 8.0


class Progress(NamedTuple):
    """Where a refinement stands after a chunk of steps.

    Attributes:
        step: number of steps that are done.
        steps: number of steps in all.
        bpp: payload bits per pixel of each image's rounded latents, float [B]. With
            `newton`, these are the latents that files would be made from now, but in
            tiles those before the last step.
        value: the objective of the same latents, float [B].
    """

    step: int
    steps: int
    bpp: np.ndarray
    value: np.ndarray


class Refined(NamedTuple):
    """A refined image.

    Attributes:
        data: the file, an ordinary `.semlic` file.
        unrefined: the unrefined file within the same budget.
        value: objective of the image that `data` decodes to; lower is better.
        unrefined_value: objective of `unrefined`, which `value` never exceeds.
        steps: number of steps that were made, fewer than asked for if it was stopped.
        history: for each chunk of steps, the last `step` and the image's `bpp`, `value`
            and `beta` after it.
    """

    data: bytes
    unrefined: bytes
    value: float
    unrefined_value: float
    steps: int
    history: tuple[dict[str, float], ...]


_original_taps = FloatProgram(original_taps)
_structure_weights = jax.jit(structure_weights)
_lattice_weights = jax.jit(lattice_weights)
_mesh_weights = jax.jit(mesh_weights)


class Batch:
    """The refinement of one batch: what is fixed, and what the files are made from.

    A subclass that works in another way overrides the methods that do the work:
    `prepared`, `pixels_at_once`, `make_stepper` and `score`, which `__init__` calls,
    and `curvature`, `stepper`, `keep_within_budget`, `decoded_values` and `finish`.

    Attributes:
        codec: the codec of the model.
        settings: the settings of the refinement.
        jobs: what each image's file is made with, see `jobs.Job`.
        frozen, images, weights, target: arguments of the steps, see `steps.Problem`.
        rng: a random key for each image, [B].
        place: function that puts a pytree on the devices, see `steps.placement`.
        start: the first latents, y_scaled and z.
        log_beta: logarithm of the rate's multiplier at the start, float32 [B].
        best: the latents to make the files from, at first those of the start.
        best_rounding: how the best latents are rounded.
        best_terms: `Terms` of the best latents, rounded in this way.
        history: `step`, `bpp`, `value` and `beta` after each chunk of steps, [B] each.
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
        """Analyse the images and prepare their refinement up to the first step.

        Args:
            codec: the codec of the model.
            settings: the settings of the refinement.
            pixels: uint8 [H, W, 3] each, all of one bucket of the codec.
            budgets: the most bytes of each file.
            regions: region of interest of each image, or None.
            icc_profiles: ICC profile of each image, or None.
            unrefined: unrefined file of each image within its budget.

        Raises:
            ValueError: the images are of several buckets, a region's mask has another
                size than its image, an unrefined file is of another size, or
                perceptual terms lack feature weights.
            MemoryError: there is no room for the steps.
        """
        self.codec = codec
        self.settings = settings
        self._newton = settings.method == "newton"
        analysed = [codec.analyse(image) for image in pixels]
        grids = {latents.y.shape for latents in analysed}
        if len(grids) != 1:
            raise ValueError(
                "expected images of one padded size, found latents of the shapes "
                f"{sorted(grids)}"
            )
        self.jobs = [
            plan_job(
                codec,
                latents,
                budget_bytes=budget,
                region=region,
                icc_profile=profile,
                unrefined=data,
                overshoot=settings.overshoot,
            )
            for latents, budget, region, profile, data in zip(
                analysed, budgets, regions, icc_profiles, unrefined, strict=True
            )
        ]
        sizes = np.array([job.size for job in self.jobs], np.int32)
        levels = np.array([job.level for job in self.jobs])
        payload_bits = np.array([job.payload_bits for job in self.jobs])

        grid = grids.pop()
        features = settings.load_features()
        x = _padded(pixels, grid)
        weights, feature_weights = pixel_weights(x, sizes.tolist(), regions)
        static = Static(
            config=codec.config,
            method=settings.method,
            perceptual=features is not None,
            style=features is not None and settings.style > 0,
            mean_style=features is not None and settings.mean_style > 0,
            padded=bool((sizes != x.shape[1:3]).any()),
            dtype=settings.dtype,
        )
        self.weights = Weights(
            alpha=jnp.float32(settings.alpha),
            gamma=jnp.float32(settings.gamma),
            style=jnp.float32(settings.style),
            mean_style=jnp.float32(settings.mean_style),
            structure=jnp.float32(settings.structure),
            lattice=jnp.float32(settings.lattice),
            mesh=jnp.float32(settings.mesh),
        )
        y_bits, _ = codec.entropy.y_tables.bits_lookup()
        z_bits, _ = codec.entropy.z_tables.bits_lookup()
        frozen = Frozen(
            params=codec.twin_params(),
            y_bits=jnp.asarray(y_bits),
            z_bits=jnp.asarray(z_bits),
            features=features,
            static=static,
        )
        self.place = place = placement(len(pixels))
        self.frozen = place(frozen, None)
        images = Images(
            x=place(x, 0),
            sizes=place(sizes, 0),
            quality=place(_quality(levels), 0),
            weights=place(weights, 0),
            feature_weights=place(feature_weights, 0),
        )
        self.images = self.prepared(images)
        self.start = place(self._scaled(analysed, levels), 0)
        self._require_memory()
        self.best, self.best_rounding = self.start, self._plain()
        self.best_terms = self.score(self.best, self.images, self.best_rounding)
        self.history: list[dict[str, np.ndarray]] = []
        log_beta, scale = self._slope(analysed, self.best_terms)
        self.log_beta = place(log_beta, 0)
        counts = sizes.prod(axis=1).astype(np.float32)
        aim_bits = _AIM * payload_bits
        if self._newton:
            aim_bits = payload_bits - np.minimum(_SPARE_BITS, payload_bits / 2)
        self.target = Target(
            place(np.float32(aim_bits / counts), 0),
            place(np.float32(scale * counts), 0),
            jnp.float32(
                settings.newton_integral if self._newton else settings.integral
            ),
            jnp.float32(settings.proportional),
        )
        keys = [
            jax.random.fold_in(
                jax.random.key(settings.seed), zlib.crc32(image.tobytes())
            )
            for image in pixels
        ]
        self.rng = place(jnp.stack(keys), 0)

    def prepared(self, images: Images) -> Images:
        """The images with all that the objective needs to know of the originals."""
        features = self.frozen.features
        if features is None:
            return images
        taps = self.place(_original_taps(features, images.x), 1)
        known = images.x, images.weights, images.sizes
        structure: tuple[Any, ...] = ()
        if self.settings.structure:
            structure = self.place(_structure_weights(*known), 0)
        lattice: tuple[Any, ...] = ()
        if self.settings.lattice:
            lattice = (self.place(_lattice_weights(*known), 0),)
        mesh: tuple[Any, ...] = ()
        if self.settings.mesh:
            mesh = (self.place(_mesh_weights(images.weights, images.sizes), 0),)
        return images._replace(
            taps=taps, structure=structure, lattice=lattice, mesh=mesh
        )

    def _require_memory(self) -> None:
        """Raise MemoryError if there is no room for the steps.

        Since nothing as large has run by then, the stepper has placeholders as numbers.
        """

        def needed_bytes() -> int | None:
            count = len(self.jobs)
            zeros = self.place(np.zeros(count, np.float32), 0)
            keys = self.place(jax.random.split(jax.random.key(0), count), 0)
            target = Target(zeros, zeros, jnp.float32(0), jnp.float32(0))
            problem = self._problem(target, keys)
            return self.make_stepper(problem, zeros, self.start[0]).memory_bytes()

        require_memory("refining", self.pixels_at_once(), needed_bytes)

    def pixels_at_once(self) -> int:
        """The number of pixels that a step works on at once."""
        return math.prod(self.images.x.shape[:3])

    def _scaled(self, analysed: Sequence[Analysed], levels: np.ndarray) -> Latents:
        """y_scaled and z of all images, each at its own quality level."""
        pairs = [
            self.codec.scaled(latents, level)
            for latents, level in zip(analysed, levels.tolist(), strict=True)
        ]
        y_scaled, z = zip(*pairs, strict=True)
        return jnp.stack(y_scaled), jnp.stack(z)

    def _slope(
        self, analysed: Sequence[Analysed], here: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """The logarithm of beta at the start, and the scale of the loss, float32 [B].

        The multiplier of a constraint is the slope of the best value over the
        constraint. The slope between unrefined files of neighbouring qualities is a
        good estimate of it.

        Args:
            analysed: latents of the images.
            here: `Terms` of the start, rounded to the nearest whole numbers.
        """
        levels = np.array([job.level for job in self.jobs])
        direction = np.where(levels >= LEVEL_PROBE, -1, 1)
        levels = levels + direction * LEVEL_PROBE
        images = self.images._replace(quality=self.place(_quality(levels), 0))
        start = self.place(self._scaled(analysed, levels), 0)
        there = self.score(start, images, self._plain())
        rise = (there.bpp - here.bpp) * direction
        slope = (here.value - there.value) * direction / np.maximum(rise, 1e-6)
        usual = here.value / np.maximum(here.bpp, 1e-6)
        slope = np.clip(slope, 0.02 * usual, 5 * usual)
        if self.settings.beta is not None:
            slope = np.full_like(slope, self.settings.beta)
        return np.log(slope), 1 / np.maximum(here.value, 1e-9)

    def score(self, latents: Latents, images: Images, rounding: Rounding) -> Any:
        """`Terms` of the rounded latents, as NumPy arrays."""
        terms, _ = fit.score(self.frozen, images, self.weights, rounding, *latents)
        return jax.tree.map(np.asarray, terms)

    def _plain(self) -> Rounding:
        """The rounding to the nearest whole number."""
        return Rounding(jnp.zeros(len(self.jobs)))

    def _rounding(self, state: Any) -> Rounding:
        """How the latents of a state are rounded."""
        if not self._newton:
            return self._plain()
        stiffness = newton.stiffness(
            state.curvature, state.log_beta, self.images, self.settings.kappa
        )
        return self._plain()._replace(stiffness=stiffness)

    def _rounding_at(self, strictness: np.ndarray) -> Rounding:
        """How the best latents are rounded at a strictness [B]; see `fit.fit_files`."""
        best = self.best_rounding
        if best.stiffness is None:
            return Rounding(jnp.asarray(strictness, jnp.float32))
        factor = np.exp(-_SOFTENING * strictness).astype(np.float32)
        return best._replace(stiffness=best.stiffness * factor[:, None, None, None])

    def run(self, progress: Callable[[Progress], bool | None] | None) -> int:
        """Make the steps, which works once; return how many were made.

        After each chunk of steps `progress` is called; it stops them by returning
        False.
        """
        settings, steps = self.settings, self.settings.steps
        stepper = self.stepper()
        aim = self.target
        done = 0
        while done < steps:
            count = min(settings.chunk_steps, steps - done)
            taken_bpp = stepper(count, aim)
            done += count
            state = stepper.state
            beta = np.exp(np.asarray(state.log_beta))
            if self._newton:
                hard = self.keep_within_budget(state)
            else:
                hard = self._keep_better(state, beta)
                # Relaxed latents take slightly more or fewer bits than rounded ones.
                ratio = np.clip(taken_bpp / hard.bpp, 0.7, 1.4)
                aim = aim._replace(bpp=self.target.bpp * ratio)
            self.history.append({"step": np.full(len(beta), done), "beta": beta})
            self.history[-1] |= {"bpp": hard.bpp, "value": hard.value}
            now = Progress(done, steps, hard.bpp, hard.value)
            if progress is not None and progress(now) is False:
                break
        return done

    def _keep_better(self, state: relaxed.State, beta: np.ndarray) -> Any:
        """Keep a state's latents where they are better when rounded.

        Returns the `Terms` of the state's rounded latents, whether they are kept or
        not.
        """
        rounding = self._rounding(state)
        hard = self.score(state.latents, self.images, rounding)
        better = self._lagrangian(hard, beta) < self._lagrangian(self.best_terms, beta)
        self.best = pick(better, state.latents, self.best)
        self.best_terms = jax.tree.map(partial(np.where, better), hard, self.best_terms)
        return hard

    def keep_within_budget(self, state: newton.State) -> Any:
        """Keep the last latents or the best within the budget; return their `Terms`.

        The ones with the lower Lagrangian are kept; the last ones if no best ones were
        found, which is always so with perceptual terms.
        """
        last, best = self._rounding(state), state.best
        self.best, self.best_rounding = state.latents, last
        self.best_terms = self.score(state.latents, self.images, last)
        found = np.isfinite(np.asarray(best.value))
        if found.any():
            rounding = last._replace(stiffness=best.stiffness)
            terms = self.score(best.latents, self.images, rounding)
            beta = np.exp(np.asarray(state.log_beta))
            found &= self._lagrangian(terms, beta) <= self._lagrangian(
                self.best_terms, beta
            )
            self.best = pick(found, best.latents, self.best)
            self.best_rounding = pick(found, rounding, last)
            self.best_terms = jax.tree.map(
                partial(np.where, found), terms, self.best_terms
            )
        return self.best_terms

    def stepper(self) -> Stepper:
        """A stepper that makes the steps of this batch, from its start."""
        problem = self._problem(self.target, self.rng)
        first = jnp.round(self.start[0])
        curvature = self.curvature(problem, first) if self._newton else first
        return self.make_stepper(problem, self.log_beta, curvature)

    def curvature(self, problem: Problem, y_hat: Array) -> Array:
        """The curvature at y_hat, as `newton.curvature_of` gives it."""
        return newton.curvature_of(
            *problem[:3], y_hat, problem.rng, self.settings.probes
        )

    def _problem(self, target: Target, rng: Array) -> Problem:
        return Problem(self.frozen, self.images, self.weights, target, rng)

    def make_stepper(
        self, problem: Problem, log_beta: Array, curvature: Array
    ) -> Stepper:
        """Make a stepper; only the method `newton` uses the curvature."""
        if not self._newton:
            state = relaxed.start_state(self.start, log_beta)
            schedule = relaxed.make_schedule(self.settings)
            return Stepper(problem, state, schedule, relaxed.run_steps)
        newton_state = newton.start_state(self.start, curvature, log_beta)
        newton_schedule = newton.make_schedule(self.settings)
        return Stepper(problem, newton_state, newton_schedule, newton.run_steps)

    def _lagrangian(self, terms: Terms, beta: np.ndarray) -> np.ndarray:
        """Value and rate in one number for each image, [B].

        Bits above the target count twice, because they will have to be cut off.
        """
        excess = terms.bpp - np.asarray(self.target.bpp)
        return terms.value + beta * (np.minimum(excess, 0) + 2 * np.maximum(excess, 0))

    def decoded_values(self, files: Sequence[Sequence[bytes]]) -> list[list[float]]:
        """The objective of what each file decodes to; see `fit.decoded_values`."""
        return fit.decoded_values(
            self.codec, self.frozen, self.images, self.weights, files
        )

    def finish(self, steps: int) -> list[Refined]:
        """Make the files from the best latents, after so many steps."""
        finished = fit.fit_files(
            self.codec,
            self.frozen,
            self.images,
            self.best,
            self._rounding_at,
            self.decoded_values,
            self.jobs,
        )
        return [
            Refined(
                data=fitted.data,
                unrefined=self.jobs[i].unrefined,
                value=fitted.value,
                unrefined_value=fitted.unrefined_value,
                steps=steps,
                history=tuple(
                    {key: float(values[i]) for key, values in row.items()}
                    for row in self.history
                ),
            )
            for i, fitted in enumerate(finished)
        ]


def _quality(levels: np.ndarray) -> np.ndarray:
    """Quality in [0, 1] of levels from 0 to 255, float32 [B]."""
    return levels.astype(np.float32) / np.float32(MAX_LEVEL)


def _padded(pixels: Sequence[np.ndarray], grid: tuple[int, ...]) -> np.ndarray:
    """Images float32 [B, H, W, 3] in [0, 1], padded as the codec does: by the edge."""
    side = 16
    padded = []
    for image in pixels:
        pads = [(0, side * grid[i] - image.shape[i]) for i in range(2)]
        padded.append(np.pad(image, (*pads, (0, 0)), mode="edge"))
    return np.stack(padded).astype(np.float32) / 255
