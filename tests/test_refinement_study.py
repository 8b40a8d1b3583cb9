# SPDX-License-Identifier: Apache-2.0
"""Studies of refinement and its benchmark, on small images and hardly any steps."""

from __future__ import annotations

import csv
import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from semlic_jax import refinement
from semlic_jax.evaluation import (
    refinement_benchmark,
    refinement_study,
    roi_study,
    settings_study,
)
from semlic_jax.evaluation.results import (
    CodecFacts,
    ImageFacts,
    MetricFacts,
    Results,
    Row,
    Skipped,
    read_results,
)
from semlic_jax.refinement import Settings

SIZE = (56, 64)
QUICK = Settings(steps=2, gamma=0.0, chunk_steps=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, photograph):
    path = tmp_path_factory.mktemp("images")
    for seed in (3, 4):
        Image.fromarray(photograph(*SIZE, seed)).save(path / f"photo{seed}.png")
    return path


@pytest.fixture(scope="module")
def rates(mini_codec, photograph):
    """Four rates that the model reaches on both images."""
    sizes = [
        [8 * len(mini_codec.compress(photograph(*SIZE, seed), quality=q)) / 56 / 64]
        for seed in (3, 4)
        for q in (0.0, 1.0)
    ]
    ends = np.reshape(sizes, (2, 2))
    low, high = ends[:, 0].max(), ends[:, 1].min()
    return [round(low + part * (high - low), 3) for part in (0.15, 0.4, 0.65, 0.9)]


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_gain(folder, rates, mini_model, tmp_path):
    broken, skipped = tmp_path / "broken.png", []
    broken.write_bytes(b"not an image")
    tmp_path /= "out"

    def run(say=lambda text: None):
        return refinement_study.gain(
            [folder, broken],
            tmp_path,
            model=str(mini_model),
            settings=QUICK,
            rates=rates,
            progress=say,
            skipped=skipped,
        )

    paths = run()
    assert [each.name for each in skipped] == [str(broken)]
    assert [path.name for path in paths] == [
        *("gain.csv", "gain.md", "gain.png", "gain.svg")
    ]
    rows = [row for row in rows_of(paths[0]) if row["metric"] == "psnr_db"]
    assert [row["image"] for row in rows] == ["photo3.png", "photo4.png"]
    # Never worse under PSNR, which is what was refined for.
    assert all(row["worse_at_bpp"] == "" for row in rows)
    results = read_results(tmp_path)
    for rate in rates:
        files, over, use = refinement_study.budget_use(results, rate)
        assert (files, over) == (2, 0) and 0.9 < use <= 1
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.semlic")}
    assert len(made) == 16
    run()  # goes on where it stopped: nothing is encoded again
    assert made == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.semlic")}


def results_of(refined_db, *, bpp=0.2):
    """One image, one rate up to four, with PSNRs that are known."""
    rows = []
    for codec, values in (("semlic", (25, 27, 29, 31)), ("refined", refined_db)):
        for step, value in enumerate(values):
            rate = bpp * 2**step
            found = {"psnr_db": float(value)}
            rows.append(Row("a", codec, rate, rate, int(rate * 125), values=found))
    return Results(
        images=(ImageFacts("a", "0", 100, 10),),
        skipped=(),
        codecs={name: CodecFacts(name, "") for name in ("semlic", "refined")},
        image_metrics={"psnr_db": MetricFacts("PSNR", True)},
        set_metrics={},
        rows=tuple(rows),
    )


def test_images_that_are_left_out_are_named(folder, capsys, monkeypatch):
    def gain(*images, skipped, **options):
        skipped.append(Skipped("broken.png", "it is damaged"))
        return []

    monkeypatch.setattr(refinement_study, "gain", gain)
    assert refinement_study.main(["gain", str(folder), "--bpp", "1,2,3,4"]) == 4
    assert capsys.readouterr().err == "skipped broken.png: it is damaged\n"


