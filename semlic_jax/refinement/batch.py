# SPDX-License-Identifier: Apache-2.0
"""A batch of images of one bucket, from the first latents to the files.

The weights stay as they are. Steps move y and z of each image to lower

    alpha * D + gamma * (Perceptual and the terms beside it, see `objective.py`)

with a rate R within the budget, through the fake-quantised twin of the entropy
networks: Adam through a relaxed rounding (`steps.py`, `sga.py`) or Newton steps between
whole numbers (`newton.py`). The multiplier of the rate follows by dual ascent: it rises
while an image takes more than its budget and falls while it takes less. After each
chunk of steps the rounded latents are scored with the coder's tables. Of a relaxed
rounding the best are kept; of Newton steps the last, or for PSNR the best within the
budget where that is better. `fit.py` then makes the files with the real coder.
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
from semlic_jax.refinement.structure import lattice_weights, structure_weights
from semlic_jax.refinement.symbols import Rounding

if TYPE_CHECKING:
    from semlic_jax.codec import Codec
    from semlic_jax.codec import Latents as Analysed

Array = jax.Array

# The relaxed rate is steered to slightly above the budget: what little is too much can
# be cut off well, what is missing cannot be filled up as well.
_AIM = 1.003
# Newton steps aim a little below the budget: streams take a few bits more than their
# ideal length. Half of the payload at most, where that is hardly anything.
_SPARE_BITS = 12
_LEVEL_PROBE = 16
# With a region whose pixels weigh so much more than others, the unrefined file that the
# refinement starts from is larger than the budget by this share. On five photographs
# at 0.15 bpp, foreground weight 0.9: +0.5 dB inside at 0.1, +0.9 at 0.3, +1.15 at 0.5.
_REGION_RATIO = 10.0
_REGION_OVERSHOOT = 0.5
# How fast the weight of the error falls with the strictness of rounding.
_SOFTENING = 8.0
_MAX_LEVEL = 255


class Progress(NamedTuple):
    """Where a refinement stands, after a chunk of steps.

    Attributes:
        step, steps: done, and in all.
        bpp: payload bits per pixel of the rounded latents of each image, float [B]; by
            `newton` those that files would be made of now, in tiles of the step before.
        value: the objective of each image, float [B].
    """

    step: int
    steps: int
    bpp: np.ndarray
    value: np.ndarray


class Refined(NamedTuple):
    """A refined image.

    Attributes:
        data: the file, an ordinary `.semlic` file.
        unrefined: the file without refinement within the same budget.
        value: objective of `data` as decoded, lower is better.
        unrefined_value: objective of `unrefined`; `value` is never above it.
        steps: that were made; fewer than asked for where it was stopped.
        history: of each chunk, the `step` and the image's `bpp`, `value` and `beta`.
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


