# SPDX-License-Identifier: Apache-2.0
"""The PyTorch side of the benchmark runs the same networks."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from semlic_jax.model.compression import (  # noqa: E402
    SIZES,
    CompressionModel,
    entropy_model,
)
from semlic_jax.objectives.features import SqueezeNet, feature_distance  # noqa: E402
from semlic_jax.training.torch_twin import (  # noqa: E402
    Twin,
    convert,
    make_step,
    squeezenet_distance,
)

VARIANTS = [
    {},
    dict(linear_skip=False, patch=1, widths=(6, 8, 8, 8, 8)),
    dict(level_blocks=2),
]


def channels_first(x):
    return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2))


def random_params(shapes):
    rng = np.random.default_rng(1)

    def leaf(path, shape):
        name = jax.tree_util.keystr(path)
        centre = 0.9 if "gamma" in name or "scale" in name else 0.05
        return rng.normal(centre, 0.15, shape.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


@pytest.mark.slow
@pytest.mark.parametrize("change", VARIANTS)
def test_the_twin_computes_the_model(change):
    config = dataclasses.replace(
        SIZES["tiny"],
        groups=(4, 8),
        latent_channels=12,
        context_shifts=(4, 2),
        **change,
    )
    model = CompressionModel(config)
    key = jax.random.key(1)
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 64, 128, 3)), jnp.float32)
    quality = jnp.asarray([0.2, 0.8])
    params = random_params(jax.eval_shape(model.init, key, x, quality, key)["params"])
    made = jax.jit(lambda p: model.apply({"params": p}, x, quality, key))(params)
    z_key, y_key = jax.random.split(key)
    z_noise = jax.random.uniform(
        z_key, (2, 1, 2, config.hyper_channels), minval=-0.5, maxval=0.5
    )
    y_noise = jax.random.uniform(y_key, (2, 4, 8, 12), minval=-0.5, maxval=0.5)
    twin = Twin(config, params, entropy_model(config, "float").layer_specs())
    x_hat, y_bits, z_bits = twin.forward(
        channels_first(x),
        torch.tensor(np.asarray(quality)),
        channels_first(z_noise),
        channels_first(y_noise),
    )
    expected = channels_first(made.x_hat).numpy()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(x_hat.detach() / scale, expected / scale, atol=1e-5)
    np.testing.assert_allclose(y_bits.detach(), made.rate.y_bits, rtol=1e-4)
    np.testing.assert_allclose(z_bits.detach(), made.rate.z_bits, rtol=1e-4)


def test_the_trunk_and_a_step():
    rng = np.random.default_rng(2)
    x, x_hat = rng.uniform(size=(2, 2, 64, 64, 3)).astype(np.float32)
    module = SqueezeNet("1.0", taps=("conv1", "fire3"))
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.asarray(x))["params"]
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), shapes
    )

    @jax.jit
    def distance(x, x_hat):
        taps = [module.apply({"params": params}, images) for images in (x, x_hat)]
        return feature_distance(*([tap[n] for n in module.taps] for tap in taps))

    trunk = convert(params, "cpu")
    found = squeezenet_distance(
        trunk, channels_first(x), channels_first(x_hat), module.taps
    )
    np.testing.assert_allclose(found.detach(), distance(x, x_hat), rtol=1e-4)

    config = SIZES["tiny"]
    model = CompressionModel(config)
    key = jax.random.key(0)
    shapes = jax.eval_shape(model.init, key, jnp.asarray(x), jnp.zeros(2), key)
    twin = Twin(
        config,
        random_params(shapes["params"]),
        entropy_model(config, "float").layer_specs(),
    )
    step = make_step(twin, trunk, module.taps, lr=1e-3)
    losses = [float(step(channels_first(x))) for _ in range(6)]
    assert losses[-1] < losses[0]
