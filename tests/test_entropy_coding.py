# SPDX-License-Identifier: Apache-2.0
"""Entropy coding: exact tables, round trips, code length, hostile data, golden bytes.

`reference_encode` and `reference_decode` are written from the format document in
`semlic_jax.coding.bitstream` with Python integers, and share no code with the package.
"""

import copy
import math
import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semlic_jax.coding.bitstream import BitstreamError
from semlic_jax.coding.entropy_coding import SymbolDecoder, SymbolEncoder
from semlic_jax.coding.symbol_tables import (
    MAX_COUNTS,
    MAX_SYMBOL,
    MAX_TABLES,
    PRECISION_BITS,
    SymbolTables,
    gaussian_tables,
    tables_from_pmfs,
)

TOTAL = 2**24
SCALES = np.exp(np.linspace(np.log(0.11), np.log(64.0), 64))


@pytest.fixture(scope="module")
def gaussian():
    return gaussian_tables(SCALES)


@pytest.fixture(scope="module")
def small():
    """Three tables: one symbol, lopsided, and one far from zero."""
    pmfs = [np.array([0.9]), np.array([0.5, 0.25, 0.2]), np.array([0.1, 0.8])]
    return tables_from_pmfs(pmfs, [0, -1, 1000])


def sample(num, seed, mean_index=4.0):
    """Symbols and indexes as an image has them: mostly narrow tables and zeros."""
    rng = np.random.default_rng(seed)
    indexes = np.clip(rng.exponential(mean_index, num), 0, 63).astype(np.uint8)
    symbols = np.rint(rng.standard_normal(num) * SCALES[indexes]).astype(np.int32)
    return symbols, indexes


def encode(*pushes):
    encoder = SymbolEncoder()
    for symbols, indexes, tables in pushes:
        encoder.push(symbols, indexes, tables)
    return encoder.finish()


def assert_round_trip(*pushes):
    data = encode(*pushes)
    decoder = SymbolDecoder(data)
    for symbols, indexes, tables in pushes:
        decoded = decoder.pop(indexes, tables)
        assert decoded.dtype == np.int32
        np.testing.assert_array_equal(decoded, symbols)
    decoder.finish()
    return data


def slot_spans(tables, table):
    """(start, count) of each slot."""
    counts = tables.counts[tables.starts[table] : tables.starts[table + 1]].tolist()
    return [(sum(counts[:slot]), count) for slot, count in enumerate(counts)]


LENGTH_SPANS = [
    (TOTAL - 2 ** (24 - length), 2 ** (23 - length)) for length in range(16)
]
LENGTH_SPANS.append((TOTAL - 2**8, 2**8))


def place_span(length, value):
    return value * 2 ** (23 - length), 2 ** (23 - length)


def spans_of(symbols, indexes, tables):
    """The (start, count) that code a push, in the order of the format document."""
    escaped, spans = [], []
    for table in range(len(tables.offsets)):
        slots = slot_spans(tables, table)
        for position in np.flatnonzero(np.asarray(indexes) == table).tolist():
            slot = int(symbols[position]) - int(tables.offsets[table])
            if not 0 <= slot < len(slots) - 1:
                k = slot - (len(slots) - 1) if slot > 0 else -1 - slot
                escaped.append((position, slot > 0, k))
                slot = len(slots) - 1
            spans.append(slots[slot])
    escaped.sort()
    lengths = [(k + 1).bit_length() - 1 for _, _, k in escaped]
    spans += [LENGTH_SPANS[length] for length in lengths]
    for length in range(17):
        for (_, above, k), own in zip(escaped, lengths, strict=True):
            if own == length:
                spans.append(place_span(length, above * 2**length + k + 1 - 2**length))
    return spans


