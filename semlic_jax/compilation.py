# SPDX-License-Identifier: Apache-2.0
"""How programs are compiled, and when they are forgotten.

XLA:CPU of the jaxlib 0.10 series hands single convolutions to a library that takes up
to 1.8 times as long for them, forwards and to their inputs, as its own code. The choice
is an experimental option of the compiler: where it is missing nothing is asked for.
LLVM's first level of optimisation makes programs that run as fast as those of its third
(level 0: half as fast), and takes 9 to 15 % off the time until the first refined image.

Programs are compiled for each bucket of image sizes. They are forgotten before there
are too many: both directions of one bucket take about 950 memory mappings and 70 MiB on
a CPU, Linux allows a process 65,530 mappings, and beyond them LLVM ends it by SIGSEGV.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import glob
import os
import re
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import jax

# The operations that library may still take: its defaults without convolutions.
_KINDS = ("INDIVIDUAL_DOT", "REDUCE")
_OWN_CONVOLUTIONS: dict[str, str | int] = {
    "xla_cpu_experimental_ynn_fusion_type": ",".join(
        f"LIBRARY_FUSION_TYPE_{kind}" for kind in _KINDS
    )
}
_LEVEL: dict[str, str | int] = {"xla_backend_optimization_level": 1}

# Programs that took less to compile are not cached on disk: JAX's default, and ours.
_USUAL_LEAST_COMPILE_S, _LEAST_COMPILE_S = 1.0, 0.1

_CACHE_WARNING = re.compile(
    "Error (reading|writing) persistent compilation cache entry for "
    "'([^']+)': ([A-Za-z]+): ?(.*)",
    re.DOTALL,
)

_MOST_BUCKETS = 16
_MOST_MAPPED = 0.5  # share of the mappings that Linux allows
_programs: weakref.WeakSet[Any] = weakref.WeakSet()
_buckets: set[Hashable] = set()
_lock = threading.Lock()


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
        program = jax.jit(self._function, compiler_options=options, **self._options)
        return _listed(program)

    def __call__(self, *arguments: Any) -> Any:
        """As the function."""
        return self._program(*arguments)

    def lower(self, *arguments: Any) -> Any:
        """As `jax.jit(...).lower`."""
        return self._program.lower(*arguments)


def float_program(**options: Any) -> Callable[[Callable[..., Any]], FloatProgram]:
    """A decorator that makes a `FloatProgram` of a function."""
    return lambda function: FloatProgram(function, **options)


def exact_program(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: `jax.jit` of a program in integers, or of a few floats."""

    def decorate(function: Callable[..., Any]) -> Any:
        return _listed(jax.jit(function, **options))

    return decorate


def _listed(program: Any) -> Any:
    """A program that `enter_bucket`, also of another thread, knows from now on."""
    with _lock:
        _programs.add(program)
    return program


def enter_bucket(bucket: Hashable) -> None:
    """Forget the compiled programs of earlier buckets where they have become many.

    The cache on disk, where there is one, makes it cheap to compile them again.

    Args:
        bucket: names the model and the shape whose programs are needed next.
    """
    with _lock:
        if bucket in _buckets:
            return
        if len(_buckets) >= _MOST_BUCKETS or _mapped_share() > _MOST_MAPPED:
            for program in list(_programs):
                program.clear_cache()
            _buckets.clear()
            if _mapped_share() > _MOST_MAPPED:  # they are of others
                jax.clear_caches()
        _buckets.add(bucket)


def _mapped_share() -> float:
    """Memory mappings of this process in those that Linux allows; 0 elsewhere."""
    try:
        with open("/proc/self/maps", "rb") as lines:
            count = sum(1 for _ in lines)
        return count / int(Path("/proc/sys/vm/max_map_count").read_text())
    except (OSError, ValueError, ZeroDivisionError):
        return 0.0


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """JAX's default strictness, whatever the caller has set; also a decorator."""
    with (
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
        jax.transfer_guard("allow"),
    ):
        yield


def told_of_cache(warning: str) -> str | None:
    """What people are told in the place of a warning of JAX's about its cache.

    JAX writes the cache such that a full disk or a kill leaves parts of entries, never
    replaces one, and so would warn of it and compile its program again for ever. What
    it could not read is deleted here, before the program that it then compiles is kept.

    Args:
        warning: the text of any warning.

    Returns:
        One clause; None for warnings of anything else.
    """
    found = _CACHE_WARNING.match(warning)
    if found is None:
        return None
    action, name, kind, why = found.groups()
    if action == "writing":
        return f"a compiled program could not be kept: {why or kind}"
    if issubclass(getattr(builtins, kind, Exception), OSError):
        return f"a compiled program could not be read: {why or kind}"
    folder = jax.config.values["jax_compilation_cache_dir"]
    for path in Path(folder or os.devnull).glob(f"{glob.escape(name)}-*cache"):
        with contextlib.suppress(OSError):
            path.unlink()
    return "damaged programs in the cache are compiled again"


def use_disk_cache() -> None:
    """Keep compiled programs between processes, unless the user set it up.

    The folder is $SEMLIC_CACHE or ~/.cache/semlic_jax; an empty $SEMLIC_CACHE turns
    the cache off, and so does a folder that cannot be written.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    folder = os.environ.get("SEMLIC_CACHE")
    if folder is None:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = os.path.join(base, "semlic_jax")
        if not os.path.isabs(folder):  # a user without a home
            return
    if not folder:
        return
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
    except OSError:  # a read-only home: JAX would warn at every program
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", folder)
        name = "jax_persistent_cache_min_compile_time_secs"
        if jax.config.values[name] == _USUAL_LEAST_COMPILE_S:
            jax.config.update(name, _LEAST_COMPILE_S)
