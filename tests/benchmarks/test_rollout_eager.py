"""The eager rungs compute what the reference rollout computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.rollout import ladder
from benchmarks.rollout.eager import EagerRollout, SdpaChoice
from benchmarks.rollout.ladder import BundleSpec, Case, Platform
from export.request.geometry import StepPlan
from export.request.targets import load_target
from lightforcing_ref.config import preset
from lightforcing_ref.model import CausalWanModel
from lightforcing_ref.rollout import Rollout
from lightforcing_ref.sparsity import kept_blocks

CPU = Platform("cpu", load_target("cpu"), "onnxruntime", "fp32")


@pytest.fixture(autouse=True)
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers and a thin decoder."""
    tiny = preset("tiny")
    small = replace(tiny, dit=replace(tiny.dit, layers=2, dim=32, ffn_dim=64), vae=replace(tiny.vae, dim=2))
    monkeypatch.setattr(ladder, "ladder_preset", lambda name, *, light_vae: small)


def plan_for(frames: int, *, sparse: bool) -> StepPlan:
    return BundleSpec("fp32", sparse, True).request(Case("tiny", 64, 64, frames), CPU, Path("unused")).plan


class Recorder:
    """Stands for the decoder and keeps the latents it is given."""

    def __init__(self) -> None:
        self.frames: list[Tensor] = []

    def decode_first(self, frame: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.decode_next(frame, [])

    def decode_next(self, frame: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        self.frames.append(frame.clone())
        return torch.zeros(1, 3, 8, 8), caches


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("frames", "chunks"), [(81, 4), (243, 6)])
def test_latents_are_the_references(frames: int, chunks: int, sparse: bool) -> None:
    plan = plan_for(frames, sparse=sparse)
    if frames > 81:  # in the long mode sinks stay where they are: see the module's description
        cache = plan.variant.cache.model_copy(update={"sink_positions": "absolute"})
        plan = replace(plan, variant=plan.variant.model_copy(update={"cache": cache}))
    eager = EagerRollout(plan, "cpu", SdpaChoice(), sparse=sparse, seed=3)
    recorder = Recorder()
    noise = torch.randn(chunks, 4, 16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    drawn = iter(noise.flatten(0, 1))
    eager._decoder, eager._noise = recorder, lambda: next(drawn)
    records = list(eager.clip(chunks))
    assert len(records) == chunks
    assert all(record.denoise > 0 and record.other is None for record in records)

    torch.manual_seed(3)
    model = CausalWanModel(plan.preset.dit).eval().requires_grad_(False)
    reference = Rollout(
        model,
        plan.spec,
        eager._text[0],
        lambda chunk, step: noise[chunk, step],
        (4, 4),
        window_frames=plan.variant.window_frames,
        sink_frames=plan.variant.cache.sink_frames,
    )
    wanted = torch.cat(list(reference.stream(chunks)), dim=1)
    torch.testing.assert_close(torch.cat(recorder.frames, dim=1), wanted, rtol=1e-3, atol=1e-4)


def test_weights_do_not_change_the_work() -> None:
    """Two seeds, weights near zero and weights so large that attention is one-hot: the same blocks per forward."""
    plan, chunks = plan_for(81, sparse=True), 3

    def blown_up(model: CausalWanModel, factor: float) -> None:
        for parameter in model.blocks.parameters():
            parameter.mul_(factor)

    counts = []
    for seed, factor in ((0, 1.0), (1, 1.0), (0, 1e-3), (0, 50.0)):
        rollout = EagerRollout(
            plan, "cpu", SdpaChoice(), sparse=True, seed=seed, scale_weights=lambda model, f=factor: blown_up(model, f)
        )  # fmt: skip
        rollout._decoder = Recorder()
        assert len(list(rollout.clip(chunks))) == chunks
        counts.append(rollout.kept)
    blocks, layers = plan.geometry.k_blocks, plan.preset.dit.layers
    forwards = (
        [0] * 5 + [1] * 5 + [2] * 4
    )  # chunk of each forward; the clean one of the last chunk does not run
    wanted = [
        kept_blocks(plan.spec.keep_q20, c, 3 * (c + 1) * blocks) for c in forwards for _ in range(layers)
    ]
    assert counts == [wanted] * len(counts)


def test_frames_of_a_clip() -> None:
    rollout = EagerRollout(plan_for(81, sparse=False), "cpu", SdpaChoice(), sparse=False)
    assert [record.frames for record in rollout.clip(3)] == [9, 12, 12]
    rollout.close()
