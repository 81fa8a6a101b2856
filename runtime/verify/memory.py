"""What the dry run holds memory against: bounds, alignment, order of writes and reads, and what may not overlap."""

from __future__ import annotations

from collections import defaultdict
from typing import Final

from runtime.program.program import (
    ALIGNMENT,
    EngineRun,
    Forward,
    KernelLaunch,
    Operation,
    Program,
    Queue,
    View,
)

from .steps import Flaws

__all__ = ["MemoryChecker"]

_KERNEL_ALIGNMENT: Final = 16
_SHARED_BY_SLOT: Final = ("latents",)
"""Written in one queue and read in another, but never the same slot at once (see runtime.frame_table.LatentRing)."""


class MemoryChecker:
    """Follows a rollout through memory; the operations come in the order of execution."""

    def __init__(self, program: Program, flaws: Flaws) -> None:
        self._program = program
        self._flaws = flaws
        self._written: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self._writers: dict[str, set[Queue]] = defaultdict(set)
        self._users: dict[str, set[Queue]] = defaultdict(set)
        self._weights_read: set[int] = set()
        self.tensors = 0

    def check_layout(self) -> None:
        """Every buffer aligned, inside its part of the arena, and apart from the others."""
        program = self._program
        for name, size in (("shared", program.shared_bytes), ("session", program.session_bytes)):
            if size % ALIGNMENT:
                self._flaws.add(f"the {name} part of the arena", f"{size:,} bytes do not keep the alignment")
            placed = [p for p in program.buffers.values() if p.per_session == (name == "session")]
            placed.sort(key=lambda p: p.offset)
            end, before = 0, ""
            for part in placed:
                where = f"buffer {part.buffer.name!r}"
                if part.offset % ALIGNMENT:
                    self._flaws.add(
                        where, f"it begins at {part.offset:,}, expected a multiple of {ALIGNMENT}"
                    )
                if part.offset < end:
                    self._flaws.add(where, f"it overlaps buffer {before!r}")
                end, before = part.offset + part.buffer.nbytes, part.buffer.name
                if end > size:
                    self._flaws.add(where, f"it ends at {end:,}, past the {size:,} bytes of the {name} part")

    def feed(self, forward: Forward) -> None:
        """The host writes what the forward is fed with."""
        for view in forward.feeds:
            self._write(view, forward.queue, f"forward {forward.name!r}, feed {view.buffer!r}")

    def check(self, operation: Operation, where: str, forward: Forward) -> None:
        """One operation: bounds, alignment, nothing read before it is written, nothing written that it reads."""
        alignment = {EngineRun: ALIGNMENT, KernelLaunch: _KERNEL_ALIGNMENT}.get(type(operation), 1)
        outputs = dict(operation.outputs)
        scratch = operation.scratch if isinstance(operation, EngineRun) else None
        if scratch is not None:
            outputs["its activation memory"] = scratch
        for name, view in operation.inputs.items():
            self._inside(view, f"{where}, {name!r}", alignment)
            self._read(view, forward.queue, f"{where}, {name!r}")
            for other, target in outputs.items():
                if _overlap(view, target):
                    self._flaws.add(
                        f"{where}, {name!r}", f"it is read, and {other!r} is written to the same memory"
                    )
        names = list(outputs)
        for index, name in enumerate(names):
            self._inside(outputs[name], f"{where}, {name!r}", alignment)
            for other in names[index + 1 :]:
                if _overlap(outputs[name], outputs[other]):
                    self._flaws.add(f"{where}, {name!r}", f"it and {other!r} are written to the same memory")
        for name, view in outputs.items():
            self._write(view, forward.queue, f"{where}, {name!r}")
        if scratch is not None:
            del self._written[scratch.buffer]  # worth nothing after the run
        sizes = (
            {operation.inputs["source"].nbytes, operation.outputs["target"].nbytes}
            if "source" in (operation.inputs)
            else {0}
        )
        if len(sizes) > 1:
            self._flaws.add(where, f"source and target differ in size: {sorted(sizes)} bytes")

    def check_queues(self) -> None:
        """What one queue writes, no other touches."""
        for buffer, queues in self._users.items():
            if len(queues) > 1 and self._writers[buffer] and buffer not in _SHARED_BY_SLOT:
                self._flaws.add(
                    f"buffer {buffer!r}",
                    f"queues {', '.join(sorted(queues))} run at the same time and "
                    f"{', '.join(sorted(self._writers[buffer]))} write(s) it",
                )

    def unbound(self) -> tuple[str, ...]:
        """Tensors of the weights file that nothing has read."""
        return tuple(
            sorted(
                name for name, view in self._program.weights.items() if view.offset not in self._weights_read
            )
        )

    def _inside(self, view: View, where: str, alignment: int) -> None:
        self.tensors += 1
        placed = self._program.buffers.get(view.buffer)
        if placed is None:
            self._flaws.add(where, f"there is no buffer {view.buffer!r}")
            return
        if view.offset < 0 or view.offset + view.extent > placed.buffer.nbytes:
            self._flaws.add(
                where,
                f"bytes {view.offset:,} to {view.offset + view.extent:,} of buffer {view.buffer!r}, which has "
                f"{placed.buffer.nbytes:,}",
            )
        for session in range(min(2, self._program.sessions)):
            offset = self._program.offset(view, session)
            if offset % alignment:
                self._flaws.add(where, f"it begins at {offset:,}, expected a multiple of {alignment}")
                break

    def _read(self, view: View, queue: Queue, where: str) -> None:
        self._users[view.buffer].add(queue)
        if view.buffer == "weights":
            self._weights_read.add(view.offset)
        if view.nbytes and not _covered(self._written[view.buffer], view.offset, view.offset + view.extent):
            self._flaws.add(where, f"buffer {view.buffer!r} is read before it is written")

    def _write(self, view: View, queue: Queue, where: str) -> None:
        self._users[view.buffer].add(queue)
        # Constants are written once, before any queue runs.
        if where.startswith("forward 'load'"):
            self._users[view.buffer].discard(queue)
        else:
            self._writers[view.buffer].add(queue)
        spans = self._written[view.buffer]
        spans.append((view.offset, view.offset + view.extent))
        spans.sort()
        merged = [spans[0]]
        for start, end in spans[1:]:
            if start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, end))
        self._written[view.buffer] = merged


def _overlap(one: View, other: View) -> bool:
    if one.buffer != other.buffer:
        return False
    return one.offset < other.offset + other.extent and other.offset < one.offset + one.extent


def _covered(spans: list[tuple[int, int]], start: int, end: int) -> bool:
    return any(first <= start and end <= last for first, last in spans)
