# SPDX-License-Identifier: Apache-2.0
"""Read the tensors of PyTorch's .pth / .pt files without PyTorch and without pickle.

Such a file is a pickle, and unpickling it would run whatever program its author wrote.
Here `pickletools` decodes the pickle's operations, and a small machine carries out
those that `torch.save` needs for a dict of tensors: it builds numbers, strings, tuples,
lists, dicts and tensors of plain types, and calls nothing. Whatever else a file asks
for is refused by its name.

Both containers are read: the zip archive (PyTorch 1.6 and later) and the older stream
of five pickles with the storages behind them, which many published files still have.
Imports numpy only.
"""

from __future__ import annotations

import dataclasses
import io
import math
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_DTYPES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}
# Tensors may share a storage (tied weights), but each becomes an array of its own.
_MAX_SHARING = 4
_MAX_AXES = 64  # NumPy's own limit
_MAX_NUMBER = 2**63
_MAX_MESSAGE = 200  # most characters of a file's content in a message
_MARK = object()


@dataclasses.dataclass(frozen=True)
class _Name:
    """A class or function that the pickle names; never looked up, never called."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"[:_MAX_MESSAGE]


@dataclasses.dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str
    count: int

    @property
    def size_bytes(self) -> int:
        itemsize = 2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize
        return self.count * itemsize


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_ORDERED_DICT = _Name("collections", "OrderedDict")
_ALLOWED = {
    _ORDERED_DICT,
    _Name("torch._utils", "_rebuild_tensor"),
    _Name("torch._utils", "_rebuild_tensor_v2"),
    _Name("torch._utils", "_rebuild_parameter"),
    *(_Name("torch", name) for name in _DTYPES),
}


def read_torch_file(path: str | Path) -> dict[str, np.ndarray]:
    """Read the tensors of a state dict that `torch.save` wrote, by name.

    Args:
        path: a .pth or .pt file. A dict around the state dict (a checkpoint) is
            entered if exactly one of its values is a dict with tensors.

    Returns:
        contiguous arrays of the saved types (bfloat16 widened to float32).

    Raises:
        ValueError: there is no such file, it is not a file of PyTorch or damaged, or it
            holds anything but plain tensors (the message says what was refused).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"the weights file {path} does not exist")
    try:
        if zipfile.is_zipfile(path):
            value, load = _open_zip(path)
        else:
            value, load = _open_stream(path)
        tensors = _state_dict(value)
        loaded = {
            storage: _decode(storage, load(storage))
            for storage in dict.fromkeys(t.storage for t in tensors.values())
        }
        room_bytes = _MAX_SHARING * sum(flat.nbytes for flat in loaded.values())
        arrays = {}
        for name, tensor in tensors.items():
            arrays[name] = _as_array(tensor, loaded[tensor.storage])
            room_bytes -= arrays[name].nbytes
            if room_bytes < 0:
                raise _Refused(
                    f"its tensors have more than {_MAX_SHARING} times the bytes of its "
                    "storages"
                )
        return arrays
    except _Refused as error:
        raise ValueError(f"{path.name} was refused: {error}") from None
    except Exception as error:  # a damaged pickle or zip can raise anything
        reason = str(error)[:_MAX_MESSAGE]
        raise ValueError(f"{path.name} is not a readable PyTorch file: {reason}") from (
            error
        )


class _Refused(Exception):
    """The file asks for something other than plain tensors."""


def _open_zip(path: Path) -> tuple[Any, Callable[[_Storage], bytes]]:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise ValueError("its archive has no single data.pkl")
        root = names[0].removesuffix("data.pkl")
        value = _run(io.BytesIO(_read_entry(archive, names[0])))
        order = f"{root}byteorder"
        if order in archive.namelist() and _read_entry(archive, order) != b"little":
            raise _Refused("its numbers are big-endian")

    def load(storage: _Storage) -> bytes:
        with zipfile.ZipFile(path) as archive:
            return _read_entry(archive, f"{root}data/{storage.key}")

    return value, load


def _read_entry(archive: zipfile.ZipFile, name: str) -> bytes:
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise _Refused(f"entry {name} is compressed, which torch.save never does")
    return archive.read(name)


