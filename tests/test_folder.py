# SPDX-License-Identifier: Apache-2.0
"""Folders of photographs: what is skipped, and names of any kind."""

from __future__ import annotations

import os
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image

from semlic_jax.refinement import Refined, preset, refine_folder
from semlic_jax.refinement import folder as folder_module
from semlic_jax.refinement.batch import Progress
from semlic_jax.refinement.folder_table import Table, to_csv

SIZE = (20, 30)
SETTINGS = preset(4, gamma=0.0)


class Stub:
    """A codec whose files are the pixels."""

    fingerprint = b"stub"

    def __init__(self, failing=None, error=None):
        self.failing, self.error = failing, error

    def bucket(self, size):
        return size

    def budget_bytes(self, bpp, size):
        return size[0] * size[1] * 3

    def compress(self, pixels, **options):
        if pixels[0, 0, 0] == self.failing:
            raise self.error
        return pixels.tobytes()


@pytest.fixture(autouse=True)
def refined(monkeypatch):
    """The images that are refined, each by its first value."""
    seen = []

    def refine_batch(codec, images, *, unrefined, **options):
        assert len({codec.bucket(image.shape[:2]) for image in images}) == 1
        seen.extend(int(image[0, 0, 0]) for image in images)
        return [Refined(data, data, 1.0, 2.0, SETTINGS.steps, ()) for data in unrefined]

    monkeypatch.setattr(folder_module, "refine_batch", refine_batch)
    return seen


@pytest.fixture
def album(tmp_path):
    """Three photographs of one colour each: 1, 2 and 3."""
    folder = tmp_path / "in"
    folder.mkdir()
    for value, name in enumerate("abc", start=1):
        Image.new("RGB", SIZE[::-1], (value, 0, 0)).save(folder / f"{name}.png")
    return folder


def run(album, codec=None, bpp=1.0, **options):
    return refine_folder(
        codec or Stub(),
        sorted(album.iterdir()),
        album.parent / "out",
        bpp=bpp,
        settings=SETTINGS,
        **options,
    )


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError("encoding needs 9 GiB"), "not enough memory: encoding needs"),
        (MemoryError(), "not enough memory: MemoryError"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GiB"),
            "not enough memory: RESOURCE_EXHAUSTED",
        ),
        (ValueError("expected\nanother budget"), "expected another budget"),
    ],
)
def test_images_that_cannot_be_compressed_are_skipped(album, refined, error, reason):
    report = run(album, Stub(failing=2, error=error))
    assert refined == [1, 3] and [row.image for row in report.rows] == [
        "a.png",
        "c.png",
    ]
    assert list(report.skipped) == ["b.png"]
    assert report.skipped["b.png"].startswith(reason)


def test_errors_of_ours_end_the_run(album):
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        run(album, Stub(failing=2, error=jax.errors.JaxRuntimeError("INTERNAL: bug")))


@pytest.mark.parametrize("step", ["photograph_size", "read_photograph"])
def test_images_without_room_to_be_read_are_skipped(album, refined, monkeypatch, step):
    work = getattr(folder_module, step)

    def narrow(path, **options):
        if path.name == "b.png":
            raise MemoryError("9 GiB")
        return work(path, **options)

    monkeypatch.setattr(folder_module, step, narrow)
    assert run(album).skipped == {"b.png": "not enough memory: 9 GiB"}
    assert refined == [1, 3]


