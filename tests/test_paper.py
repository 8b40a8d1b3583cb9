# SPDX-License-Identifier: Apache-2.0
"""The paper's tables and figures: each command on small images and a tiny model."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from small_trunk import load_small_trunk

from semlic_jax.evaluation import measures, paper, region_figure
from semlic_jax.evaluation.results import Skipped, read_results
from semlic_jax.refinement import Settings

# Two steps for the distortion alone: the tests are of what is done with the files.
QUICK = Settings(steps=2, gamma=0.0, chunk_steps=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, photograph):
    path = tmp_path_factory.mktemp("images")
    for seed in range(2):
        Image.fromarray(photograph(64, 64, seed)).save(path / f"photo{seed}.png")
    return path


@pytest.fixture(scope="module")
def rates(codec, photograph):
    """Four rates that the tiny model reaches on both images."""
    sizes = np.array(
        [
            [8 * len(codec.compress(photograph(64, 64, seed), quality=q)) / 64**2]
            for seed in range(2)
            for q in (0.0, 1.0)
        ]
    ).reshape(2, 2)
    low, high = sizes[:, 0].max(), sizes[:, 1].min()
    return [round(low + part * (high - low), 3) for part in (0.1, 0.35, 0.65, 0.9)]


@pytest.fixture(autouse=True)
def small_distances(monkeypatch):
    monkeypatch.setattr(measures, "load_features", load_small_trunk)
    monkeypatch.setattr(paper, "paper_metrics", lambda weights: ("frechet", "kernel"))


def test_without_weights_other_distances_take_their_place(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.delenv("SEMLIC_FEATURES", raising=False)
    assert paper.paper_metrics(tmp_path) == ("frechet", "kernel", "feature_distance")
    packaged = ("compact_frechet", "compact_kernel", "compact_distance")
    assert paper.paper_metrics(None) == packaged


def test_main_figure(folder, rates, tiny_model, tmp_path):
    report = paper.rd(
        [folder],
        [str(tiny_model)],
        tmp_path,
        rivals=["jpeg"],
        rates=[*rates, 4.0],
        patch_side=32,
    )
    results = report.summary.results
    assert list(results.codecs) == ["semlic:tiny", "jpeg"]
    assert list(results.metrics) == ["psnr_db", "frechet", "kernel"]
    assert (tmp_path / "plots" / "rd_all.svg").exists()


def test_ablation_table(folder, rates, tiny_model, tmp_path):
    other = tmp_path / "without_style.npz"
    shutil.copy(tiny_model, other)
    path = paper.ablation(
        [folder],
        [str(tiny_model), str(other)],
        tmp_path / "out",
        rates=rates,
        patch_side=32,
    )
    text = path.read_text()
    assert "against *tiny* at equal metric" in text and "2 images" in text
    # The same model under another name takes the same bits.
    row = next(line for line in text.splitlines() if line.startswith("| without style"))
    assert "+0.0 %" in row
    with pytest.raises(ValueError, match="at least two models, found 1"):
        paper.ablation([folder], [str(tiny_model)], tmp_path / "one")


def test_figure5(folder, rates, tiny_model, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    tmp_path /= "out"
    skipped = []
    paths = paper.figure5(
        [folder, broken],
        str(tiny_model),
        tmp_path,
        skipped=skipped,
        bpp=rates[2],
        refine=QUICK,
        factors=(1.0, 3.0),
        patch_side=32,
    )
    assert [each.name for each in skipped] == [str(broken)]
    assert [path.name for path in paths] == [
        "figure5.png",
        "figure5.svg",
        "results.csv",
    ]
    text = paths[1].read_text()
    for label in ("PSNR (dB), higher is better", "alpha varies", "not refined"):
        assert label in text
    results = read_results(tmp_path)
    assert list(results.codecs) == [
        "semlic",
        "alpha=0.003 gamma=0",
        "alpha=0.009 gamma=0",
    ]
    for row in results.rows:
        assert row.bpp is not None and row.bpp <= rates[2]


def test_figure6(folder, rates, tiny_model, tmp_path):
    paths = paper.figure6(
        folder / "photo0.png",
        str(tiny_model),
        tmp_path,
        region="16,16,24,24",
        bpp=rates[2],
        refine=QUICK,
        foregrounds=(0.5, 0.9),
    )
    with Image.open(paths[0]) as picture:
        assert picture.size[0] > picture.size[1] > 300
    rows = list(csv.DictReader(paths[2].read_text().splitlines()))
    assert [row["variant"] for row in rows] == [
        "not refined",
        "refined, no region",
        "L1, foreground 0.5",
        "L1, foreground 0.9",
        "L2, foreground 0.5",
        "L2, foreground 0.9",
    ]
    assert len(list((tmp_path / "figure6").glob("*.semlic"))) == 5
    budget = rates[2] * 64 * 64 / 8
    assert all(int(row["bytes"]) <= budget for row in rows)
    with pytest.raises(ValueError, match="foreground weights from 0 to 1, found 2"):
        paper.figure6(
            folder / "photo0.png", str(tiny_model), tmp_path, foregrounds=[2.0]
        )


def test_psnr_of_regions():
    original = np.full((8, 8, 3), 100, np.uint8)
    decoded, mask = original.copy(), np.zeros((8, 8), np.float32)
    mask[:4] = 1
    decoded[:4] += 1
    decoded[4:] += 10
    inside, outside = region_figure.region_psnr_db(original, decoded, mask)
    assert inside == pytest.approx(48.1308, abs=1e-4)
    assert outside == pytest.approx(28.1308, abs=1e-4)


def test_command_refuses_in_one_sentence(folder, tmp_path, capsys):
    command = ["ablation", str(folder), "--out", str(tmp_path / "out")]
    assert paper.main(command) == 1
    assert "at least two models" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        paper.main(["figure7"])


def test_command_prints_the_table(folder, rates, tiny_model, tmp_path, capsys):
    other = tmp_path / "other.npz"
    shutil.copy(tiny_model, other)
    command = ["ablation", str(folder), "--out", str(tmp_path / "out")]
    command += ["--models", str(tiny_model), str(other), "--patch", "32"]
    command += ["--bpp", ",".join(map(str, rates))]
    assert paper.main(command) == 0
    printed = capsys.readouterr().out
    assert "| other" in printed and "ablation.md" in printed


def test_commands_name_the_images_that_they_left_out(tmp_path, capsys, monkeypatch):
    left_out = [Skipped("broken.png", "it is damaged")]
    results = SimpleNamespace(images=(), skipped=left_out)
    summary = SimpleNamespace(results=results, bd_rates=())
    report = SimpleNamespace(summary=summary, paths=())
    monkeypatch.setattr(paper, "evaluate", lambda *images, **options: report)
    monkeypatch.setattr(paper, "bd_table", lambda *found: [])

    def figure5(*images, skipped, **options):
        skipped += left_out
        return []

    monkeypatch.setattr(paper, "figure5", figure5)
    for command in (["rd"], ["ablation", "--models", "a", "b"], ["figure5"]):
        command = [command[0], "images", *command[1:], "--out", str(tmp_path)]
        assert paper.main(command) == 4
        assert capsys.readouterr().err == "skipped broken.png: it is damaged\n"


WITHOUT_MATPLOTLIB = """
import importlib, sys

sys.modules["matplotlib"] = None
for line in sys.argv[2:]:
    name, *command = line.split()
    module = importlib.import_module(f"semlic_jax.evaluation.{name}")
    assert not command or module.main([*command, sys.argv[1], "--out", "no"]) == 1
"""


def test_studies_refuse_where_nothing_can_be_drawn(folder, tmp_path):
    studies = ["paper rd", "paper figure5", "paper figure6", "roi_study --bpp 1"]
    studies += ["refinement_study gain", "refinement_study settings"]
    image = str(folder / "photo0.png")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MATPLOTLIB, image, *studies, "settings_study"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert done.returncode == 0, done.stderr
    refusal = "plots need matplotlib: pip install 'semlic_jax[eval]'"
    lines = [f"{study.split()[0]}: {refusal}" for study in studies]
    assert done.stderr.splitlines() == lines
    assert list(tmp_path.iterdir()) == []
