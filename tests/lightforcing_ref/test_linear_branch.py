"""SLA's linear branch: the oracle against loops over single tokens, its place in rollouts, and its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightforcing_ref.cache import AttentionSpec
from lightforcing_ref.checkpoint import has_linear_branch, load_dit_state
from lightforcing_ref.config import DiTConfig
from lightforcing_ref.errors import CheckpointError
from lightforcing_ref.model import CausalWanModel
from lightforcing_ref.policies import SLA, MethodOperator, PolicyAttention, sparse_linear_attention
from lightforcing_ref.rollout import Rollout
from lightforcing_ref.sparsity import BlockGeometry, HSAConfig
from tests import brute_force
from tests.lightforcing_ref.checkpoint import fixtures

Q20 = 1 << 20
Array = brute_force.Array


def features(row: Array) -> list[float]:
    powers = [math.exp(float(x)) for x in row]
    return [power / sum(powers) for power in powers]


def linear_by_token(case: brute_force.HSACase, weight: Array, bias: Array) -> Array:
    """What the linear branch adds, token by token in float64: a mean of values, weighted by products of features."""
    q, slots = case.inputs["q"], case.past_slots
    out = np.zeros(q.shape)
    for head in range(case.heads):
        keys = [row for slot in slots for row in case.inputs["past_k"][slot, :, head]]
        values = [row for slot in slots for row in case.inputs["past_v"][slot, :, head]]
        keys += list(case.inputs["k"][:, head])
        values += list(case.inputs["v"][:, head])
        known = [features(key) for key in keys]
        for token in range(len(q)):
            own = features(q[token, head])
            shares = [sum(a * b for a, b in zip(own, other, strict=True)) for other in known]
            mixed = sum(share * value.astype(np.float64) for share, value in zip(shares, values, strict=True))
            mixed = mixed / (1e-5 + sum(shares))
            out[token, head] = [
                sum(float(w) * float(x) for w, x in zip(row, mixed, strict=True)) + float(b)
                for row, b in zip(weight, bias, strict=True)
            ]
    return out


@st.composite
def one_stage(draw: st.DrawFn) -> dict[str, object]:
    return draw(brute_force.hsa_attributes()) | {"keep_frames": 99, "sink_frames": 0, "near_frames": 0}


@settings(max_examples=25, deadline=None)
@given(brute_force.hsa_cases(one_stage()), st.integers(0, 2**20))
def test_both_branches_by_token(case: brute_force.HSACase, seed: int) -> None:
    """First chunks, ragged blocks, slots in any order and absent ones: the best blocks, and all keys beside them."""
    rng = np.random.default_rng(seed)
    dim = case.inputs["q"].shape[2]
    weight, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((dim, dim), (dim,)))
    sparse, selection = brute_force.hsa(case)
    names = ("frame_tokens", "block_q", "block_k", "scale", "keep_q20")
    out = sparse_linear_attention(
        *map(torch.from_numpy, (*case.inputs.values(), weight, bias)),
        **{name: case.attributes[name] for name in names},
    )
    if not brute_force.is_ambiguous(selection):
        expected = sparse + linear_by_token(case, weight, bias)
        np.testing.assert_allclose(out.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_what_it_shows_is_the_sparse_branch() -> None:
    case = brute_force.random_case(np.random.default_rng(2), keep_frames=99, sink_frames=0, near_frames=0)
    _, selection = brute_force.hsa(case)
    names = ("frame_tokens", "block_q", "block_k", "scale", "keep_q20")
    assert isinstance(sparse_linear_attention, MethodOperator)
    nothing = torch.zeros(8, 8), torch.zeros(8)
    seen = sparse_linear_attention.visible(
        *map(torch.from_numpy, case.inputs.values()),
        *nothing,
        **{name: case.attributes[name] for name in names},
    )
    by_block = seen.numpy()[:, ::4, ::4]  # blocks of 4 tokens on frames of 12
    assert brute_force.mask_to_sets(by_block) == {pair: choice.blocks for pair, choice in selection.items()}


# In rollouts.

CONFIG = DiTConfig(
    dim=24, ffn_dim=32, heads=2, layers=3, text_dim=8, text_len=4, freq_dim=16, linear_branch=True
)
GRID = (4, 5)
SPEC = AttentionSpec(
    2, BlockGeometry(20, 8, 8), HSAConfig(99, 0, 0), (Q20, Q20 // 3), 12**-0.5, linear_branch=True
)


def model(projection: float) -> CausalWanModel:
    """A model whose projections are drawn, `projection` large."""
    torch.manual_seed(5)
    made = CausalWanModel(CONFIG).eval()
    with torch.no_grad():
        for layer in made.layers:
            assert layer.self_attn.proj_l is not None
            layer.self_attn.proj_l.weight.normal_().mul_(projection)
            layer.self_attn.proj_l.bias.mul_(projection)
    return made


def latents(made: CausalWanModel, chunks: int = 5, **changes: object) -> Tensor:
    """Five chunks of three frames in a window of nine: the last two evict, and the first frame stays."""
    text = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))

    def noise(chunk: int, step: int) -> Tensor:
        return torch.randn(16, 3, 8, 10, generator=torch.Generator().manual_seed(10 * chunk + step))

    plain = Rollout(
        made, SPEC, text, noise, GRID, window_frames=9, sink_frames=1, attend=sparse_linear_attention
    )
    return torch.cat(list(replace(plain, **changes).stream(chunks)), 1)  # type: ignore[arg-type]


def test_a_projection_of_zero_is_the_sparse_branch_alone() -> None:
    off = latents(model(0.0), spec=replace(SPEC, linear_branch=False), attend=PolicyAttention(SLA(), GRID))
    torch.testing.assert_close(latents(model(0.0)), off, rtol=1e-4, atol=1e-4)


def test_the_branch_runs_from_the_first_chunk_on_and_sees_what_is_resident() -> None:
    """The operator is asked with everything that the window shows; of evicted frames nothing is left."""
    shown: list[int] = []

    def recorded(*tensors: Tensor, **attributes: object) -> Tensor:
        shown.append(int((tensors[8] >= 0).sum()))
        return sparse_linear_attention(*tensors, **attributes)

    made = model(0.3)
    found = latents(made, attend=recorded)
    assert shown == [past for past in (0, 3, 6, 6, 6) for _ in range(15)][:-3]  # no clean forward of the last
    off = latents(made, spec=replace(SPEC, linear_branch=False), attend=PolicyAttention(SLA(), GRID))
    assert (found[:, :3] - off[:, :3]).abs().max() > 1e-3


# ---- checkpoints ----

DIT = DiTConfig(dim=16, ffn_dim=24, heads=2, layers=2, text_dim=12, text_len=4, linear_branch=True)
PLACES = (
    "blocks.@.self_attn.proj_l.",
    "blocks.@.self_attn.attn_op.local_attn.proj_l.",  # TurboDiffusion's
    "blocks.@.self_attn.attn_impl.proj_l.",
)


def with_projections(place: str, layers: int = 2) -> dict[str, Tensor]:
    state = fixtures.tensors(fixtures.dit(fixtures.DIT_SMALL), 0, torch.float32)
    for layer in range(layers):
        stem = place.replace("@", str(layer))
        state |= {f"{stem}weight": torch.randn(8, 8), f"{stem}bias": torch.randn(8)}
    return state


def saved(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save({"generator_ema": fixtures.prefixed(state, "model.")}, path)
    return path


@pytest.mark.parametrize("place", PLACES)
def test_projections_are_found_where_others_keep_them(place: str, tmp_path: Path) -> None:
    state = with_projections(place)
    path = saved(tmp_path / "sla.pt", state)
    assert has_linear_branch(path)
    loaded = load_dit_state(path, DIT)
    CausalWanModel(DIT).load_state_dict(loaded, strict=True)
    for layer in range(2):
        for part in ("weight", "bias"):
            given = state[place.replace("@", str(layer)) + part]
            assert torch.equal(loaded[f"blocks.{layer}.self_attn.proj_l.{part}"], given)


def test_a_checkpoint_without_has_none(tmp_path: Path) -> None:
    path = saved(tmp_path / "plain.pt", with_projections(PLACES[0], layers=0))
    assert not has_linear_branch(path)
    assert "blocks.0.self_attn.proj_l.weight" not in load_dit_state(path, replace(DIT, linear_branch=False))


def without(key: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.__delitem__(key)


def twice(state: dict[str, Tensor]) -> None:
    state[PLACES[1].replace("@", "0") + "bias"] = torch.zeros(8)


def untrained(state: dict[str, Tensor]) -> None:
    state["blocks.1.self_attn.proj_l.weight"].zero_()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("blocks.1.self_attn.proj_l.weight"), r"1 missing \(blocks.1.self_attn.proj_l.weight\)"),
        (without("blocks.0.self_attn.proj_l.bias"), r"1 missing \(blocks.0.self_attn.proj_l.bias\)"),
        (twice, "blocks.0.self_attn.proj_l.bias' under two names"),
    ],
)
def test_half_of_the_projections_is_refused_by_name(
    change: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path
) -> None:
    state = with_projections(PLACES[0])
    change(state)
    path = saved(tmp_path / "half.pt", state)
    with pytest.raises(CheckpointError, match=message):
        load_dit_state(path, DIT)


def test_a_projection_that_never_left_zero_is_taken(tmp_path: Path) -> None:
    state = with_projections(PLACES[0])
    untrained(state)
    loaded = load_dit_state(saved(tmp_path / "zero.pt", state), DIT)
    assert not loaded["blocks.1.self_attn.proj_l.weight"].any()
