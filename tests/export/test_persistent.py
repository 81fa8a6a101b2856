"""Bundles with a persistent set of blocks: rollouts, switches, sessions and plans, on the host and a simulated GPU."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from export.cli.main import main
from export.compare.attention_map import attention_maps
from export.compare.reference import Reference
from export.errors import InputError
from export.estimate.memory import plan_memory
from export.request.plan import PlanRequest
from export.request.targets import Variant, load_target, load_variant
from lightforcing_ref.config import PRESETS
from lightforcing_ref.policies import PersistentSet
from runtime.backends import load_engine
from runtime.bundle import Bundle, Manifest, load_bundle
from runtime.bundle.golden import ComponentRunner, GoldenVectors
from runtime.cuda.runner import CudaComponentRunner
from runtime.host.runner import HostRunner
from runtime.program.attention import persist_work
from runtime.program.buffers import plan_buffers
from runtime.program.program import KernelLaunch, View
from runtime.rollout import most_start_frames
from runtime.verify.dry_run import dry_run
from tests.conftest import build, shared
from tests.runtime.program.test_program_engine import Load, OnGpu, embedding, opened

CHUNKS = 6
"""One sink, two persistent frames and six recent ones: the third chunk is the first that chooses."""
ROUNDING = 1e-4
"""Of float32 in latents around one."""


def variant(**parameters: Any) -> Variant:
    """The window's sinks of the long variant, and four blocks a frame."""
    document = load_variant("long").model_dump() | {"block": 16}
    return Variant.model_validate(
        document | {"attention": {"policy": "pbsa", "persistent_frames": 2, "budget": 0.5, **parameters}}
    )


@pytest.fixture(scope="session")
def pbsa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared(
        tmp_path_factory,
        "tiny-pbsa-segments",
        lambda out: build(out, "pbsa", variant=variant(), execution="segmented"),
    )


@functools.cache
def expected(path: Path, switch: str | None = None, **parts: Any) -> np.ndarray:
    """Latents of the reference."""
    manifest = load_bundle(path).manifest
    reference = Reference.of(manifest)
    rollout = reference.rollout(manifest, torch.from_numpy(embedding(path, 0)), 3)
    if parts:
        rollout = replace(rollout, **parts)
    latents = list(rollout.stream(4))
    if switch is not None:
        rollout.set_prompt(torch.from_numpy(embedding(path, 1)), switch)  # type: ignore[arg-type]
    latents += rollout.stream(CHUNKS - 4)
    return torch.stack(latents).numpy()


def clip(load: Load, path: Path, switch: str | None = None) -> np.ndarray:
    """Latents through the runtime."""
    with (
        opened(load, path) as pipe,
        pipe.session(embedding=embedding(path, 0), seed=3, latents=True) as session,
    ):
        if switch is not None:
            session.set_prompt(embedding=embedding(path, 1), recache=switch, at=4)
        return np.stack([chunk.latent for chunk in session.stream(chunks=CHUNKS)])


@pytest.mark.parametrize(
    "switch",
    [
        None,
        "window",
        "all",
        *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("none", "flush", "cut")),
    ],
)
def test_a_bundle_rolls_out_as_the_reference(pbsa: Path, switch: str | None) -> None:
    """From embedding to latents, past several evictions, whatever a switch does to the set."""
    manifest = load_bundle(pbsa).manifest
    assert (manifest.window_frames, manifest.persistent_frames, manifest.cache.max_past_frames) == (9, 2, 6)
    assert np.abs(clip(load_engine, pbsa, switch) - expected(pbsa, switch)).max() < ROUNDING


@pytest.mark.parametrize("other", [PersistentSet(2, "shared"), PersistentSet(2, "own", "peak")])
def test_another_choice_makes_another_clip(pbsa: Path, other: PersistentSet) -> None:
    """What the test above would not see, were nothing chosen."""
    one, two = expected(pbsa), expected(pbsa, persistent=other)
    assert np.abs(one - two).max() > 20 * ROUNDING
    # The first three chunks see frames as they were.
    assert np.array_equal(one[:3], two[:3])


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "score"), [("shared", "sum"), ("own", "peak")])
def test_other_rules_in_a_bundle(tmp_path: Path, heads: str, score: str) -> None:
    path = build(
        tmp_path, "rules", variant=variant(heads=heads, score=score, budget="uniform"), execution="whole"
    )
    assert np.abs(clip(load_engine, path) - expected(path)).max() < ROUNDING


