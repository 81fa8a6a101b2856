"""What the system's compiler needs for a package of a GPU: headers, and the driver's library under the right name.

PyTorch includes `cuda.h` and links with `-lcuda`, and looks for both in a CUDA toolkit. A machine without one has the
headers that came with PyTorch and Triton, and the driver's `libcuda.so.1`, which no linker finds under that name.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from export.errors import BuildError
from runtime.files import temporary_folder

__all__ = ["cuda_headers", "cuda_toolchain", "driver_library"]

_NAME = "libcuda.so.1"


def driver_library(maps: Path = Path("/proc/self/maps")) -> Path:
    """Where the driver's library lies that this process has loaded, or loads now.

    Raises:
        BuildError: there is none.
    """
    try:
        ctypes.CDLL(_NAME)
    except OSError as error:
        raise BuildError(
            f"packages for a GPU are linked with the NVIDIA driver's {_NAME}, which is not there ({error}); install "
            "the driver"
        ) from error
    for line in maps.read_text().splitlines():
        path = Path(line.split(maxsplit=5)[-1])
        if path.name.startswith("libcuda.so"):
            return path
    raise BuildError(f"{_NAME} is loaded, but {maps} does not tell from where")


def cuda_headers() -> list[Path]:
    """Folders of CUDA's headers that came with PyTorch, then those that came with Triton, which has a few more."""
    found = []
    for package, header in (
        ("nvidia", "*/include/cuda_runtime_api.h"),
        ("triton", "backends/nvidia/include/cuda.h"),
    ):
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or ()) if spec else ():
            found += [path.parent for path in sorted(Path(root).glob(header))]
    return found


@contextmanager
def cuda_toolchain() -> Iterator[None]:
    """While the body runs, compilers find CUDA's headers, and `-lcuda` the driver's library.

    Both come after what `CPATH` and `LIBRARY_PATH` name, and after a toolkit that PyTorch finds.
    """
    with tempfile.TemporaryDirectory(prefix="libcuda-", dir=temporary_folder()) as folder:
        Path(folder, "libcuda.so").symlink_to(driver_library())
        added = {"LIBRARY_PATH": [folder], "CPATH": [str(path) for path in cuda_headers()]}
        before = {name: os.environ.get(name) for name in added}
        for name, folders in added.items():
            os.environ[name] = os.pathsep.join(filter(None, (before[name], *folders)))
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
