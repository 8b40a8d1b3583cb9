# SPDX-License-Identifier: Apache-2.0
"""Where numbers and pictures of a run go.

`metrics.jsonl` and PNG files always; TensorBoard through clu where it is installed
(the extra `train`: clu's writers need TensorFlow and TensorBoard, so they are imported
here, inside the training program, and nowhere else). Only process 0 writes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


class Writer:
    """Metrics and pictures of one run, appended to what is there."""

    def __init__(self, workdir: Path, *, active: bool, tensorboard: bool) -> None:
        """Opens the files.

        Args:
            workdir: of the run.
            active: false on all processes but one: nothing is written.
            tensorboard: write TensorBoard files too, where clu is installed.

        Raises:
            ValueError: the folder cannot be written.
        """
        self._workdir = workdir
        self._file = None
        self._writers: dict[str, Any] = {}
        self._tensorboard = active and tensorboard and _clu() is not None
        if active:
            with _clear_errors(workdir):
                workdir.mkdir(parents=True, exist_ok=True)
                self._file = (workdir / "metrics.jsonl").open("a")

    def config(self, text: str) -> None:
        """Keeps the configuration, as JSON."""
        if self._file is not None:
            with _clear_errors(self._workdir):
                (self._workdir / "config.json").write_text(text)

    def scalars(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """One row of the log; also a point of each TensorBoard curve."""
        if self._file is None:
            return
        row = json.dumps({"stage": stage, "step": step, **values})
        with _clear_errors(self._workdir):
            self._file.write(row + "\n")
            self._file.flush()
        if self._tensorboard:
            self._writer(stage).write_scalars(step, values)

    def images(self, stage: str, step: int, rows: Sequence[np.ndarray]) -> None:
        """A picture sheet: one row for each array, float [B, H, W, 3] in [0, 1]."""
        if self._file is None:
            return
        sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
        pixels = np.round(np.clip(sheet, 0, 1) * 255).astype(np.uint8)
        folder = self._workdir / "images"
        with _clear_errors(self._workdir):
            folder.mkdir(exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{stage}_{step:07d}.png")
        if self._tensorboard:
            self._writer(stage).write_images(step, {"reconstructions": pixels[None]})

    def _writer(self, stage: str) -> Any:
        if stage not in self._writers:
            folder = str(self._workdir / "tensorboard" / stage)
            self._writers[stage] = _clu().SummaryWriter(folder)
        return self._writers[stage]

    def close(self) -> None:
        """Flushes everything."""
        for writer in self._writers.values():
            writer.close()
        if self._file is not None:
            self._file.close()


@contextmanager
def _clear_errors(workdir: Path) -> Iterator[None]:
    """Says which folder it was that could not be written."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"--workdir must be a folder that can be written, found {workdir}: "
            f"{error.strerror or error}"
        ) from error


def _clu() -> Any:
    """clu's metric writers, or None where they or their needs are missing."""
    try:
        from clu import metric_writers
    except ImportError as error:
        logging.info("no TensorBoard files: %s", error)
        return None
    return metric_writers
