# SPDX-License-Identifier: Apache-2.0
"""The codec's programs: under any JAX, for buckets, the same elsewhere, their cache."""

import logging
import os

import jax
import numpy as np
import pytest
from PIL import Image

import semlic_jax
from semlic_jax.codec import bucket_side
from semlic_jax.coding import integer_networks
from semlic_jax.compilation import use_disk_cache
from semlic_jax.evaluation import exactness


@pytest.mark.parametrize(
    "name, value, usual",
    [
        ("jax_numpy_rank_promotion", "raise", "allow"),
        ("jax_numpy_dtype_promotion", "strict", "standard"),
        ("jax_transfer_guard", "disallow", None),
    ],
)
def test_a_strict_jax_is_none_of_the_codecs_concern(
    codec, tiny_model, photograph, name, value, usual
):
    image = photograph(64, 64)
    data = codec.compress(image, quality=0.7)
    wanted = codec.decompress(data)
    jax.clear_caches()  # what is compiled already would not be checked
    jax.config.update(name, value)
    try:
        strict = semlic_jax.load(tiny_model)
        assert strict.compress(image, bpp=8 * len(data) / 64**2)
        assert strict.compress(image, quality=0.7) == data
        found = strict.decompress(data)
    finally:
        jax.config.update(name, usual)
    np.testing.assert_array_equal(found, wanted)


def test_parts_of_the_codec_work_under_a_strict_jax(codec, photograph):
    image, level = photograph(64, 64), 178
    data = codec.compress(image, quality=level / 255)
    with jax.transfer_guard("disallow"):
        latents = codec.analyse(image)
        codec.scaled(latents, level)
        assert codec.encode(latents, level) == data
        codec.decode_latents(data)


# Buckets and compilation


