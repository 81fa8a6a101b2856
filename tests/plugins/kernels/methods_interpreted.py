"""The other methods' Triton kernels in Triton's interpreter against their oracles and ONNX bodies.

Not collected by name, see kernels_interpreted.py. By hand:
TRITON_INTERPRET=1 pytest tests/plugins/kernels/methods_interpreted.py
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightforcing_ref.policies import (
    MethodOperator,
    radial_attention,
    sliding_tile_attention,
    sparge_attention,
    vmoba_attention,
)
from plugins import contract
from plugins.eager.methods import MethodKernels
from tests import brute_force

assert os.environ.get("TRITON_INTERPRET") == "1", __doc__

KERNELS = MethodKernels.just_in_time()
ORACLES: dict[str, MethodOperator] = {
    contract.SLIDING_TILE: sliding_tile_attention,
    contract.RADIAL: radial_attention,
    contract.SPARGE: sparge_attention,
    contract.VMOBA: vmoba_attention,
}


def case_of(seed: int, past: int, current: int, geometry: dict[str, int], **more: Any) -> brute_force.HSACase:
    """Random inputs, slots in no order, those that are not named full of NaN."""
    rng = np.random.default_rng(seed)
    sizes = {name: geometry[name] for name in ("frame_tokens", "block_q", "block_k")}
    return brute_force.random_case(
        rng,
        heads=2,
        head_dim=64,
        past=past,
        max_past=past + int(rng.integers(0, 3)),
        chunk_frames=current,
        chunk=int(rng.integers(0, 3)),
        **sizes,
        **more,
    )


def check(operator: str, attributes: dict[str, Any], case: brute_force.HSACase) -> None:
    """What the kernels see and what comes out is the oracle's."""
    tensors = [torch.from_numpy(np.ascontiguousarray(x)) for x in case.inputs.values()]
    expected = ORACLES[operator](*tensors, **attributes)
    found = KERNELS(operator, *tensors, **attributes)
    assert not found.isnan().any()
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


@st.composite
def grids(draw: st.DrawFn) -> tuple[int, int]:
    return draw(st.integers(1, 7)), draw(st.integers(2, 7))


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_sliding_tiles(data: st.DataObject) -> None:
    """Grids that tiles do not divide, histories of every length, frames that were evicted, windows for each head."""
    rows, columns = data.draw(grids())
    odd = st.integers(0, 3).map(lambda n: 2 * n + 1)
    heads = data.draw(st.sampled_from((1, 2)))
    attributes = {
        "frame_tokens": rows * columns,
        "block_q": 32,
        "block_k": 32,
        "scale": 0.3,
        "columns": columns,
        "tile": (data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))),
        "windows": tuple(data.draw(st.lists(odd, min_size=3 * heads, max_size=3 * heads))),
        "sink_frames": data.draw(st.integers(0, 2)),
    }
    past, current = data.draw(st.integers(0, 4)), data.draw(st.sampled_from((1, 3)))
    case = case_of(data.draw(st.integers(0, 99)), past, current, attributes)
    check(contract.SLIDING_TILE, attributes, case)


@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_radial(data: st.DataObject) -> None:
    attributes = {
        "frame_tokens": data.draw(st.integers(65, 150)),
        "block_q": data.draw(st.sampled_from((32, 64))),
        "block_k": 64,
        "scale": 0.3,
        "decay": data.draw(st.sampled_from((0.1, 0.2, 0.7))),
        "sink_frames": data.draw(st.integers(0, 2)),
    }
    past = data.draw(st.integers(0, 9))
    case = case_of(data.draw(st.integers(0, 99)), past, data.draw(st.sampled_from((1, 2))), attributes)
    check(contract.RADIAL, attributes, case)


def with_common_keys(case: brute_force.HSACase, seed: int, strength: float) -> brute_force.HSACase:
    """Keys and queries with a common part, as real ones have: then some blocks are similar and others are not."""
    common = np.random.default_rng(seed).standard_normal((2, 64)).astype(np.float32) * strength
    for name in ("k", "past_k", "k_mean", "past_kmean"):
        case.inputs[name] += common
    return case


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_sparge(data: st.DataObject) -> None:
    """Both modes, with and without blocks that are not similar, with and without the mean key."""
    attributes = {
        "frame_tokens": data.draw(st.integers(33, 100)),
        "block_q": 32,
        "block_k": data.draw(st.sampled_from((32, 64))),
        "scale": 0.3,
        "similarity": data.draw(st.sampled_from((-0.1, 0.02, 0.03, 0.05, 1.0))),
        "cumulative": data.draw(st.sampled_from((0.0, 0.3, 0.8, 1.0))),
        "smooth": data.draw(st.sampled_from((0, 1))),
        "keep_q20": data.draw(st.sampled_from(((1 << 20, 1 << 18), (1,), (1 << 20,)))),
    }
    past, seed = data.draw(st.integers(0, 6)), data.draw(st.integers(0, 99))
    case = case_of(seed, past, data.draw(st.sampled_from((1, 2))), attributes)
    check(contract.SPARGE, attributes, with_common_keys(case, seed, data.draw(st.sampled_from((0.0, 0.3)))))


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_vmoba(data: st.DataObject) -> None:
    """Blocks in time, in space and in both, runs of queries over several patches, by number and by share."""
    rows, columns = data.draw(grids())
    sides = st.integers(0, 4)
    attributes = {
        "frame_tokens": rows * columns,
        "block_q": 32,
        "block_k": 32,
        "scale": 0.3,
        "columns": columns,
        "extent": (data.draw(sides), data.draw(sides), data.draw(sides)),
        "top": data.draw(st.sampled_from((0, 0, 1, 3, 99))),
        "threshold": data.draw(st.sampled_from((0.1, 0.25, 0.6, 1.0))),
        "query_block": 32,
    }
    past, current = data.draw(st.integers(0, 5)), data.draw(st.sampled_from((1, 2)))
    check(contract.VMOBA, attributes, case_of(data.draw(st.integers(0, 99)), past, current, attributes))


@pytest.mark.parametrize("tile", [(16, 16), (5, 7)])
def test_tiles_of_more_than_a_block(tile: tuple[int, int]) -> None:
    """A tile of 256 tokens is two query blocks of 128; and tiles of 35 tokens, borders of 14 and of 10."""
    attributes = {
        "frame_tokens": 17 * 16,
        "block_q": 32,
        "block_k": 32,
        "scale": 0.1,
        "columns": 16,
        "tile": tile,
        "windows": (3, 1, 1, 1, 3, 3),
        "sink_frames": 0,
    }
    check(contract.SLIDING_TILE, attributes, case_of(0, 1, 1, attributes))
