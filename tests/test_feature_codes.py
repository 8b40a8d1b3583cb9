# SPDX-License-Identifier: Apache-2.0
"""The adversary of features: its classes, its discriminator, a step with both."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from mini_config import get_config
from small_trunk import load_small_trunk

from semlic_jax.objectives.adversary import Discriminator
from semlic_jax.objectives.features import FeatureNetwork
from semlic_jax.training import feature_codes as feature_codes_module
from semlic_jax.training import train as train_module
from semlic_jax.training.data import Photographs
from semlic_jax.training.feature_codes import (
    feature_codes,
    kept_codes,
    nearest_codes,
)
from semlic_jax.training.programs import codec_program, make_run
from semlic_jax.training.settings import read_settings
from semlic_jax.training.sharding import make_mesh
from semlic_jax.training.sources import open_sources
from semlic_jax.training.steps import Trunk
from semlic_jax.training.train import initial_params, train

pytestmark = pytest.mark.usefixtures("quick_to_compile")


class Flat:
    """Photographs of one colour each: about red, green or blue."""

    def example(self, step, index, *, seed):
        image = np.zeros((16, 16, 3), np.float32)
        image[..., index % 3] = 0.2 + 0.1 * (index % 7)
        image[..., (index + 1) % 3] = 0.1 * (index % 2)
        return image


class _Pixels(nn.Module):
    """A network whose features are the pixels, after a tap of nothing."""

    taps: tuple = ("nothing", "pixels")

    def __call__(self, images):
        pixels = images[:, ::4, ::4]
        return {"nothing": 0 * pixels, "pixels": pixels}


def test_codes_are_the_groups_of_the_features():
    network = FeatureNetwork({}, _Pixels())
    codes = feature_codes(network, 1, Flat(), 3, seed=0)
    assert codes.dtype == np.float32
    order = np.argsort(codes.argmax(1))
    np.testing.assert_allclose(codes[order], np.eye(3), atol=0.3)
    # Means of unit vectors that differ are shorter.
    np.testing.assert_allclose(np.linalg.norm(codes, axis=1), 1, atol=1e-5)
    again = feature_codes(network, 1, Flat(), 3, seed=0)
    np.testing.assert_array_equal(again, codes)


def test_codes_of_a_network_in_bfloat16(monkeypatch):
    """k-means takes float32 alone."""

    class Narrow(_Pixels):
        def __call__(self, images):
            return super().__call__(images.astype(jnp.bfloat16))

    codes = feature_codes(FeatureNetwork({}, Narrow()), 1, Flat(), 3, seed=0)
    assert codes.dtype == np.float32
    wide = feature_codes(FeatureNetwork({}, _Pixels()), 1, Flat(), 3, seed=0)
    order = np.argsort(codes.argmax(1)), np.argsort(wide.argmax(1))
    np.testing.assert_allclose(codes[order[0]], wide[order[1]], atol=0.02)
    features = np.random.default_rng(0).normal(size=(1, 2, 2, 3))
    found = nearest_codes(codes, jnp.asarray(features, jnp.bfloat16), (4, 4))
    rounded = jnp.asarray(features, jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(found, nearest_codes(codes, rounded, (4, 4)))


def test_codes_are_made_once(tmp_path, monkeypatch):
    path = epath.Path(tmp_path) / "perceptual" / "codes.npy"
    network = FeatureNetwork({}, _Pixels())
    made = kept_codes(path, network, 1, Flat(), 3, seed=0)
    np.testing.assert_array_equal(made, feature_codes(network, 1, Flat(), 3, seed=0))
    monkeypatch.setattr(feature_codes_module, "feature_codes", None)
    again = kept_codes(path, network, 1, Flat(), 3, seed=0)
    np.testing.assert_array_equal(again, made)
    assert [file.name for file in path.parent.iterdir()] == ["codes.npy"]
    with pytest.raises(ValueError, match=r"shape \(4, 3\) .* another adversary"):
        kept_codes(path, network, 1, Flat(), 4, seed=0)
    path.write_bytes(b"\x93NUMPY\x01\x00v\x00{")
    with pytest.raises(ValueError, match="expected codes in .* found no array"):
        kept_codes(path, network, 1, Flat(), 3, seed=0)


def test_the_nearest_code_is_that_of_the_largest_cosine():
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(5, 4)).astype(np.float32)
    codes /= np.linalg.norm(codes, axis=1, keepdims=True)
    features = rng.normal(size=(2, 3, 4, 4)).astype(np.float32)
    found = nearest_codes(codes, features, (3, 4))
    lengths = np.linalg.norm(features, axis=-1, keepdims=True)
    expected = np.einsum("bhwd,cd->bhwc", features / lengths, codes).argmax(-1)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, expected)
    # On a finer grid each cell has the code of the place.
    finer = np.asarray(nearest_codes(codes, features[:, :1, :1], (2, 2)))
    assert (finer == expected[:, :1, :1]).all()


SEEING = dict(
    classes=4,
    widths=(5, 5),
    up_widths=(5,),
    context_channels=0,
    patch=4,
    feature_channels=3,
    mix_widths=(6,),
)


def test_a_discriminator_sees_features_and_hands_their_gradient_on():
    module = Discriminator(**SEEING)
    rng = np.random.default_rng(1)
    image = rng.random((1, 32, 32, 3)).astype(np.float32)
    y_hat = np.zeros((1, 2, 2, 4), np.float32)
    taps = [rng.random((1, n, n, c)).astype(np.float32) for n, c in ((9, 6), (3, 5))]
    params = module.init(jax.random.key(0), image, y_hat, taps)["params"]
    assert params["tap_0"]["kernel"].shape == (1, 1, 6, 3)
    assert params["mix_0"]["kernel"].shape == (3, 3, 5 + 2 * 3, 6)

    @jax.jit
    def total(taps, image):
        logits = module.apply({"params": params}, image, y_hat, taps)
        assert logits.shape == (1, 4, 4, 4)
        return jnp.sum(logits**2)

    to_taps, to_image = jax.grad(total, argnums=(0, 1))(taps, image)
    assert all(np.any(gradient) for gradient in (*to_taps, to_image))
    # Only their direction counts.
    np.testing.assert_allclose(
        total([7 * tap for tap in taps], image), total(taps, image), rtol=1e-4
    )


@pytest.mark.parametrize("channels", [0, 3])
def test_taps_and_a_place_for_them_go_together(channels):
    module = Discriminator(**SEEING | dict(feature_channels=channels))
    image, y_hat = jnp.ones((1, 32, 32, 3)), jnp.ones((1, 2, 2, 4))
    taps = () if channels else (jnp.ones((1, 3, 3, 2)),)
    with pytest.raises(
        ValueError, match="expected taps exactly if feature_channels is set"
    ):
        module.init(jax.random.key(0), image, y_hat, taps)


def seeing_config():
    config = get_config()
    config.networks.discriminator.update(feature_channels=2, mix_widths=(8,))
    config.perceptual.weights.perceptual = 0.1
    config.perceptual.adversary.update(
        binary=False, codes="features", code_count=5, code_tap=0, largest_share=1.0
    )
    return config


def test_a_step_with_features_trains_codec_and_discriminator():
    settings = read_settings(seeing_config())
    run = make_run(settings, make_mesh(1, 1), Trunk(load_small_trunk()))
    (stage,) = settings.records
    photographs = Photographs(open_sources(settings.data.train), crop=64)
    params = initial_params(settings, photographs)
    codes = {"codes": np.eye(5, 3, dtype=np.float32)}
    program = codec_program(run, stage, lambda: params, codes)
    images = next(photographs.batches(0, 1, seed=0, examples=range(4)))
    before = jax.tree.map(np.array, program.start())
    after, metrics = program.update(program.start(), 0, jnp.asarray(images))
    head = after["discriminator"]["params"]["head"]["kernel"]
    assert head.shape[-1] == 6
    assert (
        np.asarray(after["discriminator"]["params"]["tap_0"]["kernel"])
        != before["discriminator"]["params"]["tap_0"]["kernel"]
    ).any()
    assert 0 < float(metrics["adversarial_share"]) <= 1
    assert float(metrics["d_loss"]) > 0


def test_a_run_takes_its_codes_from_the_photographs(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "semlic_jax.training.train.load_features",
        lambda *args, **options: load_small_trunk(),
    )
    config = seeing_config()
    config.perceptual.steps = 2
    config.perceptual.adversary.code_tap = 1
    with pytest.raises(ValueError, match="code_tap must be below 1"):
        train(config, tmp_path / "refused")
    config.perceptual.adversary.code_tap = 0
    trained = train(config, tmp_path / "run")
    assert set(trained) == {"codec"}
    # They are of the run: it goes on with them beside its checkpoints.
    codes = np.load(tmp_path / "run" / "perceptual" / "codes.npy")
    assert codes.shape == (5, 3)
    np.save(tmp_path / "run" / "perceptual" / "codes.npy", codes[::-1])
    seen = []
    program = train_module.codec_program
    monkeypatch.setattr(
        train_module, "codec_program", lambda *args: seen.append(args) or program(*args)
    )
    config.perceptual.steps = 3
    train(config, tmp_path / "run")
    ((_, _, _, labeller),) = seen
    np.testing.assert_array_equal(labeller["codes"], codes[::-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(codes="clusters"), "must be labeller or features, found 'clusters'"),
        (dict(code_count=0), "code_count from 1 to 4096"),
    ],
)
def test_bad_settings_are_refused(change, message):
    config = seeing_config()
    config.perceptual.adversary.update(change)
    with pytest.raises(ValueError, match=message):
        read_settings(config)
