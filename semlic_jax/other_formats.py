# SPDX-License-Identifier: Apache-2.0
"""Formats that Pillow reads by another package: HEIC, as phones store it, and JPEG XL.

A package is imported when a file needs it. What its import or its registration adds to
Pillow stays, as with any plugin of Pillow.

May import Pillow and those packages, and nothing of this package.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

_HEAD_BYTES = 16


@dataclass(frozen=True)
class _Format:
    """A format that a package adds to Pillow.

    Attributes:
      kind: as people call its files.
      package: its name for pip.
      module: what is imported.
      register: the function of the module to call then; "" where the import is enough.
      suffixes: of its files.
      brands: its files start with a box `ftyp` of one of these, or
      magic: with one of these.
    """

    kind: str
    package: str
    module: str
    register: str
    suffixes: frozenset[str]
    brands: tuple[bytes, ...] = ()
    magic: tuple[bytes, ...] = ()

    def starts(self, head: bytes) -> bool:
        """Whether a file of this format can start like that."""
        branded = head[4:8] == b"ftyp" and head[8:12] in self.brands
        return branded or head.startswith(self.magic)

    def add(self) -> bool:
        """Add it to Pillow if its package is installed; whether it is."""
        try:
            module = importlib.import_module(self.module)
        except ImportError:
            return False
        if self.register:
            getattr(module, self.register)()
        return True


_FORMATS = (
    _Format(
        kind="a HEIC file",
        package="pillow-heif",
        module="pillow_heif",
        register="register_heif_opener",
        suffixes=frozenset((".heic", ".heics", ".heif", ".heifs", ".hif")),
        brands=tuple(b"heic heix heim heis hevc hevx hevm hevs mif1 msf1".split()),
    ),
    _Format(
        kind="a JPEG XL file",
        package="pillow-jxl-plugin",
        module="pillow_jxl",
        register="",
        suffixes=frozenset((".jxl",)),
        magic=(b"\xff\x0a", b"\x00\x00\x00\x0cJXL \r\n\x87\n"),
    ),
)


OTHER_SUFFIXES = frozenset().union(*(each.suffixes for each in _FORMATS))


def image_suffixes() -> frozenset[str]:
    """Suffixes of image files, in small letters; some need a package to be read."""
    return OTHER_SUFFIXES.union(Image.registered_extensions())


def add_format_of(source: str | os.PathLike | BinaryIO) -> str | None:
    """Add the format of a file to Pillow, if it is one of another package.

    Args:
      source: a path or a binary file, which is left where it was.

    Returns:
      What the file is and what to install, for people, where its package is missing.
      None otherwise, or where nobody can look into the file without taking from it.
    """
    head = _head(source)
    for each in _FORMATS:
        known = head is not None and each.starts(head)
        if (known or head is None) and not each.add() and known:
            return (
                f"{each.kind}, which takes another package: pip install {each.package}"
            )
    return None


def _head(source: Any) -> bytes | None:
    """The first bytes of a file; None of a pipe, and of what cannot be opened."""
    try:
        if isinstance(source, str | os.PathLike):
            if not os.path.isfile(source):
                return None
            with Path(source).open("rb") as stream:
                return stream.read(_HEAD_BYTES)
        place = source.tell()
        source.seek(0)  # where Pillow starts, too
        head = source.read(_HEAD_BYTES)
        source.seek(place)
    except (OSError, AttributeError, ValueError):
        return None
    return head
