# SPDX-License-Identifier: Apache-2.0
"""Summary of a sweep: means over images, BD-rates with confidence intervals, gaps.

A point of a curve is the mean over *all* images of the set, of the rate as of the
metric; a codec that misses a rate on one image has no point there, since a mean over
fewer images would be a mean over another set. (Under a metric of the set, the images
are those that hold a patch, for every codec.) BD-rates are those of
`objectives.bd_rates` between such curves; their intervals come from resampling the
images with replacement (Efron's percentile bootstrap, with wider tails for few images),
with both curves on the same sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.special import ndtr, stdtrit

from semlic_jax.evaluation.published import PublishedCurve
from semlic_jax.evaluation.results import (
    Results,
    Row,
    rate_text,
    require_same_images,
)
from semlic_jax.objectives.bd_rates import RateCurve, bd_rate

RESAMPLES = 1000
CONFIDENCE = 0.95
# If a larger share of the resampled curves cannot be compared, there is no interval.
_MOST_FAILURES = 0.05
# Fewer images get no interval: resampled means stay within the images' own values, and
# those of 4 images all lie on one side of the truth about once in 8 times.
_FEWEST_IMAGES = 5


@dataclass(frozen=True)
class Point:
    """Mean over a set of images at one rate that was asked for."""

    target_bpp: float
    bpp: float
    value: float


@dataclass(frozen=True)
class Curve:
    """The curve of one codec under one metric.

    Attributes:
      codec, metric: keys of `Results`.
      points: in ascending order of the rate.
      gaps: rate to the reason why there is no point.
      samples: float64 [2, images, points], bpp and metric of each image, or None for
        metrics of the set.
    """

    codec: str
    metric: str
    points: tuple[Point, ...]
    gaps: dict[float, str]
    samples: np.ndarray | None = None


@dataclass(frozen=True)
class BdRate:
    """Bits of a codec relative to those of an anchor at equal metric, in percent.

    Attributes:
      anchor, codec, metric: those of the two curves.
      percent: negative if the codec needs fewer bits; None with a `gap`.
      low, high: the confidence interval, or None if there is none.
      gap: why there is no number, or no interval.
    """

    anchor: str
    codec: str
    metric: str
    percent: float | None
    low: float | None = None
    high: float | None = None
    gap: str = ""


def curve(results: Results, codec: str, metric: str) -> Curve:
    """The curve of a codec under a metric of images or of the set.

    Raises:
      ValueError: the results have no such codec or metric.
    """
    if codec not in results.codecs:
        raise ValueError(
            f"the results have no codec {codec!r}: they have "
            f"{', '.join(results.codecs)}"
        )
    if metric in results.set_metrics:
        return _set_curve(results, codec, metric)
    if metric not in results.image_metrics:
        raise ValueError(
            f"the results have no metric {metric!r}: they have "
            f"{', '.join(results.metrics)}"
        )
    points, samples = [], []
    gaps: dict[float, str] = {}
    by_rate: dict[float, dict[str, Row]] = {}
    for row in results.rows:
        if row.codec == codec:
            by_rate.setdefault(row.target_bpp, {})[row.image] = row
    names = [image.name for image in results.images]
    for rate in sorted(by_rate):
        rows = [by_rate[rate].get(name) for name in names]
        reason = _reason(rows, metric)
        if reason:
            gaps[rate] = reason
            continue
        pairs = np.array([(r.bpp, r.values[metric]) for r in rows if r is not None])
        bpp, value = pairs.mean(axis=0)
        points.append(Point(rate, float(bpp), float(value)))
        samples.append(pairs.T)
    stacked = np.stack(samples, axis=-1) if samples else None
    return Curve(codec, metric, tuple(points), gaps, stacked)


def _reason(rows: Sequence[Row | None], metric: str) -> str:
    """Why a rate has no point: how many images lack it, and the first one's reason."""
    lacking = [
        (row, "it is not in the results" if row is None else _gap_of(row, metric))
        for row in rows
        if row is None or metric not in row.values
    ]
    if not lacking:
        return ""
    row, why = lacking[0]
    where = f" ({row.image}: {why})" if row is not None else f" ({why})"
    return f"{len(lacking)} of {len(rows)} images have none{where}"


