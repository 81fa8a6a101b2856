"""The packages of a bundle: which there are, and compiling them side by side in processes of their own.

Packages hold no weights, so they are the same for every checkpoint of a model's shape, and travel well. Where the GPU
that they are for is not here, those processes take the library of `null_gpu` for one.
"""

from __future__ import annotations

import gc
import os
import pickle
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import torch
from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

from export.errors import BuildError, InputError
from export.parts.worker import run_worker
from export.progress import StepCallback
from export.quantize.formats import choose_formats
from export.quantize.graph import KINDS
from export.request.geometry import StepPlan
from export.request.graph_types import graph_types
from export.request.request import BuildRequest
from plugins.compile.kernels import needed_driver
from runtime.bundle import ENCODER_COMPONENTS
from runtime.files import temporary_folder
from runtime.host_memory import memory, processors

from .decoder import vae_first, vae_next
from .encoder import VAE_ENCODERS
from .link import cuda_toolchain
from .lowering import package_lowerings
from .modules import Compiled, conditioner, step_segments, text_layer
from .null_gpu import compile_library, environment

__all__ = [
    "EFFORT",
    "compile_package",
    "compile_packages",
    "device_of",
    "fp8_linears",
    "is_cross",
    "needed_drivers",
    "package_modules",
    "package_names",
]

EFFORT: Mapping[str, float] = {
    "text_encoder": 15.0,
    "conditioner": 15.0,
    "first": 12.0,
    "layer": 15.0,
    "last": 15.0,
    "vae_next": 50.0,
    "vae_first": 110.0,
    **dict.fromkeys(ENCODER_COMPONENTS, 50.0),
}
"""The packages, with the seconds that compiling takes at full size."""

_MEMORY = 3 << 30
"""Of a process that compiles."""

_CONDITIONER_KINDS = ("cross_attn.k", "cross_attn.v")
"""Linears that run once per prompt and stay in the graph's type."""


def device_of(request: BuildRequest) -> Literal["cpu", "cuda"]:
    """Where a request's packages run."""
    return "cpu" if request.target.compute_capability is None else "cuda"


def is_cross(request: BuildRequest) -> bool:
    """Whether the GPU that the packages are for is not in this machine."""
    if device_of(request) == "cpu":
        return False
    if not torch.cuda.is_available():
        return True
    return "{}.{}".format(*torch.cuda.get_device_capability()) != request.target.compute_capability


def fp8_linears(request: BuildRequest, plan: StepPlan) -> frozenset[str]:
    """Kinds of the block linears that are in FP8.

    Raises:
        InputError: what is skipped differs between layers, which share one package; or it needs measured errors.
    """
    if request.precision != "fp8":
        return frozenset()
    skip = request.quantization.skip
    if "auto" in skip:
        raise InputError(
            "the inductor backend does not measure errors, so there is no --skip auto; name the linears, such as "
            "--skip '*.ffn.2'"
        )
    layers = range(plan.preset.dit.layers)
    kinds = [kind for kind in KINDS if kind not in _CONDITIONER_KINDS]
    chosen = choose_formats([f"blocks.{i}.{kind}" for i in layers for kind in kinds], "fp8", skip=skip)
    by_kind = {kind: {i for i in layers if f"blocks.{i}.{kind}" in chosen} for kind in kinds}
    uneven = [kind for kind, found in by_kind.items() if 0 < len(found) < len(layers)]
    if uneven:
        raise InputError(
            f"--skip leaves {uneven[0]} in FP8 in {len(by_kind[uneven[0]])} of {len(layers)} layers, but one package "
            f"serves them all; skip it in all (--skip '*.{uneven[0]}') or in none"
        )
    return frozenset(kind for kind, found in by_kind.items() if found)


def package_modules(request: BuildRequest) -> dict[str, Callable[[], Compiled]]:
    """What each package is compiled from, by name; no weights are read."""
    plan, types = request.plan, graph_types(request)
    vae = request.weights.vae_config()
    segments = step_segments(plan, types.transformer, fp8_linears(request, plan)).by_name
    return {
        "text_encoder": partial(text_layer, plan, types.text),
        "conditioner": partial(conditioner, plan.preset.dit, types.transformer),
        **{name: partial(_same, segment) for name, segment in segments.items()},
        "vae_first": partial(vae_first, vae, types.decoder, plan),
        "vae_next": partial(vae_next, vae, types.decoder, plan),
        **_encoders(request),
    }


def _encoders(request: BuildRequest) -> dict[str, Callable[[], Compiled]]:
    config, dtype = request.encoder, graph_types(request).decoder
    if config is None:
        return {}
    return {name: partial(make, config, dtype, request.plan) for name, make in VAE_ENCODERS.items()}


def package_names(request: BuildRequest) -> tuple[str, ...]:
    """The packages of a bundle."""
    return tuple(name for name in EFFORT if request.with_encoder or name not in ENCODER_COMPONENTS)


def _same(module: Compiled) -> Compiled:
    return module


_CUDA_DRIVERS = {12: 525, 13: 580}
"""Major versions of CUDA that PyTorch is built with, and the branch of the oldest driver that each runs on."""


