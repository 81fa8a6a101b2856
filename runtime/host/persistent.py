"""The kernels that choose which blocks outlive the window, in numpy; docs/kernels.md says what they do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.program.program import KernelLaunch

__all__ = ["PERSISTENT_KERNELS"]

Arrays = Mapping[str, NDArray[Any]]


def _score(arrays: Arrays, launch: KernelLaunch) -> None:
    """The kernel `score`: products of the means of query blocks and of all resident key blocks."""
    slots = _present(arrays)
    keys = np.concatenate([arrays["past_kmean"][slots], arrays["k_mean"]])
    query, keys = (x.reshape(-1, *x.shape[2:]).transpose(1, 0, 2) for x in (arrays["q_mean"], keys))
    np.matmul(query, keys.transpose(0, 2, 1), out=arrays["scores"][..., : keys.shape[1]])


def _weigh(arrays: Arrays, launch: KernelLaunch) -> None:
    """The kernel `weigh`."""
    sizes = launch.problem.sizes()
    resident = (len(_present(arrays)) + sizes["chunk_frames"]) * sizes["k_blocks"]
    logits = np.float32(launch.options["scale"]) * arrays["scores"][..., :resident]
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    arrays["importance"][:, :resident] = weights.max(1) if launch.options["peak"] else weights.sum(1)


def _persist(arrays: Arrays, launch: KernelLaunch) -> None:
    """The kernel `persist`."""
    kept, evicted = map(int, arrays["contest"])
    if not evicted:
        return
    slots, sizes = _present(arrays), launch.problem.sizes()
    blocks, block = sizes["k_blocks"], sizes["block_k"]
    whole, sinks = sizes["frame_tokens"] // block, int(launch.options["sink_frames"])
    scores = arrays["importance"][:, sinks * blocks : (sinks + kept + evicted) * blocks]
    if launch.options["shared_heads"]:
        scores = np.broadcast_to(scores.sum(0), scores.shape)
    frames = slots[sinks : sinks + kept + evicted]
    by_frame = scores.reshape(len(scores), -1, blocks)
    for first, count in ((0, whole), (whole, blocks - whole)):
        if not count:
            continue
        for head, marks in enumerate(by_frame[:, :, first : first + count].reshape(len(scores), -1)):
            chosen = np.zeros(marks.size, dtype=bool)
            chosen[np.argsort(-marks, kind="stable")[: kept * count]] = True  # equal ones: the lower index
            places = np.flatnonzero(~chosen[: kept * count]).tolist()
            taken = np.flatnonzero(chosen[kept * count :]) + kept * count
            for place, source in zip(places, taken.tolist(), strict=True):
                _move(
                    arrays,
                    head,
                    (frames[place // count], first + place % count),
                    (frames[source // count], first + source % count),
                    block,
                )


def _move(arrays: Arrays, head: int, place: tuple[int, int], source: tuple[int, int], block: int) -> None:
    """Overwrite one head's block, (slot, block), by another one of its size."""
    into, of = (slice(number * block, (number + 1) * block) for _, number in (place, source))
    for name in ("past_k", "past_v"):
        arrays[name][place[0], into, head] = arrays[name][source[0], of, head]
    arrays["past_kmean"][(*place, head)] = arrays["past_kmean"][(*source, head)]


def _present(arrays: Arrays) -> NDArray[np.int32]:
    slots = arrays["frame_slots"]
    found: NDArray[np.int32] = slots[slots >= 0]
    return found


PERSISTENT_KERNELS: Mapping[str, Callable[..., None]] = {
    "score": _score,
    "weigh": _weigh,
    "persist": _persist,
}
"""On arrays named as their buffers, for a launch."""
