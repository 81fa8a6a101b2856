"""Building a bundle: every component in turn, resumable, published when complete."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Literal

import torch

import lightforcing_ref
import plugins
from lightforcing_ref.config import Preset
from lightforcing_ref.model import CausalWanModel
from lightforcing_ref.vae import VAEDecoder
from runtime import bundle

from . import components
from .errors import BuildError
from .plan import StepPlan
from .progress import ProgressCallback
from .segments import write_segments
from .targets import BackendName, Precision, Target, Variant
from .weights import Weights
from .workspace import open_workspace

__all__ = ["BuildRequest", "Execution", "build_bundle", "export_onnx"]

_TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "transformers", "tokenizers", "numpy")

Execution = Literal["whole", "segmented"]

_SEGMENTS = "segments.json"
"""The manifest's section on segments, kept beside a build in progress."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class BuildRequest:
    """What to build, from what, and where to put it.

    Args:
        height, width: of the video, in pixels.
        execution: the step as one graph, or cut into segments whose weights are inputs.
        seed: draws random weights; None = weights come from the files.
        command: command line, for the manifest.
    """

    target: Target
    variant: Variant
    preset: Preset
    height: int
    width: int
    backend: BackendName
    precision: Precision
    out: Path
    name: str
    seed: int | None = None
    checkpoint: Path | None = None
    lora: Path | None = None
    vae: Path | None = None
    text_encoder: Path | None = None
    tokenizer: Path | None = None
    per_chunk: bool = False
    execution: Execution = "whole"
    command: str = ""

    @property
    def plan(self) -> StepPlan:
        """The request in numbers; see `StepPlan.of` for the errors."""
        blocks = self.variant.blocks(self.target, self.preset.block)
        return StepPlan.of(
            self.preset, self.variant, self.height, self.width, block_q=blocks.query, block_k=blocks.key
        )

    @property
    def weights(self) -> Weights:
        return Weights(
            self.preset, self.seed, self.checkpoint, self.lora, self.vae, self.text_encoder, self.tokenizer
        )


def _no_progress(part: str, done: int, total: int) -> None:
    pass


