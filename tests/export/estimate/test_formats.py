"""Formats for a budget of error: times by hand, and the choice against every combination of kinds."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from export.errors import InputError
from export.estimate.formats import find_formats, linear_seconds
from export.quantize.calibration import ALL, Calibration
from export.quantize.decision import block_linear_names
from export.quantize.formats import choose_formats
from export.quantize.graph import KINDS
from export.request.plan import PlanRequest
from export.request.targets import load_target, load_variant
from lightforcing_ref.config import preset

LAYERS, TOKENS, DIM, FFN, TEXT = 30, 4608, 1536, 8960, 512
NAMES = block_linear_names(LAYERS)
FORWARDS = 7 * 4 + 6
"""Of 81 frames: four for each of seven chunks, and the clean ones of all but the last."""


def planned(precision: str = "fp8", target: str = "rtx5090") -> PlanRequest:
    return PlanRequest(load_target(target), load_variant("short"), preset("wan-1.3b"), 512, 768, precision)


def calibration(**changes: object) -> Calibration:
    """Kinds that lose more and more, NVFP4 four times as much as FP8; the last layer of each is twice as bad."""
    own = {name: 0.2 if name.startswith(f"blocks.{LAYERS - 1}.") else 0.1 for name in NAMES}
    outputs = {kind: 0.002 * (1 + index) for index, kind in enumerate(KINDS)}
    document = {
        "preset": "wan-1.3b",
        "weights": {"checkpoint": "random:0"},
        "prompts": 1,
        "chunks": 3,
        "steps": 5,
        "height": 512,
        "width": 768,
        "variant": "short",
        "modelopt": "0.47.0",
        "amax": dict.fromkeys(NAMES, 6.0),
        "errors": {name: {"fp8": e / 4, "fp8_static": e / 4, "nvfp4": e} for name, e in own.items()},
        "output_errors": {
            **{kind: {"fp8": e, "nvfp4": 4 * e} for kind, e in outputs.items()},
            ALL: {"fp8": 0.03, "nvfp4": 0.12},
        },
    }
    return Calibration.model_validate(document | changes)


def test_times_by_hand() -> None:
    """ffn.0 is bound by arithmetic in every format; what is written of its input comes on top. The text runs once."""
    peak = planned().target.peak
    operations = 2 * TOKENS * DIM * FFN
    written = {
        "bf16": 2 * TOKENS * DIM,
        "fp8": TOKENS * DIM + 4 * TOKENS,
        "nvfp4": TOKENS * DIM * 9 // 16 + 4 * TOKENS,
    }
    for precision, size in written.items():
        found = linear_seconds(planned(precision))
        rate = {"bf16": 209.5e12, "fp8": 419.0e12, "nvfp4": 1676.0e12}[precision]
        assert found["ffn.0"] == pytest.approx(FORWARDS * (operations / rate + size / 1792e9), rel=1e-3)
        assert set(found) == set(KINDS)
    text = 2 * TEXT * DIM * DIM / 209.5e12 + 2 * TEXT * DIM / (peak.memory_gb_s * 1e9)
    assert linear_seconds(planned("bf16"))["cross_attn.k"] == pytest.approx(text, rel=1e-3)


@pytest.mark.parametrize("budget", [0.004, 0.01, 0.02, 0.05, 0.08])
def test_no_combination_of_kinds_is_faster(budget: float) -> None:
    found = find_formats(planned(), ("fp8", "nvfp4"), calibration(), budget)
    errors = calibration().output_errors
    times = {format: linear_seconds(planned(format)) for format in ("bf16", "fp8", "nvfp4")}

    def cost(formats: tuple[str, ...]) -> tuple[float, float]:
        error = math.hypot(*(errors[k][f] for k, f in zip(KINDS, formats, strict=True) if f != "bf16"))
        return LAYERS * sum(times[f][k] for k, f in zip(KINDS, formats, strict=True)), error

    known = [cost(formats) for formats in itertools.product(("bf16", "fp8", "nvfp4"), repeat=len(KINDS))]
    assert found.search.seconds == pytest.approx(min(s for s, e in known if e <= budget))
    assert found.search.error <= budget == found.search.budget
    assert (found.search.seconds, found.search.error) in found.search.frontier
    assert len(found.search.frontier) <= 24
    # What the request says again comes out as the formats that were found.
    formats = choose_formats(NAMES, found.precision, skip=found.skip)
    of_kinds = tuple(formats.get(f"blocks.3.{kind}", "bf16") for kind in KINDS)
    assert cost(of_kinds) == (pytest.approx(found.search.seconds), pytest.approx(found.search.error))


def test_budgets_at_the_ends() -> None:
    wide = find_formats(planned(), ("fp8", "nvfp4"), calibration(), 1.0)
    assert (wide.precision, wide.skip) == ("nvfp4", ())
    narrow = find_formats(planned(), ("fp8", "nvfp4"), calibration(), 1e-9)
    assert narrow.precision is None and narrow.search.error == 0.0
    only = find_formats(planned(target="rtx4090"), ("fp8",), calibration(), 1.0)
    assert (only.precision, only.skip) == ("fp8", ())


def test_each_linear_has_its_own_format_where_each_layer_has_its_engine() -> None:
    """The last layers, which lose twice as much, are the first to be left out, and more fits into the same budget."""
    shared = find_formats(planned(), ("fp8", "nvfp4"), calibration(), 0.03)
    own = find_formats(planned(), ("fp8", "nvfp4"), calibration(), 0.03, each=True)
    assert own.search.error <= 0.03
    assert own.search.seconds < shared.search.seconds
    formats = choose_formats(NAMES, own.precision, skip=own.skip)
    rank = {"nvfp4": 0, "fp8": 1, "bf16": 2}
    for kind in KINDS:
        ranks = [rank[formats.get(f"blocks.{layer}.{kind}", "bf16")] for layer in range(LAYERS)]
        assert ranks[-1] >= max(ranks[:-1]) or max(ranks) - min(ranks) == 0


def test_what_cannot_be_searched_is_refused() -> None:
    with pytest.raises(InputError, match="needs a calibration that measured output errors"):
        find_formats(planned(), ("fp8",), calibration(output_errors={}), 0.1)
    unknown = planned()
    unknown = replace(unknown, target=unknown.target.model_copy(update={"peak": None}))
    with pytest.raises(InputError, match="no peak rates of rtx5090 are known"):
        find_formats(unknown, ("fp8",), calibration(), 0.1)
