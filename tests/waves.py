# SPDX-License-Identifier: Apache-2.0
"""Grain and waves for the tests of the spectrum terms."""

from __future__ import annotations

import numpy as np


def grain(seed=1):
    """A grey image with fine noise, float32 [1, 256, 256, 3]."""
    noise = np.random.default_rng(seed).normal(size=(1, 256, 256, 1))
    return np.float32(0.5 + 0.04 * np.repeat(noise, 3, axis=-1))


def wave(rows, columns, amplitude, side=256):
    """A wave of so many periods in 32 pixels, float32 [1, side, side, 1]."""
    i, j = np.mgrid[:side, :side]
    phase = 2 * np.pi * (rows * i + columns * j) / 32
    return np.float32(amplitude * np.cos(phase))[None, ..., None]
