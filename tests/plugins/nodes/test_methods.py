"""The other methods' ONNX bodies in ONNX Runtime against their oracles, over random shapes, histories and budgets."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from export.graph.oracles import ORACLES
from plugins import contract
from plugins.nodes.functions import AttentionForm
from tests import brute_force
from tests.plugins.nodes.test_functions import attention_inputs, finished, session

FORMS: tuple[AttentionForm, ...] = ("dense", "scan")
EXACT = {"frame_tokens": 24, "block_q": 8, "block_k": 4, "scale": 0.5}
RAGGED = {"frame_tokens": 35, "block_q": 8, "block_k": 6, "scale": 0.25}
FULL = contract.DENSE_Q20
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    (contract.SLIDING_TILE, {**EXACT, "columns": 6, "tile": (2, 3), "windows": (3, 1, 1), "sink_frames": 0}),
    (contract.SLIDING_TILE, {**RAGGED, "columns": 7, "tile": (2, 2), "windows": (5, 3, 3, 1, 3, 1), "sink_frames": 1}),
    (contract.SLIDING_TILE, {**RAGGED, "columns": 5, "tile": (8, 1), "windows": (99, 1, 3), "sink_frames": 2}),
    (contract.RADIAL, {**EXACT, "decay": 0.2, "sink_frames": 1}),
    (contract.RADIAL, {**RAGGED, "block_k": 2, "block_q": 3, "decay": 0.5, "sink_frames": 0}),
    (contract.SPARGE, {**EXACT, "similarity": 0.4, "cumulative": 0.0, "smooth": 1, "keep_q20": (FULL, FULL // 3)}),
    (contract.SPARGE, {**RAGGED, "similarity": 0.3, "cumulative": 0.6, "smooth": 0, "keep_q20": (FULL,)}),
    (contract.SPARGE, {**RAGGED, "similarity": -0.1, "cumulative": 0.9, "smooth": 1, "keep_q20": (FULL,)}),
    (contract.SPARGE, {**EXACT, "similarity": 1.0, "cumulative": 0.0, "smooth": 1, "keep_q20": (FULL, 1)}),
    (contract.VMOBA, {**EXACT, "columns": 6, "extent": (2, 0, 0), "top": 0, "threshold": 0.25, "query_block": 0}),
    (contract.VMOBA, {**RAGGED, "columns": 7, "extent": (0, 2, 3), "top": 0, "threshold": 0.5, "query_block": 0}),
    (contract.VMOBA, {**RAGGED, "columns": 7, "extent": (2, 2, 3), "top": 4, "threshold": 1.0, "query_block": 0}),
    (contract.VMOBA, {**EXACT, "columns": 4, "extent": (1, 0, 0), "top": 99, "threshold": 1.0, "query_block": 0}),
    (contract.VMOBA, {**RAGGED, "columns": 7, "extent": (2, 2, 3), "top": 0, "threshold": 0.4, "query_block": 8}),
    (contract.VMOBA, {**RAGGED, "columns": 5, "extent": (1, 3, 2), "top": 3, "threshold": 1.0, "query_block": 10}),
    (contract.VMOBA, {**EXACT, "columns": 6, "extent": (0, 0, 2), "top": 0, "threshold": 0.3, "query_block": 99}),
    (contract.PERSISTENT_BLOCK, {**EXACT, "keep_q20": (FULL, FULL // 4)}),
    (contract.PERSISTENT_BLOCK, {**RAGGED, "keep_q20": (FULL // 3, 1)}),
    (contract.SPARSE_LINEAR, {**EXACT, "keep_q20": (FULL, FULL // 4)}),
    (contract.SPARSE_LINEAR, {**RAGGED, "keep_q20": (FULL // 3, 1)}),
)  # fmt: skip


@functools.cache
def method_session(index: int, form: AttentionForm) -> ort.InferenceSession:
    """One node whose every dimension is symbolic."""
    operator, attributes = CASES[index]
    inputs = attention_inputs(ir.DataType.FLOAT)
    if operator == contract.PERSISTENT_BLOCK:
        inputs.append(ir.Value(name="pinned", type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape([])))
    if operator == contract.SPARSE_LINEAR:
        for name, shape in (("linear_weight", ["dim", "dim"]), ("linear_bias", ["dim"])):
            inputs.append(ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape)))
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in attributes.items()}
    node = ir.node(operator, inputs, given, domain=contract.DOMAIN)
    return session(finished(inputs, node, [("out", ir.DataType.FLOAT, ["tokens", "heads", "dim"])], form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: f"{CASES[index][0]}-{index}")
def test_a_body_is_its_oracle(index: int, form: AttentionForm) -> None:
    operator, attributes = CASES[index]
    rng = np.random.default_rng(index)
    for past in (0, 1, 2, 3, 5, 8):
        case = brute_force.random_case(
            rng,
            head_dim=6,
            past=past,
            max_past=past + int(rng.integers(0, 3)),
            chunk_frames=int(rng.choice([1, 3])),
            chunk=int(rng.integers(0, 3)),
            **{name: attributes[name] for name in ("frame_tokens", "block_q", "block_k")},
        )
        # Keys with a common part, as real ones have: then some blocks are similar and others are not.
        common = rng.standard_normal((1, 2, 6)).astype(np.float32)
        case.inputs["k"] += common
        case.inputs["past_k"] += common
        case.inputs["k_mean"] += common
        case.inputs["past_kmean"] += common
        if operator == contract.PERSISTENT_BLOCK:
            case.inputs["pinned"] = np.array(rng.integers(0, past + 1), dtype=np.int32)
        if operator == contract.SPARSE_LINEAR:
            case.inputs["linear_weight"] = rng.standard_normal((6, 6)).astype(np.float32)
            case.inputs["linear_bias"] = rng.standard_normal(6).astype(np.float32)
        expected = ORACLES[operator](*map(torch.from_numpy, case.inputs.values()), **attributes)
        (found,) = method_session(index, form).run(None, case.inputs)
        np.testing.assert_allclose(found, expected.numpy(), atol=2e-5, err_msg=f"past {past}")
