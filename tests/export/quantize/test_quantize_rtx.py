"""What TensorRT-RTX makes of quantized linears, built for an RTX 5090 with no GPU and read from the plan's own text."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from export.backends.tensorrt_rtx.engine_text import parse_engine
from export.graph.partition import merge_repeated, partition
from export.quantize.formats import choose_formats, linear_names, quantize

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

TOKENS, DIM, HIDDEN = 64, 128, 256
SHAPES = {"self_attn.o": (DIM, DIM), "ffn.0": (HIDDEN, DIM), "ffn.2": (DIM, HIDDEN)}


def layer() -> ir.Model:
    """X -> self_attn.o -> ffn.0 -> GELU -> ffn.2 -> + x in bfloat16, written as the exporter writes it."""
    helper, rng = onnx.helper, np.random.default_rng(0)
    nodes, initializers, infos, previous = [], [], [], "x"
    info = lambda name, width: helper.make_tensor_value_info(  # noqa: E731
        name, onnx.TensorProto.BFLOAT16, [1, TOKENS, width]
    )
    for kind, (rows, columns) in SHAPES.items():
        stem = f"model.blocks.0.{kind}"
        for name, shape in (("weight", (rows, columns)), ("bias", (rows,))):
            array = rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
            initializers.append(onnx.numpy_helper.from_array(array, f"{stem}.{name}"))
        nodes += [
            helper.make_node("Transpose", [f"{stem}.weight"], [f"{kind}.t"], perm=[1, 0]),
            helper.make_node("MatMul", [previous, f"{kind}.t"], [f"{kind}.m"]),
            helper.make_node("Add", [f"{kind}.m", f"{stem}.bias"], [kind]),
        ]
        infos += [info(f"{kind}.m", rows), info(kind, rows)]
        previous = kind
        if kind == "ffn.0":
            nodes.append(helper.make_node("Gelu", [kind], ["gelu"], approximate="tanh"))
            infos.append(info("gelu", rows))
            previous = "gelu"
    nodes.append(helper.make_node("Add", [previous, "x"], ["y"]))
    graph = helper.make_graph(
        nodes, "layer", [info("x", DIM)], [info("y", DIM)], initializers, value_info=infos
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11))


def with_weights_as_inputs(model: ir.Model) -> ir.Model:
    (segment,) = partition(model, lambda node: False).segments
    return merge_repeated([segment], name="layer", is_weight=lambda name: name.startswith("model.")).model


def build(path: Path) -> bytes:
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path)), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM120, 0)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None
    return bytes(plan)


@pytest.mark.parametrize("inputs", [False, True], ids=["embedded", "inputs"])
@pytest.mark.parametrize(
    ("precision", "static", "expected"),
    [
        (None, False, {"bf16": 3}),
        ("fp8", False, {"fp8": 3}),
        ("fp8", True, {"fp8": 3}),
        ("nvfp4", False, {"fp4": 3}),
    ],
    ids=["bf16", "fp8-dynamic", "fp8-static", "nvfp4"],
)
def test_products_run_in_the_type_asked_for(
    precision: str | None, static: bool, expected: dict[str, int], inputs: bool, tmp_path: Path
) -> None:
    model = layer()
    if precision is not None:
        names = linear_names(model)
        amax = dict.fromkeys(names, 4.0) if static else None
        quantize(model, choose_formats(names, precision), amax=amax)
        suffixes = Counter(name.rpartition(".")[2] for name in model.graph.initializers)
        assert (suffixes["fp8"], suffixes["fp4"]) == (expected.get("fp8", 0), expected.get("fp4", 0))
    if inputs:
        model = with_weights_as_inputs(model)
    ir.save(model, tmp_path / "layer.onnx")
    assert parse_engine(build(tmp_path / "layer.onnx")).gemms == expected


@pytest.mark.parametrize(("precision", "fused"), [(None, True), ("fp8", False), ("nvfp4", False)])
def test_only_products_in_bf16_take_their_epilogue(
    precision: str | None, fused: bool, tmp_path: Path
) -> None:
    """If this fails for a quantized one, TensorRT-RTX has learnt it: GELU is a launch less (docs/planning.md)."""
    model = layer()
    if precision is not None:
        quantize(model, choose_formats(linear_names(model), precision))
    ir.save(with_weights_as_inputs(model), tmp_path / "layer.onnx")
    products = [one for one in parse_engine(build(tmp_path / "layer.onnx")).launches if one.kind == "gemm"]
    assert [product.fused for product in products] == [fused] * 3


def test_fp4_quantization_is_a_launch_behind_the_one_that_makes_its_input(tmp_path: Path) -> None:
    """If this fails, TensorRT-RTX has learnt to write FP4 in the kernel before (docs/planning.md)."""
    model = layer()
    quantize(model, choose_formats(linear_names(model), "nvfp4"))
    ir.save(with_weights_as_inputs(model), tmp_path / "layer.onnx")
    launches = parse_engine(build(tmp_path / "layer.onnx")).launches
    quantizing = [launch.name for launch in launches if "Dyna" in launch.name]
    assert len(quantizing) == 3
    assert all(re.fullmatch(r"__myl_Dyna(Resh|Move)*(_0x\w+)?", name) for name in quantizing), quantizing
