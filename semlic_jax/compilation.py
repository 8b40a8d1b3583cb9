# SPDX-License-Identifier: Apache-2.0
"""How programs in floats are compiled.

XLA:CPU of the jaxlib 0.10 series hands single convolutions to a library that takes up
to 1.8 times as long for them, forwards and to their inputs, as its own code. The choice
is an experimental option of the compiler: where it is missing nothing is asked for.
LLVM's first level of optimisation makes programs that run as fast as those of its third
(level 0: half as fast), and takes 9 to 15 % off the time until the first refined image.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

# The kinds of fusions for that library: its defaults less convolutions.
_KINDS = ("INDIVIDUAL_DOT", "REDUCE")
_OWN_CONVOLUTIONS: dict[str, str | int] = {
    "xla_cpu_experimental_ynn_fusion_type": ",".join(
        f"LIBRARY_FUSION_TYPE_{kind}" for kind in _KINDS
    )
}
_LEVEL: dict[str, str | int] = {"xla_backend_optimization_level": 1}


@functools.cache
def compiler_options() -> dict[str, str | int] | None:
    """For `jax.jit` of float networks whose weights do not learn; None off the CPU."""
    if jax.default_backend() != "cpu":
        return None
    trivial = jax.jit(lambda: 0, compiler_options=_OWN_CONVOLUTIONS)
    try:
        trivial.lower().compile()
    except jax.errors.JaxRuntimeError:  # another compiler, without this option
        return None
    # Who has turned optimisations off keeps level 0.
    level = {} if jax.config.values["jax_disable_most_optimizations"] else _LEVEL
    return _OWN_CONVOLUTIONS | level


class FloatProgram:
    """`jax.jit` with `compiler_options`, which it looks up when it is first called.

    The gradient of weights is slower with them, so training goes without. Not for
    calls within another `jax.jit`, which is not allowed options of its own.
    """

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        """`options` are those of `jax.jit`."""
        functools.update_wrapper(self, function)
        self._function, self._options = function, options

    @functools.cached_property
    def _program(self) -> Any:
        options = compiler_options()
        return jax.jit(self._function, compiler_options=options, **self._options)

    def __call__(self, *arguments: Any) -> Any:
        """As the function."""
        return self._program(*arguments)

    def lower(self, *arguments: Any) -> Any:
        """As `jax.jit(...).lower`."""
        return self._program.lower(*arguments)


def float_program(**options: Any) -> Callable[[Callable[..., Any]], FloatProgram]:
    """A decorator that makes a `FloatProgram` of a function."""
    return lambda function: FloatProgram(function, **options)
