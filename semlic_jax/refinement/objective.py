# SPDX-License-Identifier: Apache-2.0
"""What refinement minimises: the terms of one batch of images, soft or hard.

    alpha * D + gamma * (Perceptual + k * Style + m * MeanStyle + s * Structure
        + l * Lattice) + beta * R

* D: mean squared error in 8-bit levels (100 is 28.1 dB), over the real pixels of the
  image, weighted by the region of interest.
* Perceptual: `objectives.losses`' distance of channel-normalised features of a frozen
  trunk; Style: distance of local Gram matrices of the same features.
* MeanStyle: relative distance of local means of those features before they are
  normalised. All other terms take texture away that is not where the original has it.
* Structure: 1 - MS-SSIM as a sum of squares, see `structure.py`; in a region of
  interest its errors count as those of D.
* Lattice: what repeats in every cell of the latents, see `structure.py`; with the
  weights of D too. The terms before it let a mesh of dots pass for texture. No preset
  has it.
* R: bits per pixel, of relaxed latents under the densities or of rounded latents under
  the tables of the coder.

The trunk's strided layers are blind to patterns of their own period. So its input is
shifted by one of a few offsets, another one in each step; the features of an original
that is seen at once are computed once for all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from semlic_jax.model.compression import CompressionModel
from semlic_jax.model.mean_scale import Config, MeanScaleModel, network_of
from semlic_jax.model.transforms import STRIDE
from semlic_jax.objectives.features import (
    FeatureNetwork,
    feature_distance,
    normalise_channels,
)
from semlic_jax.objectives.style_losses import (
    local_mean_powers,
    local_mean_style,
    local_style,
)
from semlic_jax.refinement.roi import Region
from semlic_jax.refinement.structure import lattice_residuals, structure_residuals

Array = jax.Array
Network = CompressionModel | MeanScaleModel
_Found = TypeVar("_Found")

# Corners of the trunk's input, row and column: every parity of both occurs.
TRUNK_SHIFTS = ((0, 0), (1, 2), (2, 3), (3, 1))
_TRUNK_MARGIN = 3  # the largest of them
_MAX_LEVEL = 255.0


class Static(NamedTuple):
    """What the compiled programs are specialised for.

    Attributes:
        config: of the model.
        method: of the refinement, see `settings.METHODS`.
        perceptual, style, mean_style: whether these terms have a weight.
        padded: whether an image is smaller than its batch.
        dtype: name of the type that g_s computes in.
    """

    config: Config
    method: str
    perceptual: bool
    style: bool
    mean_style: bool
    padded: bool
    dtype: str = "float32"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """What does not change during a refinement, besides the images: a pytree.

    Attributes:
        params: of the differentiable twin (`Codec.twin_params`).
        y_bits, z_bits: `SymbolTables.bits_lookup()` matrices of the coder, float32
            [T, 2 * radius + 1].
        features: the trunk, or None without perceptual terms.
        static: metadata of the pytree and no leaf: programs are compiled for it.
    """

    params: Any
    y_bits: Array
    z_bits: Array
    features: FeatureNetwork | None
    static: Static = dataclasses.field(metadata={"static": True})


class Images(NamedTuple):
    """A batch of images of one bucket, and what is wanted of each.

    Attributes:
        x: float32 [B, H, W, 3] in [0, 1], padded.
        sizes: int32 [B, 2], real height and width.
        quality: float32 [B] in [0, 1].
        weights: float32 [B, H, W], of each pixel in D; 0 outside the image.
        feature_weights: float32 [B, H, W], of each pixel in the perceptual terms.
        taps: features of x for each of TRUNK_SHIFTS, each [S, B, h, w, C]. Where
            these are not given they are computed when they are needed.
        structure: `structure_weights` of x; empty where the term has no weight.
        lattice: `lattice_weights` of x alone; empty where the term has no weight.
        mean_powers: of the image that is seen through windows, see `mean_powers`;
            empty where it is seen at once.
        noise_origin: of a window in its image, see `CompressionModel.synthesis`.
    """

    x: Array
    sizes: Array
    quality: Array
    weights: Array
    feature_weights: Array
    taps: tuple[Array, ...] = ()
    structure: tuple[Array, ...] = ()
    lattice: tuple[Array, ...] = ()
    mean_powers: tuple[Array, ...] = ()
    noise_origin: Array | None = None

    @property
    def pixel_counts(self) -> Array:
        """How many real pixels each image has, float32 [B]."""
        return jnp.prod(self.sizes.astype(jnp.float32), axis=1)


class Weights(NamedTuple):
    """Of the terms; float32 scalars, so that changing them compiles nothing anew."""

    alpha: Array
    gamma: Array
    style: Array
    mean_style: Array
    structure: Array
    lattice: Array


class Terms(NamedTuple):
    """Of each image, float32 [B] each.

    Attributes:
        value: all terms but the rate, with their weights.
        bpp: payload bits per real pixel.
        mse: mean squared error in 8-bit levels, weighted as in the loss.
        perceptual: 0 where it has no weight.
    """

    value: Array
    bpp: Array
    mse: Array
    perceptual: Array


def apply_twin(frozen: Frozen, forward: Callable[[Network], _Found]) -> _Found:
    """What a function finds by the differentiable model, bound to its parameters."""
    static = frozen.static
    model = network_of(static.config, "twin", jnp.dtype(static.dtype))
    return nn.apply(forward, model)({"params": frozen.params})


def decoded_image(frozen: Frozen, images: Images, y_hat: Array) -> Array:
    """What the decoder shows of y_hat_scaled [B, h, w, M]: [B, H, W, 3] in [0, 1]."""

    return apply_twin(frozen, lambda model: reconstruct(model, frozen, images, y_hat))


def image_terms(
    frozen: Frozen,
    images: Images,
    weights: Weights,
    bits: Array,
    x_hat: Array,
) -> Terms:
    """The terms of decoded images, seen from the first corner.

    Args:
        bits: of the payload, float32 [B].
        x_hat: float32 [B, H, W, 3] in [0, 1].
    """
    return terms_of(frozen, images, weights, bits, x_hat, jnp.int32(0))


def original_taps(features: FeatureNetwork, x: Array) -> tuple[Array, ...]:
    """`Images.taps`."""
    shifted = [features.apply(_shifted(x, *corner)) for corner in TRUNK_SHIFTS]
    return tuple(jnp.stack(taps) for taps in zip(*shifted, strict=True))


def equal_weights(x: np.ndarray, sizes: Sequence[tuple[int, int]]) -> np.ndarray:
    """Equal weights of all real pixels: float32 [B, H, W], 1 inside the images."""
    weights = np.zeros(x.shape[:3], np.float32)
    for image, (height, width) in zip(weights, sizes, strict=True):
        image[:height, :width] = 1
    return weights


def pixel_weights(
    x: np.ndarray,
    sizes: Sequence[tuple[int, int]],
    regions: Sequence[Region | None],
) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the pixels in D and in the perceptual terms, float32 [B, H, W].

    Args:
        x: the padded images, [B, H, W, 3].
        sizes: real height and width of each.
        regions: of interest, in each.
    """
    equal = equal_weights(x, sizes)
    weights, feature_weights = equal.copy(), equal.copy()
    for i, ((height, width), region) in enumerate(zip(sizes, regions, strict=True)):
        if region is None:
            continue
        own = region.pixel_weights((height, width))
        weights[i, :height, :width] = own
        if region.variant == "L2":
            feature_weights[i, :height, :width] = own
    return weights, feature_weights


