"""The error of each selection policy against dense attention, at equal sparsity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plugins.eager.launch import TorchKernels
from plugins.eager.policies import HSAPolicy, SelectionPolicy, TopKPolicy, WindowPolicy, mask_from_lists

from .inputs import AttentionInputs, FrameChoice, Shape, video_inputs

__all__ = ["method_table"]


def _dense(inputs: AttentionInputs, scale: float, column: Tensor, resident: int) -> tuple[Tensor, Tensor]:
    """Dense output `[T, H, D]` and the softmax weight that each token gives to each key block, `[H, T, blocks]`."""
    out, weights = torch.empty_like(inputs.q), []
    for head in range(inputs.q.shape[1]):
        probability = (inputs.q[:, head] @ inputs.keys[:, head].T * scale).softmax(-1)
        out[:, head] = probability @ inputs.values[:, head]
        weight = torch.zeros(probability.shape[0], resident, device=probability.device)
        weights.append(weight.index_add_(1, column, probability))
    return out, torch.stack(weights)


def method_table(
    shape: Shape,
    grid: tuple[int, int],
    hsa: FrameChoice,
    sparsities: tuple[float, ...],
    device: str,
    seed: int,
) -> list[dict[str, Any]]:
    """One row for each policy and sparsity, over structured synthetic queries and keys, in float32 where possible.

    `error` is the relative L2 of the output against dense attention; `weight` the mean share of the dense softmax
    weight that falls on the selected blocks, and `best_weight` the most that any choice of as many blocks could hold.
    """
    inputs = video_inputs(shape, grid, device, seed)
    scale = shape.head_dim**-0.5
    token = torch.arange(shape.frames * shape.frame_tokens, device=device)
    column = token // shape.frame_tokens * shape.k_blocks + token % shape.frame_tokens // shape.block_k
    dense, weights = _dense(inputs, scale, column, shape.resident)
    q_blocks = -(-shape.frame_tokens // shape.block_q)
    row = token // shape.frame_tokens * q_blocks + token % shape.frame_tokens // shape.block_q
    row = row[: inputs.q.shape[0]]
    rows_of_block = torch.bincount(row).float()
    # Mean weight of a query block on a key block.
    by_block = torch.zeros(shape.heads, len(rows_of_block), shape.resident, device=device)
    by_block.index_add_(1, row, weights)
    by_block /= rows_of_block[None, :, None]

    kernels = TorchKernels()
    # Just-in-time kernels take 16-bit types on a GPU; the interpreter takes float32.
    compute = torch.bfloat16 if device == "cuda" else torch.float32
    table = []
    for sparsity in sparsities:
        keep = shape.keep_q20(sparsity)
        policies: list[SelectionPolicy] = [
            WindowPolicy(keep),
            TopKPolicy(kernels, keep),
            HSAPolicy(kernels, **hsa, keep_q20=keep),
        ]
        for policy in policies:
            lists = policy.select(inputs.chunk)
            out = kernels.attend(
                inputs.q.to(compute),
                inputs.k.to(compute),
                inputs.v.to(compute),
                inputs.past_k.to(compute),
                inputs.past_v.to(compute),
                inputs.chunk.frame_slots,
                lists,
                frame_tokens=shape.frame_tokens,
                block_q=shape.block_q,
                block_k=shape.block_k,
                scale=scale,
            )
            mask = mask_from_lists(lists, shape.k_blocks, shape.resident)
            kept = int(lists.counts.max())
            difference = (out.float() - dense).square().sum((0, 2)).sqrt() / dense.square().sum((0, 2)).sqrt()
            table.append(
                {
                    "policy": policy.name,
                    "sparsity": round(1 - float(lists.counts.float().mean()) / shape.resident, 4),
                    "error": float((out.float() - dense).norm() / dense.norm()),
                    "error_by_head": [round(float(value), 4) for value in difference],
                    "weight": float((by_block * mask).sum(2).mean()),
                    "best_weight": float(by_block.topk(kept, dim=2).values.sum(2).mean()),
                }
            )
    return table
