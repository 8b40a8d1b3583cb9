# SPDX-License-Identifier: Apache-2.0
"""Regions of interest: foreground masks and the pixel weights made from them.

A mask is float32 [H, W], 1 where the image matters and 0 where it does not, with soft
edges. With a region, the distortion is

    D = w_fg * mean of the foreground + w_bg * mean of the background,

where each mean is over its own pixels, so the weights mean the same for a small and for
a large region. Variant `L1` weights the distortion alone, `L2` the perceptual terms
too.

`auto` finds what stands out without any learnt model, by the minimum barrier distance
to the border of the image, the colour contrast to the border and a preference for the
centre (Zhang et al. 2015, "Minimum Barrier Salient Object Detection at 80 FPS").
"""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Iterable

import numpy as np
from PIL import Image

from semlic_jax.images import read_brightness

VARIANTS = ("L1", "L2")
DEFAULT_EDGE_PIXELS = 8.0
_MOST_WEIGHT = 1e6
# Longer side, in pixels, of the small image in which `salient_mask` looks for objects.
_SALIENCY_SIDE = 96
_BARRIER_SCANS = 3
_BORDER_SHARE = 0.1
_CENTRE_STRENGTH = 0.5
_CONTRAST = 45.0  # slope of the sigmoid that turns a saliency map into a mask
# The blur lets the mask show objects and not their texture: a latent covers 16 x 16
# pixels, so bits cannot follow a mask with holes of a few pixels.
_SALIENCY_BLUR = 3.0  # pixels of the small image


class RegionWarning(UserWarning):
    """A region changes nothing, or a box is not entirely in the image."""


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """A foreground mask with the weights of foreground and background.

    Attributes:
        mask: float32 [H, W] in [0, 1]; may be given as other numbers in this range, or
            as uint8 in 0..255.
        foreground, background: w_fg and w_bg, from 0 to 1e6, not both 0.
        variant: `L1` or `L2`.

    Raises:
        ValueError: an attribute is not of this form.
    """

    mask: np.ndarray
    foreground: float = 0.8
    background: float = 0.2
    variant: str = "L1"

    def __post_init__(self) -> None:
        mask = np.asarray(self.mask)
        if mask.ndim != 2 or mask.dtype.kind not in "fbiu":
            raise ValueError(
                f"expected a mask of numbers [H, W], found {mask.dtype} of shape "
                f"{list(mask.shape)}"
            )
        mask = mask.astype(np.float32) / (255 if mask.dtype == np.uint8 else 1)
        if not (mask.min(initial=0) >= 0 and mask.max(initial=0) <= 1):
            raise ValueError(
                f"expected a mask from 0 to 1 (or uint8), found {mask.min():g} to "
                f"{mask.max():g}"
            )
        for name in ("foreground", "background"):
            value = getattr(self, name)
            if not 0 <= value <= _MOST_WEIGHT:
                raise ValueError(
                    f"expected a {name} weight from 0 to {_MOST_WEIGHT:g}, found "
                    f"{value}"
                )
        if self.foreground + self.background == 0:
            raise ValueError(
                "expected foreground or background weight above 0, found both 0"
            )
        if self.variant not in VARIANTS:
            raise ValueError(
                f"expected the variant {' or '.join(VARIANTS)}, found {self.variant!r}"
            )
        object.__setattr__(self, "mask", mask)

    def pixel_weights(self, size: tuple[int, int]) -> np.ndarray:
        """The weight of each pixel, float32 [H, W]: D is the mean of weighted errors.

        The mean weight is w_fg + w_bg. A mask that is the same everywhere gives equal
        weights and a RegionWarning.

        Args:
            size: height and width of the image.

        Raises:
            ValueError: the mask has another size.
        """
        if self.mask.shape != tuple(size):
            raise ValueError(
                f"expected a mask of the image's size {size[1]} x {size[0]}, found "
                f"{self.mask.shape[1]} x {self.mask.shape[0]}"
            )
        if self._is_even():
            what = {0: "is empty", 1: "covers the whole image"}.get(
                self.mask.flat[0], "is the same everywhere"
            )
            warnings.warn(
                f"the region {what}: refining without one", RegionWarning, stacklevel=2
            )
            total = self.foreground + self.background
            return np.full(size, total, np.float32)
        return self._weights(self.mask).astype(np.float32)

    def weight_ratio(self) -> float:
        """The weight where the mask is highest, divided by that where it is lowest.

        It lies between 1e-3 and 1e3, and is 1 for a mask that is the same everywhere.
        """
        if self._is_even():
            return 1.0
        ends = np.array([self.mask.max(), self.mask.min()], np.float64)
        inside, outside = self._weights(ends).tolist()
        return min(max(inside / max(outside, 1e-9), 1e-3), 1e3)

    def _weights(self, mask: np.ndarray) -> np.ndarray:
        """Weights of pixels where the mask has these values."""
        share = float(self.mask.mean(dtype=np.float64))
        weights = self.foreground / share * mask
        weights += self.background / (1 - share) * (1 - mask)
        return weights

    def _is_even(self) -> bool:
        share = float(self.mask.mean(dtype=np.float64))
        return not 0 < share < 1 or bool(self.mask.min() == self.mask.max())


