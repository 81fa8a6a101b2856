"""The kernels on a GPU, just-in-time through PyTorch and ahead-of-time through cuda.core, against float64."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from lightforcing_ref import attention as oracle
from lightforcing_ref.policies import PersistentSet, block_weights
from lightforcing_ref.sparsity import BlockGeometry
from plugins.eager.launch import BlockLists, TorchKernels, bind_cuda, empty_lists
from plugins.eager.policies import (
    ChunkInputs,
    DensePolicy,
    HSAPolicy,
    TopKPolicy,
    WindowPolicy,
    mask_from_lists,
)
from plugins.kernels.specs import KERNELS

NO_GPU = "" if torch.cuda.is_available() else "PyTorch finds no CUDA device"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)]

KEEP = (1 << 20, 200_000, 130_000)
SANITIZED = "LIGHTFORCING_SANITIZED"
SANITIZER_SECONDS = 180

# Relative L2 against float64, given the same inputs: one rounding of the output, and of the softmax weights.
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 7e-4}


@dataclass(frozen=True)
class Size:
    frame_tokens: int
    block_q: int
    block_k: int
    heads: int
    head_dim: int
    past: int
    max_past: int

    @property
    def id(self) -> str:
        return f"{self.frame_tokens}-{self.block_q}x{self.block_k}-h{self.heads}d{self.head_dim}-p{self.past}"


SMALL = [
    Size(64, 32, 32, 2, 64, 4, 5),
    Size(152, 64, 64, 3, 128, 5, 5),
    Size(256, 128, 128, 2, 128, 7, 9),
    Size(280, 128, 64, 1, 64, 7, 7),
    Size(200, 64, 128, 2, 128, 0, 3),
    Size(70, 32, 64, 16, 64, 3, 3),
]
FULL = [
    Size(1536, 64, 64, 12, 128, 18, 18),
    Size(1536, 128, 128, 12, 128, 18, 18),
    Size(1560, 64, 64, 12, 128, 18, 18),
    Size(1560, 128, 128, 12, 128, 9, 18),
]


def inputs(size: Size, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """The operator's inputs, everything that must not be read poisoned."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    slots = size.max_past + 2
    shape = (size.frame_tokens, size.heads, size.head_dim)
    q, k, v = (normal(3 * size.frame_tokens, *shape[1:]).to(dtype) for _ in range(3))
    past_k, past_v = (normal(slots, *shape).to(dtype) for _ in range(2))
    frame_slots = torch.full((size.max_past,), -1, dtype=torch.int32, device="cuda")
    order = torch.randperm(slots, generator=torch.Generator().manual_seed(seed))[: size.past]
    frame_slots[: size.past] = order.cuda().int()
    unused = torch.ones(slots, dtype=torch.bool, device="cuda")
    unused[order.cuda()] = False
    past_kmean = oracle.block_means(past_k.flatten(0, 1), size.frame_tokens, size.block_k)
    for cache in (past_k, past_v, past_kmean):
        cache[unused] = float("nan")
    return {
        "q": q,
        "k": k,
        "v": v,
        "q_mean": oracle.block_means(q, size.frame_tokens, size.block_q),
        "k_mean": oracle.block_means(k, size.frame_tokens, size.block_k),
        "past_k": past_k,
        "past_v": past_v,
        "past_kmean": past_kmean,
        "frame_slots": frame_slots,
        "chunk": torch.tensor(2, dtype=torch.int32, device="cuda"),
    }


def attributes(size: Size) -> dict[str, Any]:
    geometry = {"frame_tokens": size.frame_tokens, "block_q": size.block_q, "block_k": size.block_k}
    return {**geometry, "keep_frames": 4, "sink_frames": 1, "near_frames": 1, "keep_q20": KEEP}


