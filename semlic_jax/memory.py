# SPDX-License-Identifier: Apache-2.0
"""Whether work has room, asked before it starts.

An accelerator without room says so in an error. On a CPU the system ends the process,
and with it all that the others of a folder would have become.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

# With more than this free for each pixel, `needed_bytes` is not called: it traces the
# program again. A step of `newton` takes 1.3 kB per pixel with `small`.
_ROOMY_BYTES_PER_PIXEL = 16_384
_GIB = 2**30

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
# Files with the limit of a control group and with what it uses.
_OF_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
_OF_VERSION_2 = ("memory.max", "memory.current")


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
    if left is None or pixels * _ROOMY_BYTES_PER_PIXEL <= left:
        return
    needed = needed_bytes()
    if needed is not None and needed > left:
        raise MemoryError(
            f"{work} {pixels} pixels at once needs at least {needed / _GIB:.1f} GiB of "
            f"memory, found {left / _GIB:.1f} GiB"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the host or an accelerator has too little memory."""
    text = str(error)
    return isinstance(error, MemoryError) or (
        "RESOURCE_EXHAUSTED" in text or "Out of memory" in text
    )


def available_bytes() -> int | None:
    """What a program on the CPU can still get; None on accelerators, or not known."""
    import jax

    if jax.default_backend() != "cpu":
        return None
    try:
        lines = (_PROC / "meminfo").read_text("ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        left = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        return None
    return min([left, *_left_in_control_groups()])


def _left_in_control_groups() -> Iterator[int]:
    """What each limit on the process leaves, of its own group or of one above it.

    In a container these are below what the machine has.
    """
    try:
        lines = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, names = _CGROUPS, _OF_VERSION_2
        elif "memory" in controllers.split(","):
            top, names = _CGROUPS / "memory", _OF_VERSION_1
        else:
            continue
        # The path may be the host's, where the container's own group is the top.
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(top):
                break
            try:
                limit, used = (int((folder / name).read_text()) for name in names)
                stat = dict(
                    entry.split()
                    for entry in (folder / "memory.stat").read_text().splitlines()
                )
            except (OSError, ValueError):  # "max", or no such group
                continue
            # Pages of files are counted as used, but make room for others. Version 1
            # has them without the groups below under the plain names.
            total = "total_" if "total_inactive_file" in stat else ""
            kinds = (f"{total}{kind}_file" for kind in ("active", "inactive"))
            spare = sum(int(stat.get(kind, "0")) for kind in kinds)
            yield max(0, limit - used + spare)
