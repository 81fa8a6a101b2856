"""Rolling rollouts: a bundle of the exporter, on the host and on a simulated GPU."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from export.build import BuildRequest, check_build
from export.compare.against_reference import against_reference
from export.compare.attention_map import attention_maps
from export.compare.reference import Reference
from export.errors import ComparisonError, InputError
from export.estimate.efficiency import measured
from export.estimate.memory import plan_memory
from export.estimate.roofline import Workload
from export.request.plan import PlanRequest
from export.request.targets import load_target, load_variant
from export.request.weights import Weights
from lightforcing_ref.config import PRESETS
from lightforcing_ref.rolling import ROLLING_STEPS
from runtime import InputError as RuntimeInputError
from runtime.backends import load_engine
from runtime.bundle import Manifest, load_bundle
from runtime.cli.main import main as runtime
from runtime.program.buffers import plan_buffers
from runtime.verify.dry_run import dry_run
from tests.conftest import build
from tests.runtime.program.test_program_engine import Load, OnGpu, embedding, opened

CHUNKS = (
    9  # the anchor leaves the clean forward's sight at chunk 7, and the oldest frames the cache at chunk 8
)


@pytest.fixture(scope="module")
def rolling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("rolling"), "rolling", execution="segmented")


def video(
    load: Load, path: Path, chunks: int = CHUNKS, switch_at: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Latents `[channels, frames, h, w]` and frames of one session."""
    with (
        opened(load, path) as pipe,
        pipe.session(embedding=embedding(path, 0), seed=3, latents=True) as session,
    ):
        if switch_at is not None:
            session.set_prompt(embedding=embedding(path, 1), at=switch_at)
        made = list(session.stream(chunks=chunks))
    latents = [chunk.latent for chunk in made if chunk.latent is not None]
    return np.concatenate(latents, axis=1), np.concatenate([chunk.frames for chunk in made])


