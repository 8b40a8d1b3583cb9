# SPDX-License-Identifier: Apache-2.0
"""What several test files share: a small model, a synthetic photograph, real data."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

REPOSITORY = Path(__file__).parents[1]

# Programs kept from an earlier run could hide that today's code does not compile, and
# tests have no business in the user's cache.
os.environ["SEMLIC_CACHE"] = ""


@pytest.fixture(scope="session", autouse=True)
def programs_of_this_run(tmp_path_factory):
    """Compiles what many tests have in common once in each process of the tests.

    Compilation is most of the time that they take. JAX does not write its cache such
    that processes may share it.
    """
    import jax

    folder = tmp_path_factory.mktemp("programs")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def photograph_like(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, 3]: what photographs have and noise lacks.

    Correlated colours with a 1/f spectrum, a few objects with sharp edges, and texture
    in some of them.
    """
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    frequency = np.hypot(
        np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width) * width
    )
    frequency[0, 0] = np.inf
    mixing = np.array([[0.9, 0.1, 0.05], [0.9, 0.0, 0.0], [0.9, -0.1, -0.05]])
    spectrum = np.fft.rfft2(rng.standard_normal((3, height, width))) / frequency**1.5
    layers = np.fft.irfft2(spectrum, (height, width))
    layers /= layers.std(axis=(1, 2), keepdims=True) + 1e-9
    image = 0.5 + 0.2 * np.einsum("cl,lhw->hwc", mixing, layers)
    for _ in range(6):
        centre = rng.uniform(0, (height, width))
        radii = rng.uniform(0.05, 0.3, 2) * max(height, width)
        inside = ((rows - centre[0]) / radii[0]) ** 2 + (
            (columns - centre[1]) / radii[1]
        ) ** 2 < 1
        texture = 0.06 * rng.standard_normal((height, width, 1)) * rng.integers(2)
        image = np.where(inside[..., None], rng.uniform(0.1, 0.9, 3) + texture, image)
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def lively_params(config, seed: int = 0):
    """Parameters of a `CompressionModel` in which every part does something.

    A fresh model is silent where training starts from zeros: all means are 0, and the
    indexes do not depend on the context. Here the linear part is the KLT of synthetic
    photographs, and everything else is random. Made by NumPy: compiling the model's own
    initialisation takes longer than all else in a test.
    """
    import jax

    from semlic_jax.model.compression import CompressionModel
    from semlic_jax.training.klt import block_covariance, start_from_klt

    key = jax.random.key(0)
    x = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    quality = jax.ShapeDtypeStruct((1,), np.float32)
    shapes = jax.eval_shape(CompressionModel(config).init, key, x, quality, key)
    rng = np.random.default_rng(seed)

    def numbers(path, leaf):
        names = [part.key for part in path]
        noise = rng.standard_normal(leaf.shape)
        fan_in = np.prod(leaf.shape[:-1])
        match names:
            case ["log_gain"]:
                rows = np.linspace(0, np.log(6), len(noise))[:, None]
                array = rows + 0.1 * noise
            case ["prior", name]:
                # About a logistic density with a deviation of 4.
                matrix = -1.7 if leaf.shape[1] > 1 else 0.0
                array = 0.2 * noise + (matrix if "matrix" in name else 0)
            case ["entropy", name, "bias"]:
                array = 0.5 * noise + (1 if name.endswith("index") else 0)
            case ["entropy", name, _] if name.endswith(("index", "mean")):
                array = 0.2 * noise
            case ["g_a" | "g_s", *_, "kernel" | "bias"] if leaf.shape[-1] in (24, 48):
                array = 0.003 * noise  # little beside the linear part
            case [*_, "kernel"]:
                array = noise / np.sqrt(fan_in)
            case [*_, "gamma" | "input_scale"]:
                array = 1 + 0.1 * noise
            case _:
                array = 0.1 * noise
        return array.astype(np.float32)

    params = jax.tree_util.tree_map_with_path(numbers, shapes["params"])
    if config.linear_skip:
        photographs = [photograph_like(160, 160, seed) for seed in range(20)]
        params = start_from_klt(params, config, block_covariance(photographs))
    return jax.tree.map(np.asarray, params)


