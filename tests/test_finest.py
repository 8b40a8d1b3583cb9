# SPDX-License-Identifier: Apache-2.0
"""The finest level of a decoder trains alone, on what the coarser ones gave once."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import lively_params, photograph_like
from PIL import Image
from small_trunk import load_small_trunk

pytest.importorskip("optax", reason="training needs the extra `train`")

from semlic_jax.training import finest
from semlic_jax.training.steps import Trunk
from semlic_jax.weights import load_model

# Of the mini model's g_s, what its last upsampling step and all after it use.
FINEST = ("ConvTranspose_1", "ChannelNorm_2", "Conv_1", "repair_", "texture_1", "skip")


@pytest.fixture(scope="module")
def inputs(mini_codec):
    """Six examples: fewer than were asked for, because no photograph is used twice."""
    photographs = [photograph_like(330, 350, seed) for seed in range(6)]
    photographs.append(np.zeros((319, 400, 3), np.uint8))  # too small
    rng = np.random.default_rng(1)
    return finest.make_inputs(mini_codec, photographs, 8, rng)


def test_examples_are_what_their_files_decode_to(mini_codec, inputs):
    assert len({x.tobytes() for x in inputs.x}) == 6
    assert inputs.x.shape == (6, 320, 320, 3) and inputs.y_hat.shape == (6, 20, 20, 24)
    y_hat, quality = jnp.asarray(inputs.y_hat), jnp.asarray(inputs.quality)
    x_hat, h = finest.synthesis(mini_codec.config, mini_codec.params, y_hat, quality)
    np.testing.assert_allclose(h, inputs.h, rtol=2e-3, atol=1e-5)
    for number in (0, 5):
        level = round(float(inputs.quality[number]) * 255)
        data = mini_codec.encode(mini_codec.analyse(inputs.x[number]), level)
        pixels = np.clip(np.asarray(x_hat[number]), 0, 1) * 255
        np.testing.assert_allclose(pixels, mini_codec.decompress(data), atol=0.51)


def test_crops_decode_to_the_same_picture(mini_codec, inputs):
    """Away from the borders: latents, features, originals and noise fit together."""
    config = dataclasses.replace(mini_codec.config, texture_channels=4)
    params = lively_params(config)
    y_hat, quality = jnp.asarray(inputs.y_hat), jnp.asarray(inputs.quality)
    whole, h = finest.synthesis(config, params, y_hat, quality)
    corners = np.array([[0, 12], [5, 3], [12, 0], [1, 1], [7, 8], [2, 9]])
    made = finest.crops(inputs._replace(h=np.asarray(h)), corners, 8)
    x_hat, _ = finest.synthesis(
        config,
        params,
        jnp.asarray(made.y_hat),
        jnp.asarray(made.quality),
        h=jnp.asarray(made.h),
        origin=jnp.asarray(made.origin),
    )
    for number, (row, column) in enumerate(corners * 16):
        part = whole[number, row : row + 128, column : column + 128]
        inner = np.s_[24:-24, 24:-24]
        np.testing.assert_allclose(x_hat[number][inner], part[inner], atol=1e-4)
        original = inputs.x[number, row : row + 128, column : column + 128]
        np.testing.assert_array_equal(made.x[number], np.float32(original) / 255)


def test_only_the_finest_level_learns_and_files_stay(mini_model, inputs):
    model = load_model(mini_model)
    trunk = Trunk(load_small_trunk())
    settings = dict(steps=6, batch=2, latents=4, learning_rate=1e-2)
    made, report = finest.train(model, inputs, trunk, **settings, seed=3)
    assert made.fingerprint() == model.fingerprint()
    for name, tree in model.transforms.items():
        if name != "g_s":
            jax.tree.map(np.testing.assert_array_equal, tree, made.transforms[name])
    changed = set()
    for path, before in jax.tree_util.tree_leaves_with_path(model.transforms["g_s"]):
        after = made.transforms["g_s"]
        for key in path:
            after = after[key.key]
        if not np.array_equal(before, after):
            changed.add(path[0].key)
    assert changed and all(name.startswith(FINEST) for name in changed)
    assert {"ConvTranspose_1", "repair_0"} <= changed
    assert report["before"].keys() == report["after"].keys() >= {"spectrum", "lattice"}
    assert report["before"]["closeness"] == pytest.approx(1e-3)
    assert report["after"]["closeness"] > 1e-3
    again, _ = finest.train(model, inputs, trunk, **settings, seed=3)
    jax.tree.map(np.testing.assert_array_equal, again.transforms, made.transforms)
    other, _ = finest.train(model, inputs, trunk, **settings, seed=4)
    assert not np.array_equal(
        other.transforms["g_s"]["repair_0"]["kernel"],
        made.transforms["g_s"]["repair_0"]["kernel"],
    )


def test_a_stopped_run_goes_on_to_the_same_end(
    mini_model, inputs, monkeypatch, tmp_path
):
    model = load_model(mini_model)
    trunk = Trunk(load_small_trunk())
    settings = dict(steps=5, batch=2, latents=4, learning_rate=1e-2)
    whole, report = finest.train(model, inputs, trunk, **settings)
    monkeypatch.setattr(finest, "_SAVED_STEPS", 2)
    update, made = finest.update, []

    def stopped(*parts):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(None)
        return update(*parts)

    monkeypatch.setattr(finest, "update", stopped)
    with pytest.raises(KeyboardInterrupt):
        finest.train(model, inputs, trunk, **settings, folder=tmp_path)
    made.clear()
    resumed, again = finest.train(model, inputs, trunk, **settings, folder=tmp_path)
    assert len(made) == 3  # from step 2 to 5
    jax.tree.map(np.testing.assert_array_equal, resumed.transforms, whole.transforms)
    assert again == report
    made.clear()
    once_more, _ = finest.train(model, inputs, trunk, **settings, folder=tmp_path)
    assert not made
    jax.tree.map(np.testing.assert_array_equal, once_more.transforms, whole.transforms)
    for change, name in (({"seed": 1}, "seed"), ({"batch": 1}, "batch")):
        with pytest.raises(ValueError, match=f"other settings: {name} was"):
            finest.train(
                model, inputs, trunk, **{**settings, **change}, folder=tmp_path
            )
    with monkeypatch.context() as patch:
        patch.setattr(finest, "CLOSENESS", 0.4)
        with pytest.raises(ValueError, match="other settings: loss was"):
            finest.train(model, inputs, trunk, **settings, folder=tmp_path)
    others = inputs._replace(quality=inputs.quality + 1e-3)
    with pytest.raises(ValueError, match="other settings: examples was"):
        finest.train(model, others, trunk, **settings, folder=tmp_path)


def test_the_loss_falls(mini_model, inputs):
    model = load_model(mini_model)
    made = dict(steps=40, batch=2, latents=6, learning_rate=3e-3)
    _, report = finest.train(model, inputs, Trunk(load_small_trunk()), **made)
    loss = {
        when: sum(
            getattr(finest.WEIGHTS, name) * value
            for name, value in terms.items()
            if name != "closeness"
        )
        for when, terms in report.items()
    }
    assert loss["after"] < 0.95 * loss["before"]


def test_too_few_or_too_small_photographs_are_refused(mini_codec, mini_model, inputs):
    small = [np.zeros((320, 319, 3), np.uint8)] * 3
    with pytest.raises(ValueError, match="sides of at least 320 pixels, found none am"):
        finest.make_inputs(mini_codec, small, 2, np.random.default_rng(0))
    with pytest.raises(ValueError, match="at least 6 examples beside the 1 that are"):
        finest.train(
            load_model(mini_model),
            inputs,
            Trunk(load_small_trunk()),
            steps=1,
            batch=6,
            latents=4,
            learning_rate=1e-3,
        )


def test_large_photographs_are_scaled_down_and_others_are_not():
    pixels = photograph_like(340, 700)
    np.testing.assert_array_equal(finest._square(pixels), pixels[10:330, 190:510])
    large = photograph_like(642, 700)
    scaled = Image.fromarray(large).resize((350, 321), Image.Resampling.LANCZOS)
    expected = np.asarray(scaled)[:320, 15:335]
    np.testing.assert_array_equal(finest._square(large), expected)


def test_command_writes_a_model_and_a_report(tmp_path, mini_model, monkeypatch, capsys):
    monkeypatch.setattr(finest, "load_features", load_small_trunk)
    for seed in range(3):
        Image.fromarray(photograph_like(330, 340, seed)).save(tmp_path / f"{seed}.png")
    out = tmp_path / "out.npz"
    command = [str(mini_model), str(out), "--data", str(tmp_path), "--steps", "2"]
    command += ["--batch", "1", "--examples", "3", "--latents", "4"]
    finest.main(command)
    assert json.loads(capsys.readouterr().out).keys() == {"before", "after"}
    made, model = load_model(out), load_model(mini_model)
    assert made.fingerprint() == model.fingerprint()
    assert dataclasses.asdict(made.config) == dataclasses.asdict(model.config)
    with pytest.raises(SystemExit) as ended:
        finest.main(command)
    assert ended.value.code == 1 and "exists" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        finest.main([*command, "--force", "--latents", "3"])
    assert ended.value.code == 1
    assert "expected --latents from 4 to 20, found 3" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        finest.main([*command, "--seed", "-1"])
    assert ended.value.code == 2
    wanted = "expected a whole number from 0 to 4294967295, found '-1'"
    assert wanted in capsys.readouterr().err
