"""What memory this machine has, as Linux says it."""

from __future__ import annotations

from pathlib import Path


def memory_sizes() -> dict[str, int | None]:
    """Bytes of memory: all, and what can be had without swapping; None where Linux does not say."""
    sizes: dict[str, int] = {}
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            sizes[name] = int(value.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return {"total_nbytes": sizes.get("MemTotal"), "available_nbytes": sizes.get("MemAvailable")}
