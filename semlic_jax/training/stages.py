# SPDX-License-Identifier: Apache-2.0
"""What one stage of the training minimises, and its jitted step.

A stage is a record, not a subclass: which arithmetic the entropy networks run in,
which weights the terms of the loss have, how fast to learn.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from semlic_jax.model.compression import (
    QUALITY_LEVELS,
    CompressionModel,
    ModelConfig,
)
from semlic_jax.objectives.features import FeatureNetwork, feature_distance

Array = jax.Array
Tree = Any

# The linear block transform starts at a good place and its entries are small: it
# learns this much slower than the rest. Gains and prior live on a log scale: faster.
_RATES = {"skip": 0.05, "log_gain": 4.0, "prior": 4.0, "network": 1.0}
# The trunk's input is shifted by up to this many pixels: its strided first layer is
# blind to patterns of its own period otherwise.
_TRUNK_SHIFT = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the training.

    Attributes:
        name: `rate_distortion` or `integer`.
        steps: length.
        arithmetic: of the entropy networks, `float` or `fake`.
        learning_rate: Adam's, after `warmup_steps`.
        warmup_steps: linear from 0.
        decay_steps: of a cosine to `final_rate * learning_rate` at the end.
        final_rate: see `decay_steps`.
        lmbda_low, lmbda_high: weight of the rate (per bpp) at quality 0 and 1,
            geometric in between.
        k_charbonnier, k_perceptual: weights of the terms.
        ema: decay of the averaged parameters.
        clip_norm: largest norm of the gradient.
    """

    name: str
    steps: int
    arithmetic: str
    learning_rate: float
    warmup_steps: int
    decay_steps: int
    final_rate: float
    lmbda_low: float
    lmbda_high: float
    k_charbonnier: float
    k_perceptual: float
    ema: float
    clip_norm: float


class State(NamedTuple):
    """Everything that a step changes."""

    params: Tree
    average: Tree
    optimizer: Tree


def quality_lmbda(stage: Stage, quality: Array) -> Array:
    """Rate weight for quality [B] in [0, 1], per bit per pixel."""
    low, high = math.log(stage.lmbda_low), math.log(stage.lmbda_high)
    return jnp.exp(low + (high - low) * quality)


def make_optimizer(stage: Stage) -> optax.GradientTransformation:
    """Adam with warm-up, cosine decay at the end, and clipped gradients."""

    def schedule(step: Array) -> Array:
        warm = jnp.minimum(1.0, (step + 1) / max(stage.warmup_steps, 1))
        start = stage.steps - stage.decay_steps
        done = jnp.clip((step - start) / max(stage.decay_steps, 1), 0.0, 1.0)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * done))
        decay = stage.final_rate + (1 - stage.final_rate) * cosine
        return stage.learning_rate * warm * decay

    def label(tree: Tree) -> Tree:
        def name(path: Any, _: Any) -> str:
            keys = [p.key for p in path]
            return next((part for part in _RATES if part in keys), "network")

        return jax.tree_util.tree_map_with_path(name, tree)

    def adam(rate: float) -> optax.GradientTransformation:
        return optax.adam(lambda step: rate * schedule(step), b1=0.9, b2=0.99)

    return optax.chain(
        optax.clip_by_global_norm(stage.clip_norm),
        optax.partition({name: adam(rate) for name, rate in _RATES.items()}, label),
    )


def initial_state(stage: Stage, params: Tree) -> State:
    """State at step 0 of a stage, from parameters."""
    average = jax.tree.map(jnp.copy, params)
    return State(params, average, make_optimizer(stage).init(params))


def make_step(
    config: ModelConfig, stage: Stage, features: FeatureNetwork | None
) -> Callable[[State, Array, Array], tuple[State, dict[str, Array]]]:
    """The jitted update: (state, images, rng) -> (state, metrics).

    Images are float32 [B, H, W, 3] in [0, 1]. Metrics are scalars, float32: the loss,
    its terms, and mean bpp and squared error in each third of the quality range.
    """
    if stage.k_perceptual and features is None:
        raise ValueError(
            "the perceptual term needs feature weights, found none; "
            "set SEMLIC_FEATURES or config.features"
        )
    model = CompressionModel(config, stage.arithmetic)
    optimizer = make_optimizer(stage)

    def loss(params: Tree, images: Array, rng: Array) -> tuple[Array, dict]:
        quality_rng, noise_rng, shift_rng = jax.random.split(rng, 3)
        batch, height, width, _ = images.shape
        # Stratified: each batch covers the range of qualities.
        offsets = jax.random.uniform(quality_rng, (batch,))
        quality = (jnp.arange(batch) + offsets) / batch
        quality = jnp.round(quality * (QUALITY_LEVELS - 1)) / (QUALITY_LEVELS - 1)
        forward = model.apply({"params": params}, images, quality, noise_rng)
        error = forward.x_hat - images
        charbonnier = jnp.mean(jnp.sqrt(error**2 + 1e-6), axis=(1, 2, 3))
        bpp = (forward.rate.y_bits + forward.rate.z_bits) / (height * width)
        total = stage.k_charbonnier * charbonnier
        total = total + quality_lmbda(stage, quality) * bpp
        metrics = {"charbonnier": jnp.mean(charbonnier)}
        if stage.k_perceptual:
            corner = jax.random.randint(shift_rng, (2,), 0, _TRUNK_SHIFT)
            start = (0, corner[0], corner[1], 0)
            size = (batch, height - _TRUNK_SHIFT, width - _TRUNK_SHIFT, 3)
            real = jax.lax.dynamic_slice(images, start, size)
            made = jax.lax.dynamic_slice(forward.x_hat, start, size)
            distance = feature_distance(features.apply(real), features.apply(made))
            total = total + stage.k_perceptual * distance
            metrics["perceptual"] = jnp.mean(distance)
        clipped = jnp.clip(forward.x_hat, 0.0, 1.0)
        mse = jnp.mean((clipped - images) ** 2, axis=(1, 2, 3))
        for i, part in enumerate(("low", "mid", "high")):
            third = slice(i * batch // 3, max((i + 1) * batch // 3, i + 1))
            metrics[f"bpp_{part}"] = jnp.mean(bpp[third])
            metrics[f"mse_{part}"] = jnp.mean(mse[third])
        metrics["z_bpp"] = jnp.mean(forward.rate.z_bits) / (height * width)
        return jnp.mean(total), metrics

    def step(state: State, images: Array, rng: Array) -> tuple[State, dict]:
        (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(
            state.params, images, rng
        )
        metrics["loss"] = value
        metrics["gradient_norm"] = optax.global_norm(gradients)
        updates, optimizer_state = optimizer.update(
            gradients, state.optimizer, state.params
        )
        params = optax.apply_updates(state.params, updates)
        average = jax.tree.map(
            lambda mean, new: mean + (1 - stage.ema) * (new - mean),
            state.average,
            params,
        )
        return State(params, average, optimizer_state), metrics

    return jax.jit(step, donate_argnums=0)
