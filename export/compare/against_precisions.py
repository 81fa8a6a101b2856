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
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf
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
from export.quantize.cost import fake_quantized, layer_errors, perturbed
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
from export.tolerances import BF16_LINEAR, FORWARD, LINEAR, NOISE_FACTOR, PIXELS
from lightforcing_ref.model import CausalWanModel
from lightforcing_ref.rollout import Rollout
from runtime.bundle import Bundle, Component, Manifest, load_bundle
from runtime.files import temporary_folder

from .against_reference import (
    Measured,
    TorchRunner,
    decoded,
    facts_of,
    layer_plot,
    measure,
    reference_embedding,
    step_function,
    step_plot,
)
from .reference import Feed, GraphRollout, Reference, step_feeds, variant_of
from .result import Comparison, Film, Plot, Row, Series, difference, frames_row
from .trials import Trials, check_memory

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


@dataclass(frozen=True)
class _Limits:
    """Largest relative L2 errors: of a forward's outputs, by name or of all, of latents and of frames."""

    outputs: float | Mapping[str, float]
    latents: float
    frames: float


_COPIES = 5
"""Of the transformer in float32 that are there at once: the reference, the rounded one, three graphs."""


def compare_precisions(
    path: Path,
    precisions: Sequence[Compared],
    *,
    chunks: int = 3,
    prompts: Sequence[str] = (),
    seed: int | None = None,
    tolerance: float | None = None,
    reference: Reference | None = None,
) -> Comparison:
    """Compare what the model of the bundle at `path` computes in `precisions` with the reference in float32.

    The bundle may be for any target: its model, variant and weights are what counts, not its engines.

    Limits follow from the model, trained or not: what random errors cost in it that are as large as those of its
    linears in a precision, times `NOISE_FACTOR`. Every output of a forward has its own.

    Args:
        chunks: length of the rollouts.
        prompts, seed: what is played; by default one that the weights can show something for.
        tolerance: largest relative L2 error of all rows; None = as above, and `LINEAR` of `export.tolerances`.
        reference: the model with the bundle's weights; None = rebuilt from the seed that the manifest names.

    Raises:
        BundleError: the bundle cannot be used.
        ComparisonError: the reference's weights are needed and were not given, or there is too little memory.
    """
    G_LOGGER.module_severity = G_LOGGER.ERROR
    bundle = load_bundle(path)
    reference = reference or Reference.of(bundle.manifest)
    check_memory(bundle.manifest, reference.preset, _COPIES)
    trials = Trials.of(bundle.manifest, prompts, seed)
    with tempfile.TemporaryDirectory(prefix="precisions-", dir=temporary_folder()) as folder:
        return _Study(bundle, reference, Path(folder), chunks, trials, tolerance).compare(precisions)


