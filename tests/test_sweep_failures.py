# SPDX-License-Identifier: Apache-2.0
"""Sweeps with images, codecs and metrics that fail: gaps with their reasons."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sweeps import Counting, Failing, sweep

from semlic_jax.evaluation import image_sets
from semlic_jax.evaluation.entrants import (
    ClassicalEntrant,
)
from semlic_jax.evaluation.image_sets import list_images
from semlic_jax.evaluation.measures import Measures
from semlic_jax.evaluation.results import read_results
from semlic_jax.evaluation.sweep import run_sweep


class NoRoom(ClassicalEntrant):
    """A codec that has no room to begin with one of the images."""

    def fitter(self, image):
        if len(image) == 48:
            raise MemoryError("out of memory")
        return super().fitter(image)


@pytest.fixture
def with_one_lower(photo_folder, tmp_path, photograph):
    """Function (height) -> three photographs, and then one of this height."""

    def paths(height):
        path = tmp_path / "other.png"
        Image.fromarray(photograph(height, 80, 7)).save(path)
        return [*list_images([photo_folder]), path]

    return paths


def test_a_set_with_a_missing_file_is_not_a_smaller_set(
    with_one_lower, tmp_path, small_trunk
):
    codec = Failing("jpeg", ValueError("too low for me"), height=48)
    measures = Measures(["frechet"], patch_side=32)
    results = run_sweep(with_one_lower(48), [codec], [3.0], measures, tmp_path / "out")
    [row] = results.set_rows
    assert row.values == {} and row.bpp is None
    why = "1 of 4 images have none (other.png: too low for me)"
    assert row.gaps == {"frechet": why}
    assert [row.gaps.get("file") for row in results.rows].count("too low for me") == 1


@pytest.mark.parametrize("with_file", [True, False])
def test_images_smaller_than_a_patch_are_in_no_number_of_the_set(
    photo_folder, with_one_lower, tmp_path, small_trunk, with_file
):
    """The distance is one over the others, and so is the rate beside it."""
    height = 16
    codec = Failing("jpeg", ValueError("no"), height=0 if with_file else height)
    run = [codec], [6.0], Measures(["frechet"], patch_side=32)
    [alone] = run_sweep(list_images([photo_folder]), *run, tmp_path / "a").set_rows
    results = run_sweep(with_one_lower(height), *run, tmp_path / "b")
    [row] = results.set_rows
    rates = [found.bpp for found in results.rows]
    assert (rates[3] is not None) == with_file and rates[3] != alone.bpp
    assert row.bpp == alone.bpp == pytest.approx(np.mean(rates[:3]))
    assert row.values == alone.values and row.values
    assert row.gaps == {"images left out": "1 images are smaller than a patch"}


def test_a_codec_that_cannot_begin_with_an_image_leaves_a_gap(with_one_lower, tmp_path):
    """A model analyses the image before it looks for a file."""
    run = with_one_lower(48), [NoRoom("jpeg")], [2.0, 3.0], Measures(["psnr_db"])
    rows = run_sweep(*run, tmp_path / "out").rows
    gaps = [row.gaps.get("file") for row in rows]
    assert gaps == [None] * 6 + ["out of memory"] * 2


def test_a_link_that_leads_nowhere_is_named(photo_folder, tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    (folder / "gone.png").symlink_to(tmp_path / "nothing")
    (folder / "there.png").symlink_to(photo_folder / "photo0.png")
    results = sweep(folder, tmp_path / "out", [ClassicalEntrant("jpeg")])
    assert [image.name for image in results.images] == ["there.png"]
    [skipped] = results.skipped
    assert Path(skipped.name).name == "gone.png" and "No such file" in skipped.reason


def test_images_that_cannot_be_used_are_named(photo_folder, tmp_path):
    broken, twin = tmp_path / "broken.png", tmp_path / "twin.png"
    broken.write_bytes((photo_folder / "photo0.png").read_bytes()[:200])
    Image.open(photo_folder / "photo1.png").save(twin)
    paths = [*list_images([photo_folder]), broken, twin]
    results = run_sweep(
        paths,
        [ClassicalEntrant("jpeg")],
        [2.0],
        Measures(["psnr_db"]),
        tmp_path / "out",
    )
    assert len(results.images) == 3
    assert [Path(skipped.name).name for skipped in results.skipped] == [
        "broken.png",
        "twin.png",
    ]
    assert "damaged" in results.skipped[0].reason
    assert "same pixels as photo1.png" in results.skipped[1].reason
    with pytest.raises(ValueError, match="none of the 1 images could be read"):
        run_sweep([broken], [], [1.0], Measures([]), tmp_path / "none")


def test_names_that_are_not_utf_8(photo_folder, tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    path.write_bytes((photo_folder / "photo0.png").read_bytes())
    out = tmp_path / "out"
    results = run_sweep(
        [path], [ClassicalEntrant("jpeg")], [6.0], Measures(["psnr_db"]), out
    )
    assert b"caf\xe9.png," in (out / "results.csv").read_bytes()
    assert read_results(out) == results and results.images[0].name == path.name


def test_images_of_one_name_in_two_folders(photo_folder, tmp_path, photograph):
    Image.fromarray(photograph(40, 40, 9)).save(tmp_path / "photo0.png")
    results = run_sweep(
        list_images([photo_folder / "photo0.png", tmp_path]),
        [ClassicalEntrant("jpeg")],
        [6.0],
        Measures(["psnr_db"]),
        tmp_path / "out",
    )
    assert results.images[0].name == "photo0.png"
    assert results.images[1].name == str(tmp_path / "photo0.png")
    assert len({row.image for row in results.rows}) == 2
    assert len(list((tmp_path / "out" / "files" / "jpeg").iterdir())) == 2


FAILURES = [RuntimeError("out of\npaper"), OSError("out of paper")]
FAILURES += [MemoryError("out of paper"), ValueError("out of paper")]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_codec_that_fails_leaves_a_gap(photo_folder, tmp_path, error):
    failing = Failing("jpeg", error, height=64)
    results = sweep(photo_folder, tmp_path, [failing, ClassicalEntrant("webp")])
    failed = [row for row in results.rows if row.codec == "jpeg"]
    assert all(row.gaps == {"file": "out of paper"} for row in failed)
    assert any(row.values for row in results.rows if row.codec == "webp")
    # What a codec says of the image stays true; for the rest there is another try.
    again = Counting("jpeg")
    found = sweep(photo_folder, tmp_path, [again])
    kept = isinstance(error, ValueError)
    assert again.fits == (0 if kept else len(failed))
    assert any(row.values for row in found.rows) != kept


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_file_that_cannot_be_decoded_leaves_a_gap(
    with_one_lower, tmp_path, small_trunk, error
):
    failing = Failing("jpeg", error, height=48, step="decode")
    measures = Measures(["psnr_db", "frechet"], patch_side=32)
    run = [3.0], measures, tmp_path / "out"
    paths = with_one_lower(48)
    results = run_sweep(paths, [failing], *run)
    *others, row = results.rows
    why = "it was not measured: out of paper"
    assert row.bpp is not None and row.decode_s is None
    assert (row.values, row.gaps) == ({}, {"psnr_db": why})
    assert all(other.values for other in others)
    [of_set] = results.set_rows
    assert of_set.gaps == {"frechet": f"1 of 4 images have none (other.png: {why})"}
    # Nothing of it is kept.
    again = Counting("jpeg")
    found = run_sweep(paths, [again], *run)
    assert (again.fits, again.decodes) == (0, 1)
    assert found.rows[-1].values and not found.rows[-1].gaps
    assert found.set_rows[0].values


@pytest.mark.parametrize("step", ["measure", "features"])
def test_an_image_without_room_to_be_measured_leaves_a_gap(
    with_one_lower, tmp_path, small_trunk, monkeypatch, step
):
    work = getattr(Measures, step)

    def narrow(self, image, *rest):
        if len(image) == 48:
            raise MemoryError("9 GiB")
        return work(self, image, *rest)

    measures = Measures(["psnr_db", "frechet"], patch_side=32)
    run = [ClassicalEntrant("jpeg")], [3.0], measures, tmp_path / "out"
    paths = with_one_lower(48)
    with monkeypatch.context() as patched:
        patched.setattr(Measures, step, narrow)
        results = run_sweep(paths, *run)
    *others, row = results.rows
    assert row.bpp is not None and all(other.values for other in others)
    why = "it was not measured: 9 GiB"
    # What was measured before in this run stays.
    assert row.gaps == ({"psnr_db": why} if step == "measure" else {})
    assert why in results.set_rows[0].gaps["frechet"]
    found = run_sweep(paths, *run)
    assert found.rows[-1].values and found.set_rows[0].values


def test_one_metric_that_fails_leaves_the_others(photo_folder, tmp_path, monkeypatch):
    """And none of its older values, which may be of other weights."""
    measures = Measures(["psnr_db", "lattice"])
    run = list_images([photo_folder]), [ClassicalEntrant("jpeg")], [3.0], measures
    first = run_sweep(*run, tmp_path / "out")

    def no_room(*images):
        raise MemoryError("9 GiB")

    with monkeypatch.context() as patched:
        patched.setattr(Measures, "identity", lambda self, metric: "other weights")
        of_lattice = measures._of_images["lattice"]._functions
        patched.setitem(of_lattice, "lattice", no_room)
        failed = run_sweep(*run, tmp_path / "out")
    for before, row in zip(first.rows, failed.rows, strict=True):
        assert row.values == {"psnr_db": before.values["psnr_db"]}
        assert row.gaps == {"lattice": "it was not measured: 9 GiB"}
    again = run_sweep(*run, tmp_path / "out")  # what failed was not kept
    assert [row.values for row in again.rows] == [row.values for row in first.rows]


def test_values_of_older_weights_are_not_shown_as_new_ones(
    photo_folder, tmp_path, monkeypatch
):
    run = list_images([photo_folder]), [Counting("jpeg")], [3.0], Measures(["psnr_db"])
    run_sweep(*run, tmp_path / "out")

    def no_room(self, data):
        raise MemoryError("9 GiB")

    monkeypatch.setattr(Measures, "identity", lambda self, metric: "other weights")
    monkeypatch.setattr(Counting, "decode", no_room)
    for row in run_sweep(*run, tmp_path / "out").rows:
        assert (row.values, list(row.gaps)) == ({}, ["psnr_db"])


def test_images_that_the_set_leaves_out_are_named(
    with_one_lower, tmp_path, small_trunk
):
    measures = Measures(["psnr_db", "frechet"], patch_side=64)
    run = [ClassicalEntrant("jpeg")], [3.0], measures, tmp_path / "out"
    assert run_sweep(with_one_lower(64), *run).notes == ()
    [note] = run_sweep(with_one_lower(48), *run).notes
    assert "leave out 1 of 4 images" in note


def test_an_image_without_room_to_be_read_is_skipped(
    photo_folder, tmp_path, monkeypatch
):
    read = image_sets.read_photograph

    def narrow(path, **options):
        if path.name == "photo1.png":
            raise MemoryError
        return read(path, **options)

    monkeypatch.setattr(image_sets, "read_photograph", narrow)
    results = sweep(photo_folder, tmp_path, [ClassicalEntrant("jpeg")])
    [skipped] = results.skipped
    assert (Path(skipped.name).name, skipped.reason) == ("photo1.png", "MemoryError")
    assert len(results.images) == 2


def test_a_folder_that_holds_something_else(photo_folder, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="evaluation, found thesis.tex in it"):
        sweep(photo_folder, tmp_path, [ClassicalEntrant("jpeg")])
    assert os.listdir(tmp_path) == ["thesis.tex"]
