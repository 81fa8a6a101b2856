"""The GPU kernels on PyTorch tensors: both operators, and the steps they are made of.

`bind_cuda()` makes `torch.ops.lightforcing.*` callable on CUDA tensors. With `TRITON_INTERPRET=1` in the environment
before Triton is imported, everything here runs on CPU tensors in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from plugins import contract, operators
from plugins.kernels.specs import KernelError, KernelProblem
from runtime.bundle import FLOATS

from .launcher import BlockLists, Launcher, TritonLauncher, empty_lists
from .methods import OPERATORS, MethodKernels

__all__ = ["BlockLists", "Launcher", "TorchKernels", "TritonLauncher", "bind_cuda", "empty_lists"]

_CODES_TAKE = ("k_mean", "k_scale", "v_scale", "past_kmean", "past_kscale", "past_vscale")
"""What *attend* over codes takes besides."""

_CACHE_DTYPE = "bfloat16"
"""What a problem of the cache kernels over codes says; they hold nothing in a compute type."""


def _dtype_name(tensor: Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in FLOATS:
        raise KernelError(f"there are no kernels for {tensor.dtype}; expected one of {', '.join(FLOATS)}")
    return name


@cache
def _device_table(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def _whole(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise KernelError(
                f"{name} {list(tensor.shape)} has strides {tensor.stride()}; the kernels need it contiguous"
            )


class TorchKernels:
    """The operators and their steps on tensors, run by a launcher. Every call is safe inside a CUDA graph capture
    once it has run outside of one.
    """

    def __init__(self, launcher: Launcher | None = None) -> None:
        self._launcher = launcher or TritonLauncher()

    def qk_prepare(
        self,
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
        out: Sequence[Tensor] | None = None,
        codes: bool = False,
    ) -> tuple[Tensor, ...]:
        """The operator `QKPrepare`, or with `codes` `QKPrepareFP8`; `out`, if given, receives its results."""
        tokens, width = qkv.shape[0], qkv.shape[1] // 3
        problem = KernelProblem(
            _dtype_name(qkv),
            heads,
            width // heads,
            frame_tokens,
            tokens // frame_tokens,
            0,
            block_q,
            block_k,
        )
        sizes = problem.sizes()
        operator = operators.OPERATORS[operators.QK_PREPARE_FP8 if codes else contract.QK_PREPARE]
        if out is None:
            head = (heads, problem.head_dim)
            shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("q", "k", "v"), (tokens, *head))
            shapes |= {
                f"{name}_mean": (problem.chunk_frames, sizes[f"{name}_blocks"], *head) for name in ("q", "k")
            }
            scales = (problem.chunk_frames, sizes["k_blocks"], heads)
            shapes |= dict.fromkeys(("k_scale", "v_scale"), scales)
            if codes:
                shapes["v"] = (*scales, problem.head_dim, block_k)
            types = {
                **dict.fromkeys(("q", "k", "v"), qkv.dtype),
                **dict.fromkeys(("k", "v") * codes, torch.uint8),
            }
            out = [
                qkv.new_empty(shapes[name], dtype=types.get(name, torch.float32)) for name in operator.outputs
            ]
        results = dict(zip(operator.outputs, out, strict=True))
        buffers = {**results, "qkv": qkv, "bias": bias}
        buffers |= {"norm_q": norm_q, "norm_k": norm_k, "cos": cos, "sin": sin}
        _whole(buffers)
        self._launcher.launch("prepare_fp8" if codes else "prepare", problem, buffers, {"eps": eps})
        return tuple(out)

    def qk_prepare_fp8(self, *tensors: Tensor, **attributes: Any) -> tuple[Tensor, ...]:
        """The operator `QKPrepareFP8`."""
        return self.qk_prepare(*tensors, **attributes, codes=True)

    def select(
        self,
        q_mean: Tensor,
        k_mean: Tensor,
        past_kmean: Tensor,
        frame_slots: Tensor,
        chunk: Tensor,
        *,
        frame_tokens: int,
        block_q: int,
        block_k: int,
        keep_frames: int,
        sink_frames: int,
        near_frames: int,
        keep_q20: Sequence[int],
        out: BlockLists | None = None,
        scores: Tensor | None = None,
    ) -> BlockLists:
        """The blocks that hierarchical sparse attention keeps.

        Args:
            q_mean, k_mean: float32 `[frames, blocks, H, D]` block means of the current chunk.
            past_kmean: float32 `[slots, k_blocks, H, D]`.
            frame_slots: int32 `[F]`.
            chunk: int32 scalar tensor, read on the device.
            scores: float32 work space `[H, query_blocks, key_blocks]`.
        """
        chunk_frames, _, heads, head_dim = q_mean.shape
        problem = KernelProblem(
            "bfloat16",  # selection works on float32 means whatever the compute type is
            heads,
            head_dim,
            frame_tokens,
            chunk_frames,
            frame_slots.numel(),
            block_q,
            block_k,
        )
        out = out or empty_lists(problem, q_mean.device)
        if scores is None:
            scores = torch.empty(out.entries.shape, dtype=torch.float32, device=q_mean.device)
        buffers = {"scores": scores, "q_mean": q_mean, "k_mean": k_mean, "past_kmean": past_kmean}
        buffers |= {"frame_slots": frame_slots, "lists": out.entries, "counts": out.counts, "chunk": chunk}
        buffers["keep_q20"] = _device_table(tuple(keep_q20), q_mean.device)
        _whole(buffers)
        self._launcher.launch("score", problem, buffers)
        options = {"table_entries": len(keep_q20), "keep_frames": keep_frames}
        options |= {"sink_frames": sink_frames, "near_frames": near_frames}
        self._launcher.launch("select", problem, buffers, options)
        return out

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past_k: Tensor,
        past_v: Tensor,
        frame_slots: Tensor,
        lists: BlockLists,
        *,
        frame_tokens: int,
        block_q: int,
        block_k: int,
        scale: float,
        out: Tensor | None = None,
        codes: Mapping[str, Tensor] | None = None,
        e4m3: bool = False,
    ) -> Tensor:
        """Softmax attention of each query block over its listed key blocks, `[T, H, D]`.

        Args:
            q, k, v: `[T, H, D]`, the current chunk.
            past_k, past_v: `[slots, frame_tokens, H, D]`.
            frame_slots: int32 `[F]`.
            codes: where keys and values are such: block means of the keys and scales of both, by the names of
                `HierarchicalSparseAttentionFP8`; values are `[frames, k_blocks, H, D, block_k]` then.
            e4m3: multiply the codes.
        """
        tokens, heads, head_dim = q.shape
        problem = KernelProblem(
            _dtype_name(q),
            heads,
            head_dim,
            frame_tokens,
            tokens // frame_tokens,
            frame_slots.numel(),
            block_q,
            block_k,
        )
        out = torch.empty_like(q) if out is None else out
        buffers = {"out": out, "q": q, "k": k, "v": v, "past_k": past_k, "past_v": past_v}
        buffers |= {
            "frame_slots": frame_slots,
            "lists": lists.entries,
            "counts": lists.counts,
            **(codes or {}),
        }
        _whole(buffers)
        over_codes = "attend_e4m3" if e4m3 else "attend_fp8"
        self._launcher.launch("attend" if codes is None else over_codes, problem, buffers, {"scale": scale})
        return out

    def hierarchical_sparse_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_mean: Tensor,
        k_mean: Tensor,
        past_k: Tensor,
        past_v: Tensor,
        past_kmean: Tensor,
        frame_slots: Tensor,
        chunk: Tensor,
        *,
        frame_tokens: int,
        block_q: int,
        block_k: int,
        keep_frames: int,
        sink_frames: int,
        near_frames: int,
        scale: float,
        keep_q20: Sequence[int],
        codes: Mapping[str, Tensor] | None = None,
        e4m3: bool = False,
    ) -> Tensor:
        """The operator `HierarchicalSparseAttention`; `codes` and `e4m3` as for `attend`."""
        lists = self.select(
            q_mean,
            k_mean,
            past_kmean,
            frame_slots,
            chunk,
            frame_tokens=frame_tokens,
            block_q=block_q,
            block_k=block_k,
            keep_frames=keep_frames,
            sink_frames=sink_frames,
            near_frames=near_frames,
            keep_q20=keep_q20,
        )
        return self.attend(
            q.contiguous(),
            k.contiguous(),
            v.contiguous(),
            past_k,
            past_v,
            frame_slots,
            lists,
            frame_tokens=frame_tokens,
            block_q=block_q,
            block_k=block_k,
            scale=scale,
            codes=codes,
            e4m3=e4m3,
        )

    def hierarchical_sparse_attention_e4m3(self, *tensors: Tensor, **attributes: Any) -> Tensor:
        """The operator `HierarchicalSparseAttentionE4M3`."""
        return self.hierarchical_sparse_attention_fp8(*tensors, **attributes, e4m3=True)

    def hierarchical_sparse_attention_fp8(self, *tensors: Tensor, **attributes: Any) -> Tensor:
        """The operator `HierarchicalSparseAttentionFP8`."""
        given = dict(zip(operators.HSA_FP8_INPUTS, tensors, strict=True))
        codes = {name: given[name] for name in _CODES_TAKE}
        return self.hierarchical_sparse_attention(
            *(given[name] for name in contract.HSA_INPUTS), **attributes, codes=codes
        )

    def commit(
        self,
        past_k: Tensor,
        past_v: Tensor,
        past_kmean: Tensor,
        k: Tensor,
        v: Tensor,
        k_mean: Tensor,
        commit_slots: Tensor,
        *,
        scales: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Copy the frames of a chunk into the cache, in place.

        Args:
            past_k, past_v: `[slots, frame_tokens, H, D]`; past_kmean: float32 `[slots, k_blocks, H, D]`.
            k, v: `[T, H, D]`; k_mean: float32 `[frames, k_blocks, H, D]`.
            commit_slots: int32 `[frames]`, the slot of each frame; negative: skip the frame.
            scales: where keys and values are codes: `k_scale`, `v_scale`, `past_kscale`, `past_vscale`; values are
                `[..., k_blocks, H, D, block_k]` then.
        """
        block_k = None if scales is None else v.shape[-1]
        problem = _cache_problem(past_k, past_kmean, chunk_frames=k_mean.shape[0], block_k=block_k)
        bits = {"past_k": past_k, "past_v": past_v, "k": k, "v": v}
        if k.element_size() == 2:
            bits = {name: tensor.view(torch.int16) for name, tensor in bits.items()}
        buffers = {**bits, "past_kmean": past_kmean, "k_mean": k_mean, "commit_slots": commit_slots}
        buffers |= scales or {}
        _whole(buffers)
        self._launcher.launch("commit" if scales is None else "commit_fp8", problem, buffers)

    def rope_sink(
        self,
        past_k: Tensor,
        past_kmean: Tensor,
        sink_k: Tensor,
        sink_kmean: Tensor,
        sink_slots: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        scales: Mapping[str, Tensor] | None = None,
        block_k: int | None = None,
    ) -> None:
        """Write sink frames into their slots, rotated along time, in place.

        Args:
            past_k: `[slots, frame_tokens, H, D]`; past_kmean: float32 `[slots, k_blocks, H, D]`.
            sink_k, sink_kmean: `[sinks, ...]`, keys and block means as they were committed.
            sink_slots: int32 `[sinks]`; negative: skip the frame.
            cos, sin: float32 `[sinks, pairs]`, the rotation of the first `pairs` pairs of every head from the
                committed to the new temporal position.
            scales, block_k: where keys are codes: `sink_kscale` and `past_kscale`, and the tokens of a block.
        """
        problem = _cache_problem(past_k, past_kmean, sinks=sink_k.shape[0], block_k=block_k)
        buffers = {"past_k": past_k, "past_kmean": past_kmean, "sink_k": sink_k, "sink_kmean": sink_kmean}
        buffers |= {"sink_slots": sink_slots, "cos": cos, "sin": sin, **(scales or {})}
        _whole(buffers)
        kernel = "rope_sink" if scales is None else "rope_sink_fp8"
        self._launcher.launch(kernel, problem, buffers, {"turned_pairs": cos.shape[1]})

    def persist(
        self,
        past_k: Tensor,
        past_v: Tensor,
        past_kmean: Tensor,
        q_mean: Tensor,
        k_mean: Tensor,
        frame_slots: Tensor,
        contest: Tensor,
        *,
        block_k: int,
        scale: float,
        sink_frames: int,
        shared_heads: bool = False,
        peak: bool = False,
    ) -> None:
        """Let the best blocks of frames that leave the window take the places of worse ones, in place.

        Args:
            past_k, past_v: `[slots, frame_tokens, H, D]`; past_kmean: float32 `[slots, k_blocks, H, D]`.
            q_mean, k_mean: float32 `[frames, blocks, H, D]`, of the chunk.
            frame_slots: int32 `[past frames]`; behind the sinks come the frames that are kept, then those that leave.
            contest: int32 `[2]`, how many are kept, and how many leave.
            shared_heads, peak: see `lightforcing_ref.policies.PersistentSet`.
        """
        frames, q_blocks, heads, _ = q_mean.shape
        # Scores know query blocks by their number alone, and no size of theirs gives it for a frame of fewer tokens.
        problem = replace(
            _cache_problem(past_k, past_kmean, chunk_frames=frames, block_k=block_k),
            past_frames=frame_slots.numel(),
            ordered_blocks=(q_blocks, past_kmean.shape[1]),
        )
        sizes = problem.sizes()
        scores = q_mean.new_empty(heads, sizes["query_blocks"], sizes["key_blocks"])
        importance = q_mean.new_empty(heads, sizes["key_blocks"])
        of_set = {"past_kmean": past_kmean, "frame_slots": frame_slots, "importance": importance}
        buffers = {"scores": scores, "q_mean": q_mean, "k_mean": k_mean, **of_set}
        bits = {"past_k": past_k, "past_v": past_v}
        if past_k.element_size() == 2:
            bits = {name: tensor.view(torch.int16) for name, tensor in bits.items()}
        _whole({**buffers, **bits, "contest": contest})
        self._launcher.launch("score", problem, buffers)
        # Numbers: Triton 3.6's interpreter takes no truth values.
        self._launcher.launch("weigh", problem, buffers, {"scale": scale, "peak": int(peak)})
        places = {"sink_frames": sink_frames, "shared_heads": int(shared_heads)}
        self._launcher.launch("persist", problem, {**of_set, **bits, "contest": contest}, places)


