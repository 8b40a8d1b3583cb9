# SPDX-License-Identifier: Apache-2.0
"""The jitted update of the labeller, the VQ-VAE whose codes are classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from semlic_jax.objectives.adversary import (
    code_frequencies,
    diversity_loss,
    perplexity,
    reseed_dead_codes,
)
from semlic_jax.objectives.losses import weighted_sum
from semlic_jax.training.stages import LabellerStage
from semlic_jax.training.steps import (
    Learner,
    Metrics,
    Networks,
    Trunk,
    apply_gradients,
    norm,
    reconstruction_terms,
)

Array = jax.Array
Tree = Any


def labeller_update(
    networks: Networks, stage: LabellerStage, seed: int
) -> Callable[..., tuple[Learner, Array, Metrics]]:
    """The labeller's update, to be jitted.

    Returns:
        `update(learner, usage, step, images, trunk)`, where `usage` is the running
        share of each code, float32 [C]. It returns the new learner, the new usage and
        the metrics.
    """
    labeller = networks.labeller

    def update(
        learner: Learner,
        usage: Array,
        step: Array,
        images: Array,
        trunk: Trunk | None,
    ) -> tuple[Learner, Array, Metrics]:
        rng = jax.random.fold_in(jax.random.key(seed), step)
        shift_rng, seed_rng = jax.random.split(rng)

        def loss(params: Tree) -> tuple[Array, tuple[Metrics, Any]]:
            made = labeller.apply({"params": params}, images)
            terms = reconstruction_terms(
                images, made.x_hat, stage.weights, trunk, shift_rng
            )
            total = jnp.mean(weighted_sum(terms, stage.weights))
            total = total + stage.commitment * made.commitment
            total = total + stage.embedding * made.embedding
            metrics = {name: jnp.mean(term) for name, term in terms.items()}
            metrics["commitment"] = made.commitment
            if stage.diversity:
                metrics["diversity"] = diversity_loss(
                    made.embeddings, params["codebook"], stage.temperature
                )
                total = total + stage.diversity * metrics["diversity"]
            return total, (metrics, made)

        (value, (metrics, made)), gradients = jax.value_and_grad(loss, has_aux=True)(
            learner.params
        )
        learner = apply_gradients(learner, gradients, stage.optimizer, stage.steps)
        frequencies = code_frequencies(made.codes, labeller.code_count)
        usage = stage.usage_decay * usage + (1 - stage.usage_decay) * frequencies
        usage = jnp.where(step == 0, jnp.zeros_like(usage), usage)
        active = step < stage.reseed_until * stage.steps
        learner, usage, dead = _reseed(
            learner, usage, made.embeddings, seed_rng, stage, active
        )
        metrics |= {
            "loss": value,
            "gradient_norm": norm(gradients),
            "perplexity": perplexity(frequencies),
            "dead_codes": jnp.sum(dead).astype(jnp.float32),
        }
        return learner, usage, metrics

    return update


def _reseed(
    learner: Learner,
    usage: Array,
    embeddings: Array,
    rng: Array,
    stage: LabellerStage,
    active: Array,
) -> tuple[Learner, Array, Array]:
    threshold = jnp.where(active, stage.reseed_threshold, 0.0)
    codebook, usage, dead = reseed_dead_codes(
        learner.params["codebook"], usage, embeddings, rng, threshold=threshold
    )
    average = jnp.where(dead[:, None], codebook, learner.average["codebook"])
    params = {**learner.params, "codebook": codebook}
    learner = learner._replace(
        params=params, average={**learner.average, "codebook": average}
    )
    return learner, usage, dead
