# SPDX-License-Identifier: Apache-2.0
"""The metrics of a sweep: of each image, and of the set of all images.

Metrics of an image come from `objectives.metrics`. Metrics of the set compare the
features of patches (`objectives.distribution_metrics`): a sweep keeps one small array
of features for each image, so that they are computed once and any part of the set can
be put together from them.

Feature distances have their network in their name, so that those of two networks are
never in one column.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from semlic_jax.evaluation.codecs import FAILURES, reason_of
from semlic_jax.evaluation.entrants import code_digest
from semlic_jax.evaluation.results import MetricFacts
from semlic_jax.images import write_file
from semlic_jax.objectives.distribution_metrics import (
    PATCH_SIDE,
    FeatureStatistics,
    frechet_distance,
    kernel_distance,
    patch_count,
    patch_grids,
    polynomial_mmd,
)
from semlic_jax.objectives.features import (
    PACKAGED,
    PACKAGED_FILE,
    FeatureNetwork,
    load_features,
)
from semlic_jax.objectives.metrics import IMAGE_METRICS, ImageMetrics

_SUBSET_SIZE = 1000  # of the kernel distance, as is usual in the field
_PATCHES_PER_CALL = 8  # of the network: as many as a 768x512 image has

# The last layer at 1/16 of the image's size. The network's own last layer, fine-tuned
# to five classes, puts mild distortions in the wrong order (small's card).
_MIDDLE = "block_13_expand_relu"


@dataclass(frozen=True)
class SetMetric:
    """A distance between two sets of images: its name, network, kind and layer."""

    label: str
    network: str
    kind: str  # "frechet" or "kernel"
    tap: str | None = None  # None: the network's own last layer

    @property
    def trunk(self) -> str:
        """Name of the features that it needs, also in names of files."""
        return f"{self.network}-{self.tap}" if self.tap else self.network


SET_METRICS = {
    "frechet": SetMetric(
        "patch Fréchet distance, SqueezeNet", "squeezenet1_0", "frechet"
    ),
    "kernel": SetMetric("patch kernel distance, SqueezeNet", "squeezenet1_0", "kernel"),
    "compact_frechet": SetMetric(
        "patch Fréchet distance, compact trunk", PACKAGED, "frechet"
    ),
    "compact_kernel": SetMetric(
        "patch kernel distance, compact trunk", PACKAGED, "kernel"
    ),
    "mobilenet_frechet": SetMetric(
        "patch Fréchet distance, MobileNetV2", "mobilenet_v2", "frechet", _MIDDLE
    ),
    "mobilenet_kernel": SetMetric(
        "patch kernel distance, MobileNetV2", "mobilenet_v2", "kernel", _MIDDLE
    ),
    "mobilenet_last_frechet": SetMetric(
        "patch Fréchet distance, MobileNetV2's last layer", "mobilenet_v2", "frechet"
    ),
    "mobilenet_last_kernel": SetMetric(
        "patch kernel distance, MobileNetV2's last layer", "mobilenet_v2", "kernel"
    ),
    "fid": SetMetric("patch FID", "inception_v3", "frechet"),
    "kid": SetMetric("patch KID", "inception_v3", "kernel"),
}

_WITHOUT_NETWORKS = ("psnr_db", "ms_ssim", "ssimulacra2")
_OF_GRIDS = ("lattice", "spectrum", "mesh")  # without a network too, but not defaults
_OF_SQUEEZENET = ("feature_distance", "frechet", "kernel")
_OF_PACKAGED = ("compact_distance", "compact_frechet", "compact_kernel")
_MEAN_STYLE = "compact_mean_style"  # of the packaged network too, but not a default


def feature_metrics(weights: str | Path | None = None) -> tuple[str, ...]:
    """Names of the feature distances: of the packaged network if no other is given.

    Args:
      weights: folder of feature weights; None: the environment's SEMLIC_FEATURES.
    """
    given = weights is not None or os.environ.get("SEMLIC_FEATURES")
    return _OF_SQUEEZENET if given else _OF_PACKAGED


def default_metrics(weights: str | Path | None = None) -> tuple[list[str], list[str]]:
    """The default metrics that can be computed here, and why the others cannot.

    Args:
      weights: folder of feature weights; None: the environment's SEMLIC_FEATURES.
    """
    names, notes = [*_WITHOUT_NETWORKS, *feature_metrics(weights)], []
    if importlib.util.find_spec("ssimulacra2") is None:
        names.remove("ssimulacra2")
        notes.append(
            "SSIMULACRA2 is left out: its package ssimulacra2 is not installed"
        )
    return names, notes


class Measures:
    """Several metrics of images and of sets, loaded by name.

    Args:
      names: keys of `IMAGE_METRICS` and `SET_METRICS`.
      weights: folder of feature weights; None: the environment's SEMLIC_FEATURES.
      patch_side: side of the patches for the metrics of sets, in pixels; small sets may
        need less than 256.

    Raises:
      ValueError: a name is unknown, or weights are missing or do not fit.
    """

    def __init__(
        self,
        names: Sequence[str],
        weights: str | Path | None = None,
        *,
        patch_side: int = PATCH_SIDE,
    ) -> None:
        known = [*IMAGE_METRICS, *SET_METRICS]
        for name in names:
            if name not in known:
                raise ValueError(
                    f"unknown metric {name!r}: expected some of {', '.join(known)}"
                )
        if patch_side < 32:
            raise ValueError(
                f"expected patches of at least 32 pixels, found {patch_side}"
            )
        self.patch_side = patch_side
        # Loaded one by one, so that any of them can be measured alone.
        self._of_images = {
            name: ImageMetrics([name], weights)
            for name in names
            if name in IMAGE_METRICS
        }
        self._of_sets = {
            name: SET_METRICS[name] for name in names if name in SET_METRICS
        }
        wanted = {metric.trunk: metric for metric in self._of_sets.values()}
        self._networks = {
            trunk: load_features(
                None if metric.network == PACKAGED else weights,
                metric.network,
                taps=(metric.tap,) if metric.tap else None,
            )
            for trunk, metric in wanted.items()
        }
        self._folder = (
            weights if weights is not None else os.environ.get("SEMLIC_FEATURES")
        )

    @functools.cached_property
    def _weights(self) -> str:
        """Digest of all weight files of the folder, in use or not.

        They are large and so read only once.
        """
        if not self._folder:
            return "none"
        path = Path(self._folder)
        digest = hashlib.sha256()
        for file in sorted(path.glob("*.npz")) if path.is_dir() else [path]:
            if file.is_file():
                digest.update(os.fsencode(file.name))
                with open(file, "rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()[:12]

    @property
    def image_metrics(self) -> dict[str, MetricFacts]:
        """The metrics of images: name to facts."""
        return {
            name: MetricFacts(
                IMAGE_METRICS[name].label, IMAGE_METRICS[name].higher_is_better
            )
            for name in self._of_images
        }

    @property
    def set_metrics(self) -> dict[str, MetricFacts]:
        """The metrics of the set: name to facts."""
        return {
            name: MetricFacts(f"{metric.label} ({self.patch_side} px)", False)
            for name, metric in self._of_sets.items()
        }

    @property
    def trunks(self) -> dict[str, str]:
        """Networks whose features the metrics of sets need: name to identity."""
        return {
            name: f"{name}-{self.patch_side}-"
            + (_packaged_digest() if name == PACKAGED else self._weights)
            for name in self._networks
        }

    def identity(self, metric: str) -> str:
        """A text that changes when the values of a metric of images would.

        It is of the metric's own function or class, of its weights and its package; not
        of the functions that it calls.
        """
        loaded = self._of_images.get(metric)
        code = code_digest(_own_code(loaded._functions[metric])) if loaded else ""
        return f"{self._weights_of(metric)} {code}"

    def _weights_of(self, metric: str) -> str:
        if metric == "ssimulacra2":
            return metadata.version("ssimulacra2")
        if metric in (*_WITHOUT_NETWORKS, *_OF_GRIDS):
            return ""
        packaged = metric in (*_OF_PACKAGED, _MEAN_STYLE)
        return _packaged_digest() if packaged else self._weights

    def measure(
        self, original: np.ndarray, decoded: np.ndarray, names: Sequence[str]
    ) -> tuple[dict[str, float], dict[str, str], dict[str, str]]:
        """Values of metrics of one image, and reasons for those that have none.

        Args:
          original, decoded: uint8 [H, W, 3].
          names: which of `image_metrics`.

        Returns:
          Values; gaps, whose reason is the image; and failures, whose reason may be
          temporary (no memory).
        """
        values: dict[str, float] = {}
        gaps: dict[str, str] = {}
        failed: dict[str, str] = {}
        for name in names:
            metric = self._of_images[name]
            refused = metric.refusals(*original.shape[:2])
            if refused:
                gaps |= refused
                continue
            try:
                value = float(metric(original, decoded)[name][0])
            except FAILURES as error:
                failed[name] = reason_of(error)
                continue
            if math.isfinite(value):
                values[name] = value
            else:  # PSNR of equal images
                gaps[name] = f"its value is {value}"
        return values, gaps, failed

    def features(self, image: np.ndarray, trunk: str) -> np.ndarray:
        """Features float32 [patches, D] of one image, uint8 [H, W, 3].

        Raises:
          ValueError: the image is smaller than a patch.
        """
        patches = patch_grids(image, self.patch_side).astype(np.float32) / 255
        rows = []
        for start in range(0, len(patches), _PATCHES_PER_CALL):
            batch = patches[start : start + _PATCHES_PER_CALL]
            fill = ((0, _PATCHES_PER_CALL - len(batch)), (0, 0), (0, 0), (0, 0))
            with jax.default_matmul_precision("highest"):
                found = _embed(self._networks[trunk], np.pad(batch, fill))
            rows.append(np.asarray(found)[: len(batch)])
        return np.concatenate(rows)

    def features_shape(
        self, image_shape: tuple[int, ...], trunk: str
    ) -> tuple[int, int]:
        """What `features` of an image of this shape has."""
        height, width = image_shape[:2]
        return patch_count(height, width, self.patch_side), self._widths[trunk]

    @functools.cached_property
    def _widths(self) -> dict[str, int]:
        side = self.patch_side
        patch = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
        return {
            trunk: jax.eval_shape(_embed, network, patch).shape[1]
            for trunk, network in self._networks.items()
        }

    def distances(
        self,
        originals: Mapping[str, Sequence[np.ndarray]],
        decoded: Mapping[str, Sequence[np.ndarray]],
    ) -> tuple[dict[str, float], dict[str, str], int]:
        """Values of the metrics of a set, reasons for gaps, and patches on each side.

        Args:
          originals, decoded: trunk to the features of each image, in the same order.
        """
        values, gaps, patches = {}, {}, 0
        sides = {
            trunk: (_statistics(originals[trunk]), _statistics(decoded[trunk]))
            for trunk in self._networks
        }
        for name, metric in self._of_sets.items():
            a, b = sides[metric.trunk]
            patches = a.count
            if patches < 2:
                gaps[name] = f"needs at least 2 patches, found {patches}"
            elif metric.kind == "frechet":
                values[name] = frechet_distance(a, b)
            else:
                values[name] = _kernel(a, b)
        return values, gaps, patches


def _own_code(metric: Callable[..., Any]) -> type | Callable[..., Any]:
    """The function that a metric is, or the class that it is of."""
    return metric if inspect.isfunction(inspect.unwrap(metric)) else type(metric)


_embed = jax.jit(FeatureNetwork.embed)


def _kernel(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Kernel distance between originals and decoded versions of the same patches."""
    if a.count > _SUBSET_SIZE:
        return kernel_distance(a, b, subset_size=_SUBSET_SIZE).mean
    # In a set this small, patches and their own originals meet too often to count as
    # independent. In random subsets of a larger one they hardly do.
    return polynomial_mmd(a.kept, b.kept, paired=True)


def _statistics(features: Sequence[np.ndarray]) -> FeatureStatistics:
    rows = np.concatenate(list(features))
    statistics = FeatureStatistics(rows.shape[1])
    statistics.update(rows, range(len(rows)))
    return statistics


def write_features(path: Path, features: np.ndarray) -> None:
    """Write the features of an image, replacing older ones; the folder is created."""
    stream = io.BytesIO()
    np.save(stream, features, allow_pickle=False)
    path.parent.mkdir(exist_ok=True)
    write_file(path, stream.getvalue(), force=True)


def read_features(path: Path) -> np.ndarray | None:
    """Features float [patches, D], or None where the file is missing or damaged.

    Damage that leaves finite numbers of some shape is not seen here.
    """
    try:
        found = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        numbers = found.ndim == 2 and found.dtype.kind == "f"
        return found if numbers and np.isfinite(found).all() else None
    except Exception:  # what is no .npy raises errors of many kinds
        return None


@functools.cache
def _packaged_digest() -> str:
    """Digest of the packaged weights."""
    return hashlib.sha256(PACKAGED_FILE.read_bytes()).hexdigest()[:12]
