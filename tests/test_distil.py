# SPDX-License-Identifier: Apache-2.0
"""Distillation: distortions, pairs, terms, a run that is killed, the report."""

from __future__ import annotations

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image

pytest.importorskip("orbax.checkpoint", reason="needs semlic_jax[train]")

from semlic_jax.objectives import trunks  # noqa: E402
from semlic_jax.objectives.features import FeatureNetwork, load_features  # noqa: E402
from semlic_jax.training import distil, distil_report, distortions  # noqa: E402


def made(module, seed=0):
    """A network with random weights, by NumPy: compiling `module.init` takes longer."""
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(seed)

    def numbers(leaf):
        deviation = 1 / np.sqrt(np.prod(leaf.shape[:-1]))
        return jnp.asarray(deviation * rng.standard_normal(leaf.shape), leaf.dtype)

    return FeatureNetwork(jax.tree.map(numbers, shapes), module)


# Called as they are, each of their operations would be compiled on its own.
unit_taps = jax.jit(distil._unit_taps)
terms = jax.jit(distil.terms)
along_gradient = jax.jit(distil._along_gradient)
apply = jax.jit(FeatureNetwork.apply)


@pytest.mark.parametrize("name", sorted(distortions.DISTORTIONS))
def test_distortions_grow_with_their_strength(photograph, name):
    image = photograph(72, 97)
    distort = distortions.DISTORTIONS[name]
    errors = []
    for strength in (0.0, 0.3, 0.6, 1.0):
        found = distort(image, strength, np.random.default_rng(1))
        assert found.shape == image.shape and found.dtype == np.uint8
        again = distort(image, strength, np.random.default_rng(1))
        np.testing.assert_array_equal(found, again)
        errors.append(np.square(found.astype(float) - image).mean())
    assert errors == sorted(errors) and errors[-1] > 4 * errors[0]


def test_the_codec_is_a_distortion(codec, photograph):
    image = photograph(64, 64)
    distort = distortions.all_distortions(codec)[distortions.OWN_CODEC]
    expected = codec.decompress(codec.compress(image, quality=0.25))
    found = distort(image, 0.75, np.random.default_rng(0))
    np.testing.assert_array_equal(found, expected)


@pytest.fixture
def tiles(tmp_path):
    """Two files of a tile with three versions, each pixel of its own value."""
    recipe = distil.Recipe(
        tiles=2, tile=40, steps=4, photographs=2, versions=2, crop=32, lr=1e-3
    )
    folder = tmp_path / "pairs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(recipe.tiles):
        original = rng.integers(40, 216, (1, 40, 40, 3))
        versions = original + 10 * np.arange(4)[:, None, None, None]
        np.save(folder / f"{index:05d}.npy", versions.astype(np.uint8))
    return recipe, sorted(folder.iterdir())


def test_examples_are_functions_of_their_numbers(tiles):
    recipe, paths = tiles
    found = distil.example(paths, recipe, 3, 1)
    assert found.shape == (3, 32, 32, 3) and found.dtype == np.uint8
    np.testing.assert_array_equal(found, distil.example(paths, recipe, 3, 1))
    assert (found != distil.example(paths, recipe, 3, 0)).any()
    # The original first, and every version from the same place.
    added = found.astype(int) - found[:1]
    assert (added == added[:, :1, :1, :1]).all() and added.min() == 0
    assert len(np.unique(added[:, 0, 0, 0])) == 3 and (added[1:] > 0).all()
    batch = next(distil.batches(paths, recipe, 3, 5))
    np.testing.assert_array_equal(batch[1], found)


@pytest.mark.parametrize("change", [{"seed": 1}, {"tile": 48}, {"data": ["others"]}])
def test_tiles_of_another_recipe_are_refused(tiles, change):
    recipe, paths = tiles
    folder = paths[0].parent
    assert distil.make_pairs(folder, ["photos"], recipe) == paths
    assert distil.make_pairs(folder, ["photos"], recipe) == paths
    data = change.pop("data", ["photos"])
    with pytest.raises(ValueError, match="expected tiles of .* found"):
        distil.make_pairs(folder, data, dataclasses.replace(recipe, **change))


def test_steps_draw_by_seed_and_number():
    keys = {
        tuple(map(int, jax.random.key_data(distil.step_key(recipe, step))))
        for recipe in (distil.Recipe(seed=0), distil.Recipe(seed=1))
        for step in (0, 1)
    }
    assert len(keys) == 4


def test_a_student_that_equals_its_teacher_has_nothing_to_learn():
    network = made(trunks.CompactTrunk())
    images = np.random.default_rng(0).random((2, 3, 32, 32, 3), np.float32)
    taps = unit_taps(network, images)
    same = [np.eye(tap.shape[-1], dtype=np.float32) for tap in taps]
    found = terms(network, taps, same, images)
    assert set(found) == set(distil.WEIGHTS)
    for name, term in found.items():
        assert float(term) < 1e-8, name
    other = unit_taps(made(trunks.CompactTrunk(), seed=1), images)
    found = terms(network, other, same, images)
    assert min(map(float, found.values())) > 0.1


def test_projections_hold_the_largest_directions(tiles):
    recipe, paths = tiles
    teacher = made(trunks.CompactTrunk())
    wide = teacher.replace(taps=("tap3", "tap4", "tap4", "tap5", "tap5"))
    batch = next(distil.batches(paths, recipe, 0, 1))
    found = distil.make_projections(wide, iter([batch]))
    (moments, *_) = distil._second_moments(wide, batch)
    values = np.linalg.eigvalsh(np.asarray(moments, np.float64))[::-1]
    assert [p.shape for p in found] == [
        *((128, 48), (160, 80), (160, 128), (224, 160), (224, 224))
    ]
    for projection in found:
        channels = projection.shape[1]
        np.testing.assert_allclose(
            projection.T @ projection, np.eye(channels), atol=1e-5
        )
    held = np.trace(found[0].T @ np.asarray(moments) @ found[0])
    assert held == pytest.approx(values[:48].sum(), rel=1e-4)


