"""Bundles of every sparse method on the CPU: forwards and whole rollouts are the reference's."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from export.cli.main import main
from export.compare.against_reference import (
    decoded,
    open_bundle,
    play,
    reference_embedding,
)
from export.compare.reference import Reference
from export.compare.result import Film, frames_row
from export.compare.trials import SEED
from export.errors import InputError
from export.estimate.selection import Share, own_share
from export.graph.oracles import ORACLES
from export.parts.kernels import kernel_variants
from export.request.geometry import StepPlan
from export.request.methods import check_backend, method_attributes, operator_of, resolved
from export.request.targets import Variant, load_target, load_variant
from export.tolerances import PIXELS
from lightforcing_ref.config import PRESETS
from lightforcing_ref.errors import ConfigError
from lightforcing_ref.policies import MethodOperator
from lightforcing_ref.sparsity import BlockGeometry
from plugins import contract
from tests import brute_force
from tests.conftest import build, shared

METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "sla": {"budget": 0.3},
    "sla-linear": {"budget": 0.3, "linear": True},
    "sparge": {"mode": "cdf", "cumulative": 0.7, "similarity": 0.2},
    "sta": {"windows": ((3, 1, 3), (5, 3, 1)), "tile": (4, 2), "sink_frames": 1},
    "radial": {"decay": 0.5},
    "vmoba": {"blocks": ((1, 0, 0), (0, 2, 4), (2, 4, 4)), "threshold": 0.4, "gating": "token"},
    "vmoba-pooled": {"blocks": ((1, 0, 0), (0, 2, 3)), "gating": "pooled", "query_block": 32},
    "pbsa": {"persistent_frames": 1, "budget": 0.4},
}

CHUNKS = 5
"""A window of 12 frames: the fifth chunk evicts."""


def variant_of(policy: str, base: str = "long", **parameters: Any) -> Variant:
    document = load_variant(base).model_dump()
    method = {"policy": policy.partition("-")[0], **parameters}
    return Variant.model_validate(document | {"attention": method})


QUICK = ("sla-linear", "vmoba")
"""A bundle in segments, with weights in attention, and one that is whole."""


@pytest.fixture(
    params=[policy if policy in QUICK else pytest.param(policy, marks=pytest.mark.slow) for policy in METHODS]
)
def method_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` with the window of the long variant, so that frames are evicted and sinks move."""
    policy = request.param
    variant = variant_of(policy, **METHODS[policy])
    execution = "segmented" if policy in ("sla", "sla-linear", "sta") else "whole"
    return shared(
        tmp_path_factory,
        f"tiny-{policy}",
        lambda out: build(out, policy, variant=variant, execution=execution),
    )


def test_a_bundle_rolls_out_as_the_reference(method_bundle: Path) -> None:
    """Prompt to pixels through the runtime, past the first eviction."""
    bundle = open_bundle(method_bundle)
    reference = Reference.of(bundle.manifest)
    method = bundle.manifest.attention.method
    name = method_bundle.name
    assert method.model_dump() == variant_of(name, **METHODS[name]).attention.model_dump()
    embedding = reference_embedding(bundle, reference)
    latents = torch.cat(list(reference.rollout(bundle.manifest, embedding, SEED).stream(CHUNKS)), dim=1)
    films = Film("bundle", play(bundle, CHUNKS)), Film("PyTorch", decoded(reference, latents))
    row = frames_row(method.policy, *films, allowed=PIXELS)
    assert row.passed, row


