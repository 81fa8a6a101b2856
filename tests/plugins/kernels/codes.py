"""Inputs of the kernels over codes: what the interpreter and a GPU run them with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightforcing_ref import fp8_cache as oracle
from plugins import operators
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
