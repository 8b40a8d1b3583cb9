# SPDX-License-Identifier: Apache-2.0
"""The layers against their formulas, written out, and against other libraries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from semlic_jax.model import layers


def plain_conv_transpose(x, kernel):
    """Every input pixel adds its kernel to the output: the definition, in float64."""
    batch, height, width, _ = x.shape
    size = kernel.shape[0]
    pad = size // 2
    out = np.zeros((batch, 2 * height + size, 2 * width + size, kernel.shape[2]))
    for row in range(height):
        for column in range(width):
            stamp = np.einsum("bi,hwoi->bhwo", x[:, row, column], kernel)
            window = np.s_[2 * row : 2 * row + size, 2 * column : 2 * column + size]
            out[:, *window] += stamp
    return out[:, pad : pad + 2 * height, pad : pad + 2 * width]


@pytest.fixture(params=[3, 5], ids=["kernel 3", "kernel 5"])
def transposed(request):
    """x, kernel and a cotangent of `conv_transpose`, float32."""
    rng = np.random.default_rng(request.param)
    shapes = ((2, 4, 3, 5), (request.param, request.param, 4, 5), (2, 8, 6, 4))
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def test_conv_transpose_equals_its_definition(transposed):
    x, kernel, _ = transposed
    found = layers.conv_transpose(jnp.asarray(x), jnp.asarray(kernel))
    assert found.shape == (2, 8, 6, 4)
    np.testing.assert_allclose(found, plain_conv_transpose(x, kernel), atol=1e-5)


def lax_conv_transpose(x, kernel):
    pad = kernel.shape[0] // 2
    # The transpose of the convolution flips the kernel.
    return lax.conv_general_dilated(
        x,
        kernel[::-1, ::-1].swapaxes(2, 3),
        (1, 1),
        ((pad, pad + 1), (pad, pad + 1)),
        lhs_dilation=(2, 2),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def test_conv_transpose_and_its_gradients_equal_those_of_lax(transposed):
    x, kernel, cotangent = map(jnp.asarray, transposed)
    found, vjp = jax.vjp(layers.conv_transpose, x, kernel)
    wanted, lax_vjp = jax.vjp(lax_conv_transpose, x, kernel)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    for ours, theirs in zip(vjp(cotangent), lax_vjp(cotangent), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_conv_transpose_gradients_equal_differences(transposed):
    x, kernel, cotangent = transposed
    rng = np.random.default_rng(0)
    _, vjp = jax.vjp(layers.conv_transpose, jnp.asarray(x), jnp.asarray(kernel))
    for place, gradient in enumerate(vjp(jnp.asarray(cotangent))):
        direction = rng.standard_normal(gradient.shape)
        ends = []
        for step in (-0.5, 0.5):  # bilinear: the difference is exact
            moved = [x, kernel]
            moved[place] = moved[place] + step * direction
            ends.append((plain_conv_transpose(*moved) * cotangent).sum())
        found = (np.asarray(gradient, np.float64) * direction).sum()
        assert found == pytest.approx(ends[1] - ends[0], rel=1e-4)


def test_conv_transpose_equals_that_of_torch(transposed):
    torch = pytest.importorskip("torch")
    x, kernel, cotangent = (torch.from_numpy(array) for array in transposed)
    x, kernel = x.requires_grad_(), kernel.requires_grad_()
    size = kernel.shape[0]
    out = torch.nn.functional.conv_transpose2d(
        x.permute(0, 3, 1, 2),
        kernel.permute(3, 2, 0, 1),
        stride=2,
        padding=size // 2,
        output_padding=1,
    ).permute(0, 2, 3, 1)
    (out * cotangent).sum().backward()
    ours, vjp = jax.vjp(layers.conv_transpose, *map(jnp.asarray, transposed[:2]))
    np.testing.assert_allclose(ours, out.detach().numpy(), atol=1e-5)
    for found, wanted in zip(
        vjp(jnp.asarray(transposed[2])), (x.grad, kernel.grad), strict=True
    ):
        np.testing.assert_allclose(found, wanted.numpy(), atol=2e-5)


def test_conv_transpose_in_bfloat16(transposed):
    x, kernel, cotangent = (jnp.asarray(a, jnp.bfloat16) for a in transposed)
    out, vjp = jax.vjp(layers.conv_transpose, x, kernel)
    assert {a.dtype for a in (out, *vjp(cotangent))} == {jnp.dtype(jnp.bfloat16)}


def test_channel_norm_gradients_equal_the_automatic_ones():
    rng = np.random.default_rng(5)
    shapes = ((2, 3, 4, 6), (6,), (6,), (2, 3, 4, 6))
    *values, cotangent = (rng.standard_normal(s).astype(np.float32) for s in shapes)

    def formula(x, gamma, beta):
        deviation = x - jnp.mean(x, -1, keepdims=True)
        variance = jnp.sum(deviation**2, -1, keepdims=True) / 5
        return gamma * deviation / jnp.sqrt(variance + 1e-3) + beta

    wanted, automatic = jax.vjp(formula, *values)
    found, ours = jax.vjp(layers.channel_norm, *values)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    for mine, theirs in zip(ours(cotangent), automatic(cotangent), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_conv_pads_as_torch_does(stride):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((1, 6, 8, 3)).astype(np.float32)
    kernel = rng.standard_normal((5, 5, 3, 4)).astype(np.float32)
    params = {"kernel": kernel, "bias": np.full(4, 0.5, np.float32)}
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    wanted = [
        [
            np.einsum("hwi,hwio->o", padded[0, i : i + 5, j : j + 5], kernel)
            for j in range(0, 8, stride)
        ]
        for i in range(0, 6, stride)
    ]
    found = layers.Conv(4, 5, stride).apply({"params": params}, x)[0]
    np.testing.assert_allclose(found, np.array(wanted) + 0.5, atol=1e-5)


def test_channel_norm_equals_its_formula():
    rng = np.random.default_rng(0)
    x = 3 + 2 * rng.standard_normal((2, 3, 4, 6))
    gamma, beta = rng.standard_normal((2, 6))
    params = {"gamma": jnp.asarray(gamma), "beta": jnp.asarray(beta)}
    x32 = jnp.asarray(x, jnp.float32)
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True, ddof=1)
    wanted = gamma * (x - mean) / np.sqrt(variance + 1e-3) + beta
    norm = jax.jit(lambda x: layers.ChannelNorm().apply({"params": params}, x))
    found = norm(x32)
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    half = norm(x32.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), wanted, atol=0.1)


def test_channel_norm_of_equal_channels_is_finite():
    x = jnp.full((1, 1, 1, 4), 7.0)
    params = {"params": {"gamma": jnp.ones(4), "beta": jnp.zeros(4)}}
    norm = jax.jit(lambda x: layers.ChannelNorm().apply(params, x).sum())
    value, gradient = jax.value_and_grad(norm)(x)
    assert value == 0 and np.isfinite(gradient).all()


def test_channel_norm_needs_two_channels():
    with pytest.raises(ValueError, match="at least 2 channels, found 1"):
        layers.ChannelNorm().init(jax.random.key(0), jnp.zeros((1, 2, 2, 1)))


def test_lower_bound_lets_gradients_pull_back():
    x = jnp.array([-1.0, -1.0, 2.0, 2.0, 0.5, 0.5])
    cotangent = jnp.array([3.0, -3.0, 3.0, -3.0, 3.0, -3.0])
    out, vjp = jax.vjp(lambda x: layers.lower_bound(x, 0.5), x)
    np.testing.assert_array_equal(out, [0.5, 0.5, 2, 2, 0.5, 0.5])
    # A descent step follows minus the gradient: -3 raises x.
    np.testing.assert_array_equal(vjp(cotangent)[0], [0, -3, 3, -3, 3, -3])


def test_upper_bound_mirrors_it():
    x = jnp.array([1.0, 1.0, -2.0, -2.0])
    cotangent = jnp.array([3.0, -3.0, 3.0, -3.0])
    out, vjp = jax.vjp(lambda x: layers.upper_bound(x, 0.5), x)
    np.testing.assert_array_equal(out, [0.5, 0.5, -2, -2])
    np.testing.assert_array_equal(vjp(cotangent)[0], [3, 0, 3, -3])


def test_bounds_of_arrays():
    x, bound = jnp.array([[1.0, 5.0], [3.0, 0.0]]), jnp.array([2.0, 2.0])
    out, vjp = jax.vjp(layers.lower_bound, x, bound)
    np.testing.assert_array_equal(out, [[2, 5], [3, 2]])
    gradient, of_bound = vjp(jnp.ones_like(x))
    np.testing.assert_array_equal(gradient, [[0, 1], [1, 0]])
    np.testing.assert_array_equal(of_bound, [0, 0])


def test_straight_through_rounding():
    x = jnp.array([-1.5, -0.5, 0.5, 1.5, 2.4, 2.6, 1e6 + 0.5])
    out, vjp = jax.vjp(layers.round_straight_through, x)
    np.testing.assert_array_equal(out, [-2, 0, 0, 2, 2, 3, 1e6])
    np.testing.assert_array_equal(vjp(2 * x)[0], 2 * x)


@pytest.mark.parametrize("block", [1, 2, 4])
def test_space_to_depth_orders_a_block_by_rows(block):
    x = np.arange(2 * 8 * 4 * 3).reshape(2, 8, 4, 3)
    found = np.asarray(layers.space_to_depth(jnp.asarray(x), block))
    assert found.shape == (2, 8 // block, 4 // block, 3 * block**2)
    window = x[1, block : 2 * block, :block] if block < 8 else x[1]
    np.testing.assert_array_equal(found[1, 1, 0], window.ravel())
    back = layers.depth_to_space(jnp.asarray(found), block)
    np.testing.assert_array_equal(back, x)


def test_residual_block_adds_to_its_input():
    """Conv, norm, ReLU, conv, norm: the first norm's shift alone gets through."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 4, 4, 6)).astype(np.float32)
    kernel = np.zeros((3, 3, 6, 6), np.float32)
    centre = kernel.copy()
    centre[1, 1] = np.eye(6)
    zeros, ones = np.zeros(6, np.float32), np.ones(6, np.float32)
    shift = np.array([-9, -9, -9, 1, 1, 1], np.float32)
    params = {
        "Conv_0": {"kernel": kernel, "bias": zeros},
        "ChannelNorm_0": {"gamma": ones, "beta": shift},
        "Conv_1": {"kernel": centre, "bias": zeros},
        "ChannelNorm_1": {"gamma": ones, "beta": zeros},
    }
    found = jax.jit(layers.ResidualBlock().apply)({"params": params}, x)
    h = np.maximum(shift, 0)
    added = (h - h.mean()) / np.sqrt(h.var(ddof=1) + 1e-3)
    np.testing.assert_allclose(found - x, np.broadcast_to(added, x.shape), atol=1e-5)
