# SPDX-License-Identifier: Apache-2.0
"""What the file of each image is made with, and the quality its refinement starts from.

This module chooses the quality level of the latents, whose quantiser stays as it is
during the refinement, from the sizes of unrefined files. The refinement itself is in
`batch.py`, and `fit.py` makes the files.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from semlic_jax.refinement.roi import Region

if TYPE_CHECKING:
    from semlic_jax.codec import Codec, Latents

LEVEL_PROBE = 16  # distance of the levels between which slopes are measured
MAX_LEVEL = 255
# If the weights inside and outside of a region differ by this ratio or more, the
# unrefined file that the refinement starts from exceeds the budget by this share. On
# five photographs at 0.15 bpp with a foreground weight of 0.9, a share of 0.1 gained
# 0.5 dB inside, 0.3 gained 0.9 dB and 0.5 gained 1.15 dB.
_REGION_RATIO = 10.0
_REGION_OVERSHOOT = 0.5


class Job(NamedTuple):
    """What the file of one image is made with, besides its latents.

    Attributes:
        size: height and width of the image in pixels.
        level: quality level of the latents, 0 to 255.
        budget_bytes: the most bytes of the file.
        payload_bits: about how many bits the budget leaves for the symbols.
        icc_profile: ICC profile to store in the file, or None.
        unrefined: the unrefined file within the budget.
    """

    size: tuple[int, int]
    level: int
    budget_bytes: int
    payload_bits: float
    icc_profile: bytes | None
    unrefined: bytes


def plan_job(
    codec: Codec,
    latents: Latents,
    *,
    budget_bytes: int,
    region: Region | None,
    icc_profile: bytes | None,
    unrefined: bytes,
    overshoot: float,
) -> Job:
    """Plan the file of one image, including the level to start from.

    The bits that a file takes besides its symbols, and how its size grows with the
    level, are measured near the level of the unrefined file.

    Args:
        codec: the codec of the model.
        latents: of the analysed image.
        budget_bytes: the most bytes of the file.
        region: region of interest, or None.
        icc_profile: ICC profile to store in the file, or None.
        unrefined: an unrefined file of the image within the budget.
        overshoot: the share of the budget by which the file of the first latents
            exceeds it, if there is no region.

    Raises:
        ValueError: the unrefined file is of another size than the image, or the
            profile alone exceeds the budget.
    """
    size = latents.size
    header = codec.info(unrefined)
    if (header["height"], header["width"]) != size:
        raise ValueError(
            f"expected an unrefined file of {size[1]} x {size[0]} pixels, found "
            f"{header['width']} x {header['height']}"
        )
    level = round(header["quality"] * MAX_LEVEL)
    probe = level + LEVEL_PROBE
    if probe > MAX_LEVEL:
        probe = level - LEVEL_PROBE
    symbols = codec.entropy.symbols(*codec.scaled(latents, probe), probe, size)
    data = codec.encode_symbols(symbols, probe, size, icc_profile)
    overhead_bits = 8 * len(data) - codec.entropy.ideal_bits(symbols, size)
    # A profile takes the same bytes at every level, so it must not count: most of a
    # small file may be its profile.
    fixed = len(icc_profile or b"")
    if budget_bytes <= fixed:
        raise ValueError(
            f"expected a budget of more than {fixed:,} bytes, which the colour profile "
            f"takes, found {budget_bytes:,}"
        )
    before = len(unrefined) - header["icc_profile_bytes"]
    growth = math.log((len(data) - fixed) / before) / (probe - level)
    share = 1 + _overshoot(overshoot, region)
    wanted = math.log((budget_bytes - fixed) * share / before)
    level += round(wanted / max(growth, 1e-3))
    return Job(
        size=size,
        level=min(max(level, 0), MAX_LEVEL),
        budget_bytes=budget_bytes,
        payload_bits=8 * float(budget_bytes) - overhead_bits,
        icc_profile=icc_profile,
        unrefined=unrefined,
    )


def _overshoot(usual: float, region: Region | None) -> float:
    """The share by which the file that an image starts from exceeds its budget.

    Nothing in an image gets finer than its quantiser. So an image with a region starts
    from a finer quantiser, the more so the more the weights differ.
    """
    if region is None:
        return usual
    reached = abs(math.log(region.weight_ratio())) / math.log(_REGION_RATIO)
    extra = max(_REGION_OVERSHOOT - usual, 0.0)
    return usual + extra * min(reached, 1.0)
