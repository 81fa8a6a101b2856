"""What formats cost in single forwards of a rollout."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from export.graph.modules import merge_qkv
from export.quantize.cost import fake_quantized, output_errors
from export.quantize.decision import block_linear_names
from export.quantize.numerics import Format
from export.quantize.trial import Trial
from export.request.geometry import StepPlan
from export.request.targets import load_variant
from export.request.weights import Weights
from lightforcing_ref.config import PRESETS
from lightforcing_ref.rollout import Rollout

LAYERS = 2
NAMES = block_linear_names(LAYERS)


def test_they_are_those_of_forwards_from_the_unquantized_states() -> None:
    """Of a rollout of one chunk, by hand: four denoising forwards and the clean one, with nothing in the cache."""
    tiny = PRESETS["tiny"]
    dit = replace(tiny.dit, dim=64, ffn_dim=192, heads=1, layers=LAYERS, text_len=16)
    preset = replace(tiny, dit=dit, block=16)
    plan = StepPlan.of(preset, load_variant("dense"), 64, 64, block_q=16, block_k=16)
    text = torch.randn(1, dit.text_len, dit.text_dim, generator=torch.Generator().manual_seed(5))
    trial = Trial(plan, tuple(text), chunks=1)
    model = Weights(preset, seed=3).dit(torch.float32)
    merge_qkv(model)
    ffn: dict[str, Format] = {name: "nvfp4" for name in NAMES if ".ffn." in name}
    keys: dict[str, Format] = {
        name: "fp8" for name in NAMES if name.endswith(("cross_attn.k", "cross_attn.v"))
    }
    options = {"none": {}, "ffn": ffn, "keys": keys, "both": ffn | keys}
    found = output_errors(model, trial, options)

    states: list[tuple[torch.Tensor, int, int, list[int]]] = []
    rollouts: list[Rollout] = []

    class Watched(Rollout):
        def forward(self, x, row, chunk, past_frames=None):
            rollouts.append(self)
            states.append((x, row, chunk, []))
            return super().forward(x, row, chunk, past_frames)

    trial.run(model, Watched)
    assert len(states) == 5 and len(set(map(id, rollouts))) == 1
    rollout = rollouts[0]
    unquantized = torch.stack([Rollout.forward(rollout, *state)[0] for state in states])
    for option, formats in options.items():
        with fake_quantized(model, formats):
            rollout.cross = model.embed_text(text)
            actual = torch.stack([Rollout.forward(rollout, *state)[0] for state in states])
        error = float((actual - unquantized).double().norm() / unquantized.double().norm())
        assert found[option] == pytest.approx(error, rel=1e-5, abs=1e-12)
    assert found["none"] == 0 < found["keys"] < found["ffn"]
    assert found["both"] == pytest.approx(math.hypot(found["ffn"], found["keys"]), rel=0.2)
