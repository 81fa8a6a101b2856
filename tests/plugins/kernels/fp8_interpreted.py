"""The kernels over codes in Triton's interpreter, against the reference.

Not collected by name: test_fp8_kernels.py runs this file in a process of its own, because Triton decides when it is
imported whether it interprets. By hand: TRITON_INTERPRET=1 pytest tests/plugins/kernels/fp8_interpreted.py
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from lightforcing_ref import fp8_cache as oracle
from lightforcing_ref.rope import apply_rope
from plugins import operators
from plugins.eager.interpreter import mend_interpreter
from plugins.eager.launch import TorchKernels
from plugins.eager.launcher import TritonLauncher
from plugins.kernels.fp8 import to_codes, to_half
from tests.plugins.kernels.codes import GEOMETRIES, case_of, prepared, relative, scaled

assert os.environ.get("TRITON_INTERPRET") == "1", __doc__
mend_interpreter()
KERNELS = TorchKernels()


@triton.jit
def _there_and_back(codes, halves, x, N: tl.constexpr):
    index = tl.arange(0, N)
    code = to_codes(tl.load(x + index), False)
    tl.store(codes + index, code)
    tl.store(halves + index, to_half(code, False))


def test_integers_round_as_hardware_does() -> None:
    """Every code, every midpoint and its neighbours, subnormal ones and what lies beyond the range."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = values[values.isfinite()].unique()
    middle = (values[1:] + values[:-1]) / 2
    around = [torch.nextafter(middle, torch.tensor(side)) for side in (-1e9, 1e9)]
    beyond = torch.tensor([449.0, 1e9, -1e9, float("inf"), 2.0**-11, -(2.0**-30), 0.0])
    x = torch.cat((values, middle, *around, beyond))
    padded = torch.zeros(1024)
    padded[: len(x)] = x
    codes, halves = torch.zeros(1024, dtype=torch.uint8), torch.zeros(1024, dtype=torch.float16)
    _there_and_back[(1,)](codes, halves, padded, N=1024)
    expected = padded.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(codes.view(torch.float8_e4m3fn).float(), expected.float())
    assert torch.equal(256 * halves.float(), expected.float())


@pytest.mark.parametrize(("geometry", "head_dim"), [(g, 128 if g[0] == 44 else 64) for g in GEOMETRIES])
def test_prepare(geometry: tuple[int, int, int], head_dim: int) -> None:
    inputs, attributes = prepared(geometry, head_dim)
    found = dict(
        zip(operators.QK_PREPARE_FP8_OUTPUTS, KERNELS.qk_prepare_fp8(*inputs, **attributes), strict=True)
    )
    expected = dict(
        zip(operators.QK_PREPARE_FP8_OUTPUTS, oracle.qk_prepare_fp8(*inputs, **attributes), strict=True)
    )
    for name in ("q", "q_mean", "k_mean", "k_scale", "v_scale"):
        assert relative(found[name], expected[name]) < 1e-6, name
    for name in ("k", "v"):
        # Sums in another order move what lies on the edge between two codes.
        assert float((found[name] != expected[name]).float().mean()) < 2e-3, name


@pytest.mark.parametrize("codes", [False, True])
def test_prepare_from_a_product_of_codes(codes: bool) -> None:
    """The scales that the projection was left without are applied before anything else."""
    problem, buffers, expected = scaled(GEOMETRIES[0], 64, codes)
    TritonLauncher().launch(
        "prepare_scaled_fp8" if codes else "prepare_scaled", problem, buffers, {"eps": 1e-6}
    )
    for name, value in expected.items():
        if value.dtype == torch.uint8:
            assert float((buffers[name] != value).float().mean()) < 2e-3, name
        else:
            assert relative(buffers[name], value) < 1e-6, name


