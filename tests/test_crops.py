# SPDX-License-Identifier: Apache-2.0
"""Details of photographs side by side."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from semlic_jax.evaluation import crops


@pytest.fixture
def photo(tmp_path, photograph):
    path = tmp_path / "photo.png"
    Image.fromarray(photograph(96, 128, seed=2)).save(path)
    return path


def test_details_are_shown_as_they_are(tmp_path, photo, capsys):
    out = tmp_path / "crops.png"
    arguments = [f"{photo}:20,10,64,48", f"{photo}:0,0,64,80", "--out", str(out)]
    arguments += ["--codecs", "jpeg,webp", "--bpp", "2"]
    assert crops.main(arguments) == 0
    assert capsys.readouterr().out.split() == [str(out)]
    picture = np.asarray(Image.open(out))
    original = np.asarray(Image.open(photo))
    # The first column: the details, pixel for pixel.
    x, y = crops._MARGIN, crops._MARGIN + crops._LABEL_HEIGHT - 4
    np.testing.assert_array_equal(
        picture[y : y + 48, x : x + 64], original[10:58, 20:84]
    )
    y += 48 + crops._LABEL_HEIGHT
    np.testing.assert_array_equal(picture[y : y + 80, x : x + 64], original[:80, :64])
    # The others: like them, but not them.
    width = (picture.shape[1] - 2 * crops._MARGIN - 2 * crops._GAP) // 3
    x += width + crops._GAP
    made = picture[y : y + 80, x : x + 64].astype(float)
    assert 0 < np.abs(made - original[:80, :64]).mean() < 40
    # Nothing is lost unasked.
    assert crops.main(arguments) == 1
    assert "--force" in capsys.readouterr().err
    assert crops.main([*arguments, "--force"]) == 0


def test_a_rate_that_is_not_reached_is_said(tmp_path, photo):
    pixels = np.asarray(Image.open(photo))
    (jpeg,) = crops.entrants(["jpeg"])
    image, facts = crops._decoded(jpeg, pixels, 0.01)
    assert image is None and "its smallest file of this image takes" in facts
    out = tmp_path / "crops.png"
    detail = crops.Detail.parse(f"{photo}:0,0,120,90")
    crops.crops([detail], out, codecs=["jpeg"], bpp=0.01)
    made = np.asarray(Image.open(out))
    cell = made[crops._MARGIN + 18 :, crops._MARGIN + 120 + crops._GAP :]
    ink = (cell != crops._GROUND).any(axis=(1, 2))
    assert ink[:40].any() and not ink[70:].any()  # said, and nothing shown
    assert (cell[:, -4:] == crops._GROUND).all()  # within its column


@pytest.mark.parametrize(
    ("box", "said"),
    [
        ("0,0,64", "expected PHOTO:x,y,width,height"),
        ("0,0,0,64", "expected PHOTO:x,y,width,height"),
        ("-1,0,64,64", "expected PHOTO:x,y,width,height"),
        ("100,0,64,64", "128 x 96, found one that extends to 164, 64"),
    ],
)
def test_details_that_are_not_there(tmp_path, photo, capsys, box, said):
    out = tmp_path / "crops.png"
    assert crops.main([f"{photo}:{box}", "--out", str(out)]) == 1
    assert said in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("bpp", ["nan", "-1", "0"])
def test_a_rate_that_is_none(tmp_path, photo, capsys, bpp):
    out = tmp_path / "crops.png"
    arguments = [f"{photo}:0,0,64,64", "--out", str(out), "--codecs", "jpeg"]
    assert crops.main([*arguments, f"--bpp={bpp}"]) == 1
    assert "expected rates above 0" in capsys.readouterr().err
    assert not out.exists()


def test_a_picture_of_no_known_kind(tmp_path, photo, capsys):
    out = tmp_path / "crops.xyz"
    assert crops.main([f"{photo}:0,0,64,64", "--out", str(out)]) == 1
    assert ".xyz" in capsys.readouterr().err
