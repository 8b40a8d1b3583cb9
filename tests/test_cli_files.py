# SPDX-License-Identifier: Apache-2.0
"""`semlic compress | decompress` of several files, through streams, for programs."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import semlic_jax
from semlic_jax import cli, terminal
from semlic_jax.coding.bitstream import Header, pack, unpack
from semlic_jax.evaluation.demo import packaged_photograph


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with two photographs in it."""
    monkeypatch.chdir(tmp_path)
    pixels = packaged_photograph().pixels
    Image.fromarray(pixels[120:168, 200:264]).save("a.png")
    Image.fromarray(pixels[20:52, 100:148]).save("b.png")
    return tmp_path


@pytest.fixture
def semlic(capfdbinary, tiny_model, monkeypatch):
    """Runs a command with the small test model; gives status, output and errors."""

    def run(*argv, stdin=b"", model=tiny_model):
        argv = [str(arg) for arg in argv]
        if model is not None and argv[0] in ("compress", "decompress"):
            argv += ["--model", str(model)]
        stream = None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin))
        monkeypatch.setattr(sys, "stdin", stream)
        try:
            status = cli.main(argv)
        except SystemExit as stop:  # argparse
            status = stop.code
        captured = capfdbinary.readouterr()
        return status, captured.out, captured.err.decode()

    return run


COMPRESS = ("compress", "a.png", "b.png", "--quality", 0.5, "--out-dir", "out/deep")


def pixels_of(source):
    with Image.open(source) as image:
        return np.asarray(image)


# Several files.


def test_there_and_back(folder, semlic):
    status, out, err = semlic(*COMPRESS)
    assert (status, err) == (0, "")
    assert sorted(os.listdir("out/deep")) == ["a.semlic", "b.semlic"]
    lines = out.decode().splitlines()
    assert [line.split(":")[0] for line in lines] == [
        os.path.join("out", "deep", name) for name in ("a.semlic", "b.semlic")
    ]
    assert semlic("compress", "a.png", "--quality", 0.5)[0] == 0
    assert Path("a.semlic").read_bytes() == Path("out/deep/a.semlic").read_bytes()
    files = ["out/deep/a.semlic", "out/deep/b.semlic"]
    status, out, err = semlic("decompress", *files, "--out-dir", "back")
    assert (status, err) == (0, "") and len(out.splitlines()) == 2
    assert sorted(os.listdir("back")) == ["a.png", "b.png"]
    assert pixels_of("back/b.png").shape == (32, 48, 3)
    command = ("decompress", "--out-dir", "back", "--format", ".TIF", *files)
    assert semlic(*command)[0] == 0
    np.testing.assert_array_equal(pixels_of("back/a.tif"), pixels_of("back/a.png"))


def test_one_file_may_go_into_a_folder(folder, semlic):
    command = ("compress", "a.png", "--out-dir", "out", "--quality", 0.5)
    assert semlic(*command)[0] == 0
    assert os.listdir("out") == ["a.semlic"]


def test_files_that_fail_are_skipped(folder, semlic):
    Path("broken.png").write_bytes(b"no image")
    command = ("compress", "none.png", "a.png", "broken.png", "b.png")
    status, out, err = semlic(*command, "--quality", 0.5, "--out-dir", "out")
    assert status == 4 and len(out.splitlines()) == 2
    assert err == (
        "skipped none.png: No such file or directory\n"
        "skipped broken.png: broken.png is not an image in a known format\n"
    )
    assert sorted(os.listdir("out")) == ["a.semlic", "b.semlic"]
    stranger = pack(Header(8, 8, 99, b"\x12\x34\x56\x78"), b"payload!")
    Path("other.semlic").write_bytes(stranger)
    command = ("decompress", "other.semlic", "out/a.semlic", "--out-dir", "back")
    status, out, err = semlic(*command)
    assert status == 4 and err.startswith("skipped other.semlic: ")
    assert os.listdir("back") == ["a.png"]


