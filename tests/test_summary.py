# SPDX-License-Identifier: Apache-2.0
"""Means, BD-rates and their intervals, gaps, published curves, and plots of a sweep."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
from made_up_results import RATES, made_up, psnr_at, without
from PIL import Image

from semlic_jax.evaluation import summary
from semlic_jax.evaluation import summary as summary_module
from semlic_jax.evaluation.plots import figure_bytes, plot_metric, style_of, write_plots
from semlic_jax.evaluation.published import curves_beside, published_curves
from semlic_jax.evaluation.results import (
    Results,
    Skipped,
    merge,
    set_sha256,
)
from semlic_jax.evaluation.summary import (
    bd_rate_of,
    bd_rate_to_published,
    curve,
    default_anchor,
    summarise,
)
from semlic_jax.evaluation.tables import markdown, number, table

# Means.


def test_points_are_means_over_all_images():
    found = curve(made_up(), "jpeg", "psnr_db")
    for point, rate in zip(found.points, RATES, strict=True):
        values = [psnr_at(rate / 2, index) for index in range(6)]
        assert point.value == pytest.approx(np.mean(values))
        assert point.bpp == pytest.approx(rate)
    assert found.gaps == {}


def test_a_rate_that_one_image_misses_is_a_gap_with_the_reason():
    results = without(made_up(), "jpeg", "3.png", 0.1, "too large")
    found = curve(results, "jpeg", "psnr_db")
    assert [point.target_bpp for point in found.points] == [0.2, 0.3, 0.4, 0.5]
    assert found.gaps == {0.1: "1 of 6 images have none (3.png: too large)"}
    assert curve(results, "avif", "psnr_db").gaps == {}
    assert "jpeg at 0.1 bpp: 1 of 6 images" in markdown(summarise(results))


def test_a_metric_that_one_image_is_too_small_for_is_a_gap():
    results = made_up()
    first = replace(
        results.rows[0], values={}, gaps={"psnr_db": "needs 161x161 pixels"}
    )
    results = replace(results, rows=(first, *results.rows[1:]))
    assert "161x161" in curve(results, "semlic", "psnr_db").gaps[0.1]


def test_curves_of_what_is_not_there():
    with pytest.raises(
        ValueError, match="no codec 'gif': they have semlic, avif, jpeg"
    ):
        curve(made_up(), "gif", "psnr_db")
    with pytest.raises(ValueError, match="no metric 'lpips'"):
        curve(made_up(), "avif", "lpips")
    with pytest.raises(ValueError, match="anchor 'gif' is not among"):
        summarise(made_up(), "gif")


# BD-rates.


@pytest.mark.parametrize("metric", ["psnr_db", "distance"])
@pytest.mark.parametrize(("codec", "percent"), [("semlic", -20.0), ("jpeg", 100.0)])
def test_bd_rate_of_curves_that_are_moved_along_the_rate(metric, codec, percent):
    found = bd_rate_of(made_up(), codec, "avif", metric, resamples=50)
    # The mean of 1 / PSNR over images is not quite the curve of one image.
    tolerance = 0.5 if metric == "psnr_db" else 1.5
    assert found.percent == pytest.approx(percent, abs=tolerance)
    assert found.gap == ""
    assert found.low == pytest.approx(percent, abs=tolerance)
    assert found.high == pytest.approx(percent, abs=tolerance)
    assert found.low <= found.percent <= found.high


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    held = 0
    for seed in range(1000, 1030):
        results = made_up(("semlic", "avif"), 12, noise=0.1, seed=seed)
        found = bd_rate_of(results, "semlic", "avif", "psnr_db", resamples=100)
        held += found.low <= -20 <= found.high
        assert 4 < found.high - found.low < 23
    # 95 % of 30 is 28.5, and the bootstrap of 12 images is a little short of that.
    assert 23 <= held <= 30


def test_intervals_of_the_fewest_images_hold_the_truth():
    held, seeds = 0, range(5000, 5100)
    for seed in seeds:
        results = made_up(("semlic", "avif"), summary._FEWEST_IMAGES, 0.1, seed)
        found = bd_rate_of(results, "semlic", "avif", "psnr_db", resamples=100)
        held += found.low <= -20 <= found.high
    # Plain percentiles hold it 87 times.
    assert held >= 0.88 * len(seeds)


def test_tails_are_those_of_students_distribution():
    # t(0.025, 4) = -2.7764 and t(0.025, 23) = -2.0687, by the usual tables.
    normal = NormalDist()
    for count, student in ((5, -2.7764), (24, -2.0687)):
        expected = normal.cdf((count / (count - 1)) ** 0.5 * student)
        assert summary._tail(count) == pytest.approx(expected, rel=1e-3)
    assert summary._tail(10**6) == pytest.approx(0.025, rel=1e-4)


def test_intervals_narrow_with_more_images():
    widths = []
    for count in (8, 32):
        found = bd_rate_of(
            made_up(("semlic", "avif"), count, noise=0.2), "semlic", "avif", "psnr_db"
        )
        widths.append(found.high - found.low)
    assert widths[1] < 0.75 * widths[0]


def test_intervals_are_the_same_every_time():
    results = made_up(noise=0.1)
    first = bd_rate_of(results, "semlic", "avif", "psnr_db", resamples=50)
    assert bd_rate_of(results, "semlic", "avif", "psnr_db", resamples=50) == first


def test_both_curves_are_resampled_with_the_same_images():
    # Image by image the codecs differ by 20 % and nothing else, however different the
    # images: only samples of different images could differ by more.
    results = made_up(("semlic", "avif"), 6)
    found = bd_rate_of(results, "semlic", "avif", "psnr_db", resamples=100)
    assert found.high - found.low < 0.5


def test_no_interval_from_few_images_or_for_a_metric_of_the_set():
    found = bd_rate_of(made_up(count=4), "semlic", "avif", "psnr_db")
    assert found.percent is not None and found.low is None
    assert found.gap == "no interval from 4 images"
    found = bd_rate_of(made_up(), "semlic", "avif", "frechet")
    assert found.percent == pytest.approx(-20, abs=0.5)
    assert found.low is None and "metric of the set" in found.gap


def test_too_few_points_leave_a_gap_that_names_the_missing_rates():
    results = made_up()
    for rate in (0.1, 0.2):
        results = without(results, "jpeg", "0.png", rate, "too large")
    found = bd_rate_of(results, "jpeg", "avif", "psnr_db")
    assert found.percent is None
    assert "at least 4 points" in found.gap
    assert "jpeg has no point at 0.1, 0.2 bpp" in found.gap
    assert "no BD-rate of jpeg against avif" in markdown(summarise(results))


def test_different_images_are_refused():
    ours, theirs = made_up(count=5), made_up(count=6)
    with pytest.raises(
        ValueError, match=r"different images \(5 and 6; 5.png is in only"
    ):
        bd_rate_of(ours, "semlic", "avif", "psnr_db", anchor_results=theirs)
    other = replace(theirs.images[0], sha256="f" * 64)
    changed = replace(theirs, images=(other, *theirs.images[1:]))
    with pytest.raises(ValueError, match="different images"):
        bd_rate_of(made_up(), "semlic", "avif", "psnr_db", anchor_results=changed)


def test_another_sweep_over_the_same_images_in_another_order():
    whole = made_up(noise=0.1)
    ours = replace(whole, codecs={"semlic": whole.codecs["semlic"]})
    theirs = replace(
        whole,
        codecs={"avif": whole.codecs["avif"]},
        images=tuple(reversed(whole.images)),
    )
    expected = bd_rate_of(whole, "semlic", "avif", "psnr_db", resamples=50)
    found = bd_rate_of(
        ours, "semlic", "avif", "psnr_db", anchor_results=theirs, resamples=50
    )
    assert found.percent == pytest.approx(expected.percent)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


# Merging.


def part_of(results: Results, codec: str) -> Results:
    return replace(
        results,
        codecs={codec: results.codecs[codec]},
        rows=tuple(row for row in results.rows if row.codec == codec),
        set_rows=tuple(row for row in results.set_rows if row.codec == codec),
    )


def test_merged_sweeps_are_as_one():
    whole = made_up()
    renamed = part_of(whole, "avif")
    names = {image.name: f"other/{image.name}" for image in whole.images}
    renamed = replace(
        renamed,
        images=tuple(replace(i, name=names[i.name]) for i in whole.images),
        rows=tuple(replace(row, image=names[row.image]) for row in renamed.rows),
    )
    merged = merge([part_of(whole, "semlic"), renamed, part_of(whole, "jpeg")])
    assert summarise(merged, resamples=10).bd_rates == (
        summarise(whole, resamples=10).bd_rates
    )


def test_merging_refuses_other_images_and_the_same_codec():
    with pytest.raises(ValueError, match="different images"):
        merge([part_of(made_up(), "avif"), part_of(made_up(count=3), "jpeg")])
    with pytest.raises(ValueError, match="avif is in more than one"):
        merge([part_of(made_up(), "avif"), part_of(made_up(), "avif")])
    with pytest.raises(ValueError, match="found none"):
        merge([])


# Published curves.


def over_kodak(results: Results, monkeypatch) -> Results:
    """The same results, taken for those over the Kodak images."""
    from semlic_jax.evaluation import published

    digest = json.loads(
        (published.resources.files(published.__name__) / "sets.json").read_text()
    )["kodak"]["sha256"]
    monkeypatch.setattr(Results, "set_sha256", lambda self: digest)
    return results


def test_published_numbers():
    curves = {each.name: each for each in published_curves("kodak")}
    assert list(curves) == ["ELIC", "HiFiC", "MS-ILLM"]
    ms_illm = curves["MS-ILLM"]
    at = ms_illm.bpp.index(0.1532)
    assert ms_illm.values["psnr_db"][at] == 27.53
    assert ms_illm.values["ms_ssim"][at] == 0.9282
    assert ms_illm.values["lpips_alex"][at] == 0.0732
    assert ms_illm.values["dists"][at] == 0.0809
    assert "fid" not in ms_illm.values  # not published on Kodak
    [clic] = [c for c in published_curves("clic2020") if c.name == "MS-ILLM"]
    assert clic.values["fid"][0] == 6.272
    assert clic.values["kid"][0] == pytest.approx(0.001044)  # given times 1,000


@pytest.mark.parametrize("image_set", ["kodak", "clic2020", "div2k"])
def test_published_curves_are_whole(image_set):
    higher = {"psnr_db", "ms_ssim"}
    for each in published_curves(image_set):
        assert each.source and each.licence and each.bitrate
        assert list(each.bpp) == sorted(set(each.bpp))
        for metric, values in each.values.items():
            assert len(values) == len(each.bpp)
            ordered = sorted(values, reverse=metric not in higher)
            assert list(values) == ordered, (each.name, metric)


def test_published_curves_stand_beside_their_own_images_only(monkeypatch):
    results = made_up()
    assert curves_beside(results) == []
    with pytest.raises(
        ValueError, match="24 images of kodak, these results are over 6"
    ):
        curves_beside(results, "kodak")
    with pytest.raises(ValueError, match="no published curves over 'imagenet'"):
        curves_beside(results, "imagenet")
    found = curves_beside(over_kodak(results, monkeypatch))
    assert [each.name for each in found] == ["ELIC", "HiFiC", "MS-ILLM"]


def test_kodak_is_known_by_its_pixels():
    from semlic_jax.evaluation.image_sets import list_images, readable_images

    folder = _kodak()
    skipped = []
    images = [
        image for image, _ in readable_images(list_images([folder]), None, skipped)
    ]
    assert len(images) == 24 and not skipped
    results = replace(made_up(), images=tuple(images))
    assert [each.name for each in curves_beside(results)] == [
        "ELIC",
        "HiFiC",
        "MS-ILLM",
    ]


def _kodak():
    import os
    from pathlib import Path

    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SEMLIC_DATA", beside)) / "kodak"
    if not folder.is_dir():
        pytest.skip("the Kodak images are not here: set SEMLIC_DATA to their folder")
    return folder


def test_bd_rate_against_a_published_curve(monkeypatch):
    results = over_kodak(made_up(), monkeypatch)
    elic = published_curves("kodak")[0]
    # Our curve is ELIC's own with a tenth more bits.
    rates = np.array([0.1, 0.15, 0.2, 0.3, 0.5])
    values = np.interp(np.log(rates), np.log(elic.bpp), elic.values["psnr_db"])
    rows = [
        replace(row, bpp=1.1 * rates[i % 5], values={"psnr_db": values[i % 5]})
        for i, row in enumerate(results.rows)
    ]
    results = replace(results, rows=tuple(rows))
    found = bd_rate_to_published(results, "semlic", elic, "psnr_db")
    assert found.percent == pytest.approx(10, abs=0.7)
    assert found.low is None
    found = bd_rate_to_published(results, "semlic", elic, "distance")
    assert found.percent is None and found.gap == "ELIC has no values of it"


def test_set_hash_does_not_depend_on_the_order():
    assert set_sha256(["a", "b"]) == set_sha256(["b", "a"]) != set_sha256(["a"])


# Tables.


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (27.8349, "27.83"),
        (0.93751, "0.9375"),
        (1.6543, "1.654"),
        (-12.714, "-12.71"),
        (123.456, "123.5"),
        (80967.4, "80,967"),
        (7.8931947e7, "7.893e+07"),
        (0.000123456, "1.235e-04"),
        (0.0, "0.0000"),
    ],
)
def test_numbers_have_four_digits(value, text):
    assert number(value) == text


def test_tables_read_as_text():
    lines = table(["codec", "a"], [["x", "1.5"], ["longer", "10"]])
    assert lines == [
        "| codec  |   a |",
        "| ------ | --: |",
        "| x      | 1.5 |",
        "| longer |  10 |",
    ]


def test_summary_says_everything():
    results = replace(
        made_up(noise=0.05),
        skipped=(Skipped("broken.png", "it is damaged"),),
        notes=("SSIMULACRA2 is left out",),
    )
    summary = summarise(results, resamples=20)
    text = markdown(summary)
    assert summary.anchor == default_anchor(results) == "avif"
    for part in (
        "Means over 6 images",
        "* broken.png: it is damaged",
        "### PSNR (dB) (higher is better)",
        "### Distance (lower is better)",
        "### Fréchet distance (lower is better, 48 patches)",
        "against AVIF (BD-rate)",
        "| SEMLIC |       3.50 |       0.50 |",
        "* SSIMULACRA2 is left out",
    ):
        assert part in text
    assert re.search(r"-\d\d\.\d % \[-\d\d\.\d, -\d\d\.\d\]", text)
    facts = json.loads(json.dumps(summary.facts()))
    assert facts["skipped"][0]["name"] == "broken.png"
    assert len(facts["curves"]) == 9 and len(facts["bd_rates"]) == 6


def test_anchors():
    assert default_anchor(made_up(("semlic", "jpeg"))) == "jpeg"
    assert default_anchor(made_up(("semlic",))) == "semlic"


# Plots.


def test_plots_are_written_as_png_and_svg(tmp_path, monkeypatch):
    results = over_kodak(made_up(), monkeypatch)
    paths = write_plots(results, tmp_path, published_curves("kodak"))
    names = ["rd_all", "rd_psnr_db", "rd_distance", "rd_frechet"]
    assert [path.name for path in paths] == [
        f"{name}.{kind}" for name in names for kind in ("png", "svg")
    ]
    for path in paths:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert min(image.size) > 500
        else:
            text = path.read_text()
            for label in ("SEMLIC", "AVIF", "bits per pixel of the whole file"):
                assert label in text
            assert "Kodak, means over 6 images" in text
            assert ("ELIC (published)" in text) == (path.stem in names[:2])


def test_the_same_plot_is_the_same_file():
    figures = [plot_metric(made_up(), "psnr_db") for _ in range(2)]
    for kind in ("png", "svg"):
        first, second = (figure_bytes(figure, kind) for figure in figures)
        assert first == second
    assert Image.open(io.BytesIO(figure_bytes(figures[0], "png"))).size[0] > 900


def test_curves_hold_the_points():
    results = made_up()
    axes = plot_metric(results, "psnr_db", published_curves("kodak")).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines) == [
        "SEMLIC",
        "AVIF",
        "JPEG",
        "ELIC (published)",
        "HiFiC (published)",
        "MS-ILLM (published)",
    ]
    points = curve(results, "jpeg", "psnr_db").points
    np.testing.assert_allclose(
        lines["JPEG"].get_xydata(), [(p.bpp, p.value) for p in points]
    )
    assert axes.get_ylabel() == "PSNR (dB)\nhigher is better"
    # Published points at rates far beyond ours would squeeze our curves.
    assert max(lines["ELIC (published)"].get_xdata()) <= 1.25 * 0.5


def test_styles_differ_in_colour_and_in_marker():
    codecs = ["semlic", "semlic+refine:fast", "avif", "webp", "jxl", "jpeg", "jpeg2000"]
    styles = [style_of(codec, codecs) for codec in codecs]
    assert len({style["color"] for style in styles}) == len(codecs)
    assert len({style["marker"] for style in styles}) == len(codecs)
    # A codec keeps its style when another one joins.
    assert style_of("avif", codecs) == style_of("avif", codecs[:3])
    # More of ours than there are colours.
    models = [f"semlic:{number}" for number in range(9)]
    styles = [style_of(codec, models) for codec in models]
    assert len({tuple(style.items()) for style in styles}) == len(models)


def test_a_metric_without_points_has_no_plot(tmp_path):
    results = made_up()
    rows = [replace(row, values={"psnr_db": 30.0}) for row in results.rows]
    results = replace(results, rows=tuple(rows))
    names = {path.stem for path in write_plots(results, tmp_path)}
    assert names == {"rd_all", "rd_psnr_db", "rd_frechet"}


@pytest.mark.parametrize(("every", "enough"), [(10, False), (25, True)])
def test_resamples_that_do_not_compare_cost_the_interval(monkeypatch, every, enough):
    """A few may be missing; those of one side would be, so not more than that."""
    whole, calls = summary_module.bd_rate, []

    def fails_sometimes(base, test):
        calls.append(0)
        if len(calls) % every == 0:
            raise ValueError("they do not overlap")
        return whole(base, test)

    monkeypatch.setattr(summary_module, "bd_rate", fails_sometimes)
    found = bd_rate_of(made_up(noise=0.1), "semlic", "avif", "psnr_db", resamples=100)
    assert found.percent is not None and (found.low is not None) == enough
    assert found.gap == ("" if enough else "10 of 100 resampled curves do not compare")


def test_an_interval_leaves_out_as_much_on_either_side(monkeypatch):
    values = iter(np.arange(-1.0, 1000.0))  # the first is of all images
    monkeypatch.setattr(summary_module, "bd_rate", lambda *curves: next(values))
    found = bd_rate_of(made_up(), "semlic", "avif", "psnr_db", resamples=1000)
    assert found.percent == -1
    assert found.low == pytest.approx(999 - found.high) and 0 < found.low < 25


def test_times_are_medians():
    """The first call of each shape compiles."""
    results = made_up(("avif",))
    first, *rest = results.rows
    slow = replace(first, encode_s=1000.0, decode_s=2000.0)
    rest = [replace(row, encode_s=1.0, decode_s=2.0) for row in rest]
    [timing] = summarise(replace(results, rows=(slow, *rest)), resamples=1).timing
    assert (timing.encode_s, timing.decode_s) == (1.0, 2.0)


def test_merged_sweeps_keep_all_that_readers_are_told():
    results = made_up()
    first = replace(
        part_of(results, "semlic"), notes=("a",), skipped=(Skipped("x.png", "broken"),)
    )
    second = replace(
        part_of(results, "avif"),
        notes=("a", "b"),
        skipped=(Skipped("x.png", "broken"), Skipped("y.png", "no room")),
    )
    merged = merge([first, second])
    assert merged.notes == ("a", "b")
    assert [each.name for each in merged.skipped] == ["x.png", "y.png"]


def test_the_table_of_sets_has_its_numbers_under_their_names():
    header, line, *_ = made_up(("avif",)).set_csv().splitlines()
    found = dict(zip(header.split(","), line.split(","), strict=True))
    assert found == {
        "codec": "avif",
        "target_bpp": "0.1",
        "bpp": "0.1",
        "patches": "48",
        "frechet": "10.0",
        "gaps": "",
    }


def test_only_our_codecs_are_compared_with_published_curves(monkeypatch):
    results = over_kodak(made_up(), monkeypatch)
    published = published_curves("kodak")
    found = summarise(results, published=published, resamples=1).to_published
    assert {each.codec for each in found} == {"semlic"}
