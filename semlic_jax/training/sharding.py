# SPDX-License-Identifier: Apache-2.0
"""The devices as a (data, model) mesh, and how arrays are placed on it.

Batches are split over `data`. Parameters are replicated or, where the mesh has more
than one column, split over `model` by one rule for every leaf of a state: a kernel, its
average and its Adam moments have the same shape and so the same sharding. The compiler
inserts the collectives.
"""

from __future__ import annotations

import atexit
import bisect
import itertools
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Tree = Any

DATA, MODEL = "data", "model"

# Exit status of a process that lost another one of its run, or that was told to stop:
# EX_TEMPFAIL.
LOST_STATUS = 75

_calls = itertools.count(1)
_signals: list[int] = []  # SIGTERM, of a process without JAX's service


class Preempted(Exception):
    """The processes were told to stop; the message says what is saved."""


def start_processes(
    mode: str, coordinator: str = "", processes: int = 0, process: int = -1
) -> None:
    """Join the processes of a run; call this before any other use of JAX.

    Args:
        mode: `none`; `auto` where the environment says how (TPU pods, SLURM, Open MPI);
            `explicit` with the three other arguments.
        coordinator: `host:port` of process 0.
        processes: number of processes.
        process: number of this process, from 0.

    Raises:
        ValueError: an argument is wrong, or the processes cannot be joined.
    """
    if mode in ("none", "auto") and (coordinator or processes or process >= 0):
        raise ValueError(
            "--coordinator, --processes and --process need --distributed=explicit, "
            f"found {mode}"
        )
    if mode == "none":
        return
    explicit = {}
    if mode == "explicit":
        if not coordinator or processes < 1 or not 0 <= process < processes:
            raise ValueError(
                "explicit processes need --coordinator=HOST:PORT, --processes=N and "
                f"--process=0..N-1, found {coordinator!r}, {processes} and {process}"
            )
        explicit = dict(
            coordinator_address=coordinator,
            num_processes=processes,
            process_id=process,
        )
    elif mode != "auto":
        raise ValueError(
            f"--distributed must be none, auto or explicit, found {mode!r}"
        )
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(**explicit)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"cannot join the processes of this run: {' '.join(str(error).split())}"
        ) from error
    logging.info("process %d of %d", jax.process_index(), jax.process_count())
    if jax.default_backend() == "cpu":
        # Gloo gives the others 30 seconds to reach the first collective. Now all are
        # here; later, one of them may compile for longer than that.
        with stops_with_the_others():
            multihost_utils.sync_global_devices("start")


@contextmanager
def stops_with_the_others() -> Iterator[None]:
    """End this process at once, with status `LOST_STATUS`, if a collective fails.

    The same for `Preempted`. Nothing runs between the message and the exit: the usual
    exit joins threads first, and on a busy machine JAX, missing the others'
    heartbeats, aborts before it is done.
    """
    try:
        yield
    except Exception as error:
        count = jax.process_count()
        if isinstance(error, Preempted):
            whom, what = f"process {jax.process_index()} of {count}", "all of them"
            if count == 1:
                whom, what = "the run", "it"
            print(
                f"semlic: {whom} was told to stop: {error}; start {what} again with "
                "the same command to continue",
                file=sys.stderr,
                flush=True,
            )
            if count > 1 and jax.process_index() == 0:
                # The others abort if its coordination service goes before them.
                time.sleep(1)
            _leave(LOST_STATUS)
        if count == 1:
            raise
        if _is_broken_collective(error):
            print(
                f"semlic: process {jax.process_index()} of {jax.process_count()} "
                "cannot continue without the others: start all of them again with the "
                "same command to continue from the last checkpoint "
                f"({' '.join(str(error).split())[:200]})",
                file=sys.stderr,
            )
            _leave(LOST_STATUS)
        # At exit, JAX waits for minutes for the processes that are gone.
        atexit.register(_leave, 1)
        raise


@contextmanager
def stops_at_sigterm() -> Iterator[None]:
    """Let the first SIGTERM of a process by itself end the run at the next step.

    A second one ends the process at once. Of several processes JAX takes the signal.
    """

    def note(number: int, _: Any) -> None:
        _signals.append(number)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    alone = jax.process_count() == 1
    if not (alone and threading.current_thread() is threading.main_thread()):
        yield
        return
    before = signal.signal(signal.SIGTERM, note)
    try:
        yield
    finally:
        _signals.clear()
        signal.signal(signal.SIGTERM, before)


def told_to_stop() -> bool:
    """Whether all processes are to stop after this step, since one got a SIGTERM.

    JAX keeps the signal from ending a process of several, and has them agree on the
    step. Call this once for each step: they agree on a number of calls, which unlike
    the number of the step grows by one each time in all stages.
    """
    if _signals:
        return True
    try:
        return multihost_utils.reached_preemption_sync_point(next(_calls))
    except RuntimeError:
        return False  # the service is switched off, so the signal ends the process


