# SPDX-License-Identifier: Apache-2.0
"""Sweeps: rows from real files, resuming, sets."""

from __future__ import annotations

import csv
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from sweeps import RATES, Counting, sweep

from semlic_jax.evaluation import sweep as sweep_module
from semlic_jax.evaluation.demo import psnr_db
from semlic_jax.evaluation.entrants import (
    ClassicalEntrant,
    Encoded,
    entrants,
)
from semlic_jax.evaluation.image_sets import list_images
from semlic_jax.evaluation.measures import Measures
from semlic_jax.evaluation.results import rate_text, read_results
from semlic_jax.evaluation.sweep import check_rates, run_sweep


def test_rows_are_what_the_files_say(photo_folder, tmp_path):
    results = sweep(
        photo_folder, tmp_path, [ClassicalEntrant("jpeg"), ClassicalEntrant("webp")]
    )
    assert [(row.image, row.codec, row.target_bpp) for row in results.rows] == [
        (f"photo{i}.png", codec, rate)
        for i in range(3)
        for codec in ("jpeg", "webp")
        for rate in RATES
    ]
    for row in results.rows:
        if row.bpp is None:
            assert "bpp" in row.gaps["file"]
            continue
        suffix = {"jpeg": "jpg", "webp": "webp"}[row.codec]
        stem = row.image.removesuffix(".png")
        [path] = (tmp_path / "files" / row.codec).glob(
            f"{stem}-*@{row.target_bpp:g}.{suffix}"
        )
        original = np.asarray(Image.open(photo_folder / row.image))
        decoded = np.asarray(Image.open(path).convert("RGB"))
        assert row.file_bytes == path.stat().st_size
        assert row.bpp == 8 * row.file_bytes / (64 * 80) <= row.target_bpp
        assert row.values["psnr_db"] == pytest.approx(psnr_db(original, decoded), 1e-5)
        assert row.encode_s is not None and row.decode_s is not None
    assert any(row.bpp is not None for row in results.rows)


def test_results_come_back_from_json_and_lie_flat_in_csv(photo_folder, tmp_path):
    results = sweep(
        photo_folder, tmp_path, [ClassicalEntrant("jpeg")], ["psnr_db", "ms_ssim"]
    )
    assert read_results(tmp_path) == results
    lines = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert len(lines) == len(results.rows) == 9
    for line, row in zip(lines, results.rows, strict=True):
        assert line["image"] == row.image and line["width"] == "80"
        assert line["ms_ssim"] == ""
        assert "161x161" in line["gaps"]  # too small is a reason, not a number
        if row.bpp is not None:
            assert float(line["psnr_db"]) == row.values["psnr_db"]


