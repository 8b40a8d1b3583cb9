# SPDX-License-Identifier: Apache-2.0
"""The jitted updates of the codec and of the discriminator.

Each is a pure function of what it changes, what it reads, a batch and the step, so a
run can be repeated from any checkpoint. Networks that do not learn are arguments, never
constants of the compiled program. Metrics are float32 scalars on the device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from semlic_jax.model.compression import (
    QUALITY_LEVELS,
    CompressionModel,
    Forward,
)
from semlic_jax.objectives.adversary import (
    Discriminator,
    Labeller,
)
from semlic_jax.objectives.features import FeatureNetwork, normalise_channels
from semlic_jax.objectives.losses import (
    LossWeights,
    adversarial_discriminator,
    adversarial_generator,
    ensemble_terms,
    perceptual,
    quality_lmbda,
    weighted_sum,
)
from semlic_jax.training.feature_codes import nearest_codes
from semlic_jax.training.stages import (
    Optimizer,
    Stage,
    make_optimizer,
)

Array = jax.Array
Tree = Any
Metrics = dict[str, Array]

# The trunk's input is shifted by up to this many pixels: otherwise its strided first
# layer would be blind to patterns of its own period.
_TRUNK_SHIFT = 8


class Learner(NamedTuple):
    """A network that learns: everything that its update changes.

    Attributes:
        params: its parameters.
        average: their running mean.
        optimizer: the optimiser's state, for the parts that learn.
    """

    params: Tree
    average: Tree
    optimizer: Tree


class Trunk(NamedTuple):
    """The frozen feature network of the perceptual and style terms.

    Attributes:
        network: the network with its weights.
        heads: learnt channel weights of the perceptual term, one [C] per tap, or None.
    """

    network: FeatureNetwork
    heads: tuple[Array, ...] | None = None


class Fakes(NamedTuple):
    """What a codec update passes on to the discriminator's update.

    Attributes:
        images: float32 [B, H, W, 3], the originals.
        x_hat: their reconstructions before the update.
        y_hat: float32 [B, h, w, M], scaled latents.
        labels: int32 [B, H/8, W/8], codes of the originals.
    """

    images: Array
    x_hat: Array
    y_hat: Array
    labels: Array


@dataclasses.dataclass(frozen=True)
class Networks:
    """The modules of a run; None for those that its stages do not need."""

    model: CompressionModel
    discriminator: Discriminator | None = None
    labeller: Labeller | None = None


def new_learner(
    params: Tree, optimizer: Optimizer, steps: int, trained: tuple[str, ...] = ()
) -> Learner:
    """State at step 0 of a stage; `trained` names the parts that learn, () all."""
    part = {name: params[name] for name in trained or params}
    state = make_optimizer(optimizer, steps).init(part)
    return Learner(params, jax.tree.map(jnp.copy, params), state)


def norm(tree: Tree) -> Array:
    """Euclidean norm over all leaves."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


def apply_gradients(
    learner: Learner, gradients: Tree, optimizer: Optimizer, steps: int
) -> Learner:
    """Take one optimiser step for the parts that are in `gradients`."""
    part = {name: learner.params[name] for name in gradients}
    updates, state = make_optimizer(optimizer, steps).update(
        gradients, learner.optimizer, part
    )
    part = optax.apply_updates(part, updates)
    means = {name: learner.average[name] for name in part}
    means = jax.tree.map(
        lambda m, new: m + (1 - optimizer.ema) * (new - m), means, part
    )
    return Learner({**learner.params, **part}, {**learner.average, **means}, state)


def sample_quality(stage: Stage, rng: Array, batch: int) -> Array:
    """Draw qualities [B], whole bytes / 255, so that each batch covers the range."""
    position = (jnp.arange(batch) + jax.random.uniform(rng, (batch,))) / batch
    span = stage.quality_high - stage.quality_low
    quality = stage.quality_low + span * position
    return jnp.round(quality * (QUALITY_LEVELS - 1)) / (QUALITY_LEVELS - 1)


def _shifted(rng: Array, *images: Array) -> list[Array]:
    """The same random window of each array, smaller by `_TRUNK_SHIFT` pixels."""
    batch, height, width, channels = images[0].shape
    corner = jax.random.randint(rng, (2,), 0, _TRUNK_SHIFT)
    size = (batch, height - _TRUNK_SHIFT, width - _TRUNK_SHIFT, channels)
    start = (0, corner[0], corner[1], 0)
    return [jax.lax.dynamic_slice(x, start, size) for x in images]


