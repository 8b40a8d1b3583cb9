# SPDX-License-Identifier: Apache-2.0
"""Compilation of float programs, with and without the options of the compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semlic_jax import compilation


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
