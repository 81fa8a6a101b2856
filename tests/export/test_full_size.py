"""The models at their real size: the 1.3B exports within bounds, and a real layer of each against PyTorch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from export.graph.components import write_step
from export.graph.modules import StepModule
from export.request.geometry import StepPlan
from export.request.targets import load_variant
from lightforcing_ref.attention import block_means, hsa_attention, qk_prepare
from lightforcing_ref.config import PRESETS
from lightforcing_ref.model import CausalWanModel
from lightforcing_ref.rope import rope_tables

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

GIB = 2**20  # ru_maxrss is in KiB
MEMORY_LIMIT_GIB = 12

EXPORT = """
import resource, sys
from export.cli.main import main
status = main(sys.argv[1:])
print(status, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.parametrize(("resolution", "tokens"), [("512x768", 1536), ("480x832", 1560)])
def test_the_whole_model_exports_within_memory(tmp_path, resolution, tokens):
    arguments = [
        "onnx",
        "--preset",
        "wan-1.3b",
        "--init",
        "random",
        "--resolution",
        resolution,
        "--out",
        str(tmp_path),
    ]
    result = subprocess.run(
        [sys.executable, "-c", EXPORT, *arguments], capture_output=True, text=True, check=True
    )
    status, peak = map(int, result.stdout.splitlines()[-1].split())
    assert status == 0
    assert peak < MEMORY_LIMIT_GIB * GIB
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    onnx.checker.check_model(folder / "step.onnx")
    model = onnx.load(folder / "step.onnx", load_external_data=False)
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("HierarchicalSparseAttention") == operators.count("QKPrepare") == 30
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    assert shapes["past_k.29"][1:] == [tokens, 12, 128]
    # Without what the conditioner holds (text embedding, cross k and v) and the folded time embedding.
    assert (folder / "step.weights").stat().st_size == pytest.approx(4 * 1.25e9, rel=0.02)


@pytest.mark.parametrize(
    ("name", "height", "width"), [("wan-1.3b", 512, 768), ("wan-1.3b", 480, 832), ("wan-14b", 480, 832)]
)
def test_one_real_layer_at_chunk_seven_agrees_with_pytorch(tmp_path, name, height, width):
    preset = PRESETS[name]
    preset = replace(preset, dit=replace(preset.dit, layers=1))
    plan = StepPlan.of(preset, load_variant("short"), height, width, block_q=64, block_k=64)
    torch.manual_seed(0)
    model = CausalWanModel(preset.dit).eval().requires_grad_(False)
    gather = partial(hsa_attention, form="gather")
    module = StepModule(model, plan.spec, plan.schedule, prepare=qk_prepare, attend=gather)
    tokens, heads, dim = plan.geometry.frame_tokens, preset.dit.heads, preset.dit.head_dim
    past, chunk = 18, 6
    h, w = plan.latent_size

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape)

    keys = normal(past, tokens, heads, dim)
    means = block_means(keys.flatten(0, 1), tokens, 64)
    order = torch.randperm(past)
    cos, sin = rope_tables(torch.arange(3 * chunk, 3 * chunk + 3), (h // 2, w // 2), dim)
    feed = {
        "latent": normal(16, 3, h, w),
        "noise": normal(16, 3, h, w),
        "step": torch.tensor(1, dtype=torch.int32),
        "chunk": torch.tensor(chunk, dtype=torch.int32),
        "frame_slots": order.to(torch.int32),
        "rope_cos": cos,
        "rope_sin": sin,
        "cross_k.0": normal(512, heads, dim),
        "cross_v.0": normal(512, heads, dim),
        "past_k.0": keys,
        "past_v.0": normal(past, tokens, heads, dim),
        "past_kmean.0": means,
    }
    values = list(feed.values())
    with torch.no_grad():
        expected, *_ = module(*values[:7], *([value] for value in values[7:]))

    write_step(tmp_path, model, plan, per_chunk=False)
    session = ort.InferenceSession(tmp_path / "step.onnx", providers=["CPUExecutionProvider"])
    (actual,) = session.run(["next_latent"], {name: value.numpy() for name, value in feed.items()})
    error = np.linalg.norm(actual - expected.numpy()) / np.linalg.norm(expected.numpy())
    assert error < 1e-5
