# SPDX-License-Identifier: Apache-2.0
"""Refinement by commands: interrupts, refusals, folders that resume."""

from __future__ import annotations

import csv
import os
import signal

import pytest
from PIL import Image
from refining import SIZE, squared_error

from semlic_jax import cli, memory, refinement
from semlic_jax.refinement import folder as folder_module
from semlic_jax.refinement.batch import Batch


@pytest.fixture
def semlic(capsys, mini_model):
    """Runs a command with the mini model; gives status, output and errors."""

    def run(*argv):
        argv = [str(arg) for arg in argv]
        if argv[0] in ("compress", "refine"):
            argv += ["--model", str(mini_model)]
        try:
            status = cli.main(argv)
        except SystemExit as stop:  # argparse
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


# `semlic compress --refine`.


@pytest.fixture
def photo(tmp_path, monkeypatch, image):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(image).save("photo.png")
    return tmp_path


STEPS = ("--refine", 40, "--gamma", 0)


def test_compress_refines(semlic, photo, mini_codec, mini_model, image):
    plain = mini_codec.compress(image, quality=0.5)
    bpp = 8 * len(plain) / image.size * 3
    status, out, err = semlic("compress", "photo.png", "--bpp", bpp, *STEPS)
    assert (status, err) == (0, "") and "40 steps" in out
    with open("photo.semlic", "rb") as stream:
        data = stream.read()
    assert len(data) <= len(plain)
    better = squared_error(mini_codec, data, image)
    assert better < squared_error(mini_codec, plain, image)
    back_again = ("decompress", "photo.semlic", "back.png", "--model", mini_model)
    assert semlic(*back_again)[0] == 0
    with Image.open("back.png") as back:
        assert back.size == (64, 56)


def test_an_interrupt_keeps_the_best(semlic, photo, monkeypatch):
    score = Batch.score
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:  # two are for the slope, then come looks after steps
            signal.raise_signal(signal.SIGINT)
        return score(*args)

    monkeypatch.setattr(Batch, "score", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    status, out, err = semlic(
        "compress", "photo.png", "--quality", 0.5, "--refine", 60, "--gamma", 0
    )
    assert status == 130 and "stopping with the result so far" in err
    chunk = refinement.preset(60).chunk_steps
    assert f" {chunk} steps" in out and os.path.exists("photo.semlic")
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_interrupt_ends_a_run_over_several_files(semlic, photo, monkeypatch):
    """Also where all steps of a file were made already."""
    Image.open("photo.png").save("second.png")
    finish = Batch.finish

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return finish(*args)

    monkeypatch.setattr(Batch, "finish", interrupted)
    files = ("photo.png", "second.png", "--out-dir", "out")
    status, out, err = semlic("compress", *files, "--quality", 0.5, *STEPS)
    assert status == 130 and "40 steps" in out
    assert os.listdir("out") == ["photo.semlic"]


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (("--refine", 0, "--gamma", 0), 1, "steps of at least 1"),
        (("--refine", "slow"), 1, "expected a preset"),
        (("--refine", "1.5"), 2, "a preset or a number of steps"),
        (("--refine", 5, "--alpha", -1), 1, "alpha of at least 0"),
        (("--refine", 5, "--method", "magic"), 1, "unknown rounding method"),
        (("--refine", 5, "--seed", 10**30), 1, "expected a seed from 0 to 4294967295"),
        ((*STEPS, "--mean-style", 1), 1, "--gamma above 0 with --mean-style, found 0"),
        ((*STEPS, "--structure", 1), 1, "--gamma above 0 with --structure, found 0"),
        ((*STEPS, "--lattice", 1), 1, "--gamma above 0 with --lattice, found 0"),
        ((*STEPS, "--features", "f"), 1, "--gamma above 0 with --features, found 0"),
        (("--alpha", 1), 1, "--alpha needs --refine"),
        (("--mean-style", 1), 1, "--mean-style needs --refine"),
        (("--lattice", 1), 1, "--lattice needs --refine"),
        (("--roi", "auto"), 1, "--roi needs --refine"),
        ((*STEPS, "--roi", "no.png"), 1, "the mask no.png does not exist"),
        ((*STEPS, "--roi", "1,2,3"), 1, "x,y,width,height"),
        (
            (*STEPS, "--roi-weight", 2, "--roi", "auto"),
            2,
            "expected a number from 0 to 1",
        ),
        ((*STEPS, "--roi-variant", "L3", "--roi", "auto"), 1, "L1"),
        (
            (*STEPS, "--roi", "auto", "--roi-variant", "L2"),
            1,
            "--gamma above 0 with --roi-variant L2, found 0",
        ),
        ((*STEPS, "--max-bytes", 20), 2, "not allowed with"),
    ],
)
def test_refusals(semlic, photo, options, status, words):
    found, out, err = semlic("compress", "photo.png", "--quality", 0.5, *options)
    assert (found, out) == (status, "") and words in err
    assert err.startswith("semlic: ") and err.count("\n") == 1
    assert os.listdir() == ["photo.png"]


def test_masks_of_another_size(semlic, photo):
    Image.new("L", (32, 28), 255).save("mask.png")
    call = ("compress", "photo.png", "--quality", 0.5, *STEPS[:1], 2, *STEPS[2:])
    status, out, err = semlic(*call, "--roi", "mask.png")
    assert status == 1 and "64 x 56" in err and "32 x 28" in err
    status, out, err = semlic(*call, "--roi", "mask.png", "--roi-resize")
    assert status == 0
    assert err == "note: the region covers the whole image: refining without one\n"


