"""The target of a GPU that is here: what `--gpu auto` means."""

from __future__ import annotations

from collections.abc import Iterable

from export.errors import InputError
from export.machine import Gpu, GpuReport, find_gpus

from .targets import Target, list_targets, too_old

__all__ = ["detected_target"]

_GIB = 1 << 30
_SAME_MEMORY = 0.15
"""What the driver keeps for itself, and what error correction takes, as a share."""


def detected_target(gpus: GpuReport | None = None, targets: Iterable[Target] | None = None) -> Target:
    """The target of the first GPU of this machine, by the driver's name for it, its capability and its memory.

    Args:
        gpus: what the driver says, by default asked now.
        targets: by default the shipped ones.

    Raises:
        InputError: there is no GPU, it is older than compute capability 8.0, or none of the targets is it; names those
            that come near.
    """
    gpus = find_gpus() if gpus is None else gpus
    if not gpus.gpus:
        raise InputError(
            f"--gpu auto needs a GPU, and here is none: {gpus.problem}; name a target, or --gpu cpu"
        )
    gpu = gpus.gpus[0]
    if int(gpu.compute_capability.partition(".")[0]) < 8:
        raise too_old(gpu.name)
    alike = [
        target
        for target in (list_targets() if targets is None else targets)
        if target.compute_capability == gpu.compute_capability
    ]
    named = [
        target for target in alike if _plain(gpu.name) in map(_plain, target.driver_names or (target.title,))
    ]
    found = [target for target in named if _memory_differs(target, gpu) < _SAME_MEMORY]
    if found:
        return min(found, key=lambda target: _memory_differs(target, gpu))
    nearest = [target.name for target in sorted(alike, key=lambda target: _memory_differs(target, gpu))[:3]]
    hint = (
        f"the nearest are {', '.join(nearest)}: name the one with no more memory than it has"
        if nearest
        else "none has its compute capability"
    )
    raise InputError(
        f"{gpu.name} (compute capability {gpu.compute_capability}, {gpu.memory_bytes / _GIB:.1f} GiB) is no target of "
        f"this package; {hint}, or write a TOML file for it (docs/targets.md)"
    )


def _plain(name: str) -> str:
    return name.lower().removeprefix("nvidia ").replace(" ", "")


def _memory_differs(target: Target, gpu: Gpu) -> float:
    """By what share of it the target's memory differs from the GPU's."""
    own = (target.memory_gib or 0) * _GIB
    return abs(own - gpu.memory_bytes) / gpu.memory_bytes
