"""Variants of the step graph, made by editing it: everything shares the weights file of the one export."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from .modules import QUERY_MEANS, cache_stems, chunk_stems

__all__ = ["clean_graph", "constant_input", "keep_outputs", "per_chunk_graph"]


def constant_input(model: ir.Model, name: str, value: np.ndarray) -> None:
    """Replace the graph input `name` by a constant."""
    graph = model.graph
    old = next(value for value in graph.inputs if value.name == name)
    graph.inputs.remove(old)
    old.name = f"{name}_input"
    tensor = ir.tensor(value, name=name)
    new = ir.Value(
        name=name, shape=ir.Shape(value.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    old.replace_all_uses_with(new)
    graph.register_initializer(new)


def keep_outputs(model: ir.Model, names: Collection[str]) -> None:
    """Reduce the graph to what the outputs `names` need; inputs and weights that lose their last use go too."""
    graph = model.graph
    for output in [value for value in graph.outputs if value.name not in names]:
        graph.outputs.remove(output)
    passes.RemoveUnusedNodesPass()(model)
    for value in [value for value in graph.inputs if not value.uses()]:
        graph.inputs.remove(value)


def clean_graph(step: ir.Model, clean_step: int) -> ir.Model:
    """The clean forward: the step graph at t = 0, cut after the last layer's keys and values.

    Returns `step` itself, edited.
    """
    constant_input(step, "step", np.array(clean_step, dtype=np.int32))
    kept = frozenset((*chunk_stems("fp8"), QUERY_MEANS))
    names = (output.name or "" for output in step.graph.outputs)
    keep_outputs(step, [name for name in names if name.rpartition(".")[0] in kept])
    return step


def per_chunk_graph(step: ir.Model, chunk: int, past_frames: int) -> ir.Model:
    """The step graph of one chunk: its own budget baked in, and a cache of exactly its past frames.

    Inputs `chunk` and, for the first chunk, everything of the cache disappear; `frame_slots` stays, because slots
    may be in any order. Returns `step` itself, edited.
    """
    graph = step.graph
    constant_input(step, "chunk", np.array(0, dtype=np.int32))
    for node in graph:
        if "keep_q20" in node.attributes:
            table = node.attributes["keep_q20"].as_ints()
            entry = table[min(chunk, len(table) - 1)]
            node.attributes["keep_q20"] = ir.AttrInt64s("keep_q20", [entry])
    for value in list(graph.inputs):
        name = value.name or ""
        if name == "frame_slots":
            value.shape = ir.Shape([past_frames])
        elif name.rpartition(".")[0] in cache_stems("fp8"):
            assert value.shape is not None
            value.shape = ir.Shape([past_frames, *value.shape[1:]])
        else:
            continue
        dtype = value.dtype
        assert dtype is not None and value.shape is not None
        if past_frames == 0:
            constant_input(step, name, np.empty(value.shape.numpy(), dtype=dtype.numpy()))
    step.metadata_props["lightforcing.chunk"] = str(chunk)
    return step
