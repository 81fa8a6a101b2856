"""Scores of one generated clip against its caption, and of many clips together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from training.data.clips import FRAMES, Clip, is_held_out

from .parser import Reading, observe, read

__all__ = ["ClipScore", "chunk_frames", "psnr", "score", "ssim", "summarise"]

Frames = npt.NDArray[np.uint8]

FRAMES_PER_CHUNK = 12
"""Pixel frames of a chunk; the first chunk has three fewer."""
REAPPEARS_FROM = 0.7
"""Where in a clip an object that left is surely back in view, as a fraction of its length."""


@dataclass(frozen=True)
class ClipScore:
    """What one clip got right. `None` where a figure does not apply."""

    caption: str
    seed: int
    held_out: bool
    ground: bool
    colour: bool
    shape: bool
    motion: bool
    """Kind, direction and starting place, all three."""
    kind: bool
    """Only the kind of motion."""
    path_error: float | None
    """Mean distance in pixels from the path that the caption describes, over frames where the object is seen."""
    steady: float
    """Fraction of frames that agree with the majority on colour and shape."""
    by_chunk: tuple[float, ...]
    """Per chunk, whether colour and shape are the caption's (one frame near the chunk's end)."""
    reappears: bool | None
    """For motions that leave the picture: colour and shape are right after the return."""
    psnr: float | None = None
    ssim: float | None = None
    """Against the rollout that `score` was given to compare with."""


def chunk_frames(chunk: int) -> slice:
    """Pixel frames of a chunk."""
    start = 0 if chunk == 0 else chunk * FRAMES_PER_CHUNK - 3
    return slice(start, (chunk + 1) * FRAMES_PER_CHUNK - 3)


def _is_right(frame: Frames, clip: Clip) -> bool:
    found = observe(frame)
    return found.is_shape and found.colour == clip.colour and found.shape == clip.shape


def score(frames: Frames, clip: Clip, seed: int, dense: Frames | None = None) -> ClipScore:
    """Score frames uint8 `[N, H, W, 3]`.

    Motion is judged over the first 81 frames; a longer clip adds to `by_chunk` only.

    Args:
        dense: another row's frames with the same prompt and seed, mostly the dense rollout's.
    """
    head = frames[:FRAMES]
    reading = read(head)
    chunks = (len(frames) + 3) // FRAMES_PER_CHUNK
    by_chunk = tuple(float(_is_right(frames[chunk_frames(chunk)][-2], clip)) for chunk in range(chunks))
    reappears = None
    if clip.motion.kind == "leaves":
        late = read(head, np.arange(int(REAPPEARS_FROM * len(head)), len(head), 5))
        reappears = (late.colour, late.shape) == (clip.colour, clip.shape)
    return ClipScore(
        clip.caption,
        seed,
        is_held_out(clip),
        ground=reading.ground == clip.ground,
        colour=reading.colour == clip.colour,
        shape=reading.shape == clip.shape,
        motion=reading.motion == clip.motion,
        kind=reading.motion is not None and reading.motion.kind == clip.motion.kind,
        path_error=_path_error(reading, clip, len(head)),
        steady=reading.steady,
        by_chunk=by_chunk,
        reappears=reappears,
        psnr=None if dense is None else psnr(frames, dense),
        ssim=None if dense is None else ssim(frames, dense),
    )


def _path_error(reading: Reading, clip: Clip, length: int) -> float | None:
    index = np.linspace(0, length - 1, len(reading.path)).astype(int)
    gaps = np.hypot(*(reading.path[:, :2] - clip.path[index, :2]).T)
    return None if np.isnan(gaps).all() else float(np.nanmean(gaps))


def psnr(a: Frames, b: Frames) -> float:
    """Peak signal-to-noise ratio in dB over all pixels; 99 for equal clips."""
    error = float(np.square(a.astype(np.float64) - b).mean())
    return 99.0 if error == 0 else min(99.0, 10 * float(np.log10(255**2 / error)))


def ssim(a: Frames, b: Frames, stride: int = 4) -> float:
    """Structural similarity of luma (Wang et al. 2004; Gaussian window of 1.5 pixels), mean over every 4th frame."""
    weights = np.array([0.299, 0.587, 0.114])
    x, y = (clip[::stride].astype(np.float64) @ weights for clip in (a, b))

    def blur(image: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        blurred: npt.NDArray[np.float64] = ndimage.gaussian_filter(image, (0, 1.5, 1.5), truncate=3.5)
        return blurred

    mx, my = blur(x), blur(y)
    xx, yy, xy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mx * my + c1) * (2 * xy + c2) / ((mx * mx + my * my + c1) * (xx + yy + c2))
    return float(similarity.mean())


def _mean(values: Sequence[float | bool | None]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None


def summarise(scores: Sequence[ClipScore]) -> dict[str, float | None]:
    """Means over clips; `drift` is by how much colour and shape get worse from the first chunk to the last."""
    held_out = [s for s in scores if s.held_out]
    chunks = min((len(s.by_chunk) for s in scores), default=0)
    by_chunk = [_mean([s.by_chunk[chunk] for s in scores]) for chunk in range(chunks)]
    first, last = (by_chunk[0], by_chunk[-1]) if by_chunk else (None, None)
    return {
        "clips": float(len(scores)),
        "ground": _mean([s.ground for s in scores]),
        "colour": _mean([s.colour for s in scores]),
        "shape": _mean([s.shape for s in scores]),
        "motion": _mean([s.motion for s in scores]),
        "kind": _mean([s.kind for s in scores]),
        "held_out_all": _mean([s.colour and s.shape and s.motion for s in held_out]),
        "path_error": _mean([s.path_error for s in scores]),
        "steady": _mean([s.steady for s in scores]),
        "drift": None if first is None or last is None else first - last,
        "reappears": _mean([s.reappears for s in scores]),
        "psnr": _mean([s.psnr for s in scores]),
        "ssim": _mean([s.ssim for s in scores]),
    }
