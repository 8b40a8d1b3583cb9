# SPDX-License-Identifier: Apache-2.0
"""Regions of interest: masks from files, boxes and saliency, and what they do."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from semlic_jax import refinement
from semlic_jax.refinement import (
    Region,
    RegionWarning,
    as_region,
    box_mask,
    parse_region,
    read_mask,
    salient_mask,
)
from semlic_jax.refinement.roi import _barrier_distance, soften

SIZE = (56, 64)


def half_mask():
    mask = np.zeros(SIZE, np.float32)
    mask[:, :32] = 1
    return mask


def test_weights_are_means_over_their_own_pixels():
    """With D = sum of weights * error / pixels, whatever the size of the region."""
    rng = np.random.default_rng(0)
    error = rng.uniform(size=SIZE)
    for columns in (4, 50):
        mask = np.zeros(SIZE, np.float32)
        mask[:, :columns] = 1
        weights = Region(mask, 0.7, 0.3).pixel_weights(SIZE)
        found = (weights * error).mean()
        wanted = 0.7 * error[:, :columns].mean() + 0.3 * error[:, columns:].mean()
        assert found == pytest.approx(wanted, rel=1e-5)


def test_the_mean_weight_is_that_of_no_region():
    assert Region(half_mask(), 0.8, 0.2).pixel_weights(SIZE).mean() == pytest.approx(1)


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "is empty"), (1, "covers the whole"), (0.3, "is the same everywhere")],
)
def test_regions_without_a_border_say_so(value, words):
    mask = np.full(SIZE, value, np.float32)
    with pytest.warns(RegionWarning, match=words):
        weights = Region(mask).pixel_weights(SIZE)
    np.testing.assert_allclose(weights, 1)
    assert Region(mask).weight_ratio() == 1


@pytest.mark.parametrize("contrast", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("weights", [(0.8, 0.2), (0.1, 0.9)])
def test_ratios_are_of_weights_that_there_are(contrast, weights):
    region = Region(0.05 + 0.9 * contrast * half_mask(), *weights)
    found = region.pixel_weights(SIZE)
    expected = found[0, 0] / found[0, -1]  # foreground over background
    assert region.weight_ratio() == pytest.approx(expected, rel=1e-5)
    assert Region(half_mask(), 1.0, 0.0).weight_ratio() == 1e3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((4, 4, 3)),), r"mask of numbers \[H, W\]"),
        ((np.full((4, 4), 2.0),), "from 0 to 1"),
        ((half_mask(), -0.1, 0.2), "foreground"),
        ((half_mask(), 0.1, -0.2), "background"),
        ((half_mask(), 0.0, 0.0), "0"),
        (
            (half_mask(), 1e300, 0.2),
            r"foreground weight from 0 to 1e\+06, found 1e\+300",
        ),
        ((half_mask(), 0.5, 0.5, "L3"), "L1"),
    ],
)
def test_bad_regions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Region(*arguments)


def test_a_mask_of_another_size_names_both():
    with pytest.raises(ValueError, match="size 100 x 80, found 64 x 56"):
        Region(half_mask()).pixel_weights((80, 100))


def test_masks_from_files(tmp_path):
    path = tmp_path / "mask.png"
    Image.fromarray((half_mask() * 255).astype(np.uint8)).save(path)
    mask = read_mask(path, SIZE, edge_pixels=0)
    np.testing.assert_array_equal(mask, half_mask())
    message = r"size 128 x 112, found 64 x 56: resize it \(--roi-resize\)"
    with pytest.raises(ValueError, match=message):
        read_mask(path, (112, 128))
    resized = read_mask(path, (112, 128), resize=True, edge_pixels=0)
    assert resized.shape == (112, 128)
    assert resized[:, :60].min() > 0.99 and resized[:, 68:].max() < 0.01


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_masks_of_16_bits(tmp_path, suffix):
    path = tmp_path / f"mask.{suffix}"
    wide = np.linspace(0, 65535, 56 * 64).reshape(SIZE).astype(np.uint16)
    Image.fromarray(wide).save(path)
    mask = read_mask(path, SIZE, edge_pixels=0)
    np.testing.assert_allclose(mask, wide / 65535, atol=0.5 / 255 + 1e-6)


def test_masks_that_are_too_large_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "mask.png"
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="mask.png is refused for its size"):
        read_mask(path, SIZE)


def test_masks_that_are_no_images(tmp_path):
    path = tmp_path / "mask.png"
    with pytest.raises(ValueError, match="does not exist"):
        read_mask(path, SIZE)
    path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="is not an image"):
        read_mask(path, SIZE)


def test_boxes():
    image = np.zeros((40, 60, 3), np.uint8)
    mask = parse_region("10,5,20,15", image)
    inside = box_mask((40, 60), [(10, 5, 20, 15)], edge_pixels=0)
    assert inside[5:20, 10:30].all() and inside.sum() == 300
    np.testing.assert_allclose(mask, soften(inside, 8.0))
    with pytest.warns(
        RegionWarning, match="-5,30,10,100 extends beyond the image of 60"
    ):
        both = box_mask((40, 60), [(0, 0, 10, 10), (-5, 30, 10, 100)], edge_pixels=0)
    assert both[:10, :10].all() and both[30:, :5].all() and both.sum() == 150
    two = parse_region("0,0,9,9;20,20,9,9", image)
    assert two[4, 4] > 0.1 and two[24, 24] > 0.1 and two[4, 50] < 0.01
    with pytest.raises(ValueError, match="a box of at least 1 x 1"):
        parse_region("1,1,0,5", image)
    with pytest.raises(ValueError, match="x,y,width,height"):
        parse_region("1,1,5", image)


@pytest.mark.parametrize(
    "box", ["60,0,9,9", "0,40,9,9", "-9,0,9,9", "0,-9,9,9", "300,300,10,10"]
)
def test_boxes_outside_the_image_are_refused(box):
    image = np.zeros((40, 60, 3), np.uint8)
    message = f"^the box {box} lies outside the image of 60x40$"
    for boxes in (box, f"0,0,9,9;{box}"):
        with pytest.raises(ValueError, match=message):
            parse_region(boxes, image)
    assert parse_region("59,39,1,1;0,0,1,1", image).max() > 0


def test_soft_edges_keep_the_middle_and_the_mass():
    soft = soften(half_mask(), 3.0)
    assert soft[:, :16].min() > 0.99 and soft[:, 48:].max() < 0.01
    assert (np.diff(soft[20]) <= 1e-6).all()
    assert soft.mean() == pytest.approx(0.5, abs=0.01)
    assert soft[20, 28] == pytest.approx(1 - soft[20, 35], abs=1e-5)


def test_what_stands_out_is_found():
    """A bright disc before a cluttered, darker background."""
    rng = np.random.default_rng(0)
    image = rng.integers(40, 90, (90, 120, 3)).astype(np.uint8)
    rows, columns = np.ogrid[:90, :120]
    disc = (rows - 45) ** 2 + (columns - 65) ** 2 < 22**2
    image[disc] = (230, 120, 40)
    mask = salient_mask(image)
    assert mask.dtype == np.float32 and mask.shape == (90, 120)
    assert 0 <= mask.min() and mask.max() <= 1
    assert mask[disc].mean() > 0.8 and mask[~disc].mean() < 0.2


def test_texture_makes_no_holes():
    """Bits follow cells of 16 pixels: a dark stripe in an object is part of it."""
    image = np.full((240, 320, 3), 70, np.uint8)
    rows, columns = np.ogrid[:240, :320]
    distance = (rows - 120) ** 2 + (columns - 170) ** 2
    image[distance < 70**2] = (230, 120, 40)
    image[(distance < 70**2) & (columns % 8 < 3)] = 75
    mask = salient_mask(image)
    assert mask[distance < 50**2].min() > 0.9 and mask[distance > 90**2].max() < 0.1


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (3, 2), (300, 20)])
def test_saliency_of_any_size(size):
    mask = salient_mask(np.full((*size, 3), 128, np.uint8))
    assert mask.shape == size and np.isfinite(mask).all()


def test_regions_in_any_form(tmp_path):
    image = np.zeros((*SIZE, 3), np.uint8)
    region = Region(half_mask())
    assert as_region(None, image) is None
    assert as_region(region, image) is region
    np.testing.assert_array_equal(as_region(half_mask(), image).mask, half_mask())
    np.testing.assert_array_equal(
        as_region((half_mask() * 255).astype(np.uint8), image).mask, half_mask()
    )
    assert as_region("0,0,8,8", image).mask[0, 0] > 0.3
    path = tmp_path / "auto"  # a name that means something as text
    Image.fromarray((half_mask() * 255).astype(np.uint8)).save(path, format="PNG")
    soft = soften(half_mask(), 8.0)
    np.testing.assert_allclose(as_region(path, image).mask, soft, atol=1e-6)


def psnr_db_where(chosen, codec, data, image):
    error = (codec.decompress(data).astype(float) - image) ** 2
    return 10 * np.log10(255**2 / error[chosen].mean())


def test_weights_raise_the_foreground(mini_codec, photograph):
    """At equal bytes, and the more the larger they are; the background pays."""
    image = photograph(*SIZE, seed=3)
    budget = len(mini_codec.compress(image, quality=0.5))
    settings = refinement.preset(40, gamma=0.0, chunk_steps=10)
    inside, outside = [], []
    for weight in (0.5, 0.8, 0.98):
        region = Region(half_mask(), weight, 1 - weight)
        refined = refinement.refine(
            mini_codec, image, max_bytes=budget, settings=settings, region=region
        )
        assert len(refined.data) <= budget
        assert refined.value <= refined.unrefined_value
        inside.append(psnr_db_where(half_mask() > 0.5, mini_codec, refined.data, image))
        outside.append(
            psnr_db_where(half_mask() < 0.5, mini_codec, refined.data, image)
        )
    assert inside == sorted(inside) and inside[2] - inside[0] > 0.1
    assert outside == sorted(outside)[::-1] and outside[0] - outside[2] > 0.1


def test_ratios_of_foregrounds_without_a_weight_have_a_logarithm():
    """`--roi-weight 0`: where an image starts depends on the ratio's logarithm."""
    region = Region(half_mask(), 0.0, 1.0)
    assert region.weight_ratio() == pytest.approx(1e-3)
    assert Region(1 - half_mask(), 0.0, 1.0).weight_ratio() == pytest.approx(1e-3)