def test_gains_of_known_curves():
    """2 dB more at each rate, where 2 dB are a doubling: half the bits."""
    found = refinement_study.image_gain(results_of((27, 29, 31, 33)), "a", "psnr_db")
    assert found.bd_rate == pytest.approx(-50, abs=0.01) and found.worse == ()
    found = refinement_study.image_gain(
        results_of((25, 26.9, 29, 31.5)), "a", "psnr_db"
    )
    assert found.worse == (0.4,)
    found = refinement_study.image_gain(results_of((27,)), "a", "psnr_db")
    assert found.bd_rate is None and "at least 4 points" in found.gap


def test_the_objective_is_measured_as_it_is_refined_for():
    """Without perceptual terms it is PSNR, with them their weighted sum."""
    plain = results_of((27, 29, 31, 33))
    found = refinement_study.with_objective(plain, Settings(gamma=0.0))
    for metric in ("objective_db", "psnr_db"):
        gain = refinement_study.image_gain(found, "a", metric)
        assert gain.bd_rate == pytest.approx(-50, abs=0.01)
    assert list(found.image_metrics) == ["objective_db", "psnr_db"]
    settings = Settings(alpha=0.02, gamma=3.0, mean_style=0.0, structure=7.0, mesh=0.0)
    # Not where its perceptual part was not measured, or cannot be.
    found = refinement_study.with_objective(plain, settings)
    assert all("objective_db" not in row.values for row in found.rows)
    styled = dataclasses.replace(settings, style=1.0)
    assert refinement_study.with_objective(plain, styled) is plain
    measured = {"compact_distance": 0.5, "ms_ssim": 0.9}
    rows = [
        dataclasses.replace(row, values=row.values | measured) for row in plain.rows
    ]
    full = dataclasses.replace(plain, rows=tuple(rows))
    mse = 255**2 / 10**2.5
    for structure, value in ((7.0, 0.02 * mse + 3.6), (0.0, 0.02 * mse + 1.5)):
        changed = dataclasses.replace(settings, structure=structure)
        found = refinement_study.with_objective(full, changed)
        expected = -10 * np.log10(value)
        assert found.rows[0].values["objective_db"] == pytest.approx(expected)
    for weight, metric in (
        ("mean_style", "compact_mean_style"),
        ("lattice",) * 2,
        ("mesh",) * 2,
    ):
        more = dataclasses.replace(changed, **{weight: 4.0})
        found = refinement_study.with_objective(full, more)
        assert all("objective_db" not in row.values for row in found.rows)
        measured_too = [
            dataclasses.replace(row, values=row.values | {metric: 0.25}) for row in rows
        ]
        found = refinement_study.with_objective(
            dataclasses.replace(plain, rows=tuple(measured_too)), more
        )
        expected = -10 * np.log10(0.02 * mse + 1.5 + 3.0)
        assert found.rows[0].values["objective_db"] == pytest.approx(expected)


