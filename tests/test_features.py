# SPDX-License-Identifier: Apache-2.0
"""Feature networks against PyTorch's layers, their weight files, their distance."""

import os
import pickle
import time
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semlic_jax.objectives import feature_weights, features, inception, trunks
from semlic_jax.objectives.features import FeatureNetwork, load_features
from semlic_jax.objectives.torch_files import read_torch_file

RNG = np.random.default_rng(7)


def shared_folder(variable: str, name: str) -> Path:
    folder = Path(
        os.environ.get(variable) or Path(__file__).parents[2] / "shared" / name
    )
    if not folder.is_dir():
        pytest.skip(f"{variable} is not set: no folder of {name}")
    return folder


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).random(shape, np.float32)


def torch_nchw(images):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def normalised(images):
    mean = np.asarray([0.485, 0.456, 0.406], np.float32)
    return (images - mean) / np.asarray([0.229, 0.224, 0.225], np.float32)


def network(name, state, **settings) -> FeatureNetwork:
    """A network of the registry with a state dict of PyTorch names, through a file."""
    arrays = feature_weights.convert_network(state, name)
    params, _ = feature_weights.parameter_tree(arrays, name, "")
    return FeatureNetwork(params, features.NETWORKS[name].clone(**settings))


def kernel(out_channels, in_channels, height, width=None):
    width = width or height
    scale = np.sqrt(2 / (in_channels * height * width))
    shape = (out_channels, in_channels, height, width)
    return (RNG.normal(size=shape) * scale).astype(np.float32)


def bias(channels):
    return (RNG.normal(size=channels) * 0.1).astype(np.float32)


def assert_taps_equal(found, expected, relative=1e-4):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        theirs = theirs.numpy().transpose(0, 2, 3, 1)
        assert ours.shape == theirs.shape
        error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
        assert error < relative


def conv_relu(torch, state, name, x, **settings):
    weight, offset = (
        torch.from_numpy(state[f"{name}.{k}"]) for k in ("weight", "bias")
    )
    return torch.relu(torch.nn.functional.conv2d(x, weight, offset, **settings))


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("side", [(63, 70), (96, 64)])
def test_squeezenet_equals_pytorch(version, side):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    channels, size = (96, 7) if version == "1.0" else (64, 3)
    widths = (16, 16, 32, 32, 48, 48, 64, 64)
    index = (
        (3, 4, 5, 7, 8, 9, 10, 12) if version == "1.0" else (3, 4, 6, 7, *range(9, 13))
    )
    state = {
        "features.0.weight": kernel(channels, 3, size),
        "features.0.bias": bias(channels),
        "classifier.1.weight": kernel(10, 512, 1),
    }
    inputs = channels
    for i, s in zip(index, widths, strict=True):
        for part, shape in (
            ("squeeze", (s, inputs, 1)),
            ("expand1x1", (4 * s, s, 1)),
            ("expand3x3", (4 * s, s, 3)),
        ):
            state[f"features.{i}.{part}.weight"] = kernel(*shape)
            state[f"features.{i}.{part}.bias"] = bias(shape[0])
        inputs = 8 * s

    images = random_images(2, *side, 3)
    x = conv_relu(torch, state, "features.0", torch_nchw(normalised(images)), stride=2)
    expected = [x]
    pools = (1, 4, 8) if version == "1.0" else (1, 3, 5)
    for number, i in enumerate(index, start=2):
        if number - 1 in pools:
            x = torch.nn.functional.max_pool2d(x, 3, 2, ceil_mode=True)
        x = conv_relu(torch, state, f"features.{i}.squeeze", x)
        parts = [
            conv_relu(torch, state, f"features.{i}.expand1x1", x),
            conv_relu(torch, state, f"features.{i}.expand3x3", x, padding=1),
        ]
        x = torch.cat(parts, 1)
        expected.append(x)
    taps = ("conv1", *(f"fire{n}" for n in range(2, 10)))
    net = network(f"squeezenet{version.replace('.', '_')}", state, taps=taps)
    assert_taps_equal(jax.jit(FeatureNetwork.apply)(net, images), expected)


