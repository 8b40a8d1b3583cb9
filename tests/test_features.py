# SPDX-License-Identifier: Apache-2.0
"""Feature networks against PyTorch's layers, and their distance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from feature_networks import RNG, bias, kernel, random_images

from semlic_jax.objectives import feature_weights, features, inception, trunks
from semlic_jax.objectives.features import FeatureNetwork
from semlic_jax.objectives.torch_files import read_torch_file


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
