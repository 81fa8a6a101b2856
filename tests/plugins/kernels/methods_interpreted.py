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

from export.graph.oracles import ORACLES
from lightforcing_ref.policies import PersistentSet, block_weights
from lightforcing_ref.sparsity import BlockGeometry
from plugins import contract
from plugins.eager.launch import TorchKernels
from plugins.eager.methods import MethodKernels
from tests import brute_force
from tests.plugins.kernels.methods import case_of, with_common_keys

assert os.environ.get("TRITON_INTERPRET") == "1", __doc__

KERNELS = MethodKernels.just_in_time()


def check(operator: str, attributes: dict[str, Any], case: brute_force.HSACase, *more: torch.Tensor) -> None:
    """What the kernels see and what comes out is the oracle's; `more` are inputs that other operators do not have."""
    tensors = [*(torch.from_numpy(np.ascontiguousarray(x)) for x in case.inputs.values()), *more]
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


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_sparse_linear(data: st.DataObject) -> None:
    """First chunks, frames that no tile divides, slots in any order: the best blocks, and all keys beside them."""
    attributes = {
        "frame_tokens": data.draw(st.integers(33, 100)),
        "block_q": data.draw(st.sampled_from((32, 64))),
        "block_k": 64,
        "scale": 0.3,
        "keep_q20": data.draw(st.sampled_from(((1 << 20, 1 << 18), (1,), (1 << 20,)))),
    }
    past, seed = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 99))
    case = case_of(seed, past, data.draw(st.sampled_from((1, 2))), attributes)
    rng = np.random.default_rng(seed)
    case.inputs["linear_weight"] = rng.standard_normal((64, 64)).astype(np.float32)
    case.inputs["linear_bias"] = rng.standard_normal(64).astype(np.float32)
    check(contract.SPARSE_LINEAR, attributes, case)


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
        # Not 1: the lowest score is stretched to 0, and rounding decides whether a share of 1 takes its block.
        "threshold": data.draw(st.sampled_from((0.1, 0.25, 0.6, 0.97))),
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


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_pinned_frames(data: st.DataObject) -> None:
    """Any number of pinned frames, budgets of one block and of all, histories that are empty, too."""
    attributes = {
        "frame_tokens": data.draw(st.integers(33, 100)),
        "block_q": 32,
        "block_k": data.draw(st.sampled_from((32, 64))),
        "scale": 0.3,
        "keep_q20": data.draw(st.sampled_from(((1 << 20, 1 << 18), (1,), (1 << 20,)))),
    }
    past = data.draw(st.integers(0, 6))
    case = case_of(data.draw(st.integers(0, 99)), past, data.draw(st.sampled_from((1, 2))), attributes)
    pinned = torch.tensor(data.draw(st.integers(0, past)), dtype=torch.int32)
    check(contract.PERSISTENT_BLOCK, attributes, case, pinned)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_the_persistent_set(data: st.DataObject) -> None:
    """Every number of sinks, kept and leaving frames, short blocks, blocks that are equal, and sets of both kinds."""
    tokens, block_k = data.draw(st.integers(1, 100)), data.draw(st.sampled_from((8, 32, 64)))
    sinks, kept, leaving = (
        data.draw(st.integers(0, 2)),
        data.draw(st.integers(1, 4)),
        data.draw(st.integers(0, 3)),
    )
    geometry = {"frame_tokens": tokens, "block_q": 32, "block_k": block_k}
    past, current = sinks + kept + leaving + data.draw(st.integers(0, 2)), data.draw(st.sampled_from((1, 2)))
    case = case_of(data.draw(st.integers(0, 99)), past, current, geometry)
    given = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in case.inputs.items()}
    slots = given["frame_slots"][:past].tolist()
    if data.draw(st.booleans()):  # all the same: the lower index wins
        for mean in (*(given["past_kmean"][slot] for slot in slots), *given["k_mean"]):
            mean[:] = given["k_mean"][0, 0]
    chosen = PersistentSet(
        kept, data.draw(st.sampled_from(("own", "shared"))), data.draw(st.sampled_from(("sum", "peak")))
    )

    means = torch.cat((given["past_kmean"][slots], given["k_mean"]))
    scores = chosen.scores(block_weights(given["q_mean"], means, 0.3))
    made = BlockGeometry(tokens, 32, block_k)
    first, last = sinks * made.k_blocks, (sinks + kept + leaving) * made.k_blocks
    contenders = slots[sinks : sinks + kept + leaving]
    pool = [given[name].clone() for name in ("past_k", "past_v", "past_kmean")]
    frames = [tuple(part[slot] for part in pool) for slot in contenders]
    expected = [part.clone() for part in pool]
    for slot, frame in zip(
        contenders, chosen.contest(frames, kept, scores[:, first:last], made), strict=False
    ):
        for part, value in zip(expected, frame, strict=True):
            part[slot] = value

    TorchKernels().persist(
        *pool,
        given["q_mean"],
        given["k_mean"],
        given["frame_slots"],
        torch.tensor([kept, leaving], dtype=torch.int32),
        block_k=block_k,
        scale=0.3,
        sink_frames=sinks,
        shared_heads=chosen.heads == "shared",
        peak=chosen.score == "peak",
    )
    for found, wanted in zip(pool, expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=0, rtol=0, equal_nan=True)