def needed_drivers(packages: Sequence[Path], arch: int) -> int:
    """The branch of the oldest driver that runs all of `packages`, on compute capability `arch` (times ten).

    Raises:
        BuildError: PyTorch is built with a CUDA that is not known, or a kernel is none of a compiler that is.
    """
    major = int((torch.version.cuda or "0").partition(".")[0])
    if major not in _CUDA_DRIVERS:
        raise BuildError(
            f"PyTorch {torch.__version__} is built with CUDA {torch.version.cuda}; the drivers that run packages are "
            f"known for CUDA {' and '.join(map(str, _CUDA_DRIVERS))}"
        )
    found = [_CUDA_DRIVERS[major]]
    for path in packages:
        with zipfile.ZipFile(path) as package:
            cubins = [name for name in package.namelist() if name.endswith(".cubin")]
            found += [needed_driver(package.read(name), arch) for name in cubins]
    return max(found)


class _Choices(InductorChoices):
    """Inductor's choices, but for rows that are reduced without a loop.

    A row of the residual stream fits into registers, so that norm, modulation and quantization are one kernel that
    reads it once; Inductor by itself loops over rows above 1024 elements, and over channels that are no power of two.
    """

    @staticmethod
    def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
        limit = _ROW if features.get_reduction_hint() == ReductionHint.INNER else _CHANNELS
        numel = features.reduction_numel
        if numel.is_number and int(numel) <= limit and not cooperative_reduction:
            return True
        return InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)


_ROW, _CHANNELS = 2048, 128


def compile_package(module: Compiled, path: Path, device: str) -> None:
    """Compile `module` for `device` to the package `path`.

    Raises:
        BuildError: PyTorch does not compile it.
    """
    # The wrapper only launches kernels: optimising it costs more than all kernels together and gains nothing.
    options: dict[str, Any] = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    if device == "cpu":
        options["cpp.dynamic_threads"] = True
    else:
        # It would execute kernels, whose results mean nothing where the GPU is none.
        options["joint_graph_constant_folding"] = False
    try:
        toolchain = cuda_toolchain() if device == "cuda" else nullcontext()
        with (
            warnings.catch_warnings(),
            torch.no_grad(),
            toolchain,
            V.set_choices_handler(_Choices()),
            package_lowerings(),
        ):
            warnings.simplefilter("ignore")
            program = torch.export.export(module.eval(), module.examples(device), strict=False)
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(path), inductor_configs=options
            )
    except Exception as error:
        raise BuildError(
            f"PyTorch {torch.__version__} does not compile {path.stem!r} for {device}: {error}"
        ) from error
    finally:
        gc.collect()


def compile_packages(
    request: BuildRequest,
    folder: Path,
    key: str,
    progress: StepCallback,
    names: Sequence[str] | None = None,
) -> list[str]:
    """Compile packages of a request into `folder`, side by side as cores and memory allow.

    Those that an interrupted call finished under the same `key` are taken over.

    Args:
        names: which ones; all by default.

    Returns:
        the files, relative to `folder`.

    Raises:
        BuildError: a package does not compile; the message is PyTorch's.
    """
    kept = folder / f".packages-{key[:16]}"
    kept.mkdir(exist_ok=True)
    names = package_names(request) if names is None else names
    missing = [name for name in names if not (kept / f"{name}.pt2").is_file()]
    available = memory().available or _MEMORY
    jobs = max(1, min(len(missing), processors(), available // _MEMORY))
    done, lock = len(names) - len(missing), Lock()

    def finished(name: str, _: int, __: int) -> None:
        nonlocal done
        with lock:
            done += 1
            progress(f"{name} compiled", done, len(names))

    progress(f"compiling {', '.join(missing)}", done, len(names))
    with tempfile.TemporaryDirectory(prefix="packages-", dir=temporary_folder()) as scratch:
        Path(scratch, "request").write_bytes(pickle.dumps(request))
        job = {"device": device_of(request), "null_gpu": is_cross(request), "request": f"{scratch}/request"}
        variables = dict(os.environ)
        if job["null_gpu"]:
            variables |= environment(compile_library(Path(scratch)), request.target.name)

        def compile_group(group: Sequence[str]) -> str | None:
            packages = {name: str(kept / f"{name}.pt2") for name in group}
            found = run_worker(f"{__package__}.worker", {**job, "packages": packages}, variables, finished)
            if not found.code:
                return None
            return (
                found.result.get("failed")
                or f"the compiler's process ended with {found.code}: {found.log[-2000:]}"
            )

        with ThreadPoolExecutor(jobs) as pool:
            problems = [problem for problem in pool.map(compile_group, _groups(missing, jobs)) if problem]
    if problems:
        raise BuildError("; ".join(problems))
    for name in names:
        os.replace(kept / f"{name}.pt2", folder / f"{name}.pt2")
    kept.rmdir()
    return [f"{name}.pt2" for name in names]


def _groups(names: Sequence[str], jobs: int) -> list[list[str]]:
    """The packages in as many groups, of about the same effort."""
    groups: list[list[str]] = [[] for _ in range(jobs)]
    for name in sorted(names, key=lambda name: -EFFORT[name]):
        min(groups, key=lambda group: sum(EFFORT[other] for other in group)).append(name)
    return [group for group in groups if group]
