# SPDX-License-Identifier: Apache-2.0
"""Training input: crops as a function of the step, and every kind of source."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from semlic_jax import cli
from semlic_jax.training.data import Photographs
from semlic_jax.training.pack import pack
from semlic_jax.training.sources import (
    UnusableImage,
    decode,
    decoder_threads,
    open_sources,
)


def gradient(height: int, width: int, offset: int = 0) -> np.ndarray:
    """Every pixel tells where it is: red is the row, green the column."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows % 256, columns % 256, np.full_like(rows, offset)], -1).astype(
        np.uint8
    )


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "photos"
    path.mkdir()
    for index in range(4):
        image = Image.fromarray(gradient(90 + index, 120, 40 * index))
        image.save(path / f"{index}.png")
    return path


def photographs(*patterns, **options) -> Photographs:
    source = open_sources([str(pattern) for pattern in patterns])
    return Photographs(source, **{"crop": 64, **options})


def batches(data, start, stop, examples=range(4), seed=3):
    return list(data.batches(start, stop, seed=seed, examples=examples, threads=2))


def test_a_batch_depends_on_seed_and_step_alone(folder):
    whole = batches(photographs(folder), 0, 6)
    assert whole[0].shape == (4, 64, 64, 3) and whole[0].dtype == np.float32
    assert 0 <= whole[0].min() and whole[0].max() <= 1
    resumed = batches(photographs(folder), 4, 6)
    for a, b in zip(whole[4:], resumed, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(whole[0], whole[1])
    assert not np.array_equal(whole[0], batches(photographs(folder), 0, 1, seed=4)[0])


def test_processes_make_their_own_part_of_the_same_batch(folder):
    whole = batches(photographs(folder), 2, 4)
    parts = [
        batches(photographs(folder), 2, 4, examples=range(first, first + 2))
        for first in (0, 2)
    ]
    for step in range(2):
        joined = np.concatenate([part[step] for part in parts])
        np.testing.assert_array_equal(joined, whole[step])


def test_crops_are_windows_and_their_mirror_images(tmp_path):
    Image.fromarray(gradient(70, 200)).save(tmp_path / "a.png")
    data = photographs(tmp_path, largest_scale=1.0)
    mirrored = set()
    for step in range(20):
        crop = np.round(data.example(step, 0, seed=0) * 255).astype(int)
        if crop[0, 0, 1] > crop[0, 1, 1]:
            crop = crop[:, ::-1]
            mirrored.add(True)
        else:
            mirrored.add(False)
        top, left = crop[0, 0, :2]
        np.testing.assert_array_equal(
            crop, gradient(70, 200)[top : top + 64, left : left + 64]
        )
    assert mirrored == {True, False}


def test_scaling_down_keeps_the_crop_inside(tmp_path):
    Image.fromarray(gradient(200, 150)).save(tmp_path / "a.png")
    data = photographs(tmp_path, largest_scale=2.0)
    steps = []
    for step in range(30):
        crop = data.example(step, 0, seed=0) * 255
        steps.append(float(np.mean(np.diff(crop[8:-8, 8:-8, 0], axis=0))))
    # The gradient of rows per pixel of the crop is the factor.
    assert min(steps) < 1.2 and max(steps) > 1.8
    assert 0.98 < min(steps) and max(steps) < 2.02


def test_scaling_up_shows_less_of_the_photograph(tmp_path):
    Image.fromarray(gradient(80, 150)).save(tmp_path / "a.png")
    data = photographs(tmp_path, smallest_scale=0.5, largest_scale=1.0)
    steps = []
    for step in range(30):
        crop = data.example(step, 0, seed=0) * 255
        assert crop.shape == (64, 64, 3)
        steps.append(float(np.mean(np.diff(crop[8:-8, 8:-8, 0], axis=0))))
    assert 0.48 < min(steps) < 0.6 and 0.9 < max(steps) < 1.02


@pytest.mark.parametrize("scales", [(0.0, 2.0), (1.5, 2.0), (0.5, 0.8)])
def test_scales_on_the_wrong_side_of_one_are_refused(tmp_path, scales):
    Image.fromarray(gradient(80, 150)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="smallest_scale <= 1 <= largest_scale"):
        photographs(tmp_path, smallest_scale=scales[0], largest_scale=scales[1])


def test_corrupt_files_are_skipped_counted_and_named(folder, caplog):
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:200])
    (folder / "text.jpg").write_text("not an image")
    data = photographs(folder)
    with caplog.at_level(logging.WARNING):
        found = batches(data, 0, 10)
    assert all(np.isfinite(batch).all() for batch in found)
    names = " ".join(data.skipped.values())
    assert len(data.skipped) == 2 and "broken.png" in names and "text.jpg" in names
    assert "broken.png" in caplog.text
    # The same crops again, though what is broken is known by now.
    for a, b in zip(found, batches(data, 0, 10), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("side", [50, 10, 1])
def test_small_images_by_reflection(tmp_path, side):
    image = gradient(side, 80, 9)
    Image.fromarray(image).save(tmp_path / "small.png")
    data = photographs(tmp_path, small_images="reflect", largest_scale=1.0)
    padded = data.image(0)
    assert padded.shape == (64, 80, 3) and data.padded == {0}
    np.testing.assert_array_equal(padded[:side], image)
    if side == 50:
        np.testing.assert_array_equal(padded[50:], image[::-1][1:15])
    assert data.example(0, 0, seed=0).shape == (64, 64, 3)


def test_small_images_left_out(folder, tmp_path):
    Image.fromarray(gradient(50, 80)).save(folder / "small.png")
    data = photographs(folder)
    batches(data, 0, 10)
    assert len(data.skipped) == 1 and "80x50" in next(iter(data.skipped.values()))
    assert not data.padded
    only = tmp_path / "only"
    only.mkdir()
    (folder / "small.png").rename(only / "small.png")
    with pytest.raises(
        ValueError, match="at least 64 pixels a side, found none .*80x50"
    ):
        photographs(only).example(0, 0, seed=0)


class OneIn(list):
    """Photographs of which one is large enough."""

    def __getitem__(self, index):
        return gradient(64, 64 if index == 0 else 63)


def test_one_usable_photograph_in_hundreds_is_found():
    data = Photographs(OneIn(range(300)), crop=64)
    for step in range(20):
        assert data.example(step, 0, seed=1).shape == (64, 64, 3)
    assert len(data.skipped) == 299


def test_nothing_usable_is_refused_at_once(monkeypatch):
    source = OneIn(range(6))
    monkeypatch.setattr(OneIn, "__getitem__", lambda *_: gradient(63, 64))
    data = Photographs(source, crop=64)
    with pytest.raises(
        ValueError, match=r"found none that is usable \(6 of 6 left out"
    ):
        data.example(0, 0, seed=0)
    monkeypatch.setattr(data, "image", lambda index: pytest.fail("drawn"))
    with pytest.raises(ValueError, match="found none that is usable"):
        data.example(1, 0, seed=0)


def test_threads_are_those_of_the_cpus_that_may_be_used(monkeypatch):
    for cpus in (1, 3, 64):
        monkeypatch.setattr(
            os,
            "sched_getaffinity",
            lambda _, cpus=cpus: set(range(cpus)),
            raising=False,
        )
        assert decoder_threads() == min(cpus, 16)
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert decoder_threads() == 5


def test_the_cache_is_bounded_and_changes_nothing(folder):
    size = 92 * 120 * 3
    small, large = photographs(folder, cache_bytes=2 * size), photographs(folder)
    for a, b in zip(batches(small, 0, 8), batches(large, 0, 8), strict=True):
        np.testing.assert_array_equal(a, b)
    assert sum(image.nbytes for image in small._cache.values()) <= 2 * size
    assert len(large._cache) == 4


def test_bad_sources(tmp_path, folder):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"photographs in .*empty, found none"):
        open_sources([str(empty)])
    with pytest.raises(ValueError, match="number of images after 'synthetic:'"):
        open_sources(["synthetic:many"])
    with pytest.raises(ValueError, match=r"small_images must be skip or reflect"):
        photographs(folder, small_images="stretch")
    with pytest.raises(UnusableImage, match="x.png"):
        decode(b"nothing", "x.png")


