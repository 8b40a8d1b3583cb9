# SPDX-License-Identifier: Apache-2.0
"""Plot the log of a run: every term of every stage over the steps.

python -m semlic_jax.training.plot RUN [OUT.png]

Needs matplotlib (the extras `train` and `eval`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_COLUMNS = 4
_NOT_TERMS = {"stage", "step", "seconds_per_step", "skipped_images", "padded_images"}


def read_log(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of `metrics.jsonl` by stage; only the last row of a repeated step counts.

    Raises:
        ValueError: there is no such log, or it has no rows.
    """
    if not path.is_file():
        raise ValueError(f"the log of the run, {path}, does not exist")
    stages: dict[str, dict[int, dict[str, Any]]] = {}
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # part of a row, left by a killed run
        stages.setdefault(row["stage"], {})[row["step"]] = row
    if not stages:
        raise ValueError(f"{path} has no rows")
    return {
        stage: [rows[step] for step in sorted(rows)] for stage, rows in stages.items()
    }


def plot(workdir: Path, output: Path) -> None:
    """Write one picture with a panel for each term of each stage."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: list[tuple[str, str, list[int], list[float]]] = []
    for stage, rows in read_log(workdir / "metrics.jsonl").items():
        names = [name for name in rows[-1] if name not in _NOT_TERMS]
        for name in sorted(names, key=lambda name: (name != "loss", name)):
            points = [(row["step"], row[name]) for row in rows if name in row]
            steps, values = (list(column) for column in zip(*points, strict=True))
            panels.append((stage, name, steps, values))
    height = -(-len(panels) // _COLUMNS)
    figure, axes = pyplot.subplots(
        height, _COLUMNS, figsize=(4 * _COLUMNS, 2.4 * height), squeeze=False
    )
    for axis in axes.flat:
        axis.set_visible(False)
    for axis, (stage, name, steps, values) in zip(axes.flat, panels, strict=False):
        axis.set_visible(True)
        axis.plot(steps, values, linewidth=1)
        axis.set_title(f"{stage}: {name.replace('_', ' ')}", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(output, dpi=100)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m semlic_jax.training.plot",
        description=__doc__.splitlines()[0],
    )
    parser.add_argument("run", type=Path, help="work folder of the run")
    parser.add_argument(
        "output",
        type=Path,
        nargs="?",
        help="picture to write; default: metrics.png in the folder",
    )
    options = parser.parse_args(argv)
    output = options.output or options.run / "metrics.png"
    try:
        plot(options.run, output)
    except ValueError as error:
        parser.error(str(error))
    print(output)


if __name__ == "__main__":
    main()
