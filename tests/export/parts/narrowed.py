"""What a graph computes in bfloat16 or float16, on a runtime without these types: every result is rounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from export.quantize.emulation import emulate_fp4

TYPES = {np.dtype(ml_dtypes.bfloat16): ir.DataType.BFLOAT16, np.dtype(np.float16): ir.DataType.FLOAT16}


def save_rounded(source: Path, target: Path, dtype: Any, *, results: bool) -> None:
    """Write the float32 graph `source` with weights rounded to `dtype` and, if wanted, all results of nodes too."""
    model = ir.load(source)
    emulate_fp4(model)
    graph = model.graph
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and value.dtype == ir.DataType.FLOAT:
            value.const_value = ir.tensor(tensor.numpy().astype(dtype).astype(np.float32), name=tensor.name)
    made = [value for node in graph for value in node.outputs if value.dtype == ir.DataType.FLOAT]
    for value in made if results else ():
        producer = value.producer()
        assert producer is not None
        down = ir.node("Cast", [value], {"to": int(TYPES[np.dtype(dtype)])})
        up = ir.node("Cast", [down.outputs[0]], {"to": int(ir.DataType.FLOAT)})
        up.outputs[0].type, up.outputs[0].shape = value.type, value.shape
        graph.insert_after(producer, [down, up])
        for use in [use for use in value.uses() if use.node is not down]:
            use.node.replace_input_with(use.idx, up.outputs[0])
        if value.is_graph_output():
            name, value.name = value.name, f"{value.name}.wide"
            graph.outputs[list(graph.outputs).index(value)] = up.outputs[0]
            up.outputs[0].name = name
    ir.save(model, target, external_data=f"{target.name}.weights")