def reference_encode(spans):
    state, words = 0xC0DE, []
    for start, count in reversed(spans):
        if state >> 40 >= count:
            words.append(state & 0xFFFFFFFF)
            state >>= 32
        state = (state // count << 24) + start + state % count
    while state:
        words.append(state & 0xFFFFFFFF)
        state >>= 32
    return b"".join(word.to_bytes(4, "little") for word in words).rstrip(b"\0")


class ReferenceDecoder:
    def __init__(self, data):
        padded = data + bytes(-len(data) % 4)
        chunks = [padded[i : i + 4] for i in range(0, len(padded), 4)]
        self.words = [int.from_bytes(chunk, "little") for chunk in chunks]
        self.state = 0
        for _ in range(min(2, len(self.words))):
            self.state = self.state << 32 | self.words.pop()

    def take(self, start, count):
        self.state = self.state // TOTAL * count + self.state % TOTAL - start
        if self.state < 2**32 and self.words:
            self.state = self.state << 32 | self.words.pop()

    def slot(self, spans):
        q = self.state % TOTAL
        slot = next(i for i, (start, count) in enumerate(spans) if q < start + count)
        self.take(*spans[slot])
        return slot

    def place(self, length):
        value = self.state % TOTAL // 2 ** (23 - length)
        self.take(*place_span(length, value))
        return value

    def pop(self, indexes, tables):
        symbols = [0] * len(indexes)
        escaped = []
        for table in range(len(tables.offsets)):
            slots = slot_spans(tables, table)
            for position in np.flatnonzero(np.asarray(indexes) == table).tolist():
                slot = self.slot(slots)
                symbols[position] = int(tables.offsets[table]) + slot
                if slot == len(slots) - 1:
                    escaped.append((position, slot))
        escaped.sort()
        lengths = [self.slot(LENGTH_SPANS) for _ in escaped]
        for length in range(17):
            for (position, size), own in zip(escaped, lengths, strict=True):
                if own == length:
                    side, r = divmod(self.place(length), 2**length)
                    k = 2**length - 1 + r
                    symbols[position] += k if side else -size - 1 - k
        return symbols


# Tables


def test_counts_reach_the_coder_unchanged(gaussian, small):
    """A stream of one symbol shows where its counts start."""
    for tables in (gaussian, small):
        for table in range(len(tables)):
            spans = slot_spans(tables, table)
            for slot in {0, (len(spans) - 1) // 2, len(spans) - 2}:
                data = encode(([tables.offsets[table] + slot], [table], tables))
                assert data == reference_encode([spans[slot]])


def test_gaussian_tables_follow_the_distribution(gaussian):
    for table, scale in enumerate(SCALES):
        begin, end = gaussian.starts[table], gaussian.starts[table + 1]
        counts = gaussian.counts[begin : end - 1].astype(np.float64)
        symbols = gaussian.offsets[table] + np.arange(counts.size)
        np.testing.assert_array_equal(symbols, -symbols[::-1])
        np.testing.assert_array_equal(counts, counts[::-1])
        assert symbols[-1] == math.ceil(6 * scale)
        upper = [math.erf((s + 0.5) / scale / math.sqrt(2)) / 2 for s in symbols]
        lower = [math.erf((s - 0.5) / scale / math.sqrt(2)) / 2 for s in symbols]
        pmf = np.array(upper) - np.array(lower)
        # What the counts lose against the distribution itself, in bits per symbol.
        loss = np.sum(pmf * (np.log2(np.maximum(pmf, 1e-300)) + 24 - np.log2(counts)))
        entropy = -np.sum(pmf * np.log2(np.maximum(pmf, 1e-300)))
        assert abs(loss) < 1e-4 * entropy + 1e-6
    assert gaussian.counts.nbytes < 150_000


def test_tables_from_pmfs_give_the_rest_to_the_escape():
    tables = tables_from_pmfs([np.array([0.5, 0.25]), np.array([0.0, 1.0])], [3, -1])
    expected = [TOTAL / 2, TOTAL / 4, TOTAL / 4, 1, TOTAL - 2, 1]
    np.testing.assert_allclose(tables.counts, expected, atol=3)
    assert tables.counts[3] == tables.counts[5] == 1
    np.testing.assert_array_equal(tables.offsets, [3, -1])
    np.testing.assert_array_equal(tables.starts, [0, 3, 6])
    # A sum above 1 by rounding is shared by all.
    assert np.ptp(tables_from_pmfs([np.full(10, 0.100009)], [0]).counts[:10]) <= 20


@pytest.mark.parametrize(
    "pmf",
    [
        np.full(65537, 1 / 65537),  # as wide as a table can be
        np.append(np.zeros(65536), 1e-300),
        np.array([1e-12]),
        np.append(np.full(20_000, 1e-8), 1.0 - 1e-4),
        np.append(np.full(20_000, 1.00009 / 20_000), 0.0),
    ],
)
def test_extreme_pmfs_make_valid_tables(pmf):
    tables = tables_from_pmfs([pmf], [-32768])
    assert tables.counts.size == pmf.size + 1
    symbols = np.arange(pmf.size, dtype=np.int32)[:: max(1, pmf.size // 50)] - 32768
    assert_round_trip((symbols, np.zeros(symbols.size, int), tables))


@pytest.mark.parametrize(
    "pmf",
    [[], [0.0], [-0.1, 0.5], [0.9, 0.2], [np.nan], [np.inf], [[0.5]], [1.0 + 2e-4]],
)
def test_bad_pmfs_are_refused(pmf):
    with pytest.raises(ValueError, match="^expected probabilities"):
        tables_from_pmfs([np.array([1.0]), np.array(pmf)], [0, 0])


def test_bad_table_arguments_are_refused():
    with pytest.raises(ValueError, match="at least one distribution"):
        tables_from_pmfs([], [])
    for scales in ([0.0], [-1.0], [np.nan], [6000.0], 1.0):
        with pytest.raises(ValueError, match="^expected scales"):
            gaussian_tables(scales)


@pytest.mark.parametrize(
    ("offsets", "starts", "counts"),
    [
        ([], [0], []),
        ([0], [0, 2, 4], [1, TOTAL - 1]),
        ([0], [1, 3], [1, 1, TOTAL - 1]),
        ([0], [0, 2], [1, TOTAL - 2, 1]),
        ([0, 0], [0, 2, 3], [1, TOTAL - 1, TOTAL]),
        ([0, 0, 0], [0, 4, 2, 6], [1, TOTAL - 1] * 3),
        ([0], [0, 2], [0, TOTAL]),
        ([0], [0, 2], [1, TOTAL]),
        ([0], [0, 2], [1, TOTAL - 2]),
        ([0], [0, 2], [0.5, TOTAL - 0.5]),
        ([0], [0, 2], [1, TOTAL - 1 - 2**32]),
        ([-32769], [0, 2], [1, TOTAL - 1]),
        ([32768], [0, 3], [1, 1, TOTAL - 2]),
        ([[0]], [0, 2], [1, TOTAL - 1]),
    ],
)
def test_invalid_tables_are_refused(offsets, starts, counts):
    with pytest.raises(ValueError, match="^expected .*, found "):
        SymbolTables(np.array(offsets), np.array(starts), np.array(counts))


def test_tables_cannot_change():
    counts = np.array([1, TOTAL - 1])
    tables = SymbolTables(np.array([0]), np.array([0, 2]), counts)
    counts[0] = 7
    assert tables.counts[0] == 1
    with pytest.raises(ValueError, match="read-only"):
        tables.counts[0] = 7


@pytest.mark.parametrize(
    "again",
    [lambda tables: pickle.loads(pickle.dumps(tables)), copy.deepcopy, copy.copy],
    ids=["pickle", "deepcopy", "copy"],
)
def test_copies_of_used_tables_are_whole_and_cannot_change(again, small):
    data = encode(([0, 5, 1000], [0, 1, 2], small))
    small.ideal_bits([0], [1])
    found = again(small)
    for name in ("offsets", "starts", "counts"):
        array = getattr(found, name)
        assert array.dtype == getattr(small, name).dtype
        np.testing.assert_array_equal(array, getattr(small, name))
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 7
    assert encode(([0, 5, 1000], [0, 1, 2], found)) == data


def test_the_check_of_tables_takes_little_memory():
    """A model file may be small and its tables not."""
    size = MAX_COUNTS
    one = np.ones(size, np.uint32)
    one[0] = TOTAL - size + 1
    counts = np.tile(one, 64)
    arrays = np.full(64, -MAX_SYMBOL), size * np.arange(65), counts
    SymbolTables(*arrays)  # loads what any tables need
    tracemalloc.start()
    SymbolTables(*arrays)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1.5 * counts.nbytes  # a copy, and a bool for each


# Round trips


def test_passes_of_an_image(gaussian, small):
    z = np.array([0, 0, 5, -1, 1000, -32768, 32768], np.int32)
    z_indexes = np.array([0, 1, 0, 1, 2, 2, 2])
    pushes = [(*sample(3000, seed), gaussian) for seed in range(4)]
    assert_round_trip((z, z_indexes, small), *pushes)


def test_nothing_and_empty_pushes(gaussian):
    assert encode() == b"\xde\xc0"
    SymbolDecoder(encode()).finish()
    empty = np.zeros(0, np.int32), np.zeros(0, np.uint8), gaussian
    assert assert_round_trip(empty, empty) == encode(([], [], gaussian)) == encode()
    assert_round_trip(empty, (np.array([3]), np.array([9]), gaussian), empty)


def test_every_symbol_has_a_code(small):
    """Also the far ends, where the escapes are longest."""
    symbols = np.arange(-MAX_SYMBOL, MAX_SYMBOL + 1, 7, dtype=np.int32)
    symbols = np.append(symbols, MAX_SYMBOL)
    for table in range(3):
        assert_round_trip((symbols, np.full(symbols.size, table), small))
    ends = tables_from_pmfs([np.array([1.0])] * 2, [-MAX_SYMBOL, MAX_SYMBOL])
    assert_round_trip((symbols, np.arange(symbols.size) % 2, ends))


@pytest.mark.parametrize("num_tables", [1, 256, 257, 1000])
def test_any_number_of_tables(num_tables):
    pmfs = [np.array([0.2, 0.5, 0.2])] * num_tables
    tables = tables_from_pmfs(pmfs, np.arange(num_tables) - 1)
    rng = np.random.default_rng(0)
    indexes = rng.integers(0, num_tables, 2000)
    push = indexes + rng.integers(-2, 3, 2000), indexes, tables
    assert assert_round_trip(push) == reference_encode(spans_of(*push))


def test_integer_types_and_strides_do_not_matter(gaussian):
    symbols, indexes = sample(500, 1, mean_index=20.0)
    data = encode((symbols, indexes, gaussian))
    spread = np.repeat(symbols.astype(np.int64), 2)[::2]
    assert encode((spread, indexes.astype(np.int64), gaussian)) == data
    assert encode((symbols.tolist(), indexes.tolist(), gaussian)) == data
    encoder = SymbolEncoder()
    encoder.push(symbols, indexes, gaussian)
    symbols[:] = 0  # the encoder has its own copy
    assert encoder.finish() == encoder.finish() == data


table_sets = st.lists(
    st.tuples(
        st.lists(st.integers(1, 1000), min_size=1, max_size=6),
        st.integers(-MAX_SYMBOL, MAX_SYMBOL - 5),
    ),
    min_size=1,
    max_size=4,
)
symbol_values = st.one_of(
    st.integers(-3, 3),
    st.integers(-200, 200),
    st.integers(-MAX_SYMBOL, MAX_SYMBOL),
)


@settings(deadline=None, max_examples=150)
@given(table_sets, st.lists(st.lists(st.tuples(symbol_values, st.integers(0, 3)))))
def test_equals_the_format_document(drawn_tables, drawn_pushes):
    pmfs = [np.array(w) / (sum(w) + 1) for w, _ in drawn_tables]
    tables = tables_from_pmfs(pmfs, [offset for _, offset in drawn_tables])
    pushes = [
        (
            np.array([symbol for symbol, _ in drawn], np.int32),
            np.array([index % len(tables) for _, index in drawn], np.uint8),
            tables,
        )
        for drawn in drawn_pushes
    ]
    data = assert_round_trip(*pushes)
    assert data == reference_encode(
        [span for push in pushes for span in spans_of(*push)]
    )
    decoder = ReferenceDecoder(data)
    for symbols, indexes, _ in pushes:
        assert decoder.pop(indexes, tables) == symbols.tolist()
    assert decoder.state == 0xC0DE and not decoder.words


# Code length


@pytest.mark.parametrize("mean_index", [1.0, 4.0, 20.0])
def test_streams_are_as_short_as_ideal_bits_says(gaussian, mean_index):
    symbols, indexes = sample(100_000, 3, mean_index)
    ideal_bits = gaussian.ideal_bits(symbols, indexes)
    data = assert_round_trip((symbols, indexes, gaussian))
    # 24 bits for the end of the stream and up to 8 for whole bytes.
    assert 0 < 8 * len(data) - ideal_bits < 32 + 1e-5 * ideal_bits


def test_overhead_is_below_a_twentieth_of_a_percent(gaussian):
    """At 0.15 bpp for 768 x 512 pixels: 294,912 latents, 59,000 bits."""
    symbols, indexes = sample(294_912, 4, mean_index=5.0)
    ideal_bits = gaussian.ideal_bits(symbols, indexes)
    assert 50_000 < ideal_bits < 70_000
    size_bits = 8 * len(encode((symbols, indexes, gaussian)))
    assert size_bits < 1.0005 * ideal_bits


def test_escapes_cost_what_ideal_bits_says(small):
    rng = np.random.default_rng(5)
    symbols = np.rint(rng.standard_t(1, 20_000) * 30).clip(-30_000, 30_000).astype(int)
    indexes = rng.integers(0, 3, symbols.size)
    size_bits = 8 * len(encode((symbols, indexes, small)))
    ideal_bits = small.ideal_bits(symbols, indexes)
    assert 0 < size_bits - ideal_bits < 32 + 1e-5 * ideal_bits


def test_ideal_bits_is_the_information_content(small):
    assert small.ideal_bits([], []) == 0.0
    assert small.ideal_bits([-1], [1]) == pytest.approx(1.0, abs=1e-5)
    assert small.ideal_bits([0, -1], [1, 1]) == pytest.approx(3.0, abs=1e-5)
    # Table 0 covers 0 only: its escape, then one bit each for length and side.
    escape_bits = -math.log2(0.1)
    assert small.ideal_bits([1], [0]) == pytest.approx(escape_bits + 2, abs=1e-4)
    assert small.ideal_bits([-2], [0]) == pytest.approx(escape_bits + 4, abs=1e-4)
    # excess 32767 + 1 = 2**15: 16 bits of length, 1 of side, 15 of place.
    assert small.ideal_bits([32768], [0]) == pytest.approx(escape_bits + 32, abs=1e-4)
    # The longest length shares its code's last bit: 16 + 1 + 16.
    ends = tables_from_pmfs([np.array([0.5])], [-MAX_SYMBOL])
    assert ends.ideal_bits([MAX_SYMBOL], [0]) == pytest.approx(1 + 33, abs=1e-4)


def test_bits_lookup_equals_ideal_bits(gaussian, small):
    for tables, expected_radius in ((gaussian, 384), (small, 1001)):
        bits, radius = tables.bits_lookup()
        assert radius == expected_radius
        assert bits.dtype == np.float32
        assert bits.shape == (len(tables), 2 * radius + 1)
        for table in range(0, len(tables), 7):
            for symbol in (-radius, -9, -1, 0, 1, 2, 50, radius):
                expected = tables.ideal_bits([symbol], [table])
                assert bits[table, symbol + radius] == pytest.approx(expected, rel=1e-6)


# Wrong calls and hostile data


@pytest.mark.parametrize(
    ("symbols", "indexes"),
    [
        ([1.0], [0]),
        ([[1]], [0]),
        ([1], [[0]]),
        ([1], [0.0]),
        ([1], [0, 0]),
        ([1], [3]),
        ([1], [-1]),
        ([MAX_SYMBOL + 1], [0]),
        ([-MAX_SYMBOL - 1], [0]),
        ([2**40], [0]),
        ([1], [256]),
    ],
)
def test_wrong_arguments_are_refused(small, symbols, indexes):
    encoder = SymbolEncoder()
    with pytest.raises(ValueError, match="^expected .*, found "):
        encoder.push(np.array(symbols), np.array(indexes), small)
    assert encoder.finish() == encode()
    with pytest.raises(ValueError, match="^expected .*, found "):
        small.ideal_bits(np.array(symbols), np.array(indexes))


@pytest.mark.parametrize("indexes", [[3], [-1], [0.0], [[0]], 0])
def test_wrong_indexes_are_refused_by_the_decoder(small, indexes):
    with pytest.raises(ValueError, match="^expected .*, found "):
        SymbolDecoder(b"").pop(np.array(indexes), small)


def test_a_decoder_with_one_other_table_is_found_out(gaussian):
    """The failure of float entropy models: one index differs on one side."""
    symbols, indexes = sample(5000, 6)
    data = encode((symbols, indexes, gaussian))
    rng = np.random.default_rng(7)
    for position in rng.integers(0, symbols.size, 50):
        other = indexes.copy()
        other[position] += 1 if other[position] < 63 else -1
        decoder = SymbolDecoder(data)
        with pytest.raises(BitstreamError):
            decoder.pop(other, gaussian)
            decoder.finish()


def test_missing_and_extra_symbols_are_found_out(gaussian):
    symbols, indexes = sample(5000, 8)
    data = encode((symbols, indexes, gaussian))
    for count in (0, 1, 4999):
        decoder = SymbolDecoder(data)
        with pytest.raises(
            BitstreamError, match="does not: it is damaged|end of the payload"
        ):
            decoder.pop(indexes[:count], gaussian)
            decoder.finish()


def test_damaged_streams_never_pass(gaussian):
    """Every flipped byte, truncation and extension: an error, here or at the end."""
    symbols, indexes = sample(400, 9, mean_index=20.0)
    data = encode((symbols, indexes, gaussian))
    damaged = [data[:size] for size in range(len(data))]
    damaged += [data + extra for extra in (b"\0", b"\1", b"\0\0\0\1", data)]
    for position in range(len(data)):
        for mask in (1, 16, 128, 255):
            flipped = bytearray(data)
            flipped[position] ^= mask
            damaged.append(bytes(flipped))
    for stream in damaged:
        with pytest.raises(BitstreamError):
            decoder = SymbolDecoder(stream)
            decoder.pop(indexes, gaussian)
            decoder.finish()


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200), st.lists(st.integers(0, 2), max_size=100))
def test_arbitrary_streams_decode_or_are_refused(small, data, indexes):
    """A stream that passes is the one that its symbols encode to."""
    indexes = np.array(indexes, np.uint8)
    try:
        decoder = SymbolDecoder(data)
        symbols = decoder.pop(indexes, small)
        decoder.finish()
    except BitstreamError:
        return
    assert np.abs(symbols).max(initial=0) <= MAX_SYMBOL
    assert encode((symbols, indexes, small)) == data


def test_escapes_beyond_the_limit_are_refused():
    """A stream that a foreign encoder could write: 32768 + 131070 in one escape."""
    tables = tables_from_pmfs([np.array([0.5])], [MAX_SYMBOL])
    spans = [slot_spans(tables, 0)[1], LENGTH_SPANS[16], place_span(16, 2**17 - 1)]
    with pytest.raises(BitstreamError, match="within .*, found 163839"):
        SymbolDecoder(reference_encode(spans)).pop([0], tables)


def test_a_short_stream_for_a_large_image_ends(gaussian):
    """At the first push that it does not fill, not when all symbols were decoded."""
    indexes = np.full(200_000, 63, np.uint8)
    decoder = SymbolDecoder(b"\xff" * 8)
    with pytest.raises(BitstreamError, match="end of the payload"):
        decoder.pop(indexes, gaussian)
    symbols, indexes = sample(3000, 10)
    data = encode((symbols, indexes, gaussian))
    decoder = SymbolDecoder(data)
    # The last state is the one that the stream has to end in: no error before it.
    np.testing.assert_array_equal(decoder.pop(indexes, gaussian), symbols)
    decoder.pop(indexes[:0], gaussian)
    decoder.finish()
    with pytest.raises(BitstreamError, match="end of the payload"):
        decoder.pop(indexes, gaussian)


# Golden bytes


def test_golden_bytes():
    """The bytes of format version 1, from integer tables that cannot round apart."""
    half = TOTAL // 2
    counts = [half - 1, half, 1, TOTAL // 8 - 1, TOTAL * 3 // 4, TOTAL // 8, 1]
    tables = SymbolTables(np.array([0, -1]), np.array([0, 3, 7]), np.array(counts))
    symbols = np.tile([0, 1, -1, 0, 1, 1, 0, 0], 8)
    symbols[[5, 17, 40]] = [300, -7, MAX_SYMBOL]
    indexes = np.tile([0, 0, 1, 1, 1, 0, 1, 1], 8)
    pushes = [
        (symbols[:20], indexes[:20], tables),
        (symbols[20:], indexes[20:], tables),
    ]
    data = assert_round_trip(*pushes)
    assert data == reference_encode(
        [span for push in pushes for span in spans_of(*push)]
    )
    assert data.hex() == "9856f2ba49e9df6d8256f536b225283c1de20d1e587e505a7e509d17"


def test_precision_is_that_of_the_format():
    assert 2**PRECISION_BITS == TOTAL


def test_escapes_below_the_limit_are_refused():
    """The same at the other side: -32769 - 131070 in one escape."""
    tables = tables_from_pmfs([np.array([0.5])], [-MAX_SYMBOL])
    spans = [slot_spans(tables, 0)[1], LENGTH_SPANS[16], place_span(16, 2**16 - 1)]
    with pytest.raises(BitstreamError, match="within .*, found -163839"):
        SymbolDecoder(reference_encode(spans)).pop([0], tables)


def test_more_tables_than_an_index_can_name_are_refused():
    """Indexes have 16 bits: table 65536 would be decoded as table 0."""
    offsets = np.zeros(MAX_TABLES + 1, int)
    starts = 2 * np.arange(MAX_TABLES + 2)
    counts = np.tile([1, TOTAL - 1], MAX_TABLES + 1)
    with pytest.raises(ValueError, match="1 to 65536 tables .* found 65537 offsets"):
        SymbolTables(offsets, starts, counts)
