"""What a lease measures for speed: forms of convolutions, and configurations that timing chose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.lease.convolutions import FORMS, Convolution, convolutions_of
from benchmarks.lease.main import main
from benchmarks.lease.native import chosen_otherwise
from benchmarks.lease.stages import BUNDLE
from benchmarks.rollout.bundles import request_for
from benchmarks.rollout.ladder import LADDER, Case
from export.backends.inductor.generated import Configuration, parse_configurations


def test_a_decoders_convolutions_are_found_with_their_counts() -> None:
    """LightVAE at 512x768 by hand: 24 channels at full size, three blocks of two convolutions, two past frames."""
    found = convolutions_of("light", 64, 96)
    assert found[Convolution((1, 24, 6, 512, 768), (24, 24, 3, 3, 3), (0, 1, 1))] == 6
    assert found[Convolution((1, 24, 6, 512, 768), (3, 24, 3, 3, 3), (0, 1, 1))] == 1
    assert found[Convolution((4, 48, 512, 768), (24, 48, 3, 3), (1, 1))] == 1
    assert sum(found.values()) == 39


def test_stages_take_the_bundle_that_the_ladder_builds() -> None:
    case = Case("wan-1.3b", 512, 768, 81)
    assert request_for(case, LADDER[-1], "h200", Path("nowhere")).name == BUNDLE


@pytest.mark.parametrize("taps", [(3, 3, 3), (3, 1, 1)])
@pytest.mark.parametrize("frames", [1, 4])
def test_every_form_is_the_same_convolution(taps: tuple[int, int, int], frames: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, frames + 2, 6, 7, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 5, *taps, generator=generator, dtype=torch.float64)
    padding = (0, taps[1] // 2, taps[2] // 2)
    expected = F.conv3d(x, weight, padding=padding)
    for name, form in FORMS.items():
        torch.testing.assert_close(form(x, weight, padding)(), expected, msg=name)


def test_the_second_call_is_rehearsed_without_a_gpu(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--device", "cpu", "--build", str(tmp_path / "build"), "--out", str(tmp_path / "out")]
    assert main(["--call", "second", *arguments]) == 0
    result = json.loads((tmp_path / "out/lease-second.json").read_text())
    measured = result["stages"]["convolutions"]["results"]["convolutions"]
    assert len(measured["rows"]) == 16
    forms = [form for row in measured["rows"] for form in row["forms"].values()]
    assert all(form["error"] < 1e-5 and form["us"] > 0 for form in forms)
    assert "best of each" in capfd.readouterr().out


KERNEL = """static inline void call_triton_per_fused_{name}(
    const in_ptr0_type_& in_ptr0,
    /*
    def triton_per_fused_{name}(in_ptr0, xnumel, r0_numel, XBLOCK : tl.constexpr):
    */
    uint32_t grid_0 = {grid};
    uint32_t grid_1 = 1;
    launchKernel(kernels_.triton_per_fused_{name}, grid_0, grid_1, grid_2, {warps}, 2048, kernel_args_, stream_);
}}
"""


def test_configurations_are_read_from_generated_code() -> None:
    code = KERNEL.format(name="norm_1", grid="((xnumel + (32 - 1)) / (32))", warps=4)
    code += KERNEL.format(name="row_2", grid="xnumel", warps=8)
    ours = parse_configurations(code)
    assert ours == {
        "triton_per_fused_norm_1": Configuration(block=32, warps=4, shared=2048),
        "triton_per_fused_row_2": Configuration(block=1, warps=8, shared=2048),
    }
    timed = parse_configurations(KERNEL.format(name="norm_1", grid="((xnumel + (8 - 1)) / (8))", warps=2))
    assert chosen_otherwise(ours, ours) == {}
    assert chosen_otherwise(ours, timed) == {
        "triton_per_fused_norm_1": {
            "by rule": {"block": 32, "warps": 4, "shared": 2048},
            "timed": {"block": 8, "warps": 2, "shared": 2048},
        },
        "triton_per_fused_row_2": {"by rule": {"block": 1, "warps": 8, "shared": 2048}, "timed": None},
    }
