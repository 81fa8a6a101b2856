"""Main memory: what there is, and what may be used."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Memory", "memory"]

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Memory:
    """Main memory in bytes, total and available to a new process; None where the system does not tell."""

    total: int | None
    available: int | None


def memory() -> Memory:
    """The machine's main memory, or the part of it that this process's container may use."""
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return _elsewhere()
    fields = {
        key: int(rest.split()[0]) * 1024 for key, _, rest in (line.partition(":") for line in lines) if rest
    }
    total, available = fields.get("MemTotal"), fields.get("MemAvailable")
    try:
        limit = int((_CGROUP / "memory.max").read_text(encoding="ascii"))
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):  # none of a second version, or "max"
        return Memory(total, available)
    return Memory(_least(total, limit), _least(available, max(0, limit - used)))


def _elsewhere() -> Memory:
    """Where there is no /proc: what psutil says, if it is installed."""
    try:
        import psutil
    except ModuleNotFoundError:
        size = None
        if sys.platform != "win32":
            size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return Memory(size, None)
    found = psutil.virtual_memory()
    return Memory(int(found.total), int(found.available))


def _least(known: int | None, limit: int) -> int:
    return limit if known is None else min(known, limit)
