# SPDX-License-Identifier: Apache-2.0
"""What the programs of tables and figures refuse, and how."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(path)
    return path


def main_of(program):
    return importlib.import_module(f"semlic_jax.evaluation.{program}").main


@pytest.mark.parametrize(
    ("command", "refusal"),
    [
        ("paper rd --bpp 0.1,x", "expected numbers with commas between them, found"),
        ("paper rd --patch 0", "expected a whole number of at least 1, found '0'"),
        ("paper figure5 --factors ,", "expected numbers with commas between them"),
        ("paper figure6 --refine fast2", "expected a preset or a number of steps"),
        ("roi_study --foregrounds x", "expected numbers with commas between them"),
        ("roi_study --refine 1.5", "a preset or a number of steps, found '1.5'"),
        ("refinement_study settings --crop 0", "expected a whole number of at least"),
    ],
)
def test_options_that_do_not_fit_say_what_does(command, refusal, image, capsys):
    program, *arguments = command.split()
    with pytest.raises(SystemExit) as exit:
        main_of(program)([*arguments, "--", str(image)])
    assert exit.value.code == 2
    assert refusal in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["paper figure6", "roi_study", "refinement_study settings"]
)
def test_a_file_is_no_folder_for_results(command, image, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    program, *arguments = command.split()
    assert main_of(program)([*arguments, str(image), "--out", str(image)]) == 1
    refusal = f"{program}: expected a folder for the results, found the file {image}"
    assert capsys.readouterr().err == f"{refusal}\n"