def _source_digest() -> str:
    """Digest of the code that decides what a graph holds, so that a resumed build never mixes two versions."""
    digest = hashlib.sha256()
    for package in (lightforcing_ref, plugins):
        for path in sorted(Path(package.__path__[0]).glob("*.py")):
            digest.update(path.read_bytes())
    for path in sorted(Path(__file__).parent.glob("*.py")):
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
    parts = (
        plan.fingerprint(),
        request.target.model_dump(),
        request.backend,
        request.precision,
        request.seed,
        request.per_chunk,
        request.execution,
        sorted(digests.items()),
        sorted(_tools().items()),
        _source_digest(),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _check_room(out: Path, plan: StepPlan, weights: Weights, dtype: torch.dtype) -> None:
    """Refuse a build that cannot fit on the disk."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in CausalWanModel(plan.preset.dit).parameters())
    needed = parameters * dtype.itemsize
    if weights.text_encoder is not None:
        needed += weights.text_encoder.stat().st_size
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise BuildError(
            f"the weights need {needed / 2**30:.1f} GiB and {existing} has {free / 2**30:.1f} GiB free; make room or "
            "choose another --out"
        )


def build_bundle(request: BuildRequest, progress: ProgressCallback = _no_progress) -> Path:
    """Build the bundle `request.out / request.name` and return its folder.

    Finished components of an interrupted build of the same request are taken over. The bundle appears, or replaces
    an older one of the same name, when it is complete.

    Raises:
        BuildError: no room, a folder in the way, or another build of this bundle under way.
        CheckpointError: a checkpoint cannot be read or belongs to another model.
        ConfigError: the variant does not fit the model.
    """
    plan, weights, dtype = request.plan, request.weights, _DTYPES[request.precision]
    _check_room(request.out, plan, weights, dtype)
    digests = weights.digests()
    # Each model is loaded at most once, and only if something that is built needs it.
    vae_decoder, dit = cache(weights.vae_decoder), cache(partial(weights.dit, dtype))

    def tokenizer(folder: Path) -> list[str]:
        weights.write_tokenizer(folder / components.TOKENIZER)
        return [components.TOKENIZER]

    parts: dict[str, Callable[[Path], Sequence[str]]] = {
        "tokenizer": tokenizer,
        "text encoder": lambda folder: components.write_text_encoder(folder, plan, weights.text_weights()),
        "video decoder": lambda folder: components.write_vae(folder, vae_decoder(), plan),
        "conditioner": lambda folder: components.write_conditioner(folder, dit()),
        # Last, because it uses the model up.
        "transformer": lambda folder: _write_transformer(folder, request, plan, dit()),
    }
    with open_workspace(request.out, request.name, _key(request, plan, digests)) as workspace:
        files: list[bundle.FileEntry] = []
        for done, (name, build) in enumerate(parts.items()):
            progress(name, done, len(parts))
            entries, _ = workspace.component(name, build)
            files += entries
        progress("manifest", len(parts), len(parts))
        manifest = _manifest(request, plan, workspace.folder, files, vae_decoder(), digests)
        return workspace.publish(manifest.files, manifest)


def _write_transformer(
    folder: Path, request: BuildRequest, plan: StepPlan, model: CausalWanModel
) -> list[str]:
    files = components.write_step(folder, model, plan, per_chunk=request.per_chunk)
    if request.execution == "whole":
        return files
    written, section = write_segments(folder, folder / "step.onnx", components.attention_form(plan))
    (folder / _SEGMENTS).write_text(section.model_dump_json())
    return [*files, *written, _SEGMENTS]


def _manifest(
    request: BuildRequest,
    plan: StepPlan,
    folder: Path,
    files: Sequence[bundle.FileEntry],
    decoder: VAEDecoder,
    digests: dict[str, str],
) -> bundle.Manifest:
    entries = {
        Path(e.path).stem: components.component_of(folder, e.path) for e in files if e.path.endswith(".onnx")
    }
    segments = None
    if request.execution == "segmented":
        # The whole graphs were a step on the way: what stays of them is what goes in and comes out.
        segments = bundle.Segments.model_validate_json((folder / _SEGMENTS).read_text())
        entries |= {name: entries[name].model_copy(update={"file": None}) for name in ("step", "clean")}
        files = [e for e in files if e.path not in ("step.onnx", "step.weights", "clean.onnx", _SEGMENTS)]
    text, dit = plan.preset.text, plan.preset.dit
    caches = decoder.cache_specs(*plan.latent_size)
    if request.checkpoint is None:
        origin: bundle.RandomInit | bundle.Checkpoint = bundle.RandomInit(random=request.seed or 0)
    else:
        origin = bundle.Checkpoint(source=request.checkpoint.name, sha256=digests["checkpoint"])
    return bundle.Manifest(
        name=request.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        target=bundle.Target(name=request.target.name, compute_capability=request.target.compute_capability),
        backend="onnxruntime",
        precision="fp32",
        variant=request.variant.name,
        status="built",
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
            caches=tuple(bundle.VaeCache(name=c.name, shape=c.shape, dtype="float32") for c in caches),
            temporal_factor=decoder.config.temporal_factor,
            spatial_factor=decoder.config.spatial_factor,
        ),
        components=entries,
        segments=segments,
        files=tuple(files),
        provenance=bundle.Provenance(checkpoint=origin, tools=_tools(), command=request.command),
    )


def export_onnx(request: BuildRequest) -> Path:
    """Export the step graph (with `request.per_chunk` also each chunk's) to `request.out / request.name`.

    Raises:
        As `build_bundle`.
    """
    plan, weights, dtype = request.plan, request.weights, _DTYPES[request.precision]
    _check_room(request.out, plan, weights, dtype)
    key = _key(request, plan, weights.digests())
    with open_workspace(request.out, request.name, key, marker="step.onnx") as workspace:
        files, _ = workspace.component(
            "transformer",
            lambda into: components.write_step(into, weights.dit(dtype), plan, per_chunk=request.per_chunk),
        )
        return workspace.publish(files)
