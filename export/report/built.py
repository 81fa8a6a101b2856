"""What a build says at its end: what was made, what it took, and what nobody has tried yet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from export.parts.worker import peak_bytes
from export.units import readable_size
from runtime.bundle import Manifest

__all__ = ["built_lines"]


def built_lines(folder: Path, manifest: Manifest, title: str, seconds: float) -> Iterator[str]:
    """Sentences about a bundle that was built just now.

    Args:
        title: the target's, as people call it.
        seconds: what the build took, or what was left of one that was resumed.
    """
    size = sum(entry.bytes for entry in manifest.files)
    peak = max(
        [peak_bytes(), *(c.cost.peak_bytes for c in manifest.components.values() if c.cost is not None)]
    )
    yield (
        f"built {folder}: {readable_size(size)} in {len(manifest.files) + 1} files, in {_duration(seconds)}, with at "
        f"most {readable_size(peak)} of memory (status: {manifest.status})"
    )
    if manifest.target.compute_capability is None:
        yield "not tested yet: whether it computes what it should on this machine ('verify' tells)"
    elif not manifest.status.startswith("built and verified"):
        yield (
            f"not tested yet: nothing of it has run on a {title}; 'verify' there compares every component with the "
            f"bundle's golden vectors{'' if manifest.golden else ', which this one lacks'}"
        )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.0f} s"
