# SPDX-License-Identifier: Apache-2.0
"""Writing the metrics and pictures of a run.

They go to `metrics.jsonl` and PNG files and, where clu is installed (the extra
`train`), also to TensorBoard. clu's writers need TensorFlow and TensorBoard, so they
are imported only here, inside the training program. Only process 0 writes. The folder
may be in a bucket (`gs://...`).
"""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

_BUCKET_SECONDS = 60.0


class Writer:
    """Metrics and pictures of one run, appended to what is there."""

    def __init__(
        self, workdir: epath.PathLike, *, active: bool, tensorboard: bool
    ) -> None:
        """Open the files.

        Args:
            workdir: folder of the run.
            active: whether this process writes: true on one process only.
            tensorboard: write TensorBoard files too, if clu is installed.

        Raises:
            ValueError: the folder cannot be written to.
        """
        self._workdir = epath.Path(workdir)
        self._log: _Log | None = None
        self._writers: dict[str, Any] = {}
        self._tensorboard = active and tensorboard and _clu() is not None
        if active:
            with clear_errors(self._workdir):
                self._workdir.mkdir(parents=True, exist_ok=True)
                self._log = _Log(self._workdir / "metrics.jsonl")

    def config(self, text: str) -> None:
        """Save the configuration, given as JSON."""
        if self._log is not None:
            with clear_errors(self._workdir):
                (self._workdir / "config.json").write_text(text)

    def scalars(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Write one row of the log, and a point of each TensorBoard curve."""
        if self._log is None:
            return
        row = json.dumps({"stage": stage, "step": step, **values})
        with clear_errors(self._workdir):
            self._log.add(row + "\n")
        if self._tensorboard:
            self._writer(stage).write_scalars(step, values)

    def images(self, stage: str, step: int, rows: Sequence[np.ndarray]) -> None:
        """Write a picture with a row for each array, float [B, H, W, 3] in [0, 1]."""
        if self._log is None:
            return
        sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
        pixels = np.round(np.clip(sheet, 0, 1) * 255).astype(np.uint8)
        folder = self._workdir / "images"
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, "PNG")
        with clear_errors(self._workdir):
            folder.mkdir(exist_ok=True)
            (folder / f"{stage}_{step:07d}.png").write_bytes(encoded.getvalue())
        if self._tensorboard:
            self._writer(stage).write_images(step, {"reconstructions": pixels[None]})

    def _writer(self, stage: str) -> Any:
        if stage not in self._writers:
            folder = str(self._workdir / "tensorboard" / stage)
            self._writers[stage] = _clu().SummaryWriter(folder)
        return self._writers[stage]

    def close(self) -> None:
        """Flush and close everything."""
        for writer in self._writers.values():
            writer.close()
        if self._log is not None:
            with clear_errors(self._workdir):
                self._log.close()


class _Log:
    """A file that lines are appended to, each visible at once.

    Files in a bucket cannot grow: there the whole file is written again, at most once a
    minute.
    """

    def __init__(self, path: epath.Path) -> None:
        self._path = path
        self._file = None
        self._lines: list[str] = []
        self._written = time.monotonic()
        if not str(path).startswith("gs://"):
            # A killed run may have left part of a row.
            broken = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
            self._file = path.open("a")
            self._file.write("\n" if broken else "")
        elif path.exists():
            self._lines.append(path.read_text())

    def add(self, line: str) -> None:
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
            return
        self._lines.append(line)
        if time.monotonic() - self._written >= _BUCKET_SECONDS:
            self._write()

    def _write(self) -> None:
        self._path.write_text("".join(self._lines))
        self._written = time.monotonic()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        else:
            self._write()


@contextmanager
def clear_errors(workdir: epath.Path) -> Iterator[None]:
    """Turn any error into one that says which folder could not be written to."""
    try:
        yield
    except Exception as error:  # bucket libraries raise errors of their own
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValueError(
            f"--workdir must be a writable folder, found {workdir}: {reason[:300]}"
        ) from error


def _clu() -> Any:
    """clu's metric writers, or None if they or what they import are missing."""
    try:
        from clu import metric_writers
    except ImportError as error:
        logging.info("TensorBoard files are not written: %s", error)
        return None
    return metric_writers
