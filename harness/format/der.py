"""DER (ITU-T X.690), strictly read: as much of it as a timestamp takes.

- a tag of one byte, a definite length in its shortest form; whatever else BER allows is refused
- an element ends where its length says, a list of elements exactly where the last one does

Example::

    >>> children(parse(bytes.fromhex("3006020103020104"), where="here"), where="here")[1].content
    b'\\x04'
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from harness.errors import VerificationFailed

BOOLEAN, INTEGER, OCTETS, NULL, OBJECT, TIME = 0x01, 0x02, 0x04, 0x05, 0x06, 0x18
SEQUENCE, SET = 0x30, 0x31
"""Tags; TIME is GeneralizedTime."""
_LONGEST = 64
"""Bytes of a number or an object identifier, at most: longer ones are of no use, and slow to read."""


def context(number: int) -> int:
    """The tag of a constructed element that its context names ``[number]``."""
    return 0xA0 + number


class Element(NamedTuple):
    """One element, its contents not read yet."""

    tag: int
    content: bytes
    whole: bytes
    """Tag and length too."""


def parse(data: bytes, *, where: str) -> Element:
    """The one element that ``data`` is. Raises `VerificationFailed` for anything else."""
    found, end = _element(data, 0, where)
    if end != len(data):
        raise VerificationFailed("has bytes after its end", where=where)
    return found


def children(element: Element, *, where: str, tag: int = SEQUENCE) -> list[Element]:
    """What is in ``element``, which has ``tag``. Raises `VerificationFailed` when it has another."""
    data, offset, found = contents(element, tag, where=where), 0, []
    while offset < len(data):
        child, offset = _element(data, offset, where)
        found.append(child)
    return found


def contents(element: Element, tag: int, *, where: str) -> bytes:
    """The bytes in ``element``, which has ``tag``. Raises `VerificationFailed` when it has another."""
    if element.tag != tag:
        raise VerificationFailed(
            f"has an element of tag {element.tag:#04x} instead of {tag:#04x}", where=where
        )
    return element.content


def integer(element: Element, *, where: str) -> int:
    """A whole number. Raises `VerificationFailed` for a long one, or one not in its shortest form."""
    data = contents(element, INTEGER, where=where)
    if len(data) > _LONGEST:
        raise VerificationFailed(f"has a number of more than {_LONGEST} bytes", where=where)
    if not data or (len(data) > 1 and data[0] in (0x00, 0xFF) and (data[0] ^ data[1]) < 0x80):
        raise VerificationFailed("has a number that is not in its shortest form", where=where)
    return int.from_bytes(data, "big", signed=True)


def oid(element: Element, *, where: str) -> str:
    """An object identifier, as ``1.2.840.113549``. Raises `VerificationFailed` for a broken one."""
    data = contents(element, OBJECT, where=where)
    name = _oid(data) if len(data) <= _LONGEST else None
    if name is None:
        raise VerificationFailed("has a broken object identifier", where=where)
    return name


@lru_cache(maxsize=256)  # a few dozen, over and over
def _oid(data: bytes) -> str | None:
    arcs, value, fresh = [], 0, True
    for byte in data:
        if fresh and byte == 0x80:
            return None
        value, fresh = value << 7 | byte & 0x7F, not byte & 0x80
        if fresh:
            arcs.append(value)
            value = 0
    if not arcs or not fresh:
        return None
    top = min(arcs[0] // 40, 2)
    return ".".join(map(str, (top, arcs[0] - 40 * top, *arcs[1:])))


def encode(tag: int, *parts: bytes) -> bytes:
    """An element of ``tag`` around ``parts``."""
    content = b"".join(parts)
    if len(content) < 0x80:
        return bytes([tag, len(content)]) + content
    length = len(content).to_bytes((len(content).bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + content


def encode_integer(value: int) -> bytes:
    """A whole number, not negative."""
    return encode(INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def encode_oid(text: str) -> bytes:
    """An object identifier that is written ``1.2.840.113549``."""
    first, second, *rest = map(int, text.split("."))
    data = bytearray()
    for arc in (40 * first + second, *rest):
        digits = [arc & 0x7F]
        while arc := arc >> 7:
            digits.append(0x80 | arc & 0x7F)
        data += bytes(reversed(digits))
    return encode(OBJECT, bytes(data))


def _element(data: bytes, offset: int, where: str) -> tuple[Element, int]:
    start = offset
    header = data[offset : offset + 2]
    if len(header) < 2 or header[0] & 0x1F == 0x1F:
        raise VerificationFailed("has an element that is cut off, or a tag of several bytes", where=where)
    size, offset = header[1], offset + 2
    if size >= 0x80:
        count = size & 0x7F
        digits, offset = data[offset : offset + count], offset + count
        size = int.from_bytes(digits, "big")
        if not 1 <= count <= 4 or len(digits) != count or digits[0] == 0 or size < 0x80:
            raise VerificationFailed("has a length that is not in its shortest form", where=where)
    end = offset + size
    if end > len(data):
        raise VerificationFailed("has an element that is cut off", where=where)
    return Element(header[0], data[offset:end], data[start:end]), end


def pair(field: Element, *, where: str) -> tuple[Element, Element]:
    """The elements of a sequence of two. Raises `VerificationFailed` for more or fewer."""
    parts = children(field, where=where)
    if len(parts) != 2:
        raise VerificationFailed(f"has {len(parts)} elements in place of two", where=where)
    return parts[0], parts[1]


def first(field: Element, *, where: str) -> Element:
    """The first element of a sequence. Raises `VerificationFailed` when there is none."""
    parts = children(field, where=where)
    if not parts:
        raise VerificationFailed("has an empty list", where=where)
    return parts[0]


def inside(field: Element, number: int, *, where: str) -> Element:
    """The one element in ``[number]``. Raises `VerificationFailed` for another tag."""
    return parse(contents(field, context(number), where=where), where=where)
