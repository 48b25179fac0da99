"""How much memory this machine has, according to Linux."""

from __future__ import annotations

from pathlib import Path


def memory_sizes() -> dict[str, int | None]:
    """Return the bytes of memory, in total and available without swapping; None if Linux does not tell."""
    sizes: dict[str, int] = {}
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            sizes[name] = int(value.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return {"total_nbytes": sizes.get("MemTotal"), "available_nbytes": sizes.get("MemAvailable")}
