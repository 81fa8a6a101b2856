"""What this machine can build and run, and why not."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from export.machine import Gpu, GpuReport, find_gpus, importable, installed_version
from export.request.capability import BACKENDS, Backend, missing_modules
from export.units import readable_size
from plugins.compile.prebuilt import has_images
from plugins.kernels import specs
from runtime.files import temporary_folder
from runtime.host_memory import Memory, memory

from .tables import titled_table

__all__ = ["BackendStatus", "Library", "Report", "doctor_tables", "examine", "old_drivers"]

_LIBRARIES = {
    "numpy": "numpy",
    "pydantic": "pydantic",
    "rich": "rich",
    "platformdirs": "platformdirs",
    "onnxruntime": "onnxruntime",
    "onnxruntime-gpu": "onnxruntime",
    "tokenizers": "tokenizers",
    "ftfy": "ftfy",
    "av": "av",
    "pillow": "PIL",
    "torch": "torch",
    "onnx": "onnx",
    "onnx-ir": "onnx_ir",
    "onnxscript": "onnxscript",
    "transformers": "transformers",
    "safetensors": "safetensors",
    "polygraphy": "polygraphy",
    "ml-dtypes": "ml_dtypes",
    "triton": "triton",
    "nvidia-modelopt": "modelopt",
    "tensorrt": "tensorrt",
    "tensorrt-rtx-cu13": "tensorrt_rtx",
    "cuda-core": "cuda.core",
}
"""Distribution -> the module it provides."""

_LOAD_SECONDS = 120
_LOADER = """
import importlib, json, sys
for module in sys.argv[1:]:
    print(json.dumps([module, None, None]), flush=True)
    try:
        loaded = importlib.import_module(module)
        print(json.dumps([module, str(getattr(loaded, "__version__", "")), None]), flush=True)
    except Exception as error:
        print(json.dumps([module, None, f"{type(error).__name__}: {error}"]), flush=True)
"""


@dataclass(frozen=True)
class Library:
    """One library: the version that is installed, the version that loads, and what is wrong with it if anything."""

    name: str
    installed: str
    loaded: str | None
    problem: str | None


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can be built and run here; None means yes, a text says why not."""

    name: str
    build: str | None
    run: str | None


@dataclass(frozen=True)
class Report:
    """Everything `doctor` finds out. Sizes in bytes."""

    python: str
    system: str
    libraries: tuple[Library, ...]
    gpus: GpuReport
    backends: tuple[BackendStatus, ...]
    memory: Memory
    disk_folder: str
    disk_free: int
    problems: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)


def examine(out: Path) -> Report:
    """Look at this machine.

    Args:
        out: the folder bundles are built in; its disk's free space is reported.
    """
    libraries = _libraries()
    gpus = find_gpus()
    backends = tuple(_status(backend, gpus) for backend in BACKENDS.values())
    problems = [f"{library.name}: {library.problem}" for library in libraries if library.problem]
    if {"onnxruntime", "onnxruntime-gpu"} <= {library.name for library in libraries}:
        problems.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; uninstall both, then install "
            "onnxruntime (extra 'cpu'): ONNX Runtime is used on the processor only"
        )
    if all(status.build for status in backends):
        problems.append(
            "no backend can be built here; install the extras: pip install '.[cpu,text,video,export]'"
        )
    problems += old_drivers(gpus)
    try:
        temporary_folder()
    except OSError as error:
        problems.append(str(error))
    folder = next(path for path in (out.resolve(), *out.resolve().parents) if path.exists())
    return Report(
        python=f"{platform.python_implementation()} {platform.python_version()}",
        system=f"{platform.system()} {platform.machine()}",
        libraries=libraries,
        gpus=gpus,
        backends=backends,
        memory=memory(),
        disk_folder=str(folder),
        disk_free=shutil.disk_usage(folder).free,
        problems=tuple(problems),
    )


def _libraries() -> tuple[Library, ...]:
    installed = {name: version for name in _LIBRARIES if (version := installed_version(name))}
    loaded = _load([_LIBRARIES[name] for name in installed])
    return tuple(_library(name, version, *loaded[_LIBRARIES[name]]) for name, version in installed.items())


def _library(name: str, installed: str, loaded: str | None, failure: str | None) -> Library:
    problem = None
    if failure is not None:
        problem = f"{installed} is installed but does not load: {failure}"
    elif loaded and installed not in (
        loaded,
        loaded.partition("+")[0],
    ):  # some wheels name no build in their version
        problem = f"{installed} is installed but {loaded} loads; remove the other copy from the import path"
    return Library(name, installed, loaded or None, problem)


