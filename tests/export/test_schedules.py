"""Schedules of a variant, from its file to a bundle's frames."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from export.compare.against_reference import against_reference
from export.errors import InputError
from export.estimate.memory import plan_memory
from export.estimate.roofline import Workload
from export.request.plan import PlanRequest
from export.request.schedules import SchedulePolicy
from export.request.targets import load_target, load_variant
from lightforcing_ref.config import PRESETS
from runtime import Pipeline
from runtime.bundle import load_bundle
from runtime.cli.main import main as runtime
from runtime.program.buffers import plan_buffers
from runtime.verify.dry_run import dry_run
from tests.conftest import build

FOUR = (1000, 750, 500, 250)
# name: steps, those of the first chunk, frames of a chunk; configurations of thu-ml/Causal-Forcing
PUBLISHED = {
    "causal-chunkwise": (FOUR, (), 3),
    "causal-framewise": (FOUR, (), 1),
    "causal-framewise-2step": ((1000, 500), FOUR, 1),
    "causal-framewise-1step": ((1000,), FOUR, 1),
}
OWN = """
schema_version = 1
name = "own"
title = "Two steps, one for the first chunk, no clean forward"

[schedule]
steps = [1000, 400]
first_steps = [1000]
shift = 3.0
clean_forward = false

[sparsity]
target = 0.5
base = 0.6
table_frames = 12
keep_frames = 3
sink_frames = 1
near_frames = 1

