"""The backends an engine can be built for, and the choice among them before any long work starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, get_args

from export.errors import InputError
from export.machine import GpuReport, find_gpus, importable, installed_version

from .targets import BackendName, Precision, Target, unknown_name

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendChoice",
    "Library",
    "build_problem",
    "choose_backend",
    "known_capabilities",
    "missing_modules",
]


@dataclass(frozen=True)
class Library:
    """A library that compiles engines.

    Attributes:
        distributions: packages that bring it, of which one is installed.
        release: the release that this project builds with, as the first numbers of its version.
    """

    distributions: tuple[str, ...]
    release: tuple[int, ...]

    @property
    def version(self) -> str | None:
        """The version that is installed; None where none is."""
        return next(filter(None, map(installed_version, self.distributions)), None)

    @property
    def requirement(self) -> str:
        """What to ask pip for."""
        *first, last = self.release
        least, limit = (".".join(map(str, (*first, number))) for number in (last, last + 1))
        return f"{self.distributions[0]}>={least},<{limit}"

    def supports(self, version: str) -> bool:
        """Whether this project builds with a version."""
        return version.split(".")[: len(self.release)] == [str(number) for number in self.release]


@dataclass(frozen=True)
class Backend:
    """What a backend can do.

    Attributes:
        capabilities: compute capabilities it builds for; None = any machine, with or without a GPU.
        precisions: what it can be built in.
        execution: the ways it can execute the step, the default first.
        on_target: whether it builds on the target GPU itself and nowhere else.
        build_modules, run_modules: what must be importable to build and to run.
        library: what compiles its engines, beyond the export tools that all backends share.
        minimum: the first compute capability that computes in a precision; of precisions not named, all do.
        kernels: whether a build needs kernel images: those that came with this package, or Triton to compile them.
    """

    name: BackendName
    capabilities: frozenset[str | None] | None
    precisions: tuple[Precision, ...]
    execution: tuple[Literal["whole", "segmented"], ...]
    on_target: bool
    build_modules: tuple[str, ...]
    run_modules: tuple[str, ...]
    library: Library | None = None
    minimum: Mapping[str, str] = field(default_factory=dict)
    kernels: bool = False

    def computes(self, precision: str, compute_capability: str) -> bool:
        """Whether GPUs of a compute capability compute in a precision."""
        least = self.minimum.get(precision)
        return least is None or _order(compute_capability) >= _order(least)


_EXPORT = ("torch", "onnx", "onnx_ir", "onnxscript")
_REDUCED: tuple[Precision, ...] = ("bf16", "fp8", "nvfp4")

_PREFERENCE: tuple[Precision, ...] = ("fp8", "bf16", "fp32", "nvfp4")
"""The precision where none is asked for: the fastest whose error is that of the authors' own deployment."""

BACKENDS: Mapping[BackendName, Backend] = MappingProxyType(
    {
        "onnxruntime": Backend(
            name="onnxruntime",
            capabilities=None,
            precisions=("fp32",),
            execution=("whole", "segmented"),
            on_target=False,
            build_modules=_EXPORT,
            run_modules=("onnxruntime",),
        ),
        "tensorrt-rtx": Backend(
            name="tensorrt-rtx",
            capabilities=frozenset({"7.5", "8.0", "8.6", "8.9", "12.0", "12.1"}),
            precisions=_REDUCED,
            execution=("segmented",),
            on_target=False,
            build_modules=(*_EXPORT, "tensorrt_rtx"),
            run_modules=("tensorrt_rtx", "cuda.core"),
            library=Library(("tensorrt-rtx-cu13",), (1, 7)),
            minimum=MappingProxyType({"bf16": "8.0", "fp8": "8.9", "nvfp4": "12.0"}),
            kernels=True,
        ),
        "tensorrt": Backend(
            name="tensorrt",
            capabilities=frozenset({"7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0", "12.1"}),
            precisions=_REDUCED,
            execution=("whole",),
            on_target=True,
            build_modules=(*_EXPORT, "tensorrt"),
            run_modules=("tensorrt", "cuda.core"),
            library=Library(("tensorrt", "tensorrt-cu13", "tensorrt-cu12"), (11,)),
            minimum=MappingProxyType({"bf16": "8.0", "fp8": "8.9", "nvfp4": "10.0"}),
        ),
        "inductor": Backend(
            name="inductor",
            capabilities=frozenset({None, "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"}),
            precisions=("fp32", "bf16", "fp8"),
            execution=("segmented",),
            on_target=True,
            build_modules=_EXPORT,
            run_modules=("torch",),
        ),
    }
)


