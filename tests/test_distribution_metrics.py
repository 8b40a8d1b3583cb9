# SPDX-License-Identifier: Apache-2.0
"""Set metrics: patches, streaming and merging, Fréchet and kernel distances."""

import io
import os
import socket
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from semlic_jax.objectives.distribution_metrics import (
    FeatureStatistics,
    PatchStatistics,
    frechet_distance,
    gather_statistics,
    kernel_distance,
    patch_count,
    patch_grids,
    polynomial_mmd,
)
from semlic_jax.objectives.features import FeatureNetwork


def vectors(count: int, dimension: int = 12, seed: int = 0, shift: float = 0.0):
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(dimension, dimension))
    # A large common offset: sums of squares would lose the covariance's digits.
    return (rng.normal(size=(count, dimension)) @ mixing + 100 + shift).astype(
        np.float32
    )


def statistics_of(rows, **settings) -> FeatureStatistics:
    statistics = FeatureStatistics(rows.shape[1], **settings)
    statistics.update(rows, np.arange(len(rows)))
    return statistics


@pytest.mark.parametrize(
    "height, width, side, count",
    [
        (1365, 2048, 256, 40 + 28),  # counts of MS-ILLM's evaluation
        (512, 768, 256, 6 + 2),
        (256, 256, 256, 1),
        (383, 900, 256, 3),
        (384, 384, 256, 1 + 1),
        (96, 64, 64, 1),
        (96, 96, 64, 1 + 1),
    ],
)
def test_patch_counts_are_those_of_the_two_grids(height, width, side, count):
    image = np.zeros((height, width, 3), np.uint8)
    assert patch_grids(image, side).shape == (count, side, side, 3)
    assert patch_count(height, width, side) == count


def test_patches_are_the_pixels_at_their_places():
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    patches = patch_grids(image, 20)
    places = [(r, c) for r in (0, 20) for c in (0, 20, 40)]
    places += [(r, c) for r in (10, 30) for c in (10, 30, 50)]
    assert len(patches) == len(places)
    for patch, (r, c) in zip(patches, places, strict=True):
        np.testing.assert_array_equal(patch, image[r : r + 20, c : c + 20])
    with pytest.raises(ValueError, match="80x80 do not fit into an image of 70x50"):
        patch_grids(image, 80)
    assert patch_count(50, 70, 80) == patch_count(90, 70, 80) == 0
    with pytest.raises(ValueError, match="uint8"):
        patch_grids(image / 255.0, 20)


