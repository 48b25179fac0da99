"""Rows that a device rounded, beside those that the CPU makes: other bytes are counted there, not found to be wrong."""

from __future__ import annotations

import threading

from ..planning.rounding import Rounding

#: the output error of a row may be so much above ggml's, as a part: what a device and the CPU make of it differs
MARGIN = 1e-3


class OnDevice:
    """How these rows differ from the CPU's. Safe for threads."""

    def __init__(self, device: str) -> None:
        self.device = device
        """as the file names it"""
        self._lock = threading.Lock()
        self._rows = self._blocks = self._other_rows = self._other_blocks = 0
        self._error = self._cpus_error = 0.0

    def add(self, n_rows: int, blocks_each: int) -> None:
        """Rows that were compared."""
        with self._lock:
            self._rows += n_rows
            self._blocks += n_rows * blocks_each

    def add_others(self, n_rows: int, n_blocks: int, error: float, cpus_error: float) -> None:
        """Of these, some that are not the CPU's: how many blocks are not, their output error, and the CPU's rows'."""
        with self._lock:
            self._other_rows += n_rows
            self._other_blocks += n_blocks
            self._error += float(error)
            self._cpus_error += float(cpus_error)

    def notes(self) -> list[str]:
        """What is to be said of them."""
        if not self._rows:
            return []
        said = (
            f"of {self._rows:,} rows that were rounded on {self.device}, {self._other_rows:,} are not the CPU's bytes "
            f"({self._other_blocks:,} of {self._blocks:,} blocks)"
        )
        if self._other_rows and self._cpus_error > 0:
            said += f"; the output error of these is {self._error / self._cpus_error:.4f} x that of the CPU's rows"
        return [said]


def counted(rounding: Rounding | None) -> OnDevice | None:
    """Counts for rows of a file; None where no device rounded any."""
    return None if rounding is None or rounding.device is None else OnDevice(rounding.device.text)
