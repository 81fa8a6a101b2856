"""Bundles whose keys and values are codes, and multiplied as such: built, compared with PyTorch, planned, dry-run."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.build import build_bundle, check_build
from export.cli.arguments import chosen_variant
from export.cli.command import add_source_arguments
from export.compare.against_reference import against_reference
from export.errors import InputError
from export.estimate.memory import plan_memory
from export.estimate.roofline import Workload
from export.request.plan import PlanRequest
from export.request.request import BuildRequest
from export.request.targets import Variant, load_target, load_variant
from export.request.weights import Weights
from lightforcing_ref.config import PRESETS, preset
from runtime import Pipeline
from runtime.bundle import load_bundle
from runtime.program.buffers import plan_buffers
from runtime.verify.dry_run import dry_run

PROMPT = "a red fox in fresh snow"
SIZE = (PRESETS["tiny"].height, PRESETS["tiny"].width)


def request(
    out: Path, target: str, variant: str | Variant, backend: str, precision: str, **changes: Any
) -> BuildRequest:
    """A build of `tiny` with random weights; over codes, where the variant is given by its name."""
    tiny = PRESETS["tiny"]
    settings: dict[str, Any] = {
        "target": load_target(target),
        "variant": load_variant(variant).holding("fp8") if isinstance(variant, str) else variant,
        "weights": Weights(tiny, seed=0),
        "height": tiny.height,
        "width": tiny.width,
        "backend": backend,
        "precision": precision,
        "out": out,
        "name": "kv8",
    }
    return BuildRequest(**settings | changes)


@pytest.fixture(scope="module")
def segmented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The long mode, whose sinks move: operators run as graphs of their own, between segments."""
    out = tmp_path_factory.mktemp("kv8")
    return build_bundle(request(out, "cpu", "long", "onnxruntime", "fp32", execution="segmented"))


def test_the_manifest_says_so_and_the_cache_is_smaller(segmented: Path, tiny_long_bundle: Path) -> None:
    codes, plain = (load_bundle(root).manifest for root in (segmented, tiny_long_bundle))
    assert (codes.cache.kv, plain.cache.kv) == ("fp8", None)
    assert codes.variant == "long-kv8"
    pools = [{b.name: b for b in plan_buffers(m, 1).pool} for m in (codes, plain)]
    for name in ("past_k.0", "past_v.0"):
        assert pools[0][name].nbytes * 4 == pools[1][name].nbytes  # float32 on the CPU
    assert pools[0]["past_kscale.0"].shape == (9, codes.key_blocks, codes.model.heads)
    planned = plan_memory(
        PlanRequest(
            load_target("cpu"), load_variant("long").holding("fp8"), PRESETS["tiny"], 128, 128, "fp32"
        )
    )
    sizes = {item.name: item.bytes for item in planned.items}
    keys = ("past_k.", "past_v.", "past_kscale.", "past_vscale.")
    held = sum(b.nbytes for b in pools[0].values() if b.name.startswith(keys))
    assert sizes["keys and values of past frames"] == held


def test_it_computes_what_pytorch_does(segmented: Path) -> None:
    """Every component, every forward from equal states, and a whole rollout, in which sinks have moved."""
    result = against_reference(segmented, chunks=5)
    assert result.passed, [row for row in result.rows if not row.passed]


@pytest.mark.slow
def test_products_of_codes(tmp_path: Path) -> None:
    """The whole graph of the short mode, whose operator is another (tests/plugins/nodes has it alone)."""
    variant = load_variant("short").holding("fp8", "fp8")
    root = build_bundle(request(tmp_path, "cpu", variant, "onnxruntime", "fp32"))
    manifest = load_bundle(root).manifest
    assert (manifest.attention.products, manifest.variant) == ("fp8", "short-kv8-att8")
    result = against_reference(root, chunks=2)
    assert result.passed, [row for row in result.rows if not row.passed]


def test_products_of_codes_are_refused_where_nothing_makes_them(tmp_path: Path) -> None:
    variant = load_variant("short").holding("fp8", "fp8")
    with pytest.raises(InputError, match=r"RTX 3090 .* has no products of E4M3.*drop --attention fp8"):
        check_build(request(tmp_path, "rtx3090", variant, "tensorrt-rtx", "bf16"))
    with pytest.raises(InputError, match=r"expected cache\.kv 'fp8'"):
        load_variant("short").holding(None, "fp8")


