"""The bodies of the operators over codes in ONNX Runtime, against the reference, and as PyTorch ops."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from lightforcing_ref.attention import hsa_attention, qk_prepare
from lightforcing_ref.fp8_cache import (
    hsa_attention_e4m3,
    hsa_attention_fp8,
    qk_prepare_fp8,
    quantize_blocks,
    quantize_values,
)
from plugins import contract, operators
from plugins.errors import ContractError
from plugins.nodes import functions, ops

HEADS, DIM, FRAMES = 2, 8, 3
TYPES = {torch.uint8: ir.DataType.UINT8, torch.int32: ir.DataType.INT32, torch.float32: ir.DataType.FLOAT}
GEOMETRY: dict[str, Any] = {"frame_tokens": 13, "block_q": 4, "block_k": 8}
ATTENTION: dict[str, Any] = GEOMETRY | {
    "keep_frames": 2,
    "sink_frames": 1,
    "near_frames": 1,
    "scale": 0.3,
    "keep_q20": (1 << 20, 1 << 19),
}
PREPARE: dict[str, Any] = GEOMETRY | {"heads": HEADS, "eps": 1e-6}


def projections() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens, width = FRAMES * 13, HEADS * DIM
    qkv = torch.randn(tokens, 3 * width, generator=generator)
    qkv[:, 2 * width :] = 0  # values that are all zero but for one head
    qkv[:, -DIM:] = torch.randn(tokens, DIM, generator=generator) * 1e3
    angle = torch.rand(tokens, DIM // 2, generator=generator) * 6
    weights = (torch.zeros(3 * width), *(torch.rand(width, generator=generator) + 0.5 for _ in range(2)))
    return dict(zip(contract.QK_PREPARE_INPUTS, (qkv, *weights, angle.cos(), angle.sin()), strict=True))


def attention_inputs() -> dict[str, Tensor]:
    q, k, v, q_mean, *rest = qk_prepare_fp8(*projections().values(), **PREPARE)
    generator = torch.Generator().manual_seed(1)
    cache = torch.randn(6, 13, HEADS, DIM, generator=generator)
    means = torch.stack([cache[:, :8].mean(1), cache[:, 8:].mean(1)], 1)
    (past_k, k_scale), (past_v, v_scale) = quantize_blocks(cache, 8, means), quantize_values(cache.flip(0), 8)
    slots, chunk = torch.tensor([3, 1, 5, -1], dtype=torch.int32), torch.tensor(1, dtype=torch.int32)
    past_k[[0, 2, 4]] = past_v[[0, 2, 4]] = 0x7F  # what no slot names may be no number
    tensors = (q, k, v, q_mean, *rest, past_k, past_v, means, k_scale, v_scale, slots, chunk)
    return dict(zip(operators.HSA_FP8_INPUTS, tensors, strict=True))


def run(
    operator: str, given: dict[str, Tensor], attributes: dict[str, Any], form: functions.AttentionForm
) -> dict[str, np.ndarray]:
    """One node in a graph of its own, in ONNX Runtime."""
    contracted = operators.OPERATORS[operator]
    inputs = [
        ir.Value(name=name, type=ir.TensorType(TYPES[value.dtype]), shape=ir.Shape(value.shape))
        for name, value in given.items()
    ]
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in attributes.items()}
    outputs = contracted.outputs
    node = ir.node(operator, inputs, listed, domain=contract.DOMAIN, num_outputs=len(outputs))
    for value, name in zip(node.outputs, outputs, strict=True):
        codes = name in ("k", "v")
        value.name, value.type = name, ir.TensorType(ir.DataType.UINT8 if codes else ir.DataType.FLOAT)
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": functions.OPSET}, name="graph")
    model = ir.Model(graph, ir_version=10)
    functions.attach(model, form)
    assert set(model.functions) == {(contract.DOMAIN, operator, "")}
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found = session.run(None, {name: value.numpy() for name, value in given.items()})
    return dict(zip(outputs, found, strict=True))


def test_prepare_gives_the_codes_of_the_reference() -> None:
    given = projections()
    found = run(operators.QK_PREPARE_FP8, given, PREPARE, "scan")
    expected = qk_prepare_fp8(*given.values(), **PREPARE)
    for (name, value), want in zip(found.items(), expected, strict=True):
        if name in ("k", "v"):
            # A code may fall to the other side where float32 sums differ in their last bit.
            assert np.mean(value != want.numpy()) < 2e-3, name
        else:
            np.testing.assert_allclose(value, want.numpy(), rtol=2e-6, atol=2e-6, err_msg=name)
    assert not found["v"][:, :, 0].any()  # zeros stay zeros
    assert not found["v"][:, 1, :, :, 5:].any()  # 13 tokens are a block of 8 and one of 5
    assert {0x7F, 0xFF}.isdisjoint(np.unique(found["k"]).tolist())


@pytest.mark.parametrize("form", ["dense", "scan"])
def test_attention_over_codes(form: functions.AttentionForm) -> None:
    given = attention_inputs()
    found = run(operators.HIERARCHICAL_SPARSE_ATTENTION_FP8, given, ATTENTION, form)["out"]
    expected = hsa_attention_fp8(*given.values(), **ATTENTION)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("form", ["dense", "scan"])
def test_products_of_codes(form: functions.AttentionForm) -> None:
    given = attention_inputs()
    found = run(operators.HIERARCHICAL_SPARSE_ATTENTION_E4M3, given, ATTENTION, form)["out"]
    expected = hsa_attention_e4m3(*given.values(), **ATTENTION)
    # A weight may fall to the other side where float32 sums differ in their last bit: a sixteenth of it.
    assert float(np.linalg.norm(found - expected.numpy())) < 1e-3 * float(expected.norm())
    assert np.median(np.abs(found - expected.numpy())) < 1e-5 * float(expected.abs().max())


class TestOps:
    @pytest.fixture(autouse=True)
    def bound(self) -> None:
        ops.bind(
            "cpu",
            hsa=hsa_attention,
            qk_prepare=qk_prepare,
            codes=(qk_prepare_fp8, hsa_attention_fp8, hsa_attention_e4m3),
        )

    def test_they_are_the_reference_and_infer_its_shapes_and_types(self) -> None:
        for name, given, attributes, reference in (
            (ops.QK_PREPARE_FP8, projections(), PREPARE, qk_prepare_fp8),
            (ops.HIERARCHICAL_SPARSE_ATTENTION_FP8, attention_inputs(), ATTENTION, hsa_attention_fp8),
            (ops.HIERARCHICAL_SPARSE_ATTENTION_E4M3, attention_inputs(), ATTENTION, hsa_attention_e4m3),
        ):
            op = getattr(torch.ops.lightforcing, name)
            expected = reference(*given.values(), **attributes)
            found = op(*given.values(), **attributes)
            inferred = op(*(value.to("meta") for value in given.values()), **attributes)
            for want, have, shaped in zip(
                *(x if isinstance(x, tuple) else (x,) for x in (expected, found, inferred)), strict=True
            ):
                assert torch.equal(want, have)
                assert (shaped.shape, shaped.dtype) == (want.shape, want.dtype)

    def test_scales_of_another_shape_are_refused(self) -> None:
        given = attention_inputs()
        for name in ("v_scale", "past_kscale"):
            wrong = given | {name: given[name][:, :1]}
            with pytest.raises(ContractError, match=rf"{name} has shape"):
                torch.ops.lightforcing.hierarchical_sparse_attention_fp8(*wrong.values(), **ATTENTION)
