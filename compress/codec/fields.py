"""Bytes of the codec's headers: variable-length integers, byte strings, checksummed sections."""

from __future__ import annotations

import struct
import zlib

from hwsim.errors import FormatError, Problem

__all__ = ["Reader", "Writer", "unzigzag", "zigzag"]

_MOST_VARINT_BYTES = 9
"""63 bits: what fits a signed 64-bit integer."""


def zigzag(value: int) -> int:
    """Signed to unsigned, small magnitudes first: 0, −1, 1, −2 … become 0, 1, 2, 3 …

    >>> [zigzag(value) for value in (0, -1, 1, -2)]
    [0, 1, 2, 3]
    """
    return 2 * value if value >= 0 else -2 * value - 1


def unzigzag(value: int) -> int:
    """The inverse of `zigzag`."""
    return value >> 1 if value % 2 == 0 else -(value >> 1) - 1


class Writer:
    """Appends fields to a byte string."""

    def __init__(self) -> None:
        self._parts = bytearray()

    def content(self) -> bytes:
        """What was written so far."""
        return bytes(self._parts)

    def raw(self, content: bytes) -> None:
        """Bytes as they are."""
        self._parts += content

    def varint(self, value: int) -> None:
        """An unsigned integer, seven bits a byte, least significant first; the top bit says that more follows."""
        while value > 0x7F:
            self._parts.append(value & 0x7F | 0x80)
            value >>= 7
        self._parts.append(value)

    def text(self, value: str) -> None:
        """A length and UTF-8."""
        content = value.encode()
        self.varint(len(content))
        self.raw(content)

    def float64(self, value: float) -> None:
        """IEEE 754 binary64, little-endian."""
        self.raw(struct.pack("<d", value))

    def checksum(self) -> None:
        """CRC-32 of everything before it, little-endian."""
        self.raw(struct.pack("<I", zlib.crc32(self._parts)))


class Reader:
    """Takes fields from a byte string and never reads past its end.

    Raises
    ------
    FormatError
        From every method: too few bytes, a value out of its limits, a checksum that does not match.
    """

    def __init__(self, content: bytes | memoryview, source: str) -> None:
        self.content, self.source, self.at = memoryview(content), source, 0

    def refuse(self, field: str, message: str) -> FormatError:
        """The error to raise."""
        return FormatError(self.source, Problem(field, message))

    def raw(self, count: int, field: str) -> memoryview:
        """So many bytes; nothing is copied."""
        if count > len(self.content) - self.at:
            left = len(self.content) - self.at
            raise self.refuse(field, f"{count} bytes announced, {left} are left: truncated or damaged")
        self.at += count
        return self.content[self.at - count : self.at]

    def varint(self, field: str, most: int, least: int = 0) -> int:
        """An unsigned integer within limits."""
        value = shift = 0
        for _ in range(_MOST_VARINT_BYTES):
            byte = self.raw(1, field)[0]
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        else:
            raise self.refuse(field, "a number of more than 63 bits: damaged")
        if not least <= value <= most:
            raise self.refuse(field, f"{value}, must lie in {least} to {most}")
        return value

    def text(self, field: str, most: int = 4096) -> str:
        """A UTF-8 string of at most so many bytes."""
        content = self.raw(self.varint(field, most), field)
        try:
            return str(content, "utf-8")
        except UnicodeDecodeError:
            raise self.refuse(field, "is not UTF-8: damaged") from None

    def float64(self, field: str) -> float:
        """A number; NaN and infinities come back as they are."""
        return float(struct.unpack("<d", self.raw(8, field))[0])

    def checksum(self, field: str) -> None:
        """Compare the CRC-32 that follows with everything before it."""
        found = zlib.crc32(self.content[: self.at])
        (stored,) = struct.unpack("<I", self.raw(4, field))
        if stored != found:
            raise self.refuse(field, f"checksum {stored:08x}, content gives {found:08x}: damaged")

    def end(self, field: str) -> None:
        """Nothing may follow."""
        if self.at != len(self.content):
            raise self.refuse(field, f"{len(self.content) - self.at} bytes too many")