def vgg16_state():
    state, inputs = {}, 3
    layers = zip(feature_weights._VGG16_INDEX, trunks.VGG16_CONVS, strict=True)
    for i, name in layers:
        outputs = min(64 * 2 ** (int(name[4]) - 1), 512)
        state[f"features.{i}.weight"] = kernel(outputs, inputs, 3)
        state[f"features.{i}.bias"] = bias(outputs)
        inputs = outputs
    return state


@pytest.mark.parametrize("pooling", ["max", "l2"])
def test_vgg16_equals_pytorch(pooling):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    state = vgg16_state()
    images = random_images(1, 37, 50, 3)
    x = torch_nchw(normalised(images))
    hann = np.outer([0.5, 1, 0.5], [0.5, 1, 0.5])
    window = torch.from_numpy((hann / hann.sum()).astype(np.float32))
    expected = []
    for i in feature_weights._VGG16_INDEX:
        if i in (5, 10, 17, 24) and pooling == "max":
            x = torch.nn.functional.max_pool2d(x, 2, 2)
        elif i in (5, 10, 17, 24):
            weight = window.expand(x.shape[1], 1, 3, 3)
            blurred = torch.nn.functional.conv2d(
                x**2, weight, stride=2, padding=1, groups=x.shape[1]
            )
            x = torch.sqrt(blurred + 1e-12)
        x = conv_relu(torch, state, f"features.{i}", x, padding=1)
        if i in (2, 7, 14, 21, 28):
            expected.append(x)
    net = network("vgg16", state, pooling=pooling)
    assert_taps_equal(net.apply(images), expected)


def test_alexnet_equals_pytorch():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    shapes = ((64, 3, 11), (192, 64, 5), (384, 192, 3), (256, 384, 3), (256, 256, 3))
    state = {}
    for i, shape in zip((0, 3, 6, 8, 10), shapes, strict=True):
        state[f"features.{i}.weight"] = kernel(*shape)
        state[f"features.{i}.bias"] = bias(shape[0])
    images = random_images(2, 75, 90, 3)
    x = conv_relu(
        torch, state, "features.0", torch_nchw(normalised(images)), stride=4, padding=2
    )
    expected = [x]
    for i in (3, 6, 8, 10):
        if i in (3, 6):
            x = torch.nn.functional.max_pool2d(x, 3, 2)
        x = conv_relu(torch, state, f"features.{i}", x, padding=2 if i == 3 else 1)
        expected.append(x)
    assert_taps_equal(network("alexnet", state).apply(images), expected)


@pytest.mark.parametrize("half_pixel", [False, True])
def test_bilinear_resize_equals_its_definition(half_pixel):
    image = random_images(1, 13, 17, 3)
    found = inception.resize_bilinear(
        jnp.asarray(image), (29, 11), half_pixel=half_pixel
    )
    expected = np.empty((29, 11, 3))
    for i in range(29):
        for j in range(11):
            position = []
            for k, n, m in ((i, 13, 29), (j, 17, 11)):
                p = (k + 0.5) * n / m - 0.5 if half_pixel else k * n / m
                position.append(min(max(p, 0), n - 1))
            (a, u), (b, v) = ((int(p), p - int(p)) for p in position)
            c, d = min(a + 1, 12), min(b + 1, 16)
            expected[i, j] = (1 - u) * (
                (1 - v) * image[0, a, b] + v * image[0, a, d]
            ) + u * ((1 - v) * image[0, c, b] + v * image[0, c, d])
    np.testing.assert_allclose(found[0], expected, atol=1e-6)
    if half_pixel:
        torch = pytest.importorskip("torch", reason="PyTorch is not installed")
        theirs = torch.nn.functional.interpolate(
            torch_nchw(image), (29, 11), mode="bilinear", align_corners=False
        )
        np.testing.assert_allclose(
            found, theirs.numpy().transpose(0, 2, 3, 1), atol=1e-6
        )


