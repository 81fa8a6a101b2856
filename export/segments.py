"""The step graph as segments: `first`, one `layer` engine for all layers, `last`, and the operators in between.

Weights are inputs of the segments, so one `layer` engine serves every layer with other addresses, and another
checkpoint or a merged LoRA is another weights file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
from safetensors.numpy import save_file

from plugins import contract, functions
from runtime.bundle import Segments

from .errors import ExportError
from .partition import Partition, RepeatedSegment, merge_repeated, partition

__all__ = ["SEGMENT_WEIGHTS", "is_kernel", "is_parameter", "write_segments"]

SEGMENT_WEIGHTS = "transformer.safetensors"

_PARAMETERS = ("model.", "modulation_", "head_modulation", "sigmas")


def is_kernel(node: ir.Node) -> bool:
    """Whether the runtime launches a kernel of this project for `node`."""
    return node.domain == contract.DOMAIN


def is_parameter(name: str) -> bool:
    """Whether an initializer of the step graph comes from the model and not from the exporter."""
    return name.startswith(_PARAMETERS)


def write_segments(
    folder: Path, step: Path, attention: functions.AttentionForm
) -> tuple[list[str], Segments]:
    """Cut the step graph in `step` and write the segments, the operators and the weights.

    Args:
        step: an ONNX file as `components.write_step` leaves it; it is read, not changed.
        attention: form of the attention operator's function body, for runtimes without kernels.

    Returns:
        the files, relative to `folder`, and the manifest's section.

    Raises:
        ExportError: the layers differ in more than their weights.
    """
    model = ir.load(step)
    cut = partition(model, is_kernel)
    first, *layers, last = cut.segments
    if not layers:
        raise ExportError("the step graph has one layer; segmented execution needs two or more")
    parts = {
        "first": merge_repeated([first], name="first", is_weight=is_parameter),
        "layer": merge_repeated(layers, name="layer", is_weight=is_parameter),
        "last": merge_repeated([last], name="last", is_weight=is_parameter),
    }
    names = _canonical_names(cut)
    for name, part in parts.items():
        _rename(part, names)
        ir.external_data.load_to_model(part.model)  # constants; the weights are inputs by now
        ir.save(part.model, folder / f"{name}.onnx")
    prepare, attend = _operators(cut)
    for name, nodes in (("qk_prepare", prepare), ("attention", attend)):
        ir.save(_operator_model(model, nodes[0], attention), folder / f"{name}.onnx")

    bindings = {
        name: [dict(zip(part.weights, row, strict=True)) for row in part.bindings]
        for name, part in parts.items()
    }
    kernel_weights = [_kernel_weights(node) for node in prepare]
    used = {
        tensor for rows in [*bindings.values(), kernel_weights] for row in rows for tensor in row.values()
    }
    tensors = {name: value.const_value for name, value in model.graph.initializers.items() if name in used}
    save_file(
        {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None},
        folder / SEGMENT_WEIGHTS,
    )
    section = Segments(
        weights=SEGMENT_WEIGHTS,
        first=bindings["first"][0],
        layers=tuple(bindings["layer"]),
        last=bindings["last"][0],
        prepare=tuple(kernel_weights),
    )
    files = [f"{name}.onnx" for name in (*parts, "qk_prepare", "attention")]
    return [*files, SEGMENT_WEIGHTS], section


def _operators(cut: Partition) -> tuple[list[ir.Node], list[ir.Node]]:
    """The two operators of every layer."""
    prepare, attend = [], []
    for stage in cut.kernels:
        by_type = {node.op_type: node for node in stage}
        if len(stage) != 2 or set(by_type) != {contract.QK_PREPARE, contract.HIERARCHICAL_SPARSE_ATTENTION}:
            raise ExportError(
                f"a layer has the operators {', '.join(node.op_type for node in stage)}; expected one "
                f"{contract.QK_PREPARE} and one {contract.HIERARCHICAL_SPARSE_ATTENTION}"
            )
        prepare.append(by_type[contract.QK_PREPARE])
        attend.append(by_type[contract.HIERARCHICAL_SPARSE_ATTENTION])
    return prepare, attend


def _canonical_names(cut: Partition) -> dict[str, str]:
    """Tensor names of the whole graph -> names that are the same in every layer."""
    prepare, attend = _operators(cut)
    names: dict[str, str] = {}
    for node in prepare:
        names[_value_name(node.inputs[0])] = "qkv"
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


def _rename(part: RepeatedSegment, names: Mapping[str, str]) -> None:
    """Give a segment's inputs and outputs their canonical names; what comes out as `x` is called `x_out`."""
    graph = part.model.graph
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
        for name, value in zip(contract.QK_PREPARE_INPUTS, node.inputs, strict=True)
        if value is not None and value.is_initializer()
    }


def _operator_model(model: ir.Model, node: ir.Node, attention: functions.AttentionForm) -> ir.Model:
    """A model of one operator node, with its function body, under the operator's own tensor names."""
    input_names: Sequence[str] = contract.QK_PREPARE_INPUTS
    output_names: Sequence[str] = contract.QK_PREPARE_OUTPUTS
    if node.op_type == contract.HIERARCHICAL_SPARSE_ATTENTION:
        input_names, output_names = contract.HSA_INPUTS, contract.HSA_OUTPUTS
    inputs = [
        ir.Value(name=name, shape=value.shape, type=value.type)
        for name, value in zip(input_names, node.inputs, strict=True)
        if value is not None
    ]
    copy = ir.Node(node.domain, node.op_type, inputs, node.attributes.values(), num_outputs=len(node.outputs))
    for new, old, name in zip(copy.outputs, node.outputs, output_names, strict=True):
        new.name, new.shape, new.type = name, old.shape, old.type
    graph = ir.Graph(
        inputs, copy.outputs, nodes=[copy], opset_imports=dict(model.opset_imports), name=node.op_type
    )
    result = ir.Model(graph, ir_version=model.ir_version, producer_name=model.producer_name)
    functions.attach(result, attention)
    return result
