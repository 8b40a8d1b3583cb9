# SPDX-License-Identifier: Apache-2.0
"""Every term of the loss against an independent float64 computation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semlic_jax.objectives import losses, similarity, style_losses
from semlic_jax.objectives.features import FeatureNetwork
from semlic_jax.objectives.lattice import lattice
from semlic_jax.objectives.losses import LossWeights, RateTarget
from semlic_jax.objectives.spectrum import spectral_power, spectrum

# Each operation by itself would be compiled for each of many shapes.
structural = jax.jit(losses.structural)
ssim_terms, halve = jax.jit(similarity.ssim_terms), jax.jit(similarity.halve)


class TwoLayers(nn.Module):
    """A trunk small enough to follow by hand: two strided convolutions."""

    taps: tuple[str, ...] = ("first", "second")

    @nn.compact
    def __call__(self, images):
        first = nn.relu(nn.Conv(5, (3, 3), strides=2, name="first")(images))
        second = nn.relu(nn.Conv(7, (3, 3), strides=2, name="second")(first))
        return {"first": first, "second": second}


@pytest.fixture(scope="module")
def network():
    module = TwoLayers()
    images = jnp.zeros((1, 32, 32, 3))
    return FeatureNetwork(module.init(jax.random.key(0), images)["params"], module)


@pytest.fixture(scope="module")
def pair():
    rng = np.random.default_rng(0)
    x = rng.random((2, 32, 40, 3)).astype(np.float32)
    x_hat = np.clip(x + 0.1 * rng.normal(size=x.shape), 0, 1).astype(np.float32)
    return x, x_hat


def maps(network, images):
    return [np.asarray(tap, np.float64) for tap in network.apply(jnp.asarray(images))]


def gram(features):
    """[N, C] to the Gram matrix normalised by C * N."""
    return features.T @ features / features.size


def test_charbonnier_equals_its_equation(pair):
    x, x_hat = pair
    error = x.astype(np.float64) - x_hat
    expected = np.sqrt(error**2 + 1e-6).mean((1, 2, 3))
    np.testing.assert_allclose(losses.charbonnier(x, x_hat), expected, rtol=1e-6)
    np.testing.assert_allclose(losses.charbonnier(x, x), [1e-3, 1e-3], rtol=1e-4)
    gradient = jax.grad(lambda v: losses.charbonnier(x, v).sum())(jnp.asarray(x))
    np.testing.assert_array_equal(gradient, np.zeros_like(x))


def test_lattice_equals_its_equation():
    rng = np.random.default_rng(3)
    x = rng.random((2, 70, 64, 3)).astype(np.float32)
    x_hat = (x + 0.1 * rng.normal(size=x.shape)).astype(np.float32)
    expected = np.zeros(2)
    for image in range(2):
        values = []
        for top in range(0, 64 - 48 + 1, 16):
            for left in range(0, 64 - 48 + 1, 16):
                window = np.s_[image, top : top + 48, left : left + 48]
                real = x[window].astype(np.float64)
                error = (x_hat[window] - real).reshape(3, 16, 3, 16, 3).mean((0, 2))
                error -= error.mean((0, 1))
                variance = real.var((0, 1)).mean()
                values.append((error**2).mean() / (variance + (4 / 255) ** 2))
        expected[image] = np.mean(values)
    np.testing.assert_allclose(lattice(x, x_hat), expected, rtol=1e-4)


def test_lattice_sees_what_repeats_and_little_else():
    rng = np.random.default_rng(4)
    x = np.full((1, 96, 96, 3), 0.5, np.float32)
    cell = rng.normal(size=(16, 16, 3)) / 100
    weave = np.tile(cell - cell.mean((0, 1)), (6, 6, 1)).astype(np.float32)
    grain = (rng.normal(size=x.shape) * weave.std()).astype(np.float32)
    seen = float(lattice(x, x + weave)[0])
    assert seen == pytest.approx(weave.var() / (4 / 255) ** 2, rel=1e-3)
    assert float(lattice(x, x + grain)[0]) < 0.15 * seen
    assert float(lattice(x, x + 0.1)[0]) < 1e-6 * seen
    textured = np.random.default_rng(5).random(x.shape).astype(np.float32)
    assert float(lattice(textured, textured + weave)[0]) < 0.01 * seen


def test_lattice_refuses_images_under_a_window(pair):
    with pytest.raises(ValueError, match="48 pixels, found 32 x 40"):
        lattice(*pair)


def test_charbonnier_with_pixel_weights_is_the_weighted_mean(pair):
    x, x_hat = pair
    weights = np.random.default_rng(1).random(x.shape[:3]).astype(np.float32)
    values = np.sqrt((x.astype(np.float64) - x_hat) ** 2 + 1e-6).mean(-1)
    found = losses.charbonnier(x, x_hat, pixel_weights=weights)
    np.testing.assert_allclose(found, (weights * values).mean((1, 2)), rtol=1e-5)


@pytest.mark.parametrize("learnt", [True, False])
def test_perceptual_equals_its_equation(network, pair, learnt):
    rng = np.random.default_rng(2)
    heads = [rng.random(c).astype(np.float32) if learnt else np.ones(c) for c in (5, 7)]
    expected = np.zeros(2)
    for f, g, w in zip(*(maps(network, i) for i in pair), heads, strict=True):
        f = f / np.sqrt((f**2).sum(-1, keepdims=True) + 1e-8)
        g = g / np.sqrt((g**2).sum(-1, keepdims=True) + 1e-8)
        expected += (w * (f - g) ** 2).sum(-1).mean((1, 2))
    found = losses.perceptual(network, *pair, heads=heads if learnt else None)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_perceptual_gradient_is_finite_at_equality_and_at_black(network):
    for x in (jnp.zeros((1, 32, 32, 3)), jnp.full((1, 32, 32, 3), 0.5)):
        gradient = jax.grad(lambda v, x=x: losses.perceptual(network, x, v).sum())(x)
        assert np.isfinite(gradient).all()


def test_perceptual_gradient_reaches_only_the_reconstruction(network, pair):
    def loss(network, x, x_hat):
        return losses.perceptual(network, x, x_hat).sum()

    to_network, to_x, to_x_hat = jax.grad(loss, (0, 1, 2))(
        network, *map(jnp.asarray, pair)
    )
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(to_network))
    assert not np.any(to_x) and np.any(to_x_hat)


@pytest.mark.parametrize("positions, channels", [(40, 6), (6, 40), (9, 9)])
def test_gram_distance_equals_its_equation(positions, channels):
    rng = np.random.default_rng(3)
    f, g = rng.normal(size=(2, positions, channels)).astype(np.float32)
    expected = ((gram(f.astype(np.float64)) - gram(g.astype(np.float64))) ** 2).sum()
    np.testing.assert_allclose(style_losses.gram_distance(f, g), expected, rtol=1e-5)
    assert style_losses.gram_distance(f, f) == 0


@pytest.mark.parametrize("positions, channels", [(40, 6), (6, 40)])
def test_gram_distance_keeps_its_precision_near_equality(positions, channels):
    rng = np.random.default_rng(4)
    f = rng.normal(size=(positions, channels)).astype(np.float32)
    g = (f + 1e-4 * rng.normal(size=f.shape)).astype(np.float32)
    expected = ((gram(f.astype(np.float64)) - gram(g.astype(np.float64))) ** 2).sum()
    np.testing.assert_allclose(style_losses.gram_distance(f, g), expected, rtol=1e-3)


@pytest.mark.parametrize("positions, channels", [(40, 6), (6, 40), (9, 9)])
@pytest.mark.parametrize("argument", [0, 1])
def test_gram_distance_has_the_gradient_of_its_equation(positions, channels, argument):
    rng = np.random.default_rng(5)
    f, g = rng.normal(size=(2, 3, positions, channels)).astype(np.float32)
    weights = jnp.asarray([0.2, 1.0, -0.5])

    def plain(f, g):
        a, b = (jnp.einsum("bnc,bnd->bcd", v, v) for v in (f, g))
        return jnp.sum(jnp.square(a - b), axis=(1, 2)) / (positions * channels) ** 2

    def gradient(distance):
        return jax.grad(lambda *v: weights @ distance(*v), argument)(f, g)

    expected = gradient(plain)
    found = gradient(style_losses.gram_distance)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_style_equals_its_equation_and_pytorch(network, pair):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    expected = torch.zeros(2, dtype=torch.float64)
    for f, g in zip(*(maps(network, image) for image in pair), strict=True):
        grams = []
        for tap in (f, g):
            b, h, w, c = tap.shape
            flat = torch.from_numpy(tap).permute(0, 3, 1, 2).reshape(b, c, h * w)
            grams.append(torch.bmm(flat, flat.transpose(1, 2)) / (c * h * w))
        expected += ((grams[0] - grams[1]) ** 2).sum((1, 2))
    found = style_losses.style(*(network.apply(jnp.asarray(image)) for image in pair))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4)


def test_local_style_is_the_mean_over_patches(network, pair):
    size = pair[0].shape[1:3]  # 32 x 40: 16 pixels are 8 and 4 cells
    expected = np.zeros(2)
    both = [maps(network, image) for image in pair]
    for f, g, side in zip(*both, (8, 4), strict=True):
        rows, columns = -(-f.shape[1] // side), -(-f.shape[2] // side)
        fill = [(0, 0), (0, rows * side - f.shape[1]), (0, columns * side - f.shape[2])]
        f, g = (np.pad(tap, [*fill, (0, 0)]) for tap in (f, g))
        for b in range(2):
            total = 0.0
            for i in range(0, rows * side, side):
                for j in range(0, columns * side, side):
                    p, q = (
                        tap[b, i : i + side, j : j + side].reshape(side**2, -1)
                        for tap in (f, g)
                    )
                    total += ((gram(p) - gram(q)) ** 2).sum()
            expected[b] += total / (rows * columns)
    taps = [network.apply(jnp.asarray(image)) for image in pair]
    found = style_losses.local_style(*taps, size)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_local_style_sees_texture_that_moved_and_whole_style_does_not():
    rng = np.random.default_rng(5)
    left = np.zeros((1, 32, 32, 4), np.float32)
    left[:, :, :16] = rng.normal(size=(1, 32, 16, 4))
    moved = np.roll(left, 16, axis=2)
    assert style_losses.style([left], [moved])[0] < 1e-12
    assert style_losses.local_style([left], [moved], (32, 32))[0] > 1e-4


def test_mean_style_is_relative_and_sees_what_blur_takes_away(network, pair):
    expected = np.zeros(2)
    for f, g in zip(*(maps(network, image) for image in pair), strict=True):
        a, b = f.mean((1, 2)), g.mean((1, 2))
        expected += ((a - b) ** 2).sum(-1) / (a**2).sum(-1)
    taps = [network.apply(jnp.asarray(image)) for image in pair]
    np.testing.assert_allclose(style_losses.mean_style(*taps), expected, rtol=1e-3)
    halved = [tap / 2 for tap in taps[0]]
    layers = len(halved)
    np.testing.assert_allclose(
        style_losses.mean_style(taps[0], halved), layers / 4, rtol=1e-3
    )
    gradients = jax.grad(
        lambda a, b: style_losses.mean_style(a, b).sum(), argnums=(0, 1)
    )
    to_real, to_made = gradients(*taps)
    assert not any(np.any(g) for g in to_real) and all(np.any(g) for g in to_made)


def test_local_mean_style_is_that_of_patches(network, pair):
    size, side = pair[0].shape[1:3], 8
    expected = np.zeros(2)
    for f, g in zip(*(maps(network, image) for image in pair), strict=True):
        cells = side * f.shape[1] // size[0]
        a, b = (
            tap.reshape(2, tap.shape[1] // cells, cells, -1, cells, tap.shape[-1])
            for tap in (f, g)
        )
        a, b = a.mean((2, 4)), b.mean((2, 4))
        square, power = ((tap**2).sum(-1).mean((1, 2)) for tap in (a - b, a))
        expected += square / power
    taps = [network.apply(jnp.asarray(image)) for image in pair]
    found = style_losses.local_mean_style(*taps, size, patch_pixels=side)
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    # One patch is the whole map.
    whole = [tap[:, :4, :4] for tap in taps[0]], [tap[:, :4, :4] for tap in taps[1]]
    np.testing.assert_allclose(
        style_losses.local_mean_style(*whole, (64, 64), patch_pixels=64),
        style_losses.mean_style(*whole),
        rtol=1e-5,
    )


def test_local_mean_style_computes_in_float32(network, pair):
    size, half = pair[0].shape[1:3], jnp.bfloat16
    taps, taps_hat = (
        [tap.astype(half) for tap in network.apply(jnp.asarray(image))]
        for image in pair
    )
    wide, wide_hat = ([t.astype(jnp.float32) for t in x] for x in (taps, taps_hat))
    options = {"patch_pixels": 8}
    found = style_losses.local_mean_style(taps, taps_hat, size, **options)
    expected = style_losses.local_mean_style(wide, wide_hat, size, **options)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    powers = style_losses.local_mean_powers(taps, size, **options)
    expected = style_losses.local_mean_powers(wide, size, **options)
    for power, exact in zip(powers, expected, strict=True):
        assert power.dtype == jnp.float32
        np.testing.assert_allclose(power, exact, rtol=1e-6)


def test_local_mean_style_sees_texture_that_moved():
    left = np.zeros((1, 8, 8, 4), np.float32)
    left[:, :, :4] = 1
    moved = np.roll(left, 4, axis=2)
    assert style_losses.mean_style([left], [moved])[0] < 1e-12
    found = style_losses.local_mean_style([left], [moved], (128, 128))
    np.testing.assert_allclose(found, 2, rtol=1e-5)
    to_real, to_made = jax.grad(
        lambda a, b: style_losses.local_mean_style([a], [b], (128, 128)).sum(), (0, 1)
    )(left, moved)
    assert not np.any(to_real) and np.any(to_made)


@pytest.mark.parametrize("side", [161, 168, 175, 176])
def test_structural_is_one_minus_ms_ssim_where_that_is_defined(side):
    rng = np.random.default_rng(side)
    x = rng.random((1, side, side + 9, 3)).astype(np.float32)
    x_hat = np.clip(x + 0.1 * rng.normal(size=x.shape), 0, 1).astype(np.float32)
    found = structural(x, x_hat)
    np.testing.assert_allclose(found, 1 - similarity.ms_ssim(x, x_hat), rtol=1e-4)


def cross_entropy(logits, labels):
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    return -picked.mean((1, 2))


@pytest.mark.parametrize("codes", [1, 16])
def test_adversarial_losses_equal_their_equations(codes):
    rng = np.random.default_rng(6)
    real, fake = rng.normal(size=(2, 3, 4, 5, codes + 1)).astype(np.float32)
    labels = rng.integers(0, codes, (3, 4, 5))
    zeros = np.zeros_like(labels)
    expected = (cross_entropy(real, labels + 1) + cross_entropy(fake, zeros)) / 2
    found = losses.adversarial_discriminator(real, fake, labels)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(
        losses.adversarial_generator(fake, labels),
        cross_entropy(fake, labels + 1),
        rtol=1e-5,
    )


def test_adversarial_losses_equal_pytorch():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    rng = np.random.default_rng(7)
    logits = rng.normal(size=(2, 4, 4, 9)).astype(np.float32)
    labels = rng.integers(0, 8, (2, 4, 4))
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).permute(0, 3, 1, 2), torch.from_numpy(labels + 1)
    )
    found = losses.adversarial_generator(logits, labels).mean()
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)


def test_players_pull_in_opposite_directions():
    logits = jnp.zeros((1, 2, 2, 5))
    labels = jnp.full((1, 2, 2), 3)
    codec = jax.grad(lambda v: losses.adversarial_generator(v, labels).sum())(logits)
    other = jax.grad(
        lambda v: losses.adversarial_discriminator(logits, v, labels).sum()
    )(logits)
    assert (codec[..., 4] < 0).all() and (codec[..., 0] > 0).all()
    assert (other[..., 4] > 0).all() and (other[..., 0] < 0).all()


def test_rate_switch_is_per_sample_two_sided_and_strict():
    target = losses.MSILLM_RATE_TARGETS[0.14]
    bpp = jnp.asarray([0.10, 0.14, 0.1401, 0.9])
    np.testing.assert_allclose(target.lmbda(bpp), [0.0625, 0.0625, 2, 2])
    early = target.lmbda(jnp.asarray([0.1, 0.19, 0.21]), step=49_999)
    np.testing.assert_allclose(early, [0.0625, 0.0625, 1])
    traced = jax.jit(target.lmbda)(jnp.asarray([0.19]), jnp.asarray(50_000))
    np.testing.assert_allclose(traced, [2])
    gradient = jax.grad(lambda b: (target.lmbda(b) * b).sum())(bpp)
    np.testing.assert_allclose(gradient, [0.0625, 0.0625, 2, 2])


def test_rate_targets_are_the_references():
    for bpp, high in ((0.00875, 32), (0.07, 4), (0.3, 1), (0.9, 0.25)):
        target = losses.MSILLM_RATE_TARGETS[bpp]
        assert (target.bpp, target.lmbda_high, target.lmbda_low) == (bpp, high, 0.0625)
    assert len(losses.MSILLM_RATE_TARGETS) == 8
    for wrong in (dict(bpp=0, lmbda_high=1), dict(bpp=0.1, lmbda_high=0.01)):
        with pytest.raises(ValueError, match="rate target needs"):
            RateTarget(**wrong)


def test_quality_lmbda_is_geometric():
    found = losses.quality_lmbda(jnp.asarray([0, 0.5, 1]), 8.0, 0.5)
    np.testing.assert_allclose(found, [8, 2, 0.5], rtol=1e-6)
    with pytest.raises(ValueError, match="positive"):
        losses.quality_lmbda(jnp.zeros(1), 0.0, 1.0)


TERMS = (
    *("charbonnier", "perceptual", "style", "local_style", "mean_style"),
    "adversarial",
)


def test_ensemble_computes_each_term_and_only_those_with_a_weight(network, pair):
    rng = np.random.default_rng(8)
    inputs = dict(
        network=network,
        logits_fake=rng.normal(size=(2, 4, 5, 9)).astype(np.float32),
        labels=rng.integers(0, 8, (2, 4, 5)),
    )
    taps = [network.apply(jnp.asarray(image)) for image in pair]
    expected = {
        "charbonnier": losses.charbonnier(*pair),
        "perceptual": losses.perceptual(network, *pair),
        "style": style_losses.style(*taps),
        "local_style": style_losses.local_style(*taps, pair[0].shape[1:3]),
        "mean_style": style_losses.mean_style(*taps),
        "adversarial": losses.adversarial_generator(
            inputs["logits_fake"], inputs["labels"]
        ),
    }
    weights = LossWeights(**{name: i + 1.0 for i, name in enumerate(TERMS)})
    terms = losses.ensemble_terms(*pair, weights, **inputs)
    assert tuple(terms) == TERMS
    for name in TERMS:
        np.testing.assert_allclose(terms[name], expected[name], rtol=1e-5)
        alone = LossWeights(**{n: float(n == name) for n in TERMS})
        assert set(losses.ensemble_terms(*pair, alone, **inputs)) == {name}
    total = sum((i + 1) * np.asarray(expected[n]) for i, n in enumerate(TERMS))
    np.testing.assert_allclose(losses.weighted_sum(terms, weights), total, rtol=1e-5)
    doubled = losses.ensemble_terms(*pair, weights, **inputs, style_map=lambda f: 2 * f)
    np.testing.assert_allclose(doubled["style"], 16 * terms["style"], rtol=1e-5)
    np.testing.assert_allclose(doubled["perceptual"], terms["perceptual"])


def test_ensemble_refuses_what_is_missing(pair):
    with pytest.raises(ValueError, match="feature network"):
        losses.ensemble_terms(*pair, LossWeights(style=1.0))
    with pytest.raises(ValueError, match="logits"):
        losses.ensemble_terms(*pair, LossWeights(adversarial=1.0))
    with pytest.raises(ValueError, match="weight of style must be at least 0"):
        LossWeights(style=-1.0)
    with pytest.raises(ValueError, match="every weight"):
        losses.weighted_sum({}, LossWeights(charbonnier=0.0))


def test_a_step_takes_only_the_trunks_terms_from_the_shifted_window(network, pair):
    from semlic_jax.training.steps import Trunk, reconstruction_terms

    x, x_hat = pair
    weights = LossWeights(charbonnier=1.0, squared_error=1.0, perceptual=1.0)
    terms = reconstruction_terms(
        jnp.asarray(x), jnp.asarray(x_hat), weights, Trunk(network), jax.random.key(0)
    )
    assert set(terms) == {"charbonnier", "squared_error", "perceptual"}
    expected = ((x.astype(np.float64) - x_hat) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(terms["squared_error"], expected, rtol=1e-5)
    whole = losses.perceptual(network, x, x_hat)
    assert not np.allclose(terms["perceptual"], whole, rtol=1e-4)


def test_zoom_takes_a_share_of_the_perceptual_term_from_an_enlarged_part(network, pair):
    from semlic_jax.training.stages import Stage
    from semlic_jax.training.steps import Trunk, _enlarged, reconstruction_terms

    x, x_hat = map(jnp.asarray, pair)
    rng, trunk = jax.random.key(0), Trunk(network)
    near, far, both = (
        reconstruction_terms(
            x, x_hat, LossWeights(perceptual=1.0), trunk, rng, zoom=zoom
        )["perceptual"]
        for zoom in (1.0, 0.0, 0.25)
    )
    np.testing.assert_allclose(both, 0.25 * near + 0.75 * far, rtol=1e-5)
    # The same part of both images, twice as large.
    real, made = _enlarged(rng, x, x_hat)
    assert real.shape == x.shape
    np.testing.assert_allclose(near, losses.perceptual(network, real, made), rtol=1e-5)
    np.testing.assert_array_equal(*_enlarged(rng, x, x))
    ramp = jnp.broadcast_to(jnp.arange(40.0)[None, None, :, None], (1, 32, 40, 3))
    (part,) = _enlarged(rng, ramp)
    np.testing.assert_allclose(np.diff(part[0, 8, 4:-4, 0]), 0.5, atol=1e-4)
    with pytest.raises(ValueError, match="a.zoom must be from 0 to 1, found 2"):
        Stage(name="a", steps=1, zoom=2.0)


@pytest.mark.parametrize("side, scales", [(32, 2), (44, 3), (11, 1)])
def test_structural_of_small_crops_has_fewer_scales_of_larger_weights(side, scales):
    """The shorter side decides, whichever it is."""
    rng = np.random.default_rng(side)
    for shape in ((1, side, 2 * side + 40, 3), (1, 2 * side + 40, side, 3)):
        x = rng.random(shape).astype(np.float32)
        x_hat = np.clip(x + 0.2 * rng.normal(size=shape), 0, 1).astype(np.float32)
        found = structural(x, x_hat)
        weights = np.array(similarity.MS_SSIM_WEIGHTS[:scales])
        a, b = (jnp.asarray(v) * 255 - 128 for v in (x, x_hat))
        product = 1.0
        for scale, weight in enumerate(weights / weights.sum()):
            parts = ssim_terms(a, b)  # SSIM at the last, else its contrast
            factor = np.asarray(parts[0 if scale == scales - 1 else 1], np.float64)
            product = product * factor**weight
            a, b = halve(a), halve(b)
        np.testing.assert_allclose(found, 1 - product.mean(-1), rtol=1e-4)
    with pytest.raises(ValueError, match="at least 11 pixels, found 10"):
        structural(x[:, :, :10], x_hat[:, :, :10])


def test_structural_has_a_finite_gradient_where_images_are_opposites():
    x = np.random.default_rng(0).random((1, 32, 32, 3)).astype(np.float32)
    gradient = jax.grad(lambda v: structural(x, v).sum())(jnp.asarray(1 - x))
    assert np.isfinite(gradient).all()


def test_ensemble_has_the_terms_of_pixels_as_they_are():
    rng = np.random.default_rng(9)
    x = rng.random((2, 48, 64, 3)).astype(np.float32)
    x_hat = np.clip(x / 2 + 0.1 * rng.normal(size=x.shape), 0, 1).astype(np.float32)
    weights = LossWeights(
        charbonnier=0.0,
        squared_error=1.0,
        structural=1.0,
        lattice=1.0,
        spectrum=1.0,
        spectral_power=1.0,
    )
    terms = jax.jit(lambda *pair: losses.ensemble_terms(*pair, weights))(x, x_hat)
    expected = {
        "squared_error": losses.squared_error(x, x_hat),
        "structural": structural(x, x_hat),
        "lattice": lattice(x, x_hat),
        "spectrum": spectrum(x, x_hat),
        "spectral_power": spectral_power(x, x_hat),
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-5)
    # The original is no variable: what it shows decides what can be seen.
    swapped = lattice(x_hat, x)
    assert not np.allclose(terms["lattice"], swapped, rtol=0.1)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_weights_of_losses_are_finite(value):
    with pytest.raises(ValueError, match="weight of style must be at least 0, found"):
        LossWeights(style=value)


def test_styles_of_maps_without_features_are_finite():
    nothing = [jnp.zeros((1, 8, 8, 4))]
    some = [jnp.ones((1, 8, 8, 4))]
    for maps in (nothing, some):
        found = (
            style_losses.mean_style(nothing, maps),
            style_losses.local_mean_style(nothing, maps, (128, 128)),
        )
        assert all(np.isfinite(value).all() for value in found)


def test_patches_of_local_style_are_rounded_to_whole_cells():
    """An 8 x 8 map of 29 x 29 pixels: 16 pixels are 4.4 cells, 18 are 4.97, thus 5."""
    rng = np.random.default_rng(10)
    f, g = rng.normal(size=(2, 1, 5, 5, 3)).astype(np.float32)
    fill = ((0, 0), (0, 3), (0, 3), (0, 0))
    whole = style_losses.style([f], [g])
    found = style_losses.local_style(
        [np.pad(f, fill)], [np.pad(g, fill)], (29, 29), patch_pixels=18
    )
    np.testing.assert_allclose(found, whole / 4, rtol=1e-5)  # three are empty