def inception_state():
    """Random weights in the names of pytorch-fid, norms with real statistics."""
    variables = jax.eval_shape(
        features.InceptionV3().init, jax.random.key(0), jnp.zeros((1, 64, 64, 3))
    )["params"]
    state = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        *names, kind = (entry.key for entry in path)
        if kind != "kernel":
            continue
        layer, (height, width, inputs, outputs) = ".".join(names), leaf.shape
        state[f"{layer}.conv.weight"] = kernel(outputs, inputs, height, width)
        for part, low, high in (
            ("weight", 0.8, 1.2),
            ("bias", -0.1, 0.1),
            ("running_mean", -0.1, 0.1),
            ("running_var", 0.5, 1.5),
        ):
            values = RNG.uniform(low, high, outputs).astype(np.float32)
            state[f"{layer}.bn.{part}"] = values
    return state


def test_inception_equals_torch_fidelity(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (
            FeatureExtractorInceptionV3,
        )
    except Exception as error:  # torchvision fails to import in ways of its own
        pytest.skip(f"torch-fidelity does not import: {error}")
    state = inception_state()
    tensors = {k: torch.from_numpy(v) for k, v in state.items()}
    tensors["fc.weight"] = torch.zeros(1008, 2048)
    tensors["fc.bias"] = torch.zeros(1008)
    for key in list(tensors):
        if key.endswith("running_var"):
            name = key.replace("running_var", "num_batches_tracked")
            tensors[name] = torch.tensor(0)
    torch.save(tensors, tmp_path / "inception.pth")
    extractor = FeatureExtractorInceptionV3(
        "test", ["64", "192", "768", "2048"], str(tmp_path / "inception.pth")
    )
    images = RNG.integers(0, 256, (2, 60, 80, 3), np.uint8)
    with torch.no_grad():
        expected = extractor(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    read = read_torch_file(tmp_path / "inception.pth")
    net = network("inception_v3", read, taps=inception.INCEPTION_TAPS)
    found = jax.jit(FeatureNetwork.apply)(net, images / np.float32(255))
    for ours, theirs in zip(found, expected, strict=True):
        ours, theirs = np.asarray(ours).mean((1, 2)), theirs.numpy()
        assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 1e-4


@pytest.mark.parametrize("size, stride, padding, ceil", [(3, 2, 0, True)] + [
    (2, 2, 0, False), (3, 2, 0, False), (3, 1, 1, False)
])  # fmt: skip
@pytest.mark.parametrize("side", [(9, 12), (8, 7)])
def test_max_pool_equals_its_definition(size, stride, padding, ceil, side):
    x = np.random.default_rng(0).normal(size=(2, *side, 3)).astype(np.float32)
    found = np.asarray(trunks.max_pool(x, size, stride, padding=padding, ceil=ceil))
    starts = []
    for length in side:
        stop = length + padding - (1 if ceil else size - 1)
        starts.append(range(-padding, stop, stride))
    if ceil:  # no window starts where only overhang is left, nor one too many
        starts = [[s for s in row if s - stride + size < n] for row, n in
                  zip(starts, side, strict=True)]  # fmt: skip
    expected = [
        [
            x[:, max(i, 0) : i + size, max(j, 0) : j + size].max((1, 2))
            for j in starts[1]
        ]
        for i in starts[0]
    ]
    np.testing.assert_array_equal(found, np.array(expected).transpose(2, 0, 1, 3))


def test_max_pool_gradient_goes_to_the_maxima():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 9, 10, 2)), jnp.float32)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(1, 4, 5, 2)))

    def ours(x):
        return jnp.sum(trunks.max_pool(x, 3, 2, ceil=True) * weight)

    def theirs(x):
        pooled = jax.lax.reduce_window(
            x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1),
            ((0, 0), (0, 0), (0, 1), (0, 0)),
        )  # fmt: skip
        return jnp.sum(pooled * weight)

    np.testing.assert_allclose(jax.grad(ours)(x), jax.grad(theirs)(x), atol=1e-6)


