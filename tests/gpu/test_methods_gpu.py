"""The other methods' kernels on a GPU, just-in-time and as images, against their oracles on the processor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from export.graph.oracles import ORACLES
from plugins import contract
from plugins.eager.launch import Launcher
from plugins.eager.methods import MethodKernels
from tests.plugins.kernels.codes import relative
from tests.plugins.kernels.methods import case_of, with_common_keys

NO_GPU = "" if torch.cuda.is_available() else "PyTorch finds no CUDA device"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)]

DEVICE = "cuda"
HALVES = torch.bfloat16
"""The one compute type that these kernels have."""
ROUNDED = 5e-3
"""Relative L2 of what is rounded to it once or twice."""
SEED = 3

QUARTER = (1 << 20, 1 << 18)
GRID = {"frame_tokens": 17 * 16, "columns": 16, "block_q": 32, "block_k": 32, "scale": 0.1}
FRAMES = {"frame_tokens": 150, "block_q": 64, "block_k": 64, "scale": 0.3}
LIKE = {**FRAMES, "smooth": 1, "keep_q20": QUARTER}
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "tiles that divide nothing": (
        contract.SLIDING_TILE,
        {**GRID, "tile": (5, 7), "windows": (3, 1, 1, 1, 3, 3), "sink_frames": 0},
        4,
    ),
    "tiles of two blocks": (
        contract.SLIDING_TILE,
        {**GRID, "tile": (16, 16), "windows": (3, 1, 1), "sink_frames": 1},
        4,
    ),
    "radial": (contract.RADIAL, {**FRAMES, "decay": 0.2, "sink_frames": 1}, 9),
    "sparge by share": (contract.SPARGE, {**LIKE, "similarity": 0.05, "cumulative": 0.6}, 5),
    "sparge by number": (contract.SPARGE, {**LIKE, "similarity": -0.1, "cumulative": 0.0}, 5),
    "sla": (contract.SPARSE_LINEAR, {**FRAMES, "keep_q20": QUARTER}, 5),
    "vmoba by share": (
        contract.VMOBA,
        {**GRID, "extent": (2, 3, 4), "top": 0, "threshold": 0.4, "query_block": 32},
        4,
    ),
    "vmoba by number": (
        contract.VMOBA,
        {**GRID, "extent": (0, 4, 0), "top": 3, "threshold": 1.0, "query_block": 32},
        4,
    ),
    "pinned frames": (contract.PERSISTENT_BLOCK, {**FRAMES, "keep_q20": QUARTER}, 6),
}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("case", CASES)
def test_methods(launcher: Launcher, case: str, head_dim: int) -> None:
    operator, attributes, past = CASES[case]
    made = with_common_keys(case_of(SEED, past, 3, attributes, head_dim), SEED, 0.3)
    given = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in made.inputs.items()}
    given["chunk"].fill_(2)  # the first is dense where a method has a budget
    generator = torch.Generator().manual_seed(SEED)
    if operator == contract.SPARSE_LINEAR:
        given["linear_weight"] = torch.randn(head_dim, head_dim, generator=generator)
        given["linear_bias"] = torch.randn(head_dim, generator=generator)
    if operator == contract.PERSISTENT_BLOCK:
        given["pinned"] = torch.tensor(2, dtype=torch.int32)
    for name in ("q", "k", "v", "past_k", "past_v", "linear_weight", "linear_bias"):
        if name in given:
            given[name] = given[name].to(HALVES)
    exact = [x.float() if x.dtype == HALVES else x for x in given.values()]
    found = MethodKernels(launcher)(operator, *(x.to(DEVICE) for x in given.values()), **attributes)
    assert relative(found.cpu(), ORACLES[operator](*exact, **attributes)) < ROUNDED
