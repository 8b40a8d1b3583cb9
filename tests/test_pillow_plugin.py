# SPDX-License-Identifier: Apache-2.0
"""`.semlic` as one format among others of Pillow."""

from __future__ import annotations

import io
import pickle
import runpy
import subprocess
import sys
import tomllib
import types
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

import semlic_jax
from semlic_jax import images, pillow_plugin
from semlic_jax.coding.bitstream import Header, pack, unpack
from semlic_jax.evaluation.demo import packaged_photograph
from semlic_jax.weights import pretrained_models


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


_SCRIPT = """
from PIL import Image
import semlic_jax.pillow_plugin
photo = Image.open("photo.png")
photo.save("photo.semlic", quality=0.5)
with Image.open("photo.semlic") as image:
    print(image.format, image.size)
    image.thumbnail((32, 32))
    image.save("small.semlic", quality=0.9)
    image.convert("L").save("grey.jpg")
Image.open("small.semlic").rotate(90, expand=True).save("turned.webp")
"""


def test_a_script_of_ten_lines(photo, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pillow_plugin, "DEFAULT_MODEL", model)
    monkeypatch.chdir(tmp_path)
    photo.save("photo.png")
    Path("script.py").write_text(_SCRIPT)
    assert len(_SCRIPT.strip().splitlines()) == 10
    runpy.run_path("script.py")
    assert capsys.readouterr().out == "SEMLIC (64, 48)\n"
    modes_and_sizes = {}
    for name in ("small.semlic", "grey.jpg", "turned.webp"):
        with Image.open(name) as image:
            modes_and_sizes[name] = (image.mode, image.size)
    assert modes_and_sizes == {
        "small.semlic": ("RGB", (32, 24)),
        "grey.jpg": ("L", (32, 24)),
        "turned.webp": ("RGB", (24, 32)),
    }


def test_copies_and_pickles_carry_the_pixels(saved):
    with Image.open(saved) as image:
        again = pickle.loads(pickle.dumps(image))
        np.testing.assert_array_equal(np.asarray(again), np.asarray(image))
        np.testing.assert_array_equal(np.asarray(image.copy()), np.asarray(image))


def test_options_reach_the_codec(photo, model, monkeypatch):
    seen = {}

    class Recorder:
        def compress(self, pixels, **options):
            seen.update(options)
            return b"file"

    monkeypatch.setattr(pillow_plugin._models, "named", lambda name: Recorder())
    stream = io.BytesIO()
    photo.save(stream, "SEMLIC", bpp=0.2, quality=None, refine="fast", roi="auto")
    assert stream.getvalue() == b"file"
    assert seen == dict(bpp=0.2, refine="fast", roi="auto", icc_profile=None)


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


@pytest.fixture
def written(model):
    """Function (image, options of save) -> the profile in the file."""

    def save(image, **options):
        stream = io.BytesIO()
        image.save(stream, format="SEMLIC", model=model, **options)
        with Image.open(stream) as again:
            return again.info.get("icc_profile")

    return save


def test_a_profile_that_is_given_wins(photo, written, other_profile):
    photo.info["icc_profile"] = other_profile
    assert written(photo) == other_profile
    assert written(photo, icc_profile=None) is None  # Pillow's way to leave it out
    assert written(photo, icc_profile=b"") is None
    another = other_profile + bytes(4)
    assert written(photo, icc_profile=another) == another
    # The pixels are converted: a profile that a program hands on would be wrong.
    assert written(photo, icc_profile=other_profile, srgb=True) is None


def test_colours_are_converted_where_that_is_asked_for(photo, other_profile):
    photo.info["icc_profile"] = other_profile
    kept, converted = (images.photograph_of(photo, srgb=srgb) for srgb in (False, True))
    np.testing.assert_array_equal(kept.pixels, photo)
    assert np.abs(converted.pixels.astype(int) - kept.pixels).max() > 5
    assert converted.icc_profile is None


@pytest.mark.parametrize("mode", ["CMYK", "L", "LAB"])
def test_profiles_of_other_colour_spaces_are_not_for_rgb(
    photo, written, other_profile, mode
):
    spaces = {"CMYK": b"CMYK", "L": b"GRAY", "LAB": b"Lab "}
    profile = other_profile[:16] + spaces[mode] + other_profile[20:]
    image = photo.convert("L") if mode == "LAB" else photo.convert(mode)
    image.info["icc_profile"] = profile
    # As programs do that keep a profile, whatever the format.
    assert written(image, icc_profile=profile) is None
    assert written(image, icc_profile=other_profile) == other_profile


