# SPDX-License-Identifier: Apache-2.0
"""Which packaged model a file was made with.

A file names its model by a fingerprint alone, so the command line and the Pillow plugin
find the model here, in the cards that lie beside the packaged models. Light: reading a
file's header and finding the name of its model loads no JAX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from semlic_jax.coding.bitstream import (
    FINGERPRINT_BYTES,
    IncompatibleModelError,
    unpack,
)
from semlic_jax.weights import packaged_file, pretrained_models

if TYPE_CHECKING:
    from semlic_jax.codec import Codec


def name_of_model(fingerprint: bytes) -> str | None:
    """The packaged model with this fingerprint (its first bytes), or None."""
    for name, start in _fingerprints().items():
        if fingerprint[:FINGERPRINT_BYTES] == start:
            return name
    return None


def load_for(data: bytes) -> Codec:
    """Loads the packaged model that a file was made with.

    Raises:
      BitstreamError: the data is damaged or not a `.semlic` file.
      IncompatibleModelError: the model is not packaged; names what is.
    """
    header, _ = unpack(data)
    name = name_of_model(header.fingerprint)
    if name is None:
        ours = ", ".join(
            f"{name} {start.hex()}" for name, start in _fingerprints().items()
        )
        raise IncompatibleModelError(
            f"the file needs the model {header.fingerprint.hex()}, which is not "
            f"packaged (packaged: {ours or 'none'}): give its model file (--model, or "
            "`pillow_plugin.register_model`)"
        )
    from semlic_jax.codec import load

    return load(packaged_file(name))


def _fingerprints() -> dict[str, bytes]:
    return {
        name: bytes.fromhex(card["fingerprint"])[:FINGERPRINT_BYTES]
        for name, card in pretrained_models().items()
    }
