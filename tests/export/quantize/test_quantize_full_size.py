"""Quantization of the full-size step graph: memory and file size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import pytest

from lightforcing_ref.config import PRESETS

EXPORT = """
import sys
import torch
from pathlib import Path
from export.graph.components import write_step
from export.request.geometry import StepPlan
from export.request.targets import load_variant
from export.request.weights import Weights
from lightforcing_ref.config import PRESETS

preset = PRESETS["wan-1.3b"]
plan = StepPlan.of(preset, load_variant("short"), preset.height, preset.width, block_q=64, block_k=64)
write_step(Path(sys.argv[1]), Weights(preset, seed=0).dit(torch.bfloat16), plan, per_chunk=False)
"""

QUANTIZE = """
import json, resource, sys
from collections import Counter
import onnx_ir as ir
from pathlib import Path
from export.quantize.formats import choose_formats, linear_names, quantize, save_quantized

folder, precision = Path(sys.argv[1]), sys.argv[2]
model = ir.load(folder / "step.onnx")
quantize(model, choose_formats(linear_names(model), precision))
save_quantized(model, folder / f"{precision}.onnx", f"{precision}.weights")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
suffixes = Counter(name.rpartition(".")[2] for name in model.graph.initializers)
print(json.dumps({"peak": peak, "products": {"fp8": suffixes["fp8"], "nvfp4": suffixes["fp4"]}}))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    subprocess.run([sys.executable, "-c", EXPORT, str(folder)], check=True)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("precision", "products"),
    [
        ("fp8", {"fp8": 180, "nvfp4": 0}),
        ("nvfp4", {"fp8": 0, "nvfp4": 180}),
    ],
)
def test_one_layer_at_a_time(exported: Path, precision: str, products: dict[str, int]) -> None:
    """Peak memory stays at the mapped weights file (2.3 GiB) and little more; the new file holds what it must."""
    command = [sys.executable, "-c", QUANTIZE, str(exported), precision]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert result["products"] == products
    assert result["peak"] < 4.0
    dit = PRESETS["wan-1.3b"].dit
    elements = 6 * dit.dim**2 + 2 * dit.dim * dit.ffn_dim
    stored_bytes = elements if precision == "fp8" else elements // 2 + elements // 16
    posts = 2 * (6 * dit.dim + dit.ffn_dim + dit.dim)
    saved = ir.load(exported / f"{precision}.onnx").graph.initializers
    written = ("fp8", "fp4", "block_scales", "post")
    size = sum(v.const_value.nbytes for name, v in saved.items() if name.rpartition(".")[2] in written)
    assert size == dit.layers * (stored_bytes + posts)
