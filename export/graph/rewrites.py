"""Graph edits for TensorRT-RTX: what its parser refuses, and what it would run slowly.

The edited graph computes the same values; shapes change where a leading 1 is dropped. It is written for the engine
builder only: bundles keep the graph they were exported with.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from export.errors import ExportError

__all__ = ["prepare_for_rtx", "sink_uint8"]

_ROWWISE = frozenset(
    (
        "Abs",
        "Add",
        "Cast",
        "Clip",
        "Div",
        "Exp",
        "Gelu",
        "Identity",
        "LayerNormalization",
        "Max",
        "Min",
        "Mul",
        "Neg",
        "RMSNormalization",
        "Reciprocal",
        "Sigmoid",
        "Sqrt",
        "Sub",
        "Tanh",
        "Where",
    )
)
"""Operators that treat the rows of `[1, T, N]` as they treat those of `[T, N]`, with their default axis of -1."""

_SCALED = frozenset({"QuantizeLinear", "DequantizeLinear"})
"""Row-wise too, if their scale is one number."""

_REDUCTIONS = frozenset({"ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"})
"""Row-wise too, if they reduce the axis -1 and keep it."""

_LAYOUT = frozenset({"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"})
"""Operators that move elements and do not care about their type."""

_BATCHED = 3
"""Rank of `[1, T, N]`."""


def prepare_for_rtx(model: ir.Model) -> None:
    """Edit `model` in place so that TensorRT-RTX builds it, and builds it well.

    - A cast to uint8 moves behind the layout operators between it and the output: the parser knows uint8 at the
      outputs only.
    - The unit batch dimension goes wherever operators work row by row. A matrix product of `[1, T, K]` with a
      transposed weight is otherwise built as a batched one, and an engine whose weights are inputs then transposes
      every weight in every run.
    - Inputs and outputs `[1, T, N]` become `[T, N]` and bias inputs `[N]` become `[1, N]`, the same bytes: each is
      otherwise copied by a launch of its own.
    - An RMS norm over all heads whose result is transposed to `[1, H, T, D]` is computed on the transposed heads. It
      is otherwise two launches with a float32 tensor of the same size between them.

    Raises:
        ExportError: the graph holds operators of this project, which no engine of TensorRT-RTX can hold.
    """
    own = [node for node in model.graph if node.domain == "lightforcing"]
    if own:
        raise ExportError(
            f"the graph holds {len(own)} operators that TensorRT-RTX cannot run, the first {own[0].op_type} "
            f"({own[0].name!r}); it takes no plugins: cut the graph at them first (export.graph.partition)"
        )
    sink_uint8(model)
    _norm_transposed_heads(model.graph)
    _drop_batch(model.graph)
    passes.RemoveUnusedNodesPass()(model)
    _widen_biases(model.graph)


def _static(value: ir.Value | None) -> tuple[int, ...] | None:
    """Shape of `value` if all of it is known."""
    if value is None or value.shape is None:
        return None
    dims = tuple(dim for dim in value.shape if isinstance(dim, int))
    return dims if len(dims) == value.shape.rank() else None


def _replace(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Put `new` in the place of `old`, as an output of the graph and under its name as well."""
    name = old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = f"{name}_before", name


def sink_uint8(model: ir.Model) -> None:
    """Move each cast to uint8 behind the layout operators between it and the output, in place."""
    graph = model.graph
    for output in list(graph.outputs):
        if output.dtype != ir.DataType.UINT8:
            continue
        chain: list[ir.Node] = []
        node = output.producer()
        while node is not None and node.op_type in _LAYOUT and len(list(node.outputs[0].uses())) <= 1:
            chain.append(node)
            node = node.inputs[0].producer() if node.inputs[0] is not None else None
        if node is None or node.op_type != "Cast" or not chain:
            continue
        source = node.inputs[0]
        assert source is not None
        chain[-1].replace_input_with(0, source)
        for layout in chain:
            layout.outputs[0].type = source.type
        cast = ir.Node(
            "", "Cast", [output], node.attributes.values(), num_outputs=1, name=f"{node.name}_last"
        )
        cast.outputs[0].shape, cast.outputs[0].type = output.shape, ir.TensorType(ir.DataType.UINT8)
        graph.append(cast)
        graph.outputs[list(graph.outputs).index(output)] = cast.outputs[0]
        output.name, cast.outputs[0].name = f"{output.name}_wide", output.name


_HEADS_FIRST = (0, 2, 1, 3)
"""`[1, T, H, D]` -> `[1, H, T, D]`."""


def _only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    """What takes `value`, if that is one node of this type and nothing else."""
    users = [use.node for use in value.uses()]
    found = len(users) == 1 and users[0].op_type == op_type and not value.is_graph_output()
    return users[0] if found else None


