# SPDX-License-Identifier: Apache-2.0
"""Which images a command is given by files and folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from semlic_jax.evaluation.image_sets import (
    folders_left_out,
    list_images,
    readable_images,
)


def test_folders_are_not_searched_and_what_is_left_out_is_known(tmp_path):
    for name in ("b", "a", ".git"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "deep.png").touch()
    assert folders_left_out(tmp_path) == [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(
        ValueError, match=r"no image files in .* \(2 subfolders are not"
    ):
        list_images([tmp_path])
    photo = tmp_path / "photo.png"
    photo.touch()
    assert list_images([tmp_path, photo]) == [photo]
    assert folders_left_out(photo) == []
    with pytest.raises(ValueError, match=f"no image files in {tmp_path / 'b'}$"):
        list_images([tmp_path / "b"])


def test_no_two_images_have_one_name(tmp_path, monkeypatch):
    """Means are over names: one of two would be counted twice, the other not."""
    monkeypatch.chdir(tmp_path)
    Path("d").mkdir()
    paths = [Path("d/x.png"), Path("x.png"), Path("d/x.png").resolve()]
    for shade, path in enumerate(paths[:2]):
        Image.new("RGB", (4, 4), (shade, 0, 0)).save(path)
    skipped = []
    found = [facts.name for facts, _ in readable_images(paths, None, skipped)]
    assert len(found) == len(set(found)) == 2 and found[0] == "x.png"
    assert [each.reason for each in skipped] == ["it has the same pixels as x.png"]


def test_the_same_bytes_in_another_shape_are_another_image(tmp_path):
    paths = [tmp_path / "wide.png", tmp_path / "tall.png"]
    for path, size in zip(paths, [(8, 4), (4, 8)], strict=True):
        Image.new("RGB", size, (9, 9, 9)).save(path)
    skipped = []
    found = list(readable_images(paths, None, skipped))
    assert len(found) == 2 and not skipped