def test_settings(folder, rates, mini_model, mini_codec, photograph, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["settings", str(folder), "--out", str(out), "--model", str(mini_model)]
    command += ["--gamma", "0", "--crop", "56", "--bpp", f"{rates[1]},{rates[2]}"]
    tries = ["fast,steps=2,chunk_steps=1", "steps=2,chunk_steps=1,alpha=0.02"]
    command += [f"--try={text}" for text in tries]
    assert refinement_study.main(command) == 0
    text = capsys.readouterr().out
    assert "2 crops of 56 x 56 pixels" in text and "alpha 0.003, gamma 0 and" in text
    assert all(f"| {name} " in text for name in tries)
    rows = rows_of(out / "trials.csv")
    images = ["photo3.png"] * 2 + ["photo4.png"] * 2
    assert [row["image"] for row in rows] == images
    # The crops take the rates in turn.
    assert [float(row["bpp"]) for row in rows] == [rates[1]] * 2 + [rates[2]] * 2
    for row in rows:
        assert 0 < float(row["value_ratio"]) <= 1 and float(row["image_s"]) > 0
    lines = (out / "trials.jsonl").read_text().splitlines()
    assert len(lines) == 8  # of each image, two trials and two objectives' ladders
    # Without perceptual terms the ladder is that of the error, in real bytes.
    ladder = json.loads(lines[0])
    pixels = photograph(*SIZE, 3)[:, 4:60]
    file = mini_codec.compress(pixels, quality=0.0)
    error = pixels.astype(float) - mini_codec.decompress(file)
    alpha = Settings().alpha
    assert ladder["bytes"][0] == len(file)
    assert ladder["values"][0] == pytest.approx(alpha * np.mean(error**2), rel=1e-4)
    # What was tried is not tried again.
    assert refinement_study.main(command) == 0
    assert rows_of(out / "trials.csv") == rows
    assert len((out / "trials.jsonl").read_text().splitlines()) == 8
    command[command.index("56")] = "100"
    assert refinement_study.main(command) == 1
    assert "at least 100 x 100, found 64 x 56" in capsys.readouterr().err


def test_what_settings_save():
    """Half the bytes of the unrefined file between two of the ladder, and no more."""
    ladder = {"bytes": [100, 400], "values": [4.0, 1.0]}
    crop = settings_study._Crop("a", np.zeros((8, 8, 3), np.uint8), 0.2)
    facts = dict(bytes=100, unrefined_value=4.0, step_s=1.0, image_s=1.0)
    for value, saving in ((2.0, 50), (4.0, 0), (1.0, 75), (0.5, 75)):
        found = settings_study._trial("fast", crop, facts | {"value": value}, ladder)
        assert found.saving_percent == pytest.approx(saving)
        assert found.value_ratio == value / 4


def test_tries():
    found = settings_study.parse_try("best,noise=0", gamma=0.0, alpha=None)
    assert found == refinement.preset("best", noise=0, gamma=0)
    found = settings_study.parse_try("steps=7,gamma=2", gamma=0.0)
    assert (found.steps, found.gamma) == (7, 2)
    sga = settings_study.parse_try("default,method=sga")
    assert sga == refinement.preset("default", method="sga") and sga.steps > 100


def test_objectives_have_names_of_their_own():
    """Of all weights: what is measured under one does not serve another."""
    weights = ("alpha", "gamma", "style", "mean_style", "structure", "lattice", "mesh")
    changes = [{}, *({name: 1.0} for name in weights)]
    names = [settings_study.objective_name(Settings(**change)) for change in changes]
    assert len(set(names)) == len(changes)
    plain = [Settings(gamma=0.0, structure=weight) for weight in (0.0, 1.0)]
    assert len(set(map(settings_study.objective_name, plain))) == 1


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("bset", "found 'bset'; the nearest is best"),
        ("fast,kapa=2", "found 'kapa'; the nearest is kappa"),
        ("fast,60", "expected KEY=VALUE, found '60' in 'fast,60'"),
        ("steps=1.5", "expected a whole number for steps, found '1.5'"),
        ("kappa=-1", "expected kappa above 0, found -1"),
    ],
)
def test_tries_that_are_none(text, refusal, folder, tmp_path, capsys):
    command = ["settings", str(folder), "--out", str(tmp_path), "--try", text]
    assert refinement_study.main(command) == 1
    assert refusal in capsys.readouterr().err


def test_regions(folder, rates, mini_model, tmp_path):
    paths = roi_study.roi_study(
        [folder / "photo3.png"],
        tmp_path,
        model=str(mini_model),
        settings=QUICK,
        region="0,0,32,56",
        bpp=rates[2],
        foregrounds=(0.9,),
        variants=("L1",),
    )
    rows = rows_of(paths[0])
    assert [row["variant"] for row in rows] == ["refined, no region", "L1"]
    assert float(rows[0]["inside_gain_db"]) == 0
    gain = float(rows[1]["inside_db"]) - float(rows[0]["inside_db"])
    assert float(rows[1]["inside_gain_db"]) == pytest.approx(gain)
    assert "L1" in paths[1].read_text() and paths[2].stat().st_size > 1000


@pytest.mark.slow
def test_benchmark(mini_model, tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    command = ["--model", str(mini_model), "--side", "64", "--steps", "1"]
    command += ["--repeats", "1", "--json", str(tmp_path / "facts.json")]
    assert refinement_benchmark.main(command) == 0
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["jax_step_s"] > 0 and facts["torch_step_s"] > 0
    ratio = facts["torch_step_s"] / facts["jax_step_s"]
    assert facts["jax_speed_up"] == pytest.approx(ratio)
