"""The number formats against ml_dtypes, ONNX's own reading of packed values, and loops written from the definition."""

from __future__ import annotations

from itertools import pairwise

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export.quantize.numerics import (
    dequantize_weight,
    fake_activation,
    fake_linear,
    fold_weight,
    importance_of,
    pack_fp4,
    relative_error,
    to_e2m1,
    to_e4m3,
)

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=64))
def test_rounding_is_that_of_ml_dtypes(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    four = x.numpy().astype(ml_dtypes.float4_e2m1fn)
    np.testing.assert_array_equal(to_e2m1(x).numpy() & 7, four.view(np.uint8) & 7)
    eight = np.clip(x.numpy(), -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(to_e4m3(x).float().numpy(), eight.astype(np.float32))


def test_ties_go_to_the_even_code() -> None:
    ties = torch.tensor([(low + high) / 2 for low, high in pairwise(E2M1)])
    assert to_e2m1(ties).tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert to_e2m1(-ties).tolist() == [8, 10, 10, 12, 12, 14, 14]


def test_fp8_weights_have_a_scale_per_output_channel() -> None:
    weight = normal(5, 32) * torch.tensor([1.0, 1e-6, 0.0, 1e4, 1.0])[:, None]
    folded = fold_weight(weight, "fp8")
    scales = np.abs(weight.numpy()).max(1) / 448
    scales[2] = 1.0  # a channel of zeros
    np.testing.assert_allclose(folded.post.numpy(), [*scales[:2], folded.post[2], *scales[3:]], rtol=1e-6)
    expected = (weight.numpy() / scales[:, None]).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(dequantize_weight(folded).numpy(), expected)


@pytest.mark.parametrize("amax", [None, 3.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_fp8_linear_is_off_by_the_formats_own_error(dtype: torch.dtype, amax: float | None) -> None:
    """Rounding the scales to bfloat16 costs nothing on top: the weights are quantized with the rounded scale."""
    x, weight = normal(256, 512), normal(384, 512, seed=1)
    folded = fold_weight(weight, "fp8", dtype=dtype, amax=amax)
    assert folded.post.dtype == dtype
    error = relative_error(fake_linear(x, folded, "fp8", amax=amax), x @ weight.T)
    assert 0.034 < error < 0.041


@pytest.mark.parametrize("amax", [None, 2.9])  # 448 / 2.9 is 0.3 % off in bfloat16
def test_rounded_scales_cancel(amax: float | None) -> None:
    """Quantization takes a little off the gain (as much as the error's power); rounding scales must not add to it."""
    x, weight = normal(256, 512).clamp(-2.9, 2.9), normal(384, 512, seed=1)
    expected = x @ weight.T
    gains = []
    for dtype in (torch.float32, torch.bfloat16):
        actual = fake_linear(x, fold_weight(weight, "fp8", dtype=dtype, amax=amax), "fp8", amax=amax)
        gains.append(float((actual * expected).sum() / expected.square().sum()))
    assert gains[1] == pytest.approx(gains[0], abs=5e-4)
    assert gains[0] == pytest.approx(1, abs=3e-3)


def test_tokens_are_scaled_one_by_one_and_zeros_stay_zeros() -> None:
    x = torch.stack([normal(64), 1e6 * normal(64, seed=1), torch.zeros(64)])
    quantized, scale = fake_activation(x, "fp8")
    assert quantized.abs().amax(-1)[:2].tolist() == [448.0, 448.0]
    torch.testing.assert_close(scale[:2, 0], x.abs().amax(-1)[:2] / 448)
    assert quantized[2].eq(0).all() and torch.isfinite(scale).all()


def nvfp4_by_hand(
    row: np.ndarray,
    largest: float = 6 * 448,
    divisors: tuple[float, ...] = (6,),
    importance: np.ndarray | None = None,
) -> np.ndarray:
    """One row of NVFP4, element by element: E4M3 scale of each block of 16, nearest E2M1 value, ties to even.

    Of the scales that map the largest value of a block to one of `divisors`, the one with the least error.
    """
    outer = np.float32(np.abs(row).max() / np.float32(largest))
    out = np.zeros_like(row)
    for start in range(0, len(row), 16):
        block, best = row[start : start + 16] / outer, np.inf
        weigh = np.ones(16) if importance is None else importance[start : start + 16]
        for divisor in divisors:
            scale = (np.abs(block).max() / np.float32(divisor)).astype(ml_dtypes.float8_e4m3fn)
            wide = scale.astype(np.float32)
            values = np.zeros_like(block)
            for index, value in enumerate(block):
                if wide:
                    values[index] = (value / wide).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * wide
            error = (weigh * np.square(values - block)).sum()
            if error < best:
                best, out[start : start + 16] = error, values * outer
    return out


DIVISORS = (6, 4, 4.5, 5, 5.5, 6.5, 7, 7.5)


def nvfp4_rows() -> torch.Tensor:
    rows = normal(6, 64) * torch.logspace(-3, 3, 6)[:, None]
    rows[1, 16:32] = 0.0
    rows[2, :16] *= 1e-9  # a block whose scale rounds to zero
    return rows


def test_nvfp4_of_activations_is_its_definition() -> None:
    rows = nvfp4_rows()
    quantized, scale = fake_activation(rows, "nvfp4")
    expected = np.stack([nvfp4_by_hand(row) for row in rows.numpy()])
    np.testing.assert_allclose((quantized * scale).numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("is_weighed", [False, True])
def test_blocks_of_weights_have_the_scale_with_the_least_error(is_weighed: bool) -> None:
    rows = torch.cat([nvfp4_rows(), normal(40, 64, seed=7)])
    importance = importance_of(normal(64, seed=3).abs().tolist()) if is_weighed else None
    weigh = None if importance is None else importance.numpy()
    folded = fold_weight(rows, "nvfp4", importance=importance)
    found = (dequantize_weight(folded) * folded.post[:, None]).numpy()
    expected = np.stack([nvfp4_by_hand(row, 4 * 448, DIVISORS, weigh) for row in rows.numpy()])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_searched_scales_lose_less_and_least_where_it_matters() -> None:
    """A fifth of the error's power without a calibration; more where inputs are uneven and it is known how."""
    order = torch.randperm(256, generator=torch.Generator().manual_seed(2))
    x, weight = normal(512, 256) * torch.logspace(-1, 1, 256)[order], normal(128, 256, seed=1)
    plain = torch.from_numpy(np.stack([nvfp4_by_hand(row) for row in weight.numpy()]))
    importance = importance_of(x.square().mean(0).sqrt().tolist())
    searched, weighed = (
        dequantize_weight(folded) * folded.post[:, None]
        for folded in (fold_weight(weight, "nvfp4"), fold_weight(weight, "nvfp4", importance=importance))
    )
    errors = [relative_error(x @ found.T, x @ weight.T) for found in (plain, searched, weighed)]
    assert relative_error(searched, weight) < 0.9 * relative_error(plain, weight)
    assert errors[2] < 0.9 * errors[0]
    assert errors[2] < 0.95 * errors[1]


def test_silent_channels_keep_a_say() -> None:
    assert importance_of([0.0, 1.0]).tolist() == pytest.approx([0.5e-3, 1.0])


def test_one_nvfp4_linear_is_off_by_the_formats_own_error() -> None:
    x, weight = normal(256, 512), normal(384, 512, seed=1)
    error = relative_error(fake_linear(x, fold_weight(weight, "nvfp4"), "nvfp4"), x @ weight.T)
    assert 0.12 < error < 0.15


def test_packed_codes_are_what_onnx_reads() -> None:
    values = torch.tensor([[0.5, -1.0, 6.0, 3.0], [0.0, -6.0, 1.5, -0.5]])
    packed = pack_fp4(to_e2m1(values)).numpy()
    proto = onnx.TensorProto(
        name="w", data_type=onnx.TensorProto.FLOAT4E2M1, dims=[2, 4], raw_data=packed.tobytes()
    )
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(proto).astype(np.float32), values.numpy())