def test_streamed_moments_are_numpys():
    rows = vectors(500)
    statistics = FeatureStatistics(12)
    for start in range(0, 500, 7):
        part = rows[start : start + 7]
        statistics.update(part, range(start, start + len(part)))
    exact = rows.astype(np.float64)
    assert statistics.count == 500
    np.testing.assert_allclose(statistics.mean, exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(
        statistics.covariance, np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize("max_kept", [1000, 60])
def test_four_shards_merge_to_what_one_process_gives(max_kept):
    rows, other = vectors(400), statistics_of(vectors(300, seed=1, shift=0.5))
    whole = statistics_of(rows, max_kept=max_kept)
    merged = FeatureStatistics(12, max_kept=max_kept)
    for rank in (2, 0, 3, 1):
        shard = FeatureStatistics(12, max_kept=max_kept)
        for i in range(rank, 400, 4):
            shard.update(rows[i : i + 1], [i])
        merged.merge(FeatureStatistics.from_bytes(shard.to_bytes()))
    merged.merge(FeatureStatistics(12))  # a process that had no image
    assert frechet_distance(merged, other) == pytest.approx(
        frechet_distance(whole, other), rel=1e-9
    )
    np.testing.assert_array_equal(merged.numbers, whole.numbers)
    np.testing.assert_array_equal(merged.kept, whole.kept)
    options = dict(subsets=5, subset_size=50)
    assert kernel_distance(merged, other, **options) == kernel_distance(
        whole, other, **options
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scatter": np.zeros((12, 11))}, "scatter of float64 .12, 12."),
        ({"mean": np.zeros(12, np.float32)}, "mean of float64"),
        ({"mean": np.full(12, np.nan)}, "finite values as mean"),
        ({"kept": np.full((9, 12), np.inf, np.float32)}, "finite values as kept"),
        ({"kept": np.zeros((8, 12), np.float32)}, "kept of float32 .9, 12."),
        ({"numbers": np.arange(9)[::-1]}, "ascending numbers"),
        ({"numbers": np.zeros(9, np.int64)}, "ascending numbers"),
        ({"count": 8}, "numbers of int64 .8,."),
        ({"count": -1}, "numbers of int64"),
        ({"max_kept": 5}, "numbers of int64 .5,."),
    ],
)
def test_statistics_that_no_set_has_are_refused(changes, message):
    data = statistics_of(vectors(9)).to_bytes()
    arrays = dict(np.load(io.BytesIO(data)))
    changed = io.BytesIO()
    np.savez(changed, **arrays | changes)
    with pytest.raises(ValueError, match=message):
        FeatureStatistics.from_bytes(changed.getvalue())


def test_statistics_that_keep_other_numbers_of_vectors_do_not_merge():
    statistics = statistics_of(vectors(9), max_kept=5)
    other = FeatureStatistics(12, max_kept=6)
    other.update(vectors(9), range(9, 18))
    with pytest.raises(ValueError, match="keep 5 vectors, found 6"):
        statistics.merge(other)
    assert statistics.count == 9


def test_the_kept_sample_is_spread_over_the_set():
    statistics = statistics_of(vectors(5000), max_kept=500)
    assert len(statistics.kept) == 500
    counts, _ = np.histogram(statistics.numbers, 5, (0, 5000))
    assert counts.min() > 60 and counts.max() < 150
    np.testing.assert_array_equal(statistics.kept, vectors(5000)[statistics.numbers])


@pytest.mark.parametrize("count", [300, 9])  # 9 vectors: singular in 12 dimensions
def test_frechet_distance_equals_scipys_square_root(count):
    a, b = vectors(count), vectors(400, seed=1, shift=0.3) * np.float32(1.1)
    mean_a, mean_b = (v.astype(np.float64).mean(0) for v in (a, b))
    cov_a, cov_b = (np.cov(v.astype(np.float64), rowvar=False) for v in (a, b))
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root.real)
    found = frechet_distance(statistics_of(a), statistics_of(b))
    assert found == pytest.approx(expected, rel=1e-3 if count < 12 else 1e-9)
    same = frechet_distance(statistics_of(a), statistics_of(a))
    assert same == pytest.approx(0, abs=1e-5)


def test_frechet_distance_of_diagonal_gaussians_by_hand():
    a, b = FeatureStatistics(2), FeatureStatistics(2)
    for s, mean, deviations in ((a, (0, 0), (1, 2)), (b, (3, 4), (2, 5))):
        s.count, s.mean = 11, np.asarray(mean, float)
        s.scatter = np.diag(np.square(deviations)) * 10.0
    # |mu|^2 = 25, and (1 - 2)^2 + (2 - 5)^2 = 10 for commuting covariances
    assert frechet_distance(a, b) == pytest.approx(35, rel=1e-12)


def test_mmd_equals_its_double_sum():
    a, b = vectors(9, 4) / 100, vectors(7, 4, seed=1, shift=1) / 100

    def k(x, y):
        return (float(x.astype(np.float64) @ y) / 4 + 1) ** 3

    within_a = np.mean([k(a[i], a[j]) for i in range(9) for j in range(9) if i != j])
    within_b = np.mean([k(b[i], b[j]) for i in range(7) for j in range(7) if i != j])
    across = np.mean([k(x, y) for x in a for y in b])
    assert polynomial_mmd(a, b) == pytest.approx(
        within_a + within_b - 2 * across, abs=1e-9
    )
    with pytest.raises(ValueError, match="at least 2 vectors"):
        polynomial_mmd(a[:1], b)