def reconstruct(model: Network, frozen: Frozen, images: Images, y_hat: Array) -> Array:
    """The decoder's image of y_hat_scaled: [B, H, W, 3], clipped to [0, 1]."""
    if frozen.static.padded:
        # Decoders repeat the edge of the latents beyond the image.
        last = (images.sizes + STRIDE - 1) // STRIDE - 1
        for axis in (1, 2):
            position = jnp.arange(y_hat.shape[axis])
            source = jnp.minimum(position, last[:, axis - 1 : axis])
            shape = [-1, 1, 1, 1]
            shape[axis] = y_hat.shape[axis]
            y_hat = jnp.take_along_axis(y_hat, source.reshape(shape), axis)
    if images.noise_origin is None:
        x_hat = model.synthesis(y_hat, images.quality)
    else:
        assert isinstance(model, CompressionModel)
        x_hat = model.synthesis(y_hat, images.quality, images.noise_origin)
    return jnp.clip(x_hat, 0.0, 1.0)


def _shifted(x: Array, row: Array | int, column: Array | int) -> Array:
    batch, height, width = x.shape[:3]
    size = (batch, height - _TRUNK_MARGIN, width - _TRUNK_MARGIN, *x.shape[3:])
    start = (0, row, column, *([0] * (x.ndim - 3)))
    return jax.lax.dynamic_slice(x, start, size)


