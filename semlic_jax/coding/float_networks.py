# SPDX-License-Identifier: Apache-2.0
"""The entropy model of converted models: float networks, and a check in each file.

Published hyperprior models find the table of each latent in floats, which may come out
otherwise on another processor, with another number of threads or another release of
JAX; one index that differs makes the rest of the stream noise. It cannot be repaired
afterwards, so it is found out before any of y is decoded: a file holds a checksum over
the table indexes of its encoder, and a decoder that comes to others refuses.

The same compiled program finds the indexes and means for the encoder and the decoder;
what is rounded to symbols is computed after it, by NumPy.
"""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from semlic_jax.coding.bitstream import (
    INDEX_CHECK_BYTES,
    BitstreamError,
    IncompatibleMachineError,
)
from semlic_jax.coding.symbol_passes import (
    Parameters,
    PassCoder,
    Symbols,
    grid_of,
)
from semlic_jax.coding.symbol_tables import MAX_SYMBOL, SymbolTables
from semlic_jax.compilation import exact_program
from semlic_jax.model.compression import QUALITY_LEVELS
from semlic_jax.model.context import MEAN_STEPS
from semlic_jax.model.mean_scale import MeanScaleConfig, MeanScaleModel
from semlic_jax.model.transforms import HYPER_STRIDE, STRIDE

Array = jax.Array


@exact_program(static_argnums=0)
def _parameters(
    config: MeanScaleConfig, params: Any, z: Array, level: Array, inside: Array
) -> tuple[Array, Array]:
    """Index uint8 and mean float32 in 1/16 steps, [h, w, M], of z int32."""
    quality = level[None].astype(jnp.float32) / (QUALITY_LEVELS - 1)
    # Not TensorFloat-32 on GPUs: the fewer bits, the more indexes near a border.
    with jax.default_matmul_precision("highest"):
        found: Any = MeanScaleModel(config).apply(
            {"params": {"entropy": params}},
            z[None].astype(jnp.float32),
            quality,
            inside[None].astype(jnp.float32),
            method="parameters",
        )
    index, mean_steps = found
    return index[0].astype(jnp.uint8), mean_steps[0]


class FloatEntropyModel(PassCoder):
    """The entropy model of a converted model: same-machine decoding only."""

    def __init__(
        self,
        config: MeanScaleConfig,
        params: Any,
        y_tables: SymbolTables,
        z_tables: SymbolTables,
    ) -> None:
        """Args: params of `model.mean_scale.HyperSynthesis`, float32."""
        super().__init__(config, y_tables, z_tables)
        self._params = jax.device_put(jax.tree.map(np.array, params))

    def symbols(
        self, y_scaled: Array, z: Array, level: int, size: tuple[int, int]
    ) -> Symbols:
        z_symbols = _bounded_round(np.asarray(z))
        z_symbols = z_symbols * _inside(z_symbols.shape, size, HYPER_STRIDE)
        indexes, mean_steps = self._find(z_symbols, level, size)
        y_symbols = _bounded_round(np.asarray(y_scaled) - mean_steps / MEAN_STEPS)
        return Symbols(
            z=z_symbols,
            y=y_symbols * _inside(y_symbols.shape, size, STRIDE),
            indexes=indexes,
            mean_steps=mean_steps,
        )

    def parameters(
        self, z: np.ndarray, level: int, size: tuple[int, int], index_check: bytes
    ) -> Parameters:
        indexes, mean_steps = self._find(z, level, size)
        found = _checksum(indexes, size)
        if len(index_check) != INDEX_CHECK_BYTES:
            raise BitstreamError(
                "expected a checksum of the table indexes, as in all files of "
                "converted models, found none"
            )
        if found != index_check:
            raise IncompatibleMachineError(
                "expected a machine that computes the same table indexes as the one "
                f"that made the file (checksum {index_check.hex()}), found one that "
                f"does not ({found.hex()}): a converted model uses floating point, so "
                "its files decode only on the machine and with the software that made "
                "them"
            )
        return lambda pass_, y_hat: (indexes[None], mean_steps[None])

    def index_check(self, symbols: Symbols, size: tuple[int, int]) -> bytes:
        """The checksum over the table indexes inside the image."""
        return _checksum(symbols.indexes, size)

    def _find(
        self, z: np.ndarray, level: int, size: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        inside = _inside(z.shape, size, HYPER_STRIDE)
        found = _parameters(self.config, self._params, z, jnp.int32(level), inside)
        return np.asarray(found[0]), np.asarray(found[1])


def _checksum(indexes: np.ndarray, size: tuple[int, int]) -> bytes:
    rows, columns = grid_of(size, STRIDE)
    inside = indexes[:rows, :columns].tobytes()
    return hashlib.sha256(inside).digest()[:INDEX_CHECK_BYTES]


def _bounded_round(x: np.ndarray) -> np.ndarray:
    """Nearest int32 that the coder takes."""
    return np.clip(np.round(x), -MAX_SYMBOL, MAX_SYMBOL).astype(np.int32)


def _inside(shape: tuple[int, ...], size: tuple[int, int], stride: int) -> np.ndarray:
    """int32 [h, w, 1], 1 at the positions that are coded."""
    rows, columns = grid_of(size, stride)
    mask = np.zeros((*shape[:2], 1), np.int32)
    mask[:rows, :columns] = 1
    return mask
