"""The tensorrt backend: the whole step in one engine, the operators as plugins inside it; built on the target GPU.

Every engine is run on that GPU against golden vectors before the bundle is complete; the errors are in the manifest.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import onnx_ir as ir

from export.errors import BuildError, InputError
from export.graph import components
from export.graph.variants import clean_graph
from export.parts.golden import write_golden
from export.parts.graphs import export_graphs, graph_parts
from export.parts.kernels import kernel_variants, kernels_part
from export.parts.run import Builder, Built, BuiltEngine, Run
from export.quantize.decision import ErrorLog, QuantizationPlan, decide_formats, plan_quantization
from export.quantize.formats import linear_names, quantize, save_quantized
from export.quantize.numerics import Format
from export.request.geometry import StepPlan
from export.request.request import BuildRequest
from plugins import contract
from plugins.compile.libraries import find_plugin
from runtime import bundle

from .engine import TrtMachine, TrtPlugin, build_engine, find_machine, inspector_name, measure_engine

__all__ = ["BUILDER"]

_ENGINES: Mapping[str, float] = {
    "vae_first": 60.0,
    "text_encoder": 30.0,
    "conditioner": 30.0,
    "vae_next": 60.0,
    "clean": 240.0,
    "step": 300.0,
}
"""Engines with their rough efforts, cheap ones that fail early first."""

_WITH_OPERATORS = ("step", "clean")
_OPERATORS = [contract.HIERARCHICAL_SPARSE_ATTENTION, contract.QK_PREPARE]


def _engines(request: BuildRequest) -> Mapping[str, float]:
    encoder = dict.fromkeys(bundle.ENCODER_COMPONENTS, 60.0) if request.with_encoder else {}
    return {**encoder, **_ENGINES}


def _find_plugin() -> Path:
    found = find_plugin()
    if found is None:
        raise BuildError(
            "there is no plugin library, without which TensorRT cannot run the attention; build it with 'python -m "
            "plugins build --tensorrt'"
        )
    return found


def _machine(request: BuildRequest) -> TrtMachine:
    return find_machine(request.target.name, request.target.compute_capability, request.precision)


def _check(request: BuildRequest, plan: StepPlan) -> QuantizationPlan | None:
    if request.execution != "whole":
        raise InputError("the tensorrt backend builds the step as one engine; use --execution whole")
    if request.per_chunk:
        raise InputError("--per-chunk writes graphs for onnxruntime; drop it, or use --backend onnxruntime")
    _machine(request)
    _find_plugin()
    kernel_variants(request.target, plan)
    return plan_quantization(request, plan)


def _parts(request: BuildRequest, plan: StepPlan) -> Mapping[str, float]:
    del plan
    engines = {f"engine {name}": effort for name, effort in _engines(request).items()}
    return {
        **graph_parts(request),
        "quantization": 60.0,
        "plugin": 1.0,
        "kernels": 25.0,
        **engines,
        "golden vectors": 300.0,
        "comparison": 60.0,
    }


def _build(run: Run) -> Built:
    folder, request = run.folder, run.request
    machine = _machine(request)
    exported = export_graphs(run)
    plan = run.quantization
    quantized, _ = run.section("quantization", _Quantized, lambda into: _quantize(into, run, plan))
    plugin_files = run.part("plugin", _copy_plugin)
    plugin = TrtPlugin.at(folder / plugin_files[0].path)
    # Attention is inside the engines; the runtime still commits frames into the cache, and turns sinks.
    kernels, images = kernels_part(run)

    files = [*exported["tokenizer"], *plugin_files, *images]
    files += [entry for entry in exported["text encoder"] if entry.path == components.TEXT_WEIGHTS]
    graphs = {name: folder / quantized.graphs.get(name, f"{name}.onnx") for name in _engines(request)}
    entries: dict[str, bundle.Component] = {}
    version = machine.version
    for name in _engines(request):
        build = partial(_write_engine, run=run, name=name, graph=graphs[name], machine=machine, plugin=plugin)
        built, written = run.section(f"engine {name}", BuiltEngine, build)
        entries[name], version = built.component, built.version
        files += written

    golden, vectors = run.section(
        "golden vectors",
        bundle.Golden,
        lambda into: write_golden(into, graphs, run.plan.schedule, progress=run.within),
    )
    files += vectors
    measured, _ = run.section(
        "comparison", dict[str, float], lambda into: ([], _compare(into, entries, golden, machine, plugin))
    )
    return Built(
        entries,
        files,
        graphs,
        status=f"built and verified on {machine.gpu.name}",
        library=bundle.Library(name="tensorrt", version=version),
        kernels=kernels,
        quantization=None if plan is None else plan.section(quantized.formats, quantized.errors),
        golden=golden.model_copy(update={"measured": measured}),
    )


@dataclass(frozen=True)
class _Quantized:
    """What the part on quantization decided: formats and errors of linears, and the graphs that it made anew."""

    formats: dict[str, Format] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    graphs: dict[str, str] = field(default_factory=dict)


def _quantize(folder: Path, run: Run, plan: QuantizationPlan | None) -> tuple[list[str], _Quantized]:
    """Quantize step and conditioner; the clean graph is cut from the quantized step and shares its weights."""
    if plan is None:
        return [], _Quantized()
    files, graphs = list[str](), dict[str, str]()
    names = ("step", "conditioner")
    models = (ir.load(folder / f"{name}.onnx") for name in names)
    formats, errors = decide_formats(plan, models, run.within)
    log = ErrorLog(plan, run.within, len(formats))
    for name in names:
        model = ir.load(folder / f"{name}.onnx")
        own = {linear: formats[linear] for linear in linear_names(model) if linear in formats}
        quantize(model, own, amax=plan.amax, importance=plan.importance, observe=log)
        graph, weights = f"{name}_quantized.onnx", f"{name}_quantized.weights"
        save_quantized(model, folder / graph, weights)
        graphs[name] = graph
        files += [graph, weights]
    clean = clean_graph(ir.load(folder / "step_quantized.onnx"), run.plan.schedule.clean_step)
    ir.save(clean, folder / "clean_quantized.onnx")
    graphs["clean"] = "clean_quantized.onnx"
    files.append("clean_quantized.onnx")
    return files, _Quantized(dict(formats), errors | log.errors, graphs)


def _copy_plugin(folder: Path) -> list[str]:
    source = _find_plugin()
    shutil.copyfile(source, folder / source.name)
    return [source.name]


def _write_engine(
    folder: Path, *, run: Run, name: str, graph: Path, machine: TrtMachine, plugin: TrtPlugin
) -> tuple[list[str], BuiltEngine]:
    engine = build_engine(
        graph,
        folder / f"{name}.engine",
        component=name,
        machine=machine,
        plugin=plugin,
        dimensions={"slots": max(1, run.plan.max_past_frames)},
        progress=run.within,
    )
    return [f"{name}.engine", inspector_name(f"{name}.engine")], engine


def _compare(
    folder: Path,
    entries: Mapping[str, bundle.Component],
    golden: bundle.Golden,
    machine: TrtMachine,
    plugin: TrtPlugin,
) -> dict[str, float]:
    """Run every engine against its golden vectors; refuse the bundle if one computes something else."""
    measured = {}
    for name, component in entries.items():
        operators = _OPERATORS if name in _WITH_OPERATORS else []
        errors = measure_engine(
            folder, name, component, golden=golden.file, machine=machine, plugin=plugin, operators=operators
        )
        measured[name] = judge(name, errors, golden.tolerances[name])
    return measured


def judge(component: str, errors: Mapping[str, float | None], tolerance: float) -> float:
    """The largest of a component's errors.

    Raises:
        BuildError: it is above the tolerance, or not finite.
    """
    worst = max(errors, key=lambda name: float("inf") if errors[name] is None else errors[name] or 0.0)
    error = errors[worst]
    if error is None or error > tolerance:
        found = "is not finite" if error is None else f"is off by {error:.1e} (relative L2)"
        raise BuildError(
            f"{component}: {worst} {found} on this GPU against ONNX Runtime, and {tolerance:.0e} is allowed; the "
            "engine computes something else. Update the driver, or use another TensorRT 11 release or --precision bf16"
        )
    return error


BUILDER = Builder(parts=_parts, build=_build, check=_check, golden=False)
