# SPDX-License-Identifier: Apache-2.0
"""What an evaluation keeps to go on from, and the lock of its folder."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from sweeps import Counting, sweep

from semlic_jax import cli
from semlic_jax.evaluation import journal as journal_module
from semlic_jax.evaluation.entrants import (
    ClassicalEntrant,
)
from semlic_jax.evaluation.image_sets import list_images
from semlic_jax.evaluation.journal import Journal, alone_in
from semlic_jax.evaluation.measures import Measures
from semlic_jax.evaluation.sweep import run_sweep


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
def test_damaged_lines_of_the_journal_are_ignored(photo_folder, tmp_path, line):
    first = sweep(photo_folder, tmp_path, [Counting("jpeg")])
    journal = tmp_path / "journal.jsonl"
    identity = json.dumps(ClassicalEntrant("jpeg").identity).encode()
    records = map(json.loads, journal.read_text().splitlines())
    with open(journal, "ab") as stream:
        for key in {record["key"] for record in records}:
            found = line.replace(b'"IDENTITY"', identity)
            stream.write(found.replace(b"KEY", key.encode()) + b"\n")
    found = sweep(photo_folder, tmp_path, [ClassicalEntrant("jpeg")])
    assert [r.values for r in found.rows] == [r.values for r in first.rows]


@pytest.mark.parametrize(
    "entries",
    [
        {"bytes": 1},
        {"bytes": "1"},
        {"path": 5},
        {"path": None},
        {"setting": [1]},
        {"encode_s": "1"},
        {"values": []},
        {"gaps": None},
        {"values": {"psnr_db": 3}},
        {"values": {"psnr_db": []}},
        {"values": {"psnr_db": ["IDENTITY", "30"]}},
        {"values": {"psnr_db": ["IDENTITY", float("nan")]}},
        {"values": {"psnr_db": ["IDENTITY", 10**400]}},
        {"values": {"psnr_db": ["IDENTITY", True]}},
        {"decode_s": "1"},
    ],
    ids=lambda entries: str(entries)[:40],
)
def test_entries_of_the_journal_that_cannot_be_are_made_again(
    photo_folder, tmp_path, entries
):
    run = photo_folder, tmp_path, [ClassicalEntrant("jpeg")]
    first = sweep(*run)
    path, (name,) = tmp_path / "journal.jsonl", entries
    identity = Measures(["psnr_db"]).identity("psnr_db")
    entries = json.loads(json.dumps(entries).replace("IDENTITY", identity))
    records = [json.loads(line) for line in path.read_text().splitlines() if line]
    damaged = [record | entries if name in record else record for record in records]
    assert damaged != records
    path.write_text("".join(json.dumps(record) + "\n" for record in damaged))
    for before, after in zip(first.rows, sweep(*run).rows, strict=True):
        for field in ("bpp", "values", "setting"):
            assert getattr(before, field) == getattr(after, field)
        assert not {type(after.encode_s), type(after.decode_s)} - {int, float}


def test_what_else_is_in_a_folder_is_named(tmp_path):
    (tmp_path / ".DS_Store").touch()  # macOS leaves it where somebody looked
    with alone_in(tmp_path):
        pass
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    with pytest.raises(ValueError, match="found thesis.tex in it"), alone_in(other):
        pass
    file = other / "thesis.tex"
    with pytest.raises(ValueError, match="expected a folder"), alone_in(file):
        pass


HOLD = """
import sys, time
from pathlib import Path
from semlic_jax.evaluation.journal import alone_in

with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_evaluation_in_the_folder_is_refused(
    photo_folder, tmp_path, capsys, no_weights
):
    pytest.importorskip("fcntl", reason="folders are not locked on Windows")
    out = tmp_path / "out"
    command = ["eval", str(photo_folder), "--codecs", "jpeg", "--bpp", "2"]
    command += ["--metrics", "psnr_db", "--out", str(out)]
    other = [sys.executable, "-c", HOLD, str(out)]
    with subprocess.Popen(other, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert cli.main(command) == 1
        refusal = f"semlic: another evaluation is running in {out}\n"
        assert capsys.readouterr().err == refusal
        with pytest.raises(ValueError, match="another evaluation is running"):
            sweep(photo_folder, out, [ClassicalEntrant("jpeg")])
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


def test_evaluations_that_no_lock_parts_leave_no_holes(
    photo_folder, tmp_path, monkeypatch, small_trunk
):
    """A second one runs from start to end while the first writes a file of features."""
    monkeypatch.setattr(journal_module, "fcntl", None)
    measures = Measures(["psnr_db", "frechet"], patch_side=32)
    run = list_images([photo_folder]), [ClassicalEntrant("jpeg")], [3.0], measures
    save, found = np.save, []

    def save_and_wait(*arguments, **options):
        save(*arguments, **options)
        monkeypatch.setattr(np, "save", save)
        if not found:
            found.append(run_sweep(*run, tmp_path))

    monkeypatch.setattr(np, "save", save_and_wait)
    found.append(run_sweep(*run, tmp_path))
    for results in found:
        assert all(row.gaps == {} for row in results.rows)
        assert results.set_rows == found[0].set_rows and results.set_rows[0].values
    assert all(path.suffix == ".npy" for path in (tmp_path / "features").iterdir())
