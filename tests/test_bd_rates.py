# SPDX-License-Identifier: Apache-2.0
"""Bjontegaard deltas against hand computation and published results."""

import numpy as np
import pytest

from semlic_jax.objectives.bd_rates import RateCurve, bd_metric, bd_rate

# Kodak, PSNR in dB. ELIC: the authors' official points; VTM and mbt2018-mean:
# CompressAI's results/image/kodak (BSD-3-Clause-Clear).
ELIC = RateCurve(
    (0.0468, 0.0767, 0.1236, 0.1964, 0.3334, 0.4909, 0.7041, 0.8573, 1.1065, 1.4898),
    (26.27, 27.68, 29.13, 30.70, 32.80, 34.59, 36.49, 37.62, 39.18, 41.07),
    "PSNR",
    name="ELIC",
)
VTM = RateCurve(
    (*(0.04824, 0.11250, 0.24582, 0.49055), *(0.87481, 1.43085, 2.32461, 3.63261)),
    (*(26.1448, 28.4930, 31.1999, 34.2615), *(37.4198, 40.4244, 43.5058, 46.5918)),
    "PSNR",
    name="VTM",
)
MEAN_SCALE = RateCurve(
    (*(0.12392, 0.19798, 0.30724, 0.46061), *(0.66167, 0.91440, 1.23421, 1.61909)),
    (*(27.6995, 29.3588, 31.1289, 32.9507), *(34.9683, 36.9111, 38.8375, 40.6333)),
    "PSNR",
    name="mbt2018-mean",
)


def test_published_bd_rates_are_met():
    # reference: ELIC -7.4 %, mbt2018-mean +21.3 % against VTM, ELIC -23.5 % against it
    assert bd_rate(VTM, ELIC) == pytest.approx(-7.4, abs=0.05)
    assert bd_rate(VTM, MEAN_SCALE) == pytest.approx(21.3, abs=0.05)
    assert bd_rate(MEAN_SCALE, ELIC) == pytest.approx(-23.5, abs=0.05)


def test_straight_lines_by_hand():
    # Metric 10 * log10(bpp) + 40; the test curve needs 0.8 of the bits everywhere, so
    # it lies 10 * log10(1 / 0.8) higher.
    bpp = np.asarray([0.1, 0.2, 0.4, 0.8])
    anchor = RateCurve(bpp, 10 * np.log10(bpp) + 40)
    test = RateCurve(bpp * 0.8, 10 * np.log10(bpp) + 40)
    assert bd_rate(anchor, test) == pytest.approx(-20, abs=1e-9)
    assert bd_rate(test, anchor) == pytest.approx(25, abs=1e-9)
    assert bd_metric(anchor, test) == pytest.approx(10 * np.log10(1.25), abs=1e-9)


def test_piecewise_curve_by_hand():
    # log10 bpp equals the metric on both: equal over the common range [0, 3].
    anchor = RateCurve([1, 10, 100, 1000], [0, 1, 2, 3])
    same = RateCurve([1, 10, 1000, 10000], [0, 1, 3, 4])
    assert bd_rate(anchor, same) == pytest.approx(0, abs=1e-9)
    # Metric 2 already at 10^1.5 bpp: secants 1, 0.5, 1.5. PCHIP's slopes inside are
    # their harmonic means, 2/3 and 3/4, and at the ends (3 * near - far) / 2. A Hermite
    # segment of width 1 has the integral (y0 + y1) / 2 + (d0 - d1) / 12.
    bent = RateCurve([1, 10, 10**1.5, 1000], [0, 1, 2, 3])
    slopes = (1.25, 2 / 3, 0.75, 2.0)
    values = (0, 1, 1.5, 3)
    area = sum(
        (values[i] + values[i + 1]) / 2 + (slopes[i] - slopes[i + 1]) / 12
        for i in range(3)
    )
    expected = (10 ** ((area - 4.5) / 3) - 1) * 100
    assert bd_rate(anchor, bent) == pytest.approx(expected, abs=1e-9)


def test_falling_metrics_and_any_order_of_points():
    flipped = RateCurve(VTM.bpp[::-1], -np.asarray(VTM.values)[::-1], "PSNR")
    test = RateCurve(ELIC.bpp, -np.asarray(ELIC.values), "PSNR")
    assert bd_rate(flipped, test) == pytest.approx(bd_rate(VTM, ELIC), abs=1e-9)
    assert bd_metric(flipped, test) == pytest.approx(-bd_metric(VTM, ELIC), abs=1e-9)


def test_a_package_agrees():
    package = pytest.importorskip("bjontegaard", reason="bjontegaard is not installed")
    options = dict(method="pchip", require_matching_points=False, min_overlap=0)
    curves = (VTM.bpp, VTM.values, ELIC.bpp, ELIC.values)
    assert bd_rate(VTM, ELIC) == pytest.approx(package.bd_rate(*curves, **options))
    assert bd_metric(VTM, ELIC) == pytest.approx(package.bd_psnr(*curves, **options))


GOOD = dict(bpp=[0.1, 0.2, 0.3, 0.4], values=[30, 32, 33, 34])


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(values=[30, 33, 32, 34]), "is not monotonic.*33 at 0.2 bpp"),
        (dict(values=[30, 32, 32, 34]), "is not monotonic"),
        (dict(bpp=[0.1, 0.2, 0.2, 0.4]), "is not monotonic"),
        (dict(values=[50, 52, 53, 54]), "no common range: .* 30 to 34, .* 50 to 54"),
        (dict(values=[34, 33, 32, 30]), "^no common range"),
        (dict(values=[33.7, 40, 50, 60]), "almost no common range: .* 30 to 34"),
        (dict(bpp=[0.1, 0.2, 0.3]), "at least 4 points"),
        (dict(bpp=[0.0, 0.2, 0.3, 0.4]), "positive rates"),
        (dict(values=[30, 32, np.inf, 34]), "finite"),
        (dict(metric="MS-SSIM"), "different metrics: metric and MS-SSIM"),
        (
            dict(images=["a", "c"]),
            "different images: 2 are in only one of them, such as b",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(changes, message):
    anchor = RateCurve(**GOOD, images=["a", "b"])
    with pytest.raises(ValueError, match=message):
        bd_rate(anchor, RateCurve(**{**GOOD, **changes}))


def test_rates_without_a_common_range_are_refused():
    far = RateCurve([1, 2, 3, 4], GOOD["values"], name="far")
    with pytest.raises(ValueError, match="bpp of far goes from 1 to 4"):
        bd_metric(RateCurve(**GOOD), far)


@pytest.mark.parametrize("low, high", [(10, 12), (34, 74)])
def test_a_tenth_of_the_shorter_curve_is_enough_in_common(low, high):
    """A short curve within a long one; two that share 15 % of their ranges."""

    def curve(low, high, factor=1.0):
        values = np.linspace(low, high, 5)
        return RateCurve(factor * 10 ** (values / 20), values)

    assert bd_rate(curve(0, 40), curve(low, high, 0.8)) == pytest.approx(-20, abs=1e-9)
    assert bd_rate(curve(low, high, 0.8), curve(0, 40)) == pytest.approx(25, abs=1e-9)
