# SPDX-License-Identifier: Apache-2.0
"""What the programs that make tables and figures share: arguments, CSV, main part."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from semlic_jax.evaluation.results import Skipped
from semlic_jax.terminal import REFUSED, SKIPPED, progress_line

Progress = Callable[[str], None]


def csv_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """Bytes of a CSV file with a header and rows."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return stream.getvalue().encode()


def run_study(
    name: str,
    work: Callable[[Progress], Sequence[Path]],
    *,
    shown: Sequence[str] = (),
    skipped: Sequence[Skipped] = (),
) -> int:
    """Run a study from its command line.

    Args:
      name: name of the program, for refusals.
      work: called with a function that takes texts about its progress; returns the
        files that it made.
      shown: names of those files whose content is also printed.
      skipped: where the work puts the images that it leaves out.

    Returns:
      the exit status: 1 for a refusal, 4 where images were left out.
    """
    try:
        with progress_line() as progress:
            paths = work(progress)
    except (ValueError, OSError) as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return REFUSED
    for path in paths:
        if path.name in shown:
            print(path.read_text())
    for path in paths:
        print(path)
    for each in skipped:
        print(f"skipped {each.name}: {each.reason}", file=sys.stderr)
    return SKIPPED if skipped else 0