def box_mask(
    size: tuple[int, int],
    boxes: Iterable[tuple[int, int, int, int]],
    edge_pixels: float = DEFAULT_EDGE_PIXELS,
) -> np.ndarray:
    """Make a mask of boxes (x, y, width, height), float32 [H, W], with soft edges.

    The boxes are clipped to the image, of size [H, W]; a box that sticks out of it
    gives a RegionWarning. The edges are blurred as by `soften`.

    Raises:
        ValueError: a box has no area, or lies outside the image.
    """
    mask = np.zeros(size, np.float32)
    for x, y, width, height in boxes:
        if width < 1 or height < 1:
            raise ValueError(
                f"expected a box of at least 1 x 1, found {width} x {height}"
            )
        box = f"the box {x},{y},{width},{height}"
        image = f"the image of {size[1]}x{size[0]}"
        if x >= size[1] or y >= size[0] or x + width <= 0 or y + height <= 0:
            raise ValueError(f"{box} lies outside {image}")
        if x < 0 or y < 0 or x + width > size[1] or y + height > size[0]:
            warnings.warn(
                f"{box} extends beyond {image}: only the part inside counts",
                RegionWarning,
                stacklevel=2,
            )
        mask[max(y, 0) : max(y + height, 0), max(x, 0) : max(x + width, 0)] = 1
    return soften(mask, edge_pixels)


def read_mask(
    path: str | os.PathLike[str],
    size: tuple[int, int],
    *,
    resize: bool = False,
    edge_pixels: float = DEFAULT_EDGE_PIXELS,
) -> np.ndarray:
    """Read a mask from an image file, whose brightness it is: float32 [H, W].

    Args:
        path: any image file that Pillow reads.
        size: height and width of the photograph.
        resize: whether to resize a mask of another size instead of refusing it.
        edge_pixels: see `soften`.

    Raises:
        ValueError: there is no such file, it is not an image, it is damaged, or it has
            another size.
        OSError: the file cannot be opened.
    """
    try:
        image = Image.fromarray(read_brightness(path))
    except FileNotFoundError:
        raise ValueError(f"the mask {path} does not exist") from None
    wanted = (size[1], size[0])
    if image.size != wanted:
        if not resize:
            raise ValueError(
                f"expected a mask of the image's size {wanted[0]} x {wanted[1]}, found "
                f"{image.size[0]} x {image.size[1]}: resize it (--roi-resize) if it "
                "shows the same picture"
            )
        image = image.resize(wanted, Image.Resampling.BILINEAR)
    return soften(np.asarray(image, np.float32) / 255, edge_pixels)


def parse_region(text: str, image: np.ndarray, *, resize: bool = False) -> np.ndarray:
    """The mask that a command line names: `auto`, `x,y,w,h` or an image file.

    Several boxes are separated by `;`.

    Args:
        text: what to parse.
        image: uint8 [H, W, 3], the photograph.
        resize: see `read_mask`.

    Raises:
        ValueError: a box does not have four numbers; see also `box_mask` and
            `read_mask`.
        OSError: the file cannot be opened.
    """
    size = image.shape[:2]
    if text == "auto":
        return salient_mask(image)
    try:
        boxes = [tuple(int(part) for part in box.split(",")) for box in text.split(";")]
    except ValueError:
        return read_mask(text, size, resize=resize)
    if any(len(box) != 4 for box in boxes):
        raise ValueError(f"expected a box as x,y,width,height, found {text!r}")
    return box_mask(size, [(b[0], b[1], b[2], b[3]) for b in boxes])


def as_region(
    given: Region | np.ndarray | str | os.PathLike[str] | None, image: np.ndarray
) -> Region | None:
    """Make a region from any of the forms that `Codec.compress` takes.

    Raises:
        ValueError, OSError: see `Region`, `parse_region` and `read_mask`.
    """
    if given is None or isinstance(given, Region):
        return given
    if isinstance(given, str):
        return Region(parse_region(given, image))
    if isinstance(given, os.PathLike):  # a file, whatever its name
        return Region(read_mask(given, image.shape[:2]))
    return Region(np.asarray(given))


def soften(mask: np.ndarray, edge_pixels: float) -> np.ndarray:
    """Blur a mask by a Gaussian with this deviation in pixels, float32 [H, W]."""
    if edge_pixels <= 0:
        return mask.astype(np.float32)
    # Three box filters are nearly a Gaussian; sums over a running window are exact
    # enough in float64 and cost the same for any width.
    width = max(1, round(math.sqrt(4 * edge_pixels**2 + 1)))
    width += 1 - width % 2
    result = mask.astype(np.float64)
    for axis in (0, 1):
        for _ in range(3):
            result = _box_filter(result, width, axis)
    return np.clip(result, 0, 1).astype(np.float32)