class _Study:
    def __init__(
        self,
        bundle: Bundle,
        reference: Reference,
        folder: Path,
        chunks: int,
        trials: Trials,
        tolerance: float | None,
    ) -> None:
        self.bundle, self.manifest, self.reference = bundle, bundle.manifest, reference
        self.folder, self.chunks, self.trials, self.tolerance = folder, chunks, trials, tolerance
        self.plan = _plan(self.manifest, reference)
        self.embeddings = tuple(reference_embedding(bundle, reference, prompt) for prompt in trials.prompts)
        reference.forget("text_weights")
        # Weights as engines hold them; the exporter merges projections in place, so each use has its own copy.
        rounded = copy.deepcopy(reference.model).to(torch.bfloat16)
        self.rounded = copy.deepcopy(rounded).float()
        merge_qkv(self.rounded)
        write_conditioner(folder, rounded)
        write_step(folder, rounded, self.plan, per_chunk=False)

    def compare(self, precisions: Sequence[Compared]) -> Comparison:
        reference, manifest = self.reference, self.manifest
        errors = self._linear_errors(precisions)
        rows, plots = self._linears(precisions, errors)
        expected = self._rollout(lambda text: reference.rollout(manifest, text, self.trials.seed))
        films = [Film("float32 (reference)", decoded(reference, expected[0]))]
        latents: dict[Compared, list[Tensor]] = {}
        measured: dict[str, Measured] = {}
        rollouts: list[Row] = []
        for precision in precisions:
            limits = self._limits(precision, errors, expected)
            with ExitStack() as stack:
                execution = self._execution(precision, stack)
                measured[precision] = self._measure(execution.runner, precision, limits.outputs)
                latents[precision] = self._rollout(execution.rollout)
            rollouts += self._rollouts(precision, latents, expected, limits)
            films.append(Film(precision, decoded(reference, latents[precision][0])))
        rows += [*(entry.row for entry in measured.values()), *rollouts]
        plots += [step_plot(self.bundle, measured), layer_plot(self.bundle, measured)]
        plots.append(self._by_chunk(expected, latents))
        facts = {"chunks": str(self.chunks), "prompts": "; ".join(self.trials.prompts)}
        return Comparison(
            title=f"{manifest.name}: {', '.join(precisions)} against float32",
            bundle=manifest.name,
            facts={**facts_of(self.bundle), **facts, "seed": str(self.trials.seed)},
            tools=manifest.provenance.tools,
            rows=rows,
            plots=plots,
            films=films,
        )

    def _rollout(self, play: Callable[[Tensor], Rollout]) -> list[Tensor]:
        """Clean latents of a rollout of each prompt, `[channels, frames, h, w]`."""
        return [torch.cat(list(play(text).stream(self.chunks)), dim=1) for text in self.embeddings]

    def _measure(self, runner: BaseRunner, name: str, limits: float | Mapping[str, float]) -> Measured:
        """The denoising forwards of every prompt's rollout, from the reference's own states."""
        clean_step, seed = self.manifest.schedule.clean_step, self.trials.seed
        feeds = (
            feed
            for text in self.embeddings
            for _, step, feed in step_feeds(
                self.reference, self.manifest, self.chunks, embedding=text, seed=seed
            )
            if step != clean_step
        )
        return measure([self._reference_runner, runner], feeds, scope="step", name=name, tolerance=limits)

    def _limits(
        self, precision: Compared, errors: Mapping[str, Mapping[Format, float]], expected: Sequence[Tensor]
    ) -> _Limits:
        if self.tolerance is not None:
            return _Limits(self.tolerance, self.tolerance, self.tolerance)
        if precision == "bf16":
            noise = dict.fromkeys(block_linears(self.rounded), BF16_LINEAR)
        else:
            noise = {name: errors[name][format] for name, format in self._formats(precision).items()}
        with perturbed(self.rounded, noise, seed=self.trials.seed):
            execution = self._emulation()
            cost = self._measure(execution.runner, precision, inf)
            found = self._rollout(execution.rollout)
        costs = {name: max(run[name].relative for run in cost.runs) for name in cost.runs[0]}
        # Noise averages out in means of keys; errors of weights, the same for every key, do not.
        costs |= {
            f"kmean.{i}": max(costs[f"kmean.{i}"], costs[f"k.{i}"]) for i in range(self.manifest.model.layers)
        }
        outputs = {name: NOISE_FACTOR * value + FORWARD["fp32"] for name, value in costs.items()}
        pairs = list(zip(found, expected, strict=True))
        latents = max(difference(ours.numpy(), theirs.numpy()).relative for ours, theirs in pairs)
        frames = max(
            difference(decoded(self.reference, ours), decoded(self.reference, theirs)).relative
            for ours, theirs in pairs
        )
        return _Limits(outputs, NOISE_FACTOR * latents, NOISE_FACTOR * frames + PIXELS)

    @cached_property
    def _reference_runner(self) -> BaseRunner:
        return TorchRunner(
            step_function(self.reference.step_module(self.manifest)), self._component("step.onnx")
        )

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
            base = self.reference.rollout(self.manifest, embedding, self.trials.seed)
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
        return self._emulation()

    def _emulation(self) -> _Execution:
        """The rounded model in PyTorch, with whatever hooks it has now."""
        model = _WithModel(self.reference.weights, self.rounded)
        function = step_function(model.step_module(self.manifest))
        return _Execution(
            TorchRunner(function, self._component("step.onnx")),
            lambda embedding: model.rollout(self.manifest, embedding, self.trials.seed),
        )

    def _formats(self, precision: Literal["fp8", "nvfp4"]) -> dict[str, Format]:
        return choose_formats(block_linears(self.rounded), precision)

    # ---- findings ----

    def _linear_errors(self, precisions: Sequence[Compared]) -> dict[str, dict[Format, float]]:
        """The output error of every block linear in every format that is needed."""
        if not set(precisions) - {"bf16"}:
            return {}
        trial = Trial(self.plan, self.embeddings, chunks=self.chunks, seed=self.trials.seed)
        return layer_errors(self.rounded, trial, ("fp8", "nvfp4") if "nvfp4" in precisions else ("fp8",))

    def _linears(
        self, precisions: Sequence[Compared], errors: Mapping[str, Mapping[Format, float]]
    ) -> tuple[list[Row], list[Plot]]:
        """A row for each kind of block linear, with its worst layer, and a plot."""
        quantized: list[Literal["fp8", "nvfp4"]] = [p for p in precisions if p != "bf16"]
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
        self,
        precision: Compared,
        latents: Mapping[Compared, Sequence[Tensor]],
        expected: Sequence[Tensor],
        limits: _Limits,
    ) -> Iterator[Row]:
        found = latents[precision]
        yield _worst_row(precision, found, expected, limits.latents)
        if precision != "bf16" and "bf16" in latents:
            yield _worst_row(f"{precision} against bf16", found, latents["bf16"], limits.latents)
        films = (
            [Film("", decoded(self.reference, one)) for one in pair]
            for pair in zip(found, expected, strict=True)
        )
        rows = [frames_row(precision, ours, theirs, limits.frames) for ours, theirs in films]
        yield replace(max(rows, key=lambda row: (row.relative != row.relative, row.relative)), runs=len(rows))

    def _by_chunk(self, expected: Sequence[Tensor], latents: Mapping[Compared, Sequence[Tensor]]) -> Plot:
        """The error of each chunk, of the first prompt's rollout."""
        theirs = expected[0].chunk(self.chunks, dim=1)
        series = []
        for precision, found in latents.items():
            pairs = zip(found[0].chunk(self.chunks, dim=1), theirs, strict=True)
            gaps = [difference(a.numpy(), b.numpy()).relative for a, b in pairs]
            series.append(Series(precision, tuple(map(_finite, gaps))))
        labels = tuple(map(str, range(self.chunks)))
        return Plot("Error of a rollout's latents", labels, tuple(series), "chunk")


def _worst_row(name: str, found: Sequence[Tensor], expected: Sequence[Tensor], limit: float) -> Row:
    """The prompt whose latents are furthest off."""
    gaps = [difference(a.numpy(), b.numpy(), limit) for a, b in zip(found, expected, strict=True)]
    worst = max(gaps, key=lambda gap: gap.rank)
    return Row("rollout", name, len(gaps), "latents", worst.relative, worst.largest, limit)


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
