# SPDX-License-Identifier: Apache-2.0
"""Metrics of reconstructions against their originals, for batches of 8-bit images.

These are feature distance, LPIPS, DISTS, SSIMULACRA2, and `ImageMetrics`, which loads
what a list of names needs and measures batches. PSNR and MS-SSIM are in
`similarity.py`, metrics of a set of images in `distribution_metrics.py`, and those of
rate-distortion curves in `bd_rates.py`.

Every metric takes uint8 images, [H, W, 3] or [B, H, W, 3], or float images in [0, 1],
which are not rounded unless the definition of a metric says so. It gives one value per
image. Matrix products run in full float32 on every device, since a metric must not
change with the accelerator. Imports jax, numpy and other modules of this package's
objectives.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from semlic_jax.objectives.feature_weights import (
    load_dists_weights,
    load_lpips_heads,
)
from semlic_jax.objectives.features import (
    PACKAGED,
    FeatureNetwork,
    feature_distance,
    load_features,
)
from semlic_jax.objectives.lattice import LATTICE_PIXELS, REFINED_TILES, lattice
from semlic_jax.objectives.similarity import (
    MS_SSIM_LEAST_SIDE,
    Images,
    as_pair,
    exact,
    ms_ssim,
    psnr_db,
)
from semlic_jax.objectives.spectrum import (
    MESH_PIXELS,
    SPECTRUM_PIXELS,
    mesh,
    spectrum,
)
from semlic_jax.objectives.style_losses import local_mean_style
from semlic_jax.objectives.trunks import LPIPS_TAPS


@exact
def _network_distance(
    network: FeatureNetwork,
    heads: Sequence[jax.Array] | None,
    reference: Images,
    image: Images,
) -> jax.Array:
    x, x_hat = as_pair(reference, image)
    # 1e-20 in the root stands for stock LPIPS's 1e-10 outside; no gradient is taken.
    return feature_distance(
        network.apply(x / 255), network.apply(x_hat / 255), heads, eps=1e-20
    )


@dataclasses.dataclass(frozen=True)
class FeatureDistance:
    """LPIPS (arXiv:1801.03924) with learnt heads, a plain feature distance without.

    Attributes:
        network: the trunk whose taps are compared.
        heads: channel weights [C] per tap; None means that all are 1.
    """

    network: FeatureNetwork
    heads: tuple[jax.Array, ...] | None = None

    def __call__(self, reference: Images, image: Images) -> jax.Array:
        """Distance of original and reconstruction, float32 [B], 0 for equal images."""
        return _network_distance(self.network, self.heads, reference, image)


@exact
def _mean_style_distance(
    network: FeatureNetwork, reference: Images, image: Images
) -> jax.Array:
    x, x_hat = (pixels / 255 for pixels in as_pair(reference, image))
    size = (x.shape[1], x.shape[2])
    return local_mean_style(network.apply(x), network.apply(x_hat), size)


@dataclasses.dataclass(frozen=True)
class MeanStyleDistance:
    """Difference in how much texture there is: `style_losses.local_mean_style`.

    Attributes:
        network: the trunk whose taps are compared.
    """

    network: FeatureNetwork

    def __call__(self, reference: Images, image: Images) -> jax.Array:
        """Distance of original and reconstruction, float32 [B], 0 for equal images."""
        return _mean_style_distance(self.network, reference, image)


_LPIPS_TRUNKS = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}


def load_lpips(folder: str | Path, trunk: str = "alex") -> FeatureDistance:
    """Load LPIPS v0.1 from a folder with the weights of the trunk and of the heads.

    Args:
        folder: holds `alexnet*.npz`, `vgg16*.npz` or `squeezenet1_1*.npz`, and
            `lpips_v0.1_<trunk>.npz`.
        trunk: "alex", "vgg" or "squeeze".

    Raises:
        ValueError: the trunk is unknown, or a file is missing or does not fit.
    """
    heads = load_lpips_heads(folder, trunk)
    network = load_features(folder, _LPIPS_TRUNKS[trunk], taps=LPIPS_TAPS[trunk])
    return FeatureDistance(network, tuple(map(jnp.asarray, heads)))


@exact
def _dists(
    network: FeatureNetwork,
    alpha: Sequence[jax.Array],
    beta: Sequence[jax.Array],
    reference: Images,
    image: Images,
) -> jax.Array:
    x, x_hat = (pixels / 255 for pixels in as_pair(reference, image))
    total = sum(jnp.sum(w) for w in (*alpha, *beta))
    similarity = jnp.zeros(x.shape[0], jnp.float32)
    maps = zip(
        (x, *network.apply(x)), (x_hat, *network.apply(x_hat)), alpha, beta, strict=True
    )
    for f, g, a, b in maps:
        mean, mean_hat = jnp.mean(f, axis=(1, 2)), jnp.mean(g, axis=(1, 2))
        df, dg = f - mean[:, None, None], g - mean_hat[:, None, None]
        variances = jnp.mean(df * df + dg * dg, axis=(1, 2))
        covariance = jnp.mean(df * dg, axis=(1, 2))
        squares = mean * mean + mean_hat * mean_hat
        texture = (2 * mean * mean_hat + 1e-6) / (squares + 1e-6)
        structure = (2 * covariance + 1e-6) / (variances + 1e-6)
        similarity += (texture @ a + structure @ b) / total
    return 1 - similarity


@dataclasses.dataclass(frozen=True)
class DISTS:
    """Deep image structure and texture similarity (arXiv:2004.07728).

    1 - sum over maps and channels of alpha * texture + beta * structure, with weights
    scaled to a sum of 1. The maps are the image and five layers of VGG-16 with L2
    pooling, at the images' own size (as in MS-ILLM's evaluation; the authors' example
    first scales the short side to 256).

    Attributes:
        network: VGG-16 with `pooling="l2"`.
        alpha, beta: weights [C] of each map, the image's three channels first.
    """

    network: FeatureNetwork
    alpha: tuple[jax.Array, ...]
    beta: tuple[jax.Array, ...]

    def __call__(self, reference: Images, image: Images) -> jax.Array:
        """Distance of original and reconstruction, float32 [B], 0 for equal images."""
        return _dists(self.network, self.alpha, self.beta, reference, image)


def load_dists(folder: str | Path) -> DISTS:
    """Load DISTS from a folder that holds `vgg16*.npz` and `dists_alpha_beta.npz`.

    Raises:
        ValueError: a file is missing or does not fit.
    """
    alpha, beta = load_dists_weights(folder)
    network = load_features(folder, "vgg16", taps=LPIPS_TAPS["vgg"])
    return DISTS(
        network.replace(pooling="l2"),
        tuple(map(jnp.asarray, alpha)),
        tuple(map(jnp.asarray, beta)),
    )


@exact
def lattice_pattern(reference: Images, image: Images) -> jax.Array:
    """How much the image repeats in cells of 16 pixels, float32 [B].

    This is `lattice.lattice` in windows of 2 x 2 cells, as in the objective of
    refinement.

    Raises:
        ValueError: a side is under 32 pixels.
    """
    x, x_hat = as_pair(reference, image)
    return lattice(x / 255, x_hat / 255, tiles=REFINED_TILES)


@exact
def spectrum_peaks(reference: Images, image: Images) -> jax.Array:
    """Peaks of the image's spectrum that the reference has not, float32 [B].

    This is `spectrum.spectrum`, a mean over the whole image.

    Raises:
        ValueError: a side is under 32 pixels.
    """
    x, x_hat = as_pair(reference, image)
    return spectrum(x / 255, x_hat / 255)


@exact
def mesh_pattern(reference: Images, image: Images) -> jax.Array:
    """How much of the image is a mesh that the reference has not there, float32 [B].

    This is `spectrum.mesh`, as in the objective of refinement.

    Raises:
        ValueError: a side is under 64 pixels.
    """
    x, x_hat = as_pair(reference, image)
    return mesh(x / 255, x_hat / 255)


_NO_SSIMULACRA2 = "SSIMULACRA2 needs its package: pip install ssimulacra2"


def ssimulacra2(reference: Images, image: Images) -> np.ndarray:
    """SSIMULACRA2 from its PyPI package, float64 [B]; 100 for equal images.

    It runs in NumPy on the host, image by image. Float images are rounded to 8 bits.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        compute = importlib.import_module("ssimulacra2").compute_ssimulacra2
    except ImportError:
        raise ValueError(_NO_SSIMULACRA2) from None
    from PIL import Image

    def file_of(pixels: np.ndarray) -> io.BytesIO:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "BMP")
        buffer.seek(0)
        return buffer

    pair = [
        np.clip(np.round(np.asarray(pixels)), 0, 255).astype(np.uint8)
        for pixels in as_pair(reference, image)
    ]
    scores = [compute(file_of(a), file_of(b)) for a, b in zip(*pair, strict=True)]
    return np.asarray(scores, np.float64)


