# SPDX-License-Identifier: Apache-2.0
"""Integer tables of symbols: the coder's frequencies, and the code lengths in bits.

`SymbolTables` are part of a model file. They are made from probabilities once, when a
model is exported, and contain only whole numbers, the same on every machine.

May import: NumPy, constriction.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import constriction
import numpy as np
from numpy.typing import ArrayLike, NDArray

PRECISION_BITS = 24  # the precision of constriction's Python interface
MAX_SYMBOL = 2**15  # largest magnitude of a symbol
MAX_TABLES = 2**16
MAX_COUNTS = 2 * MAX_SYMBOL + 2  # in one table: every symbol and the escape

# A value `excess` steps outside its table has the length L = floor(log2(excess + 1)).
# Both ends of a table lie within MAX_SYMBOL, so excess < 2 * MAX_SYMBOL.
MAX_ESCAPE_LENGTH = 16


@dataclasses.dataclass(frozen=True, eq=False)
class SymbolTables:
    """Immutable integer frequencies of the symbols: part of the model.

    Table t covers the symbols `offsets[t], offsets[t] + 1, ...`, one per entry of
    `counts[starts[t]:starts[t + 1]]` except the last, which is the escape: it
    announces a symbol that the table does not cover. An entry with the count c costs
    exactly 24 - log2(c) bits: the coder uses the counts as they are.

    The arrays are copied and made read-only.

    Attributes:
        offsets: int32 [T], the smallest symbol of each table.
        starts: int32 [T + 1], where each table starts in `counts`.
        counts: uint32 [starts[-1]], each >= 1; each table sums to 2**24.

    Raises:
        ValueError: see `validate`.
    """

    offsets: NDArray[np.int32]
    starts: NDArray[np.int32]
    counts: NDArray[np.uint32]

    def __post_init__(self) -> None:
        dtypes = {"offsets": np.int32, "starts": np.int32, "counts": np.uint32}
        for name, dtype in dtypes.items():
            given = np.asarray(getattr(self, name))
            array = given.astype(dtype)
            whole = given.ndim == 1 and given.dtype.kind in "iu"
            if not whole or (array != given).any():
                raise ValueError(
                    f"expected whole numbers [n] that fit {dtype.__name__} as {name}, "
                    f"found {given.dtype} of shape {given.shape}"
                )
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        self.validate()

    def __reduce__(self) -> tuple[Any, ...]:
        # Made anew, a copy has read-only arrays and none of the coder's objects, which
        # cannot be pickled.
        return type(self), (self.offsets, self.starts, self.counts)

    def validate(self) -> None:
        """Check what the coder relies on; called when the tables are made.

        Raises:
            ValueError: a table is empty, has a count below 1, does not sum to 2**24
                or covers symbols beyond +-MAX_SYMBOL, or the arrays disagree.
        """
        num = self.offsets.size
        if not 1 <= num <= MAX_TABLES or self.starts.size != num + 1:
            raise ValueError(
                f"expected 1 to {MAX_TABLES} tables and one more start than tables, "
                f"found {num} offsets and {self.starts.size} starts"
            )
        if self.starts[0] != 0 or self.starts[-1] != self.counts.size:
            raise ValueError(
                f"expected starts from 0 to {self.counts.size}, the number of counts, "
                f"found {self.starts[0]} to {self.starts[-1]}"
            )
        sizes = np.diff(self.starts.astype(np.int64))
        if sizes.min() < 2:
            raise ValueError(
                "expected at least one symbol and the escape in each table, "
                f"found {sizes.min()} counts in table {sizes.argmin()}"
            )
        last = self.offsets + sizes - 2
        if self.offsets.min() < -MAX_SYMBOL or last.max() > MAX_SYMBOL:
            raise ValueError(
                f"expected tables within +-{MAX_SYMBOL}, "
                f"found symbols from {self.offsets.min()} to {last.max()}"
            )
        # Not np.add.reduceat, which copies all counts as int64.
        tables = np.split(self.counts, self.starts[1:-1])
        totals = np.array([table.sum(dtype=np.int64) for table in tables])
        if self.counts.min() < 1 or (totals != 1 << PRECISION_BITS).any():
            worst = int(np.argmax(totals != 1 << PRECISION_BITS))
            raise ValueError(
                f"expected counts >= 1 that sum to {1 << PRECISION_BITS} in each "
                f"table, found a smallest count of {self.counts.min()} and the sum "
                f"{totals[worst]} in table {worst}"
            )

    @property
    def num_tables(self) -> int:
        """The number of tables, T."""
        return self.offsets.size

    def __len__(self) -> int:
        return self.num_tables

    def ideal_bits(self, symbols: ArrayLike, indexes: ArrayLike) -> float:
        """The code length of the symbols, including escapes.

        A stream takes this many bits and those of its end: 22 on average, at most 32.

        Args:
            symbols: integers [n] within +-MAX_SYMBOL.
            indexes: integers [n] in 0..T-1, the table of each symbol.

        Returns:
            bits, a float64 sum.

        Raises:
            ValueError: an argument has a wrong type, shape or range.
        """
        bits, _, further_bits = self._lengths(symbols, indexes)
        return float(bits.sum() + further_bits.sum())

    def symbol_bits(
        self, symbols: ArrayLike, indexes: ArrayLike
    ) -> NDArray[np.float64]:
        """The code length of each symbol, float64 [n]; otherwise as `ideal_bits`."""
        bits, escaped, further_bits = self._lengths(symbols, indexes)
        bits[escaped] += further_bits
        return bits

    def _lengths(
        self, symbols: ArrayLike, indexes: ArrayLike
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.floating]]:
        """Bits of the entries [n], which are escapes [n], and further bits of these."""
        symbols = as_symbols(symbols)
        indexes = self.as_indexes(indexes, symbols.size)
        slots, excess = self.slots(symbols, indexes)
        escaped = slots == self.escapes[indexes]
        bits = self._slot_bits[self.starts[indexes] + slots]
        return bits, escaped, _escape_bits(excess[escaped])

    def bits_lookup(self) -> tuple[NDArray[np.float32], int]:
        """The code length of every symbol as one matrix, for rate estimates.

        `bits[t, symbol + radius]` is `ideal_bits([symbol], [t])`, even where table t
        does not cover the symbol. The radius is the largest magnitude of a symbol
        that any table covers. For a symbol beyond it, clipped to the radius, the rate
        is too low by the few bits by which its escape is longer.

        Returns:
            bits, float32 [T, 2 * radius + 1], and the radius.
        """
        last = self.offsets + self.escapes - 1
        radius = int(max(-self.offsets.min(), last.max(), 0))
        symbols = np.arange(-radius, radius + 1)
        bits = np.empty((self.num_tables, symbols.size), np.float32)
        for table, row in enumerate(bits):
            indexes = np.full(symbols.size, table)
            slots, excess = self.slots(symbols, indexes)
            escaped = slots == self.escapes[table]
            row[:] = self._slot_bits[self.starts[table] + slots]
            row[escaped] += _escape_bits(excess[escaped])
        return bits, radius

    @functools.cached_property
    def escapes(self) -> NDArray[np.int32]:
        """The slot of each table's escape, int32 [T]."""
        return np.diff(self.starts) - 1

    @functools.cached_property
    def _slot_bits(self) -> NDArray[np.float64]:
        return PRECISION_BITS - np.log2(self.counts.astype(np.float64))

    @functools.cached_property
    def _models(self) -> dict[int, Any]:
        return {}

    def coder_model(self, table: int) -> Any:
        """A table in the form that the coder takes; made on first use."""
        model = self._models.get(table)
        if model is None:
            counts = self.counts[self.starts[table] : self.starts[table + 1]]
            model = self._models[table] = exact_model(counts)
        return model

    def as_indexes(self, indexes: ArrayLike, size: int) -> NDArray[np.unsignedinteger]:
        """Table indexes [size] as the smallest type; raises ValueError if invalid."""
        array = np.asarray(indexes)
        if array.shape != (size,) or (size and array.dtype.kind not in "iu"):
            raise ValueError(
                f"expected {size} whole numbers as table indexes, "
                f"found {array.dtype} of shape {array.shape}"
            )
        if size and not 0 <= array.min() <= array.max() < self.num_tables:
            raise ValueError(
                f"expected table indexes from 0 to {self.num_tables - 1}, "
                f"found {array.min()} to {array.max()}"
            )
        # NumPy's stable sort is a radix sort only for integers of 8 and 16 bits.
        return array.astype(np.uint8 if self.num_tables <= 256 else np.uint16)

    def slots(
        self, symbols: NDArray[np.integer], indexes: NDArray[np.integer]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The entry of each symbol in its table, and how far outside the table it is.

        Returns:
            slots, int32 [n], the escape for symbols outside their table, and excess,
            int32 [n], the steps beyond the first symbol outside (meaningless inside).
        """
        slots = (symbols - self.offsets[indexes]).astype(np.int32)
        escapes = self.escapes[indexes]
        excess = np.where(slots < 0, -1 - slots, slots - escapes)
        np.copyto(slots, escapes, where=(slots < 0) | (slots > escapes))
        return slots, excess


def tables_from_pmfs(
    pmfs: Sequence[NDArray[np.float64]], offsets: ArrayLike
) -> SymbolTables:
    """Integer tables from probabilities, one table per distribution.

    The difference between the sum of a distribution and 1 becomes the probability of
    its escape, at least 2**-24. This runs once, when a model is exported: floats may
    differ between machines, so the model file stores the integers.

    Args:
        pmfs: float64 [n_t] each, >= 0; sums up to 1 + 1e-4 (from float32) count as 1.
        offsets: integers [T], the symbol of each distribution's first entry.

    Raises:
        ValueError: a distribution is empty, negative, not finite or sums to more
            than 1, or the tables are out of range (see `SymbolTables.validate`).
    """
    tables = []
    for table, pmf in enumerate(pmfs):
        pmf = np.asarray(pmf, np.float64)
        total = math.fsum(pmf) if pmf.ndim == 1 else math.nan
        if not (0 < total <= 1 + 1e-4 and pmf.min() >= 0):
            raise ValueError(
                "expected probabilities >= 0 [n] with a positive sum of at most 1, "
                f"found shape {pmf.shape} and sum {total} in table {table}"
            )
        full = np.append(pmf, max(0.0, 1.0 - total)) / max(1.0, total)
        # Rounding down leaves room for the ones. The remainder is at most twice the
        # number of entries and goes where it changes the probability least.
        free = 2**PRECISION_BITS - full.size
        counts = np.maximum(1, np.floor(full * free)).astype(np.int64)
        counts[counts.argmax()] += 2**PRECISION_BITS - counts.sum()
        tables.append(counts)
    if not tables:
        raise ValueError("expected at least one distribution, found none")
    starts = np.cumsum([0] + [counts.size for counts in tables])
    return SymbolTables(np.asarray(offsets), starts, np.concatenate(tables))


def gaussian_tables(scales: ArrayLike) -> SymbolTables:
    """Tables of Gaussians of mean zero, integrated over unit bins.

    p(s) = Phi((s + 1/2) / scale) - Phi((s - 1/2) / scale) for |s| <= 6 scale (rounded
    up), evaluated on the tails (Balle et al. 2018, arXiv:1802.01436, section 2).

    Args:
        scales: [T], the standard deviations, > 0 and at most MAX_SYMBOL / 6.

    Raises:
        ValueError: a scale is out of range.
    """
    scales = np.asarray(scales, np.float64)
    if scales.ndim != 1 or not ((scales > 0) & (scales <= MAX_SYMBOL // 6)).all():
        raise ValueError(
            f"expected scales [T] above 0 and at most {MAX_SYMBOL // 6}, found {scales}"
        )
    pmfs, offsets = [], []
    for scale in scales:
        half_width = math.ceil(6 * scale)
        edges = (np.arange(half_width + 2) - 0.5) / (scale * math.sqrt(2))
        tails = np.array([0.5 * math.erfc(edge) for edge in edges])
        right = tails[:-1] - tails[1:]  # p(0), p(1), ...
        pmfs.append(np.concatenate([right[:0:-1], right]))
        offsets.append(-half_width)
    return tables_from_pmfs(pmfs, offsets)


def exact_model(counts: ArrayLike) -> Any:
    """A constriction model whose 24-bit frequencies are exactly `counts`.

    With `perfect=False` the library starts symbol i at
    floor(sum(p[:i]) * (2**24 - n) / sum(p)) + i. For p = counts - 1 the factor is 1
    and every sum is a whole number below 2**24, exact in float64 on any machine, so
    symbol i starts at sum(counts[:i]). (constriction 0.5.0,
    src/stream/model/categorical.rs, `fast_quantized_cdf`.)
    """
    probabilities = np.asarray(counts, np.float64) - 1.0
    return constriction.stream.model.Categorical(probabilities, perfect=False)


def escape_lengths(excess: NDArray[np.int32]) -> NDArray[np.int32]:
    """floor(log2(excess + 1))."""
    return np.frexp(excess + 1.0)[1] - 1


def _escape_bits(excess: NDArray[np.int32]) -> NDArray[np.floating]:
    """The bits of an escaped value in addition to its escape symbol."""
    lengths = escape_lengths(excess)
    return np.minimum(lengths + 1, MAX_ESCAPE_LENGTH) + lengths + 1.0


def as_symbols(symbols: ArrayLike) -> NDArray[np.int32]:
    """Symbols [n] as int32; raises ValueError if the coder does not take them."""
    array = np.asarray(symbols)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(
            f"expected whole numbers [n] as symbols, "
            f"found {array.dtype} of shape {array.shape}"
        )
    if array.size and not -MAX_SYMBOL <= array.min() <= array.max() <= MAX_SYMBOL:
        raise ValueError(
            f"expected symbols within +-{MAX_SYMBOL}, "
            f"found {array.min()} to {array.max()}"
        )
    return array.astype(np.int32)