def test_inspect_tells_what_a_method_keeps(method_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(method_bundle), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    method, rows = document["attention"]["method"], document["sparsity_per_chunk"]
    assert len(rows) == 21
    assert rows[0]["kept"] == rows[0]["of"]
    if method["policy"] == "sta":
        # Windows (3, 1, 3) and (5, 3, 1) in tiles of 4 x 2 on 8 x 8 tokens: of 12 frames one is a sink, whole; of the
        # other 11 a query sees 3 (5), of 2 rows of tiles 1 (2), of 4 columns 3 (1).
        shares = [1 / 12 + 3 / 12 * 1 / 2 * 3 / 4, 1 / 12 + 5 / 12 * 2 / 2 * 1 / 4]
        assert 1 - rows[-1]["sparsity"] == pytest.approx(sum(shares) / 2)
    elif method["policy"] == "vmoba":
        assert rows[-1]["assumption"] == "a token's scores are spread evenly"


@pytest.mark.parametrize(
    ("policy", "parameters", "operator"),
    [
        ("dense", {}, contract.HIERARCHICAL_SPARSE_ATTENTION),
        ("sla", {}, contract.HIERARCHICAL_SPARSE_ATTENTION),
        ("sparge", {}, contract.HIERARCHICAL_SPARSE_ATTENTION),
        ("sparge", {"similarity": 0.0}, contract.SPARGE),
        ("sparge", {"mode": "cdf"}, contract.SPARGE),
        ("vmoba", {}, contract.VMOBA),
    ],
)
def test_plain_top_k_needs_no_operator_of_its_own(
    policy: str, parameters: dict[str, Any], operator: str
) -> None:
    method = variant_of(policy, **parameters).attention
    assert operator_of(method) == operator
    check_backend(method, "tensorrt-rtx", "segmented", kernels=True)
    if operator == contract.HIERARCHICAL_SPARSE_ATTENTION:
        check_backend(method, "tensorrt", "whole", kernels=True)
    else:
        with pytest.raises(InputError, match=f"tensorrt has no kernel for the policy {policy}.*onnxruntime"):
            check_backend(method, "tensorrt", "whole", kernels=True)


@pytest.mark.parametrize("policy", ["sta", "radial", "pbsa"])
def test_the_plugin_has_one_method_and_the_kernels_have_more(policy: str) -> None:
    method = variant_of(policy).attention
    for backend in ("onnxruntime", "tensorrt-rtx", "inductor"):
        check_backend(method, backend, "segmented", kernels=backend != "onnxruntime")
    with pytest.raises(
        InputError, match=f"tensorrt has no kernel for the policy {policy}; use --backend onnx.*rtx"
    ):
        check_backend(method, "tensorrt", "whole", kernels=True)


def test_layers_that_take_turns_are_no_segments_of_graphs() -> None:
    """Kernels are launched layer by layer, each with its own tables; a graph of the operator is one for all."""
    turns = variant_of("vmoba").attention
    check_backend(turns, "onnxruntime", "whole", kernels=False)
    check_backend(turns, "tensorrt-rtx", "segmented", kernels=True)
    alike = variant_of("vmoba", blocks=((1, 2, 2),), tops=(4,)).attention
    check_backend(alike, "onnxruntime", "segmented", kernels=False)
    for backend in ("onnxruntime", "inductor"):
        with pytest.raises(InputError, match="use --execution whole"):
            check_backend(turns, backend, "segmented", kernels=False)


@pytest.mark.parametrize("target", ["a100", "rtx3090", "rtx4090", "h100", "b200", "rtx5090"])
@pytest.mark.parametrize("size", [(480, 832), (512, 768)], ids=str)
def test_kernels_serve_every_method_at_full_size(target: str, size: tuple[int, int]) -> None:
    """Frames of 30x52 and of 32x48 tokens, in the window of the short variant: 21 frames."""
    pytest.importorskip("triton")
    kernels = {
        "sta": {"attend_ordered", "expand"},
        "radial": {"attend", "expand"},
        "sparge": {"attend", "mean_key", "resemble", "score", "select_sparge"},
        "vmoba": {"attend_ordered", "choose", "expand", "pool", "score_groups"},
        "pbsa": {"attend", "persist", "score", "select_pinned", "weigh"},
        "sla": {"add_linear", "attend", "project_linear", "score", "select", "sum_linear"},
    }
    own = {"sparge": {"similarity": 0.5}, "sla": {"linear": True}}
    for policy, expected in kernels.items():
        variant = variant_of(policy, "short", **own.get(policy, {}))
        plan = StepPlan.of(PRESETS["wan-1.3b"], variant, *size, block_q=64, block_k=64)
        names = kernel_variants(load_target(target), plan)
        assert {name.split("-")[0] for name in names} == expected | {"prepare", "commit"}


def test_the_manifest_says_how_vmoba_gates() -> None:
    """Where the variant does not: token by token in graphs, pooled in kernels; these do nothing else."""
    method = variant_of("vmoba").attention
    assert resolved(method, kernels=False).gating == "token"
    pooled = resolved(method, kernels=True)
    assert pooled.gating == "pooled"
    assert method_attributes(pooled, 1, 8)["query_block"] == 64
    assert method_attributes(resolved(method, kernels=False), 1, 8)["query_block"] == 0
    own = variant_of("vmoba", gating="token").attention
    assert resolved(own, kernels=True) == own
    with pytest.raises(InputError, match='set gating = "pooled"'):
        check_backend(own, "inductor", "segmented", kernels=True)


@pytest.mark.parametrize(
    ("budget", "values"), [("uniform", (0.0, 0.85)), (0.25, (0.0, 0.75)), (1, (0.0,)), ("growth", None)]
)
def test_budgets(budget: str | float, values: tuple[float, ...] | None) -> None:
    found = variant_of("sla", budget=budget).table().values
    assert found == (load_variant("long").table().values if values is None else values)


def test_one_stage_has_no_choice_of_frames() -> None:
    assert load_variant("long").frame_choice == (3, 1, 1)
    assert variant_of("sla").frame_choice == (9, 0, 0)


@pytest.mark.parametrize(
    ("variant", "change"),
    [
        (variant_of("sta"), "target"),
        (variant_of("dense"), "base"),
        (variant_of("sla", budget=0.3), "target"),
        (variant_of("sla"), "keep_frames"),
        (variant_of("radial"), "near_frames"),
    ],
)
def test_what_a_method_does_not_look_at_is_refused(variant: Variant, change: str) -> None:
    with pytest.raises(
        InputError, match=f"the policy {variant.attention.policy} .* does not look at {change}"
    ):
        variant.changed(**{change: 0.5 if change in ("target", "base") else 3})


def test_a_budget_by_the_table_takes_another_sparsity() -> None:
    assert variant_of("sla").changed(target=0.5).sparsity.target == 0.5
    assert variant_of("sta").changed(window_frames=9).window_frames == 9


def test_windows_fit_the_heads() -> None:
    plan = functools.partial(StepPlan.of, PRESETS["tiny"], height=128, width=128, block_q=32, block_k=32)
    with pytest.raises(ConfigError, match="3 windows; expected one, or one for each of the 2 heads of tiny"):
        plan(variant_of("sta", windows=((1, 1, 1),) * 3))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"policy": "monarch"}, "monarch"),
        ({"policy": "sta", "windows": ((2, 1, 1),)}, "expected odd numbers of tiles"),
        ({"policy": "sta", "decay": 0.2}, "decay"),
        ({"policy": "radial", "decay": 0}, "decay"),
        ({"policy": "sparge", "mode": "top-p"}, "mode"),
        ({"policy": "sla", "budget": 0}, "budget"),
        ({"policy": "vmoba", "mode": "top-k", "tops": (3,)}, "1 tops for 3 blocks"),
    ],
)
def test_bad_methods_are_refused_by_name(document: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Variant.model_validate(load_variant("short").model_dump() | {"attention": document})


def test_a_file_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.toml"
    lines = [
        'schema_version = 1\nname = "mine"\ntitle = "Tiles"',
        '[attention]\npolicy = "sta"\nwindows = [[3, 3, 3]]\ntile = [4, 4]',
        "[sparsity]\ntarget = 0.88\nbase = 0.98\ntable_frames = 21",
        "[cache]\nsink_frames = 1",
    ]
    path.write_text("\n".join(lines))
    method = load_variant(str(path)).attention
    assert (method.policy, method.windows, method.tile) == ("sta", ((3, 3, 3),), (4, 4))
    arguments = ["build", "--gpu", "rtx5090", "--variant", str(path), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--policy", "monarch"]) == 2
    assert "unknown policy 'monarch'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("policy", "parameters"),
    [
        ("sta", {"windows": ((3, 1, 3), (5, 3, 1)), "tile": (3, 2), "sink_frames": 1}),
        ("sta", {"windows": ((99, 3, 1),), "tile": (4, 5)}),
        ("radial", {"decay": 0.7, "sink_frames": 0}),
        ("radial", {"sink_frames": 2}),
    ],
)
@pytest.mark.parametrize("past", [0, 1, 4, 9])
def test_planned_shares_are_what_the_oracle_sees(policy: str, parameters: dict[str, Any], past: int) -> None:
    """On frames of 6 x 10 tokens: no multiple of tiles or blocks."""
    method, geometry = variant_of(policy, **parameters).attention, BlockGeometry(60, 8, 7)
    share = own_share(method, geometry, (6, 10), past, 3)
    case = brute_force.random_case(
        np.random.default_rng(0), frame_tokens=60, block_q=8, block_k=7, past=past, poison=False
    )
    oracle = ORACLES[operator_of(method)]
    assert isinstance(oracle, MethodOperator)
    attributes = {"frame_tokens": 60, "block_q": 8, "block_k": 7, "scale": 1.0}
    seen = oracle.visible(
        *map(torch.from_numpy, case.inputs.values()), **attributes, **method_attributes(method, 0, 10)
    )
    assert share == Share(pytest.approx(float(seen.float().mean()), rel=1e-6))