def _open_stream(path: Path) -> tuple[Any, Callable[[_Storage], bytes]]:
    data = path.read_bytes()
    stream = io.BytesIO(data)
    if _run(stream) != _MAGIC:
        raise ValueError("it does not start as a PyTorch file does")
    if _run(stream) != _PROTOCOL:
        raise ValueError("its protocol is not 1001")
    if not _run(stream).get("little_endian", True):
        raise _Refused("its numbers are big-endian")
    value = _run(stream)
    keys = _run(stream)
    position = stream.tell()
    chunks: dict[str, tuple[int, int]] = {}  # key: position, number of elements
    sizes = {s.key: s.size_bytes for s in _storages(value)}
    for key in map(_checked_key, keys):
        count = int.from_bytes(data[position : position + 8], "little")
        chunks[key] = (position + 8, count)
        if key not in sizes:
            raise ValueError(f"storage {key} belongs to no tensor")
        position += 8 + sizes[key]

    def load(storage: _Storage) -> bytes:
        start, count = chunks[storage.key]
        if count != storage.count:
            raise ValueError(f"storage {storage.key} has {count} elements")
        return data[start : start + storage.size_bytes]

    return value, load


def _storages(value: Any) -> list[_Storage]:
    """Every storage under `value`, nested dicts, lists and tuples included."""
    found, queue, seen = [], [value], set()
    while queue:
        node = queue.pop()
        if isinstance(node, _Tensor):
            found.append(node.storage)
        elif isinstance(node, dict | list | tuple) and id(node) not in seen:
            seen.add(id(node))  # a pickle may refer to itself
            queue.extend(node.values() if isinstance(node, dict) else node)
    return found


def _state_dict(value: Any) -> dict[str, _Tensor]:
    def tensors(node: Any) -> dict[str, _Tensor]:
        if not isinstance(node, dict):
            return {}
        return {str(k): v for k, v in node.items() if isinstance(v, _Tensor)}

    found = [tensors(value)]
    if not found[0] and isinstance(value, dict):
        # By identity, since a file may refer to one large dict many times.
        parts = {id(part): part for part in value.values()}.values()
        found = [inner for inner in map(tensors, parts) if inner]
    if len(found) != 1 or not found[0]:
        raise _Refused("it holds no single dict of tensors; save a state_dict()")
    return found[0]


def _decode(storage: _Storage, data: bytes) -> np.ndarray:
    if len(data) != storage.size_bytes:
        raise ValueError(
            f"storage {storage.key} should have {storage.size_bytes} bytes, "
            f"found {len(data)}"
        )
    if storage.dtype == "bfloat16":
        wide = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return wide.view(np.float32)
    return np.frombuffer(data, storage.dtype)


def _as_array(tensor: _Tensor, flat: np.ndarray) -> np.ndarray:
    numbers = (tensor.offset, *tensor.shape, *tensor.strides)
    if len(tensor.shape) != len(tensor.strides) or min(numbers, default=0) < 0:
        raise ValueError("a tensor has an impossible shape")
    count = math.prod(tensor.shape)
    if not count:
        return np.zeros(tensor.shape, flat.dtype)
    # With strides of 0, elements could share memory and claim any size: there must not
    # be more of them than in the storage.
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
    if count > flat.size or tensor.offset + reach >= flat.size:
        raise ValueError("a tensor reaches beyond its storage")
    view = np.lib.stride_tricks.as_strided(
        flat[tensor.offset :],
        tensor.shape,
        [stride * flat.itemsize for stride in tensor.strides],
        writeable=False,
    )
    return view.copy()


def _checked_key(key: Any) -> Any:
    """Return the key if it can be hashed and shown without risk; else refuse it.

    Hashing or showing nested tuples recurses in C without a limit, and takes
    exponential time if each tuple is in the next one twice.
    """
    if key is None or isinstance(key, str | int | float):
        return key
    raise _Refused(f"it uses a {type(key).__name__} as a key")


def _checked_number(value: Any) -> int:
    """Return the number if a shape or a size may hold it; else raise ValueError."""
    if not isinstance(value, int) or abs(value) >= _MAX_NUMBER:
        raise ValueError("a tensor has an impossible shape")
    return value


