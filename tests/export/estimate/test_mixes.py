"""Plans of mixed precisions: each linear counts in its own format."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from export.cli.main import main
from export.errors import InputError
from export.estimate.memory import plan_memory
from export.estimate.roofline import Workload
from export.preflight import check_target_memory
from export.request.linears import linear_precisions
from export.request.plan import PlanRequest
from export.request.request import BuildRequest, QuantizationRequest
from export.request.targets import load_target, load_variant
from export.request.weights import Weights
from lightforcing_ref.config import PRESETS, preset

LAYERS, TOKENS, DIM, FFN = 30, 4608, 1536, 8960


def planned(*skip: str, precision: str = "nvfp4") -> PlanRequest:
    short, model = load_variant("short"), preset("wan-1.3b")
    return PlanRequest(load_target("rtx5090"), short, model, 512, 768, precision, skip=skip)


def weight_bytes(request: PlanRequest | BuildRequest) -> dict[str, int]:
    return {item.name: item.bytes for item in plan_memory(request).items if item.group == "weights"}


def narrow(elements: int, rows: int) -> int:
    """Of an NVFP4 weight: four bits and a sixteenth of a byte for each element, two bytes for each row."""
    return elements // 2 + elements // 16 + 2 * rows


def test_weights_that_stay_wide_are_counted_wide() -> None:
    found = weight_bytes(planned("*.ffn.2", "*.cross_attn.k=fp8"))
    square = narrow(DIM * DIM, DIM)
    layer = narrow(3 * DIM * DIM, 3 * DIM) + 3 * square + narrow(DIM * FFN, FFN) + 2 * DIM * FFN
    assert found["transformer, block linears"] == LAYERS * layer
    conditioner = weight_bytes(planned())["conditioner"] - found["conditioner"]
    assert conditioner == LAYERS * (square - (DIM * DIM + 2 * DIM))


def test_only_the_layers_that_a_pattern_names_are_wide() -> None:
    request = planned("blocks.0.*", "blocks.7.ffn.0=fp8")
    formats = linear_precisions(request)
    assert formats["blocks.0.ffn.2"] == "bf16" and formats["blocks.7.ffn.0"] == "fp8"
    assert sum(format == "nvfp4" for format in formats.values()) == 8 * LAYERS - 8 - 1
    flops = dict.fromkeys(("bf16", "fp8", "nvfp4"), 0)
    for work in Workload(request).forward(0):
        if work.kind == "linears":
            flops[work.format] += work.flops
    layer = 2 * TOKENS * (6 * DIM * DIM + 2 * DIM * FFN)
    outer = 2 * 2 * TOKENS * 64 * DIM  # patches and head
    assert flops["fp8"] == 2 * TOKENS * DIM * FFN
    assert flops["bf16"] == layer + outer
    assert sum(flops.values()) == LAYERS * layer + outer


def test_what_is_written_for_a_linear_has_its_format() -> None:
    mixed, uniform = (
        Workload(one).passes for one in (planned("*.ffn.2", "blocks.1.cross_attn.o"), planned())
    )
    written = {one.name: one.written for one in mixed.layer()}
    assert written["GELU"] == 2 * TOKENS * FFN
    assert (
        written["quantize attention"]
        == {one.name: one.written for one in uniform.layer()}["quantize attention"]
    )
    assert "quantize cross-attention" in written
    assert "quantize cross-attention" not in {one.name for one in mixed.layer(1)}


def test_the_check_before_a_build_counts_the_mix() -> None:
    tiny = PRESETS["tiny"]
    request = BuildRequest(
        target=load_target("rtx5090"),
        variant=load_variant("short"),
        weights=Weights(tiny, seed=0),
        height=tiny.height,
        width=tiny.width,
        backend="tensorrt-rtx",
        precision="nvfp4",
        out=None,
        name="mix",
        quantization=QuantizationRequest(skip=("*.ffn.*",)),
    )
    dim, ffn = tiny.dit.dim, tiny.dit.ffn_dim
    more = 2 * dim * ffn * 2 - narrow(dim * ffn, ffn) - narrow(dim * ffn, dim)
    uniform = replace(request, quantization=QuantizationRequest())
    grown = check_target_memory(request).group("weights") - check_target_memory(uniform).group("weights")
    assert grown == tiny.dit.layers * more
    until_measured = replace(request, quantization=QuantizationRequest(skip=("auto",)))
    assert weight_bytes(until_measured) == weight_bytes(uniform)


def test_the_command_plans_a_mix(capsys: pytest.CaptureFixture[str]) -> None:
    common = ["plan", "--gpu", "rtx5090", "--preset", "wan-1.3b", "--precision", "nvfp4"]
    assert main([*common, "--json"]) == 0
    uniform = json.loads(capsys.readouterr().out)
    assert main([*common, "--json", "--skip", "*.ffn.*", "--skip", "*_attn.*=fp8"]) == 0
    mixed = json.loads(capsys.readouterr().out)
    assert mixed["skip"] == ["*.ffn.*", "*_attn.*=fp8"]
    assert mixed["prediction"]["seconds"] > uniform["prediction"]["seconds"]
    compared = mixed["prediction"]["precisions"]
    assert compared["nvfp4, as planned"]["seconds"] == mixed["prediction"]["seconds"]
    assert compared["nvfp4"]["seconds"] == uniform["prediction"]["seconds"]
    assert main([*common, "--skip", "*.ffn.2"]) == 0
    assert "nvfp4 (--skip *.ffn.2)" in " ".join(capsys.readouterr().out.split())
    assert main([*common, "--skip", "*.nothing"]) == 2
    assert "matches none of the 240 linears" in capsys.readouterr().err
    assert main([*common[:-1], "bf16", "--skip", "*.ffn.2"]) == 2
    assert "--skip is for quantized linears, and bf16 has none" in capsys.readouterr().err


def test_a_pattern_to_another_format_is_refused() -> None:
    with pytest.raises(InputError, match="leads to 'int8'"):
        linear_precisions(planned("*.ffn.2=int8"))
