"""What eight bits cost in attention: the probe against softmax written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.codes import FORMATS, Probe
from lightforcing_ref.attention import block_means, hsa_attention
from lightforcing_ref.sparsity import BlockGeometry

TOKENS, BLOCK, HEADS, WIDTH, PAST = 32, 16, 2, 32, 3


@pytest.fixture(scope="module")
def judged() -> tuple[Probe, torch.Tensor, torch.Tensor, np.ndarray, np.ndarray]:
    """A probe that was called once, what it returned, what it should, and exact output and mass by key."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(TOKENS, HEADS, WIDTH, generator=generator) for _ in range(3))
    past_k, past_v = (torch.randn(PAST, TOKENS, HEADS, WIDTH, generator=generator) for _ in range(2))
    means = [block_means(x, TOKENS, BLOCK) for x in (q, k, past_k.flatten(0, 1))]
    slots = torch.arange(PAST, dtype=torch.int32)
    tensors = (q, k, v, means[0], means[1], past_k, past_v, means[2], slots, 0)
    attributes = {
        "frame_tokens": TOKENS, "block_q": BLOCK, "block_k": BLOCK, "keep_frames": PAST, "sink_frames": 1,
        "near_frames": 1, "scale": WIDTH**-0.5, "keep_q20": [1 << 20],
    }  # fmt: skip
    probe = Probe(BlockGeometry(TOKENS, BLOCK, BLOCK), sink_frames=1, chunk_frames=1)
    out = probe(*tensors, **attributes)
    keys, values = (
        torch.cat((old.flatten(0, 1), new)).double().numpy() for old, new in ((past_k, k), (past_v, v))
    )
    logits = np.einsum("thd,khd->htk", q.double().numpy(), keys) * WIDTH**-0.5
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    exact = np.einsum("htk,khd->thd", weights, values)
    return probe, out, hsa_attention(*tensors, **attributes), exact, weights.mean((0, 1))


def test_attention_is_what_it_was(judged) -> None:
    _, out, expected, exact, _ = judged
    assert torch.equal(out, expected)
    np.testing.assert_allclose(out.numpy(), exact, rtol=1e-4, atol=1e-5)


def test_mass_is_that_of_sinks_past_and_chunk(judged) -> None:
    probe, _, _, exact, mass = judged
    frames = mass.reshape(PAST + 1, TOKENS).sum(1)
    np.testing.assert_allclose(probe.mass[""], [frames[0], frames[1:PAST].sum(), frames[PAST]], rtol=1e-9)
    assert probe.error[""] == pytest.approx(np.square(exact).sum(), rel=1e-9)
    assert probe.calls == 1


def test_fewer_bits_cost_more_and_exact_sinks_a_quarter_less(judged) -> None:
    """One frame of four without codes leaves three quarters of the squared error, if keys are alike."""
    probe, *_ = judged
    cost = {name: probe.error[name] / probe.error[""] for name in FORMATS}
    assert 0 < cost["bf16"] < 1e-4 < cost["kv fp8"] < cost["attention fp8"] < 1e-2
    assert cost["kv fp8, sinks bf16"] / cost["kv fp8"] == pytest.approx(0.75, abs=0.15)
    assert 0 < probe.moved["bf16"] < probe.moved["kv fp8, sinks bf16"] < probe.moved["kv fp8"]