class Batch:
    """One batch from start to end; what is fixed, and what the files are made of.

    A subclass that works in another way overrides what does the work: `prepared`,
    `pixels_at_once`, `make_stepper` and `score`, which `__init__` calls, and
    `curvature`, `stepper`, `keep_within_budget`, `decoded_values` and `finish`.

    Attributes:
        codec, settings: of the refinement.
        jobs: what the files are made with; one for each image.
        frozen, images, weights, target: what the steps are given.
        rng: a key for each image, [B].
        place: puts a pytree on the devices, split along an axis or (None) whole.
        start: the first latents.
        log_beta: of the multiplier of the rate at the start, float32 [B].
        best, best_rounding, best_terms: latents to make the files of, how they are
            rounded and the terms of that; those of the start before the first steps.
        history: of each chunk of steps `step`, `bpp`, `value` and `beta`, [B] each.
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
        """A batch that is ready to be refined.

        Args:
            codec, settings: of the refinement.
            pixels: uint8 [H, W, 3] each, padded by the codec to the same size.
            budgets: the most bytes of each file.
            regions, icc_profiles: of each image, or None.
            unrefined: of each image the file within its budget.

        Raises:
            ValueError: images of several buckets, or perceptual terms without feature
                weights.
            MemoryError: there is no room for the steps.
        """
        self.codec = codec
        self.settings = settings
        self._newton = settings.method == "newton"
        analysed = [codec.analyse(image) for image in pixels]
        grids = {latents.y.shape for latents in analysed}
        if len(grids) != 1:
            raise ValueError(
                "expected images of one bucket, found latents of the shapes "
                f"{sorted(grids)}"
            )
        self.jobs = [
            self._job(*parts)
            for parts in zip(
                analysed, budgets, regions, icc_profiles, unrefined, strict=True
            )
        ]
        sizes = np.array([job.size for job in self.jobs], np.int32)
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
            quality=place(self._quality(0), 0),
            weights=place(weights, 0),
            feature_weights=place(feature_weights, 0),
        )
        self.images = self.prepared(images)
        self.start = place(self._scaled(analysed, 0), 0)
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
        """With what the objective wants to know of the originals."""
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
        return images._replace(taps=taps, structure=structure, lattice=lattice)

    def _require_memory(self) -> None:
        """MemoryError where there is no room for the steps.

        Before anything of their size has run: a stepper with numbers of no meaning.
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
        """That a step works on."""
        return math.prod(self.images.x.shape[:3])

    def _job(
        self,
        latents: Analysed,
        budget_bytes: int,
        region: Region | None,
        icc_profile: bytes | None,
        unrefined: bytes,
    ) -> fit.Job:
        """What the image's file is made with, see there; also the level to start from.

        What a file takes besides its symbols is measured near the unrefined file.
        """
        codec, size = self.codec, latents.size
        level = round(codec.info(unrefined)["quality"] * _MAX_LEVEL)
        probe = level + _LEVEL_PROBE
        if probe > _MAX_LEVEL:
            probe = level - _LEVEL_PROBE
        symbols = codec.entropy.symbols(*codec.scaled(latents, probe), probe, size)
        data = codec.encode_symbols(symbols, probe, size, icc_profile)
        overhead_bits = 8 * len(data) - codec.entropy.ideal_bits(symbols, size)
        growth = math.log(len(data) / len(unrefined)) / (probe - level)
        wanted = math.log(budget_bytes * (1 + self._overshoot(region)) / len(unrefined))
        level += round(wanted / max(growth, 1e-3))
        return fit.Job(
            size=size,
            level=min(max(level, 0), _MAX_LEVEL),
            budget_bytes=budget_bytes,
            payload_bits=8 * float(budget_bytes) - overhead_bits,
            icc_profile=icc_profile,
            unrefined=unrefined,
        )

    def _overshoot(self, region: Region | None) -> float:
        """How much larger than the budget the file is that an image starts from.

        What matters gets no finer than the quantiser is, so a region starts from a
        finer one, the more so the more it matters.
        """
        usual = self.settings.overshoot
        if region is None:
            return usual
        reached = abs(math.log(region.weight_ratio())) / math.log(_REGION_RATIO)
        extra = max(_REGION_OVERSHOOT - usual, 0.0)
        return usual + extra * min(reached, 1.0)

    def _quality(self, shift: int) -> np.ndarray:
        """Quality, float32 [B], so many levels above those of the jobs."""
        levels = np.array([job.level for job in self.jobs], np.float32)
        return (levels + shift) / _MAX_LEVEL

    def _scaled(self, analysed: Sequence[Analysed], shift: int) -> Latents:
        """y_scaled and z, so many levels above those of the jobs."""
        pairs = [
            self.codec.scaled(latents, job.level + shift)
            for latents, job in zip(analysed, self.jobs, strict=True)
        ]
        y_scaled, z = zip(*pairs, strict=True)
        return jnp.stack(y_scaled), jnp.stack(z)

    def _slope(
        self, analysed: Sequence[Analysed], here: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """log of beta to start with, and the loss's scale: both float32 [B].

        The multiplier of a constraint is the slope of the best value over the
        constraint, and the unrefined files of neighbouring qualities give that well.

        Args:
            analysed: the images.
            here: `Terms` of the start, rounded to the nearest whole numbers.
        """
        levels = [job.level for job in self.jobs]
        shift = -_LEVEL_PROBE if min(levels) >= _LEVEL_PROBE else _LEVEL_PROBE
        shift = min(shift, _MAX_LEVEL - max(levels)) or -1
        images = self.images._replace(quality=self.place(self._quality(shift), 0))
        start = self.place(self._scaled(analysed, shift), 0)
        there = self.score(start, images, self._plain())
        rise = (there.bpp - here.bpp) * np.sign(shift)
        slope = (here.value - there.value) * np.sign(shift) / np.maximum(rise, 1e-6)
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
        """To the nearest whole number."""
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
        """See `fit.fit_files`."""
        best = self.best_rounding
        if best.stiffness is None:
            return Rounding(jnp.asarray(strictness, jnp.float32))
        factor = np.exp(-_SOFTENING * strictness).astype(np.float32)
        return best._replace(stiffness=best.stiffness * factor[:, None, None, None])

    def run(self, progress: Callable[[Progress], bool | None] | None) -> int:
        """Refine, once; returns the number of steps that were made."""
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
                # Relaxed latents take a little more or less than rounded ones.
                ratio = np.clip(taken_bpp / hard.bpp, 0.7, 1.4)
                aim = aim._replace(bpp=self.target.bpp * ratio)
            self.history.append({"step": np.full(len(beta), done), "beta": beta})
            self.history[-1] |= {"bpp": hard.bpp, "value": hard.value}
            now = Progress(done, steps, hard.bpp, hard.value)
            if progress is not None and progress(now) is False:
                break
        return done

    def _keep_better(self, state: relaxed.State, beta: np.ndarray) -> Any:
        """Keeps the rounded latents of a state where they are better; their `Terms`."""
        rounding = self._rounding(state)
        hard = self.score(state.latents, self.images, rounding)
        better = self._lagrangian(hard, beta) < self._lagrangian(self.best_terms, beta)
        self.best = pick(better, state.latents, self.best)
        self.best_terms = jax.tree.map(partial(np.where, better), hard, self.best_terms)
        return hard

    def keep_within_budget(self, state: newton.State) -> Any:
        """Keeps the best within the budget, or the last latents; their `Terms`.

        Whichever has the lower Lagrangian; the last ones where no best was found, as
        with perceptual terms.
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
        """The steps of this batch, from its start."""
        problem = self._problem(self.target, self.rng)
        first = jnp.round(self.start[0])
        curvature = self.curvature(problem, first) if self._newton else first
        return self.make_stepper(problem, self.log_beta, curvature)

    def curvature(self, problem: Problem, y_hat: Array) -> Array:
        """See `newton.curvature_of`."""
        return newton.curvature_of(
            *problem[:3], y_hat, problem.rng, self.settings.probes
        )

    def _problem(self, target: Target, rng: Array) -> Problem:
        return Problem(self.frozen, self.images, self.weights, target, rng)

    def make_stepper(
        self, problem: Problem, log_beta: Array, curvature: Array
    ) -> Stepper:
        """A stepper; the curvature is for the method `newton` alone."""
        if not self._newton:
            state = relaxed.start_state(self.start, log_beta)
            schedule = relaxed.make_schedule(self.settings)
            return Stepper(problem, state, schedule, relaxed.run_steps)
        newton_state = newton.start_state(self.start, curvature, log_beta)
        newton_schedule = newton.make_schedule(self.settings)
        return Stepper(problem, newton_state, newton_schedule, newton.run_steps)

    def _lagrangian(self, terms: Terms, beta: np.ndarray) -> np.ndarray:
        """Value and rate in one number; what is over the budget has to be cut off."""
        excess = terms.bpp - np.asarray(self.target.bpp)
        return terms.value + beta * (np.minimum(excess, 0) + 2 * np.maximum(excess, 0))

    def decoded_values(self, files: Sequence[Sequence[bytes]]) -> list[list[float]]:
        """The objective of what each of the files of each image decodes to."""
        return fit.decoded_values(
            self.codec, self.frozen, self.images, self.weights, files
        )

    def finish(self, steps: int) -> list[Refined]:
        """The files."""
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


def _padded(pixels: Sequence[np.ndarray], grid: tuple[int, ...]) -> np.ndarray:
    """float32 [B, H, W, 3] in [0, 1], the edge repeated, as the codec pads."""
    side = 16
    padded = []
    for image in pixels:
        pads = [(0, side * grid[i] - image.shape[i]) for i in range(2)]
        padded.append(np.pad(image, (*pads, (0, 0)), mode="edge"))
    return np.stack(padded).astype(np.float32) / 255
