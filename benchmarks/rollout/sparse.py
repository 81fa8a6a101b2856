# mypy: allow-untyped-calls, no-warn-return-any
"""Hierarchical sparse attention as a plain PyTorch implementation does it: the yardstick of rung 1.

Written from the paper's description (Light Forcing, arXiv 2602.04789), one obvious operation after another: queries
and the whole key history are pooled in every forward, `torch.topk` chooses frames and then blocks, and a simple
Triton kernel (on a CPU: SDPA over gathered blocks) attends to what was chosen. Blocks are frame-aligned, as
everywhere else, so the amount of work is that of the operator.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightforcing_ref.cache import AttentionSpec
from lightforcing_ref.sparsity import kept_blocks

__all__ = ["choose_blocks", "gathered_attention", "pool_blocks", "sparse_attention"]


def pool_blocks(x: Tensor, frame_tokens: int, block: int) -> Tensor:
    """Means of `x` `[frames * frame_tokens, H, D]` over each block, in its own type: `[frames, blocks, H, D]`."""
    frames = x.unflatten(0, (-1, frame_tokens))
    whole = frame_tokens // block * block
    means = [frames[:, :whole].unflatten(1, (-1, block)).mean(2)] if whole else []
    if whole < frame_tokens:
        means.append(frames[:, whole:].mean(1, keepdim=True))
    return torch.cat(means, dim=1) if len(means) > 1 else means[0]


def choose_blocks(
    q_mean: Tensor, k_mean: Tensor, past_frames: int, chunk: int, spec: AttentionSpec
) -> Tensor:
    """Key blocks of each query block, best first.

    Args:
        q_mean: `[frames, q_blocks, H, D]` of the current chunk.
        k_mean: `[past + current frames, k_blocks, H, D]`, oldest first.

    Returns:
        int32 `[H, query blocks, kept]`, logical block indices.
    """
    frames, blocks = k_mean.shape[:2]
    hsa = spec.hsa
    query = q_mean.flatten(0, 1).transpose(0, 1)
    scores = query @ k_mean.flatten(0, 1).permute(1, 2, 0)
    if past_frames > hsa.keep_frames:
        first, last = hsa.sink_frames, past_frames - hsa.near_frames
        best = hsa.keep_frames - hsa.sink_frames - hsa.near_frames
        frame_scores = query @ k_mean[first:last].mean(1).permute(1, 2, 0)
        outside = torch.ones(*scores.shape[:2], frames, dtype=torch.bool, device=scores.device)
        outside[..., :first] = outside[..., last:] = False
        outside.scatter_(-1, first + frame_scores.topk(best, dim=-1).indices, False)
        scores = scores.masked_fill(outside.repeat_interleave(blocks, -1), -torch.inf)
    return scores.topk(kept_blocks(spec.keep_q20, chunk, frames * blocks), dim=-1).indices.int()


def sparse_attention(
    q: Tensor, keys: Tensor, values: Tensor, chunk: int, spec: AttentionSpec
) -> tuple[Tensor, int]:
    """Attention of the current chunk `q` `[T, H, D]` over `keys`, `values` `[frames * frame_tokens, H, D]`.

    There must be a past; the first chunk is dense.

    Returns:
        the output `[T, H, D]`, and the number of key blocks that each query block attended to.
    """
    geometry = spec.geometry
    frame_tokens = geometry.frame_tokens
    q_mean = pool_blocks(q, frame_tokens, geometry.block_q)
    k_mean = pool_blocks(keys, frame_tokens, geometry.block_k)
    past_frames = (keys.shape[0] - q.shape[0]) // frame_tokens
    chosen = choose_blocks(q_mean, k_mean, past_frames, chunk, spec)
    if q.is_cuda:
        from .sparse_kernel import block_attention

        out = block_attention(
            q, keys, values, chosen, frame_tokens, geometry.block_q, geometry.block_k, spec.scale
        )
    else:
        out = gathered_attention(q, keys, values, chosen, spec)
    return out, chosen.shape[-1]


def _in_blocks(x: Tensor, frame_tokens: int, block: int) -> Tensor:
    """`[H, blocks of all frames, block, D]`; the rows past a frame's end are zeros."""
    frames = F.pad(x.unflatten(0, (-1, frame_tokens)), (0, 0, 0, 0, 0, -frame_tokens % block))
    return frames.unflatten(1, (-1, block)).flatten(0, 1).permute(2, 0, 1, 3)


def gathered_attention(
    q: Tensor, keys: Tensor, values: Tensor, chosen: Tensor, spec: AttentionSpec
) -> Tensor:
    """SDPA of each query block over its chosen key blocks, gathered; arguments as above."""
    geometry = spec.geometry
    frame_tokens, block_q, block_k = geometry.frame_tokens, geometry.block_q, geometry.block_k
    heads, head_dim = q.shape[1:]
    head = torch.arange(heads, device=q.device)[:, None, None]
    query = _in_blocks(q, frame_tokens, block_q)
    k, v = (_in_blocks(x, frame_tokens, block_k)[head, chosen.long()].flatten(2, 3) for x in (keys, values))
    mask = None
    if frame_tokens % block_k:
        rows = torch.full((geometry.k_blocks,), block_k, device=q.device)
        rows[-1] = frame_tokens % block_k
        inside = torch.arange(block_k, device=q.device) < rows[chosen.long() % geometry.k_blocks][..., None]
        mask = inside.flatten(2)[:, :, None]
    out = F.scaled_dot_product_attention(query, k, v, mask, scale=spec.scale)
    out = out.unflatten(1, (-1, geometry.q_blocks)).flatten(2, 3)[:, :, :frame_tokens]
    return out.reshape(heads, -1, head_dim).transpose(0, 1)
