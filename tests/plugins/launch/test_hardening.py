"""The launch library is built with what compilers and linkers offer against overflows, as the plugin is."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from plugins.compile.libraries import build_libraries
from plugins.kernels import specs
from tests.plugins.launch import launch_interface as lf

pytest.importorskip("triton")


@pytest.mark.skipif(shutil.which("readelf") is None, reason="binutils are not installed")
def test_the_launch_library_is_hardened(tmp_path: Path) -> None:
    lf.write_stand_ins(tmp_path / "kernels")
    out = tmp_path / "libraries"
    built = build_libraries(
        specs.ARCHS, tmp_path / "kernels", out, tensorrt_root=out / "nowhere", fetch=False, jobs=2
    )

    def readelf(*options: str) -> str:
        command = ["readelf", "--wide", *options, str(built.launch)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    segments = readelf("--segments")
    assert "GNU_RELRO" in segments
    stack = next(line for line in segments.splitlines() if "GNU_STACK" in line)
    assert re.search(r"\bRWE\b", stack) is None, "an executable stack"
    assert re.search(r"\bRW\b", stack)
    assert re.search(r"\b(NOW|BIND_NOW)\b", readelf("--dynamic"))
    assert "TEXTREL" not in readelf("--dynamic")
    symbols = readelf("--dyn-syms")
    assert "__stack_chk_fail" in symbols
