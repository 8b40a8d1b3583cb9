# SPDX-License-Identifier: Apache-2.0
"""Values of command-line options, of all programs: what argparse takes as `type`.

Imports nothing of this package.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

_Value = TypeVar("_Value")


def _checked(
    text: str,
    read: Callable[[str], _Value],
    wanted: str,
    fits: Callable[[_Value], bool] = lambda value: True,
) -> _Value:
    """A value that fits; argparse's own complaint does not say what would."""
    try:
        value = read(text)
        if fits(value):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected {wanted}, found {text!r}")


def any_float(text: str) -> float:
    return _checked(text, float, "a number")


def any_int(text: str) -> int:
    return _checked(text, int, "a whole number")


def unit_float(text: str) -> float:
    return _checked(text, float, "a number from 0 to 1", lambda x: 0 <= x <= 1)


def positive_float(text: str) -> float:
    return _checked(text, float, "a number above 0", lambda x: 0 < x < float("inf"))


def positive_int(text: str) -> int:
    return _checked(text, int, "a whole number of at least 1", lambda x: x >= 1)


def seed_int(text: str) -> int:
    wanted = "a whole number from 0 to 4294967295"
    return _checked(text, int, wanted, lambda x: 0 <= x < 2**32)


def preset_or_steps(text: str) -> str | int:
    """How to refine: the name of a preset, or a number of steps."""
    if text.isalpha():
        return text
    return _checked(text, int, "a preset or a number of steps")


def numbers(text: str) -> list[float]:
    def read(text: str) -> list[float]:
        return [float(number) for number in text.split(",")]

    return _checked(text, read, "numbers with commas between them")


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def some_names(text: str) -> list[str]:
    """At least one: an empty variable of a shell is a mistake."""
    return _checked(text, names, "names with commas between them", bool)


def rates(text: str) -> list[float]:
    return [positive_float(rate) for rate in names(text)]
