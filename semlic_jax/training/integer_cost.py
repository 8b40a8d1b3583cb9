# SPDX-License-Identifier: Apache-2.0
"""Measure what the integers cost: bits of the coded tables against the float networks.

    python -m semlic_jax.training.integer_cost RUN/integer MODEL.npz IMAGES...

The float side has everything that the coder lacks: unrounded weights, activations and
means, a continuous scale for each latent, and the density of z instead of its tables.
Both sides code the same latents. Tables that were fitted at export are more accurate
than the Gaussians of the float side and can make the cost negative: export without
`--fit-tables` to see what the integers alone cost.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from semlic_jax.codec import MAX_LEVEL, Codec
from semlic_jax.images import photograph_size, read_photograph
from semlic_jax.model.compression import CompressionModel, ModelConfig, image_masks
from semlic_jax.model.context import MEAN_STEPS, Pass
from semlic_jax.model.priors import gaussian_bits, scale_from_index
from semlic_jax.training.checkpoints import check_fits, read_params
from semlic_jax.training.programs import codec_shapes
from semlic_jax.weights import ModelFile, load_model

Array = jax.Array


@partial(jax.jit, static_argnums=0)
def float_bits(
    config: ModelConfig,
    params: Any,
    y_scaled: Array,
    z: Array,
    quality: Array,
    size: Array,
) -> Array:
    """Bits of one image's rounded latents under the float networks.

    Args:
        config: the model's architecture.
        params: float parameters of `CompressionModel`.
        y_scaled: float32 [h, w, M].
        z: float32 [h/4, w/4, N].
        quality: in [0, 1].
        size: int [2], height and width of the image in pixels.
    """
    model = CompressionModel(config, "float")
    masks = image_masks(size[None], (y_scaled.shape[0], y_scaled.shape[1]))
    z_hat = jnp.round(z)[None] * masks.z
    z_bits: Any = model.apply({"params": params}, z_hat, method="z_bits")
    total = jnp.sum(z_bits * masks.z)

    def visit(pass_: Pass, index: Array, mean: Array) -> Array:
        nonlocal total
        part = y_scaled[None, ..., pass_.start : pass_.stop]
        residual = jnp.round(part - mean / MEAN_STEPS)
        bits = gaussian_bits(residual, scale_from_index(index)) * masks.y
        rows, columns = jnp.ogrid[: bits.shape[1], : bits.shape[2]]
        ours = (rows + columns) % 2 == pass_.parity
        total = total + jnp.sum(bits * ours[None, ..., None])
        return residual * MEAN_STEPS + mean

    model.apply(
        {"params": params},
        z_hat,
        quality[None],
        masks,
        visit,
        method="traverse_latents",
    )
    return total


def integer_cost(
    codec: Codec, params: Any, images: Sequence[Path], qualities: Sequence[float]
) -> dict[str, float]:
    """Total bits of both sides, and the cost of the integers in percent."""
    exact, free = 0.0, 0.0
    for path in images:
        latents = codec.analyse(read_photograph(path).pixels)
        for quality in qualities:
            level = round(quality * MAX_LEVEL)
            y_scaled, z = codec.scaled(latents, level)
            symbols = codec.entropy.symbols(y_scaled, z, level, latents.size)
            exact += codec.entropy.ideal_bits(symbols, latents.size)
            bits = float_bits(
                codec.config,
                params,
                y_scaled,
                z,
                jnp.float32(level / MAX_LEVEL),
                np.asarray(latents.size, np.int32),
            )
            free += float(bits)
    cost = 100 * (exact / free - 1)
    return {"table_bits": exact, "float_bits": free, "cost_percent": cost}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m semlic_jax.training.integer_cost",
        description=__doc__.splitlines()[0],
    )
    parser.add_argument("stage", type=Path, help="folder of the checkpoints of a stage")
    parser.add_argument("model", help="name or path of the exported model")
    parser.add_argument("images", nargs="+", type=Path)
    arguments = parser.parse_args()
    qualities = (0.0, 0.25, 0.5, 0.75, 1.0)
    try:
        for path in arguments.images:
            photograph_size(path)  # to refuse now what is no image
        model = load_model(arguments.model)
        if not isinstance(model, ModelFile):
            raise ValueError(
                f"{arguments.model} is a converted model, which has no integer networks"
            )
        codec = Codec(model)
        params = read_params(arguments.stage)
        wanted = codec_shapes(CompressionModel(model.config))
        check_fits(params, wanted, arguments.stage, exactly=True)
        found = integer_cost(codec, params, arguments.images, qualities)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