[cache]
window_frames = 9
sink_frames = 1
sink_positions = "window"
"""


@pytest.fixture(scope="module")
def framewise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("framewise"), "causal-framewise-2step")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cut into segments, by a variant of one's own."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own.toml").write_text(OWN)
    return build(folder, "own", variant=load_variant(str(folder / "own.toml")), execution="segmented")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_schedules(name: str) -> None:
    variant = load_variant(name)
    schedule = variant.schedule
    assert (schedule.steps, schedule.first_steps, schedule.chunk_frames) == PUBLISHED[name]
    assert (schedule.shift, schedule.clean_forward, variant.window_frames) == (5, True, 21)
    assert variant.max_past_frames == 21 - schedule.chunk_frames


def test_variants_without_a_section_are_self_forcings() -> None:
    assert load_variant("short").schedule == SchedulePolicy(steps=FOUR, shift=5, chunk_frames=3)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (("[1000, 400]", "[400, 1000]"), "steps is .400, 1000.; expected timesteps that fall"),
        (("[1000, 400]", "[900, 400]"), "steps begins at 900; expected 1000"),
        (("[1000, 400]", "[1000, 0]"), "schedule.steps.1"),
        (("[1000, 400]", "[]"), "schedule.steps"),
        (("[1000]", "[1000, 1000]"), "first_steps is .1000, 1000."),
        (("shift = 3.0", "shift = 0.5"), "schedule.shift"),
        (("shift = 3.0", "chunk_frames = 2"), "schedule.chunk_frames"),
        (("table_frames = 12", "table_frames = 13"), "whole number of chunks of 3"),
        (
            ("window_frames = 9", "window_frames = 2"),
            "cache.window_frames is 2; expected at least the 3 frames",
        ),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, edit: tuple[str, str], message: str) -> None:
    (tmp_path / "own.toml").write_text(OWN.replace(*edit))
    with pytest.raises(InputError, match=message):
        load_variant(str(tmp_path / "own.toml"))


def test_frames_made_one_by_one_equal_the_reference(framewise: Path) -> None:
    manifest = load_bundle(framewise).manifest
    assert manifest.model.chunk_frames == 1
    assert manifest.schedule.timesteps == pytest.approx((1000, 833.33333, 0))
    assert manifest.schedule.first_timesteps == pytest.approx((1000, 937.5, 833.33333, 625))
    found = against_reference(framewise, chunks=3, tolerance=1e-4)
    assert found.passed, [row for row in found.rows if not row.passed]
    # Four forwards of the first chunk and two of each other.
    assert {row.name: row.runs for row in found.rows}["step"] == 4 + 2 + 2


def test_a_schedule_of_ones_own_equals_the_reference(own: Path) -> None:
    manifest = load_bundle(own).manifest
    # By hand, 3 s / (1 + 2 s) at 0.4.
    assert manifest.schedule.sigmas == pytest.approx((1, 1.2 / 1.8, 0))
    assert not manifest.schedule.clean_forward
    found = against_reference(own, chunks=4, tolerance=1e-4)
    assert found.passed, [row for row in found.rows if not row.passed]
    assert {"denoise.0", "denoise.1", "denoise.3"} <= {
        cost.name for cost in dry_run(load_bundle(own)).forwards
    }


def test_a_prompt_takes_effect_within_one_latent_frame(framewise: Path) -> None:
    with Pipeline.load(framewise, threads=1) as pipe:

        def clip(switch: bool) -> list[bytes]:
            with pipe.session("a red square", seed=1) as session:
                chunks = []
                for chunk in session.stream(chunks=4, ahead=0):
                    assert len(chunk.frames) == (1 if chunk.index == 0 else 4)
                    chunks.append(chunk.frames.tobytes())
                    if switch and chunk.index == 1:
                        assert session.set_prompt("a blue circle") == 2
                return chunks

        plain, switched = clip(False), clip(True)
    assert [a == b for a, b in zip(plain, switched, strict=True)] == [True, True, False, False]


def test_commands_count_single_frames(framewise: Path, tmp_path: Path) -> None:
    """Half a second are eight frames, so three latent frames: nine. A chunk that is timed has four."""
    clip, latents, bench = tmp_path / "clip.mp4", tmp_path / "latents.npy", tmp_path / "bench.json"
    once = ["--prompt", "a red square", "--threads", "1"]
    arguments = [*once, "--seconds", "0.5", "--switch", "1: a blue circle", "--latents", str(latents)]
    assert runtime(["generate", str(framewise), *arguments, "--out", str(clip)]) == 0
    assert np.load(latents).shape == (16, 3, 16, 16)
    assert clip.stat().st_size > 0
    timed = ["--chunks", "3", "--warmup-chunks", "1", "--json", str(bench)]
    assert runtime(["bench", str(framewise), *once, *timed]) == 0
    document = json.loads(bench.read_text())
    assert (document["frames"], [chunk["index"] for chunk in document["chunks"]]) == (12, [1, 2, 3])


def test_saved_frame_by_frame_sessions_go_on(framewise: Path, tmp_path: Path) -> None:
    with Pipeline.load(framewise, threads=1) as pipe:
        with pipe.session("a red square", seed=1) as session:
            whole = [chunk.frames.tobytes() for chunk in session.stream(chunks=4)]
        with pipe.session("a red square", seed=1) as session:
            list(session.stream(chunks=2))
            session.save(tmp_path / "session")
        with pipe.resume(tmp_path / "session") as session:
            assert [chunk.frames.tobytes() for chunk in session.stream(chunks=2)] == whole[2:]


@pytest.mark.parametrize("name", ["framewise", "own"])
def test_memory_plans_count_the_runtimes_buffers(name: str, request: pytest.FixtureRequest) -> None:
    bundle = load_bundle(request.getfixturevalue(name))
    variant = load_variant(
        "causal-framewise-2step" if name == "framewise" else str(bundle.root.parent / "own.toml")
    )
    preset = PRESETS["tiny"]
    planned = plan_memory(
        PlanRequest(load_target("cpu"), variant, preset, preset.height, preset.width, "fp32")
    )
    buffers = plan_buffers(bundle.manifest, 1)
    assert planned.per_session == buffers.session_bytes
    if bundle.manifest.segments is None:
        assert planned.group("buffers") == buffers.total_bytes - buffers.session_bytes


def test_work_by_hand() -> None:
    preset = PRESETS["wan-1.3b"]

    def forwards(variant: str, chunk: int) -> float:
        """Self-attention runs of a chunk, in units of one forward's."""
        request = PlanRequest(load_target("h200"), load_variant(variant), preset, 480, 832, "bf16")
        work = Workload(request)
        runs = [one for one in work.chunk(chunk) if one.kind == "cross-attention"]
        return len(runs) / preset.dit.layers

    # The clean forward of the chunk before ends before its last layer's cross-attention.
    clean = 29 / 30
    assert forwards("causal-framewise-1step", 0) == 4
    assert forwards("causal-framewise-1step", 3) == pytest.approx(1 + clean)
    assert forwards("causal-framewise-2step", 3) == pytest.approx(2 + clean)
    assert forwards("dense", 0) == 4
    assert forwards("dense", 3) == pytest.approx(4 + clean)
    request = PlanRequest(load_target("h200"), load_variant("causal-framewise"), preset, 480, 832, "bf16")
    assert Workload(request).tokens == 1560
    assert [Workload(request).pixel_frames(chunk) for chunk in (0, 1)] == [1, 4]