def test_distance_equals_numpy_and_is_finite_at_zero():
    rng = np.random.default_rng(0)
    a, b = ([rng.normal(size=(2, 5, 6, c)).astype(np.float32) for c in (3, 4)]
            for _ in range(2))  # fmt: skip
    heads = [rng.random(c).astype(np.float32) for c in (3, 4)]
    expected = np.zeros(2)
    for x, y, w in zip(a, b, heads, strict=True):
        x = x / np.linalg.norm(x, axis=-1, keepdims=True)
        y = y / np.linalg.norm(y, axis=-1, keepdims=True)
        expected += (w * (x - y) ** 2).sum(-1).mean((1, 2))
    found = features.feature_distance(a, b, heads)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found.shape == (2,)

    def of_zero(x):
        return features.feature_distance([x], [jnp.zeros_like(x)]).sum()

    gradient = jax.grad(of_zero)(jnp.zeros((1, 2, 2, 3)))
    assert np.isfinite(gradient).all()
    with pytest.raises(ValueError, match="as many"):
        features.feature_distance(a, b, heads[:1])


def test_pixel_weights_select_a_region():
    rng = np.random.default_rng(0)
    a, b = (rng.random((1, 8, 8, 4)).astype(np.float32) for _ in range(2))
    b[:, :, 4:] = a[:, :, 4:]
    left = np.zeros((1, 32, 32), np.float32)
    left[:, :, :14] = 1  # clear of the seam, which resizing blurs
    whole = features.feature_distance([a], [b])
    ones = features.feature_distance([a], [b], pixel_weights=np.ones_like(left))
    np.testing.assert_allclose(ones, whole, rtol=1e-6)
    right = features.feature_distance([a], [b], pixel_weights=left[:, :, ::-1])
    assert right[0] == 0 < features.feature_distance([a], [b], pixel_weights=left)[0]


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


# ---- PyTorch files


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_read_as_pytorch_reads_them(tmp_path, zipped):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    state = module.state_dict()
    base = torch.arange(60, dtype=torch.int64).reshape(3, 4, 5)
    cases = [
        state,
        {"epoch": 3, "state_dict": state, "options": {"rate": 1e-3, "names": ["a"]}},
        dict(module.named_parameters()),
        {"a": base.permute(2, 0, 1)[1:, :, ::2], "b": base[1], "c": base.bool()},
        {"h": state["0.weight"].half(), "d": base.double(), "u": base.byte()},
    ]
    for number, saved in enumerate(cases):
        path = tmp_path / f"{number}.pth"
        torch.save(saved, path, _use_new_zipfile_serialization=zipped)
        found = read_torch_file(path)
        expected = saved.get("state_dict", saved)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            np.testing.assert_array_equal(found[key], tensor.detach().numpy())
            assert found[key].dtype == tensor.detach().numpy().dtype
    torch.save({"x": torch.tensor([1.5, -2.0]).bfloat16()}, tmp_path / "b.pth")
    np.testing.assert_array_equal(read_torch_file(tmp_path / "b.pth")["x"], [1.5, -2])


def write_zip(path, data, storages=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        for key, content in storages:
            archive.writestr(f"archive/data/{key}", content)


def tensor_pickle(shape, strides, count=6, offset=0, names="x"):
    """The pickle of {"x": tensor} as torch.save writes it, by hand.

    For several names, of one letter each, it is the same tensor each time.
    """

    def number(n):
        return b"J" + int(n).to_bytes(4, "little", signed=True)

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu"
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage + number(count) + b"tQ" + number(offset)
        + numbers(shape) + numbers(strides) + b"\x89N" + b"tR"
    )  # fmt: skip
    keys = (b"X\x01\0\0\0" + name.encode() for name in names)
    return b"\x80\x02}" + b"".join(key + tensor + b"s" for key in keys) + b"."


