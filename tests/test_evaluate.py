# SPDX-License-Identifier: Apache-2.0
"""The command `semlic eval`."""

from __future__ import annotations

import json
import os

import pytest

from semlic_jax import cli
from semlic_jax.evaluation import evaluate
from semlic_jax.evaluation import measures as measures_module
from semlic_jax.objectives import metrics


def test_command(photo_folder, tmp_path, capsys, no_weights):
    command = ["eval", str(photo_folder), "--codecs", "jpeg,webp", "--bpp", "1.5,2"]
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
    photo_folder, tmp_path, capsys, no_weights
):
    def run(images, codecs, metrics):
        command = ["eval", str(images), "--codecs", codecs, "--bpp", "3"]
        command += ["--metrics", metrics, "--out", str(tmp_path)]
        assert cli.main(command) == 0
        return capsys.readouterr().err

    assert run(photo_folder, "jpeg", "psnr_db,lattice,spectrum") == ""
    plots = tmp_path / "plots"
    mine = plots / "rd_mine.png"
    mine.write_bytes(b"drawn by hand")
    assert run(photo_folder, "jpeg,webp", "psnr_db") == ""  # nothing is lost
    names = ["rd_all.png", "rd_all.svg", mine.name, "rd_psnr_db.png", "rd_psnr_db.svg"]
    assert sorted(os.listdir(plots)) == names
    own = "give each evaluation a folder of its own"
    for images, codecs, of in (
        (photo_folder, "webp", "other codecs"),
        (photo_folder / "photo0.png", "webp", "another set of images"),
        (photo_folder, "jpeg", "another set of images and other codecs"),
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


def test_command_with_skipped_images_says_so(
    photo_folder, tmp_path, capfdbinary, no_weights
):
    broken = tmp_path / os.fsdecode(b"brok\xe9n.png")  # no UTF-8
    broken.write_bytes(b"not an image")
    command = [
        "eval",
        str(photo_folder / "photo0.png"),
        str(broken),
        "--codecs",
        "jpeg",
    ]
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
    photo_folder, tmp_path, capsys, no_weights, options, message
):
    out = tmp_path / "out"
    assert cli.main(["eval", str(photo_folder), "--out", str(out), *options]) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("command", ["eval", "compare"])
def test_no_metrics_at_all_are_wrong_usage(photo_folder, capsys, command):
    photo = str(photo_folder / "photo0.png")
    with pytest.raises(SystemExit) as ended:
        cli.main([command, photo, "--metrics", " , "])
    assert ended.value.code == 2
    assert "expected names with commas between them" in capsys.readouterr().err


def test_every_option_of_the_command_is_taken(
    photo_folder, tmp_path, monkeypatch, capsys
):
    taken = {}

    def stop(inputs, codecs, rates, out, **options):
        taken.update(options, inputs=inputs, codecs=codecs, rates=rates, out=out)
        raise ValueError("stop here")

    monkeypatch.setattr(evaluate, "evaluate", stop)
    command = ["eval", str(photo_folder), "--codecs", "jpeg,webp", "--bpp", "0.5,1"]
    command += ["--metrics", "psnr_db,ms_ssim", "--out", str(tmp_path / "out")]
    command += ["--model", "base", "--anchor", "webp", "--weights", str(tmp_path)]
    command += ["--patch", "64", "--published", "kodak", "--jobs", "3", "--remeasure"]
    assert cli.main([*command, "--background", "#010203"]) == 1
    assert "stop here" in capsys.readouterr().err
    taken.pop("progress")
    assert taken == dict(
        inputs=[photo_folder],
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
    photo_folder, tmp_path, capsys, monkeypatch
):
    def default_metrics(weights):
        return ["psnr_db"], ["SSIMULACRA2 is left out"]

    monkeypatch.setattr(evaluate, "default_metrics", default_metrics)
    command = ["eval", str(photo_folder), "--codecs", "jpeg", "--bpp", "3"]
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


def test_command_refuses_published_curves_over_other_images(
    photo_folder, tmp_path, capsys
):
    command = ["eval", str(photo_folder), "--codecs", "jpeg", "--bpp", "3", "--metrics"]
    command += ["psnr_db", "--out", str(tmp_path), "--published", "kodak"]
    assert cli.main(command) == 1
    assert "images of kodak, these results are over 3 others" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[" * 100_000, "{}", "[1]"])
def test_damaged_results_are_replaced(
    photo_folder, tmp_path, capsys, no_weights, content
):
    command = ["eval", str(photo_folder), "--codecs", "jpeg", "--bpp", "3"]
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
