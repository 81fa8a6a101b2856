"""What the tools find out about a machine."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from export.machine import Gpu, GpuReport, find_gpus, importable, installed_version
from export.report.doctor import BackendStatus, Library, Report, _library, _load, doctor_tables, old_drivers
from export.request.capability import BACKENDS
from runtime.host_memory import Memory, memory

ROOT = Path(__file__).resolve().parents[3]

DRIVER = """
#include <stddef.h>
#include <string.h>
int cuInit(unsigned flags) { return INIT; }
int cuDriverGetVersion(int *version) { *version = VERSION; return 0; }
int cuDeviceGetCount(int *count) { *count = COUNT; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char *name, int length, int device) { strncpy(name, "Test GPU", length); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t)48 << 30; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 12 : attribute == 76 ? device : -1;
    return 0;
}
"""


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What `doctor --json` prints here."""
    command = [sys.executable, "-m", "export", "doctor", "--json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found: dict[str, Any] = json.loads(result.stdout)
    assert result.returncode == (1 if found["problems"] else 0)
    return found


def driver(folder: Path, *, init: int = 0, count: int = 2, version: int = 13020) -> str:
    """A library with the driver's interface, compiled for this test."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, library = folder / "driver.c", folder / "libdriver.so"
    source.write_text(DRIVER)
    command = [compiler, "-shared", "-fPIC", f"-DINIT={init}", f"-DCOUNT={count}"]
    command += [f"-DVERSION={version}", "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    return str(library)


def test_gpus_are_read_from_the_driver(tmp_path: Path) -> None:
    found = find_gpus(driver(tmp_path))
    assert found.gpus == (Gpu("Test GPU", "12.0", 48 << 30), Gpu("Test GPU", "12.1", 48 << 30))
    assert (found.cuda_version, found.problem) == ("13.2", None)


def test_driver_without_devices_and_driver_that_fails(tmp_path: Path) -> None:
    (tmp_path / "failing").mkdir()
    assert "shows no device" in (find_gpus(driver(tmp_path, count=0)).problem or "")
    assert "CUDA error 999" in (find_gpus(driver(tmp_path / "failing", init=999)).problem or "")


def test_no_driver() -> None:
    found = find_gpus("libno_such_driver.so.1")
    assert found.gpus == ()
    assert found.problem == "no NVIDIA driver (libno_such_driver.so.1 is not there)"


def test_memory_is_plausible() -> None:
    found = memory()
    assert found.total is not None
    assert found.total > 1 << 28
    assert found.available is None or 0 < found.available <= found.total


def test_versions_and_modules() -> None:
    assert installed_version("numpy") == metadata.version("numpy")
    assert installed_version("no-such-package") is None
    assert importable("numpy.linalg")
    assert not importable("no_such_package")
    assert not importable("no_such_package.part")


def test_report_covers_machine_and_libraries(report: dict[str, Any]) -> None:
    assert sys.version.split()[0] in report["python"]
    libraries = {library["name"]: library for library in report["libraries"]}
    for name in ("numpy", "torch", "onnx", "onnxruntime"):
        found = libraries[name]
        assert (found["installed"], found["problem"]) == (metadata.version(name), None)
    assert libraries["torch"]["loaded"] == torch.__version__
    assert report["disk_free"] > 0


@pytest.mark.parametrize(
    ("installed", "loaded", "is_another"),
    [
        ("2.11.0", "2.11.0+cu130", False),  # as the wheel on PyPI has it
        ("2.13.0+cpu", "2.13.0+cpu", False),
        ("2.11.0+cu130", "2.11.0+cpu", True),
        ("2.11.0", "2.13.0", True),
    ],
)
def test_another_copy_is_told_from_a_build(installed: str, loaded: str, is_another: bool) -> None:
    assert (_library("torch", installed, loaded, None).problem is not None) == is_another


def test_report_says_what_can_be_built_and_why_not(report: dict[str, Any]) -> None:
    statuses = {status["name"]: status for status in report["backends"]}
    assert set(statuses) == {"onnxruntime", "tensorrt-rtx", "tensorrt", "inductor"}
    assert statuses["onnxruntime"] == {"name": "onnxruntime", "build": None, "run": None}
    gpu = find_gpus()
    for name, device in (("tensorrt-rtx", False), ("tensorrt", True), ("inductor", True)):
        missing = [module for module in BACKENDS[name].build_modules if not importable(module)]
        said = statuses[name]["build"] or ""
        assert all(module in said for module in missing)
        assert ((gpu.problem or "-") in said) == (device and gpu.problem is not None)


def test_modules_that_fail_or_crash_do_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sound_one.py").write_text("__version__ = '1.2'")
    (tmp_path / "broken_one.py").write_text("raise RuntimeError('no luck')")
    (tmp_path / "crashing_one.py").write_text("import os; os.abort()")
    (tmp_path / "loud_one.py").write_text("print('hello')\n__version__ = '3'")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = _load(["broken_one", "crashing_one", "loud_one", "sound_one"])
    assert found == {
        "broken_one": (None, "RuntimeError: no luck"),
        "crashing_one": (None, "crashes when imported"),
        "loud_one": ("3", None),
        "sound_one": ("1.2", None),
    }


@pytest.mark.parametrize(("version", "told"), [(12040, 2), (12080, 0), (13000, 0)])
def test_a_driver_older_than_the_kernels_is_a_problem(tmp_path: Path, version: int, told: int) -> None:
    problems = old_drivers(find_gpus(driver(tmp_path, version=version)))
    assert len(problems) == told
    assert all(
        "supports CUDA 12.4, and its attention kernels need a driver of branch 570" in p for p in problems
    )


def test_tables_show_every_finding() -> None:
    report = Report(
        python="CPython 3.11.7",
        system="Linux x86_64",
        libraries=(Library("some-lib", "1.0", "0.9", "1.0 is installed but 0.9 loads"),),
        gpus=GpuReport((Gpu("NVIDIA H200", "9.0", 80 << 30),), "13.0"),
        backends=(BackendStatus("onnxruntime", None, "onnxruntime not installed"),),
        memory=Memory(24 << 30, None),
        disk_folder="/data",
        disk_free=3 << 29,
        problems=("[red]: two runtimes",),
    )
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(*doctor_tables(report))
    text = console.export_text()
    for finding in ("0.9 loads", "NVIDIA H200", "9.0", "80.00 GiB", "up to 13.0", "[red]: two runtimes"):
        assert finding in text
    assert "attention kernels need a driver of branch 525" in text
    for finding in ("unknown available of 24.00 GiB", "1.50 GiB free at /data", "onnxruntime not installed"):
        assert finding in text
