# SPDX-License-Identifier: Apache-2.0
"""`semlic bench`: how long compressing and decompressing take, beside classical codecs.

Times are medians after a warm-up, in one process on one image. The classical codecs are
measured at the setting whose file is closest below ours, or else at their smallest
file. The last line starts `semlic decompress` as a new process, with compiled programs
from the cache: this is how long a user of the command waits.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from semlic_jax.coding.entropy_coding import SymbolDecoder, SymbolEncoder
from semlic_jax.evaluation.codecs import FAILURES, Ladder, classical_codec, reason_of
from semlic_jax.evaluation.demo import packaged_photograph, psnr_db

if TYPE_CHECKING:
    from semlic_jax.codec import Codec

RIVALS = ("jpeg", "webp", "avif")

# The size that speeds of image codecs are usually quoted for.
_WIDTH, _HEIGHT = 768, 512


@dataclass(frozen=True)
class Row:
    """The measurements of one codec; times are medians of wall time in seconds.

    `coding_*_s` is the part spent between symbols and bytes; None for codecs that do
    not show it separately.
    """

    name: str
    file_bytes: int
    bpp: float
    psnr_db: float
    compress_s: float
    decompress_s: float
    coding_compress_s: float | None = None
    coding_decompress_s: float | None = None


@dataclass(frozen=True)
class Report:
    """What `run_benchmark` measured, and on what.

    `missing` has the reason for each codec that could not be measured.
    """

    width: int
    height: int
    cores: int
    platform: str
    repeats: int
    rows: tuple[Row, ...]
    first_compress_s: float
    first_decompress_s: float
    process_decompress_s: float
    missing: dict[str, str]

    def facts(self) -> dict[str, Any]:
        """The report for JSON, which has no infinity: PSNR of equal images is None."""
        facts = asdict(self)
        for row in facts["rows"]:
            if not math.isfinite(row["psnr_db"]):
                row["psnr_db"] = None
        return facts

    def table(self) -> str:
        lines = [
            f"{self.width}x{self.height}, {self.cores} cores, {self.platform}, "
            f"medians of {self.repeats}",
            f"{'codec':<12}{'bytes':>9}{'bpp':>8}{'PSNR':>10}"
            f"{'compress':>11}{'(coding)':>11}{'decompress':>12}{'(coding)':>11}",
        ]
        for row in self.rows:
            lines.append(
                f"{row.name:<12}{row.file_bytes:>9,}{row.bpp:>8.3f}"
                f"{row.psnr_db:>7.2f} dB{_ms(row.compress_s):>11}"
                f"{_ms(row.coding_compress_s):>11}{_ms(row.decompress_s):>12}"
                f"{_ms(row.coding_decompress_s):>11}"
            )
        for row in self.rows[1:]:
            if row.file_bytes > self.rows[0].file_bytes:
                lines.append(f"{row.name} cannot make a smaller file of this image")
        lines += [f"{name} was left out: {why}" for name, why in self.missing.items()]
        lines.append(
            f"first calls in this process: compress {self.first_compress_s:.2f} s, "
            f"decompress {self.first_decompress_s:.2f} s"
        )
        lines.append(
            "`semlic decompress` as a new process, in total: "
            f"{self.process_decompress_s:.2f} s"
        )
        return "\n".join(lines)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:,.1f} ms"


def packaged_pixels() -> np.ndarray:
    """The packaged photograph at 768x512, uint8 [512, 768, 3]."""
    image = Image.fromarray(packaged_photograph().pixels)
    return np.asarray(image.resize((_WIDTH, _HEIGHT), Image.Resampling.LANCZOS))


def run_benchmark(
    codec: Codec,
    pixels: np.ndarray,
    *,
    model: str,
    quality: float,
    repeats: int,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Measure `codec` and the classical codecs on one image.

    Args:
      codec: the loaded model, best unused so far, since its first calls are reported.
      pixels: uint8 [H, W, 3].
      model: the name or path that `codec` was loaded by, for the new process.
      quality: quality of our file, 0..1.
      repeats: calls that each median is taken over, after one that does not count.
      progress: called with a text about what is being done.
    """
    height, width = pixels.shape[:2]
    progress("warming up")
    first_compress_s, data = _timed(lambda: codec.compress(pixels, quality=quality))
    first_decompress_s, image = _timed(lambda: codec.decompress(data))
    progress("measuring semlic")
    with _time_in(SymbolEncoder, "push", "finish") as coding:
        compress_s, coding_compress_s = _medians(
            lambda: codec.compress(pixels, quality=quality), repeats, coding
        )
    with _time_in(SymbolDecoder, "__init__", "pop", "finish") as coding:
        decompress_s, coding_decompress_s = _medians(
            lambda: codec.decompress(data), repeats, coding
        )
    rows = [
        Row(
            "semlic",
            len(data),
            8 * len(data) / (height * width),
            psnr_db(pixels, image),
            compress_s,
            decompress_s,
            coding_compress_s,
            coding_decompress_s,
        )
    ]
    missing = {}
    for name in RIVALS:
        progress(f"measuring {name}")
        try:
            rows.append(_rival(name, pixels, len(data), repeats))
        except FAILURES as error:  # the others still count
            missing[name] = reason_of(error)
    progress("measuring a new process")
    return Report(
        width,
        height,
        os.cpu_count() or 1,
        f"{platform.machine()} {platform.system()}",
        repeats,
        tuple(rows),
        first_compress_s,
        first_decompress_s,
        _process_s(data, model),
        missing,
    )