def test_streams_and_graphs_change_no_bit(pbsa: Path) -> None:
    assert np.array_equal(clip(OnGpu(1, 0.3), pbsa, "window"), clip(load_engine, pbsa, "window"))


def test_sessions_have_sets_of_their_own_and_keep_them(pbsa: Path, tmp_path: Path) -> None:
    """Two sessions that take turns, one of them saved after it has chosen and resumed in another place."""
    with opened(load_engine, pbsa, 3) as pipe:
        with pipe.session(embedding=embedding(pbsa, 0), seed=3) as session:
            alone = [chunk.frames for chunk in session.stream(chunks=CHUNKS)]
        with (
            pipe.session(embedding=embedding(pbsa, 0), seed=3) as one,
            pipe.session(embedding=embedding(pbsa, 2), seed=4) as other,
        ):
            streams = one.stream(), other.stream()
            found = []
            for _ in range(4):
                found.append(next(streams[0]).frames)
                next(streams[1])
            one.save(tmp_path / "state.lfs")
            with pipe.resume(tmp_path / "state.lfs") as resumed:
                found += [chunk.frames for chunk in resumed.stream(chunks=CHUNKS - 4)]
    assert np.array_equal(np.concatenate(found), np.concatenate(alone))


def test_a_dry_run_walks_it(pbsa: Path) -> None:
    bundle = load_bundle(pbsa)
    costs = {cost.name: cost for cost in dry_run(bundle).forwards}
    assert list(costs).index("clean") < list(costs).index("persist") < list(costs).index("commit")
    assert costs["persist"].kernel_launches == 3 * bundle.manifest.model.layers, "score, weigh, persist"
    assert costs["persist"].fed_bytes == 8


@pytest.mark.parametrize("sessions", [1, 2])
def test_planned_buffers_are_those_of_the_runtime(pbsa: Path, sessions: int) -> None:
    whole = load_bundle(pbsa, verify=False).manifest.model_copy(update={"segments": None})
    tiny, real = PRESETS["tiny"], plan_buffers(whole, sessions)
    request = PlanRequest(load_target("cpu"), variant(), tiny, tiny.height, tiny.width, "fp32")
    plan = plan_memory(request, sessions)
    assert plan.group("cache") + plan.group("buffers") == real.total_bytes
    assert plan.per_session == real.session_bytes
    items = {item.name: item.bytes for item in plan.items}
    # 6 layers, 2 frames, keys and values of 64 tokens of 128 channels in float32.
    assert items["keys and values of persistent blocks"] == 6 * 2 * 2 * 64 * 128 * 4


def test_as_published_by_default() -> None:
    """A set of 6 frames, a window of 6 with the chunk in it, 25 % of its blocks, on any variant with its sink."""
    made = load_variant("short").with_policy("pbsa")
    assert (made.window_frames, made.max_past_frames, made.cache.sink_frames) == (13, 10, 1)
    assert made.table().values == (0.0, 0.75)
    growth = Variant.model_validate(
        load_variant("short").model_dump() | {"attention": {"policy": "pbsa", "budget": "growth"}}
    )
    assert len(growth.table().values) == 7
    assert not made.is_dense
    with pytest.raises(InputError, match=r"pbsa .* does not look at window_frames"):
        made.changed(window_frames=9)


