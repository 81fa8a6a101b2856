"""Building a bundle: the backend's parts in turn, resumable, published when complete."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import engines
import lightforcing_ref
import plugins
from runtime import bundle

from . import components
from .builder import Builder, Built, Run
from .errors import BuildError
from .onnx_parts import graph_types
from .plan import StepPlan
from .preflight import check_disk
from .progress import ProgressCallback
from .request import BuildRequest
from .targets import BackendName
from .workspace import open_workspace

__all__ = ["BuildRequest", "build_bundle", "export_onnx"]

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
    "tensorrt-rtx-cu13",
    "triton",
)


# ---- backends: one entry each; their modules are imported when they are needed ----


def _onnxruntime() -> Builder:
    from .ort_bundle import BUILDER

    return BUILDER


_BUILDERS: Mapping[BackendName, Callable[[], Builder]] = {
    "onnxruntime": _onnxruntime,
}


# ---- the build ----


def _no_progress(part: str, done: float, total: float) -> None:
    pass


def build_bundle(request: BuildRequest, progress: ProgressCallback = _no_progress) -> Path:
    """Build the bundle `request.out / request.name` and return its folder.

    Finished parts of an interrupted build of the same request are taken over. The bundle appears, or replaces an
    older one of the same name, when it is complete.

    Raises:
        BuildError: no room, a folder in the way, another build of this bundle under way, or an engine that is not
            what it should be.
        CheckpointError: a checkpoint cannot be read or belongs to another model.
        ConfigError: the variant does not fit the model.
        InputError: the backend cannot build this.
    """
    plan, builder = request.plan, _builder(request.backend)
    check_disk(request, plan)
    builder.check(request, plan)
    digests = request.weights.digests()
    with open_workspace(request.out, request.name, _key(request, plan, digests)) as workspace:
        run = Run(workspace, request, plan, builder.parts(request, plan), progress)
        built = builder.build(run)
        run.finish("manifest")
        return workspace.publish(built.files, _manifest(run, built, digests))


def export_onnx(request: BuildRequest) -> Path:
    """Export the step graph (with `request.per_chunk` also each chunk's) to `request.out / request.name`.

    Raises:
        As `build_bundle`.
    """
    plan = request.plan
    check_disk(request, plan)
    key = _key(request, plan, request.weights.digests())
    dtype = graph_types(request).transformer
    with open_workspace(request.out, request.name, key, marker="step.onnx") as workspace:
        files, _ = workspace.component(
            "transformer",
            lambda into: components.write_step(
                into, request.weights.dit(dtype), plan, per_chunk=request.per_chunk
            ),
        )
        return workspace.publish(files)


def _builder(backend: BackendName) -> Builder:
    if backend not in _BUILDERS:
        raise BuildError(
            f"this version does not build for {backend}; it builds for {', '.join(_BUILDERS)} (--backend)"
        )
    return _BUILDERS[backend]()


# ---- what identifies a build ----


def _source_digest() -> str:
    """Digest of the code that decides what a bundle holds, so that a resumed build never mixes two versions."""
    digest = hashlib.sha256()
    folders = [Path(package.__path__[0]) for package in (lightforcing_ref, plugins)]
    files = [path for folder in folders for path in folder.rglob("*.py")]
    files += Path(__file__).parent.glob("*.py")
    files += Path(engines.__path__[0], "expectations").glob("*.toml")
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _tools() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _TOOLS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _key(request: BuildRequest, plan: StepPlan, digests: dict[str, str]) -> str:
    quantization = request.quantization
    calibration = quantization.calibration
    parts = (
        plan.fingerprint(),
        request.target.model_dump(),
        request.backend,
        request.precision,
        request.weights.seed,
        request.per_chunk,
        request.execution,
        request.embedded,
        quantization.static,
        quantization.skip,
        calibration and bundle.hash_file(calibration),
        sorted(digests.items()),
        sorted(_tools().items()),
        _source_digest(),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


# ---- the manifest ----


def _manifest(run: Run, built: Built, digests: dict[str, str]) -> bundle.Manifest:
    request, plan, weights = run.request, run.plan, run.request.weights
    text, dit = plan.preset.text, plan.preset.dit
    decoder = run.models.decoder(graph_types(request).decoder)
    caches = decoder.cache_specs(*plan.latent_size)
    if weights.checkpoint is None:
        origin: bundle.RandomInit | bundle.Checkpoint = bundle.RandomInit(random=weights.seed or 0)
    else:
        origin = bundle.Checkpoint(source=weights.checkpoint.name, sha256=digests["checkpoint"])
    return bundle.Manifest(
        name=request.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        target=bundle.Target(name=request.target.name, compute_capability=request.target.compute_capability),
        backend=request.backend,
        precision=request.precision,
        library=built.library,
        variant=request.variant.name,
        status=built.status,
        **plan.manifest_sections(),
        text=bundle.Text(
            encoder="umt5",
            text_len=dit.text_len,
            dim=dit.text_dim,
            vocab=text.vocab,
            layers=text.layers,
            heads=text.heads,
            eps=text.eps,
            tokenizer=components.TOKENIZER,
            weights=components.TEXT_WEIGHTS,
            pad_id=text.pad_id,
            eos_id=text.eos_id,
        ),
        vae=bundle.Vae(
            caches=tuple(bundle.VaeCache(name=c.name, shape=c.shape, dtype=built.vae_dtype) for c in caches),
            temporal_factor=decoder.config.temporal_factor,
            spatial_factor=decoder.config.spatial_factor,
        ),
        components=dict(built.components),
        segments=built.segments,
        kernels=built.kernels,
        quantization=built.quantization,
        files=tuple(built.files),
        provenance=bundle.Provenance(checkpoint=origin, tools=_tools(), command=request.command),
    )