def _gap_of(row: Row, metric: str) -> str:
    return row.gaps.get("file") or row.gaps.get(metric) or "it was not measured"


def _set_curve(results: Results, codec: str, metric: str) -> Curve:
    points, gaps = [], {}
    for row in results.set_rows:
        if row.codec != codec:
            continue
        if metric in row.values and row.bpp is not None:
            points.append(Point(row.target_bpp, row.bpp, row.values[metric]))
        else:
            gaps[row.target_bpp] = row.gaps.get(metric, "it was not measured")
    points.sort(key=lambda point: point.target_bpp)
    return Curve(codec, metric, tuple(points), gaps)


def bd_rate_of(
    results: Results,
    codec: str,
    anchor: str,
    metric: str,
    *,
    anchor_results: Results | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> BdRate:
    """BD-rate of a codec against an anchor, with its interval.

    Args:
      results: results of the codec, and of the anchor unless it has its own.
      codec, anchor: keys of codecs.
      metric: name of a metric of images, or of the set, which has no interval.
      anchor_results: results of the anchor, if it is from another sweep.
      resamples: number of resamples of the images.
      seed: seed of the resampling.

    Raises:
      ValueError: the two are over different images, or a name is unknown.
    """
    theirs = anchor_results or results
    require_same_images(results, theirs)
    test, base = curve(results, codec, metric), curve(theirs, anchor, metric)
    where = anchor, codec, metric
    try:
        percent = bd_rate(_rate_curve(base), _rate_curve(test))
    except ValueError as error:
        return BdRate(*where, None, gap=_with_gaps(str(error), test, base))
    if test.samples is None or base.samples is None:
        return BdRate(*where, percent, gap="a metric of the set has no interval")
    count = test.samples.shape[1]
    if count < _FEWEST_IMAGES:
        return BdRate(*where, percent, gap=f"no interval from {count} images")
    # The same image may have another place in another sweep.
    order = [image.sha256 for image in theirs.images]
    places = [order.index(image.sha256) for image in results.images]
    base_samples = base.samples[:, places]
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        chosen = rng.integers(0, count, count)
        pair = []
        for which, samples in ((base, base_samples), (test, test.samples)):
            bpp, values = samples[:, chosen].mean(axis=1)
            pair.append((which, bpp, values))
        try:
            found.append(bd_rate(*(_rate_curve(c, b, v) for c, b, v in pair)))
        except ValueError:
            continue
    if len(found) < (1 - _MOST_FAILURES) * resamples:
        lost = resamples - len(found)
        return BdRate(
            *where,
            percent,
            gap=f"{lost} of {resamples} resampled curves do not compare",
        )
    tail = 100 * _tail(count)
    low, high = np.percentile(found, [tail, 100 - tail])
    return BdRate(*where, percent, float(low), float(high))


def _tail(count: int) -> float:
    """Share of resampled values to leave out on either side, for `count` images.

    The plain percentiles of few images are too narrow: resampled means of n images
    spread too little, by a factor of sqrt((n - 1) / n), and have the tails of a normal
    distribution where those of Student's are right. This is the correction of
    Hesterberg 2015 ("What teachers should know about the bootstrap", arXiv:1411.5279).
    """
    student = stdtrit(count - 1, (1 - CONFIDENCE) / 2)
    return float(ndtr(np.sqrt(count / (count - 1)) * student))


def _rate_curve(
    curve: Curve, bpp: np.ndarray | None = None, values: np.ndarray | None = None
) -> RateCurve:
    return RateCurve(
        bpp=[p.bpp for p in curve.points] if bpp is None else list(bpp),
        values=[p.value for p in curve.points] if values is None else list(values),
        metric=curve.metric,
        name=curve.codec,
    )


def _with_gaps(text: str, *curves: Curve) -> str:
    """Add the rates without a point, if there are any, to a refusal."""
    for each in curves:
        if each.gaps:
            rates = ", ".join(map(rate_text, sorted(each.gaps)))
            text += f"; {each.codec} has no point at {rates} bpp"
    return text


def bd_rate_to_published(
    results: Results, codec: str, published: PublishedCurve, metric: str
) -> BdRate:
    """BD-rate of a codec against a published curve over the same images.

    There is no interval, since others publish only means.

    Raises:
      ValueError: the results have no such codec or metric.
    """
    where = published.name, codec, metric
    test = curve(results, codec, metric)
    if metric not in published.values:
        return BdRate(*where, None, gap=f"{published.name} has no values of it")
    try:
        base = RateCurve(
            published.bpp, published.values[metric], metric, name=published.name
        )
        percent = bd_rate(base, _rate_curve(test))
    except ValueError as error:
        return BdRate(*where, None, gap=_with_gaps(str(error), test))
    return BdRate(*where, percent, gap="published means have no interval")


@dataclass(frozen=True)
class Timing:
    """Median wall times of one call of a codec over images and rates, in seconds.

    They are medians because the first call of each shape compiles.
    """

    codec: str
    encode_s: float | None
    decode_s: float | None


@dataclass(frozen=True)
class Summary:
    """Everything that is reported of a sweep: by `facts` to programs, else by `tables`.

    Attributes:
      results: results of the sweep.
      anchor: codec that BD-rates are relative to.
      curves: curve of every codec under every metric.
      bd_rates: BD-rate of every other codec under every metric.
      to_published: BD-rates relative to curves that others have published.
      timing: times of every codec.
    """

    results: Results
    anchor: str
    curves: tuple[Curve, ...]
    bd_rates: tuple[BdRate, ...]
    to_published: tuple[BdRate, ...]
    timing: tuple[Timing, ...]

    def facts(self) -> dict[str, object]:
        """The summary in a form that JSON can hold, for programs."""
        return {
            "images": len(self.results.images),
            "set_sha256": self.results.set_sha256(),
            "skipped": [asdict(skipped) for skipped in self.results.skipped],
            "anchor": self.anchor,
            "curves": [
                {
                    "codec": curve.codec,
                    "metric": curve.metric,
                    "points": [asdict(point) for point in curve.points],
                    "gaps": {rate_text(rate): why for rate, why in curve.gaps.items()},
                }
                for curve in self.curves
            ],
            "bd_rates": [asdict(found) for found in self.bd_rates],
            "to_published": [asdict(found) for found in self.to_published],
            "timing": [asdict(timing) for timing in self.timing],
            "notes": list(self.results.notes),
        }


def summarise(
    results: Results,
    anchor: str | None = None,
    *,
    published: Sequence[PublishedCurve] = (),
    resamples: int = RESAMPLES,
) -> Summary:
    """Means, BD-rates and median times of a sweep.

    Args:
      results: results of the sweep.
      anchor: codec that BD-rates are relative to; None: AVIF, else the first that is
        not of this package, else the first.
      published: curves over the same images; see `published.curves_beside`.
      resamples: number of resamples of the images, for intervals.

    Raises:
      ValueError: the results do not have the anchor.
    """
    anchor = anchor or default_anchor(results)
    if anchor not in results.codecs:
        raise ValueError(
            f"the anchor {anchor!r} is not among the codecs {', '.join(results.codecs)}"
        )
    metrics, codecs = list(results.metrics), list(results.codecs)
    ours = [codec for codec in codecs if codec.startswith("semlic")]
    timing = []
    for codec in codecs:
        rows = [row for row in results.rows if row.codec == codec and row.bpp]
        encode_s = [row.encode_s for row in rows if row.encode_s is not None]
        decode_s = [row.decode_s for row in rows if row.decode_s is not None]
        timing.append(Timing(codec, _median(encode_s), _median(decode_s)))
    return Summary(
        results=results,
        anchor=anchor,
        curves=tuple(curve(results, c, m) for m in metrics for c in codecs),
        bd_rates=tuple(
            bd_rate_of(results, codec, anchor, metric, resamples=resamples)
            for codec in codecs
            if codec != anchor
            for metric in metrics
        ),
        to_published=tuple(
            bd_rate_to_published(results, codec, system, metric)
            for system in published
            for codec in ours
            for metric in metrics
            if metric in system.values
        ),
        timing=tuple(timing),
    )


def default_anchor(results: Results) -> str:
    """AVIF, else the first codec that is not of this package, else the first."""
    if "avif" in results.codecs:
        return "avif"
    others = [codec for codec in results.codecs if not codec.startswith("semlic")]
    return [*others, *results.codecs][0]


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if values else None
