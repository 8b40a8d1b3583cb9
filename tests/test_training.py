# SPDX-License-Identifier: Apache-2.0
"""The start of the training, some steps, and a run that is killed and goes on."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from conftest import lively_params

pytest.importorskip("absl", reason="training needs the extra `train`")
pytest.importorskip("ml_collections", reason="training needs the extra `train`")
pytest.importorskip("optax", reason="training needs the extra `train`")
pytest.importorskip("orbax.checkpoint", reason="training needs the extra `train`")

# ruff: noqa: E402
from semlic_jax.codec import MAX_LEVEL, Codec
from semlic_jax.model.layers import space_to_depth
from semlic_jax.model.priors import NUM_SCALES, index_from_scale
from semlic_jax.model.transforms import filter_borders, lapping_matrix
from semlic_jax.training import loop
from semlic_jax.training import train as program
from semlic_jax.training.data import Photographs
from semlic_jax.training.klt import BASE_STEP, block_covariance, start_from_klt
from semlic_jax.training.settings import base_config, stage_config
from semlic_jax.training.sources import open_sources
from semlic_jax.weights import export_model


def a_config(steps=4):
    """Two images per step, on images that the program makes itself."""
    config = base_config()
    config.model = "tiny"
    config.architecture = dict(groups=(24,), context_shifts=(2,))
    config.data.update(train=("synthetic:8",), batch=2, crop=64, threads=1)
    config.stages = ("rate_distortion",)
    config.rate_distortion = stage_config(
        "rate_distortion",
        steps=steps,
        optimizer=dict(lr=2e-3, warmup_steps=1),
        lmbda_low=1.2,
        lmbda_high=0.025,
    )
    config.checkpoint_steps = 2
    config.log_steps = 1
    config.tensorboard = False
    return config


@pytest.fixture(scope="module")
def photographs():
    return Photographs(open_sources(("synthetic:8",)), crop=64)


@pytest.fixture(scope="module")
def start(photographs, tiny_config, tiny_params):
    """Parameters as at step 0: the network random, silent, beside the KLT.

    `initial_params` does the same with JAX's numbers, and compiles for half a minute.
    """

    def silent(path, array):
        names = [part.key for part in path]
        outputs = {"g_a": 24, "g_s": 48}.get(names[0]) == array.shape[-1]
        heads = names[0] == "entropy" and names[1].endswith(("index", "mean"))
        return np.zeros_like(array) if outputs or heads else array

    params = jax.tree_util.tree_map_with_path(silent, tiny_params)
    params["log_gain"] = np.repeat(np.linspace(0, np.log(6), 6)[:, None], 24, 1).astype(
        np.float32
    )
    params = start_from_klt(
        params, tiny_config, block_covariance(photographs.sample(8))
    )
    return jax.tree.map(np.asarray, params)


@pytest.fixture(scope="module")
def one_group(tiny_config):
    """A third of the passes, and so of the time to compile a step."""
    return dataclasses.replace(tiny_config, groups=(24,), context_shifts=(2,))


@pytest.fixture(scope="module")
def first_params(one_group):
    return lively_params(one_group)


@pytest.fixture(scope="module")
def train(first_params):
    """The training program, without the time that initial parameters take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "initial_params", lambda *_: first_params)
        yield program.train


def test_block_covariance_is_the_second_moment_of_lapped_blocks(photograph):
    images = [photograph(40, 64, seed) for seed in range(3)]
    rows = []
    for image in images:
        x = image[None, :32] / 255.0 - 0.5  # whole blocks only
        blocks = space_to_depth(filter_borders(x, lapping_matrix()), 16)
        rows.append(np.asarray(blocks).reshape(-1, 768))
    rows = np.concatenate(rows).astype(np.float64)
    found = block_covariance([*images, np.zeros((15, 99, 3), np.uint8)])
    np.testing.assert_allclose(found, rows.T @ rows / len(rows), atol=1e-5)
    with pytest.raises(ValueError, match="found none"):
        block_covariance([np.zeros((15, 99, 3), np.uint8)])


def test_the_start_predicts_the_scales_of_its_latents(start, tiny_config, photographs):
    """At the lowest and the highest quality, from the biases alone."""
    images = np.stack(list(photographs.sample(8)))[:, :128]
    codec = Codec(export_model(tiny_config, start))
    y = np.stack([codec.analyse(image).y for image in images])
    for level in (0, MAX_LEVEL):
        gain = np.exp(start["log_gain"][-1 if level else 0])
        deviation = np.sqrt(np.mean((y * gain) ** 2, axis=(0, 1, 2)))
        wanted = index_from_scale(deviation)
        latents = codec.analyse(images[0])
        symbols = codec.entropy.symbols(
            *codec.scaled(latents, level), level, latents.size
        )
        assert not symbols.mean_steps.any()
        found = symbols.indexes[0, 0]
        inside = (wanted > 0) & (wanted < NUM_SCALES - 1)
        assert inside.sum() > 12
        # Half an index is 5 % of a scale; more images than these made the start.
        np.testing.assert_allclose(found[inside], wanted[inside], atol=3)