@pytest.mark.parametrize("space", [b"Lab ", b"CMYK", None])
def test_what_is_no_rgb_profile_is_not_kept(photo, written, other_profile, space):
    given = b"junk" * 99
    if space is not None:
        given = other_profile[:16] + space + other_profile[20:]
    assert written(photo, icc_profile=given) is None
    photo.info["icc_profile"] = other_profile  # what the pixels are in
    assert written(photo, icc_profile=given) == other_profile


@pytest.mark.parametrize(
    "expected",
    [semlic_jax.BitstreamError, Image.UnidentifiedImageError, OSError, ValueError],
)
def test_damaged_files(saved, expected):
    data = bytearray(saved.read_bytes())
    data[-1] ^= 1
    saved.write_bytes(data)
    with pytest.raises(expected) as caught:
        Image.open(saved)
    with pytest.raises(semlic_jax.BitstreamError) as plain:
        unpack(bytes(data))
    assert str(caught.value) == str(plain.value)


def test_damage_that_shows_at_the_pixels(saved, monkeypatch):
    def damaged(data):
        raise semlic_jax.BitstreamError("no end")

    monkeypatch.setattr(pillow_plugin._models, "of_file", damaged)
    with Image.open(saved) as image, pytest.raises(OSError, match="no end"):
        image.load()


@pytest.mark.parametrize("background", [7, (1, 2), (0, 0, 256), "whyte", 0.5])
def test_backgrounds_that_are_no_colour(photo, model, background):
    clear = photo.copy()
    clear.putalpha(9)
    for image in (photo, clear):
        with pytest.raises(ValueError, match="colour"):
            image.save(io.BytesIO(), "SEMLIC", model=model, background=background)


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


def test_eight_threads_at_one_image(saved, model, monkeypatch):
    """It is decoded once, and all of them see all of it."""
    codec = semlic_jax.load(model)
    expected = codec.decompress(saved.read_bytes())
    decoded = []

    class Counter:
        def decompress(self, data):
            decoded.append(len(data))
            return codec.decompress(data)

    monkeypatch.setattr(pillow_plugin._models, "of_file", lambda data: Counter())
    with Image.open(saved) as image, ThreadPoolExecutor(8) as pool:
        for pixels in pool.map(lambda _: np.asarray(image), range(32)):
            np.testing.assert_array_equal(pixels, expected)
    assert decoded == [saved.stat().st_size]


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


@pytest.fixture
def models(monkeypatch):
    """Models of which `small`, `variant` and `other` differ in their decoder alone."""
    small = bytes.fromhex(pretrained_models()["small"]["fingerprint"])
    monkeypatch.setattr(
        semlic_jax,
        "load",
        lambda name: types.SimpleNamespace(
            name=name, fingerprint=b"elsewhere" if name == "own" else small
        ),
    )
    models = pillow_plugin._Models()

    def decoder_of(name):
        fingerprint = semlic_jax.load(name).fingerprint
        return models.of_file(pack(Header(8, 8, 0, fingerprint), b"")).name

    models.decoder_of = decoder_of
    return models


def test_a_model_that_saves_does_not_decode_the_files_of_others(models):
    models.named("variant")
    models.named("own")
    assert models.decoder_of("small") == "small"
    assert models.decoder_of("own") == "own"


def test_the_model_that_was_registered_last_decodes(models):
    assert models.decoder_of("small") == "small"
    for name in ("variant", "other", "variant", "own"):
        models.register(name)
        assert models.decoder_of("small") == (name if name != "own" else "variant")


@pytest.mark.parametrize("name", [3, b"small", "", 0.5])
def test_what_is_no_name_of_a_model(photo, name):
    with pytest.raises(ValueError, match="expected a model's name or path as model"):
        photo.save(io.BytesIO(), "SEMLIC", model=name)
    with pytest.raises(ValueError, match="expected a model's name or path as model"):
        pillow_plugin.register_model(name)


@pytest.mark.parametrize("option", ["refine", "max_bytes"])
def test_yes_is_no_number(photo, model, option):
    with pytest.raises(ValueError, match=f"a number as {option}, found True"):
        photo.save(io.BytesIO(), "SEMLIC", model=model, **{option: True})


def test_importing_it_is_light():
    code = (
        "import sys, semlic_jax.pillow_plugin\n"
        "from PIL import Image\n"
        "assert Image.registered_extensions()['.semlic'] == 'SEMLIC'\n"
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_entry_point_is_the_plugin():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    groups = tomllib.loads(text)["project"]["entry-points"]
    (name, value), *others = groups["pillow.plugins"].items()
    assert name == "semlic" and not others
    assert EntryPoint(name, value, "pillow.plugins").load() is pillow_plugin
