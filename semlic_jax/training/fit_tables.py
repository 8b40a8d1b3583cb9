# SPDX-License-Identifier: Apache-2.0
"""Tables of y fitted to photographs, in place of those of the model's Gaussians.

Latents have heavier tails than the Gaussians that their scales stand for, and rare
symbols are expensive: 24 bits and more. So the tables of an exported model are fitted
to counts:

1. Count the symbols of all photographs at a range of qualities, for each table. The
   histogram of each quality is divided by the bits of that quality, so that a percent
   saved at one quality is worth as much as a percent saved at another.
2. Fit a mixture of zero-mean Gaussians to the symmetric histogram of each table by
   expectation maximisation: it is smooth and falling, with a tail as heavy as the
   symbols' own.
3. Add to the histogram `_PRIOR_SYMBOLS` symbols distributed like the mixture. Where
   there are many symbols the histogram decides; where there are none, the mixture.

A table ends where less than `_TAIL` is left beyond both ends together, for the escape.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from semlic_jax.codec import Codec
from semlic_jax.coding.symbol_tables import SymbolTables, tables_from_pmfs
from semlic_jax.model.priors import scale_table
from semlic_jax.model.transforms import HYPER_STRIDE
from semlic_jax.training.sources import Source, UnusableImage
from semlic_jax.weights import ModelFile

LEVELS = (0, 32, 64, 96, 128, 160, 191, 223, 255)
RADIUS = 1024  # symbols beyond it are left to the escape
_MAX_SIDE = 512  # of the part of a photograph that is used, in pixels
_PRIOR_SYMBOLS = 1000
_TAIL = 2.0**-16
_ITERATIONS = 100
# The mixture's scales continue those of the tables in the same steps: down to about
# half of the smallest and up to four times the largest.
_STEPS_BELOW, _STEPS_ABOVE = 7, 14


class Histogram(NamedTuple):
    """How often each symbol occurs in photographs, by quality level and table.

    Attributes:
        counts: int64 [L, T, 2 * RADIUS + 1], for the symbols from -RADIUS to RADIUS.
        bits: float64 [L], bits of the symbols of y under the codec's own tables.
        photographs: how many photographs were used.
        left_out: why others were not used.
    """

    counts: NDArray[np.int64]
    bits: NDArray[np.float64]
    photographs: int
    left_out: list[str]


def count_symbols(codec: Codec, source: Source) -> Histogram:
    """Count the symbols of y of photographs at each of LEVELS.

    Args:
        codec: the model.
        source: photographs; only the middle of each is used: at most 512 pixels a side,
            in multiples of 64 so that nothing is padded.

    Raises:
        ValueError: there is no photograph that can be used.
    """
    tables = codec.entropy.y_tables
    width = 2 * RADIUS + 1
    counts = np.zeros((len(LEVELS), len(tables) * width), np.int64)
    bits = np.zeros(len(LEVELS))
    left_out: list[str] = []
    for number in range(len(source)):
        try:
            pixels = _middle(source[number], number)
        except UnusableImage as error:
            left_out.append(str(error))
            continue
        latents = codec.analyse(pixels)
        for row, level in enumerate(LEVELS):
            y_scaled, z = codec.scaled(latents, level)
            symbols = codec.entropy.symbols(y_scaled, z, level, latents.size)
            y, indexes = symbols.y.ravel(), symbols.indexes.ravel()
            bits[row] += tables.ideal_bits(y, indexes)
            near = np.abs(y) <= RADIUS
            cells = indexes[near].astype(np.int64) * width + y[near] + RADIUS
            counts[row] += np.bincount(cells, minlength=counts.shape[1])
    used = len(source) - len(left_out)
    if not used:
        raise ValueError(
            f"expected photographs to fit tables to, found none usable among "
            f"{len(source)}: {left_out[0]}"
        )
    return Histogram(counts.reshape(len(LEVELS), -1, width), bits, used, left_out)


def fit_tables(counts: NDArray[np.floating]) -> SymbolTables:
    """Fit the tables to the number of times that each symbol occurs in each of them.

    Args:
        counts: float64 [64, 2 * RADIUS + 1], at least 0, for the symbols from -RADIUS
            to RADIUS. A table without any symbol gets its Gaussian.
    """
    steps = np.arange(-_STEPS_BELOW, len(scale_table()) + _STEPS_ABOVE)
    first, second = scale_table()[:2]
    parts = _gaussians(first * (second / first) ** steps)
    pmfs, offsets = [], []
    for own, found in zip(_gaussians(scale_table()), counts, strict=True):
        # With few symbols, the mixture must stay close to the table's own Gaussian.
        symmetric = (found + found[::-1]) / 2 + _PRIOR_SYMBOLS * own
        pmf = found + _PRIOR_SYMBOLS * _mixture(symmetric, parts)
        pmf /= pmf.sum()
        # beyond[k]: the probability outside of -k to k.
        beyond = np.cumsum((pmf[RADIUS:] + pmf[RADIUS::-1])[::-1])[::-1]
        beyond = np.append(beyond[1:], 0.0)
        reach = max(1, int(np.argmax(beyond < _TAIL)))
        pmfs.append(pmf[RADIUS - reach : RADIUS + reach + 1])
        offsets.append(-reach)
    return tables_from_pmfs(pmfs, offsets)


def with_fitted_tables(
    model: ModelFile, source: Source
) -> tuple[ModelFile, Histogram, NDArray[np.float64]]:
    """The model with tables of y fitted to photographs, and so another fingerprint.

    Args:
        model: the model; its own tables are used to weight the qualities.
        source: photographs of the kind that the model was trained on, none of which
            must be used for evaluation.

    Returns:
        the model, what was counted, and the percentage of the bits of y that is saved
        at each of LEVELS, float64 [L]. The savings are those on the photographs
        themselves: with a few hundred of them, hardly more than on others.

    Raises:
        ValueError: there is no photograph that can be used.
    """
    found = count_symbols(Codec(model), source)
    # Weighting keeps the total number of symbols, since the prior is in symbols too.
    weights = 1 / found.bits
    weights *= found.counts.sum() / (weights @ found.counts.sum((1, 2)))
    tables = fit_tables(np.tensordot(weights, found.counts, 1))
    bits, radius = tables.bits_lookup()
    # Symbols beyond the longest table count as those at its end, a few bits too little.
    reach = np.clip(np.arange(-RADIUS, RADIUS + 1), -radius, radius) + radius
    fitted_bits = np.sum(found.counts * bits.astype(np.float64)[:, reach], (1, 2))
    saved_percent = 100 * (1 - fitted_bits / found.bits)
    return dataclasses.replace(model, y_tables=tables), found, saved_percent


def report(found: Histogram, saved_percent: Sequence[float]) -> str:
    """Text that says what was fitted and what it saves."""
    lines = [f"left out: {reason}" for reason in found.left_out]
    savings = ", ".join(
        f"{percent:.2f} at {level}"
        for level, percent in zip(LEVELS, saved_percent, strict=True)
    )
    lines.append(f"tables of y fitted to {found.photographs} photographs")
    lines.append(
        f"bits of y saved on these photographs, in percent by quality level: {savings}"
    )
    return "\n".join(lines)


def _middle(pixels: NDArray[np.uint8], number: int) -> NDArray[np.uint8]:
    for axis in (0, 1):
        side = min(pixels.shape[axis], _MAX_SIDE) // HYPER_STRIDE * HYPER_STRIDE
        if not side:
            raise UnusableImage(
                f"photograph {number} ({pixels.shape[1]} x {pixels.shape[0]} pixels, "
                f"a side below {HYPER_STRIDE})"
            )
        start = (pixels.shape[axis] - side) // 2
        pixels = np.take(pixels, np.arange(start, start + side), axis)
    return pixels


def _gaussians(scales: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gaussians over unit bins, [len(scales), 2 * RADIUS + 1]; each sums to 1."""
    distance = np.abs(np.arange(-RADIUS, RADIUS + 1))
    # Use the tail below zero, where small differences keep their precision.
    upper = ndtr((0.5 - distance) / scales[:, None])
    mass = upper - ndtr((-0.5 - distance) / scales[:, None])
    return mass / mass.sum(1, keepdims=True)


def _mixture(
    counts: NDArray[np.float64], parts: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The mixture of `parts` fitted to the counts, by EM starting from equal shares."""
    seen = np.flatnonzero(counts)
    share = counts[seen] / math.fsum(counts)
    likelihood = parts[:, seen]
    mix = np.full(len(parts), 1 / len(parts))
    for _ in range(_ITERATIONS):
        mix *= likelihood @ (share / (mix @ likelihood))
    return mix @ parts