def chunk_inputs(tensors: dict[str, Tensor], size: Size) -> ChunkInputs:
    names = ("q_mean", "k_mean", "past_kmean", "frame_slots", "chunk")
    return ChunkInputs(*(tensors[name] for name in names), size.frame_tokens, size.block_q, size.block_k)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def exact_attention(tensors: dict[str, Tensor], size: Size, mask: Tensor, scale: float) -> Tensor:
    """Masked attention in float64, head by head and frame by frame."""
    slots = tensors["frame_slots"][tensors["frame_slots"] >= 0].long()
    keys, values = (torch.cat((tensors[f"past_{x}"][slots].flatten(0, 1), tensors[x])) for x in ("k", "v"))

    def blocks(tokens: int, block: int) -> Tensor:
        token = torch.arange(tokens, device="cuda")
        return (
            token // size.frame_tokens * -(-size.frame_tokens // block) + token % size.frame_tokens // block
        )

    row, column = blocks(tensors["q"].shape[0], size.block_q), blocks(keys.shape[0], size.block_k)
    out = torch.empty(tensors["q"].shape, dtype=torch.float64, device="cuda")
    for head in range(size.heads):
        key, value = keys[:, head].double(), values[:, head].double()
        for part in torch.arange(tensors["q"].shape[0], device="cuda").split(size.frame_tokens):
            logits = tensors["q"][part, head].double() @ key.T * scale
            logits.masked_fill_(~mask[head][row[part]][:, column], -torch.inf)
            out[part, head] = logits.softmax(-1) @ value
    return out


def selection_errors(tensors: dict[str, Tensor], size: Size, found: Tensor) -> list[str]:
    """Rows of `found` that differ from a float64 selection by more than rounding can explain."""
    past = int((tensors["frame_slots"] >= 0).sum())
    slots = tensors["frame_slots"][:past].long()
    k_mean = torch.cat((tensors["past_kmean"][slots], tensors["k_mean"])).double()
    q_mean = tensors["q_mean"].double().flatten(0, 1)
    scores = torch.einsum("qhd,fbhd->hqfb", q_mean, k_mean)
    frames, blocks = scores.shape[2:]
    total = frames * blocks
    keep = total if past == 0 else min(max(1, KEEP[2] * total >> 20), total)
    tolerance = 1e-5 * float(scores.abs().max())
    errors = []
    for head in range(size.heads):
        for row in range(scores.shape[1]):
            frame_score = scores[head, row].mean(1)
            candidates = list(range(1, past - 1)) if past > 4 else []
            ranked = sorted(candidates, key=lambda f: (-float(frame_score[f]), f))
            close = bool(candidates) and float(frame_score[ranked[1]] - frame_score[ranked[2]]) <= tolerance
            eligible = torch.ones(frames, dtype=torch.bool, device="cuda")
            eligible[ranked[2:]] = False
            score = scores[head, row].masked_fill(~eligible[:, None], -torch.inf).flatten()
            chosen = torch.zeros(total, dtype=torch.bool, device="cuda")
            chosen[score.sort(descending=True, stable=True).indices[:keep]] = True
            have = found[head, row]
            if torch.equal(have, chosen) or close:
                continue
            spread = score[have ^ chosen]
            # Not "larger than": among blocks that are not eligible the spread is not a number.
            if int(have.sum()) != keep or not float(spread.max() - spread.min()) <= 2 * tolerance:
                errors.append(f"head {head}, query block {row}: {int((have ^ chosen).sum())} blocks differ")
    return errors


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("size", SMALL, ids=lambda size: size.id)
def test_operator_small(kernels: TorchKernels, size: Size, dtype: torch.dtype) -> None:
    tensors = inputs(size, dtype)
    chunk = chunk_inputs(tensors, size)
    lists = empty_lists(chunk.problem, torch.device("cuda"))
    lists.entries.fill_(-77)
    names = ("q_mean", "k_mean", "past_kmean", "frame_slots", "chunk")
    kernels.select(*(tensors[name] for name in names), **attributes(size), out=lists)
    blocks = tensors["k_mean"].shape[1]
    mask = mask_from_lists(lists, blocks, (size.past + 3) * blocks)
    assert not selection_errors(tensors, size, mask)
    valid = torch.arange(lists.entries.shape[2], device="cuda") < lists.counts[..., None]
    assert (lists.entries[~valid] == -77).all(), "written past the end of a list"

    out = torch.full_like(tensors["q"], float("nan"))
    geometry = {key: attributes(size)[key] for key in ("frame_tokens", "block_q", "block_k")}
    names = ("q", "k", "v", "past_k", "past_v", "frame_slots")
    kernels.attend(*(tensors[name] for name in names), lists, **geometry, scale=0.1, out=out)
    assert relative(out, exact_attention(tensors, size, mask, 0.1)) < TOLERANCE[dtype]
    whole = kernels.hierarchical_sparse_attention(*tensors.values(), **attributes(size), scale=0.1)
    assert torch.equal(whole, out), "the same inputs give other bits"


