# SPDX-License-Identifier: Apache-2.0
"""Which images a sweep is over: files and folders given, what cannot be used left out.

An image is known by its pixels: the same pixels under two names are one image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from semlic_jax.evaluation.codecs import reason_of
from semlic_jax.evaluation.results import ImageFacts, Skipped
from semlic_jax.images import read_photograph
from semlic_jax.other_formats import image_suffixes


def list_images(inputs: Sequence[Path]) -> list[Path]:
    """The files named, and the image files in the folders named, sorted in each.

    Folders in those folders are not looked into; `folders_left_out` names them.

    Raises:
      ValueError: there is no such file or folder, or no image file at all.
    """
    suffixes = image_suffixes()
    found: list[Path] = []
    for given in inputs:
        if given.is_dir():
            inside = [p for p in given.iterdir() if p.suffix.lower() in suffixes]
            # A link that leads nowhere is named when it cannot be read.
            found += sorted(
                p for p in inside if p.is_file() or p.is_symlink() and not p.exists()
            )
        elif given.exists():
            found.append(given)
        else:
            raise ValueError(f"{given} does not exist")
    if not found:
        left_out = sum(len(folders_left_out(given)) for given in inputs)
        deeper = f" ({left_out} subfolders are not searched)" if left_out else ""
        raise ValueError(f"no image files in {', '.join(map(str, inputs))}{deeper}")
    return list(dict.fromkeys(found))


def folders_left_out(given: Path) -> list[Path]:
    """The folders in a folder, which `list_images` does not look into, sorted.

    Hidden ones are not told of; a file has none.
    """
    if not given.is_dir():
        return []
    inside = [path for path in given.iterdir() if not path.name.startswith(".")]
    return sorted(path for path in inside if path.is_dir())


def readable_images(
    paths: Sequence[Path],
    background: tuple[int, int, int] | None,
    skipped: list[Skipped],
) -> Iterator[tuple[ImageFacts, np.ndarray]]:
    """Images that can be read, once each, with their pixels, uint8 [H, W, 3].

    Args:
      paths: files.
      background: RGB that transparent pixels are laid on; None: such images are
        skipped.
      skipped: files that cannot be read, or hold the pixels of an earlier one, are
        appended to it.
    """
    seen: dict[str, str] = {}
    names: set[str] = set()
    for path in paths:
        try:
            pixels = read_photograph(path, background=background).pixels
        except (ValueError, OSError, MemoryError) as error:
            skipped.append(Skipped(str(path), reason_of(error)))
            continue
        height, width = pixels.shape[:2]
        digest = hashlib.sha256(f"{height}x{width} ".encode() + pixels.tobytes())
        sha256 = digest.hexdigest()
        if sha256 in seen:
            reason = f"it has the same pixels as {seen[sha256]}"
            skipped.append(Skipped(str(path), reason))
            continue
        # Two folders may hold files of one name, and one of them may be this folder.
        candidates = (path.name, str(path), f"{path.name} {sha256[:12]}")
        name = next(name for name in candidates if name not in names)
        seen[sha256] = name
        names.add(name)
        yield ImageFacts(name, sha256, width, height), pixels
