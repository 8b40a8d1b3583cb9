# SPDX-License-Identifier: Apache-2.0
"""Compilation of float programs, with and without the options of the compiler."""

import os
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semlic_jax import codec, compilation
from semlic_jax.coding import float_networks, integer_networks


@pytest.fixture
def fresh():
    """No answer of an earlier test is remembered, nor one of this test later."""
    compilation.compiler_options.cache_clear()
    yield
    compilation.compiler_options.cache_clear()


def double(static, x):
    """Twice x, and what is static."""
    return 2 * x + static


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="an option of XLA:CPU")
@pytest.mark.parametrize("off, level", [(False, {1}), (True, set())])
def test_the_tested_compiler_has_the_options(fresh, off, level):
    before = jax.config.values["jax_disable_most_optimizations"]
    try:
        jax.config.update("jax_disable_most_optimizations", off)
        options = compilation.compiler_options()
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
    assert options.items() >= compilation._OWN_CONVOLUTIONS.items()
    assert {options.get("xla_backend_optimization_level")} - {None} == level


def test_a_compiler_without_an_option_is_asked_for_nothing(fresh, monkeypatch):
    monkeypatch.setattr(compilation, "_OWN_CONVOLUTIONS", {"xla_cpu_no_such": "1"})
    assert compilation.compiler_options() is None
    program = compilation.FloatProgram(double, static_argnums=0)
    assert program(3, jnp.ones(())) == 5


def test_other_devices_get_no_option_of_the_cpu(fresh, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compilation.compiler_options() is None


def test_a_program_is_its_function_compiled():
    program = compilation.float_program(static_argnums=0)(double)
    assert program.__name__ == "double" and program.__doc__ == double.__doc__
    np.testing.assert_array_equal(program(1, jnp.arange(3.0)), [1, 3, 5])
    assert "f32[3]" in program.lower(1, jnp.arange(3.0)).compile().as_text()


@pytest.fixture
def no_programs(monkeypatch):
    """Those of other tests are kept."""
    monkeypatch.setattr(compilation, "_programs", weakref.WeakSet())
    monkeypatch.setattr(compilation, "_buckets", set())


def test_programs_are_forgotten_before_there_are_too_many(no_programs, monkeypatch):
    """Of shapes that keep changing, a process would end by SIGSEGV."""
    monkeypatch.setattr(compilation, "_MOST_BUCKETS", 2)
    exact = compilation.exact_program(static_argnums=0)(double)
    floats = compilation.float_program(static_argnums=0)(double)
    for bucket in ("a", "b", "a", "b"):
        compilation.enter_bucket(bucket)
        for program in (exact, floats):
            program(len(bucket), jnp.zeros(len(bucket)))
    assert exact._cache_size() and floats._program._cache_size()
    compilation.enter_bucket("c")
    assert exact._cache_size() == floats._program._cache_size() == 0
    np.testing.assert_array_equal(exact(1, jnp.arange(3.0)), [1, 3, 5])
    compilation.enter_bucket("c")
    assert exact._cache_size()


def test_all_programs_are_forgotten_where_ours_are_not_the_many(
    no_programs, monkeypatch
):
    cleared = []
    monkeypatch.setattr(jax, "clear_caches", lambda: cleared.append(1))
    compilation.enter_bucket("a")
    assert not cleared
    monkeypatch.setattr(compilation, "_mapped_share", lambda: 0.6)
    compilation.enter_bucket("b")
    assert cleared


@pytest.mark.skipif(sys.platform != "linux", reason="mappings are Linux's")
def test_the_share_of_mappings_is_known():
    assert 0 < compilation._mapped_share() < 1


def test_programs_of_the_codec_can_be_forgotten():
    ours = [codec._scale, integer_networks._psi, integer_networks._symbols]
    ours += [integer_networks._group_parameters, float_networks._parameters]
    for program in ours:
        assert program in compilation._programs
    for program in (codec._analyse, codec._synthesise):
        assert isinstance(program, compilation.FloatProgram)


COMPILE_ONE = """
import jax
from semlic_jax.cli.terminal import cache_warnings_are_notes
from semlic_jax.compilation import use_disk_cache

use_disk_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
with cache_warnings_are_notes():
    for x in (1.0, jax.numpy.ones(3)):
        assert (jax.jit(lambda x: 2 * x + 1)(x) == 3).all()
"""


def test_parts_of_cached_programs_are_replaced(tmp_path):
    """As a full disk or a kill leaves them."""

    def run():
        process = subprocess.run(
            [sys.executable, "-c", COMPILE_ONE],
            env=dict(os.environ, SEMLIC_CACHE=str(tmp_path), JAX_PLATFORMS="cpu"),
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr
        return process.stderr

    assert run() == ""
    entries = [path for path in tmp_path.iterdir() if path.name.endswith("-cache")]
    sizes = {path: path.stat().st_size for path in entries}
    assert len(entries) >= 2
    for path, length in zip(entries, (0, 100, *([9] * 50)), strict=False):
        path.write_bytes(path.read_bytes()[:length])
    assert run() == "note: damaged programs in the cache are compiled again\n"
    assert {path: path.stat().st_size for path in entries} == pytest.approx(sizes, 0.1)
    assert run() == ""


@pytest.mark.parametrize(
    ("warning", "told", "left"),
    [
        ("reading {}'jit_f': error: cut", "damaged programs", False),
        ("reading {}'jit_f': ValueError: ", "damaged programs", False),
        ("reading {}'jit_f-0a': ValueError: cut", "damaged programs", True),
        ("reading {}'jit_f': PermissionError: no", "could not be read: no", True),
        ("writing {}'jit_f': OSError: full", "could not be kept: full", True),
        ("writing {}'jit_f': OSError: ", "could not be kept: OSError", True),
        ("of another kind", None, True),
    ],
)
def test_only_what_is_damaged_leaves_the_cache(tmp_path, warning, told, left):
    entry, other = tmp_path / "jit_f-0a1b-cache", tmp_path / "jit_fg-0a1b-cache"
    for path in (entry, other):
        path.write_bytes(b"")
    text = f"Error {warning}".format("persistent compilation cache entry for ")
    before = jax.config.values["jax_compilation_cache_dir"]
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        found = compilation.told_of_cache(text)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert (found is None) if told is None else (told in found)
    assert entry.exists() == left and other.exists()


def test_programs_are_listed_while_no_thread_reads_the_list(monkeypatch):
    class Watched(weakref.WeakSet):
        def add(self, item):
            assert compilation._lock.locked()
            super().add(item)

    monkeypatch.setattr(compilation, "_programs", Watched())
    exact = compilation.exact_program(static_argnums=0)(double)
    floats = compilation.FloatProgram(double, static_argnums=0)._program
    assert set(compilation._programs) == {exact, floats}
