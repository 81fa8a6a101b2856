"""The kernels over codes on a GPU, just-in-time and as images, against the reference on the processor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightforcing_ref import attention, fp8_cache
from plugins import operators
from plugins.eager.launch import Launcher, TorchKernels
from tests.plugins.kernels.codes import (
    GEOMETRIES,
    case_of,
    check_commit,
    check_sinks,
    prepared,
    relative,
    scaled,
)

NO_GPU = "" if torch.cuda.is_available() else "PyTorch finds no CUDA device"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)]

DEVICE = "cuda"
HALVES = torch.bfloat16
"""The one compute type that kernels over codes have."""
ROUNDED = 5e-3
"""Relative L2 of what is rounded to it once or twice."""


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_prepare_bfloat16(kernels: TorchKernels, geometry: tuple[int, int, int], head_dim: int) -> None:
    inputs, attributes = prepared(geometry, head_dim)
    given = tuple(x.to(HALVES) for x in inputs[:4]) + inputs[4:]
    exact = [x.float() for x in given]
    names = operators.QK_PREPARE_FP8_OUTPUTS
    outputs = kernels.qk_prepare_fp8(*(x.to(DEVICE) for x in given), **attributes)
    found = dict(zip(names, (x.cpu() for x in outputs), strict=True))
    expected = dict(zip(names, fp8_cache.qk_prepare_fp8(*exact, **attributes), strict=True))
    for name in ("q", "q_mean", "k_mean", "k_scale", "v_scale"):
        assert relative(found[name], expected[name]) < ROUNDED, name
    _, keys, values, *_ = attention.qk_prepare(*exact, **attributes)
    check_codes(found, expected, keys, values, geometry)


def check_codes(
    found: dict[str, Tensor],
    expected: dict[str, Tensor],
    keys: Tensor,
    values: Tensor,
    geometry: tuple[int, int, int],
) -> None:
    """A code beside the expected one is as near as that, so errors are held, not codes."""
    for read, want in ((read_keys, keys), (read_values, values)):
        error = relative(read(found, geometry), want)
        assert error < 1.05 * relative(read(expected, geometry), want)


def read_keys(outputs: dict[str, Tensor], geometry: tuple[int, int, int]) -> Tensor:
    frame_tokens, _, block_k = geometry
    codes = outputs["k"].unflatten(0, (-1, frame_tokens))
    return fp8_cache.dequantize_blocks(codes, outputs["k_scale"], block_k, outputs["k_mean"]).flatten(0, 1)


def read_values(outputs: dict[str, Tensor], geometry: tuple[int, int, int]) -> Tensor:
    return fp8_cache.dequantize_values(outputs["v"], outputs["v_scale"], geometry[0]).flatten(0, 1)


@pytest.mark.parametrize(("head_dim", "past"), [(64, 0), (64, 4), (128, 4)])
@pytest.mark.parametrize("geometry", [*GEOMETRIES, (256, 128, 128)], ids=str)
def test_attention_bfloat16(
    kernels: TorchKernels, geometry: tuple[int, int, int], head_dim: int, past: int
) -> None:
    given = case_of(geometry, past, head_dim)
    attributes: Any = given.pop("attributes")
    given["q"] = given["q"].to(HALVES)
    exact = [x.float() if x.dtype == HALVES else x for x in given.values()]
    moved = [x.to(DEVICE) for x in given.values()]
    expected = fp8_cache.hsa_attention_fp8(*exact, **attributes)
    found = kernels.hierarchical_sparse_attention_fp8(*moved, **attributes)
    assert relative(found.cpu(), expected) < ROUNDED
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU does not multiply codes")
    rounded = fp8_cache.hsa_attention_e4m3(*exact, **attributes)
    found = kernels.hierarchical_sparse_attention_e4m3(*moved, **attributes).cpu()
    assert relative(found, rounded) < min(1e-2, relative(rounded, expected) / 2)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("codes", [False, True])
def test_prepare_from_a_product_of_codes(launcher: Launcher, codes: bool, head_dim: int) -> None:
    if DEVICE == "cuda" and torch.cuda.get_device_capability() not in {(8, 9), (12, 0)}:
        pytest.skip("only engines of TensorRT-RTX leave the scales of a projection to prepare")
    problem, buffers, expected = scaled(GEOMETRIES[0], head_dim, codes, HALVES)
    moved = {name: x.to(DEVICE) for name, x in buffers.items()}
    launcher.launch("prepare_scaled_fp8" if codes else "prepare_scaled", problem, moved, {"eps": 1e-6})
    found = {name: moved[name].cpu() for name in expected}
    for name, value in expected.items():
        assert value.dtype == torch.uint8 or relative(found[name], value) < ROUNDED, name
    if codes:
        _, _, exact = scaled(GEOMETRIES[0], head_dim, False, HALVES)
        check_codes(found, expected, exact["k"], exact["v"], GEOMETRIES[0])


def test_commit_copies_what_belongs_to_a_frame(kernels: TorchKernels) -> None:
    check_commit(kernels, DEVICE)


@pytest.mark.parametrize("geometry", [(64, 32, 32), (88, 64, 64)], ids=str)
def test_sinks_are_turned_and_rounded_again(kernels: TorchKernels, geometry: tuple[int, int, int]) -> None:
    check_sinks(kernels, geometry, DEVICE)
