# SPDX-License-Identifier: Apache-2.0
"""semlic_jax: a perceptual image codec for JAX.

    import semlic_jax

    codec = semlic_jax.load("small")
    data = codec.compress(image, bpp=0.2)  # uint8 [H, W, 3] -> bytes
    image = codec.decompress(data)  # bytes -> uint8 [H, W, 3]

The names below are the whole public surface, with the command line and the file format.
Importing the package loads neither JAX nor anything else that is heavy: each name is
loaded when it is first used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from semlic_jax.codec import Codec, load
    from semlic_jax.coding.bitstream import (
        BITSTREAM_VERSION,
        BitstreamError,
        IncompatibleModelError,
    )
    from semlic_jax.weights import pretrained_models

__version__ = "0.1.0"

__all__ = [
    "BITSTREAM_VERSION",
    "BitstreamError",
    "Codec",
    "IncompatibleModelError",
    "__version__",
    "load",
    "pretrained_models",
]

_HOME = {
    "BITSTREAM_VERSION": "semlic_jax.coding.bitstream",
    "BitstreamError": "semlic_jax.coding.bitstream",
    "IncompatibleModelError": "semlic_jax.coding.bitstream",
    "Codec": "semlic_jax.codec",
    "load": "semlic_jax.codec",
    "pretrained_models": "semlic_jax.weights",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
