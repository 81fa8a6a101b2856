"""CUDA C++ to PTX with NVRTC, NVIDIA's compiler as a library: no GPU, no CUDA toolkit and no host compiler."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from plugins.errors import PluginError

__all__ = ["NvrtcError", "to_ptx"]


class NvrtcError(PluginError):
    """NVRTC is missing, or refuses a source."""


def to_ptx(path: Path, target: str, defines: Mapping[str, int]) -> str:
    """Compile a source for `target` (`sm_90a`), with `defines` as macros; the `.cuh` files beside it can be included.

    Raises:
        NvrtcError: the package is not installed, or the source does not compile.
    """
    name = path.name
    headers = {header.name: header.read_bytes() for header in sorted(path.parent.glob("*.cuh"))}
    try:
        nvrtc: Any = import_module("cuda.bindings.nvrtc")
        status, program = nvrtc.nvrtcCreateProgram(
            path.read_bytes(),
            name.encode(),
            len(headers),
            list(headers.values()),
            [header.encode() for header in headers],
        )
    except (ImportError, RuntimeError) as error:
        raise NvrtcError(
            f"{name} is CUDA C++, which NVRTC compiles; install the packages cuda-bindings and nvidia-cuda-nvrtc, of "
            f"one major version ({error})"
        ) from error
    _check(nvrtc, status, name)
    options = ["--std=c++17", f"--gpu-architecture={target.replace('sm_', 'compute_')}"]
    options += [f"-D{key}={int(value)}" for key, value in defines.items()]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if int(status):
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = b" " * size
        nvrtc.nvrtcGetProgramLog(program, log)
        raise NvrtcError(f"{name} does not compile: {log.decode(errors='replace').strip()}")
    status, size = nvrtc.nvrtcGetPTXSize(program)
    _check(nvrtc, status, name)
    ptx = b" " * size
    (status,) = nvrtc.nvrtcGetPTX(program, ptx)
    _check(nvrtc, status, name)
    nvrtc.nvrtcDestroyProgram(program)
    return ptx.decode().rstrip("\0")


def _check(nvrtc: Any, status: Any, name: str) -> None:
    if int(status):
        _, text = nvrtc.nvrtcGetErrorString(status)
        raise NvrtcError(f"NVRTC fails on {name}: {text!r}")