def _norm_transposed_heads(graph: ir.Graph) -> None:
    for norm in [node for node in graph if node.op_type == "RMSNormalization"]:
        reshape = _only_user(norm.outputs[0], "Reshape")
        transpose = None if reshape is None else _only_user(reshape.outputs[0], "Transpose")
        if reshape is None or transpose is None or transpose.outputs[0].is_graph_output():
            continue
        axis, order = norm.attributes.get("axis"), transpose.attributes.get("perm")
        heads = _static(reshape.outputs[0])
        last = axis is None or axis.as_int() in (-1, _BATCHED - 1)
        if (
            last
            and _is_batch(_static(norm.inputs[0]))
            and heads is not None
            and order is not None
            and tuple(order.as_ints()) == _HEADS_FIRST
        ):
            result = _normed_heads(graph, norm, transpose, heads)
            transpose.outputs[0].replace_all_uses_with(result)


def _normed_heads(graph: ir.Graph, norm: ir.Node, before: ir.Node, heads: tuple[int, ...]) -> ir.Value:
    """What `norm` gives, as `[1, H, T, D]`: in float32 up to the weight, as ONNX defines it."""
    x, weight = norm.inputs[0], norm.inputs[1]
    assert x is not None and weight is not None and x.dtype is not None
    batch, tokens, count, width = heads
    turned, rows = (batch, count, tokens, width), (batch, 1, tokens, 1)

    def node(
        op_type: str,
        inputs: list[ir.Value],
        dims: tuple[int, ...],
        dtype: ir.DataType,
        attributes: dict[str, int | list[int]] | None = None,
    ) -> ir.Value:
        name = f"{norm.name}.{len(made)}"
        output = ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(dtype))
        made.append(ir.node(op_type, inputs, attributes, outputs=[output], name=name))
        return output

    made: list[ir.Node] = []
    wide, kind = ir.DataType.FLOAT, x.dtype
    eps = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
    constants: dict[str, np.ndarray] = {
        "heads": np.array(heads, dtype=np.int64),
        "weight": np.array((1, count, 1, width), dtype=np.int64),
        "axes": np.array((1, 3), dtype=np.int64),
        "eps": np.array(eps, dtype=np.float32),
    }
    given = {key: _constant(graph, f"{norm.name}.{key}", array) for key, array in constants.items()}
    split = node("Reshape", [x, given["heads"]], heads, kind)
    split = node("Transpose", [split], turned, kind, {"perm": list(_HEADS_FIRST)})
    split = node("Cast", [split], turned, wide, {"to": int(wide)})
    square = node("Mul", [split, split], turned, wide)
    mean = node("ReduceMean", [square, given["axes"]], rows, wide, {"keepdims": 1})
    root = node("Sqrt", [node("Add", [mean, given["eps"]], rows, wide)], rows, wide)
    normed = node("Cast", [node("Div", [split, root], turned, wide)], turned, kind, {"to": int(kind)})
    factor = node("Reshape", [weight, given["weight"]], (1, count, 1, width), kind)
    result = node("Mul", [normed, factor], turned, kind)
    graph.insert_before(before, made)
    return result


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


