"""The plain sparse attention of rung 1 is the operator, and its work depends on the table alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.rollout.sparse import choose_blocks, pool_blocks, sparse_attention
from lightforcing_ref.attention import block_means, hsa_attention, hsa_selection
from lightforcing_ref.cache import AttentionSpec
from lightforcing_ref.sparsity import BlockGeometry, HSAConfig, kept_blocks

ROOT = Path(__file__).parents[2]
HEADS, HEAD_DIM, CURRENT = 2, 16, 3
KEEP = (1 << 20, 300_000, 220_000, 150_000)


def spec_for(frame_tokens: int, block: int, keep_frames: int = 4) -> AttentionSpec:
    geometry = BlockGeometry(frame_tokens, block, block)
    return AttentionSpec(HEADS, geometry, HSAConfig(keep_frames, 1, 1), KEEP, HEAD_DIM**-0.5)


def tensors(spec: AttentionSpec, past: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Q of the chunk, keys and values of everything."""
    generator = torch.Generator().manual_seed(seed)
    frames = (CURRENT, past + CURRENT, past + CURRENT)
    q, k, v = (
        torch.randn(n * spec.geometry.frame_tokens, HEADS, HEAD_DIM, generator=generator) for n in frames
    )
    return q, k, v


@pytest.mark.parametrize("frame_tokens", [32, 44, 7])
def test_pooling_is_the_oracles(frame_tokens: int) -> None:
    x = torch.randn(3 * frame_tokens, HEADS, HEAD_DIM)
    torch.testing.assert_close(pool_blocks(x, frame_tokens, 8), block_means(x, frame_tokens, 8))


@pytest.mark.parametrize("past", [3, 4, 6, 9])
@pytest.mark.parametrize("frame_tokens", [32, 44])
def test_same_blocks_and_same_output_as_the_oracle(frame_tokens: int, past: int) -> None:
    spec, chunk = spec_for(frame_tokens, 8), past // 3
    q, k, v = tensors(spec, past)
    q_mean, k_mean = block_means(q, frame_tokens, 8), block_means(k, frame_tokens, 8)
    wanted = hsa_selection(q_mean, k_mean, past_frames=past, chunk=chunk, hsa=spec.hsa, keep_q20=KEEP)
    chosen = choose_blocks(q_mean, k_mean, past, chunk, spec)
    found = torch.zeros_like(wanted).scatter_(-1, chosen.long(), True)
    assert torch.equal(found, wanted)

    split = past * frame_tokens
    cache = [x[:split].unflatten(0, (past, frame_tokens)) for x in (k, v)]
    oracle = hsa_attention(
        q, k[split:], v[split:], q_mean, k_mean[past:], *cache, k_mean[:past], torch.arange(past), chunk,
        **spec.attend_attributes(),
    )  # fmt: skip
    out, kept = sparse_attention(q, k, v, chunk, spec)
    torch.testing.assert_close(out, oracle, rtol=1e-4, atol=1e-5)
    assert kept == chosen.shape[-1]


@settings(max_examples=40, deadline=None)
@given(
    past=st.integers(1, 9),
    chunk=st.integers(0, 6),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 1e4]),
    shift=st.sampled_from([0.0, -3.0, 1e3]),
    seed=st.integers(0, 2**16),
)
def test_statistics_do_not_change_how_much_is_selected(
    past: int, chunk: int, scale: float, shift: float, seed: int
) -> None:
    """Equal, tiny, huge and one-sided means all select what the table says, in rung 1 and in the operator alike."""
    spec = spec_for(24, 8, keep_frames=3)
    generator = torch.Generator().manual_seed(seed)
    q_mean = torch.randn(CURRENT, 3, HEADS, HEAD_DIM, generator=generator) * scale + shift
    k_mean = torch.randn(past + CURRENT, 3, HEADS, HEAD_DIM, generator=generator) * scale - shift
    chosen = choose_blocks(q_mean, k_mean, past, chunk, spec)
    selected = hsa_selection(q_mean, k_mean, past_frames=past, chunk=chunk, hsa=spec.hsa, keep_q20=KEEP)
    budget = kept_blocks(KEEP, chunk, 3 * (past + CURRENT))
    assert (selected.sum(-1) == budget).all()
    assert chosen.shape[-1] == budget
    assert (chosen.sort(-1).values.diff(dim=-1) > 0).all()


PROGRAM = """
import torch
from benchmarks.rollout.sparse import choose_blocks, gathered_attention, pool_blocks
from benchmarks.rollout.sparse_kernel import block_attention
from plugins.eager.interpreter import mend_interpreter
from tests.benchmarks.test_rollout_sparse import spec_for, tensors
mend_interpreter()
spec = spec_for(44, 16)
q, k, v = tensors(spec, 5)
chosen = choose_blocks(pool_blocks(q, 44, 16), pool_blocks(k, 44, 16), 5, 2, spec)
found = block_attention(q, k, v, chosen, 44, 16, 16, spec.scale)
torch.testing.assert_close(found, gathered_attention(q, k, v, chosen, spec), rtol=1e-4, atol=1e-5)
"""


def test_the_kernel_in_tritons_interpreter() -> None:
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-5_000:]
