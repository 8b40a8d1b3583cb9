# SPDX-License-Identifier: Apache-2.0
"""Runs one stage from its last checkpoint to its end.

What a step does to the state is a function of its number, so a killed run that is
started again ends with the same parameters as an unbroken one.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import jax
import numpy as np
from etils import epath

from semlic_jax.training.checkpoints import Checkpoints
from semlic_jax.training.data import Photographs
from semlic_jax.training.programs import Program, Run
from semlic_jax.training.sharding import (
    Preempted,
    global_batch,
    local_examples,
    place,
    replicated,
    told_to_stop,
)
from semlic_jax.training.stages import LabellerStage, Stage
from semlic_jax.training.writers import Writer

Tree = Any

_SHOWN_IMAGES = 4
_SHOWN_STEP = 2**31 - 1  # a batch that no training reaches


class NotFiniteError(ValueError):
    """A term of the loss, or a gradient, is not a finite number."""


def run_program(
    run: Run,
    stage: Stage | LabellerStage,
    program: Program,
    photographs: Photographs,
    writer: Writer,
    workdir: epath.Path,
    record: str,
) -> Tree:
    """Train one stage to its end; return the averaged parameters of its network.

    The configuration `record` is saved before the first step, but not if the stage's
    checkpoints do not fit this run: their own record is still needed to export them.

    Raises:
        NotFiniteError: a term is not finite; names the step and the term.
        Preempted: the processes were told to stop; the checkpoint is complete.
        ValueError: the checkpoints are of another model, or cannot be written.
    """
    settings = run.settings
    batch = settings.data.batch
    examples = local_examples(run.mesh, batch)
    with Checkpoints(workdir / stage.name, settings.keep_checkpoints) as checkpoints:
        restored = checkpoints.restore(program.shapes)
        state, start = restored or (program.start(), 0)
        if start:
            logging.info("%s continues from step %d", stage.name, start)
        if start < stage.steps:
            writer.config(record)
        meter = _Meter(stage, start, batch)
        for step, local in enumerate(
            photographs.batches(
                start,
                stage.steps,
                seed=settings.stage_seed(stage.name),
                examples=examples,
                threads=settings.data.threads,
            ),
            start,
        ):
            images = global_batch(run.mesh, local, examples, batch)
            state, metrics = program.update(state, step, images)
            meter.add(metrics)
            done = step + 1
            last = done == stage.steps
            if last or done % settings.log_steps == 0:
                row = meter.row(done)
                row["skipped_images"] = len(photographs.skipped)
                row["padded_images"] = len(photographs.padded)
                writer.scalars(stage.name, done, row)
            if settings.image_steps and (last or done % settings.image_steps == 0):
                _show(run, program, state, photographs, writer, stage.name, done)
            stopping = told_to_stop()
            if stopping or last or done % settings.checkpoint_steps == 0:
                meter.check(done)
                checkpoints.save(done, state)
            if stopping:
                checkpoints.wait()
                raise Preempted(
                    f"the checkpoint of step {done} of the stage {stage.name} is saved"
                )
    return state["average"]


def _show(
    run: Run,
    program: Program,
    state: dict[str, Tree],
    photographs: Photographs,
    writer: Writer,
    stage: str,
    done: int,
) -> None:
    """Write originals with their reconstructions below, always of the same crops."""
    originals = np.stack(
        [
            photographs.example(_SHOWN_STEP, index, seed=run.settings.seed)
            for index in range(_SHOWN_IMAGES)
        ]
    )
    shown = program.show(state, place(originals, replicated(run.mesh)))
    writer.images(stage, done, [originals, *map(np.asarray, shown)])


class _Meter:
    """Means of the metrics since the last row, throughput and time left.

    Metrics stay on the device until a row or a check asks for them.
    """

    def __init__(self, stage: Stage | LabellerStage, start: int, batch: int) -> None:
        self._stage, self._batch = stage, batch
        self._waiting: list[dict[str, jax.Array]] = []
        self._rows: list[dict[str, float]] = []
        # The first step is mostly compilation, so its time does not count.
        self._begun: float | None = None
        self._first = start + 1

    def add(self, metrics: dict[str, jax.Array]) -> None:
        self._waiting.append(metrics)
        if self._begun is None:
            jax.block_until_ready(metrics)
            self._begun = time.monotonic()

    def check(self, done: int) -> None:
        """Raise NotFiniteError for the first value that is not finite."""
        rows = jax.device_get(self._waiting)
        for step, row in enumerate(rows, done - len(rows) + 1):
            for name, value in row.items():
                if not np.isfinite(value):
                    raise NotFiniteError(
                        f"{name} is {value} at step {step} of the stage "
                        f"{self._stage.name}; the last checkpoint is from an earlier "
                        "step"
                    )
        self._rows += [{name: float(row[name]) for name in row} for row in rows]
        self._waiting = []

    def row(self, done: int) -> dict[str, float]:
        """Return and log the means since the last row, up to the step `done`."""
        self.check(done)
        row = {
            name: float(np.mean([values[name] for values in self._rows]))
            for name in self._rows[0]
        }
        self._rows = []
        steps = done - self._first
        seconds = (time.monotonic() - (self._begun or 0.0)) / steps if steps else 0.0
        terms = " ".join(f"{name} {value:.4g}" for name, value in row.items())
        row["seconds_per_step"] = seconds
        row["images_per_second"] = self._batch / seconds if seconds else 0.0
        logging.info(
            "%s %d/%d: %s; %.1f images/s, %s left",
            self._stage.name,
            done,
            self._stage.steps,
            terms,
            row["images_per_second"],
            _duration((self._stage.steps - done) * seconds),
        )
        return row


def _duration(seconds: float) -> str:
    minutes = int(seconds / 60 + 0.5)
    return (
        f"{minutes // 60} h {minutes % 60:02d} min"
        if minutes >= 60
        else (f"{minutes} min")
    )
