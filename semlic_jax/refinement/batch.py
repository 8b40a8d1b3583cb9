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
from typing import Any, NamedTuple

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
    Weights,
    equal_weights,
    original_taps,
)
from semlic_jax.refinement.roi import Region
from semlic_jax.refinement.settings import Settings
from semlic_jax.refinement.steps import Latents, Problem, Stepper, Target, pick
from semlic_jax.refinement.structure import lattice_weights, structure_weights
from semlic_jax.refinement.symbols import Rounding

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
    """One batch from start to end; what is fixed, and what the files are made of."""

    def __init__(
        self,
        codec: Any,
        settings: Settings,
        pixels: Sequence[np.ndarray],
        budgets: Sequence[int],
        regions: Sequence[Region | None],
        icc_profiles: Sequence[bytes | None],
        unrefined: Sequence[bytes],
    ) -> None:
        self.codec = codec
        self.settings = settings
        self._newton = settings.method == "newton"
        self.unrefined = list(unrefined)
        self.icc_profiles = list(icc_profiles)
        self.budgets = list(budgets)
        self._regions = list(regions)
        self.sizes = [(image.shape[0], image.shape[1]) for image in pixels]
        analysed = [codec.analyse(image) for image in pixels]
        grids = {latents.y.shape for latents in analysed}
        if len(grids) != 1:
            raise ValueError(
                "expected images of one bucket, found latents of the shapes "
                f"{sorted(grids)}"
            )
        starts = [self._start(latents, i) for i, latents in enumerate(analysed)]
        self.levels = [level for level, _ in starts]
        overheads = [overhead_bits for _, overhead_bits in starts]
        counts = np.array([height * width for height, width in self.sizes], np.float32)
        self.payload_bits = 8 * np.array(budgets, np.float64) - np.array(overheads)

        grid = grids.pop()
        features = settings.load_features()
        x = _padded(pixels, grid)
        sizes = np.array(self.sizes, np.int32)
        weights, feature_weights = _pixel_weights(x, self.sizes, regions)
        self.static = Static(
            codec.config,
            settings.method,
            features is not None,
            features is not None and settings.style > 0,
            features is not None and settings.mean_style > 0,
            bool((sizes != x.shape[1:3]).any()),
            settings.dtype,
        )
        self.weights = Weights(
            jnp.float32(settings.alpha),
            jnp.float32(settings.gamma),
            jnp.float32(settings.style),
            jnp.float32(settings.mean_style),
            jnp.float32(settings.structure),
            jnp.float32(settings.lattice),
        )
        y_bits, _ = codec.entropy.y_tables.bits_lookup()
        z_bits, _ = codec.entropy.z_tables.bits_lookup()
        frozen = Frozen(
            codec.twin_params(), jnp.asarray(y_bits), jnp.asarray(z_bits), features
        )
        self.place = place = _placement(len(pixels))
        self.frozen = place(frozen, None)
        images = Images(
            x=place(x, 0),
            sizes=place(sizes, 0),
            quality=place(self._quality(0), 0),
            weights=place(weights, 0),
            feature_weights=place(feature_weights, 0),
        )
        self.images = self._prepared(images)
        self.start = place(self._scaled(analysed, self.levels), 0)
        self._require_memory()
        log_beta, scale = self._slope(analysed)
        self.log_beta = place(log_beta, 0)
        aim_bits = _AIM * self.payload_bits
        if self._newton:
            spare_bits = np.minimum(_SPARE_BITS, self.payload_bits / 2)
            aim_bits = self.payload_bits - spare_bits
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

    def _prepared(self, images: Images) -> Images:
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
            count = len(self.sizes)
            zeros = self.place(np.zeros(count, np.float32), 0)
            keys = self.place(jax.random.split(jax.random.key(0), count), 0)
            target = Target(zeros, zeros, jnp.float32(0), jnp.float32(0))
            problem = self._problem(target, keys)
            return self._stepper(problem, zeros, self.start[0]).memory_bytes()

        require_memory("refining", self._pixels_at_once(), needed_bytes)

    def _pixels_at_once(self) -> int:
        """That a step works on."""
        return math.prod(self.images.x.shape[:3])

    def _start(self, latents: Any, i: int) -> tuple[int, float]:
        """The level to start from, and the bits of a file besides its symbols."""
        codec, profile = self.codec, self.icc_profiles[i]
        size = self.sizes[i]
        level = round(codec.info(self.unrefined[i])["quality"] * _MAX_LEVEL)
        probe = level + _LEVEL_PROBE
        if probe > _MAX_LEVEL:
            probe = level - _LEVEL_PROBE
        symbols = codec.entropy.symbols(*codec.scaled(latents, probe), probe, size)
        data = codec.encode_symbols(symbols, probe, size, profile)
        overhead_bits = 8 * len(data) - codec.entropy.ideal_bits(symbols, size)
        growth = math.log(len(data) / len(self.unrefined[i])) / (probe - level)
        wanted = math.log(
            self.budgets[i] * (1 + self._overshoot(i)) / len(self.unrefined[i])
        )
        level += round(wanted / max(growth, 1e-3))
        return min(max(level, 0), _MAX_LEVEL), overhead_bits

    def _overshoot(self, i: int) -> float:
        """How much larger than the budget the file is that image i starts from.

        What matters gets no finer than the quantiser is, so a region starts from a
        finer one, the more so the more it matters.
        """
        region, usual = self._regions[i], self.settings.overshoot
        if region is None:
            return usual
        reached = abs(math.log(region.weight_ratio())) / math.log(_REGION_RATIO)
        extra = max(_REGION_OVERSHOOT - usual, 0.0)
        return usual + extra * min(reached, 1.0)

    def _quality(self, shift: int) -> np.ndarray:
        return (np.array(self.levels, np.float32) + shift) / _MAX_LEVEL

    def _scaled(self, analysed: Sequence[Any], levels: Sequence[int]) -> Latents:
        pairs = [
            self.codec.scaled(latents, level)
            for latents, level in zip(analysed, levels, strict=True)
        ]
        y_scaled, z = zip(*pairs, strict=True)
        return jnp.stack(y_scaled), jnp.stack(z)

    def _slope(self, analysed: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """log of beta to start with, and the loss's scale: both float32 [B].

        The multiplier of a constraint is the slope of the best value over the
        constraint, and the unrefined files of neighbouring qualities give that well.
        """
        shift = -_LEVEL_PROBE if min(self.levels) >= _LEVEL_PROBE else _LEVEL_PROBE
        shift = min(shift, _MAX_LEVEL - max(self.levels)) or -1
        plain = Rounding(jnp.zeros(len(self.levels)))
        here = self._score(self.start, self.images, plain)
        levels = [level + shift for level in self.levels]
        images = self.images._replace(quality=self.place(self._quality(shift), 0))
        start = self.place(self._scaled(analysed, levels), 0)
        there = self._score(start, images, plain)
        rise = (there.bpp - here.bpp) * np.sign(shift)
        slope = (here.value - there.value) * np.sign(shift) / np.maximum(rise, 1e-6)
        usual = here.value / np.maximum(here.bpp, 1e-6)
        slope = np.clip(slope, 0.02 * usual, 5 * usual)
        if self.settings.beta is not None:
            slope = np.full_like(slope, self.settings.beta)
        return np.log(slope), 1 / np.maximum(here.value, 1e-9)

    def _score(self, latents: Latents, images: Images, rounding: Rounding) -> Any:
        """`Terms` of the rounded latents, as NumPy arrays."""
        terms, _ = fit.score(
            self.static, self.frozen, images, self.weights, rounding, *latents
        )
        return jax.tree.map(np.asarray, terms)

    def _rounding(self, state: Any) -> Rounding:
        """How the latents of a state are rounded."""
        plain = Rounding(jnp.zeros(len(self.levels)))
        if not self._newton:
            return plain
        stiffness = newton.stiffness(
            state.curvature, state.log_beta, self.images, self.settings.kappa
        )
        return plain._replace(stiffness=stiffness)

    def _rounding_at(self, strictness: np.ndarray) -> Rounding:
        """See `fit.fit_files`."""
        best = self.best_rounding
        if best.stiffness is None:
            return Rounding(jnp.asarray(strictness, jnp.float32))
        factor = np.exp(-_SOFTENING * strictness).astype(np.float32)
        return best._replace(stiffness=best.stiffness * factor[:, None, None, None])

    def run(self, progress: Callable[[Progress], bool | None] | None) -> int:
        """Refine; returns the number of steps that were made."""
        settings, steps = self.settings, self.settings.steps
        stepper = self.stepper()
        aim = self.target
        self.best, self.best_rounding = self.start, self._rounding(stepper.state)
        if not self._newton:
            self.best_terms = self._score(self.best, self.images, self.best_rounding)
        self.history: list[dict[str, np.ndarray]] = []
        done = 0
        while done < steps:
            count = min(settings.chunk_steps, steps - done)
            taken_bpp = stepper(count, aim)
            done += count
            state = stepper.state
            beta = np.exp(np.asarray(state.log_beta))
            if self._newton:
                hard = self._keep_within_budget(state)
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
        hard = self._score(state.latents, self.images, rounding)
        better = self._lagrangian(hard, beta) < self._lagrangian(self.best_terms, beta)
        self.best = pick(better, state.latents, self.best)
        self.best_terms = jax.tree.map(partial(np.where, better), hard, self.best_terms)
        return hard

    def _keep_within_budget(self, state: newton.State) -> Any:
        """Keeps the best within the budget, or the last latents; their `Terms`.

        Whichever has the lower Lagrangian; the last ones where no best was found, as
        with perceptual terms.
        """
        last, best = self._rounding(state), state.best
        self.best, self.best_rounding = state.latents, last
        self.best_terms = self._score(state.latents, self.images, last)
        found = np.isfinite(np.asarray(best.value))
        if found.any():
            rounding = last._replace(stiffness=best.stiffness)
            terms = self._score(best.latents, self.images, rounding)
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
        curvature = self._curvature(problem, first) if self._newton else first
        return self._stepper(problem, self.log_beta, curvature)

    def _curvature(self, problem: Problem, y_hat: Array) -> Array:
        """See `newton.curvature_of`."""
        return newton.curvature_of(
            *problem[:4], y_hat, problem.rng, self.settings.probes
        )

    def _problem(self, target: Target, rng: Array) -> Problem:
        return Problem(self.static, self.frozen, self.images, self.weights, target, rng)

    def _stepper(self, problem: Problem, log_beta: Array, curvature: Array) -> Stepper:
        """A stepper; the curvature is for the method `newton` alone."""
        if not self._newton:
            state = relaxed.start_state(self.start, log_beta)
            schedule = relaxed.make_schedule(self.settings)
            return Stepper(problem, state, schedule, relaxed.run_steps)
        newton_state = newton.start_state(self.start, curvature, log_beta)
        newton_schedule = newton.make_schedule(self.settings)
        return Stepper(problem, newton_state, newton_schedule, newton.run_steps)

    def _lagrangian(self, terms: Any, beta: np.ndarray) -> np.ndarray:
        """Value and rate in one number; what is over the budget has to be cut off."""
        excess = terms.bpp - np.asarray(self.target.bpp)
        return terms.value + beta * (np.minimum(excess, 0) + 2 * np.maximum(excess, 0))

    def _decoded_values(
        self, files: Sequence[dict[bytes, None]]
    ) -> list[dict[bytes, float]]:
        """The objective of what each of the files of each image decodes to."""
        return fit.decoded_values(
            self.codec, self.static, self.frozen, self.images, self.weights, files
        )

    def finish(self, steps: int) -> list[Refined]:
        """The files."""
        finished = fit.fit_files(
            self.codec,
            self.static,
            self.frozen,
            self.images,
            self.best,
            self._rounding_at,
            self._decoded_values,
            levels=self.levels,
            sizes=self.sizes,
            budgets=self.budgets,
            payload_bits=self.payload_bits,
            icc_profiles=self.icc_profiles,
            unrefined=self.unrefined,
        )
        return [
            Refined(
                data=fitted.data,
                unrefined=self.unrefined[i],
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


def _pixel_weights(
    x: np.ndarray, sizes: Sequence[tuple[int, int]], regions: Sequence[Region | None]
) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the pixels in D and in the perceptual terms, float32 [B, H, W]."""
    equal = equal_weights(x, sizes)
    weights, feature_weights = equal.copy(), equal.copy()
    for i, (size, region) in enumerate(zip(sizes, regions, strict=True)):
        if region is None:
            continue
        own = region.pixel_weights(size)
        weights[i, : size[0], : size[1]] = own
        if region.variant == "L2":
            feature_weights[i, : size[0], : size[1]] = own
    return weights, feature_weights


def _placement(count: int) -> Callable[[Any, int | None], Any]:
    """Puts arrays on the devices, split along the axis of the images (None: whole)."""
    devices = jax.local_devices()
    if len(devices) == 1 or count % len(devices):
        return lambda tree, axis: jax.tree.map(jnp.asarray, tree)
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))

    def place(tree: Any, axis: int | None) -> Any:
        names = () if axis is None else (*([None] * axis), "data")
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names))
        return jax.tree.map(lambda array: jax.device_put(array, sharding), tree)

    return place
