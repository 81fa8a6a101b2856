"""The operators' contract: attribute validation, shape rules, and that it needs nothing but Python."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugins import contract
from plugins.contract import HSAAttributes, QKPrepareAttributes
from plugins.errors import ContractError, PluginError
from plugins.shapes import hsa_output_shapes, qk_prepare_output_shapes
from tests import brute_force

HSA: dict[str, Any] = {
    "frame_tokens": 20,
    "block_q": 8,
    "block_k": 4,
    "keep_frames": 6,
    "sink_frames": 1,
    "near_frames": 2,
    "scale": 0.25,
    "keep_q20": (1 << 20, 1000),
}
PREPARE: dict[str, Any] = {"heads": 2, "frame_tokens": 20, "block_q": 8, "block_k": 4, "eps": 1e-6}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frame_tokens": 0}, "frame_tokens is 0; expected at least 1"),
        ({"block_q": -4}, "block_q is -4"),
        ({"block_k": 4.0}, r"block_k is 4\.0; expected an integer"),
        ({"frame_tokens": True}, "frame_tokens is True; expected an integer"),
        ({"keep_frames": 0, "sink_frames": 0, "near_frames": 0}, "keep_frames is 0; expected at least 1"),
        ({"sink_frames": -1}, "sink_frames is -1"),
        ({"near_frames": -1}, "near_frames is -1"),
        ({"keep_frames": 2}, "keep_frames 2 is smaller than sink_frames [+] near_frames = 1 [+] 2; raise"),
        ({"scale": 0.0}, r"scale is 0\.0; expected a positive finite number"),
        ({"scale": float("inf")}, "scale is inf"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"keep_q20": ()}, "keep_q20 is empty"),
        ({"keep_q20": (1 << 20, -1)}, r"keep_q20\[1\] is -1"),
        ({"keep_q20": ((1 << 20) + 1,)}, r"keep_q20\[0\] is 1048577; .* at most 1048576"),
        ({"keep_q20": (0.5,)}, r"keep_q20\[0\] is 0\.5; expected an integer"),
    ],
)
def test_attention_attributes_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        HSAAttributes(**{**HSA, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 0}, "heads is 0"),
        ({"eps": 0}, "eps is 0; expected a positive"),
        ({"block_q": 0}, "block_q is 0"),
    ],
)
def test_prepare_attributes_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        QKPrepareAttributes(**{**PREPARE, **change})


def test_attributes_list_their_values_in_schema_order() -> None:
    assert tuple(HSAAttributes(**HSA).as_dict().items()) == tuple(HSA.items())
    assert tuple(QKPrepareAttributes(**PREPARE).as_dict().items()) == tuple(PREPARE.items())
    assert tuple(HSA) == contract.HSA_ATTRIBUTES
    assert tuple(PREPARE) == contract.QK_PREPARE_ATTRIBUTES


def test_lists_become_tuples_so_that_attributes_can_be_keys() -> None:
    assert hash(HSAAttributes(**{**HSA, "keep_q20": [5]})) == hash(HSAAttributes(**{**HSA, "keep_q20": (5,)}))


def test_contract_errors_can_be_caught_as_value_errors_and_as_plugin_errors() -> None:
    assert issubclass(ContractError, ValueError)
    assert issubclass(ContractError, PluginError)


@pytest.mark.parametrize(
    ("frame_tokens", "block", "blocks"), [(1536, 64, 24), (1560, 64, 25), (1560, 128, 13), (5, 8, 1)]
)
def test_blocks_are_aligned_with_frames(frame_tokens: int, block: int, blocks: int) -> None:
    attributes = HSAAttributes(**{**HSA, "frame_tokens": frame_tokens, "block_q": block, "block_k": block})
    assert (attributes.q_blocks, attributes.k_blocks) == (blocks, blocks)


@pytest.mark.parametrize(
    ("sparsity", "past", "per_frame", "kept"),
    # Published budgets of the short configuration, exact and ragged frames (rounded sparsities, so not every row).
    [(0.827, 3, 24, 24), (0.855, 6, 24, 31), (0.883, 12, 24, 42), (0.898, 18, 24, 51), (0.898, 18, 25, 53)],
)
def test_kept_blocks_of_the_published_table(sparsity: float, past: int, per_frame: int, kept: int) -> None:
    entry = round((1 - sparsity) * (1 << 20))
    attributes = HSAAttributes(
        **{**HSA, "frame_tokens": per_frame * 64, "block_k": 64, "keep_q20": (1 << 20, entry)}
    )
    assert attributes.kept_blocks(1, past, 3) == kept


@given(
    table=st.lists(st.integers(0, 1 << 20), min_size=1, max_size=5),
    chunk=st.integers(-3, 9),
    past=st.integers(0, 30),
    frames=st.integers(1, 3),
)
def test_kept_blocks_equal_the_brute_force(table: list[int], chunk: int, past: int, frames: int) -> None:
    attributes = HSAAttributes(**{**HSA, "keep_q20": tuple(table)})
    total = (past + frames) * 5
    assert attributes.kept_blocks(chunk, past, frames) == brute_force.kept_blocks(table, chunk, total, past)


def attention_shapes() -> dict[str, tuple[int, ...]]:
    return {
        "q": (60, 2, 16),
        "k": (60, 2, 16),
        "v": (60, 2, 16),
        "q_mean": (3, 3, 2, 16),
        "k_mean": (3, 5, 2, 16),
        "past_k": (7, 20, 2, 16),
        "past_v": (7, 20, 2, 16),
        "past_kmean": (7, 5, 2, 16),
        "frame_slots": (6,),
        "chunk": (),
    }


def prepare_shapes() -> dict[str, tuple[int, ...]]:
    return {
        "qkv": (60, 96),
        "bias": (96,),
        "norm_q": (32,),
        "norm_k": (32,),
        "cos": (60, 8),
        "sin": (60, 8),
    }


def test_output_shapes() -> None:
    assert tuple(attention_shapes()) == contract.HSA_INPUTS
    assert hsa_output_shapes(HSAAttributes(**HSA), attention_shapes()) == {"out": (60, 2, 16)}
    assert tuple(prepare_shapes()) == contract.QK_PREPARE_INPUTS
    assert qk_prepare_output_shapes(QKPrepareAttributes(**PREPARE), prepare_shapes()) == {
        "q": (60, 2, 16),
        "k": (60, 2, 16),
        "v": (60, 2, 16),
        "q_mean": (3, 3, 2, 16),
        "k_mean": (3, 5, 2, 16),
        "k_scale": (3, 5, 2),
        "v_scale": (3, 5, 2),
    }


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("q", (60, 32), r"q has shape \[60, 32\]; expected \[tokens, heads, head_dim\]"),
        ("q", (61, 2, 16), "q has 61 tokens; expected whole frames"),
        ("q", (0, 2, 16), "q has 0 tokens"),
        ("v", (60, 2, 8), r"v has shape \[60, 2, 8\]; expected \[60, 2, 16\]"),
        ("q_mean", (3, 5, 2, 16), r"q_mean has shape .* expected \[3, 3, 2, 16\]"),
        ("past_k", (7, 24, 2, 16), r"past_k has shape .* expected \[slots, 20, 2, 16\]"),
        ("past_kmean", (7, 3, 2, 16), r"past_kmean .* expected \[slots, 5, 2, 16\]"),
        ("frame_slots", (1, 6), "frame_slots has shape"),
        ("chunk", (1,), r"chunk has shape \[1\]; expected \[\]"),
    ],
)
def test_attention_shapes_are_checked(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        hsa_output_shapes(HSAAttributes(**HSA), {**attention_shapes(), name: shape})


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("qkv", (60, 97), "qkv has width 97"),
        ("qkv", (60, 6 * 15), "an even head_dim"),
        ("qkv", (59, 96), "qkv has 59 tokens"),
        ("bias", (32,), r"bias has shape \[32\]; expected \[96\]"),
        ("norm_k", (16,), r"norm_k has shape \[16\]; expected \[32\]"),
        ("cos", (60, 16), r"cos has shape \[60, 16\]; expected \[60, 8\]"),
    ],
)
def test_prepare_shapes_are_checked(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        qk_prepare_output_shapes(QKPrepareAttributes(**PREPARE), {**prepare_shapes(), name: shape})


def test_the_contract_imports_nothing_outside_the_standard_library() -> None:
    code = (
        "import sys; import plugins.contract; "
        "print([m for m in ('torch', 'onnx', 'onnx_ir', 'onnxscript', 'numpy', 'triton') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