def test_the_learning_rate_rises_and_falls():
    recipe = distil.Recipe(steps=2000, lr=1.0)
    rates = [recipe.learning_rate(step) for step in range(2000)]
    assert rates[0] == 0.01 and rates[100] == max(rates) == 1
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[1050] == pytest.approx(0.505)
    assert rates[-1] == pytest.approx(0.01, rel=1e-3)


def test_images_move_along_the_gradient(tiles):
    recipe, paths = tiles
    student = made(trunks.CompactTrunk())
    images = next(distil.batches(paths, recipe, 0, 1)) / np.float32(255)
    moved = along_gradient(student, images, jax.random.key(0))
    np.testing.assert_array_equal(moved[:, :-1], images[:, :-1])
    step = np.asarray(moved[:, -1] - images[:, -1])
    levels = 255 * np.sqrt(np.square(step).mean(axis=(1, 2, 3)))
    assert ((levels > 0.1) & (levels < 4.1)).all()
    gradient = distil_report.gradients(student, images[:, 0], images[:, -1])
    for a, b in zip(step, np.asarray(gradient), strict=True):
        cosine = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
        assert abs(cosine) > 0.99


@pytest.mark.slow
def test_a_killed_run_ends_as_an_unbroken_one(tiles, tmp_path, monkeypatch):
    recipe, paths = tiles
    teacher = made(trunks.SqueezeNet())
    monkeypatch.setattr(distil, "load_features", lambda *_: teacher)
    params = made(trunks.CompactTrunk()).params
    first = {"params": params, "optimizer": distil._OPTIMIZER.init(params)}
    assert jax.eval_shape(lambda: first) == jax.eval_shape(
        lambda: distil.initial_state(0)
    )
    first = jax.device_get(first)
    # On a device by name, as what comes from a checkpoint: one program for all runs.
    monkeypatch.setattr(
        distil, "initial_state", lambda seed: jax.device_put(first, jax.devices()[0])
    )
    whole = distil.distil(tmp_path, [], tmp_path, recipe, log_steps=2).read_bytes()
    network = load_features(tmp_path / "compact.npz")
    assert network.name == "compact"
    images = np.random.default_rng(0).random((1, 32, 32, 3), np.float32)
    assert all(np.isfinite(tap).all() for tap in apply(network, images))

    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "pairs").symlink_to(tmp_path / "pairs")
    update, calls = distil.update, []

    def killed_at_the_third(*arguments):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return update(*arguments)

    monkeypatch.setattr(distil, "update", killed_at_the_third)
    run = dict(log_steps=2, checkpoint_steps=2)
    with pytest.raises(KeyboardInterrupt):
        distil.distil(broken, [], tmp_path, recipe, **run)
    resumed = distil.distil(broken, [], tmp_path, recipe, **run)
    assert len(calls) == 3 + 2
    with np.load(io.BytesIO(whole)) as a, np.load(resumed) as b:
        for key in a.files:
            np.testing.assert_array_equal(a[key], b[key])


def test_rank_correlations():
    rng = np.random.default_rng(0)
    teacher = rng.random((5, 4, 6))
    kinds = ["jpeg", "webp", "blur", "semlic"]
    student = np.exp(teacher)  # the same ranks
    student[:, 2] = -student[:, 2]  # but for blur
    found = distil_report.rank_correlations(
        {"teacher": teacher, "student": student, "ms_ssim": -teacher}, kinds
    )
    assert found["kinds"] == pytest.approx(
        {"jpeg": 1, "webp": 1, "blur": -1, "semlic": 1}
    )
    assert found["codecs_pooled"] == found["codecs_within_image_mean"] == 1
    assert found["teacher_with_ms_ssim"] == -1
    assert -1 < found["within_image_least"] <= found["within_image_mean"] < 1
    assert -1 < found["pooled"] < 1


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"tiles": 0}, "tiles must be at least 1, found 0"),
        ({"steps": -1}, "steps must be at least 1, found -1"),
        ({"versions": 12}, "versions must be at most 11, found 12"),
        ({"crop": 193}, "crop must be from 7 to 192, .* found 193"),
        ({"crop": 6}, "crop must be from 7 to 192, .* found 6"),
        ({"lr": float("nan")}, "lr must be finite and above 0, found nan"),
        ({"seed": -1}, "seed must be at least 0, found -1"),
    ],
)
def test_recipes_are_checked(wrong, reason):
    with pytest.raises(ValueError, match=reason):
        distil.Recipe(**wrong)


def test_photographs_that_are_too_small_are_refused(tmp_path):
    Image.new("RGB", (300, 200)).save(tmp_path / "a.png")
    network = made(trunks.CompactTrunk())
    with pytest.raises(ValueError, match="256 pixels a side, found none"):
        distil_report.report(network, network, [str(tmp_path)])


def test_training_takes_the_packaged_network_where_no_other_is_given(monkeypatch):
    from semlic_jax.training.settings import read_settings
    from semlic_jax.training.train import _trunk, load_config

    monkeypatch.delenv("SEMLIC_FEATURES", raising=False)
    tiny = str(REPOSITORY / "configs" / "tiny.py")
    term = "--config.perceptual.weights.perceptual=1.0"
    trunk = _trunk(read_settings(load_config(tiny, [term])))
    assert trunk.network.name == "compact" and trunk.heads is None
    assert _trunk(read_settings(load_config(tiny, []))) is None