def test_the_command_line_chooses() -> None:
    """fp8 products imply codes, and are refused without."""
    parser = argparse.ArgumentParser()
    add_source_arguments(parser)

    def chosen(*options: str) -> tuple[str | None, str | None]:
        _, variant = chosen_variant(parser.parse_args(["--gpu", "rtx4090", "--preset", "tiny", *options]))
        return variant.cache.kv, variant.products

    assert chosen() == (None, None)
    assert chosen("--kv", "fp8") == chosen("--kv", "fp8", "--attention", "bf16") == ("fp8", None)
    assert chosen("--attention", "fp8") == chosen("--kv", "fp8", "--attention", "fp8") == ("fp8", "fp8")
    with pytest.raises(InputError, match="drop --kv bf16"):
        chosen("--kv", "bf16", "--attention", "fp8")


def test_sessions_are_isolated(segmented: Path) -> None:
    with Pipeline.load(segmented, sessions=2, threads=1) as pipe:
        with pipe.session(prompt=PROMPT, seed=1) as alone:
            expected = [chunk.frames for chunk in alone.stream(chunks=5)]
        with pipe.session(prompt=PROMPT, seed=1) as one, pipe.session(prompt="b", seed=2) as other:
            streams = one.stream(chunks=5), other.stream(chunks=5)
            for want, (have, _) in zip(expected, zip(*streams, strict=True), strict=True):
                assert np.array_equal(have.frames, want)


def test_the_cost_of_a_chunk() -> None:
    """1.3B at 512x768: a byte for each key and value, and the scales of blocks of 64."""
    model = preset("wan-1.3b")
    plain, codes = (
        PlanRequest(load_target("rtx5090"), load_variant("short").holding(kv), model, 512, 768, "fp8")
        for kv in (None, "fp8")
    )
    sizes = [{i.name: i.bytes for i in plan_memory(one).items} for one in (plain, codes)]
    name = "keys and values of past frames"
    assert sizes[1][name] == 18 * 30 * 2 * (1536 * 1536 + 24 * 12 * 4)
    assert sizes[0][name] == 18 * 30 * 2 * 1536 * 1536 * 2
    moved = [Workload(one).attention(6).bytes for one in (plain, codes)]
    assert moved[0] - moved[1] == 2 * 21 * 1536 * 1536
    multiplied = replace(codes, variant=codes.variant.holding("fp8", "fp8"))
    peak, works = codes.target.peak, [Workload(one).attention(6) for one in (codes, multiplied)]
    assert peak is not None
    assert [work.format for work in works] == ["bf16", "fp8"]
    assert works[0].seconds(peak) / works[1].seconds(peak) == pytest.approx(
        2, rel=0.01
    )  # GeForce's fp32 sums
    prepare = [Workload(one).passes.prepare().written for one in (plain, codes)]
    assert prepare[0] - prepare[1] == 2 * 4608 * 1536 - 2 * 3 * 24 * 12 * 4


def test_the_plugin_has_no_codes(tmp_path: Path) -> None:
    asked = request(tmp_path, "h200", "short", "tensorrt", "bf16")
    with pytest.raises(InputError, match="drop --kv fp8, or use --backend"):
        check_build(asked)


@pytest.mark.parametrize(
    ("policy", "target", "backend"),
    [
        ("radial", "cpu", "onnxruntime"),
        ("pbsa", "cpu", "onnxruntime"),
        ("pbsa", "rtx5090", "tensorrt-rtx"),
        ("pbsa", "h200", "inductor"),
    ],
)
def test_other_methods_have_no_codes(policy: str, target: str, backend: str, tmp_path: Path) -> None:
    precision = "fp32" if target == "cpu" else "bf16"
    asked = request(tmp_path, target, "short", backend, precision, execution="segmented")
    asked = replace(asked, variant=asked.variant.with_policy(policy))
    with pytest.raises(
        InputError, match=rf"the policy {policy} .* is not there over keys and values in fp8; drop --kv"
    ):
        check_build(asked)


@pytest.mark.slow
def test_engines_and_kernels_for_a_gpu(tmp_path: Path) -> None:
    """Built for real: TensorRT-RTX engines between kernels over codes, every launch checked against the images."""
    pytest.importorskip("tensorrt_rtx")
    variant = load_variant("long").holding("fp8", "fp8")
    asked = request(tmp_path, "rtx4090", variant, "tensorrt-rtx", "bf16", execution="segmented")
    root = build_bundle(asked)
    dry_run(load_bundle(root))
    names = json.loads((root / "kernels" / "sm_89" / "kernels.json").read_text())["images"]
    kernels = {image["kernel"] for image in names}
    over_codes = {f"{kernel}_fp8" for kernel in ("prepare", "commit", "rope_sink")}
    assert kernels == {"score", "select", "attend_e4m3", *over_codes}
    assert all(image["spill_stores"] == 0 for image in names)