def _trunk_view(
    frozen: Frozen, images: Images, x_hat: Array, shift: Array | int
) -> tuple[Array, Array]:
    """What the trunk sees of x_hat, and the weights of its pixels.

    Beyond the images it sees the originals. Means with these weights over the padded
    image are means over the real one.
    """
    height, width = x_hat.shape[1:3]
    if frozen.static.padded:
        rows = jnp.arange(height)[:, None] < images.sizes[:, 0, None, None]
        columns = jnp.arange(width)[None, :] < images.sizes[:, 1, None, None]
        x_hat = jnp.where((rows & columns)[..., None], x_hat, images.x)
    row, column = jnp.asarray(TRUNK_SHIFTS)[shift]
    pixels = images.pixel_counts
    cell_weights = _shifted(images.feature_weights, row, column)
    cell_weights = cell_weights * (height * width / pixels)[:, None, None]
    return _shifted(x_hat, row, column), cell_weights


def terms_of(
    frozen: Frozen,
    images: Images,
    weights: Weights,
    bits: Array,
    x_hat: Array,
    shift: Array,
) -> Terms:
    """The terms of decoded images that take so many bits.

    Args:
        bits: of the payload, float32 [B].
        x_hat: float32 [B, H, W, 3] in [0, 1].
        shift: int32 scalar, which of TRUNK_SHIFTS the trunk sees.
    """
    pixels = images.pixel_counts
    square = jnp.mean(jnp.square(x_hat - images.x), -1) * _MAX_LEVEL**2
    mse = jnp.sum(square * images.weights, (1, 2)) / pixels
    value = weights.alpha * mse
    distance = jnp.zeros_like(mse)
    if frozen.static.perceptual:
        assert frozen.features is not None
        seen, cell_weights = _trunk_view(frozen, images, x_hat, shift)
        made = frozen.features.apply(seen)
        real = _original_seen(frozen.features, images, shift)
        distance = feature_distance(real, made, pixel_weights=cell_weights)
        value = value + weights.gamma * distance
        size = (seen.shape[1], seen.shape[2])
        if frozen.static.style:
            unit, unit_made = (
                [_weigh(normalise_channels(tap), cell_weights, 4) for tap in taps]
                for taps in (real, made)
            )
            texture = local_style(unit, unit_made, size)
            value = value + weights.gamma * weights.style * texture
        if frozen.static.mean_style:
            weighted, weighted_made = (
                [_weigh(tap, cell_weights, 2) for tap in taps] for taps in (real, made)
            )
            powers = images.mean_powers or None
            texture = local_mean_style(weighted, weighted_made, size, powers=powers)
            value = value + weights.gamma * weights.mean_style * texture
    if images.structure:
        structure = structure_distance(images, x_hat)
        value = value + weights.gamma * weights.structure * structure
    for part in _lattice_parts(images, x_hat):
        pattern = jnp.sum(jnp.square(part), (1, 2, 3, 4))
        value = value + weights.gamma * weights.lattice * pattern
    return Terms(value, bits / pixels, mse, distance)


