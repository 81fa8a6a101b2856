"""Building a bundle: the backend's parts in turn, resumable, published when complete."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from export.estimate.memory import MemoryPlan
from export.graph import components
from export.parts.golden import write_golden
from export.parts.golden_persistent import PersistReference, persist_component
from export.parts.golden_reference import GoldenGraph
from export.parts.keys import BuildKeys, tool_versions
from export.parts.run import Builder, Built, Run
from export.parts.workspace import open_workspace
from export.quantize.decision import QuantizationPlan
from export.request.graph_types import graph_types
from export.request.methods import check_backend, check_products, operator_of
from export.request.request import BuildRequest
from export.request.targets import BackendName
from export.request.weights import Weights
from lightforcing_ref.dimensions import DecoderConfig, TAEConfig
from plugins.contract import HIERARCHICAL_SPARSE_ATTENTION
from runtime import bundle
from runtime.bundle.policies import has_linear_branch
from runtime.files import temporary_folder

from .errors import InputError
from .preflight import check_disk, check_memory, check_target_memory
from .progress import ProgressCallback

__all__ = ["BuildRequest", "CheckedBuild", "build_bundle", "check_build", "compile_bundle", "export_onnx"]

_GOLDEN = "golden vectors"
"""The part, and the manifest's section, kept beside a build in progress."""


# ---- backends: one entry each; their modules are imported when they are needed ----


def _onnxruntime() -> Builder:
    from export.backends.onnxruntime import BUILDER

    return BUILDER


def _tensorrt_rtx() -> Builder:
    from export.backends.tensorrt_rtx.bundle import BUILDER

    return BUILDER


def _tensorrt() -> Builder:
    from export.backends.tensorrt.bundle import BUILDER

    return BUILDER


def _inductor() -> Builder:
    from export.backends.inductor.bundle import BUILDER

    return BUILDER


_BUILDERS: Mapping[BackendName, Callable[[], Builder]] = {
    "onnxruntime": _onnxruntime,
    "tensorrt-rtx": _tensorrt_rtx,
    "tensorrt": _tensorrt,
    "inductor": _inductor,
}


# ---- the build ----


def _no_progress(part: str, done: float, total: float) -> None:
    pass


@dataclass(frozen=True)
class CheckedBuild:
    """A request that can be built here, with what was worked out to know that.

    Attributes:
        memory: on the target, for one session.
        quantization: None where nothing is quantized.
    """

    request: BuildRequest
    memory: MemoryPlan
    quantization: QuantizationPlan | None


def check_build(request: BuildRequest) -> CheckedBuild:
    """Refuse what cannot be built, before any long work. `build_bundle` takes the result, or does so itself.

    Raises:
        InputError: the backend or the method has no keys and values in fp8, or the target does not multiply them;
            besides, as `build_bundle`.
    """
    temporary_folder()
    plan = request.plan
    _check_variant(request)
    if plan.spec.kv is not None and request.backend == "tensorrt":
        raise InputError(
            "the plugin of the backend tensorrt holds keys and values in the type that the model computes in; drop "
            "--kv fp8, or use --backend inductor, tensorrt-rtx or onnxruntime"
        )
    operator = operator_of(request.variant.attention)
    if plan.spec.kv is not None and operator != HIERARCHICAL_SPARSE_ATTENTION:
        raise InputError(
            f"the policy {request.variant.attention.policy} ({operator}) is not there over keys and values in fp8; "
            "drop --kv fp8, or use --policy hsa"
        )
    quantization = _BUILDERS[request.backend]().check(request, plan)
    memory = check_target_memory(request)
    check_memory(request, plan)
    check_disk(request, plan)
    request.weights.check(with_encoder=request.with_encoder)
    return CheckedBuild(request, memory, quantization)


def _check_variant(request: BuildRequest) -> None:
    """Refuse a variant that the backend, its kernels or the target do not execute.

    Raises:
        InputError: they do not.
    """
    check_products(request.target, request.variant)
    check_backend(
        request.variant.attention, request.backend, request.execution, kernels=request.launches_kernels
    )
    _check_rollout(request)
    _check_linear_branch(request)


