"""The step graph as segments: `first`, one `layer` engine for all layers, `last`, and the operators in between.

Weights are inputs of the segments, so one `layer` engine serves every layer with other addresses, and another
checkpoint or a merged LoRA is another weights file. Or they are embedded: then there is a graph for every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from export.errors import ExportError
from export.progress import StepCallback, no_steps
from plugins import contract
from plugins.nodes import functions
from plugins.operators import OPERATORS
from runtime.bundle import ELEMENT_TYPES, FLOATS, Dtype, Segments

from .partition import Partition, Segment, merge_repeated, partition
from .tensor_files import StoredTensor, write_tensors
from .tracing import EXTERNAL_BYTES

__all__ = ["SEGMENT_WEIGHTS", "is_kernel", "is_parameter", "write_segments"]

SEGMENT_WEIGHTS = "transformer.safetensors"

_STORED: Mapping[ir.DataType, Dtype] = {
    **{ir.DataType[ELEMENT_TYPES[dtype].onnx]: dtype for dtype in (*FLOATS, "float8_e4m3fn")},
    ir.DataType.FLOAT4E2M1: "uint8",
}
"""Types of weights. The file format has none of four bits: two such elements are a byte."""

_VIEWS = frozenset({"Gather", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
"""What stands between a projection and the operator, and moves nothing."""

_PARAMETERS = ("model.", "modulation_", "head_modulation", "sigmas")


def is_kernel(node: ir.Node) -> bool:
    """Whether the runtime launches a kernel of this project for `node`."""
    return node.domain == contract.DOMAIN


def is_parameter(name: str) -> bool:
    """Whether an initializer of the step graph comes from the model and not from the exporter."""
    return name.startswith(_PARAMETERS)


@dataclass(frozen=True)
class _Scaled:
    """A projection to queries, keys and values whose scales are applied behind its product.

    Attributes:
        product: of codes, `[1, T, 3 H D]`.
        token_scale, channel_scale: `[1, T, 1]` and `[3 H D]`.
        between: the nodes that apply them and hand the result to the operator.
    """

    product: ir.Value
    token_scale: ir.Value
    channel_scale: ir.Value
    between: tuple[ir.Node, ...]


def _scaled_projection(prepare: ir.Node) -> _Scaled | None:
    """What `export.quantize` put in front of `prepare`; None where it is not that."""
    node, between = prepare.inputs[0].producer() if prepare.inputs[0] else None, list[ir.Node]()
    while node is not None and node.op_type in _VIEWS:
        between.append(node)
        node = node.inputs[0].producer() if node.inputs[0] else None
    factors: list[ir.Value] = []
    for _ in range(2):
        if node is None or node.op_type != "Mul" or len(list(node.outputs[0].uses())) != 1:
            return None
        between.append(node)
        value, factor = node.inputs
        if value is None or factor is None:
            return None
        factors.append(factor)
        node = value.producer()
    channel, token = factors
    by_token = token.shape is not None and token.shape[-1] == 1
    if node is None or node.op_type != "MatMul" or not channel.is_initializer() or not by_token:
        return None
    return _Scaled(node.outputs[0], token, channel, tuple(between))


def _scaled_projections(model: ir.Model) -> list[_Scaled]:
    """The projections of all layers, if all have scales; else none."""
    prepares = [
        node for node in model.graph if node.op_type in OPERATORS and OPERATORS[node.op_type].prepares
    ]
    found = [_scaled_projection(node) for node in prepares]
    return [scaled for scaled in found if scaled is not None] if all(found) else []


def write_segments(
    folder: Path,
    model: ir.Model,
    attention: functions.AttentionForm,
    *,
    embedded: bool = False,
    leave_scales: bool = False,
    progress: StepCallback = no_steps,
) -> tuple[list[str], Segments]:
    """Cut a step graph and write the segments, the operators and the weights.

    Args:
        model: a graph as `components.write_step` leaves it, perhaps quantized; weights may still lie in a file or be
            yet to compute, and are written one by one.
        attention: form of the attention operator's function body, for runtimes without kernels.
        embedded: leave the weights inside, in a graph for every layer (`layer.0`, ...). The file of weights then holds
            those of the operators only.
        leave_scales: where every layer's projection to queries, keys and values is quantized with a scale per token,
            leave its scales to `QKPrepare`: segments give `qkv_scale` besides `qkv`, and the operator's graph takes
            `token_scale` and `channel_scale`.
        progress: called as weights are written.

    Returns:
        the files, relative to `folder`, and the manifest's section.

    Raises:
        ExportError: the layers differ in more than their weights.
    """
    scaled = _scaled_projections(model) if leave_scales else []
    left = {node for projection in scaled for node in projection.between}
    cut = partition(model, lambda node: is_kernel(node) or node in left)
    if len(cut.segments) < _FEWEST:
        raise ExportError("the step graph has one layer; segmented execution needs two or more")
    names = _canonical_names(cut, scaled)
    if embedded:
        files, (first, *layers, last) = _write_embedded(folder, cut.segments, names, progress)
    else:
        files, (first, *layers, last) = _write_shared(folder, cut.segments, names)
    prepare, attend = _operators(cut)
    for name, nodes in (("qk_prepare", prepare), ("attention", attend)):
        of_first = scaled[0] if scaled and name == "qk_prepare" else None
        ir.save(_operator_model(model, nodes[0], attention, of_first), folder / f"{name}.onnx")
    prepared, attended = ([_kernel_weights(node) for node in nodes] for nodes in (prepare, attend))
    for weights, projection in zip(prepared, scaled, strict=False):
        weights["channel_scale"] = _value_name(projection.channel_scale)
    attended = attended if any(attended) else []
    rows = (first, *layers, last, *prepared, *attended)
    used = {tensor for row in rows for tensor in row.values()}
    stored = [_stored(value) for name, value in model.graph.initializers.items() if name in used]
    write_tensors(folder / SEGMENT_WEIGHTS, stored, progress)
    section = Segments(
        weights=SEGMENT_WEIGHTS,
        first=first,
        layers=tuple(layers),
        last=last,
        prepare=tuple(prepared),
        attention=tuple(attended),
    )
    return [*files, "qk_prepare.onnx", "attention.onnx", SEGMENT_WEIGHTS], section


_FEWEST = 3
"""Segments of two layers: `first`, `layer`, `last`."""

_Rows = list[dict[str, str]]
"""For each run of a segment, in order: weight input -> tensor of the weights file."""


def _write_shared(
    folder: Path, segments: Sequence[Segment], names: Mapping[str, str]
) -> tuple[list[str], _Rows]:
    """Graphs whose weights are inputs: the first and the last segment, and one for all between them."""
    groups = {"first": segments[:1], "layer": segments[1:-1], "last": segments[-1:]}
    rows: _Rows = []
    for name, group in groups.items():
        part = merge_repeated(group, name=name, is_weight=is_parameter)
        _rename(part.model, names)
        ir.external_data.load_to_model(part.model)  # constants; the weights are inputs by now
        ir.save(part.model, folder / f"{name}.onnx")
        rows += [dict(zip(part.weights, row, strict=True)) for row in part.bindings]
    return [f"{name}.onnx" for name in groups], rows


def _write_embedded(
    folder: Path, segments: Sequence[Segment], names: Mapping[str, str], progress: StepCallback
) -> tuple[list[str], _Rows]:
    """A graph for every segment, each with a file of its weights."""
    files = []
    titles = ["first", *(f"layer.{index}" for index in range(len(segments) - 2)), "last"]
    for done, (title, segment) in enumerate(zip(titles, segments, strict=True)):
        progress(title, done, len(titles))
        _rename(segment.model, names)
        weights = f"{title}.weights"
        ir.save(
            segment.model,
            folder / f"{title}.onnx",
            external_data=weights,
            size_threshold_bytes=EXTERNAL_BYTES,
        )
        files += [f"{title}.onnx", weights]
    return files, [{} for _ in segments]


def _stored(value: ir.Value) -> StoredTensor:
    tensor, dtype = value.const_value, value.dtype
    if tensor is None or dtype is None or dtype not in _STORED:
        raise ExportError(
            f"the weight {value.name!r} is {dtype}; expected one of {', '.join(map(str, _STORED))}"
        )
    shape = tuple(tensor.shape.numpy())
    if dtype == ir.DataType.FLOAT4E2M1:
        shape = (*shape[:-1], shape[-1] // 2)
    return StoredTensor(_value_name(value), _STORED[dtype], shape, _reader(tensor))


def _reader(tensor: ir.TensorProtocol) -> Callable[[], memoryview]:
    return lambda: memoryview(tensor.tobytes())


def _operators(cut: Partition) -> tuple[list[ir.Node], list[ir.Node]]:
    """The two operators of every layer."""
    prepare, attend = [], []
    for stage in cut.kernels:
        known = [OPERATORS[node.op_type] for node in stage if node.op_type in OPERATORS]
        prepares = [node for node in stage if (found := OPERATORS.get(node.op_type)) and found.prepares]
        attends = [node for node in stage if (found := OPERATORS.get(node.op_type)) and not found.prepares]
        alike = len({operator.over_codes for operator in known}) == 1
        others = sum(is_kernel(node) for node in stage) - 2
        if (others, len(prepares), len(attends)) != (0, 1, 1) or not alike:
            raise ExportError(
                f"a layer has the operators {', '.join(node.op_type for node in stage)}; expected one "
                f"{contract.QK_PREPARE} and one of {', '.join(contract.ATTENTION_OPERATORS)}, or both over codes"
            )
        prepare += prepares
        attend += attends
    return prepare, attend


def _canonical_names(cut: Partition, scaled: Sequence[_Scaled]) -> dict[str, str]:
    """Tensor names of the whole graph -> names that are the same in every layer."""
    prepare, attend = _operators(cut)
    names: dict[str, str] = {}
    for node in prepare:
        names[_value_name(node.inputs[0])] = "qkv"
    for projection in scaled:
        names[_value_name(projection.product)] = "qkv"
        names[_value_name(projection.token_scale)] = "qkv_scale"
    for node in attend:
        names[_value_name(node.outputs[0])] = "attention_out"
    projections = set(names)
    for segment in cut.segments[:-1]:
        for output in segment.outputs:
            if output not in projections:
                names[output] = "x"
    for layer in range(len(attend)):
        names |= {f"cross_k.{layer}": "cross_k", f"cross_v.{layer}": "cross_v"}
    return names


def _value_name(value: ir.Value | None) -> str:
    assert value is not None and value.name is not None
    return value.name


def _rename(model: ir.Model, names: Mapping[str, str]) -> None:
    """Give a segment's inputs and outputs their canonical names; what comes out as `x` is called `x_out`."""
    graph = model.graph
    for value in graph.outputs:
        canonical = names.get(_value_name(value), _value_name(value))
        value.name = "x_out" if canonical == "x" else canonical
    for value in graph.inputs:
        value.name = names.get(_value_name(value), value.name)
    if len({value.name for value in (*graph.inputs, *graph.outputs)}) != len(graph.inputs) + len(
        graph.outputs
    ):
        raise ExportError(
            f"segment {graph.name!r} passes more than the residual stream and the projection: inputs "
            f"{[value.name for value in graph.inputs]}, outputs {[value.name for value in graph.outputs]}"
        )


