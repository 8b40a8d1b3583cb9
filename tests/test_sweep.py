# SPDX-License-Identifier: Apache-2.0
"""Sweeps: the search for a rate, rows from real files, resuming, bad inputs."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from small_trunk import load_small_trunk

from semlic_jax import cli
from semlic_jax.evaluation import evaluate, image_sets
from semlic_jax.evaluation import journal as journal_module
from semlic_jax.evaluation import measures as measures_module
from semlic_jax.evaluation import sweep as sweep_module
from semlic_jax.evaluation.codecs import CODECS, Jpeg, classical_codec
from semlic_jax.evaluation.demo import psnr_db
from semlic_jax.evaluation.entrants import (
    ClassicalEntrant,
    Encoded,
    RateSearch,
    RefinedEntrant,
    SemlicEntrant,
    TooSmallError,
    entrants,
    refinement_identity,
)
from semlic_jax.evaluation.image_sets import list_images
from semlic_jax.evaluation.journal import Journal, alone_in
from semlic_jax.evaluation.measures import SET_METRICS, Measures
from semlic_jax.evaluation.results import read_results
from semlic_jax.evaluation.sweep import check_rates, run_sweep
from semlic_jax.objectives import metrics
from semlic_jax.objectives.features import FeatureNetwork
from semlic_jax.refinement import preset

RATES = [1.5, 2.0, 3.0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, photograph):
    """Three small photographs."""
    path = tmp_path_factory.mktemp("images")
    for seed in range(3):
        Image.fromarray(photograph(64, 80, seed)).save(path / f"photo{seed}.png")
    return path


class Counting(ClassicalEntrant):
    """A codec that counts how often it works."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.fits = self.decodes = 0

    def fitter(self, image):
        fit = super().fitter(image)

        def counted(bpp):
            self.fits += 1
            return fit(bpp)

        return counted

    def decode(self, data):
        self.decodes += 1
        return super().decode(data)


def sweep(folder, out, codecs, metrics=("psnr_db",), rates=RATES, **options):
    return run_sweep(
        list_images([folder]), codecs, rates, Measures(metrics), out, **options
    )


# The search.


class Stairs:
    """A codec whose file sizes are given."""

    name, suffix = "stairs", ".st"

    def __init__(self, sizes):
        self.sizes, self.settings, self.calls = sizes, range(len(sizes)), []

    def encode(self, image, setting):
        self.calls.append(setting)
        return bytes(self.sizes[setting])

    def decode(self, data):
        raise NotImplementedError


IMAGE = np.zeros((80, 100, 3), np.uint8)  # 1,000 bytes are 1 bpp


@pytest.mark.parametrize("base", [1.02, 1.05, 1.2])
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3, 0.77, 1.0, 3.0])
def test_search_finds_the_highest_setting_that_fits(base, rate):
    sizes = [round(40 * base**i) for i in range(100)]
    codec = Stairs(sizes)
    budget = int(rate * 1000)
    fitting = [i for i, size in enumerate(sizes) if size <= budget]
    search = RateSearch(codec, IMAGE)
    if len(fitting) == len(sizes) and sizes[-1] < 0.97 * budget:
        with pytest.raises(ValueError, match=f"largest .* {sizes[-1] / 1000:.3f} bpp"):
            search.fit(rate)
    else:
        assert search.fit(rate).setting == str(fitting[-1])
        assert len(codec.calls) == len(set(codec.calls)) <= 11


def test_search_uses_every_byte_of_the_rate():
    """0.7 bpp of 180 x 240 are 3,780 bytes; the product is a hair less in floats."""
    assert 0.7 * 180 * 240 / 8 < 3780
    search = RateSearch(Stairs([3000, 3780, 3781]), np.zeros((180, 240, 3), np.uint8))
    assert search.fit(0.7).setting == "1"


def test_search_on_plateaus_and_cliffs():
    sizes = [100] * 20 + [500] * 30 + [501, 9000]
    search = RateSearch(Stairs(sizes), IMAGE)
    assert search.fit(0.1).setting == "19"
    assert search.fit(0.4).setting == "19"
    assert search.fit(0.5).setting == "49"
    assert search.fit(0.9).setting == "50"
    assert search.fit(9.0).setting == "51"


def test_search_never_breaks_the_budget_where_sizes_do_not_grow():
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = (40 * 1.06 ** np.arange(80) * rng.uniform(0.7, 1.4, 80)).astype(int)
        search = RateSearch(Stairs(list(sizes)), IMAGE)
        for rate in (0.1, 0.2, 0.4, 0.8):
            assert len(search.fit(rate).data) <= 1000 * rate


def test_search_says_how_small_it_gets():
    with pytest.raises(ValueError, match="smallest file of this image takes 0.200 bpp"):
        RateSearch(Stairs([200, 300]), IMAGE).fit(0.1)
    # A largest file just below the rate is what was asked for.
    assert RateSearch(Stairs([200, 980]), IMAGE).fit(1.0).setting == "1"


