# SPDX-License-Identifier: Apache-2.0
"""The page that compares codecs: equal bytes, exact pictures, and in a real browser."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
import re
from dataclasses import replace

import chromium
import numpy as np
import pytest
from PIL import Image

from semlic_jax import cli
from semlic_jax.coding import tfc_coding
from semlic_jax.coding.bitstream import pack, unpack
from semlic_jax.coding.entropy_coding import SymbolDecoder
from semlic_jax.evaluation import compare
from semlic_jax.evaluation.bit_allocation import bits_per_block
from semlic_jax.evaluation.entrants import ClassicalEntrant, SemlicEntrant
from semlic_jax.evaluation.measures import Measures

TITLE = '<i>cup & "saucer"</i></script>.png'


@pytest.fixture(scope="module")
def measures():
    return Measures(["psnr_db", "ms_ssim"])


@pytest.fixture(scope="module")
def pixels(photograph):
    return photograph(150, 200)


@pytest.fixture(scope="module")
def shown(pixels, codec, measures):
    """A model, two classical codecs, and one that does not reach the rate."""
    low, high = (
        8 * len(codec.compress(pixels, quality=q)) / (150 * 200) for q in (0.0, 1.0)
    )
    entrants = [
        SemlicEntrant("semlic", codec),
        ClassicalEntrant("webp"),
        ClassicalEntrant("jpeg"),
        Hopeless("jpeg2000"),
    ]
    return compare.compare(pixels, entrants, low + 0.7 * (high - low), measures)


class Hopeless(ClassicalEntrant):
    def fitter(self, image):
        def fit(bpp):
            raise ValueError("its smallest file is a mountain")

        return fit


@pytest.fixture(scope="module")
def page(pixels, shown, measures):
    return compare.page(TITLE, pixels, shown, measures)


def data_of(page: str) -> dict:
    inside = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert inside is not None
    return json.loads(inside[1])


def picture_of(url: str) -> np.ndarray:
    head, _, body = url.partition(",")
    assert head in ("data:image/webp;base64", "data:image/png;base64")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(body))).convert("RGB"))


# Bits.


@pytest.mark.parametrize("size", [(64, 64), (150, 200), (1, 1), (17, 16)])
def test_bits_of_blocks_add_up_to_the_file(codec, photograph, size):
    data = codec.compress(photograph(*size), quality=0.8)
    bits = bits_per_block(codec, data)
    assert bits.shape == (-(-size[0] // 16), -(-size[1] // 16))
    assert bits.min() >= 0
    payload_bits = 8 * codec.info(data)["payload_bytes"]
    # The end of the stream takes 22 bits on average and at most 32.
    assert bits.sum() - 8 <= payload_bits <= bits.sum() + 40


def test_bits_of_a_block_are_those_of_its_symbols(codec, photograph):
    image, level, size = photograph(150, 200), 200, (150, 200)
    data = codec.compress(image, quality=level / 255)
    bits = bits_per_block(codec, data)
    entropy = codec.entropy
    symbols = entropy.symbols(*codec.scaled(codec.analyse(image), level), level, size)
    channels = np.arange(codec.config.hyper_channels)
    # 10 x 13 blocks, 4 x 4 of which share a hyper-latent, fewer at the edges.
    for row, column, sharing in ((0, 1, 16), (2, 12, 4), (9, 3, 8), (9, 12, 2)):
        z = symbols.z[row // 4, column // 4]
        expected = entropy.z_tables.ideal_bits(z, channels) / sharing
        expected += entropy.y_tables.ideal_bits(
            symbols.y[row, column], symbols.indexes[row, column]
        )
        assert bits[row, column] == pytest.approx(expected, rel=1e-5)


# Equal bytes.


def test_all_codecs_get_the_bytes_of_the_first(shown):
    first, webp, jpeg, hopeless = shown
    assert first.data and first.bits is not None
    for rival in (webp, jpeg):
        if rival.data:
            assert len(rival.data) <= len(first.data)
            assert rival.bits is None
        else:
            assert "bpp" in rival.gaps["file"]
    assert hopeless.image is None
    assert hopeless.gaps == {"file": "its smallest file is a mountain"}


def test_the_same_codec_twice_makes_the_same_file(pixels):
    # Not one byte of the budget is lost to rounding.
    measures = Measures([])
    for bpp in (1.0, 1.37, 2.22, 3.1):
        entrants = [ClassicalEntrant("jpeg"), ClassicalEntrant("jpeg")]
        first, second = compare.compare(pixels, entrants, bpp, measures)
        assert first.data == second.data


def test_a_first_codec_that_fails_leaves_the_rate_to_the_next(pixels, measures):
    first, second = compare.compare(
        pixels, [Hopeless("jpeg"), ClassicalEntrant("webp")], 2.0, measures
    )
    assert first.image is None and len(second.data) <= 2.0 * 150 * 200 / 8
    with pytest.raises(ValueError, match="no codec reaches .* mountain"):
        compare.compare(pixels, [Hopeless("jpeg")], 2.0, measures)


@pytest.mark.parametrize("step", ["fit", "decode"])
@pytest.mark.parametrize(
    "error", [MemoryError("9\nGiB"), RuntimeError("9 GiB"), OSError("9 GiB")], ids=repr
)
def test_a_codec_that_fails_at_any_step_leaves_a_gap(pixels, step, error):
    class Failing(ClassicalEntrant):
        def fitter(self, image):
            if step == "fit":
                raise error
            return super().fitter(image)

        def decode(self, data):
            if step == "decode":
                raise error
            return super().decode(data)

    def jpeg_at(bpp):
        entrant = ClassicalEntrant("jpeg")
        return entrant.decode(entrant.fitter(pixels)(bpp).data)

    jpeg = jpeg_at(2.0)
    failed, whole = compare.compare(
        pixels, [Failing("jpeg"), ClassicalEntrant("jpeg")], 2.0, Measures([])
    )
    assert failed.gaps == {"file": "9 GiB"} and not failed.data
    np.testing.assert_array_equal(whole.image, jpeg)  # at the rate that was asked for


def test_a_metric_that_fails_is_not_a_missing_file(pixels, monkeypatch):
    def no_room(*images):
        raise MemoryError("9 GiB")

    measures = Measures(["psnr_db", "ms_ssim"])
    monkeypatch.setitem(measures._of_images["ms_ssim"]._functions, "ms_ssim", no_room)
    pixels = np.tile(pixels, (2, 1, 1))  # large enough for MS-SSIM
    [shown] = compare.compare(pixels, [ClassicalEntrant("jpeg")], 2.0, measures)
    assert shown.data and shown.gaps == {"ms_ssim": "9 GiB"}
    assert list(shown.values) == ["psnr_db"]


def test_a_file_far_below_the_budget_is_the_nearest(pixels):
    """A flat image: the best JPEG file is smaller than what was asked for."""
    flat = np.full((64, 64, 3), 128, np.uint8)
    [shown] = compare.compare(flat, [ClassicalEntrant("jpeg")], 40.0, Measures([]))
    assert shown.data == ClassicalEntrant("jpeg")._codec.encode(flat, 100)
    most = 8 * len(shown.data) / 64**2
    largest = f"its largest file of this image takes {most:.3f} bpp"
    assert shown.note == f"{largest}, less than 40.000 bpp"


def test_bits_of_the_second_coder(codec, photograph, monkeypatch):
    """Its streams are read by its own decoder; here a stand-in with inverted bytes."""

    class Inverted(SymbolDecoder):
        def __init__(self, data, tables):
            assert tables == (codec.entropy.z_tables, codec.entropy.y_tables)
            super().__init__(bytes(255 - byte for byte in data))

    monkeypatch.setattr(tfc_coding, "TfcSymbolDecoder", Inverted)
    data = codec.compress(photograph(64, 64), quality=0.8)
    header, payload = unpack(data)
    inverted = pack(
        dataclasses.replace(header, coder="tfc"), bytes(255 - byte for byte in payload)
    )
    np.testing.assert_array_equal(
        bits_per_block(codec, inverted), bits_per_block(codec, data)
    )


def test_values_are_those_of_the_pictures(pixels, shown, measures):
    for each in shown[:1]:
        values, *_ = measures.measure(pixels, each.image, ["psnr_db"])
        assert each.values["psnr_db"] == values["psnr_db"]
        assert "161x161" in each.gaps["ms_ssim"]
    text = compare.table(shown, measures)
    assert "mountain" in text and f"{len(shown[0].data):,}" in text


# The page as a file.


def test_pictures_in_the_page_are_exact(pixels, shown, page):
    data = data_of(page)
    np.testing.assert_array_equal(picture_of(data["original"]), pixels)
    for each, found in zip(shown, data["codecs"], strict=True):
        if each.image is None:
            assert "picture" not in found and found["gaps"]["file"]
            continue
        np.testing.assert_array_equal(picture_of(found["picture"]), each.image)
        _, _, file = found["file"].partition(",")
        assert base64.b64decode(file) == each.data
        assert found["bytes"] == len(each.data)
    bits = data["codecs"][0]["bits"]
    assert len(bits["values"]) == bits["rows"] * bits["columns"] == 10 * 13


def test_the_page_names_no_address(page):
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page.split('id="data"')[0])
    assert "default-src 'none'" in page


def test_titles_cannot_break_out(page):
    assert page.count("</script>") == 2
    assert "<i>cup" not in page
    assert data_of(page)["title"] == TITLE


def test_titles_that_are_not_utf_8(tmp_path, pixels, capfdbinary):
    image = tmp_path / os.fsdecode(b"caf\xe9.png")
    Image.fromarray(pixels).save(image)
    command = ["compare", str(image), "--bpp", "2", "--codecs", "jpeg"]
    assert cli.main([*command, "--metrics", "psnr_db"]) == 0
    # Read here: pytest-xdist cannot send what is no UTF-8 with its report.
    assert capfdbinary.readouterr().out.endswith(b"caf\xe9.html\n")
    page = image.with_suffix(".html").read_text(encoding="utf-8")
    assert data_of(page)["title"] == "caf?.png"


def test_a_colour_profile_stays_with_the_pictures(pixels, shown, measures):
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    page = compare.page("a", pixels, shown, measures, icc_profile=profile)
    body = data_of(page)["original"].partition(",")[2]
    with Image.open(io.BytesIO(base64.b64decode(body))) as image:
        assert image.info["icc_profile"] == profile


def test_command(tmp_path, pixels, capsys, monkeypatch):
    monkeypatch.delenv("SEMLIC_FEATURES", raising=False)
    image, out = tmp_path / "cup.png", tmp_path / "cup.html"
    Image.fromarray(pixels).save(image)
    command = ["compare", str(image), "--bpp", "2", "--codecs", "webp,jpeg"]
    command += ["--metrics", "psnr_db"]
    assert cli.main(command) == 0
    assert str(out) in capsys.readouterr().out
    data = data_of(out.read_text())
    assert [codec["key"] for codec in data["codecs"]] == ["webp", "jpeg"]
    far = [*command[:2], "--bpp", "40", *command[4:], "--force"]
    assert cli.main(far) == 0
    assert capsys.readouterr().err.startswith("note: WebP: its largest file of this")
    assert cli.main(command) == 1
    assert "cup.html exists" in capsys.readouterr().err
    assert cli.main([*command, "--out", str(image), "--force"]) == 1
    assert "is also an input" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["other.png", "page", "page.txt"])
def test_command_writes_only_pages(tmp_path, pixels, capsys, monkeypatch, name):
    monkeypatch.setattr("semlic_jax.cli.measure.read_input", None)  # before the work
    image, out = tmp_path / "cup.png", tmp_path / name
    Image.fromarray(pixels).save(image)
    out.write_bytes(b"a photograph")
    assert cli.main(["compare", str(image), "--out", str(out), "--force"]) == 1
    refusal = f"semlic: expected an output named .html or .htm, found {out}\n"
    assert capsys.readouterr().err == refusal
    assert out.read_bytes() == b"a photograph"


def test_command_refuses_metrics_of_many_images(tmp_path, pixels, capsys):
    image = tmp_path / "cup.png"
    Image.fromarray(pixels).save(image)
    command = ["compare", str(image), "--metrics", "psnr_db,compact_frechet"]
    assert cli.main(command) == 1
    refusal = "compact_frechet is measured over many images: use semlic eval\n"
    assert capsys.readouterr().err == f"semlic: {refusal}"
    assert not image.with_suffix(".html").exists()


# The page in a browser.


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = chromium.find()
    if program is None:
        pytest.skip("no Chromium is installed: set CHROMIUM to its path")
    browser = chromium.Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory, page):
    path = tmp_path_factory.mktemp("page") / "cup.html"
    path.write_text(page)
    return path.as_uri()


def problems(browser) -> list:
    kinds = ("Log.entryAdded", "Runtime.exceptionThrown")
    return [event for event in browser.events if event.get("method") in kinds]


def requests(browser) -> list[str]:
    sent = [e for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    return [event["params"]["request"]["url"] for event in sent]


@pytest.mark.parametrize(("width", "mobile"), [(1280, False), (390, True), (320, True)])
def test_page_at_any_width(browser, address, width, mobile):
    browser.open(address, width, 900, mobile=mobile)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    box = browser.evaluate("stage.getBoundingClientRect().toJSON()")
    assert box["width"] > 0.85 * min(width, 1400) and box["height"] > 100
    # Everything that can be touched is large enough for a finger.
    small = browser.evaluate(
        "[...document.querySelectorAll('button, select, .choices span')]"
        ".filter(e => e.offsetParent && e.getBoundingClientRect().height < 40).length"
    )
    assert small == 0
    assert browser.evaluate("document.querySelector('h1').textContent") == TITLE
    image = Image.open(io.BytesIO(browser.screenshot()))
    assert len(image.convert("RGB").resize((64, 64)).getcolors(4096)) > 500
    assert problems(browser) == []


def test_no_request_leaves_the_page(browser, address):
    browser.open(address, 1280, 900)
    for key in "db2s3d1":
        browser.press(key)
    browser.evaluate("drawDifference()")
    assert {url.split(":")[0] for url in requests(browser)} <= {"file", "data"}
    # The policy holds: a request that a script tries does not go out.
    browser.events.clear()
    refused = browser.evaluate(
        "fetch('http://127.0.0.1:9/x').then(() => 'sent', () => 'refused')"
    )
    assert refused == "refused"
    assert any("Content Security Policy" in str(event) for event in problems(browser))


def test_pictures_are_decoded_exactly(browser, address, pixels, shown):
    browser.open(address, 1280, 900)
    total = "pixelsOf({}).then(p => p.reduce((a, b, i) => i % 4 == 3 ? a : a + b, 0))"
    assert browser.evaluate(total.format("original")) == pixels.sum()
    assert browser.evaluate(total.format("shown[0]")) == shown[0].image.sum()


def test_keys_choose_codec_view_and_zoom(browser, address, pixels, shown):
    browser.open(address, 1280, 900)
    keys = [each.key for each in shown]
    pictured = [i for i, each in enumerate(shown) if each.image is not None]
    assert browser.evaluate("state.right") == "semlic"
    last = pictured[-1]
    browser.press(str(last + 1))
    assert browser.evaluate("state.right") == keys[last]
    assert (
        browser.evaluate("document.querySelector('#right :checked').value")
        == keys[last]
    )
    browser.press("4")  # there is no picture of it
    assert browser.evaluate("state.right") == keys[last]

    browser.press("d")
    browser.evaluate("drawDifference()")
    mean = np.abs(pixels.astype(int) - shown[last].image.astype(int)).mean()
    assert f"mean {mean:.2f} of 255" in browser.evaluate("at('say').textContent")
    assert browser.evaluate("!at('map').hidden && at('divider').hidden")

    browser.press("b")
    text = browser.evaluate("at('say').textContent")
    assert ("There is no map" in text) == (last != 0)
    browser.press("1")
    most = f"{shown[0].bits.max():.0f}"
    assert browser.evaluate("at('say').textContent").endswith(most)
    assert browser.evaluate("!at('bits').hidden && at('map').hidden")

    browser.press("s")
    before = browser.evaluate("scale()")
    browser.press("+")
    assert browser.evaluate("scale()") == pytest.approx(1.5 * before)
    browser.press("0")
    assert browser.evaluate("scale()") == pytest.approx(before)


def test_everything_is_reached_with_the_tab_key(browser, address):
    browser.open(address, 1280, 900)
    reached = []
    for _ in range(20):
        browser.press("Tab", 9)
        reached.append(
            browser.evaluate("document.activeElement.id || document.activeElement.name")
        )
    for name in (
        "left",
        "right",
        "view",
        "out",
        "in",
        "fit",
        "one",
        "stage",
        "divider",
    ):
        assert name in reached, name
    labels = browser.evaluate(
        "[...document.querySelectorAll('button, input, select')]"
        ".every(e => e.textContent.trim() || e.ariaLabel || e.labels?.length)"
    )
    assert labels


def test_divider_moves_with_keys_and_mouse(browser, address):
    browser.open(address, 1280, 900)
    browser.evaluate("at('divider').focus()")
    value = "at('divider').getAttribute('aria-valuenow')"
    assert browser.evaluate(value) == "50"
    browser.press("ArrowRight", 39)
    assert browser.evaluate(value) == "52"
    browser.press("Home", 36)
    assert browser.evaluate(value) == "0"
    # At the far left everything is the right side.
    cut = "at('right-image').style.clipPath"
    assert browser.evaluate(cut) == "inset(0px)"
    browser.press("End", 35)
    assert browser.evaluate(cut) == "inset(0px 0px 0px 200px)"

    box = browser.evaluate("stage.getBoundingClientRect().toJSON()")
    y = box["y"] + box["height"] / 2
    browser.mouse("mousePressed", box["x"] + 0.5 * box["width"], y)
    browser.mouse("mouseMoved", box["x"] + 0.25 * box["width"], y)
    browser.mouse("mouseReleased", box["x"] + 0.25 * box["width"], y)
    assert browser.evaluate(value) == "25"


def test_a_zoomed_picture_is_moved_by_the_mouse(browser, address):
    browser.open(address, 1280, 900)
    browser.evaluate("zoomTo(4)")
    x = browser.evaluate("state.x")
    box = browser.evaluate("stage.getBoundingClientRect().toJSON()")
    left, y = box["x"] + 0.2 * box["width"], box["y"] + 50
    browser.mouse("mousePressed", left, y)
    browser.mouse("mouseMoved", left + 80, y)
    browser.mouse("mouseReleased", left + 80, y)
    assert browser.evaluate("state.x") == pytest.approx(x + 80, abs=1)
    assert browser.evaluate("state.divider") == 0.5


def test_the_address_keeps_what_is_shown(browser, address, shown):
    last = [each.key for each in shown if each.image is not None][-1]
    browser.open(f"{address}#right={last}&view=difference&zoom=2", 1280, 900)
    assert browser.evaluate("[state.right, state.view, state.zoom]") == [
        last,
        "difference",
        2,
    ]
    browser.open(f"{address}#right=nothing&view=nonsense&zoom=x", 1280, 900)
    assert browser.evaluate("[state.right, state.view, state.zoom]") == [
        "semlic",
        "slider",
        1,
    ]


def test_the_table_says_why_a_codec_is_missing(browser, address):
    browser.open(address, 1280, 900)
    rows = browser.evaluate(
        "[...document.querySelectorAll('tbody tr')].map(r => r.innerText)"
    )
    assert len(rows) == 4 and "mountain" in rows[3]
    assert browser.evaluate("document.querySelectorAll('a[download]').length") == sum(
        "save" in row for row in rows
    )


def test_the_page_has_its_numbers_under_their_names(pixels, shown, measures):
    kept = replace(shown[0], encode_s=1.25, decode_s=2.5, bits=np.ones((4, 5)))
    data = data_of(compare.page("a", pixels, [kept, *shown[1:]], measures))
    first = data["codecs"][0]
    assert (first["encode"], first["decode"]) == ("1.25 s", "2.50 s")
    assert (first["bits"]["rows"], first["bits"]["columns"]) == (4, 5)
    for facts in data["metrics"]:
        name = facts["name"]
        known = measures.image_metrics[name]
        assert facts["better"] == ("higher" if known.higher_is_better else "lower")
        values = {each.key: each.values[name] for each in shown if name in each.values}
        best = max if known.higher_is_better else min
        marked = [
            each["key"]
            for each in data["codecs"]
            if each["values"].get(name, {}).get("best")
        ]
        assert marked == [key for key in values if values[key] == best(values.values())]


def test_command_with_a_profile_a_background_and_a_rate(
    tmp_path, pixels, other_profile
):
    half = np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])
    half[:8, :8, 3] = 0
    path = tmp_path / "cup.png"
    Image.fromarray(half).save(path, icc_profile=other_profile)
    command = ["compare", str(path), "--codecs", "jpeg", "--metrics", "psnr_db"]
    assert cli.main([*command, "--bpp", "3"]) == 1
    sizes = []
    for bpp in ("2", "4"):
        options = ["--bpp", bpp, "--background", "#010203", "--force"]
        assert cli.main([*command, *options]) == 0
        data = data_of((tmp_path / "cup.html").read_text())
        sizes.append(8 * data["bytes"] / pixels[..., 0].size)
    assert sizes[0] <= 2 < sizes[1] <= 4
    body = data["original"].partition(",")[2]
    with Image.open(io.BytesIO(base64.b64decode(body))) as image:
        assert image.info["icc_profile"] == other_profile
        assert image.convert("RGB").getpixel((0, 0)) == (1, 2, 3)
