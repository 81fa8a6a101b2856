"""What a model's precisions cost, on a machine with no GPU: bf16, fp8 and nvfp4 against the reference in float32.

bf16 and fp8 run as the graphs that a GPU's engines are made from, through their float32 twins on ONNX Runtime: weights
and scales are the rounded ones, activations are rounded where the graph quantizes them, and not to bfloat16 elsewhere.
NVFP4 runs in no ONNX Runtime; there the PyTorch model computes what the graph would, with the same numbers.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.logger import G_LOGGER
from torch import Tensor

from export.errors import ComparisonError
from export.graph.components import component_of, write_conditioner, write_step
from export.graph.float32_twin import float32_twin
from export.graph.modules import merge_qkv
from export.graph.tracing import save_model
from export.graph.variants import clean_graph
from export.quantize.cost import fake_quantized, layer_errors
from export.quantize.formats import (
    ORT_SESSION_CONFIG,
    choose_formats,
    linear_names,
    quantize,
    save_quantized,
)
from export.quantize.graph import KINDS, is_block_linear
from export.quantize.numerics import Format
from export.quantize.trial import Trial, block_linears
from export.request.geometry import StepPlan
from export.tolerances import FORWARD, LINEAR
from lightforcing_ref.model import CausalWanModel
from lightforcing_ref.rollout import Rollout
from runtime.bundle import Bundle, Component, Manifest, load_bundle

from .against_reference import (
    SEED,
    Measured,
    TorchRunner,
    decoded,
    facts_of,
    frames_row,
    layer_plot,
    measure,
    reference_embedding,
    step_function,
    step_plot,
)
from .reference import Feed, GraphRollout, Reference, step_feeds, variant_of
from .result import Comparison, Film, Plot, Row, Series, difference

__all__ = ["Compared", "compare_precisions"]

Compared = Literal["bf16", "fp8", "nvfp4"]

Run = Callable[[Feed], dict[str, NDArray[Any]]]


@dataclass(frozen=True)
class _WithModel(Reference):
    """The reference with another transformer in place of its own."""

    transformer: CausalWanModel

    @property
    def model(self) -> CausalWanModel:
        return self.transformer


@dataclass(frozen=True)
class _Execution:
    """One precision, ready to run: the step for Polygraphy, and a rollout from a prompt's embedding."""

    runner: BaseRunner
    rollout: Callable[[Tensor], Rollout]


def compare_precisions(
    path: Path,
    precisions: Sequence[Compared],
    *,
    chunks: int = 3,
    tolerance: float | None = None,
    reference: Reference | None = None,
) -> Comparison:
    """Compare what the model of the bundle at `path` computes in `precisions` with the reference in float32.

    The bundle may be for any target: its model, variant and weights are what counts, not its engines.

    Args:
        chunks: length of the rollouts.
        tolerance: largest relative L2 error of all rows; None = `FORWARD` of `export.tolerances`, `LINEAR` for linears.
        reference: the model with the bundle's weights; None = rebuilt from the seed that the manifest names.

    Raises:
        BundleError: the bundle cannot be used.
        ComparisonError: the reference's weights are needed and were not given.
    """
    G_LOGGER.module_severity = G_LOGGER.ERROR
    bundle = load_bundle(path)
    reference = reference or Reference.of(bundle.manifest)
    with tempfile.TemporaryDirectory(prefix="precisions-") as folder:
        return _Study(bundle, reference, Path(folder), chunks, tolerance).compare(precisions)


