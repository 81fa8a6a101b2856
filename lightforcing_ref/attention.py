"""The oracle of both operators: QK preparation and hierarchical sparse attention (HSA) in plain PyTorch.

The definition is in docs/operators.md; source: Light Forcing, section on HSA, with frame-aligned blocks so that
frames whose token count is no multiple of the block size are well defined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .rope import apply_rope
from .sparsity import BlockGeometry, HSAConfig, kept_blocks

__all__ = [
    "block_means",
    "dense_attention",
    "hsa_attention",
    "hsa_selection",
    "lowest_index_top",
    "qk_prepare",
    "rms_norm",
    "token_blocks",
]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis in float32, rounded to the input's type, then scaled."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def block_means(x: Tensor, frame_tokens: int, block: int) -> Tensor:
    """Mean of `x` `[T, H, D]` over each block of each frame, as float32 `[frames, blocks, H, D]`.

    The shorter last block of a frame is averaged over its own rows.
    """
    frames = x.shape[0] // frame_tokens
    blocks = -(-frame_tokens // block)
    padding = blocks * block - frame_tokens
    wide = x.float().unflatten(0, (frames, frame_tokens))
    sums = F.pad(wide, (0, 0, 0, 0, 0, padding)).unflatten(1, (blocks, block)).sum(2)
    rows = torch.full((blocks,), float(block), device=x.device)
    rows[-1] -= padding
    return sums / rows[None, :, None, None]


def qk_prepare(
    qkv: Tensor,
    bias: Tensor,
    norm_q: Tensor,
    norm_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    frame_tokens: int,
    block_q: int,
    block_k: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Turn the merged projection into what attention and cache need.

    Args:
        qkv: `[T, 3 H D]`, the projection without its bias, ordered q | k | v.
        bias: `[3 H D]`.
        norm_q, norm_k: `[H D]` RMS-norm weights over the full width, before the split into heads.
        cos, sin: float32 `[T, D/2]`.

    Returns:
        q, k, v `[T, H, D]` in the type of `qkv` (computed in float32, rounded once), and the float32 block means
        of the rounded q and k, `[frames, blocks, H, D]`.
    """
    wide = qkv.float() + bias.float()
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in wide.chunk(3, dim=-1))
    q, k = (
        apply_rope(rms_norm(part.flatten(-2), weight.float(), eps).unflatten(-1, (heads, -1)), cos, sin)
        for part, weight in ((q, norm_q), (k, norm_k))
    )
    q, k, v = (part.to(qkv.dtype) for part in (q, k, v))
    return q, k, v, block_means(q, frame_tokens, block_q), block_means(k, frame_tokens, block_k)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of q `[T, H, D]` over k, v `[K, H, D]`, in float32; `mask` `[H, T, K]` is True where seen."""
    query, key, value = (x.float().transpose(0, 1) for x in (q, k, v))
    out = F.scaled_dot_product_attention(query[None], key[None], value[None], mask, scale=scale)[0]
    return out.transpose(0, 1).to(q.dtype)


def lowest_index_top(scores: Tensor, count: int) -> Tensor:
    """Boolean mask of the `count` largest entries of the last axis; ties go to the lowest index."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def hsa_selection(
    q_mean: Tensor,
    k_mean: Tensor,
    *,
    past_frames: int,
    chunk: int,
    hsa: HSAConfig,
    keep_q20: Sequence[int],
) -> Tensor:
    """Which key blocks each query block sees.

    Args:
        q_mean: float32 `[frames, q_blocks, H, D]`, the current chunk.
        k_mean: float32 `[past + current frames, k_blocks, H, D]`, oldest first.

    Returns:
        bool `[H, frames * q_blocks, (past + current) * k_blocks]`.
    """
    frames, blocks = k_mean.shape[:2]
    query = q_mean.flatten(0, 1).transpose(0, 1).float()
    total = frames * blocks
    if past_frames == 0:
        return torch.ones(*query.shape[:2], total, dtype=torch.bool, device=query.device)
    keys = k_mean.float().permute(2, 0, 1, 3)
    scores = query @ keys.flatten(1, 2).transpose(1, 2)
    if past_frames > hsa.keep_frames:
        frame_scores = query @ keys.mean(2).transpose(1, 2)
        index = torch.arange(frames, device=query.device)
        candidate = (index >= hsa.sink_frames) & (index < past_frames - hsa.near_frames)
        best = lowest_index_top(
            frame_scores.masked_fill(~candidate, -torch.inf),
            hsa.keep_frames - hsa.sink_frames - hsa.near_frames,
        )
        rejected = (candidate & ~best).repeat_interleave(blocks, -1)
        scores = scores.masked_fill(rejected, -torch.inf)
    # A budget beyond the eligible blocks goes on with the rejected ones, which are all equal now: in their order.
    return lowest_index_top(scores, kept_blocks(keep_q20, chunk, total))


def hsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_mean: Tensor,
    k_mean: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    past_kmean: Tensor,
    frame_slots: Tensor,
    chunk: Tensor | int,
    *,
    frame_tokens: int,
    block_q: int,
    block_k: int,
    keep_frames: int,
    sink_frames: int,
    near_frames: int,
    scale: float,
    keep_q20: Sequence[int],
    form: Literal["mask", "gather"] = "mask",
    attend: Callable[..., Tensor] = dense_attention,
) -> Tensor:
    """Hierarchical sparse attention of the current chunk over the cached frames and itself.

    Args:
        q, k, v: `[T, H, D]`, the current chunk, q and k normed and roped.
        q_mean, k_mean: float32 `[frames, blocks, H, D]` block means of q and k.
        past_k, past_v: `[slots, frame_tokens, H, D]`; slots that `frame_slots` does not name are never read.
        past_kmean: float32 `[slots, k_blocks, H, D]`.
        frame_slots: int32 `[F]`, slot of each past frame, oldest first, then -1 for absent ones.
        chunk: index into `keep_q20`, clamped to its range.
        form: `"mask"` masks the dense score matrix, `"gather"` gathers each query block's key blocks; they agree.
        attend: softmax attention of what is selected, called as `dense_attention` is.

    Returns:
        `[T, H, D]` in the type of `q`.
    """
    geometry = BlockGeometry(frame_tokens, block_q, block_k)
    slots = frame_slots[frame_slots >= 0].long()
    keys = torch.cat((past_k[slots].flatten(0, 1), k))
    values = torch.cat((past_v[slots].flatten(0, 1), v))
    selected = hsa_selection(
        q_mean,
        torch.cat((past_kmean[slots], k_mean)),
        past_frames=slots.numel(),
        chunk=int(chunk),
        hsa=HSAConfig(keep_frames, sink_frames, near_frames),
        keep_q20=keep_q20,
    )
    if form == "gather":
        return _gathered_attention(q, keys, values, selected, geometry, scale, attend)
    row = token_blocks(q.shape[0], frame_tokens, block_q, q.device)
    column = token_blocks(keys.shape[0], frame_tokens, block_k, q.device)
    return attend(q, keys, values, scale, selected[:, row][:, :, column])


def token_blocks(tokens: int, frame_tokens: int, block: int, device: torch.device) -> Tensor:
    """Logical block index of each token, `[tokens]`."""
    token = torch.arange(tokens, device=device)
    return token // frame_tokens * -(-frame_tokens // block) + token % frame_tokens // block


def _gathered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    geometry: BlockGeometry,
    scale: float,
    attend: Callable[..., Tensor],
) -> Tensor:
    """Attention that touches only the selected blocks: one small dense problem per head and query block."""
    row = token_blocks(q.shape[0], geometry.frame_tokens, geometry.block_q, q.device)
    column = token_blocks(k.shape[0], geometry.frame_tokens, geometry.block_k, q.device)
    out = torch.empty_like(q)
    for head in range(q.shape[1]):
        for block in range(selected.shape[1]):
            queries = row == block
            seen = selected[head, block][column]
            part = slice(head, head + 1)
            out[queries, part] = attend(q[queries, part], k[seen, part], v[seen, part], scale)
    return out
