"""Prompt switches by one joint forward: a bundle of the exporter, on the host and on a simulated GPU."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from export.build import BuildRequest, check_build
from export.cli.arguments import build_request
from export.cli.main import _parser
from export.compare.against_reference import decoded
from export.compare.reference import Reference
from export.errors import InputError
from export.estimate.memory import plan_memory
from export.request.plan import PlanRequest
from export.request.targets import load_target, load_variant
from export.tolerances import CODES
from lightforcing_ref.config import PRESETS
from runtime import InputError as RuntimeInputError
from runtime.backends import load_engine
from runtime.bundle import Manifest, load_bundle
from runtime.program.buffers import plan_buffers
from runtime.verify.dry_run import dry_run
from tests.conftest import build
from tests.runtime.program.test_program_engine import Load, OnGpu, embedding, opened


@pytest.fixture(scope="module")
def longlive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("longlive"), "longlive", execution="segmented")


@pytest.fixture(scope="module")
def longlive_codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    variant = load_variant("longlive").holding("fp8")
    return build(tmp_path_factory.mktemp("longlive"), "longlive-kv8", variant=variant, execution="segmented")


def clip(load: Load, path: Path, switch_at: int, recache: str | None = None) -> np.ndarray:
    with opened(load, path) as pipe, pipe.session(embedding=embedding(path, 0), seed=3) as session:
        assert session.set_prompt(embedding=embedding(path, 1), recache=recache, at=switch_at) == switch_at
        return np.concatenate([chunk.frames for chunk in session.stream(chunks=switch_at + 2)])


@pytest.mark.parametrize("switch_at", [2, 5])
def test_a_bundle_recomputes_jointly_as_the_reference_does(longlive: Path, switch_at: int) -> None:
    """At chunk 2 all frames are recomputed, the sinks too; at chunk 5 the nine behind the sinks."""
    manifest = load_bundle(longlive).manifest
    assert manifest.cache.recache == "joint"
    reference = Reference.of(manifest)
    rollout = reference.rollout(manifest, torch.from_numpy(embedding(longlive, 0)), 3)
    latents = list(rollout.stream(switch_at))
    rollout.set_prompt(torch.from_numpy(embedding(longlive, 1)), "joint")
    latents += rollout.stream(2)
    expected = decoded(reference, torch.cat(latents, dim=1)).astype(int)
    found = clip(load_engine, longlive, switch_at)
    assert np.abs(found.astype(int) - expected).max() <= 1
    causal = clip(load_engine, longlive, switch_at, "window")
    assert np.array_equal(found[:-24], causal[:-24])
    assert not np.array_equal(found, causal)


@pytest.mark.slow
def test_codes_are_recomputed_jointly_as_in_the_reference(longlive_codes: Path) -> None:
    """Chunks of a joint forward see each other's keys and values as the cache holds them, with `--kv fp8` as codes."""
    manifest = load_bundle(longlive_codes).manifest
    assert (manifest.cache.recache, manifest.cache.kv) == ("joint", "fp8")
    rollout = Reference.of(manifest).rollout(manifest, torch.from_numpy(embedding(longlive_codes, 0)), 3)
    latents = list(rollout.stream(5))
    switched = torch.from_numpy(embedding(longlive_codes, 1))
    rollout.set_prompt(switched, "joint")
    expected = torch.cat([*latents, *rollout.stream(1)], dim=1).numpy()
    with (
        opened(load_engine, longlive_codes) as pipe,
        pipe.session(embedding=embedding(longlive_codes, 0), seed=3, latents=True) as session,
    ):
        session.set_prompt(embedding=embedding(longlive_codes, 1), at=5)
        made = list(session.stream(chunks=6))
    found = np.concatenate([chunk.latent for chunk in made if chunk.latent is not None], axis=1)
    # A code that falls between two is rounded either way; its error is that of one code among many.
    assert np.linalg.norm(found - expected) < CODES * np.linalg.norm(expected)
    frames = np.concatenate([chunk.frames for chunk in made])
    assert np.array_equal(clip(OnGpu(2, 0.3), longlive_codes, 5)[: len(frames)], frames)
    dry_run(load_bundle(longlive_codes))