def test_hand_written_zip_reads(tmp_path):
    values = np.arange(6, dtype=np.float32)
    write_zip(tmp_path / "a.pth", tensor_pickle([2, 3], [3, 1]), [("0", values)])
    found = read_torch_file(tmp_path / "a.pth")["x"]
    np.testing.assert_array_equal(found, values.reshape(2, 3))


@pytest.mark.parametrize(
    "shape, strides, count, offset",
    [
        ([2, 4], [4, 1], 6, 0),
        ([2, 3], [3, 1], 6, 1),
        ([2, 3], [3, 1], 5, 0),
        ([1000, 1000], [0, 0], 6, 0),
        ([2, 3], [3, -1], 6, 0),
        ([2, 3], [1], 6, 0),
    ],
)
def test_tensors_outside_their_storage_are_refused(
    tmp_path, shape, strides, count, offset
):
    data = tensor_pickle(shape, strides, count, offset)
    write_zip(tmp_path / "a.pth", data, [("0", np.zeros(6, np.float32))])
    with pytest.raises(ValueError, match="a.pth is not a readable"):
        read_torch_file(tmp_path / "a.pth")


def test_tensors_may_share_a_storage_but_not_without_end(tmp_path):
    """Each name costs an array of its own."""
    values = np.arange(6, dtype=np.float32)
    tied = tensor_pickle([2, 3], [3, 1], names="abcd")
    write_zip(tmp_path / "a.pth", tied, [("0", values)])
    found = read_torch_file(tmp_path / "a.pth")
    assert list(found) == list("abcd")
    for array in found.values():
        np.testing.assert_array_equal(array, values.reshape(2, 3))
    copies = tensor_pickle([2, 3], [3, 1], names="abcde")
    write_zip(tmp_path / "a.pth", copies, [("0", values)])
    with pytest.raises(
        ValueError, match="a.pth was refused: .* than 4 times the bytes"
    ):
        read_torch_file(tmp_path / "a.pth")


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_code_in_a_torch_file_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for protocol in (0, 1, 2, 4, 5):
        data = pickle.dumps({"x": _Evil()}, protocol=protocol)
        for path in (tmp_path / "zip.pth", tmp_path / "raw.pth"):
            if path.name == "zip.pth":
                write_zip(path, data)
            else:
                path.write_bytes(data)
            with pytest.raises(ValueError, match=r"mkdir|operation \w+,|not start"):
                read_torch_file(path)
    write_zip(tmp_path / "a.pth", pickle.dumps({"x": _Evil()}, protocol=2))
    with pytest.raises(ValueError, match=r"a.pth was refused: it holds \w+\.mkdir,"):
        read_torch_file(tmp_path / "a.pth")
    write_zip(tmp_path / "a.pth", pickle.dumps({"x": 1}, 2), (), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed"):
        read_torch_file(tmp_path / "a.pth")
    assert not (tmp_path / "pwned").exists()


def test_damaged_torch_files_give_one_error(tmp_path):
    path = tmp_path / "a.pth"
    good = tensor_pickle([2, 3], [3, 1])
    for cut in range(len(good)):
        write_zip(path, good[:cut], [("0", np.zeros(6, np.float32))])
        with pytest.raises(ValueError, match="a.pth"):
            read_torch_file(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="a.pth"):
        read_torch_file(path)
    with pytest.raises(ValueError, match="does not exist"):
        read_torch_file(tmp_path / "none.pth")


def ordered_dict_of(pairs: int, times: int) -> bytes:
    """A pickle that makes OrderedDicts of one list of pairs, many times."""
    one = b"ccollections\nOrderedDict\nh\x01\x85R"
    listed = b"".join(
        b"(J" + index.to_bytes(4, "little") + b"Nt" for index in range(pairs)
    )
    return b"\x80\x02](" + listed + b"eq\x01" + times * one + b"."


# Tuples of tuples: to hash them recurses in C, or takes exponential time.
NESTED = b")" + b"\x85" * 2000
DOUBLED = b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))


