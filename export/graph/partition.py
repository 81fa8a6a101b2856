"""Cut a graph into segments at its kernel nodes, and merge segments that differ in their weights only.

Engines that take no plugins run the segments; the runtime launches the kernels in between. Weights are passed by
reference: a segment's initializers are the tensors of the whole graph, nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir

from export.errors import ExportError

__all__ = ["Partition", "RepeatedSegment", "Segment", "merge_repeated", "partition"]


@dataclass(frozen=True)
class Segment:
    """A part of the graph without kernel nodes. Tensor names are those of the whole graph."""

    model: ir.Model
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Partition:
    """Segments and the kernel stages between them: segment 0, kernels 0, segment 1, kernels 1, ..."""

    segments: tuple[Segment, ...]
    kernels: tuple[tuple[ir.Node, ...], ...]


@dataclass(frozen=True)
class RepeatedSegment:
    """One model that stands for several segments, its weights being inputs.

    Args:
        inputs, outputs: tensor names of the model, weights left out.
        weights: names of the weight inputs.
        activations: per repetition, the whole graph's names for `inputs` and `outputs`, in their order.
        bindings: per repetition, the initializer of the whole graph for each of `weights`.
    """

    model: ir.Model
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...]
    activations: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    bindings: tuple[tuple[str, ...], ...]


def _name(value: ir.Value) -> str:
    if value.name is None:
        raise ExportError("the graph has an unnamed tensor; run onnx_ir's NameFixPass before cutting it")
    return value.name


def _stages(graph: ir.Graph, is_kernel: Callable[[ir.Node], bool]) -> dict[ir.Node, int]:
    """Stage of every node: segment s runs before kernel stage s, which runs before segment s + 1."""
    stage: dict[ir.Node, int] = {}
    for node in graph:
        if not is_kernel(node) and any(
            attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()
        ):
            raise ExportError(
                f"node {node.name!r} ({node.op_type}) holds a subgraph, which cannot be cut; inline it first"
            )
        after = is_kernel(node)
        stage[node] = max(
            (
                stage[producer] + (is_kernel(producer) and not after)
                for value in node.inputs
                if value is not None and (producer := value.producer()) is not None
            ),
            default=0,
        )
    return stage


def _early(graph: ir.Graph, is_kernel: Callable[[ir.Node], bool]) -> dict[ir.Node, bool]:
    """Nodes that no kernel comes before, and whether they depend on scalar inputs and weights only (look-ups)."""
    early: dict[ir.Node, bool] = {}
    for node in graph:
        values = [value for value in node.inputs if value is not None]
        producers = [producer for value in values if (producer := value.producer()) is not None]
        if is_kernel(node) or not all(producer in early for producer in producers):
            continue
        scalars = all(
            value.is_initializer() or (value.shape is not None and value.shape.rank() == 0)
            for value in values
            if value.producer() is None
        )
        early[node] = scalars and all(early[producer] for producer in producers)
    return early


def partition(model: ir.Model, is_kernel: Callable[[ir.Node], bool]) -> Partition:
    """Cut `model` at the nodes for which `is_kernel` holds.

    Every ordinary node ends up in one segment: the earliest possible one, or, where it depends on no kernel, the one
    that uses it. Look-ups by scalar inputs are repeated in each segment that uses them, so that their results need
    not travel. A segment's outputs are what later segments, kernels or the whole graph's outputs take from it.

    Raises:
        ExportError: a node holds a subgraph, or a tensor has no name.
    """
    graph = model.graph
    stage = _stages(graph, is_kernel)
    places: dict[ir.Node, set[int]] = {node: {index} for node, index in stage.items()}
    early = _early(graph, is_kernel)
    for node in reversed(graph):
        if node in early and not any(value.is_graph_output() for value in node.outputs):
            # A kernel takes its operands from the segments before it: the last of them will do.
            users = {index for value in node.outputs for use in value.uses() for index in places[use.node]}
            if users and (early[node] or len(users) == 1):
                places[node] = users
    count = max((index for indices in places.values() for index in indices), default=0) + 1
    kernels: list[list[ir.Node]] = [[] for _ in range(count)]
    ordinary: list[list[ir.Node]] = [[] for _ in range(count)]
    for node in graph:
        for index in sorted(places[node]):
            (kernels if is_kernel(node) else ordinary)[index].append(node)

    def leaves(value: ir.Value, index: int) -> bool:
        """Whether something outside segment `index` takes `value` from it."""
        if value.is_graph_output():
            return True
        producer = value.producer()
        home = places[producer] if producer is not None else set()
        for use in value.uses():
            if is_kernel(use.node) and (index in places[use.node] or len(home) == 1):
                return True
            if not is_kernel(use.node) and not places[use.node] <= home:
                return True
        return False

    segments = tuple(
        _segment(model, nodes, partial(leaves, index=index), f"segment_{index}")
        for index, nodes in enumerate(ordinary)
    )
    return Partition(segments, tuple(tuple(stage_kernels) for stage_kernels in kernels if stage_kernels))


def _segment(
    model: ir.Model, nodes: Sequence[ir.Node], leaves: Callable[[ir.Value], bool], name: str
) -> Segment:
    produced = {value for node in nodes for value in node.outputs}
    taken = [value for node in nodes for value in node.inputs if value is not None and value not in produced]
    weights = {value: None for value in taken if value.is_initializer()}
    inputs = {value: None for value in taken if not value.is_initializer()}
    outputs = [value for node in nodes for value in node.outputs if leaves(value)]
    copies: dict[ir.Value, ir.Value] = {}
    for value in (*inputs, *weights):
        copies[value] = ir.Value(
            name=_name(value), shape=value.shape, type=value.type, const_value=value.const_value
        )
    segment = _build(model, nodes, copies, list(inputs), outputs, list(weights), name)
    return Segment(segment, tuple(_name(v) for v in inputs), tuple(_name(v) for v in outputs))


def _build(
    model: ir.Model,
    nodes: Sequence[ir.Node],
    copies: dict[ir.Value, ir.Value],
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    weights: Sequence[ir.Value],
    name: str,
) -> ir.Model:
    """A model of copies of `nodes`; `copies` maps values from outside and receives those produced inside."""
    cloned = []
    for node in nodes:
        new = ir.Node(
            node.domain,
            node.op_type,
            [None if value is None else copies[value] for value in node.inputs],
            node.attributes.values(),
            num_outputs=len(node.outputs),
            version=node.version,
            name=node.name,
        )
        for old_value, new_value in zip(node.outputs, new.outputs, strict=True):
            new_value.name, new_value.shape, new_value.type = (
                _name(old_value),
                old_value.shape,
                old_value.type,
            )
            copies[old_value] = new_value
        cloned.append(new)
    graph = ir.Graph(
        [copies[value] for value in inputs],
        [copies[value] for value in outputs],
        nodes=cloned,
        initializers=[copies[value] for value in weights],
        opset_imports={node.domain: model.opset_imports[node.domain] for node in nodes}
        or dict(model.opset_imports),
        name=name,
    )
    return ir.Model(graph, ir_version=model.ir_version, producer_name=model.producer_name)


def _signature(model: ir.Model) -> list[object]:
    """What two segments must share to be one model: operators, attributes, wiring, types; names do not count."""
    graph = model.graph
    index: dict[ir.Value, int] = {}
    for value in (*graph.inputs, *graph.initializers.values()):
        index[value] = len(index)

    def kind(value: ir.Value) -> tuple[str, str]:
        return str(value.dtype), str(value.shape)

    signature: list[object] = [[kind(value) for value in graph.inputs]]
    signature.append([kind(value) for value in graph.initializers.values()])
    for node in graph:
        attributes = sorted((key, str(attribute.value)) for key, attribute in node.attributes.items())
        wiring = [None if value is None else index[value] for value in node.inputs]
        signature.append((node.domain, node.op_type, attributes, wiring))
        for value in node.outputs:
            index[value] = len(index)
    signature.append([index[value] for value in graph.outputs])
    return signature


def merge_repeated(
    segments: Sequence[Segment], *, name: str, is_weight: Callable[[str], bool]
) -> RepeatedSegment:
    """One model for `segments` that differ in tensor names and weights only.

    Args:
        is_weight: tells by its name whether an initializer becomes an input; all others stay constants, which the
            segments must have in common. Values of weights decide nothing, so that other weights fit too.

    Raises:
        ExportError: the segments differ in more than their weights; names the first one that does.
    """
    models = [segment.model for segment in segments]
    first = _signature(models[0])
    columns = list(zip(*(model.graph.initializers.values() for model in models), strict=False))
    for position, other in enumerate(models[1:], start=1):
        if _signature(other) != first or not all(
            _same(column[0], column[position]) for column in columns if not is_weight(_name(column[0]))
        ):
            raise ExportError(
                f"segment {position} of {len(models)} differs from the first in more than its weights; "
                "they cannot share one engine (use --weights embedded)"
            )
    template = models[0].graph
    weights, constants, copies = [], [], {}
    for value in template.initializers.values():
        if is_weight(_name(value)):
            weights.append(value)
            copies[value] = ir.Value(name=f"weight.{len(weights) - 1}", shape=value.shape, type=value.type)
        else:
            constants.append(value)
            copies[value] = ir.Value(
                name=_name(value), shape=value.shape, type=value.type, const_value=value.const_value
            )
    for value in template.inputs:
        copies[value] = ir.Value(name=_name(value), shape=value.shape, type=value.type)
    merged = _build(
        models[0],
        list(template),
        copies,
        [*template.inputs, *weights],
        list(template.outputs),
        constants,
        name,
    )
    weight_columns = [column for column in columns if is_weight(_name(column[0]))]
    return RepeatedSegment(
        model=merged,
        inputs=segments[0].inputs,
        outputs=segments[0].outputs,
        weights=tuple(f"weight.{index}" for index in range(len(weights))),
        activations=tuple((segment.inputs, segment.outputs) for segment in segments),
        bindings=tuple(
            tuple(_name(column[position]) for column in weight_columns) for position in range(len(models))
        ),
    )


def _same(a: ir.Value, b: ir.Value) -> bool:
    """Whether two constants hold the same bytes."""
    left, right = a.const_value, b.const_value
    return left is not None and right is not None and (left is right or left.tobytes() == right.tobytes())
