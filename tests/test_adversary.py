# SPDX-License-Identifier: Apache-2.0
"""The labeller and the discriminator against the reference's sizes and plain NumPy."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semlic_jax.objectives.adversary import (
    CrossCovarianceAttention,
    Discriminator,
    Labeller,
    code_frequencies,
    diversity_loss,
    perplexity,
    reseed_dead_codes,
    upsample,
)

SMALL_DISCRIMINATOR = dict(
    classes=3, widths=(3, 3), up_widths=(3,), context_channels=2, patch=4
)
SMALL_LABELLER = dict(
    widths=(4, 6), blocks=1, attention=False, patch=4, code_count=5, code_channels=3
)


pytestmark = pytest.mark.usefixtures("quick_to_compile")


def count(tree) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def shapes_of(module, *inputs):
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in inputs]
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def randomised(tree, seed=0):
    """The same tree with every leaf random, also those that start at 0 or 1."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(0.3, 0.3, leaf.shape).astype(np.float32), tree
    )


def test_the_full_labeller_has_the_references_parameters():
    params = shapes_of(Labeller(), (1, 64, 64, 3))
    assert count(params["encoder"]) == 7_443_523
    assert count(params["decoder"]) == 10_660_103
    assert count(params) == 18_116_178


def test_the_full_discriminator_has_the_references_parameters():
    params = shapes_of(Discriminator(), (1, 64, 64, 3), (1, 4, 4, 220))
    assert count(params["context"]) == 31_696
    assert count(params) == 17_877_073


