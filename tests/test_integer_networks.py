# SPDX-License-Identifier: Apache-2.0
"""The exact path against plain NumPy, and against itself everywhere else.

`Reference` is written from the documentation of `semlic_jax.model.context` and of the
format, in int64, on arrays cropped to the image: it shares no code with the package but
the entropy coder.
"""

import dataclasses
import functools
import tracemalloc
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_integers

from semlic_jax.coding.bitstream import BitstreamError
from semlic_jax.coding.entropy_coding import SymbolDecoder
from semlic_jax.coding.integer_networks import (
    IntegerEntropyModel,
    export_integers,
    float_twin,
    prove_exact,
)
from semlic_jax.model import context
from semlic_jax.model.compression import entropy_model, image_masks
from semlic_jax.model.context import traverse

SIZES = [(1, 1), (64, 128), (100, 50), (17, 190)]
GRID = (8, 12)  # of all of them, padded


class Reference:
    """The entropy networks of one model in NumPy int64."""

    def __init__(self, config, integers):
        self.config = config
        self.layers = integers

    def conv(self, name, x):
        kernel, bias, shift = (
            self.layers[name][part].astype(np.int64)
            for part in ("kernel", "bias", "shift")
        )
        size = len(kernel)
        height, width = x.shape[:2]
        pad = size // 2
        padded = np.pad(x, ((pad, pad), (pad, pad), (0, 0)))
        total = np.zeros((height, width, len(bias)), np.int64)
        for i in range(size):
            for j in range(size):
                total += padded[i : i + height, j : j + width] @ kernel[i, j]
        return (total + bias + 2 ** (shift - 1)) // 2**shift

    def hidden(self, name, x):
        return self.conv(name, x).clip(0, 255)

    def upsampled(self, name, x, rows, columns):
        h = self.hidden(name, x)
        height, width, channels = h.shape
        out = np.zeros((2 * height, 2 * width, channels // 4), np.int64)
        for i in (0, 1):
            for j in (0, 1):
                part = 2 * i + j
                first = part * (channels // 4)
                out[i::2, j::2] = h[..., first : first + channels // 4]
        return out[:rows, :columns]

    def psi(self, z_hat, level, size):
        plane = np.full((*z_hat.shape[:2], 1), level, np.int64)
        h = np.concatenate([(8 * z_hat.astype(np.int64)).clip(-128, 127), plane], -1)
        h = self.hidden("h_s_0", h)
        h = self.upsampled("h_s_1", h, -(-size[0] // 32), -(-size[1] // 32))
        return self.upsampled("h_s_2", h, -(-size[0] // 16), -(-size[1] // 16))

    def walk(self, psi, level, symbols_of):
        """y_hat, symbols, indexes and means; `symbols_of(k, first, colour, index,
        mean)` gives the symbols of the positions where `colour` is true."""
        height, width = psi.shape[:2]
        rows, columns = np.mgrid[:height, :width]
        plane = np.full((height, width, 1), level, np.int64)
        known, fields = [], []
        first = 0
        for k, channels in enumerate(self.config.groups):
            y_hat, symbols, indexes, means = np.zeros(
                (4, height, width, channels), np.int64
            )
            for parity in (0, 1):
                colour = (rows + columns) % 2 == parity
                features = [psi, plane]
                if k > 0:
                    h = self.hidden(f"g_ch_{k}_0", np.concatenate(known, -1))
                    features.append(self.hidden(f"g_ch_{k}_1", h))
                if parity == 0:
                    channels_sp = self.config.context_channels
                    features.append(np.zeros((height, width, channels_sp), np.int64))
                else:
                    seen = self.requantised(y_hat, k)
                    features.append(self.hidden(f"g_sp_{k}", seen))
                h = self.hidden(f"g_ep_{k}_0", np.concatenate(features, -1))
                h = self.hidden(f"g_ep_{k}_1", h)
                h = np.concatenate([h, plane], -1)
                index = self.conv(f"g_ep_{k}_index", h).clip(0, 63)[colour]
                mean = self.conv(f"g_ep_{k}_mean", h).clip(-4095, 4095)[colour]
                found = symbols_of(k, first, colour, index, mean)
                symbols[colour], indexes[colour], means[colour] = found, index, mean
                y_hat[colour] = 16 * found + mean
            known.append(self.requantised(y_hat, k))
            fields.append((y_hat, symbols, indexes, means))
            first += channels
        return [np.concatenate(parts, -1) for parts in zip(*fields, strict=True)]

    def requantised(self, y_hat, k):
        step = 2 ** self.config.context_shifts[k]
        return ((y_hat + step // 2) // step).clip(-128, 127)

    def symbols(self, y_scaled, z, level, size):
        """z, y, indexes and means of an image, from its cropped latents."""

        def rounded(x):
            return np.rint(x).clip(-(2**15), 2**15).astype(np.int64)

        def symbols_of(k, first, colour, index, mean):
            y = y_scaled[..., first : first + self.config.groups[k]][colour]
            return rounded(y - mean.astype(np.float32) / np.float32(16))

        z_hat = rounded(z)
        _, *fields = self.walk(self.psi(z_hat, level, size), level, symbols_of)
        return z_hat, *fields

    def decode(self, payload, level, size, y_tables, z_tables):
        """y_hat in 1/16 steps."""
        decoder = SymbolDecoder(payload)
        channels = self.config.hyper_channels
        shape = (-(-size[0] // 64), -(-size[1] // 64), channels)
        z_hat = decoder.pop(np.arange(np.prod(shape)) % channels, z_tables)

        def symbols_of(k, first, colour, index, mean):
            return decoder.pop(index.ravel(), y_tables).reshape(index.shape)

        psi = self.psi(z_hat.reshape(shape), level, size)
        y_hat, *_ = self.walk(psi, level, symbols_of)
        decoder.finish()
        return y_hat


def latents(config, seed, spread=20.0, grid=GRID):
    """y_scaled and z on the padded grid: noise also where no image is."""
    rng = np.random.default_rng(seed)
    y = rng.standard_normal((*grid, config.latent_channels)) * spread
    z = rng.standard_normal((grid[0] // 4, grid[1] // 4, config.hyper_channels)) * 3
    return y.astype(np.float32), z.astype(np.float32)


def cropped(array, size, stride):
    return array[: -(-size[0] // stride), : -(-size[1] // stride)]


def assert_equals_reference(model, integers, y, z, level, size):
    """Encoder, decoder and reference agree in everything; returns the symbols."""
    reference = Reference(model.config, integers)
    found = model.symbols(jnp.asarray(y), jnp.asarray(z), level, size)
    y_inside, z_inside = cropped(y, size, 16), cropped(z, size, 64)
    wanted = reference.symbols(y_inside, z_inside, level, size)
    for array, stride, expected in zip(found, (64, 16, 16, 16), wanted, strict=True):
        np.testing.assert_array_equal(cropped(array, size, stride), expected)
    payload = model.encode(found, size)
    decoded = model.decode(payload, level, size, y.shape[:2])
    assert decoded.dtype == np.float32
    _, symbols, _, means = wanted
    np.testing.assert_array_equal(decoded, (16 * symbols + means) / 16)
    by_reference = reference.decode(
        payload, level, size, model.y_tables, model.z_tables
    )
    np.testing.assert_array_equal(16 * decoded, by_reference)
    return found


@pytest.fixture(scope="module")
def tiny(tiny_file):
    return IntegerEntropyModel(
        tiny_file.config, tiny_file.integers, tiny_file.y_tables, tiny_file.z_tables
    )


def with_integers(tiny_file, config, integers):
    """A model of these networks; `config` keeps the channels of z."""
    return IntegerEntropyModel(config, integers, tiny_file.y_tables, tiny_file.z_tables)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("level", [0, 131, 255])
def test_a_model_equals_the_reference(tiny, tiny_file, size, level):
    y, z = latents(tiny.config, level)
    symbols = assert_equals_reference(tiny, tiny_file.integers, y, z, level, size)
    if size == SIZES[1]:  # the test would see a silent network
        assert len(np.unique(symbols.indexes)) > 10
        assert len(np.unique(symbols.mean_steps)) > 30


@pytest.mark.parametrize("saturated", [False, True], ids=["random", "saturated"])
def test_any_integers_equal_the_reference(tiny, tiny_file, saturated):
    for seed in range(4):
        integers = random_integers(tiny.config, seed, saturated=saturated)
        model = with_integers(tiny_file, tiny.config, integers)
        spread = [1.0, 100.0, 3e4, 1e9][seed]
        y, z = latents(tiny.config, seed, spread)
        z = z * np.float32(10.0**seed)
        assert_equals_reference(model, integers, y, z, 85 * seed, SIZES[2])


@pytest.fixture(scope="module")
def wide_config(tiny_config):
    """So wide that the bound on sums, not that on weights, limits the shifts."""
    return dataclasses.replace(
        tiny_config,
        latent_channels=66,
        groups=(66,),
        psi_channels=72,
        context_channels=4,
        hidden_channels=4,
        context_shifts=(0,),
    )


@pytest.fixture(scope="module")
def wide_params(wide_config):
    """Float parameters with all weights of a channel equally large."""
    rng = np.random.default_rng(0)
    params = {}
    for name, spec in entropy_model(wide_config, "exact").layer_specs().items():
        shape = (spec.kernel, spec.kernel, spec.inputs, spec.features)
        size = np.exp(rng.uniform(-3, 0, spec.features)) / np.sqrt(np.prod(shape[:3]))
        kernel = size * rng.choice([-1, 1], shape) * rng.uniform(0.9, 1, shape)
        bias = rng.uniform(0, 2, spec.features)
        params[name] = {"kernel": kernel, "bias": bias}
    return jax.tree.map(partial(np.asarray, dtype=np.float32), params)


def test_sums_at_the_bound_equal_the_reference(tiny_file, wide_config):
    """576 and more equal weights: sums just below 2**24, where float32 ends."""
    integers = random_integers(wide_config, saturated=True)
    sums = np.abs(integers["h_s_1"]["kernel"].astype(int)).sum((0, 1, 2)) * 255
    assert (2**24 - sums < 2**18).all()
    model = with_integers(tiny_file, wide_config, integers)
    y, z = latents(wide_config, 0, 300.0, (4, 4))
    assert_equals_reference(model, integers, y, 100 * z, 255, (64, 40))


@pytest.mark.parametrize("signed", [0, 5, 65])
def test_both_convolutions_are_exact(signed):
    """int8 on CPU, shifted dot products elsewhere, at the largest sums."""
    rng = np.random.default_rng(signed)
    largest = (2**24 - 1) // (255 * 9 * 65)
    kernel = largest * rng.choice([-1, 1], (3, 3, 65, 8)).astype(np.int8)
    kernel[..., 0] = largest
    x = rng.choice([0, 1, 254, 255], (1, 6, 6, 65))
    x[..., :signed] = rng.choice([-128, -127, 126, 127], (1, 6, 6, signed))
    x[0, :3, :3] = np.where(np.arange(65) < signed, 127, 255)
    windows = np.lib.stride_tricks.sliding_window_view(x[0], (3, 3), (0, 1))
    wanted = np.einsum("hwcij,ijco->hwo", windows, kernel.astype(np.int64))
    padded = jnp.asarray(x, jnp.int32)
    kernel = jnp.asarray(kernel)
    for found in (
        jax.jit(partial(context._int8_conv, signed=signed))(padded, kernel),
        jax.jit(context._shifted_dot)(padded, kernel),
    ):
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found[0], wanted)


def test_a_model_on_an_accelerator_equals_the_reference_and_the_cpu(
    tiny, tiny_file, monkeypatch
):
    """The branch of other platforms, through the whole model."""
    size, level = SIZES[2], 190
    y, z = latents(tiny.config, 11)
    on_cpu = tiny.symbols(jnp.asarray(y), jnp.asarray(z), level, size)
    payload = tiny.encode(on_cpu, size)
    shapes = []

    def elsewhere(padded, kernel, *, cpu, default):
        shapes.append(kernel.shape)
        return default(padded, kernel)

    monkeypatch.setattr(context.lax, "platform_dependent", elsewhere)
    # Programs are kept for each default precision: none of these was made for the CPU.
    with jax.default_matmul_precision("bfloat16"):
        found = assert_equals_reference(tiny, tiny_file.integers, y, z, level, size)
        assert tiny.encode(found, size) == payload
    kernels = {layer["kernel"].shape for layer in tiny_file.integers.values()}
    assert set(shapes) == kernels
    for array, other in zip(found, on_cpu, strict=True):
        np.testing.assert_array_equal(array, other)


@functools.cache
def rounded_walker(config, arithmetic):
    """Function (params, y, z, level, size) -> z_hat and, by pass, symbols, indexes and
    means of the `fake` or the `twin` arithmetic."""
    network = entropy_model(config, arithmetic)

    @jax.jit
    def walk(params, y, z, level, size):
        masks = image_masks(size[None], y.shape[:2])
        variables, quality = {"params": params}, level[None].astype(jnp.float32)
        z_hat = jnp.round(z)[None]
        psi = network.apply(variables, z_hat, quality, masks, method="hyper_synthesis")
        fields = {}

        def parameters(pass_, y_hat):
            return network.apply(
                variables, pass_, psi, y_hat, quality, masks, method="parameters"
            )

        def visit(pass_, index, mean):
            symbol = jnp.round(y[None, ..., pass_.start : pass_.stop] - mean / 16)
            fields[pass_] = (symbol, index, mean)
            return symbol * 16 + mean

        traverse(config.groups, y.shape[:2], parameters, visit)
        return z_hat[0], fields

    return walk


def rounded_walk(config, arithmetic, params, y, z, level, size):
    """z_hat, symbols, index and mean of the `fake` or the `twin` arithmetic."""
    walk = rounded_walker(config, arithmetic)
    z_hat, fields = walk(params, y, z, np.int32(level), np.array(size))
    out = np.zeros((3, *y.shape), np.float32)
    rows, columns = np.mgrid[: y.shape[0], : y.shape[1]]
    for pass_, values in fields.items():
        colour = (rows + columns) % 2 == pass_.parity
        for field, array in zip(out, values, strict=True):
            field[..., pass_.start : pass_.stop][colour] = array[0][colour]
    return z_hat, *out


def assert_equals_exact(model, arithmetic, params, y, z, level, size):
    found = rounded_walk(model.config, arithmetic, params, y, z, level, size)
    wanted = model.symbols(jnp.asarray(y), jnp.asarray(z), level, size)
    for rounded, exact, stride in zip(found, wanted, (64, 16, 16, 16), strict=True):
        np.testing.assert_array_equal(
            cropped(rounded, size, stride), cropped(exact, size, stride)
        )


def test_fake_quantisation_equals_the_integers(tiny, tiny_params, tiny_file):
    """What the training sees of the trained parameters, and of the twin."""
    y, z = latents(tiny.config, 5)
    twin = float_twin(tiny_file.integers, tiny.config)
    for arithmetic, params in (("fake", tiny_params["entropy"]), ("twin", twin)):
        assert_equals_exact(tiny, arithmetic, params, y, z, 200, SIZES[2])


def test_float_twin_gives_the_integers_back(tiny_file, tiny_config):
    twin = float_twin(tiny_file.integers, tiny_config)
    again = export_integers(twin, tiny_config)
    for name, layer in tiny_file.integers.items():
        for part, array in layer.items():
            np.testing.assert_array_equal(again[name][part], array, f"{name}/{part}")


def test_float_twin_where_the_bound_on_sums_limits(tiny_file, wide_config, wide_params):
    integers = export_integers(wide_params, wide_config)
    largest = np.abs(integers["h_s_1"]["kernel"].astype(int)).max((0, 1, 2))
    assert (largest < 64).any()  # a bit more would fit, but for the sum
    model = with_integers(tiny_file, wide_config, integers)
    y, z = latents(wide_config, 1, grid=(4, 4))
    twin = float_twin(integers, wide_config)
    for arithmetic, params in (("fake", wide_params), ("fake", twin), ("twin", twin)):
        assert_equals_exact(model, arithmetic, params, y, z, 60, (64, 40))


def broken(tree, name, part, change):
    layer = {key: array.copy() for key, array in tree[name].items()}
    layer[part] = change(layer[part])
    return {**tree, name: layer}


def put(value):
    def change(array):
        array[(0,) * array.ndim] = value
        return array

    return change


@pytest.mark.parametrize(
    "name, part, change, message",
    [
        ("g_ep_1_0", "kernel", put(-128), "weights within .* found 128"),
        ("g_ep_1_0", "kernel", lambda a: a[..., :-1], "g_ep_1_0/kernel"),
        ("g_ep_1_0", "kernel", lambda a: a.astype(np.int16), "g_ep_1_0/kernel as int8"),
        ("g_ep_1_0", "bias", lambda a: a.astype(np.float32), "g_ep_1_0/bias as int32"),
        ("g_ep_1_0", "bias", put(2**31 - 1), "within int32 in g_ep_1_0"),
        ("g_ep_1_0", "bias", put(-(2**31)), "within int32 in g_ep_1_0"),
        ("g_ep_1_0", "shift", put(0), r"1 to 14 in g_ep_1_0, found 0"),
        ("g_ep_1_0", "shift", put(15), r"1 to 14 in g_ep_1_0, found .*15"),
        ("g_ep_1_index", "shift", put(17), r"1 to 16 in g_ep_1_index"),
        ("g_ep_1_0", "scale", None, "g_ep_1_0"),
    ],
)
def test_broken_layers_are_refused(tiny_file, name, part, change, message):
    tree = tiny_file.integers
    if change is None:
        tree = {**tree, name: {**tree[name], part: tree[name]["bias"]}}
    else:
        tree = broken(tree, name, part, change)
    with pytest.raises(ValueError, match=message):
        prove_exact(tree, tiny_file.config)
    with pytest.raises(ValueError, match=message):
        with_integers(tiny_file, tiny_file.config, tree)


def test_missing_and_additional_layers_are_refused(tiny_file):
    tree = dict(tiny_file.integers)
    layer = tree.pop("h_s_1")
    with pytest.raises(ValueError, match="h_s_1"):
        prove_exact(tree, tiny_file.config)
    with pytest.raises(ValueError, match="h_s_9"):
        prove_exact({**tiny_file.integers, "h_s_9": layer}, tiny_file.config)


def test_sums_beyond_float32_are_refused(wide_config):
    tree = random_integers(wide_config, saturated=True)
    prove_exact(tree, wide_config)
    with pytest.raises(ValueError, match=r"below 2\*\*24 in h_s_1, found up to"):
        prove_exact(
            broken(tree, "h_s_1", "kernel", lambda a: np.full_like(a, 127)), wide_config
        )


def test_the_proof_takes_little_memory(tiny_config):
    """A file may be small and its kernels not."""
    config = dataclasses.replace(tiny_config, psi_channels=512)
    tree = random_integers(config, saturated=True)
    kernel_bytes = tree["h_s_1"]["kernel"].nbytes
    assert kernel_bytes > 2**23
    tracemalloc.start()
    prove_exact(tree, config)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 5 * kernel_bytes  # of two layers, as int16


@pytest.mark.parametrize(
    "part, value, message",
    [
        ("kernel", np.nan, "h_s_1/kernel"),
        ("kernel", np.inf, "h_s_1/kernel"),
        ("kernel", 100.0, "h_s_1/kernel within .*127 steps, found 200"),
        ("kernel", -3e38, "h_s_1/kernel"),
        ("bias", np.nan, "h_s_1/bias"),
        ("bias", 1e9, "h_s_1/bias"),
    ],
)
def test_parameters_that_fit_no_integer_are_not_exported(
    tiny_params, tiny_config, part, value, message
):
    tree = broken(tiny_params["entropy"], "h_s_1", part, put(value))
    with pytest.raises(ValueError, match=message):
        export_integers(tree, tiny_config)


def test_results_do_not_depend_on_the_padding(tiny):
    size, level = (100, 50), 77
    y, z = latents(tiny.config, 3)
    symbols = tiny.symbols(jnp.asarray(y), jnp.asarray(z), level, size)
    payload = tiny.encode(symbols, size)
    small_grid = tiny.decode(payload, level, size, (8, 4))
    np.testing.assert_array_equal(tiny.decode(payload, level, size, GRID), small_grid)
    y2, z2 = (np.full_like(a, 99) for a in (y, z))
    y2[:7, :4], z2[:2, :1] = y[:7, :4], z[:2, :1]
    other = tiny.symbols(jnp.asarray(y2), jnp.asarray(z2), level, size)
    assert tiny.encode(other, size) == payload


def test_ideal_bits_are_what_the_stream_takes(tiny):
    size = (128, 190)
    y, z = latents(tiny.config, 4)
    symbols = tiny.symbols(jnp.asarray(y), jnp.asarray(z), 10, size)
    bits = tiny.ideal_bits(symbols, size)
    assert bits < 8 * len(tiny.encode(symbols, size)) < bits + 40


def test_without_jit(tiny_file):
    """A smaller model: here each operation is compiled by itself."""
    config = dataclasses.replace(
        tiny_file.config, latent_channels=4, groups=(4,), context_shifts=(2,)
    )
    model = with_integers(tiny_file, config, random_integers(config))
    size, level = (33, 20), 140
    y, z = (jnp.asarray(a) for a in latents(config, 6, grid=(4, 4)))
    symbols = model.symbols(y, z, level, size)
    payload = model.encode(symbols, size)
    y_hat = model.decode(payload, level, size, (4, 4))
    with jax.disable_jit():
        np.testing.assert_array_equal(model.decode(payload, level, size, (4, 4)), y_hat)


def test_payloads_of_another_level_or_size_are_refused(tiny):
    """The networks choose other tables, so the stream does not end where it must."""
    size, level = (64, 64), 100
    y, z = latents(tiny.config, 7)
    symbols = tiny.symbols(jnp.asarray(y), jnp.asarray(z), level, size)
    payload = tiny.encode(symbols, size)
    tiny.decode(payload, level, size, GRID)
    for other_level, other_size in ((220, size), (level, (64, 40)), (level, (48, 64))):
        with pytest.raises(BitstreamError):
            tiny.decode(payload, other_level, other_size, GRID)


def test_a_stream_that_ends_early_is_refused_early(tiny, monkeypatch):
    """A short file that claims a large image costs neither memory nor time."""

    def refuse(*_):
        raise AssertionError("the networks ran")

    monkeypatch.setattr("semlic_jax.coding.integer_networks._psi", refuse)
    for payload in (b"", b"\x01", b"\xde\xc0", bytes(range(1, 30))):
        with pytest.raises(BitstreamError, match="the end of the payload"):
            tiny.decode(payload, 9, (16384, 16384), (1024, 1024))
