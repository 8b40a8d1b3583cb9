# SPDX-License-Identifier: Apache-2.0
"""Bjontegaard deltas, which compare two rate curves in one number (VCEG-M33).

`bd_rate` and `bd_metric` interpolate log10 bpp over the metric, or the metric over
log10 bpp, by piecewise cubic Hermite polynomials (scipy's PCHIP), and integrate over
the range that both curves cover. Curves that cannot be compared are refused. Imports
numpy and scipy only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.interpolate import PchipInterpolator

LEAST_POINTS = 4  # as in VCEG-M33 and ever since
# Least common range, as a share of the shorter curve's range: a mean over less says
# nothing about the curves.
LEAST_OVERLAP = 0.1


@dataclasses.dataclass(frozen=True)
class RateCurve:
    """Points of one codec over one set of images, in any order.

    Attributes:
        bpp: bits per pixel of each point, positive.
        values: value of the metric at each point.
        metric: name of the metric; curves of different metrics are not compared.
        images: names of the images that the points are means over; curves over
            different images are not compared. If empty, they are unknown and unchecked.
        name: name of the codec, for messages.

    Raises:
        ValueError: there are fewer than 4 points, not as many values as rates, values
            that are not finite or rates that are not positive.
    """

    bpp: Sequence[float]
    values: Sequence[float]
    metric: str = "metric"
    images: Sequence[str] = ()
    name: str = "curve"

    def __post_init__(self) -> None:
        if len(self.bpp) != len(self.values) or len(self.bpp) < LEAST_POINTS:
            raise ValueError(
                f"{self.name} needs at least {LEAST_POINTS} points of bpp and "
                f"{self.metric}, found {len(self.bpp)} and {len(self.values)}"
            )
        numbers = np.asarray([*self.bpp, *self.values], np.float64)
        if not np.isfinite(numbers).all() or min(self.bpp) <= 0:
            raise ValueError(
                f"{self.name} needs finite values at positive rates, found bpp "
                f"{list(self.bpp)} and {self.metric} {list(self.values)}"
            )

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """log10 bpp, ascending, and the metric there; both float64.

        Raises:
            ValueError: the metric does not strictly rise or strictly fall with the
                rate, or two points have the same rate.
        """
        order = np.argsort(self.bpp, kind="stable")
        rate = np.asarray(self.bpp, np.float64)[order]
        values = np.asarray(self.values, np.float64)[order]
        steps = np.diff(values) * np.sign(values[-1] - values[0])
        bad = np.flatnonzero((steps <= 0) | (np.diff(rate) <= 0))
        if bad.size:
            i = int(bad[0])
            raise ValueError(
                f"{self.name} is not monotonic: {self.metric} "
                f"{values[i]:g} at {rate[i]:g} bpp, then {values[i + 1]:g} at "
                f"{rate[i + 1]:g} bpp"
            )
        return np.log10(rate), values


def bd_rate(anchor: RateCurve, test: RateCurve) -> float:
    """Mean difference in rate at equal metric, in percent of the anchor's rate.

    (10^(mean over the common range of log10 R_test(m) - log10 R_anchor(m)) - 1) * 100,
    which is negative if `test` needs fewer bits. The metric must rise or fall
    monotonically with the rate.

    Raises:
        ValueError: the curves have different metrics or images, are not monotonic, run
            in opposite directions, or have a common range of less than a tenth of the
            shorter one's.
    """
    _require_comparable(anchor, test)
    (rate_a, value_a), (rate_b, value_b) = anchor.points(), test.points()
    difference = _mean_difference(
        (value_a, rate_a), (value_b, rate_b), f"{anchor.metric} of {{}}", anchor, test
    )
    return float((10**difference - 1) * 100)


def bd_metric(anchor: RateCurve, test: RateCurve) -> float:
    """Mean difference in metric at equal rate, in the metric's unit.

    The mean is over log10 bpp. It is positive if `test` has the larger values.

    Raises:
        ValueError: as for `bd_rate`, but the metric may rise in one curve and fall in
            the other.
    """
    _require_comparable(anchor, test)
    return _mean_difference(anchor.points(), test.points(), "bpp of {}", anchor, test)


def _require_comparable(anchor: RateCurve, test: RateCurve) -> None:
    if anchor.metric != test.metric:
        raise ValueError(
            f"{anchor.name} and {test.name} are curves of different metrics: "
            f"{anchor.metric} and {test.metric}"
        )
    ours, theirs = set(anchor.images), set(test.images)
    if ours and theirs and ours != theirs:
        odd = sorted(ours ^ theirs)
        raise ValueError(
            f"{anchor.name} and {test.name} are curves over different images: "
            f"{len(odd)} are in only one of them, such as {odd[0]}"
        )


def _mean_difference(
    a: tuple[np.ndarray, np.ndarray],
    b: tuple[np.ndarray, np.ndarray],
    axis: str,
    anchor: RateCurve,
    test: RateCurve,
) -> float:
    """Mean of b's curve minus a's over the common range; each is (abscissa, value)."""
    low = max(a[0].min(), b[0].min())
    high = min(a[0].max(), b[0].max())
    rising = [curve[0][-1] > curve[0][0] for curve in (a, b)]
    shorter = min(np.ptp(a[0]), np.ptp(b[0]))
    if not high - low >= LEAST_OVERLAP * shorter or rising[0] != rising[1]:
        spans = []
        for curve, name in ((a, anchor.name), (b, test.name)):
            ends = curve[0][[0, -1]]
            ends = 10**ends if axis.startswith("bpp") else ends
            spans.append(f"{axis.format(name)} goes from {ends[0]:g} to {ends[1]:g}")
        little = "almost no" if low < high and rising[0] == rising[1] else "no"
        raise ValueError(f"{little} common range: " + ", ".join(spans))
    integrals = []
    for abscissa, value in (a, b):
        order = np.argsort(abscissa)
        curve = PchipInterpolator(abscissa[order], value[order])
        integrals.append(float(curve.integrate(low, high)))
    return (integrals[1] - integrals[0]) / float(high - low)
