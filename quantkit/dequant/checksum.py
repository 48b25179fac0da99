"""The CRC-32 of a file whose pieces are written in any order, by several threads."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

#: CRC-32's polynomial P; like all here with the coefficient of x^0 in the highest of 32 bits
_P = 0xEDB88320
_ONE, _X8 = 1 << 31, 1 << 23


def joined(pieces: Mapping[int, tuple[int, int]]) -> int:
    """The CRC-32 of what these pieces are together: offset -> (CRC-32, bytes), without a gap.

    That of A then B is A's times x^(8 * bytes of B), mod P, plus B's: the register after A has gone through as many
    zeros, and a CRC is linear.
    """
    crc = 0
    for _, (own, nbytes) in sorted(pieces.items()):
        crc = _product(crc, _power(nbytes)) ^ own
    return crc


@lru_cache(maxsize=4096)
def _power(nbytes: int) -> int:
    """x^(8 * nbytes) mod P."""
    out, square = _ONE, _X8
    while nbytes:
        if nbytes & 1:
            out = _product(out, square)
        square = _product(square, square)
        nbytes >>= 1
    return out


def _product(a: int, b: int) -> int:
    """a * b mod P, as polynomials over GF(2)."""
    out = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            out ^= b
        b = b >> 1 ^ (_P if b & 1 else 0)
    return out
