# SPDX-License-Identifier: Apache-2.0
"""The container of `.semlic` files, version 1."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping

MAGIC = b"\x89SLC"
BITSTREAM_VERSION = 1
FINGERPRINT_BYTES = 4
MAX_SIDE = 65535
MAX_PIXELS = 2**28
MAX_CHUNKS = 16
MAX_CHUNK_BYTES = 2**24

_FLAG_CHUNKS = 1
_CRC_BYTES = 4


class BitstreamError(ValueError):
    """The data is not a valid `.semlic` file: damaged, cut off, or something else."""


class IncompatibleModelError(ValueError):
    """The file was made with another model than the one asked to decode it."""


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says about itself besides the payload.

    Attributes:
      width: pixels, 1..65535.
      height: pixels, 1..65535.
      quality: the gain q as a byte, 0..255 (q = quality / 255).
      fingerprint: of the model, at least 4 bytes; only the first 4 are kept.
      chunks: side data by 4-character tag, e.g. `{b"ICCP": profile}`.

    Raises:
      ValueError: a field is out of range.
    """

    width: int
    height: int
    quality: int
    fingerprint: bytes
    chunks: Mapping[bytes, bytes] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("width", "height"):
            if not 1 <= getattr(self, name) <= MAX_SIDE:
                raise ValueError(
                    f"expected {name} in 1..{MAX_SIDE}, found {getattr(self, name)}"
                )
        if not 0 <= self.quality <= 255:
            raise ValueError(f"expected quality in 0..255, found {self.quality}")
        if len(self.fingerprint) < FINGERPRINT_BYTES:
            raise ValueError(
                f"expected a fingerprint of at least {FINGERPRINT_BYTES} bytes, "
                f"found {len(self.fingerprint)}"
            )
        fingerprint = bytes(self.fingerprint[:FINGERPRINT_BYTES])
        object.__setattr__(self, "fingerprint", fingerprint)
        if len(self.chunks) > MAX_CHUNKS:
            raise ValueError(
                f"expected at most {MAX_CHUNKS} chunks, found {len(self.chunks)}"
            )
        for tag, content in self.chunks.items():
            if len(tag) != 4 or not tag.isalnum():
                raise ValueError(
                    f"expected a chunk tag of 4 letters or digits, found {tag!r}"
                )
            if len(content) > MAX_CHUNK_BYTES:
                raise ValueError(
                    f"expected at most {MAX_CHUNK_BYTES} bytes in chunk "
                    f"{tag.decode()}, found {len(content)}"
                )

    def require_model(self, fingerprint: bytes) -> None:
        """Raises IncompatibleModelError unless `fingerprint` is the file's model."""
        if fingerprint[:FINGERPRINT_BYTES] != self.fingerprint:
            raise IncompatibleModelError(
                f"the file needs the model {self.fingerprint.hex()}, this one is "
                f"{fingerprint[:FINGERPRINT_BYTES].hex()}"
            )


def pack(header: Header, payload: bytes, *, max_pixels: int = MAX_PIXELS) -> bytes:
    """The bytes of a file."""
    _check_pixels(header.width, header.height, max_pixels)
    out = bytearray(MAGIC)
    out.append(BITSTREAM_VERSION)
    out += header.fingerprint
    out += _varint(header.width)
    out += _varint(header.height)
    out.append(header.quality)
    out.append(_FLAG_CHUNKS if header.chunks else 0)
    if header.chunks:
        out += _varint(len(header.chunks))
        for tag, content in sorted(header.chunks.items()):
            out += tag + _varint(len(content)) + content
    out += payload
    out += zlib.crc32(out).to_bytes(_CRC_BYTES, "little")
    return bytes(out)


def unpack(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[Header, bytes]:
    """Header and payload of a file; everything is checked before it is used."""
    data = bytes(data)
    if not data.startswith(MAGIC):
        raise BitstreamError(
            f"expected a .semlic file (first bytes {MAGIC.hex()}), "
            f"found {data[: len(MAGIC)].hex() or 'nothing'}"
        )
    reader = _Reader(data)
    reader.take(len(MAGIC))
    version = reader.byte()
    if version != BITSTREAM_VERSION:
        raise BitstreamError(
            f"expected format version {BITSTREAM_VERSION}, found {version}: "
            "the file needs another release of this program, or is damaged"
        )
    body, crc = data[:-_CRC_BYTES], int.from_bytes(data[-_CRC_BYTES:], "little")
    if len(body) <= len(MAGIC) or zlib.crc32(body) != crc:
        raise BitstreamError(
            f"expected checksum {zlib.crc32(body):08x}, found {crc:08x}: "
            "the file is damaged or cut off"
        )
    reader = _Reader(body, len(MAGIC) + 1)
    fingerprint = reader.take(FINGERPRINT_BYTES)
    width, height = reader.varint(), reader.varint()
    quality, flags = reader.byte(), reader.byte()
    if flags & ~_FLAG_CHUNKS:
        raise BitstreamError(f"expected flags 0 or 1, found {flags}")
    chunks = reader.chunks() if flags & _FLAG_CHUNKS else {}
    try:
        header = Header(width, height, quality, fingerprint, chunks)
        _check_pixels(width, height, max_pixels)
    except ValueError as error:
        raise BitstreamError(f"bad header: {error}") from None
    return header, reader.rest()


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ValueError(
            f"expected at most {max_pixels} pixels, found {width} x {height}"
        )


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


class _Reader:
    """A cursor over bytes that refuses to run past the end."""

    def __init__(self, data: bytes, position: int = 0) -> None:
        self._data = data
        self._position = position

    def take(self, size: int) -> bytes:
        start, stop = self._position, self._position + size
        if stop > len(self._data):
            raise BitstreamError(
                f"expected {size} bytes at position {start}, "
                f"found {len(self._data) - start}: the file is cut off"
            )
        self._position = stop
        return self._data[start:stop]

    def byte(self) -> int:
        return self.take(1)[0]

    def varint(self) -> int:
        value = 0
        for shift in range(0, 28, 7):
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                if byte == 0 and shift:
                    break
                return value
        raise BitstreamError("expected a number of at most 4 bytes, none padded")

    def chunks(self) -> dict[bytes, bytes]:
        count = self.varint()
        if not 1 <= count <= MAX_CHUNKS:
            raise BitstreamError(f"expected 1..{MAX_CHUNKS} chunks, found {count}")
        chunks: dict[bytes, bytes] = {}
        for _ in range(count):
            tag = self.take(4)
            if chunks and tag <= max(chunks):
                raise BitstreamError("expected chunks in rising order of their tags")
            chunks[tag] = self.take(self.varint())
        return chunks

    def rest(self) -> bytes:
        return self._data[self._position :]
