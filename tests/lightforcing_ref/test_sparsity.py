"""CAG tables and budgets against the figures printed in the paper's configurations."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightforcing_ref.config import PRESETS, planned_latents, video_frames
from lightforcing_ref.errors import ConfigError
from lightforcing_ref.schedule import FlowSchedule
from lightforcing_ref.sparsity import (
    DENSE_Q20,
    BlockGeometry,
    HSAConfig,
    SparsityTable,
    kept_blocks,
    quantize_keep,
)

SHORT = (0.0, 0.827, 0.855, 0.872, 0.883, 0.892, 0.898)
HOPPER = (0.0, 0.747, 0.775, 0.792, 0.803, 0.812, 0.818)
LONG_21 = (0.0, 0.803, 0.830, 0.846, 0.857, 0.865, 0.871)


@pytest.mark.parametrize(
    ("target", "base", "window", "expected"),
    [(0.88, 0.98, None, SHORT), (0.80, 0.90, None, HOPPER), (0.85, 0.95, 12, LONG_21)],
)
def test_tables_planned_for_21_frames(target, base, window, expected):
    table = SparsityTable.chunk_aware(target, base, window_frames=window)
    assert table.values == pytest.approx(expected, abs=5.1e-4)


def test_long_table_planned_for_63_frames():
    table = SparsityTable.chunk_aware(0.85, 0.95, table_frames=63, window_frames=12)
    assert len(table.values) == 21
    # The published row (.735, .774, .798 ... .884) was rounded twice; these are its values at four decimals.
    assert table.values[:4] == pytest.approx((0, 0.7345, 0.7740, 0.7976), abs=5.1e-5)
    assert table.values[-1] == pytest.approx(0.8835, abs=5.1e-5)


@pytest.mark.parametrize(
    ("frames", "latents"), [(1, 3), (9, 3), (10, 6), (21, 6), (22, 9), (81, 21), (82, 24), (249, 63)]
)
def test_planned_length_is_the_whole_chunks_that_hold_it(frames: int, latents: int) -> None:
    assert planned_latents(frames) == latents
    assert video_frames(latents - 3) < frames <= video_frames(latents)


@pytest.mark.parametrize(
    ("target", "base", "per_frame", "kept"),
    [
        (0.88, 0.98, 24, (24, 31, 36, 42, 46, 51)),
        (0.88, 0.98, 25, (25, 32, 38, 43, 48, 53)),
        (0.80, 0.90, 12, (18, 24, 29, 35, 40, 45)),
    ],
)
def test_kept_blocks_of_the_published_configurations(target, base, per_frame, kept):
    table = SparsityTable.chunk_aware(target, base)
    totals = [3 * (chunk + 1) * per_frame for chunk in range(7)]
    keep = table.keep_q20(totals)
    assert keep[0] == DENSE_Q20
    assert tuple(kept_blocks(keep, chunk, totals[chunk]) for chunk in range(1, 7)) == kept


@given(st.floats(0.01, 0.99), st.integers(1, 64))
def test_fixed_point_counts_equal_the_floating_point_ones(sparsity, per_frame):
    totals = [frames * per_frame for frames in range(3, 22)]
    try:
        keep = quantize_keep(sparsity, totals)
    except ConfigError:
        # Only where (1 - s) K lies within 2^-20 of an integer for some K can no fixed-point fraction exist.
        assert any(abs((1 - sparsity) * k - round((1 - sparsity) * k)) < k / 2**19 for k in totals)
        return
    for total in totals:
        assert kept_blocks([keep], 0, total) == max(1, int((1 - sparsity) * total))


def test_average_sparsity_is_the_target():
    table = SparsityTable.chunk_aware(0.88, 0.98)
    work = [3 * (i + 1) for i in range(1, 7)]
    average = sum(s * w for s, w in zip(table.values[1:], work, strict=True)) / sum(work)
    assert average == pytest.approx(0.88)


def test_chunks_past_the_table_use_its_last_entry():
    assert kept_blocks((DENSE_Q20, DENSE_Q20 // 2), 99, 10) == 5
    assert kept_blocks((DENSE_Q20, DENSE_Q20 // 2), -1, 10) == 10
    assert kept_blocks((1,), 0, 10) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 1.0, "base": 1.0}, r"target is 1.0; expected a value in \[0, 1\)"),
        ({"target": -0.1, "base": 0.5}, "target is -0.1"),
        ({"target": 0.9, "base": 0.8}, "base 0.8 is below the target 0.9"),
        (
            {"target": 0.8, "base": 0.9, "table_frames": 20},
            "table_frames is 20; expected a positive multiple of 3",
        ),
        ({"target": 0.1, "base": 0.9}, "bring base and target closer"),
    ],
)
def test_impossible_tables_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        SparsityTable.chunk_aware(**arguments)


def test_frame_budgets_must_be_consistent():
    with pytest.raises(ConfigError, match="keep_frames 2 is smaller than"):
        HSAConfig(keep_frames=2, sink_frames=1, near_frames=2)
    with pytest.raises(ConfigError, match="expected keep >= 1"):
        HSAConfig(keep_frames=0, sink_frames=0, near_frames=0)
    with pytest.raises(ConfigError, match="block_q is 0"):
        BlockGeometry(64, 0, 32)


def test_block_counts_of_both_published_resolutions():
    assert BlockGeometry(1536, 64, 64).k_blocks == 24
    assert BlockGeometry(1560, 64, 64).k_blocks == 25
    wan = PRESETS["wan-1.3b"]
    assert wan.frame_tokens(512, 768) == 1536
    assert wan.frame_tokens(480, 832) == 1560
    with pytest.raises(ConfigError, match="video height is 500 pixels; expected a multiple of 16"):
        wan.latent_size(500, 768)


def test_schedule_is_warped_with_shift_five():
    schedule = FlowSchedule.warped()
    assert schedule.timesteps == pytest.approx((1000, 937.5, 833.3333333, 625.0, 0))
    assert [t / 1000 for t in schedule.timesteps] == pytest.approx(schedule.sigmas)
    assert (schedule.denoise_steps, schedule.clean_step) == (4, 4)
    assert all(
        math.isclose(s, 5 * u / (1 + 4 * u))
        for s, u in zip(schedule.sigmas, (1, 0.75, 0.5, 0.25), strict=False)
    )


def test_pixel_frames():
    assert [video_frames(n) for n in (0, 1, 3, 21)] == [0, 1, 9, 81]