def _load(modules: list[str]) -> dict[str, tuple[str | None, str | None]]:
    """Import `modules` in a process of its own, so that one that crashes or hangs is reported, not shared.

    Returns:
        for each module its `__version__` ("" if it has none) and the failure.
    """
    found: dict[str, tuple[str | None, str | None]] = {}
    waiting = list(dict.fromkeys(modules))
    while waiting:
        failure = "crashes when imported"
        try:
            process = subprocess.run(
                [sys.executable, "-c", _LOADER, *waiting],
                capture_output=True,
                text=True,
                timeout=_LOAD_SECONDS,
                check=False,
            )
            lines = process.stdout.splitlines()
        except subprocess.TimeoutExpired as error:
            failure = f"does not finish importing in {_LOAD_SECONDS} s"
            lines = error.stdout.decode().splitlines() if isinstance(error.stdout, bytes) else []
        for line in lines:
            if line.startswith('["'):
                module, version, problem = json.loads(line)
                found[module] = (version, failure if version is None and problem is None else problem)
        remaining = [module for module in waiting if module not in found]
        if len(remaining) == len(waiting):
            found |= dict.fromkeys(remaining, (None, "the interpreter does not start"))
            break
        waiting = remaining
    return found


def _kernel_driver(gpu: Gpu) -> int | None:
    """The branch of the oldest driver that loads the attention kernels for `gpu`; None where there are none."""
    try:
        return specs.least_driver(specs.image_arch(int(gpu.compute_capability.replace(".", ""))))
    except specs.KernelError:
        return None


def old_drivers(gpus: GpuReport) -> list[str]:
    """What is to be done about GPUs whose driver does not load their attention kernels."""
    found = tuple(int(part) for part in (gpus.cuda_version or "").split(".") if part)
    return [
        f"{gpu.name}: the driver supports CUDA {gpus.cuda_version}, and its attention kernels need a driver of branch "
        f"{branch} or newer; update the driver"
        for gpu in gpus.gpus
        if (branch := _kernel_driver(gpu)) and found < specs.DRIVERS[branch]
    ]


def _status(backend: Backend, gpus: GpuReport) -> BackendStatus:
    device = [gpus.problem] if gpus.problem and backend.capabilities is not None else []
    build = (device if backend.on_target else []) + _missing(backend.build_modules)
    if backend.kernels and not importable("triton") and not any(map(has_images, specs.ARCHS)):
        build.append("triton not installed, and no kernel images in this package")
    run = device + _missing(backend.run_modules)
    return BackendStatus(backend.name, "; ".join(build) or None, "; ".join(run) or None)


def _missing(modules: tuple[str, ...]) -> list[str]:
    missing = missing_modules(modules)
    return [f"{', '.join(missing)} not installed"] if missing else []


_YES = "[green]yes[/]"


def doctor_tables(report: Report) -> tuple[Table | str, ...]:
    """The report of `doctor`: machine, libraries, backends, and what is broken."""
    machine = titled_table("Machine", "", "")
    machine.show_header = False
    machine.add_row("Python", report.python)
    machine.add_row("system", report.system)
    machine.add_row("memory", f"{_known(report.memory.available)} available of {_known(report.memory.total)}")
    machine.add_row("disk", f"{_known(report.disk_free)} free at {escape(report.disk_folder)}")
    for gpu in report.gpus.gpus:
        machine.add_row(
            "GPU", f"{gpu.name}, compute capability {gpu.compute_capability}, {_known(gpu.memory_bytes)}"
        )
        if branch := _kernel_driver(gpu):
            machine.add_row("", f"its attention kernels need a driver of branch {branch} or newer")
    machine.add_row("CUDA", report.gpus.problem or f"driver supports up to {report.gpus.cuda_version}")

    libraries = titled_table("Libraries", "library", "installed", "loaded", "")
    for library in report.libraries:
        verdict = f"[red]{escape(library.problem)}[/]" if library.problem else "[green]ok[/]"
        libraries.add_row(library.name, library.installed, library.loaded or "-", verdict)

    backends = titled_table("Backends", "backend", "build here", "run here")
    for status in report.backends:
        backends.add_row(status.name, status.build or _YES, status.run or _YES)

    verdicts = [f"[red]problem:[/] {escape(problem)}" for problem in report.problems]
    return machine, libraries, backends, *(verdicts or ["[green]no problems found[/]"])


def _known(size: int | None) -> str:
    return "unknown" if size is None else readable_size(size)
