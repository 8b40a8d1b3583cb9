# SPDX-License-Identifier: Apache-2.0
"""HEIC and JPEG XL, which Pillow reads by other packages."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from semlic_jax.cli import main
from semlic_jax.evaluation.image_sets import list_images
from semlic_jax.images import photograph_of, photograph_size, read_photograph
from semlic_jax.other_formats import add_format_of
from semlic_jax.training.sources import image_files

HEIC_HEAD = b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf"
JXL_HEADS = b"\xff\x0a\x00", b"\x00\x00\x00\x0cJXL \r\n\x87\n\x00"


@pytest.fixture(scope="module")
def picture():
    """uint8 [24, 40, 3], smooth, so that lossy files keep it nearly."""
    rows, columns = np.mgrid[:24, :40]
    return np.stack([rows * 8, columns * 5, 220 - rows * 4], -1).astype(np.uint8)


@pytest.fixture(scope="module")
def heif():
    return pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")


def heic(heif, picture, *, mode="RGB", **options):
    image = Image.fromarray(picture).convert(mode)
    stream = io.BytesIO()
    heif.from_pillow(image).save(stream, quality=95, chroma=444, **options)
    return stream.getvalue()


def jxl(picture):
    pytest.importorskip("pillow_jxl", reason="pillow-jxl-plugin is not installed")
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "JXL", lossless=True)
    return stream.getvalue()


def isolated(code, *arguments):
    """What a process prints that has neither of the two packages."""
    gone = "import sys; sys.modules.update(pillow_heif=None, pillow_jxl=None)\n"
    done = subprocess.run(
        [sys.executable, "-c", gone + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_heic_files_and_streams(heif, picture, tmp_path):
    data = heic(heif, picture)
    path = tmp_path / "a.jpg"  # the suffix does not matter
    path.write_bytes(data)
    for source in (path, io.BytesIO(data)):
        photograph = read_photograph(source)
        assert photograph.notes == () and photograph.icc_profile is None
        assert np.abs(photograph.pixels.astype(int) - picture).mean() < 2
    assert photograph_size(path) == (24, 40)


@pytest.mark.parametrize("piped", [False, True])
def test_a_process_that_has_not_read_heic_before(heif, picture, tmp_path, piped):
    """The package is imported for the file, whoever else imported it in these tests."""
    path = tmp_path / "a"
    data = heic(heif, picture)
    if piped:
        if not hasattr(os, "mkfifo"):
            pytest.skip("no named pipes here")
        os.mkfifo(path)
        threading.Thread(target=path.write_bytes, args=(data,), daemon=True).start()
    else:
        path.write_bytes(data)
    code = (
        "import sys\n"
        "from semlic_jax.images import read_photograph\n"
        "assert 'pillow_heif' not in sys.modules\n"
        "print(read_photograph(sys.argv[1]).pixels.shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "(24, 40, 3)\n", done.stderr


def test_heic_is_upright(heif, picture):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    data = heic(heif, picture, exif=exif.tobytes())
    turned = read_photograph(io.BytesIO(data)).pixels
    assert np.abs(turned.astype(int) - np.rot90(picture, -1)).mean() < 2
    assert photograph_size(io.BytesIO(data)) == (40, 24)


def test_the_main_picture_of_heic_files_of_several(heif, picture):
    file = heif.HeifFile()
    file.add_from_pillow(Image.fromarray(picture))
    file.add_from_pillow(Image.fromarray(255 - picture))
    stream = io.BytesIO()
    file.save(stream, quality=95, chroma=444, primary_index=1)
    photograph = read_photograph(stream)
    assert np.abs(photograph.pixels.astype(int) - (255 - picture)).mean() < 2
    assert photograph.notes == ("only the main one of 2 frames is used",)


def test_what_is_lost_of_heic_is_noted(heif, picture):
    wide = (picture.astype(np.uint16) * 257).tobytes()
    stream = io.BytesIO()
    heif.from_bytes("RGB;16", (40, 24), wide).save(stream, quality=95)
    notes = read_photograph(stream).notes
    assert notes == ("10-bit samples were reduced to 8 bits",)


@pytest.mark.parametrize(
    ("primaries", "transfer", "noted"),
    [(1, 13, False), (1, 1, False), (2, 2, False), (12, 13, True), (1, 16, True)],
)
def test_colours_that_only_code_points_describe(
    heif, picture, primaries, transfer, noted
):
    data = heic(
        heif,
        picture,
        color_primaries=primaries,
        transfer_characteristics=transfer,
    )
    notes = read_photograph(io.BytesIO(data)).notes
    assert [note.startswith("it has no ICC profile") for note in notes] == [
        True
    ] * noted
    assert all(f"primaries {primaries}, transfer {transfer}" in note for note in notes)


def test_a_profile_goes_before_code_points(picture):
    image = Image.fromarray(picture)
    codes = {"color_primaries": 12, "transfer_characteristics": 16}
    image.info["nclx_profile"] = codes
    assert "primaries 12" in photograph_of(image).notes[0]
    profile = b"\0\0\0\x80" + bytes(12) + b"RGB " + bytes(16) + b"acsp" + bytes(88)
    image.info["icc_profile"] = profile
    photograph = photograph_of(image)
    assert photograph.icc_profile == profile and photograph.notes == ()


def test_jpeg_xl(picture, tmp_path):
    path = tmp_path / "a.jxl"
    path.write_bytes(jxl(picture))
    np.testing.assert_array_equal(read_photograph(path).pixels, picture)


@pytest.mark.parametrize("format_", ["heic", "jxl"])
def test_files_that_were_cut_off_are_refused(request, picture, format_):
    if format_ == "heic":
        data = heic(request.getfixturevalue("heif"), picture)
    else:
        data = jxl(picture)
    for length in (20, len(data) // 2, len(data) - 20):
        with pytest.raises(ValueError, match="the input is"):
            read_photograph(io.BytesIO(data[:length]))


@pytest.mark.parametrize(
    ("head", "package"),
    [(HEIC_HEAD, "pillow-heif")] + [(head, "pillow-jxl-plugin") for head in JXL_HEADS],
)
def test_a_missing_package_is_named(tmp_path, head, package):
    path = tmp_path / "photo"
    path.write_bytes(head + bytes(40))
    code = (
        "from semlic_jax.images import read_photograph\n"
        "stream = open(sys.argv[1], 'rb')\n"
        "stream.seek(3)  # Pillow reads from the start\n"
        "for source in sys.argv[1], stream:\n"
        "    try: read_photograph(source)\n"
        "    except ValueError as error: print(error)\n"
    )
    lines = isolated(code, path).splitlines()
    assert [f"pip install {package}" in line for line in lines] == [True, True]


def test_other_files_are_no_business_of_these_packages(tmp_path):
    path = tmp_path / "a.heic"
    path.write_bytes(b"no image")
    code = (
        "from semlic_jax.images import read_photograph\n"
        "try: read_photograph(sys.argv[1])\n"
        "except ValueError as error: print(error)\n"
    )
    assert isolated(code, path) == "a.heic is not an image in a known format\n"


def test_a_stream_is_left_where_it_was():
    stream = io.BytesIO(b"12345678")
    stream.seek(5)
    assert add_format_of(stream) is None
    assert stream.tell() == 5


def test_folders_hold_heic_with_or_without_the_package(tmp_path):
    """A photograph that cannot be read is skipped by name, not passed over."""
    for name in ("a.heic", "b.HIF", "c.jxl", "d.txt"):
        (tmp_path / name).write_bytes(b"")
    code = (
        "from pathlib import Path\n"
        "from semlic_jax.evaluation.image_sets import list_images\n"
        "print(*(path.name for path in list_images([Path(sys.argv[1])])))\n"
    )
    assert isolated(code, tmp_path) == "a.heic b.HIF c.jxl\n"
    assert [path.name for path in list_images([tmp_path])] == [
        "a.heic",
        "b.HIF",
        "c.jxl",
    ]
    names = sorted(os.path.basename(path) for path in image_files(str(tmp_path)))
    assert names == ["a.heic", "b.HIF", "c.jxl"]


@pytest.mark.parametrize("name", ["b.heic", "b.HEIF", "b.jxl"])
def test_compress_does_not_write_over_a_second_photograph(tmp_path, capsys, name):
    """What a shell makes of *.heic: the second one is taken for the output."""
    (tmp_path / name).write_bytes(b"a photograph")
    paths = [str(tmp_path / "a.heic"), str(tmp_path / name)]
    assert main(["compress", *paths, "--bpp", "0.2", "--force"]) == 1
    assert "named like an image" in capsys.readouterr().err
    assert (tmp_path / name).read_bytes() == b"a photograph"