def _check_linear_branch(request: BuildRequest) -> None:
    """Refuse weights that were trained with SLA's linear branch under a method without it, and the opposite.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        InputError: weights and method do not belong together.
    """
    method, weights = request.variant.attention, request.weights
    if has_linear_branch(method) and not weights.transformer.linear_branch:
        raise InputError(
            f"the variant {request.variant.name} asks for SLA's linear branch, and {weights.checkpoint} has no "
            "projection for it (blocks.N.self_attn.proj_l); drop linear = true, or give a checkpoint that was trained "
            "with it"
        )
    if weights.transformer.linear_branch and not has_linear_branch(method):
        raise InputError(
            f"{weights.checkpoint} was trained with SLA's linear branch (blocks.N.self_attn.proj_l), which the policy "
            f"{method.policy} does not run; use --policy sla, or a checkpoint without it"
        )


def _check_rollout(request: BuildRequest) -> None:
    """Refuse what a rollout's forwards cannot be made of.

    Raises:
        InputError: the request asks for it.
    """
    if request.variant.cache.recache == "joint" and request.execution != "segmented":
        raise InputError(
            f"the variant {request.variant.name} recomputes all cached frames in one forward at a prompt switch; in it "
            "chunks take turns in every layer, so the step must be cut into segments; use --execution segmented, with "
            "--backend tensorrt-rtx, inductor or onnxruntime, or recompute them chunk by chunk: --recache window"
        )
    if not request.variant.schedule.rolling:
        return
    if request.execution != "segmented":
        raise InputError(
            f"the variant {request.variant.name} denoises {request.variant.schedule.window_chunks} chunks in a step; "
            "they take turns in every layer, so the step must be cut into segments; use --execution segmented, with "
            "--backend tensorrt-rtx, inductor or onnxruntime"
        )
    if request.variant.cache.kv is not None:
        raise InputError(
            f"the variant {request.variant.name} denoises several chunks in a forward, whose keys and values are there "
            "in the compute type only; drop --kv fp8"
        )
    for asked, option in ((request.per_chunk, "--per-chunk"), (request.with_encoder, "--with-encoder")):
        if asked:
            raise InputError(
                f"the variant {request.variant.name} denoises several chunks in a forward, beginning with nothing, and "
                f"{option} is for one chunk after the other; leave it out"
            )


def build_bundle(request: BuildRequest | CheckedBuild, progress: ProgressCallback = _no_progress) -> Path:
    """Build the bundle `request.out / request.name` and return its folder.

    Finished parts of an interrupted build of the same request are taken over. The bundle appears, or replaces an
    older one of the same name, when it is complete.

    Raises:
        BuildError: no room on the disk or in memory, a folder in the way, another build of this bundle under way, or
            an engine that is not what it should be.
        CheckpointError: a checkpoint cannot be read or belongs to another model.
        ConfigError: the variant does not fit the model.
        InputError: the backend cannot build this.
        OSError: there is no folder for temporary files.
    """
    checked = request if isinstance(request, CheckedBuild) else check_build(request)
    request = checked.request
    plan, builder = request.plan, _BUILDERS[request.backend]()
    digests = request.weights.digests()
    keys = BuildKeys.of(request, plan, digests)
    with open_workspace(request.out, request.name, keys.build) as workspace:
        parts = {**builder.parts(request, plan), **({_GOLDEN: 70.0} if builder.golden else {})}
        run = Run(workspace, request, plan, keys, parts, progress, checked.quantization)
        built = _with_persist(run, builder.build(run))
        if builder.golden:
            built = _with_golden(run, built)
        run.finish("manifest")
        return workspace.publish(built.files, _manifest(run, built, digests))


def compile_bundle(request: BuildRequest, progress: ProgressCallback = _no_progress) -> Path:
    """Make the parts of a bundle that hold no weights, and leave them in the folder from which `build_bundle` resumes.

    They are small and the same for all weights, and can be taken to another machine, where the same request is built.

    Returns:
        that folder.

    Raises:
        As `build_bundle`; InputError also where the backend has no such parts.
    """
    temporary_folder()
    plan, builder = request.plan, _BUILDERS[request.backend]()
    _check_variant(request)
    if builder.compile is None:
        raise InputError(
            f"the {request.backend} backend has no parts that do without weights; build the bundle"
        )
    quantization = builder.check(request, plan)
    keys = BuildKeys.of(request, plan, request.weights.digests())
    with open_workspace(request.out, request.name, keys.build) as workspace:
        parts = builder.parts(request, plan)
        builder.compile(Run(workspace, request, plan, keys, parts, progress, quantization))
        return workspace.folder