@pytest.mark.parametrize("key", [NESTED, DOUBLED])
def test_keys_of_torch_files_are_plain(tmp_path, key):
    path = tmp_path / "a.pth"
    for data in (
        b"}" + key + b"K\x01s.",  # SETITEM
        b"}(" + key + b"K\x01u.",  # SETITEMS
        b"(" + key + b"K\x01d.",  # DICT
        b"ccollections\nOrderedDict\n](](" + key + b"K\x01ee\x85R.",
        b"(X\x07\0\0\0storagectorch\nFloatStorage\n" + key + b"NK\x01tQ.",
    ):
        write_zip(path, b"\x80\x02" + data)
        with pytest.raises(ValueError, match="it uses a tuple as a key"):
            read_torch_file(path)
    # The old form names its storages in a list.
    number = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
    head = b"\x8a\x0a" + number + b".", b"M\xe9\x03.", b"}.", b"}."
    path.write_bytes(
        b"".join(b"\x80\x02" + part for part in head) + b"](" + key + b"e."
    )
    with pytest.raises(ValueError, match="it uses a tuple as a key"):
        read_torch_file(path)


def test_ordered_dicts_of_torch_files_copy_no_more_than_was_written(tmp_path):
    path = tmp_path / "a.pth"
    write_zip(path, ordered_dict_of(1000, 3))
    with pytest.raises(ValueError, match="no single dict of tensors"):
        read_torch_file(path)
    write_zip(path, ordered_dict_of(1000, 5))
    with pytest.raises(ValueError, match="copies one list of pairs many times"):
        read_torch_file(path)
    write_zip(path, b"\x80\x02ccollections\nOrderedDict\n}\x85R.")
    with pytest.raises(ValueError, match="not a list of pairs"):
        read_torch_file(path)


def test_shapes_of_torch_files_have_an_end(tmp_path):
    path = tmp_path / "a.pth"
    for shape in ([1] * 65, [2**31 - 1] * 200_000):
        write_zip(path, tensor_pickle(shape, [1] * len(shape)), [("0", bytes(24))])
        with pytest.raises(ValueError, match="impossible shape"):
            read_torch_file(path)


def test_marks_of_torch_files_cost_linear_time(tmp_path):
    marks = b"\x80\x02" + b"N" * 200_000 + b"(t" * 50_000 + b"."
    write_zip(tmp_path / "a.pth", marks)
    started = time.monotonic()
    with pytest.raises(ValueError, match="no single dict of tensors"):
        read_torch_file(tmp_path / "a.pth")
    assert time.monotonic() - started < 30  # of a second; quadratic, of ten minutes


def test_messages_about_torch_files_are_short(tmp_path):
    path = tmp_path / "a.pth"
    for data in (b"c" + b"x" * 100_000 + b"\ny\n.", NESTED + b")R."):
        write_zip(path, b"\x80\x02" + data)
        with pytest.raises(ValueError, match="a.pth was refused") as caught:
            read_torch_file(path)
        assert len(str(caught.value)) < 400


def test_normalise_channels_has_the_gradient_of_its_equation():
    rng = np.random.default_rng(11)
    x, weights = rng.normal(size=(2, 2, 5, 4, 7)).astype(np.float32)
    x[0, 0] = 0  # where all channels are 0

    def plain(x):
        return x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-8)

    def gradient(normalise):
        return jax.grad(lambda x: jnp.sum(weights * normalise(x)))(x)

    np.testing.assert_allclose(features.normalise_channels(x), plain(x), rtol=1e-5)
    expected = gradient(plain)
    np.testing.assert_allclose(
        gradient(features.normalise_channels), expected, rtol=1e-5, atol=1e-5
    )


