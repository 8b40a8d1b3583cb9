# SPDX-License-Identifier: Apache-2.0
"""What a region of interest gains: PSNR inside and outside it, at equal bytes.

    python -m semlic_jax.evaluation.roi_study IMAGES --region auto --refine default

Every image is refined to one rate without a region and then with it, by both variants
of the loss and several weights of the foreground. Goes on where it stopped; writes
`roi.csv`, one row for each file, `roi.md`, the means, and a plot.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import semlic_jax
from semlic_jax.evaluation.image_sets import list_images
from semlic_jax.evaluation.plots import new_figure, require_matplotlib, write_figure
from semlic_jax.evaluation.region_figure import (
    FOREGROUNDS,
    NO_REGION,
    refined_file,
    region_psnr_db,
)
from semlic_jax.evaluation.studies import (
    Progress,
    csv_table,
    run_study,
)
from semlic_jax.evaluation.tables import table
from semlic_jax.images import check_folder, read_photograph, write_file
from semlic_jax.option_kinds import numbers, preset_or_steps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from semlic_jax.refinement import Settings


@dataclass(frozen=True)
class Row:
    """One file.

    Attributes:
      image, variant: names; `NO_REGION` is what gains are against.
      foreground: its weight; the background has the rest.
      bytes: of the file.
      inside_db, outside_db: PSNR by the soft mask.
      inside_gain_db, outside_gain_db: against the file without a region.
    """

    image: str
    variant: str
    foreground: float
    bytes: int
    inside_db: float
    outside_db: float
    inside_gain_db: float
    outside_gain_db: float


def roi_study(
    images: Sequence[Path],
    out: Path,
    *,
    model: str,
    settings: Settings,
    region: str = "auto",
    bpp: float = 0.15,
    foregrounds: Sequence[float] = FOREGROUNDS,
    variants: Sequence[str] = ("L1", "L2"),
    progress: Progress = lambda text: None,
) -> list[Path]:
    """Refines every image without and with a region.

    Args:
      images: files and folders.
      out: folder, new or of an earlier run.
      model: name or path.
      settings: of the refinement.
      region: `auto`, `x,y,width,height`, or a folder of masks named as the images.
      bpp: rate of all files.
      foregrounds: weights of the foreground, 0 to 1; the background has the rest.
      variants: of the loss.
      progress: is told what is being done.

    Returns:
      the table of all files, the table of means, and a plot.

    Raises:
      ValueError: a mask is missing or does not fit, or `out` is a file.
    """
    from semlic_jax import refinement

    require_matplotlib()
    check_folder(out, "for the results")
    progress(f"loading the model {model}")
    codec = semlic_jax.load(model)
    rows: list[Row] = []
    for path in list_images(images):
        pixels = read_photograph(path).pixels
        folder = Path(region)
        given = str(folder / f"{path.stem}.png") if folder.is_dir() else region
        mask = refinement.parse_region(given, pixels)
        regions: list[tuple[str, float, refinement.Region | None]] = [
            (NO_REGION, 0.0, None)
        ]
        regions += [
            (variant, weight, refinement.Region(mask, weight, 1 - weight, variant))
            for variant in variants
            for weight in foregrounds
        ]
        base = (0.0, 0.0)
        for variant, weight, chosen in regions:
            progress(f"{path.name}, {variant} {weight:g}")
            data = refined_file(
                codec, pixels, chosen, out / "files", bpp=bpp, settings=settings
            )
            inside, outside = region_psnr_db(pixels, codec.decompress(data), mask)
            if chosen is None:
                base = inside, outside
            gains = inside - base[0], outside - base[1]
            row = Row(path.name, variant, weight, len(data), inside, outside, *gains)
            rows.append(row)
    header = [field.name for field in fields(Row)]
    paths = [out / "roi.csv", out / "roi.md"]
    write_file(paths[0], csv_table(header, map(astuple, rows)), force=True)
    means = _means(rows)
    lines = table(
        ["variant", "foreground", "inside, dB", "outside, dB", "bytes"],
        [
            [
                variant,
                f"{weight:g}",
                f"{inside:+.2f}",
                f"{outside:+.2f}",
                f"{size:,.0f}",
            ]
            for (variant, weight), (inside, outside, size) in means.items()
        ],
    )
    write_file(paths[1], ("\n".join(lines) + "\n").encode(), force=True)
    return paths + write_figure(_draw(means), out / "roi")


Means = dict[tuple[str, float], tuple[float, float, float]]


def _means(rows: Sequence[Row]) -> Means:
    """Mean gains inside and outside, and bytes, of each variant and weight."""
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.variant, row.foreground), []).append(row)
    return {
        key: (
            float(np.mean([row.inside_gain_db for row in group])),
            float(np.mean([row.outside_gain_db for row in group])),
            float(np.mean([row.bytes for row in group])),
        )
        for key, group in groups.items()
    }


def _draw(means: Means) -> Figure:
    figure = new_figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for variant, colour, marker in (("L1", "#D55E00", "o"), ("L2", "#0072B2", "s")):
        found = [(weight, m) for (name, weight), m in means.items() if name == variant]
        axes.plot(
            [m[1] for _, m in found],
            [m[0] for _, m in found],
            color=colour,
            marker=marker,
            label=variant,
        )
        for weight, m in found:
            axes.annotate(
                f"{weight:g}", (m[1], m[0]), (5, 5), textcoords="offset points"
            )
    axes.axhline(0, color="#6B6B6B", linewidth=0.8)
    axes.axvline(0, color="#6B6B6B", linewidth=0.8)
    axes.set_xlabel("gain outside the region (dB)")
    axes.set_ylabel("gain inside the region (dB)")
    axes.legend(frameon=False)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study; returns the exit status, 1 for a refusal."""
    from semlic_jax import refinement

    parser = argparse.ArgumentParser(
        prog="python -m semlic_jax.evaluation.roi_study",
        description="Measure what a region of interest gains inside and loses outside.",
    )
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("roi_study"))
    parser.add_argument("--model", default="small")
    parser.add_argument("--refine", type=preset_or_steps, default="default")
    parser.add_argument("--gamma", type=float)
    parser.add_argument("--weights", type=Path, help="folder of feature weights")
    parser.add_argument("--region", default="auto")
    parser.add_argument("--bpp", type=float, default=0.15)
    parser.add_argument("--foregrounds", type=numbers, default=list(FOREGROUNDS))
    parser.add_argument("--variants", default="L1,L2")
    options = parser.parse_args(argv)
    features = None if options.weights is None else os.fspath(options.weights)

    def work(progress: Progress) -> list[Path]:
        return roi_study(
            options.images,
            options.out,
            model=options.model,
            settings=refinement.preset(
                options.refine, gamma=options.gamma, features=features
            ),
            region=options.region,
            bpp=options.bpp,
            foregrounds=options.foregrounds,
            variants=options.variants.split(","),
            progress=progress,
        )

    return run_study("roi_study", work, shown=["roi.md"])


if __name__ == "__main__":
    sys.exit(main())