class _Flattener:
    """Rewrites nodes on `[1, T, N]` as nodes on `[T, N]`, and remembers both forms of every tensor."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.flat: dict[ir.Value, ir.Value] = {}
        self._shapes: dict[tuple[int, ...], ir.Value] = {}

    def _shape(self, dims: tuple[int, ...]) -> ir.Value:
        if dims not in self._shapes:
            name = "rtx_shape_" + "x".join(map(str, dims))
            self._shapes[dims] = _constant(self.graph, name, np.array(dims, dtype=np.int64))
        return self._shapes[dims]

    def _reshape(self, value: ir.Value, dims: tuple[int, ...], before: ir.Node, name: str) -> ir.Value:
        node = ir.Node("", "Reshape", [value, self._shape(dims)], num_outputs=1, name=name)
        (out,) = node.outputs
        out.name, out.shape, out.type = name, ir.Shape(dims), value.type
        self.graph.insert_before(before, node)
        return out

    def flatten_input(self, value: ir.Value) -> None:
        """Declare the graph input `[1, T, N]` as `[T, N]`."""
        dims, nodes = _static(value), [use.node for use in value.uses()]
        assert dims is not None
        value.shape = ir.Shape(dims[1:])
        if nodes:
            first = next(node for node in self.graph if node in nodes)
            batched = self._reshape(value, dims, first, f"{value.name}_batch")
            for use in list(value.uses()):
                if use.node is not batched.producer():
                    use.node.replace_input_with(use.idx, batched)
            self.flat[batched] = value

    def operand(self, value: ir.Value | None, node: ir.Node) -> ir.Value | None:
        """`value` without its leading 1, if it has three dimensions."""
        dims = _static(value)
        if value is None or dims is None or len(dims) != _BATCHED:
            return value
        if value not in self.flat:
            source = _source(value)
            if _static(source) != dims[1:]:
                source = self._reshape(source, dims[1:], node, f"{value.name}_rows")
            self.flat[value] = source
        return self.flat[value]

    def skip(self, node: ir.Node) -> None:
        """Let what takes the only row of a batch away take the two-dimensional tensor instead."""
        value, out = node.inputs[0], node.outputs[0]
        if value in self.flat and _static(self.flat[value]) == _static(out) and not out.is_graph_output():
            out.replace_all_uses_with(self.flat[value])
        elif value in self.flat and node.op_type == "Reshape":
            node.replace_input_with(0, self.flat[value])

    def rewrite(self, node: ir.Node, flattened: Sequence[int]) -> None:
        """Replace `node` by one whose inputs at the positions `flattened`, and whose output, are two-dimensional."""
        old = node.outputs[0]
        dims = _static(old)
        assert dims is not None
        inputs = [self.operand(v, node) if i in flattened else v for i, v in enumerate(node.inputs)]
        attributes = [ir.AttrInt64("axis", -1) if a.name == "axis" else a for a in node.attributes.values()]
        new = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            attributes,
            num_outputs=1,
            version=node.version,
            name=f"{node.name}_rows",
        )
        (out,) = new.outputs
        out.name, out.shape, out.type = f"{old.name}_flat", ir.Shape(dims[1:]), old.type
        self.graph.insert_before(node, new)
        batched = self._reshape(out, dims, node, f"{node.name}_batch")
        _replace(self.graph, old, batched)
        self.flat[batched] = out


def _last_axis(node: ir.Node) -> bool:
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    if axes is None or axes.const_value is None:
        return False
    keeps = node.attributes["keepdims"].as_int() if "keepdims" in node.attributes else 1
    return keeps == 1 and axes.const_value.numpy().tolist() == [-1]


def _is_batch(dims: tuple[int, ...] | None) -> bool:
    return dims is not None and len(dims) == _BATCHED and dims[0] == 1


def _flattened_inputs(node: ir.Node) -> list[int] | None:
    """Positions of the inputs that lose their leading 1 if `node` can work on `[T, N]`; None if it cannot."""
    out = _static(node.outputs[0])
    if node.domain or len(node.outputs) != 1 or not _is_batch(out):
        return None
    shapes = [_static(value) for value in node.inputs]
    if any(value is not None and dims is None for value, dims in zip(node.inputs, shapes, strict=True)):
        return None
    if any(dims and len(dims) == _BATCHED and dims[0] != 1 for dims in shapes):
        return None
    batched = [index for index, dims in enumerate(shapes) if dims and len(dims) == _BATCHED]
    axis = node.attributes.get("axis")
    if node.op_type == "MatMul":  # the other operand is a weight
        return [0] if shapes[0] and shapes[1] and (len(shapes[0]), len(shapes[1])) == (_BATCHED, 2) else None
    if node.op_type in _SCALED:
        return [0] if shapes[1] == () else None
    if node.op_type in _REDUCTIONS:
        return [0] if _last_axis(node) else None
    if node.op_type not in _ROWWISE or (axis is not None and axis.as_int() not in (-1, _BATCHED - 1)):
        return None
    return batched


def _source(value: ir.Value) -> ir.Value:
    """What `value` was reshaped from."""
    node = value.producer()
    while (
        node is not None
        and node.op_type in ("Reshape", "Unsqueeze", "Squeeze")
        and node.inputs[0] is not None
    ):
        value = node.inputs[0]
        node = value.producer()
    return value


def _takes_only_row(node: ir.Node) -> bool:
    """Whether `node` is `x[0]` or another way to write `[1, T, N]` as `[T, N]`, or reshapes it by absolute sizes."""
    if node.op_type == "Gather":
        axis, index = node.attributes.get("axis"), node.inputs[1]
        dims, out = _static(node.inputs[0]), _static(node.outputs[0])
        first = axis is None or axis.as_int() == 0
        return first and dims is not None and dims[0] == 1 and dims[1:] == out and _static(index) == ()
    if node.op_type == "Reshape":
        shape = node.inputs[1].const_value if node.inputs[1] is not None else None
        return shape is not None and 0 not in shape.numpy()
    return node.op_type == "Squeeze"


def _drop_batch(graph: ir.Graph) -> None:
    flattener = _Flattener(graph)
    for value in graph.inputs:
        if _is_batch(_static(value)):
            flattener.flatten_input(value)
    for node in list(graph):
        positions = _flattened_inputs(node)
        if positions:
            flattener.rewrite(node, positions)
        elif len(node.outputs) == 1 and _takes_only_row(node):
            flattener.skip(node)
    for value in list(graph.outputs):
        flat = flattener.flat.get(value)
        if flat is not None and not flat.is_graph_output() and not flat.is_graph_input():
            graph.outputs[list(graph.outputs).index(value)] = flat
            value.name, flat.name = f"{value.name}_batch", value.name


def _widen_biases(graph: ir.Graph) -> None:
    for value in graph.inputs:
        dims = _static(value)
        uses = list(value.uses())
        if dims and len(dims) == 1 and uses and all(_adds_rows(use.node, value) for use in uses):
            value.shape = ir.Shape([1, *dims])


def _adds_rows(node: ir.Node, value: ir.Value) -> bool:
    ranks = [len(_static(other) or ()) for other in (*node.inputs, node.outputs[0]) if other is not value]
    return node.op_type in ("Add", "Mul") and all(rank == 2 for rank in ranks)
