"""A GPU where there is none, to compile for: a small library that a process takes for the driver and the CUDA runtime.

Which GPUs it can be, how it is compiled from `null_gpu.c` with the system's compiler, and how a process is started with
it; what such a process calls before it compiles is in `pretend`. Nothing executes: what comes out is compiled code.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from export.errors import BuildError, InputError

from .link import cuda_headers

__all__ = ["GPUS", "Gpu", "compile_library", "environment"]

_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True)
class Gpu:
    """What a compiler asks of a GPU; sizes in bytes.

    Attributes:
        shared_block, shared_sm: shared memory of a block that asks for all it can get, and of a multiprocessor.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_block: int
    shared_sm: int
    cache: int
    memory: int

    @property
    def described(self) -> str:
        """As `null_gpu.c` reads it."""
        sizes = (self.multiprocessors, self.shared_block, self.shared_sm, self.cache, self.memory)
        return ",".join(map(str, (*self.capability, *sizes, self.name)))


GPUS: Mapping[str, Gpu] = {
    gpu.name.partition(" ")[2].lower(): gpu
    for gpu in (
        Gpu("NVIDIA A100", (8, 0), 108, 163 * _KIB, 164 * _KIB, 40 * _MIB, 80 * _GIB),
        Gpu("NVIDIA H100", (9, 0), 132, 227 * _KIB, 228 * _KIB, 50 * _MIB, 80 * _GIB),
        Gpu("NVIDIA H200", (9, 0), 132, 227 * _KIB, 228 * _KIB, 60 * _MIB, 141 * _GIB),
        Gpu("NVIDIA B200", (10, 0), 148, 227 * _KIB, 228 * _KIB, 126 * _MIB, 180 * _GIB),
    )
}
"""The GPUs that can be compiled for, by the names of their targets."""

_SOURCE = Path(__file__).with_name("null_gpu.c")
_NAME = "libcuda.so.1"
"""The driver's: a process that has this library loaded finds it under that name, and packages are linked with it."""


def compile_library(folder: Path) -> Path:
    """Compile the library into `folder`, with the headers of the CUDA runtime that PyTorch came with.

    Raises:
        BuildError: there is no C compiler, or it fails.
    """
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        raise BuildError("compiling for a GPU that is not here needs a C compiler; install gcc")
    library = folder / _NAME
    flags = ["-O1", "-fPIC", "-shared", f"-Wl,-soname,{_NAME}", *(f"-I{path}" for path in cuda_headers())]
    done = subprocess.run(
        [compiler, *flags, str(_SOURCE), "-o", str(library)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BuildError(f"{compiler} does not compile {_SOURCE.name}: {done.stderr.strip()[-1500:]}")
    return library


def environment(library: Path, target: str) -> dict[str, str]:
    """Variables of a process that takes `library` for the GPU of a target.

    Raises:
        InputError: the target's GPU is not described here.
    """
    if target not in GPUS:
        raise InputError(
            f"packages for {target} can only be compiled on such a GPU; without one, there are {', '.join(GPUS)}"
        )
    preloaded = " ".join(filter(None, (str(library), os.environ.get("LD_PRELOAD"))))
    return {"LD_PRELOAD": preloaded, "NULL_GPU": GPUS[target].described}