@pytest.mark.parametrize("size", FULL, ids=lambda size: size.id)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_operator_at_full_size(kernels: TorchKernels, size: Size, dtype: torch.dtype) -> None:
    tensors = inputs(size, dtype)
    chunk = chunk_inputs(tensors, size)
    blocks = tensors["k_mean"].shape[1]
    for policy in (HSAPolicy(kernels, 4, 1, 1, KEEP), DensePolicy()):
        lists = policy.select(chunk)
        mask = mask_from_lists(lists, blocks, (size.past + 3) * blocks)
        if policy.name == "hsa":
            assert not selection_errors(tensors, size, mask)
        geometry = {key: attributes(size)[key] for key in ("frame_tokens", "block_q", "block_k")}
        names = ("q", "k", "v", "past_k", "past_v", "frame_slots")
        out = kernels.attend(*(tensors[name] for name in names), lists, **geometry, scale=128**-0.5)
        assert relative(out, exact_attention(tensors, size, mask, 128**-0.5)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("size", [*SMALL, FULL[0], FULL[2]], ids=lambda size: size.id)
def test_prepare(kernels: TorchKernels, size: Size, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(1)
    tokens, width = 3 * size.frame_tokens, size.heads * size.head_dim
    qkv, bias, norm_q, norm_k = (
        torch.randn(shape, generator=generator, device="cuda").to(dtype)
        for shape in ((tokens, 3 * width), (3 * width,), (width,), (width,))
    )
    angle = torch.randn(tokens, size.head_dim // 2, generator=generator, device="cuda")
    arguments = {key: attributes(size)[key] for key in ("frame_tokens", "block_q", "block_k")}
    arguments |= {"heads": size.heads, "eps": 1e-6}
    out = kernels.qk_prepare(qkv, bias, norm_q, norm_k, angle.cos(), angle.sin(), **arguments)
    exact = oracle.qk_prepare(
        *(x.double().float() for x in (qkv, bias, norm_q, norm_k)), angle.cos(), angle.sin(), **arguments
    )
    for found, expected in zip(out[:3], exact[:3], strict=True):
        assert relative(found, expected) < TOLERANCE[dtype]
    for mean, rounded, block in ((out[3], out[0], size.block_q), (out[4], out[1], size.block_k)):
        assert relative(mean, oracle.block_means(rounded, size.frame_tokens, block)) < 1e-6


def test_every_policy(kernels: TorchKernels) -> None:
    size = SMALL[2]
    tensors = inputs(size, torch.bfloat16)
    blocks = tensors["k_mean"].shape[1]
    policies = (
        DensePolicy(),
        WindowPolicy(KEEP),
        HSAPolicy(kernels, 4, 1, 1, KEEP),
        TopKPolicy(kernels, KEEP),
    )
    for policy in policies:
        lists = policy.select(chunk_inputs(tensors, size))
        mask = mask_from_lists(lists, blocks, (size.past + 3) * blocks)
        geometry = {key: attributes(size)[key] for key in ("frame_tokens", "block_q", "block_k")}
        names = ("q", "k", "v", "past_k", "past_v", "frame_slots")
        out = kernels.attend(*(tensors[name] for name in names), lists, **geometry, scale=0.1)
        assert relative(out, exact_attention(tensors, size, mask, 0.1)) < TOLERANCE[torch.bfloat16]


def test_commit_and_rope_sink(kernels: TorchKernels) -> None:
    size = SMALL[1]
    tensors = inputs(size, torch.bfloat16)
    names = ("past_k", "past_v", "past_kmean", "k", "v", "k_mean")
    before = {name: tensors[name].clone() for name in names[:3]}
    kernels.commit(
        *(tensors[name] for name in names), torch.tensor([6, -1, 0], dtype=torch.int32, device="cuda")
    )
    for name, source in (("past_k", "k"), ("past_v", "v"), ("past_kmean", "k_mean")):
        frames = tensors[source].reshape(3, *tensors[name].shape[1:])
        assert torch.equal(tensors[name][6], frames[0])
        assert torch.equal(tensors[name][0], frames[2])
        assert torch.equal(tensors[name][1:6].nan_to_num(9), before[name][1:6].nan_to_num(9))

    sinks = torch.randn(2, *tensors["past_k"].shape[1:], device="cuda").bfloat16()
    means = oracle.block_means(sinks.flatten(0, 1), size.frame_tokens, size.block_k)
    angle = torch.randn(2, 22, device="cuda")
    slots = torch.tensor([3, 1], dtype=torch.int32, device="cuda")
    kernels.rope_sink(tensors["past_k"], tensors["past_kmean"], sinks, means, slots, angle.cos(), angle.sin())
    for name, source, tolerance in (("past_k", sinks, 4e-3), ("past_kmean", means, 1e-6)):
        turn = torch.zeros(2, 1, 1, size.head_dim // 2, dtype=torch.float64, device="cuda")
        turn[..., :22] = angle[:, None, None].double()
        complexes = torch.view_as_complex(source.double().unflatten(-1, (-1, 2)))  # type: ignore[attr-defined]
        want = torch.view_as_real(complexes * torch.polar(torch.ones_like(turn), turn)).flatten(-2)
        assert relative(tensors[name][[3, 1]], want) < tolerance


@pytest.mark.parametrize("size", [SMALL[1], FULL[3]], ids=lambda size: size.id)
@pytest.mark.parametrize(("heads", "score"), [("own", "sum"), ("shared", "peak")])
def test_the_persistent_set(
    kernels: TorchKernels, size: Size, heads: Literal["own", "shared"], score: Literal["sum", "peak"]
) -> None:
    """One sink; of the frames behind it two stay, less the blocks that are worse than those of two that leave."""
    tensors, chosen = inputs(size, torch.bfloat16), PersistentSet(2, heads, score)
    pool = [tensors[name] for name in ("past_k", "past_v", "past_kmean")]
    slots = tensors["frame_slots"][: size.past].tolist()
    geometry = BlockGeometry(size.frame_tokens, size.block_q, size.block_k)
    means = torch.cat((tensors["past_kmean"][slots], tensors["k_mean"])).double()
    marks = chosen.scores(block_weights(tensors["q_mean"].double(), means, 0.1))
    contenders, blocks = slots[1:5], geometry.k_blocks
    frames = [tuple(part[slot] for part in pool) for slot in contenders]
    expected = [part.clone() for part in pool]
    left = chosen.contest(frames, 2, marks[:, blocks : 5 * blocks], geometry)
    for slot, frame in zip(contenders[:2], left, strict=True):
        for part, value in zip(expected, frame, strict=True):
            part[slot] = value
    kernels.persist(
        *pool,
        *(tensors[name] for name in ("q_mean", "k_mean", "frame_slots")),
        torch.tensor([2, 2], dtype=torch.int32, device="cuda"),
        block_k=size.block_k,
        scale=0.1,
        sink_frames=1,
        shared_heads=heads == "shared",
        peak=score == "peak",
    )
    for found, wanted in zip(pool, expected, strict=True):
        assert torch.equal(found.nan_to_num(9), wanted.nan_to_num(9))


def captured(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # compile and load outside of the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        run()
    return graph


def test_one_graph_serves_every_chunk(kernels: TorchKernels) -> None:
    """Capture once, then replay with other `chunk` and `frame_slots` on the device."""
    size = SMALL[2]
    tensors = inputs(size, torch.bfloat16)
    for name in ("past_k", "past_v", "past_kmean"):
        tensors[name].nan_to_num_(nan=0.5)  # every slot takes its turn below
    lists = empty_lists(chunk_inputs(tensors, size).problem, torch.device("cuda"))
    scores = torch.empty(lists.entries.shape, device="cuda")
    out = torch.empty_like(tensors["q"])
    selected = ("q_mean", "k_mean", "past_kmean", "frame_slots", "chunk")
    attended = ("q", "k", "v", "past_k", "past_v", "frame_slots")
    geometry = {key: attributes(size)[key] for key in ("frame_tokens", "block_q", "block_k")}

    def run() -> None:
        kernels.select(*(tensors[name] for name in selected), **attributes(size), out=lists, scores=scores)
        kernels.attend(*(tensors[name] for name in attended), lists, **geometry, scale=0.1, out=out)

    graph = captured(run)
    for chunk, past in ((0, 0), (1, 3), (2, 6), (3, 9), (1, 5)):
        order = torch.randperm(size.max_past + 2, generator=torch.Generator().manual_seed(past))[:past]
        tensors["frame_slots"].fill_(-1)
        tensors["frame_slots"][:past] = order.cuda().int()
        tensors["chunk"].fill_(chunk)
        out.fill_(float("nan"))
        graph.replay()
        blocks = tensors["k_mean"].shape[1]
        mask = mask_from_lists(lists, blocks, (past + 3) * blocks)
        total = (past + 3) * blocks
        kept = total if past == 0 else KEEP[min(chunk, 2)] * total >> 20
        assert (lists.counts == kept).all()
        assert relative(out, exact_attention(tensors, size, mask, 0.1)) < TOLERANCE[torch.bfloat16]


def test_torch_ops_run_these_kernels() -> None:
    bind_cuda()
    size = SMALL[1]
    tensors = inputs(size, torch.float16)
    values = {**attributes(size), "scale": 0.1}
    order = (
        "frame_tokens",
        "block_q",
        "block_k",
        "keep_frames",
        "sink_frames",
        "near_frames",
        "scale",
        "keep_q20",
    )
    found = torch.ops.lightforcing.hierarchical_sparse_attention(
        *tensors.values(), *(list(values[key]) if key == "keep_q20" else values[key] for key in order)
    )
    want = oracle.hsa_attention(
        *(x.float() if x.is_floating_point() else x for x in tensors.values()), **values
    )
    assert relative(found, want) < TOLERANCE[torch.float16]


def test_empty_list_writes_zeros_and_reads_nothing(kernels: TorchKernels) -> None:
    size = SMALL[0]
    tensors = inputs(size, torch.bfloat16)
    lists = DensePolicy().select(chunk_inputs(tensors, size))
    lists.counts[1, 2] = 0
    lists.entries[1, 2] = 0x7FFFFFFF
    names = ("q", "k", "v", "past_k", "past_v", "frame_slots")
    geometry = {key: attributes(size)[key] for key in ("frame_tokens", "block_q", "block_k")}
    out = kernels.attend(
        *(tensors[name] for name in names), BlockLists(lists.entries, lists.counts), **geometry, scale=0.1
    )
    torch.cuda.synchronize()
    assert (out[64:96, 1] == 0).all()
    assert not out.isnan().any()


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_is_clean(tool: str, image_folder: Path) -> None:
    """Minutes each: the last part of `make gpu`."""
    if os.environ.get(SANITIZED):
        pytest.skip("this is the run under the sanitizer")
    program = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    environment = {**os.environ, SANITIZED: "1", "LIGHTFORCING_KERNELS": str(image_folder)}
    # Without a caching allocator, one byte past a buffer is one byte past an allocation.
    environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    # Our kernels only, and nothing about calls: cuda.bindings asks the driver for functions that it may not have.
    # Of the two ways to launch them that of the images, which starts no compiler under the tool.
    options = ["--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
    options += [part for kernel in KERNELS for part in ("--kernel-name", f"kernel_name={kernel}")]
    tests = (
        "cuda.core and ((bfloat16 and (test_operator_small or test_prepare) and not 1536 and not 1560) "
        "or test_commit_and or (test_the_persistent and not 1560))"
    )
    result = subprocess.run(
        [program, *options, sys.executable, "-m",
         "pytest", "-q", "-x", "-m", "gpu", "-p", "no:cacheprovider", "-k", tests, __file__],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=SANITIZER_SECONDS,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-4000:]
