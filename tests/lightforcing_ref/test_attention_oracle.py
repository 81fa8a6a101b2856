"""The oracle of both operators against an independent brute-force loop written from the definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lightforcing_ref.attention import block_means, hsa_attention, hsa_selection, qk_prepare
from lightforcing_ref.sparsity import HSAConfig
from tests import brute_force
from tests.brute_force import DENSE, HSACase

FAST = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
FORMS: tuple[Literal["mask", "gather"], ...] = ("mask", "gather")


def run(case: HSACase, form: Literal["mask", "gather"], dtype: torch.dtype | None = None) -> torch.Tensor:
    inputs = {name: torch.from_numpy(value) for name, value in case.inputs.items()}
    if dtype is not None:
        inputs |= {name: inputs[name].to(dtype) for name in ("q", "k", "v", "past_k", "past_v")}
    return hsa_attention(**inputs, **case.attributes, form=form)


def selected(case: HSACase) -> dict[brute_force.Pair, frozenset[int]]:
    slots = case.past_slots
    names = ("keep_frames", "sink_frames", "near_frames")
    mask = hsa_selection(
        torch.from_numpy(case.inputs["q_mean"]),
        torch.from_numpy(np.concatenate([case.inputs["past_kmean"][slots], case.inputs["k_mean"]])),
        past_frames=len(slots),
        chunk=int(case.inputs["chunk"]),
        hsa=HSAConfig(*(case.attributes[name] for name in names)),
        keep_q20=case.attributes["keep_q20"],
    )
    return brute_force.mask_to_sets(mask.numpy())


@FAST
@given(case=brute_force.hsa_cases())
def test_selection_and_both_forms_equal_the_definition(case: HSACase) -> None:
    expected, selection = brute_force.hsa(case)
    assert brute_force.selection_errors(case, selection, selected(case)) == []
    assume(not brute_force.is_ambiguous(selection))
    for form in FORMS:
        np.testing.assert_allclose(run(case, form).numpy(), expected, atol=1e-5, rtol=1e-5, err_msg=form)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_narrow_types_are_rounded_once(dtype: torch.dtype, form: Literal["mask", "gather"]) -> None:
    case = brute_force.random_case(np.random.default_rng(0), past=6, block_k=8, frame_tokens=13, ties=True)
    names = ("q", "k", "v", "past_k", "past_v")
    rounded = {name: torch.from_numpy(case.inputs[name]).to(dtype).float().numpy() for name in names}
    case = HSACase(case.inputs | rounded, case.attributes)
    out = run(case, form, dtype)
    assert out.dtype == dtype
    step = torch.finfo(dtype).eps
    np.testing.assert_allclose(out.float().numpy(), brute_force.hsa(case)[0], atol=step, rtol=step)


EDGES: tuple[dict[str, Any], ...] = (
    {"past": 0, "max_past": 0, "slots": 0},
    {"past": 0, "max_past": 4},
    {"past": 3, "keep_frames": 3},
    {"past": 4, "keep_frames": 3},
    {"past": 7, "keep_frames": 3, "sink_frames": 2, "near_frames": 1},  # sink and near cover everything
    {"past": 2, "keep_frames": 9},
    {
        "past": 7,
        "keep_frames": 1,
        "sink_frames": 0,
        "near_frames": 0,
        "keep_q20": (DENSE,),
    },  # too few eligible
    {"past": 7, "keep_q20": (DENSE, 0)},  # one block
    {"past": 5, "chunk": 1000},
    {"past": 5, "chunk": -1},
    {"past": 5, "chunk_frames": 1},
    {"past": 5, "frame_tokens": 5, "block_q": 8, "block_k": 8},
)


@pytest.mark.parametrize("options", EDGES)
@pytest.mark.parametrize("ties", [False, True])
def test_edges(options: dict[str, Any], ties: bool) -> None:
    case = brute_force.random_case(np.random.default_rng(1), ties=ties, **options)
    expected, selection = brute_force.hsa(case)
    assert selected(case) == {pair: choice.blocks for pair, choice in selection.items()}
    for form in FORMS:
        np.testing.assert_allclose(run(case, form).numpy(), expected, atol=2e-6, err_msg=form)


@FAST
@given(case=brute_force.hsa_cases())
def test_a_table_that_keeps_everything_is_full_attention(case: HSACase) -> None:
    case = HSACase(case.inputs, case.attributes | {"keep_q20": (DENSE,)})
    slots = case.past_slots
    past = ([*case.inputs[name][slots]] for name in ("past_k", "past_v"))
    k, v = (
        torch.from_numpy(np.concatenate([*frames, case.inputs[name]]))
        for name, frames in zip("kv", past, strict=True)
    )
    q, scale = torch.from_numpy(case.inputs["q"]), case.attributes["scale"]
    full = ((q.transpose(0, 1) @ k.permute(1, 2, 0)) * scale).softmax(-1) @ v.transpose(0, 1)
    for form in FORMS:
        torch.testing.assert_close(run(case, form), full.transpose(0, 1), rtol=1e-4, atol=1e-5)


def test_a_budget_beyond_the_eligible_blocks_is_filled_in_order() -> None:
    """Written out by hand: 5 past frames of 3 blocks, of which 0 and 4 are eligible with the 3 current ones: 15 blocks.

    A budget of 20 of 24 adds the first five of frames 1, 2 and 3, whatever they score.
    """
    case = brute_force.random_case(
        np.random.default_rng(3), past=5, keep_frames=2, keep_q20=(DENSE * 5 // 6 + 1,), chunk=0
    )
    assert set(selected(case).values()) == {frozenset(range(24)) - {8, 9, 10, 11}}


def test_all_scores_equal_takes_the_lowest_indices() -> None:
    """Written out by hand: 5 past frames of 3 blocks, frames 0 (sink), 1 (first of the ties) and 4 (near) eligible."""
    case = brute_force.random_case(np.random.default_rng(2), past=5, keep_q20=(DENSE * 2 // 6,), chunk=0)
    zero = {name: np.zeros_like(case.inputs[name]) for name in ("q_mean", "k_mean")}
    case = HSACase(
        case.inputs | zero | {"past_kmean": np.zeros_like(case.inputs["past_kmean"])}, case.attributes
    )
    # 24 resident blocks; a third of them, rounded down by the fixed-point fraction, is 7.
    assert set(selected(case).values()) == {frozenset({0, 1, 2, 3, 4, 5, 12})}


@FAST
@given(
    seed=st.integers(0, 2**32 - 1),
    heads=st.integers(1, 3),
    dim=st.sampled_from([2, 4, 6, 16]),
    frames=st.integers(1, 3),
    geometry=st.tuples(st.integers(5, 20), st.sampled_from([4, 8]), st.sampled_from([4, 8])),
    dtype=st.sampled_from([np.float32, np.float16]),
)
def test_prepare_equals_the_definition(
    seed: int, heads: int, dim: int, frames: int, geometry: Sequence[int], dtype: Any
) -> None:
    rng = np.random.default_rng(seed)
    frame_tokens, block_q, block_k = geometry
    tokens, width = frames * frame_tokens, heads * dim
    angles = rng.uniform(0, 6, (tokens, dim // 2))
    inputs = {
        "qkv": rng.standard_normal((tokens, 3 * width)).astype(dtype),
        "bias": rng.standard_normal(3 * width).astype(dtype),
        "norm_q": rng.uniform(0.5, 1.5, width).astype(dtype),
        "norm_k": rng.uniform(0.5, 1.5, width).astype(dtype),
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
    }
    attributes = {
        "heads": heads,
        "frame_tokens": frame_tokens,
        "block_q": block_q,
        "block_k": block_k,
        "eps": 1e-6,
    }
    expected = brute_force.qk_prepare(inputs, attributes)
    results = qk_prepare(*(torch.from_numpy(value) for value in inputs.values()), **attributes)
    tolerance = 2e-6 if dtype is np.float32 else 2e-3
    for found, (name, want) in zip(results, expected.items(), strict=True):
        assert found.numpy().dtype == (np.float32 if name.endswith("_mean") else dtype)
        np.testing.assert_allclose(found.numpy(), want, atol=tolerance, rtol=tolerance, err_msg=name)


def test_means_are_those_of_the_rounded_values() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(shape, generator=generator).bfloat16() for shape in ((26, 48), (48,), (16,), (16,))
    ]
    angles = torch.rand(26, 4, generator=generator)
    q, k, _, q_mean, k_mean = qk_prepare(
        *tensors, angles.cos(), angles.sin(), heads=2, frame_tokens=13, block_q=4, block_k=8, eps=1e-6
    )
    for x, mean, block in ((q, q_mean, 4), (k, k_mean, 8)):
        want = brute_force.block_means(x.float().numpy(), 13, block)
        np.testing.assert_allclose(mean.numpy(), want, atol=1e-6)
        np.testing.assert_allclose(block_means(x, 13, block).numpy(), want, atol=1e-6)
