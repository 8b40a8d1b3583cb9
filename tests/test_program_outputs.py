# SPDX-License-Identifier: Apache-2.0
"""Programs that measure, `python -m semlic_jax...`: they replace no file unasked."""

from __future__ import annotations

import argparse
import importlib
import sys

import pytest

pytest.importorskip("orbax.checkpoint", reason="training needs the extra `train`")
pytest.importorskip("optax", reason="training needs the extra `train`")

PROGRAMS = {
    "evaluation.exactness": "--out",
    "evaluation.refinement_benchmark": "--json",
    "training.benchmark": "--json",
    "training.distil": "--evaluate",
}
INPUTS = {"training.benchmark": [], "training.distil": ["--data"]}


def refusal(monkeypatch, capsys, program, *arguments):
    """The status and the line of a program that should do no work."""
    module = importlib.import_module(f"semlic_jax.{program}")
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    try:
        status = module.main()
    except SystemExit as ended:
        status = ended.code
    error = capsys.readouterr().err
    assert status == 2 or error.count("\n") == 1, error
    return status, error


@pytest.mark.parametrize("program", PROGRAMS)
def test_files_are_kept_and_places_are_checked_before_the_work(
    program, tmp_path, monkeypatch, capsys
):
    photograph = tmp_path / "photo.png"
    photograph.write_bytes(b"mine")
    options = INPUTS.get(program, [""])
    images = [each for option in options for each in (option, str(photograph)) if each]
    option = PROGRAMS[program]
    for path, reason in (
        (photograph, "exists: give --force"),
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "x.json", "does not exist"),
    ):
        given = *images, option, str(path)
        status, error = refusal(monkeypatch, capsys, program, *given)
        assert status == 1 and reason in error
    assert photograph.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("program", "work"),
    [
        ("evaluation.exactness", "report"),
        ("evaluation.refinement_benchmark", "measure"),
        ("training.benchmark", "run_benchmark"),
    ],
)
def test_a_file_that_appears_meanwhile_is_kept_and_the_record_printed(
    program, work, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "record.json"

    def measured(*given, **options):
        path.write_text("theirs")
        return {"variants": {}}

    module = importlib.import_module(f"semlic_jax.{program}")
    monkeypatch.setattr(module, work, measured)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    photographs = INPUTS.get(program, ["photo.png"])
    command = [program, *photographs, PROGRAMS[program], str(path)]
    monkeypatch.setattr(sys, "argv", command)
    try:
        status = module.main()
    except SystemExit as ended:
        status = ended.code
    printed = capsys.readouterr()
    assert status == 1 and "exists: give --force" in printed.err
    assert '"variants"' in printed.out and path.read_text() == "theirs"


@pytest.mark.parametrize(
    ("program", "option"),
    [
        ("evaluation.refinement_benchmark", []),
        ("training.benchmark", ["--torch"]),
    ],
)
def test_a_missing_pytorch_is_said_before_the_work(
    program, option, monkeypatch, capsys
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, error = refusal(monkeypatch, capsys, program, *option)
    assert status == 1 and "PyTorch is not installed" in error


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("--crop=100", "--crop must be a multiple of 64, found 100"),
        ("--train=nosuch", "photographs in nosuch, found none"),
    ],
)
def test_what_a_step_cannot_take_is_said_before_the_work(
    option, reason, monkeypatch, capsys
):
    monkeypatch.setattr("semlic_jax.training.benchmark.jax_step", None)
    status, error = refusal(monkeypatch, capsys, "training.benchmark", option)
    assert status == 1 and reason in error


def test_photographs_of_no_use_are_said_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_text("not an image")
    benchmark = importlib.import_module("semlic_jax.training.benchmark")
    monkeypatch.setattr(benchmark, "jax_step", None)
    options = argparse.Namespace(crop=64, torch=False, train=[str(tmp_path)])
    options.dtype, options.batch = "float32", 1
    with pytest.raises(ValueError, match="none that is usable .1 of 1 left out"):
        benchmark.run_benchmark(options)


@pytest.mark.parametrize("program", list(PROGRAMS)[1:3])
@pytest.mark.parametrize("option", ["--batch", "--repeats"])
@pytest.mark.parametrize("number", ["0", "-2", "x"])
def test_numbers_of_measurements(program, option, number, monkeypatch, capsys):
    status, error = refusal(monkeypatch, capsys, program, f"{option}={number}")
    assert status == 2 and f"at least 1, found '{number}'" in error