def _cache_problem(
    past_k: Tensor,
    past_kmean: Tensor,
    *,
    chunk_frames: int = 0,
    sinks: int = 0,
    block_k: int | None = None,
) -> KernelProblem:
    _, frame_tokens, heads, head_dim = past_k.shape
    # Where only the number of blocks matters, this size gives it back.
    block_k = block_k or -(-frame_tokens // past_kmean.shape[1])
    return KernelProblem(
        _CACHE_DTYPE if past_k.dtype == torch.uint8 else _dtype_name(past_k),
        heads,
        head_dim,
        frame_tokens,
        chunk_frames,
        0,
        block_k,
        block_k,
        sinks,
    )


def bind_cuda() -> None:
    """Make `torch.ops.lightforcing.*` run these kernels on CUDA tensors."""
    from plugins.nodes import ops

    kernels, methods = TorchKernels(), MethodKernels.just_in_time()
    ops.bind(
        "cuda",
        hsa=kernels.hierarchical_sparse_attention,
        qk_prepare=kernels.qk_prepare,
        methods={operator: partial(methods, operator) for operator in OPERATORS},
        codes=(
            kernels.qk_prepare_fp8,
            kernels.hierarchical_sparse_attention_fp8,
            kernels.hierarchical_sparse_attention_e4m3,
        ),
    )
