# SPDX-License-Identifier: Apache-2.0
"""The semantic ensemble loss, term by term (arXiv:2401.14007).

    L = lambda(q)*R + k_charbonnier*Charbonnier + k_squared_error*SquaredError
        + k_structural*Structural + k_lattice*Lattice + k_spectrum*Spectrum
        + k_spectral_power*SpectralPower + k_perceptual*Perceptual + k_style*Style
        + k_local_style*LocalStyle + k_mean_style*MeanStyle
        + k_adversarial*Adversarial

Each term is a function that returns one value per image, float32 [B], so that rate
targets and region weights act per sample. `ensemble_terms` computes the terms that have
a weight and skips the others. The rate weight is here too. The networks whose outputs
the terms compare are in `features.py` and `adversary.py`, optimisers and schedules in
`semlic_jax.training`.

Images are float [B, H, W, 3] in [0, 1]; reconstructions are compared unclamped.
Imports jax and other modules of this package's objectives.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from semlic_jax.objectives.features import FeatureNetwork, feature_distance
from semlic_jax.objectives.lattice import lattice
from semlic_jax.objectives.similarity import MS_SSIM_WEIGHTS, halve, ssim_terms
from semlic_jax.objectives.spectrum import spectral_power, spectrum
from semlic_jax.objectives.style_losses import local_style, mean_style, style

# The rate target of the first steps is this much looser (HiFiC: 0.20 bpp for 0.14).
WARM_UP_STEPS = 50_000
WARM_UP_TARGET_FACTOR = 0.20 / 0.14
WARM_UP_LMBDA_FACTOR = 0.5


def charbonnier(
    x: jax.Array,
    x_hat: jax.Array,
    eps: float = 1e-3,
    *,
    pixel_weights: jax.Array | None = None,
) -> jax.Array:
    """Mean over pixels and channels of sqrt((x - x_hat)^2 + eps^2), float32 [B].

    This is nearly the absolute error, but smooth at 0; equal images give eps.

    Args:
        x, x_hat: float [B, H, W, C].
        eps: width of the smooth part, in units of the images.
        pixel_weights: factors of the pixels' values before the mean, float [B, H, W];
            weights with a mean of 1 keep the scale.
    """
    error = x.astype(jnp.float32) - x_hat.astype(jnp.float32)
    pixels = jnp.mean(jnp.sqrt(jnp.square(error) + eps**2), axis=-1)
    if pixel_weights is not None:
        pixels = pixels * pixel_weights
    return jnp.mean(pixels, axis=(1, 2))


def squared_error(x: jax.Array, x_hat: jax.Array) -> jax.Array:
    """Mean over pixels and channels of (x - x_hat)^2, float32 [B]: MS-ILLM's fidelity.

    Args:
        x, x_hat: float [B, H, W, C].
    """
    error = x.astype(jnp.float32) - x_hat.astype(jnp.float32)
    return jnp.mean(jnp.square(error), axis=(1, 2, 3))


def structural(x: jax.Array, x_hat: jax.Array) -> jax.Array:
    """1 - MS-SSIM, float32 [B] (Wang et al. 2003), for crops of any size.

    There are as many of the five scales as leave sides of 11 pixels, with their weights
    scaled to a sum of 1. Factors are at least 1e-3, because a power of a smaller one
    has no useful gradient.

    Args:
        x, x_hat: float [B, H, W, 3] in [0, 1].

    Raises:
        ValueError: a side is under 11 pixels.
    """
    smallest = side = min(x.shape[1:3])
    scales = 0
    while scales < len(MS_SSIM_WEIGHTS) and side >= 11:
        scales += 1
        side = (side + 1) // 2  # as `halve` does
    if not scales:
        raise ValueError(f"MS-SSIM needs sides of at least 11 pixels, found {smallest}")
    weights = MS_SSIM_WEIGHTS[:scales]
    x, x_hat = (pixels.astype(jnp.float32) * 255 - 128 for pixels in (x, x_hat))
    product = jnp.ones((x.shape[0], x.shape[-1]), jnp.float32)
    for scale, weight in enumerate(weights):
        ssim, contrast = ssim_terms(x, x_hat)
        factor = ssim if scale == scales - 1 else contrast
        product = product * jnp.maximum(factor, 1e-3) ** (weight / sum(weights))
        x, x_hat = halve(x), halve(x_hat)
    return 1 - jnp.mean(product, axis=-1)


def perceptual(
    network: FeatureNetwork,
    x: jax.Array,
    x_hat: jax.Array,
    *,
    heads: Sequence[jax.Array] | None = None,
    pixel_weights: jax.Array | None = None,
) -> jax.Array:
    """LPIPS-type distance under a frozen trunk, float32 [B] (arXiv:1801.03924).

    sum_l mean_hw sum_c w_lc (f_l(x) - f_l(x_hat))^2 with f of unit length over
    channels, f / sqrt(|f|^2 + 1e-8). Stock LPIPS adds its epsilon outside of the root,
    whose gradient then explodes where all features are 0.

    Args:
        network: the trunk; its taps are the layers l. No gradient reaches its weights.
        x, x_hat: float [B, H, W, 3] in [0, 1]; no gradient flows to x.
        heads: learnt channel weights w, one [C] per tap; None means that all are 1.
        pixel_weights: see `feature_distance`.

    Raises:
        ValueError: there are not as many heads as taps.
    """
    taps, taps_hat = _taps_of(network, x, x_hat)
    return feature_distance(taps, taps_hat, heads, pixel_weights=pixel_weights)


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log softmax(logits)[label], averaged over positions, float32 [B]."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    picked = jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
    return -jnp.mean(picked, axis=tuple(range(1, picked.ndim)))


def adversarial_discriminator(
    logits_real: jax.Array, logits_fake: jax.Array, labels: jax.Array
) -> jax.Array:
    """The discriminator's loss, non-binary, float32 [B] (MS-ILLM, arXiv:2301.11189).

    (CE(D(x), c(x) + 1) + CE(D(x_hat), 0)) / 2

    Args:
        logits_real, logits_fake: float [B, h, w, C + 1] of originals and of
            reconstructions; class 0 is "fake", classes 1 ... C are the codes. They need
            not be of the same images.
        labels: int [B, h, w], codes 0 ... C - 1 of the originals in `logits_real`. All
            zeros with C = 1 is the usual binary discriminator.
    """
    real = _cross_entropy(logits_real, labels + 1)
    fake = _cross_entropy(logits_fake, jnp.zeros(logits_fake.shape[:-1], jnp.int32))
    return (real + fake) / 2


def adversarial_generator(logits_fake: jax.Array, labels: jax.Array) -> jax.Array:
    """The codec's loss, CE(D(x_hat), c(x) + 1), float32 [B] (arXiv:2301.11189).

    Args:
        logits_fake: float [B, h, w, C + 1] of the reconstructions x_hat.
        labels: int [B, h, w], codes 0 ... C - 1 of the originals x of the same images.
    """
    return _cross_entropy(logits_fake, labels + 1)


@dataclasses.dataclass(frozen=True)
class RateTarget:
    """A two-sided switch of the rate weight around a target (HiFiC, MS-ILLM).

    Attributes:
        bpp: the target in bits per pixel.
        lmbda_high: weight of the rate, per bpp, above the target.
        lmbda_low: weight of the rate, per bpp, at or below the target.
        warm_up_steps: number of batches at the start for which the target is 0.20/0.14
            times as high and `lmbda_high` half as large. The reference counts optimiser
            steps and so ends its warm-up after half as many batches.

    Raises:
        ValueError: the target or a weight is not positive, or lmbda_low is above
            lmbda_high.
    """

    bpp: float
    lmbda_high: float
    lmbda_low: float = 2.0**-4
    warm_up_steps: int = WARM_UP_STEPS

    def __post_init__(self) -> None:
        if not 0 < self.lmbda_low <= self.lmbda_high or not self.bpp > 0:
            raise ValueError(
                "a rate target needs bpp > 0 and 0 < lmbda_low <= lmbda_high, found "
                f"bpp={self.bpp}, lmbda_low={self.lmbda_low}, "
                f"lmbda_high={self.lmbda_high}"
            )

    def lmbda(self, bpp: jax.Array, step: jax.Array | int | None = None) -> jax.Array:
        """The rate weight [B] of images that cost `bpp` [B] bits per pixel.

        Args:
            bpp: the rate of rounded latents; no gradient flows through the choice.
            step: number of batches trained so far; None means after the warm-up.
        """
        early = jnp.asarray(False if step is None else step < self.warm_up_steps)
        target = self.bpp * jnp.where(early, WARM_UP_TARGET_FACTOR, 1.0)
        high = self.lmbda_high * jnp.where(early, WARM_UP_LMBDA_FACTOR, 1.0)
        return jnp.where(jax.lax.stop_gradient(bpp) > target, high, self.lmbda_low)


# Constants of MS-ILLM's released configurations, by target in bpp.
MSILLM_RATE_TARGETS = {
    target: RateTarget(target, high)
    for target, high in (
        *((0.00875, 32.0), (0.0175, 16.0), (0.035, 8.0), (0.07, 4.0)),
        *((0.14, 2.0), (0.3, 1.0), (0.45, 0.5), (0.9, 0.25)),
    )
}


def quality_lmbda(quality: jax.Array, low: float, high: float) -> jax.Array:
    """The rate weight of a quality, geometric between its values at the two ends.

    Args:
        quality: float [B] in [0, 1].
        low, high: weights at quality 0 and at quality 1, both positive.

    Returns:
        float [B].

    Raises:
        ValueError: a weight is not positive.
    """
    if not (low > 0 and high > 0):
        raise ValueError(f"rate weights must be positive, found {low} and {high}")
    return jnp.exp(math.log(low) + (math.log(high) - math.log(low)) * quality)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights k of the ensemble's terms; a term of weight 0 is not computed.

    The defaults are the plainest loss; the configuration of a training stage sets its
    own weights.

    Raises:
        ValueError: a weight is negative or not finite.
    """

    charbonnier: float = 1.0
    squared_error: float = 0.0
    structural: float = 0.0
    lattice: float = 0.0
    spectrum: float = 0.0
    spectral_power: float = 0.0
    perceptual: float = 0.0
    style: float = 0.0
    local_style: float = 0.0
    mean_style: float = 0.0
    adversarial: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"the weight of {field.name} must be at least 0, found {value}"
                )

    @property
    def sees_features(self) -> bool:
        """Whether a term compares features of the frozen network."""
        styles = (self.style, self.local_style, self.mean_style)
        return bool(self.perceptual or any(styles))


