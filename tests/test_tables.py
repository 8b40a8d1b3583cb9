# SPDX-License-Identifier: Apache-2.0
"""The tables of a sweep, for people."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

from made_up_results import made_up, without

from semlic_jax.evaluation.results import (
    CodecFacts,
    ImageFacts,
    MetricFacts,
    Results,
    Row,
    Skipped,
)
from semlic_jax.evaluation.summary import summarise
from semlic_jax.evaluation.tables import markdown

RATES = (0.1, 0.2, 0.3, 0.4, 0.5)
LABELS = {"semlic": "Ours", "avif": "AVIF", "jpeg": "JPEG", "jpeg444": "JPEG"}


def a_sweep() -> Results:
    """One metric with values, one without."""
    rows = [
        Row(
            "0.png",
            codec,
            rate,
            bpp=rate,
            values={"psnr_db": 30 + 10 * rate - index},
            gaps={"dists": "needs 16x16 pixels"},
        )
        for index, codec in enumerate(LABELS)
        for rate in RATES
    ]
    return Results(
        images=(ImageFacts("0.png", "0" * 64, 8, 8),),
        skipped=(),
        codecs={codec: CodecFacts(label, "1") for codec, label in LABELS.items()},
        image_metrics={
            "psnr_db": MetricFacts("PSNR (dB)", True),
            "dists": MetricFacts("DISTS", False),
        },
        set_metrics={},
        rows=tuple(rows),
    )


def section(text: str, title: str) -> list[str]:
    """Rows of the table under a heading."""
    part = text.split(f"### {title}")[1].split("###")[0]
    return [line for line in part.splitlines() if line.startswith("|")]


def first_cells(rows: list[str]) -> list[str]:
    return [row.split("|")[1].strip() for row in rows[2:]]


def test_codecs_have_one_name_in_all_tables():
    text = markdown(summarise(a_sweep(), resamples=3))
    labels = list(LABELS.values())
    assert first_cells(section(text, "PSNR (dB)")) == labels
    assert first_cells(section(text, "Bits per pixel used")) == labels
    # Two codecs of one name keep a row each.
    assert first_cells(section(text, "Bits at equal")) == ["Ours", "JPEG", "JPEG"]


def test_rates_that_nobody_reaches_are_told_of_first():
    sweep = a_sweep()
    images = [ImageFacts(f"{n}.png", str(n) * 64, 80, 8 * n) for n in (4, 1, 3, 2)]
    rows = [
        dataclasses.replace(row, image=image.name, bpp=None, values={}, gaps={})
        for row in sweep.rows
        for image in images
    ]
    sweep = dataclasses.replace(sweep, images=tuple(images), rows=tuple(rows))
    text = markdown(summarise(sweep, resamples=3))
    assert "BD-rate)" not in text and "no BD-rate of semlic against avif" in text
    told = text.split("###")[0].splitlines()[-2]
    assert told.startswith("No codec reaches any of these rates on every image.")
    assert told.endswith("1.png (80x8), 2.png (80x16), 3.png (80x24).")
    assert "No codec reaches" not in markdown(summarise(a_sweep(), resamples=3))


def test_names_with_line_breaks_stay_in_their_lines():
    sweep = a_sweep()
    image = replace(sweep.images[0], name="c\nd.png")
    rows = tuple(replace(row, image=image.name, values={}) for row in sweep.rows)
    skipped = (Skipped("a\nb.png", "it is damaged"),)
    sweep = replace(sweep, images=(image,), rows=rows, skipped=skipped)
    text = markdown(summarise(sweep, resamples=3))
    assert "\n* a b.png: it is damaged\n" in text
    assert "(c d.png: it was not measured)\n" in text  # among the gaps


def test_metrics_without_a_value_have_no_table_and_are_told_of():
    text = markdown(summarise(a_sweep(), resamples=3))
    assert "### DISTS" not in text
    header = section(text, "Bits at equal")[0]
    assert "PSNR (dB)" in header and "DISTS" not in header
    gaps = text.split("### Gaps")[1]
    assert "dists: semlic at 0.1 bpp" in gaps and "needs 16x16 pixels" in gaps
    assert "by the names that the command line gives them" in gaps


def test_used_rates_are_those_of_the_files_and_of_all_images():
    results = made_up(("avif",))
    rows = [replace(row, bpp=0.9 * row.target_bpp) for row in results.rows]
    results = without(replace(results, rows=tuple(rows)), "avif", "3.png", 0.2, "no")
    text = markdown(summarise(results, resamples=1))
    part = text.partition("### Bits per pixel used")[2].splitlines()
    cells = [cell.strip() for cell in part[4].strip("|").split("|")]
    assert cells == ["AVIF", "0.0900", "-", "0.2700", "0.3600", "0.4500"]
