"""Main memory and processors, as the system and a container's limits tell them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import runtime.host_memory as module
from runtime.host_memory import memory, processors

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
    monkeypatch.setattr(module, "_OWN_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
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


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content + "\n")


def test_the_limits_of_all_groups_around_count(system: Path) -> None:
    """The host's name space: the group lies somewhere below, and the limit may be that of its parent."""
    (system / "cgroup").write_text("0::/kubepods/pod7/container\n")
    pod = system / "kubepods" / "pod7"
    write(pod, memory__max=str(4096 * MIB), memory__current=str(1024 * MIB), cpu__max="250000 100000")
    write(pod / "container", memory__max="max", memory__current=str(512 * MIB), cpu__max="max 100000")
    assert memory() == module.Memory(4096 * MIB, 3072 * MIB)
    assert processors() == 3, "two and a half are rounded up"
    write(
        pod / "container",
        memory__max=str(1024 * MIB),
        memory__current=str(512 * MIB),
        cpu__max="50000 100000",
    )
    assert memory() == module.Memory(1024 * MIB, 512 * MIB)
    assert processors() == 1, "half of one still is one"


def test_a_group_that_the_container_does_not_see_is_the_top_one(system: Path) -> None:
    """Its own mount, with a path of the host in /proc."""
    (system / "cgroup").write_text("0::/../../docker/abc\n")
    write(system, memory__max=str(2048 * MIB), memory__current=str(48 * MIB), cpu__max="400000 100000")
    assert memory() == module.Memory(2048 * MIB, 2000 * MIB)
    assert processors() == 4


@pytest.mark.parametrize("path", ["/docker/abc", "/"])
def test_the_first_version_counts_too(system: Path, path: str) -> None:
    (system / "cgroup").write_text(f"5:memory:{path}\n4:cpu,cpuacct:{path}\n1:name=systemd:/\n0::/\n")
    below = path.strip("/")
    unlimited = str((1 << 63) - 4096)
    write(system / "memory", memory__limit_in_bytes=unlimited, memory__usage_in_bytes="1")
    write(system / "cpu,cpuacct", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert memory() == module.Memory(8192 * MIB, 6144 * MIB)
    assert processors() == 16
    limits = {"memory__limit_in_bytes": str(1024 * MIB), "memory__usage_in_bytes": str(1000 * MIB)}
    write(system / "memory" / below, **limits, memory__stat=f"cache 5\ntotal_inactive_file {200 * MIB}")
    write(system / "cpu,cpuacct" / below, cpu__cfs_quota_us="200000", cpu__cfs_period_us="100000")
    assert memory() == module.Memory(1024 * MIB, 224 * MIB), (
        "what is kept of files is given up when it is wanted"
    )
    assert processors() == 2


def test_both_versions_at_once(system: Path) -> None:
    (system / "cgroup").write_text("3:memory:/a\n2:cpu:/a\n0::/a\n")
    write(system / "memory" / "a", memory__limit_in_bytes=str(1024 * MIB), memory__usage_in_bytes="0")
    write(system / "cpu" / "a", cpu__cfs_quota_us="300000", cpu__cfs_period_us="100000")
    write(system / "unified" / "a", cpu__max="max 100000")
    assert memory() == module.Memory(1024 * MIB, 1024 * MIB)
    assert processors() == 3


@pytest.mark.parametrize("content", ["", "garbage", "::::", "0::", "7:memory", "\xff"])
def test_what_cannot_be_read_is_no_limit(system: Path, content: str) -> None:
    (system / "cgroup").write_text(content, encoding="utf-8")
    write(system, memory__max="nonsense", memory__current="", cpu__max="1 0", memory__stat="inactive_file")
    assert memory() == module.Memory(8192 * MIB, 6144 * MIB)
    assert processors() == 16
