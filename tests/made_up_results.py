# SPDX-License-Identifier: Apache-2.0
"""Results of a sweep whose means and BD-rates are known, for several test files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from semlic_jax.evaluation.results import (
    CodecFacts,
    ImageFacts,
    MetricFacts,
    Results,
    Row,
    SetRow,
)

RATES = (0.1, 0.2, 0.3, 0.4, 0.5)
# Fewer bits than AVIF at the same PSNR, image by image.
SAVING = {"avif": 1.0, "semlic": 0.8, "jpeg": 2.0}


def psnr_at(bpp: float, difficulty: float) -> float:
    return 35 + 6 * np.log2(bpp) - difficulty


def made_up(codecs=("semlic", "avif", "jpeg"), count=6, noise=0.0, seed=0) -> Results:
    """A sweep whose BD-rates are known: every curve is AVIF's, moved along the rate."""
    rng = np.random.default_rng(seed)
    images = [ImageFacts(f"{i}.png", f"{i:064x}", 768, 512) for i in range(count)]
    rows = []
    for index, image in enumerate(images):
        for codec in codecs:
            factor = SAVING[codec] * np.exp(noise * rng.standard_normal())
            for rate in RATES:
                psnr_db = psnr_at(rate / factor, index)
                rows.append(
                    Row(
                        image.name,
                        codec,
                        rate,
                        bpp=rate,
                        file_bytes=int(rate * 49152),
                        setting="1",
                        encode_s=1.0 + index,
                        decode_s=0.5,
                        values={"psnr_db": psnr_db, "distance": 1 / psnr_db},
                    )
                )
    return Results(
        images=tuple(images),
        skipped=(),
        codecs={codec: CodecFacts(codec.upper(), "1") for codec in codecs},
        image_metrics={
            "psnr_db": MetricFacts("PSNR (dB)", True),
            "distance": MetricFacts("Distance", False),
        },
        set_metrics={"frechet": MetricFacts("Fréchet distance", False)},
        rows=tuple(rows),
        set_rows=tuple(
            SetRow(codec, rate, rate, {"frechet": SAVING[codec] / rate}, patches=48)
            for codec in codecs
            for rate in RATES
        ),
    )


def without(results: Results, codec: str, image: str, rate: float, why: str) -> Results:
    rows = [
        Row(row.image, row.codec, row.target_bpp, gaps={"file": why})
        if (row.codec, row.image, row.target_bpp) == (codec, image, rate)
        else row
        for row in results.rows
    ]
    return replace(results, rows=tuple(rows))