@pytest.mark.parametrize("side", [64, 128])
def test_grids_are_an_eighth(side):
    labeller = Labeller(**SMALL_LABELLER)
    assert labeller.stride == 8
    image = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    made, _ = jax.eval_shape(labeller.init_with_output, jax.random.key(0), image)
    assert made.codes.shape == (2, side // 8, side // 8)
    assert made.codes.dtype == jnp.int32
    assert made.x_hat.shape == image.shape
    discriminator = Discriminator()
    assert discriminator.stride == 8
    y_hat = jax.ShapeDtypeStruct((2, side // 16, side // 16, 220), jnp.float32)
    logits, _ = jax.eval_shape(
        discriminator.init_with_output, jax.random.key(0), image, y_hat
    )
    assert logits.shape == (2, side // 8, side // 8, 1025)


def test_attention_against_numpy():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 6)).astype(np.float32)
    module = CrossCovarianceAttention()
    params = randomised(shapes_of(module, x.shape))
    norm, qkv, out = params["ChannelNorm_0"], params["qkv"], params["projection"]
    expected = []
    for image in x.astype(np.float64):
        tokens = image.reshape(12, 6)
        deviation = tokens - tokens.mean(1, keepdims=True)
        variance = (deviation**2).sum(1, keepdims=True) / 5
        h = deviation / np.sqrt(variance + 1e-3) * norm["gamma"] + norm["beta"]
        h = h @ qkv["kernel"] + qkv["bias"]
        q, k, v = h[:, :6].T, h[:, 6:12].T, h[:, 12:].T  # channels x tokens
        q /= np.linalg.norm(q, axis=1, keepdims=True)
        k /= np.linalg.norm(k, axis=1, keepdims=True)
        scores = np.exp(params["temperature"] * q @ k.T)
        h = (scores / scores.sum(1, keepdims=True) @ v).T
        expected.append((tokens + h @ out["kernel"] + out["bias"]).reshape(3, 4, 6))
    found = jax.jit(module.apply)({"params": params}, x)
    np.testing.assert_allclose(found, np.stack(expected), rtol=2e-4, atol=2e-4)


def test_codes_are_the_nearest_and_losses_move_one_side_each():
    labeller = Labeller(**SMALL_LABELLER)
    rng = np.random.default_rng(1)
    images = rng.uniform(size=(2, 16, 16, 3)).astype(np.float32)
    params = jax.tree.map(
        np.array, jax.jit(labeller.init)(jax.random.key(3), images)["params"]
    )

    @jax.jit
    def run(params):
        return labeller.apply({"params": params}, images)

    made = run(params)
    book = params["codebook"] / np.linalg.norm(
        params["codebook"], axis=1, keepdims=True
    )
    flat = np.asarray(made.embeddings).reshape(-1, 3)
    np.testing.assert_allclose(np.linalg.norm(flat, axis=1), 1, rtol=1e-5)
    distance = ((flat[:, None] - book[None]) ** 2).sum(-1)
    np.testing.assert_array_equal(np.asarray(made.codes).ravel(), distance.argmin(1))
    assert float(made.commitment) == pytest.approx(distance.min(1).mean() / 3, rel=1e-4)
    labels = jax.jit(partial(labeller.apply, method="labels"))(
        {"params": params}, images
    )
    np.testing.assert_array_equal(labels, made.codes)

    commitment, embedding, picture = (
        jax.jit(jax.grad(lambda p, part=part: part(run(p))))(params)
        for part in (
            lambda made: made.commitment,
            lambda made: made.embedding,
            lambda made: jnp.sum(jnp.sin(made.x_hat)),
        )
    )
    assert not np.any(commitment["codebook"]) and not np.any(picture["codebook"])
    assert np.any(embedding["codebook"])
    assert np.any(commitment["to_code"]["kernel"])
    assert not np.any(embedding["to_code"]["kernel"])
    # Straight through: the picture's gradient reaches the encoder.
    assert np.any(picture["to_code"]["kernel"])


def test_perplexity_counts_codes_in_use():
    codes = jnp.asarray([[0, 1], [3, 3]])
    frequencies = code_frequencies(codes, 6)
    np.testing.assert_allclose(frequencies, [0.25, 0.25, 0, 0.5, 0, 0])
    entropy = -(0.5 * np.log(0.25) + 0.5 * np.log(0.5))
    assert float(perplexity(frequencies)) == pytest.approx(np.exp(entropy), rel=1e-5)
    assert float(perplexity(jnp.full(6, 1 / 6))) == pytest.approx(6, rel=1e-5)


def test_diversity_is_0_at_even_use_and_grows_with_collapse():
    codebook = np.eye(3, dtype=np.float32)
    even = diversity_loss(np.eye(3, dtype=np.float32), codebook, 0.1)
    assert float(even) == pytest.approx(0, abs=1e-5)
    collapsed = diversity_loss(np.tile(codebook[:1], (3, 1)), codebook, 0.1)
    p = np.exp(np.array([10.0, 0, 0])) / (np.exp(10.0) + 2)
    expected = np.log(3) + (p * np.log(p)).sum()
    assert float(collapsed) == pytest.approx(expected, rel=1e-4)


def test_dead_codes_move_onto_embeddings_and_live_ones_stay():
    rng = np.random.default_rng(2)
    codebook = rng.normal(size=(4, 3)).astype(np.float32)
    embeddings = rng.normal(size=(2, 2, 5, 3)).astype(np.float32)
    usage = jnp.asarray([0.5, 0.001, 0.3, 0.024])
    moved, new_usage, dead = reseed_dead_codes(
        codebook, usage, embeddings, jax.random.key(0), threshold=0.1
    )
    np.testing.assert_array_equal(dead, [False, True, False, True])
    np.testing.assert_array_equal(moved[::2], codebook[::2])
    flat = embeddings.reshape(-1, 3)
    for row in np.asarray(moved)[1::2]:
        assert (flat == row).all(1).any()
    np.testing.assert_allclose(new_usage, [0.5, 0.25, 0.3, 0.25])


def conv(x, layer, pad):
    """NumPy: symmetric padding, stride 1, one image."""
    kernel, size = layer["kernel"], layer["kernel"].shape[0]
    x = np.pad(x, ((pad, pad), (pad, pad), (0, 0)))
    rows, columns = x.shape[0] - size + 1, x.shape[1] - size + 1
    out = np.zeros((rows, columns, kernel.shape[-1])) + layer["bias"]
    for i in range(size):
        for j in range(size):
            out += x[i : i + rows, j : j + columns] @ kernel[i, j]
    return out


def lrelu(x):
    return np.where(x > 0, x, 0.2 * x)


def pool(x):
    return x.reshape(x.shape[0] // 2, 2, x.shape[1] // 2, 2, -1).mean((1, 3))


def twice(x):
    return x.repeat(2, 0).repeat(2, 1)


@pytest.mark.parametrize("preactivated", [True, False])
@pytest.mark.parametrize("lateral", [True, False])
def test_discriminator_against_numpy(preactivated, lateral):
    module = Discriminator(
        classes=4,
        widths=(5, 5, 6),
        up_widths=(5, 6),
        context_channels=2,
        patch=4,
        preactivated_shortcut=preactivated,
        lateral_skips=lateral,
    )
    assert (module.stride, module.multiple) == (8, 32)
    rng = np.random.default_rng(4)
    image = rng.normal(0.5, 0.5, (1, 64, 32, 3)).astype(np.float32)
    y_hat = rng.normal(0, 2, (1, 4, 2, 7)).astype(np.float32)
    params = randomised(shapes_of(module, image.shape, y_hat.shape))
    found = jax.jit(module.apply)({"params": params}, image, y_hat)

    def residual(x, block, name, leading):
        a = lrelu(x) if leading else x
        shortcut = a if preactivated else x
        if name == "up":
            a, shortcut = twice(a), twice(shortcut)
        h = conv(lrelu(conv(a, block["Conv_0"], 1)), block["Conv_1"], 1)
        if "shortcut" in block:
            shortcut = conv(shortcut, block["shortcut"], 0)
        h = h + shortcut
        return pool(h) if name == "down" else h

    context = np.pad(y_hat[0], ((1, 1), (1, 1), (0, 0)), "reflect")
    context = lrelu(conv(context, params["context"], 0))
    blocks = image[0].reshape(16, 4, 8, 4, 3).transpose(0, 2, 1, 3, 4)
    h = np.concatenate([blocks.reshape(16, 8, 48), twice(twice(context))], -1)
    maps = []
    for level in range(3):
        h = residual(h, params[f"down_{level}"], "down", level > 0)
        maps.append(h)
    for level in (1, 0):
        h = residual(h, params[f"up_{level}"], "up", True)
        if lateral:
            h = np.concatenate([h, maps[level]], -1)
    expected = conv(h, params["head"], 0)
    np.testing.assert_allclose(found[0], expected, rtol=2e-4, atol=2e-3)


def test_no_gradient_reaches_the_latents():
    module = Discriminator(
        classes=3, widths=(3, 3), up_widths=(3,), context_channels=2, patch=4
    )
    image, y_hat = jnp.ones((1, 32, 32, 3)), jnp.ones((1, 2, 2, 4))
    params = randomised(shapes_of(module, image.shape, y_hat.shape))

    def total(image, y_hat):
        return jnp.sum(module.apply({"params": params}, image, y_hat) ** 2)

    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))
    to_image, to_latents = gradients(image, y_hat)
    assert np.any(to_image) and not np.any(to_latents)
    # And yet they are seen.
    assert float(total(image, y_hat)) != float(total(image, 2 * y_hat))


def test_sides_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="multiples of 8, found 20x16"):
        shapes_of(Labeller(**SMALL_LABELLER), (1, 16, 20, 3))
    with pytest.raises(ValueError, match="multiples of 64, found 96x64"):
        shapes_of(Discriminator(), (1, 64, 96, 3), (1, 4, 6, 220))


