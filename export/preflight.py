"""Checks before long work: whether a build fits on the disk and into memory."""

from __future__ import annotations

import shutil
from math import prod

from export.estimate.memory import MemoryPlan, plan_memory
from export.parts.workspace import partial_folder
from export.request.geometry import StepPlan
from export.request.graph_types import graph_types
from export.request.request import BuildRequest
from export.request.sizes import transformer_parameters
from lightforcing_ref.checkpoint.spec import umt5_shapes
from runtime.host_memory import memory

from .errors import BuildError, InputError
from .units import readable_size

__all__ = ["check_disk", "check_memory", "check_target_memory", "text_bytes"]

_COPIES, _BASE = 1.5, 2 << 30
"""Memory of an export: so many times the transformer's weights, and the libraries (measured)."""


def text_bytes(request: BuildRequest, plan: StepPlan) -> int:
    """Size of the text encoder's weights as the bundle stores them."""
    elements = sum(prod(shape) for shape in umt5_shapes(plan.preset.text).values())
    return elements * graph_types(request).text.itemsize


def check_disk(request: BuildRequest, plan: StepPlan) -> None:
    """Refuse a build that cannot fit on the disk; what an interrupted one left counts as room.

    Raises:
        BuildError: says what is needed and what is free.
    """
    # Segments are cut from the whole graph, whose weights lie beside theirs until the bundle is complete.
    copies = 2 if request.execution == "segmented" else 1
    needed = copies * transformer_parameters(plan.preset.dit) * graph_types(request).transformer.itemsize
    needed += text_bytes(request, plan)
    out = request.out.absolute()
    existing = next(path for path in (out, *out.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    left = [path.stat().st_size for path in partial_folder(out, request.name).rglob("*") if path.is_file()]
    if free + sum(left) < needed:
        raise BuildError(
            f"the build needs {readable_size(needed)} and {existing} has {readable_size(free)} free; make room or "
            "choose another --out"
        )


def check_memory(request: BuildRequest, plan: StepPlan) -> None:
    """Refuse a build that cannot fit into memory.

    Raises:
        BuildError: says what is needed and what is free.
    """
    # Random weights are drawn in float32.
    itemsize = 4 if request.weights.checkpoint is None else graph_types(request).transformer.itemsize
    needed, free = _COPIES * transformer_parameters(plan.preset.dit) * itemsize + _BASE, memory().available
    if free is not None and free < needed:
        raise BuildError(
            f"the build takes about {readable_size(needed)} of memory and {readable_size(free)} are free; close "
            "other programs, or use a machine with more"
        )


def check_target_memory(request: BuildRequest) -> MemoryPlan:
    """Refuse a bundle of which not even one rollout fits into its target's memory.

    Returns:
        what it takes.

    Raises:
        InputError: says what is needed and what the target has.
    """
    planned = plan_memory(request)
    if request.target.memory_gib is not None and planned.fits is False:
        raise InputError(f"{request.name} {planned.verdict}")
    return planned
