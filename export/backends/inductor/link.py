"""What the linker needs for a package of a GPU: the driver's library under the name that it looks for.

PyTorch links packages with `-lcuda`, and searches the stubs of a CUDA toolkit. A machine with a driver and without a
toolkit has the driver's `libcuda.so.1` alone, which no linker finds under that name.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from export.errors import BuildError

__all__ = ["driver_library", "linkable_driver"]

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


@contextmanager
def linkable_driver() -> Iterator[None]:
    """While the body runs, `-lcuda` finds the driver's library, through LIBRARY_PATH and after all that is in it."""
    before = os.environ.get("LIBRARY_PATH")
    with tempfile.TemporaryDirectory(prefix="libcuda-") as folder:
        Path(folder, "libcuda.so").symlink_to(driver_library())
        os.environ["LIBRARY_PATH"] = os.pathsep.join(filter(None, (before, folder)))
        try:
            yield
        finally:
            if before is None:
                del os.environ["LIBRARY_PATH"]
            else:
                os.environ["LIBRARY_PATH"] = before
