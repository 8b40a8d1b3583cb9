# SPDX-License-Identifier: Apache-2.0
"""A summary for people: Markdown tables that read as plain text too."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from semlic_jax.evaluation.results import Results, rate_text
from semlic_jax.evaluation.summary import CONFIDENCE, BdRate, Summary

_MOST_NAMED = 3  # of the smallest images


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, padded so that it reads as text too."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first, *rest = row
        padded = [
            cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)
        ]
        return "| " + " | ".join([first.ljust(widths[0]), *padded]) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [line(cells[0]), "| " + " | ".join(rule) + " |", *map(line, cells[1:])]


def number(value: float) -> str:
    """Four significant digits, as tables show them."""
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-3:
        return f"{value:.3e}"
    if size >= 1000:
        return f"{value:,.0f}"
    decimals = 3 if size < 1 else 3 - math.floor(math.log10(size))
    return f"{value:.{decimals + (size < 1)}f}"


def markdown(summary: Summary) -> str:
    """Tables of means, of BD-rates and of times, then the gaps and notes.

    A metric without any value has no table, and is among the gaps.
    """
    results = summary.results
    count = len(results.images)
    lines = [
        f"Means over {count} image{'s' * (count > 1)}; rates are whole files, at most "
        "the bits per pixel (bpp) asked for."
    ]
    if results.skipped:
        lines += ["", f"Skipped, {len(results.skipped)} files:", ""]
        lines += [f"* {skipped.name}: {skipped.reason}" for skipped in results.skipped]
    targets = results.targets()
    if not any(_used_bpp(results, codec) for codec in results.codecs):
        lines += ["", _out_of_reach(results)]
    header = [f"{rate_text(rate)} bpp" for rate in targets]
    for metric in _measured(summary):
        facts = results.metrics[metric]
        arrow = "higher" if facts.higher_is_better else "lower"
        patches = {row.patches for row in results.set_rows if metric in row.values}
        of_set = f", {max(patches)} patches" if patches else ""
        lines += ["", f"### {facts.label} ({arrow} is better{of_set})", ""]
        lines += table(
            ["codec", *header],
            [
                [
                    results.codecs[each.codec].label,
                    *_cells(targets, {p.target_bpp: p.value for p in each.points}),
                ]
                for each in summary.curves
                if each.metric == metric
            ],
        )
    lines += ["", "### Bits per pixel used", ""]
    lines += table(
        ["codec", *header],
        [
            [facts.label, *_cells(targets, _used_bpp(results, key))]
            for key, facts in results.codecs.items()
        ],
    )
    if _columns(summary, summary.bd_rates):
        label = results.codecs[summary.anchor].label
        lines += [
            "",
            f"### Bits at equal metric against {label} (BD-rate)",
            "",
            f"In brackets the {CONFIDENCE:.0%} interval over images; negative is "
            "better.",
            "",
        ]
        lines += bd_table(
            summary, summary.bd_rates, lambda found: results.codecs[found.codec].label
        )
    if _columns(summary, summary.to_published):
        lines += ["", "### Bits at equal metric against published curves (BD-rate)", ""]
        lines += bd_table(
            summary,
            summary.to_published,
            lambda found: f"{results.codecs[found.codec].label} : {found.anchor}",
        )
    lines += ["", "### Wall time of one call, median, under the load of the sweep", ""]
    lines += table(
        ["codec", "encode (s)", "decode (s)"],
        [
            [
                results.codecs[timing.codec].label,
                *(
                    "-" if seconds is None else f"{seconds:.2f}"
                    for seconds in (timing.encode_s, timing.decode_s)
                ),
            ]
            for timing in summary.timing
        ],
    )
    gaps = _gaps(summary)
    if gaps:
        lines += [
            "",
            "### Gaps",
            "",
            "Codecs and metrics by the names that the command line gives them.",
            "",
            *(f"* {gap}" for gap in gaps),
        ]
    if results.notes:
        lines += ["", "### Notes", "", *(f"* {note}" for note in results.notes)]
    # Names of files may have line breaks, and so may reasons that name one.
    return "\n".join(" ".join(line.splitlines()) for line in lines)


def _out_of_reach(results: Results) -> str:
    """What a reader is told where no codec reaches any rate on every image."""
    smallest = sorted(results.images, key=lambda image: image.width * image.height)
    named = [f"{image.name} ({image.width}x{image.height})" for image in smallest]
    return (
        "No codec reaches any of these rates on every image. The smallest images, "
        f"which take the most bits per pixel: {', '.join(named[:_MOST_NAMED])}."
    )


def _measured(summary: Summary) -> list[str]:
    """Metrics under which some codec has a point."""
    found = {each.metric for each in summary.curves if each.points}
    return [metric for metric in summary.results.metrics if metric in found]


def _used_bpp(results: Results, codec: str) -> dict[float, float]:
    """Mean rate of the files at each rate that the codec reaches on every image."""
    used: dict[float, list[float]] = {}
    for row in results.rows:
        if row.codec == codec and row.bpp is not None:
            used.setdefault(row.target_bpp, []).append(row.bpp)
    count = len(results.images)
    return {
        rate: sum(bpps) / count for rate, bpps in used.items() if len(bpps) == count
    }


def _cells(targets: Sequence[float], found: dict[float, float]) -> list[str]:
    return [number(found[rate]) if rate in found else "-" for rate in targets]


def bd_table(
    summary: Summary, found: Sequence[BdRate], name: Callable[[BdRate], str]
) -> list[str]:
    """Lines of a Markdown table of BD-rates: a row for each pair, metrics across.

    Args:
      summary: of the sweep.
      found: BD-rates of it; a metric without any value has no column.
      name: of the row that a BD-rate stands in.
    """
    metrics = _columns(summary, found)
    # By the pair: two codecs may be of one name for people.
    names: dict[tuple[str, str], str] = {}
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for each in found:
        text = "-" if each.percent is None else f"{each.percent:+.1f} %"
        if each.low is not None and each.high is not None:
            text += f" [{each.low:+.1f}, {each.high:+.1f}]"
        pair = each.codec, each.anchor
        names[pair] = name(each)
        cells.setdefault(pair, {})[each.metric] = text
    return table(
        ["codec", *(summary.results.metrics[metric].label for metric in metrics)],
        [[names[pair], *(c.get(m, "-") for m in metrics)] for pair, c in cells.items()],
    )


def _columns(summary: Summary, found: Sequence[BdRate]) -> list[str]:
    """Metrics that a table of these BD-rates shows."""
    shown = {each.metric for each in found}
    return [metric for metric in _measured(summary) if metric in shown]


def _gaps(summary: Summary) -> list[str]:
    """Every number that is missing from the tables, once for each reason."""
    points: dict[str, list[str]] = {}
    for each in summary.curves:
        for rate, why in each.gaps.items():
            where = f"{each.codec} at {rate_text(rate)} bpp: {why}"
            points.setdefault(where, []).append(each.metric)
    bd_rates: dict[str, list[str]] = {}
    intervals: dict[str, list[str]] = {}
    for found in (*summary.bd_rates, *summary.to_published):
        if not found.gap:
            continue
        # The same reason under several metrics names each of them.
        why = found.gap.replace(found.metric, "metric")
        if found.percent is None:
            where = f"no BD-rate of {found.codec} against {found.anchor}: {why}"
            bd_rates.setdefault(where, []).append(found.metric)
        elif found in summary.bd_rates:
            where = f"no interval: {why}"
            intervals.setdefault(where, []).append(found.metric)
    every = len(summary.results.metrics)
    gaps = []
    for kind in (points, bd_rates, intervals):
        for text, names in kind.items():
            names = list(dict.fromkeys(names))
            which = "" if len(names) == every else f"{', '.join(names)}: "
            gaps.append(which + text)
    return gaps
