# SPDX-License-Identifier: Apache-2.0
"""Plot the log of a run: every term of every stage over the steps.

python -m semlic_jax.training.plot RUN [OUT.png]

Needs matplotlib (the extras `train` and `eval`).
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from semlic_jax.images import check_outputs, write_file

_COLUMNS = 4
_NOT_TERMS = {"stage", "step", "seconds_per_step", "skipped_images", "padded_images"}


def read_log(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of `metrics.jsonl` by stage; only the last row of a repeated step counts.

    Lines that are no rows are passed over.

    Raises:
        ValueError: there is no such log, or it has no rows.
    """
    if not path.is_file():
        raise ValueError(f"the log of the run, {path}, does not exist")
    stages: dict[str, dict[int, dict[str, Any]]] = {}
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # part of a row, left by a killed run
        if not isinstance(row, dict):
            continue
        stage, step = row.get("stage"), row.get("step")
        if isinstance(stage, str) and isinstance(step, int):
            stages.setdefault(stage, {})[step] = row
    if not stages:
        raise ValueError(f"{path} has no rows")
    return {
        stage: [rows[step] for step in sorted(rows)] for stage, rows in stages.items()
    }


def plot(workdir: Path, output: Path) -> None:
    """Write one PNG picture with a panel for each term of each stage.

    Replaces a file that is there.

    Raises:
        ValueError: the log is missing, or has no terms.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: list[tuple[str, str, list[int], list[float]]] = []
    for stage, rows in read_log(workdir / "metrics.jsonl").items():
        names = [name for name in rows[-1] if name not in _NOT_TERMS]
        for name in sorted(names, key=lambda name: (name != "loss", name)):
            points = [
                (row["step"], row[name])
                for row in rows
                if isinstance(row.get(name), int | float)
            ]
            if not points:
                continue
            steps, values = (list(column) for column in zip(*points, strict=True))
            panels.append((stage, name, steps, values))
    if not panels:
        raise ValueError(f"the log in {workdir} has no terms to plot")
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
    stream = io.BytesIO()
    figure.savefig(stream, dpi=100, format="png")
    pyplot.close(figure)
    write_file(output, stream.getvalue(), force=True)


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
        help="PNG to write; default: metrics.png in the folder, which is replaced",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace an existing OUTPUT"
    )
    options = parser.parse_args(argv)
    output = options.output or options.run / "metrics.png"
    try:
        if options.output:
            if output.suffix.lower() != ".png":
                raise ValueError(f"expected a name that ends in .png, found {output}")
            check_outputs([output], force=options.force)
        plot(options.run, output)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(output)


if __name__ == "__main__":
    main()
