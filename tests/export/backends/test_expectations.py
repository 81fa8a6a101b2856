"""Expectations of engines where some linears were left in another type."""

from __future__ import annotations

from export.backends.tensorrt_rtx.expectations import load_expectations


def gemms(component: str, moved: dict[tuple[str, str], int], precision: str = "fp8") -> dict[str, object]:
    expected = load_expectations(precision).components[component]
    return dict(expected.with_formats(moved, merges=component == "conditioner").gemms)


def test_linears_left_in_bf16_move_from_one_count_to_the_other() -> None:
    assert gemms("layer", {("fp8", "bf16"): 2}) == {"fp8": (4, 4), "bf16": (2, 2)}
    assert gemms("last", {("fp8", "bf16"): 1}) == {"fp8": (4, 4), "bf16": (2, 2)}
    assert gemms("layer", {("fp4", "fp8"): 4, ("fp4", "bf16"): 1}, "nvfp4") == {
        "fp8": (4, 4),
        "fp4": (1, 1),
        "bf16": (1, 1),
    }


def test_bf16_products_of_one_input_may_become_one() -> None:
    assert gemms("conditioner", {("fp8", "bf16"): 6})["bf16"] == (3, 8)


def test_nothing_moved_changes_nothing() -> None:
    assert gemms("layer", {}) == {"fp8": (6, 6)}
