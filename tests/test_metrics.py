# SPDX-License-Identifier: Apache-2.0
"""Metrics of one reconstruction against independent implementations."""

import io
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from feature_networks import shared_folder
from PIL import Image
from scipy.signal import fftconvolve

from semlic_jax.objectives import (
    distribution_metrics,
    feature_weights,
    features,
    metrics,
    similarity,
    trunks,
)
from semlic_jax.objectives.features import FeatureNetwork
from semlic_jax.objectives.lattice import lattice
from semlic_jax.objectives.metrics import ImageMetrics
from semlic_jax.objectives.spectrum import mesh, spectrum


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def synthetic(height: int, width: int) -> np.ndarray:
    """A picture with smooth areas, edges and texture."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width] / 40.0
    smooth = np.stack([np.sin(x + y), np.cos(x - 2 * y), np.sin(3 * x)], -1) * 60 + 128
    texture = rng.normal(size=(height, width, 1)) * 30 * (np.sin(y) > 0)[..., None]
    edges = 40 * (np.sin(5 * x) * np.cos(3 * y) > 0)[..., None]
    return np.clip(smooth + texture + edges, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def pair():
    x = synthetic(176, 171)
    return x, jpeg(x, 20)


def test_psnr_equals_its_definition(pair):
    x, x_hat = pair
    expected = 10 * np.log10(255**2 / np.mean((x.astype(float) - x_hat) ** 2))
    found = similarity.psnr_db(np.stack([x, x]), np.stack([x_hat, x]))
    assert found[0] == pytest.approx(expected, abs=1e-4)
    assert found[1] == np.inf


def test_psnr_rounds_float_images_to_8_bits(pair):
    x, x_hat = pair
    noisy = (x_hat + np.random.default_rng(0).uniform(-0.45, 0.45, x.shape)) / 255
    found = similarity.psnr_db(x / np.float32(255), noisy.astype(np.float32))
    np.testing.assert_allclose(found, similarity.psnr_db(x, x_hat), rtol=1e-6)


def ms_ssim_float64(x, x_hat):
    """Independent of the code under test: FFT convolutions, explicit pooling."""
    window = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = np.outer(window, window)[..., None] / window.sum() ** 2
    x, x_hat = x.astype(np.float64), x_hat.astype(np.float64)
    c1, c2 = 6.5025, 58.5225
    factors = []
    for scale in range(5):

        def blur(v):
            return fftconvolve(v, window, mode="valid", axes=(0, 1))

        m, n = blur(x), blur(x_hat)
        cov = blur(x * x_hat) - m * n
        var = blur(x * x) + blur(x_hat * x_hat) - m * m - n * n
        contrast = (2 * cov + c2) / (var + c2)
        ssim = (2 * m * n + c1) / (m * m + n * n + c1) * contrast
        factors.append((ssim if scale == 4 else contrast).mean((0, 1)))
        pads = [(s % 2, s % 2) for s in x.shape[:2]] + [(0, 0)]
        x, x_hat = (np.pad(v, pads) for v in (x, x_hat))
        h, w = x.shape[0] // 2 * 2, x.shape[1] // 2 * 2
        x, x_hat = (
            (v[:h:2, :w:2] + v[1:h:2, :w:2] + v[:h:2, 1:w:2] + v[1:h:2, 1:w:2]) / 4
            for v in (x, x_hat)
        )
    weights = np.asarray([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])[:, None]
    return float(np.prod(np.maximum(factors, 0) ** weights, axis=0).mean())


def test_ms_ssim_equals_a_float64_computation(pair):
    found = similarity.ms_ssim(*pair)
    assert found.shape == (1,)
    assert float(found[0]) == pytest.approx(ms_ssim_float64(*pair), abs=1e-5)
    same = similarity.ms_ssim(pair[0], pair[0])
    assert float(same[0]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("shape", [(192, 256), (205, 211)])
def test_ms_ssim_of_parts_of_any_size(photograph, shape):
    sizes = [(161, 200), (178, 169), (187, 211), (189, 163), shape]
    rng = np.random.default_rng(0)
    x = np.stack([photograph(*shape, seed=i) for i in range(len(sizes))])
    x_hat = rng.integers(0, 256, x.shape, np.uint8)  # beyond the part, anything
    expected = []
    for image, made, (height, width) in zip(x, x_hat, sizes, strict=True):
        part = image[:height, :width]
        noisy = np.rint(part + 12 * rng.standard_normal(part.shape)).clip(0, 255)
        made[:height, :width] = noisy
        expected.append(float(similarity.ms_ssim(part, noisy.astype(np.uint8))[0]))
    found = similarity.ms_ssim_within(x, x_hat, np.array(sizes, np.int32))
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert max(expected) < 0.99


def test_ms_ssim_equals_pytorch_msssim_on_photographs():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    package = pytest.importorskip(
        "pytorch_msssim", reason="pytorch-msssim is not installed"
    )
    folder = shared_folder("SEMLIC_DATA", "data") / "kodak"
    # The last is odd at several scales.
    for name, quality, size in (("05", 10, None), ("20", 80, None), ("07", 30, 201)):
        image = np.asarray(Image.open(folder / f"{name}.png").convert("RGB"))
        image = image if size is None else image[:171, :size]
        images = [image, jpeg(image, quality)]
        tensors = [
            torch.from_numpy(v.transpose(2, 0, 1).copy())[None].double() for v in images
        ]
        expected = float(package.ms_ssim(*tensors, data_range=255))
        assert float(similarity.ms_ssim(*images)[0]) == pytest.approx(
            expected, abs=1e-5
        )


def test_negative_similarity_counts_as_nothing():
    x = np.random.default_rng(0).integers(0, 256, (176, 176, 3), np.uint8)
    assert similarity.ms_ssim(x, 255 - x)[0] == 0


# ---- metrics on feature networks


def random_params(module, seed=0):
    """Random weights of the scale that keeps activations alive, biases included."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    rng = np.random.default_rng(seed)

    def draw(leaf):
        fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) == 4 else 100
        return jnp.asarray(
            rng.normal(size=leaf.shape) * np.sqrt(2 / fan_in), jnp.float32
        )

    return jax.tree.map(draw, shapes["params"])


