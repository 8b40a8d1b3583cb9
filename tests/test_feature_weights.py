# SPDX-License-Identifier: Apache-2.0
"""Files of feature weights: round trips, published ones, what is refused and why."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from feature_networks import bias, kernel, random_images, shared_folder

from semlic_jax.objectives import feature_weights, features, trunks
from semlic_jax.objectives.features import FeatureNetwork, load_features


def test_own_form_round_trips_through_a_file(tmp_path):
    state = {}
    init = jax.jit(features.NETWORKS["alexnet"].init)
    variables = init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    for name, layer in variables.items():
        state[f"{name}.weight"] = np.asarray(layer["kernel"]).transpose(3, 2, 0, 1)
        state[f"{name}.bias"] = np.asarray(layer["bias"])
    np.savez(tmp_path / "published.npz", **state)
    file_name, data = features.convert_features(tmp_path / "published.npz", "alexnet")
    (tmp_path / file_name).write_bytes(data)
    net = load_features(tmp_path, "alexnet", taps=("conv2",))
    images = random_images(1, 64, 64, 3)
    expected = FeatureNetwork(variables, trunks.AlexNet(("conv2",))).apply(images)
    np.testing.assert_allclose(net.apply(images)[0], expected[0], rtol=1e-6)
    assert net.embed(images).shape == (1, 192)
    half = load_features(tmp_path, "alexnet", dtype=jnp.bfloat16)
    assert jax.eval_shape(half.apply, images)[0].dtype == jnp.bfloat16


def test_wrong_weights_are_refused_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.delenv("SEMLIC_FEATURES", raising=False)
    with pytest.raises(ValueError, match="SEMLIC_FEATURES"):
        load_features(name="squeezenet1_0")
    with pytest.raises(ValueError, match="expected one of alexnet"):
        load_features(tmp_path, "resnet")
    with pytest.raises(ValueError, match="semlic convert features"):
        load_features(tmp_path, "vgg16")
    with pytest.raises(ValueError, match="does not exist"):
        load_features(tmp_path / "none.npz", "vgg16")
    state = {"conv1.weight": kernel(64, 3, 11), "conv1.bias": bias(64)}
    np.savez(tmp_path / "alexnet.npz", **state)
    with pytest.raises(ValueError, match="conv2/bias should have shape"):
        load_features(tmp_path, "alexnet")
    arrays = feature_weights.convert_network(state, "alexnet")
    np.savez(tmp_path / "vgg16.npz", **arrays)
    with pytest.raises(ValueError, match="weights of alexnet, not of vgg16"):
        load_features(tmp_path, "vgg16")
    np.savez(tmp_path / "squeezenet1_1.npz", objects=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="not a readable .npz"):
        load_features(tmp_path, "squeezenet1_1")
    with pytest.raises(ValueError, match="taps must be among"):
        trunks.VGG16(("conv9",)).init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    with pytest.raises(ValueError, match="at least 31x31"):
        trunks.AlexNet().init(jax.random.key(0), jnp.zeros((1, 30, 64, 3)))


def refused_weights(path, **changes):
    """The refusal of the packaged weights with some arrays changed."""
    arrays = dict(np.load(features.PACKAGED_FILE)) | changes
    np.savez(path, **arrays)
    with pytest.raises(ValueError) as caught:
        load_features(path)
    return str(caught.value)


def test_weights_that_are_no_finite_floats_are_refused_by_their_layer(tmp_path):
    path = tmp_path / "compact.npz"
    name = "conv1/kernel"
    kernel = np.load(features.PACKAGED_FILE)[name]
    values = {
        "NaN or infinity": np.where(kernel == kernel.max(), np.nan, kernel),
        "found NaN or": kernel.astype(np.float64) * 1e300,  # infinite as float32
        "<U1": np.full(kernel.shape, "a"),
        "int32": np.zeros(kernel.shape, np.int32),
        "<c8": kernel.astype(np.complex64),
        "|V4": np.zeros(kernel.shape, [("a", "<f4")]),
        "<M8": np.zeros(kernel.shape, "M8[s]"),
    }
    for found, changed in values.items():
        message = refused_weights(path, **{name: changed})
        assert name in message and found in message
    # Those of heads and of published files too.
    heads = {
        f"lin{i}.model.1.weight": np.ones((1, c, 1, 1), np.float32)
        for i, c in enumerate(feature_weights._LPIPS_CHANNELS["alex"])
    }
    heads["lin2.model.1.weight"][0, 3] = np.inf
    np.savez(path, **heads)
    with pytest.raises(ValueError, match="finite floats as lin2.model.1.weight"):
        feature_weights.load_lpips_heads(path, "alex")
    state = {"conv1.weight": np.zeros((64, 3, 11, 11), np.int64)}
    with pytest.raises(ValueError, match="finite floats as conv1.weight, found int64"):
        feature_weights.convert_network(state, "alexnet")


def test_an_array_in_the_place_of_a_folder_is_refused(tmp_path):
    path = tmp_path / "compact.npz"
    message = refused_weights(path, **{"conv1/kernel/x": np.zeros(2, np.float32)})
    assert "only an array conv1/kernel, found a folder too" in message


def test_arrays_beside_those_of_the_network_are_left_out(tmp_path):
    arrays = dict(np.load(features.PACKAGED_FILE))
    np.savez(tmp_path / "compact.npz", **arrays, **{"other/kernel": np.array("a")})
    assert "other" not in load_features(tmp_path / "compact.npz").params


def test_weights_that_unpack_to_far_more_than_the_file_are_refused(tmp_path):
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, a=np.zeros(6 << 20, np.float32))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(ValueError, match="bytes in total, found 1 of 2516"):
        load_features(path)


def test_published_squeezenet_tells_distortions_apart():
    net = load_features(shared_folder("SEMLIC_FEATURES", "weights"))
    assert net.module.preprocessing == "caffe"
    ramp = np.linspace(0, 1, 96, dtype=np.float32)[:, None, None]
    image = np.broadcast_to(ramp, (1, 96, 96, 3))
    noise = np.random.default_rng(0).normal(size=image.shape).astype(np.float32)
    clean = net.apply(image)
    assert [t.shape[1:] for t in clean] == [
        *((45, 45, 96), (22, 22, 128), (11, 11, 256)),
        *((11, 11, 384), (11, 11, 512)),
    ]
    near, far = (
        features.feature_distance(clean, net.apply(np.clip(image + s * noise, 0, 1)))
        for s in (np.float32(0.02), np.float32(0.1))
    )
    assert 0 < near[0] < far[0]


def test_published_heads_load():
    folder = shared_folder("SEMLIC_FEATURES", "weights")
    for trunk, taps in trunks.LPIPS_TAPS.items():
        heads = feature_weights.load_lpips_heads(folder, trunk)
        assert len(heads) == len(taps) and min(h.min() for h in heads) >= 0
    alpha, beta = feature_weights.load_dists_weights(folder)
    assert [len(a) for a in alpha] == list(feature_weights.DISTS_CHANNELS)
    assert len(beta) == 6
    with pytest.raises(ValueError, match="alex, vgg or squeeze"):
        feature_weights.load_lpips_heads(folder, "resnet")
    with pytest.raises(ValueError, match="should hold lin0"):
        feature_weights.load_lpips_heads(folder / "dists_alpha_beta.npz", "alex")
    with pytest.raises(ValueError, match=r"lin1.* \(1, 192, 1, 1\)"):
        feature_weights.load_lpips_heads(folder / "lpips_v0.1_vgg.npz", "alex")


def test_heads_convert_to_files_that_load(tmp_path):
    rng = np.random.default_rng(0)
    channels = feature_weights._LPIPS_CHANNELS["alex"]
    heads = {
        f"lin{i}.model.1.weight": rng.random((1, c, 1, 1), np.float32)
        for i, c in enumerate(channels)
    }
    total = sum(feature_weights.DISTS_CHANNELS)
    weights = {k: rng.random((1, total, 1, 1), np.float32) for k in ("alpha", "beta")}
    for name, arrays in (("lpips_alex", heads), ("dists", weights)):
        np.savez(tmp_path / "published.npz", **arrays)
        file_name, data = features.convert_features(tmp_path / "published.npz", name)
        (tmp_path / file_name).write_bytes(data)
    loaded = feature_weights.load_lpips_heads(tmp_path, "alex")
    for ours, theirs in zip(loaded, heads.values(), strict=True):
        np.testing.assert_array_equal(ours, theirs.reshape(-1))
    alpha, _ = feature_weights.load_dists_weights(tmp_path)
    np.testing.assert_array_equal(np.concatenate(alpha), weights["alpha"].reshape(-1))
    with pytest.raises(ValueError, match="expected one of alexnet.*dists"):
        features.convert_features(tmp_path / "published.npz", "resnet")
    with pytest.raises(ValueError, match="no layer of vgg16"):
        features.convert_features(tmp_path / "published.npz", "vgg16")
