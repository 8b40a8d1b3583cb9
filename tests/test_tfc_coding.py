# SPDX-License-Identifier: Apache-2.0
"""The second coder: the same symbols out, nearly the same sizes.

Most of it runs where TensorFlow Compression is installed (`make test-tfc`).
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest

import semlic_jax
from semlic_jax.cli import main
from semlic_jax.coding import tfc_coding
from semlic_jax.coding.bitstream import BitstreamError, unpack
from semlic_jax.coding.entropy_coding import SymbolEncoder
from semlic_jax.coding.symbol_tables import (
    MAX_SYMBOL,
    gaussian_tables,
    tables_from_pmfs,
)
from semlic_jax.coding.tfc_coding import (
    TfcSymbolDecoder,
    TfcSymbolEncoder,
    narrow_counts,
)
from semlic_jax.evaluation.bit_allocation import bits_per_block
from semlic_jax.model.priors import scale_table
from semlic_jax.weights import load_model

INSTALLED = importlib.util.find_spec("tensorflow_compression_ops") is not None
needs_tfc = pytest.mark.skipif(
    not INSTALLED, reason="TensorFlow Compression is not installed (make test-tfc)"
)
Y_TABLES = gaussian_tables(scale_table())
Z_TABLES = tables_from_pmfs([np.array([0.2, 0.5, 0.2]), np.array([1.0])], [-1, 0])


def test_narrow_tables_cost_little():
    for start, stop in zip(Y_TABLES.starts, Y_TABLES.starts[1:], strict=False):
        counts = Y_TABLES.counts[start:stop]
        narrow = narrow_counts(counts)
        assert narrow.min() >= 1 and narrow.sum() == 2**16
        probability = counts / 2**24
        bits = -(probability * np.log2(probability)).sum()
        narrow_bits = -(probability * np.log2(narrow / 2**16)).sum()
        assert narrow_bits - bits < 0.003 + 0.004 * bits
    assert narrow_counts(np.array([2**23, 2**23])).tolist() == [2**15, 2**15]
    ends = narrow_counts(np.array([1, 2**24 - 2, 1]))
    assert ends.tolist() == [1, 2**16 - 2, 1]


def test_tables_of_too_many_counts_are_refused():
    widest = np.ones(2**16 - 1, np.int64)
    widest[-1] += 2**24 - widest.size
    narrow = narrow_counts(widest.astype(np.uint32))
    assert narrow.min() == 1 and narrow.sum() == 2**16
    tables = tables_from_pmfs([np.full(65537, 1 / 65537)], [-MAX_SYMBOL])
    for counts in (tables.counts, tables.counts[2:]):
        with pytest.raises(ValueError, match="fewer than 65536 counts.*found one of"):
            narrow_counts(counts)


def test_narrow_tables_never_change():
    """Files that were once written with this coder decode for ever."""
    model = load_model(Path(__file__).parent / "data" / "golden" / "1" / "model.npz")
    rows = tfc_coding._Lookup((model.z_tables, model.y_tables)).rows
    assert hashlib.sha256(rows.astype("<i4").tobytes()).hexdigest() == (
        "a09a66189e0318b7bb57997a43d47e2f7464d89acca958f13f757cc00ce2e672"
    )


@pytest.mark.skipif(INSTALLED, reason="TensorFlow Compression is installed")
def test_without_the_extra_it_is_one_sentence(tiny_model, tmp_path, capsys, photograph):
    from PIL import Image

    Image.fromarray(photograph(20, 20)).save(tmp_path / "a.png")
    arguments = [str(tmp_path / "a.png"), "--quality", "0.5", "--coder", "tfc"]
    assert main(["compress", *arguments, "--model", str(tiny_model)]) == 1
    error = capsys.readouterr().err
    assert "semlic_jax[tfc]" in error and error.count("\n") == 1
    with pytest.raises(ValueError, match="one of the coders ans, tfc, found 'rans'"):
        semlic_jax.load(tiny_model, coder="rans")


def symbols_of(rng, size):
    indexes = rng.integers(0, len(Y_TABLES), size)
    symbols = np.round(rng.standard_normal(size) * scale_table()[indexes])
    return symbols.astype(np.int32), indexes


@needs_tfc
def test_symbols_and_escapes_round_trip():
    rng = np.random.default_rng(0)
    pushes = []
    for _ in range(4):
        symbols, indexes = symbols_of(rng, 3000)
        wild = rng.integers(0, 3000, 60)
        symbols[wild] = rng.integers(-MAX_SYMBOL, MAX_SYMBOL + 1, 60)
        symbols[:2] = -MAX_SYMBOL, MAX_SYMBOL
        pushes.append((symbols, indexes, Y_TABLES))
    pushes.append((np.array([-1, 0, 1, 5, -7]), np.array([0, 1, 0, 1, 0]), Z_TABLES))
    pushes.append((np.zeros(0, int), np.zeros(0, int), Z_TABLES))
    encoder = TfcSymbolEncoder((Z_TABLES, Y_TABLES))
    for push in pushes:
        encoder.push(*push)
    data = encoder.finish()
    decoder = TfcSymbolDecoder(data, (Z_TABLES, Y_TABLES))
    for symbols, indexes, tables in pushes:
        np.testing.assert_array_equal(decoder.pop(indexes, tables), symbols)
    decoder.finish()


@needs_tfc
def test_sizes_are_within_half_a_percent():
    rng = np.random.default_rng(1)
    symbols, indexes = symbols_of(rng, 50000)
    ours, theirs = SymbolEncoder(), TfcSymbolEncoder((Y_TABLES,))
    for encoder in (ours, theirs):
        encoder.push(symbols, indexes, Y_TABLES)
    sizes = [len(encoder.finish()) for encoder in (ours, theirs)]
    assert abs(sizes[1] / sizes[0] - 1) < 0.005


@needs_tfc
def test_a_damaged_stream_is_an_error_or_wrong_symbols():
    rng = np.random.default_rng(2)
    symbols, indexes = symbols_of(rng, 2000)
    encoder = TfcSymbolEncoder((Y_TABLES,))
    encoder.push(symbols, indexes, Y_TABLES)
    data = encoder.finish()
    for position in rng.integers(0, len(data), 20):
        damaged = bytearray(data)
        damaged[position] ^= 255
        decoder = TfcSymbolDecoder(bytes(damaged), (Y_TABLES,))
        try:
            assert (decoder.pop(indexes, Y_TABLES) != symbols).any()
            decoder.finish()
        except BitstreamError:
            pass


@needs_tfc
@pytest.mark.parametrize("size", [(1, 1), (50, 70), (128, 192)])
def test_both_coders_give_the_same_image(codec, tiny_model, photograph, size):
    other = semlic_jax.load(tiny_model, coder="tfc")
    image = photograph(*size)
    for quality in (0.0, 0.5, 1.0):
        files = [c.compress(image, quality=quality) for c in (codec, other)]
        assert [unpack(data)[0].coder for data in files] == ["ans", "tfc"]
        images = [codec.decompress(data) for data in files]
        np.testing.assert_array_equal(*images)
        sizes = [len(data) for data in files]
        bits = bits_per_block(codec, files[1])
        np.testing.assert_array_equal(bits, bits_per_block(codec, files[0]))
        # Smaller where symbols lie in the tails: 16 bits cannot say how rare they are.
        assert 0.9 * sizes[0] <= sizes[1] <= 1.005 * sizes[0] + 8
