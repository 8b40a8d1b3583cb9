# SPDX-License-Identifier: Apache-2.0
"""Figure 6 of the paper: one photograph refined with a region of interest.

`roi_study` makes a table of the same over many photographs.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import semlic_jax
from semlic_jax.evaluation.entrants import refinement_identity
from semlic_jax.evaluation.plots import new_figure, require_matplotlib, write_figure
from semlic_jax.evaluation.studies import Progress, csv_table
from semlic_jax.images import check_folder, read_photograph, write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from semlic_jax.codec import Codec
    from semlic_jax.refinement import Region, Settings

# The weight of the foreground; that of the background is the rest.
FOREGROUNDS = (0.5, 0.8, 0.95)

NO_REGION = "refined, no region"


def figure6(
    image: Path,
    model: str,
    out: Path,
    *,
    region: str = "auto",
    bpp: float = 0.15,
    refine: str | int = "default",
    foregrounds: Sequence[float] = FOREGROUNDS,
    features: str | Path | None = None,
    progress: Progress = lambda text: None,
) -> list[Path]:
    """Refinement with a region of interest, by both variants and several weights.

    Args:
      image: file.
      model: name or path.
      out: folder.
      region: `auto`, `x,y,width,height` or the file of a mask.
      bpp: rate of all files.
      refine: preset or steps.
      foregrounds: weights of the foreground, 0 to 1; the background has the rest.
      features: folder of feature weights; None: as the preset has them.
      progress: is told what is being done.

    Returns:
      the picture as PNG and SVG, and its numbers.

    Raises:
      ValueError: a weight is out of range, the mask does not fit, or `out` is a file.
    """
    from semlic_jax import refinement

    require_matplotlib()
    check_folder(out, "for the results")
    for weight in foregrounds:
        if not 0 <= weight <= 1:
            raise ValueError(
                f"expected foreground weights from 0 to 1, found {weight:g}"
            )
    pixels = read_photograph(image).pixels
    mask = refinement.parse_region(region, pixels)
    progress(f"loading the model {model}")
    codec = semlic_jax.load(model)
    settings = refinement.preset(refine)
    if features is not None:
        settings = replace(settings, features=os.fspath(features))
    plain = codec.compress(pixels, bpp=bpp)
    shown = {"not refined": (plain, codec.decompress(plain))}
    regions: dict[str, refinement.Region | None] = {NO_REGION: None}
    for variant in ("L1", "L2"):
        for weight in foregrounds:
            chosen = refinement.Region(mask, weight, 1 - weight, variant)
            regions[f"{variant}, foreground {weight:g}"] = chosen
    for name, weighted in regions.items():
        progress(f"refining {name}")
        data = refined_file(
            codec, pixels, weighted, out / "figure6", bpp=bpp, settings=settings
        )
        shown[name] = data, codec.decompress(data)
    rows = [
        (name, len(data), *region_psnr_db(pixels, decoded, mask))
        for name, (data, decoded) in shown.items()
    ]
    header = ["variant", "bytes", "foreground_psnr_db", "background_psnr_db"]
    write_file(out / "figure6.csv", csv_table(header, rows), force=True)
    pictures = {name: decoded for name, (_, decoded) in shown.items()}
    figure = _draw_figure6(pixels, mask, pictures, rows, len(foregrounds))
    return write_figure(figure, out / "figure6") + [out / "figure6.csv"]


def refined_file(
    codec: Codec,
    pixels: np.ndarray,
    region: Region | None,
    folder: Path,
    *,
    bpp: float,
    settings: Settings,
) -> bytes:
    """A refined file, kept in a folder; made once for all that it depends on.

    Args:
      codec: the model.
      pixels: uint8 [H, W, 3].
      region: what matters, or None.
      folder: of the kept files.
      bpp: rate of the file.
      settings: of the refinement.
    """
    identity = refinement_identity(codec, settings)
    digest = hashlib.sha256(f"{identity} {bpp:g}".encode())
    digest.update(pixels.tobytes())
    if region is not None:
        text = f"{region.variant} {region.foreground!r} {region.background!r}"
        digest.update(text.encode() + region.mask.tobytes())
    path = folder / f"{digest.hexdigest()[:32]}.semlic"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        data = codec.compress(pixels, bpp=bpp, refine=settings, roi=region)
        write_file(path, data, force=True)
    return path.read_bytes()


def region_psnr_db(
    original: np.ndarray, decoded: np.ndarray, mask: np.ndarray
) -> tuple[float, float]:
    """PSNR over the foreground and over the background, by a soft mask."""
    error = (original.astype(np.float64) - decoded) ** 2
    found = []
    for weights in (mask, 1 - mask):
        mse = np.average(error.mean(axis=2), weights=np.maximum(weights, 1e-9))
        found.append(10 * float(np.log10(255**2 / max(mse, 1e-9))))
    return found[0], found[1]


def _draw_figure6(
    original: np.ndarray,
    mask: np.ndarray,
    pictures: dict[str, np.ndarray],
    rows: Sequence[tuple[str, int, float, float]],
    columns: int,
) -> Figure:
    """First column: original and mask; then a row for each variant of the loss."""
    height, width = original.shape[:2]
    side = 3.4
    wide = columns + 2
    size = (side * wide, 2 * (side * height / width + 0.55))
    figure = new_figure(figsize=size, layout="constrained")
    names = list(pictures)
    captions = {
        name: f"{name}\n{size_bytes:,} bytes, {fg:.2f} dB inside, {bg:.2f} dB outside"
        for name, size_bytes, fg, bg in rows
    }
    cells: list[tuple[int, np.ndarray, str]] = [
        (0, original, "original"),
        (wide, np.repeat(mask[..., None], 3, axis=2), "region"),
        (1, pictures[names[0]], captions[names[0]]),
        (wide + 1, pictures[NO_REGION], captions[NO_REGION]),
    ]
    for index, name in enumerate(names[2:]):
        row, column = divmod(index, columns)
        cells.append((row * wide + column + 2, pictures[name], captions[name]))
    for place, picture, caption in cells:
        axes = figure.add_subplot(2, wide, place + 1)
        axes.imshow(picture, interpolation="lanczos", vmin=0, vmax=1)
        axes.set_title(caption, fontsize=8)
        axes.set_axis_off()
    return figure
