# SPDX-License-Identifier: Apache-2.0
"""The objective that refinement minimises, term by term, for one batch of images.

    alpha * D + gamma * (Perceptual + k * Style + t * MeanStyle + s * Structure
        + l * Lattice + m * Mesh) + beta * R

* D: mean squared error in 8-bit levels (100 is 28.1 dB), over the real pixels of the
  image, weighted by the region of interest.
* Perceptual: distance of the channel-normalised features of a frozen trunk
  (`objectives.features.feature_distance`).
* Style: distance of local Gram matrices of the same features.
* MeanStyle: relative distance of local means of the trunk's features before they are
  normalised. The other terms remove all texture that is not where the original has it.
* Structure: 1 - MS-SSIM as a sum of squares, see `structure.py`. With a region of
  interest, its errors are weighted like those of D.
* Lattice: what repeats in every cell of the latents, see `structure.py`; it is also
  weighted like D. No preset uses this term.
* Mesh: waves that the original has not where they are (`objectives.spectrum.mesh`);
  weighted like D. Without this term and the one before, a mesh of dots passes for
  texture.
* R: bits per pixel, of relaxed latents under the densities or of rounded latents under
  the tables of the coder.

The strided layers of the trunk are blind to patterns of their own period. So the
trunk's input is shifted by one of a few offsets, drawn anew for each step. The features
of an original that is not refined in tiles are computed only once, for all offsets.
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
from semlic_jax.objectives.spectrum import mesh_patches
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

# Where the trunk's input starts, row and column: all pairs of parities occur.
TRUNK_SHIFTS = ((0, 0), (1, 2), (2, 3), (3, 1))
_TRUNK_MARGIN = 3  # the largest shift
_MAX_LEVEL = 255.0


class Static(NamedTuple):
    """What the compiled programs are specialised for.

    Attributes:
        config: the model's architecture.
        method: the method of the refinement, one of `settings.METHODS`.
        perceptual, style, mean_style: whether these terms have a weight.
        padded: whether any image is smaller than the padded ones.
        dtype: name of the type in which g_s computes.
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
    """What stays the same during a refinement, besides the images: a pytree.

    Attributes:
        params: parameters of the differentiable twin (`Codec.twin_params`).
        y_bits, z_bits: matrices from `SymbolTables.bits_lookup` of the coder's tables,
            float32 [T, 2 * radius + 1].
        features: the trunk, or None without perceptual terms.
        static: what programs are compiled for; metadata of the pytree, not a leaf.
    """

    params: Any
    y_bits: Array
    z_bits: Array
    features: FeatureNetwork | None
    static: Static = dataclasses.field(metadata={"static": True})


class Images(NamedTuple):
    """A batch of images of one bucket, with what the objective needs of each.

    Attributes:
        x: the padded images, float32 [B, H, W, 3] in [0, 1].
        sizes: real height and width of each image, int32 [B, 2].
        quality: quality of each image, float32 [B] in [0, 1].
        weights: weight of each pixel in D, float32 [B, H, W]; 0 outside the image.
        feature_weights: weight of each pixel in the perceptual terms, float32
            [B, H, W]; 0 outside the image.
        taps: for each layer of the trunk, the features of x under all TRUNK_SHIFTS,
            [S, B, h, w, C]; if empty, they are computed when they are needed.
        structure: `structure_weights` of x; empty if the term has no weight.
        lattice: one array, `lattice_weights` of x; empty if the term has no weight.
        mesh: one array, `mesh_weights`; empty if the term has no weight.
        mean_powers: for an image that is refined in tiles, `mean_powers` of the whole
            image; otherwise empty.
        noise_origin: first latent of a window in its image, row and column, int32
            [B, 2]; None means (0, 0). See `CompressionModel.synthesis`.
    """

    x: Array
    sizes: Array
    quality: Array
    weights: Array
    feature_weights: Array
    taps: tuple[Array, ...] = ()
    structure: tuple[Array, ...] = ()
    lattice: tuple[Array, ...] = ()
    mesh: tuple[Array, ...] = ()
    mean_powers: tuple[Array, ...] = ()
    noise_origin: Array | None = None

    @property
    def pixel_counts(self) -> Array:
        """The number of real pixels of each image, float32 [B]."""
        return jnp.prod(self.sizes.astype(jnp.float32), axis=1)