def _checked_shape(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or len(values) > _MAX_AXES:
        raise ValueError("a tensor has an impossible shape")
    return tuple(map(_checked_number, values))


def _storage_of(reference: Any) -> _Storage:
    """The storage that a persistent id ("storage", type, key, device, count) names."""
    if not isinstance(reference, tuple) or len(reference) not in (5, 6):
        raise _Refused("a reference that is not a plain storage")
    kind, dtype, key, _, count, *view = reference
    if kind != "storage" or not isinstance(dtype, _Name) or view not in ([], [None]):
        raise _Refused("a reference that is not a plain storage")
    if dtype.name not in _DTYPES:
        raise _Refused(f"{dtype} is not a type of storage")
    if not isinstance(count, int) or not 0 <= count < _MAX_NUMBER:
        raise ValueError("a storage has an impossible size")
    return _Storage(_DTYPES[dtype.name], str(_checked_key(key)), count)


def _pairs_of(arguments: Any) -> list[Any]:
    """The pairs that an OrderedDict is called with: a list of pairs, or nothing."""
    if arguments == ():
        return []
    if len(arguments) != 1 or not isinstance(arguments[0], list):
        raise _Refused("an OrderedDict of something that is not a list of pairs")
    return arguments[0]


def _reduce(function: Any, arguments: Any) -> Any:
    """Build the result of a call, if it is one that a dict of tensors needs."""
    if not isinstance(arguments, tuple):
        raise _Refused(f"a call with a {type(arguments).__name__} as its arguments")
    name = function.name if isinstance(function, _Name) else ""
    if name == "OrderedDict":
        return {_checked_key(key): value for key, value in _pairs_of(arguments)}
    if name == "_rebuild_parameter":
        return arguments[0]
    if name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
        storage, offset, shape, strides = arguments[:4]
        if not isinstance(storage, _Storage):
            raise _Refused("a tensor without a storage")
        return _Tensor(
            storage,
            _checked_number(offset),
            _checked_shape(shape),
            _checked_shape(strides),
        )
    raise _Refused(f"a call of {name or type(function).__name__}")


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "MARK": lambda: _MARK,
}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "INT", "LONG"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING", "UNICODE"),
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _run(stream: io.BytesIO) -> Any:
    """Carry out one pickle's operations, up to and including its STOP."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    copied = 0

    def to_mark() -> list[Any]:
        # From the top, since searching the whole stack every time takes quadratic time.
        for at in reversed(range(len(stack))):
            if stack[at] is _MARK:
                values = stack[at + 1 :]
                del stack[at:]
                return values
        raise ValueError("its pickle lacks a mark")

    argument: Any
    for done, (operation, argument, _) in enumerate(pickletools.genops(stream)):
        op = operation.name
        if op in _CONSTANTS:
            stack.append(_CONSTANTS[op]())
        elif op in _LITERALS:
            stack.append(argument)
        elif op in _TUPLES:
            values = stack[-_TUPLES[op] :]
            del stack[-_TUPLES[op] :]
            stack.append(tuple(values))
        elif op == "TUPLE":
            stack.append(tuple(to_mark()))
        elif op == "LIST":
            stack.append(to_mark())
        elif op in ("APPEND", "APPENDS"):
            values = [stack.pop()] if op == "APPEND" else to_mark()
            stack[-1].extend(values)
        elif op in ("SETITEM", "SETITEMS", "DICT"):
            values = to_mark() if op != "SETITEM" else [stack.pop(-2), stack.pop()]
            if op == "DICT":
                stack.append({})
            keys = map(_checked_key, values[::2])
            stack[-1].update(zip(keys, values[1::2], strict=True))
        elif op in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = stack[-1]
        elif op == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif op in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif op == "GLOBAL":
            name = _Name(*argument.split(" ", 1))
            if name not in _ALLOWED:
                raise _Refused(f"it holds {name}, which is not a plain tensor")
            stack.append(name)
        elif op == "BINPERSID":
            stack.append(_storage_of(stack.pop()))
        elif op == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            if function == _ORDERED_DICT:
                # Writing a pair takes operations, but copying it again takes none.
                copied += len(_pairs_of(arguments))
                if copied > done:
                    raise _Refused("it copies one list of pairs many times")
            stack.append(_reduce(function, arguments))
        elif op == "BUILD":  # attributes of a dict, such as a state dict's _metadata
            stack.pop()
            if not isinstance(stack[-1], dict):
                raise _Refused("it sets attributes of something that is not a dict")
        elif op == "STOP":
            return stack.pop()
        elif op != "PROTO":
            raise _Refused(f"the pickle operation {op}, which torch.save never writes")
    raise ValueError("its pickle has no end")
