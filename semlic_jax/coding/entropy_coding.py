# SPDX-License-Identifier: Apache-2.0
"""Symbols and table indexes to bytes and back, by constriction's range coder."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import constriction
import numpy as np
from numpy.typing import ArrayLike, NDArray

from semlic_jax.coding.bitstream import BitstreamError

PRECISION_BITS = 24
MAX_SYMBOL = 2**15
MAX_TABLES = 2**16

# Escaped values: excess + 1 in [2**L, 2**(L+1)), L coded with probability 2**-(L+1).
_MAX_LENGTH = 16

Indexes = NDArray[np.integer]


@dataclasses.dataclass(frozen=True, eq=False)
class SymbolTables:
    offsets: NDArray[np.int32]
    starts: NDArray[np.int32]
    counts: NDArray[np.uint32]

    def __post_init__(self) -> None:
        for name, dtype in (
            ("offsets", np.int32),
            ("starts", np.int32),
            ("counts", np.uint32),
        ):
            array = np.array(getattr(self, name), dtype=dtype)
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        self.validate()

    def validate(self) -> None:
        """Raises ValueError unless every table is complete and decodable."""
        num = self.num_tables
        if not 1 <= num <= MAX_TABLES or self.starts.shape != (num + 1,):
            raise ValueError(
                f"expected 1..{MAX_TABLES} tables and one more start than offsets, "
                f"found {self.offsets.shape} offsets and {self.starts.shape} starts"
            )
        sizes = np.diff(self.starts.astype(np.int64))
        if self.starts[0] != 0 or self.starts[-1] != self.counts.size:
            raise ValueError(
                f"expected starts from 0 to {self.counts.size}, "
                f"found {self.starts[0]} to {self.starts[-1]}"
            )
        if sizes.min() < 2:
            raise ValueError(
                "expected at least one symbol and the escape in each table, "
                f"found {sizes.min()} entries in table {sizes.argmin()}"
            )
        last = self.offsets + sizes - 2
        if self.offsets.min() < -MAX_SYMBOL or last.max() > MAX_SYMBOL:
            raise ValueError(
                f"expected symbols within +-{MAX_SYMBOL}, "
                f"found {self.offsets.min()}..{last.max()}"
            )
        totals = np.add.reduceat(self.counts.astype(np.int64), self.starts[:-1])
        if self.counts.min() < 1 or (totals != 1 << PRECISION_BITS).any():
            worst = int(np.argmax(totals != 1 << PRECISION_BITS))
            raise ValueError(
                f"expected counts >= 1 that sum to {1 << PRECISION_BITS} in each "
                f"table, found minimum {self.counts.min()} and sum {totals[worst]} "
                f"in table {worst}"
            )

    @property
    def num_tables(self) -> int:
        return self.offsets.size

    def __len__(self) -> int:
        return self.num_tables

    def ideal_bits(self, symbols: ArrayLike, indexes: ArrayLike) -> float:
        """Code length in bits, escapes included."""
        symbols = _as_symbols(symbols)
        indexes = self._check_indexes(indexes, symbols.size)
        slots, excess = self._slots(symbols, indexes)
        bits = self._bits[self.starts[indexes] + slots].sum()
        escaped = slots == self._escapes[indexes]
        lengths = np.frexp(excess[escaped] + 1.0)[1] - 1
        return float(bits + (2.0 * lengths + 2.0).sum())

    def bits_lookup(self) -> tuple[NDArray[np.float32], int]:
        """Matrix [T, 2*radius + 1] of bits per symbol -radius..radius."""
        last = self.offsets + self._escapes - 1
        radius = int(max(-self.offsets.min(), last.max(), 0))
        symbols = np.arange(-radius, radius + 1)
        bits = np.empty((self.num_tables, symbols.size), np.float32)
        for t in range(self.num_tables):
            index = np.full(symbols.size, t)
            slots, excess = self._slots(symbols, index)
            lengths = np.frexp(excess + 1.0)[1] - 1
            bits[t] = self._bits[self.starts[t] + slots]
            bits[t] += np.where(slots == self._escapes[t], 2.0 * lengths + 2.0, 0.0)
        return bits, radius

    @functools.cached_property
    def _escapes(self) -> NDArray[np.int32]:
        return np.diff(self.starts) - 1

    @functools.cached_property
    def _bits(self) -> NDArray[np.float64]:
        return PRECISION_BITS - np.log2(self.counts.astype(np.float64))

    @functools.cached_property
    def _models(self) -> dict[int, Any]:
        return {}

    def _model(self, table: int) -> Any:
        model = self._models.get(table)
        if model is None:
            counts = self.counts[self.starts[table] : self.starts[table + 1]]
            model = self._models[table] = _exact_model(counts)
        return model

    def _check_indexes(self, indexes: ArrayLike, size: int) -> Indexes:
        array = np.asarray(indexes)
        if array.dtype.kind not in "iu" or array.shape != (size,):
            raise ValueError(
                f"expected {size} integer table indexes, "
                f"found {array.dtype} of shape {array.shape}"
            )
        if size and not 0 <= array.min() <= array.max() < self.num_tables:
            raise ValueError(
                f"expected table indexes in 0..{self.num_tables - 1}, "
                f"found {array.min()}..{array.max()}"
            )
        # NumPy's stable sort is a radix sort for 8 and 16 bits only.
        return array.astype(np.uint8 if self.num_tables <= 256 else np.uint16)

    def _slots(
        self, symbols: NDArray[np.integer], indexes: Indexes
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        slots = (symbols - self.offsets[indexes]).astype(np.int32)
        escapes = self._escapes[indexes]
        excess = np.where(slots < 0, -1 - slots, slots - escapes)
        np.copyto(slots, escapes, where=(slots < 0) | (slots > escapes))
        return slots, excess


def _exact_model(counts: NDArray[np.integer]) -> Any:
    """A constriction model whose 24-bit frequencies are exactly `counts`.

    With `perfect=False` the library gives symbol i the left cumulative
    floor(sum(p[:i]) * (2**24 - n) / sum(p)) + i. For p = counts - 1 the factor is
    exactly 1 and every sum is an exact float64, so the result is sum(counts[:i]).
    """
    return constriction.stream.model.Categorical(
        counts.astype(np.float64) - 1.0, perfect=False
    )


def tables_from_pmfs(
    pmfs: Sequence[NDArray[np.float64]], offsets: ArrayLike
) -> SymbolTables:
    """Integer tables from probabilities; mass missing to 1 goes to the escape."""
    tables = []
    for t, pmf in enumerate(pmfs):
        pmf = np.asarray(pmf, np.float64)
        if pmf.ndim != 1 or not pmf.size or not np.isfinite(pmf).all():
            raise ValueError(f"expected finite probabilities [n] in table {t}")
        total = math.fsum(pmf)
        if pmf.min() < 0 or not 0 < total <= 1 + 1e-6:
            raise ValueError(
                f"expected probabilities >= 0 that sum to at most 1 in table {t}, "
                f"found minimum {pmf.min()} and sum {total}"
            )
        full = np.append(pmf, max(0.0, 1.0 - total))
        counts = np.maximum(1, np.rint(full * 2**PRECISION_BITS)).astype(np.int64)
        counts[counts.argmax()] -= counts.sum() - 2**PRECISION_BITS
        tables.append(counts)
    starts = np.cumsum([0] + [len(counts) for counts in tables])
    return SymbolTables(np.asarray(offsets), starts, np.concatenate(tables))


def gaussian_tables(scales: ArrayLike) -> SymbolTables:
    """Tables of zero-mean Gaussians of the given deviations, over unit bins."""
    pmfs, offsets = [], []
    for scale in np.asarray(scales, np.float64):
        half_width = math.ceil(6 * scale)
        edges = (np.arange(half_width + 2) - 0.5) / (scale * math.sqrt(2))
        tails = np.array([0.5 * math.erfc(edge) for edge in edges])
        right = tails[:-1] - tails[1:]
        pmfs.append(np.concatenate([right[:0:-1], right]))
        offsets.append(-half_width)
    return tables_from_pmfs(pmfs, offsets)


class SymbolEncoder:
    """Collects the symbols of one image into one stream."""

    def __init__(self) -> None:
        self._coder = constriction.stream.queue.RangeEncoder()

    def push(
        self, symbols: ArrayLike, indexes: ArrayLike, tables: SymbolTables
    ) -> None:
        """Appends symbols, each coded with its own table."""
        symbols = _as_symbols(symbols)
        indexes = tables._check_indexes(indexes, symbols.size)
        order = np.argsort(indexes, kind="stable")
        slots, excess = tables._slots(symbols[order], indexes[order])
        for table, start, stop in _runs(indexes, tables.num_tables):
            self._coder.encode(slots[start:stop], tables._model(table))
        escaped = np.flatnonzero(slots == tables._escapes[indexes[order]])
        if escaped.size:
            escaped = escaped[np.argsort(order[escaped])]
            above = symbols[order[escaped]] >= tables.offsets[indexes[order[escaped]]]
            self._push_escaped(excess[escaped], above)

    def _push_escaped(
        self, excess: NDArray[np.int32], above: NDArray[np.bool_]
    ) -> None:
        lengths = np.frexp(excess + 1.0)[1] - 1
        self._coder.encode(lengths.astype(np.int32), _length_model())
        widths = lengths + 1
        ends = np.cumsum(widths)
        shifts = np.repeat(ends - 1, widths) - np.arange(ends[-1])
        values = np.repeat((excess + 1) - (1 << lengths) + (above << lengths), widths)
        self._coder.encode((values >> shifts & 1).astype(np.int32), _bit_model())

    def finish(self) -> bytes:
        """The stream of everything pushed so far."""
        words = self._coder.get_compressed()
        return words.astype(">u4").tobytes().rstrip(b"\0")


class SymbolDecoder:
    """Reads back what a SymbolEncoder wrote, by the same sequence of calls."""

    def __init__(self, data: bytes) -> None:
        words = np.frombuffer(data + b"\0" * (-len(data) % 4), ">u4")
        self._coder = constriction.stream.queue.RangeDecoder(words.astype(np.uint32))

    def pop(self, indexes: ArrayLike, tables: SymbolTables) -> NDArray[np.int32]:
        """The next symbols, given their tables."""
        indexes = tables._check_indexes(indexes, np.size(indexes))
        order = np.argsort(indexes, kind="stable")
        slots = np.empty(order.size, np.int32)
        for table, start, stop in _runs(indexes, tables.num_tables):
            slots[start:stop] = self._decode(tables._model(table), stop - start)
        symbols = np.empty_like(slots)
        symbols[order] = slots
        escaped = np.flatnonzero(symbols == tables._escapes[indexes])
        symbols += tables.offsets[indexes]
        if escaped.size:
            symbols[escaped] = self._pop_escaped(tables, indexes[escaped])
        return symbols

    def _pop_escaped(self, tables: SymbolTables, indexes: Indexes) -> NDArray[np.int32]:
        lengths = self._decode(_length_model(), indexes.size)
        widths = lengths + 1
        ends = np.cumsum(widths)
        bits = self._decode(_bit_model(), int(ends[-1])).astype(np.int64)
        shifts = np.repeat(ends - 1, widths) - np.arange(ends[-1])
        values = np.add.reduceat(bits << shifts, ends - widths)
        above = values >> lengths
        excess = (values & (1 << lengths) - 1) + (1 << lengths) - 1
        lowest = tables.offsets[indexes]
        symbols = np.where(
            above == 1, lowest + tables._escapes[indexes] + excess, lowest - 1 - excess
        )
        if np.abs(symbols).max() > MAX_SYMBOL:
            raise BitstreamError(
                f"expected symbols within +-{MAX_SYMBOL}, "
                f"found {symbols[np.abs(symbols).argmax()]}"
            )
        return symbols.astype(np.int32)

    def finish(self) -> None:
        """Raises BitstreamError if data is left over."""
        if not self._coder.maybe_exhausted():
            raise BitstreamError("expected the end of the payload, found more data")

    def _decode(self, model: Any, size: int) -> NDArray[np.int32]:
        try:
            return self._coder.decode(model, size)
        except AssertionError:
            raise BitstreamError(
                "expected coded symbols, found a payload that no encoder writes"
            ) from None


def _runs(indexes: Indexes, num_tables: int) -> list[tuple[int, int, int]]:
    sizes = np.bincount(indexes, minlength=num_tables)
    ends = np.cumsum(sizes)
    used = np.flatnonzero(sizes)
    return list(
        zip(
            used.tolist(),
            (ends - sizes)[used].tolist(),
            ends[used].tolist(),
            strict=True,
        )
    )


def _as_symbols(symbols: ArrayLike) -> NDArray[np.int32]:
    array = np.asarray(symbols)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ValueError(
            f"expected integer symbols [n], found {array.dtype} {array.shape}"
        )
    if array.size and not -MAX_SYMBOL <= array.min() <= array.max() <= MAX_SYMBOL:
        raise ValueError(
            f"expected symbols within +-{MAX_SYMBOL}, "
            f"found {array.min()}..{array.max()}"
        )
    return array.astype(np.int32)


@functools.cache
def _length_model() -> Any:
    counts = [2 ** (PRECISION_BITS - 1 - length) for length in range(_MAX_LENGTH)]
    return _exact_model(np.array(counts + [counts[-1]]))


@functools.cache
def _bit_model() -> Any:
    return constriction.stream.model.Uniform(2)
