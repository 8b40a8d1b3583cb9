# SPDX-License-Identifier: Apache-2.0
"""Compiled steps of a refinement by relaxed rounding, with Adam and dual ascent.

`newton.py` has a state and a program of its own and shares the rest of this module.

One program makes a chunk of steps in one `lax.scan`. But XLA:CPU runs the input
gradients of convolutions several times slower inside a loop than outside (jax issue
12868), and calls cost next to nothing there, so on a CPU a program makes one step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from semlic_jax.compilation import float_program
from semlic_jax.model.compression import image_masks
from semlic_jax.model.priors import gaussian_bits, scale_from_index
from semlic_jax.refinement.objective import (
    TRUNK_SHIFTS,
    Frozen,
    Images,
    Network,
    Terms,
    Weights,
    apply_twin,
    reconstruct,
    terms_of,
)
from semlic_jax.refinement.settings import Settings
from semlic_jax.refinement.sga import draw_noise, relaxed_round, temperatures
from semlic_jax.refinement.symbols import walk

Array = jax.Array
Latents = tuple[Array, Array]  # y_scaled [B, h, w, M] and z [B, h/4, w/4, N]

_MAX_EXCESS = 0.3
ADAM_EPS = 1e-8


class Schedule(NamedTuple):
    """The schedule of K steps: arrays [K], or scalars for a single step.

    Attributes:
        step: number of the step, from 0.
        temperature: temperature of the relaxed rounding.
        learning_rate: Adam's learning rate.
        shift: which of TRUNK_SHIFTS the trunk's input has.
    """

    step: Any
    temperature: Any
    learning_rate: Any
    shift: Any


class State(NamedTuple):
    """What a step changes.

    Attributes:
        latents: y_scaled and z.
        first, second: Adam's moments of both latents, shaped like them.
        log_beta: logarithm of the rate's multiplier, [B].
    """

    latents: Latents
    first: Latents
    second: Latents
    log_beta: Array


class Target(NamedTuple):
    """The target of each image's rate, and how it is steered there.

    Attributes:
        bpp: payload bits per pixel to which the rate of the steps is steered, float32
            [B].
        scale: factor of each image's loss, float32 [B].
        integral, proportional: gains of the dual ascent, scalars.
    """

    bpp: Array
    scale: Array
    integral: Array
    proportional: Array


def soft_terms(
    frozen: Frozen,
    images: Images,
    weights: Weights,
    y_scaled: Array,
    z: Array,
    rng: Array,
    temperature: Array,
    shift: Array,
) -> Terms:
    """The terms of one relaxed sample of the latents.

    Args:
        frozen, images, weights: those of the refinement, see `objective`.
        y_scaled: float32 [B, h, w, M].
        z: float32 [B, h/4, w/4, N].
        rng: one key per image, [B].
        temperature: temperature of the relaxed rounding, a scalar.
        shift: which of TRUNK_SHIFTS the trunk's input has, int32 scalar.
    """
    method = frozen.static.method
    keys = jax.vmap(lambda key: jax.random.split(key))(rng)
    y_noise = draw_noise(method, keys[:, 0], y_scaled.shape[1:])
    z_noise = draw_noise(method, keys[:, 1], z.shape[1:])
    three = method == "ssl3"

    def round_y(v: Array, _: Array, channels: slice) -> Array:
        part = y_noise[..., channels, :] if three else y_noise[..., channels]
        return relaxed_round(v, part, temperature, method)

    def forward(model: Network) -> tuple[Array, Array]:
        masks = image_masks(images.sizes, (y_scaled.shape[1], y_scaled.shape[2]))
        z_tilde = relaxed_round(z, z_noise, temperature, method) * masks.z
        z_bits = jnp.sum(model.z_bits(z_tilde) * masks.z, (1, 2, 3))
        residual, index, y_hat = walk(
            model, images.quality, masks, y_scaled, z_tilde, round_y
        )
        y_bits = gaussian_bits(residual, scale_from_index(index))
        y_bits = jnp.sum(y_bits * masks.y, (1, 2, 3))
        return z_bits + y_bits, reconstruct(model, frozen, images, y_hat)

    bits, x_hat = apply_twin(frozen, forward)
    return terms_of(frozen, images, weights, bits, x_hat, shift)


@float_program(donate_argnums=5)
def run_steps(
    frozen: Frozen,
    images: Images,
    weights: Weights,
    target: Target,
    rng: Array,
    state: State,
    schedule: Schedule,
) -> tuple[State, Terms]:
    """Make the steps of a schedule; return the state and the mean of their terms."""

    def step(state: State, now: Schedule) -> tuple[State, Terms]:
        keys = jax.vmap(lambda key: jax.random.fold_in(key, now.step))(rng)

        def loss(latents: Latents) -> tuple[Array, tuple[Terms, Array]]:
            terms = soft_terms(
                frozen,
                images,
                weights,
                *latents,
                keys,
                now.temperature,
                now.shift,
            )
            excess = rate_excess(terms.bpp, target)
            beta = jnp.exp(state.log_beta + target.proportional * excess)
            total = target.scale * (terms.value + beta * terms.bpp)
            return jnp.sum(total), (terms, excess)

        gradient, (terms, excess) = jax.grad(loss, has_aux=True)(state.latents)
        latents, first, second = _adam(state, gradient, now)
        log_beta = state.log_beta + target.integral * excess
        return State(latents, first, second, log_beta), terms

    if len(schedule.step) == 1:  # no loop
        return step(state, jax.tree.map(lambda values: values[0], schedule))
    state, terms = jax.lax.scan(step, state, schedule)
    return state, jax.tree.map(lambda values: jnp.mean(values, 0), terms)


def rate_excess(bpp: Array, target: Target) -> Array:
    """Logarithm of rate [B] over target, clipped and without gradient, float32 [B]."""
    excess = jnp.log(jax.lax.stop_gradient(bpp) / target.bpp)
    return jnp.clip(excess, -_MAX_EXCESS, _MAX_EXCESS)


def _adam(
    state: State, gradient: Latents, now: Schedule
) -> tuple[Latents, Latents, Latents]:
    b1, b2 = 0.9, 0.999
    time = now.step + 1

    def first_moment(mean: Array, g: Array) -> Array:
        return b1 * mean + (1 - b1) * g

    def second_moment(mean: Array, g: Array) -> Array:
        return b2 * mean + (1 - b2) * jnp.square(g)

    def move(x: Array, mean: Array, square: Array) -> Array:
        mean, square = mean / (1 - b1**time), square / (1 - b2**time)
        return x - now.learning_rate * mean / (jnp.sqrt(square) + ADAM_EPS)

    first = jax.tree.map(first_moment, state.first, gradient)
    second = jax.tree.map(second_moment, state.second, gradient)
    return jax.tree.map(move, state.latents, first, second), first, second


def pick(better: Array | np.ndarray, new: Any, old: Any) -> Any:
    """Choose for each image the new arrays [B, ...] if `better` [B], else the old."""

    def choose(a: Array, b: Array) -> Array:
        return jnp.where(better.reshape([-1] + [1] * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, new, old)


def start_state(start: Latents, log_beta: Array) -> State:
    """The state before the first step; log_beta is [B]."""
    zeros = jax.tree.map(jnp.zeros_like, start)
    return State(start, zeros, zeros, log_beta)


def trunk_shifts(settings: Settings) -> np.ndarray:
    """Which of TRUNK_SHIFTS the trunk's input has in each step, int [steps]."""
    rng = np.random.default_rng(settings.seed)
    return rng.integers(len(TRUNK_SHIFTS), size=settings.steps)


