"""Cutting graphs: segments chained by hand, in ONNX Runtime, equal the whole graph."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from export.errors import ExportError
from export.graph.partition import merge_repeated, partition

WIDTH = 3


def is_kernel(node: ir.Node) -> bool:
    return node.op_type == "Tanh"


def is_weight(name: str) -> bool:
    return name.startswith(("w", "table"))


def run(model: ir.Model, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    wanted = {value.name: feed[value.name] for value in session.get_inputs()}
    return dict(zip(names, session.run(names, wanted), strict=True))


@st.composite
def random_graphs(draw) -> onnx.ModelProto:
    """Random graphs of Add, Mul, Relu and MatMul with Tanh in the role of the kernels."""
    values = ["x", "y", "w0", "w1", "c"]
    nodes = []
    for index in range(draw(st.integers(3, 25))):
        kind = draw(st.sampled_from(["Add", "Mul", "Relu", "Tanh", "MatMul"]))
        arity = 1 if kind in ("Relu", "Tanh") else 2
        inputs = [draw(st.sampled_from(values)) for _ in range(arity)]
        if kind == "MatMul":
            inputs[1] = draw(st.sampled_from(["w0", "w1"]))
        nodes.append(helper.make_node(kind, inputs, [f"v{index}"], name=f"n{index}"))
        values.append(f"v{index}")
    produced = [node.output[0] for node in nodes]
    outputs = draw(st.lists(st.sampled_from(produced), min_size=1, max_size=3, unique=True))
    info = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [WIDTH, WIDTH])  # noqa: E731
    weight = lambda name, seed: numpy_helper.from_array(  # noqa: E731
        np.random.default_rng(seed).standard_normal((WIDTH, WIDTH)).astype(np.float32) / WIDTH, name
    )
    graph = helper.make_graph(
        nodes,
        "random",
        [info("x"), info("y")],
        [info(name) for name in outputs],
        initializer=[weight("w0", 0), weight("w1", 1), weight("c", 2)],
        value_info=[info(name) for name in produced if name not in outputs],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def nodes_after_a_kernel(model: ir.Model) -> set[str]:
    """Names of the nodes that depend on a kernel; only the others may be repeated."""
    after: set[ir.Node] = set()
    for node in model.graph:
        producers = [value.producer() for value in node.inputs]
        if any(producer is not None and (is_kernel(producer) or producer in after) for producer in producers):
            after.add(node)
    return {node.name for node in after}


@settings(max_examples=60, deadline=None)
@given(random_graphs())
def test_segments_and_kernels_in_turn_compute_the_whole_graph(proto):
    model = ir.from_proto(proto)
    rng = np.random.default_rng(3)
    feed = {name: rng.standard_normal((WIDTH, WIDTH)).astype(np.float32) for name in ("x", "y")}
    expected = run(model, feed)

    cut = partition(model, is_kernel)
    computed = nodes_after_a_kernel(model)
    values = dict(feed)
    values |= {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    seen: set[str] = set()
    for index, segment in enumerate(cut.segments):
        names = {node.name for node in segment.model.graph}
        assert not names & seen & computed
        seen |= names
        assert not any(is_kernel(node) for node in segment.model.graph)
        if segment.outputs:
            values |= run(segment.model, values)
        for kernel in cut.kernels[index] if index < len(cut.kernels) else ():
            values[kernel.outputs[0].name] = np.tanh(values[kernel.inputs[0].name])
    assert seen == {node.name for node in model.graph if not is_kernel(node)}
    for name, value in expected.items():
        np.testing.assert_allclose(values[name], value, rtol=1e-5, atol=1e-6)


def layered(layers: int, *, odd_one: int | None = None) -> ir.Model:
    """X -> [kernel, MatMul(w_i), Mul(small), Add residual, Gather(table_i, step)] * layers."""
    nodes, initializers = [], []
    info = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [32, 32])  # noqa: E731
    previous, infos = "x", []
    for i in range(layers):
        rng = np.random.default_rng(i)
        for name, shape in ((f"w{i}", (32, 32)), (f"table{i}", (5, 1, 32))):
            initializers.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
        initializers.append(numpy_helper.from_array(np.float32(0.125), f"scale{i}"))
        nodes += [
            helper.make_node("Tanh", [previous], [f"t{i}"]),
            helper.make_node("Gather", [f"table{i}", "step"], [f"g{i}"]),
            helper.make_node("MatMul", [f"t{i}", f"w{i}"], [f"m{i}"]),
            helper.make_node("Sub" if i == odd_one else "Mul", [f"m{i}", f"scale{i}"], [f"s{i}"]),
            helper.make_node("Add", [f"s{i}", f"g{i}"], [f"a{i}"]),
            helper.make_node("Add", [previous, f"a{i}"], [f"x{i}"]),
        ]
        infos += [info(f"{stem}{i}") for stem in "tmsa"]
        previous = f"x{i}"
    graph = helper.make_graph(
        nodes,
        "layered",
        [info("x"), helper.make_tensor_value_info("step", TensorProto.INT32, [])],
        [info(previous)],
        initializer=initializers,
        value_info=infos + [info(f"x{i}") for i in range(layers - 1)],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11))


def test_layers_share_one_model_whose_weights_are_inputs():
    model = layered(4)
    feed = {
        "x": np.random.default_rng(9).standard_normal((32, 32)).astype(np.float32),
        "step": np.array(3, np.int32),
    }
    expected = run(model, feed)["x3"]

    cut = partition(model, is_kernel)
    assert [len(list(segment.model.graph)) for segment in cut.segments] == [0, 5, 5, 5, 5]
    repeated = merge_repeated(cut.segments[1:], name="layer", is_weight=is_weight)
    assert repeated.weights == ("weight.0", "weight.1")
    assert [sorted(binding) for binding in repeated.bindings] == [[f"table{i}", f"w{i}"] for i in range(4)]
    assert list(repeated.model.graph.initializers) == ["scale0"]

    session = ort.InferenceSession(
        ir.to_proto(repeated.model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    weights = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    values = dict(feed)
    for layer, ((inputs, outputs), binding) in enumerate(
        zip(repeated.activations, repeated.bindings, strict=True)
    ):
        kernel = cut.kernels[layer][0]
        values[kernel.outputs[0].name] = np.tanh(values[kernel.inputs[0].name])
        arguments = {ours: values[theirs] for ours, theirs in zip(repeated.inputs, inputs, strict=True)}
        arguments |= {name: weights[source] for name, source in zip(repeated.weights, binding, strict=True)}
        values |= dict(zip(outputs, session.run(list(repeated.outputs), arguments), strict=True))
    np.testing.assert_allclose(values["x3"], expected, rtol=1e-5, atol=1e-5)


def test_look_ups_move_to_the_segment_that_needs_them():
    cut = partition(layered(3), is_kernel)
    for segment in cut.segments[1:]:
        assert [node.op_type for node in segment.model.graph].count("Gather") == 1
        assert "step" in segment.inputs
    crossing = [set(a.outputs) & set(b.inputs) for a, b in pairwise(cut.segments[1:])]
    assert all(not any(name.startswith("g") for name in names) for names in crossing)


def test_segments_that_differ_are_not_merged():
    cut = partition(layered(3, odd_one=1), is_kernel)
    with pytest.raises(ExportError, match="segment 1 of 3 differs from the first in more than its weights"):
        merge_repeated(cut.segments[1:], name="layer", is_weight=is_weight)
