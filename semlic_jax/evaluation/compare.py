# SPDX-License-Identifier: Apache-2.0
"""`semlic compare`: one page with one photograph by several codecs at equal bytes.

The page is one HTML file with everything inside: pictures, files, numbers, script. It
loads nothing from the network, which its content security policy enforces.
"""

from __future__ import annotations

import base64
import html
import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import numpy as np
from PIL import Image

from semlic_jax.evaluation.bit_allocation import bits_per_block
from semlic_jax.evaluation.codecs import FAILURES, reason_of
from semlic_jax.evaluation.entrants import (
    Encoded,
    Entrant,
    RefinedEntrant,
    SemlicEntrant,
    TooSmallError,
)
from semlic_jax.evaluation.measures import Measures
from semlic_jax.evaluation.tables import number

_TEMPLATE = "compare.html"
_LARGEST_WEBP_SIDE = 16383


@dataclass(frozen=True)
class Shown:
    """What the page shows of one codec.

    Attributes:
      key, label, suffix: those of the codec.
      data: its file; empty if there is none.
      image: uint8 [H, W, 3] decoded from it, or None.
      encode_s, decode_s: wall time of one call.
      values: metric to its value.
      gaps: "file" or metric to the reason why there is none.
      bits: bits per block of 16 x 16 pixels, float64 [h, w], or None.
      note: where the file is far below the rate, how large it can get.
    """

    key: str
    label: str
    suffix: str
    data: bytes = b""
    image: np.ndarray | None = None
    encode_s: float = 0.0
    decode_s: float = 0.0
    values: dict[str, float] = field(default_factory=dict)
    gaps: dict[str, str] = field(default_factory=dict)
    bits: np.ndarray | None = None
    note: str = ""


def compare(
    pixels: np.ndarray,
    entrants: Sequence[Entrant],
    bpp: float,
    measures: Measures,
    *,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Shown]:
    """Fit every codec to the bytes of the first one's file.

    Args:
      pixels: uint8 [H, W, 3].
      entrants: codecs; the first that makes a file is fitted to the rate, the others to
        the size of its file.
      bpp: the rate in bits per pixel, an upper bound.
      measures: metrics of images.
      progress: called with a text about what is being done.

    Raises:
      ValueError: no codec reaches the rate; says why the first does not.
    """
    height, width = pixels.shape[:2]
    names = list(measures.image_metrics)
    shown: list[Shown] = []
    rate = bpp
    for entrant in entrants:
        progress(f"fitting {entrant.label}")
        facts: dict[str, Any] = {
            "key": entrant.key,
            "label": entrant.label,
            "suffix": entrant.suffix,
        }
        try:
            encoded, note = _nearest(entrant, pixels, rate)
            start_s = time.perf_counter()
            image = entrant.decode(encoded.data)
            decode_s = time.perf_counter() - start_s
            bits = None
            if isinstance(entrant, SemlicEntrant | RefinedEntrant):
                bits = bits_per_block(entrant.codec, encoded.data)
        except FAILURES as error:
            shown.append(Shown(**facts, gaps={"file": reason_of(error)}))
            continue
        progress(f"measuring {entrant.label}")
        values, gaps, failed = measures.measure(pixels, image, names)
        if not any(each.data for each in shown):
            # Slightly more than the file takes, so that rounding loses no byte.
            rate = 8 * len(encoded.data) / (height * width) * (1 + 1e-12)
        shown.append(
            Shown(
                **facts,
                data=encoded.data,
                image=image,
                encode_s=encoded.encode_s,
                decode_s=decode_s,
                values=values,
                gaps=gaps | failed,
                bits=bits,
                note=note,
            )
        )
    if not any(each.data for each in shown):
        first = shown[0]
        raise ValueError(
            f"no codec reaches {bpp:g} bpp on this image; {first.label}: "
            f"{first.gaps['file']}"
        )
    return shown


def _nearest(entrant: Entrant, pixels: np.ndarray, rate: float) -> tuple[Encoded, str]:
    """The best file of at most this rate; a note if the codec's files end far below."""
    try:
        return entrant.fitter(pixels)(rate), ""
    except TooSmallError as error:
        return error.encoded, f"{error}, less than {rate:.3f} bpp"


