# SPDX-License-Identifier: Apache-2.0
"""Image files that are written: what each kind holds, and other systems."""

from __future__ import annotations

import io
import os
import stat

import numpy as np
import pytest
from PIL import Image

from semlic_jax import images


class Windows:
    """`os` as far as it differs there."""

    name = "nt"

    def __getattr__(self, name):
        return getattr(os, name)

    def rename(self, source, target):
        if os.path.exists(target):
            raise FileExistsError(17, "File exists")
        os.rename(source, target)

    def link(self, source, target):
        raise OSError(1, "Incorrect function")


@pytest.mark.parametrize("suffix", sorted(images._SAVE_OPTIONS))
def test_which_kinds_keep_a_profile(suffix, other_profile):
    data = images.encode_image(
        np.zeros((4, 4, 3), np.uint8), suffix, icc_profile=other_profile
    )
    with Image.open(io.BytesIO(data)) as image:
        kept = image.info.get("icc_profile") == other_profile
    assert (
        kept == images.keeps_profile(suffix.upper()) == (suffix not in (".bmp", ".ppm"))
    )


def test_a_read_only_flag_of_windows_is_not_carried_over(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    path.chmod(0o444)
    monkeypatch.setattr(images, "os", Windows())
    images.write_file(path, b"new", force=True)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) & 0o200


def test_a_name_that_is_taken_meanwhile_is_kept_on_windows(tmp_path, monkeypatch):
    path = tmp_path / "a"
    monkeypatch.setattr(images, "os", Windows())
    monkeypatch.setattr(
        images, "check_outputs", lambda paths, force: path.write_bytes(b"theirs")
    )
    with pytest.raises(ValueError, match="a exists: give --force to replace it"):
        images.write_file(path, b"ours")
    assert path.read_bytes() == b"theirs" and os.listdir(tmp_path) == ["a"]