def make_schedule(settings: Settings) -> Schedule:
    """The schedule of a refinement by relaxed rounding."""
    return Schedule(
        np.arange(settings.steps, dtype=np.int32),
        temperatures(
            settings.steps,
            settings.temperature_start,
            settings.temperature_end,
            settings.temperature_hold,
        ),
        settings.learning_rates(),
        trunk_shifts(settings).astype(np.int32),
    )


class Problem(NamedTuple):
    """The arguments that all steps of a batch have in common; see `run_steps`."""

    frozen: Frozen
    images: Images
    weights: Weights
    target: Target
    rng: Array


class Stepper:
    """A refinement under way.

    Attributes:
        state: the state after the steps so far.
    """

    def __init__(
        self,
        problem: Problem,
        state: Any,
        schedule: Any,
        program: Callable[..., tuple[Any, Terms]],
    ) -> None:
        """Prepare the steps; none is made yet.

        Args:
            problem: what all steps have in common.
            state: the state at the start; copied, since a step overwrites its memory.
            schedule: a named tuple of arrays [steps].
            program: `run_steps`, or another with this signature whose state also has
                `latents` and `log_beta`.
        """
        self._problem = problem
        self._schedule = schedule
        self._program = program
        self._next = 0
        self.state = jax.tree.map(jnp.copy, state)

    def __call__(self, count: int, target: Target | None = None) -> np.ndarray:
        """Make steps; after the last step of the schedule comes the first again.

        Args:
            count: number of steps.
            target: replaces the problem's own target.

        Returns:
            each image's bits per pixel, as the mean of what the steps saw, float [B].
        """
        problem = self._problem
        if target is not None:
            problem = problem._replace(target=target)
        end, total = self._next + count, len(self._schedule[0])
        taken_bpp: list[Array] = []
        while self._next < end:
            start = self._next % total
            wanted = min(end - self._next, total - start)
            part = slice(start, start + self._program_steps(wanted))
            schedule = self._part(part)
            self.state, terms = self._program(*problem, self.state, schedule)
            made = len(schedule[0])
            taken_bpp += [terms.bpp] * made
            self._next += made
        return np.mean(jax.device_get(taken_bpp), axis=0)

    def flops(self) -> float | None:
        """Floating-point operations of a step, or None if the compiler does not say."""
        found: Any = self._one_step().cost_analysis() or {}
        if isinstance(found, list):
            found = found[0]
        return found.get("flops")

    def memory_bytes(self) -> int | None:
        """The bytes that a step takes besides its arguments, as the compiler plans.

        None if the compiler does not say.
        """
        plan = self._one_step().memory_analysis()
        if plan is None:
            return None
        own = plan.output_size_in_bytes - plan.alias_size_in_bytes
        return plan.temp_size_in_bytes + own

    def _one_step(self) -> Any:
        """The compiled program of one step."""
        program: Any = self._program
        schedule = self._part(slice(1))
        return program.lower(*self._problem, self.state, schedule).compile()

    def _part(self, steps: slice) -> Any:
        return type(self._schedule)(*(values[steps] for values in self._schedule))

    @staticmethod
    def _program_steps(wanted: int) -> int:
        return 1 if jax.default_backend() == "cpu" else wanted


def placement(count: int) -> Callable[[Any, int | None], Any]:
    """Return a function that puts a tree of arrays of `count` images on the devices.

    Its second argument is the axis of the images, along which arrays are split over the
    devices; with None, each device gets the whole arrays. If the number of devices does
    not divide `count`, the default device gets everything.
    """
    devices = jax.local_devices()
    if len(devices) == 1 or count % len(devices):
        return lambda tree, axis: jax.tree.map(jnp.asarray, tree)
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))

    def place(tree: Any, axis: int | None) -> Any:
        names = () if axis is None else (*([None] * axis), "data")
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names))
        return jax.tree.map(lambda array: jax.device_put(array, sharding), tree)

    return place
