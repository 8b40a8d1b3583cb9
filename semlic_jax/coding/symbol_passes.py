# SPDX-License-Identifier: Apache-2.0
"""The payload of a file: which symbols it contains, and in which order.

This module contains the pushes of z and of every pass over y, written once for both the
exact and the float entropy models. The table index and the mean of each symbol come
from `integer_networks` or `float_networks`, the tables from `symbol_tables` and the
coder from `entropy_coding`.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from semlic_jax.coding.entropy_coding import SymbolDecoder, SymbolEncoder
from semlic_jax.coding.symbol_tables import SymbolTables
from semlic_jax.model.context import (
    MEAN_STEPS,
    Pass,
    checkerboard,
    coding_order,
    traverse,
)
from semlic_jax.model.transforms import HYPER_STRIDE, STRIDE

# Index and mean of a pass, [1, h, w, C] each, from the part of y decoded so far.
Parameters = Callable[[Pass, tuple[np.ndarray, ...]], tuple[np.ndarray, np.ndarray]]


class Symbols(NamedTuple):
    """The symbols with which a file codes one image, on the padded grids.

    Attributes:
        z: int32 [h/4, w/4, N].
        y: int32 [h, w, M], `round(y_scaled - mean)`.
        indexes: uint8 [h, w, M], the table of each y symbol.
        mean_steps: means in 1/16 steps, [h, w, M]: int16, or float32 if the entropy
            model works in floats.
    """

    z: np.ndarray
    y: np.ndarray
    indexes: np.ndarray
    mean_steps: np.ndarray


class PassCoder(abc.ABC):
    """Converts symbols to bytes and back for one entropy model.

    Attributes:
        config: the model's configuration; `groups` and `hyper_channels` are used.
        y_tables, z_tables: the integer frequencies.
    """

    def __init__(
        self, config: Any, y_tables: SymbolTables, z_tables: SymbolTables
    ) -> None:
        self.config = config
        self.y_tables = y_tables
        self.z_tables = z_tables

    @abc.abstractmethod
    def symbols(
        self, y_scaled: Any, z: Any, level: int, size: tuple[int, int]
    ) -> Symbols:
        """Round the latents of one image to the values that the coder uses.

        Args:
            y_scaled: float32 [h, w, M], y * gain, h and w multiples of 4.
            z: float32 [h/4, w/4, N].
            level: quality, 0..255.
            size: height and width of the image in pixels.
        """

    @abc.abstractmethod
    def parameters(
        self, z: np.ndarray, level: int, size: tuple[int, int], index_check: bytes
    ) -> Parameters:
        """A function that gives a decoder the index and the mean of each pass.

        Args:
            z: int32 [h/4, w/4, N], decoded; zeros outside the image.
            level, size: as in `symbols`.
            index_check: the one in the file, see the method `index_check`.

        Raises:
            BitstreamError: float entropy networks need an index check, and the file
                has none.
            IncompatibleMachineError: they give other indexes here than where the file
                was made.
        """

    def index_check(self, symbols: Symbols, size: tuple[int, int]) -> bytes:
        """The index check of a file; empty for exact entropy models."""
        return b""

    def encode(
        self, symbols: Symbols, size: tuple[int, int], coder: str = "ans"
    ) -> bytes:
        """The payload of a file.

        Args:
            symbols: of the image.
            size: its height and width in pixels.
            coder: one of `bitstream.CODERS`.

        Raises:
            ValueError: a symbol is beyond +-2**15, the package of the coder is not
                installed, or the coder cannot use the tables.
        """
        encoder: Any = SymbolEncoder()
        if coder == "tfc":
            from semlic_jax.coding.tfc_coding import TfcSymbolEncoder

            encoder = TfcSymbolEncoder((self.z_tables, self.y_tables))
        rows, columns = grid_of(size, HYPER_STRIDE)
        z = symbols.z[:rows, :columns]
        encoder.push(z.ravel(), self._z_indexes(rows * columns), self.z_tables)
        for pass_, inside in self._passes(size):
            part = (*inside, slice(pass_.start, pass_.stop))
            encoder.push(
                symbols.y[part].ravel(), symbols.indexes[part].ravel(), self.y_tables
            )
        return encoder.finish()

    def ideal_bits(self, symbols: Symbols, size: tuple[int, int]) -> float:
        """The code length of the symbols under the tables, in bits."""
        rows, columns = grid_of(size, HYPER_STRIDE)
        z = symbols.z[:rows, :columns].ravel()
        total = self.z_tables.ideal_bits(z, self._z_indexes(rows * columns))
        rows, columns = grid_of(size, STRIDE)
        y = symbols.y[:rows, :columns].ravel()
        indexes = symbols.indexes[:rows, :columns].ravel()
        return total + self.y_tables.ideal_bits(y, indexes)

    def decode(
        self,
        payload: bytes,
        level: int,
        size: tuple[int, int],
        grid: tuple[int, int],
        index_check: bytes = b"",
        coder: str = "ans",
    ) -> np.ndarray:
        """Decode y_hat_scaled from a payload.

        Args:
            payload: the result of `encode`.
            level: quality, 0..255.
            size: height and width of the image in pixels.
            grid: height and width to which y is padded, multiples of 4. With an exact
                entropy model, the values inside the image do not depend on it.
            index_check, coder: those of the file.

        Returns:
            float32 [ceil(H/16), ceil(W/16), M].

        Raises:
            BitstreamError: the payload is not a valid stream of this model.
            IncompatibleMachineError: float entropy networks give other indexes here
                than where the file was made.
            ValueError: see `decoder`.
        """
        decoder = self.decoder(payload, coder)
        z = np.zeros((grid[0] // 4, grid[1] // 4, self.config.hyper_channels), np.int32)
        rows, columns = grid_of(size, HYPER_STRIDE)
        popped = decoder.pop(self._z_indexes(rows * columns), self.z_tables)
        z[:rows, :columns] = popped.reshape(rows, columns, -1)
        inside = dict(self._passes(size))

        def visit(pass_: Pass, index: np.ndarray, mean: np.ndarray) -> np.ndarray:
            part = (0, *inside[pass_])
            symbols = decoder.pop(index[part].ravel(), self.y_tables)
            symbols = symbols.reshape(-1, index.shape[-1]) * MEAN_STEPS
            values = np.zeros(index.shape, np.result_type(symbols, mean))
            values[part] = symbols + mean[part]
            return values

        parameters = self.parameters(z, level, size, index_check)
        groups = traverse(self.config.groups, grid, parameters, visit)
        decoder.finish()
        rows, columns = grid_of(size, STRIDE)
        y_hat = np.concatenate(groups, -1)[0, :rows, :columns]
        return y_hat.astype(np.float32) / MEAN_STEPS

    def decoder(self, payload: bytes, coder: str) -> Any:
        """A decoder for the symbols of a payload: z first, then each pass over y.

        Raises:
            ValueError: the package of the coder is not installed, or the coder cannot
                use the tables.
        """
        if coder == "tfc":
            from semlic_jax.coding.tfc_coding import TfcSymbolDecoder

            return TfcSymbolDecoder(payload, (self.z_tables, self.y_tables))
        return SymbolDecoder(payload)

    def _z_indexes(self, positions: int) -> np.ndarray:
        channels = self.config.hyper_channels
        return np.tile(np.arange(channels, dtype=np.uint16), positions)

    def _passes(
        self, size: tuple[int, int]
    ) -> Iterator[tuple[Pass, tuple[np.ndarray, np.ndarray]]]:
        """Each pass with the rows and columns of its positions inside the image."""
        colours = []
        for parity in (0, 1):
            rows, columns, _ = np.nonzero(checkerboard(*grid_of(size, STRIDE), parity))
            colours.append((rows, columns))
        for pass_ in coding_order(self.config.groups):
            yield pass_, colours[pass_.parity]


def grid_of(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Rows and columns of the grid that covers an image of this height and width."""
    return -(-size[0] // stride), -(-size[1] // stride)
