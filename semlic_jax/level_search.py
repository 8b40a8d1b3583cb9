# SPDX-License-Identifier: Apache-2.0
"""Which quality level fills a budget, by looking at the sizes of few files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

# Where the search starts, and by how much the log of the size rises from one level to
# the next: 0.014 to 0.023 on the images of Kodak between 0.1 and 0.3 bpp.
_FIRST_LEVEL = 100
_USUAL_RISE = 0.018
# Steps until the search no longer trusts the sizes to rise evenly.
_EXTRAPOLATIONS = 4
_INTERPOLATIONS = 7
# Levels to try beyond the first that does not fit, because sizes do not rise strictly.
# The search stops early at a file that is too large by more than any dip.
_LOOK_AHEAD = 3
_DIP_BYTES = 16
_DIP_SHARE = 0.01


def best_level(size: Callable[[int], int], budget: int, last: int) -> int | None:
    """The level of the largest file within a budget, of files of one size the highest.

    Args:
        size: bytes of the file of a level; slow, called once for a level.
        budget: most bytes.
        last: highest level; the lowest is 0.

    Returns:
        None where not even level 0 fits.
    """
    sizes: dict[int, int] = {}
    fits, too_big = -1, last + 1
    before: int | None = None  # the level before, where the search is on one side yet
    for step in itertools.count():
        if too_big - fits <= 1:
            break
        if not sizes:
            guess = _FIRST_LEVEL
        elif fits >= 0 and too_big <= last:
            # log(size) is nearly linear in the level, so a few steps are enough. Where
            # it is not, halving the range ends the search soon.
            position = math.log(budget / sizes[fits]) / math.log(
                sizes[too_big] / sizes[fits]
            )
            if step >= _INTERPOLATIONS and step % 2:
                position = 0.5
            guess = fits + round(position * (too_big - fits))
        else:
            nearest, end = (fits, last) if fits >= 0 else (too_big, 0)
            rise = _USUAL_RISE
            if before is not None:
                rise = math.log(sizes[nearest] / sizes[before]) / (nearest - before)
            before, guess = nearest, end
            if step <= _EXTRAPOLATIONS and rise > 0:
                wanted = math.log(max(budget, 1)) - math.log(sizes[nearest])
                guess = nearest + round(wanted / rise)
        guess = min(max(guess, fits + 1), too_big - 1)
        sizes[guess] = size(guess)
        if sizes[guess] <= budget:
            fits = guess
        else:
            too_big = guess
    return best_known(size, sizes, too_big, budget, last)


def best_known(
    size: Callable[[int], int],
    sizes: dict[int, int],
    too_big: int,
    budget: int,
    last: int,
) -> int | None:
    """The level of the largest file within a budget, after a search has come to an end.

    A few levels beyond the first that does not fit are looked at as well.

    Args:
        size: bytes of the file of a level.
        sizes: those that are known; gets what is looked at.
        too_big: the first level that does not fit; `last` + 1 where all do.
        budget, last: see `best_level`.

    Returns:
        None where nothing fits.
    """
    for level in range(too_big + 1, min(too_big + _LOOK_AHEAD, last) + 1):
        if level not in sizes:
            sizes[level] = size(level)
        if sizes[level] > budget * (1 + _DIP_SHARE) + _DIP_BYTES:
            break
    fitting = [level for level, found in sizes.items() if found <= budget]
    return max(fitting, key=lambda level: (sizes[level], level), default=None)
