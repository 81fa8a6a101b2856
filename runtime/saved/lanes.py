"""Between a lane of the scheduler and a saved session."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np

from runtime.errors import InputError
from runtime.frame_table import TableState
from runtime.rollout import PromptSwitch
from runtime.scheduler import Chunk, Lane, SessionStatistics

from .file import SavedChunk, SavedMeta, SavedPrompt, SavedSession, SavedTable

__all__ = ["capture", "revive"]


def capture(lane: Lane, bundle: str) -> SavedSession:
    """The state of a lane that stands still, with the digest of its bundle."""
    table, buffers, side = lane.rollout.save()
    prompts: list[tuple[int | None, PromptSwitch]] = [*lane.switches]
    if lane.prompt is not None:
        prompts.insert(0, (None, lane.prompt))
    meta = SavedMeta.model_validate(
        {
            "bundle": bundle,
            "seed": lane.rollout.seed,
            "side": side,
            "table": SavedTable(**asdict(table)),
            "started": lane.started,
            "delivered": lane.delivered,
            "flushed": lane.flushed,
            "statistics": asdict(lane.totals),
            "prompts": [
                SavedPrompt(at=at, recache=switch.recache, label=switch.label, step=switch.step)
                for at, switch in prompts
            ],
            "done": [
                SavedChunk(
                    index=chunk.index,
                    latency=chunk.latency,
                    denoise=chunk.denoise,
                    decode=chunk.decode,
                    other=chunk.other,
                    label=chunk.label,
                )
                for chunk in lane.done
            ],
        }
    )
    return SavedSession(
        meta,
        buffers,
        tuple(switch.embedding for _, switch in prompts),
        tuple(chunk.frames for chunk in lane.done),
    )


def revive(lane: Lane, saved: SavedSession, shape: tuple[int, int], frame: tuple[int, int, int]) -> None:
    """Make a new lane be as the saved one was; `shape` is a prompt embedding's, `frame` a frame's.

    Raises:
        InputError: what was saved does not fit.
    """
    meta = saved.meta
    _check(saved, shape, frame)
    table = meta.table
    lane.rollout.restore(
        TableState(**table.model_dump()),
        saved.buffers,
        meta.side,
    )
    lane.started, lane.delivered, lane.flushed = meta.started, meta.delivered, meta.flushed
    lane.asked = meta.delivered
    known = {key: value for key, value in meta.statistics.items() if key in SessionStatistics.__annotations__}
    whole = {
        key: int(value) for key, value in known.items() if key in ("chunks", "delivered", "flushed", "frames")
    }
    lane.totals = SessionStatistics(**{**known, **whole})  # type: ignore[arg-type]
    lane.switches = []
    for entry, embedding in zip(meta.prompts, saved.prompts, strict=True):
        switch = PromptSwitch(embedding, entry.recache, entry.label, entry.step)
        if entry.at is None:
            lane.prompt = switch
        else:
            lane.switches.append((entry.at, switch))
    for chunk, frames in zip(meta.done, saved.frames, strict=True):
        lane.done.append(Chunk(frames=frames, **chunk.model_dump()))


def _check(saved: SavedSession, shape: tuple[int, int], frame: tuple[int, int, int]) -> None:
    meta = saved.meta
    waiting = [chunk.index for chunk in meta.done]
    if (
        any(array.dtype != np.float32 or array.shape != shape for array in saved.prompts)
        or any(array.dtype != np.uint8 or array.shape[1:] != frame for array in saved.frames)
        or any(array.dtype != np.uint8 for array in saved.buffers.values())
        or waiting != list(range(meta.delivered, meta.started))
        or meta.table.next_chunk != meta.started
        or not meta.prompts
    ):
        raise InputError("the saved session contradicts itself; expected a file that Session.save wrote")
