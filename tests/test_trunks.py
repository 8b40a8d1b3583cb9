# SPDX-License-Identifier: Apache-2.0
"""SqueezeNet, VGG-16, AlexNet and the compact trunk against NumPy, layer by layer.

The references are written from the papers and from torchvision's layers, with NumPy
alone: `test_features.py` compares with PyTorch where it is installed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from feature_networks import kernels, lively_layers

from semlic_jax.objectives import trunks

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def conv(x, layer, stride=1, padding=0):
    """Padding of one number at all four edges."""
    kernel = layer["kernel"]
    side = kernel.shape[0]
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    height, width = ((n - side) // stride + 1 for n in x.shape[1:3])
    out = np.zeros((len(x), height, width, kernel.shape[3])) + layer["bias"]
    for i in range(side):
        for j in range(side):
            rows = slice(i, i + stride * (height - 1) + 1, stride)
            columns = slice(j, j + stride * (width - 1) + 1, stride)
            out += np.tensordot(x[:, rows, columns], kernel[i, j], 1)
    return out


def relu(x):
    return np.maximum(x, 0)


def pooled(x, size, ceil=False):
    """Maxima of windows `size` wide at a stride of 2."""
    rows, columns = (
        [
            slice(start, start + size)
            for start in range(0, n, 2)
            if start + size <= n or (ceil and start + size - 2 < n)
        ]
        for n in x.shape[1:3]
    )
    windows = [[x[:, i, j].max((1, 2)) for j in columns] for i in rows]
    return np.asarray(windows).transpose(2, 0, 1, 3)


def fire(x, layers):
    x = relu(conv(x, layers["squeeze"]))
    parts = conv(x, layers["expand1x1"]), conv(x, layers["expand3x3"], padding=1)
    return relu(np.concatenate(parts, -1))


def assert_taps_equal(module, params, images, expected):
    found = jax.device_get(jax.jit(module.apply)({"params": params}, images))
    assert set(found) == set(module.taps)
    for name, ours in found.items():
        theirs = expected[name]
        assert ours.shape == theirs.shape, name
        assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max(), name


def images_of(height, width):
    return np.random.default_rng(3).random((1, height, width, 3), np.float32)


def normalised(images):
    """As torchvision's weights expect it."""
    return (images.astype(np.float64) - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_squeezenet_equals_numpy(version):
    known = ("conv1", *(f"fire{n}" for n in range(2, 10)))
    module = trunks.SqueezeNet(version, known)
    params = lively_layers(module, 64)
    channels, side = (96, 7) if version == "1.0" else (64, 3)
    shapes = {"conv1": (side, side, 3, channels)}
    for n, squeeze in enumerate((16, 16, 32, 32, 48, 48, 64, 64), start=2):
        shapes[f"fire{n}.squeeze"] = (1, 1, channels, squeeze)
        shapes[f"fire{n}.expand1x1"] = (1, 1, squeeze, 4 * squeeze)
        shapes[f"fire{n}.expand3x3"] = (3, 3, squeeze, 4 * squeeze)
        channels = 8 * squeeze
    assert kernels(params) == shapes
    images = images_of(33, 46)  # the last windows of pools hang over the edge
    pools = (1, 4, 8) if version == "1.0" else (1, 3, 5)
    expected = {}
    x = expected["conv1"] = relu(conv(normalised(images), params["conv1"], 2))
    for n in range(2, 10):
        x = pooled(x, 3, ceil=True) if n - 1 in pools else x
        x = expected[f"fire{n}"] = fire(x, params[f"fire{n}"])
    assert_taps_equal(module, params, images, expected)


@pytest.mark.parametrize("pooling", ["max", "l2"])
def test_vgg16_equals_numpy(pooling):
    """The taps of LPIPS; the Hann window of DISTS in the place of the pools."""
    last = ("conv1_2", "conv2_2", "conv3_3", "conv4_3", "conv5_3")
    assert trunks.VGG16().taps == last
    if pooling == "l2":
        last = last[:3]
    module = trunks.VGG16(last, pooling=pooling)
    params = lively_layers(module, 32)
    images = images_of(19, 26)
    hann = np.outer((1, 2, 1), (1, 2, 1)) / 16
    x, channels, expected, shapes = normalised(images), 3, {}, {}
    for block, (repeats, width) in enumerate(
        ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)), start=1
    ):
        if block > 1 and pooling == "max":
            x = pooled(x, 2)
        elif block > 1:
            square = np.pad(x**2, ((0, 0), (1, 1), (1, 1), (0, 0)))
            windows = np.lib.stride_tricks.sliding_window_view(square, (3, 3), (1, 2))
            blurred = np.einsum("bhwcij,ij->bhwc", windows[:, ::2, ::2], hann)
            x = np.sqrt(blurred + 1e-12)
        for index in range(1, repeats + 1):
            name = f"conv{block}_{index}"
            shapes[name] = (3, 3, channels, width)
            x = expected[name] = relu(conv(x, params[name], padding=1))
            channels = width
        if name == last[-1]:
            break
    assert kernels(params) == shapes
    assert_taps_equal(module, params, images, expected)