def test_streams_and_graphs_change_no_bit(longlive: Path) -> None:
    assert np.array_equal(clip(OnGpu(1, 0.3), longlive, 5), clip(load_engine, longlive, 5))


def test_a_dry_run_walks_it(longlive: Path) -> None:
    bundle = load_bundle(longlive)
    costs = {cost.name: cost for cost in dry_run(bundle).forwards}
    layers = bundle.manifest.model.layers
    # Four chunks at most; every layer of each but the last is prepared after the attention of the one before.
    assert [name for name in costs if name.startswith("joint.")] == [f"joint.{n}" for n in (1, 2, 3, 4)]
    assert costs["joint.4"].engine_runs == 4 * (layers + layers + (layers - 1))
    assert costs["joint.4"].kernel_launches == 3 * layers


def test_memory_plans_count_it(longlive: Path) -> None:
    manifest = load_bundle(longlive).manifest
    buffers = {buffer.name: buffer.nbytes for buffer in plan_buffers(manifest, 1).work}
    preset, variant = PRESETS["tiny"], load_variant("longlive").model_copy(update={"block": 32})
    request = PlanRequest(load_target("rtx5090"), variant, preset, preset.height, preset.width, "fp32")
    planned = {item.name: item.bytes for item in plan_memory(request).items}
    found = sum(size for name, size in buffers.items() if name.startswith("joint."))
    assert planned["chunks that are recomputed at once"] == found
    window = replace(request, variant=load_variant("dense"))
    assert "chunks that are recomputed at once" not in {item.name for item in plan_memory(window).items}


def test_only_where_it_can_be(longlive: Path, tiny_bundle: Path) -> None:
    manifest = load_bundle(longlive).manifest
    for change in ({"segments": None}, {"cache": manifest.cache.model_copy(update={"sink_frames": 2})}):
        with pytest.raises(ValueError, match="is 'joint', which needs"):
            Manifest.model_validate(manifest.model_copy(update=change).model_dump())
    with (
        opened(load_engine, tiny_bundle) as pipe,
        pipe.session(embedding=embedding(tiny_bundle, 0)) as session,
    ):
        with pytest.raises(RuntimeInputError, match="expected one of window, all, none, flush, cut"):
            session.set_prompt(embedding=embedding(tiny_bundle, 0), recache="joint")
        with pytest.raises(RuntimeInputError, match="a cut is at one chunk"):
            session.set_prompt(embedding=embedding(tiny_bundle, 0), recache="cut", over=2)


def test_a_whole_graph_is_refused_and_told_what_to_do(tmp_path: Path) -> None:
    common = ("build", "--gpu", "cpu", "--variant", "longlive", "--out", str(tmp_path))

    def request(*more: str) -> BuildRequest:
        args = _parser().parse_args([*common, *more])
        args.command_line = ""
        return build_request(args)[0]

    assert (request().execution, request().variant.cache.recache) == ("segmented", "joint")
    with pytest.raises(InputError, match=r"--execution segmented.*or .* chunk by chunk: --recache window"):
        check_build(request("--execution", "whole"))
    window = request("--recache", "window")
    assert (window.execution, window.variant.name) == ("whole", "longlive-window")
    assert check_build(window).request.plan.manifest_sections()["cache"].recache == "window"
    with pytest.raises(InputError, match=r"variant 'dense' with --recache joint.*whole chunks"):
        load_variant("dense").switching("joint")
    assert load_variant("dense").switching("window") == load_variant("dense")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("target = 0.0", "target = 0.5", "joint.*full attention"),
        ("sink_frames = 3", "sink_frames = 2", "no whole chunks of 3"),
        ('"absolute"', '"window"', "sinks that stay where they are"),
        ('recache = "joint"', 'recache = "some"', "cache.recache"),
    ],
)
def test_variants_that_cannot_be(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = resources.files("engines").joinpath("variants/longlive.toml").read_text().replace(old, new)
    (tmp_path / "mine.toml").write_text(text.replace("base = 0.0", "base = 0.6"))
    with pytest.raises(InputError, match=message):
        load_variant(str(tmp_path / "mine.toml"))
