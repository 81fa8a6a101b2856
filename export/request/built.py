"""The variant that a bundle was built from, out of the sections of its manifest."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.bundle import Attention, Cache, Recache, Schedule, Sparsity

from .schedules import SchedulePolicy
from .targets import CachePolicy, SparsityPolicy, Variant

__all__ = ["built_schedule", "built_variant"]


def built_schedule(schedule: Schedule, chunk_frames: int) -> SchedulePolicy:
    """The schedule that a manifest's timesteps were warped from, with the usual shift."""
    shift = SchedulePolicy().shift

    def steps(warped: Sequence[float]) -> tuple[int, ...]:
        shares = [timestep / 1000 for timestep in warped if timestep]
        return tuple(round(1000 * share / (shift - (shift - 1) * share)) for share in shares)

    return SchedulePolicy.model_validate(
        {
            "steps": steps(schedule.timesteps),
            "first_steps": steps(schedule.first_timesteps),
            "chunk_frames": chunk_frames,
            "clean_forward": schedule.clean_forward,
            "rolling": schedule.rolling,
        }
    )


def built_variant(
    name: str,
    title: str,
    schedule: SchedulePolicy,
    *,
    attention: Attention,
    sparsity: Sparsity,
    cache: Cache,
    recache: Recache,
) -> Variant:
    """A variant of these sections, but for the size of blocks, which a target may have decided.

    Args:
        recache: what a prompt switch does by default.
    """
    return Variant(
        schema_version=1,
        name=name,
        title=title,
        schedule=schedule,
        attention=attention.method,
        products=attention.products,
        sparsity=SparsityPolicy(
            target=sparsity.target,
            base=sparsity.base,
            table_frames=sparsity.table_frames,
            keep_frames=attention.keep_frames,
            sink_frames=attention.sink_frames,
            near_frames=attention.near_frames,
        ),
        cache=CachePolicy(
            window_frames=cache.window_frames,
            sink_frames=cache.sink_frames,
            sink_positions=cache.sink_positions,
            recache=recache,
            flush_frames=cache.flush_frames,
            cut_frames=cache.cut_frames,
            kv=cache.kv,
        ),
    )