def test_alexnet_equals_numpy():
    module = trunks.AlexNet()
    params = lively_layers(module, 64)
    assert kernels(params) == {
        "conv1": (11, 11, 3, 64),
        "conv2": (5, 5, 64, 192),
        "conv3": (3, 3, 192, 384),
        "conv4": (3, 3, 384, 256),
        "conv5": (3, 3, 256, 256),
    }
    images = images_of(49, 74)
    expected = {"conv1": relu(conv(normalised(images), params["conv1"], 4, 2))}
    x = pooled(expected["conv1"], 3)
    x = expected["conv2"] = relu(conv(x, params["conv2"], padding=2))
    x = pooled(x, 3)
    for name in ("conv3", "conv4", "conv5"):
        x = expected[name] = relu(conv(x, params[name], padding=1))
    assert_taps_equal(module, params, images, expected)


def test_the_compact_trunk_equals_numpy():
    """Modules that keep the number of channels have a bypass; taps have no ReLU."""
    module = trunks.CompactTrunk()
    params = lively_layers(module, 32)
    images = images_of(31, 46)
    x, expected = relu(conv(normalised(images), params["conv1"], 2)), {}
    stages = ((), (2, 3), (4, 5), (6, 7), (8,))
    for index, modules in enumerate(stages, start=1):
        x = pooled(x, 3, ceil=True) if index in (2, 3) else x
        for number in modules:
            y = fire(x, params[f"fire{number}"])
            x = x + y if number in (3, 5, 7, 8) else y
        tap = expected[f"tap{index}"] = conv(x, params[f"tap{index}"])
        assert tap.min() < 0
    assert_taps_equal(module, params, images, expected)


def test_preprocessing_is_that_of_the_weights():
    image = np.float32([[[0.2, 0.4, 0.8]], [[0, 1, 0.5]]])
    wanted = {
        "imagenet": normalised(image),
        # Blue, green, red; Caffe's means are in this order too.
        "caffe": image[..., ::-1] * 255.0 - (104, 117, 123),
        "signed": 2 * image - 1,
        "unit": image,
    }
    for form, expected in wanted.items():
        found = trunks.preprocess(jnp.asarray(image), form)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match='"signed" or "unit", found \'bgr\''):
        trunks.preprocess(jnp.asarray(image), "bgr")


def test_choices_that_do_not_exist_are_refused():
    image = jnp.zeros((1, 32, 32, 3))
    for module, message in (
        (trunks.SqueezeNet("1.2"), 'must be "1.0" or "1.1", found \'1.2\''),
        (trunks.SqueezeNet(taps=("fire10",)), "conv1, fire2, .*; found fire10"),
        (trunks.SqueezeNet(taps=()), "taps must be among .*; found -"),
        (trunks.VGG16(pooling="average"), '"max" or "l2", found \'average\''),
        (trunks.AlexNet(taps=("conv6",)), "taps must be among .*; found conv6"),
    ):
        with pytest.raises(ValueError, match=message):
            module.apply({}, image)


@pytest.mark.parametrize(
    ("module", "least", "network"),
    [
        (trunks.SqueezeNet("1.0"), 7, "SqueezeNet 1.0"),
        (trunks.SqueezeNet("1.1"), 3, "SqueezeNet 1.1"),
        (trunks.VGG16(), 16, "VGG-16"),
        (trunks.AlexNet(), 31, "AlexNet"),
        (trunks.CompactTrunk(), 7, "the compact trunk"),
    ],
)
def test_the_smallest_images_have_taps_and_smaller_ones_are_refused(
    module, least, network
):
    def taps_of(height, width):
        image = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
        found, _ = jax.eval_shape(module.init_with_output, jax.random.key(0), image)
        return found

    for tap in taps_of(least, least).values():
        assert min(tap.shape) > 0
    for size in ((least - 1, least), (least, least - 1)):
        found = f"{network} needs images of at least {least}x{least} pixels, found "
        with pytest.raises(ValueError, match=f"{found}{size[1]}x{size[0]}"):
            taps_of(*size)