def test_images_are_what_the_codec_would_take():
    def encoded(image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    found = decode(encoded(Image.fromarray(ramp.astype(np.uint16))), "wide.png")
    assert found.shape == (64, 64, 3) and found.dtype == np.uint8
    np.testing.assert_allclose(found[..., 1], ramp / 257, atol=0.6)
    clear = Image.new("RGBA", (64, 64), (200, 10, 10, 0))
    with pytest.raises(UnusableImage, match="clear.png .* transparent pixels"):
        decode(encoded(clear), "clear.png")


def test_folders_globs_and_synthetic_images_together(folder):
    source = open_sources([str(folder / "[01].png"), "synthetic:3", str(folder)])
    assert len(source) == 4 + 3  # a file that two patterns match counts once
    assert source[3].shape == (93, 120, 3)
    images = [source[index] for index in (4, 5, 4)]
    assert images[0].dtype == np.uint8 and images[0].shape[2] == 3
    np.testing.assert_array_equal(images[0], images[2])
    assert not np.array_equal(images[0], images[1])
    assert images[0].std() > 10


def test_packed_folders_give_the_same_images(folder, tmp_path):
    pytest.importorskip("array_record", reason="needs array-record (extra `train`)")
    (folder / "text.jpg").write_text("not an image")
    output = tmp_path / "photos.array_record"
    written, skipped = pack([str(folder)], output, shards=2)
    assert written == 4 and len(skipped) == 1 and "text.jpg" in skipped[0]
    source = open_sources([str(tmp_path / "photos-*.array_record")])
    assert len(source) == 4
    expected = {open_sources([str(folder / f"{i}.png")])[0].tobytes() for i in range(4)}
    assert {source[index].tobytes() for index in range(4)} == expected
    with pytest.raises(FileExistsError):
        pack([str(folder)], output, shards=2)
    with pytest.raises(ValueError, match="1 to 5, the number of photographs"):
        pack([str(folder)], output, shards=9)


@pytest.fixture
def damaged(folder, tmp_path):
    """Two array_record files, the second with a damaged record between two others."""
    pytest.importorskip("array_record", reason="needs array-record (extra `train`)")
    rng = np.random.default_rng(0)
    for index in range(6):
        noise = rng.integers(0, 256, (90, 120, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
    pack([str(folder)], tmp_path / "photos.array_record", shards=2)
    paths = sorted(tmp_path.glob("photos-*.array_record"))
    data = bytearray(paths[1].read_bytes())
    data[70_000] ^= 0xFF  # of the third record
    paths[1].write_bytes(data)
    return paths


def test_a_damaged_record_is_skipped_and_named(damaged):
    data = photographs(damaged[0].parent / "photos-*.array_record")
    assert len(data) == 6
    usable = [data.image(index) is not None for index in range(6)]
    assert usable == [True] * 5 + [False]
    assert data.skipped[5].startswith(f"{damaged[1]}[2] (Corrupted Riegeli/records")
    assert len(batches(data, 0, 3)) == 3


@pytest.mark.parametrize("content", [b"", b"text", None])
def test_a_file_that_is_no_array_record_is_refused(damaged, content):
    whole = damaged[0].read_bytes()
    damaged[1].write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ValueError, match=f"cannot read {damaged[1]}: ") as refusal:
        open_sources([str(path) for path in damaged])
    assert "\n" not in str(refusal.value)


def test_packing_refuses(folder, tmp_path):
    pytest.importorskip("array_record", reason="needs array-record (extra `train`)")
    with pytest.raises(ValueError, match=r"must end in \.array_record, found x\.rec"):
        pack([str(folder)], tmp_path / "x.rec")
    with pytest.raises(ValueError, match="found none"):
        pack([str(tmp_path / "nowhere")], tmp_path / "x.array_record")


def test_packing_takes_each_file_that_is_named_once(folder, tmp_path, monkeypatch):
    """A shell has expanded its own patterns; what is left need not be one."""
    pytest.importorskip("array_record", reason="needs array-record (extra `train`)")
    monkeypatch.chdir(tmp_path)
    odd = tmp_path / "odd"
    odd.mkdir()
    names = "x[1].png", "y.png"
    for name, path in zip(names, sorted(folder.iterdir()), strict=False):
        (odd / name).write_bytes(path.read_bytes())
    given = [f"odd/{name}" for name in names]
    assert pack(given, tmp_path / "a.array_record") == (2, [])
    again = [*given, "odd", str(odd), "./odd/*.png"]
    assert pack(again, tmp_path / "b.array_record") == (2, [])
    assert len(open_sources(given)) == 2


def test_packing_names_files_of_other_kinds(folder, tmp_path, capsys):
    """A shell's `photos/*` has all that lies there."""
    pytest.importorskip("array_record", reason="needs array-record (extra `train`)")
    notes = tmp_path / "notes.txt"
    notes.write_text("not an image")
    photograph = min(map(str, folder.iterdir()))
    output = tmp_path / "x.array_record"
    assert cli.main(["pack", photograph, str(notes), str(output)]) == 4
    printed = capsys.readouterr()
    assert printed.err.startswith(f"skipped {notes}: ")
    assert printed.out == "1 photographs written, 1 skipped\n"


def test_packing_refuses_what_names_no_photograph(folder, tmp_path, capsys):
    pytest.importorskip("array_record", reason="needs array-record (extra `train`)")
    output = tmp_path / "x.array_record"
    for wrong in ("nosuch", "nosuch.png", str(tmp_path / "*.jpg")):
        assert cli.main(["pack", str(folder), wrong, str(output)]) == 1
        assert f"photographs in {wrong}, found none" in capsys.readouterr().err
    nowhere = str(tmp_path / "no" / "x.array_record")
    assert cli.main(["pack", str(folder), nowhere]) == 1
    assert "no for x.array_record does not exist" in capsys.readouterr().err
    assert list(tmp_path.glob("*record*")) == []


def test_a_sample_of_no_use_is_refused_with_its_reasons(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "small.png")
    photographs = Photographs(open_sources([str(tmp_path)]), crop=64)
    with pytest.raises(ValueError, match="at least 64 pixels a side.*16x16"):
        list(photographs.sample(5))


def test_packing_names_what_it_left_out(folder, tmp_path, capsys):
    pytest.importorskip("array_record", reason="needs array-record (extra `train`)")
    output = tmp_path / "photos.array_record"
    assert cli.main(["pack", str(folder), str(output)]) == 0
    assert capsys.readouterr().out == "4 photographs written, 0 skipped\n"
    (folder / "text.jpg").write_text("not an image")
    again = ["pack", str(folder), str(tmp_path / "again.array_record")]
    assert cli.main(again) == 4
    printed = capsys.readouterr()
    assert printed.out == "4 photographs written, 1 skipped\n"
    reason = "the input is not an image in a known format"
    assert printed.err == f"skipped {folder / 'text.jpg'}: {reason}\n"


@pytest.mark.parametrize(("readable", "shards"), [(0, 1), (2, 3)])
def test_packing_too_little_leaves_no_file(tmp_path, capsys, readable, shards):
    pytest.importorskip("array_record", reason="needs array-record (extra `train`)")
    for index in range(4):
        path = tmp_path / f"{index}.png"
        path.write_text("not an image")
        if index < readable:
            Image.new("RGB", (8, 8)).save(path)
    out = tmp_path / "out"
    out.mkdir()
    command = ["pack", str(tmp_path), str(out / "x.array_record")]
    assert cli.main([*command, "--shards", str(shards)]) == 1
    error = capsys.readouterr().err
    expected = {0: "none of the 4 photographs could be read", 2: "at least 3 readable"}
    assert error.count("\n") == 1 and expected[readable] in error
    assert list(out.iterdir()) == []


def test_packing_knows_the_option_for_tracebacks(tmp_path, capsys):
    with pytest.raises(SystemExit) as status:
        cli.main(["pack", "--help"])
    assert status.value.code == 0 and "--debug" in capsys.readouterr().out
    with pytest.raises(ValueError, match="found none|needs the package"):
        cli.main(["pack", str(tmp_path), str(tmp_path / "x.array_record"), "--debug"])


PREPARE = """
import sys
import tensorflow_datasets as tfds

class Photos(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        features = tfds.features.FeaturesDict({"image": tfds.features.Image()})
        return tfds.core.DatasetInfo(builder=self, features=features)
    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "other": self._generate_examples()}
    def _generate_examples(self):
        for index in range(3):
            yield index, {"image": sys.argv[2] + f"/{index}.png"}

Photos(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
from semlic_jax.training.sources import UnusableImage, open_sources
source = open_sources([f"tfds:photos/train?dir={sys.argv[1]}"])
shapes = sorted(source[index].shape for index in range(len(source)))
assert shapes == [(90 + index, 120, 3) for index in range(3)], shapes
part = open_sources([f"tfds:photos/train[1:]?dir={sys.argv[1]}"])
assert len(part) == 2 and (part[1] == source[2]).all()

class Damaged:
    def __getitem__(self, index):
        raise RuntimeError("hash mismatch")

part._records = Damaged()
try:
    part[1]
except UnusableImage as error:
    assert "-train.array_record-00000-of-00001[2] (hash mismatch)" in str(error), error
else:
    raise AssertionError("read")
for name in ("photos/nosplit", "nosuchset/train"):
    try:
        open_sources([f"tfds:{name}?dir={sys.argv[1]}"])
    except ValueError as error:
        assert name.split("/")[0] in str(error), error
    else:
        raise AssertionError(name)
assert "tensorflow" not in sys.modules
"""


def test_tfds_without_tensorflow(folder, tmp_path):
    pytest.importorskip("array_record", reason="needs array-record (extra `train`)")
    # In a process of its own: it registers a data set, and must not load TensorFlow.
    probe = "import importlib.util as u; exit(not u.find_spec('tensorflow_datasets'))"
    if subprocess.run([sys.executable, "-c", probe]).returncode:
        pytest.skip("needs tensorflow-datasets (extra `train`)")
    done = subprocess.run(
        [sys.executable, "-c", PREPARE, str(tmp_path / "tfds"), str(folder)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