def ensemble_terms(
    x: jax.Array,
    x_hat: jax.Array,
    weights: LossWeights,
    *,
    network: FeatureNetwork | None = None,
    heads: Sequence[jax.Array] | None = None,
    logits_fake: jax.Array | None = None,
    labels: jax.Array | None = None,
    style_map: Callable[[jax.Array], jax.Array] = lambda features: features,
) -> dict[str, jax.Array]:
    """Compute every term that has a weight; return them unweighted, float32 [B] each.

    Perceptual and style terms share one pass of the trunk. `weighted_sum` adds the
    terms up.

    Args:
        x, x_hat: float [B, H, W, 3] in [0, 1].
        weights: their values are not applied; terms of weight 0 are left out.
        network: see `perceptual`; needed by the perceptual term and the style terms.
        heads: see `perceptual`.
        logits_fake, labels: see `adversarial_generator`.
        style_map: applied to feature maps before their Gram matrices, such as
            `features.normalise_channels`.

    Raises:
        ValueError: a term has a weight but lacks its inputs, or the images are too
            small for it.
    """
    terms: dict[str, jax.Array] = {}
    if weights.charbonnier:
        terms["charbonnier"] = charbonnier(x, x_hat)
    if weights.squared_error:
        terms["squared_error"] = squared_error(x, x_hat)
    if weights.structural:
        terms["structural"] = structural(x, x_hat)
    if weights.lattice:
        terms["lattice"] = lattice(x, x_hat)
    if weights.spectrum:
        terms["spectrum"] = spectrum(x, x_hat)
    if weights.spectral_power:
        terms["spectral_power"] = spectral_power(x, x_hat)
    if weights.sees_features:
        if network is None:
            raise ValueError(
                "perceptual and style terms need a feature network, found none"
            )
        taps, taps_hat = _taps_of(network, x, x_hat)
        if weights.perceptual:
            terms["perceptual"] = feature_distance(taps, taps_hat, heads)
        mapped, mapped_hat = (list(map(style_map, maps)) for maps in (taps, taps_hat))
        if weights.style:
            terms["style"] = style(mapped, mapped_hat)
        if weights.local_style:
            size = (x.shape[1], x.shape[2])
            terms["local_style"] = local_style(mapped, mapped_hat, size)
        if weights.mean_style:
            terms["mean_style"] = mean_style(taps, taps_hat)
    if weights.adversarial:
        if logits_fake is None or labels is None:
            raise ValueError(
                "the adversarial term needs the discriminator's logits and the "
                "originals' labels, found none"
            )
        terms["adversarial"] = adversarial_generator(logits_fake, labels)
    return terms


def weighted_sum(terms: Mapping[str, jax.Array], weights: LossWeights) -> jax.Array:
    """The sum of k * term over the result of `ensemble_terms`, float32 [B].

    Raises:
        ValueError: there are no terms.
    """
    values = [getattr(weights, name) * term for name, term in terms.items()]
    if not values:
        raise ValueError("every weight of the loss is 0")
    return sum(values[1:], values[0])


def _taps_of(
    network: FeatureNetwork, x: jax.Array, x_hat: jax.Array
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Feature maps of originals and reconstructions, with gradients to x_hat alone."""
    network = jax.lax.stop_gradient(network)
    return network.apply(jax.lax.stop_gradient(x)), network.apply(x_hat)
