# SPDX-License-Identifier: Apache-2.0
"""The `.semlic` file, format version 1: this docstring is the format document.

Whole numbers of more than one byte are little-endian. A *varint* is a whole number in
groups of 7 bits, least significant group first, one byte each, the top bit set on all
but the last; at most 4 bytes, and no more than needed.

The container
=============

========  ============================================================================
bytes     content
========  ============================================================================
4         magic: 89 53 4C 43 (0x89 "SLC"; not text, so that no tool converts line ends)
1         format version: 1
4         model fingerprint: the first 4 bytes of the model's SHA-256
1 to 3    width in pixels, varint, 1 to 65535
1 to 3    height in pixels, varint, 1 to 65535
1         quality q, 0 to 255
1         flags: the sum of 1 if chunks follow, 2 if an index check follows and 4 if the
          payload is of the second coder; other values are not used
0 or 4    index check, if its flag is set
chunks    if their flag is set: their number as a varint, 1 to 16; then for each a tag
          of 4 ASCII letters or digits, its length in bytes as a varint (at most 2**24)
          and its content. Tags are unique and in rising order of their bytes.
rest      payload
4         CRC-32 (that of zlib and PNG) of all bytes before it
========  ============================================================================

For an image of 768 x 512 without chunks, this is 19 bytes besides the payload.

Chunks hold information about the image besides its pixels; a reader may ignore any of
them. `ICCP` is an ICC profile. There is no chunk for the orientation, which is applied
before coding.

The index check is for models whose entropy networks work in floats, which are those
converted from other projects. It is the first 4 bytes of the SHA-256 of the table
indexes of y, one byte each, by row, then column, then channel. Float results differ
between machines, so a reader that computes other indexes refuses the file, which
decodes only where it was made (`semlic_jax.coding.float_networks`).

A reader refuses a file with another magic or version, a wrong CRC, a number outside the
ranges above, or more pixels than it is willing to decode (`MAX_PIXELS` by default). Any
change to the meaning of a byte, in the container or in the payload, requires a new
version.

What the payload codes
======================

The model, named by its fingerprint, supplies the tables and the integer networks that
choose among them. The payload is one stream of symbols:

1. z, the hyper-latents: z_hat at the positions of the ceil(H / 64) x ceil(W / 64) grid,
   each channel with the z table of its number; one *push*.
2. y, the latents, on the ceil(H / 16) x ceil(W / 16) grid: `round(y - mean)`, one push
   for each pass of the coding order, first to last. A pass is a range of channels and
   one colour of the checkerboard: the channel groups in rising order, and in each group
   first the positions with even row + column, then the others. The table index and the
   mean of every symbol of a pass follow from what earlier pushes decoded
   (`semlic_jax.model.context`).

Positions outside these grids, which an implementation may add as padding, are not
coded. Within a push, the symbols are ordered by row, then column, then channel.

The tables
==========

Table t has the smallest symbol `offset` and positive counts c[0], ..., c[n], which sum
to 2**24. *Slot* i < n stands for the symbol offset + i; slot n is the escape. Slot i
starts at s[i] = c[0] + ... + c[i-1].

A push is decoded in this order:

1. The slots of all its symbols, grouped by table: the tables in rising order and,
   within a table, the symbols in the order of the push.
2. If some slots are the escape, then for each of these symbols, in the order of the
   push, its length L from 0 to 16, with the counts 2**23, 2**22, ..., 2**8, 2**8.
3. For each L that occurs, in rising order, and for each symbol of this length, in the
   order of the push: a number v below 2**(L+1), where all are equally likely (counts of
   2**(23-L)). Its top bit, of value 2**L, is the side; the rest is r, and
   k = 2**L - 1 + r. The symbol is offset + n + k if the side is 1, and offset - 1 - k
   if it is 0.

All symbols are within +-2**15; a reader refuses others.

The coder
=========

An asymmetric numeral system (ANS) with a 64-bit state and 32-bit words: the coder of
`constriction.stream.stack.AnsCoder`. The payload, with zero bytes appended up to a
multiple of 4 bytes, is a stack of words whose top is at the end. A payload never ends
in a zero byte: such bytes are the top bytes of the encoder's last state, and it drops
them.

Start: the state is 0. Pop up to two words, each as `state = state * 2**32 + word`.

To decode a slot of a table: let q = state mod 2**24 and i the slot with
s[i] <= q < s[i] + c[i]. Then `state = (state div 2**24) * c[i] + q - s[i]`. If the
state is now below 2**32 and there are words left, pop the next word and set
`state = state * 2**32 + word`.

End: after the last symbol the state is 49374 (C0DE) and no words are left; a reader
refuses any other payload. The encoder starts in this state and works backwards: before
it codes a slot, it moves the low word of the state to the stack if
state div 2**40 >= c[i], and then sets
`state = (state div c[i]) * 2**24 + s[i] + state mod c[i]`.

The second coder
================

With the flag 4, the payload is a stream of TensorFlow Compression's range coder
(`EntropyEncodeIndex`, one stream) with tables that sum to 2**16. For a table with the
counts c[0], ..., c[n], slot i gets 1 + floor(c[i] * (2**16 - n - 1) / 2**24), and the
first of the largest also gets the difference between the sum and 2**16. A model with a
table of 2**16 counts or more cannot be used with this coder.

A push consists of the slots of its symbols in their order; then the lengths L of those
that are the escape, with the counts 2**15, 2**14, ..., 1, 1; then for each L that
occurs, in rising order, and each symbol of this length, the L + 1 bits of v, top bit
first, each with the counts 2**15 and 2**15. The rest is as above.
"""

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
INDEX_CHECK_BYTES = 4
CODERS = ("ans", "tfc")
ICC_CHUNK = b"ICCP"