@dataclasses.dataclass(frozen=True)
class MetricInfo:
    """What a table or plot must know about a metric.

    Attributes:
        label: name of the metric for axes and headings, with the unit.
        higher_is_better: whether larger values are better.
        least_side: least side in pixels of an image that can be measured.
    """

    label: str
    higher_is_better: bool
    least_side: int = 1


IMAGE_METRICS = {
    "psnr_db": MetricInfo("PSNR (dB)", True),
    "ms_ssim": MetricInfo("MS-SSIM", True, MS_SSIM_LEAST_SIDE),
    "feature_distance": MetricInfo("SqueezeNet feature distance", False, 7),
    "compact_distance": MetricInfo("compact feature distance", False, 7),
    "compact_mean_style": MetricInfo("compact mean-style distance", False, 7),
    "lpips_alex": MetricInfo("LPIPS (AlexNet)", False, 31),
    "lpips_vgg": MetricInfo("LPIPS (VGG-16)", False, 16),
    "lpips_squeeze": MetricInfo("LPIPS (SqueezeNet)", False, 17),
    "dists": MetricInfo("DISTS", False, 16),
    "mobilenet_distance": MetricInfo("MobileNetV2 feature distance", False, 32),
    "lattice": MetricInfo("lattice", False, LATTICE_PIXELS * REFINED_TILES),
    "spectrum": MetricInfo("peaks of the spectrum", False, SPECTRUM_PIXELS),
    "mesh": MetricInfo("mesh", False, MESH_PIXELS),
    "ssimulacra2": MetricInfo("SSIMULACRA2", True, 8),
}


