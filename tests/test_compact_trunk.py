# SPDX-License-Identifier: Apache-2.0
"""The packaged feature network: there without downloads, and true to its teacher.

`data/teacher_distances.json` holds SqueezeNet 1.0's distances of the pairs that `pairs`
makes from the packaged photograph, in its order.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.stats import spearmanr

from semlic_jax.evaluation.measures import Measures, default_metrics, feature_metrics
from semlic_jax.objectives import features, metrics, trunks
from semlic_jax.objectives.features import feature_distance, load_features
from semlic_jax.refinement import preset
from semlic_jax.training.distortions import DISTORTIONS
from semlic_jax.weights import PRETRAINED_FOLDER

TEACHER_DISTANCES = Path(__file__).parent / "data" / "teacher_distances.json"
SIDE = 128
CORNERS = ((0, 0), (136, 236), (272, 472))
STRENGTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
# Well under what the packaged weights reach.
POOLED_FLOOR = 0.95
WITHIN_FLOOR = 0.93
CHECKSUM = 2.42915


@pytest.fixture(scope="module")
def network():
    return load_features(name=features.PACKAGED)


@pytest.fixture(scope="module")
def pixels():
    return np.asarray(Image.open(PRETRAINED_FOLDER / "photograph.png").convert("RGB"))


def pairs(pixels):
    """Crops [3, H, W, 3] and their distorted versions [3, kinds * strengths, ...]."""
    crops, versions = [], []
    for index, (top, left) in enumerate(CORNERS):
        crop = pixels[top : top + SIDE, left : left + SIDE]
        rng = np.random.default_rng(index)
        crops.append(crop)
        versions.append(
            np.stack(
                [
                    distort(crop, strength, rng)
                    for distort in DISTORTIONS.values()
                    for strength in STRENGTHS
                ]
            )
        )
    return np.stack(crops), np.stack(versions)


@jax.jit
def distance(network, x, x_hat):
    return feature_distance(network.apply(x), network.apply(x_hat))


def test_it_is_what_there_is_where_nothing_is_given(monkeypatch, tmp_path):
    monkeypatch.delenv("SEMLIC_FEATURES", raising=False)
    assert load_features().name == "compact"
    # As in a shell: set to nothing is not set.
    monkeypatch.setenv("SEMLIC_FEATURES", "")
    assert load_features().name == "compact"
    # Another folder chooses another network, and still leaves ours within reach.
    monkeypatch.setenv("SEMLIC_FEATURES", str(tmp_path))
    with pytest.raises(ValueError, match=r"no squeezenet1_0\*.npz in the folder"):
        load_features()
    assert load_features(name="compact").name == "compact"
    # A file says itself what it holds.
    assert load_features(features.PACKAGED_FILE).name == "compact"
    with pytest.raises(ValueError, match="weights of compact, not of vgg16"):
        load_features(features.PACKAGED_FILE, "vgg16")
    np.savez(tmp_path / "other.npz", network=np.asarray("resnet"))
    with pytest.raises(ValueError, match="weights of resnet, an unknown network"):
        load_features(tmp_path / "other.npz")


def test_its_file_is_small(network):
    assert features.PACKAGED_FILE.stat().st_size <= 3 * 2**20
    with np.load(features.PACKAGED_FILE) as arrays:
        kinds = {key: arrays[key].dtype.kind for key in arrays.files}
        weights = [arrays[key] for key, kind in kinds.items() if kind != "U"]
    assert {array.dtype for array in weights} == {np.dtype(np.float16)}
    assert all(np.isfinite(array).all() for array in weights)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(network.params)}
    assert dtypes == {np.dtype(np.float32)}


@pytest.mark.parametrize("size", [(7, 9), (64, 64), (67, 93), (128, 98)])
def test_its_taps_lie_on_the_grids_of_its_teachers(size):
    images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)

    def taps_of(module):
        variables = jax.eval_shape(module.init, jax.random.key(0), images)
        return list(jax.eval_shape(module.apply, variables, images).values())

    ours, theirs = taps_of(trunks.CompactTrunk()), taps_of(trunks.SqueezeNet())
    assert [tap.shape[:3] for tap in ours] == [tap.shape[:3] for tap in theirs]
    channels = [features for features, _ in trunks.COMPACT_STAGES.values()]
    assert [tap.shape[3] for tap in ours] == channels


def test_a_choice_of_taps_gives_the_same_maps(network):
    images = np.random.default_rng(0).random((1, 32, 40, 3), np.float32)
    every = dict(zip(network.taps, network.apply(images), strict=True))
    (second,) = network.replace(taps=("tap2",)).apply(images)
    np.testing.assert_allclose(second, every["tap2"], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="taps must be among tap1"):
        network.replace(taps=("conv1",)).apply(images)
    with pytest.raises(ValueError, match="at least 7x7"):
        network.apply(images[:, :6])


def test_it_ranks_as_its_teacher_does(network, pixels):
    originals, versions = pairs(pixels)
    expected = np.asarray(json.loads(TEACHER_DISTANCES.read_text()))
    assert expected.shape == versions.shape[:2]
    x, x_hat = (
        images.astype(np.float32) / 255
        for images in (np.repeat(originals, versions.shape[1], 0), versions)
    )
    found = distance(network, x, x_hat.reshape(x.shape))
    found = np.asarray(found).reshape(expected.shape)
    assert spearmanr(found.ravel(), expected.ravel()).statistic > POOLED_FLOOR
    for ours, theirs in zip(found, expected, strict=True):
        assert spearmanr(ours, theirs).statistic > WITHIN_FLOOR
    # About on the teacher's own scale, so that weights of losses nearly carry over.
    assert 0.5 < np.median(found / expected) < 1.5


def test_distances_do_not_change_unseen(network, pixels):
    x = pixels[100:164, 200:264].astype(np.float32)[None] / 255
    x_hat = x[:, :, ::-1]
    assert float(distance(network, x, x_hat)[0]) == pytest.approx(CHECKSUM, rel=1e-4)


def test_gradients_are_finite_and_point_home(network, pixels):
    x = pixels[100:164, 200:264].astype(np.float32)[None] / 255
    noise = np.random.default_rng(0).normal(0, 0.03, x.shape).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda y: distance(network, x, y).sum()))
    at_home = np.asarray(gradient(x))
    assert np.isfinite(at_home).all() and np.abs(at_home).max() < 1e-6
    # Flat images have no features but a mean.
    flat = np.zeros_like(x)
    found = jax.jit(jax.grad(lambda y: distance(network, flat, y).sum()))(flat)
    assert np.isfinite(found).all()
    away = np.asarray(gradient(x + noise))
    assert np.isfinite(away).all() and (away * noise).sum() > 0
    step = x + noise - 1e-3 * away / np.sqrt(np.square(away).mean())
    assert distance(network, x, step)[0] < distance(network, x, x + noise)[0]


def test_its_distances_have_names_of_their_own(monkeypatch, pixels):
    monkeypatch.delenv("SEMLIC_FEATURES", raising=False)
    measure = metrics.ImageMetrics(["compact_distance"])
    x = pixels[:64, :64]
    value = measure(x, x[::-1])["compact_distance"][0]
    expected = metrics.FeatureDistance(load_features())(x, x[::-1])[0]
    assert value == pytest.approx(float(expected), rel=1e-6)
    with pytest.raises(ValueError, match="SEMLIC_FEATURES"):
        metrics.ImageMetrics(["feature_distance"])


def test_mean_style_sees_texture_that_is_gone_more_than_texture_of_another_seed(pixels):
    measure = metrics.ImageMetrics(["compact_mean_style", "compact_distance"])
    rng = np.random.default_rng(2)
    smooth = np.asarray(pixels[:128, :128] // 8 + 96, np.float64)
    grainy = [
        np.uint8(np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 255))
        for _ in range(2)
    ]
    same, other, gone = (
        measure(grainy[0], np.uint8(image)) for image in (*grainy, smooth)
    )
    assert same["compact_mean_style"][0] < 1e-9
    assert other["compact_mean_style"][0] < 0.1 * gone["compact_mean_style"][0]
    # The distance at equal places hardly tells them apart.
    assert other["compact_distance"][0] > 0.2 * gone["compact_distance"][0]


def test_sweeps_measure_it_where_no_other_is_given(monkeypatch, tmp_path, pixels):
    monkeypatch.delenv("SEMLIC_FEATURES", raising=False)
    names, _ = default_metrics()
    ours = ["compact_distance", "compact_frechet", "compact_kernel"]
    assert names[-3:] == ours == list(feature_metrics())
    theirs = ["feature_distance", "frechet", "kernel"]
    assert default_metrics(tmp_path)[0][-3:] == theirs
    # Its weights are part of what a cached value is of; others' weights are not.
    measures = Measures(ours, patch_side=32)
    elsewhere = Measures(ours, tmp_path, patch_side=32)
    assert measures.trunks == elsewhere.trunks
    assert measures.identity(ours[0]) == elsewhere.identity(ours[0]) != ""
    weights = measures.identity(ours[0]).split()[0]  # beside the digest of its code
    assert measures.identity("compact_mean_style").split()[0] == weights
    assert measures.identity("feature_distance") != measures.identity(ours[0])
    facts = measures.image_metrics | measures.set_metrics
    assert all("compact" in facts[name].label for name in ours)
    x = pixels[:64, :64]
    values, gaps, _ = measures.measure(x, x[::-1], ours[:1])
    assert values[ours[0]] > 0 and not gaps
    assert measures.features(x, "compact").shape[1] == 224


def test_refinement_takes_it_where_no_other_is_given(monkeypatch, tmp_path):
    # Not where metrics find theirs, either: files would depend on it unseen.
    for value in ("", str(tmp_path)):
        monkeypatch.setenv("SEMLIC_FEATURES", value)
        assert preset("fast").load_features().name == "compact"
    assert preset("fast", gamma=0).load_features() is None
