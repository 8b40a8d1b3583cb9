# SPDX-License-Identifier: Apache-2.0
"""Read .npz files from anywhere: whatever the file is, it stays in bounds.

NumPy's own reader allocates what the header of an array claims, unpacks as much as an
entry holds and takes entries of any kind. Imports numpy only.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

MAX_FILE_BYTES = 2**31  # of all arrays together, unpacked
# Arrays may also take at most MAX_EXPANSION times the size of the file, plus
# ALLOWED_BYTES. Trained parameters hardly compress; a file made to exhaust memory does.
MAX_EXPANSION = 16
ALLOWED_BYTES = 2**24
MAX_ENTRIES = 2**14


def read_arrays_file(
    source: Path | bytes, dtypes: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name, read-only.

    Args:
        source: the file, or its content.
        dtypes: what the allowed ones start with, as `numpy.dtype.str` writes them:
            "<f2" is one, "<f" all little-endian floats.

    Raises:
        ValueError: more or other arrays than allowed, or a damaged array. A damaged
            archive raises what zipfile and zlib do.
    """
    arrays: dict[str, np.ndarray] = {}
    file: io.BytesIO | Path
    if isinstance(source, bytes):
        packed, file = len(source), io.BytesIO(source)
    else:
        packed, file = source.stat().st_size, source
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        unpacked = sum(entry.file_size for entry in entries)
        limit = MAX_EXPANSION * packed + ALLOWED_BYTES
        limit = min(limit, MAX_FILE_BYTES)
        if len(entries) > MAX_ENTRIES or unpacked > limit:
            raise ValueError(
                f"expected at most {MAX_ENTRIES} arrays of {limit} bytes in total, "
                f"found {len(entries)} of {unpacked} bytes"
            )
        for entry in entries:
            name = entry.filename.removesuffix(".npy")
            if name in arrays:
                raise ValueError(f"expected one {entry.filename}, found two")
            arrays[name] = _read_array(archive, entry, dtypes)
    return arrays


def _read_array(
    archive: zipfile.ZipFile, entry: zipfile.ZipInfo, dtypes: tuple[str, ...]
) -> np.ndarray:
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(
            f"expected {entry.filename} stored or deflated, found compression method "
            f"{entry.compress_type}"
        )
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(
                f"expected {entry.filename} in .npy version (1, 0), found {version}"
            )
        try:
            shape, columns_first, dtype = np.lib.format.read_array_header_1_0(file)
        except MemoryError:  # of Python's parser, since headers are short
            raise ValueError(
                f"the header of {entry.filename} is nested too deeply"
            ) from None
        if not dtype.str.startswith(dtypes):
            raise ValueError(
                f"expected {entry.filename} of {', '.join(dtypes)}, found {dtype.str}"
            )
        # Without a number it would unpack all there is, whatever the directory says.
        data = file.read(entry.file_size)
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"expected {entry.filename} of shape {shape}, found {len(data)} bytes"
        )
    array = np.frombuffer(data, dtype)
    return array.reshape(shape, order="F" if columns_first else "C")


def as_tree(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays by path ("conv1/kernel") as nested dicts.

    Raises:
        ValueError: a name is that of an array and of a folder.
    """
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *folders, leaf = name.split("/")
        node = tree
        for depth, folder in enumerate(folders, 1):
            node = node.setdefault(folder, {})
            if not isinstance(node, dict):
                both = "/".join(folders[:depth])
                raise ValueError(f"expected only an array {both}, found a folder too")
        if leaf in node:
            raise ValueError(f"expected only an array {name}, found a folder too")
        node[leaf] = array
    return tree