_FLAG_CHUNKS = 1
_FLAG_INDEX_CHECK = 2
_FLAG_TFC = 4
_FLAGS = _FLAG_CHUNKS | _FLAG_INDEX_CHECK | _FLAG_TFC
_CRC_BYTES = 4
_VARINT_BYTES = 4


class BitstreamError(ValueError):
    """The data is not a valid `.semlic` file: damaged, cut off, or of another kind."""


class IncompatibleModelError(ValueError):
    """The file was made with another model than the one asked to decode it."""


class IncompatibleMachineError(ValueError):
    """The file decodes only on the machine that made it, which this is not."""


@dataclasses.dataclass(frozen=True)
class Header:
    """The content of a file besides the payload.

    Attributes:
        width: pixels, 1 to 65535.
        height: pixels, 1 to 65535.
        quality: the gain q in steps of 1/255, 0 to 255.
        fingerprint: the model's fingerprint, at least 4 bytes; the first 4 are kept.
        chunks: content by tag of 4 ASCII letters or digits, e.g. b"ICCP"; at most 16
            of at most 2**24 bytes each.
        index_check: 4 bytes if the model's entropy networks work in floats, else none.
        coder: the coder of the payload, one of CODERS.

    Raises:
        ValueError: a field is out of range.
    """

    width: int
    height: int
    quality: int
    fingerprint: bytes
    chunks: Mapping[bytes, bytes] = dataclasses.field(
        default_factory=dict,
        hash=False,  # a dict has no hash
    )
    index_check: bytes = b""
    coder: str = "ans"

    def __post_init__(self) -> None:
        _check_range("width", self.width, 1, MAX_SIDE)
        _check_range("height", self.height, 1, MAX_SIDE)
        _check_range("quality", self.quality, 0, 255)
        if len(self.fingerprint) < FINGERPRINT_BYTES:
            raise ValueError(
                f"expected a fingerprint of at least {FINGERPRINT_BYTES} bytes, "
                f"found {len(self.fingerprint)}"
            )
        fingerprint = bytes(self.fingerprint[:FINGERPRINT_BYTES])
        object.__setattr__(self, "fingerprint", fingerprint)
        if len(self.index_check) not in (0, INDEX_CHECK_BYTES):
            raise ValueError(
                f"expected an index check of 0 or {INDEX_CHECK_BYTES} bytes, "
                f"found {len(self.index_check)}"
            )
        check_coder(self.coder)
        _check_range("the number of chunks", len(self.chunks), 0, MAX_CHUNKS)
        for tag, content in self.chunks.items():
            if not isinstance(tag, bytes) or len(tag) != 4 or not tag.isalnum():
                raise ValueError(
                    f"expected a chunk tag of 4 ASCII letters or digits, found {tag!r}"
                )
            size_name = f"the size in bytes of chunk {tag.decode('ascii')}"
            _check_range(size_name, len(content), 0, MAX_CHUNK_BYTES)

    @property
    def icc_profile(self) -> bytes | None:
        """The ICC profile in the chunks, if there is one."""
        return self.chunks.get(ICC_CHUNK)

    def require_model(self, fingerprint: bytes) -> None:
        """Check that the file was made with the model of this fingerprint.

        Args:
            fingerprint: that of the model at hand, at least 4 bytes.

        Raises:
            IncompatibleModelError: it was not; the message names both models.
        """
        found = fingerprint[:FINGERPRINT_BYTES]
        if found != self.fingerprint:
            raise IncompatibleModelError(
                f"expected the model {self.fingerprint.hex()} that made the file, "
                f"found the model {found.hex()}"
            )


def pack(header: Header, payload: bytes, *, max_pixels: int = MAX_PIXELS) -> bytes:
    """The bytes of a file. `unpack` is the inverse.

    Args:
        header: see `Header`.
        payload: the result of `SymbolEncoder.finish`.
        max_pixels: the most pixels that the image may have; readers must allow them.

    Raises:
        ValueError: the image is too large.
    """
    _check_pixels(header, max_pixels)
    out = bytearray(MAGIC)
    out.append(BITSTREAM_VERSION)
    out += header.fingerprint
    out += _varint(header.width)
    out += _varint(header.height)
    out.append(header.quality)
    flags = _FLAG_CHUNKS if header.chunks else 0
    flags |= _FLAG_INDEX_CHECK if header.index_check else 0
    out.append(flags | (_FLAG_TFC if header.coder == "tfc" else 0))
    out += header.index_check
    if header.chunks:
        out += _varint(len(header.chunks))
        for tag, content in sorted(header.chunks.items()):
            out += tag + _varint(len(content)) + content
    out += payload
    out += zlib.crc32(out).to_bytes(_CRC_BYTES, "little")
    return bytes(out)