def test_upsampling_repeats():
    x = np.arange(6.0).reshape(1, 2, 3, 1)
    np.testing.assert_array_equal(upsample(x)[0, :, :, 0], twice(x[0])[..., 0])


def balanced(tree, seed=0):
    """The same tree with random leaves that let every layer count in the result."""
    rng = np.random.default_rng(seed)

    def numbers(leaf):
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 4
        return (rng.normal(size=leaf.shape) * fan_in**-0.5).astype(np.float32)

    return jax.tree.map(numbers, tree)


def test_labeller_against_numpy():
    """Two levels of the encoder and of the decoder, with attention at the coarser."""
    module = Labeller(widths=(4, 6), blocks=1, patch=2, code_count=5, code_channels=3)
    image = np.random.default_rng(6).random((1, 8, 12, 3)).astype(np.float32)
    params = balanced(shapes_of(module, image.shape))
    found = jax.jit(module.apply)({"params": params}, image)

    def norm(x, layer):
        deviation = x - x.mean(-1, keepdims=True)
        variance = (deviation**2).sum(-1, keepdims=True) / (x.shape[-1] - 1)
        return deviation / np.sqrt(variance + 1e-3) * layer["gamma"] + layer["beta"]

    def swish(x, layer):
        x = norm(x, layer)
        return x / (1 + np.exp(-x))

    def block(x, layers):
        h = conv(swish(x, layers["ChannelNorm_0"]), layers["Conv_0"], 1)
        h = conv(swish(h, layers["ChannelNorm_1"]), layers["Conv_1"], 1)
        return h + (conv(x, layers["shortcut"], 0) if "shortcut" in layers else x)

    attend = CrossCovarianceAttention()

    def attended(x, layers):
        return np.asarray(attend.apply({"params": layers}, jnp.asarray(x[None])))[0]

    def middle(h, layers):
        h = attended(block(h, layers["middle_0"]), layers["middle_attention"])
        return block(h, layers["middle_1"])

    layers = params["encoder"]
    blocks = image[0].reshape(4, 2, 6, 2, 3).transpose(0, 2, 1, 3, 4)
    h = conv(blocks.reshape(4, 6, 12), layers["Conv_0"], 1)
    h = block(h, layers["_SwishBlock_0"])
    # As in VQGAN: a stride of 2 with a row and a column of zeros at the end alone.
    h = np.pad(h, ((0, 1), (0, 1), (0, 0)))
    h = conv(h, layers["Conv_1"], 0)[::2, ::2]
    h = block(h, layers["_SwishBlock_1"])
    h = middle(attended(h, layers["CrossCovarianceAttention_0"]), layers)
    h = conv(swish(h, layers["ChannelNorm_0"]), layers["Conv_2"], 1)
    h = conv(h, params["to_code"], 0)
    h /= np.linalg.norm(h, axis=-1, keepdims=True)
    np.testing.assert_allclose(found.embeddings[0], h, atol=1e-3)

    layers = params["decoder"]
    book = params["codebook"]
    book = book / np.linalg.norm(book, axis=1, keepdims=True)
    h = conv(book[np.asarray(found.codes)[0]], params["from_code"], 0)
    h = middle(conv(h, layers["Conv_0"], 1), layers)
    for number in (0, 1):  # one more than in the encoder
        h = block(h, layers[f"_SwishBlock_{number}"])
        h = attended(h, layers[f"CrossCovarianceAttention_{number}"])
    h = conv(twice(h), layers["Conv_1"], 1)
    h = block(block(h, layers["_SwishBlock_2"]), layers["_SwishBlock_3"])
    h = conv(swish(h, layers["ChannelNorm_0"]), layers["Conv_2"], 1)
    x_hat = h.reshape(4, 6, 2, 2, 3).transpose(0, 2, 1, 3, 4).reshape(8, 12, 3)
    assert np.std(x_hat) > 0.1
    np.testing.assert_allclose(found.x_hat[0], x_hat, rtol=0, atol=1e-3)


