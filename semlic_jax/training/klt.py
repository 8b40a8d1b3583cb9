# SPDX-License-Identifier: Apache-2.0
"""A working codec to start from: the Karhunen-Loève transform of photographs.

A trainable linear block transform (`linear_skip`) runs beside g_a and g_s. This module
sets it to the KLT of 16 x 16 blocks, and the scales of the entropy model to the
standard deviation of each component, so that training starts at a decent transform
codec.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from semlic_jax.model.compression import ModelConfig
from semlic_jax.model.priors import index_from_scale
from semlic_jax.model.transforms import STRIDE, filter_borders, lapping_matrix

# Quantisation step of the coefficients in image units at a gain of 1, the coarsest
# quality: about 200 of 255 grey levels.
BASE_STEP = 0.8


def block_covariance(images: Iterable[np.ndarray]) -> np.ndarray:
    """Second moment of 16 x 16 RGB blocks about mid-grey, after the lapping filter.

    Args:
        images: uint8 [H, W, 3] each.

    Returns:
        float64 [768, 768], in squared image units ([0, 1]); rows in the order of
        `layers.space_to_depth`.

    Raises:
        ValueError: no image holds a block.
    """
    size = 3 * STRIDE**2
    lapping = lapping_matrix().astype(np.float32)
    total = np.zeros((size, size))
    count = 0
    for image in images:
        rows, columns = image.shape[0] // STRIDE, image.shape[1] // STRIDE
        if not rows * columns:
            continue
        image = image[: rows * STRIDE, : columns * STRIDE] / np.float32(255) - 0.5
        image = filter_borders(image[None], lapping)[0]
        blocks = image.reshape(rows, STRIDE, columns, STRIDE, 3).transpose(
            0, 2, 1, 3, 4
        )
        blocks = blocks.reshape(-1, size)
        total += blocks.T @ blocks
        count += len(blocks)
    if not count:
        raise ValueError("expected photographs of at least 16 x 16 pixels, found none")
    return total / count


def start_from_klt(
    params: dict[str, Any], config: ModelConfig, covariance: np.ndarray
) -> dict[str, Any]:
    """Initial parameters whose linear part is the KLT and whose scales fit it.

    Args:
        params: a fresh parameter tree of `CompressionModel`.
        config: the model's architecture; must have `linear_skip`.
        covariance: from `block_covariance`.

    Returns:
        A new tree of the same shapes.

    Raises:
        ValueError: the model has no linear skip.
    """
    if not config.linear_skip:
        raise ValueError(
            "a KLT start needs a model with linear_skip, found one without"
        )
    values, vectors = np.linalg.eigh(covariance)
    order = np.argsort(values)[::-1][: config.latent_channels]
    basis = vectors[:, order]
    # Standard deviations in units of the coarsest step. The mean of the blocks is about
    # mid-grey, so the second moments about mid-grey serve as variances.
    deviation = np.sqrt(np.maximum(values[order], 1e-8)) / BASE_STEP
    tree = jax.tree.map(np.array, params)
    tree["g_a"]["skip"]["kernel"][:] = basis / BASE_STEP
    tree["g_s"]["skip"]["kernel"][:] = basis.T * BASE_STEP
    tree["g_a"]["skip_lapping"][:] = lapping_matrix()
    tree["g_s"]["skip_lapping"][:] = lapping_matrix().T
    tree["g_s"]["input_scale"][:] = 1 / deviation
    tree["h_a"]["input_scale"][:] = 1 / deviation
    log_gain = np.mean(tree["log_gain"], axis=1)
    # Table index of each deviation at the lowest and highest quality: the first becomes
    # the bias, their difference the slope over the quality byte, which the last layers
    # read as their last input.
    low = index_from_scale(deviation * math.exp(log_gain[0]))
    high = index_from_scale(deviation * math.exp(log_gain[-1]))
    start = 0
    for k, channels in enumerate(config.groups):
        layer = tree["entropy"][f"g_ep_{k}_index"]
        part = slice(start, start + channels)
        # An index unit is 4 accumulator units, a bias unit is 32 of them.
        layer["bias"][:] = low[part] * 4 / 32
        layer["kernel"][0, 0, -1, :] = (high - low)[part] * 4 / 255
        start += channels
    return jax.tree.map(jnp.asarray, tree)