def _rival(name: str, pixels: np.ndarray, max_bytes: int, repeats: int) -> Row:
    codec = classical_codec(name)
    ladder = Ladder(codec, pixels)
    try:
        fit = ladder.fit(max_bytes)
        setting, data = fit.setting, fit.data
    except ValueError:  # its smallest file is larger than ours
        setting = codec.settings[0]
        data = ladder.encode(setting)
    height, width = pixels.shape[:2]
    compress_s, _ = _medians(lambda: codec.encode(pixels, setting), repeats)
    decompress_s, _ = _medians(lambda: codec.decode(data), repeats)
    return Row(
        codec.name,
        len(data),
        8 * len(data) / (height * width),
        psnr_db(pixels, codec.decode(data)),
        compress_s,
        decompress_s,
    )


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start_s = time.perf_counter()
    result = call()
    return time.perf_counter() - start_s, result


def _medians(
    call: Callable[[], Any], repeats: int, part: list[float] | None = None
) -> tuple[float, float | None]:
    """Medians of a call's time and of the part of it that is collected in `part`."""
    call()
    totals_s, parts_s = [], []
    for _ in range(repeats):
        if part is not None:
            part.clear()
        totals_s.append(_timed(call)[0])
        parts_s.append(sum(part or ()))
    median_part_s = None if part is None else statistics.median(parts_s)
    return statistics.median(totals_s), median_part_s


@contextmanager
def _time_in(cls: type, *methods: str) -> Iterator[list[float]]:
    """Collect the seconds of every call of these methods while the context is open."""
    seconds: list[float] = []
    originals = {name: getattr(cls, name) for name in methods}

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            elapsed_s, result = _timed(lambda: method(*args, **options))
            seconds.append(elapsed_s)
            return result

        return call

    for name, method in originals.items():
        setattr(cls, name, watched(method))
    try:
        yield seconds
    finally:
        for name, method in originals.items():
            setattr(cls, name, method)


def _process_s(data: bytes, model: str) -> float:
    """Wall time of `semlic decompress` as a process: a second run, with warm caches."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "photograph.semlic")
        source.write_bytes(data)
        command = [sys.executable, "-m", "semlic_jax.cli", "decompress", str(source)]
        command += ["--model", model, "--force"]
        for _ in range(2):
            elapsed_s, done = _timed(
                lambda: subprocess.run(command, capture_output=True, text=True)
            )
            if done.returncode:
                raise RuntimeError(f"semlic decompress failed: {done.stderr.strip()}")
    return elapsed_s
