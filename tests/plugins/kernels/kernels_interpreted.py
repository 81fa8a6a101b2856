"""The Triton kernels in Triton's interpreter, on the CPU, against the reference and the brute-force judge.

Not collected by name: test_kernels_interpreter.py runs this file in a process of its own, because Triton decides when
it is imported whether it interprets. By hand: TRITON_INTERPRET=1 pytest tests/plugins/kernels/kernels_interpreted.py
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.attention.inputs import Shape
from benchmarks.attention.quality import method_table
from lightforcing_ref import attention as oracle
from plugins.eager.launch import BlockLists, TorchKernels, empty_lists
from plugins.eager.policies import (
    ChunkInputs,
    DensePolicy,
    HSAPolicy,
    SelectionPolicy,
    TopKPolicy,
    WindowPolicy,
    lists_from_mask,
    mask_from_lists,
)
from plugins.kernels.specs import KernelError, KernelProblem
from tests import brute_force

assert os.environ.get("TRITON_INTERPRET") == "1", __doc__

MARGIN = 64
CANARY = 77
KERNELS = TorchKernels()

# (frame_tokens, block_q, block_k): whole blocks as 1536 = 24 * 64, and a tail as 1560 = 24 * 64 + 24.
GEOMETRIES = [(64, 32, 32), (76, 32, 128), (88, 64, 64), (128, 64, 128), (152, 128, 64)]


class Guarded:
    """An output buffer full of poison, between two margins that must stay as they are."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        size = int(np.prod(shape))
        self._whole = torch.full((size + 2 * MARGIN,), CANARY, dtype=dtype)
        self.tensor = self._whole[MARGIN : MARGIN + size].view(shape)
        self.tensor.fill_(float("nan") if dtype.is_floating_point else -CANARY)

    def check(self, *, complete: bool = True) -> None:
        assert (self._whole[:MARGIN] == CANARY).all()
        assert (self._whole[-MARGIN:] == CANARY).all()
        if complete:
            assert not self.tensor.isnan().any(), "not every element was written"


def fenced(x: Tensor) -> Tensor:
    """`x` between NaN margins, so that reading outside of it shows."""
    whole = torch.full((x.numel() + 2 * MARGIN,), float("nan"), dtype=x.dtype)
    whole[MARGIN:-MARGIN] = x.flatten()
    return whole[MARGIN:-MARGIN].view(x.shape)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# Output rounding of each type. The interpreter truncates to bfloat16 where a GPU rounds.
ROUNDING = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 8e-3}


