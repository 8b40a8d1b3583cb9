# SPDX-License-Identifier: Apache-2.0
"""`semlic demo`: one photograph, one file, and classical codecs at the same bytes.

It needs only the core of the package, so that `make demo` installs little.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from semlic_jax.evaluation.codecs import (
    FAILURES,
    ClassicalCodec,
    Ladder,
    classical_codec,
    reason_of,
)
from semlic_jax.images import (
    Photograph,
    check_outputs,
    encode_image,
    read_photograph,
    write_file,
)

if TYPE_CHECKING:
    from semlic_jax.codec import Codec

RIVALS = ("avif", "webp", "jpeg")

_PHOTOGRAPH = "photograph.png"

# The picture: five columns of a fixed width on a dark background.
_COLUMN_WIDTH = 384
_COLUMN_HEIGHT = 480  # limits upright photographs
_CROP_HEIGHT = 288
_MARGIN = 32
_GAP = 16
_LABEL_HEIGHT = 68
_TITLE_HEIGHT = 84
_GROUND = (18, 20, 24)
_INK = (238, 240, 243)
_FAINT = (150, 156, 166)
_ACCENT = (255, 176, 58)
_WARNING = (255, 120, 110)


@dataclass(frozen=True)
class Candidate:
    """What one codec made of the photograph.

    Attributes:
      name: name of the codec.
      file_bytes: size of the whole file; of the raw pixels for the original.
      image: uint8 [H, W, 3], decoded from the file.
      psnr_db: PSNR against the original; infinite for the original.
      over_budget: whether even the smallest file of the codec, which this is, is too
        large.
      encode_s, decode_s: wall time of one call, including the search for the size.
    """

    name: str
    file_bytes: int
    image: np.ndarray
    psnr_db: float
    over_budget: bool = False
    encode_s: float = 0.0
    decode_s: float = 0.0

    @property
    def bpp(self) -> float:
        height, width = self.image.shape[:2]
        return 8 * self.file_bytes / (height * width)


@dataclass(frozen=True)
class Outputs:
    """The three files of the demo."""

    file: Path
    decoded: Path
    comparison: Path

    @classmethod
    def of(cls, folder: Path, stem: str) -> Outputs:
        return cls(
            folder / f"{stem}.semlic",
            folder / f"{stem}.decoded.png",
            folder / f"{stem}.comparison.png",
        )

    def paths(self) -> tuple[Path, Path, Path]:
        return self.file, self.decoded, self.comparison


def packaged_photograph() -> Photograph:
    """The photograph that comes with the package; see `pretrained/README.md`."""
    source = resources.files("semlic_jax") / "pretrained" / _PHOTOGRAPH
    with source.open("rb") as stream:
        return read_photograph(stream)  # type: ignore[arg-type]


def run_demo(
    codec: Codec,
    photograph: Photograph,
    stem: str,
    folder: Path,
    *,
    bpp: float,
    force: bool = False,
    progress: Callable[[str], None] = lambda text: None,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[Outputs, list[Candidate]]:
    """Write the file, the decoded picture and the comparison.

    Args:
      codec: the loaded model.
      photograph: what to compress.
      stem: stem of the names of the outputs.
      folder: folder for the outputs; created if it is missing.
      bpp: upper bound of the file's rate, in bits per pixel.
      force: whether to replace existing outputs.
      progress: called with a text about what is being done.
      note: called with a text about each rival that is left out, and why.

    Returns:
      The paths, and what each codec made: the original first, then semlic.
    """
    outputs = Outputs.of(folder, stem)
    with _made_folder(folder):
        check_outputs(outputs.paths(), force=force)
        candidates, data = _candidates(codec, photograph, bpp, progress, note)
        progress("drawing the comparison")
        picture = np.asarray(draw_comparison(candidates, stem))
        decoded, icc_profile = candidates[1].image, photograph.icc_profile
        write_file(outputs.file, data, force=force)
        write_file(
            outputs.decoded,
            encode_image(decoded, ".png", icc_profile=icc_profile),
            force=force,
        )
        write_file(
            outputs.comparison,
            encode_image(picture, ".png", icc_profile=icc_profile),
            force=force,
        )
    return outputs, candidates


@contextlib.contextmanager
def _made_folder(folder: Path) -> Iterator[None]:
    """Create a folder; it goes again where the work fails and leaves it empty."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # one is not empty
            for path in made:
                path.rmdir()
        raise


def _candidates(
    codec: Codec,
    photograph: Photograph,
    bpp: float,
    progress: Callable[[str], None],
    note: Callable[[str], None],
) -> tuple[list[Candidate], bytes]:
    """What each codec makes of the photograph, and the file of semlic."""
    original = photograph.pixels
    progress("compressing with semlic")
    start_s = time.perf_counter()
    data = codec.compress(original, bpp=bpp, icc_profile=photograph.icc_profile)
    encode_s = time.perf_counter() - start_s
    start_s = time.perf_counter()
    decoded = codec.decompress(data)
    decode_s = time.perf_counter() - start_s
    candidates = [
        Candidate("original", original.size, original, float("inf")),
        Candidate(
            "semlic",
            len(data),
            decoded,
            psnr_db(original, decoded),
            encode_s=encode_s,
            decode_s=decode_s,
        ),
    ]
    for name in RIVALS:
        progress(f"fitting {name} to {len(data):,} bytes")
        try:
            candidates.append(_rival(classical_codec(name), original, len(data)))
        except FAILURES as error:
            note(f"{name} is left out: {reason_of(error)}")
    return candidates, data


