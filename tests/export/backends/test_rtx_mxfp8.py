"""MXFP8 in TensorRT-RTX: not there today. This test fails on the day that it is.

On GeForce cards, products of plain FP8 with fp32 sums run at half the rate that those of block-scaled FP8 have
(docs/planning.md), so the day is worth knowing.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from onnx import TensorProto, helper

from export.backends.tensorrt_rtx.engine import build_engine
from tests.export.backends.rtx_graphs import OUT, ROWS, WIDTH, save

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra tensorrt-rtx)")

BLOCK = 32
"""Elements that share a scale in MXFP8, a power of two."""


def linear(path: Path) -> Path:
    """Y = dq(q(x)) @ dq(q(w))^T in MXFP8, with the operators that ModelOpt exports."""
    half, fp8 = TensorProto.FLOAT16, TensorProto.FLOAT8E4M3FN
    info = helper.make_tensor_value_info
    blocks = {"axis": -1, "block_size": BLOCK, "domain": "trt"}
    nodes = []
    for name in ("x", "w"):
        codes = [f"{name}_q", f"{name}_s"]
        nodes += [
            helper.make_node("TRT_MXFP8DynamicQuantize", [name], codes, output_dtype=fp8, **blocks),
            helper.make_node("TRT_MXFP8DequantizeLinear", codes, [f"{name}_d"], output_dtype=half, **blocks),
        ]
    nodes += [
        helper.make_node("Transpose", ["w_d"], ["w_t"], perm=[1, 0], name="transpose_w"),
        helper.make_node("MatMul", ["x_d", "w_t"], ["y"], name="product"),
    ]
    inputs = [info("x", half, [ROWS, WIDTH]), info("w", half, [OUT, WIDTH])]
    return save(path, nodes, inputs, [info("y", half, [ROWS, OUT])], domain="trt")


def test_mxfp8_falls_back_to_a_product_in_full_precision(tmp_path: Path) -> None:
    info = build_engine(
        linear(tmp_path / "mxfp8.onnx"),
        tmp_path / "mxfp8.engine",
        component="mxfp8",
        compute_capability="12.0",
    )
    assert info.report.gemms == {"fp16": 1}, (
        f"TensorRT-RTX {info.version} multiplies MXFP8 as {info.report.gemms}: give the linears a format of their own "
        "(export/quantize), whose products run at twice the rate of plain FP8 on GeForce cards"
    )