def test_images_too_large_for_their_reader_are_skipped(album, refined, monkeypatch):
    Image.new("RGB", (90, 90), (2, 0, 0)).save(album / "b.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    report = run(album)
    assert refined == [1, 3] and "refused for its size" in report.skipped["b.png"]


def test_damaged_exif_data_skip_no_image(album, refined):
    damaged = b"Exif\0\0MM\0*\xff\xff\xff\xff"
    Image.new("RGB", SIZE[::-1], (2, 0, 0)).save(album / "b.png", exif=damaged)
    assert not run(album).skipped and refined == [1, 2, 3]


def test_upright_photographs_are_of_their_own_bucket(album, refined):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", SIZE[::-1], (2, 0, 0)).save(album / "b.png", exif=exif)
    run(album, batch=3)
    assert refined == [1, 3, 2]


def test_processes_may_have_batches_of_different_sizes(album, refined):
    """Each image is in one share: a CPU's batches are of 1, an accelerator's of 16."""
    for value, name in enumerate("defg", start=4):
        Image.new("RGB", SIZE[::-1], (value, 0, 0)).save(album / f"{name}.png")
    run(album, processes=2, process=0, batch=1)
    run(album, processes=2, process=1, batch=16)
    assert sorted(refined) == [1, 2, 3, 4, 5, 6, 7]


def test_heads_with_another_size_do_not_end_the_run(album, refined, monkeypatch):
    Image.new("RGB", SIZE, (2, 0, 0)).save(album / "b.png")
    monkeypatch.setattr(folder_module, "photograph_size", lambda path: SIZE)
    assert len(run(album, batch=3).rows) == 3 and refined == [1, 3, 2]


def test_a_photograph_that_was_damaged_since_is_skipped(album, refined):
    (album / "a.png").unlink()
    path = album / "a.bmp"  # whose head is whole when its end is lost
    Image.new("RGB", SIZE[::-1], (1, 0, 0)).save(path)
    run(album)
    path.write_bytes(path.read_bytes()[:500])
    report = run(album)
    assert [row.image for row in report.rows] == ["b.png", "c.png"]
    assert "a.bmp is damaged" in report.skipped["a.bmp"]
    assert refined == [1, 2, 3]
    assert "a.bmp" in (album.parent / "out" / "refine.csv").read_text()


def test_names_that_are_not_utf_8(album, refined):
    name = os.fsdecode(b"caf\xe9.png")
    (album / "b.png").rename(album / name)
    report = run(album)
    assert [row.image for row in report.rows] == ["a.png", "c.png", name]
    out = album.parent / "out"
    assert (out / os.fsdecode(b"caf\xe9.semlic")).is_file()
    assert b"caf\xe9.png,caf\xe9.semlic," in (out / "refine.csv").read_bytes()
    assert len(run(album).rows) == len(refined) == 3  # it is found again


def test_names_with_a_carriage_return(album, refined):
    (album / "b.png").rename(album / "b\r.png")
    run(album)
    assert len(run(album).rows) == len(refined) == 3  # it is found again


def test_colours_are_converted_where_that_is_asked_for(
    album, refined, monkeypatch, other_profile
):
    profiles = []
    compress = Stub.compress

    def noting(self, pixels, **options):
        profiles.append(options["icc_profile"])
        return compress(self, pixels, **options)

    monkeypatch.setattr(Stub, "compress", noting)
    for path in album.iterdir():
        with Image.open(path) as image:
            image.save(path, icc_profile=other_profile)
    run(album)
    run(album, srgb=True, force=True)
    assert profiles == [other_profile] * 3 + [None] * 3
    assert len(run(album, srgb=True).rows) == 3 and len(profiles) == 6


def test_another_profile_is_another_photograph(album, refined, monkeypatch):
    profiles = [b"one", b"one", b"two"]
    read = folder_module.read_photograph

    def with_profile(path, **options):
        return replace(read(path, **options), icc_profile=profiles[0])

    monkeypatch.setattr(folder_module, "read_photograph", with_profile)
    run(album)
    profiles.pop(0)
    assert len(run(album).rows) == len(refined) == 3
    profiles.pop(0)
    with pytest.raises(ValueError, match="a.semlic was not made from this image"):
        run(album)


def test_runs_that_made_the_same_file(album, refined):
    """The files of the stub do not depend on the rate, but the rows' tasks do."""
    for process in (0, 1):
        run(album, processes=2, process=process)
    run(album, bpp=2.0, force=True)
    assert len(refined) == 6
    assert len(run(album, bpp=2.0).rows) == len(run(album).rows) == 3
    assert len(refined) == 6


# The table.

HEAD = to_csv([], header=True)


OTHER_ORDER = b",".join(HEAD.strip().split(b",")[::-1]) + b"\n"


@pytest.mark.parametrize(
    "left",
    [b"", HEAD[:8], HEAD + b"b.png,b.semlic,64,6", HEAD + b'"b,.pn', OTHER_ORDER],
)
def test_tables_that_were_cut_off_or_edited_are_gone_on_with(album, refined, left):
    (album.parent / "out").mkdir()
    (album.parent / "out" / "refine.csv").write_bytes(left)
    with pytest.raises(KeyboardInterrupt):
        run(album, Stub(failing=3, error=KeyboardInterrupt()))
    assert refined == [1, 2]
    assert len(run(album).rows) == len(refined) == 3


def test_tables_of_others_are_not_replaced(album, refined):
    out = album.parent / "out"
    out.mkdir()
    (out / "refine.csv").write_text("my,notes\n1,2\n")
    with pytest.raises(ValueError, match="expected a table of refined files"):
        run(album)
    assert os.listdir(out) == ["refine.csv"] and not refined
    assert (out / "refine.csv").read_text() == "my,notes\n1,2\n"
    with pytest.raises(KeyboardInterrupt):
        run(album, Stub(failing=3, error=KeyboardInterrupt()), force=True)
    assert len(run(album).rows) == len(refined) == 3
    # With notes beside it, it is still ours.
    lines = (out / "refine.csv").read_text().splitlines()
    (out / "refine.csv").write_text("".join(f"{line},notes\n" for line in lines))
    assert len(run(album).rows) == len(refined) == 3


@pytest.mark.parametrize("content", ['a,"' + 200_000 * "x" + '"\n', "a\rb,c\n"])
def test_tables_that_are_no_csv(album, refined, content):
    out = album.parent / "out"
    out.mkdir()
    for name in ("refine_notes.csv", "refine.csv"):
        (out / name).write_bytes(content.encode())
        if name == "refine_notes.csv":
            assert len(run(album).rows) == 3
    with pytest.raises(ValueError, match="expected a table of refined files"):
        run(album)
    assert len(refined) == 3


def test_images_of_a_stopped_run_are_refined_again(album, refined, monkeypatch):
    """Their files are from too few steps; the other images were not begun."""
    whole = folder_module.refine_batch

    def stopped(*arguments, progress, **options):
        now = Progress(1, SETTINGS.steps, np.ones(1), np.ones(1))
        assert progress(now) is False
        return [each._replace(steps=1) for each in whole(*arguments, **options)]

    with monkeypatch.context() as patched:
        patched.setattr(folder_module, "refine_batch", stopped)
        report = run(album, progress=lambda now: False)
    assert report.stopped and refined == [1]
    assert [row.steps for row in report.rows] == [1]
    report = run(album)
    assert not report.stopped and refined == [1, 1, 2, 3]
    assert [row.steps for row in report.rows] == [SETTINGS.steps] * 3


def test_a_kill_between_a_row_and_its_file_leaves_no_file_that_is_not_ours(
    album, refined, monkeypatch
):
    def killed(table, row):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Table, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            run(album)
    assert len(run(album).rows) == 3 and refined == [1, 1, 2, 3]


def test_the_same_values_in_another_shape_are_another_photograph(album, refined):
    run(album)
    Image.new("RGB", SIZE, (2, 0, 0)).save(album / "b.png")
    with pytest.raises(ValueError, match="b.semlic was not made from this image"):
        run(album)


def test_another_model_or_trunk_is_another_task(album, refined):
    run(album)
    other = Stub()
    other.fingerprint = b"else"
    with pytest.raises(ValueError, match="a.semlic was not made from this image"):
        run(album, other)
    # A trunk counts by its weights.
    trunk = preset(4, gamma=1.0).load_features()
    near = replace(trunk, params=jax.tree.map(lambda leaf: 1.001 * leaf, trunk.params))
    texts = [
        folder_module._as_text(preset(4, gamma=1.0, features=network))
        for network in (trunk, trunk, near)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_seconds_are_those_of_one_image(album, refined, monkeypatch):
    times_s = iter([0.0, 6.0])
    monkeypatch.setattr(folder_module.time, "perf_counter", lambda: next(times_s))
    assert [row.seconds for row in run(album, batch=3).rows] == [2.0] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batch=0), "a batch of at least 1 image, found 0"),
        (dict(bpp=0.0), "bits per pixel above 0, found 0"),
        (dict(bpp=float("nan")), "bits per pixel above 0, found nan"),
        (dict(process=2, processes=2), "a process from 0 to 1 of 2, found 2"),
    ],
)
def test_numbers_out_of_range_are_refused(album, refined, options, message):
    with pytest.raises(ValueError, match=message):
        run(album, **options)
    assert not refined and not (album.parent / "out").exists()
