# SPDX-License-Identifier: Apache-2.0
"""The results of a sweep: one row per image, codec and rate; as CSV and JSON.

JSON holds everything and can be read back; CSV is for spreadsheets. A missing number
has a reason in its place (`gaps`), never a zero. This module imports only the standard
library, so that tables and plots can be made where no codec is installed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RESULTS_VERSION = 1

# Columns of every row, before those of the metrics.
_ROW_COLUMNS = (
    "image",
    "width",
    "height",
    "codec",
    "target_bpp",
    "bpp",
    "file_bytes",
    "setting",
    "encode_s",
    "decode_s",
)


def rate_text(rate: float) -> str:
    """Bits per pixel as text: short, but different for different rates."""
    text = f"{rate:g}"
    return text if float(text) == rate else repr(float(rate))


@dataclass(frozen=True)
class ImageFacts:
    """One image of a set.

    Attributes:
      name: name of its file.
      sha256: hash of its shape and pixels, by which a set is known whatever the names
        of its files.
      width, height: in pixels.
    """

    name: str
    sha256: str
    width: int
    height: int


@dataclass(frozen=True)
class Skipped:
    """A file that was given but not used."""

    name: str
    reason: str


@dataclass(frozen=True)
class CodecFacts:
    """What a codec is called, and what exactly made its files."""

    label: str
    identity: str


@dataclass(frozen=True)
class MetricFacts:
    """What a metric is called, and which direction is better."""

    label: str
    higher_is_better: bool


@dataclass(frozen=True)
class Row:
    """One image by one codec at one rate.

    Attributes:
      image: its name, as in `Results.images`.
      codec: its key, as in `Results.codecs`.
      target_bpp: the rate that was asked for; the file's is at most that.
      bpp: file bytes * 8 / (width * height); None if there is no file.
      file_bytes: size of the whole file.
      setting: the codec's setting, as the codec itself states it.
      encode_s, decode_s: wall time of one call, under the load of the sweep.
      values: metric to its value.
      gaps: "file" or metric to the reason why there is none.
    """

    image: str
    codec: str
    target_bpp: float
    bpp: float | None = None
    file_bytes: int | None = None
    setting: str | None = None
    encode_s: float | None = None
    decode_s: float | None = None
    values: dict[str, float] = field(default_factory=dict)
    gaps: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SetRow:
    """One codec at one rate over the whole set.

    Attributes:
      codec, target_bpp: as in `Row`.
      bpp: mean over the images that are compared, those that hold a patch; None if one
        of them has no file, or none is compared.
      values: metric of the set to its value.
      patches: number of patches on each side of the comparison.
      gaps: metric to the reason why there is none.
    """

    codec: str
    target_bpp: float
    bpp: float | None = None
    values: dict[str, float] = field(default_factory=dict)
    patches: int = 0
    gaps: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """Everything that a sweep found.

    Attributes:
      images: the set, in order.
      skipped: files that were given and not used.
      codecs: key to facts, in the order of tables.
      image_metrics, set_metrics: name to facts, in the order of tables.
      rows: see `Row`; ordered by image, codec, rate.
      set_rows: see `SetRow`.
      notes: sentences that a reader of the numbers should know.
    """

    images: tuple[ImageFacts, ...]
    skipped: tuple[Skipped, ...]
    codecs: dict[str, CodecFacts]
    image_metrics: dict[str, MetricFacts]
    set_metrics: dict[str, MetricFacts]
    rows: tuple[Row, ...]
    set_rows: tuple[SetRow, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def metrics(self) -> dict[str, MetricFacts]:
        """The metrics of images and of the set."""
        return {**self.image_metrics, **self.set_metrics}

    def targets(self) -> list[float]:
        """The rates that were asked for, ascending."""
        return sorted({row.target_bpp for row in self.rows})

    def set_sha256(self) -> str:
        """Hash of the set of images: the same for the same pixels in any order."""
        return set_sha256(image.sha256 for image in self.images)

    def to_json(self) -> str:
        """Everything as JSON; `read_results` reads it back."""
        return json.dumps({"version": RESULTS_VERSION, **asdict(self)}, indent=1)

    def to_csv(self) -> str:
        """The rows as CSV, one line each, with gaps in the last column."""
        names = list(self.image_metrics)
        sizes = {image.name: image for image in self.images}
        stream = io.StringIO()
        table = csv.writer(stream, lineterminator="\n")
        table.writerow([*_ROW_COLUMNS, *names, "gaps"])
        for row in self.rows:
            size = sizes[row.image]
            facts = {**asdict(row), "width": size.width, "height": size.height}
            table.writerow(
                [
                    *("" if facts[c] is None else facts[c] for c in _ROW_COLUMNS),
                    *(row.values.get(name, "") for name in names),
                    "; ".join(f"{name}: {why}" for name, why in row.gaps.items()),
                ]
            )
        return stream.getvalue()

    def set_csv(self) -> str:
        """The metrics of the set as CSV, one line per codec and rate."""
        names = list(self.set_metrics)
        stream = io.StringIO()
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(["codec", "target_bpp", "bpp", "patches", *names, "gaps"])
        for row in self.set_rows:
            table.writerow(
                [
                    row.codec,
                    row.target_bpp,
                    "" if row.bpp is None else row.bpp,
                    row.patches,
                    *(row.values.get(name, "") for name in names),
                    "; ".join(f"{name}: {why}" for name, why in row.gaps.items()),
                ]
            )
        return stream.getvalue()


def set_sha256(images: Iterable[str]) -> str:
    """Hash of a set of images, from the hashes of its members in any order."""
    return hashlib.sha256("\n".join(sorted(images)).encode()).hexdigest()


def read_results(path: str | Path) -> Results:
    """Read the `results.json` of a sweep, given its path or that of its folder.

    Raises:
      ValueError: the file is not one, or was written by another version.
      OSError: the file cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "results.json"
    try:
        found = json.loads(path.read_text())
        version = found.pop("version")
        if version != RESULTS_VERSION:
            raise ValueError(
                f"expected version {RESULTS_VERSION} of {path}, found {version}: run "
                "the evaluation again"
            )
        return Results(
            images=_tuple_of(ImageFacts, found["images"]),
            skipped=_tuple_of(Skipped, found["skipped"]),
            codecs={k: CodecFacts(**v) for k, v in found["codecs"].items()},
            image_metrics={
                k: MetricFacts(**v) for k, v in found["image_metrics"].items()
            },
            set_metrics={k: MetricFacts(**v) for k, v in found["set_metrics"].items()},
            rows=_tuple_of(Row, found["rows"]),
            set_rows=_tuple_of(SetRow, found["set_rows"]),
            notes=tuple(found["notes"]),
        )
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{path} is not the results.json of an evaluation") from None


