# SPDX-License-Identifier: Apache-2.0
"""Bits of blocks where symbols lie far outside of their tables."""

from __future__ import annotations

import numpy as np

from semlic_jax.evaluation.bit_allocation import bits_per_block

SIZE = (64, 64)


def test_bits_of_escapes_are_counted(mini_codec, photograph):
    level = 200
    y_scaled, z = mini_codec.scaled(mini_codec.analyse(photograph(*SIZE)), level)
    y_scaled = np.array(y_scaled)
    y_scaled[1, 2, :8] = 20000
    symbols = mini_codec.entropy.symbols(y_scaled, z, level, SIZE)
    data = mini_codec.encode_symbols(symbols, level, SIZE)
    bits = bits_per_block(mini_codec, data)
    payload_bits = 8 * mini_codec.info(data)["payload_bytes"]
    assert bits.sum() - 8 <= payload_bits <= bits.sum() + 40
    expected = mini_codec.entropy.y_tables.ideal_bits(
        symbols.y[1, 2], symbols.indexes[1, 2]
    )
    assert bits[1, 2] > expected > 8 * 20