@dataclass(frozen=True)
class BackendChoice:
    """The backend to build, its precision, and why this one, in a sentence."""

    backend: BackendName
    precision: Precision
    reason: str


def missing_modules(modules: tuple[str, ...]) -> list[str]:
    """Those of `modules` that cannot be imported."""
    return [module for module in modules if not importable(module)]


def known_capabilities(backend: Backend) -> list[str]:
    """The compute capabilities that a backend builds for, the oldest first."""
    return sorted(filter(None, backend.capabilities or ()), key=_order)


def build_problem(backend: Backend, target: Target, gpus: GpuReport) -> str | None:
    """Why `backend` cannot be built for `target` on this machine; None where it can."""
    supported = backend.capabilities
    if supported is not None and target.compute_capability not in supported:
        known = ", ".join(known_capabilities(backend))
        return (
            f"only for compute capability {known}, which {target.name} "
            f"({target.compute_capability or 'no GPU'}) is not"
        )
    problems = []
    on_gpu = target.compute_capability is not None
    if (
        backend.on_target
        and on_gpu
        and not any(g.compute_capability == target.compute_capability for g in gpus.gpus)
    ):
        here = ", ".join(f"{gpu.name} ({gpu.compute_capability})" for gpu in gpus.gpus) or gpus.problem
        problems.append(f"built on the target GPU itself only, and here there is {here}")
    missing = missing_modules(backend.build_modules)
    if backend.kernels and not (importable("triton") or _has_images(target)):
        missing.append("triton (there are no kernel images in this package)")
    if missing:
        problems.append(f"needs {', '.join(missing)}, not installed")
    return ", ".join(problems) or None


def _has_images(target: Target) -> bool:
    from plugins.compile.prebuilt import has_images

    capability = target.compute_capability
    return capability is not None and has_images(int(capability.replace(".", "")))


def choose_backend(
    target: Target,
    backend: str = "auto",
    precision: str | None = None,
    *,
    gpus: GpuReport | None = None,
) -> BackendChoice:
    """The backend to build for `target`.

    Args:
        backend: a backend's name, or "auto" for the first of the target's preferences that works here.
        precision: fp32, bf16, fp8 or nvfp4; None = the first of `_PREFERENCE` that target and backend both have.
        gpus: the GPUs of this machine, by default asked from the driver.

    Raises:
        InputError: what is asked for cannot be built; says why and names the alternative.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise unknown_name("backend", backend, ["auto", *BACKENDS])
    if precision is not None and precision not in get_args(Precision):
        raise unknown_name("precision", precision, get_args(Precision))
    if precision is not None and precision not in target.precisions:
        raise InputError(
            f"{target.name} ({target.sm or 'a CPU'}) does not compute in {precision}; use --precision "
            f"{' or '.join(target.precisions)}, or another --gpu"
        )
    gpus = find_gpus() if gpus is None else gpus
    asked = [name for name in BACKENDS if name == backend]
    rejected: dict[str, list[str]] = {}
    for name in asked or target.backends:
        chosen, problem = _precision(target, name, precision, gpus)
        if chosen is not None:
            reason = "it was asked for" if asked else "it is the target's first choice"
            if rejected:
                reason = f"preferred, but not possible here: {_list(rejected)}"
            return BackendChoice(name, chosen, reason)
        rejected.setdefault(problem, []).append(name)
    raise InputError(
        f"cannot build for {target.name}{f' in {precision}' if precision else ''}: {_list(rejected)}; "
        f"{_alternative(target, gpus)}"
    )


def _precision(
    target: Target, name: BackendName, precision: str | None, gpus: GpuReport
) -> tuple[Precision | None, str]:
    """The precision to build backend `name` in; or None and why it cannot be built."""
    backend = BACKENDS[name]
    if problem := build_problem(backend, target, gpus):
        return None, problem
    for candidate in _PREFERENCE:
        common = candidate in target.precisions and candidate in backend.precisions
        if common and precision in (None, candidate):
            return candidate, ""
    return (
        None,
        f"no {precision or ' or '.join(target.precisions)}, only {', '.join(backend.precisions)}",
    )


def _list(rejected: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{' and '.join(names)} ({problem})" for problem, names in rejected.items())


def _alternative(target: Target, gpus: GpuReport) -> str:
    for name in target.backends:
        if chosen := _precision(target, name, None, gpus)[0]:
            return f"use --backend {name} --precision {chosen}"
    return "see 'python -m export doctor' for what is missing"


def _order(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))