def test_files_of_one_rate_narrow_the_search_for_the_next():
    codec = Stairs([round(40 * 1.05**i) for i in range(100)])
    search = RateSearch(codec, IMAGE)
    for rate in (0.1, 0.15, 0.2, 0.3, 0.45):
        search.fit(rate)
    assert len(codec.calls) <= 20


def test_search_looks_beyond_the_first_that_does_not_fit():
    """As `Codec.compress` does, whose files a sweep is to measure."""
    sizes = [round(400 * 1.018**i) for i in range(100)]
    sizes[44] = sizes[42] - 1  # dips below the budget that 43 is above
    search = RateSearch(Stairs(sizes), IMAGE)
    assert search.fit(sizes[42] / 1000).setting == "42"
    assert search.fit((sizes[42] - 1) / 1000).setting == "44"


@pytest.mark.parametrize("key", ["jpeg", "webp"])
def test_search_agrees_with_trying_every_setting(key, photograph):
    image, codec = photograph(64, 80), classical_codec(key)
    sizes = {s: len(codec.encode(image, s)) for s in codec.settings}
    search = RateSearch(codec, image)
    for rate in RATES:
        found = search.fit(rate)
        budget = int(rate * 64 * 80 / 8)
        setting = int(found.setting)
        assert len(found.data) == sizes[setting] <= budget
        assert setting == codec.settings[-1] or sizes[setting + 1] > budget
        assert found.encode_s > 0


# Rows.


