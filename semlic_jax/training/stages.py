# SPDX-License-Identifier: Apache-2.0
"""The stages of training, as records, and their optimisers.

A stage is a record, not a subclass: it says which parts of the model learn, in which
arithmetic the entropy networks run, which weights the terms of the loss have, how fast
to learn and what the adversary is.

==================  =================================================================
stage               what it is for
==================  =================================================================
`labeller`          the VQ-VAE whose codes the discriminator tells apart
`rate_distortion`   the codec under every term but the adversary's
`perceptual`        all terms; in `configs/` the decoder alone learns, so that files
                    of the model that it started from stay readable
`integer`           short fine-tuning with the entropy networks in fake quantisation
==================  =================================================================
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from semlic_jax.model.context import ARITHMETICS
from semlic_jax.objectives.losses import LossWeights, RateTarget

Array = jax.Array
Tree = Any

# The parts of the model's parameter tree.
PARTS = ("entropy", "g_a", "g_s", "h_a", "log_gain", "prior")
# The parts that the rate depends on: all but the decoder.
RATE_PARTS = tuple(part for part in PARTS if part != "g_s")

# Learning rates of parts relative to the rest. The linear block transform starts at a
# good place and has small entries, so it learns more slowly. The gains and the prior
# live on a log scale, so they learn faster.
_RATES = {
    "skip": 0.05,
    "skip_lapping": 0.05,
    "log_gain": 4.0,
    "prior": 4.0,
    "network": 1.0,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Adam with warm-up, cosine decay at the end, clipped gradients and an average.

    Attributes:
        lr: learning rate after the warm-up.
        warmup_steps: steps over which the rate rises linearly from 0.
        decay_steps: last steps of the stage, over which the rate falls along a cosine
            to `final_rate * lr`.
        final_rate: see `decay_steps`.
        beta1, beta2: decay rates of Adam's moments.
        weight_decay: decoupled weight decay (AdamW); 0 for none.
        clip_norm: norm that longer gradients are scaled down to.
        ema: decay of the averaged parameters.
    """

    lr: float = 1e-4
    warmup_steps: int = 200
    decay_steps: int = 0
    final_rate: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema: float = 0.998

    def __post_init__(self) -> None:
        for name in ("lr", "final_rate", "weight_decay"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(
                    f"an optimizer's {name} must be finite and at least 0, found "
                    f"{value}"
                )
        for name in ("warmup_steps", "decay_steps"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"an optimizer's {name} must be at least 0, found "
                    f"{getattr(self, name)}"
                )
        for name in ("beta1", "beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"an optimizer's {name} must be at least 0 and below 1, found "
                    f"{getattr(self, name)}"
                )
        if not self.clip_norm > 0:
            raise ValueError(
                f"an optimizer's clip_norm must be above 0, found {self.clip_norm}"
            )

    def rate(self, step: Array, steps: int) -> Array:
        """Learning rate at `step` of a stage of `steps` steps."""
        warm = jnp.minimum(1.0, (step + 1) / max(self.warmup_steps, 1))
        start = steps - self.decay_steps
        done = jnp.clip((step - start) / max(self.decay_steps, 1), 0.0, 1.0)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * done))
        return self.lr * warm * (self.final_rate + (1 - self.final_rate) * cosine)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adversary:
    """How the discriminator learns in a stage.

    Attributes:
        optimizer: the discriminator's own.
        binary: tell real from fake instead of codes (an ablation).
        codes: what the classes are: the codes of the `labeller`, or k-means clusters,
            over the photographs, of the `features` of the perceptual term's network.
        code_count: number of clusters of features.
        code_tap: index of the network's tap whose features are clustered.
        split_batch: whether the originals and the reconstructions of an update come
            from different images, half of the batch each (MS-ILLM), or from the same.
        largest_share: upper bound of the norm of the adversary's gradient with respect
            to an image, relative to that of the other terms; 0 for no bound.
    """

    optimizer: Optimizer = Optimizer(lr=4e-4, beta1=0.5, beta2=0.9)
    binary: bool = False
    codes: str = "labeller"
    code_count: int = 32
    code_tap: int = 2
    split_batch: bool = False
    largest_share: float = 0.0

    def __post_init__(self) -> None:
        if self.codes not in ("labeller", "features"):
            raise ValueError(
                f"adversary.codes must be labeller or features, found {self.codes!r}"
            )
        if not 1 <= self.code_count <= 4096 or self.code_tap < 0:
            raise ValueError(
                "adversary needs code_count from 1 to 4096 and code_tap of at least 0, "
                f"found {self.code_count} and {self.code_tap}"
            )
        if not 0 <= self.largest_share < math.inf:
            raise ValueError(
                "adversary.largest_share must be finite and at least 0, found "
                f"{self.largest_share}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the codec's training.

    Attributes:
        name: name of the stage and of its folder.
        steps: number of steps.
        arithmetic: arithmetic of the entropy networks, `float` or `fake` (quantised).
        trained: the parts of the model that learn, a subset of `PARTS`.
        optimizer: the codec's.
        lmbda_low, lmbda_high: weight of the rate (per bpp) at quality 0 and 1,
            geometric in between.
        balance: an image's loss is divided by its rate weight (relative to the middle
            of the range) to this power. At 0, low qualities dominate the gradient,
            since their loss is large; 0.5 evens this out.
        rate_target: a two-sided switch of the rate weight around one bpp, in place of
            lmbda_low and lmbda_high.
        weights: weights of the terms of the loss; 0 leaves a term out.
        zoom: share of the perceptual term that is measured on a quarter of the crop,
            enlarged twofold. Trunks start with a stride of 2 and hardly see patterns of
            two pixels, which a decoder then leaves as a fine grid on smooth skin.
        adversary: used if `weights.adversarial` is not 0.
        quality_low, quality_high: the range of qualities that training draws from.
    """

    name: str
    steps: int
    arithmetic: str = "float"
    trained: tuple[str, ...] = PARTS
    optimizer: Optimizer = Optimizer()
    lmbda_low: float = 1.0
    lmbda_high: float = 1.0
    balance: float = 0.0
    rate_target: RateTarget | None = None
    weights: LossWeights = LossWeights()
    zoom: float = 0.0
    adversary: Adversary = Adversary()
    quality_low: float = 0.0
    quality_high: float = 1.0

    def __post_init__(self) -> None:
        _check_steps(self.name, self.steps, self.optimizer)
        if self.weights.adversarial:
            _check_steps(f"{self.name}.adversary", self.steps, self.adversary.optimizer)
        if self.arithmetic not in ARITHMETICS[:2]:
            raise ValueError(
                f"{self.name}.arithmetic must be float or fake, found "
                f"{self.arithmetic!r}"
            )
        unknown = [part for part in self.trained if part not in PARTS]
        if unknown or not self.trained:
            raise ValueError(
                f"{self.name}.trained must be some of {', '.join(PARTS)}, found "
                f"{', '.join(unknown) or 'none'}"
            )
        for name in ("lmbda_low", "lmbda_high"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(
                    f"{self.name}.{name} must be finite and above 0, found {value}"
                )
        if not any(dataclasses.astuple(self.weights)):
            raise ValueError(f"{self.name}.weights must not all be 0")
        if not 0 <= self.zoom <= 1:
            raise ValueError(f"{self.name}.zoom must be from 0 to 1, found {self.zoom}")
        if self.zoom and not self.weights.perceptual:
            raise ValueError(
                f"{self.name}.zoom needs weights.perceptual above 0, found 0"
            )
        if not 0 <= self.quality_low <= self.quality_high <= 1:
            raise ValueError(
                f"{self.name} needs 0 <= quality_low <= quality_high <= 1, found "
                f"{self.quality_low} and {self.quality_high}"
            )

    @property
    def trains_rate(self) -> bool:
        """Whether any trained part affects the rate."""
        return any(part in RATE_PARTS for part in self.trained)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabellerStage:
    """The training of the VQ-VAE labeller; the recipe is ours.

    The auto-encoder learns to reconstruct images under Charbonnier and feature
    distances, so that codes describe texture and not only colour. A commitment term
    ties the embeddings to their codes, the codes follow the embeddings by gradient
    descent, a diversity term spreads the embeddings over all codes, and codes that fall
    out of use are moved onto embeddings of the batch, except in the last steps.

    Attributes:
        name, steps, optimizer: as in `Stage`.
        weights: weights of the Charbonnier, perceptual and style terms of the
            reconstruction.
        commitment, embedding: weights of the two codebook terms.
        diversity, temperature: weight and softness of the diversity term.
        usage_decay: decay of the running share of each code.
        reseed_threshold: a code whose share is below this part of an even share is
            dead.
        reseed_until: part of the steps after which dead codes are no longer moved.
    """

    name: str = "labeller"
    steps: int
    optimizer: Optimizer = Optimizer()
    weights: LossWeights = LossWeights()
    commitment: float = 0.25
    embedding: float = 1.0
    diversity: float = 0.1
    temperature: float = 0.1
    usage_decay: float = 0.95
    reseed_threshold: float = 0.1
    reseed_until: float = 0.8

    def __post_init__(self) -> None:
        _check_steps(self.name, self.steps, self.optimizer)


def _check_steps(stage: str, steps: int, optimizer: Optimizer) -> None:
    if steps < 1:
        raise ValueError(
            f"{stage}.steps must be at least 1, found {steps}; "
            "config.stages says which stages are run"
        )
    if optimizer.decay_steps > steps:
        # The learning rate would start somewhere in the middle of its decay.
        raise ValueError(
            f"{stage}.optimizer.decay_steps must be at most the {steps} steps of the "
            f"stage, found {optimizer.decay_steps}"
        )


def make_optimizer(optimizer: Optimizer, steps: int) -> optax.GradientTransformation:
    """The optimiser of a stage of `steps` steps, for any tree of parameters."""

    def label(tree: Tree) -> Tree:
        def name(path: Any, _: Any) -> str:
            keys = [p.key for p in path]
            return next((part for part in _RATES if part in keys), "network")

        return jax.tree_util.tree_map_with_path(name, tree)

    def adam(rate: float) -> optax.GradientTransformation:
        def schedule(step: Array) -> Array:
            return rate * optimizer.rate(step, steps)

        betas = dict(b1=optimizer.beta1, b2=optimizer.beta2)
        if optimizer.weight_decay:
            return optax.adamw(schedule, weight_decay=optimizer.weight_decay, **betas)
        return optax.adam(schedule, **betas)

    return optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm),
        optax.partition({name: adam(rate) for name, rate in _RATES.items()}, label),
    )
