# SPDX-License-Identifier: Apache-2.0
"""The second coder: TensorFlow Compression's range coder on the same integer tables.

Its classes have the methods of `SymbolEncoder` and `SymbolDecoder` and code the same
symbols in the same order; only the coded words differ, and `bitstream` has a flag for
that. Its tables have 16 bits where ours have 24. They are made from ours with whole
numbers only, so that they are the same on every machine, and cost less than half a
percent where the symbols follow the tables, as they do if these were fitted at export
(`training.fit_tables`). If the latents have heavier tails than the Gaussians of a
model, the files are smaller: 16 bits cannot make a symbol as rare as 24 bits do.

TensorFlow Compression is in maintenance mode and requires old versions of TensorFlow
and JAX, so it needs an environment of its own (the extra `tfc`) and is imported only
when it is used. Its own escape code is not used: on a damaged stream it never ends.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from semlic_jax.coding.bitstream import BitstreamError
from semlic_jax.coding.symbol_tables import (
    MAX_ESCAPE_LENGTH,
    MAX_SYMBOL,
    PRECISION_BITS,
    SymbolTables,
    as_symbols,
    escape_lengths,
)

PRECISION = 16  # bits, of TensorFlow Compression's tables
_TOTAL = 1 << PRECISION


def narrow_counts(counts: NDArray[np.uint32]) -> NDArray[np.int32]:
    """Convert a table that sums to 2**24 to one that sums to 2**16, in whole numbers.

    Args:
        counts: uint32 [n], each >= 1, which sum to 2**24.

    Returns:
        int32 [n], each >= 1, which sum to 2**16: the shares are rounded down, and the
        remainder is added to the largest.

    Raises:
        ValueError: n is 2**16 or more, which leaves nothing to share out.
    """
    if counts.size >= _TOTAL:
        raise ValueError(
            f"expected tables of fewer than {_TOTAL} counts for the coder tfc, "
            f"found one of {counts.size}"
        )
    free = _TOTAL - counts.size
    narrow = 1 + (counts.astype(np.int64) * free >> PRECISION_BITS)
    narrow[narrow.argmax()] += _TOTAL - narrow.sum()
    return narrow.astype(np.int32)


class _Lookup:
    """The rows of TensorFlow Compression's table; knows where each of ours starts."""

    def __init__(self, tables: Sequence[SymbolTables]) -> None:
        rows: list[NDArray[np.int32]] = []
        self._bases: dict[int, int] = {}
        for each in tables:
            self._bases[id(each)] = len(rows)
            for start, stop in zip(each.starts, each.starts[1:], strict=False):
                rows.append(narrow_counts(each.counts[start:stop]))
        self.length = len(rows)
        halves = [_TOTAL >> 1 + length for length in range(MAX_ESCAPE_LENGTH)]
        rows.append(np.array([*halves, halves[-1]], np.int32))
        self.bit = len(rows)
        rows.append(np.array([_TOTAL // 2] * 2, np.int32))
        zero = np.zeros(1, np.int32)
        parts = [np.concatenate([zero + PRECISION, zero, r.cumsum()]) for r in rows]
        self.rows = np.concatenate(parts).astype(np.int32)
        self._tables = tables  # keeps the identities alive

    def base(self, tables: SymbolTables) -> int:
        return self._bases[id(tables)]


class TfcSymbolEncoder:
    """`SymbolEncoder` with the other coder.

    Args:
        tables: all tables with which symbols will be pushed.

    Raises:
        ValueError: TensorFlow Compression is not installed, or a table has 2**16 counts
            or more.
    """

    def __init__(self, tables: Sequence[SymbolTables]) -> None:
        self._ops = tfc_ops()
        self._lookup = _Lookup(tables)
        self._indexes: list[NDArray[np.int32]] = []
        self._values: list[NDArray[np.int32]] = []

    def push(
        self, symbols: ArrayLike, indexes: ArrayLike, tables: SymbolTables
    ) -> None:
        """Append symbols, each coded with its own table; see `SymbolEncoder.push`."""
        symbols = as_symbols(symbols)
        indexes = tables.as_indexes(indexes, symbols.size)
        slots, excess = tables.slots(symbols, indexes)
        self._append(self._lookup.base(tables) + indexes.astype(np.int32), slots)
        escaped = slots == tables.escapes[indexes]
        if not escaped.any():
            return
        above = symbols[escaped] > tables.offsets[indexes[escaped]]
        lengths = escape_lengths(excess[escaped])
        self._append(np.full(lengths.size, self._lookup.length), lengths)
        values = excess[escaped] + 1 + ((above.astype(np.int32) - 1) << lengths)
        for length in np.unique(lengths):
            places = np.arange(length, -1, -1)
            bits = values[lengths == length, None] >> places & 1
            self._append(np.full(bits.size, self._lookup.bit), bits.ravel())

    def _append(self, indexes: NDArray[Any], values: NDArray[Any]) -> None:
        self._indexes.append(indexes.astype(np.int32))
        self._values.append(values.astype(np.int32))

    def finish(self) -> bytes:
        """The stream of everything pushed so far."""
        ops = self._ops
        handle = ops.create_range_encoder([], self._lookup.rows)
        handle = ops.entropy_encode_index(
            handle, np.concatenate(self._indexes), np.concatenate(self._values)
        )
        return bytes(ops.entropy_encode_finalize(handle).numpy())


class TfcSymbolDecoder:
    """`SymbolDecoder` with the other coder.

    Args:
        data: the result of `TfcSymbolEncoder.finish`.
        tables: all tables with which symbols will be popped.

    Raises:
        ValueError: TensorFlow Compression is not installed, or a table has 2**16 counts
            or more.
    """

    def __init__(self, data: bytes, tables: Sequence[SymbolTables]) -> None:
        self._ops = tfc_ops()
        self._lookup = _Lookup(tables)
        self._handle = self._ops.create_range_decoder(data, self._lookup.rows)

    def pop(self, indexes: ArrayLike, tables: SymbolTables) -> NDArray[np.int32]:
        """The symbols of the next push; see `SymbolDecoder.pop`.

        Raises:
            BitstreamError: a symbol is beyond +-MAX_SYMBOL.
        """
        indexes = tables.as_indexes(indexes, np.size(indexes))
        slots = self._decode(self._lookup.base(tables) + indexes.astype(np.int32))
        symbols = slots + tables.offsets[indexes]
        escaped = np.flatnonzero(slots == tables.escapes[indexes])
        if escaped.size:
            lengths = self._decode(np.full(escaped.size, self._lookup.length))
            values = np.zeros(escaped.size, np.int32)
            for length in np.unique(lengths):
                members = np.flatnonzero(lengths == length)
                size = members.size * (length + 1)
                bits = self._decode(np.full(size, self._lookup.bit))
                places = np.arange(length, -1, -1)
                values[members] = bits.reshape(-1, length + 1) @ (1 << places)
            above = values >> lengths == 1
            excess = (values | 1 << lengths) - 1
            lowest = tables.offsets[indexes[escaped]]
            found = np.where(above, symbols[escaped] + excess, lowest - 1 - excess)
            if np.abs(found).max() > MAX_SYMBOL:
                raise BitstreamError(
                    f"expected symbols within +-{MAX_SYMBOL}, found "
                    f"{found[np.abs(found).argmax()]}: the payload is damaged"
                )
            symbols[escaped] = found
        return symbols.astype(np.int32)

    def _decode(self, indexes: NDArray[Any]) -> NDArray[np.int32]:
        self._handle, values = self._ops.entropy_decode_index(
            self._handle, indexes.astype(np.int32), indexes.shape, np.int32
        )
        return values.numpy()

    def finish(self) -> None:
        """Check that the stream ends here, as far as the coder can tell.

        Raises:
            BitstreamError: it does not end here.
        """
        if not self._ops.entropy_decode_finalize(self._handle).numpy():
            raise BitstreamError(
                "expected the payload to end with the last symbol, found that it does "
                "not: it is damaged, or encoder and decoder used different tables"
            )


def tfc_ops() -> Any:
    """The operations of TensorFlow Compression.

    Raises:
        ValueError: it is not installed.
    """
    # Without this, the import writes many messages to the error stream.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        import tensorflow_compression_ops as tfc
    except ImportError as error:
        raise ValueError(
            f"the coder tfc needs the package {error.name}: "
            "pip install 'semlic_jax[tfc]' in an environment of its own"
        ) from None
    return tfc
