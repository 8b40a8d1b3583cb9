# SPDX-License-Identifier: Apache-2.0
"""Regions of interest: foreground masks and the pixel weights that come of them.

A mask is float32 [H, W], 1 where the image matters, 0 where it does not, with soft
edges. With a region the distortion is

    D = w_fg * mean of the foreground + w_bg * mean of the background,

each mean over its own pixels, so the weights mean the same for a small and for a large
region. Variant `L1` weights the distortion alone, `L2` the perceptual terms too.

`auto` finds what stands out, without any learnt model: minimum barrier distance to the
border of the image, with the colour contrast to the border and a preference for the
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
# Cells of the longer side of the picture that `salient_mask` looks at.
_SALIENCY_SIDE = 96
_BARRIER_SCANS = 3
_BORDER_SHARE = 0.1
_CENTRE_STRENGTH = 0.5
_CONTRAST = 45.0  # of the sigmoid that makes a saliency map a mask
# Objects, not their texture: a latent covers 16 x 16 pixels, so that bits cannot follow
# a mask with holes of a few.
_SALIENCY_BLUR = 3.0  # pixels of the small image


class RegionWarning(UserWarning):
    """A region that changes nothing, or a box that is not all in the image."""


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """A mask with its weights.

    Attributes:
        mask: float32 [H, W] in [0, 1].
        foreground, background: w_fg and w_bg, at least 0, not both 0.
        variant: `L1` or `L2`.
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
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"expected a {name} weight from 0, found {value}")
        if self.foreground + self.background == 0:
            raise ValueError("expected a weight above 0, found both weights 0")
        if self.variant not in VARIANTS:
            raise ValueError(
                f"expected a variant of {' or '.join(VARIANTS)}, found {self.variant!r}"
            )
        object.__setattr__(self, "mask", mask)

    def pixel_weights(self, size: tuple[int, int]) -> np.ndarray:
        """Weights whose mean with the pixels' errors is D: float32 [H, W].

        Their mean is w_fg + w_bg. A region that is the same everywhere gives equal
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
        """Weight of a pixel where the mask is highest over one where it is lowest.

        Between 1e-3 and 1e3; 1 for a region that is the same everywhere.
        """
        if self._is_even():
            return 1.0
        ends = np.array([self.mask.max(), self.mask.min()], np.float64)
        inside, outside = self._weights(ends).tolist()
        return min(max(inside / max(outside, 1e-9), 1e-3), 1e3)

    def _weights(self, mask: np.ndarray) -> np.ndarray:
        """Of pixels with these values of the mask."""
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
    """Mask of boxes (x, y, width, height), clipped to the image: float32 [H, W].

    A box that sticks out of the image gives a RegionWarning.

    Raises:
        ValueError: a box without area, or one that lies outside the image.
    """
    mask = np.zeros(size, np.float32)
    for x, y, width, height in boxes:
        if width < 1 or height < 1:
            raise ValueError(f"expected a box of area, found {width} x {height}")
        box = f"the box {x},{y},{width},{height}"
        image = f"the image of {size[1]}x{size[0]}"
        if x >= size[1] or y >= size[0] or x + width <= 0 or y + height <= 0:
            raise ValueError(f"{box} lies outside {image}")
        if x < 0 or y < 0 or x + width > size[1] or y + height > size[0]:
            warnings.warn(
                f"{box} sticks out of {image}: its part in the image counts",
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
    """Mask of an image file, its brightness: float32 [H, W].

    Args:
        path: any image file that Pillow reads.
        size: height and width of the photograph.
        resize: take a mask of another size and resize it.
        edge_pixels: see `soften`.

    Raises:
        ValueError: not an image, damaged, or another size.
        OSError: the file cannot be opened.
    """
    try:
        image = Image.fromarray(read_brightness(path))
    except FileNotFoundError:
        raise ValueError(f"expected a mask, found nothing at {path}") from None
    wanted = (size[1], size[0])
    if image.size != wanted:
        if not resize:
            raise ValueError(
                f"expected a mask of the image's size {wanted[0]} x {wanted[1]}, found "
                f"{image.size[0]} x {image.size[1]}: resize it (--roi-resize) if it is "
                "of the same picture"
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
        ValueError: see `box_mask` and `read_mask`.
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
    """A region in any of the forms that `Codec.compress` takes."""
    if given is None or isinstance(given, Region):
        return given
    if isinstance(given, str):
        return Region(parse_region(given, image))
    if isinstance(given, os.PathLike):  # a file, whatever its name
        return Region(read_mask(given, image.shape[:2]))
    return Region(np.asarray(given))


def soften(mask: np.ndarray, edge_pixels: float) -> np.ndarray:
    """Blur the edges of a mask with a Gaussian of this deviation, in pixels."""
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
    """Soft mask of what stands out in a photograph: float32 [H, W].

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
    """Brightness, red-green and yellow-blue, gamma-coded; about even to the eye."""
    red, green, blue = np.moveaxis(rgb, -1, 0)
    return np.stack(
        [(red + green + blue) / 3, (red - green) / 2, (red + green - 2 * blue) / 4], -1
    )


def _normalised(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    return (values - low) / max(high - low, 1e-9)


def _barrier_distance(channel: np.ndarray) -> np.ndarray:
    """Minimum barrier distance to the border: least range of values on a path there.

    Raster scans, alternately from the top left and from the bottom right.
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
    """Least Mahalanobis distance to the colours of three of the four border strips."""
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
    # The object may touch one side: the strip that differs most is left out.
    return _normalised(sum(distances) - np.max(distances, axis=0))


def _otsu_threshold(values: np.ndarray) -> float:
    """The threshold in [0, 1] that separates two classes best."""
    counts, edges = np.histogram(values, 64, (0.0, 1.0))
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = sums / below - (sums[-1] - sums) / above
        variance = np.nan_to_num(below * above * gap**2)
    return float(edges[1:][np.argmax(variance)])