def test_results_of_another_kind_are_refused(tmp_path):
    path = tmp_path / "results.json"
    for text in ("[]", "{", '{"version": 1}', '{"version": 1, "images": 3}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="is not the results.json"):
            read_results(tmp_path)
    path.write_text('{"version": 99}')
    with pytest.raises(ValueError, match="expected version 1 of .* found 99"):
        read_results(path)


def test_a_second_run_does_nothing_again(photo_folder, tmp_path):
    first = sweep(photo_folder, tmp_path, [Counting("jpeg")])
    again = Counting("jpeg")
    assert sweep(photo_folder, tmp_path, [again]) == first
    assert again.fits == again.decodes == 0


def test_an_interrupted_run_goes_on(photo_folder, tmp_path):
    whole = sweep(photo_folder, tmp_path / "whole", [Counting("jpeg")])

    def interrupt(text):
        if text.startswith("2/3"):
            raise KeyboardInterrupt

    out = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        sweep(photo_folder, out, [Counting("jpeg")], progress=interrupt)
    assert not (out / "results.json").exists()
    with open(out / "journal.jsonl", "a") as journal:
        journal.write('{"key": "measure of a line that was cut')
    rest = Counting("jpeg")
    found = sweep(photo_folder, out, [rest])
    assert rest.decodes == 3  # of the last image
    for row, other in zip(found.rows, whole.rows, strict=True):
        assert row.values == other.values and row.file_bytes == other.file_bytes
    again = Counting("jpeg")
    sweep(photo_folder, out, [again])
    assert again.fits == again.decodes == 0


@pytest.mark.parametrize("damage", ["deleted", "changed"])
def test_a_file_that_is_not_what_it_was_is_made_again(photo_folder, tmp_path, damage):
    first = sweep(photo_folder, tmp_path, [Counting("jpeg")])
    path = next((tmp_path / "files" / "jpeg").glob("photo1-*@2.jpg"))
    whole = path.read_bytes()
    path.unlink() if damage == "deleted" else path.write_bytes(whole[:-5])
    again = Counting("jpeg")
    found = sweep(photo_folder, tmp_path, [again])
    assert again.fits == 1 and path.read_bytes() == whole
    assert [r.values for r in found.rows] == [r.values for r in first.rows]


def test_another_codec_of_that_name_makes_its_own_files(photo_folder, tmp_path):
    sweep(photo_folder, tmp_path, [Counting("jpeg")])
    newer = Counting("jpeg")
    newer.identity += " of tomorrow"
    found = sweep(photo_folder, tmp_path, [newer])
    assert newer.fits == 9
    # The files are the same bytes, but its decoder may make other pictures of them.
    assert newer.decodes == sum(row.bpp is not None for row in found.rows) > 0


def test_new_metrics_and_rates_take_only_their_own_work(photo_folder, tmp_path):
    sweep(photo_folder, tmp_path, [Counting("jpeg")], ["psnr_db"])
    more = Counting("jpeg")
    found = sweep(photo_folder, tmp_path, [more], ["psnr_db", "ms_ssim"], [*RATES, 4.0])
    assert more.fits == 3
    assert more.decodes == sum(row.bpp is not None for row in found.rows)
    fewer = Counting("jpeg")
    found = sweep(photo_folder, tmp_path, [fewer], ["psnr_db"], [2.0])
    assert fewer.fits == fewer.decodes == 0
    assert len(found.rows) == 3 and list(found.rows[0].values) == ["psnr_db"]


def test_remeasuring_decodes_but_does_not_encode(photo_folder, tmp_path):
    first = sweep(photo_folder, tmp_path, [Counting("jpeg")])
    again = Counting("jpeg")
    found = sweep(photo_folder, tmp_path, [again], remeasure=True)
    assert again.fits == 0
    assert again.decodes == sum(row.bpp is not None for row in first.rows)
    assert [r.values for r in found.rows] == [r.values for r in first.rows]


def test_one_thread_or_many_give_the_same(photo_folder, tmp_path):
    codecs = ["jpeg", "webp"]
    both = [
        sweep(photo_folder, tmp_path / str(jobs), entrants(codecs), jobs=jobs).rows
        for jobs in (1, 4)
    ]
    for one, many in zip(*both, strict=True):
        assert (one.file_bytes, one.values) == (many.file_bytes, many.values)


def test_set_metrics_fall_with_the_rate(photo_folder, tmp_path, small_trunk):
    measures = Measures(["psnr_db", "frechet", "kernel"], patch_side=32)
    run = [
        list_images([photo_folder]),
        [ClassicalEntrant("jpeg")],
        [1.5, 3.0],
        measures,
    ]
    results = run_sweep(*run, tmp_path)
    low, high = results.set_rows
    # 2 x 2 patches of 32 in 64 x 80, and 1 x 2 on the grid that is shifted by 16.
    assert low.patches == high.patches == 3 * (4 + 2)
    assert 0 < high.values["frechet"] < low.values["frechet"]
    assert set(low.values) == {"frechet", "kernel"}
    assert results.set_metrics["frechet"].label.endswith("(32 px)")
    features = sorted((tmp_path / "features").iterdir())
    assert len(features) == 3 + 6
    assert np.load(features[0]).shape == (6, 3)
    # Patches are compared with their own originals, which is no chance.
    sets = {trunk: [np.load(each) for each in features] for trunk in measures.trunks}
    assert measures.distances(sets, sets)[0]["kernel"] == 0
    # A second run takes the features from their files.
    stamp = features[0].stat().st_mtime_ns
    assert run_sweep(*run, tmp_path).set_rows == results.set_rows
    assert features[0].stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    "damage", ["empty", "cut", "text", "zip", "other", "fewer", "narrow", "none"]
)
def test_damaged_features_are_measured_again(
    photo_folder, tmp_path, small_trunk, damage
):
    measures = Measures(["psnr_db", "frechet"], patch_side=32)
    run = list_images([photo_folder]), [ClassicalEntrant("jpeg")], [3.0], measures
    results = run_sweep(*run, tmp_path)
    paths = sorted((tmp_path / "features").iterdir())
    whole = [path.read_bytes() for path in paths]
    for path in paths:  # of the originals, and of what was decoded
        numbers = np.load(path)
        others = {"other": np.zeros(3), "fewer": numbers[:1], "narrow": numbers[:, :1]}
        others["none"] = np.full_like(numbers, np.nan)
        if damage in others:
            np.save(path, others[damage])
            continue
        found = {"empty": b"", "cut": path.read_bytes()[:-9], "text": b"not an array"}
        path.write_bytes(found.get(damage, b"PK\3\4 not an archive"))
    again = run_sweep(*run, tmp_path)
    assert again.set_rows == results.set_rows
    assert [path.read_bytes() for path in paths] == whole


def test_set_metrics_of_images_smaller_than_a_patch(
    photo_folder, tmp_path, small_trunk
):
    results = run_sweep(
        list_images([photo_folder]),
        [ClassicalEntrant("jpeg")],
        [3.0],
        Measures(["frechet"], patch_side=256),
        tmp_path,
    )
    [row] = results.set_rows
    assert row.values == {} and "patch of 256" in row.gaps["frechet"]


