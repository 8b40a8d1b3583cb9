# SPDX-License-Identifier: Apache-2.0
"""Whole photographs against their tiles."""

import importlib
import json

import numpy as np
import pytest
from conftest import photograph_like
from PIL import Image

from semlic_jax.evaluation.crop_cost import crop_cost, main
from semlic_jax.evaluation.demo import packaged_photograph


def test_bits_are_those_of_the_files(codec):
    image = photograph_like(70, 140)
    (record,) = crop_cost(codec, [image], 64, qualities=(0.6,))

    def payload_bits(part):
        part = np.ascontiguousarray(part)
        return 8 * codec.info(codec.compress(part, quality=0.6))["payload_bytes"]

    whole = payload_bits(image[:64, :128])
    tiles = payload_bits(image[:64, :64]) + payload_bits(image[:64, 64:128])
    # A payload ends in up to four bytes of the coder's state.
    assert abs(record["whole_bpp"] * 64 * 128 - whole) <= 40
    assert abs(record["tiles_bpp"] * 64 * 128 - tiles) <= 80
    expected = 100 * (record["whole_bpp"] / record["tiles_bpp"] - 1)
    assert record["whole_percent"] == pytest.approx(expected)


def test_an_image_of_one_tile_is_refused(codec):
    with pytest.raises(
        ValueError, match="at least two tiles of 64 pixels, found 70x90"
    ):
        crop_cost(codec, [photograph_like(90, 70)], 64)


def test_the_packaged_model_did_not_learn_borders(tmp_path, capsys):
    """A model that needs many more bits for a whole than for its tiles is broken."""
    pixels = packaged_photograph().pixels[:256, :384]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    main(["small", str(tmp_path / "a.png"), "--side", "128"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert json.loads(line)["whole_percent"] < 3, line


@pytest.mark.parametrize("program", ["crop_cost", "exactness"])
def test_a_missing_image_is_one_sentence(program, tmp_path, capsys, monkeypatch):
    module = importlib.import_module(f"semlic_jax.evaluation.{program}")
    missing = str(tmp_path / "a.png")
    arguments = ["small", missing] if program == "crop_cost" else [missing]
    monkeypatch.setattr("sys.argv", [program, *arguments])
    with pytest.raises(SystemExit) as exit:
        module.main()
    assert exit.value.code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and missing in error