def test_the_start_is_a_working_codec(start, tiny_config, photographs):
    """Its error is what the components left out and the rounding of the others."""
    codec = Codec(export_model(tiny_config, start))
    image = photographs.image(3)[:128]
    x = image / 255
    sizes, errors = [], []
    for quality in (0, 0.5, 1):
        data = codec.compress(image, quality=quality)
        sizes.append(len(data))
        errors.append(np.mean((codec.decompress(data) / 255 - x) ** 2))
    assert sizes == sorted(sizes) and sizes[0] * 8 < 0.2 * x.shape[0] * x.shape[1]
    lapped = filter_borders(x[None] - 0.5, lapping_matrix())
    blocks = np.asarray(space_to_depth(lapped, 16)).reshape(-1, 768)
    basis = start["g_a"]["skip"]["kernel"] @ start["g_s"]["skip"]["kernel"]
    left_out = np.mean((blocks - blocks @ basis) ** 2)
    assert left_out < np.var(x, axis=(0, 1)).mean() / 2
    kept = tiny_config.latent_channels / 768
    low, high = np.exp(start["log_gain"][[0, -1], 0])
    for error, gain in ((errors[0], low), (errors[2], high)):
        rounding = kept * (BASE_STEP / gain) ** 2 / 12
        assert 0.9 * left_out < error < 1.1 * (left_out + rounding)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, train):
    """Folder and parameters of a run from its beginning to its end."""
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, train(a_config(), folder)["codec"]


def rows_of(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_steps_change_every_part(unbroken, first_params):
    folder, trained = unbroken
    assert jax.tree.structure(trained) == jax.tree.structure(first_params)
    for (path, _), after in zip(
        jax.tree_util.tree_leaves_with_path(first_params),
        jax.tree.leaves(trained),
        strict=True,
    ):
        assert np.isfinite(after).all(), path
    for part in first_params:
        moved = jax.tree.map(
            lambda a, b: np.abs(a - b).max(), first_params[part], trained[part]
        )
        assert max(jax.tree.leaves(moved)) > 0, part
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(np.isfinite(row["loss"]) for row in rows)


class Killed(BaseException):
    """What a signal does to a run, as far as it can be done in a test."""


def test_a_killed_run_ends_as_an_unbroken_one(unbroken, train, tmp_path, monkeypatch):
    place = loop.global_batch
    steps = []

    def dies(*arguments):
        steps.append(0)
        if len(steps) == 4:
            raise Killed
        return place(*arguments)

    monkeypatch.setattr(loop, "global_batch", dies)
    with pytest.raises(Killed):
        train(a_config(), tmp_path)
    monkeypatch.setattr(loop, "global_batch", place)
    # First parameters take a minute, of photographs in a bucket more.
    monkeypatch.setattr(program, "initial_params", lambda *_: pytest.fail("made"))
    resumed = train(a_config(), tmp_path)["codec"]
    # The checkpoint of step 2 is the last; step 3 was lost and is done again.
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 3, 4]
    _, wanted = unbroken
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(wanted),
        jax.tree.leaves(resumed),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
    losses = {row["step"]: row["loss"] for row in rows_of(tmp_path)}
    assert losses == {row["step"]: row["loss"] for row in rows_of(unbroken[0])}


def test_a_refused_run_keeps_the_record_of_the_checkpoints(unbroken, train, tmp_path):
    shutil.copytree(unbroken[0], tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_text()
    assert json.loads(before)["stages"] == ["rate_distortion"]
    config = a_config()
    config.rate_distortion.trained = ("g_s",)
    with pytest.raises(
        ValueError, match="it has optimizer/.*, which the model does not"
    ):
        train(config, tmp_path / "run")
    assert (tmp_path / "run" / "config.json").read_text() == before


def test_a_trained_model_is_exported(unbroken, one_group, first_params):
    trained, first = (
        export_model(one_group, params) for params in (unbroken[1], first_params)
    )
    assert trained.fingerprint() != first.fingerprint()


def test_batches_are_functions_of_the_step(photographs):
    def batch(step, seed=0):
        batches = photographs.batches(
            step, step + 1, seed=seed, examples=range(2), threads=1
        )
        return next(batches)

    first = batch(5)
    assert first.shape == (2, 64, 64, 3) and first.dtype == np.float32
    assert 0 <= first.min() < first.max() <= 1
    np.testing.assert_array_equal(batch(5), first)
    assert (batch(6) != first).any() and (batch(5, seed=1) != first).any()
    run = list(photographs.batches(3, 9, seed=0, examples=range(2), threads=2))
    assert len(run) == 6
    np.testing.assert_array_equal(run[2], first)
