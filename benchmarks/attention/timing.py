# mypy: allow-untyped-calls, no-warn-return-any
"""Times of *prepare*, *select* and *attend* against dense attention and FlexAttention on one GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.timing import Work, microseconds
from lightforcing_ref.attention import qk_prepare
from plugins.eager.launch import BlockLists, TorchKernels
from plugins.eager.policies import DensePolicy, HSAPolicy, mask_from_lists

from .inputs import CHUNK_FRAMES, AttentionInputs, FrameChoice, Shape, random_inputs

__all__ = [
    "HSA_LONG",
    "HSA_SHORT",
    "Steps",
    "dense_baselines",
    "exact_head",
    "input_sets",
    "measure",
    "measure_prepare",
    "relative",
]

HSA_SHORT: FrameChoice = {"keep_frames": 6, "sink_frames": 1, "near_frames": 2}
HSA_LONG: FrameChoice = {"keep_frames": 3, "sink_frames": 1, "near_frames": 1}
DTYPE = torch.bfloat16
BUFFER_SETS = 3

Microseconds = float
Reason = str


def _attempt(run: Callable[[], Any]) -> Any:
    """The result, or why there is none: a yardstick that does not run on this machine is a note in the table."""
    try:
        return run()
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        return f"{type(error).__name__}: {first[:120]}"


def input_sets(shape: Shape) -> list[AttentionInputs]:
    """As many inputs of one shape as run in turn, so that none is found in a cache."""
    return [random_inputs(shape, DTYPE, "cuda", seed) for seed in range(BUFFER_SETS)]


def dense_baselines(sets: Sequence[AttentionInputs], scale: float) -> dict[str, Microseconds | Reason]:
    """Time of each dense attention, in the memory layout it likes best."""

    def heads_first(x: Tensor) -> Tensor:
        return x.transpose(0, 1).contiguous()[None]

    in_order = [(heads_first(s.q), heads_first(s.keys), heads_first(s.values)) for s in sets]

    def sdpa(backend: SDPBackend) -> Microseconds:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, scale=scale)

        return microseconds([partial(run, *inputs) for inputs in in_order])

    def flash(module: str) -> Microseconds:
        function = import_module(module).flash_attn_func
        return microseconds(
            [partial(function, s.q[None], s.keys[None], s.values[None], softmax_scale=scale) for s in sets]
        )

    return {
        "sdpa flash": _attempt(lambda: sdpa(SDPBackend.FLASH_ATTENTION)),
        "sdpa cudnn": _attempt(lambda: sdpa(SDPBackend.CUDNN_ATTENTION)),
        "flash-attn 2": _attempt(lambda: flash("flash_attn")),
        "flash-attn 3": _attempt(lambda: flash("flash_attn_interface")),
    }


def _flex(
    sets: Sequence[AttentionInputs], lists: Sequence[BlockLists], shape: Shape, scale: float
) -> tuple[Microseconds, Tensor]:
    """FlexAttention over the same blocks: its time and its first output `[T, H, D]`.

    Frames are padded to whole blocks, because its blocks are not aligned to frames.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    padded_frame = shape.k_blocks * shape.block_k

    def padded(x: Tensor, block: int) -> Tensor:
        frames = F.pad(x.unflatten(0, (-1, shape.frame_tokens)), (0, 0, 0, 0, 0, -shape.frame_tokens % block))
        return frames.flatten(0, 1).transpose(0, 1).contiguous()[None]

    def in_frame(b: Tensor, h: Tensor, q: Tensor, key: Tensor) -> Tensor:
        return key % padded_frame < shape.frame_tokens

    def block_mask(one: BlockLists) -> BlockMask:
        entries = one.entries[..., : shape.resident]
        valid = torch.arange(shape.resident, device=entries.device) < one.counts[..., None]
        index = torch.where(valid, (entries >> 16) * shape.k_blocks + (entries & 0xFFFF), 0).int()[None]
        counts, size = one.counts[None], (shape.block_q, shape.block_k)
        if padded_frame == shape.frame_tokens:  # every block is full: nothing to mask inside
            return BlockMask.from_kv_blocks(torch.zeros_like(counts), index, counts, index, BLOCK_SIZE=size)
        return BlockMask.from_kv_blocks(counts, index, BLOCK_SIZE=size, mask_mod=in_frame)

    compiled = torch.compile(flex_attention, dynamic=False)

    def work(s: AttentionInputs, one: BlockLists) -> Callable[[], Tensor]:
        q, keys, values = (
            padded(s.q, shape.block_q),
            padded(s.keys, shape.block_k),
            padded(s.values, shape.block_k),
        )
        mask = block_mask(one)
        return lambda: compiled(q, keys, values, block_mask=mask, scale=scale)

    works = [work(s, one) for s, one in zip(sets, lists, strict=True)]
    output = works[0]()[0].transpose(0, 1).unflatten(0, (CHUNK_FRAMES, -1))[:, : shape.frame_tokens]
    return microseconds(works), output.flatten(0, 1)


def relative(found: Tensor, want: Tensor) -> float:
    """Relative L2 distance."""
    return float((found.double() - want.double()).norm() / want.double().norm())


def exact_head(inputs: AttentionInputs, mask: Tensor, shape: Shape, head: int) -> Tensor:
    """Attention of one head over the blocks of `mask` `[H, query_blocks, resident]` in float64, `[T, D]`."""

    def blocks(tokens: int, block: int) -> Tensor:
        token = torch.arange(tokens, device=mask.device)
        return (
            token // shape.frame_tokens * -(-shape.frame_tokens // block)
            + token % shape.frame_tokens // block
        )

    keys = inputs.keys[:, head].double()
    seen = mask[head][blocks(inputs.q.shape[0], shape.block_q)][:, blocks(keys.shape[0], shape.block_k)]
    logits = inputs.q[:, head].double() @ keys.T * shape.head_dim**-0.5
    return logits.masked_fill_(~seen, -torch.inf).softmax(-1) @ inputs.values[:, head].double()


