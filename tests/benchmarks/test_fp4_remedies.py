from __future__ import annotations

import pytest
import torch

from benchmarks.fp4_remedies import (
    activation_aware,
    mixed,
    product_error,
    remedies,
    rotated,
    seconds,
    smoothed,
)

GENERATOR = torch.Generator().manual_seed(0)
X, WEIGHT = torch.randn(64, 128, generator=GENERATOR), torch.randn(96, 128, generator=GENERATOR)
OUTLYING = X.clone()
OUTLYING[:, 5] *= 100


@pytest.mark.parametrize("remedy", [smoothed, activation_aware, rotated])
def test_a_remedy_changes_no_unquantized_product(remedy) -> None:
    x, weight = remedy(OUTLYING, WEIGHT, 16 if remedy is rotated else 0.5)
    assert x.abs().max() < 0.8 * OUTLYING.abs().max()
    torch.testing.assert_close(x @ weight.T, OUTLYING @ WEIGHT.T, rtol=1e-4, atol=1e-3)


def test_scales_help_where_a_channel_stands_out_and_a_branch_where_the_weight_is_of_low_rank() -> None:
    assert remedies(OUTLYING, WEIGHT)["AWQ-lite"] < 0.9 * product_error(OUTLYING, WEIGHT)
    low = WEIGHT[:, :4] @ X[:4] + 0.01 * WEIGHT
    assert product_error(X, low, rank=4) < 0.2 * product_error(X, low)


def test_time_in_fp8_in_place_of_a_branch_by_hand() -> None:
    """At peak rates FP8 takes four times as long as NVFP4, and bf16 eight times."""
    times = seconds(1 / 8)
    assert times["fp8"] == pytest.approx(4 * times["nvfp4"])
    assert times["branch"] == pytest.approx(times["nvfp4"])
    assert mixed(0.09, 0.03, 1 / 8) == pytest.approx((2 / 3 * 0.09**2 + 1 / 3 * 0.03**2) ** 0.5)
    assert mixed(0.09, 0.03, 1.0) == pytest.approx(0.03)