def random_integers(config, seed: int = 0, *, saturated: bool = False):
    """Integer networks of any configuration, with lively activations.

    Args:
        config: the architecture.
        seed: of the numbers.
        saturated: weights, sums and shifts at the limits of what can be proved.
    """
    from semlic_jax.model.compression import entropy_model

    rng = np.random.default_rng(seed)
    tree = {}
    for name, spec in entropy_model(config, "exact").layer_specs().items():
        shape = (spec.kernel, spec.kernel, spec.inputs, spec.features)
        taps = spec.kernel**2 * spec.inputs
        if saturated:
            largest = min(127, (2**24 - 1) // (spec.input_max * taps))
            kernel = largest * rng.choice([-1, 1], shape)
            bias = rng.integers(-(2**30), 2**30, spec.features)
            shift = rng.choice([1, 6, 10, 14 + spec.right], spec.features)
        else:
            kernel = np.clip(np.rint(30 * rng.standard_normal(shape)), -127, 127)
            # A sum of products of about 60 gives an activation of about 60.
            shift = np.full(spec.features, round(np.log2(30 * np.sqrt(taps))))
            shift += spec.right - (name.endswith("mean"))
            bias = rng.integers(-20, 60, spec.features) << shift
        tree[name] = {
            "kernel": kernel.astype(np.int8),
            "bias": bias.astype(np.int32),
            "shift": shift.astype(np.int32),
        }
    return tree


@pytest.fixture(scope="module")
def quick_to_compile():
    """For programs that run for milliseconds: not worth optimising."""
    import jax

    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def photograph():
    """Function (height, width, seed=0) -> uint8 [height, width, 3]."""
    return photograph_like


@pytest.fixture(scope="session")
def image(photograph):
    """The photograph that tests of refinement share; they do not write to it."""
    from refining import SIZE

    return photograph(*SIZE, seed=3)


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory):
    """Folder of three small photographs; tests do not write there."""
    path = tmp_path_factory.mktemp("images")
    for seed in range(3):
        image = Image.fromarray(photograph_like(64, 80, seed))
        image.save(path / f"photo{seed}.png")
    return path


@pytest.fixture
def no_weights(monkeypatch):
    """No folder of feature weights, whatever the environment says."""
    monkeypatch.delenv("SEMLIC_FEATURES", raising=False)


@pytest.fixture
def small_trunk(monkeypatch):
    """Evaluations measure features of `small_trunk.py`."""
    from small_trunk import load_small_trunk

    from semlic_jax.evaluation import measures

    monkeypatch.setattr(measures, "load_features", load_small_trunk)


@pytest.fixture(scope="session")
def tiny_config():
    from semlic_jax.model.compression import SIZES

    return SIZES["tiny"]


@pytest.fixture(scope="session")
def tiny_params(tiny_config):
    """Float parameters of the smallest size, random but lively."""
    return lively_params(tiny_config)


@pytest.fixture(scope="session")
def tiny_file(tiny_config, tiny_params):
    """The `ModelFile` of those parameters."""
    from semlic_jax.weights import export_model

    return export_model(tiny_config, tiny_params)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tiny_file):
    """Path of that model file."""
    from semlic_jax.weights import save_model

    path = tmp_path_factory.mktemp("models") / "tiny.npz"
    save_model(path, tiny_file)
    return path


@pytest.fixture(scope="session")
def codec(tiny_model):
    """A codec of that model, shared: it has no state but its compiled programs."""
    import semlic_jax

    return semlic_jax.load(tiny_model)


@pytest.fixture(scope="session")
def mini_model(tmp_path_factory, tiny_config):
    """Path of a model file whose refinement compiles in seconds.

    Narrow networks, two groups, and gains so low that rounding is most of the error.
    """
    import dataclasses

    from semlic_jax.weights import export_model, save_model

    config = dataclasses.replace(
        tiny_config,
        widths=(8, 8, 8),
        blocks=0,
        groups=(8, 16),
        context_shifts=(2, 2),
        hyper_channels=4,
        psi_channels=8,
        context_channels=8,
        hidden_channels=8,
    )
    params = lively_params(config)
    params["log_gain"] = params["log_gain"] - 2.5
    path = tmp_path_factory.mktemp("models") / "mini.npz"
    save_model(path, export_model(config, params))
    return path


@pytest.fixture(scope="session")
def mini_codec(mini_model):
    """A codec of that model."""
    import semlic_jax

    return semlic_jax.load(mini_model)


@pytest.fixture(scope="session")
def kodak_paths():
    """Paths of the Kodak photographs; skips where they are not."""
    folders = [REPOSITORY.parent / "shared" / "data"]
    if "SEMLIC_DATA" in os.environ:
        folders.insert(0, Path(os.environ["SEMLIC_DATA"]))
    for folder in folders:
        paths = sorted((folder / "kodak").glob("*.png"))
        if paths:
            return paths
    pytest.skip("needs the Kodak photographs in $SEMLIC_DATA/kodak")


@pytest.fixture(scope="session")
def other_profile():
    """An RGB profile with red and green exchanged, bytes."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    red, green, free = b"rXYZ", b"gXYZ", b"????"
    return profile.replace(red, free).replace(green, red).replace(free, green)