@pytest.mark.parametrize("edge_pixels", [8.0, 20.0])
def test_soft_edges_have_the_deviation_they_are_asked_for(edge_pixels):
    mask = np.zeros((9, 201), np.float32)
    mask[:, 100] = 1
    line = soften(mask, edge_pixels)[4].astype(np.float64)
    assert line.sum() == pytest.approx(1, rel=1e-4)
    deviation = np.sqrt((line * (np.arange(201) - 100) ** 2).sum())
    assert deviation == pytest.approx(edge_pixels, rel=0.2)


def test_an_object_that_touches_one_side_stands_out():
    image = np.full((96, 96, 3), 70, np.uint8)
    image += np.random.default_rng(0).integers(0, 12, image.shape, np.uint8)
    image[40:, 30:66] = (230, 120, 40)  # down to the lower side
    mask = salient_mask(image)
    assert mask[50:70, 36:60].mean() > 0.8 and mask[:, :16].mean() < 0.2


def test_barriers_are_seen_from_all_sides():
    """Within a wall with a gap to the right, all is one with the border."""
    channel = np.zeros((9, 9))
    channel[2:7, 2:7] = 1
    channel[3:6, 3:6] = 0
    closed = _barrier_distance(channel)
    assert (closed[3:6, 3:6] == 1).all()
    for gap in (np.s_[4, 6], np.s_[4, 2], np.s_[2, 4], np.s_[6, 4]):
        opened = channel.copy()
        opened[gap] = 0
        assert _barrier_distance(opened)[4, 4] == 0