def test_names_that_no_file_can_have_are_skipped_too(folder, semlic):
    """Whether the folder of the outputs is there or not."""
    long = "n" * 250 + ".png"  # too long for NAME.semlic
    shutil.copy("b.png", long)
    for out_dir in ("new", "new"):
        command = ("compress", "m" * 300, "a.png", long, "--quality", 0.5, "--force")
        status, out, err = semlic(*command, "--out-dir", out_dir)
        assert status == 4 and len(out.splitlines()) == 1
        first, second = err.splitlines()
        assert first == f"skipped {'m' * 300}: File name too long"
        target = os.path.join(out_dir, f"{long[:-4]}.semlic")
        assert second == f"skipped {long}: {target}: File name too long"
        assert os.listdir(out_dir) == ["a.semlic"]
    status, _, err = semlic("compress", long, "--quality", 0.5)
    assert status == 1 and "File name too long" in err


def test_an_output_that_is_named_like_a_folder_is_refused(folder, semlic):
    for command in (
        ("compress", "a.png", "new/", "--quality", 0.5),
        ("decompress", "a.semlic", "new.png/"),
    ):
        status, out, err = semlic(*command)
        assert (status, out) == (1, b"")
        name = command[2]
        assert err == (
            f"semlic: the output {name} is a folder: expected a file name, or "
            f"--out-dir {name}\n"
        )
        assert sorted(os.listdir()) == ["a.png", "b.png"]


def test_nothing_is_done_where_something_is_in_the_way(folder, semlic):
    os.makedirs("out/deep")
    Path("out/deep/b.semlic").write_bytes(b"mine")
    status, out, err = semlic(*COMPRESS)
    assert (status, out) == (1, b"") and "b.semlic exists: give --force" in err
    assert os.listdir("out/deep") == ["b.semlic"]
    assert semlic(*COMPRESS, "--force")[0] == 0
    assert unpack(Path("out/deep/b.semlic").read_bytes())[0].width == 48


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a.png", "c/a.jpg"], "found a.png and c/a.jpg for out/a.semlic"),
        (["a.png", "a.png"], "found a.png and a.png for out/a.semlic"),
        (["A.jpg", "a.png"], "found A.jpg and a.png for out/a.semlic"),
        (["a.png", "-"], "expected file names with --out-dir, found -"),
    ],
)
def test_inputs_that_do_not_fit_together(folder, semlic, arguments, words):
    command = ("compress", *arguments, "--quality", 0.5, "--out-dir", "out")
    status, out, err = semlic(*command)
    assert (status, out) == (1, b"") and words in err and not os.path.exists("out")


def test_refusals_before_the_work(folder, semlic):
    status, _, err = semlic("compress", "a.png", "b.png", "a.png", "--quality", 0.5)
    assert status == 2 and "found 3 names: several files need --out-dir DIR" in err
    command = ("compress", "a.png", "--quality", 0.5, "--out-dir")
    status, _, err = semlic(*command, "b.png")
    assert status == 1 and "expected a folder as --out-dir, found the file b" in err
    status, _, err = semlic(*command, "out", model="enormous")
    assert status == 1 and "enormous" in err
    status, _, err = semlic(*command, "out", "--background", "whyte")
    assert status == 1 and "whyte" in err
    os.link("a.png", "a.semlic")
    status, _, err = semlic(*command, ".", "--force")
    assert status == 1 and "is also an input" in err
    status, _, err = semlic("decompress", "a.semlic", "--out-dir", "out", model="none")
    assert status == 1 and "'none'" in err
    for options, words in (
        (["--format", "gif"], "cannot write .gif"),
        (
            ["x.jpg", "--format", "png"],
            "OUT to end in .png, as --format says, found x.jpg",
        ),
    ):
        status, _, err = semlic("decompress", "a.semlic", *options)
        assert status == 1 and words in err
    assert sorted(os.listdir()) == ["a.png", "a.semlic", "b.png"]


