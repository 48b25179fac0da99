"""A reader of journals that is not quantkit's, so that a defect of quantkit's is seen.

The format is in quantkit/base/journal.py; here is only what a fault's checks want of it.
"""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from quantkit.building.folder import folder_of

_RECORD = struct.Struct("<IQQ16sI")


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
    found = records_of(folder_of(out) / "journal")
    if found is None:
        return None
    tensors = [(name, row_bytes) for name, _, row_bytes, _ in found[0]["tensors"]]
    return Claim(tensors, found[1])


def records_of(journal: Path) -> tuple[dict[str, Any], list[tuple[int, int, int]]] | None:
    """What the first line of a journal says, and its records: part, first unit, units."""
    try:
        line, newline, rest = journal.read_bytes().partition(b"\n")
    except OSError:
        return None
    text, _, crc = line.rpartition(b" ")
    if not newline or crc != b"%08x" % zlib.crc32(text):
        return None
    records = []
    for at in range(0, len(rest) - _RECORD.size + 1, _RECORD.size):
        part, start, n, _, crc = _RECORD.unpack_from(rest, at)
        if zlib.crc32(rest[at : at + _RECORD.size - 4]) != crc:
            break
        records.append((part, start, n))
    return json.loads(text), records
