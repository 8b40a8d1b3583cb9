# SPDX-License-Identifier: Apache-2.0
"""Curves that others have published, as data, each with its source and licence.

Every `.json` file here is one system. A curve belongs to a set of images; where the
pixels of the set are known (`sets.json`), it is put beside results over exactly those
pixels and refused beside any others.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources

from semlic_jax.evaluation.results import Results

_SETS = "sets.json"


@dataclass(frozen=True)
class PublishedCurve:
    """One system over one set of images.

    Attributes:
      name: of the system.
      image_set: name of the set, such as "kodak".
      source: where the numbers stand.
      licence: of the source.
      bpp: bits per pixel, ascending; `bitrate` says how they were counted.
      values: metric to its value at each rate.
      bitrate: how the bits were counted.
    """

    name: str
    image_set: str
    source: str
    licence: str
    bpp: tuple[float, ...]
    values: dict[str, tuple[float, ...]]
    bitrate: str


def published_curves(image_set: str) -> list[PublishedCurve]:
    """The published curves over a set of images, by name.

    Raises:
      ValueError: no curve here is over that set.
    """
    folder = resources.files(__name__)
    found, known = [], set()
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if not file.name.endswith(".json") or file.name == _SETS:
            continue
        system = json.loads(file.read_text())
        for curve in system["curves"]:
            known.add(curve["set"])
            if curve["set"] != image_set:
                continue
            by_column = zip(*curve["points"], strict=True)
            columns = dict(zip(curve["columns"], by_column, strict=True))
            found.append(
                PublishedCurve(
                    name=system["name"],
                    image_set=image_set,
                    source=system["source"],
                    licence=system["licence"],
                    bpp=columns.pop("bpp"),
                    values=columns,
                    bitrate=system["bitrate"],
                )
            )
    if not found:
        raise ValueError(
            f"no published curves over {image_set!r}: expected one of "
            f"{', '.join(sorted(known))}"
        )
    return found


def curves_beside(
    results: Results, image_set: str | None = None
) -> list[PublishedCurve]:
    """The published curves over the images of results.

    Args:
      results: of a sweep.
      image_set: name of the set; None finds it by its pixels, and finds no curves where
        no set is known to have them.

    Raises:
      ValueError: the set of that name has other pixels, or no curve is over it.
    """
    sets = json.loads((resources.files(__name__) / _SETS).read_text())
    ours = results.set_sha256()
    if image_set is None:
        names = [name for name, facts in sets.items() if facts["sha256"] == ours]
        return published_curves(names[0]) if names else []
    curves = published_curves(image_set)
    if image_set in sets and sets[image_set]["sha256"] != ours:
        raise ValueError(
            f"the published curves are over the {sets[image_set]['images']} images of "
            f"{image_set}, these results are over {len(results.images)} others"
        )
    return curves
