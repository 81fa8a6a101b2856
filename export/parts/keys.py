"""What identifies a build and its parts, so that an interrupted build takes over exactly what it would make again."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import engines as engine_data
import lightforcing_ref
import plugins
from export.machine import driver_version
from export.request.capability import BACKENDS
from export.request.geometry import StepPlan
from export.request.graph_types import graph_types
from export.request.request import BuildRequest
from export.request.targets import BackendName
from runtime import bundle

__all__ = ["BuildKeys", "digest", "files_digest", "source_files", "tool_versions"]

_TOOLS = (
    "torch",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "transformers",
    "tokenizers",
    "numpy",
    "nvidia-modelopt",
    "triton",
)


_SOURCES = {".py", ".c", ".cu", ".cuh", ".cpp", ".h"}


@dataclass(frozen=True)
class BuildKeys:
    """Digests of everything that decides what a part holds.

    Attributes:
        model: the weights, the video's size, and the types of the graphs; enough for text encoder, conditioner and
            decoder.
        graphs: the attention variant too; enough for the step graphs.
        engines: model and target; enough for engines of components that are never quantized.
        build: everything.
    """

    model: str
    graphs: str
    engines: str
    build: str

    @classmethod
    def of(cls, request: BuildRequest, plan: StepPlan, digests: Mapping[str, str]) -> BuildKeys:
        """The keys of a request, given the digests of its weights' files."""
        model = digest(
            plan.preset,
            plan.height,
            plan.width,
            graph_types(request),
            request.weights.seed,
            sorted(digests.items()),
            sorted(_deciding_versions().items()),
            _source_digest(),
        )
        graphs = digest(model, plan.fingerprint(), request.per_chunk)
        engines = digest(model, request.backend, request.target.model_dump(), _compilers(request.backend))
        quantization = request.quantization
        calibration = quantization.calibration
        build = digest(
            graphs,
            engines,
            request.precision,
            request.execution,
            request.embedded,
            request.with_encoder,
            quantization.static,
            quantization.skip,
            quantization.search,
            None if calibration is None else bundle.hash_file(calibration),
        )
        return cls(model, graphs, engines, build)


def digest(*parts: object) -> str:
    """A key of values whose representations tell them apart."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@cache
def _source_digest() -> str:
    """Digest of the code and data that decide what a bundle holds, so that a resumed build never mixes two versions."""
    # Of the runtime only `runtime.bundle`: manifests, weights files and golden vectors are what it defines.
    folders = [Path(package.__path__[0]) for package in (lightforcing_ref, plugins)]
    folders.append(Path(inspect.getfile(bundle)).parent)
    folders.append(Path(__file__).parents[1])
    files = [path for folder in folders for path in source_files(folder)]
    files += Path(engine_data.__path__[0], "expectations").glob("*.toml")
    return files_digest(files)


def source_files(folder: Path) -> list[Path]:
    """The code in a folder and below it."""
    return [path for path in folder.rglob("*") if path.suffix in _SOURCES]


def files_digest(files: Iterable[Path]) -> str:
    """Digest of the contents of files, whose paths give the order and nothing else."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _deciding_versions() -> dict[str, str]:
    """The versions that tell builds apart. Not Python's patch level: parts that were compiled on one machine are taken
    over on another, whose Python seldom is the same to the last digit.
    """
    versions = {name: version for name, version in tool_versions().items() if name in _TOOLS}
    return {**versions, "python": ".".join(platform.python_version_tuple()[:2])}


def _compilers(name: BackendName) -> tuple[str | None, ...]:
    """What compiles a backend's engines: its library; and the driver, where engines are timed on the GPU they are for.

    Packages of Inductor are compiled on one machine and finished on another, so that no driver decides what they are.
    """
    library = BACKENDS[name].library
    version = None if library is None else library.version
    return (version, driver_version()) if name == "tensorrt" else (version,)


def tool_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a bundle's contents depend on, of those that are installed."""
    versions = {"python": platform.python_version()}
    compilers = (backend.library for backend in BACKENDS.values() if backend.library is not None)
    for name in (*_TOOLS, *(name for library in compilers for name in library.distributions)):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
