# SPDX-License-Identifier: Apache-2.0
"""The demo: its three files, its picture, its table."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image, ImageCms

import semlic_jax
from semlic_jax import cli
from semlic_jax.evaluation import demo
from semlic_jax.evaluation.codecs import CodecUnavailableError, classical_codec
from semlic_jax.images import Photograph


def test_packaged_photograph():
    photograph = demo.packaged_photograph()
    assert photograph.pixels.shape == (400, 600, 3)
    assert photograph.notes == ()


def test_psnr_of_known_differences():
    black = np.zeros((4, 4, 3), np.uint8)
    assert demo.psnr_db(black, black) == float("inf")
    # 10 log10(255^2 / error^2); differences and squares of uint8 must not wrap.
    for error, expected_db in ((1, 48.1308), (200, 2.1102)):
        other = black + np.uint8(error)
        assert demo.psnr_db(black, other) == pytest.approx(expected_db, abs=1e-4)
        assert demo.psnr_db(other, black) == pytest.approx(expected_db, abs=1e-4)


def test_busiest_corner_finds_the_texture():
    image = np.full((60, 90, 3), 128, np.uint8)
    rng = np.random.default_rng(3)
    image[20:40, 30:50] = rng.integers(0, 256, (20, 20, 3))
    image[:, 70:] = rng.integers(100, 150, (60, 20, 3))  # weaker, and more of it
    image[45:, :] = rng.integers(100, 150, (15, 90, 3))
    # The window takes the texture and the edge around it: one pixel of slack.
    left, top = demo.busiest_corner(image, 22, 22)
    assert 28 <= left <= 30 and 18 <= top <= 20


@pytest.mark.parametrize("size", [(90, 60), (60, 90)])
def test_busiest_corner_of_the_whole_image(size):
    image = np.zeros((size[1], size[0], 3), np.uint8)
    assert demo.busiest_corner(image, *size) == (0, 0)


def candidates(width: int, height: int) -> list[demo.Candidate]:
    """Codecs whose pictures are one colour each, so that they can be found again."""
    names = ["original", "semlic", "AVIF", "WebP", "JPEG"]
    return [
        demo.Candidate(
            name,
            1000 + index,
            np.full((height, width, 3), (50 * index, 0, 255), np.uint8),
            30.0,
            over_budget=name == "JPEG",
        )
        for index, name in enumerate(names)
    ]


@pytest.mark.parametrize(
    "size", [(600, 400), (400, 900), (3000, 2000), (5, 3), (1, 1), (2000, 2)]
)
def test_picture_holds_every_codec_twice(size):
    width, height = size
    picture = np.asarray(demo.draw_comparison(candidates(width, height), "photo"))
    assert max(picture.shape) < 2200
    for index in range(5):
        found = (picture == (50 * index, 0, 255)).all(axis=2).sum()
        detail = min(width, 384) * min(height, 288)
        scale = min(1, 384 / width, 480 / height)
        whole = max(1, round(width * scale)) * max(1, round(height * scale))
        frame = 4 * (width * scale + height * scale) if index == 0 else 0
        assert detail + whole - frame <= found <= detail + whole


def test_table_has_a_line_for_each_codec():
    lines = demo.table(candidates(100, 50)).splitlines()
    assert [line.split()[0] for line in lines] == "codec semlic AVIF WebP JPEG".split()
    assert "1,001" in lines[1] and "1.602" in lines[1]  # 8 * 1001 / 5000
    assert [("smallest" in line) for line in lines] == [False] * 4 + [True]
    # One pixel takes thousands of bits.
    assert demo.table(candidates(1, 1)).splitlines()[1].split()[1:3] == [
        "1,001",
        "8008.000",
    ]


def test_names_with_line_breaks_have_a_title():
    one, other = (
        np.asarray(demo.draw_comparison(candidates(64, 48), title))
        for title in ("a b", "a\nb")
    )
    np.testing.assert_array_equal(one, other)


def test_demo_files(tmp_path, tiny_model):
    codec = semlic_jax.load(tiny_model)
    pixels = demo.packaged_photograph().pixels[120:168, 200:264]
    bpp = 8 * len(codec.compress(pixels, quality=0.5)) / (64 * 48)
    outputs, made = demo.run_demo(
        codec, Photograph(pixels), "cup", tmp_path / "new", bpp=bpp
    )
    assert sorted(os.listdir(tmp_path / "new")) == sorted(
        path.name for path in outputs.paths()
    )
    data = outputs.file.read_bytes()
    assert 8 * len(data) <= bpp * 64 * 48
    with Image.open(outputs.decoded) as image:
        np.testing.assert_array_equal(np.asarray(image), codec.decompress(data))
    assert [each.name for each in made] == [
        "original",
        "semlic",
        "AVIF",
        "WebP",
        "JPEG",
    ]
    for rival in made[2:]:
        assert rival.over_budget or rival.file_bytes <= len(data)


class Stub:
    """A codec whose files are 2,000 bytes."""

    def compress(self, pixels, **options):
        self.pixels = pixels
        return bytes(2000)

    def decompress(self, data):
        return self.pixels


def test_rivals_that_fail_are_left_out_with_a_reason(tmp_path, monkeypatch, photograph):
    """WebP ends at 16,383 pixels; and one that this machine lacks."""

    def without_avif(name):
        if name == "avif":
            raise CodecUnavailableError("this Pillow was built without AVIF")
        return classical_codec(name)

    monkeypatch.setattr(demo, "classical_codec", without_avif)
    notes = []
    pixels = np.tile(photograph(4, 41), (1, 400, 1))
    _, made = demo.run_demo(
        Stub(), Photograph(pixels), "cup", tmp_path, bpp=1, note=notes.append
    )
    assert [each.name for each in made] == ["original", "semlic", "JPEG"]
    assert notes[0] == "avif is left out: this Pillow was built without AVIF"
    assert notes[1].startswith("webp is left out: ") and "16383" in notes[1]


def test_a_rate_out_of_reach_is_named_and_leaves_nothing(tmp_path, capsys, tiny_model):
    image, out = tmp_path / "tiny.png", tmp_path / "new" / "demo"
    Image.new("RGB", (4, 4)).save(image)
    command = ["demo", str(image), "--model", str(tiny_model), "--out", str(out)]
    assert cli.main(command) == 1
    assert "found 0.15 bpp, which is 0 bytes\n" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["tiny.png"]
    out.parent.mkdir()  # what was there before stays
    assert cli.main(command) == 1
    assert os.listdir(tmp_path / "new") == []


def test_demo_refuses_before_it_works(tmp_path):
    (tmp_path / "cup.comparison.png").touch()
    with pytest.raises(ValueError, match="cup.comparison.png exists"):
        # No codec is there to be called.
        demo.run_demo(
            None, Photograph(np.zeros((8, 8, 3), np.uint8)), "cup", tmp_path, bpp=1
        )
    assert os.listdir(tmp_path) == ["cup.comparison.png"]


def test_pictures_keep_the_colour_profile(tmp_path, photograph):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    made = Photograph(photograph(64, 64), icc_profile=profile)
    outputs, _ = demo.run_demo(Stub(), made, "cup", tmp_path, bpp=4)
    for path in (outputs.decoded, outputs.comparison):
        with Image.open(path) as image:
            assert image.info["icc_profile"] == profile, path


def test_a_rival_that_cannot_shows_its_smallest_file(photograph):
    pixels = photograph(64, 64)
    codec = demo.classical_codec("jpeg")
    found = demo._rival(codec, pixels, 10)
    assert found.over_budget
    assert found.file_bytes == len(codec.encode(pixels, codec.settings[0]))
    original = demo.Candidate("original", 1, pixels, float("inf"))
    found = demo.Candidate("a", 9, pixels, 30.0, True, encode_s=1.25, decode_s=2.5)
    _, line = demo.table([original, found]).splitlines()
    assert line.split("dB")[1].split()[:4] == ["1.25", "s", "2.50", "s"]
    assert line.endswith("its smallest file")
    below = demo.Candidate("b", 9, pixels, 30.0)
    assert "smallest" not in demo.table([original, below])