def _enlarged(rng: Array, *images: Array) -> list[Array]:
    """The same random quarter of each array, enlarged to the full size."""
    batch, height, width, channels = images[0].shape
    corner = [
        jax.random.randint(key, (), 0, side - side // 2 + 1)
        for key, side in zip(jax.random.split(rng), (height, width), strict=True)
    ]
    size = (batch, height // 2, width // 2, channels)
    return [
        jax.image.resize(
            jax.lax.dynamic_slice(x, (0, *corner, 0), size), x.shape, "cubic"
        )
        for x in images
    ]


def reconstruction_terms(
    images: Array,
    x_hat: Array,
    weights: LossWeights,
    trunk: Trunk | None,
    rng: Array,
    zoom: float = 0.0,
) -> Metrics:
    """All terms that have a weight, [B] each; the trunk's on a shifted window.

    Args:
        images, x_hat: float [B, H, W, 3], originals and their reconstructions.
        weights: weights of the terms.
        trunk: the feature network, if a term needs it.
        rng: key of the window and of the enlarged part.
        zoom: share of the perceptual term that is measured on an enlarged part; see
            `Stage`.
    """
    deep = LossWeights(
        charbonnier=0.0,
        perceptual=weights.perceptual,
        style=weights.style,
        local_style=weights.local_style,
        mean_style=weights.mean_style,
    )
    rest = dataclasses.replace(
        weights, perceptual=0.0, style=0.0, local_style=0.0, mean_style=0.0
    )
    terms = ensemble_terms(images, x_hat, rest)
    if deep.sees_features:
        real, made = _shifted(rng, images, x_hat)
        network, heads = trunk or (None, None)
        terms |= ensemble_terms(
            real,
            made,
            deep,
            network=network,
            heads=heads,
            style_map=normalise_channels,
        )
    if zoom and weights.perceptual and trunk is not None:
        real, made = _enlarged(rng, images, x_hat)
        near = perceptual(trunk.network, real, made, heads=trunk.heads)
        terms["perceptual"] = (1 - zoom) * terms["perceptual"] + zoom * near
    return terms


def limited_sum(
    closeness: Callable[[Array], Metrics],
    realism: Callable[[Array], Metrics],
    weights: LossWeights,
    x_hat: Array,
    largest_share: float,
) -> tuple[Array, Metrics, Array]:
    """The weighted sum of all terms, with the adversary's pull on each image bounded.

    Where the adversary's gradient with respect to an image is longer than
    `largest_share` times that of the other terms, it is shortened to that length. A
    discriminator that wins has steep gradients, which drown out the other terms under
    any fixed weight. (Esser et al. 2021, arXiv:2012.09841, equation 7, balance the two
    at the last layer, in both directions.)

    Returns:
        The sum, float32 [B], whose gradient is the limited one; the terms; and the
        share of the adversary's gradient that was kept, [B].
    """

    def gradient(
        terms_of: Callable[[Array], Metrics],
    ) -> tuple[Array, tuple[Metrics, Array]]:
        def total(x: Array) -> tuple[Array, tuple[Metrics, Array]]:
            terms = terms_of(x)
            value = weighted_sum(terms, weights)
            return jnp.sum(value), (terms, value)

        return jax.grad(total, has_aux=True)(jax.lax.stop_gradient(x_hat))

    def length(g: Array) -> Array:
        return jnp.sqrt(jnp.sum(jnp.square(g), (1, 2, 3)))

    close_gradient, (close, close_value) = gradient(closeness)
    real_gradient, (real, real_value) = gradient(realism)
    most = largest_share * length(close_gradient)
    share = jnp.minimum(1.0, most / jnp.maximum(length(real_gradient), 1e-30))
    combined = close_gradient + share[:, None, None, None] * real_gradient
    pull = jnp.sum(x_hat * jax.lax.stop_gradient(combined), (1, 2, 3))
    value = close_value + real_value + pull - jax.lax.stop_gradient(pull)
    return value, close | real, share


def codec_update(
    networks: Networks, stage: Stage, seed: int
) -> Callable[..., tuple[Learner, Metrics, Fakes | None]]:
    """The codec's update, to be jitted.

    Returns:
        `update(learner, step, images, trunk, discriminator, labeller)` with the step as
        an int32 scalar, images float32 [B, H, W, 3] in [0, 1], the feature network, and
        the parameters of the discriminator and the labeller; each network is None if no
        term needs it. It returns the new learner, the metrics and, with an adversary,
        what the discriminator's update needs.
    """
    model = networks.model.clone(arithmetic=stage.arithmetic)
    adversarial = bool(stage.weights.adversarial)

    def update(
        learner: Learner,
        step: Array,
        images: Array,
        trunk: Trunk | None,
        discriminator: Tree,
        labeller: Tree,
    ) -> tuple[Learner, Metrics, Fakes | None]:
        rng = jax.random.fold_in(jax.random.key(seed), step)
        quality_rng, noise_rng, shift_rng = jax.random.split(rng, 3)
        order_rng = jax.random.fold_in(rng, 3)
        batch, height, width, _ = images.shape
        quality = sample_quality(stage, quality_rng, batch)
        labels = None
        if adversarial:
            labels = _labels(networks, stage, labeller, images, trunk)

        def loss(trained: Tree) -> tuple[Array, tuple[Metrics, Array, Array]]:
            params = {**learner.params, **trained}
            forward = model.apply({"params": params}, images, quality, noise_rng)

            def closeness(x_hat: Array) -> Metrics:
                weights = dataclasses.replace(stage.weights, adversarial=0.0)
                return reconstruction_terms(
                    images, x_hat, weights, trunk, shift_rng, stage.zoom
                )

            def realism(x_hat: Array) -> Metrics:
                logits = networks.discriminator.apply(
                    {"params": discriminator},
                    x_hat,
                    forward.y_hat,
                    seen_taps(networks.discriminator, trunk, x_hat),
                )
                return {"adversarial": adversarial_generator(logits, labels)}

            if adversarial and stage.adversary.largest_share:
                total, terms, share = limited_sum(
                    closeness,
                    realism,
                    stage.weights,
                    forward.x_hat,
                    stage.adversary.largest_share,
                )
                metrics = {"adversarial_share": jnp.mean(share)}
            else:
                terms = closeness(forward.x_hat)
                terms |= realism(forward.x_hat) if adversarial else {}
                total = weighted_sum(terms, stage.weights)
                metrics = {}
            metrics |= {name: jnp.mean(term) for name, term in terms.items()}
            pixels = height * width
            if stage.trains_rate:
                lmbda = _lmbda(stage, quality, forward, pixels, step)
                bits = forward.rate.y_bits + forward.rate.z_bits
                total = total + lmbda * bits / pixels
            metrics |= _by_quality(images, forward)
            total = total * _balance(stage, quality)
            return jnp.mean(total), (metrics, forward.x_hat, forward.y_hat)

        trained = {name: learner.params[name] for name in stage.trained}
        (value, (metrics, x_hat, y_hat)), gradients = jax.value_and_grad(
            loss, has_aux=True
        )(trained)
        metrics["loss"] = value
        metrics["gradient_norm"] = norm(gradients)
        learner = apply_gradients(learner, gradients, stage.optimizer, stage.steps)
        fakes = None
        if adversarial:
            # Qualities rise along the batch, and the discriminator sees the latents:
            # halves of a batch in that order would give away which is real.
            order = jax.random.permutation(order_rng, batch)
            fakes = Fakes(images, x_hat, y_hat, labels)
            fakes = jax.tree.map(lambda values: values[order], fakes)
        return learner, metrics, fakes

    return update


def _lmbda(
    stage: Stage, quality: Array, forward: Forward, pixels: int, step: Array
) -> Array:
    """Rate weight of each image, per bpp."""
    if stage.rate_target is None:
        return quality_lmbda(quality, stage.lmbda_low, stage.lmbda_high)
    bpp = (forward.rounded_rate.y_bits + forward.rounded_rate.z_bits) / pixels
    return stage.rate_target.lmbda(bpp, step)


def _balance(stage: Stage, quality: Array) -> Array:
    """Weight of each image's whole loss, 1 in the middle of the range."""
    middle = math.sqrt(stage.lmbda_low * stage.lmbda_high)
    lmbda = quality_lmbda(quality, stage.lmbda_low, stage.lmbda_high)
    return (lmbda / middle) ** -stage.balance


def _by_quality(images: Array, forward: Forward) -> Metrics:
    """bpp and squared error of each third of the range of qualities, and bpp of z."""
    batch, height, width, _ = images.shape
    bpp = (forward.rate.y_bits + forward.rate.z_bits) / (height * width)
    clipped = jnp.clip(forward.x_hat, 0.0, 1.0)
    mse = jnp.mean((clipped - images) ** 2, axis=(1, 2, 3))
    metrics = {"z_bpp": jnp.mean(forward.rate.z_bits) / (height * width)}
    for i, part in enumerate(("low", "mid", "high")):
        third = slice(i * batch // 3, max((i + 1) * batch // 3, i * batch // 3 + 1))
        metrics[f"bpp_{part}"] = jnp.mean(bpp[third])
        metrics[f"mse_{part}"] = jnp.mean(mse[third])
    return metrics


def seen_taps(
    discriminator: Discriminator, trunk: Trunk | None, images: Array
) -> Sequence[Array]:
    """The trunk's features that a discriminator sees; its weights get no gradient."""
    if not discriminator.feature_channels:
        return ()
    return jax.lax.stop_gradient(trunk.network).apply(images)


def _labels(
    networks: Networks,
    stage: Stage,
    labeller: Tree,
    images: Array,
    trunk: Trunk | None,
) -> Array:
    """Codes of the originals on the discriminator's grid; all 0 for a binary one."""
    stride = networks.discriminator.stride
    batch, height, width, _ = images.shape
    grid = (height // stride, width // stride)
    if stage.adversary.binary:
        return jnp.zeros((batch, *grid), jnp.int32)
    if stage.adversary.codes == "features":
        features = trunk.network.apply(images)[stage.adversary.code_tap]
        return nearest_codes(labeller["codes"], features, grid)
    return networks.labeller.apply({"params": labeller}, images, method="labels")


def discriminator_update(
    networks: Networks, stage: Stage
) -> Callable[..., tuple[Learner, Metrics]]:
    """The discriminator's update, to be jitted.

    Returns:
        `update(learner, fakes, trunk)` with the discriminator's learner, what the
        codec's update passed on, and the feature network. It returns the new learner
        and the metrics: the loss, the gradient's norm, the share of the originals'
        cells that are given their own code (`d_code_accuracy`) or any code
        (`d_real_accuracy`), and the share of the reconstructions' cells that are found
        to be fake (`d_fake_accuracy`).
    """
    optimizer = stage.adversary.optimizer

    def update(
        learner: Learner, fakes: Fakes, trunk: Trunk | None
    ) -> tuple[Learner, Metrics]:
        batch = fakes.images.shape[0]
        real = fake = slice(None)
        if stage.adversary.split_batch:
            fake, real = slice(0, batch // 2), slice(batch // 2, batch)
        images = jnp.concatenate([fakes.images[real], fakes.x_hat[fake]])
        y_hat = jnp.concatenate([fakes.y_hat[real], fakes.y_hat[fake]])
        labels = fakes.labels[real]
        taps = seen_taps(networks.discriminator, trunk, images)

        def loss(params: Tree) -> tuple[Array, tuple[Array, Array]]:
            logits = networks.discriminator.apply(
                {"params": params}, images, y_hat, taps
            )
            logits = (logits[: labels.shape[0]], logits[labels.shape[0] :])
            return jnp.mean(adversarial_discriminator(*logits, labels)), logits

        (value, (on_real, on_fake)), gradients = jax.value_and_grad(loss, has_aux=True)(
            learner.params
        )
        guess = jnp.argmax(on_real, axis=-1)
        metrics = {
            "d_loss": value,
            "d_gradient_norm": norm(gradients),
            "d_code_accuracy": jnp.mean(guess == labels + 1),
            "d_real_accuracy": jnp.mean(guess > 0),
            "d_fake_accuracy": jnp.mean(jnp.argmax(on_fake, axis=-1) == 0),
        }
        return apply_gradients(learner, gradients, optimizer, stage.steps), metrics

    return update
