# SPDX-License-Identifier: Apache-2.0
"""Distances of two sets of images: Fréchet (FID) and kernel (KID), under any trunk.

The module has HiFiC's patches on two grids, feature statistics that can be updated and
merged, and the two distances. With Inception-v3's "Mixed_7c" and patches of 256 pixels,
these are the FID/256 and KID/256 of HiFiC and MS-ILLM (arXiv:2006.09965, appendix A.7;
arXiv:2301.11189).

Statistics are float64 on the host. Mean and scatter matrix are updated in place (Chan
et al. 1983), so a set of any size fits in memory. For the kernel distance, a sample of
features is kept, chosen by a hash of each patch's place in the set. So the merged
statistics of several processes are those that one process would have. Imports jax,
numpy, `semlic_jax.arrays_file` and this package's `features`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from semlic_jax.arrays_file import read_arrays_file
from semlic_jax.objectives.features import FeatureNetwork

PATCH_SIDE = 256
_PATCHES_PER_IMAGE = 1 << 24  # numbers reserved for the patches of each image
_MAX_KEPT = 10_000
_PENDING_ROWS = 256
_FILE_DTYPES = ("<f4", "<f8", "<i8", "<U")


def patch_grids(image: np.ndarray, side: int = PATCH_SIDE) -> np.ndarray:
    """Cut an image into patches on HiFiC's two grids, each without overlap.

    The first grid starts at (0, 0), and remainders at the right and bottom are dropped.
    The second is shifted by side // 2 and used only if both sides of the image are at
    least 1.5 * side. A 768x512 image has 6 + 2 patches of 256 pixels.

    Args:
        image: uint8 [H, W, 3].
        side: side of a patch in pixels.

    Returns:
        uint8 [N, side, side, 3].

    Raises:
        ValueError: the image is not of this form, or smaller than a patch.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(
            f"image should be uint8 [H, W, 3], found {image.dtype} {image.shape}"
        )
    height, width, _ = image.shape
    if side < 1 or min(height, width) < side:
        raise ValueError(
            f"patches of {side}x{side} do not fit into an image of {width}x{height}"
        )
    grids = []
    for start, rows, columns in _grids(height, width, side):
        part = image[start : start + rows * side, start : start + columns * side]
        part = part.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
        grids.append(part.reshape(-1, side, side, 3))
    return np.concatenate(grids)


def patch_count(height: int, width: int, side: int = PATCH_SIDE) -> int:
    """How many patches `patch_grids` cuts; 0 where none fits."""
    if min(height, width) < side:
        return 0
    return sum(rows * columns for _, rows, columns in _grids(height, width, side))