def _kernel_weights(node: ir.Node) -> dict[str, str]:
    """Weights that the operator itself reads: its input name -> initializer."""
    return {
        name: _value_name(value)
        for name, value in zip(OPERATORS[node.op_type].inputs, node.inputs, strict=True)
        if value is not None and value.is_initializer()
    }


def _operator_model(
    model: ir.Model, node: ir.Node, attention: functions.AttentionForm, scaled: _Scaled | None
) -> ir.Model:
    """A model of one operator node, with its function body, under the operator's own tensor names; `scaled` is what its
    first input is made from where that is left to it.
    """
    operator = OPERATORS[node.op_type]
    inputs = [
        ir.Value(name=name, shape=value.shape, type=value.type)
        for name, value in zip(operator.inputs, node.inputs, strict=True)
        if value is not None
    ]
    taken, nodes = list(inputs), list[ir.Node]()
    if scaled is not None:
        rows, _ = inputs[0].shape or (None, None)
        for name, value, dims in (
            ("token_scale", scaled.token_scale, ir.Shape([rows, 1])),
            ("channel_scale", scaled.channel_scale, scaled.channel_scale.shape),
        ):
            factor = ir.Value(name=name, shape=dims, type=value.type)
            inputs.append(factor)
            nodes.append(ir.Node("", "Mul", [taken[0], factor], num_outputs=1))
            (taken[0],) = nodes[-1].outputs
            taken[0].name, taken[0].shape, taken[0].type = f"qkv.{name}", inputs[0].shape, inputs[0].type
    copy = ir.Node(node.domain, node.op_type, taken, node.attributes.values(), num_outputs=len(node.outputs))
    for new, old, name in zip(copy.outputs, node.outputs, operator.outputs, strict=True):
        new.name, new.shape, new.type = name, old.shape, old.type
    graph = ir.Graph(
        inputs, copy.outputs, nodes=[*nodes, copy], opset_imports=dict(model.opset_imports), name=node.op_type
    )
    result = ir.Model(graph, ir_version=model.ir_version, producer_name=model.producer_name)
    functions.attach(result, attention)
    return result
