"""Targets and variants: the shipped files, files of one's own, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from export.errors import InputError
from export.machine import Gpu, GpuReport
from export.request.detect import detected_target
from export.request.targets import (
    Blocks,
    Target,
    Variant,
    list_targets,
    list_variants,
    load_target,
    load_variant,
)
from lightforcing_ref import config
from lightforcing_ref.errors import ConfigError

# name: compute capability, GiB, block, precisions beyond fp32, published bf16 / fp8 / nvfp4 TFLOPS, GB/s
PUBLISHED = {
    "rtx5090": ("12.0", 32, 64, "bf16 fp8 nvfp4", 209.5, 419.0, 1676.0, 1792),
    "rtx5080": ("12.0", 16, 64, "bf16 fp8 nvfp4", 112.6, 225.1, 900.4, 960),
    "rtx4090": ("8.9", 24, 64, "bf16 fp8", 165.2, 330.3, None, 1008),
    "rtx3090": ("8.6", 24, 64, "bf16", 71.2, None, None, 936),
    "h100": ("9.0", 80, 128, "bf16 fp8", 989.4, 1978.9, None, 3350),
    "h200": ("9.0", 140, 128, "bf16 fp8", 989.4, 1978.9, None, 4800),
    "b200": ("10.0", 179, 128, "bf16 fp8 nvfp4", 2250, 4500, 9000, 8000),
    "a100": ("8.0", 80, 64, "bf16", 312, None, None, 2039),
}

# name: target, base, planned frames, keep/sink/near, window, cached sinks and their positions, block
PUBLISHED_VARIANTS = {
    "short": (0.88, 0.98, 21, (6, 1, 2), 21, 1, "absolute", None),
    "long": (0.85, 0.95, 63, (3, 1, 1), 12, 1, "window", None),
    "hopper": (0.80, 0.90, 21, (6, 1, 2), 21, 1, "absolute", 128),
    "dense": (0, 0, 21, (18, 0, 0), 21, 1, "absolute", None),
    "longlive": (0, 0, 21, (9, 0, 0), 12, 3, "absolute", None),
    "infinite": (0, 0, 21, (3, 0, 0), 6, 1, "window", None),
    "rolling": (0, 0, 21, (18, 0, 0), 21, 3, "window", None),
}

OTHERS = {  # held by tests/export/test_schedules.py
    "causal-chunkwise",
    "causal-framewise",
    "causal-framewise-2step",
    "causal-framewise-1step",
}

MINE = """
schema_version = 1
name = "mine"
title = "A card of my own"
compute_capability = "8.6"
precisions = ["fp32"]
backends = ["onnxruntime"]
"""


def test_shipped_names() -> None:
    assert {target.name for target in list_targets()} >= {*PUBLISHED, "cpu"}
    assert {variant.name for variant in list_variants()} == {*PUBLISHED_VARIANTS, *OTHERS}


@pytest.mark.parametrize("name", PUBLISHED)
def test_target_holds_the_published_facts(name: str) -> None:
    target = load_target(name)
    capability, gib, block, precisions, bf16, fp8, fp4, bandwidth = PUBLISHED[name]
    assert target.compute_capability == capability
    assert target.sm == f"sm_{capability.replace('.', '')}"
    assert target.memory_gib == gib
    assert target.blocks == Blocks(query=block, key=block)
    assert target.precisions == ("fp32", *precisions.split())
    assert target.peak is not None
    assert [target.peak.tflops(kind) for kind in ("bf16", "fp8", "nvfp4")] == [bf16, fp8, fp4]
    assert target.peak.memory_gb_s == bandwidth
    assert target.backends[-1] == "onnxruntime"


@pytest.mark.parametrize("name", ["rtx5090", "rtx5080", "rtx4090"])
def test_geforce_halves_fp32_sums_but_of_block_scaled_operands(name: str) -> None:
    peak = load_target(name).peak
    assert peak is not None
    half, full = peak.tflops("fp8"), peak.tflops("fp8", "fp16")
    assert half and full == pytest.approx(2 * half, rel=1e-3)
    assert peak.tflops("bf16") == pytest.approx(half / 2, rel=1e-3)
    assert peak.tflops("int8") == full
    assert peak.tflops("mxfp8") == (full if name.startswith("rtx50") else None)
    assert peak.tflops("nvfp4") == (pytest.approx(2 * full, rel=1e-3) if name.startswith("rtx50") else None)


def test_every_rate_has_a_source() -> None:
    for target in list_targets():
        if target.peak is not None:
            sources = [target.peak.memory_source, *(rate.source for rate in target.peak.rates)]
            kinds = ("white paper", "data sheet", "third parties' tables")
            assert all(any(kind in source for kind in kinds) for source in sources), target.name


# name: GiB and GB/s as the vendor's pages state them, and the cores that 128 a multiprocessor make.
CARDS = {
    "rtx3060": (12, 360, 3584),
    "rtx3080": (10, 760, 8704),
    "rtx3090ti": (24, 1008, 10752),
    "rtx4060ti-16gb": (16, 288, 4352),
    "rtx4070super": (12, 504, 7168),
    "rtx4080super": (16, 736, 10240),
    "rtx5060ti": (8, 448, 4608),
    "rtx5070": (12, 672, 6144),
    "rtx5070ti": (16, 896, 8960),
    "rtx4090-laptop": (16, 576, 9728),
    "rtx3060-8gb": (8, 240, 3584),
    "rtx3050-6gb": (6, 168, 2304),
    "rtx3060-laptop": (6, 336, 3840),
    "rtx3070-laptop": (8, 448, 5120),
    "rtx3070ti-laptop": (8, 448, 5888),
    "rtx3080-laptop": (16, 448, 6144),
    "rtx4050-laptop": (6, 192, 2560),
    "rtx5060-laptop": (8, 384, 3328),
    "rtx5070-laptop": (8, 384, 4608),
    "rtxpro2000": (16, 288, 4352),
    "rtxpro4000": (24, 672, 8960),
    "rtxpro4500": (32, 896, 10496),
    "rtx5090-laptop": (24, 896, 10496),
}


@pytest.mark.parametrize("name", CARDS)
def test_cards_have_the_vendors_figures(name: str) -> None:
    target, (gib, bandwidth, cores) = load_target(name), CARDS[name]
    assert target.memory_gib == gib
    assert target.peak is not None
    assert target.peak.memory_gb_s == bandwidth
    assert f"{cores // 128} SMs" in target.peak.rates[0].source


def test_rates_are_what_their_sources_multiply_to() -> None:
    checked = 0
    for target in list_targets():
        for rate in target.peak.rates if target.peak else ():
            if match := re.search(r"(\d+) SMs x (\d+) FLOP per clock x ([\d.]+) GHz", rate.source):
                product = int(match[1]) * int(match[2]) * float(match[3]) / 1000
                assert rate.tflops == pytest.approx(product, abs=0.051), f"{target.name} {rate.operands}"
                checked += 1
    assert checked > 60


def test_workstation_cards_hold_fp32_sums_at_the_full_rate() -> None:
    """Half of what the data sheets print, which count sparse products."""
    for name, sparse_fp8 in (("rtx6000ada", 1457.0), ("l4", 485.0)):
        peak = load_target(name).peak
        assert peak is not None and peak.tflops("fp8") == pytest.approx(sparse_fp8 / 2, rel=1e-3)


@pytest.mark.parametrize("name", ["rtxpro5000", "rtxpro5000-72gb", "rtxpro6000"])
def test_blackwell_workstations_multiply_four_times_as_fast_as_they_add(name: str) -> None:
    """Their published float32 rates, 65 and 125 TFLOPS, are 256 operations a clock and multiprocessor; bf16 is 1024."""
    peak = load_target(name).peak
    assert peak is not None
    single = 125 if name == "rtxpro6000" else 65
    assert peak.tflops("bf16") == pytest.approx(4 * single, rel=0.01)
    assert [peak.tflops(kind) for kind in ("fp8", "nvfp4")] == [
        2 * peak.tflops("bf16"),
        4 * peak.tflops("bf16"),
    ]
    assert peak.memory_gb_s == (1792 if name == "rtxpro6000" else 1344)


@pytest.mark.parametrize("name", ["rtx2080ti", "gtx1080", "titan-rtx", "quadro-rtx5000", "t4", "v100"])
def test_older_cards_are_told_why_not(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is older than compute capability 8.0"):
        load_target(name)


def gpu(name: str, capability: str, gib: float) -> GpuReport:
    return GpuReport((Gpu(name, capability, int(gib * 2**30)),), "13.0")


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (gpu("NVIDIA GeForce RTX 5090", "12.0", 31.4), "rtx5090"),
        (gpu("NVIDIA GeForce RTX 4060 Ti", "8.9", 7.6), "rtx4060ti"),
        (gpu("NVIDIA GeForce RTX 4060 Ti", "8.9", 15.6), "rtx4060ti-16gb"),
        (gpu("NVIDIA GeForce RTX 3080", "8.6", 9.8), "rtx3080"),
        (gpu("NVIDIA GeForce RTX 3080", "8.6", 11.8), "rtx3080-12gb"),
        (gpu("NVIDIA GeForce RTX 3080 Laptop GPU", "8.6", 7.8), "rtx3080-laptop-8gb"),
        (gpu("NVIDIA GeForce RTX 3050 6GB", "8.6", 5.8), "rtx3050-6gb"),
        (gpu("NVIDIA RTX PRO 5000 72GB Blackwell", "12.0", 71), "rtxpro5000-72gb"),
        (gpu("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "12.0", 94.9), "rtxpro6000-maxq"),
        (gpu("NVIDIA GeForce RTX 4090 Laptop GPU", "8.9", 15.7), "rtx4090-laptop"),
        (gpu("NVIDIA A100-SXM4-80GB", "8.0", 79.3), "a100"),
        (gpu("NVIDIA H200", "9.0", 139.8), "h200"),
        (gpu("NVIDIA L4", "8.9", 22.0), "l4"),
    ],
)
def test_a_gpu_that_is_here_is_recognised(report: GpuReport, expected: str) -> None:
    assert detected_target(report).name == expected


def test_a_gpu_that_is_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"needs a GPU, and here is none: no driver; name a target"):
        detected_target(GpuReport(problem="no driver"))
    with pytest.raises(InputError, match=r"GeForce RTX 5999 .* is no target .* nearest are rtx50"):
        detected_target(gpu("NVIDIA GeForce RTX 5999", "12.0", 16.2))
    with pytest.raises(InputError, match="none has its compute capability"):
        detected_target(gpu("NVIDIA Thing", "13.0", 16))
    with pytest.raises(InputError, match=r"GeForce RTX 2080 Ti is older than compute capability 8\.0.*bf16"):
        detected_target(gpu("NVIDIA GeForce RTX 2080 Ti", "7.5", 11))


def test_a_rate_is_stated_once(tmp_path: Path) -> None:
    rate = '[[peak.rates]]\noperands = "bf16"\naccumulator = "fp32"\ntflops = 9.0\nsource = "mine"\n'
    path = tmp_path / "mine.toml"
    path.write_text(MINE + '[peak]\nmemory_gb_s = 1.0\nmemory_source = "mine"\n' + 2 * rate)
    with pytest.raises(InputError, match="2 rates of bf16 with fp32 sums"):
        load_target(str(path))


def test_cpu_leaves_machine_and_preset_their_say() -> None:
    cpu = load_target("cpu")
    assert (cpu.compute_capability, cpu.sm, cpu.memory_gib, cpu.blocks, cpu.peak) == (None,) * 5
    short = load_variant("short")
    assert short.blocks(cpu, config.PRESETS["tiny"].block) == Blocks(query=32, key=32)
    assert short.blocks(cpu, config.PRESETS["wan-1.3b"].block) == Blocks(query=64, key=64)
    assert load_variant("hopper").blocks(cpu, 32) == Blocks(query=128, key=128)
    assert short.blocks(load_target("h200"), 64) == Blocks(query=128, key=128)


def test_default_variants_exist_and_suit_the_blocks() -> None:
    for target in list_targets():
        block = load_variant(target.default_variant).block
        assert block is None or target.blocks == Blocks(query=block, key=block)


@pytest.mark.parametrize("name", PUBLISHED_VARIANTS)
def test_variant_holds_the_published_settings(name: str) -> None:
    variant = load_variant(name)
    sparsity, cache = variant.sparsity, variant.cache
    assert (
        sparsity.target,
        sparsity.base,
        sparsity.table_frames,
        (variant.keep_frames, sparsity.sink_frames, sparsity.near_frames),
        variant.window_frames,
        cache.sink_frames,
        cache.sink_positions,
        variant.block,
    ) == PUBLISHED_VARIANTS[name]
    assert variant.max_past_frames == variant.window_frames - 3


def test_published_sparsity_tables() -> None:
    short = [0, 0.827, 0.855, 0.872, 0.883, 0.892, 0.898]
    assert load_variant("short").table().values == pytest.approx(short, abs=5e-4)
    hopper = [0, 0.747, 0.775, 0.792, 0.803, 0.812, 0.818]
    assert load_variant("hopper").table().values == pytest.approx(hopper, abs=5e-4)
    long = load_variant("long").table().values
    assert len(long) == 21
    assert [*long[:4], long[-1]] == pytest.approx(
        [0, 0.735, 0.774, 0.798, 0.884], abs=5.5e-4
    )  # published after rounding to four decimals first
    assert set(load_variant("dense").table().values) == {0.0}


def test_unknown_names_suggest_and_list() -> None:
    with pytest.raises(
        InputError, match=r"unknown target 'rtx509'; did you mean rtx5090.*a100, a40, b200, cpu, h100"
    ):
        load_target("rtx509")
    with pytest.raises(
        InputError,
        match=r"unknown variant 'xyz'; the variants are causal-chunkwise, .*hopper, infinite, long, longlive, rolling,",
    ):
        load_variant("xyz")


def test_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MINE)
    target = load_target(str(path))
    assert isinstance(target, Target)
    assert (target.name, target.sm, target.default_variant) == ("mine", "sm_86", "short")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (("schema_version = 1", "schema_version = 2"), "schema_version"),
        (('"8.6"', '"ampere"'), "compute_capability"),
        (('["onnxruntime"]', '["onnx"]'), "backends"),
        (('["fp32"]', "[]"), "precisions"),
        (("title", "titel"), "titel"),
        (('name = "mine"', 'name = "../mine"'), "name"),
        (("schema_version = 1", "schema_version == 1"), "not readable TOML"),
    ],
)
def test_malformed_file_names_file_and_field(tmp_path: Path, edit: tuple[str, str], message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MINE.replace(*edit))
    with pytest.raises(InputError, match=message) as caught:
        load_target(str(path))
    assert str(path) in str(caught.value)


def test_missing_file_lists_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no target file at .*rtx5090"):
        load_target(str(tmp_path / "none.toml"))


def test_changes_make_a_custom_variant() -> None:
    short = load_variant("short")
    assert short.changed(target=None, keep_frames=None) is short
    changed = short.changed(keep_frames=4, window_frames=15)
    assert isinstance(changed, Variant)
    assert (changed.name, changed.keep_frames, changed.max_past_frames) == ("short-custom", 4, 12)
    assert changed.changed(near_frames=1).name == "short-custom"
    assert load_variant("dense").changed(window_frames=9).keep_frames == 6


def test_target_alone_takes_the_base_along() -> None:
    short = load_variant("short")
    assert short.changed(target=0.8).sparsity.base == pytest.approx(0.9)
    assert short.changed(target=0.95).sparsity.base == 0.999
    assert short.changed(target=0.8, base=0.85).sparsity.base == 0.85
    assert set(short.changed(target=0.0).table().values) == {0.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": 0.5}, "base >= target"),
        ({"target": 1.0}, "sparsity.target"),
        ({"table_frames": 20}, "whole number of chunks"),
        ({"keep_frames": 2}, "at least sink \\+ near = 3"),
        ({"window_frames": 3}, "cache.sink_frames is 1; expected at most the 0 past"),
        ({"window_frames": 2}, "cache.window_frames"),
    ],
)
def test_changes_that_do_not_go_together(changes: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_variant("short").changed(**changes)


def test_table_that_would_go_negative() -> None:
    with pytest.raises(ConfigError, match="bring base and target closer together"):
        load_variant("short").changed(target=0.1, base=0.98).table()