# Folders.


@pytest.fixture
def album(tmp_path, monkeypatch, photograph):
    monkeypatch.chdir(tmp_path)
    os.mkdir("in")
    for name, seed in (("a", 3), ("b", 4), ("c", 5)):
        Image.fromarray(photograph(*SIZE, seed=seed)).save(f"in/{name}.png")
    return tmp_path


BPP = 0.42  # within what the model reaches on these images
REFINE = ("refine", "in", "out", "--bpp", BPP, "--steps", 4, "--gamma", 0)


def rows_of(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def counted(monkeypatch, fail_at=None):
    """Counts the images that are refined; breaks off at one of them."""
    refine, names = refinement.refine_batch, []

    def counting(codec, images, **options):
        names.extend(images)
        if fail_at is not None and len(names) >= fail_at:
            raise KeyboardInterrupt
        return refine(codec, images, **options)

    monkeypatch.setattr(folder_module, "refine_batch", counting)
    return names


def test_a_folder_resumes_after_a_kill(semlic, album, monkeypatch):
    with monkeypatch.context() as patched:
        counted(patched, fail_at=3)
        assert semlic(*REFINE)[0] == 130
    assert sorted(os.listdir("out")) == ["a.semlic", "b.semlic", "refine.csv"]
    before = {name: os.stat(f"out/{name}.semlic").st_mtime_ns for name in "ab"}
    seen = counted(monkeypatch)
    status, out, err = semlic(*REFINE)
    assert (status, err) == (0, "") and len(seen) == 1
    for name, time_ns in before.items():
        assert os.stat(f"out/{name}.semlic").st_mtime_ns == time_ns
    rows = rows_of("out/refine.csv")
    assert [row["image"] for row in rows] == ["a.png", "b.png", "c.png"]
    for row in rows:
        size = os.path.getsize(f"out/{row['file']}")
        assert int(row["bytes"]) == size <= int(row["budget_bytes"])
        assert float(row["bpp"]) <= BPP
        assert float(row["value"]) <= float(row["unrefined_value"])
    assert semlic(*REFINE)[0] == 0 and len(seen) == 1
    # A file that was lost or damaged is made again.
    with open("out/b.semlic", "ab") as stream:
        stream.write(b"?")
    status, _, err = semlic(*REFINE)
    assert status == 1 and "b.semlic was not made from this image" in err
    os.remove("out/b.semlic")
    assert semlic(*REFINE)[0] == 0 and len(seen) == 2


def test_other_settings_do_not_replace_files(semlic, album, monkeypatch):
    assert semlic(*REFINE)[0] == 0
    seen = counted(monkeypatch)
    status, _, err = semlic(*REFINE, "--seed", 5)
    assert status == 1 and "out/a.semlic was not made" in err and not seen
    assert semlic(*REFINE, "--seed", 5, "--force")[0] == 0 and len(seen) == 3


def test_processes_share_a_folder(semlic, album, monkeypatch):
    seen = counted(monkeypatch)
    for process, count in ((0, 2), (1, 3)):
        status, _, _ = semlic(*REFINE, "--processes", 2, "--process", process)
        assert status == 0 and len(seen) == count
    names = [
        row["image"] for i in (0, 1) for row in rows_of(f"out/refine.{i}-of-2.csv")
    ]
    assert names == ["a.png", "c.png", "b.png"]
    # What two have done, one need not do again.
    assert semlic(*REFINE)[0] == 0 and len(seen) == 3
    assert len(rows_of("out/refine.csv")) == 3


def test_images_that_fail_do_not_end_the_run(semlic, album):
    with open("in/b.png", "wb") as stream:
        stream.write(b"no image")
    Image.new("RGB", (8, 8)).save("in/c.png")  # too few pixels for the rate
    status, out, err = semlic(*REFINE)
    assert status == 4 and out.startswith("a.semlic: ")
    assert "skipped b.png: " in err and "skipped c.png: expected a budget" in err


def test_images_without_room_do_not_end_the_run(semlic, album, monkeypatch):
    left = iter([1])
    monkeypatch.setattr(memory, "available_bytes", lambda: next(left, None))
    status, out, err = semlic(*REFINE)
    assert status == 4 and "skipped a.png: not enough memory: refining" in err
    assert [line.split(":")[0] for line in out.splitlines()[:2]] == [
        "b.semlic",
        "c.semlic",
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--processes", 2), "--process=0..N-1"),
        (("--process", 0), "--process=0..N-1"),
        (("--steps", 0), "steps of at least 1"),
        (("--distributed", "maybe"), "none, auto or explicit"),
        (("--coordinator", "host:1"), "--coordinator needs --distributed explicit"),
    ],
)
def test_refusals_of_folders(semlic, album, options, words):
    status, out, err = semlic(*REFINE, *options)
    assert (status, out) == (1, "") and words in err and not os.path.exists("out")


def test_names_that_collide_are_refused(semlic, album):
    Image.new("RGB", (64, 56)).save("in/a.bmp")
    status, _, err = semlic(*REFINE)
    assert status == 1 and "a.bmp" in err and "a.png" in err