class ImageMetrics:
    """Several metrics at once, loaded by name.

    Args:
        names: names in `IMAGE_METRICS`.
        weights: folder of feature weights; None takes that of the environment variable
            SEMLIC_FEATURES. Only metrics that need such weights look there.

    Raises:
        ValueError: a name is unknown, weights are missing or do not fit, or the package
            of SSIMULACRA2 is not installed.
    """

    def __init__(self, names: Sequence[str], weights: str | Path | None = None) -> None:
        unknown = [name for name in names if name not in IMAGE_METRICS]
        if unknown:
            raise ValueError(
                f"unknown metric {', '.join(unknown)}: "
                f"expected some of {', '.join(IMAGE_METRICS)}"
            )
        self._functions = {name: self._load(name, weights) for name in names}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the metrics, as given."""
        return tuple(self._functions)

    @staticmethod
    def _load(name: str, weights: str | Path | None) -> Callable[..., Any]:
        plain = {
            "psnr_db": psnr_db,
            "ms_ssim": ms_ssim,
            "ssimulacra2": ssimulacra2,
            "lattice": lattice_pattern,
            "spectrum": spectrum_peaks,
            "mesh": mesh_pattern,
        }
        if name == "ssimulacra2" and importlib.util.find_spec(name) is None:
            raise ValueError(_NO_SSIMULACRA2)
        if name in plain:
            return plain[name]
        if name == "feature_distance":
            return FeatureDistance(load_features(weights, "squeezenet1_0"))
        if name == "compact_distance":  # always of the packaged weights
            return FeatureDistance(load_features(None, PACKAGED))
        if name == "compact_mean_style":
            return MeanStyleDistance(load_features(None, PACKAGED))
        folder = weights if weights is not None else os.environ.get("SEMLIC_FEATURES")
        if not folder:
            raise ValueError(
                f"{name} needs feature weights: give their folder, or set "
                "SEMLIC_FEATURES to it"
            )
        if name == "dists":
            return load_dists(folder)
        if name == "mobilenet_distance":
            return FeatureDistance(load_features(folder, "mobilenet_v2"))
        return load_lpips(folder, name.removeprefix("lpips_"))

    def refusals(self, height: int, width: int) -> dict[str, str]:
        """The metrics that images of this size are too small for: name to reason."""
        return {
            name: f"needs {least}x{least} pixels, found {width}x{height}"
            for name in self._functions
            if min(height, width) < (least := IMAGE_METRICS[name].least_side)
        }

    def __call__(self, reference: Images, image: Images) -> dict[str, np.ndarray]:
        """Measure with every metric that the images are large enough for.

        Args:
            reference, image: uint8 (or float in [0, 1]), [H, W, 3] or [B, H, W, 3].

        Returns:
            name to values, float64 [B]; metrics among `refusals` are left out.
        """
        height, width = reference.shape[-3:-1]
        refused = self.refusals(height, width)
        return {
            name: np.asarray(function(reference, image), np.float64)
            for name, function in self._functions.items()
            if name not in refused
        }
