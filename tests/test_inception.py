# SPDX-License-Identifier: Apache-2.0
"""FID's Inception-v3 against NumPy, from the published description of its layers."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from feature_networks import kernels, lively_layers

from semlic_jax.objectives import inception

pytestmark = pytest.mark.usefixtures("quick_to_compile")

SIDE = 107  # small, and yet of 2 x 2 cells at the end


def conv(layers, name, x, stride=1, pad=None):
    """Convolution and ReLU of one image; without `pad`, stride 1 keeps the size."""
    kernel, bias = layers[name]["kernel"], layers[name]["bias"]
    height, width = kernel.shape[:2]
    if pad is None:
        pad = (height // 2, width // 2) if stride == 1 else (0, 0)
    x = np.pad(x, ((pad[0], pad[0]), (pad[1], pad[1]), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (height, width), (0, 1))
    windows = windows[::stride, ::stride].transpose(0, 1, 3, 4, 2)
    out = np.tensordot(np.ascontiguousarray(windows), kernel, 3)
    return np.maximum(out + bias, 0)


def windows_of_3(x, stride, value):
    pad = 1 if stride == 1 else 0
    x = np.pad(x, ((pad, pad), (pad, pad), (0, 0)), constant_values=value)
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (0, 1))
    return windows[::stride, ::stride]


def max_pool(x, stride=2):
    return windows_of_3(x, stride, -np.inf).max((-2, -1))


def average_pool(x):
    """Of the cells that there are, without the padding."""
    return np.nanmean(windows_of_3(x, 1, np.nan), (-2, -1))


def block_a(run, x):
    double = run(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
    five = run(x, "branch5x5_1", "branch5x5_2")
    return [run(x, "branch1x1"), five, double, run(average_pool(x), "branch_pool")]


def block_b(run, x):
    double = run(x, "branch3x3dbl_1", "branch3x3dbl_2")
    halved = [run(x, "branch3x3", stride=2), run(double, "branch3x3dbl_3", stride=2)]
    return [*halved, max_pool(x)]


def block_c(run, x):
    seven = run(x, *(f"branch7x7_{i}" for i in (1, 2, 3)))
    double = run(x, *(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)))
    return [run(x, "branch1x1"), seven, double, run(average_pool(x), "branch_pool")]


def block_d(run, x):
    three = run(run(x, "branch3x3_1"), "branch3x3_2", stride=2)
    seven = run(x, *(f"branch7x7x3_{i}" for i in (1, 2, 3)))
    return [three, run(seven, "branch7x7x3_4", stride=2), max_pool(x)]


def block_e(run, x, pool=average_pool):
    three = run(x, "branch3x3_1")
    double = run(x, "branch3x3dbl_1", "branch3x3dbl_2")
    sides = [
        run(h, f"{name}{side}")
        for h, name in ((three, "branch3x3_2"), (double, "branch3x3dbl_3"))
        for side in "ab"
    ]
    return [run(x, "branch1x1"), *sides, run(pool(x), "branch_pool")]


BLOCKS = {
    **dict.fromkeys(("Mixed_5b", "Mixed_5c", "Mixed_5d"), block_a),
    "Mixed_6a": block_b,
    **dict.fromkeys(("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"), block_c),
    "Mixed_7a": block_d,
    "Mixed_7b": block_e,
    "Mixed_7c": partial(block_e, pool=partial(max_pool, stride=1)),
}


def numpy_taps(params, x):
    """All taps of an image that is preprocessed already."""
    taps = {}
    x = conv(params, "Conv2d_1a_3x3", x, stride=2)
    x = conv(params, "Conv2d_2a_3x3", x, pad=(0, 0))
    x = taps["MaxPool_1"] = max_pool(conv(params, "Conv2d_2b_3x3", x))
    x = conv(params, "Conv2d_3b_1x1", x)
    x = taps["MaxPool_2"] = max_pool(conv(params, "Conv2d_4a_3x3", x, pad=(0, 0)))
    for name, block in BLOCKS.items():
        layers = params[name]

        def run(x, *names, stride=1, layers=layers):
            for layer in names:
                x = conv(layers, layer, x, stride)
            return x

        x = taps[name] = np.concatenate(block(run, x), -1)
    return taps


@pytest.fixture(scope="module")
def params():
    module = inception.InceptionV3(inception.INCEPTION_TAPS)
    return lively_layers(module, 299)


def test_layers_and_grids_are_those_of_inception_v3(params):
    shapes = kernels(params)
    assert len(shapes) == 94 and inception.INPUT_SIDE == 299
    # As many as Keras counts without the norms' statistics and the classifier.
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 21_768_352
    assert shapes["Mixed_6c.branch7x7_2"] == (1, 7, 160, 160)
    assert shapes["Mixed_6c.branch7x7dbl_2"] == (7, 1, 160, 160)
    assert shapes["Mixed_7a.branch7x7x3_2"] == (1, 7, 192, 192)
    assert shapes["Mixed_7c.branch3x3_2a"] == (1, 3, 384, 384)
    assert shapes["Mixed_7c.branch3x3dbl_3b"] == (3, 1, 384, 384)
    module = inception.InceptionV3(inception.INCEPTION_TAPS)
    image = jax.ShapeDtypeStruct((2, 40, 60, 3), jnp.float32)  # of any size
    taps = jax.eval_shape(module.apply, {"params": params}, image)
    assert {name: tap.shape for name, tap in taps.items()} == {
        "MaxPool_1": (2, 73, 73, 64),
        "MaxPool_2": (2, 35, 35, 192),
        "Mixed_6e": (2, 17, 17, 768),
        "Mixed_7c": (2, 8, 8, 2048),
    }


def test_inception_equals_numpy(params, monkeypatch):
    monkeypatch.setattr(inception, "INPUT_SIDE", SIDE)
    image = np.random.default_rng(5).random((2 * SIDE, 2 * SIDE, 3), np.float32)
    module = inception.InceptionV3(inception.INCEPTION_TAPS)
    found = jax.jit(module.apply)({"params": params}, image[None])
    # TensorFlow 1 takes every second pixel to halve the sides.
    expected = numpy_taps(params, (image[::2, ::2] * 255 - 128) / 128)
    assert tuple(found) == inception.INCEPTION_TAPS
    for name, ours in found.items():
        theirs = expected[name]
        assert ours.shape == (1, *theirs.shape), name
        assert np.abs(ours[0] - theirs).max() < 1e-4 * np.abs(theirs).max(), name


def test_preprocessing_is_that_of_each_package(params, monkeypatch):
    """On grids of half as many pixels along each side."""
    side = 33
    monkeypatch.setattr(inception, "INPUT_SIDE", side)
    image = np.random.default_rng(6).random((2 * side, 2 * side, 3), np.float32)
    stem = {name: params[name] for name in params if name.startswith("Conv2d_")}
    means = image.reshape(side, 2, side, 2, 3).mean((1, 3))
    for name, prepared in (
        ("torch_fidelity", (image[::2, ::2] * 255 - 128) / 128),
        ("pytorch_fid", 2 * means - 1),
    ):
        module = inception.InceptionV3(("MaxPool_1",), name)
        taps = jax.jit(module.apply)({"params": stem}, image[None])
        (found,) = taps.values()
        x = conv(params, "Conv2d_1a_3x3", prepared, stride=2)
        x = conv(params, "Conv2d_2a_3x3", x, pad=(0, 0))
        expected = max_pool(conv(params, "Conv2d_2b_3x3", x))
        np.testing.assert_allclose(found[0], expected, atol=1e-4)


def test_unknown_taps_and_preprocessing_are_refused():
    image = jnp.zeros((1, 8, 8, 3))
    for module, message in (
        (inception.InceptionV3(("Mixed_5b",)), "MaxPool_2, .*; found Mixed_5b"),
        (inception.InceptionV3(()), "taps must be among .*; found -"),
        (
            inception.InceptionV3(preprocessing="imagenet"),
            '"torch_fidelity" or "pytorch_fid", found \'imagenet\'',
        ),
    ):
        with pytest.raises(ValueError, match=message):
            module.apply({}, image)
