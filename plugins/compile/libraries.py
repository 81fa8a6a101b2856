"""Build the launch library and the TensorRT plugin from kernel images, by driving CMake. Needs a C++ compiler."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from runtime.host_memory import processors

from .embedding import write_embedded
from .kernels import BuildError

__all__ = [
    "HEADERS_HINT",
    "LAUNCH_LIBRARY",
    "PLUGIN_LIBRARY",
    "PLUGIN_VARIABLE",
    "BuiltLibraries",
    "build_libraries",
    "find_plugin",
    "find_tool",
]

PLUGIN_LIBRARY: Final = "libnvinfer_plugin_lightforcing.so"
LAUNCH_LIBRARY: Final = "liblightforcing_launch.so"
PLUGIN_VARIABLE: Final = "LIGHTFORCING_TENSORRT_PLUGIN"
DEFAULT_OUT: Final = Path("build/tensorrt")
HEADERS_HINT: Final = (
    "set TENSORRT_ROOT to a folder of TensorRT 10.3 or later that has include/NvInferRuntime.h, install the vendor's "
    "libnvinfer-headers-dev, or allow the network so that the headers are fetched"
)
_PACKAGE: Final = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class BuiltLibraries:
    """What a build left behind.

    Attributes:
        launch: the launch library, `LAUNCH_LIBRARY`.
        plugin: the TensorRT plugin, `PLUGIN_LIBRARY`; None where the headers of TensorRT could not be had.
        header: the launch library's C header.
        targets: architectures inside of both, such as `("sm_80", "sm_90a")`.
    """

    launch: Path
    plugin: Path | None
    header: Path
    targets: tuple[str, ...]


def find_tool(name: str) -> str | None:
    """`cmake` or `ninja`: beside this interpreter, where their packages put them, or in the PATH."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def find_plugin() -> Path | None:
    """The TensorRT plugin of this installation, if there is one.

    Looks at the file that `LIGHTFORCING_TENSORRT_PLUGIN` names, into this package (wheels can carry it in
    `plugins/lib`), and where `python -m plugins build --tensorrt` leaves it.

    Raises:
        BuildError: the variable names a file that does not exist.
    """
    if named := os.environ.get(PLUGIN_VARIABLE):
        if not Path(named).is_file():
            raise BuildError(f"{PLUGIN_VARIABLE} is {named!r}, which is not a file; correct or unset it")
        return Path(named).resolve()
    for folder in (_PACKAGE / "lib", Path.cwd() / DEFAULT_OUT):
        if (folder / PLUGIN_LIBRARY).is_file():
            return folder / PLUGIN_LIBRARY
    return None


def _run(command: Sequence[str | Path], what: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        output = (result.stdout + result.stderr)[-6000:]
        raise BuildError(
            f"{what} failed; the libraries need a C++17 compiler and CMake 3.18 or later:\n{output}"
        )


def _cuda_headers() -> Path | None:
    """Triton brings the CUDA headers along; the compiler of the kernels is always installed."""
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    folder = Path(triton.origin).parent / "backends" / "nvidia" / "include"
    return folder if (folder / "cuda_runtime_api.h").exists() else None


def build_libraries(
    archs: Sequence[int],
    kernels: Path,
    out: Path,
    *,
    tensorrt_root: Path | None = None,
    fetch: bool = True,
    sanitize: str = "",
    tests: bool = False,
    jobs: int | None = None,
) -> BuiltLibraries:
    """Build both libraries into `out`; CMake works in `out/work`.

    Args:
        archs: compute capabilities times ten, each with a folder of images in `kernels`.
        kernels: what `python -m plugins build` wrote.
        tensorrt_root: holds `include/NvInferRuntime.h`; default: the environment's `TENSORRT_ROOT`, then the system.
        fetch: fetch the headers from the vendor's repository where there are none.
        sanitize: sanitizers to compile with, such as `address,undefined`.
        tests: build the programs of `tests/driver` too (from a checkout); they stay in `out/work`.
        jobs: parallel compilations; default: one per processor.

    Raises:
        BuildError: CMake is missing, or the libraries do not compile.
        BundleError, EmbeddingError: the images cannot be embedded.
    """
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    if cmake is None:
        raise BuildError("there is no cmake; install it, for example with `pip install cmake ninja`")
    out = out.resolve()
    work = out / "work"
    embedded = work / "embedded"
    targets = write_embedded(archs, kernels, embedded)
    libraries = work / "cmake"
    # What was found in an earlier build must not decide over this one.
    (libraries / "CMakeCache.txt").unlink(missing_ok=True)
    for name in (LAUNCH_LIBRARY, PLUGIN_LIBRARY):
        (libraries / name).unlink(missing_ok=True)
        (out / name).unlink(missing_ok=True)

    root = tensorrt_root or os.environ.get("TENSORRT_ROOT")
    cuda = _cuda_headers()
    configure: list[str | Path] = [
        cmake,
        "-S",
        _PACKAGE,
        "-B",
        libraries,
        f"-DLIGHTFORCING_EMBEDDED={embedded}",
    ]
    configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    configure += [f"-DTENSORRT_ROOT={Path(root).resolve()}"] if root else []
    configure += [f"-DLIGHTFORCING_CUDA_INCLUDE={cuda}"] if cuda else []
    configure += [f"-DLIGHTFORCING_FETCH={'ON' if fetch else 'OFF'}", f"-DLIGHTFORCING_SANITIZE={sanitize}"]
    configure += [f"-DLIGHTFORCING_TESTS={'ON' if tests else 'OFF'}"]
    _run(configure, "configuring")
    _run([cmake, "--build", libraries, "--parallel", str(jobs or processors())], "compiling")

    header = out / "lightforcing_launch.h"
    shutil.copyfile(_PACKAGE / "launch" / header.name, header)
    for name in (LAUNCH_LIBRARY, PLUGIN_LIBRARY):
        if (libraries / name).exists():
            os.replace(libraries / name, out / name)
    plugin = out / PLUGIN_LIBRARY
    return BuiltLibraries(out / LAUNCH_LIBRARY, plugin if plugin.exists() else None, header, tuple(targets))