def _is_broken_collective(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            return "RESOURCE_EXHAUSTED" not in str(error)
        error = error.__cause__
    return False


def _leave(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def make_mesh(data: int, model: int) -> Mesh:
    """The mesh of (data, model) devices; `data` = 0 uses all that there are.

    Raises:
        ValueError: there are more shards than devices, `model` does not divide the
            devices, a run of several processes would not use all of them, or JAX knows
            no such mesh of these devices.
    """
    devices = jax.devices()
    if model < 1 or data < 0:
        raise ValueError(
            f"config.mesh needs data >= 0 and model >= 1, found {data} and {model}"
        )
    wanted = max(data, 1) * model
    if wanted > len(devices):
        raise ValueError(
            f"config.mesh asks for {wanted} devices ({max(data, 1)} data x {model} "
            f"model), found {len(devices)}"
        )
    if data == 0:
        if len(devices) % model:
            raise ValueError(
                f"config.mesh.model={model} does not divide {len(devices)} devices"
            )
        data = len(devices) // model
    if jax.process_count() > 1 and data * model != len(devices):
        raise ValueError(
            f"a run of {jax.process_count()} processes must use all "
            f"{len(devices)} devices, config.mesh asks for {data * model}"
        )
    shape = (data, model)
    try:
        # On some TPU slices a model axis of 2 is a part of an axis of the torus, which
        # `jax.make_mesh` does not split.
        places = mesh_utils.create_device_mesh(
            shape, devices[: data * model], allow_split_physical_axes=True
        )
    except Exception as error:  # it has assertions too
        raise ValueError(
            f"config.mesh: {data} data x {model} model cannot be placed on "
            f"{len(devices)} devices ({devices[0].device_kind}): "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    return Mesh(places, (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto))


def state_sharding(mesh: Mesh, tree: Tree, *, shard_from: int) -> Tree:
    """The sharding of each leaf of a state.

    A leaf of at least `shard_from` elements and two axes is split along its largest
    axis that the `model` axis divides, the last of equal ones (output channels); all
    others are replicated.

    Args:
        mesh: from `make_mesh`.
        tree: arrays or shapes.
        shard_from: smallest number of elements of a leaf that is split.
    """
    columns = mesh.shape[MODEL]

    def place(leaf: Any) -> NamedSharding:
        shape = np.shape(leaf)
        spec: list[str | None] = [None] * len(shape)
        if columns > 1 and len(shape) > 1 and np.prod(shape) >= shard_from:
            fitting = [i for i, side in enumerate(shape) if side % columns == 0]
            if fitting:
                spec[max(fitting, key=lambda i: (shape[i], i))] = MODEL
        return NamedSharding(mesh, P(*spec))

    return jax.tree.map(place, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays with a whole copy on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of batches, which are split over the data axis."""
    return NamedSharding(mesh, P(DATA))


def place(tree: Tree, shardings: Tree) -> Tree:
    """Turn arrays that are the same on every process into global arrays.

    Args:
        tree: NumPy arrays or arrays of this process; no typed keys.
        shardings: one for all leaves, or a tree of them.
    """
    if isinstance(shardings, NamedSharding):
        one = shardings
        shardings = jax.tree.map(lambda _: one, tree)

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])

    return jax.tree.map(put, tree, shardings)


def local_examples(mesh: Mesh, batch: int) -> tuple[int, ...]:
    """The examples of a global batch that this process's devices work on, sorted.

    They need not follow each other: the rows of a TPU host are where the mesh has its
    chips.

    Raises:
        ValueError: the data axis does not divide the batch.
    """
    rows = mesh.shape[DATA]
    if batch % rows:
        raise ValueError(
            f"config.data.batch must be a multiple of the {rows} data shards, "
            f"found {batch}"
        )
    places = batch_sharding(mesh).addressable_devices_indices_map((batch,))
    needed = {i for index in places.values() for i in range(*index[0].indices(batch))}
    return tuple(sorted(needed))


def global_batch(
    mesh: Mesh, local: np.ndarray, examples: Sequence[int], batch: int
) -> Any:
    """The global batch, of which `local` is this process's part."""

    def part(index: tuple[slice, ...]) -> np.ndarray:
        wanted = range(*index[0].indices(batch))
        # A shard's examples follow each other in `examples` too.
        first = bisect.bisect_left(examples, wanted.start)
        return local[first : first + len(wanted)]

    shape = (batch, *local.shape[1:])
    return jax.make_array_from_callback(shape, batch_sharding(mesh), part)
