"""Inputs of the kernels over codes, and checks: what the interpreter and a GPU run them with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightforcing_ref import fp8_cache as oracle
from lightforcing_ref.attention import qk_prepare
from lightforcing_ref.rope import apply_rope
from plugins import contract, operators
from plugins.eager.launch import TorchKernels
from runtime.bundle.images import KernelProblem
from tests import brute_force

GEOMETRIES = [(44, 32, 32), (64, 32, 64), (88, 64, 64)]
"""Tokens of a frame, of a query block and of a key block: with and without a tail."""


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def prepared(geometry: tuple[int, int, int], head_dim: int) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    frame_tokens, block_q, block_k = geometry
    frames, heads = 2, 3
    tokens, width = frames * frame_tokens, heads * head_dim
    generator = torch.Generator().manual_seed(frame_tokens)
    qkv, bias, norm_q, norm_k = (
        torch.randn(shape, generator=generator)
        for shape in ((tokens, 3 * width), (3 * width,), (width,), (width,))
    )
    qkv[:, 2 * width : 2 * width + head_dim] = 0  # the values of a head that are all zero
    bias[2 * width : 2 * width + head_dim] = 0
    angle = torch.randn(tokens, head_dim // 2, generator=generator)
    attributes: dict[str, Any] = {"heads": heads, "frame_tokens": frame_tokens, "eps": 1e-6}
    return (qkv, bias, norm_q, norm_k, angle.cos(), angle.sin()), attributes | {
        "block_q": block_q,
        "block_k": block_k,
    }


def scaled(
    geometry: tuple[int, int, int], head_dim: int, codes: bool, dtype: torch.dtype = torch.float32
) -> tuple[KernelProblem, dict[str, Tensor], dict[str, Tensor]]:
    """A projection that was left without its scales: the problem of *prepare*, its buffers and what it must give.

    Buffers in `dtype` where kernels have their compute type; what is expected is float32 and codes.
    """
    (qkv, *rest), attributes = prepared(geometry, head_dim)
    generator = torch.Generator().manual_seed(1)
    token_scale = torch.rand(len(qkv), 1, generator=generator) + 0.5
    channel_scale = torch.rand(qkv.shape[1], generator=generator) + 0.5
    names = ("bias", "norm_q", "norm_k")
    buffers = {"qkv": qkv, "token_scale": token_scale, "channel_scale": channel_scale}
    buffers = {
        name: x.to(dtype) for name, x in (buffers | dict(zip(names, rest[:3], strict=True))).items()
    } | dict(zip(("cos", "sin"), rest[3:], strict=True))
    exact = {name: x.float() for name, x in buffers.items()}
    exact["qkv"] = exact["qkv"] * exact.pop("token_scale") * exact.pop("channel_scale")
    reference = oracle.qk_prepare_fp8 if codes else qk_prepare
    operator = operators.OPERATORS[operators.QK_PREPARE_FP8 if codes else contract.QK_PREPARE]
    expected = dict(
        zip(operator.outputs, reference(*(exact[x] for x in operator.inputs), **attributes), strict=True)
    )
    compute = dict.fromkeys(("q",) if codes else ("q", "k", "v"), dtype)
    for name, value in expected.items():
        buffers[name] = torch.full_like(value, 7, dtype=compute.get(name, value.dtype))
    sizes = (attributes["heads"], head_dim, geometry[0], 2, 0, attributes["block_q"], attributes["block_k"])
    return KernelProblem(str(dtype).removeprefix("torch."), *sizes), buffers, expected


def case_of(geometry: tuple[int, int, int], past: int, head_dim: int = 64) -> dict[str, Tensor]:
    """Inputs of the attention over codes: of keys and values that are quantized here, in slots out of order."""
    frame_tokens, block_q, block_k = geometry
    case = brute_force.random_case(
        np.random.default_rng(past),
        heads=2,
        head_dim=head_dim,
        frame_tokens=frame_tokens,
        block_q=block_q,
        block_k=block_k,
        past=past,
        max_past=past + 1,
        chunk=1,
    )
    given = {name: torch.from_numpy(np.ascontiguousarray(x)).clone() for name, x in case.inputs.items()}
    frames = (-1, frame_tokens)
    named = {"frame_slots": given["frame_slots"], "chunk": given["chunk"]}
    for name in ("q", "q_mean", "k_mean", "past_kmean"):
        named[name] = given[name].float()
    for stem in ("", "past_"):
        keys, values = (
            (given[f"{stem}{kind}"].float() if stem else given[kind].float().unflatten(0, frames))
            for kind in ("k", "v")
        )
        keys, values = keys.nan_to_num(), values.nan_to_num()  # slots that nothing names hold anything
        means = named["past_kmean" if stem else "k_mean"].nan_to_num()
        codes, scale = oracle.quantize_blocks(keys, block_k, means)
        value_codes, value_scale = oracle.quantize_values(
            values * torch.linspace(0.1, 9, len(values))[:, None, None, None], block_k
        )
        named[f"{stem}k"] = codes if stem else codes.flatten(0, 1)
        named[f"{stem}v"] = value_codes
        named[f"{stem}kscale" if stem else "k_scale"] = scale
        named[f"{stem}vscale" if stem else "v_scale"] = value_scale
    return {name: named[name] for name in operators.HSA_FP8_INPUTS} | {"attributes": case.attributes}  # type: ignore[dict-item]


def check_commit(kernels: TorchKernels, device: str = "cpu") -> None:
    """Frames of a chunk in the slots that are named, and in no other."""
    given = case_of((44, 32, 32), 3)
    given.pop("attributes")
    names = ("past_k", "past_v", "past_kmean", "past_kscale", "past_vscale")
    pool = {name: given[name].to(device, copy=True) for name in names}
    staged = [given[name].to(device) for name in ("k", "v", "k_mean")]
    frames = given["k_mean"].shape[0]
    slots = torch.tensor([2, -1, 0][:frames], dtype=torch.int32)
    scales = {name: given[name].to(device) for name in ("k_scale", "v_scale")}
    kernels.commit(
        *(pool[name] for name in names[:3]), *staged, slots.to(device),
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
        assert torch.equal(pool[name].cpu().nan_to_num(), expected.nan_to_num()), name


def check_sinks(kernels: TorchKernels, geometry: tuple[int, int, int], device: str = "cpu") -> None:
    """Sinks whose codes are read, turned along time, and rounded again, and slots of others as they were."""
    frame_tokens, _, block = geometry
    heads, head_dim, pairs, sinks, slots = 2, 64, 12, 2, 4
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(sinks, frame_tokens, heads, head_dim, generator=generator)
    means = torch.stack([torch.stack([part.mean(0) for part in frame.split(block)]) for frame in keys])
    codes, scale = oracle.quantize_blocks(keys, block, means)
    angle = torch.randn(sinks, pairs, generator=generator)
    target = torch.tensor([3, 1], dtype=torch.int32)
    pool = [
        torch.full((slots, frame_tokens, heads, head_dim), 77, dtype=torch.uint8, device=device),
        *(torch.full((slots, *x.shape[1:]), 7.0, device=device) for x in (means, scale)),
    ]
    moved = [x.to(device) for x in (codes, means, target, angle.cos(), angle.sin())]
    kernels.rope_sink(
        *pool[:2], *moved, scales={"past_kscale": pool[2], "sink_kscale": scale.to(device)}, block_k=block
    )
    past_k, past_kmean, past_kscale = (x.cpu() for x in pool)
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