def test_mmd_of_pairs_is_unbiased():
    """Rows are pairs, as those of a decoded patch and its original."""
    a = vectors(48, 4) / 100
    assert polynomial_mmd(a, a, paired=True) == 0
    assert polynomial_mmd(a, a) < 0
    rng = np.random.default_rng(0)
    shown = rng.normal(size=(20_000, 4))
    noisy = shown + 0.5 * rng.normal(size=shown.shape) + 0.2
    truth = polynomial_mmd(shown[:4000], noisy[10_000:14_000])  # of independent vectors
    pairs = [(shown[i : i + 20], noisy[i : i + 20]) for i in range(0, 20_000, 20)]
    found = [polynomial_mmd(*pair, paired=True) for pair in pairs]
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found) - truth) < 4 * error
    assert np.mean([polynomial_mmd(*pair) for pair in pairs]) < truth - 10 * error
    with pytest.raises(ValueError, match="on both sides, found 48 and 47"):
        polynomial_mmd(a, a[1:], paired=True)


def test_kernel_distance_equals_torch_fidelity():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    try:
        from torch_fidelity.metric_kid import kid_features_to_metric
    except Exception as error:  # torchvision fails to import in ways of its own
        pytest.skip(f"torch-fidelity does not import: {error}")
    a, b = vectors(300, 32) / 100, vectors(250, 32, seed=1, shift=10) / 100
    options = dict(subsets=20, subset_size=100)
    theirs = kid_features_to_metric(
        *map(torch.from_numpy, (a.astype(np.float64), b.astype(np.float64))),
        **{f"kid_{k}": v for k, v in options.items()},
        verbose=False,
    )
    found = kernel_distance(statistics_of(a), statistics_of(b), **options)
    mean, std = (
        theirs[f"kernel_inception_distance_{part}"] for part in ("mean", "std")
    )
    assert found.mean == pytest.approx(mean, rel=1e-9)
    assert found.std == pytest.approx(std, rel=1e-9)


class Pool(nn.Module):
    """A trunk whose feature vector is known: the mean colour and its square."""

    taps: tuple[str, ...] = ("colour",)
    preprocessing: str = "none"

    @nn.compact
    def __call__(self, images):
        return {"colour": jnp.concatenate([images, images**2], axis=-1)}


def test_patches_of_images_stream_through_a_network():
    rng = np.random.default_rng(0)
    images = [
        rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((48, 70), (33, 32))
    ]
    network = FeatureNetwork({}, Pool())
    collected = PatchStatistics(network, patch_side=16, batch=5)
    counts = [collected.add(image, index) for index, image in enumerate(images)]
    assert counts == [12 + 8 - 2, 4 + 1]
    first = collected.statistics().count
    patches = np.concatenate([patch_grids(image, 16) for image in images]) / 255.0
    expected = np.concatenate([patches, patches**2], -1).mean((1, 2))
    statistics = collected.statistics()
    assert first == statistics.count == sum(counts)
    np.testing.assert_allclose(statistics.mean, expected.mean(0), rtol=1e-6)
    np.testing.assert_allclose(statistics.kept, expected, rtol=1e-6)
    # Images in another order, over two collectors, are the same set.
    parts = [PatchStatistics(network, patch_side=16, batch=3) for _ in range(2)]
    for part, index in zip(parts, (1, 0), strict=True):
        part.add(images[index], index)
    merged = parts[0].statistics()
    merged.merge(parts[1].statistics())
    np.testing.assert_array_equal(merged.numbers, statistics.numbers)
    np.testing.assert_allclose(merged.kept, statistics.kept, rtol=1e-6)


def test_what_does_not_belong_together_is_refused(tmp_path):
    a = statistics_of(vectors(20), label="Inception")
    with pytest.raises(ValueError, match="different features: Inception.*VGG"):
        frechet_distance(a, statistics_of(vectors(20), label="VGG"))
    with pytest.raises(ValueError, match="different features"):
        a.merge(FeatureStatistics(5, label="Inception"))
    with pytest.raises(ValueError, match="found one twice"):
        a.update(vectors(1), [3])
    with pytest.raises(ValueError, match=r"should be \[N, 12\]"):
        a.update(vectors(2, 5), [30, 31])
    with pytest.raises(ValueError, match="not finite"):
        a.update(np.full((1, 12), np.nan), [30])
    with pytest.raises(ValueError, match="subsets of 1000 vectors .* 20 kept"):
        kernel_distance(a, a)
    with pytest.raises(ValueError, match="at least 2 vectors, found 1"):
        frechet_distance(statistics_of(vectors(1)), statistics_of(vectors(1)))
    path = tmp_path / "statistics.npz"
    a.save(path)
    loaded = FeatureStatistics.load(path)
    assert frechet_distance(a, loaded) == pytest.approx(0, abs=1e-6)
    assert (loaded.count, loaded.label) == (20, "Inception")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a file of feature statistics"):
        FeatureStatistics.load(path)
    assert gather_statistics(a) is a  # one process: nothing to gather