class Steps:
    """*select* and *attend* of one call as work items, with buffers of their own."""

    def __init__(
        self, kernels: TorchKernels, shape: Shape, inputs: AttentionInputs, lists: BlockLists
    ) -> None:
        self._kernels, self._shape, self._inputs = kernels, shape, inputs
        self.lists = lists
        self.out = torch.empty_like(inputs.q)
        self._scores = torch.empty(lists.entries.shape, device=lists.entries.device)
        self._geometry: dict[str, Any] = {
            "frame_tokens": shape.frame_tokens,
            "block_q": shape.block_q,
            "block_k": shape.block_k,
        }

    def select(self, hsa: FrameChoice, keep_q20: tuple[int, ...]) -> Work:
        c = self._inputs.chunk
        return lambda: self._kernels.select(
            c.q_mean,
            c.k_mean,
            c.past_kmean,
            c.frame_slots,
            c.chunk,
            **self._geometry,
            **hsa,
            keep_q20=keep_q20,
            out=self.lists,
            scores=self._scores,
        )

    def attend(self) -> Work:
        s = self._inputs
        return lambda: self._kernels.attend(
            s.q,
            s.k,
            s.v,
            s.past_k,
            s.past_v,
            s.chunk.frame_slots,
            self.lists,
            **self._geometry,
            scale=self._shape.head_dim**-0.5,
            out=self.out,
        )


def measure(
    kernels: TorchKernels,
    shape: Shape,
    hsa: FrameChoice,
    sparsities: Sequence[float],
    flex: Sequence[float],
) -> list[dict[str, Any]]:
    """One row for each sparsity of one shape; FlexAttention only for those in `flex`."""
    scale = shape.head_dim**-0.5
    sets = input_sets(shape)
    dense = dense_baselines(sets, scale)
    best = min((time for time in dense.values() if isinstance(time, float)), default=float("nan"))
    own_dense = microseconds([Steps(kernels, shape, s, DensePolicy().select(s.chunk)).attend() for s in sets])

    rows = []
    for sparsity in sparsities:
        keep = shape.keep_q20(sparsity)
        policy = HSAPolicy(kernels, **hsa, keep_q20=keep)
        steps = [Steps(kernels, shape, s, policy.select(s.chunk)) for s in sets]
        selects, attends = [step.select(hsa, keep) for step in steps], [step.attend() for step in steps]
        select_us, attend_us = microseconds(selects), microseconds(attends)
        total_us = microseconds([work for pair in zip(selects, attends, strict=True) for work in pair]) * 2
        skipped = 1 - float(steps[0].lists.counts.float().mean()) / shape.resident

        steps[0].out.fill_(float("nan"))
        attends[0]()
        mask = mask_from_lists(steps[0].lists, shape.k_blocks, shape.resident)
        exact = exact_head(sets[0], mask, shape, 0)
        row: dict[str, Any] = {
            "sparsity": round(skipped, 4),
            "kept_blocks": float(steps[0].lists.counts.float().mean()),
            "resident_blocks": shape.resident,
            "dense_us": dense,
            "best_dense_us": best,
            "own_dense_us": own_dense,
            "select_us": select_us,
            "attend_us": attend_us,
            "total_us": total_us,
            "eta": best * (1 - skipped) / attend_us,
            "eta_total": best * (1 - skipped) / total_us,
            "speedup": best / total_us,
            "attend_tflops": shape.dense_flops() * (1 - skipped) / attend_us / 1e6,
            "error": relative(steps[0].out[:, 0], exact),
        }
        if sparsity in flex:
            result = _attempt(partial(_flex, sets, [step.lists for step in steps], shape, scale))
            row["flex_us"] = result if isinstance(result, str) else result[0]
            if not isinstance(result, str):
                row["flex_error"] = relative(result[1][:, 0], exact)
        rows.append(row)
    return rows


def measure_prepare(kernels: TorchKernels, shape: Shape) -> dict[str, Any]:
    """Time of *prepare*, its error, and the bytes it must move at least (each input read, each output written once)."""
    tokens, width = CHUNK_FRAMES * shape.frame_tokens, shape.heads * shape.head_dim
    works, error = [], 0.0
    for seed in range(BUFFER_SETS):
        generator = torch.Generator("cuda").manual_seed(seed)
        qkv, bias, norm_q, norm_k = (
            torch.randn(size, generator=generator, device="cuda").to(DTYPE)
            for size in ((tokens, 3 * width), (3 * width,), (width,), (width,))
        )
        angle = torch.randn(tokens, shape.head_dim // 2, generator=generator, device="cuda")
        arguments = (qkv, bias, norm_q, norm_k, angle.cos(), angle.sin())
        options: dict[str, Any] = {"heads": shape.heads, "frame_tokens": shape.frame_tokens, "eps": 1e-6}
        options |= {"block_q": shape.block_q, "block_k": shape.block_k}
        out = kernels.qk_prepare(*arguments, **options)
        works.append(lambda a=arguments, o=options, out=out: kernels.qk_prepare(*a, **o, out=out))
        if not seed:
            exact = qk_prepare(*(x.float() for x in arguments), **options)
            error = max(relative(found, want) for found, want in zip(out, exact, strict=True))
    moved = 2 * tokens * 3 * width * DTYPE.itemsize
    time = microseconds(works)
    return {
        "prepare_us": time,
        "error": error,
        "bytes": moved,
        "terabytes_per_second": moved / time / 1e6,
    }
