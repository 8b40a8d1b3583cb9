# SPDX-License-Identifier: Apache-2.0
"""The coding order: complete, causal, and the shifts that make weights integers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_integers

from semlic_jax.model.compression import entropy_model, full_masks, image_masks
from semlic_jax.model.context import (
    ACCUMULATOR_LIMIT,
    IntegerConv,
    LayerSpec,
    Pass,
    checkerboard,
    coding_order,
    pack_colour,
    traverse,
    unpack_colour,
    weight_shift,
)

LAYOUTS = [(6,), (1, 2, 3), (4, 1, 1)]


def test_coding_order_is_groups_then_colours():
    assert coding_order((2, 3)) == (
        Pass(group=0, start=0, stop=2, parity=0),
        Pass(group=0, start=0, stop=2, parity=1),
        Pass(group=1, start=2, stop=5, parity=0),
        Pass(group=1, start=2, stop=5, parity=1),
    )


def test_checkerboard():
    anchors = checkerboard(2, 3, 0)[..., 0]
    np.testing.assert_array_equal(anchors, [[1, 0, 1], [0, 1, 0]])
    np.testing.assert_array_equal(checkerboard(2, 3, 1)[..., 0], ~anchors)


@pytest.mark.parametrize("parity", [0, 1])
def test_packing_keeps_the_positions_of_a_colour(parity):
    x = np.arange(2 * 3 * 4 * 2).reshape(2, 3, 4, 2)
    ours = checkerboard(3, 4, parity)[..., 0]
    packed = pack_colour(jnp.asarray(x), parity)
    assert packed.shape == (2, 3, 2, 2)
    np.testing.assert_array_equal(packed.reshape(2, 6, 2), x[:, ours])
    np.testing.assert_array_equal(unpack_colour(packed)[:, ours], x[:, ours])


@pytest.mark.parametrize("groups", LAYOUTS)
@pytest.mark.parametrize("grid", [(4, 8), (1, 1), (3, 5)])
def test_traverse_visits_every_latent_once(groups, grid):
    visits = np.zeros((1, *grid, sum(groups)), int)
    latents = np.arange(1, visits.size + 1).reshape(visits.shape)
    order = []

    def parameters(pass_, y_hat):
        assert len(y_hat) == pass_.group + pass_.parity
        known = np.concatenate([*y_hat, np.zeros((1, *grid, 0), int)], -1)
        # What is known is what was visited before, and zero elsewhere.
        width = known.shape[-1]
        np.testing.assert_array_equal(known, (latents * visits)[..., :width])
        assert not visits[..., width:].any()
        shape = (1, *grid, pass_.stop - pass_.start)
        return np.full(shape, len(order)), np.zeros(shape, int)

    def visit(pass_, index, mean):
        assert (index == len(order)).all()
        order.append(pass_)
        part = (..., slice(pass_.start, pass_.stop))
        visits[part] += checkerboard(*grid, pass_.parity)
        return latents[part]  # the wrong colour too: traverse keeps the pass's own

    found = traverse(groups, grid, parameters, visit)
    assert tuple(order) == coding_order(groups)
    assert (visits == 1).all()
    np.testing.assert_array_equal(np.concatenate(found, -1), latents)


def walker(config, arithmetic):
    """Function (integers or params, y, z, quality) -> index, mean of all latents.

    y are whole numbers in 1/16 steps, given instead of decoded.
    """
    network = entropy_model(config, arithmetic)
    dtype = jnp.int32 if arithmetic == "exact" else jnp.float32

    @jax.jit
    def walk(params, y, z, quality):
        variables, grid = {"params": params}, (y.shape[1], y.shape[2])
        masks = jax.tree.map(lambda m: m.astype(dtype), full_masks(1, grid))
        y, z, quality = y.astype(dtype), z.astype(dtype), quality.astype(dtype)
        psi = network.apply(variables, z, quality, masks, method="hyper_synthesis")
        found = [jnp.zeros(y.shape, dtype), jnp.zeros(y.shape, dtype)]

        def parameters(pass_, y_hat):
            return network.apply(
                variables, pass_, psi, y_hat, quality, masks, method="parameters"
            )

        def visit(pass_, index, mean):
            part = (..., slice(pass_.start, pass_.stop))
            ours = checkerboard(*grid, pass_.parity)
            for i, values in enumerate((index, mean)):
                found[i] = found[i].at[part].add(values * ours)
            return y[part]

        traverse(config.groups, grid, parameters, visit)
        return found

    return walk


def small_config(config, groups):
    return dataclasses.replace(
        config,
        latent_channels=sum(groups),
        groups=groups,
        hyper_channels=4,
        psi_channels=8,
        context_channels=8,
        hidden_channels=8,
        context_shifts=(1,) * len(groups),
    )


def rank(groups, grid):
    """In which pass each latent is coded, int [h, w, M]."""
    ranks = np.zeros((*grid, sum(groups)), int)
    for i, pass_ in enumerate(coding_order(groups)):
        ours = checkerboard(*grid, pass_.parity)
        ranks[..., pass_.start : pass_.stop] += i * ours
    return ranks


@pytest.mark.parametrize("groups", LAYOUTS)
def test_parameters_depend_on_earlier_passes_only(tiny_config, groups):
    config, grid = small_config(tiny_config, groups), (8, 4)
    walk = walker(config, "exact")
    params = random_integers(config, seed=1)
    rng = np.random.default_rng(2)
    y = rng.integers(-200, 200, (1, *grid, 6))
    z = rng.integers(-9, 9, (1, 2, 1, 4))
    quality = np.array([99])
    before = walk(params, y, z, quality)
    assert len(np.unique(before[0])) > 20 and len(np.unique(before[1])) > 40
    ranks = rank(groups, grid)
    last = ranks.max()
    reached = set()
    for trial in range(40):
        row, column, channel = (rng.integers(size) for size in (*grid, 6))
        moved = y.copy()
        moved[0, row, column, channel] += rng.choice([-90, 90])
        after = walk(params, moved, z, quality)
        changed = (before[0] != after[0]) | (before[1] != after[1])
        origin = ranks[row, column, channel]
        assert (ranks[np.asarray(changed)[0]] > origin).all(), f"trial {trial}"
        if origin < last:
            reached.update((origin, later) for later in ranks[np.asarray(changed)[0]])
    # The test would see a leak: everything that may depend does.
    wanted = {(i, j) for i in range(last) for j in range(i + 1, last + 1)}
    # The anchors of a group read the other groups, not the second colour of theirs.
    assert reached >= {(i, j) for i, j in wanted if j // 2 > i // 2 or j == i + 1}
    for changed_z, changed_q in ((z + 3, quality), (z, quality + 90)):
        after = walk(params, y, changed_z, changed_q)
        changed = np.asarray((before[0] != after[0]) | (before[1] != after[1]))[0]
        assert set(ranks[changed]) == set(range(last + 1))


def test_outputs_stay_in_their_ranges(tiny_config):
    config = small_config(tiny_config, (1, 2, 3))
    walk = walker(config, "exact")
    params = random_integers(config, saturated=True)
    rng = np.random.default_rng(0)
    y = rng.choice([-(2**19), 2**19], (1, 8, 4, 6))
    z = rng.choice([-(2**15), 2**15], (1, 2, 1, 4))
    index, mean = walk(params, y, z, np.array([255]))
    assert (index.min(), index.max()) == (0, 63)
    assert (mean.min(), mean.max()) == (-4095, 4095)


def test_masks_cover_what_a_file_codes():
    sizes = np.array([[1, 1], [64, 65], [100, 33], [128, 128]])
    masks = image_masks(sizes, (8, 8))
    for mask, stride, side in zip(masks, (64, 32, 16), (2, 4, 8), strict=True):
        assert mask.shape == (4, side, side, 1)
        for found, (height, width) in zip(np.asarray(mask)[..., 0], sizes, strict=True):
            rows, columns = -(-height // stride), -(-width // stride)
            wanted = np.zeros((side, side))
            wanted[:rows, :columns] = 1
            np.testing.assert_array_equal(found, wanted)


def plain_shift(kernel, input_max):
    """`weight_shift` by trying: Python floats and integers, one channel at a time."""
    shifts = []
    for channel in np.moveaxis(kernel.astype(np.float64), -1, 0):
        best = 1
        for s in range(1, 15):
            rounded = np.rint(channel * 2**s)
            fits = np.abs(channel).max() * 2**s <= 127
            if fits and np.abs(rounded).sum() * input_max < ACCUMULATOR_LIMIT:
                best = s
        shifts.append(best)
    return shifts


@pytest.mark.parametrize("input_max", [128, 255])
@pytest.mark.parametrize("taps", [8, 600, 3000])
def test_weight_shift_is_the_largest_that_fits(taps, input_max):
    rng = np.random.default_rng(taps)
    kernel = rng.standard_normal((1, 1, taps, 90)) * 2.0 ** np.linspace(-14, 7, 90)
    kernel[..., ::3] = np.sign(kernel[..., ::3]) * np.abs(kernel).max((0, 1, 2))[::3]
    kernel[..., 5] = 0
    kernel[0, 0, 0, 7:12] = 127 / 2.0 ** np.arange(5)  # exactly at the limit
    limit = (ACCUMULATOR_LIMIT - 1) // input_max
    if limit < 127 * taps:  # sums exactly at the limit and one beyond it
        kernel[0, 0, :, 13] = (limit // taps + (np.arange(taps) < limit % taps)) / 32
        kernel[0, 0, :, 14] = kernel[0, 0, :, 13]
        kernel[0, 0, -1, 14] += 1 / 32
    kernel = kernel.astype(np.float32)
    found = weight_shift(kernel, input_max)
    assert isinstance(found, np.ndarray) and found.dtype == np.int32
    wanted = plain_shift(kernel, input_max)
    wanted[5] = 14
    np.testing.assert_array_equal(found, wanted)
    in_jax = jax.jit(weight_shift, static_argnums=1)(jnp.asarray(kernel), input_max)
    np.testing.assert_array_equal(in_jax, wanted)
    # Weights that are rounded already keep their values.
    rounded = np.rint(np.ldexp(kernel, found)).astype(np.float32)
    again = weight_shift(np.ldexp(rounded, -found), input_max)
    assert (again >= found).all()


def test_weight_shift_has_no_gradient():
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((1, 1, 4, 2)))
    gradient = jax.grad(
        lambda k: (k * jnp.ldexp(jnp.float32(1), weight_shift(k, 255))).sum()
    )(kernel.astype(jnp.float32))
    np.testing.assert_array_equal(
        gradient,
        np.broadcast_to(2.0 ** weight_shift(np.asarray(kernel), 255), kernel.shape),
    )


def test_fake_quantisation_of_a_layer_is_exact_at_every_shift():
    """Weights with 1 to 14 bits after the point; the first output is at a half."""
    spec = LayerSpec(3, 14, 1)
    rng = np.random.default_rng(0)
    shifts = np.arange(1, 15)
    weights = rng.integers(-126, 127, (1, 1, 3, 14))
    weights[0, 0, 0] = 127
    x = rng.integers(0, 256, (1, 5, 5, 3))
    half = 1 << shifts >> 1
    bias = (half - x[0, 0, 0] @ weights[0, 0]) % (2 * half)
    off = rng.uniform(-0.4, 0.4, (1, 1, 3, 14))
    off[0, 0, 0] = 0
    params = {
        "kernel": np.ldexp(weights + off, -shifts).astype(np.float32),
        "bias": np.ldexp(bias + 0.25, -shifts - 5).astype(np.float32),
    }
    layer = IntegerConv(spec, "fake")
    found = jax.jit(layer.apply)({"params": params}, x.astype(np.float32))
    wanted = (x @ weights[0, 0] + bias + half) >> shifts
    np.testing.assert_array_equal(found, wanted)


def test_float_arithmetic_is_the_layer_without_rounding():
    spec = LayerSpec(3, 2, 3, right=2)
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((3, 3, 3, 2)).astype(np.float32)
    bias = rng.standard_normal(2).astype(np.float32)
    x = rng.uniform(0, 255, (1, 3, 3, 3)).astype(np.float32)
    found = IntegerConv(spec, "float").apply(
        {"params": {"kernel": kernel, "bias": bias}}, x
    )
    centre = (np.einsum("hwi,hwio->o", x[0], kernel) + 32 * bias) / 4
    np.testing.assert_allclose(found[0, 1, 1], centre, rtol=1e-4)


def test_gradients_pass_through_fake_quantisation(tiny_config):
    config = small_config(tiny_config, (2, 4))
    walk = walker(config, "fake")
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: jnp.asarray(0.1 * rng.standard_normal(a.shape), jnp.float32),
        {
            name: {"kernel": layer["kernel"], "bias": layer["bias"]}
            for name, layer in random_integers(config).items()
        },
    )
    y = rng.integers(-200, 200, (1, 8, 4, 6))
    z = rng.integers(-9, 9, (1, 2, 1, 4))
    gradient = jax.jit(
        jax.grad(lambda p: -sum(a.sum() for a in walk(p, y, z, np.array([128]))))
    )(params)
    for name, layer in gradient.items():
        assert np.isfinite(layer["kernel"]).all() and layer["kernel"].any(), name
