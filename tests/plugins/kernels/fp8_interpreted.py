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

from lightforcing_ref import fp8_cache as oracle
from plugins import operators
from plugins.eager.interpreter import mend_interpreter
from plugins.eager.launch import TorchKernels
from plugins.eager.launcher import TritonLauncher
from plugins.kernels.fp8 import to_codes, to_half
from tests.plugins.kernels.codes import (
    GEOMETRIES,
    case_of,
    check_commit,
    check_sinks,
    prepared,
    relative,
    scaled,
)

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
    check_commit(KERNELS)


@pytest.mark.parametrize("geometry", [(64, 32, 32), (88, 64, 64)], ids=str)
def test_sinks_are_turned_and_rounded_again(geometry: tuple[int, int, int]) -> None:
    check_sinks(KERNELS, geometry)