def _with_persist(run: Run, built: Built) -> Built:
    """What was built, and what updates the persistent set, if there is one; every backend has the same."""
    if not run.plan.spec.persistent_frames or bundle.PERSIST in built.components:
        return built
    component = persist_component(built.components["step"], run.plan.spec.persistent_frames)
    return replace(built, components={**built.components, bundle.PERSIST: component})


def _without_graphs(run: Run, built: Built) -> dict[str, GoldenGraph]:
    """The references of components that no ONNX graph computes."""
    component = built.components.get(bundle.PERSIST)
    return {} if component is None else {bundle.PERSIST: PersistReference(component, run.plan)}


def _with_golden(run: Run, built: Built) -> Built:
    """What was built, with the golden vectors of its components."""
    section, own = run.section(
        _GOLDEN,
        bundle.Golden,
        lambda folder: write_golden(
            folder,
            built.graphs,
            run.plan.schedule,
            segments=built.segments,
            others=_without_graphs(run, built),
            progress=run.within,
        ),
    )
    return replace(built, files=[*built.files, *own], golden=section)


def export_onnx(request: BuildRequest) -> Path:
    """Export the step graph (with `request.per_chunk` also each chunk's) to `request.out / request.name`.

    Raises:
        As `build_bundle`.
    """
    plan = request.plan
    check_memory(request, plan)
    check_disk(request, plan)
    keys = BuildKeys.of(request, plan, request.weights.digests())
    dtype = graph_types(request).transformer
    with open_workspace(request.out, request.name, keys.graphs, marker="step.onnx") as workspace:
        files, _ = workspace.component(
            "transformer",
            lambda into: components.write_step(
                into, request.weights.dit(dtype), plan, per_chunk=request.per_chunk
            ),
        )
        return workspace.publish(files)


# ---- the manifest ----


def _manifest(run: Run, built: Built, digests: dict[str, str]) -> bundle.Manifest:
    request, plan, weights = run.request, run.plan, run.request.weights
    text, dit = plan.preset.text, plan.preset.dit
    decoder = run.models.decoder(graph_types(request).decoder)
    lying = {spec.name: spec for spec in built.components["vae_next"].inputs}
    caches = [lying[cache.name] for cache in decoder.cache_specs(*plan.latent_size)]
    if weights.checkpoint is None:
        origin: bundle.RandomInit | bundle.Checkpoint = bundle.RandomInit(random=weights.seed or 0)
    else:
        loras = [
            bundle.MergedLora(
                source=name, sha256=digests[f"lora.{index}"], strength=weights.loras[index].strength
            )
            for index, name in enumerate(weights.lora_sources)
        ]
        origin = bundle.Checkpoint(
            source=weights.source,
            sha256=digests["checkpoint"],
            section=weights.section,
            lora=loras[0] if loras else None,
            further_loras=tuple(loras[1:]),
        )
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
            words=weights.words,
        ),
        vae=bundle.Vae(
            caches=tuple(
                bundle.VaeCache(name=c.name, shape=tuple(int(dim) for dim in c.shape), dtype=c.dtype)
                for c in caches
            ),
            temporal_factor=decoder.config.temporal_factor,
            spatial_factor=decoder.config.spatial_factor,
            **_decoder_kind(decoder.config),
        ),
        components=dict(built.components),
        segments=built.segments,
        kernels=built.kernels,
        quantization=built.quantization,
        golden=built.golden,
        files=tuple(built.files),
        provenance=bundle.Provenance(
            checkpoint=origin,
            files=_sources(weights, digests),
            tools=tool_versions(),
            command=request.command,
        ),
    )


def _sources(weights: Weights, digests: Mapping[str, str]) -> dict[Any, bundle.SourceFile]:
    """What the decoder, the text encoder and the tokenizer were made from, by role."""
    return {
        role: bundle.SourceFile(source=name, sha256=digests[role])
        for role, name in weights.other_sources.items()
    }


def _decoder_kind(config: DecoderConfig) -> dict[str, Any]:
    if isinstance(config, TAEConfig):
        kind = {"kind": "tae", "denormalise": config.denormalise, "pixel_range": (0.0, 1.0)}
    else:
        kind = {"kind": "wan", "denormalise": True, "pixel_range": (-1.0, 1.0)}
    return {**kind, "widths": config.widths}