@pytest.mark.parametrize(
    ("geometry", "head_dim", "dtype"),
    [
        ((32, 32, 32), 64, torch.float32),
        ((44, 32, 32), 64, torch.float16),
        ((20, 32, 64), 128, torch.float32),
        ((36, 64, 32), 64, torch.bfloat16),
    ],
)
def test_prepare(geometry: tuple[int, int, int], head_dim: int, dtype: torch.dtype) -> None:
    frame_tokens, block_q, block_k = geometry
    frames, heads = 2, 3
    tokens, width = frames * frame_tokens, heads * head_dim
    generator = torch.Generator().manual_seed(frame_tokens)
    qkv, bias, norm_q, norm_k = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((tokens, 3 * width), (3 * width,), (width,), (width,))
    )
    angle = torch.randn(tokens, head_dim // 2, generator=generator)
    attributes: dict[str, Any] = {"heads": heads, "frame_tokens": frame_tokens, "eps": 1e-6}
    attributes |= {"block_q": block_q, "block_k": block_k}
    inputs = tuple(fenced(x) for x in (qkv, bias, norm_q, norm_k, angle.cos(), angle.sin()))

    out = [Guarded((tokens, heads, head_dim), dtype) for _ in range(3)]
    out += [
        Guarded((frames, -(-frame_tokens // block), heads, head_dim), torch.float32)
        for block in (block_q, block_k)
    ]
    KERNELS.qk_prepare(*inputs, **attributes, out=[guarded.tensor for guarded in out])

    expected = oracle.qk_prepare(*inputs, **attributes)
    for guarded, want in zip(out, expected, strict=True):
        guarded.check()
        assert relative(guarded.tensor, want) < ROUNDING[dtype]
    # The means are those of the rounded q and k, summed in float32.
    for mean, x, block in ((out[3], out[0], block_q), (out[4], out[1], block_k)):
        assert relative(mean.tensor, oracle.block_means(x.tensor, frame_tokens, block)) < 1e-6


def select(case: brute_force.HSACase) -> Tensor:
    """Run score and select on a case; the mask of what was selected, after checking lists and margins."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in case.inputs.items()}
    problem = KernelProblem(
        "bfloat16",
        case.heads,
        case.inputs["q"].shape[2],
        case.attributes["frame_tokens"],
        case.chunk_frames,
        len(case.inputs["frame_slots"]),
        case.attributes["block_q"],
        case.attributes["block_k"],
    )
    shape = empty_lists(problem, torch.device("cpu")).entries.shape
    entries, counts, scores = (
        Guarded(tuple(shape), torch.int32),
        Guarded(tuple(shape[:2]), torch.int32),
        Guarded(tuple(shape), torch.float32),
    )
    lists = BlockLists(entries.tensor, counts.tensor)
    attributes = {key: value for key, value in case.attributes.items() if key != "scale"}
    names = ("q_mean", "k_mean", "past_kmean", "frame_slots", "chunk")
    KERNELS.select(*(tensors[name] for name in names), **attributes, out=lists, scores=scores.tensor)

    for guarded in (entries, counts, scores):
        guarded.check(complete=False)
    resident = case.total_blocks
    column = torch.arange(shape[2])
    valid = column < lists.counts[..., None]
    order = (lists.entries >> 16) * case.k_blocks + (lists.entries & 0xFFFF)
    assert (lists.counts >= 1).all()
    assert (lists.entries[~valid] == -CANARY).all(), "written past the end of a list"
    assert ((order.diff(dim=2) > 0) | ~valid[..., 1:]).all(), "a list is not ascending"
    mask = mask_from_lists(lists, case.k_blocks, resident)
    assert torch.equal(mask.sum(2).int(), lists.counts)
    return mask


SELECTIONS: list[dict[str, Any]] = [
    {"past": 0, "max_past": 4, "chunk": 0},  # the first chunk is dense
    {"past": 0, "max_past": 0, "chunk": 3},  # no room for past frames at all
    {"past": 3, "max_past": 6, "chunk": 1},  # one stage: few past frames
    {"past": 6, "max_past": 6, "chunk": 2},
    {"past": 6, "max_past": 9, "chunk": 9},  # chunk beyond the table
    {"past": 6, "max_past": 6, "chunk": -1},  # and before it
    {"past": 6, "max_past": 6, "chunk": 2, "ties": True},
    {
        "past": 9,
        "max_past": 9,
        "chunk": 1,
        "ties": True,
        "keep_frames": 5,
        "sink_frames": 2,
        "near_frames": 0,
    },
    {"past": 7, "max_past": 8, "chunk": 1, "keep_frames": 2},  # no frame but sink and near
    {
        "past": 7,
        "max_past": 8,
        "chunk": 1,
        "keep_frames": 1,
        "sink_frames": 0,
        "near_frames": 0,
        "ties": True,
    },
    {"past": 5, "max_past": 5, "chunk": 0, "keep_q20": (0,)},  # at least one block
    {"past": 5, "max_past": 5, "chunk": 0, "keep_q20": (1 << 20,)},  # more than are eligible
    {"past": 30, "max_past": 30, "chunk": 1},  # as many frames as a kernel serves
    {
        "past": 30,
        "max_past": 30,
        "chunk": 1,
        "ties": True,
        "keep_frames": 29,  # one frame less than there are, and one to choose
        "sink_frames": 9,
        "near_frames": 19,
    },
]


@pytest.mark.parametrize("options", SELECTIONS, ids=str)
def test_select(options: dict[str, Any]) -> None:
    frame_tokens, block_q, block_k = (76, 32, 32) if options.get("ties") else (130, 128, 64)
    case = brute_force.random_case(
        np.random.default_rng(1),
        head_dim=64,
        frame_tokens=frame_tokens,
        block_q=block_q,
        block_k=block_k,
        chunk_frames=2,
        **options,
    )
    found = brute_force.mask_to_sets(select(case).numpy())
    assert not brute_force.selection_errors(case, brute_force.hsa_select(case), found)


def test_select_treats_both_zeros_as_equal() -> None:
    case = brute_force.random_case(
        np.random.default_rng(0),
        heads=1,
        head_dim=64,
        frame_tokens=64,
        block_q=64,
        block_k=32,
        past=1,
        keep_q20=(1 << 19,),
    )
    case.inputs["q_mean"][:] = 1.0
    for name in ("k_mean", "past_kmean"):
        case.inputs[name][:] = 0.0
        case.inputs[name][:, 0] = -0.0
    mask = select(case)
    assert (mask.sum(2) == 4).all()
    assert mask[..., :4].all(), "zeros of either sign tie, and ties go to the lowest index"


def attend_case(
    geometry: tuple[int, int, int], dtype: torch.dtype, *, past: int, max_past: int, head_dim: int = 64
) -> tuple[dict[str, Tensor], KernelProblem]:
    """Random q, k, v and a cache in shuffled slots, everything unused poisoned."""
    frame_tokens, block_q, block_k = geometry
    case = brute_force.random_case(
        np.random.default_rng(frame_tokens),
        heads=2,
        head_dim=head_dim,
        frame_tokens=frame_tokens,
        block_q=block_q,
        block_k=block_k,
        chunk_frames=2,
        past=past,
        max_past=max_past,
        chunk=2,
    )
    tensors = {name: torch.from_numpy(x) for name, x in case.inputs.items()}
    for name in ("q", "k", "v", "past_k", "past_v"):
        tensors[name] = fenced(tensors[name].to(dtype))
    problem = KernelProblem("bfloat16", 2, head_dim, frame_tokens, 2, max_past, block_q, block_k)
    return tensors, problem


def attend(
    tensors: dict[str, Tensor], problem: KernelProblem, lists: BlockLists, kernels: TorchKernels = KERNELS
) -> Tensor:
    out = Guarded(tuple(tensors["q"].shape), tensors["q"].dtype)
    names = ("q", "k", "v", "past_k", "past_v", "frame_slots")
    kernels.attend(
        *(tensors[name] for name in names),
        lists,
        frame_tokens=problem.frame_tokens,
        block_q=problem.block_q,
        block_k=problem.block_k,
        scale=0.125,
        out=out.tensor,
    )
    out.check()
    return out.tensor


def expected_attention(tensors: dict[str, Tensor], problem: KernelProblem, mask: Tensor) -> Tensor:
    """Masked attention over the logical sequence, by the reference."""
    slots = tensors["frame_slots"][tensors["frame_slots"] >= 0].long()
    keys, values = (
        torch.cat((tensors[f"past_{name}"][slots].flatten(0, 1), tensors[name])).float()
        for name in ("k", "v")
    )
    row, column = (
        torch.cat(
            [
                torch.arange(problem.frame_tokens) // block + frame * -(-problem.frame_tokens // block)
                for frame in range(tokens // problem.frame_tokens)
            ]
        )
        for tokens, block in ((tensors["q"].shape[0], problem.block_q), (keys.shape[0], problem.block_k))
    )
    return oracle.dense_attention(tensors["q"].float(), keys, values, 0.125, mask[:, row][:, :, column])


@pytest.mark.parametrize(
    ("geometry", "dtype"),
    [
        (GEOMETRIES[1], torch.float32),
        (GEOMETRIES[4], torch.float32),
        *(pytest.param(GEOMETRIES[n], torch.float32, marks=pytest.mark.slow) for n in (0, 2, 3)),
        (GEOMETRIES[2], torch.float16),
        (GEOMETRIES[3], torch.bfloat16),
    ],
)
def test_attend_over_given_lists(geometry: tuple[int, int, int], dtype: torch.dtype) -> None:
    tensors, problem = attend_case(geometry, dtype, past=3, max_past=4)
    sizes = problem.sizes()
    resident = (3 + problem.chunk_frames) * sizes["k_blocks"]
    mask = torch.rand(2, sizes["query_blocks"], resident) < 0.4
    mask[..., sizes["k_blocks"] - 1] = True  # a ragged block of the past
    mask[..., -1] |= torch.arange(sizes["query_blocks"]) % 2 == 0  # and of the present, for some
    lists = lists_from_mask(mask, sizes["k_blocks"], sizes["key_blocks"])
    found = attend(tensors, problem, lists)
    assert relative(found, expected_attention(tensors, problem, mask)) < 1.5 * ROUNDING[dtype]


def test_attend_with_head_dim_128_and_no_past() -> None:
    tensors, problem = attend_case((96, 64, 64), torch.float16, past=0, max_past=0, head_dim=128)
    assert tensors["frame_slots"].numel() == 0
    sizes = problem.sizes()
    mask = torch.ones(2, sizes["query_blocks"], sizes["key_blocks"], dtype=torch.bool)
    lists = lists_from_mask(mask, sizes["k_blocks"], sizes["key_blocks"])
    found = attend(tensors, problem, lists)
    assert relative(found, expected_attention(tensors, problem, mask)) < 1e-3


def test_attend_writes_zeros_where_a_list_is_empty() -> None:
    tensors, problem = attend_case((64, 32, 32), torch.float32, past=1, max_past=1)
    sizes = problem.sizes()
    mask = torch.ones(2, sizes["query_blocks"], sizes["key_blocks"], dtype=torch.bool)
    mask[1, 2] = False
    lists = lists_from_mask(mask, sizes["k_blocks"], sizes["key_blocks"])
    lists.entries[1, 2] = -1  # nothing of an empty row may be looked at
    found = attend(tensors, problem, lists)
    assert (found[64:96, 1] == 0).all()
    assert (found[64:96, 0] != 0).all()


KEEP = (1 << 20, 1 << 19, 3 << 17)
POLICIES: dict[str, SelectionPolicy] = {
    "dense": DensePolicy(),
    "window": WindowPolicy(KEEP),
    "hsa": HSAPolicy(KERNELS, 3, 1, 1, KEEP),
    "top-k": TopKPolicy(KERNELS, KEEP),
}


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_runs_through_the_same_attention(name: str) -> None:
    tensors, problem = attend_case((88, 64, 64), torch.float32, past=5, max_past=6)
    names = ("q_mean", "k_mean", "past_kmean", "frame_slots", "chunk")
    chunk = ChunkInputs(
        *(tensors[key] for key in names), problem.frame_tokens, problem.block_q, problem.block_k
    )
    lists = POLICIES[name].select(chunk)
    sizes = problem.sizes()
    resident = 7 * sizes["k_blocks"]
    mask = mask_from_lists(lists, sizes["k_blocks"], resident)
    kept = resident if name == "dense" else 3 * resident >> 3
    assert (lists.counts == kept).all()
    if name == "hsa":
        want = oracle.hsa_selection(
            chunk.q_mean,
            torch.cat((chunk.past_kmean[chunk.frame_slots[:5].long()], chunk.k_mean)),
            past_frames=5,
            chunk=2,
            hsa=oracle.HSAConfig(3, 1, 1),  # type: ignore[attr-defined]
            keep_q20=KEEP,
        )
        assert torch.equal(mask, want)
    found = attend(tensors, problem, lists)
    assert relative(found, expected_attention(tensors, problem, mask)) < 1e-6


def test_operator_agrees_with_both_forms_of_the_reference() -> None:
    tensors, _ = attend_case((88, 32, 64), torch.float32, past=5, max_past=7)
    attributes: dict[str, Any] = {"frame_tokens": 88, "block_q": 32, "block_k": 64, "keep_frames": 3}
    attributes |= {"sink_frames": 1, "near_frames": 1, "scale": 0.125, "keep_q20": KEEP}
    found = KERNELS.hierarchical_sparse_attention(*tensors.values(), **attributes)
    for form in ("mask", "gather"):
        want = oracle.hsa_attention(*tensors.values(), **attributes, form=form)
        assert relative(found, want) < 1e-6


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3, 4, 5))]
)
def test_operator_on_random_shapes(seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    past = int(rng.integers(0, 7))
    case = brute_force.random_case(
        rng,
        heads=int(rng.integers(1, 3)),
        head_dim=64,
        frame_tokens=int(rng.integers(33, 110)),
        block_q=64,
        block_k=int(rng.choice([64, 128])),
        chunk_frames=int(rng.integers(1, 4)),
        past=past,
        max_past=past + int(rng.integers(0, 3)),
        keep_frames=int(rng.integers(2, 5)),
        chunk=int(rng.integers(-1, 5)),
    )
    assert not brute_force.is_ambiguous(brute_force.hsa_select(case)), "choose another seed"
    tensors = [
        fenced(torch.from_numpy(x)) if x.ndim > 1 else torch.from_numpy(x) for x in case.inputs.values()
    ]
    found = KERNELS.hierarchical_sparse_attention(*tensors, **case.attributes)
    assert relative(found, oracle.hsa_attention(*tensors, **case.attributes)) < 1e-6


def test_commit_moves_bits_into_named_slots_only() -> None:
    slots, frame_tokens, k_blocks, heads, head_dim = 5, 12, 3, 2, 64
    generator = torch.Generator().manual_seed(0)
    past = [Guarded((slots, frame_tokens, heads, head_dim), torch.bfloat16) for _ in range(2)]
    past_kmean = Guarded((slots, k_blocks, heads, head_dim), torch.float32)
    k, v = (
        fenced(torch.randn(3 * frame_tokens, heads, head_dim, generator=generator).bfloat16())
        for _ in range(2)
    )
    k_mean = fenced(torch.randn(3, k_blocks, heads, head_dim, generator=generator))
    commit_slots = torch.tensor([4, -1, 1], dtype=torch.int32)
    KERNELS.commit(past[0].tensor, past[1].tensor, past_kmean.tensor, k, v, k_mean, commit_slots)
    for guarded, source in ((past[0], k), (past[1], v), (past_kmean, k_mean)):
        guarded.check(complete=False)
        frames = source.reshape(3, *guarded.tensor.shape[1:])
        assert torch.equal(guarded.tensor[4], frames[0])
        assert torch.equal(guarded.tensor[1], frames[2])
        assert guarded.tensor[[0, 2, 3]].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rope_sink_turns_the_temporal_pairs(dtype: torch.dtype) -> None:
    slots, frame_tokens, k_blocks, heads, head_dim, pairs = 4, 70, 3, 2, 64, 12
    generator = torch.Generator().manual_seed(0)
    sink_k = torch.randn(2, frame_tokens, heads, head_dim, generator=generator).to(dtype)
    sink_kmean = torch.randn(2, k_blocks, heads, head_dim, generator=generator)
    angle = torch.randn(2, pairs, generator=generator)
    past_k = Guarded((slots, frame_tokens, heads, head_dim), dtype)
    past_kmean = Guarded((slots, k_blocks, heads, head_dim), torch.float32)
    sink_slots = torch.tensor([3, 0], dtype=torch.int32)
    KERNELS.rope_sink(
        past_k.tensor,
        past_kmean.tensor,
        fenced(sink_k),
        fenced(sink_kmean),
        sink_slots,
        angle.cos(),
        angle.sin(),
    )
    for guarded, source in ((past_k, sink_k), (past_kmean, sink_kmean)):
        guarded.check(complete=False)
        # A pair is one complex number; the temporal ones are multiplied by exp(i angle).
        turn = torch.zeros(2, 1, 1, head_dim // 2, dtype=torch.float64)
        turn[..., :pairs] = angle[:, None, None].double()
        complexes = torch.view_as_complex(source.double().unflatten(-1, (-1, 2)))
        want = torch.view_as_real(complexes * torch.polar(torch.ones_like(turn), turn)).flatten(-2)
        assert relative(guarded.tensor[[3, 0]], want) < ROUNDING[source.dtype]
        assert guarded.tensor[[1, 2]].isnan().all()


def test_method_table_ranks_what_it_selects() -> None:
    shape = Shape(96, 4, 64, 64, heads=2, head_dim=64)
    hsa = {"keep_frames": 3, "sink_frames": 1, "near_frames": 1}
    rows = method_table(shape, (8, 12), hsa, (0.5,), "cpu", seed=0)
    assert [row["policy"] for row in rows] == ["window", "top-k", "hsa"]
    for row in rows:
        assert row["sparsity"] == 0.5
        assert 0 < row["weight"] <= row["best_weight"] + 1e-6
        assert 0 < row["error"] < 1


def test_strided_tensors_are_refused() -> None:
    tensors, problem = attend_case((64, 32, 32), torch.float32, past=1, max_past=1)
    lists = empty_lists(problem, torch.device("cpu"))
    tensors["past_k"] = tensors["past_k"].transpose(0, 1)
    with pytest.raises(KernelError, match=r"past_k .* need it contiguous"):
        attend(tensors, problem, lists)


def test_other_types_are_refused() -> None:
    tensors, problem = attend_case((64, 32, 32), torch.float64, past=1, max_past=1)
    with pytest.raises(
        KernelError, match=r"no kernels for torch.float64; expected one of float32, float16, bfloat16"
    ):
        attend(tensors, problem, empty_lists(problem, torch.device("cpu")))
