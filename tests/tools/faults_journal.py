"""A reader of an unfinished build's journal that is not quantkit's, so that a defect of quantkit's is seen.

The format is in quantkit/building/journal.py; here is only what a fault's checks want of it.
"""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

from quantkit.building.folder import folder_of

_RECORD = struct.Struct("<III16sI")


class Claim(NamedTuple):
    """What a journal says is on the disk: tensors by name with their bytes a row, and rows of them."""

    tensors: list[tuple[str, int]]
    records: list[tuple[int, int, int]]
    """tensor, first row, rows"""

    def rows(self) -> dict[str, set[int]]:
        """The rows of each tensor."""
        out: dict[str, set[int]] = {name: set() for name, _ in self.tensors}
        for tensor, row, n in self.records:
            out[self.tensors[tensor][0]].update(range(row, row + n))
        return out


def claim_of(out: Path) -> Claim | None:
    """The journal of the unfinished build of `out`, up to the first record that is not sound. None where there is no
    journal, or its first line is not sound."""
    try:
        line, newline, rest = (folder_of(out) / "journal").read_bytes().partition(b"\n")
    except OSError:
        return None
    text, _, crc = line.rpartition(b" ")
    if not newline or crc != b"%08x" % zlib.crc32(text):
        return None
    tensors = [(name, row_bytes) for name, _, row_bytes, _ in json.loads(text)["tensors"]]
    records = []
    for at in range(0, len(rest) - _RECORD.size + 1, _RECORD.size):
        tensor, row, n_rows, _, crc = _RECORD.unpack_from(rest, at)
        if zlib.crc32(rest[at : at + _RECORD.size - 4]) != crc:
            break
        records.append((tensor, row, n_rows))
    return Claim(tensors, records)
