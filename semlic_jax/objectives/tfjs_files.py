# SPDX-License-Identifier: Apache-2.0
"""Read the weights of TensorFlow.js models: a model.json and the files it names.

The JSON has a manifest that gives each weight's name, shape, type and, if it was
quantised, how. Beside it lie one or more files with the bytes of the weights, one after
the other. The graph of the model is not looked at. Imports numpy only.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_MAX_JSON_BYTES = 16 << 20
_MAX_WEIGHTS_BYTES = 1 << 30  # of all groups together
_MAX_AXES = 64  # NumPy's own limit
_DTYPES = {
    "float32": "<f4",
    "float16": "<f2",
    "int32": "<i4",
    "uint16": "<u2",
    "uint8": "u1",
    "bool": "?",
}


def read_tfjs_file(path: str | Path) -> dict[str, np.ndarray]:
    """Read all weights of a model.json by name; quantised ones become float32.

    Args:
        path: the JSON file; the files that it names lie in the same folder.

    Raises:
        ValueError: there is no such file, it is not a model of TensorFlow.js or has
            weights of another form than expected, or the files of its weights are
            missing, too large or of another length than the manifest says.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"the weights file {path} does not exist")
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(
            f"expected a model.json of at most {_MAX_JSON_BYTES} bytes, found {path} "
            f"of {path.stat().st_size}"
        )
    arrays: dict[str, np.ndarray] = {}
    room_bytes = _MAX_WEIGHTS_BYTES
    try:
        groups = json.loads(path.read_bytes())["weightsManifest"]
        for group in groups:
            data = _read_shards(path, group["paths"], room_bytes)
            room_bytes -= len(data)
            found = _unpack(group["weights"], data)
            twice = sorted(arrays.keys() & found.keys())
            if twice:
                raise _Refused(f"it has two weights named {twice[0]}")
            arrays |= found
    except _Refused as error:
        raise ValueError(f"{path}: {error}") from None
    # RecursionError comes from JSON nested too deeply, the others from its content.
    except (
        *(ArithmeticError, AttributeError, LookupError, OSError),
        *(RecursionError, TypeError, ValueError),
    ) as error:
        raise ValueError(
            f"{path} is not a readable model of TensorFlow.js: {error!r}"
        ) from error
    return arrays


class _Refused(Exception):
    """A model is refused; the message is a sentence that says why."""


def _read_shards(model: Path, names: list[str], room_bytes: int) -> bytes:
    parts, size = [], 0
    for name in names:
        # Only files beside it: a model from elsewhere must not name any other path.
        plain = isinstance(name, str) and Path(name).name == name and "\0" not in name
        if not plain or name in ("", ".", ".."):
            raise _Refused(f"expected the names of files beside it, found {name!r}")
        file = model.with_name(name)
        if not file.is_file():
            raise _Refused(f"it names the weights file {name}, which does not exist")
        size += file.stat().st_size
        if size > room_bytes:
            raise _Refused(f"expected at most {_MAX_WEIGHTS_BYTES} bytes of weights")
        parts.append(file.read_bytes())
    return b"".join(parts)


def _unpack(weights: list[Mapping[str, Any]], data: bytes) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    offset = 0
    for weight in weights:
        name, quantised = str(weight["name"]), weight.get("quantization")
        if len(weight["shape"]) > _MAX_AXES:
            raise _Refused(
                f"{name} has {len(weight['shape'])} axes: expected at most {_MAX_AXES}"
            )
        shape = tuple(map(operator.index, weight["shape"]))
        kind = (quantised or weight)["dtype"]
        if kind not in _DTYPES or min(shape, default=0) < 0:
            raise _Refused(f"{name} is of type {kind!r:.60} and shape {shape}")
        dtype = np.dtype(_DTYPES[kind])
        end = offset + math.prod(shape) * dtype.itemsize
        if end > len(data):
            break
        values = np.frombuffer(data, dtype, math.prod(shape), offset).reshape(shape)
        if quantised and "scale" in quantised:  # float16 has none
            with np.errstate(over="ignore", invalid="ignore"):  # refused below
                scale = np.float32(quantised["scale"])
                least = np.float32(quantised["min"])
                values = values.astype(np.float32) * scale + least
            if not np.isfinite(values).all():
                raise _Refused(f"{name} has scale {scale} and min {least}")
        elif quantised:
            values = values.astype(np.float32)
        arrays[name] = values
        offset = end
    if len(arrays) < len(weights) or offset != len(data):
        raise _Refused(
            f"expected files of exactly {len(weights)} different weights, found "
            f"{len(arrays)} in the first {offset} of {len(data)} bytes"
        )
    return arrays