def write_stream(path, little=True, count=6, values=6, data=None):
    """The older form of `tensor_pickle([2, 3], [3, 1])`: five pickles, then values."""
    number = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
    order = b"}X\x0d\0\0\0little_endian" + (b"\x88" if little else b"\x89") + b"s."
    pickles = (b"\x8a\x0a" + number + b".", b"M\xe9\x03.", order)
    head = b"".join(b"\x80\x02" + part for part in pickles)
    keys = b"\x80\x02](X\x01\0\0\x000e."
    content = count.to_bytes(8, "little") + np.arange(values, dtype="<f4").tobytes()
    path.write_bytes(head + (data or tensor_pickle([2, 3], [3, 1])) + keys + content)


def test_torch_files_of_the_other_byte_order_are_refused(tmp_path):
    path = tmp_path / "a.pth"
    values = np.arange(6, dtype=np.float32)
    for little in (True, False):
        for zipped in (True, False):
            if zipped:
                data = tensor_pickle([2, 3], [3, 1])
                write_zip(path, data, [("0", values)])
                with zipfile.ZipFile(path, "a") as archive:
                    order = "little" if little else "big"
                    archive.writestr("archive/byteorder", order)
            else:
                write_stream(path, little)
            if little:
                found = read_torch_file(path)["x"]
                np.testing.assert_array_equal(found, values.reshape(2, 3))
            else:
                with pytest.raises(ValueError, match="numbers are big-endian"):
                    read_torch_file(path)


def test_storages_of_another_length_are_refused(tmp_path):
    path = tmp_path / "a.pth"
    write_stream(path, count=7)
    with pytest.raises(ValueError, match="storage 0 has 7 elements"):
        read_torch_file(path)
    write_stream(path, values=5)
    with pytest.raises(ValueError, match="24 bytes, found 20"):
        read_torch_file(path)
    for count in (5, 7):
        values = np.zeros(count, np.float32)
        write_zip(path, tensor_pickle([2, 3], [3, 1]), [("0", values)])
        with pytest.raises(ValueError, match=f"24 bytes, found {4 * count}"):
            read_torch_file(path)


def test_views_of_storages_are_refused(tmp_path):
    """Their offset would be left out, and the weights be others."""
    path = tmp_path / "a.pth"
    plain, values = tensor_pickle([2, 3], [3, 1]), np.zeros(6, np.float32)
    write_zip(path, plain.replace(b"tQ", b"NtQ"), [("0", values)])
    assert read_torch_file(path)["x"].shape == (2, 3)
    view = b"(X\x01\0\0\x001K\x03K\x03ttQ"  # key, offset and size
    write_zip(path, plain.replace(b"tQ", view), [("0", values)])
    with pytest.raises(ValueError, match="not a plain storage"):
        read_torch_file(path)


def test_of_two_dicts_of_tensors_none_is_chosen(tmp_path):
    """As of a checkpoint with averaged weights beside those of the last step."""
    one = tensor_pickle([2, 3], [3, 1])[2:-1]
    names = (b"X\x01\0\0\0" + name for name in (b"a", b"b"))
    data = b"\x80\x02}" + b"".join(name + one + b"s" for name in names) + b"."
    write_zip(tmp_path / "a.pth", data, [("0", np.zeros(6, np.float32))])
    with pytest.raises(ValueError, match="no single dict of tensors"):
        read_torch_file(tmp_path / "a.pth")


def test_attributes_of_other_things_than_dicts_are_refused(tmp_path):
    write_zip(tmp_path / "a.pth", b"\x80\x02NNb.")
    with pytest.raises(ValueError, match="sets attributes of something that is not"):
        read_torch_file(tmp_path / "a.pth")
