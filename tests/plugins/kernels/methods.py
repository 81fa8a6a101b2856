"""Inputs of the other methods' kernels: what the interpreter and a GPU run them with."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests import brute_force


def case_of(
    seed: int, past: int, current: int, geometry: dict[str, Any], head_dim: int = 64
) -> brute_force.HSACase:
    """Random inputs of any chunk of three, slots in no order, those that are not named full of NaN."""
    rng = np.random.default_rng(seed)
    sizes = {name: geometry[name] for name in ("frame_tokens", "block_q", "block_k")}
    return brute_force.random_case(
        rng,
        heads=2,
        head_dim=head_dim,
        past=past,
        max_past=past + int(rng.integers(0, 3)),
        chunk_frames=current,
        chunk=int(rng.integers(0, 3)),
        **sizes,
    )


def with_common_keys(case: brute_force.HSACase, seed: int, strength: float) -> brute_force.HSACase:
    """Keys and queries with a common part, as real ones have: then some blocks are similar and others are not."""
    shape = case.inputs["k"].shape[1:]
    common = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * strength
    for name in ("k", "past_k", "k_mean", "past_kmean"):
        case.inputs[name] += common
    return case
