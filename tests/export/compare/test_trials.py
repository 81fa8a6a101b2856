"""What is compared on, limits by output, memory; and the shipped model in every precision, right and wrong."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

import export.compare.against_precisions as against_precisions
import export.graph.components as components
from export.build import BuildRequest, build_bundle
from export.compare.against_precisions import compare_precisions
from export.compare.against_reference import measure
from export.compare.reference import Reference
from export.compare.result import difference
from export.compare.trials import SEED, Trials, check_memory
from export.errors import ComparisonError
from export.graph.modules import merge_qkv
from export.quantize.cost import perturbed
from export.request.targets import load_target, load_variant
from export.request.weights import shipped_weights
from lightforcing_ref.config import PRESETS
from lightforcing_ref.shipped import CAPTIONS
from runtime.bundle import Checkpoint, load_bundle
from runtime.host_memory import memory


def test_what_is_played_by_default_is_what_the_weights_know(tiny_bundle: Path) -> None:
    manifest = load_bundle(tiny_bundle, verify=False).manifest
    assert Trials.of(manifest) == Trials(("a red square moves right",), SEED)
    assert Trials.of(manifest, ("one", "two"), 7) == Trials(("one", "two"), 7)
    origin = Checkpoint(source="shipped:tiny", sha256="0" * 64)
    provenance = manifest.provenance.model_copy(update={"checkpoint": origin})
    shipped = manifest.model_copy(update={"provenance": provenance})
    assert Trials.of(shipped) == Trials((CAPTIONS["tiny"],), SEED)


def test_memory_is_estimated_before_anything_is_loaded(tiny_bundle: Path) -> None:
    manifest = load_bundle(tiny_bundle, verify=False).manifest
    assert check_memory(manifest, PRESETS["tiny"], 5) < 3 << 30
    free = memory().available
    assert free is not None
    with pytest.raises(ComparisonError, match=r"takes about [\d.]+ GiB of memory and .* are free"):
        check_memory(manifest, PRESETS["tiny"], free / 1e6)


class Constant:
    """A runner that gives what it was made with, as Polygraphy's do."""

    def __init__(self, **values: float) -> None:
        self.values = {name: np.array([value]) for name, value in values.items()}
        self.fed: list[object] = []

    def __enter__(self) -> Constant:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def infer(self, feed: object) -> dict[str, np.ndarray]:
        self.fed.append(feed)
        return self.values


def test_the_worst_output_is_the_one_furthest_past_its_own_limit() -> None:
    right, other = Constant(a=1.0, b=1.0), Constant(a=1.3, b=1.2)
    limits = {"a": 0.5, "b": 0.1}
    found = measure([right, other], iter([{}, {}]), scope="step", name="x", tolerance=limits)  # type: ignore[list-item]
    assert (found.row.output, found.row.tolerance, found.row.runs) == ("b", 0.1, 2)
    assert found.row.relative == pytest.approx(0.2) and not found.row.passed
    alike = measure([right, other], [{}], scope="step", name="x", tolerance=0.5)  # type: ignore[list-item]
    assert alike.row.output == "a" and alike.row.passed
    broken = Constant(a=1.3, b=float("nan"))
    assert measure([right, broken], [{}], scope="step", name="x", tolerance=9.0).row.output == "b"  # type: ignore[list-item]


def test_noise_is_as_large_as_asked_for(tiny_bundle: Path) -> None:
    model = copy.deepcopy(Reference.of(load_bundle(tiny_bundle, verify=False).manifest).model)
    merge_qkv(model)
    linear = model.get_submodule("blocks.2.ffn.0")
    x = torch.randn(50, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = linear(x)
        with perturbed(model, {"blocks.2.ffn.0": 0.125}):
            first, second = linear(x), linear(x)
        for found in (first, second):
            assert difference(found.numpy(), expected.numpy()).relative == pytest.approx(0.125, rel=1e-4)
        assert not torch.equal(first, second)
        assert torch.equal(linear(x), expected)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model, dense."""
    preset = PRESETS["tiny"]
    weights = shipped_weights(preset, dense=True)
    assert weights is not None
    request = BuildRequest(
        target=load_target("cpu"),
        variant=load_variant("dense"),
        weights=weights,
        height=preset.height,
        width=preset.width,
        backend="onnxruntime",
        precision="fp32",
        out=tmp_path_factory.mktemp("trained"),
        name="trained",
    )
    return build_bundle(request)


@pytest.mark.slow
def test_the_shipped_model_passes_in_every_precision(trained: Path) -> None:
    prompts = (CAPTIONS["tiny"], "a blue circle on white bounces left from the bottom")
    found = compare_precisions(trained, ["bf16", "fp8", "nvfp4"], chunks=2, prompts=prompts)
    assert len(found.rows) == 27 and found.passed, [row for row in found.rows if not row.passed]
    assert {row.runs for row in found.rows if row.scope == "step"} == {16}
    assert {row.runs for row in found.rows if row.scope == "rollout"} == {2}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blocks.3.ffn.2", "blocks.1.self_attn.o", "blocks.4.cross_attn.q"])
def test_a_wrong_layer_of_the_shipped_model_is_found(
    trained: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_step = components.write_step

    def wrong(folder: Path, model: torch.nn.Module, *arguments: object, **options: object) -> object:
        with torch.no_grad():
            weight = model.get_submodule(name).weight
            weight.copy_(weight.roll(1, 0))
        return write_step(folder, model, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(against_precisions, "write_step", wrong)
    found = compare_precisions(trained, ["bf16", "fp8"], chunks=1)
    assert [row.passed for row in found.rows if row.scope == "step"] == [False, False]
