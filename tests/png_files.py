# SPDX-License-Identifier: Apache-2.0
"""PNG files that Pillow does not write."""

import struct
import zlib


def png(
    width: int,
    height: int,
    bits: int,
    colour: int,
    rows: bytes,
    key: bytes = b"",
    **chunks: bytes,
) -> bytes:
    """A PNG file of kinds that Pillow reads but does not write.

    `key` is that of tRNS, `chunks` are others, by their tags.
    """

    def chunk(tag: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(tag + body))
        return struct.pack(">I", len(body)) + tag + body + check

    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + b"".join(chunk(tag.encode(), body) for tag, body in chunks.items())
        + (chunk(b"tRNS", key) if key else b"")
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