def test_progress_counts_files(folder, semlic, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    Path("b.png").write_bytes(b"no image")
    assert semlic(*COMPRESS)[0] == 4
    text = shown.getvalue()
    bar = "[############............] 1/2 files: reading b.png"
    assert bar in text and "0/2 files: compressing a.png" in text
    # Lines begin where there is no progress any more.
    assert "\r\x1b[Kskipped b.png: " in text and text.endswith("\r\x1b[K")
    monkeypatch.setattr(sys, "stderr", None)
    terminal.clear_line()


# For programs.


def test_json(folder, semlic):
    Image.open("a.png").convert("L").save("grey.png")
    status, out, err = semlic("compress", "grey.png", "--quality", 0.4, "--json")
    facts = json.loads(out)
    size = os.path.getsize("grey.semlic")
    assert status == 0 and facts.pop("seconds") >= 0
    assert facts.pop("model").endswith("tiny.npz")
    assert facts == {
        "input": "grey.png",
        "output": "grey.semlic",
        "width": 64,
        "height": 48,
        "file_bytes": size,
        "bpp": pytest.approx(8 * size / (64 * 48), abs=1e-6),
        "quality": pytest.approx(0.4, abs=1e-6),
        "notes": ["a greyscale image was converted to RGB"],
    }
    command = ("decompress", "grey.semlic", "again.png", "--json")
    status, out, err = semlic(*command)
    again = json.loads(out)
    assert again["output"] == "again.png" and again["notes"] == []
    same = ("width", "height", "file_bytes", "bpp", "quality", "model")
    assert [again[name] for name in same[:5]] == [facts[name] for name in same[:5]]
    status, out, err = semlic(*COMPRESS, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["input"] for line in lines] == ["a.png", "b.png"]


def test_the_quality_that_a_budget_got_is_said(folder, semlic):
    semlic("compress", "a.png", "middle.semlic", "--quality", 0.5)
    budget = os.path.getsize("middle.semlic")
    status, out, _ = semlic("compress", "a.png", "--max-bytes", budget)
    quality = unpack(Path("a.semlic").read_bytes())[0].quality / 255
    assert f", quality {quality:.3f}, " in out.decode()


def test_json_of_a_refinement(folder, semlic, mini_model):
    command = ("compress", "a.png", "--quality", 0.5, "--json", "--refine", 2)
    options = ("--gamma", 0, "--roi", "50,0,20,20", "--model", mini_model)
    status, out, err = semlic(*command, *options, model=None)
    facts = json.loads(out)
    words = "the box 50,0,20,20 extends beyond the image of 64x48"
    assert status == 0 and facts["steps"] == 2 and len(facts["notes"]) == 1
    assert words in facts["notes"][0] and f"note: {words}" in err


@pytest.mark.parametrize("box", ["300,300,10,10", "64,0,9,9", "0,-9,9,9"])
def test_boxes_outside_are_refused_before_the_work(folder, semlic, box):
    command = ("compress", "a.png", "--quality", 0.5, "--refine", 2, "--gamma", 0)
    # Not even the model is looked for.
    status, out, err = semlic(*command, "--roi", box, model="enormous")
    assert (status, out) == (1, b"")
    assert err == f"semlic: the box {box} lies outside the image of 64x48\n"


# Streams.


def test_streams(folder, semlic):
    photo = Path("a.png").read_bytes()
    command = ("compress", "-", "-", "--quality", 0.5)
    status, data, err = semlic(*command, stdin=photo)
    assert status == 0 and err.startswith("-: 64x48, ")
    semlic("compress", "a.png", "--quality", 0.5)
    assert data == Path("a.semlic").read_bytes()
    status, out, err = semlic("decompress", "-", "-", stdin=data)
    assert status == 0 and err.startswith("-: 64x48, ")
    with Image.open(io.BytesIO(out)) as image:
        assert (image.format, image.size) == ("PNG", (64, 48))
    status, out, _ = semlic("decompress", "-", "-", "--format", "bmp", stdin=data)
    assert out.startswith(b"BM")
    status, out, err = semlic("decompress", "-", "x.png", "--json", stdin=data)
    assert json.loads(out)["input"] == "-" and os.path.exists("x.png")
    status, out, err = semlic("info", "-", "--json", stdin=data)
    assert json.loads(out)["file"] == "-" and json.loads(out)["width"] == 64
    status, out, err = semlic("compress", "a.png", "-", "--quality", 0.5, "--json")
    assert out == data and json.loads(err)["output"] == "-"
    assert not os.path.exists("-")


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs /dev/zero")
def test_what_is_no_coded_file_is_not_read_to_its_end(folder, semlic):
    for command in (("info", "/dev/zero"), ("decompress", "/dev/zero", "x.png")):
        status, out, err = semlic(*command)
        assert (status, out) == (1, b"") and err.endswith(", found 00000000\n")
    assert not os.path.exists("x.png")


def test_an_output_folder_that_is_named_like_a_file_is_refused(folder, semlic):
    status, out, err = semlic("refine", "a.png", "a.semlic", "--bpp", 1, model=None)
    assert (status, out) == (1, b"") and not os.path.exists("a.semlic")
    assert "found a.semlic: for one photograph there is semlic compress" in err


def test_notes_and_refusals_of_streams(folder, semlic):
    stream = io.BytesIO()
    Image.open("a.png").convert("L").save(stream, "PNG")
    command = ("compress", "-", "x.semlic", "--quality", 0.5)
    status, _, err = semlic(*command, stdin=stream.getvalue())
    assert err == "note: standard input: a greyscale image was converted to RGB\n"
    status, out, err = semlic("compress", "-", "-", "--quality", 0.5, stdin=b"")
    assert (status, out) == (1, b"") and "the input is not an image" in err


def test_a_file_of_that_name_can_be_named(folder, semlic):
    os.rename("a.png", "-")
    command = ("compress", "./-", "./-.semlic", "--quality", 0.5)
    assert semlic(*command)[0] == 0
    assert sorted(os.listdir()) == ["-", "-.semlic", "b.png"]


def test_closed_streams_are_refused(folder, semlic, monkeypatch):
    status, _, err = semlic("info", "-", stdin=None)
    assert status == 1 and "expected data on standard input" in err
    monkeypatch.setattr(sys, "stdout", None)
    status, _, err = semlic("compress", "a.png", "-", "--quality", 0.5)
    assert status == 1 and "expected an open standard output for -" in err


def test_a_shell_that_appends_loses_nothing(folder, tiny_model):
    Path("log").write_bytes(b"kept\n")
    command = [sys.executable, "-m", "semlic_jax.cli", "compress", "a.png"]
    command += ["/dev/stdout", "--quality", "0.5", "--force", "--model", tiny_model]
    with open("log", "ab") as log:
        process = subprocess.run(command, stdout=log, stderr=subprocess.PIPE)
    assert process.returncode == 0 and b"/dev/stdout: 64x48" in process.stderr
    data = Path("log").read_bytes()
    assert data[:5] == b"kept\n" and unpack(data[5:])[0].width == 64


def test_pipes_of_programs(folder, tiny_model):
    program = f"{sys.executable} -m semlic_jax.cli"
    model = f"--model {tiny_model}"
    done = subprocess.run(
        f"cat a.png | {program} compress - - --quality 0.1 {model} "
        f"| {program} decompress - - {model} > again.png",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout == ""
    assert pixels_of("again.png").shape == (48, 64, 3)
    assert len(done.stderr.splitlines()) == 2


# Folders.


def test_folders_that_are_not_looked_into_are_named(folder, semlic, monkeypatch):
    os.makedirs("photos/holiday")
    os.makedirs("photos/.hidden")
    os.makedirs("photos/out")
    command = ("refine", "photos", "photos/out", "--bpp", 0.2, "--gamma", 0)
    status, _, err = semlic(*command)
    assert status == 1 and "no image files in photos (2 subfolders are not" in err
    os.rename("a.png", "photos/a.png")
    status, _, err = semlic(*command, "--model", "enormous")
    note = "note: photos: subfolders are not searched: holiday\n"
    assert status == 1 and err.startswith(note)
    options = ("--out", "photos/out", "--codecs", "none", "--bpp", 0.2)
    status, _, err = semlic("eval", "photos", *options)
    assert status == 1 and err.startswith(note)


@pytest.mark.parametrize(
    ("name", "notes"),
    [
        ("c.bmp", ["BMP has no place for the ICC profile, which was dropped"]),
        ("c.png", []),
    ],
)
def test_a_profile_that_is_dropped_is_noted(
    folder, semlic, other_profile, monkeypatch, name, notes
):
    header = Header(8, 8, 0, b"none", {b"ICCP": other_profile})
    (folder / "c.semlic").write_bytes(pack(header, b""))

    class Decoder:
        name = "none"

        def decompress(self, data):
            return np.zeros((8, 8, 3), np.uint8)

    monkeypatch.setattr(semlic_jax, "load", lambda name: Decoder())
    status, out, err = semlic("decompress", "c.semlic", name, "--json")
    assert status == 0 and json.loads(out)["notes"] == notes
    assert err == "".join(f"note: c.semlic: {note}\n" for note in notes)
