"""Kernels by name, and parts of a forward by the order of launches."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.kernel_classes import CLASSES, PARTS, GpuEvent, classify, part_shares
from plugins.kernels import specs
from runtime.bundle import load_bundle
from runtime.program.buffers import plan_buffers
from runtime.program.builder import build_program
from runtime.program.program import Copy, EngineRun, Fill, Forward, KernelLaunch, Program
from tests.runtime.device_bundles import build_device_bundle

NAMES = json.loads(Path(__file__).with_name("kernel_names.json").read_text())["kernels"]


def test_every_class_has_real_names() -> None:
    assert {entry["class"] for entry in NAMES} == set(CLASSES)
    assert len({entry["name"] for entry in NAMES}) == len(NAMES)


@pytest.mark.parametrize("entry", NAMES, ids=lambda entry: entry["name"][-60:])
def test_a_kernel_is_of_the_class_of_what_it_computes(entry: dict[str, str]) -> None:
    assert classify(entry["name"]) == entry["class"]


def test_every_kernel_of_this_project_has_a_class() -> None:
    """By the room that it has among them: what is neither prepared, attended nor copied is selected."""
    begins = {"prepare": "norm/elementwise", "attend": "attention"}
    begins |= dict.fromkeys(("sum", "project", "add"), "attention")  # SLA's linear branch
    begins |= dict.fromkeys(("commit", "rope", "persist"), "copy")
    for kernel in specs.KERNELS:
        assert classify(kernel) == begins.get(kernel.split("_")[0], "selection"), kernel


def test_templates_are_what_they_compute() -> None:
    """Inductor writes products itself only where it may tune them, which packages built without a GPU do not."""
    assert classify("triton_tem_fused_addmm_view_3") == "gemm"
    assert classify("triton_tem_fused_convolution_silu_0") == "conv"
    assert classify("triton_tem_fused_flex_attention_0") == "attention"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    bundle = load_bundle(build_device_bundle(tmp_path_factory.mktemp("bundle") / "bundle"))
    return build_program(bundle, plan_buffers(bundle.manifest, 1))


FORWARD, DECODE = 7, 13
KERNELS = {  # of each package; a copy inside of one is its own
    "first": ("triton_poi_fused_clone_0", "nvjet_a", "triton_red_fused_abs_1", "nvjet_b"),
    "layer": ("triton_red_fused_abs_0", "nvjet_a", "Memcpy DtoD (Device -> Device)", "nvjet_b"),
    "last": ("triton_red_fused_abs_0", "nvjet_c", "triton_poi_fused_sub_5"),
    "vae_first": ("sm90_xmma_fprop_a",),
    "vae_next": ("sm90_xmma_fprop_a", "triton_poi_fused_silu_1"),
}


class Device:
    """Runs forwards of a program one after the other and notes what a profiler would see, and what it was part of."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self.events: list[GpuEvent] = []
        self.times: defaultdict[str, float] = defaultdict(float)

    def _event(self, name: str, part: str, stream: int) -> None:
        start = self.events[-1].start + self.events[-1].duration if self.events else 0.0
        duration = 1.0 + len(self.events) % 7
        self.events.append(GpuEvent(name, start, duration, stream))
        self.times[part] += duration

    def run(self, name: str) -> None:
        """The forward's feeds, then its operations."""
        forward = self._program.forwards[name]
        stream = DECODE if forward.queue == "decode" else FORWARD
        for _ in forward.feeds:
            self._event("Memcpy HtoD (Pinned -> Device)", "copies", stream)
        for kernel, part in self._launches(forward):
            self._event(kernel, part, stream)

    def _launches(self, forward: Forward) -> Iterator[tuple[str, str]]:
        for operation in forward.operations:
            if isinstance(operation, EngineRun):
                part = "decoder" if forward.queue == "decode" else operation.component
                yield from ((kernel, part) for kernel in KERNELS[operation.component])
            elif isinstance(operation, KernelLaunch):
                own = operation.kernel in ("commit", "rope_sink")
                yield operation.kernel, "copies" if own else "operators"
            else:
                assert isinstance(operation, Copy | Fill)
                yield "Memcpy DtoD (Device -> Device)", "copies"

    def copy(self) -> None:
        """One that is part of no forward."""
        self._event("Memcpy DtoD (Device -> Device)", "copies", FORWARD)


def chunk(device: Device, steps: int) -> None:
    """As the engine does it: the clean forward of the chunk before, then denoising, and decoding beside it."""
    device.run("begin_clean")
    device.copy()
    device.run("clean")
    device.run("commit")
    device.run("begin")
    for step in range(steps):
        device.run(f"denoise.{step}")
        device.run("decode_next.a")
    device.copy()


def test_the_parts_of_a_forward_are_told_apart_by_order(program: Program) -> None:
    device = Device(program)
    chunk(device, 4)
    found, total = part_shares(device.events), sum(device.times.values())
    assert found is not None and set(found) == set(PARTS) == set(device.times)
    for part, seconds in device.times.items():
        assert found[part] == pytest.approx(seconds / total), part


def test_a_stretch_that_begins_and_ends_amid_a_layer(program: Program) -> None:
    device = Device(program)
    chunk(device, 4)
    names = [event.name for event in device.events]
    first_attend = names.index("attend")
    found = part_shares(device.events[first_attend + 2 :])  # one kernel of a layer is missing
    whole = part_shares(device.events)
    assert found is not None and whole is not None
    assert found["layer"] == pytest.approx(whole["layer"], rel=0.2)
    assert found["first"] > 0 and found["last"] > 0


def test_without_a_bundle_there_are_no_parts() -> None:
    assert part_shares([GpuEvent("nvjet_a", 0.0, 1.0, 7)]) is None
