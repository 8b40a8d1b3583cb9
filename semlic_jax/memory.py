# SPDX-License-Identifier: Apache-2.0
"""Whether work has room, asked before it starts.

An accelerator without room says so in an error. On a CPU the system ends the process,
and with it all that the others of a folder would have become.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax

# With more than this free nothing is asked, which takes as long as tracing the program
# again. A step of the method `newton` takes 1.3 kB per pixel with `small`.
_ROOMY_BYTES = 16_384
_GIB = 2**30


def require_memory(
    work: str, pixels: int, needed_bytes: Callable[[], int | None]
) -> None:
    """Raise where the machine has less memory left than work needs.

    Args:
        work: what is done to the pixels, for the message.
        pixels: that are worked on at once.
        needed_bytes: what that needs besides what is there already; slow, and not
            called where there is plenty. None is not known.

    Raises:
        MemoryError: says how much is needed and left.
    """
    left = available_bytes()
    if left is None or pixels * _ROOMY_BYTES <= left:
        return
    needed = needed_bytes()
    if needed is not None and needed > left:
        raise MemoryError(
            f"{work} {pixels} pixels at once needs at least {needed / _GIB:.1f} GiB, "
            f"found {left / _GIB:.1f} GiB"
        )


def available_bytes() -> int | None:
    """What a program on the CPU can still get; None on accelerators, or not known."""
    if jax.default_backend() != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        return None
