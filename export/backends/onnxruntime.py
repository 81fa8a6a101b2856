"""The onnxruntime backend: the exported graphs are the engines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from export.graph import components
from export.graph.segments import write_segments
from export.parts.graphs import export_graphs, graph_parts
from export.parts.run import Builder, Built, Run
from export.quantize.decision import QuantizationPlan, plan_quantization
from export.request.geometry import StepPlan
from export.request.request import BuildRequest
from runtime import bundle

__all__ = ["BUILDER"]

_WHOLE = ("step", "clean")


def _check(request: BuildRequest, plan: StepPlan) -> QuantizationPlan | None:
    return plan_quantization(request, plan)


def _parts(request: BuildRequest, plan: StepPlan) -> Mapping[str, float]:
    segments = {"segments": 20.0} if request.execution == "segmented" else {}
    return {**graph_parts(request), **segments}


def _build(run: Run) -> Built:
    files = [entry for entries in export_graphs(run).values() for entry in entries]
    folder, section = run.folder, None
    entries = {
        Path(entry.path).stem: components.component_of(folder, entry.path)
        for entry in files
        if entry.path.endswith(".onnx")
    }
    if run.request.execution == "segmented":
        # The whole graphs were a step on the way: what stays of them is what goes in and comes out.
        files = [entry for entry in files if Path(entry.path).stem not in _WHOLE]
        section, written = run.section("segments", bundle.Segments, lambda into: _segments(into, run))
        files += written
        entries |= {name: entries[name].model_copy(update={"file": None}) for name in _WHOLE}
        entries |= {
            Path(entry.path).stem: components.component_of(folder, entry.path)
            for entry in written
            if entry.path.endswith(".onnx")
        }
    graphs = {name: folder / entry.file for name, entry in entries.items() if entry.file is not None}
    return Built(entries, files, graphs, segments=section)


def _segments(folder: Path, run: Run) -> tuple[list[str], bundle.Segments]:
    model, form = ir.load(folder / "step.onnx"), components.attention_form(run.plan)
    return write_segments(folder, model, form, embedded=run.request.embedded, progress=run.within)


BUILDER = Builder(parts=_parts, build=_build, check=_check)