def test_buckets():
    sides = np.arange(1, 65536)
    buckets = np.array([bucket_side(int(side)) for side in sides])
    needed = -(-sides // 64) * 64
    assert (buckets >= needed).all() and (buckets % 64 == 0).all()
    assert (buckets <= 1.125 * needed).all()
    assert len(np.unique(buckets)) < 70
    assert (np.diff(buckets) >= 0).all()
    for side in (64, 512, 768, 1024, 4096):
        assert bucket_side(side) == side


def test_programs_of_each_bucket_are_accounted_for(codec, photograph, monkeypatch):
    entered = []
    monkeypatch.setattr(semlic_jax.codec, "enter_bucket", entered.append)
    data = codec.compress(photograph(65, 64), quality=0.7)
    codec.decompress(data)
    assert entered == [(codec.fingerprint, (128, 64))] * 2


def compiled(caplog):
    return [r.message for r in caplog.records if r.message.startswith("Compiling")]


def test_a_new_size_in_the_same_bucket_compiles_nothing(codec, photograph, caplog):
    # A bucket that no other test uses: its programs would be compiled already.
    sizes = [(200, 20), (256, 64), (230, 33)]
    assert len({tuple(map(bucket_side, size)) for size in sizes}) == 1
    caplog.set_level(logging.WARNING)
    with jax.log_compiles():
        codec.decompress(codec.compress(photograph(*sizes[0]), quality=0.4))
        # The test would see it; and the passes of a group share one in the decoder.
        passes = [text for text in compiled(caplog) if "_parameters" in text]
        assert len(passes) == len(codec.config.groups)
        caplog.clear()
        for size, quality in zip(sizes, (0.1, 0.9, 0.4), strict=True):
            data = codec.compress(photograph(*size, seed=5), quality=quality)
            codec.decompress(data)
            codec.compress(photograph(*size), max_bytes=len(data) + 99)
    assert compiled(caplog) == []


# The same latents everywhere


def test_files_decode_to_the_same_latents_elsewhere(tiny_model, photograph, tmp_path):
    """Other processes, threads, precisions and mathematics, as few as can be."""
    path = tmp_path / "photo.png"
    Image.fromarray(photograph(100, 50)).save(path)
    variants = {
        "one thread, bfloat16, fast mathematics": {
            "SEMLIC_EXACTNESS_CPUS": "1",
            "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
            "XLA_FLAGS": "--xla_cpu_enable_fast_math=true",
        },
        "two threads, tensorfloat32": {
            "SEMLIC_EXACTNESS_CPUS": "2",
            "JAX_DEFAULT_MATMUL_PRECISION": "tensorfloat32",
        },
        "highest, 64 bits": {
            "JAX_DEFAULT_MATMUL_PRECISION": "highest",
            "JAX_ENABLE_X64": "1",
        },
    }
    record = exactness.report(
        str(tiny_model), [path], qualities=(0.0, 0.5, 1.0), variants=variants
    )
    assert record["files"] == 3 and record["largest_excess_bytes"] <= 0
    for name, variant in record["variants"].items():
        assert variant["different"] == 0, name


def test_images_of_one_name_are_both_looked_at(tiny_model, photograph, tmp_path):
    paths = [tmp_path / "a" / "photo.png", tmp_path / "b" / "photo.png"]
    for seed, path in enumerate(paths):
        path.parent.mkdir()
        Image.fromarray(photograph(16, 16, seed)).save(path)
    written = exactness.write_files(str(tiny_model), paths, [0.5], tmp_path)
    assert len(set(written["digests"].values())) == 2
    assert exactness.decode_files(str(tiny_model), tmp_path) == written["digests"]


def test_a_different_decoder_is_found_out(
    tiny_model, photograph, tmp_path, monkeypatch
):
    """One index of one latent differs: some files do not even decode."""
    path = tmp_path / "photo.png"
    Image.fromarray(photograph(16, 16)).save(path)
    exact, digests = integer_networks._group_parameters, {}

    def other(network, pass_, *arguments):
        index, mean_steps = exact(network, pass_, *arguments)
        return index.at[0, 0, 0, 0].add(1 if pass_.group == 0 else 0), mean_steps

    def decode_elsewhere(model, folder, extra):
        with monkeypatch.context() as patch:
            patch.setattr(integer_networks, "_group_parameters", other)
            digests.update(exactness.decode_files(model, folder))
        return digests

    monkeypatch.setattr(exactness, "decode_elsewhere", decode_elsewhere)
    record = exactness.report(str(tiny_model), [path], variants={"other": {}})
    assert record["variants"]["other"]["different"] == 5
    assert any(text.startswith("not decoded: expected") for text in digests.values())


# The cache of compiled programs


@pytest.fixture
def cache_folder(monkeypatch):
    """Function: the folder that a codec would choose under these variables."""

    def choose(**variables):
        for name in ("SEMLIC_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        before = jax.config.jax_compilation_cache_dir
        jax.config.update("jax_compilation_cache_dir", None)
        use_disk_cache()
        found = jax.config.jax_compilation_cache_dir
        jax.config.update("jax_compilation_cache_dir", before)
        return found

    return choose


def test_place_of_the_cache(cache_folder, tmp_path):
    ours, file = str(tmp_path / "a" / "b"), tmp_path / "file"
    file.touch()
    assert cache_folder(SEMLIC_CACHE=ours) == ours and os.path.isdir(ours)
    assert cache_folder(XDG_CACHE_HOME=tmp_path) == f"{tmp_path}/semlic_jax"
    assert cache_folder(HOME=tmp_path) == f"{tmp_path}/.cache/semlic_jax"
    assert os.stat(f"{tmp_path}/.cache/semlic_jax").st_mode & 0o077 == 0
    assert cache_folder(SEMLIC_CACHE="") is None
    assert cache_folder(HOME=file) is None  # no folder can be made there
    assert cache_folder(XDG_CACHE_HOME="relative") is None


def test_who_has_chosen_what_is_cached_keeps_it(cache_folder, tmp_path):
    name = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[name]
    try:
        for chosen, kept in ((5.0, 5.0), (1.0, 0.1)):
            jax.config.update(name, chosen)
            assert cache_folder(SEMLIC_CACHE=tmp_path)
            assert jax.config.values[name] == kept
    finally:
        jax.config.update(name, before)
