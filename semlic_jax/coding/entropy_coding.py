# SPDX-License-Identifier: Apache-2.0
"""Symbols and the indexes of their tables to bytes, and back.

    encoder = SymbolEncoder()                decoder = SymbolDecoder(data)
    encoder.push(z, z_indexes, z_tables)     z = decoder.pop(z_indexes, z_tables)
    encoder.push(y, y_indexes, y_tables)     y = decoder.pop(y_indexes, y_tables)
    data = encoder.finish()                  decoder.finish()

The model says which table each symbol has; this module knows nothing of images or
networks. `bitstream` documents the bytes precisely enough to write another decoder.

The coder is constriction's ANS coder with 24-bit frequencies. It is a stack, so the
encoder keeps what is pushed and codes it backwards at the end; the decoder runs
forwards, pass by pass. The usual choice is the same library's range coder, which
streams. On the skewed tables of an image codec (97 % zeros, 0.1 bit per symbol) ANS
comes closer to the ideal: it adds about 22 bits per stream whatever its length, where
the range coder adds 17 and 1 more for every 12,000 symbols. And the decoder returns to
the encoder's first state only if every symbol was decoded with the table that it was
coded with, so one whose networks disagree with the encoder's gets an error, not a wrong
picture.

May import: NumPy, constriction, `bitstream`.
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

from semlic_jax.coding.bitstream import BitstreamError

PRECISION_BITS = 24  # of constriction's Python interface
MAX_SYMBOL = 2**15  # largest magnitude of a symbol
MAX_TABLES = 2**16

# The state in which the encoder starts and the decoder must end. Not 0, where a decoder
# that has used up its data stays. Up to 16 bits it costs less than 1 bit: the first
# symbol fills the state to about 24 bits anyway.
_INITIAL_STATE = 0xC0DE

# A value `excess` steps outside its table has the length L = floor(log2(excess + 1)).
# Both ends of a table lie within MAX_SYMBOL, so excess < 2 * MAX_SYMBOL.
MAX_ESCAPE_LENGTH = 16


@dataclasses.dataclass(frozen=True, eq=False)
class SymbolTables:
    """Immutable integer frequencies of the symbols: part of the model.

    Table t covers the symbols `offsets[t], offsets[t] + 1, ...`, one per entry of
    `counts[starts[t]:starts[t + 1]]` except the last, which is the escape: it
    announces a symbol that the table does not cover. An entry of count c costs
    24 - log2(c) bits, exactly: the coder uses the counts as they are.

    The arrays are copied and made read-only.

    Attributes:
        offsets: int32 [T], smallest symbol of each table.
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

    def validate(self) -> None:
        """Check what the coder relies on; runs when the tables are made.

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
                f"expected starts from 0 to the {self.counts.size} counts, "
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
        totals = np.add.reduceat(self.counts.astype(np.int64), self.starts[:-1])
        if self.counts.min() < 1 or (totals != 1 << PRECISION_BITS).any():
            worst = int(np.argmax(totals != 1 << PRECISION_BITS))
            raise ValueError(
                f"expected counts >= 1 that sum to {1 << PRECISION_BITS} in each "
                f"table, found a least count of {self.counts.min()} and the sum "
                f"{totals[worst]} in table {worst}"
            )

    @property
    def num_tables(self) -> int:
        """T."""
        return self.offsets.size

    def __len__(self) -> int:
        return self.num_tables

    def ideal_bits(self, symbols: ArrayLike, indexes: ArrayLike) -> float:
        """Code length of the symbols, escapes included.

        What a stream takes beyond the sum of these is the end of the stream: 22 bits
        on average, at most 32.

        Args:
            symbols: integers [n] within +-MAX_SYMBOL.
            indexes: integers [n] in 0..T-1, the table of each symbol.

        Returns:
            bits, a float64 sum.

        Raises:
            ValueError: an argument has another type, shape or range.
        """
        symbols = as_symbols(symbols)
        indexes = self.as_indexes(indexes, symbols.size)
        slots, excess = self.slots(symbols, indexes)
        bits = self._slot_bits[self.starts[indexes] + slots].sum()
        escaped = slots == self.escapes[indexes]
        return float(bits + _escape_bits(excess[escaped]).sum())

    def bits_lookup(self) -> tuple[NDArray[np.float32], int]:
        """The code length of every symbol as one matrix, for rate estimates.

        `bits[t, symbol + radius]` is `ideal_bits([symbol], [t])`, also where table t
        does not cover the symbol. The radius is the largest magnitude of a symbol
        that any table covers; beyond it, a clipped symbol underestimates the rate by
        the few bits by which its escape is longer.

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
        """int32 [T], the slot of each table's escape."""
        return np.diff(self.starts) - 1

    @functools.cached_property
    def _slot_bits(self) -> NDArray[np.float64]:
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

    def as_indexes(self, indexes: ArrayLike, size: int) -> NDArray[np.unsignedinteger]:
        """Table indexes [size] as the smallest type; raises ValueError for others."""
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
        # NumPy's stable sort is a radix sort for integers of 8 and 16 bits only.
        return array.astype(np.uint8 if self.num_tables <= 256 else np.uint16)

    def slots(
        self, symbols: NDArray[np.integer], indexes: NDArray[np.integer]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The entry of each symbol in its table, and how far outside it lies.

        Returns:
            slots, int32 [n], the escape for symbols outside their table, and excess,
            int32 [n], steps beyond the first symbol outside (meaningless inside).
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

    What a distribution lacks to 1 becomes the probability of its escape, at least
    2**-24. Run once, when a model is exported: floats may differ between machines,
    so the model file stores the integers.

    Args:
        pmfs: float64 [n_t] each, >= 0; sums up to 1 + 1e-4 (float32) count as 1.
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
        # Rounding down leaves room for the ones. What is left over is at most twice the
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
        scales: [T], standard deviations, > 0 and at most MAX_SYMBOL / 6.

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


class SymbolEncoder:
    """Collects the symbols of one image and codes them into one stream."""

    def __init__(self) -> None:
        self._runs: list[tuple[NDArray[np.int32], Any]] = []

    def push(
        self, symbols: ArrayLike, indexes: ArrayLike, tables: SymbolTables
    ) -> None:
        """Append symbols, each coded with its own table.

        Args:
            symbols: integers [n] within +-MAX_SYMBOL; those that their table does
                not cover are escaped.
            indexes: integers [n] in 0..T-1, the table of each symbol; uint8 is
                fastest.
            tables: the tables.

        Raises:
            ValueError: an argument has another type, shape or range. Nothing is
                appended then.
        """
        symbols = as_symbols(symbols)
        indexes = tables.as_indexes(indexes, symbols.size)
        order = np.argsort(indexes, kind="stable")
        slots, excess = tables.slots(symbols[order], indexes[order])
        for table, start, stop in _groups(indexes):
            self._runs.append((slots[start:stop], tables._model(table)))
        escaped = np.flatnonzero(slots == tables.escapes[indexes[order]])
        if escaped.size:
            escaped = escaped[np.argsort(order[escaped])]  # in the caller's order
            positions = order[escaped]
            above = symbols[positions] > tables.offsets[indexes[positions]]
            self._push_escaped(excess[escaped], above)

    def _push_escaped(
        self, excess: NDArray[np.int32], above: NDArray[np.bool_]
    ) -> None:
        lengths = escape_lengths(excess)
        self._runs.append((lengths, _length_model()))
        # The bits of excess + 1 below its leading one, and the side in its place.
        values = excess + 1 + ((above.astype(np.int32) - 1) << lengths)
        for length in np.unique(lengths):
            self._runs.append((values[lengths == length], _side_model(int(length))))

    def finish(self) -> bytes:
        """The stream of everything pushed so far, never empty."""
        start = np.array([_INITIAL_STATE], np.uint32)
        coder = constriction.stream.stack.AnsCoder(start)
        for symbols, model in reversed(self._runs):
            coder.encode_reverse(symbols, model)
        words = coder.get_compressed()
        return words.astype("<u4").tobytes().rstrip(b"\0")


class SymbolDecoder:
    """Reads what a `SymbolEncoder` wrote, by the same sequence of calls.

    No data can make it hang or take more memory than a small multiple of what the
    caller asks for. A damaged stream decodes to wrong symbols or to an error, and
    `finish` finds out, except with a probability of about 2**-16.

    Args:
        data: what `SymbolEncoder.finish` returned.

    Raises:
        BitstreamError: the data ends in a zero byte, which no stream does.
    """

    def __init__(self, data: bytes) -> None:
        data = bytes(data)
        if data.endswith(b"\0"):
            raise BitstreamError(
                "expected a payload that ends in a byte other than zero, found zero: "
                "it is damaged"
            )
        words = np.frombuffer(data + b"\0" * (-len(data) % 4), "<u4")
        self._coder = constriction.stream.stack.AnsCoder(words.astype(np.uint32))

    def pop(self, indexes: ArrayLike, tables: SymbolTables) -> NDArray[np.int32]:
        """The symbols of the next push.

        Args:
            indexes: integers [n] in 0..T-1, those of the push.
            tables: those of the push.

        Returns:
            symbols, int32 [n].

        Raises:
            ValueError: an argument has another type, shape or range.
            BitstreamError: a symbol beyond +-MAX_SYMBOL, or the data has run out.
        """
        indexes = tables.as_indexes(indexes, np.size(indexes))
        order = np.argsort(indexes, kind="stable")
        slots = np.empty(order.size, np.int32)
        for table, start, stop in _groups(indexes):
            slots[start:stop] = self._coder.decode(tables._model(table), stop - start)
        symbols = np.empty_like(slots)
        symbols[order] = slots
        escaped = np.flatnonzero(symbols == tables.escapes[indexes])
        symbols += tables.offsets[indexes]
        if escaped.size:
            excess, above = self._pop_escaped(escaped.size)
            # Here `symbols` is one above the table's last symbol.
            lowest = tables.offsets[indexes[escaped]]
            values = np.where(above, symbols[escaped] + excess, lowest - 1 - excess)
            if np.abs(values).max() > MAX_SYMBOL:
                raise BitstreamError(
                    f"expected symbols within +-{MAX_SYMBOL}, "
                    f"found {values[np.abs(values).argmax()]}: the payload is damaged"
                )
            symbols[escaped] = values
        words_left, state = self._coder.pos()
        # Without words the state can only fall, and it has to end at its first value:
        # a caller need not go on to `finish` with data that claims more than it has.
        if words_left == 0 and state < _INITIAL_STATE:
            raise BitstreamError(
                "expected more symbols, found the end of the payload: it is damaged"
            )
        return symbols

    def _pop_escaped(self, size: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        lengths = self._coder.decode(_length_model(), size)
        values = np.empty(size, np.int32)
        for length in np.unique(lengths):
            members = np.flatnonzero(lengths == length)
            model = _side_model(int(length))
            values[members] = self._coder.decode(model, members.size)
        above = values >> lengths == 1
        return (values | 1 << lengths) - 1, above

    def finish(self) -> None:
        """Check that the stream ends here.

        Raises:
            BitstreamError: the stream has more or fewer symbols than were read, or
                some were read with other tables than they were written with.
        """
        if self._coder.pos() != (0, _INITIAL_STATE):  # (words left, state)
            raise BitstreamError(
                "expected the payload to end with the last symbol, found it out of "
                "step: it is damaged, or encoder and decoder used different tables"
            )


def _exact_model(counts: ArrayLike) -> Any:
    """A constriction model whose 24-bit frequencies are exactly `counts`.

    With `perfect=False` the library starts symbol i at
    floor(sum(p[:i]) * (2**24 - n) / sum(p)) + i. For p = counts - 1 the factor is 1
    and every sum is a whole number below 2**24, exact in float64 on any machine, so
    symbol i starts at sum(counts[:i]). (constriction 0.5.0,
    src/stream/model/categorical.rs, `fast_quantized_cdf`.)
    """
    probabilities = np.asarray(counts, np.float64) - 1.0
    return constriction.stream.model.Categorical(probabilities, perfect=False)


@functools.cache
def _length_model() -> Any:
    """P(L) = 2**-(L + 1): with side and remaining bits, an Elias gamma code."""
    counts = [2 ** (PRECISION_BITS - 1 - length) for length in range(MAX_ESCAPE_LENGTH)]
    return _exact_model([*counts, counts[-1]])


@functools.cache
def _side_model(length: int) -> Any:
    """One bit for the side and `length` bits for the place, all equally likely."""
    return constriction.stream.model.Uniform(2 ** (length + 1))


def escape_lengths(excess: NDArray[np.int32]) -> NDArray[np.int32]:
    """floor(log2(excess + 1))."""
    return np.frexp(excess + 1.0)[1] - 1


def _escape_bits(excess: NDArray[np.int32]) -> NDArray[np.floating]:
    """What an escaped value costs besides its escape symbol."""
    lengths = escape_lengths(excess)
    return np.minimum(lengths + 1, MAX_ESCAPE_LENGTH) + lengths + 1.0


def _groups(indexes: NDArray[np.unsignedinteger]) -> list[tuple[int, int, int]]:
    """(table, start, stop) of each table used, in the sorted order."""
    sizes = np.bincount(indexes)
    stops = np.cumsum(sizes)
    used = np.flatnonzero(sizes)
    starts = stops - sizes
    return [(int(t), int(starts[t]), int(stops[t])) for t in used]


def as_symbols(symbols: ArrayLike) -> NDArray[np.int32]:
    """Symbols [n] as int32; raises ValueError for what the coder does not take."""
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