def mean_powers(frozen: Frozen, images: Images) -> tuple[Array, ...]:
    """What the mean style is relative to: of each layer of the trunk float32 [B]."""
    assert frozen.features is not None
    seen, cell_weights = _trunk_view(frozen, images, images.x, 0)
    taps = [_weigh(tap, cell_weights, 2) for tap in frozen.features.apply(seen)]
    return tuple(local_mean_powers(taps, (seen.shape[1], seen.shape[2])))


def _original_seen(
    features: FeatureNetwork, images: Images, shift: Array | int
) -> list[Array]:
    """What the trunk makes of the originals, seen from one of TRUNK_SHIFTS."""
    if images.taps:
        return [jax.lax.dynamic_index_in_dim(t, shift, 0, False) for t in images.taps]
    row, column = jnp.asarray(TRUNK_SHIFTS)[shift]
    return list(features.apply(_shifted(images.x, row, column)))


def structure_distance(images: Images, x_hat: Array) -> Array:
    """About 1 - MS-SSIM of decoded images [B, H, W, 3], float32 [B]."""
    parts = _structure_parts(images, x_hat)
    return sum((jnp.sum(jnp.square(part), (1, 2, 3)) for part in parts), jnp.zeros(()))


def objective_residuals(
    frozen: Frozen, images: Images, weights: Weights, x_hat: Array
) -> tuple[Array, ...]:
    """Residuals of x_hat whose squares add up to the objective without any style.

    Args:
        x_hat: float32 [B, H, W, 3] in [0, 1].

    Returns:
        of the pixels [B, H, W, 3]; where there are perceptual terms also of each tap
        [B, h, w, C], of each scale of the structure, and of the lattice.
    """
    pixels = images.pixel_counts[:, None, None, None]
    scale = jnp.sqrt(weights.alpha * images.weights[..., None] / (3 * pixels))
    residuals = [scale * _MAX_LEVEL * (x_hat - images.x)]
    if frozen.static.perceptual:
        assert frozen.features is not None
        seen, cell_weights = _trunk_view(frozen, images, x_hat, 0)
        made = frozen.features.apply(seen)
        originals = _original_seen(frozen.features, images, 0)
        for tap, real in zip(made, originals, strict=True):
            cells = jax.image.resize(cell_weights, tap.shape[:3], "linear")
            cells = cells * weights.gamma / (tap.shape[1] * tap.shape[2])
            difference = normalise_channels(tap) - normalise_channels(real)
            residuals.append(jnp.sqrt(cells)[..., None] * difference)
    scale = jnp.sqrt(weights.gamma * weights.structure)
    residuals += [scale * part for part in _structure_parts(images, x_hat)]
    scale = jnp.sqrt(weights.gamma * weights.lattice)
    residuals += [scale * part for part in _lattice_parts(images, x_hat)]
    return tuple(residuals)


def _structure_parts(images: Images, x_hat: Array) -> list[Array]:
    return structure_residuals(images.x, x_hat, images.weights, images.structure)


def _lattice_parts(images: Images, x_hat: Array) -> list[Array]:
    return [lattice_residuals(images.x, x_hat, windows) for windows in images.lattice]


def _weigh(tap: Array, pixel_weights: Array, root: int) -> Array:
    """Features times the square or fourth root of the weights of their pixels.

    So squares of features are weighted, or with the fourth root squares of their
    Gram matrices.
    """
    cells = jax.image.resize(pixel_weights, tap.shape[:3], "linear")
    return tap * cells[..., None] ** (1 / root)
