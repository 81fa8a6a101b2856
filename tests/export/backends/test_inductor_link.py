"""`-lcuda` finds the driver's library where there is no CUDA toolkit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMPILER = shutil.which("cc") or shutil.which("gcc")
ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
def test_a_program_links_with_the_driver_that_is_loaded(tmp_path: Path) -> None:
    """In a process of its own, whose driver's library is one made here, under the name that a driver has."""
    assert COMPILER
    (tmp_path / "driver.c").write_text("int cuInit(unsigned flags) { return 0; }\n")
    (tmp_path / "user.c").write_text("int cuInit(unsigned); int main(void) { return cuInit(0); }\n")
    (tmp_path / "driver").mkdir()
    library = tmp_path / "driver/libcuda.so.1"
    subprocess.run([COMPILER, "-shared", "-fPIC", tmp_path / "driver.c", "-o", library], check=True)
    script = (
        "import os, subprocess, sys\nfrom export.backends.inductor.link import cuda_toolchain\n"
        "command = [sys.argv[1], sys.argv[2] + '/user.c', '-o', sys.argv[2] + '/user', '-lcuda']\n"
        "if not subprocess.run(command, capture_output=True).returncode: raise SystemExit(77)\n"
        "with cuda_toolchain():\n    subprocess.run(command, check=True)\n"
        "assert os.environ.get('LIBRARY_PATH') is None\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "LIBRARY_PATH"}
    environment["LD_LIBRARY_PATH"] = str(library.parent)
    command = [sys.executable, "-c", script, COMPILER, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if result.returncode == 77:
        pytest.skip("the linker finds a driver's library or its stub without help")
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="there is a driver")
def test_without_a_driver_the_error_says_what_is_missing() -> None:
    script = "from export.backends.inductor.link import driver_library\ndriver_library()"
    environment = {k: v for k, v in os.environ.items() if k != "LD_LIBRARY_PATH"}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert "linked with the NVIDIA driver's libcuda.so.1, which is not there" in result.stderr
