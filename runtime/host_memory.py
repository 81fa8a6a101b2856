"""What of the host this process may use: main memory, and processors.

A container's limits are those of its control group and of all groups around it, in version 1 or 2 of that interface,
mounted with a name space of its own or with the host's.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

__all__ = ["Memory", "memory", "processors"]

_MEMINFO = Path("/proc/meminfo")
_OWN_GROUPS = Path("/proc/self/cgroup")
_CGROUP = Path("/sys/fs/cgroup")
_NO_LIMIT: Final = 1 << 60
"""Version 1 writes a number near 2**63 where there is no limit."""


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
    second = ("memory.max", "memory.current", "inactive_file")
    first = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    for folder, names in _groups("memory", second, first):
        limit, used = _number(folder / names[0]), _number(folder / names[1])
        if limit is None or limit >= _NO_LIMIT:
            continue
        total = _least(total, limit)
        if used is not None:
            # What the kernel keeps of files counts as used, and is given up as soon as someone wants memory.
            available = _least(available, max(0, limit - used + _statistic(folder / "memory.stat", names[2])))
    return Memory(total, available)


def processors() -> int:
    """How many processors this process may keep busy: those it may run on, or fewer where it has a quota of time."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder, (quota, period) in _groups("cpu", ("cpu.max", ""), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        share = _quota(folder, quota, period)
        if share is not None:
            allowed = min(allowed, max(1, math.ceil(share)))
    return allowed


def _groups(
    controller: str, second: tuple[str, ...], first: tuple[str, ...]
) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """The folders of this process's control group and of those around it, each with the names of its files.

    A container sees its own group at the top of the mount, or, with the host's name space, somewhere below; what is
    named in `/proc` then may lie outside of the mount, and the top is the container's own.
    """
    try:
        lines = _OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in [*lines, "0::/"]:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            unified = _CGROUP / "unified"  # where both versions are mounted
            top, names = unified if unified.is_dir() else _CGROUP, second
        elif controller in controllers.split(","):
            mounts = [_CGROUP / name for name in (controllers, controller)]
            top, names = next((mount for mount in mounts if mount.is_dir()), _CGROUP), first
        else:
            continue
        parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
        for depth in range(len(parts), -1, -1):
            yield top.joinpath(*parts[:depth]), names


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # not there, or "max"
        return None


def _statistic(path: Path, name: str) -> int:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)


def _quota(folder: Path, quota: str, period: str) -> float | None:
    """Processors' worth of time; None without a limit."""
    if period:
        time, of = _number(folder / quota), _number(folder / period)
    else:
        try:
            given, _, rest = (folder / quota).read_text(encoding="ascii").partition(" ")
            time, of = int(given), int(rest)
        except (OSError, ValueError):
            return None
    return time / of if time is not None and of and time > 0 else None


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
