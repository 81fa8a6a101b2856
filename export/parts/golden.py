"""Writing golden vectors: what each component of a bundle must compute, from ONNX Runtime on the CPU.

A component is judged by the graph it was built from, run in float32: a bfloat16 graph as its float32 twin, a
quantized one with the same quantized weights and rounding of activations. What the runtime does with the result is in
`runtime.bundle.golden`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from export import tolerances
from export.errors import ExportError
from export.graph.components import TEXT_WEIGHTS
from export.progress import StepCallback, no_steps
from lightforcing_ref.schedule import FlowSchedule
from lightforcing_ref.text import LAYER_WEIGHTS
from runtime import bundle
from runtime.bundle.golden import (
    METADATA_KEY,
    Codes,
    Expected,
    GoldenCase,
    GoldenCases,
    Integers,
    Mask,
    Normal,
    Recipe,
    Rotary,
    Scales,
    Stored,
    sample,
    seed_of,
    shaped,
)
from runtime.bundle.weights_file import WeightsFile

from .golden_persistent import PersistReference
from .golden_reference import GoldenGraph, ReferenceGraph

__all__ = ["GOLDEN_FILE", "write_golden", "write_vectors"]

GOLDEN_FILE = "golden.safetensors"

PIXELS = "frames"
"""The one output that is pixels; other bytes are codes of E4M3."""
PIXEL_CENTRE = 127.5

CODE_SCALE = 1 / 112
"""Scale with which drawn codes stand for numbers around one."""

CLEAR = 1e-4
"""By what share blocks that stay exceed others in golden inputs, so that rounding moves none."""

LAYER_SAMPLES = 3
"""Runs of a component that serves all layers: the first, the last, and one between them."""

_SEGMENTED = frozenset({"first", "layer", "last", "qk_prepare"})

_Bindings = Mapping[str, Stored]


@dataclass(frozen=True)
class _Scenario:
    """What distinguishes one run of a component from another.

    Args:
        past: frames in the cache; None = all it can hold.
        weights: tensors that are inputs.
    """

    label: str
    step: int = 0
    past: int | None = None
    weights: _Bindings = field(default_factory=dict)


def write_golden(
    folder: Path,
    parts: Mapping[str, Path],
    schedule: FlowSchedule,
    *,
    segments: bundle.Segments | None = None,
    others: Mapping[str, GoldenGraph] = MappingProxyType({}),
    progress: StepCallback = no_steps,
) -> tuple[list[str], bundle.Golden]:
    """Write the golden vectors of a bundle's components.

    Args:
        folder: of the bundle, with its weights files; the golden file goes there.
        parts: component -> the ONNX file it was built from, in the inputs and outputs that the component has (shapes
            may differ where the number of elements does not). An operator that a kernel executes is given with its
            function body.
        schedule: of the bundle's chunks.
        segments: the manifest's section, for a bundle whose step is cut into segments.
        others: components that have no ONNX file, and what computes them.
        progress: called with the component, the components done, and their number.

    Returns:
        the files written, relative to `folder`, and the manifest's section.

    Raises:
        ExportError: an input is of no kind that is known here, or a weight is in none of the bundle's files.
    """
    if segments is None and not parts.keys().isdisjoint(_SEGMENTED):
        raise ExportError(
            "golden vectors of a segmented bundle need the manifest's section on segments, which binds the weights"
        )
    graphs = chain(_opened(folder, parts), others.items())
    total = len(parts) + len(others)
    return write_vectors(folder, graphs, schedule, segments, progress=progress, total=total)


def _opened(folder: Path, parts: Mapping[str, Path]) -> Iterator[tuple[str, GoldenGraph]]:
    """The graphs one after the other; the files of each are gone when the next one is asked for."""
    for name, path in parts.items():
        with tempfile.TemporaryDirectory(dir=folder, prefix=".golden-") as scratch:
            yield name, ReferenceGraph(path, Path(scratch))


def write_vectors(
    folder: Path,
    graphs: Iterable[tuple[str, GoldenGraph]],
    schedule: FlowSchedule,
    segments: bundle.Segments | None,
    *,
    progress: StepCallback = no_steps,
    total: int = 0,
) -> tuple[list[str], bundle.Golden]:
    """Write the golden vectors of components whatever they are computed with; see `write_golden`.

    Args:
        graphs: component and what computes it, each used before the next one is taken.
        total: their number, for `progress`.
    """
    cases: list[GoldenCase] = []
    samples: dict[str, NDArray[np.float32]] = {}
    limits: dict[str, float] = {}
    files: dict[str, WeightsFile] = {}
    for done, (name, graph) in enumerate(graphs):
        progress(name, done, total)
        limits[name] = _tolerance(graph)
        for scenario in _scenarios(name, graph, schedule, segments, folder):
            case, found = _run(name, graph, scenario, schedule.chunk_frames, folder, files)
            cases.append(case)
            samples |= found
    document = GoldenCases(cases=tuple(cases)).model_dump_json()
    save_file(samples, folder / GOLDEN_FILE, metadata={METADATA_KEY: document})
    return [GOLDEN_FILE], bundle.Golden(file=GOLDEN_FILE, tolerances=limits)


def _tolerance(graph: GoldenGraph) -> float:
    if any(spec.name == PIXELS for spec in graph.outputs):
        return tolerances.GOLDEN_PIXELS[graph.precision]
    depth = max(1.0, graph.layers / tolerances.GOLDEN_LAYERS)
    # What lies between two codes falls to either, a sixteenth apart.
    codes = any(spec.dtype == "uint8" for spec in (*graph.inputs, *graph.outputs))
    tolerance = max(tolerances.GOLDEN[graph.precision], tolerances.GOLDEN["fp8"] if codes else 0.0)
    return round(tolerance * math.sqrt(depth), 5)


# ---- which runs ----


def _scenarios(
    name: str, graph: GoldenGraph, schedule: FlowSchedule, segments: bundle.Segments | None, folder: Path
) -> Iterator[_Scenario]:
    last_step = max(schedule.rows(0))  # the first chunk's own rows lie behind those of the others
    inputs = {spec.name for spec in graph.inputs}
    if name == "text_encoder":
        with WeightsFile(folder / TEXT_WEIGHTS) as weights:
            layers = len({tensor.split(".")[1] for tensor in weights if tensor.startswith("layers.")})
        for layer in sorted({0, layers - 1}):
            bound = {w: Stored(file=TEXT_WEIGHTS, tensor=f"layers.{layer}.{w}") for w in LAYER_WEIGHTS}
            yield _Scenario(f"{name}@{layer}", weights=bound)
        return
    bindings = _bindings(name, segments)
    if isinstance(graph, PersistReference):
        yield _clear_choice(name, graph, schedule.chunk_frames)
    elif "frame_slots" in inputs:
        first, middle, last = (bindings[index] if bindings else {} for index in (0, len(bindings) // 2, -1))
        yield _Scenario(f"{name}@empty", past=0, weights=first)
        if "q" in inputs:
            yield _Scenario(f"{name}@chunk1", past=schedule.chunk_frames, weights=middle)
        yield _Scenario(f"{name}@full", step=min(1, schedule.denoise_steps - 1), weights=last)
    elif bindings:
        for index in _spread(len(bindings)):
            label = f"{name}@{index}" if len(bindings) > 1 else name
            yield _Scenario(label, step=min(index, last_step), weights=bindings[index])
        if len(bindings) == 1 and "step" in inputs:
            yield _Scenario(f"{name}@step{last_step}", step=last_step, weights=bindings[0])
    else:
        yield _Scenario(name)


def _clear_choice(name: str, graph: PersistReference, chunk_frames: int) -> _Scenario:
    """A full cache in which no block stays, or goes, by a hair: the seeds follow from the label."""
    for attempt in count():
        scenario = _Scenario(f"{name}@full{attempt or ''}")
        recipes, slots = _recipes(graph, scenario, chunk_frames)
        judged = {
            spec.name: shaped(recipes[spec.name], spec, slots, {})
            for spec in graph.inputs
            if spec.name not in ("past_k", "past_v")
        }
        if graph.margin(judged) > CLEAR:
            return scenario
    raise AssertionError  # there is no last attempt


def _spread(total: int) -> list[int]:
    """Up to `LAYER_SAMPLES` of `total` indices, the first and the last among them."""
    chosen = min(total, LAYER_SAMPLES)
    return sorted({round(index * (total - 1) / max(1, chosen - 1)) for index in range(chosen)})


def _bindings(name: str, segments: bundle.Segments | None) -> list[_Bindings]:
    """The weights of each run of a segment; empty where weights are inside the engine."""
    if segments is None:
        return []
    rows: dict[str, list[dict[str, str]]] = {
        "first": [segments.first],
        "layer": [*segments.layers],
        "last": [segments.last],
        "qk_prepare": [*segments.prepare],
        "attention": [*segments.attention],
        **{component: [row] for component, row in segments.outside.items()},
    }
    file = segments.weights
    return [
        {given: Stored(file=file, tensor=tensor) for given, tensor in row.items()}
        for row in rows.get(name, [])
        if row
    ]


# ---- what goes in ----


def _recipes(graph: GoldenGraph, scenario: _Scenario, chunk_frames: int) -> tuple[dict[str, Recipe], int]:
    """The recipe of every input, and the number of slots."""
    shapes = {spec.name: spec.shape for spec in graph.inputs}
    (most,) = shapes.get("frame_slots", (0,))
    assert isinstance(most, int)
    past = most if scenario.past is None else min(scenario.past, most)
    integers = {
        "step": (scenario.step,),
        "chunk": (-(-past // chunk_frames),),
        "pinned": (past // 2,),
        "frame_slots": _slots(scenario.label, past, most),
    }
    if isinstance(graph, PersistReference):  # a whole set, and as many frames leave as a chunk has
        integers["contest"] = (int(graph.outputs[0].shape[0]), chunk_frames)
    recipes: dict[str, Recipe] = {}
    for spec in graph.inputs:
        seed = seed_of(scenario.label, spec.name)
        if spec.name in scenario.weights:
            recipes[spec.name] = scenario.weights[spec.name]
        elif spec.name in integers:
            recipes[spec.name] = Integers(values=integers[spec.name])
        elif spec.name in ("cos", "sin", "rope_cos", "rope_sin"):
            angle = seed_of(scenario.label, "angle")
            recipes[spec.name] = Rotary(kind="cos" if spec.name.endswith("cos") else "sin", seed=angle)
        elif spec.name == "mask":
            recipes[spec.name] = Mask(ones=max(1, math.prod(int(dim) for dim in spec.shape) // 3))
        elif spec.dtype == "uint8":
            recipes[spec.name] = Codes(seed=seed)
        elif spec.name.partition(".")[0].endswith("scale"):
            recipes[spec.name] = Scales(seed=seed, scale=CODE_SCALE)
        elif spec.dtype in bundle.FLOATS:
            recipes[spec.name] = Normal(seed=seed, scale=_scale(spec.name))
        else:
            raise ExportError(
                f"{graph.path.name}: nothing is known of the input {spec.name!r} ({spec.dtype}); expected a weight "
                f"that the segments bind, a float tensor, or one of {', '.join(integers)}"
            )
    return recipes, max(1, most)


def _slots(label: str, past: int, most: int) -> tuple[int, ...]:
    """`past` slots in an order of no order, then -1."""
    order = sorted(range(most), key=lambda slot: seed_of(label, f"slot {slot}"))
    return (*order[:past], *[-1] * (most - past))


def _scale(name: str) -> float:
    """Standard deviation of an input. What the residual stream adds is small beside a layer's own results then, so
    that an error of these is seen; layers normalise what they read of it.
    """
    return 0.05 if name == "x" else 1.0


# ---- what comes out ----


def _run(
    component: str,
    graph: GoldenGraph,
    scenario: _Scenario,
    chunk_frames: int,
    folder: Path,
    files: dict[str, WeightsFile],
) -> tuple[GoldenCase, dict[str, NDArray[np.float32]]]:
    recipes, slots = _recipes(graph, scenario, chunk_frames)
    for recipe in recipes.values():
        if isinstance(recipe, Stored) and recipe.file not in files:
            files[recipe.file] = WeightsFile(folder / recipe.file)
    inputs = {spec.name: shaped(recipes[spec.name], spec, slots, files) for spec in graph.inputs}
    outputs: dict[str, Expected] = {}
    samples: dict[str, NDArray[np.float32]] = {}
    for name, value in graph.run(inputs).items():
        centre, codes = (PIXEL_CENTRE if name == PIXELS else 0.0), value.dtype == np.uint8 and name != PIXELS
        seed = seed_of(scenario.label, name)
        picked, norm = sample(
            value, Expected(size=value.size, seed=seed, norm=0.0, centre=centre, codes=codes)
        )
        if not np.isfinite(norm):
            raise ExportError(
                f"{component}: the output {name!r} is not finite on golden inputs ({scenario.label}); the weights are "
                "damaged, or the graph overflows: check the checkpoint"
            )
        outputs[name] = Expected(size=value.size, seed=seed, norm=norm, centre=centre, codes=codes)
        samples[f"{scenario.label}/{name}"] = picked
    case = GoldenCase(name=scenario.label, component=component, slots=slots, inputs=recipes, outputs=outputs)
    return case, samples