@pytest.mark.parametrize(("geometry", "past"), list(zip(GEOMETRIES, (4, 0, 2), strict=True)))
def test_attention(geometry: tuple[int, int, int], past: int) -> None:
    given = case_of(geometry, past)
    attributes: Any = given.pop("attributes")
    found = KERNELS.hierarchical_sparse_attention_fp8(*given.values(), **attributes)
    expected = oracle.hsa_attention_fp8(*given.values(), **attributes)
    # Queries and weights are float16 in the products.
    assert relative(found, expected) < 1e-3
    found = KERNELS.hierarchical_sparse_attention_e4m3(*given.values(), **attributes)
    rounded = oracle.hsa_attention_e4m3(*given.values(), **attributes)
    # Means of blocks are float16 in their product, which moves some weights to the code beside theirs: far less than
    # rounding all of them does.
    assert relative(found, rounded) < min(6e-3, relative(rounded, expected) / 3)


def test_commit_copies_what_belongs_to_a_frame() -> None:
    given = case_of((44, 32, 32), 3)
    given.pop("attributes")
    names = ("past_k", "past_v", "past_kmean", "past_kscale", "past_vscale")
    pool = {name: given[name].clone() for name in names}
    staged = [given[name] for name in ("k", "v", "k_mean")]
    frames = given["k_mean"].shape[0]
    slots = torch.tensor([2, -1, 0][:frames], dtype=torch.int32)
    scales = {name: given[name] for name in ("k_scale", "v_scale")}
    KERNELS.commit(
        *(pool[name] for name in names[:3]), *staged, slots,
        scales=scales | {name: pool[name] for name in names[3:]},
    )  # fmt: skip
    sources = [
        given["k"].unflatten(0, (frames, -1)),
        *(given[name] for name in ("v", "k_mean", "k_scale", "v_scale")),
    ]
    for name, source in zip(names, sources, strict=True):
        expected = given[name].clone()
        for frame, slot in enumerate(slots.tolist()):
            if slot >= 0:
                expected[slot] = source[frame]
        assert torch.equal(pool[name].nan_to_num(), expected.nan_to_num()), name


@pytest.mark.parametrize("geometry", [(64, 32, 32), (88, 64, 64)], ids=str)
def test_sinks_are_turned_and_rounded_again(geometry: tuple[int, int, int]) -> None:
    frame_tokens, _, block = geometry
    heads, head_dim, pairs, sinks, slots = 2, 64, 12, 2, 4
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(sinks, frame_tokens, heads, head_dim, generator=generator)
    means = torch.stack([_means(frame, block) for frame in keys])
    codes, scale = oracle.quantize_blocks(keys, block, means)
    angle = torch.randn(sinks, pairs, generator=generator)
    past_k = torch.full((slots, frame_tokens, heads, head_dim), 77, dtype=torch.uint8)
    past_kmean, past_kscale = (
        torch.full((slots, *means.shape[1:]), 7.0),
        torch.full((slots, *scale.shape[1:]), 7.0),
    )
    target = torch.tensor([3, 1], dtype=torch.int32)
    KERNELS.rope_sink(
        past_k, past_kmean, codes, means, target, angle.cos(), angle.sin(),
        scales={"past_kscale": past_kscale, "sink_kscale": scale}, block_k=block,
    )  # fmt: skip
    whole = torch.zeros(sinks, head_dim // 2)
    whole[:, :pairs] = angle
    for sink, slot in enumerate(target.tolist()):
        cos, sin = whole[sink].cos()[None], whole[sink].sin()[None]
        assert relative(past_kmean[slot], apply_rope(means[sink], cos, sin)) < 1e-6
        residual = oracle.dequantize_blocks(codes[sink][None], scale[sink][None], block)[0]
        expected, new = oracle.quantize_blocks(apply_rope(residual, cos, sin)[None], block)
        assert relative(past_kscale[slot], new[0]) < 1e-6
        assert float((past_k[slot] != expected[0]).float().mean()) < 2e-3
    assert (past_k[[0, 2]] == 77).all() and (past_kscale[[0, 2]] == 7).all()


def _means(frame: Tensor, block: int) -> Tensor:
    return torch.stack([part.mean(0) for part in frame.split(block)])