def _grids(height: int, width: int, side: int) -> list[tuple[int, int, int]]:
    """Start, rows and columns of each of the two grids."""
    starts = [0] if min(height, width) < 1.5 * side else [0, side // 2]
    return [(at, (height - at) // side, (width - at) // side) for at in starts]


def _hashed(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64 of uint64 numbers: an order that looks random and never changes."""
    z = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class FeatureStatistics:
    """Count, mean and scatter of feature vectors, and a sample of them.

    Attributes:
        label: what the features are; statistics with different labels do not mix.
        count: number of vectors seen.
        mean: mean of the vectors, float64 [D].
        scatter: sum of outer products of deviations from the mean, float64 [D, D].
        numbers: places in the set of the kept vectors, int64 [K], ascending.
        kept: the kept vectors, float32 [K, D].
        max_kept: the most vectors to keep, the largest K.
    """

    def __init__(
        self, dimension: int, *, label: str = "", max_kept: int = _MAX_KEPT
    ) -> None:
        self.label = label
        self.count = 0
        self.mean = np.zeros(dimension)
        self.scatter = np.zeros((dimension, dimension))
        self.numbers = np.zeros(0, np.int64)
        self.kept = np.zeros((0, dimension), np.float32)
        self.max_kept = max_kept

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased covariance, float64 [D, D].

        Raises:
            ValueError: fewer than 2 vectors were seen.
        """
        if self.count < 2:
            raise ValueError(
                f"a covariance needs at least 2 vectors, found {self.count}"
            )
        return self.scatter / (self.count - 1)

    def update(self, features: np.ndarray, numbers: Sequence[int] | np.ndarray) -> None:
        """Add vectors.

        Args:
            features: float [N, D], finite.
            numbers: N places in the whole set, over all processes, none twice.

        Raises:
            ValueError: the vectors have another dimension, another number or values
                that are not finite, or a place is given twice or is that of a kept
                vector. Nothing is added then.
        """
        rows = np.asarray(features, np.float64)
        if rows.ndim != 2 or rows.shape[1] != len(self.mean):
            raise ValueError(
                f"features should be [N, {len(self.mean)}], found {rows.shape}"
            )
        if len(rows) != len(numbers):
            raise ValueError(
                f"expected a number for each of {len(rows)} vectors, found "
                f"{len(numbers)}"
            )
        if not np.isfinite(rows).all():
            raise ValueError("features hold values that are not finite")
        if not len(rows):
            return
        numbers = np.asarray(numbers, np.int64)
        self._require_new(numbers)
        mean = rows.mean(axis=0)
        deviations = rows - mean
        self._add_moments(len(rows), mean, deviations.T @ deviations)
        self._keep(numbers, rows.astype(np.float32))

    def merge(self, other: FeatureStatistics) -> None:
        """Add all vectors that other statistics have seen.

        Raises:
            ValueError: the others are of different features, share a place with these,
                or have another `max_kept`, which would make the sample of both uneven.
        """
        _require_alike(self, other)
        if other.count:
            if other.max_kept != self.max_kept:
                raise ValueError(
                    f"expected statistics that keep {self.max_kept} vectors, found "
                    f"{other.max_kept}"
                )
            self._require_new(other.numbers)
            self._add_moments(other.count, other.mean, other.scatter)
            self._keep(other.numbers, other.kept)

    def _add_moments(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        total = self.count + count
        shift = mean - self.mean
        self.scatter += scatter
        self.scatter += np.outer(shift, shift) * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total

    def _require_new(self, numbers: np.ndarray) -> None:
        every = np.concatenate([self.numbers, numbers])
        if len(np.unique(every)) != len(every):
            raise ValueError("expected each number in the set once, found one twice")

    def _keep(self, numbers: np.ndarray, features: np.ndarray) -> None:
        numbers = np.concatenate([self.numbers, numbers])
        first = np.argsort(_hashed(numbers), kind="stable")[: self.max_kept]
        order = first[np.argsort(numbers[first])]
        features = np.concatenate([self.kept, features])
        self.numbers, self.kept = numbers[order], features[order]

    def to_bytes(self) -> bytes:
        """All attributes as the bytes of an .npz file, without pickle."""
        buffer = io.BytesIO()
        np.savez(
            buffer,
            label=np.asarray(self.label),
            count=self.count,
            mean=self.mean,
            scatter=self.scatter,
            numbers=self.numbers,
            kept=self.kept,
            max_kept=self.max_kept,
        )
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> FeatureStatistics:
        """Read back what `to_bytes` made.

        Raises:
            ValueError: the bytes are anything else.
        """
        try:
            values = read_arrays_file(data, _FILE_DTYPES)
            count, max_kept = int(values["count"]), int(values["max_kept"])
            _check_statistics(count, max_kept, values)
            statistics = cls(
                len(values["mean"]), label=str(values["label"]), max_kept=max_kept
            )
            statistics.count = count
            for name in ("mean", "scatter", "numbers", "kept"):
                setattr(statistics, name, values[name].copy())  # not read-only
        except Exception as error:  # zipfile, zlib and numpy have errors of their own
            raise ValueError(f"not a file of feature statistics: {error}") from error
        return statistics

    def save(self, path: str | Path) -> None:
        """Write the statistics to a file, for another process to merge."""
        Path(path).write_bytes(self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> FeatureStatistics:
        """Read the statistics that `save` wrote.

        Raises:
            ValueError: it is not such a file.
            OSError: the file cannot be read.
        """
        return cls.from_bytes(Path(path).read_bytes())


def _check_statistics(
    count: int, max_kept: int, values: Mapping[str, np.ndarray]
) -> None:
    """Raise ValueError for arrays that no `FeatureStatistics` can have."""
    dimension = values["mean"].size
    kept = min(count, max_kept)
    for name, dtype, shape in (
        ("mean", np.float64, (dimension,)),
        ("scatter", np.float64, (dimension, dimension)),
        ("numbers", np.int64, (kept,)),
        ("kept", np.float32, (kept, dimension)),
    ):
        array = values[name]
        if array.dtype != dtype or array.shape != shape:
            raise ValueError(
                f"expected {name} of {np.dtype(dtype)} {shape}, found {array.dtype} "
                f"{array.shape}"
            )
        if not np.isfinite(array).all():
            raise ValueError(f"expected finite values as {name}, found other values")
    if (np.diff(values["numbers"]) <= 0).any():
        raise ValueError("expected ascending numbers, found them out of order")


def _require_alike(a: FeatureStatistics, b: FeatureStatistics) -> None:
    if a.label != b.label or len(a.mean) != len(b.mean):
        raise ValueError(
            f"statistics of different features: {a.label or 'no label'} with "
            f"{len(a.mean)} values, {b.label or 'no label'} with {len(b.mean)}"
        )


def gather_statistics(statistics: FeatureStatistics) -> FeatureStatistics:
    """Merge the statistics of all processes of a `jax.distributed` run, on each one.

    They are sent as bytes, since JAX would round float64 to float32.

    Raises:
        ValueError: see `FeatureStatistics.merge`.
    """
    if jax.process_count() == 1:
        return statistics
    from jax.experimental.multihost_utils import process_allgather

    data = np.frombuffer(statistics.to_bytes(), np.uint8)
    lengths = np.asarray(process_allgather(np.asarray(len(data), np.int32)))
    filled = np.zeros(int(lengths.max()), np.uint8)
    filled[: len(data)] = data
    merged = FeatureStatistics(
        len(statistics.mean), label=statistics.label, max_kept=statistics.max_kept
    )
    rows = np.asarray(process_allgather(filled))
    for row, length in zip(rows, lengths.reshape(-1), strict=True):
        merged.merge(FeatureStatistics.from_bytes(row[:length].tobytes()))
    return merged


_embed = jax.jit(FeatureNetwork.embed)


class PatchStatistics:
    """Statistics of the patches of a set of images under one network.

    Args:
        network: the network, whose last tap's spatial mean is the feature vector of a
            patch; for FID, `load_features(..., "inception_v3")`.
        patch_side: side of a patch in pixels; smaller than 256 for small sets.
        batch: patches per call of the network; one compiled program serves all images.
        max_kept: see `FeatureStatistics`.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        *,
        patch_side: int = PATCH_SIDE,
        batch: int = 8,
        max_kept: int = _MAX_KEPT,
    ) -> None:
        self._network = network
        self._side, self._batch = patch_side, batch
        images = jax.ShapeDtypeStruct((1, patch_side, patch_side, 3), np.float32)
        dimension = jax.eval_shape(FeatureNetwork.embed, network, images).shape[-1]
        module = network.module
        label = (
            f"{type(module).__name__} {getattr(module, 'version', '')}"
            f"({network.taps[-1]}, {module.preprocessing}, patches of {patch_side})"
        )
        self._statistics = FeatureStatistics(dimension, label=label, max_kept=max_kept)
        self._patches: list[np.ndarray] = []
        self._numbers: list[int] = []
        self._rows: list[np.ndarray] = []
        self._row_numbers: list[int] = []

    def add(self, image: np.ndarray, index: int) -> int:
        """Add the patches of one image.

        Args:
            image: uint8 [H, W, 3].
            index: the image's place in the whole set, over all processes.

        Returns:
            the number of patches.

        Raises:
            ValueError: see `patch_grids`.
        """
        patches = patch_grids(image, self._side)
        self._patches.extend(patches)
        first = index * _PATCHES_PER_IMAGE
        self._numbers.extend(range(first, first + len(patches)))
        while len(self._patches) >= self._batch:
            self._run(self._batch)
        return len(patches)

    def statistics(self) -> FeatureStatistics:
        """The statistics of all images added so far."""
        if self._patches:
            self._run(len(self._patches))
        self._fold()
        return self._statistics

    def _run(self, count: int) -> None:
        patches = np.stack(self._patches[:count]).astype(np.float32) / 255
        fill = ((0, self._batch - count), (0, 0), (0, 0), (0, 0))
        with jax.default_matmul_precision("highest"):
            rows = np.asarray(_embed(self._network, np.pad(patches, fill)))[:count]
        self._rows.append(rows)
        self._row_numbers += self._numbers[:count]
        del self._patches[:count], self._numbers[:count]
        if len(self._row_numbers) >= _PENDING_ROWS:  # the scatter update costs D^2
            self._fold()

    def _fold(self) -> None:
        if self._rows:
            self._statistics.update(np.concatenate(self._rows), self._row_numbers)
            self._rows, self._row_numbers = [], []


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), float64 (arXiv:1706.08500).

    The trace of the root is the sum of the roots of the eigenvalues of
    C_a^(1/2) C_b C_a^(1/2). This matrix is symmetric, so there are no complex parts,
    and covariances of fewer vectors than dimensions are no trouble (but the distance is
    biased then).

    Raises:
        ValueError: the statistics are of different features, or have seen fewer than 2
            vectors.
    """
    _require_alike(a, b)
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    covariance = b.covariance
    product = np.linalg.eigvalsh(root @ covariance @ root)
    trace = np.trace(a.covariance) + np.trace(covariance)
    shift = a.mean - b.mean
    return float(shift @ shift + trace - 2 * np.sqrt(np.maximum(product, 0)).sum())


class KernelDistance(NamedTuple):
    """Mean and standard deviation of the kernel distance over random subsets."""

    mean: float
    std: float


def polynomial_mmd(a: np.ndarray, b: np.ndarray, *, paired: bool = False) -> float:
    """Unbiased squared MMD under k(x, y) = (x . y / D + 1)^3 (arXiv:1801.01401).

    Args:
        a, b: float [N, D] and [M, D], computed in float64.
        paired: whether row i of b shows the same place as row i of a, so that the two
            are not independent. Such pairs are then left out (Gretton et al. 2012,
            lemma 6); with them, the distance of small sets would be far too small,
            below 0 for a set and itself.

    Raises:
        ValueError: there are fewer than 2 vectors, their dimensions differ or, if they
            are paired, their numbers differ.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if min(len(a), len(b)) < 2 or a.shape[1:] != b.shape[1:]:
        raise ValueError(
            "a kernel distance needs at least 2 vectors of equal dimension on both "
            f"sides, found {a.shape} and {b.shape}"
        )
    if paired and len(a) != len(b):
        raise ValueError(
            f"expected as many vectors on both sides, found {len(a)} and {len(b)}"
        )

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def mean_off_diagonal(k: np.ndarray) -> float:
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

    within = mean_off_diagonal(kernel(a, a)) + mean_off_diagonal(kernel(b, b))
    across = kernel(a, b)
    between = mean_off_diagonal(across) if paired else across.mean()
    return float(within - 2 * between)


def kernel_distance(
    a: FeatureStatistics,
    b: FeatureStatistics,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> KernelDistance:
    """KID: `polynomial_mmd` over random subsets, as torch-fidelity draws them.

    The defaults are those of torch-fidelity; so are the subsets if all vectors were
    kept.

    Raises:
        ValueError: the statistics are of different features, or have kept fewer vectors
            than `subset_size`.
    """
    _require_alike(a, b)
    least = min(len(a.kept), len(b.kept))
    if least < subset_size:
        raise ValueError(
            f"subsets of {subset_size} vectors need as many, found {least} kept: "
            "give a smaller subset size or smaller patches"
        )
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        rows_a = rng.choice(len(a.kept), subset_size, replace=False)
        rows_b = rng.choice(len(b.kept), subset_size, replace=False)
        values.append(polynomial_mmd(a.kept[rows_a], b.kept[rows_b]))
    return KernelDistance(float(np.mean(values)), float(np.std(values)))