def unpack(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[Header, bytes]:
    """Header and payload of a file.

    No memory is allocated on the strength of what the header claims. Whether the model
    fits is left to `Header.require_model`.

    Args:
        data: the bytes of the file.
        max_pixels: the most pixels that the image may have.

    Returns:
        the header and the payload.

    Raises:
        BitstreamError: the data is not a `.semlic` file, has another format version, is
            damaged, or has values out of the ranges of the format.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        # bytes(10**9) would be a gigabyte of zeros.
        raise BitstreamError(
            f"expected the bytes of a .semlic file, found {type(data).__name__}"
        )
    data = bytes(data)
    if not data.startswith(MAGIC):
        found = data[: len(MAGIC)].hex() or "no bytes"
        raise BitstreamError(
            f"expected a .semlic file, which starts with {MAGIC.hex()}, found {found}"
        )
    reader = _Reader(data, len(MAGIC))
    version = reader.byte()
    if version != BITSTREAM_VERSION:
        raise BitstreamError(
            f"expected .semlic format version {BITSTREAM_VERSION}, found {version}: "
            "the file needs another release of semlic_jax, or is damaged"
        )
    body, crc = data[:-_CRC_BYTES], int.from_bytes(data[-_CRC_BYTES:], "little")
    if zlib.crc32(body) != crc:
        raise BitstreamError(
            f"expected the checksum {zlib.crc32(body):08x}, found {crc:08x}: "
            "the file is damaged or cut off"
        )
    reader = _Reader(body, len(MAGIC) + 1)
    fingerprint = reader.take(FINGERPRINT_BYTES)
    width, height = reader.varint(), reader.varint()
    quality, flags = reader.byte(), reader.byte()
    if flags & ~_FLAGS:
        raise BitstreamError(f"expected flags from 0 to {_FLAGS}, found {flags}")
    index_check = reader.take(INDEX_CHECK_BYTES) if flags & _FLAG_INDEX_CHECK else b""
    chunks = reader.chunks() if flags & _FLAG_CHUNKS else {}
    coder = "tfc" if flags & _FLAG_TFC else "ans"
    try:
        header = Header(width, height, quality, fingerprint, chunks, index_check, coder)
        _check_pixels(header, max_pixels)
    except ValueError as error:
        raise BitstreamError(str(error)) from None
    return header, reader.rest()


def check_coder(coder: str) -> None:
    """Raise ValueError if this is not one of CODERS."""
    if coder not in CODERS:
        raise ValueError(
            f"expected one of the coders {', '.join(CODERS)}, found {coder!r}"
        )


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"expected {name} from {low} to {high}, found {value}")


def _check_pixels(header: Header, max_pixels: int) -> None:
    if header.width * header.height > max_pixels:
        raise ValueError(
            f"expected an image of at most {max_pixels} pixels, "
            f"found {header.width} x {header.height}"
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

    def __init__(self, data: bytes, position: int) -> None:
        self._data = data
        self._position = position

    def take(self, size: int) -> bytes:
        start, stop = self._position, self._position + size
        if stop > len(self._data):
            more = "1 more byte" if size == 1 else f"{size} more bytes"
            raise BitstreamError(
                f"expected {more} at position {start}, "
                f"found {len(self._data) - start}: the file is damaged or cut off"
            )
        self._position = stop
        return self._data[start:stop]

    def byte(self) -> int:
        return self.take(1)[0]

    def varint(self) -> int:
        value = 0
        for shift in range(0, 7 * _VARINT_BYTES, 7):
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                if byte == 0 and shift > 0:
                    raise BitstreamError(
                        "expected a number in as few bytes as possible, found more"
                    )
                return value
        raise BitstreamError(
            f"expected a number of at most {_VARINT_BYTES} bytes, found a longer one"
        )

    def chunks(self) -> dict[bytes, bytes]:
        count = self.varint()
        # This also bounds the loop. Header checks the other limits.
        if not 1 <= count <= MAX_CHUNKS:
            raise BitstreamError(f"expected 1 to {MAX_CHUNKS} chunks, found {count}")
        chunks: dict[bytes, bytes] = {}
        last = b""
        for _ in range(count):
            tag = self.take(4)
            if tag <= last:
                raise BitstreamError(
                    f"expected chunk tags in ascending order, found {tag!r} after "
                    f"{last!r}"
                )
            chunks[tag] = self.take(self.varint())
            last = tag
        return chunks

    def rest(self) -> bytes:
        return self._data[self._position :]
