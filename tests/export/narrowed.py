"""What a bfloat16 or float16 graph computes, on a runtime without these types: every result is rounded."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from export.quantize_emulation import emulate_fp4
from export.quantize_twin import float32_twin

NARROW = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)


def save_narrowed(source: Path, target: Path) -> None:
    """Write the float32 twin of `source` with a cast to the narrow type and back behind each of its results."""
    model = ir.load(source)
    narrow = {
        value.name: value.dtype for node in model.graph for value in node.outputs if value.dtype in NARROW
    }
    emulate_fp4(float32_twin(model))
    graph = model.graph
    made = [value for node in graph for value in node.outputs if value.name in narrow]
    for value in made:
        producer, dtype = value.producer(), narrow[value.name]
        assert producer is not None
        assert dtype is not None
        down = ir.node("Cast", [value], {"to": int(dtype)})
        up = ir.node("Cast", [down.outputs[0]], {"to": int(ir.DataType.FLOAT)})
        up.outputs[0].type, up.outputs[0].shape = value.type, value.shape
        graph.insert_after(producer, [down, up])
        uses = [use for use in value.uses() if use.node is not down]
        for use in uses:
            use.node.replace_input_with(use.idx, up.outputs[0])
        if value.is_graph_output():
            index = list(graph.outputs).index(value)
            name, value.name = value.name, f"{value.name}.wide"
            graph.outputs[index] = up.outputs[0]
            up.outputs[0].name = name
    ir.save(model, target, external_data=f"{target.name}.weights")