def test_codecs_of_like_names_have_files_of_their_own(photo_folder, tmp_path):
    class Named(ClassicalEntrant):
        def __init__(self, key, setting):
            super().__init__("jpeg")
            self.key, self.setting = key, setting

        def fitter(self, image):
            data = self._codec.encode(image, self.setting)
            return lambda bpp: Encoded(data, str(self.setting), 0.0)

    keys = "semlic:модель", "semlic:опорная", "a" * 90, "a" * 91, "a:b", "a;b"
    codecs = [Named(key, 20 + at) for at, key in enumerate(keys)]
    results = sweep(photo_folder, tmp_path, codecs)
    assert len(list((tmp_path / "files").iterdir())) == len(keys)
    for row in results.rows:
        codec = next(codec for codec in codecs if codec.key == row.codec)
        assert row.setting == str(codec.setting) and row.values


def test_with_one_thread_nothing_is_measured_while_a_file_is_made(
    photo_folder, tmp_path, monkeypatch
):
    at_work, measure = [], Measures.measure

    class Timed(ClassicalEntrant):
        def fitter(self, image):
            fit = super().fitter(image)

            def watched(bpp):
                at_work.append(bpp)
                time.sleep(0.05)
                found = fit(bpp)
                at_work.pop()
                return found

            return watched

    def measured(self, *arguments):
        assert not at_work
        return measure(self, *arguments)

    monkeypatch.setattr(Measures, "measure", measured)
    sweep(photo_folder, tmp_path, [Timed("jpeg")], jobs=1)


def test_listing_images(photo_folder, tmp_path):
    (tmp_path / "README.txt").touch()
    for name in ("b.PNG", "a.jpg"):
        (tmp_path / name).touch()
    assert [p.name for p in list_images([tmp_path])] == ["a.jpg", "b.PNG"]
    named = tmp_path / "README.txt"  # named files are tried whatever they are called
    assert list_images([named, named]) == [named]
    with pytest.raises(ValueError, match="nowhere does not exist"):
        list_images([photo_folder, tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image files in .*empty"):
        list_images([tmp_path / "empty"])


@pytest.mark.parametrize("rates", [[], [0.0], [-1.0], [float("nan")], [0.1, 0.1], [99]])
def test_rates_that_are_none(rates):
    with pytest.raises(ValueError, match="rate"):
        check_rates(rates)


def test_a_rate_given_twice_is_named():
    with pytest.raises(ValueError, match="the rate 0.15 was given twice"):
        check_rates([0.3, 0.15, 0.15])


def test_rates_that_differ_little_have_files_of_their_own(photo_folder, tmp_path):
    """The largest file below a rate is above another one, less by a ten-millionth."""
    image = list_images([photo_folder])[:1]
    run = image, [ClassicalEntrant("jpeg")]
    [row] = run_sweep(*run, [2.0], Measures(["psnr_db"]), tmp_path / "a").rows
    rates = [row.bpp - 1e-7, row.bpp]
    rows = run_sweep(*run, rates, Measures(["psnr_db"]), tmp_path / "b").rows
    assert rows[0].bpp < rates[0] and rows[1].bpp == row.bpp
    assert rate_text(rates[0]) != rate_text(rates[1])
    assert (rate_text(0.15), rate_text(3.0)) == ("0.15", "3")


def test_rates_are_sorted():
    assert check_rates([0.3, 0.1]) == [0.1, 0.3]


def test_features_are_of_patches_of_one_size(photo_folder, tmp_path, small_trunk):
    """Another `--patch` in the same folder takes none of the features there."""

    def run(side, out):
        measures = Measures(["frechet"], patch_side=side)
        codecs = [ClassicalEntrant("jpeg")]
        return run_sweep(
            list_images([photo_folder]), codecs, [3.0], measures, out
        ).set_rows

    run(32, tmp_path / "both")
    assert run(48, tmp_path / "both") == run(48, tmp_path / "alone")


def test_a_newer_codec_may_reach_what_an_older_one_did_not(photo_folder, tmp_path):
    class Refusing(Counting):
        def fitter(self, image):
            def refuse(bpp):
                raise ValueError("it does not get there")

            return refuse

    first = sweep(photo_folder, tmp_path, [Refusing("jpeg")], rates=[3.0])
    assert all("file" in row.gaps for row in first.rows)
    newer = Counting("jpeg")
    newer.identity += " of tomorrow"
    found = sweep(photo_folder, tmp_path, [newer], rates=[3.0])
    assert newer.fits == 3 and all(row.bpp for row in found.rows)


def test_the_time_left_is_that_of_the_images_left(monkeypatch):
    now, told = [0.0], []
    monkeypatch.setattr(
        sweep_module, "time", SimpleNamespace(perf_counter=lambda: now[0])
    )
    clock = sweep_module._Clock(10, told.append)
    clock.say("a")
    now[0] = 600.0  # ten minutes for two of ten images
    clock.one_done()
    clock.one_done()
    clock.say("b")
    assert told == ["0/10 images: a", "2/10 images, about 40 min left: b"]
