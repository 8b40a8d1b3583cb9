# SPDX-License-Identifier: Apache-2.0
"""Folders in a bucket, `gs://...`, which here is a folder behind fsspec."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

epath = pytest.importorskip("etils.epath", reason="training needs the extra `train`")
fsspec = pytest.importorskip("fsspec", reason="training needs the extra `train`")
pytest.importorskip("ml_collections", reason="training needs the extra `train`")
pytest.importorskip("orbax.checkpoint", reason="training needs the extra `train`")

# ruff: noqa: E402
from fsspec.implementations.local import LocalFileSystem
from launching import stand_in
from mini_config import get_config

from launch import worker
from semlic_jax.training import checkpoints, writers
from semlic_jax.training.settings import read_settings
from semlic_jax.training.writers import Writer


class FolderBucket(LocalFileSystem):
    """`gs://NAME/x` is `ROOT/NAME/x`; as in a bucket, files cannot be appended to."""

    protocol = ("gcs", "gs")
    root = ""

    @classmethod
    def _strip_protocol(cls, path):
        inner = os.fspath(path).removeprefix("gs://").removeprefix(cls.root)
        return f"{cls.root}/{inner.strip('/')}"

    def open(self, path, mode="rb", **options):
        if "a" in mode:
            raise NotImplementedError("files in a bucket cannot be appended to")
        return super().open(path, mode, **options)


@pytest.fixture
def bucket(tmp_path, monkeypatch) -> Path:
    """The folder that is gs://b."""
    if epath.gpath._is_tf_installed():
        pytest.skip("TensorFlow would ask the real storage")
    folder = tmp_path / "cloud"
    (folder / "b").mkdir(parents=True)
    monkeypatch.setattr(FolderBucket, "root", str(folder))
    fsspec.register_implementation("gcs", FolderBucket, clobber=True)
    # Nothing may land where pathlib would take gs://b/x for a relative path.
    monkeypatch.chdir(tmp_path)
    yield folder / "b"
    assert not (tmp_path / "gs:").exists()