def test_rows_are_what_the_files_say(folder, tmp_path):
    results = sweep(
        folder, tmp_path, [ClassicalEntrant("jpeg"), ClassicalEntrant("webp")]
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
        original = np.asarray(Image.open(folder / row.image))
        decoded = np.asarray(Image.open(path).convert("RGB"))
        assert row.file_bytes == path.stat().st_size
        assert row.bpp == 8 * row.file_bytes / (64 * 80) <= row.target_bpp
        assert row.values["psnr_db"] == pytest.approx(psnr_db(original, decoded), 1e-5)
        assert row.encode_s is not None and row.decode_s is not None
    assert any(row.bpp is not None for row in results.rows)


def test_results_come_back_from_json_and_lie_flat_in_csv(folder, tmp_path):
    results = sweep(
        folder, tmp_path, [ClassicalEntrant("jpeg")], ["psnr_db", "ms_ssim"]
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


# Going on.


def test_a_second_run_does_nothing_again(folder, tmp_path):
    first = sweep(folder, tmp_path, [Counting("jpeg")])
    again = Counting("jpeg")
    assert sweep(folder, tmp_path, [again]) == first
    assert again.fits == again.decodes == 0


def test_an_interrupted_run_goes_on(folder, tmp_path):
    whole = sweep(folder, tmp_path / "whole", [Counting("jpeg")])

    def interrupt(text):
        if text.startswith("2/3"):
            raise KeyboardInterrupt

    out = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        sweep(folder, out, [Counting("jpeg")], progress=interrupt)
    assert not (out / "results.json").exists()
    with open(out / "journal.jsonl", "a") as journal:
        journal.write('{"key": "measure of a line that was cut')
    rest = Counting("jpeg")
    found = sweep(folder, out, [rest])
    assert rest.decodes == 3  # of the last image
    for row, other in zip(found.rows, whole.rows, strict=True):
        assert row.values == other.values and row.file_bytes == other.file_bytes
    again = Counting("jpeg")
    sweep(folder, out, [again])
    assert again.fits == again.decodes == 0


@pytest.mark.parametrize("damage", ["deleted", "changed"])
def test_a_file_that_is_not_what_it_was_is_made_again(folder, tmp_path, damage):
    first = sweep(folder, tmp_path, [Counting("jpeg")])
    path = next((tmp_path / "files" / "jpeg").glob("photo1-*@2.jpg"))
    whole = path.read_bytes()
    path.unlink() if damage == "deleted" else path.write_bytes(whole[:-5])
    again = Counting("jpeg")
    found = sweep(folder, tmp_path, [again])
    assert again.fits == 1 and path.read_bytes() == whole
    assert [r.values for r in found.rows] == [r.values for r in first.rows]


def test_another_codec_of_that_name_makes_its_own_files(folder, tmp_path):
    sweep(folder, tmp_path, [Counting("jpeg")])
    newer = Counting("jpeg")
    newer.identity += " of tomorrow"
    found = sweep(folder, tmp_path, [newer])
    assert newer.fits == 9
    # The files are the same bytes, but its decoder may make other pictures of them.
    assert newer.decodes == sum(row.bpp is not None for row in found.rows) > 0


def test_new_metrics_and_rates_take_only_their_own_work(folder, tmp_path):
    sweep(folder, tmp_path, [Counting("jpeg")], ["psnr_db"])
    more = Counting("jpeg")
    found = sweep(folder, tmp_path, [more], ["psnr_db", "ms_ssim"], [*RATES, 4.0])
    assert more.fits == 3
    assert more.decodes == sum(row.bpp is not None for row in found.rows)
    fewer = Counting("jpeg")
    found = sweep(folder, tmp_path, [fewer], ["psnr_db"], [2.0])
    assert fewer.fits == fewer.decodes == 0
    assert len(found.rows) == 3 and list(found.rows[0].values) == ["psnr_db"]


def test_remeasuring_decodes_but_does_not_encode(folder, tmp_path):
    first = sweep(folder, tmp_path, [Counting("jpeg")])
    again = Counting("jpeg")
    found = sweep(folder, tmp_path, [again], remeasure=True)
    assert again.fits == 0
    assert again.decodes == sum(row.bpp is not None for row in first.rows)
    assert [r.values for r in found.rows] == [r.values for r in first.rows]


def test_journal_keeps_the_last_of_a_key(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.put("a", {"n": 1})
    journal.put("a", {"n": 2})
    assert Journal(path).get("a") == {"key": "a", "n": 2}
    assert Journal(path).get("b") is None


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe{\x00",
        b"[" * 100_000,
        b'{"key": ["a"]}',
        b'{"key": "KEY"}',
        b'{"key": "KEY", "identity": "IDENTITY"}',
    ],
    ids=["no UTF-8", "deep", "no key", "no entry", "one entry"],
)
def test_damaged_lines_of_the_journal_are_ignored(folder, tmp_path, line):
    first = sweep(folder, tmp_path, [Counting("jpeg")])
    journal = tmp_path / "journal.jsonl"
    identity = json.dumps(ClassicalEntrant("jpeg").identity).encode()
    records = map(json.loads, journal.read_text().splitlines())
    with open(journal, "ab") as stream:
        for key in {record["key"] for record in records}:
            found = line.replace(b'"IDENTITY"', identity)
            stream.write(found.replace(b"KEY", key.encode()) + b"\n")
    found = sweep(folder, tmp_path, [ClassicalEntrant("jpeg")])
    assert [r.values for r in found.rows] == [r.values for r in first.rows]


HOLD = """
import sys, time
from pathlib import Path
from semlic_jax.evaluation.journal import alone_in

with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_evaluation_in_the_folder_is_refused(
    folder, tmp_path, capsys, no_weights
):
    pytest.importorskip("fcntl", reason="folders are not locked on Windows")
    out = tmp_path / "out"
    command = ["eval", str(folder), "--codecs", "jpeg", "--bpp", "2"]
    command += ["--metrics", "psnr_db", "--out", str(out)]
    other = [sys.executable, "-c", HOLD, str(out)]
    with subprocess.Popen(other, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert cli.main(command) == 1
        refusal = f"semlic: another evaluation is running in {out}\n"
        assert capsys.readouterr().err == refusal
        with pytest.raises(ValueError, match="another evaluation is running"):
            sweep(folder, out, [ClassicalEntrant("jpeg")])
        holder.kill()
    assert cli.main(command) == 0  # the lock went with the process


def test_no_file_that_is_used_is_locked(tmp_path):
    """On SMB a locked file is closed to every other stream."""
    fcntl = pytest.importorskip("fcntl", reason="folders are not locked on Windows")
    with alone_in(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {".lock", "journal.jsonl"}
        for name, free in ((".lock", False), ("journal.jsonl", True)):
            with open(tmp_path / name, "ab") as stream:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    assert not free
                else:
                    assert free
    (tmp_path / "journal.jsonl").unlink()
    with alone_in(tmp_path):  # a start that was interrupted is no other folder
        pass


@pytest.mark.parametrize("content", ["[" * 100_000, "{}", "[1]"])
def test_damaged_results_are_replaced(folder, tmp_path, capsys, no_weights, content):
    command = ["eval", str(folder), "--codecs", "jpeg", "--bpp", "3"]
    command += ["--metrics", "psnr_db", "--out", str(tmp_path)]
    assert cli.main(command) == 0
    path = tmp_path / "results.json"
    whole = json.loads(path.read_text())
    path.write_text(content)
    assert (
        cli.main(command) == 0 and json.loads(path.read_text()).keys() == whole.keys()
    )
    whole["codecs"]["jpeg"]["identity"] = ["JPEG"]
    whole["images"][0]["sha256"] = 5
    path.write_text(json.dumps(whole))
    assert cli.main(command) == 0 and "replaced" not in capsys.readouterr().err


def test_evaluations_that_no_lock_parts_leave_no_holes(
    folder, tmp_path, monkeypatch, small_trunk
):
    """A second one runs from start to end while the first writes a file of features."""
    monkeypatch.setattr(journal_module, "fcntl", None)
    measures = Measures(["psnr_db", "frechet"], patch_side=32)
    run = list_images([folder]), [ClassicalEntrant("jpeg")], [3.0], measures, tmp_path
    save, found = np.save, []

    def save_and_wait(*arguments, **options):
        save(*arguments, **options)
        monkeypatch.setattr(np, "save", save)
        if not found:
            found.append(run_sweep(*run))

    monkeypatch.setattr(np, "save", save_and_wait)
    found.append(run_sweep(*run))
    for results in found:
        assert all(row.gaps == {} for row in results.rows)
        assert results.set_rows == found[0].set_rows and results.set_rows[0].values
    assert all(path.suffix == ".npy" for path in (tmp_path / "features").iterdir())


def test_one_thread_or_many_give_the_same(folder, tmp_path):
    codecs = ["jpeg", "webp"]
    both = [
        sweep(folder, tmp_path / str(jobs), entrants(codecs), jobs=jobs).rows
        for jobs in (1, 4)
    ]
    for one, many in zip(*both, strict=True):
        assert (one.file_bytes, one.values) == (many.file_bytes, many.values)


# Sets.


@pytest.fixture
def small_trunk(monkeypatch):
    monkeypatch.setattr(measures_module, "load_features", load_small_trunk)


def test_set_metrics_fall_with_the_rate(folder, tmp_path, small_trunk):
    measures = Measures(["psnr_db", "frechet", "kernel"], patch_side=32)
    run = [list_images([folder]), [ClassicalEntrant("jpeg")], [1.5, 3.0], measures]
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


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "zip", "other"])
def test_damaged_features_are_measured_again(folder, tmp_path, small_trunk, damage):
    measures = Measures(["psnr_db", "frechet"], patch_side=32)
    run = list_images([folder]), [ClassicalEntrant("jpeg")], [3.0], measures, tmp_path
    results = run_sweep(*run)
    paths = sorted((tmp_path / "features").iterdir())
    whole = [path.read_bytes() for path in paths]
    for path in paths:  # of the originals, and of what was decoded
        if damage == "other":
            np.save(path, np.zeros(3))
            continue
        found = {"empty": b"", "cut": path.read_bytes()[:-9], "text": b"not an array"}
        path.write_bytes(found.get(damage, b"PK\3\4 not an archive"))
    again = run_sweep(*run)
    assert again.set_rows == results.set_rows
    assert [path.read_bytes() for path in paths] == whole


def test_set_metrics_of_images_smaller_than_a_patch(folder, tmp_path, small_trunk):
    results = run_sweep(
        list_images([folder]),
        [ClassicalEntrant("jpeg")],
        [3.0],
        Measures(["frechet"], patch_side=256),
        tmp_path,
    )
    [row] = results.set_rows
    assert row.values == {} and "patch of 256" in row.gaps["frechet"]


class Failing(ClassicalEntrant):
    """A codec that fails on one image, known by its height, at one step."""

    def __init__(self, key, error, *, height, step="fit"):
        super().__init__(key)
        self.error, self.height, self.step, self.fits = error, height, step, 0

    def fitter(self, image):
        fit = super().fitter(image)

        def failing(bpp):
            self.fits += 1
            if self.step == "fit" and len(image) == self.height:
                raise self.error
            return fit(bpp)

        return failing

    def decode(self, data):
        image = super().decode(data)
        if self.step == "decode" and len(image) == self.height:
            raise self.error
        return image


@pytest.fixture
def with_one_lower(folder, tmp_path, photograph):
    """Function (height) -> three photographs, and then one of this height."""

    def paths(height):
        path = tmp_path / "other.png"
        Image.fromarray(photograph(height, 80, 7)).save(path)
        return [*list_images([folder]), path]

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
    folder, with_one_lower, tmp_path, small_trunk, with_file
):
    """The distance is one over the others, and so is the rate beside it."""
    height = 16
    codec = Failing("jpeg", ValueError("no"), height=0 if with_file else height)
    run = [codec], [6.0], Measures(["frechet"], patch_side=32)
    [alone] = run_sweep(list_images([folder]), *run, tmp_path / "a").set_rows
    results = run_sweep(with_one_lower(height), *run, tmp_path / "b")
    [row] = results.set_rows
    rates = [found.bpp for found in results.rows]
    assert (rates[3] is not None) == with_file and rates[3] != alone.bpp
    assert row.bpp == alone.bpp == pytest.approx(np.mean(rates[:3]))
    assert row.values == alone.values and row.values
    assert row.gaps == {"images left out": "1 images are smaller than a patch"}


# Bad inputs.


def test_images_that_cannot_be_used_are_named(folder, tmp_path):
    broken, twin = tmp_path / "broken.png", tmp_path / "twin.png"
    broken.write_bytes((folder / "photo0.png").read_bytes()[:200])
    Image.open(folder / "photo1.png").save(twin)
    paths = [*list_images([folder]), broken, twin]
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


def test_names_that_are_not_utf_8(folder, tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    path.write_bytes((folder / "photo0.png").read_bytes())
    out = tmp_path / "out"
    results = run_sweep(
        [path], [ClassicalEntrant("jpeg")], [6.0], Measures(["psnr_db"]), out
    )
    assert b"caf\xe9.png," in (out / "results.csv").read_bytes()
    assert read_results(out) == results and results.images[0].name == path.name


def test_images_of_one_name_in_two_folders(folder, tmp_path, photograph):
    Image.fromarray(photograph(40, 40, 9)).save(tmp_path / "photo0.png")
    results = run_sweep(
        list_images([folder / "photo0.png", tmp_path]),
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
def test_a_codec_that_fails_leaves_a_gap(folder, tmp_path, error):
    failing = Failing("jpeg", error, height=64)
    results = sweep(folder, tmp_path, [failing, ClassicalEntrant("webp")])
    failed = [row for row in results.rows if row.codec == "jpeg"]
    assert all(row.gaps == {"file": "out of paper"} for row in failed)
    assert any(row.values for row in results.rows if row.codec == "webp")
    # What a codec says of the image stays true; for the rest there is another try.
    again = Counting("jpeg")
    found = sweep(folder, tmp_path, [again])
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


def test_one_metric_that_fails_leaves_the_others(folder, tmp_path, monkeypatch):
    """And none of its older values, which may be of other weights."""
    measures = Measures(["psnr_db", "lattice"])
    run = list_images([folder]), [ClassicalEntrant("jpeg")], [3.0], measures
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
    folder, tmp_path, monkeypatch
):
    run = list_images([folder]), [Counting("jpeg")], [3.0], Measures(["psnr_db"])
    run_sweep(*run, tmp_path / "out")

    def no_room(self, data):
        raise MemoryError("9 GiB")

    monkeypatch.setattr(Measures, "identity", lambda self, metric: "other weights")
    monkeypatch.setattr(Counting, "decode", no_room)
    for row in run_sweep(*run, tmp_path / "out").rows:
        assert (row.values, list(row.gaps)) == ({}, ["psnr_db"])


def test_codecs_of_like_names_have_files_of_their_own(folder, tmp_path):
    class Named(ClassicalEntrant):
        def __init__(self, key, setting):
            super().__init__("jpeg")
            self.key, self.setting = key, setting

        def fitter(self, image):
            data = self._codec.encode(image, self.setting)
            return lambda bpp: Encoded(data, str(self.setting), 0.0)

    keys = "semlic:модель", "semlic:опорная", "a" * 90, "a" * 91, "a:b", "a;b"
    codecs = [Named(key, 20 + at) for at, key in enumerate(keys)]
    results = sweep(folder, tmp_path, codecs)
    assert len(list((tmp_path / "files").iterdir())) == len(keys)
    for row in results.rows:
        codec = next(codec for codec in codecs if codec.key == row.codec)
        assert row.setting == str(codec.setting) and row.values


def test_with_one_thread_nothing_is_measured_while_a_file_is_made(
    folder, tmp_path, monkeypatch
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
    sweep(folder, tmp_path, [Timed("jpeg")], jobs=1)


def test_images_that_the_set_leaves_out_are_named(
    with_one_lower, tmp_path, small_trunk
):
    measures = Measures(["psnr_db", "frechet"], patch_side=64)
    run = [ClassicalEntrant("jpeg")], [3.0], measures, tmp_path / "out"
    assert run_sweep(with_one_lower(64), *run).notes == ()
    [note] = run_sweep(with_one_lower(48), *run).notes
    assert "leave out 1 of 4 images" in note


def test_an_image_without_room_to_be_read_is_skipped(folder, tmp_path, monkeypatch):
    read = image_sets.read_photograph

    def narrow(path, **options):
        if path.name == "photo1.png":
            raise MemoryError
        return read(path, **options)

    monkeypatch.setattr(image_sets, "read_photograph", narrow)
    results = sweep(folder, tmp_path, [ClassicalEntrant("jpeg")])
    [skipped] = results.skipped
    assert (Path(skipped.name).name, skipped.reason) == ("photo1.png", "MemoryError")
    assert len(results.images) == 2


def test_a_folder_that_holds_something_else(folder, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="an earlier evaluation, found other files"):
        sweep(folder, tmp_path, [ClassicalEntrant("jpeg")])
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_listing_images(folder, tmp_path):
    (tmp_path / "README.txt").touch()
    for name in ("b.PNG", "a.jpg"):
        (tmp_path / name).touch()
    assert [p.name for p in list_images([tmp_path])] == ["a.jpg", "b.PNG"]
    named = tmp_path / "README.txt"  # named files are tried whatever they are called
    assert list_images([named, named]) == [named]
    with pytest.raises(ValueError, match="nowhere does not exist"):
        list_images([folder, tmp_path / "nowhere"])
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


def test_rates_are_sorted():
    assert check_rates([0.3, 0.1]) == [0.1, 0.3]


def test_measures_are_of_the_contents_of_their_weights(tmp_path, monkeypatch):
    """Other weights of the same name and size give other values."""
    path = tmp_path / "squeezenet1_0.npz"
    identities = set()
    for content in (b"one", b"two"):
        path.write_bytes(content)
        for given in (tmp_path, path):
            measures = Measures([], given)
            identities.add(measures.identity("feature_distance"))
    assert len(identities) == 2
    # They are read once, and where something needs them alone.
    measures = Measures(["psnr_db"], tmp_path)
    assert measures.identity("psnr_db") == Measures(["psnr_db"]).identity("psnr_db")
    identity = measures.identity("feature_distance")
    monkeypatch.delattr(measures_module.hashlib, "file_digest")
    assert measures.identity("feature_distance") == identity
    Measures(["psnr_db"], tmp_path)


def test_measures_are_of_their_own_code(folder, tmp_path, monkeypatch):
    """A metric that was changed is measured again, the others are not."""

    def brighter(reference, image):
        return jnp.atleast_1d(jnp.mean(image / 1.0 - reference))

    def darker(reference, image):
        return -brighter(reference, image)

    class Distance:
        def __call__(self, reference, image):
            return darker(reference, image)

    names = ["psnr_db", "brightness"]
    info = metrics.MetricInfo("brightness", True)
    monkeypatch.setitem(metrics.IMAGE_METRICS, "brightness", info)
    load = metrics.ImageMetrics._load
    found, identities = [], set()
    for function in (brighter, darker, jax.jit(brighter), Distance()):

        def load_own(name, weights, function=function):
            return function if name == "brightness" else load(name, weights)

        monkeypatch.setattr(metrics.ImageMetrics, "_load", staticmethod(load_own))
        measures = Measures(names)
        identities.add(measures.identity("brightness"))
        identities.add(measures.identity("psnr_db"))
        if not isinstance(function, Distance):
            results = run_sweep(
                list_images([folder]), [Counting("jpeg")], [3.0], measures, tmp_path
            )
            found.append([row.values["brightness"] for row in results.rows])
    assert len(identities) == 1 + 3  # jax.jit(brighter) has the code of `brighter`
    assert found[0] == [-value for value in found[1]] == found[2] != found[1]


def test_ssimulacra2_is_of_its_package(monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs its package: pip install ssimulacra2"):
        Measures(["psnr_db", "ssimulacra2"])
    identities = set()
    for version in "1.0", "2.0":
        found = {"ssimulacra2": version}.__getitem__
        monkeypatch.setattr(measures_module.metadata, "version", found)
        identities.add(Measures([]).identity("ssimulacra2"))
    assert len(identities) == 2


def test_unknown_metrics():
    with pytest.raises(ValueError, match="unknown metric 'psnr': expected .*psnr_db"):
        Measures(["psnr"])
    with pytest.raises(ValueError, match="at least 32 pixels"):
        Measures(["psnr_db"], patch_side=8)


# Codecs by name.


@pytest.mark.parametrize(
    "name", ["gif", "semlic2", "semlic:", "semlic+refine:", "semlic+fast", ""]
)
def test_unknown_codecs(name, tiny_model):
    with pytest.raises(ValueError, match="unknown codec"):
        entrants([name], model=str(tiny_model))


def test_codecs_given_twice(tiny_model):
    with pytest.raises(ValueError, match="given twice"):
        entrants(["jpeg", "jpeg"])
    with pytest.raises(ValueError, match="two models have the name semlic:tiny"):
        entrants([f"semlic:{tiny_model}", f"semlic:{tiny_model.parent}/./tiny.npz"])


def test_a_changed_codec_is_another_one(monkeypatch):
    """Its name and the description that it inherits are the same."""

    class Slower(Jpeg):
        def encode(self, image, setting):
            return super().encode(image, setting) + b"!"

    class Parent(Slower):
        pass

    made = type("Made", (Jpeg,), {})  # there is no source of it
    identities = set()
    for kind in (Jpeg, Slower, Parent, made):
        monkeypatch.setitem(CODECS, "jpeg", kind)
        identity = ClassicalEntrant("jpeg").identity
        assert ClassicalEntrant("jpeg").identity == identity
        assert "Pillow" in identity and "Progressive JPEG" in identity
        identities.add(identity)
    assert len(identities) == 4


@pytest.mark.parametrize("kind", [SemlicEntrant, RefinedEntrant])
def test_the_largest_file_counts_for_rates_just_above(kind, codec, photograph):
    refine = [replace(preset(1), gamma=0.0)] if kind is RefinedEntrant else []
    image = photograph(64, 64)
    fit = kind("semlic", codec, *refine).fitter(image)
    most = len(codec.compress(image, quality=1)) * 8 / 64**2
    assert fit(1.01 * most).setting == "255"
    with pytest.raises(TooSmallError, match=r"largest file .* takes 0\.\d{3} bpp"):
        fit(1.1 * most)


def test_refined_files_are_of_their_feature_network_too(codec):
    """Kept files of other weights must not be taken for those of today's."""
    settings = preset("fast")
    identity = refinement_identity(codec, settings)
    assert RefinedEntrant("refined", codec, "fast").identity == identity
    assert refinement_identity(codec, replace(settings, gamma=0.0)) != identity
    trunk = settings.load_features()
    same = replace(settings, features=trunk)
    assert refinement_identity(codec, same) == identity
    other = FeatureNetwork(jax.tree.map(lambda w: w + 1, trunk.params), trunk.module)
    changed = replace(settings, features=other)
    assert refinement_identity(codec, changed) != identity
    fewer = replace(settings, features=trunk.replace(taps=trunk.taps[:2]))
    assert refinement_identity(codec, fewer) != identity


def test_models_by_name_and_path(tiny_model, codec, photograph):
    image = photograph(64, 80)
    plain, named = entrants(["semlic", f"semlic:{tiny_model}"], model=str(tiny_model))
    assert (plain.key, named.key) == ("semlic", "semlic:tiny")
    assert plain.identity == named.identity
    fit = plain.fitter(image)
    low, high = (
        8 * len(codec.compress(image, quality=quality)) / (64 * 80)
        for quality in (0.0, 1.0)
    )
    for part in (0.3, 0.8):
        rate = low + part * (high - low)
        found = fit(rate)
        assert 0.7 * rate * 64 * 80 / 8 < len(found.data) <= rate * 64 * 80 / 8
        assert codec.info(found.data)["quality"] * 255 == pytest.approx(
            int(found.setting)
        )
        np.testing.assert_array_equal(
            plain.decode(found.data), codec.decompress(found.data)
        )
    with pytest.raises(ValueError, match=f"smallest file .* {low:.3f} bpp"):
        fit(low / 2)
    with pytest.raises(ValueError, match=f"largest file .* {high:.3f} bpp"):
        fit(2 * high)


# The command.


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.delenv("SEMLIC_FEATURES", raising=False)


def test_command(folder, tmp_path, capsys, no_weights):
    command = ["eval", str(folder), "--codecs", "jpeg,webp", "--bpp", "1.5,2"]
    command += ["--metrics", "psnr_db", "--out", str(tmp_path), "--anchor", "webp"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "### PSNR (dB)" in printed and "against WebP" in printed
    for name in (
        "results.json results.csv sets.csv summary.md summary.json journal.jsonl "
        "plots/rd_all.png plots/rd_all.svg plots/rd_psnr_db.png plots/rd_psnr_db.svg"
    ).split():
        assert (tmp_path / name).stat().st_size > 0, name
    facts = json.loads((tmp_path / "summary.json").read_text())
    assert facts["images"] == 3 and facts["anchor"] == "webp"


def test_command_leaves_no_plots_and_tables_of_other_options_unsaid(
    folder, tmp_path, capsys, no_weights
):
    def run(images, codecs, metrics):
        command = ["eval", str(images), "--codecs", codecs, "--bpp", "3"]
        command += ["--metrics", metrics, "--out", str(tmp_path)]
        assert cli.main(command) == 0
        return capsys.readouterr().err

    assert run(folder, "jpeg", "psnr_db,lattice") == ""
    plots = tmp_path / "plots"
    mine = plots / "rd_mine.png"
    mine.write_bytes(b"drawn by hand")
    assert run(folder, "jpeg,webp", "psnr_db") == ""  # nothing is lost
    names = ["rd_all.png", "rd_all.svg", mine.name, "rd_psnr_db.png", "rd_psnr_db.svg"]
    assert sorted(os.listdir(plots)) == names
    own = "give each evaluation a folder of its own"
    for images, codecs, of in (
        (folder, "webp", "other codecs"),
        (folder / "photo0.png", "webp", "another set of images"),
        (folder, "jpeg", "another set of images and other codecs"),
    ):
        note = f"note: tables of {of} were replaced in {tmp_path}: {own}\n"
        assert run(images, codecs, "psnr_db") == note


def test_command_tells_where_programs_and_metrics_are(capsys):
    with pytest.raises(SystemExit):
        cli.main(["eval", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "for programs: DIR/summary.json" in text
    of_each, of_all = text.split("of each image: ")[1].split("over patches of all")[:2]
    of_all = of_all.split("default:")[0]
    for name in metrics.IMAGE_METRICS:
        assert name in of_each and name not in of_all.replace("_distance", " ")
    assert all(name in of_all for name in measures_module.SET_METRICS)


def test_command_with_skipped_images_says_so(folder, tmp_path, capfdbinary, no_weights):
    broken = tmp_path / os.fsdecode(b"brok\xe9n.png")  # no UTF-8
    broken.write_bytes(b"not an image")
    command = ["eval", str(folder / "photo0.png"), str(broken), "--codecs", "jpeg"]
    command += ["--bpp", "2", "--metrics", "psnr_db", "--out", str(tmp_path / "out")]
    assert cli.main(command) == 4
    printed = capfdbinary.readouterr()
    assert b"skipped" in printed.err and b"n.png" in printed.err
    for text in (printed.out, (tmp_path / "out" / "summary.md").read_bytes()):
        assert b"Skipped, 1 files" in text and b"brok\xe9n.png" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--codecs", "gif"], "unknown codec 'gif'"),
        (["--codecs", "jpeg", "--anchor", "avif"], "the anchor 'avif' is not among"),
        (["--codecs", "jpeg", "--metrics", "fid"], "SEMLIC_FEATURES"),
        (["--codecs", "jpeg", "--published", "imagenet"], "expected one of clic"),
    ],
)
def test_command_refuses_before_it_works(
    folder, tmp_path, capsys, no_weights, options, message
):
    out = tmp_path / "out"
    assert cli.main(["eval", str(folder), "--out", str(out), *options]) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_features_are_of_patches_of_one_size(folder, tmp_path, small_trunk):
    """Another `--patch` in the same folder takes none of the features there."""

    def run(side, out):
        measures = Measures(["frechet"], patch_side=side)
        codecs = [ClassicalEntrant("jpeg")]
        return run_sweep(list_images([folder]), codecs, [3.0], measures, out).set_rows

    run(32, tmp_path / "both")
    assert run(48, tmp_path / "both") == run(48, tmp_path / "alone")


def test_a_newer_codec_may_reach_what_an_older_one_did_not(folder, tmp_path):
    class Refusing(Counting):
        def fitter(self, image):
            def refuse(bpp):
                raise ValueError("it does not get there")

            return refuse

    first = sweep(folder, tmp_path, [Refusing("jpeg")], rates=[3.0])
    assert all("file" in row.gaps for row in first.rows)
    newer = Counting("jpeg")
    newer.identity += " of tomorrow"
    found = sweep(folder, tmp_path, [newer], rates=[3.0])
    assert newer.fits == 3 and all(row.bpp for row in found.rows)


def test_psnr_of_equal_images_is_a_gap(folder):
    image = np.asarray(Image.open(next(folder.iterdir())))
    values, gaps, failed = Measures(["psnr_db"]).measure(image, image, ["psnr_db"])
    assert (values, gaps, failed) == ({}, {"psnr_db": "its value is inf"}, {})


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


def test_only_the_best_quality_can_be_too_small(monkeypatch):
    """Far below the rate at a lower quality is a step of the qualities, not the end."""
    quality = [0.5]
    codec = SimpleNamespace(
        budget_bytes=lambda bpp, shape: 1000,
        compress=lambda image, **options: bytes(800),
        info=lambda data: dict(quality=quality[0], bpp=0.8, width=80, height=100),
    )
    monkeypatch.setattr(
        "semlic_jax.evaluation.entrants.refinement_identity", lambda *_: ""
    )
    fit = RefinedEntrant("refined", codec, "fast").fitter(np.zeros((100, 80, 3)))
    assert len(fit(1.0).data) == 800
    quality[0] = 1
    with pytest.raises(TooSmallError, match="0.800 bpp"):
        fit(1.0)


def test_layers_are_those_that_the_labels_name():
    trunks = {name: metric.trunk for name, metric in SET_METRICS.items()}
    for kind in ("frechet", "kernel"):
        assert trunks[f"mobilenet_last_{kind}"] == "mobilenet_v2"
        assert trunks[f"mobilenet_{kind}"] == "mobilenet_v2-block_13_expand_relu"


# The command.


def test_every_option_of_the_command_is_taken(folder, tmp_path, monkeypatch, capsys):
    taken = {}

    def stop(inputs, codecs, rates, out, **options):
        taken.update(options, inputs=inputs, codecs=codecs, rates=rates, out=out)
        raise ValueError("stop here")

    monkeypatch.setattr(evaluate, "evaluate", stop)
    command = ["eval", str(folder), "--codecs", "jpeg,webp", "--bpp", "0.5,1"]
    command += ["--metrics", "psnr_db,ms_ssim", "--out", str(tmp_path / "out")]
    command += ["--model", "base", "--anchor", "webp", "--weights", str(tmp_path)]
    command += ["--patch", "64", "--published", "kodak", "--jobs", "3", "--remeasure"]
    assert cli.main([*command, "--background", "#010203"]) == 1
    assert "stop here" in capsys.readouterr().err
    taken.pop("progress")
    assert taken == dict(
        inputs=[folder],
        codecs=["jpeg", "webp"],
        rates=[0.5, 1.0],
        out=tmp_path / "out",
        metrics=["psnr_db", "ms_ssim"],
        model="base",
        anchor="webp",
        weights=tmp_path,
        patch_side=64,
        image_set="kodak",
        jobs=3,
        background=(1, 2, 3),
        remeasure=True,
    )


def test_command_measures_again_and_says_what_it_left_out(
    folder, tmp_path, capsys, monkeypatch
):
    def default_metrics(weights):
        return ["psnr_db"], ["SSIMULACRA2 is left out"]

    monkeypatch.setattr(evaluate, "default_metrics", default_metrics)
    command = ["eval", str(folder), "--codecs", "jpeg", "--bpp", "3"]
    command += ["--out", str(tmp_path)]
    assert cli.main(command) == 0
    assert "* SSIMULACRA2 is left out" in capsys.readouterr().out
    before = (tmp_path / "results.csv").read_text()
    journal = tmp_path / "journal.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines() if line]
    for line in lines:
        if line["key"].startswith("measure "):
            line["values"]["psnr_db"][1] = 99.0
    journal.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert cli.main(command) == 0
    assert (tmp_path / "results.csv").read_text().count(",99.0,") == 3
    assert cli.main([*command, "--remeasure"]) == 0
    after = (tmp_path / "results.csv").read_text()
    values = [
        [row.split(",")[10] for row in text.splitlines()] for text in (before, after)
    ]
    assert values[0] == values[1]


def test_command_refuses_published_curves_over_other_images(folder, tmp_path, capsys):
    command = ["eval", str(folder), "--codecs", "jpeg", "--bpp", "3", "--metrics"]
    command += ["psnr_db", "--out", str(tmp_path), "--published", "kodak"]
    assert cli.main(command) == 1
    assert "images of kodak, these results are over 3 others" in capsys.readouterr().err