def page(
    title: str,
    pixels: np.ndarray,
    shown: Sequence[Shown],
    measures: Measures,
    *,
    icc_profile: bytes | None = None,
) -> str:
    """The whole page as HTML.

    Args:
      title: title of the photograph.
      pixels: uint8 [H, W, 3], the original.
      shown: from `compare`.
      measures: those that `shown` was measured with.
      icc_profile: profile of the photograph, which the pictures in the page carry too.
    """
    height, width = pixels.shape[:2]
    first = next(each for each in shown if each.data)
    metrics = measures.image_metrics
    best = {}
    for name, facts in metrics.items():
        values = [each.values[name] for each in shown if name in each.values]
        if len(values) > 1:
            best[name] = max(values) if facts.higher_is_better else min(values)
    data = {
        "title": title,
        "width": width,
        "height": height,
        "bytes": len(first.data),
        "bpp": number(8 * len(first.data) / (height * width)),
        "original": _picture(pixels, icc_profile),
        "metrics": [
            {
                "name": name,
                "label": facts.label,
                "better": "higher" if facts.higher_is_better else "lower",
            }
            for name, facts in metrics.items()
        ],
        "codecs": [
            _codec_data(title, each, (height, width), best, icc_profile)
            for each in shown
        ],
    }
    # "</script>" inside the data would end the script.
    inside = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    template = (resources.files(__package__) / _TEMPLATE).read_text(encoding="utf-8")
    heading = html.escape(f"{title}, {len(first.data):,} bytes")
    before, _, after = template.partition("__DATA__")
    return before.replace("__TITLE__", heading) + inside + after


def _codec_data(
    title: str,
    each: Shown,
    size: tuple[int, int],
    best: dict[str, float],
    icc_profile: bytes | None,
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "key": each.key,
        "label": each.label,
        "gaps": each.gaps,
        "values": {
            name: {"text": number(value), "best": value == best.get(name)}
            for name, value in each.values.items()
        },
    }
    if each.image is None:
        return found
    file = base64.b64encode(each.data).decode()
    found |= {
        "bytes": len(each.data),
        "bpp": number(8 * len(each.data) / (size[0] * size[1])),
        "encode": f"{each.encode_s:.2f} s",
        "decode": f"{each.decode_s:.2f} s",
        "picture": _picture(each.image, icc_profile),
        "file": f"data:application/octet-stream;base64,{file}",
        "name": f"{title}{each.suffix}",
    }
    if each.bits is not None:
        found["bits"] = {
            "rows": each.bits.shape[0],
            "columns": each.bits.shape[1],
            "values": [round(float(value), 1) for value in each.bits.ravel()],
        }
    return found


def _picture(pixels: np.ndarray, icc_profile: bytes | None) -> str:
    """A lossless picture as a data URL: WebP, or PNG if it is too large for WebP."""
    stream = io.BytesIO()
    options: dict[str, Any] = {"icc_profile": icc_profile} if icc_profile else {}
    if max(pixels.shape[:2]) <= _LARGEST_WEBP_SIDE:
        kind = "webp"
        options |= {"lossless": True, "quality": 60, "method": 4, "exact": True}
    else:
        kind = "png"
    Image.fromarray(pixels).save(stream, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def table(shown: Sequence[Shown], measures: Measures) -> str:
    """The page's numbers as text."""
    metrics = measures.image_metrics
    lines = [
        f"{'codec':<22}{'bytes':>9}  " + "  ".join(f.label for f in metrics.values())
    ]
    for each in shown:
        if not each.data:
            lines.append(f"{each.label:<22}{'-':>9}  {each.gaps['file']}")
            continue
        cells = [
            number(each.values[name]) if name in each.values else "-"
            for name in metrics
        ]
        padded = [
            cell.rjust(len(facts.label))
            for cell, facts in zip(cells, metrics.values(), strict=True)
        ]
        lines.append(f"{each.label:<22}{len(each.data):>9,}  " + "  ".join(padded))
    return "\n".join(lines)