def _box_filter(values: np.ndarray, width: int, axis: int) -> np.ndarray:
    pads = [(0, 0), (0, 0)]
    pads[axis] = (width // 2 + 1, width // 2)
    sums = np.cumsum(np.pad(values, pads, mode="edge"), axis)
    length = values.shape[axis]
    after = np.take(sums, range(width, width + length), axis)
    return (after - np.take(sums, range(length), axis)) / width


def salient_mask(image: np.ndarray) -> np.ndarray:
    """Make a soft mask of what stands out in a photograph, float32 [H, W].

    Args:
        image: uint8 [H, W, 3].
    """
    height, width = image.shape[:2]
    scale = min(1.0, _SALIENCY_SIDE / max(height, width))
    small = Image.fromarray(image).resize(
        (max(1, round(width * scale)), max(1, round(height * scale))),
        Image.Resampling.BOX,
    )
    lab = _opponent_colours(np.asarray(small, np.float64) / 255)
    barriers = [_barrier_distance(channel) for channel in np.moveaxis(lab, -1, 0)]
    saliency = _normalised(np.sum(barriers, axis=0))
    saliency = _normalised(saliency + _border_contrast(lab))
    rows, columns = np.ogrid[-1 : 1 : small.height * 1j, -1 : 1 : small.width * 1j]
    centred = np.exp(-_CENTRE_STRENGTH * (rows**2 + columns**2))
    saliency = _normalised(soften(saliency * centred, _SALIENCY_BLUR))
    mask = 1 / (1 + np.exp(-_CONTRAST * (saliency - _otsu_threshold(saliency))))
    full = Image.fromarray(_normalised(mask).astype(np.float32)).resize(
        (width, height), Image.Resampling.BILINEAR
    )
    return np.clip(np.asarray(full), 0, 1).astype(np.float32)


def _opponent_colours(rgb: np.ndarray) -> np.ndarray:
    """Gamma-coded brightness, red-green and yellow-blue, about even to the eye."""
    red, green, blue = np.moveaxis(rgb, -1, 0)
    return np.stack(
        [(red + green + blue) / 3, (red - green) / 2, (red + green - 2 * blue) / 4], -1
    )


def _normalised(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    return (values - low) / max(high - low, 1e-9)


def _barrier_distance(channel: np.ndarray) -> np.ndarray:
    """The minimum barrier distance of each pixel to the border of the image.

    This is the least range of values on a path to the border. It is approximated by
    raster scans, alternately from the top left and from the bottom right.
    """
    values = channel.tolist()
    height, width = channel.shape
    distance = [[math.inf] * width for _ in range(height)]
    upper = [list(row) for row in values]
    lower = [list(row) for row in values]
    for row in range(height):
        for column in range(width):
            if row in (0, height - 1) or column in (0, width - 1):
                distance[row][column] = 0.0
    for scan in range(_BARRIER_SCANS):
        back = scan % 2
        step = -1 if back else 1
        rows = range(1, height - 1)[::step]
        columns = range(1, width - 1)[::step]
        for row in rows:
            for column in columns:
                value = values[row][column]
                for r, c in ((row - step, column), (row, column - step)):
                    high = max(upper[r][c], value)
                    low = min(lower[r][c], value)
                    if high - low < distance[row][column]:
                        distance[row][column] = high - low
                        upper[row][column], lower[row][column] = high, low
    return np.array(distance)


def _border_contrast(colours: np.ndarray) -> np.ndarray:
    """Mahalanobis distance to the colours of three of the four border strips, summed.

    It is scaled to [0, 1].
    """
    height, width = colours.shape[:2]
    strip = max(1, round(_BORDER_SHARE * min(height, width)))
    distances = []
    for border in (
        colours[:strip],
        colours[-strip:],
        colours[:, :strip],
        colours[:, -strip:],
    ):
        samples = border.reshape(-1, 3)
        deviation = samples - samples.mean(0)
        covariance = deviation.T @ deviation / len(samples) + 1e-4 * np.eye(3)
        offset = colours - samples.mean(0)
        square = np.einsum("hwi,ij,hwj->hw", offset, np.linalg.inv(covariance), offset)
        distances.append(_normalised(np.sqrt(np.maximum(square, 0))))
    # The object may touch one side, so for each pixel the largest distance is left out.
    return _normalised(sum(distances) - np.max(distances, axis=0))


def _otsu_threshold(values: np.ndarray) -> float:
    """The threshold in [0, 1] that separates the values best into two classes."""
    counts, edges = np.histogram(values, 64, (0.0, 1.0))
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = sums / below - (sums[-1] - sums) / above
        variance = np.nan_to_num(below * above * gap**2)
    return float(edges[1:][np.argmax(variance)])