class _Study:
    def __init__(
        self, bundle: Bundle, reference: Reference, folder: Path, chunks: int, tolerance: float | None
    ) -> None:
        self.bundle, self.manifest, self.reference = bundle, bundle.manifest, reference
        self.folder, self.chunks, self.tolerance = folder, chunks, tolerance
        self.plan = _plan(self.manifest, reference)
        self.embedding = reference_embedding(bundle, reference)
        # Weights as engines hold them; the exporter merges projections in place, so each use has its own copy.
        rounded = copy.deepcopy(reference.model).to(torch.bfloat16)
        self.rounded = copy.deepcopy(rounded).float()
        merge_qkv(self.rounded)
        write_conditioner(folder, rounded)
        write_step(folder, rounded, self.plan, per_chunk=False)

    def compare(self, precisions: Sequence[Compared]) -> Comparison:
        reference, manifest = self.reference, self.manifest
        clean_step = manifest.schedule.clean_step
        feeds = [f for _, step, f in step_feeds(reference, manifest, self.chunks) if step != clean_step]
        expected = self._latents(reference.rollout(manifest, self.embedding, SEED))
        films = [Film("float32 (reference)", decoded(reference, expected))]
        latents: dict[Compared, Tensor] = {}
        measured: dict[str, Measured] = {}
        rows, plots = self._linears(precisions)
        for precision in precisions:
            with ExitStack() as stack:
                execution = self._execution(precision, stack)
                measured[precision] = measure(
                    [self._reference_runner, execution.runner],
                    feeds,
                    scope="step",
                    name=precision,
                    tolerance=self._limit(precision),
                )
                latents[precision] = self._latents(execution.rollout(self.embedding))
            films.append(Film(precision, decoded(reference, latents[precision])))
        rows += [entry.row for entry in measured.values()]
        rows += self._rollouts(expected, latents, films)
        plots += [step_plot(self.bundle, measured), layer_plot(self.bundle, measured)]
        plots.append(self._by_chunk(expected, latents))
        return Comparison(
            title=f"{manifest.name}: {', '.join(precisions)} against float32",
            bundle=manifest.name,
            facts={**facts_of(self.bundle), "chunks": str(self.chunks)},
            tools=manifest.provenance.tools,
            rows=rows,
            plots=plots,
            films=films,
        )

    def _limit(self, precision: Compared) -> float:
        return FORWARD[precision] if self.tolerance is None else self.tolerance

    def _latents(self, rollout: Rollout) -> Tensor:
        """Clean latents of a rollout, `[channels, frames, h, w]`."""
        return torch.cat(list(rollout.stream(self.chunks)), dim=1)

    @cached_property
    def _reference_runner(self) -> BaseRunner:
        """The reference's step; it computes each forward once, for all precisions."""
        function = step_function(self.reference.step_module(self.manifest))
        known: dict[tuple[int, int], dict[str, Tensor]] = {}

        def run(feed: Feed) -> dict[str, Tensor]:
            key = int(feed["chunk"]), int(feed["step"])
            if key not in known:
                known[key] = function(feed)
            return known[key]

        return TorchRunner(run, self._component("step.onnx"))

    def _component(self, file: str) -> Component:
        """Names and shapes of a graph's tensors; values are exchanged in float32 whatever the graph's own type."""
        component = component_of(self.folder, file)

        def wide(specs: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(
                s.model_copy(update={"dtype": "float32"}) if s.dtype == "bfloat16" else s for s in specs
            )

        return component.model_copy(
            update={"inputs": wide(component.inputs), "outputs": wide(component.outputs)}
        )

    # ---- executions ----

    def _execution(self, precision: Compared, stack: ExitStack) -> _Execution:
        if precision == "nvfp4":
            return self._in_pytorch(precision, stack)
        step, conditioner = self._twin("step", precision), self._twin("conditioner", precision)
        clean = self.folder / f"clean_{precision}.onnx"
        save_model(clean_graph(ir.load(step), self.plan.schedule.clean_step), clean)
        sessions = {"step": _session(step), "clean": _session(clean), "conditioner": _session(conditioner)}
        runs = {name: _run_of(session) for name, session in sessions.items()}

        def rollout(embedding: Tensor) -> Rollout:
            base = self.reference.rollout(self.manifest, embedding, SEED)
            return GraphRollout(base, self.manifest, **runs)

        return _Execution(OnnxrtRunner(sessions["step"]), rollout)

    def _twin(self, name: str, precision: Compared) -> Path:
        """Write the float32 twin of a component in `precision`."""
        model = ir.load(self.folder / f"{name}.onnx")
        if precision != "bf16":
            quantize(model, choose_formats(linear_names(model), precision))
        path = self.folder / f"{name}_{precision}.onnx"
        save_quantized(float32_twin(model), path, f"{path.stem}.weights")
        return path

    def _in_pytorch(self, precision: Literal["nvfp4"], stack: ExitStack) -> _Execution:
        """The quantized model in PyTorch while `stack` is open."""
        stack.enter_context(fake_quantized(self.rounded, self._formats(precision)))
        model = _WithModel(self.reference.weights, self.rounded)
        function = step_function(model.step_module(self.manifest))
        return _Execution(
            TorchRunner(function, self._component("step.onnx")),
            lambda embedding: model.rollout(self.manifest, embedding, SEED),
        )

    def _formats(self, precision: Literal["fp8", "nvfp4"]) -> dict[str, Format]:
        return choose_formats(block_linears(self.rounded), precision)

    # ---- findings ----

    def _linears(self, precisions: Sequence[Compared]) -> tuple[list[Row], list[Plot]]:
        """The output error of every block linear: a row for each kind, with its worst layer, and a plot."""
        quantized: list[Literal["fp8", "nvfp4"]] = [p for p in precisions if p != "bf16"]
        if not quantized:
            return [], []
        trial = Trial(self.plan, (self.embedding,), chunks=self.chunks, seed=SEED)
        needed: tuple[Format, ...] = ("fp8", "nvfp4") if "nvfp4" in quantized else ("fp8",)
        errors = layer_errors(self.rounded, trial, needed)
        rows, plots = [], []
        for precision in quantized:
            series = []
            for kind, names in _by_kind(errors).items():
                format = self._formats(precision)[names[0]]
                found = {name: errors[name][format] for name in names}
                worst = max(names, key=lambda name: (found[name] != found[name], found[name]))
                limit = LINEAR[format] if self.tolerance is None else self.tolerance
                layer = f"layer {names.index(worst)}"
                rows.append(
                    Row("linear", f"{precision}: {kind}", len(names), layer, found[worst], None, limit)
                )
                series.append(Series(f"{kind} ({format})", tuple(_finite(value) for value in found.values())))
            labels = tuple(str(layer) for layer in range(self.manifest.model.layers))
            plots.append(Plot(f"{precision}: error of each linear's output", labels, tuple(series), "layer"))
        return rows, plots

    def _rollouts(
        self, expected: Tensor, latents: Mapping[Compared, Tensor], films: Sequence[Film]
    ) -> Iterator[Row]:
        pairs = zip(latents.items(), films[1:], strict=True)
        for (precision, found), film in pairs:
            limit = self._limit(precision)
            gap = difference(found.numpy(), expected.numpy(), limit)
            yield Row("rollout", precision, 1, "latents", gap.relative, gap.largest, limit)
            if precision != "bf16" and "bf16" in latents:
                gap = difference(found.numpy(), latents["bf16"].numpy(), limit)
                name = f"{precision} against bf16"
                yield Row("rollout", name, 1, "latents", gap.relative, gap.largest, limit)
            yield frames_row(precision, film, films[0], limit)

    def _by_chunk(self, expected: Tensor, latents: Mapping[Compared, Tensor]) -> Plot:
        theirs = expected.chunk(self.chunks, dim=1)
        series = []
        for precision, found in latents.items():
            pairs = zip(found.chunk(self.chunks, dim=1), theirs, strict=True)
            gaps = [difference(a.numpy(), b.numpy()).relative for a, b in pairs]
            series.append(Series(precision, tuple(map(_finite, gaps))))
        labels = tuple(map(str, range(self.chunks)))
        return Plot("Error of a rollout's latents", labels, tuple(series), "chunk")


def _by_kind(names: Mapping[str, object]) -> dict[str, list[str]]:
    """Linears by kind, each in the order of layers."""
    return {kind: [name for name in names if is_block_linear(name) == kind] for kind in KINDS}


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    for key, value in ORT_SESSION_CONFIG.items():
        options.add_session_config_entry(key, value)
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _run_of(session: ort.InferenceSession) -> Run:
    inputs = [entry.name for entry in session.get_inputs()]
    outputs = [entry.name for entry in session.get_outputs()]

    def run(feed: Feed) -> dict[str, NDArray[Any]]:
        values = session.run(outputs, {name: np.asarray(feed[name], order="C") for name in inputs})
        return dict(zip(outputs, values, strict=True))

    return run


def _plan(manifest: Manifest, reference: Reference) -> StepPlan:
    """The plan that the bundle's manifest was written from."""
    sparsity, attention, model = manifest.sparsity, manifest.attention, manifest.model
    plan = StepPlan.of(
        reference.preset,
        variant_of(manifest),
        model.video_height,
        model.video_width,
        block_q=attention.block_q,
        block_k=attention.block_k,
    )
    if plan.spec.keep_q20 != sparsity.keep_q20 or plan.schedule.timesteps != manifest.schedule.timesteps:
        raise ComparisonError(
            f"{manifest.name} has another sparsity table or schedule than this version gives its settings; rebuild it"
        )
    return plan
