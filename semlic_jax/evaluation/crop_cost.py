# SPDX-License-Identifier: Apache-2.0
"""Does a model code whole photographs as well as the crops that it was trained on?

    python -m semlic_jax.evaluation.crop_cost MODEL IMAGES... --side 128

Codes each photograph whole and in tiles, and compares ideal bits of the same pixels.
Tiles know less about their surroundings, so a sound model needs fewer bits for the
whole. If it needs more, its networks learnt the borders of the training crops by heart:
of two runs on crops of 128 pixels, one ended 8 % and the other 30 % above the tiles at
its highest quality, while every number in the training log looked right.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from semlic_jax.codec import MAX_LEVEL, Codec, load
from semlic_jax.images import read_photograph

QUALITIES = (0.2, 0.6, 1.0)


def _ideal_bits(codec: Codec, image: np.ndarray, level: int) -> float:
    latents = codec.analyse(image)
    symbols = codec.entropy.symbols(*codec.scaled(latents, level), level, latents.size)
    return codec.entropy.ideal_bits(symbols, latents.size)


def crop_cost(
    codec: Codec,
    images: Sequence[np.ndarray],
    side: int,
    qualities: Sequence[float] = QUALITIES,
) -> list[dict[str, float]]:
    """Bits of whole images against those of their tiles, a record for each quality.

    Args:
        codec: the model.
        images: uint8 [H, W, 3]; what does not fill a tile is cut off.
        side: side of the tiles in pixels.
        qualities: from 0 to 1.

    Raises:
        ValueError: an image holds fewer than two tiles.
    """
    whole = []
    for image in images:
        rows, columns = (length // side for length in image.shape[:2])
        if rows * columns < 2:
            raise ValueError(
                f"expected images that hold at least two tiles of {side} pixels, found "
                f"{image.shape[1]}x{image.shape[0]}"
            )
        whole.append(image[: rows * side, : columns * side])
    pixels = sum(image[..., 0].size for image in whole)
    records = []
    for quality in qualities:
        level = round(quality * MAX_LEVEL)
        whole_bits = sum(_ideal_bits(codec, image, level) for image in whole)
        tile_bits = sum(
            _ideal_bits(codec, image[top : top + side, left : left + side], level)
            for image in whole
            for top in range(0, image.shape[0], side)
            for left in range(0, image.shape[1], side)
        )
        records.append(
            {
                "quality": quality,
                "whole_bpp": whole_bits / pixels,
                "tiles_bpp": tile_bits / pixels,
                "whole_percent": 100 * (whole_bits / tile_bits - 1),
            }
        )
    return records


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m semlic_jax.evaluation.crop_cost",
        description=__doc__.splitlines()[0],
    )
    parser.add_argument("model", help="name or path of a model")
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument(
        "--side", type=int, default=128, help="side of the tiles in pixels; default 128"
    )
    options = parser.parse_args(argv)
    if options.side < 1:
        parser.error(f"expected a side of at least 1, found {options.side}")
    try:
        images: list[Any] = [read_photograph(path).pixels for path in options.images]
        records = crop_cost(load(options.model), images, options.side)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    for record in records:
        print(json.dumps(record))


if __name__ == "__main__":
    main()
