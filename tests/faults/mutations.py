"""Random damage to the bytes of a file, by a seed."""

from __future__ import annotations

import random
from collections.abc import Callable


def _flipped(data: bytearray, draw: random.Random) -> bytes:
    for _ in range(draw.choice((1, 1, 2, 8))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def _cut_off(data: bytearray, draw: random.Random) -> bytes:
    return bytes(data[: draw.randrange(len(data))])


def _inserted(data: bytearray, draw: random.Random) -> bytes:
    at = draw.randrange(len(data) + 1)
    new = draw.choice(
        (b"\0", b"[" * 2000, b"9" * 5000, b"\n", b'"', b"{", b"- ", b": ", b"\xff\xfe", b"null", b"1e999")
    )
    return bytes(data[:at]) + new + bytes(data[at:])


def _deleted(data: bytearray, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    return bytes(data[:at] + data[at + draw.choice((1, 1, 7, 100)) :])


def _repeated(data: bytearray, draw: random.Random) -> bytes:
    first, last = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    return bytes(data[:last] + data[first:])


def _lines_swapped(data: bytearray, draw: random.Random) -> bytes:
    lines = bytes(data).splitlines(keepends=True)
    one, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    lines[one], lines[other] = lines[other], lines[one]
    return b"".join(lines)


def _zeros(data: bytearray, draw: random.Random) -> bytes:
    """As a crash of the machine leaves a file whose pages were not written."""
    at = draw.randrange(len(data))
    return bytes(data[:at]) + bytes(min(len(data) - at, draw.choice((1, 512, 4096)))) + bytes(data[at + 4096 :])


KINDS: tuple[Callable[[bytearray, random.Random], bytes], ...] = (
    _flipped,
    _cut_off,
    _inserted,
    _deleted,
    _repeated,
    _lines_swapped,
    _zeros,
)


def mutated(data: bytes, seed: int) -> bytes:
    """``data`` with one to three kinds of damage. The same seed gives the same bytes."""
    draw = random.Random(seed)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        if data:
            data = draw.choice(KINDS)(bytearray(data), draw)
    return data
