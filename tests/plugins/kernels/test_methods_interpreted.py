"""The kernels of the other methods, interpreted: against their oracles, and in whole bundles."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.compare.against_reference import open_bundle, play
from export.compare.result import Film, frames_row
from export.compare.trials import Trials
from export.request.targets import Variant, load_variant
from export.request.weights import Weights
from export.tolerances import PIXELS
from lightforcing_ref.config import PRESETS
from tests.conftest import build

pytest.importorskip("triton")

ROOT = Path(__file__).parents[3]
INTERPRETED = {**os.environ, "TRITON_INTERPRET": "1"}
CHUNKS = 3
"""Of a window of six frames: the third evicts."""
METHODS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "sta": (
        {"windows": [[3, 1, 1], [1, 3, 3]], "tile": [5, 5], "sink_frames": 1},
        {"expand", "attend_ordered"},
    ),
    "radial": ({"decay": 0.1, "sink_frames": 0}, {"expand", "attend"}),
    "sparge": (
        {"mode": "cdf", "cumulative": 0.6, "similarity": 0.1},
        {"score", "mean_key", "resemble", "select_sparge", "attend"},
    ),
    "sla": (
        {"budget": 0.3, "linear": True},
        {"score", "select", "attend", "sum_linear", "project_linear", "add_linear"},
    ),
    "vmoba": (
        {"gating": "pooled", "query_block": 32, "blocks": [[2, 3, 4]], "threshold": 0.4},
        {"pool", "score_groups", "choose", "expand", "attend_ordered"},
    ),
    "pbsa": (
        # The second chunk chooses: of the blocks of two frames those of one stay.
        {"persistent_frames": 1, "budget": 0.5},
        {"score", "select_pinned", "attend", "weigh", "persist"},
    ),
}


def run(*arguments: str | Path) -> str:
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=INTERPRETED,
        capture_output=True,
        text=True,
        timeout=1700,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-5_000:]
    return result.stdout


def test_kernels_of_the_methods() -> None:
    run("-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider",
        Path(__file__).with_name("methods_interpreted.py"))  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("policy", METHODS)
def test_a_bundle_rolls_out_alike_on_graphs_and_kernels(policy: str, tmp_path: Path) -> None:
    """Prompt to pixels past the first eviction; that graphs roll out as the reference is tested of every method."""
    parameters, kernels = METHODS[policy]
    document = load_variant("long").changed(window_frames=6).model_dump()
    document["schedule"] |= {"steps": [1000], "clean_forward": False}  # a forward a chunk: each takes seconds
    document["block"] = 32 if policy == "pbsa" else document["block"]  # a choice takes two blocks a frame
    variant = Variant.model_validate(document | {"attention": {"policy": policy, **parameters}})
    tiny = PRESETS["tiny"]
    preset = replace(tiny, dit=replace(tiny.dit, layers=2))
    folder = build(tmp_path, policy, variant=variant, execution="segmented", weights=Weights(preset, seed=0))
    bundle = open_bundle(folder)
    (prompt,) = Trials.of(bundle.manifest, ()).prompts
    copy, out = tmp_path / "copy", tmp_path / "frames.npy"
    shutil.copytree(folder, copy)
    launched = run("-m", "tests.plugins.kernels.bundle_interpreted", copy, prompt, str(CHUNKS), out)
    assert set(json.loads(launched)) == {"prepare", "commit", "rope_sink"} | kernels
    films = Film("kernels", np.load(out)), Film("graphs", play(bundle, CHUNKS))
    row = frames_row(policy, *films, allowed=PIXELS)
    assert row.passed, row
