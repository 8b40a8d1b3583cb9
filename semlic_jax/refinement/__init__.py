# SPDX-License-Identifier: Apache-2.0
"""Refines the latents of one image, or of several, when they are compressed.

May import `model`, `objectives`, `images`, `compilation` and `memory` of this package.
The codec is an argument of its functions.
"""

from semlic_jax.refinement.batch import Progress, Refined
from semlic_jax.refinement.folder import FolderProgress, refine_folder
from semlic_jax.refinement.refine import RefinementWarning, refine, refine_batch
from semlic_jax.refinement.roi import (
    Region,
    RegionWarning,
    as_region,
    box_mask,
    parse_region,
    read_mask,
    salient_mask,
)
from semlic_jax.refinement.settings import PRESETS, Settings, preset

__all__ = [
    "PRESETS",
    "FolderProgress",
    "Progress",
    "Refined",
    "RefinementWarning",
    "Region",
    "RegionWarning",
    "as_region",
    "Settings",
    "box_mask",
    "parse_region",
    "preset",
    "read_mask",
    "refine",
    "refine_batch",
    "refine_folder",
    "salient_mask",
]