def test_what_a_discriminator_sees_beside_the_image_against_numpy():
    """Latents on a log scale, and taps of a grid as fine and of one half as fine."""
    module = Discriminator(
        classes=4,
        widths=(5, 5),
        up_widths=(5,),
        context_channels=2,
        context_log=True,
        patch=4,
        feature_channels=3,
        mix_widths=(6,),
    )
    rng = np.random.default_rng(7)
    image = rng.normal(0.5, 0.5, (1, 32, 32, 3)).astype(np.float32)
    y_hat = rng.normal(0, 30, (1, 2, 2, 7)).astype(np.float32)
    taps = [
        rng.normal(size=(1, n, n, c)).astype(np.float32) for n, c in ((4, 6), (2, 5))
    ]
    shapes = jax.eval_shape(module.init, jax.random.key(0), image, y_hat, taps)
    params = balanced(shapes["params"])
    found = jax.jit(module.apply)({"params": params}, image, y_hat, taps)

    def residual(x, layers, leading):
        a = lrelu(x) if leading else x
        h = conv(lrelu(conv(a, layers["Conv_0"], 1)), layers["Conv_1"], 1)
        return h, conv(a, layers["shortcut"], 0) if "shortcut" in layers else a

    context = np.sign(y_hat[0]) * np.log(1 + np.abs(y_hat[0]))
    context = np.pad(context, ((1, 1), (1, 1), (0, 0)), "reflect")
    context = lrelu(conv(context, params["context"], 0))
    blocks = image[0].reshape(8, 4, 8, 4, 3).transpose(0, 2, 1, 3, 4)
    h = np.concatenate([blocks.reshape(8, 8, 48), twice(twice(context))], -1)
    for level in range(2):
        h = pool(sum(residual(h, params[f"down_{level}"], level > 0)))
    h = sum(residual(twice(h), params["up_0"], True))
    seen = [lrelu(h)]
    for index, tap in enumerate(taps):
        unit = tap[0] / np.linalg.norm(tap[0], axis=-1, keepdims=True)
        seen.append(conv(4 * unit, params[f"tap_{index}"], 0))
    # From 2 x 2 to 4 x 4, linearly between the centres of cells.
    lines = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    seen[2] = np.einsum("ia,jb,abc->ijc", lines, lines, seen[2])
    h = lrelu(conv(np.concatenate(seen, -1), params["mix_0"], 1))
    expected = conv(h, params["head"], 0)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-3)


