"""Main memory, as the system and a container's limits tell it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import runtime.host_memory as module
from runtime.host_memory import memory

MIB = 1 << 20


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 8 GiB of which 6 GiB are free; tests add a container's limits."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(
        "MemTotal:        8388608 kB\nMemFree: 1 kB\nMemAvailable:    6291456 kB\nHugePages_Total: 0\n"
    )
    monkeypatch.setattr(module, "_MEMINFO", meminfo)
    monkeypatch.setattr(module, "_CGROUP", tmp_path)
    return tmp_path


def limit(folder: Path, most: str, used: int) -> None:
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text(f"{used}\n")


def test_this_machine_tells() -> None:
    found = memory()
    assert found.total is None or found.total > MIB
    assert found.available is None or found.total is None or MIB < found.available <= found.total


def test_without_a_container_it_is_the_machines(system: Path) -> None:
    assert memory() == module.Memory(8192 * MIB, 6144 * MIB)
    limit(system, "max", 100 * MIB)
    assert memory() == module.Memory(8192 * MIB, 6144 * MIB)


def test_a_container_may_use_what_is_left_of_its_limit(system: Path) -> None:
    limit(system, str(2048 * MIB), 1500 * MIB)
    assert memory() == module.Memory(2048 * MIB, 548 * MIB)
    limit(system, str(2048 * MIB), 3000 * MIB)  # already over it
    assert memory() == module.Memory(2048 * MIB, 0)
    limit(system, str(32768 * MIB), 4096 * MIB)  # a limit beyond the machine's own
    assert memory() == module.Memory(8192 * MIB, 6144 * MIB)


def test_a_system_without_meminfo_is_asked_through_psutil(system: Path) -> None:
    psutil = pytest.importorskip("psutil")
    (system / "meminfo").unlink()
    found = memory()
    assert found.total == psutil.virtual_memory().total
    assert found.available is not None and MIB < found.available <= found.total


def test_without_psutil_it_tells_its_size_only(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (system / "meminfo").unlink()
    monkeypatch.setitem(sys.modules, "psutil", None)
    found = memory()
    assert found.available is None and found.total is not None and found.total > MIB
