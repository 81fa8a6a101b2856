"""What this machine has: GPUs, their driver, and which libraries are installed."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

__all__ = ["Gpu", "GpuReport", "driver_version", "find_gpus", "importable", "installed_version"]

_DRIVER = Path("/proc/driver/nvidia/version")
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{MAJOR,MINOR}


@dataclass(frozen=True)
class Gpu:
    """A CUDA device. `memory_bytes` is its total memory."""

    name: str
    compute_capability: str
    memory_bytes: int


@dataclass(frozen=True)
class GpuReport:
    """The CUDA devices the driver shows, and why there are none.

    Attributes:
        cuda_version: newest CUDA version the driver supports, e.g. "13.0"; None without a driver.
        problem: None where at least one device can be used.
    """

    gpus: tuple[Gpu, ...] = ()
    cuda_version: str | None = None
    problem: str | None = None


def find_gpus(library: str | None = None) -> GpuReport:
    """The CUDA devices of this machine, asked from the driver itself; creates no context and needs no package.

    Args:
        library: the driver's library, by default the system's.
    """
    library = library or ("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return GpuReport(problem=f"no NVIDIA driver ({library} is not there)")
    if code := cuda.cuInit(0):
        return GpuReport(problem=f"the NVIDIA driver does not start (cuInit returned CUDA error {code})")
    version, count = ctypes.c_int(), ctypes.c_int()
    if cuda.cuDriverGetVersion(ctypes.byref(version)) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return GpuReport(problem="the NVIDIA driver does not answer; restart the machine or its driver")
    text = f"{version.value // 1000}.{version.value % 1000 // 10}"
    gpus = tuple(_describe(cuda, ordinal) for ordinal in range(count.value))
    return GpuReport(gpus, text, None if gpus else "the NVIDIA driver shows no device")


def _describe(cuda: ctypes.CDLL, ordinal: int) -> Gpu:
    device = ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), ordinal)
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGetName(name, len(name), device)
    total = ctypes.c_size_t()
    cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device)
    capability = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(str(value.value))
    return Gpu(name.value.decode(errors="replace"), ".".join(capability), total.value)


def driver_version() -> str | None:
    """Version of the NVIDIA driver's kernel module ("580.65.06"); None without one, or where the system hides it."""
    try:
        text = _DRIVER.read_text(errors="replace")
    except OSError:
        return None
    match = re.search(r"\b\d{3,}\.\d+(?:\.\d+)*\b", text)
    return match[0] if match else None


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def importable(module: str) -> bool:
    """Whether `module` could be imported; does not import it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