@functools.cache
def on_host(path: Path, chunks: int = CHUNKS, switch_at: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    return video(load_engine, path, chunks, switch_at)


def expected(path: Path, chunks: int = CHUNKS, switch_at: int | None = None) -> np.ndarray:
    manifest = load_bundle(path).manifest
    rollout = Reference.of(manifest).rolling(manifest, torch.from_numpy(embedding(path, 0)), 3)
    made, latents = rollout.generate(), []
    for chunk in range(chunks):
        if chunk == switch_at:
            rollout.set_prompt(torch.from_numpy(embedding(path, 1)))
        latents.append(next(made))
    return torch.cat(latents, dim=1).numpy()


@pytest.mark.parametrize(("chunks", "switch_at"), [(CHUNKS, None), (2, 1)])
def test_a_bundle_rolls_as_the_reference_does(rolling: Path, chunks: int, switch_at: int | None) -> None:
    """Latents, every one of them, and their number of frames of video; a new prompt changes all that leave later."""
    found, frames = on_host(rolling, chunks, switch_at)
    wanted = expected(rolling, chunks, switch_at)
    assert found.shape == wanted.shape
    assert np.linalg.norm(found - wanted) < 1e-4 * np.linalg.norm(wanted)
    assert len(frames) == 9 + 12 * (chunks - 1)
    if switch_at:
        plain = on_host(rolling)[0][:, : 3 * chunks]
        assert np.array_equal(found[:, : 3 * switch_at], plain[:, : 3 * switch_at])
        assert not np.array_equal(found[:, 3 * switch_at :], plain[:, 3 * switch_at :])


@pytest.mark.slow
def test_it_passes_the_comparison_with_the_reference(rolling: Path) -> None:
    """Prompts to pixels through the runtime, and the step alone."""
    found = against_reference(rolling, chunks=1, tolerance=1e-4)
    assert found.passed, [row for row in found.rows if not row.passed]


def test_streams_and_graphs_change_no_bit(rolling: Path) -> None:
    """Sessions share the slots of the window's chunks; each has its own latents there."""
    latents, frames = video(OnGpu(1, 0.3), rolling, 2)
    assert np.array_equal(latents, on_host(rolling)[0][:, :6])
    assert np.array_equal(frames, on_host(rolling)[1][:21])


def test_sessions_that_take_turns_are_apart(rolling: Path) -> None:
    alone = on_host(rolling)[0][:, :6]
    with opened(load_engine, rolling, sessions=2) as pipe:
        sessions = [
            pipe.session(embedding=embedding(rolling, number), seed=3, latents=True) for number in (0, 1)
        ]
        streams = [session.stream(chunks=2) for session in sessions]
        turns = [[next(stream) for stream in streams] for _ in range(2)]
    assert np.array_equal(np.concatenate([turn[0].latent for turn in turns], axis=1), alone)


def test_a_saved_session_goes_on(rolling: Path, tmp_path: Path) -> None:
    """What is in the window is saved with it."""
    whole = on_host(rolling)[1]
    with opened(load_engine, rolling) as pipe:
        with pipe.session(embedding=embedding(rolling, 0), seed=3) as session:
            next(session.stream(chunks=1))
            session.save(tmp_path / "session")
        with pipe.resume(tmp_path / "session") as session:
            (chunk,) = session.stream(chunks=1)
            assert np.array_equal(chunk.frames, whole[9:21])


def test_noise_of_ones_own_reaches_the_window(rolling: Path) -> None:
    """Window w takes the initial noise of chunk w, and for each chunk before it that of its next step."""
    asked: list[tuple[int, int]] = []
    model = load_bundle(rolling).manifest.model
    shape = (model.latent_channels, model.chunk_frames, model.latent_height, model.latent_width)

    def noise(chunk: int, step: int) -> np.ndarray:
        asked.append((chunk, step))
        return np.zeros(shape, dtype=np.float32)

    with (
        opened(load_engine, rolling) as pipe,
        pipe.session(embedding=embedding(rolling, 0), noise=noise) as session,
    ):
        list(session.stream(chunks=1, ahead=0))
    windows = [[(w, 0), *((w - n + 1, n) for n in range(1, 5) if w - n + 1 >= 0)] for w in range(5)]
    assert asked == [one for window in windows for one in window]


def test_a_dry_run_walks_it(rolling: Path) -> None:
    bundle = load_bundle(rolling)
    costs = {cost.name: cost for cost in dry_run(bundle, sessions=2).forwards}
    layers = bundle.manifest.model.layers
    assert [name for name in costs if name.startswith("window.")] == [f"window.{n}" for n in range(1, 6)]
    assert not any(name.startswith("denoise.") for name in costs)  # nothing is recorded that never runs
    # Each chunk: the segments, and the two operators of every layer; all but the last chunk are committed.
    assert costs["window.5"].engine_runs == 5 * (layers + 1 + 2 * layers)
    assert costs["window.5"].kernel_launches == 4 * layers


def test_memory_plans_count_it(rolling: Path) -> None:
    manifest = load_bundle(rolling).manifest
    preset, variant = PRESETS["tiny"], load_variant("rolling").model_copy(update={"block": 32})
    request = PlanRequest(load_target("rtx5090"), variant, preset, preset.height, preset.width, "fp32")
    planned, buffers = plan_memory(request), plan_buffers(manifest, 1)
    assert planned.per_session == buffers.session_bytes
    items = {item.name: item.bytes for item in planned.items}
    joint = sum(buffer.nbytes for buffer in buffers.work if buffer.name.startswith("joint."))
    assert items["chunks that are denoised at once"] == joint
    # 21 frames of a session and 12 of the window's other chunks, which sessions share.
    assert [buffer.shape[0] for buffer in buffers.pool] == [33] * len(buffers.pool)
    assert [buffer.shape[0] for buffer in plan_buffers(manifest, 3).pool] == [75] * len(buffers.pool)
    pool = sum(buffer.nbytes for buffer in buffers.pool)
    assert items["keys and values of the window's other chunks"] == pool * 12 // 33
    assert plan_buffers(manifest, 3).session_bytes == buffers.session_bytes


def test_a_bench_is_planned_with(rolling: Path, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    arguments = ["--chunks", "1", "--warmup-chunks", "1", "--threads", "1", "--json", str(path)]
    assert runtime(["bench", str(rolling), *arguments]) == 0
    document = json.loads(path.read_text())
    assert (document["frames"], document["chunks"][0]["index"]) == (12, 1)
    document["bundle"] |= {
        "target": {"name": "rtx5090", "compute_capability": "12.0"},
        "backend": "tensorrt-rtx",
        "precision": "bf16",
    }
    path.write_text(json.dumps(document))
    assert measured(path, load_target("rtx5090")).is_measured


def test_work_by_hand() -> None:
    preset = PRESETS["wan-1.3b"]
    request = PlanRequest(load_target("h200"), load_variant("rolling"), preset, 480, 832, "bf16")
    work = Workload(request)

    def forwards(chunk: int) -> float:
        runs = [one for one in work.chunk(chunk) if one.kind == "cross-attention"]
        return len(runs) / preset.dit.layers

    assert forwards(0) == 1 + 2 + 3 + 4 + 5
    assert forwards(8) == pytest.approx(5 + 29 / 30)  # and the clean forward, but for its last layer
    # Windows of the first chunk see nothing but themselves; full ones behind it the anchor and one clean chunk more.
    assert [work.window(0, members) for members in (1, 5)] == [3, 15]
    assert [work.window(chunk, 5) for chunk in (1, 2, 3, 9)] == [18, 21, 21, 21]


def test_the_variant_is_the_published_schedule() -> None:
    variant = load_variant("rolling")
    schedule = variant.schedule
    assert (schedule.steps, schedule.window_chunks, schedule.shift) == (ROLLING_STEPS, 5, 5)
    assert (variant.window_frames, variant.max_past_frames, variant.held_frames) == (21, 18, 21)
    assert "5 chunks at once" in schedule.described


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("target = 0.0", "target = 0.5", "rolling is for full attention, and the policy hsa skips"),
        ("sink_frames = 3", "sink_frames = 1", "cache.sink_frames 3, sink_positions 'window'"),
        ('"window"', '"absolute"', "sink_positions 'window'.*'absolute'"),
        ('recache = "none"', 'recache = "window"', "recache 'none'"),
        ("window_frames = 21", "window_frames = 15", "window_frames is 15; .*, 18 frames or more"),
        ("window_frames = 21", "window_frames = 20", "whole number of chunks"),
        ("rolling = true", "rolling = true\nclean_forward = false", "rolling is for two steps or more"),
        ("rolling = true", "rolling = true\nfirst_steps = [1000]", "rolling is for two steps or more"),
        ("[1000, 800, 600, 400, 200]", "[1000]", "rolling is for two steps or more"),
    ],
)
def test_variants_that_cannot_be(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = resources.files("engines").joinpath("variants/rolling.toml").read_text()
    assert old in text
    (tmp_path / "mine.toml").write_text(text.replace(old, new).replace("base = 0.0", "base = 0.6"))
    with pytest.raises(InputError, match=message):
        load_variant(str(tmp_path / "mine.toml"))


def request(**changes: object) -> BuildRequest:
    preset = PRESETS["tiny"]
    whole = BuildRequest(
        target=load_target("cpu"),
        variant=load_variant("rolling"),
        weights=Weights(preset, seed=0),
        height=preset.height,
        width=preset.width,
        backend="onnxruntime",
        precision="fp32",
        out=Path("."),
        name="rolling",
        execution="segmented",
    )
    return replace(whole, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"execution": "whole"}, "5 chunks in a step.*use --execution segmented"),
        ({"per_chunk": True}, "--per-chunk is for one chunk after the other; leave it out"),
        ({"with_encoder": True}, "--with-encoder is for one chunk after the other"),
        ({"variant": load_variant("rolling").holding("fp8")}, "in the compute type only; drop --kv fp8"),
    ],
)
def test_builds_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_build(request(**changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segments": None}, "found no segments"),
        ({"cache": {"recache": "window"}}, "'window'"),
        ({"sparsity": {"target": 0.5, "base": 0.5}}, "at a sparsity of 0.5"),
        ({"cache": {"sink_frames": 2}}, "sinks that are the first chunk.*2 sinks"),
        ({"cache": {"window_frames": 15, "max_past_frames": 12}}, "18 or more.*a window of 15"),
        ({"schedule": {"clean_forward": False}}, "rolling needs 2 steps or more"),
    ],
)
def test_manifests_that_cannot_be(rolling: Path, change: dict[str, object], message: str) -> None:
    raw = load_bundle(rolling).manifest.model_dump()
    for field, value in change.items():
        raw[field] = {**raw[field], **value} if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=message):
        Manifest.model_validate(raw)


def test_switches_recompute_nothing(rolling: Path) -> None:
    with (
        opened(load_engine, rolling) as pipe,
        pipe.session(embedding=embedding(rolling, 0)) as session,
        pytest.raises(RuntimeInputError, match="'window'; expected one of none with this bundle"),
    ):
        session.set_prompt(embedding=embedding(rolling, 0), recache="window")


def test_what_looks_at_forwards_of_one_chunk_refuses_it(rolling: Path) -> None:
    with pytest.raises(ComparisonError, match="denoises 5 chunks in a forward"):
        attention_maps(rolling, chunks=2)