_WORKER = """
import sys
import jax, numpy as np
rank, port, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, rank)
from semlic_jax.objectives.distribution_metrics import *
rows = np.random.default_rng(0).normal(size=(31, 6)).astype(np.float32)
mine = FeatureStatistics(6, label="test")
mine.update(rows[rank::2], range(rank, 31, 2))
gather_statistics(mine).save(f"{out}/{rank}.npz")
"""


def test_two_processes_gather_the_whole_set(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    repository = str(Path(__file__).parents[1])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": repository}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(rank), port, str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors.decode()
    rows = np.random.default_rng(0).normal(size=(31, 6)).astype(np.float32)
    whole = statistics_of(rows, label="test")
    for rank in range(2):
        gathered = FeatureStatistics.load(tmp_path / f"{rank}.npz")
        assert gathered.count == 31
        np.testing.assert_allclose(gathered.mean, whole.mean, rtol=1e-9)
        np.testing.assert_allclose(gathered.scatter, whole.scatter, rtol=1e-9)
        np.testing.assert_array_equal(gathered.kept, whole.kept)


def test_embedding_runs_under_jit_as_an_argument():
    network = FeatureNetwork({}, Pool())
    image = jnp.full((2, 4, 4, 3), 0.5)
    found = jax.jit(FeatureNetwork.embed)(network, image)
    np.testing.assert_allclose(found, np.tile([0.5] * 3 + [0.25] * 3, (2, 1)))


class Exploit:
    """Loading this would run code."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def test_pickles_among_statistics_are_refused():
    arrays = dict(np.load(io.BytesIO(statistics_of(vectors(9)).to_bytes())))
    changed = io.BytesIO()
    np.savez(changed, **arrays | {"extra": np.array([Exploit()], dtype=object)})
    with pytest.raises(ValueError, match="not a file of feature statistics.*found .O"):
        FeatureStatistics.from_bytes(changed.getvalue())


def test_statistics_that_unpack_to_far_more_are_refused():
    arrays = dict(np.load(io.BytesIO(statistics_of(vectors(9)).to_bytes())))
    changed = io.BytesIO()
    np.savez_compressed(changed, **arrays | {"extra": np.zeros(2**22)})
    assert len(changed.getvalue()) < 2**17
    with pytest.raises(ValueError, match="statistics: expected at most .* bytes in to"):
        FeatureStatistics.from_bytes(changed.getvalue())


def test_statistics_that_were_read_take_more():
    whole = statistics_of(vectors(9))
    read = FeatureStatistics.from_bytes(statistics_of(vectors(9)[:5]).to_bytes())
    read.update(vectors(9)[5:], range(5, 9))
    np.testing.assert_allclose(read.scatter, whole.scatter)
    np.testing.assert_array_equal(read.kept, whole.kept)


def test_a_shard_does_not_merge_twice():
    statistics = statistics_of(vectors(9))
    before = statistics.to_bytes()
    for other in (statistics, statistics_of(vectors(3, seed=1))):
        with pytest.raises(ValueError, match="found one twice"):
            statistics.merge(FeatureStatistics.from_bytes(other.to_bytes()))
    with pytest.raises(ValueError, match="number for each of 2 vectors, found 1"):
        statistics.update(vectors(2), [30])
    assert statistics.to_bytes() == before


def test_subsets_have_each_vector_once():
    """So a subset of as many vectors as there are is the whole set."""
    a, b = vectors(30, 4) / 100, vectors(30, 4, seed=1, shift=1) / 100
    found = kernel_distance(
        statistics_of(a), statistics_of(b), subsets=3, subset_size=30
    )
    assert found.mean == pytest.approx(polynomial_mmd(a, b), rel=1e-9)
    assert found.std == pytest.approx(0, abs=1e-9 * found.mean)