class Weights(NamedTuple):
    """Weights of the terms, float32 scalars: a change needs no new compilation."""

    alpha: Array
    gamma: Array
    style: Array
    mean_style: Array
    structure: Array
    lattice: Array
    mesh: Array


class Terms(NamedTuple):
    """Terms of the objective for each image, float32 [B] each.

    Attributes:
        value: weighted sum of all terms but the rate.
        bpp: payload bits per real pixel.
        mse: mean squared error in 8-bit levels, with the weights of the pixels.
        perceptual: the term Perceptual; 0 if there are no perceptual terms.
    """

    value: Array
    bpp: Array
    mse: Array
    perceptual: Array


def apply_twin(frozen: Frozen, forward: Callable[[Network], _Found]) -> _Found:
    """Call a function with the differentiable twin, bound to its parameters."""
    static = frozen.static
    model = network_of(static.config, "twin", jnp.dtype(static.dtype))
    return nn.apply(forward, model)({"params": frozen.params})


def decoded_image(frozen: Frozen, images: Images, y_hat: Array) -> Array:
    """The decoder's image of y_hat_scaled [B, h, w, M]: [B, H, W, 3] in [0, 1]."""

    return apply_twin(frozen, lambda model: reconstruct(model, frozen, images, y_hat))


def image_terms(
    frozen: Frozen,
    images: Images,
    weights: Weights,
    bits: Array,
    x_hat: Array,
) -> Terms:
    """The terms of decoded images, with the trunk's input not shifted.

    Args:
        frozen, images, weights: those of the refinement.
        bits: bits of the payload, float32 [B].
        x_hat: decoded images, float32 [B, H, W, 3] in [0, 1].
    """
    return terms_of(frozen, images, weights, bits, x_hat, jnp.int32(0))


def original_taps(features: FeatureNetwork, x: Array) -> tuple[Array, ...]:
    """Compute `Images.taps` of padded images x."""
    shifted = [features.apply(_shifted(x, *corner)) for corner in TRUNK_SHIFTS]
    return tuple(jnp.stack(taps) for taps in zip(*shifted, strict=True))


def equal_weights(x: np.ndarray, sizes: Sequence[tuple[int, int]]) -> np.ndarray:
    """Equal weights for all real pixels, float32 [B, H, W]: 1 inside the images."""
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
        sizes: real height and width of each image.
        regions: region of interest of each image, or None.

    Raises:
        ValueError: a region's mask has another size than its image.
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
    """What the trunk sees of x_hat, and the weights of these pixels.

    Beyond the real images it sees the padded originals. Weighted means over the padded
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
        frozen, images, weights: those of the refinement.
        bits: bits of the payload, float32 [B].
        x_hat: decoded images, float32 [B, H, W, 3] in [0, 1].
        shift: which of TRUNK_SHIFTS the trunk's input has, int32 scalar.
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
    for patches in images.mesh:
        waves = jnp.sum(mesh_patches(images.x, x_hat) * patches, (1, 2))
        value = value + weights.gamma * weights.mesh * waves
    return Terms(value, bits / pixels, mse, distance)


def mean_powers(frozen: Frozen, images: Images) -> tuple[Array, ...]:
    """What the mean style is relative to, float32 [B] for each layer of the trunk."""
    assert frozen.features is not None
    seen, cell_weights = _trunk_view(frozen, images, images.x, 0)
    taps = [_weigh(tap, cell_weights, 2) for tap in frozen.features.apply(seen)]
    return tuple(local_mean_powers(taps, (seen.shape[1], seen.shape[2])))


def _original_seen(
    features: FeatureNetwork, images: Images, shift: Array | int
) -> list[Array]:
    """The trunk's features of the originals under one of TRUNK_SHIFTS."""
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
    """Residuals whose squares add up to the objective without rate, styles and mesh.

    Args:
        frozen, images, weights: those of the refinement.
        x_hat: decoded images, float32 [B, H, W, 3] in [0, 1].

    Returns:
        residuals of the pixels [B, H, W, 3]; with perceptual terms also those of each
        tap [B, h, w, C], of each scale of the structure, and of the lattice.
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
    """Multiply features by a root of the weights of their pixels, of degree `root`.

    The square root weights the squares of features, the fourth root the squares of
    their Gram matrices.
    """
    cells = jax.image.resize(pixel_weights, tap.shape[:3], "linear")
    return tap * cells[..., None] ** (1 / root)
