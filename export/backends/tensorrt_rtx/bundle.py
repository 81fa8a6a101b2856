"""The tensorrt-rtx backend: engines for one compute capability, kernels between them, built with no GPU.

Every engine is a part of its own, so that an interrupted build loses one at most. Beside each lies what it says about
itself, as the manifest will have it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import onnx_ir as ir

from export.errors import InputError
from export.graph import components
from export.graph.segments import write_segments
from export.parts.graphs import export_graphs, graph_parts
from export.parts.kernels import kernel_variants, kernels_part
from export.parts.run import Builder, Built, BuiltEngine, Run
from export.quantize.decision import ErrorLog, QuantizationPlan, decide_formats, plan_quantization
from export.quantize.formats import linear_names, quantize, save_quantized
from export.quantize.numerics import Format
from export.request.geometry import StepPlan
from export.request.request import BuildRequest
from runtime import bundle

from .engine import EngineInfo, EngineTensor, build_engine, check_request
from .engine_text import EngineReport
from .expectations import Expectations, Structure, decoder_kind, load_expectations

__all__ = ["BUILDER", "STATUS"]

STATUS = "built, not executed"
"""What can be said of engines that were built where they cannot run."""

_PLAN_TYPES: Mapping[Format | None, str] = {"fp8": "fp8", "nvfp4": "fp4", None: "bf16"}
"""Formats of linears -> operand types of the products in plans."""

_NEVER_QUANTIZED = frozenset({"text_encoder", "vae_first", "vae_next", *bundle.ENCODER_COMPONENTS})

_EFFORT = {"conditioner": 5.0, **dict.fromkeys(("vae_first", "vae_next", *bundle.ENCODER_COMPONENTS), 2.5)}
_SMALL_EFFORT = 1.0


# ---- before the work ----


def _check(request: BuildRequest, plan: StepPlan) -> QuantizationPlan | None:
    if request.execution != "segmented":
        raise InputError(
            "tensorrt-rtx engines hold no attention kernels (it takes no plugins), so the step cannot be one engine; "
            "use --execution segmented, or --backend tensorrt"
        )
    if request.per_chunk:
        raise InputError("--per-chunk writes graphs for onnxruntime; drop it, or use --backend onnxruntime")
    if plan.preset.dit.layers < 2:
        raise InputError(
            f"{plan.preset.name} has one layer, and segments need two; use --backend onnxruntime"
        )
    assert request.target.compute_capability is not None  # tensorrt-rtx is no CPU target's backend
    needed = {"bf16": ("bf16",), "fp8": ("bf16", "fp8"), "nvfp4": ("bf16", "fp8", "nvfp4")}
    check_request(request.target.compute_capability, *needed[request.precision])
    kernel_variants(request.target, plan)
    load_expectations(request.precision)
    return plan_quantization(request, plan)


def _engines(request: BuildRequest, plan: StepPlan) -> list[str]:
    """The components that become engines, cheap ones that fail early first."""
    layers = plan.preset.dit.layers
    segments = [f"layer.{index}" for index in range(layers - 1)] if request.embedded else ["layer"]
    engines = ["first", *segments, "last", "conditioner", "text_encoder", "vae_first", "vae_next"]
    return [*engines, *(bundle.ENCODER_COMPONENTS if request.with_encoder else ())]


def _parts(request: BuildRequest, plan: StepPlan) -> Mapping[str, float]:
    engines = {_engine(name): _EFFORT.get(name, _SMALL_EFFORT) for name in _engines(request, plan)}
    quantized = {"quantization": 12.0, "segments": 40.0}
    written = {"quantization": 0.1, "segments": 10.0}
    of_weights = written if request.precision == "bf16" else quantized
    return {**graph_parts(request), **of_weights, **engines, "kernels": 10.0}


def _engine(component: str) -> str:
    return f"engine {component}"


# ---- the work ----


def _build(run: Run) -> Built:
    request, folder = run.request, run.folder
    exported = export_graphs(run)
    plan = run.quantization
    quantized, _ = run.section("quantization", _Quantized, lambda into: _quantize(into, run, plan))
    cut, segments = run.section("segments", _Cut, lambda into: _cut(into, run, plan, quantized))
    graphs = {name: folder / f"{name}.onnx" for name in _engines(request, run.plan)}
    graphs["conditioner"] = folder / quantized.conditioner
    expectations, structure = load_expectations(request.precision), Structure.of(run.plan)
    entries: dict[str, bundle.Component] = {}
    library = None
    files = [*exported["tokenizer"], *_named(exported["text encoder"], components.TEXT_WEIGHTS)]
    files += _named(segments, cut.segments.weights)
    for name, graph in graphs.items():
        moved = _moved(plan, quantized.formats, _linears_of(name, run.plan.preset.dit.layers))
        kind = decoder_kind(name, run.plan.preset.vae)
        sizes = structure
        if name in bundle.ENCODER_COMPONENTS:
            width = request.weights.vae_encoder_config().dim
            sizes = replace(structure, pixels=request.height * request.width * width)
        check = partial(_check_plan, expectations, kind, sizes, moved)
        built, written = run.section(
            _engine(name),
            BuiltEngine,
            partial(_write_engine, run=run, name=name, graph=graph, check=check),
            key=run.keys.engines if name in _NEVER_QUANTIZED else None,
        )
        entries[name] = built.component
        library = bundle.Library(name="tensorrt-rtx", version=built.version)
        files += written
    kernels, images = kernels_part(run, scaled="channel_scale" in cut.segments.prepare[0])
    files += images
    # What comes in and goes out where no engine runs: the step as a whole, and the operators, which are kernels.
    for name in ("step", "clean", "qk_prepare", "attention"):
        entries[name] = components.component_of(folder, f"{name}.onnx").model_copy(update={"file": None})
    graphs |= {name: folder / f"{name}.onnx" for name in ("qk_prepare", "attention")}
    return Built(
        entries,
        files,
        graphs,
        status=STATUS,
        segments=cut.segments,
        library=library,
        kernels=kernels,
        quantization=None if plan is None else plan.section(quantized.formats, quantized.errors | cut.errors),
    )


def _named(entries: Sequence[bundle.FileEntry], path: str) -> list[bundle.FileEntry]:
    return [entry for entry in entries if entry.path == path]


# ---- quantization ----


@dataclass(frozen=True)
class _Quantized:
    """What the part on quantization decided: formats, the conditioner's graph, and the errors of its linears and of
    those that are left out because of theirs.
    """

    formats: dict[str, Format]
    errors: dict[str, float]
    conditioner: str


@dataclass(frozen=True)
class _Cut:
    """The manifest's section, and the errors of the step's linears."""

    segments: bundle.Segments
    errors: dict[str, float]


def _quantize(folder: Path, run: Run, plan: QuantizationPlan | None) -> tuple[list[str], _Quantized]:
    """Decide the format of every linear, and quantize the conditioner."""
    formats: Mapping[str, Format] = {}
    errors: dict[str, float] = {}
    files, conditioner = list[str](), "conditioner.onnx"
    if plan is not None:
        model = ir.load(folder / conditioner)
        models = (ir.load(folder / name) for name in ("step.onnx", "conditioner.onnx"))
        formats, errors = decide_formats(plan, models, run.within)
        names = set(linear_names(model))
        own = {name: format for name, format in formats.items() if name in names}
        conditioner, weights = "conditioner_quantized.onnx", "conditioner_quantized.weights"
        log = ErrorLog(plan, run.within, len(own))
        quantize(model, own, amax=plan.amax, importance=plan.importance, observe=log)
        save_quantized(model, folder / conditioner, weights)
        errors |= log.errors
        files += [conditioner, weights]
    return files, _Quantized(dict(formats), errors, conditioner)


def _cut(
    folder: Path, run: Run, plan: QuantizationPlan | None, quantized: _Quantized
) -> tuple[list[str], _Cut]:
    """Quantize the step and cut it; its weights are quantized as they are written."""
    model, errors = ir.load(folder / "step.onnx"), dict[str, float]()
    if plan is not None:
        names = set(linear_names(model))
        own = {name: format for name, format in quantized.formats.items() if name in names}
        log = ErrorLog(plan, run.within, len(own))
        quantize(model, own, amax=plan.amax, importance=plan.importance, observe=log)
        errors = log.errors
    form = components.attention_form(run.plan)
    files, section = write_segments(
        folder, model, form, embedded=run.request.embedded, leave_scales=True, progress=run.within
    )
    return files, _Cut(section, errors)


# ---- engines ----


def _linears_of(component: str, layers: int) -> list[str]:
    """The block linears that the engine of `component` computes."""
    before, after = ("self_attn.qkv",), ("self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")
    kind, _, index = component.partition(".")
    if kind == "first":
        return [f"blocks.0.{name}" for name in before]
    if kind == "last":
        return [f"blocks.{layers - 1}.{name}" for name in after]
    if kind == "layer":
        layer = int(index or 0)
        return [
            *(f"blocks.{layer}.{name}" for name in after),
            *(f"blocks.{layer + 1}.{name}" for name in before),
        ]
    if kind == "conditioner":
        return [f"blocks.{layer}.cross_attn.{name}" for layer in range(layers) for name in ("k", "v")]
    return []


def _moved(
    plan: QuantizationPlan | None, formats: Mapping[str, Format], linears: list[str]
) -> dict[tuple[str, str], int]:
    if plan is None:
        return {}
    moved = plan.moved(formats, linears)
    return {(_PLAN_TYPES[source], _PLAN_TYPES[to]): count for (source, to), count in moved.items()}


def _check_plan(
    expectations: Expectations,
    name: str,
    structure: Structure,
    moved: Mapping[tuple[str, str], int],
    report: EngineReport,
) -> None:
    expectations.check(name, report, structure, moved)


def _write_engine(
    folder: Path, *, run: Run, name: str, graph: Path, check: partial[None]
) -> tuple[list[str], BuiltEngine]:
    capability = run.request.target.compute_capability
    assert capability is not None
    info = build_engine(
        graph,
        folder / f"{name}.engine",
        component=name,
        compute_capability=capability,
        check=check,
        progress=run.within,
    )
    return [info.path.name], BuiltEngine(_component(info), info.version)


def _component(info: EngineInfo) -> bundle.Component:
    def specs(tensors: Sequence[EngineTensor]) -> tuple[bundle.TensorSpec, ...]:
        return tuple(bundle.TensorSpec(name=t.name, dtype=t.dtype, shape=t.shape) for t in tensors)

    cost = bundle.Cost(
        launches=len(info.report.launches),
        activation_bytes=info.report.activation_bytes,
        gemms=info.report.gemms,
        seconds=round(info.seconds, 3),
        peak_bytes=info.peak_bytes,
    )
    return bundle.Component(
        file=info.path.name, inputs=specs(info.inputs), outputs=specs(info.outputs), cost=cost
    )


BUILDER = Builder(parts=_parts, build=_build, check=_check)