def test_methods_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    """Chunks 2 to 7 of `wan-1.3b`, 24 blocks a frame: past frames are 3, 6, 9, 10, 10 and 10."""
    arguments = ["plan", "--gpu", "rtx5090", "--preset", "wan-1.3b", "--precision", "bf16", "--json"]
    assert main([*arguments, "--policies", "pbsa"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    # One sink; virtual frames are what is past beyond it and three; a quarter of the 5 or 6 others, whole blocks.
    seen = [
        24 * pinned + recent * 24 // 4 for pinned, recent in ((1, 5), (3, 6), (6, 6), (7, 6), (7, 6), (7, 6))
    ]
    total = [24 * frames for frames in (6, 9, 12, 13, 13, 13)]
    assert row["seen"] == pytest.approx(sum(seen) / sum(total))
    assert row["seen_last"] == pytest.approx(seen[-1] / total[-1])
    assert row["assumption"] is None


def test_maps_show_what_is_pinned(pbsa: Path) -> None:
    maps = attention_maps(pbsa, chunks=5, layers=(2,))
    last = maps.chunks[4][2]
    assert last.shape == (2, 12, 9 * 4)
    assert (last[..., :12] == 1).all(), "one sink, two virtual frames"
    assert (last[..., 12:].sum(-1) == 12).all(), "half of the blocks of six frames"


def test_inspect_and_compare(pbsa: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(pbsa), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    rows = document["sparsity_per_chunk"]
    assert [(row["kept"], row["of"]) for row in rows[:5]] == [
        (12, 12),
        (14, 24),
        (24, 36),
        (24, 36),
        (24, 36),
    ]
    assert main(["compare", str(pbsa), "--policies", "hsa,pbsa", "--chunks", "4"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    # 14 of 24, 24 of 36 and 24 of 36; the clean forwards of the first two count, too.
    assert f"pbsa {(5 * 14 / 24 + 9 * 24 / 36) / 14:.1%}" in text


def test_a_start_is_no_longer_than_what_is_recent(pbsa: Path) -> None:
    """Four recent frames are one whole chunk: nine pixel frames."""
    assert most_start_frames(load_bundle(pbsa).manifest) == 9


def on_gpu_runner(bundle: Bundle) -> CudaComponentRunner:
    """The runner of a GPU's bundle; the simulated launches are told the shapes of what they get."""
    load = OnGpu()
    load(bundle, plan_buffers(bundle.manifest, 1))
    described, manifest = bundle.component("persist"), bundle.manifest
    slots = manifest.cache.max_past_frames
    views = {
        spec.name: View(
            spec.name, spec.dtype, tuple(slots if dim == "slots" else int(dim) for dim in spec.shape)
        )
        for spec in described.inputs
    }
    views |= {name: View(name, *of_work) for name, of_work in persist_work(manifest).items()}
    launch = load.executor.launch

    def told(operation: KernelLaunch, addresses: Mapping[str, int], stream: int) -> None:
        launch(replace(operation, buffers=views), addresses, stream)

    load.executor.launch = told
    return CudaComponentRunner(bundle, load.driver, load.executor)


@pytest.mark.parametrize("where", [HostRunner, on_gpu_runner])
def test_golden_vectors_judge_the_choice(pbsa: Path, where: Callable[[Bundle], ComponentRunner]) -> None:
    """The set passes bit by bit; one block that another one stands for is far from passing."""
    bundle = load_bundle(pbsa)
    runner = where(bundle)
    with GoldenVectors(bundle) as vectors:
        (case,) = (case for case in vectors.cases if case.component == "persist")
        inputs = vectors.inputs(case)
        kept, evicted = inputs["contest"]
        assert (kept, evicted) == (2, 3)
        given = {name: value.copy() for name, value in inputs.items()}
        outputs = runner.run("persist", inputs)
        assert all(np.array_equal(inputs[name], given[name]) for name in given), "inputs stay as they are"
        assert vectors.errors(case, outputs) == dict.fromkeys(("kept_k", "kept_v", "kept_kmean"), 0.0)
        first = given["frame_slots"][1:3]
        assert not np.array_equal(outputs["kept_k"], given["past_k"][first]), "some blocks go"
        outputs["kept_v"][0, :16, 0] = given["past_v"][first[0], 16:32, 0]
        assert vectors.errors(case, outputs)["kept_v"] > 100 * vectors.tolerances["persist"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"local_frames": 5}, "local_frames is 5; expected at least two chunks of 3"),
        ({"persistent_frames": 0}, "persistent_frames"),
        ({"heads": "some"}, "heads"),
        ({"score": "mean"}, "score"),
    ],
)
def test_bad_parameters_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        variant(**change)


def test_manifests_that_cannot_be(pbsa: Path) -> None:
    manifest = load_bundle(pbsa).manifest
    joint = manifest.cache.model_copy(update={"recache": "joint", "sink_frames": 3})
    narrow = manifest.cache.model_copy(update={"window_frames": 8, "max_past_frames": 5})
    for cache in (joint, narrow):
        with pytest.raises(ValidationError, match=r"pbsa|joint"):
            Manifest.model_validate(manifest.model_copy(update={"cache": cache}).model_dump())
    with pytest.raises(ValidationError, match=r"joint.*full attention"):
        document = variant().model_dump()
        Variant.model_validate(document | {"cache": document["cache"] | {"recache": "joint"}})
