"""Packages are loaded without starting a compiler, which would take most of a minute and may not be there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
COMPILER = torch._inductor.config.cpp.cxx
COMPILERS = [name for name in (COMPILER if isinstance(COMPILER, tuple) else (COMPILER,)) if name]

SCRIPT = """
import sys
from types import SimpleNamespace
from pathlib import Path
import torch
from runtime.bundle import BundleFile, file_entry
from runtime.errors import EngineError
from runtime.host.inductor import load_package
folder = Path(sys.argv[1])
bundle = SimpleNamespace(
    root=folder,
    opened=lambda path: BundleFile(folder, file_entry(folder, path), None),
    component=lambda name: SimpleNamespace(file=f"{name}.pt2"),
)
try:
    package = load_package(bundle, "twice")
except EngineError as error:
    sys.exit(str(error))
result = package.run([torch.full((4,), 3.0)])
assert result[0].tolist() == [6.0] * 4, result
"""


COMPILE = """
import sys

import torch


class Twice(torch.nn.Module):
    def forward(self, x):
        return x * 2


program = torch.export.export(Twice(), (torch.zeros(4),))
torch._inductor.aoti_compile_and_package(program, package_path=sys.argv[1])
"""


@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="PyTorch finds no C++ compiler here")
def test_a_package_is_loaded_without_a_compiler(tmp_path: Path) -> None:
    # In a process of its own: PyTorch keeps what it once found out of this processor.
    subprocess.run([sys.executable, "-c", COMPILE, str(tmp_path / "twice.pt2")], check=True)
    compiler = tmp_path / "c++"
    compiler.write_text(f"#!/bin/sh\necho called >> {tmp_path}/called\nexit 1\n")
    compiler.chmod(0o755)
    # With a cache of its own: PyTorch keeps what a compiler told it about this machine.
    environment = {**os.environ, "CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}

    def load(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path)],
            cwd=ROOT, env={**environment, **more}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    result = load()
    assert result.returncode == 0, result.stderr
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        less = load(ATEN_CPU_CAPABILITY="default")  # as on a processor without vectors
        assert less.returncode == 1
        assert "was compiled for a processor with AVX" in less.stderr
        assert "and this one has DEFAULT" in less.stderr
    assert not (tmp_path / "called").exists(), "loading has started the compiler"