def test_networks_of_bfloat16_give_float32():
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    y_hat = jax.ShapeDtypeStruct((1, 2, 2, 4), jnp.float32)
    key = jax.random.key(0)
    labeller = Labeller(**SMALL_LABELLER, dtype=jnp.bfloat16)
    made, params = jax.eval_shape(labeller.init_with_output, key, image)
    assert {array.dtype for array in made} == {jnp.dtype("float32"), jnp.dtype("int32")}
    module = Discriminator(**SMALL_DISCRIMINATOR, dtype=jnp.bfloat16)
    logits, more = jax.eval_shape(module.init_with_output, key, image, y_hat)
    assert logits.dtype == jnp.float32
    for leaf in jax.tree.leaves((params, more)):
        assert leaf.dtype == jnp.float32


def test_a_diversity_loss_sees_directions_alone():
    rng = np.random.default_rng(8)
    embeddings = rng.normal(size=(2, 3, 4)).astype(np.float32)
    codebook = rng.normal(size=(5, 4)).astype(np.float32)
    lengths = np.linspace(0.1, 9, 5, dtype=np.float32)[:, None]
    found = [
        diversity_loss(embeddings, book, 0.5) for book in (codebook, lengths * codebook)
    ]
    np.testing.assert_allclose(*found, rtol=1e-4)


def test_recomputing_the_levels_changes_no_number():
    """Nor the names and shapes of the parameters."""
    module, frugal = (
        Discriminator(**SMALL_DISCRIMINATOR, remat=remat) for remat in (False, True)
    )
    rng = np.random.default_rng(9)
    image = rng.random((1, 32, 32, 3)).astype(np.float32)
    y_hat = rng.normal(size=(1, 2, 2, 4)).astype(np.float32)
    params = randomised(shapes_of(module, image.shape, y_hat.shape))
    assert shapes_of(frugal, image.shape, y_hat.shape) == shapes_of(
        module, image.shape, y_hat.shape
    )

    def gradient(module):
        def loss(params):
            return jnp.sum(jnp.sin(module.apply({"params": params}, image, y_hat)))

        return jax.jit(jax.grad(loss))(params)

    for ours, theirs in zip(
        *map(jax.tree.leaves, map(gradient, (module, frugal))), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