def _tuple_of(kind: Any, records: Sequence[dict[str, Any]]) -> tuple[Any, ...]:
    return tuple(kind(**record) for record in records)


def merge(parts: Sequence[Results]) -> Results:
    """Merge the results of several sweeps over the same set of images.

    Raises:
      ValueError: the sets of images differ, or a codec is in two of the results.
    """
    if not parts:
        raise ValueError("expected results to merge, found none")
    first = parts[0]
    codecs: dict[str, CodecFacts] = {}
    for part in parts:
        require_same_images(first, part)
        twice = sorted(set(codecs) & set(part.codecs))
        if twice:
            raise ValueError(f"the codec {twice[0]} is in more than one of the results")
        codecs.update(part.codecs)
    # Images may have other names in another folder: rows take those of the first part.
    names = {image.sha256: image.name for image in first.images}
    rows: list[Row] = []
    for part in parts:
        known = {image.name: names[image.sha256] for image in part.images}
        rows += [Row(**{**asdict(r), "image": known[r.image]}) for r in part.rows]
    return Results(
        images=first.images,
        skipped=tuple(dict.fromkeys(s for part in parts for s in part.skipped)),
        codecs=codecs,
        image_metrics={k: v for p in parts for k, v in p.image_metrics.items()},
        set_metrics={k: v for p in parts for k, v in p.set_metrics.items()},
        rows=tuple(rows),
        set_rows=tuple(row for part in parts for row in part.set_rows),
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )


def require_same_images(a: Results, b: Results) -> None:
    """Raise ValueError if two results are over different sets of images."""
    odd = {i.sha256: i.name for i in a.images}
    for image in b.images:
        if odd.pop(image.sha256, None) is None:
            odd[image.sha256] = image.name
    if odd:
        raise ValueError(
            f"the results are over different images ({len(a.images)} and "
            f"{len(b.images)}; {next(iter(odd.values()))} is in only one): they cannot "
            "be compared"
        )
