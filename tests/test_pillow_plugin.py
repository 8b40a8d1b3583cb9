# SPDX-License-Identifier: Apache-2.0
"""`.semlic` as one format among others of Pillow."""

from __future__ import annotations

import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageCms

import semlic_jax
from semlic_jax import pillow_plugin
from semlic_jax.evaluation.demo import packaged_photograph


@pytest.fixture(scope="module")
def model(tiny_model):
    pillow_plugin.register_model(tiny_model)
    return tiny_model


@pytest.fixture
def photo():
    return Image.fromarray(packaged_photograph().pixels[120:168, 200:264])


@pytest.fixture
def saved(photo, model, tmp_path):
    path = tmp_path / "photo.semlic"
    photo.save(path, quality=0.5, model=model)
    return path


def test_pixels_are_the_codecs(saved, photo, model):
    codec = semlic_jax.load(model)
    data = saved.read_bytes()
    assert data == codec.compress(np.asarray(photo), quality=0.5)
    with Image.open(saved) as image:
        assert (image.format, image.mode, image.size) == ("SEMLIC", "RGB", (64, 48))
        assert image.get_format_mimetype() == "image/x-semlic"
        np.testing.assert_array_equal(np.asarray(image), codec.decompress(data))
        np.testing.assert_array_equal(np.asarray(image), codec.decompress(data))


def test_nothing_is_decoded_before_the_pixels_are_asked_for(saved, monkeypatch):
    def refuse(data):
        raise AssertionError("decoded")

    monkeypatch.setattr(pillow_plugin._models, "of_file", refuse)
    with Image.open(saved) as image:
        assert image.size == (64, 48)
        assert image.info["quality"] == pytest.approx(0.5, abs=1 / 255)
        with pytest.raises(AssertionError, match="decoded"):
            image.getpixel((0, 0))


def test_usual_operations(saved, tmp_path):
    with Image.open(saved) as image:
        image.thumbnail((16, 16))
        assert image.size == (16, 12)
    with Image.open(saved) as image:
        assert image.convert("L").crop((1, 2, 11, 7)).size == (10, 5)
    with Image.open(saved) as image:
        image.save(tmp_path / "photo.png")
    with Image.open(tmp_path / "photo.png") as again, Image.open(saved) as image:
        np.testing.assert_array_equal(np.asarray(again), np.asarray(image))


def test_streams(photo, model):
    stream = io.BytesIO()
    photo.save(stream, format="SEMLIC", quality=0.5, model=model)
    stream.seek(0)
    with Image.open(stream) as image:
        image.load()
    assert not stream.closed  # it is the caller's


@pytest.mark.parametrize("rate", ["max_bytes", "bpp"])
def test_budgets(photo, model, rate, saved):
    budget = saved.stat().st_size
    value = budget if rate == "max_bytes" else 8 * budget / (64 * 48)
    stream = io.BytesIO()
    photo.save(stream, format="SEMLIC", model=model, **{rate: value})
    assert len(stream.getvalue()) <= budget


def test_a_file_is_written_without_options(photo, model, tmp_path, monkeypatch):
    monkeypatch.setattr(pillow_plugin, "DEFAULT_MODEL", model)
    photo.save(tmp_path / "photo.semlic")
    with Image.open(tmp_path / "photo.semlic") as image:
        assert image.info["quality"] == pytest.approx(0.5, abs=1 / 255)


def test_profile_and_conversions(photo, model, tmp_path):
    path = tmp_path / "photo.semlic"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photo.save(path, model=model, icc_profile=profile)
    with Image.open(path) as image:
        assert image.info["icc_profile"] == profile
    photo.convert("L").save(path, model=model)
    clear = Image.new("RGBA", (8, 8), (1, 2, 3, 4))
    with pytest.raises(ValueError, match="background"):
        clear.save(tmp_path / "clear.semlic", model=model)
    assert not (tmp_path / "clear.semlic").exists()
    clear.save(tmp_path / "clear.semlic", model=model, background="white")


def test_damaged_files(saved):
    data = bytearray(saved.read_bytes())
    data[-1] ^= 1
    saved.write_bytes(data)
    with pytest.raises(semlic_jax.BitstreamError):
        Image.open(saved)


def test_a_loop_over_mixed_formats(saved, photo, tmp_path):
    for suffix in ("png", "jpg", "webp", "gif"):
        photo.save(tmp_path / f"photo.{suffix}")
    (tmp_path / "notes.txt").write_text("not an image")
    sizes = {}
    for path in sorted(tmp_path.iterdir()):
        try:
            with Image.open(path) as image:
                sizes[image.format] = image.convert("RGB").size
        except Image.UnidentifiedImageError:
            continue
    assert sizes == dict.fromkeys(["GIF", "JPEG", "PNG", "SEMLIC", "WEBP"], (64, 48))


def test_eight_threads(saved, photo, model):
    expected = semlic_jax.load(model).decompress(saved.read_bytes())

    def there_and_back(_):
        stream = io.BytesIO()
        photo.save(stream, format="SEMLIC", quality=0.5, model=model)
        with Image.open(stream) as image:
            return np.asarray(image)

    with ThreadPoolExecutor(8) as pool:
        for pixels in pool.map(there_and_back, range(16)):
            np.testing.assert_array_equal(pixels, expected)


def test_a_model_is_loaded_once(model, monkeypatch):
    calls = []

    def load(name):
        calls.append(name)
        return object()

    monkeypatch.setattr(semlic_jax, "load", load)
    models = pillow_plugin._Models()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: models.named("any"), range(32)))
    assert calls == ["any"]


def test_importing_it_is_light():
    code = (
        "import sys, semlic_jax.pillow_plugin\n"
        "from PIL import Image\n"
        "assert Image.registered_extensions()['.semlic'] == 'SEMLIC'\n"
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
