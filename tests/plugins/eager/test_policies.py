"""Policies that look at geometry only, and the two forms of what a policy returns (lists and masks)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.eager.policies import (
    ChunkInputs,
    DensePolicy,
    SelectionPolicy,
    WindowPolicy,
    lists_from_mask,
    mask_from_lists,
)
from plugins.errors import PluginError

HALF = (1 << 20, 1 << 19)


def chunk_inputs(
    *, past: int, max_past: int, frame_tokens: int = 256, block_q: int = 64, block_k: int = 64, chunk: int = 1
) -> ChunkInputs:
    q_blocks, k_blocks = -(-frame_tokens // block_q), -(-frame_tokens // block_k)
    slots = torch.full((max_past,), -1, dtype=torch.int32)
    slots[:past] = torch.arange(past, 0, -1)
    return ChunkInputs(
        torch.zeros(3, q_blocks, 2, 64),
        torch.zeros(3, k_blocks, 2, 64),
        torch.zeros(max_past + 1, k_blocks, 2, 64),
        slots,
        torch.tensor(chunk, dtype=torch.int32),
        frame_tokens,
        block_q,
        block_k,
    )


def as_mask(policy: SelectionPolicy, chunk: ChunkInputs) -> torch.Tensor:
    k_blocks = chunk.k_mean.shape[1]
    resident = (chunk.present() + 3) * k_blocks
    lists = policy.select(chunk)
    assert lists.entries.dtype == lists.counts.dtype == torch.int32
    assert lists.entries.shape == (2, 3 * chunk.q_mean.shape[1], (len(chunk.frame_slots) + 3) * k_blocks)
    mask = mask_from_lists(lists, k_blocks, resident)
    assert torch.equal(mask.sum(2).int(), lists.counts)
    again = lists_from_mask(mask, k_blocks, lists.entries.shape[2])
    valid = torch.arange(lists.entries.shape[2]) < lists.counts[..., None]
    assert torch.equal(again.entries * valid, lists.entries * valid), "lists are not ascending"
    return mask


def test_dense_sees_all_resident_blocks_and_no_other() -> None:
    assert as_mask(DensePolicy(), chunk_inputs(past=2, max_past=5)).all()
    assert as_mask(DensePolicy(), chunk_inputs(past=0, max_past=5, frame_tokens=70)).all()


def test_window_is_a_box_around_the_query_block() -> None:
    # 3 past and 3 current frames of 4 blocks; the window holds half of these 24.
    mask = as_mask(WindowPolicy(HALF), chunk_inputs(past=3, max_past=3)).view(2, 3, 4, 6, 4)
    assert (mask.sum((3, 4)) == 12).all()
    assert torch.equal(mask[0], mask[1]), "heads differ"
    for frame in range(3):
        for block in range(4):
            seen = mask[0, frame, block]
            assert seen[3 + frame, block], "a query block does not see itself"
            # Seen frames are the nearest ones, and in each of them the seen blocks are the nearest ones.
            distance = {f: abs(3 + frame - f) for f in range(6)}
            inside = [f for f in range(6) if seen[f].any()]
            outside = [f for f in range(6) if not seen[f].any()]
            assert max(distance[f] for f in inside) <= min((distance[f] for f in outside), default=6)
            for f in inside:
                near = [abs(block - b) for b in range(4) if seen[f, b]]
                far = [abs(block - b) for b in range(4) if not seen[f, b]]
                assert max(near) <= min(far, default=4)


def test_window_follows_the_table_and_is_dense_without_past() -> None:
    assert as_mask(WindowPolicy((1,)), chunk_inputs(past=3, max_past=3)).sum(2).unique().tolist() == [1]
    assert as_mask(WindowPolicy(HALF), chunk_inputs(past=3, max_past=3, chunk=0)).all()
    assert as_mask(WindowPolicy(HALF), chunk_inputs(past=3, max_past=3, chunk=7)).sum(
        2
    ).unique().tolist() == [12]
    assert as_mask(WindowPolicy((1,)), chunk_inputs(past=0, max_past=3)).all()


@settings(max_examples=30, deadline=None)
@given(
    past=st.integers(0, 5),
    spare=st.integers(0, 2),
    frame_tokens=st.integers(33, 200),
    block_q=st.sampled_from([32, 64]),
    block_k=st.sampled_from([32, 64, 128]),
    keep=st.integers(0, 1 << 20),
)
def test_window_keeps_as_many_blocks_as_the_operator(
    past: int, spare: int, frame_tokens: int, block_q: int, block_k: int, keep: int
) -> None:
    chunk = chunk_inputs(
        past=past, max_past=past + spare, frame_tokens=frame_tokens, block_q=block_q, block_k=block_k
    )
    mask = as_mask(WindowPolicy((keep,)), chunk)
    total = mask.shape[2]
    kept = total if past == 0 else min(max(1, keep * total // 2**20), total)
    assert (mask.sum(2) == kept).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 7))
def test_lists_and_masks_are_two_forms_of_one_thing(seed: int, k_blocks: int, frames: int) -> None:
    mask = torch.rand(2, 3, k_blocks * frames, generator=torch.Generator().manual_seed(seed)) < 0.5
    lists = lists_from_mask(mask, k_blocks, k_blocks * frames + 2)
    assert torch.equal(mask_from_lists(lists, k_blocks, k_blocks * frames), mask)


def test_mask_that_does_not_fit_is_refused() -> None:
    with pytest.raises(PluginError, match="9 key blocks, the lists have room for 8"):
        lists_from_mask(torch.ones(1, 1, 9, dtype=torch.bool), 3, 8)