def _rival(codec: ClassicalCodec, original: np.ndarray, max_bytes: int) -> Candidate:
    ladder = Ladder(codec, original)
    start_s = time.perf_counter()
    over_budget = False
    try:
        data = ladder.fit(max_bytes).data
    except ValueError:
        data, over_budget = ladder.encode(codec.settings[0]), True
    encode_s = time.perf_counter() - start_s
    start_s = time.perf_counter()
    image = codec.decode(data)
    decode_s = time.perf_counter() - start_s
    return Candidate(
        codec.name,
        len(data),
        image,
        psnr_db(original, image),
        over_budget,
        encode_s,
        decode_s,
    )


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 images; infinite if they are equal."""
    mse = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float("inf") if mse == 0 else 10 * float(np.log10(255**2 / mse))


def table(candidates: Sequence[Candidate]) -> str:
    """The candidates as lines of text."""
    lines = [
        f"{'codec':<10}{'bytes':>10}{'bpp':>8}{'PSNR':>10}{'encode':>10}{'decode':>10}"
    ]
    for candidate in candidates[1:]:
        lines.append(
            f"{candidate.name:<10}{candidate.file_bytes:>10,} {candidate.bpp:>7.3f}"
            f"{candidate.psnr_db:>7.2f} dB{candidate.encode_s:>8.2f} s"
            f"{candidate.decode_s:>8.2f} s"
            + ("  its smallest file" if candidate.over_budget else "")
        )
    return "\n".join(lines)


def draw_comparison(candidates: Sequence[Candidate], title: str) -> Image.Image:
    """Draw one picture: whole images in a row, and the same detail of each below."""
    height, width = candidates[0].image.shape[:2]
    scale = min(_COLUMN_WIDTH / width, _COLUMN_HEIGHT / height, 1.0)
    small = max(1, round(width * scale)), max(1, round(height * scale))
    crop_width, crop_height = min(width, _COLUMN_WIDTH), min(height, _CROP_HEIGHT)
    left, top = busiest_corner(candidates[0].image, crop_width, crop_height)

    picture_width = (
        2 * _MARGIN + len(candidates) * _COLUMN_WIDTH + (len(candidates) - 1) * _GAP
    )
    first_y = _TITLE_HEIGHT + _LABEL_HEIGHT
    second_y = first_y + small[1] + _GAP
    picture = Image.new(
        "RGB", (picture_width, second_y + crop_height + _MARGIN), _GROUND
    )
    draw = ImageDraw.Draw(picture)
    _draw_title(draw, candidates, title)
    for index, candidate in enumerate(candidates):
        x = _MARGIN + index * (_COLUMN_WIDTH + _GAP)
        _draw_label(draw, x, candidate, is_original=index == 0)
        whole = Image.fromarray(candidate.image).resize(small, Image.Resampling.LANCZOS)
        detail = Image.fromarray(
            candidate.image[top : top + crop_height, left : left + crop_width]
        )
        if index == 0:
            _draw_frame(whole, scale, left, top, crop_width, crop_height)
        picture.paste(whole, (x, first_y))
        picture.paste(detail, (x, second_y))
    return picture


def busiest_corner(image: np.ndarray, width: int, height: int) -> tuple[int, int]:
    """Left and top of the `width` x `height` part with the strongest gradients."""
    grey = image.astype(np.float32).mean(axis=2)
    energy = np.zeros_like(grey)
    energy[:, 1:] += np.abs(np.diff(grey, axis=1))
    energy[1:, :] += np.abs(np.diff(grey, axis=0))
    # Sums over all windows from a summed-area table.
    area = np.zeros((grey.shape[0] + 1, grey.shape[1] + 1))
    area[1:, 1:] = energy.cumsum(axis=0, dtype=np.float64).cumsum(axis=1)
    sums = (
        area[height:, width:]
        - area[:-height, width:]
        - area[height:, :-width]
        + area[:-height, :-width]
    )
    top, left = np.unravel_index(int(sums.argmax()), sums.shape)
    return int(left), int(top)


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _draw_title(
    draw: ImageDraw.ImageDraw, candidates: Sequence[Candidate], title: str
) -> None:
    height, width = candidates[0].image.shape[:2]
    budget = candidates[1]
    title = " ".join(title.split())  # names of files may have line breaks
    draw.text((_MARGIN, 24), title, _INK, font=_font(30))
    draw.text(
        (_MARGIN + draw.textlength(title, font=_font(30)) + 18, 33),
        f"{width} x {height}, every codec at {budget.file_bytes:,} bytes or its "
        f"nearest size below ({budget.bpp:.3f} bits per pixel). "
        "Below: the framed part, pixel for pixel.",
        _FAINT,
        font=_font(20),
    )


def _draw_label(
    draw: ImageDraw.ImageDraw, x: int, candidate: Candidate, *, is_original: bool
) -> None:
    y = _TITLE_HEIGHT
    colour = _ACCENT if candidate.name == "semlic" else _INK
    draw.text((x, y), candidate.name, colour, font=_font(26))
    facts = f"{candidate.file_bytes:,} bytes   {candidate.bpp:.3f} bpp"
    if is_original:
        facts = f"{candidate.file_bytes:,} bytes   24 bpp"
    else:
        facts += f"   {candidate.psnr_db:.2f} dB"
    if candidate.over_budget:
        facts += "   (its smallest)"
    draw.text(
        (x, y + 36),
        facts,
        _WARNING if candidate.over_budget else _FAINT,
        font=_font(18),
    )


def _draw_frame(
    whole: Image.Image, scale: float, left: int, top: int, width: int, height: int
) -> None:
    """Mark where in the photograph the detail is."""
    box = [
        round(scale * left),
        round(scale * top),
        round(scale * (left + width)) - 1,
        round(scale * (top + height)) - 1,
    ]
    if box[2] > box[0] and box[3] > box[1]:
        ImageDraw.Draw(whole).rectangle(box, outline=_ACCENT, width=2)