def test_the_log_of_a_run(bucket, monkeypatch):
    picture = np.full((1, 8, 8, 3), 0.5)
    for step in (1, 2):  # the second run goes on with the log of the first
        writer = Writer("gs://b/run", active=True, tensorboard=False)
        writer.config("{}")
        writer.scalars("perceptual", step, {"loss": 0.5})
        writer.images("perceptual", step, [picture])
        writer.close()
    lines = (bucket / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert (bucket / "run" / "config.json").read_text() == "{}"
    with Image.open(bucket / "run" / "images" / "perceptual_0000002.png") as image:
        assert image.size == (8, 8)
    # While a run goes on, the log is seen from time to time.
    monkeypatch.setattr(writers, "_BUCKET_SECONDS", 0.0)
    writer = Writer("gs://b/other", active=True, tensorboard=False)
    writer.scalars("perceptual", 7, {})
    assert '"step": 7' in (bucket / "other" / "metrics.jsonl").read_text()


def test_a_bucket_that_refuses(bucket, monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("403 not\nallowed")  # no OSError: the library's own

    monkeypatch.setattr(FolderBucket, "open", refuse)
    with pytest.raises(ValueError, match="found gs://b/run: 403 not allowed"):
        checkpoints.Checkpoints("gs://b/run", 1)
    writer = Writer("gs://b/run", active=True, tensorboard=False)
    with pytest.raises(ValueError, match="--workdir must .* found gs://b/run: 403 not"):
        writer.config("{}")


def test_checkpoints_keep_the_name_of_the_bucket(bucket, monkeypatch):
    """Orbax writes to buckets itself: here one sees that it gets the right name."""
    found = []
    monkeypatch.setattr(
        checkpoints,
        "_Manager",
        lambda folder, **options: found.append(folder) or SimpleNamespace(),
    )
    checkpoints.Checkpoints("gs://b/run/perceptual", 2)
    assert [str(folder) for folder in found] == ["gs://b/run/perceptual"]
    assert list((bucket / "run" / "perceptual").iterdir()) == []  # no probe is left
    for step in (12, 15):  # of which the later was interrupted
        (bucket / "run" / "perceptual" / str(step)).mkdir()
    (bucket / "run" / "perceptual" / "12" / "commit_success.txt").write_text("")
    with pytest.raises(
        ValueError, match="of step 5 in gs://b/run/perceptual, found 12$"
    ):
        checkpoints.read_params("gs://b/run/perceptual", 5)
    config = get_config()
    config.init_from = "gs://b/run/perceptual"
    assert read_settings(config).init_from == "gs://b/run/perceptual"
    config.init_from = "gs://b/elsewhere"
    with pytest.raises(ValueError, match="the folder gs://b/elsewhere does not exist"):
        read_settings(config)


# What a refinement does to its folders, as far as copying is concerned.
PROGRAM = """#!/bin/bash
echo "$*" > {folder}/called
out=${{@:5:1}}
cat $out/old.csv > {folder}/old
echo more >> $out/old.csv
echo new > $out/a.semlic
echo half > $out/.part
exit {status}
"""


@pytest.mark.parametrize("status", [0, 4])
def test_a_refinement_over_a_bucket(bucket, tmp_path, monkeypatch, status):
    for name in ("in/a.png", "in/b.png", "out/old.csv", "out/kept.semlic"):
        path = bucket / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    before = (bucket / "out" / "kept.semlic").stat().st_mtime_ns
    program = tmp_path / "python"
    program.write_text(PROGRAM.format(folder=tmp_path, status=status))
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    arguments = ["gs://b/in", "gs://b/out", "--bpp", "0.2"]
    share = worker.Share(1, 3, {})
    assert worker.run("refine", arguments, share) == status
    called = (tmp_path / "called").read_text().split()
    assert called[:3] == ["-m", "semlic_jax.cli", "refine"]
    assert called[5:] == ["--bpp", "0.2", "--processes=3", "--process=1"]
    assert not any(path.startswith("gs://") for path in called)
    # What an earlier run left was there; what is new came back, if it was complete.
    assert (tmp_path / "old").read_text() == "out/old.csv"
    names = sorted(path.name for path in (bucket / "out").iterdir())
    assert names == ["a.semlic", "kept.semlic", "old.csv"]
    assert (bucket / "out" / "old.csv").read_text() == "out/old.csvmore\n"
    assert (bucket / "out" / "kept.semlic").stat().st_mtime_ns == before
    assert not Path(called[3]).exists()  # the copies are gone


def test_staging(bucket, tmp_path):
    (bucket / "set" / "deep").mkdir(parents=True)
    (bucket / "set" / "a.png").write_text("a")
    (bucket / "set" / "deep" / "b.png").write_text("b")
    arguments = ["gs://b/set", "here.png", "--out=gs://b/new", "--weights", "gs://b/w"]
    staged = worker.stage("eval", arguments, tmp_path / "scratch")
    folder, *rest = staged.arguments
    assert (Path(folder) / "deep" / "b.png").read_text() == "b"
    assert rest == ["here.png", "--out", str(staged.output), "--weights", "gs://b/w"]
    assert staged.output is not None and list(staged.output.iterdir()) == []
    assert str(staged.remote) == "gs://b/new"
    with pytest.raises(ValueError, match="gs://b/no does not exist"):
        worker.stage("eval", ["gs://b/no", "--out", "x"], tmp_path / "other")


def test_an_evaluation_without_a_folder_for_its_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match="eval needs --out DIR, found none"):
        worker.stage("eval", ["here.png"], tmp_path)


def test_a_bucket_that_fails_for_a_while_ends_no_program(
    bucket, tmp_path, monkeypatch, capsys
):
    """The next time all of it is copied."""
    wait = f"until [ -e {tmp_path}/tried ]; do sleep 0.01; done"
    stand_in(tmp_path, "python", f"echo new > $5/a.semlic\n{wait}")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(worker, "_UPLOAD_SECONDS", 0.01)
    upload = worker.Uploader.upload

    def fails_once(self):
        if not (tmp_path / "tried").exists():
            (tmp_path / "tried").write_text("")
            raise RuntimeError("503, try again\nlater")
        return upload(self)

    monkeypatch.setattr(worker.Uploader, "upload", fails_once)
    share = worker.Share(0, 1, {})
    assert worker.run("refine", [str(tmp_path), "gs://b/out"], share) == 0
    assert (bucket / "out" / "a.semlic").read_text() == "new\n"
    assert "launch: not copied yet: 503, try again later\n" in capsys.readouterr().err


@pytest.mark.parametrize("failures", [2, 99])
def test_the_last_copy_is_tried_again_and_results_are_not_lost(
    bucket, tmp_path, monkeypatch, capsys, failures
):
    stand_in(tmp_path, "python", "echo new > $5/a.semlic")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(worker, "_PAUSES_S", (0, 0, 0))
    tries, upload = [], worker.Uploader.upload

    def fails(self):
        tries.append(self)
        if len(tries) <= failures:
            raise RuntimeError("503")
        return upload(self)

    monkeypatch.setattr(worker.Uploader, "upload", fails)
    arguments = "refine", [str(tmp_path), "gs://b/out"], worker.Share(0, 1, {})
    if failures == 2:
        assert worker.run(*arguments) == 0 and len(tries) == 3
        assert (bucket / "out" / "a.semlic").read_text() == "new\n"
        return
    with pytest.raises(OSError, match="gs://b/out, and stay in .*: 503") as refusal:
        worker.run(*arguments)
    kept = Path(str(refusal.value).split("stay in ")[1].split(": ")[0])
    # One more where the program was still there when it was first looked at.
    assert len(tries) in (4, 5) and (kept / "a.semlic").read_text() == "new\n"
    shutil.rmtree(kept.parent)
