"""Checkpoints with the projections of SLA's linear branch: what is built of them, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.build import BuildRequest, check_build
from export.errors import InputError
from export.estimate.roofline import Workload
from export.request.methods import check_backend, operator_of
from export.request.plan import PlanRequest
from export.request.targets import Variant, load_target, load_variant
from export.request.weights import Weights, shipped_weights
from lightforcing_ref.config import PRESETS
from plugins import contract
from runtime.bundle.policies import SlaPolicy


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """The shipped tiny model with projections, under the names that TurboDiffusion's files have."""
    files = shipped_weights(PRESETS["tiny"], dense=False)
    assert files is not None and files.checkpoint is not None
    state = {key: value.clone() for key, value in load_file(files.checkpoint).items()}
    generator = torch.Generator().manual_seed(2)
    for layer in range(6):
        stem = f"blocks.{layer}.self_attn.attn_op.local_attn.proj_l"
        state[f"{stem}.weight"] = 0.1 * torch.randn(64, 64, generator=generator)
        state[f"{stem}.bias"] = 0.1 * torch.randn(64, generator=generator)
    path = tmp_path_factory.mktemp("trained") / "sla.safetensors"
    save_file(state, path)
    return replace(files, checkpoint=path)


def request(weights: Weights, variant: Variant, out: Path) -> BuildRequest:
    return BuildRequest(
        target=load_target("cpu"),
        variant=variant,
        weights=weights,
        height=128,
        width=128,
        backend="onnxruntime",
        precision="fp32",
        out=out,
        name="bundle",
        execution="segmented",
    )


def sla(*, linear: bool = False) -> Variant:
    document = load_variant("short").model_dump() | {"attention": {"policy": "sla", "linear": linear}}
    return Variant.model_validate(document)


def test_the_branch_runs_where_the_checkpoint_has_it(trained: Weights, tmp_path: Path) -> None:
    made = request(trained, sla(), tmp_path)
    assert made.variant.attention == SlaPolicy(linear=True)
    assert operator_of(made.variant.attention) == contract.SPARSE_LINEAR
    assert made.plan.spec.linear_branch
    assert made.plan.manifest_sections()["attention"].method.linear
    check_build(made)
    projection = made.weights.dit(torch.float32).layers[3].self_attn.proj_l
    assert projection is not None and projection.weight.std() == pytest.approx(0.1, rel=0.1)


def test_without_projections_the_branch_is_off(tmp_path: Path) -> None:
    shipped = shipped_weights(PRESETS["tiny"], dense=False)
    for weights in (shipped, Weights(PRESETS["tiny"], seed=1)):
        assert weights is not None
        made = request(weights, sla(), tmp_path)
        assert made.variant.attention == SlaPolicy()
        assert operator_of(made.variant.attention) == contract.HIERARCHICAL_SPARSE_ATTENTION
        assert made.weights.dit(torch.float32).layers[0].self_attn.proj_l is None


@pytest.mark.parametrize("policy", ["hsa", "dense", "sparge"])
def test_another_method_does_not_drop_what_was_trained(policy: str, trained: Weights, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=rf"linear branch .*which the policy {policy} does not run; use --policy sla"
    ):
        check_build(request(trained, load_variant("short").with_policy(policy), tmp_path))


def test_a_branch_without_projections_is_refused(tmp_path: Path) -> None:
    shipped = shipped_weights(PRESETS["tiny"], dense=False)
    assert shipped is not None
    with pytest.raises(
        InputError, match=r"no projection for it \(blocks.N.self_attn.proj_l\); drop linear = true"
    ):
        check_build(request(shipped, sla(linear=True), tmp_path))


def test_keys_in_eight_bits_have_no_linear_branch(trained: Weights, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not there over keys and values in fp8; drop --kv fp8"):
        check_build(request(trained, sla().holding("fp8"), tmp_path))


def test_the_plugin_has_no_kernel_for_it() -> None:
    method = SlaPolicy(linear=True)
    for backend in ("onnxruntime", "tensorrt-rtx", "inductor"):
        check_backend(method, backend, "segmented", kernels=backend != "onnxruntime")
    with pytest.raises(
        InputError, match=r"tensorrt has no kernel for SLA's linear branch.*use --backend onnxruntime"
    ):
        check_backend(method, "tensorrt", "whole", kernels=True)


@pytest.mark.parametrize(("chunk", "frames"), [(0, 3), (1, 6), (9, 21)])
def test_predictions_count_the_branch(chunk: int, frames: int) -> None:
    """Frames of 64 tokens, two heads of 64: states of 8192 numbers; keys, queries and the projection multiply them."""
    work = Workload(PlanRequest(load_target("h200"), sla(linear=True), PRESETS["tiny"], 128, 128, "bf16"))
    found = work.linear_branch(chunk)
    assert found.flops == 2 * (64 * frames + 192 + 64) * 8192
    # Keys and values once, the queries, and the output read and written, in bf16; the states in float32, twice.
    assert found.bytes == 2 * 128 * (2 * 64 * frames + 3 * 192) + 2 * 4 * 8192 * frames
    assert list(work.forward(chunk)).count(found) == 6
