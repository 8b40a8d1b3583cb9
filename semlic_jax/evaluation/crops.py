# SPDX-License-Identifier: Apache-2.0
"""The same details of photographs as several codecs show them, at equal rates.

    python -m semlic_jax.evaluation.crops face.png:200,40,192,192 sky.jpg:0,0,192,192 \\
        --codecs avif,semlic,semlic+refine:default --bpp 0.15 --out crops.png

The picture has a row for each detail, the original first, at its full resolution. Each
photograph is coded as a whole: the rate above a detail is that of the whole file, the
PSNR that of the detail.
"""

from __future__ import annotations

import argparse
import math
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from semlic_jax.evaluation.demo import psnr_db
from semlic_jax.evaluation.entrants import Entrant, entrants
from semlic_jax.evaluation.studies import Progress, run_study
from semlic_jax.evaluation.sweep import check_rates
from semlic_jax.images import (
    check_outputs,
    check_suffix,
    encode_image,
    read_photograph,
    write_file,
)

_CODECS = "avif,semlic,semlic+refine:default"
_MARGIN = 12
_GAP = 8
_LABEL_HEIGHT = 40
_GROUND = (18, 20, 24)
_INK = (238, 240, 243)
_FAINT = (150, 156, 166)


@dataclass(frozen=True)
class Detail:
    """A part of a photograph: `path`, and left, top, width and height in pixels."""

    path: Path
    left: int
    top: int
    width: int
    height: int

    @classmethod
    def parse(cls, text: str) -> Detail:
        """Parse `PATH:x,y,width,height`.

        Raises:
          ValueError: the text has another form.
        """
        path, _, box = text.rpartition(":")
        try:
            left, top, width, height = (int(number) for number in box.split(","))
        except ValueError:
            path = ""
        if not path or min(left, top) < 0 or min(width, height) < 1:
            raise ValueError(f"expected PHOTO:x,y,width,height, found {text!r}")
        return cls(Path(path), left, top, width, height)

    def of(self, image: np.ndarray) -> np.ndarray:
        """Cut this part out of an image [H, W, 3].

        Raises:
          ValueError: the part reaches beyond the image.
        """
        bottom, right = self.top + self.height, self.left + self.width
        if bottom > image.shape[0] or right > image.shape[1]:
            raise ValueError(
                f"expected a part inside {self.path.name}, {image.shape[1]} x "
                f"{image.shape[0]}, found one that extends to {right}, {bottom}"
            )
        return image[self.top : bottom, self.left : right]


@dataclass(frozen=True)
class _Cell:
    image: np.ndarray | None
    title: str
    facts: str


def crops(
    details: Sequence[Detail],
    out: Path,
    *,
    codecs: Sequence[str] = tuple(_CODECS.split(",")),
    bpp: float = 0.15,
    model: str = "small",
    force: bool = False,
    progress: Progress = lambda text: None,
) -> list[Path]:
    """Write the picture.

    Args:
      details: the details to show.
      out: path of the picture, .png, .jpg or .webp.
      codecs: names as in `entrants.py`.
      bpp: upper bound of the rate of whole files, in bits per pixel.
      model: name or path of the model of codecs that name none.
      force: whether to replace an existing picture.
      progress: called with a text about what is being done.

    Returns:
      the picture's path.

    Raises:
      ValueError: a photograph cannot be read, a detail is not inside it, a codec is
        unknown or unavailable, the rate is out of range, or `out` exists or is of a
        kind that cannot be written.
    """
    check_rates([bpp])
    check_outputs([out], force=force)
    check_suffix(out.suffix)
    photographs = {d.path: read_photograph(d.path).pixels for d in details}
    for detail in details:
        detail.of(photographs[detail.path])
    contestants = entrants(codecs, model=model)
    shown: dict[tuple[Path, str], tuple[np.ndarray | None, str]] = {}
    for path, pixels in photographs.items():
        for entrant in contestants:
            progress(f"{path.name}, {entrant.label}")
            shown[path, entrant.key] = _decoded(entrant, pixels, bpp)
    rows = []
    for detail in details:
        part = detail.of(photographs[detail.path])
        row = [_Cell(part, "original", detail.path.name)]
        for entrant in contestants:
            image, facts = shown[detail.path, entrant.key]
            made = None if image is None else detail.of(image)
            if made is not None:
                facts += f", {psnr_db(part, made):.2f} dB"
            row.append(_Cell(made, entrant.label, facts))
        rows.append(row)
    picture = np.asarray(_draw(rows))
    write_file(out, encode_image(picture, out.suffix), force=force)
    return [out]


def _decoded(
    entrant: Entrant, pixels: np.ndarray, bpp: float
) -> tuple[np.ndarray | None, str]:
    """The image in a codec's file, and its rate; or None, and why there is no file."""
    try:
        data = entrant.fitter(pixels)(bpp).data
    except ValueError as error:
        return None, " ".join(str(error).split())
    rate = 8 * len(data) / (pixels.shape[0] * pixels.shape[1])
    return entrant.decode(data), f"{len(data):,} bytes, {rate:.3f} bpp"


def _draw(rows: Sequence[Sequence[_Cell]]) -> Image.Image:
    originals = [row[0].image for row in rows]
    heights = [image.shape[0] for image in originals if image is not None]
    column = max(image.shape[1] for image in originals if image is not None)
    small = ImageFont.load_default(11)
    texts = [cell.facts for row in rows for cell in row if cell.image is not None]
    column = max(column, *(math.ceil(small.getlength(text)) for text in texts))
    columns = len(rows[0])
    width = 2 * _MARGIN + columns * column + (columns - 1) * _GAP
    height = 2 * _MARGIN + sum(heights) + len(rows) * _LABEL_HEIGHT
    picture = Image.new("RGB", (width, height), _GROUND)
    draw = ImageDraw.Draw(picture)
    y = _MARGIN
    for row, row_height in zip(rows, heights, strict=True):
        for index, cell in enumerate(row):
            x = _MARGIN + index * (column + _GAP)
            draw.text((x, y), cell.title, _INK, font=ImageFont.load_default(14))
            if cell.image is not None:
                draw.text((x, y + 18), cell.facts, _FAINT, font=small)
                picture.paste(Image.fromarray(cell.image), (x, y + _LABEL_HEIGHT - 4))
            else:  # the reason, in place of the picture
                lines = textwrap.fill(cell.facts, max(column // 7, 8))
                draw.text((x, y + 18), lines, _FAINT, font=small)
        y += row_height + _LABEL_HEIGHT
    return picture


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the picture; return the exit status, 1 for a refusal."""
    parser = argparse.ArgumentParser(
        prog="python -m semlic_jax.evaluation.crops",
        description="Draw details of photographs as several codecs show them.",
    )
    parser.add_argument("details", nargs="+", metavar="PHOTO:x,y,width,height")
    parser.add_argument("--codecs", default=_CODECS)
    parser.add_argument("--bpp", type=float, default=0.15)
    parser.add_argument("--model", default="small")
    parser.add_argument("--out", type=Path, default=Path("crops.png"))
    parser.add_argument(
        "--force", action="store_true", help="replace an existing picture"
    )
    options = parser.parse_args(argv)

    def work(progress: Progress) -> list[Path]:
        return crops(
            [Detail.parse(text) for text in options.details],
            options.out,
            codecs=options.codecs.split(","),
            bpp=options.bpp,
            model=options.model,
            force=options.force,
            progress=progress,
        )

    return run_study("crops", work)


if __name__ == "__main__":
    sys.exit(main())