def write_network(folder: Path, name: str) -> FeatureNetwork:
    net = FeatureNetwork(
        random_params(features.NETWORKS[name]), features.NETWORKS[name]
    )
    arrays = {
        "/".join(entry.key for entry in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(net.params)
    }
    np.savez(folder / f"{name}.npz", network=name, preprocessing="imagenet", **arrays)
    return net


def write_heads(folder: Path, trunk: str) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    channels = feature_weights._LPIPS_CHANNELS[trunk]
    heads = [rng.random(c).astype(np.float32) for c in channels]
    arrays = {
        f"lin{i}.model.1.weight": h.reshape(1, -1, 1, 1) for i, h in enumerate(heads)
    }
    np.savez(folder / f"lpips_v0.1_{trunk}.npz", **arrays)
    return heads


def test_lpips_equals_its_equation_on_its_own_taps(tmp_path):
    net, heads = write_network(tmp_path, "alexnet"), write_heads(tmp_path, "alex")
    x = synthetic(65, 70)
    x_hat = jpeg(x, 20)
    apply = jax.jit(FeatureNetwork.apply)
    maps = [apply(net, v[None] / np.float32(255)) for v in (x, x_hat)]
    expected = 0.0
    for f, g, w in zip(*maps, heads, strict=True):
        f, g = (np.asarray(v, np.float64) for v in (f, g))
        f = f / (np.linalg.norm(f, axis=-1, keepdims=True) + 1e-10)
        g = g / (np.linalg.norm(g, axis=-1, keepdims=True) + 1e-10)
        expected += ((f - g) ** 2 @ w).mean()
    lpips = metrics.load_lpips(tmp_path)
    assert float(lpips(x, x_hat)[0]) == pytest.approx(expected, rel=1e-4)
    assert float(lpips(x, x)[0]) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("trunk", ["alex", "vgg", "squeeze"])
def test_every_lpips_head_has_the_width_of_its_tap(trunk):
    module = features.NETWORKS[metrics._LPIPS_TRUNKS[trunk]]
    images = jnp.zeros((1, 64, 64, 3))
    taps, _ = jax.eval_shape(module.init_with_output, jax.random.key(0), images)
    widths = [taps[name].shape[-1] for name in trunks.LPIPS_TAPS[trunk]]
    assert tuple(widths) == feature_weights._LPIPS_CHANNELS[trunk]


def torch_state(net: FeatureNetwork, index: tuple[int, ...]) -> dict:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    state = {}
    for i, layer in zip(index, net.params, strict=True):
        kernel, bias = (np.array(net.params[layer][k]) for k in ("kernel", "bias"))
        state[f"{i}.weight"] = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
        state[f"{i}.bias"] = torch.from_numpy(bias)
    return state


@pytest.mark.filterwarnings("ignore")  # the package's own, of torchvision's
@pytest.mark.parametrize("trunk", ["alex", "vgg"])
def test_lpips_equals_its_package(tmp_path, trunk):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    try:
        import lpips
    except Exception as error:  # torchvision fails to import in ways of its own
        pytest.skip(f"lpips does not import: {error}")
    name = {"alex": "alexnet", "vgg": "vgg16"}[trunk]
    net = write_network(tmp_path, name)
    index = {
        "alex": feature_weights._ALEXNET_INDEX,
        "vgg": feature_weights._VGG16_INDEX,
    }[trunk]
    reference = lpips.LPIPS(net=trunk, pnet_rand=True, verbose=False)
    # lpips names the slices of its trunk and keeps torchvision's layer numbers inside.
    state = torch_state(net, index)
    keys = {k.split(".", 1)[1]: k for k in reference.net.state_dict()}
    reference.net.load_state_dict({keys[k]: v for k, v in state.items()})
    heads = {
        f"lin{i}.model.1.weight": getattr(reference, f"lin{i}").model[1].weight
        for i in range(5)
    }
    heads = {k: v.detach().numpy() for k, v in heads.items()}
    np.savez(tmp_path / f"lpips_v0.1_{trunk}.npz", **heads)
    x = synthetic(64, 83)
    x_hat = jpeg(x, 20)
    tensors = [
        torch.from_numpy((v.transpose(2, 0, 1) / 255.0).astype(np.float32))[None]
        for v in (x, x_hat)
    ]
    with torch.no_grad():
        expected = float(reference(*tensors, normalize=True))
    found = float(metrics.load_lpips(tmp_path, trunk)(x, x_hat)[0])
    assert expected > 1e-3 and found == pytest.approx(expected, rel=1e-4)


def write_dists(folder: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    total = sum(feature_weights.DISTS_CHANNELS)
    weights = {
        k: rng.random((1, total, 1, 1)).astype(np.float32) for k in ("alpha", "beta")
    }
    np.savez(folder / "dists_alpha_beta.npz", **weights)
    return weights


class Waves(nn.Module):
    """A cheap trunk with DISTS's channels: sines of mixed colours, ever coarser."""

    taps: tuple[str, ...] = trunks.LPIPS_TAPS["vgg"]

    @nn.compact
    def __call__(self, images):
        rng = np.random.default_rng(0)
        maps = {}
        channels = feature_weights.DISTS_CHANNELS[1:]
        for level, (name, width) in enumerate(zip(self.taps, channels, strict=True)):
            mixing = rng.normal(size=(3, width)).astype(np.float32)
            maps[name] = jnp.sin(3 * images[:, :: 2**level, :: 2**level] @ mixing)
        return maps


def test_dists_equals_its_equation_on_its_own_maps(tmp_path):
    weights = write_dists(tmp_path)
    x = synthetic(64, 72)
    x_hat = jpeg(x, 20)
    net = FeatureNetwork({}, Waves())
    images = [v[None] / np.float32(255) for v in (x, x_hat)]
    maps = [[v, *net.apply(jnp.asarray(v))] for v in images]
    alpha, beta = (v.reshape(-1).astype(np.float64) for v in weights.values())
    texture, structure = [], []
    for f, g in zip(*maps, strict=True):
        f, g = (np.asarray(v, np.float64)[0].reshape(-1, v.shape[-1]) for v in (f, g))
        m, n = f.mean(0), g.mean(0)
        texture.append((2 * m * n + 1e-6) / (m**2 + n**2 + 1e-6))
        cov = (f * g).mean(0) - m * n
        structure.append((2 * cov + 1e-6) / (f.var(0) + g.var(0) + 1e-6))
    texture, structure = map(np.concatenate, (texture, structure))
    expected = 1 - (alpha @ texture + beta @ structure) / (alpha.sum() + beta.sum())
    loaded = feature_weights.load_dists_weights(tmp_path)
    dists = metrics.DISTS(net, *(tuple(map(jnp.asarray, part)) for part in loaded))
    assert float(dists(x, x_hat)[0]) == pytest.approx(expected, abs=1e-5)
    assert float(dists(x, x)[0]) == pytest.approx(0, abs=1e-5)


def test_dists_equals_its_package(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    try:
        from DISTS_pytorch import DISTS_pt
    except Exception as error:  # torchvision fails to import in ways of its own
        pytest.skip(f"dists-pytorch does not import: {error}")
    net, weights = write_network(tmp_path, "vgg16"), write_dists(tmp_path)
    vgg = DISTS_pt.models.vgg16(weights=None)
    vgg.features.load_state_dict(torch_state(net, feature_weights._VGG16_INDEX))
    monkeypatch.setattr(DISTS_pt.models, "vgg16", lambda pretrained: vgg)
    reference = DISTS_pt.DISTS(load_weights=False)
    for name, values in weights.items():
        getattr(reference, name).data = torch.from_numpy(values)
    x = synthetic(67, 72)
    x_hat = jpeg(x, 20)
    tensors = [
        torch.from_numpy((v.transpose(2, 0, 1) / 255.0).astype(np.float32))[None]
        for v in (x, x_hat)
    ]
    expected = float(reference(*tensors).detach())
    found = float(metrics.load_dists(tmp_path)(x, x_hat)[0])
    assert expected > 1e-3 and found == pytest.approx(expected, rel=1e-4)


def test_ssimulacra2_is_its_package_on_the_same_files(tmp_path, pair):
    package = pytest.importorskip("ssimulacra2", reason="ssimulacra2 is not installed")
    paths = [tmp_path / "x.png", tmp_path / "x_hat.png"]
    for path, image in zip(paths, pair, strict=True):
        Image.fromarray(image).save(path)
    expected = package.compute_ssimulacra2(*map(str, paths))
    found = metrics.ssimulacra2(pair[0][None], pair[1][None])
    assert found.dtype == np.float64 and found[0] == expected < 90


# ---- the whole set


def test_image_metrics_measure_a_batch_by_name(tmp_path, pair):
    write_network(tmp_path, "alexnet")
    write_heads(tmp_path, "alex")
    names = ("psnr_db", "ms_ssim", "lpips_alex", "lattice", "spectrum", "mesh")
    measure = ImageMetrics(names, tmp_path)
    x = np.stack([pair[0], pair[1]])
    x_hat = np.stack([pair[1], pair[1]])
    found = measure(x, x_hat)
    assert tuple(found) == measure.names == names
    for name, values in found.items():
        assert values.shape == (2,) and values.dtype == np.float64
        info = metrics.IMAGE_METRICS[name]
        assert (values[1] > values[0]) == info.higher_is_better
    pixels = [jnp.asarray(images, jnp.float32) / 255 for images in (x, x_hat)]
    np.testing.assert_allclose(found["lattice"], lattice(*pixels, tiles=2), 1e-4, 1e-9)
    np.testing.assert_allclose(found["spectrum"], spectrum(*pixels), 1e-3, 1e-6)
    np.testing.assert_allclose(found["mesh"], mesh(*pixels), 1e-3, 1e-6)


def test_small_images_give_a_reason_and_no_number():
    measure = ImageMetrics(("psnr_db", "ms_ssim"))
    small = np.zeros((160, 400, 3), np.uint8)
    assert set(measure(small, small)) == {"psnr_db"}
    refused = measure.refusals(160, 400)
    assert list(refused) == ["ms_ssim"] and "161x161" in refused["ms_ssim"]
    assert measure.refusals(161, 400) == {}
    with pytest.raises(
        similarity.ImageTooSmallError, match="161x161 pixels, found 400x160"
    ):
        similarity.ms_ssim(small, small)


def test_lpips_squeezenet_needs_what_its_layers_need():
    def has_maps(side):
        side = (side - 3) // 2 + 1  # conv1
        for _ in range(3):  # pools of 3 x 3, stride 2, sizes rounded up
            side = -(-(side - 3) // 2) + 1
        return side >= 1

    least = metrics.IMAGE_METRICS["lpips_squeeze"].least_side
    assert has_maps(least) and not has_maps(least - 1)


def test_wrong_calls_are_refused(tmp_path, pair, monkeypatch):
    monkeypatch.delenv("SEMLIC_FEATURES", raising=False)
    x, _ = pair
    with pytest.raises(ValueError, match="one shape"):
        similarity.psnr_db(x, x[1:])
    with pytest.raises(ValueError, match="found int32"):
        similarity.psnr_db(x.astype(np.int32), x)
    with pytest.raises(ValueError, match="found shape"):
        similarity.psnr_db(x[..., 0], x[..., 0])
    with pytest.raises(
        ValueError, match="unknown metric vmaf: expected some of psnr_db"
    ):
        ImageMetrics(["vmaf"])
    with pytest.raises(ValueError, match="SEMLIC_FEATURES"):
        ImageMetrics(["dists"])
    with pytest.raises(ValueError, match=r"no vgg16\*.npz"):
        write_heads(tmp_path, "vgg")
        ImageMetrics(["lpips_vgg"], tmp_path)


def test_ssimulacra2_without_its_package_says_how_to_get_it(pair, monkeypatch):
    def fail(name):
        raise ImportError(name)

    monkeypatch.setattr(metrics.importlib, "import_module", fail)
    with pytest.raises(ValueError, match="pip install ssimulacra2"):
        metrics.ssimulacra2(*pair)


def test_published_squeezenet_ranks_qualities():
    folder = shared_folder("SEMLIC_FEATURES", "weights")
    x = synthetic(96, 96)
    measure = ImageMetrics(["feature_distance"], folder)
    low, high = (measure(x, jpeg(x, q))["feature_distance"][0] for q in (5, 60))
    assert 0 < high < low
    assert trunks.SQUEEZENET1_0_TAPS == features.NETWORKS["squeezenet1_0"].taps


class Precision(nn.Module):
    """A trunk that notes with what precision its program is made."""

    taps: tuple[str, ...] = ("colour",)
    preprocessing: str = "none"
    seen = []

    def __call__(self, images):
        self.seen.append(jax.config.jax_default_matmul_precision)
        return {"colour": images}


def test_products_have_full_precision_on_every_device(monkeypatch):
    """Else a GPU or a TPU rounds their factors, and metrics depend on the device."""
    monkeypatch.setattr(Precision, "seen", seen := [])
    network = FeatureNetwork({}, Precision())
    x = synthetic(32, 40)
    metrics.FeatureDistance(network)(x, x)
    assert seen and set(seen) == {"highest"}
    seen.clear()
    collected = distribution_metrics.PatchStatistics(network, patch_side=32)
    seen.clear()  # of the shapes
    collected.add(x, 0)
    collected.statistics()
    assert seen and set(seen) == {"highest"}


def test_psnr_clips_float_images():
    x = np.ones((8, 8, 3), np.float32)
    assert similarity.psnr_db(x, 1.5 * x)[0] == np.inf
    assert similarity.psnr_db(0 * x, -0.5 * x)[0] == np.inf


def test_mean_style_of_an_image_that_is_not_square():
    """Patches of 64 pixels along both sides."""
    network = FeatureNetwork({}, Precision())
    x, x_hat = synthetic(128, 320), jpeg(synthetic(128, 320), 10)
    found = metrics.MeanStyleDistance(network)(x, x_hat)
    means, means_hat = (
        image.astype(np.float64).reshape(2, 64, 5, 64, 3).mean((1, 3)) / 255
        for image in (x, x_hat)
    )
    square = ((means - means_hat) ** 2).sum(-1).mean()
    expected = square / ((means**2).sum(-1).mean() + 1e-6)
    assert float(found[0]) == pytest.approx(expected, rel=1e-3)
