# SPDX-License-Identifier: Apache-2.0
"""Where in an image the bits of a `.semlic` file go."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from semlic_jax.coding.bitstream import unpack
from semlic_jax.coding.symbol_tables import SymbolTables

if TYPE_CHECKING:
    from semlic_jax.codec import Codec

_Z_PER_Y = 4  # positions of y along one side of a position of z


def bits_per_block(codec: Codec, data: bytes) -> np.ndarray:
    """Bits that a file spends on each block of 16 x 16 pixels.

    The bits of a hyper-latent, which describes 64 x 64 pixels, are shared out among its
    blocks. The sum is the length of the payload, except for the end of the stream and
    for the narrower tables of the coder `tfc`.

    Args:
      codec: the codec of the model that made the file.
      data: the file, refined or not.

    Returns:
      float64 [ceil(H/16), ceil(W/16)].

    Raises:
      BitstreamError: the data is damaged or not a `.semlic` file.
      IncompatibleModelError: another model made it.
    """
    header, y_hat = codec.decode_latents(data)
    entropy, channels = codec.entropy, codec.config.hyper_channels
    rows, columns = y_hat.shape[:2]
    z_rows, z_columns = -(-rows // _Z_PER_Y), -(-columns // _Z_PER_Y)
    z_indexes = np.tile(np.arange(channels), z_rows * z_columns)
    decoder = entropy.decoder(unpack(data)[1], header.coder)
    z = decoder.pop(z_indexes, entropy.z_tables)
    z_hat = z.reshape(z_rows, z_columns, channels)
    # Latents on the coder's grid round to exactly the symbols of the file.
    padding = (0, -rows % _Z_PER_Y), (0, -columns % _Z_PER_Y), (0, 0)
    symbols = entropy.symbols(
        jnp.asarray(np.pad(y_hat, padding)),
        jnp.asarray(z_hat, jnp.float32),
        header.quality,
        (header.height, header.width),
    )
    y_bits = _bits(
        entropy.y_tables, symbols.y[:rows, :columns], symbols.indexes[:rows, :columns]
    )
    z_bits = _bits(entropy.z_tables, z_hat, z_indexes.reshape(z_hat.shape))
    cells = np.ones((_Z_PER_Y, _Z_PER_Y))
    inside = np.kron(np.ones_like(z_bits), cells)[:rows, :columns]
    # A hyper-latent at the edge describes fewer than sixteen blocks.
    counts = np.add.reduceat(
        np.add.reduceat(inside, np.arange(0, rows, _Z_PER_Y), axis=0),
        np.arange(0, columns, _Z_PER_Y),
        axis=1,
    )
    return y_bits + np.kron(z_bits / counts, cells)[:rows, :columns]


def _bits(tables: SymbolTables, symbols: np.ndarray, indexes: np.ndarray) -> np.ndarray:
    """Code lengths [h, w] of symbols [h, w, C], summed over channels."""
    bits = tables.symbol_bits(symbols.ravel(), indexes.ravel())
    return bits.reshape(symbols.shape).sum(axis=-1)
