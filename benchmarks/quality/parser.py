"""Reads a clip's colour, shape and motion back from its frames; needs no model.

Per frame: the ground is the commonest colour along the border; the object is the largest connected region that
differs from it. Colour is the nearest palette entry of the region's inside, shape the best template at the region's
own place and area. Motion is the variant whose ideal path lies closest to the observed one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from training.data.clips import COLOURS, GROUNDS, MOTIONS, SHAPES, Clip, Motion, coverage

__all__ = ["Observation", "Reading", "observe", "read", "reference_path"]

MIN_AREA = 60
"""Smallest region that counts as an object, in pixels."""
CONTRAST = 0.4
"""A pixel belongs to the object if it differs from the ground by this fraction of the object's contrast."""
LEAST_CONTRAST = 36.0
"""Smallest colour difference (largest channel, 0..255) that an object has from the ground."""
LEAST_OVERLAP = 0.6
"""A region whose overlap with every template is smaller has no shape, so that smears and noise count as nothing."""
ABSENT_PENALTY = 40.0
"""Distance in pixels charged for a frame in which the object is expected and not seen, or the reverse."""
OBSERVED_FRAMES = 17
"""Frames looked at in a clip of 81: every fifth."""

Frame = npt.NDArray[np.uint8]
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Observation:
    """One frame: the ground's colour name and, if an object is seen, its colour, shape, centre and area."""

    ground: str
    colour: str | None = None
    shape: str | None = None
    x: float = float("nan")
    y: float = float("nan")
    area: float = 0.0
    overlap: float = 0.0
    """Intersection over union with the best template, 0..1."""

    @property
    def is_shape(self) -> bool:
        """Whether the object is one of the shapes, and not just something that differs from the ground."""
        return self.overlap >= LEAST_OVERLAP


@dataclass(frozen=True)
class Reading:
    """A whole clip: the majority over its frames, and the observed path.

    `path` `[n, 3]` is centre and radius of the equivalent circle in the observed frames, NaN where nothing is seen.
    `shown` is the fraction of frames with something to see, `steady` the fraction of those in which it is a shape and
    agrees with the majority on colour and shape. Where most frames show no shape, colour, shape and motion are None.
    """

    ground: str
    colour: str | None
    shape: str | None
    motion: Motion | None
    path: Array
    path_error: float
    """Mean distance from the best motion's ideal path, in pixels."""
    shown: float
    steady: float


def _nearest(colour: Array, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.abs(colour - np.array(palette[name])).sum()))


@cache
def _template(shape: str, size: int) -> npt.NDArray[np.bool_]:
    """The shape centred by its centroid on a square canvas, scaled to about `size` pixels of area."""
    radius = (size / _unit_area(shape)) ** 0.5
    side = int(3.2 * radius) + 3
    mask = coverage(shape, side / 2, side / 2, radius, (side, side)) > 0.5
    return np.asarray(mask)


@cache
def _unit_area(shape: str) -> float:
    return float(coverage(shape, 64, 64, 30).sum()) / 900


def _overlap(region: npt.NDArray[np.bool_], shape: str) -> float:
    """Intersection over union of a region and a template of its area, centroids aligned."""
    area = int(region.sum())
    template = _template(shape, area - area % 4)
    canvas = np.zeros(region.shape, bool)
    shift = [round(a - b) for a, b in zip(_centroid(region), _centroid(template), strict=True)]
    rows, columns = np.nonzero(template)
    rows, columns = rows + shift[0], columns + shift[1]
    inside = (rows >= 0) & (rows < region.shape[0]) & (columns >= 0) & (columns < region.shape[1])
    canvas[rows[inside], columns[inside]] = True
    return float((canvas & region).sum() / max((canvas | region).sum(), 1))


def _centroid(mask: npt.NDArray[np.bool_]) -> tuple[float, float]:
    rows, columns = np.nonzero(mask)
    return float(rows.mean()), float(columns.mean())


def observe(frame: Frame) -> Observation:
    """Read one frame uint8 `[H, W, 3]`."""
    pixels = frame.astype(np.float64)
    border = np.concatenate(
        [pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3), pixels[:, 0], pixels[:, -1]]
    )
    ground = np.median(border, axis=0)
    name = _nearest(ground, GROUNDS)
    difference = np.abs(pixels - ground).max(2)
    strong = difference > LEAST_CONTRAST
    labels, count = ndimage.label(strong)
    if count == 0:
        return Observation(name)
    sizes = np.bincount(labels.ravel())[1:]
    region = labels == 1 + int(sizes.argmax())
    if sizes.max() < MIN_AREA:
        return Observation(name)
    contrast = float(np.median(difference[region]))
    region &= difference > CONTRAST * contrast
    inside = ndimage.binary_erosion(region, iterations=2)
    colour = np.median(pixels[inside if inside.sum() >= 10 else region], axis=0)
    overlaps = {shape: _overlap(region, shape) for shape in SHAPES}
    best = max(overlaps, key=lambda shape: overlaps[shape])
    y, x = _centroid(region)
    return Observation(
        name, _nearest(colour, COLOURS), best, x + 0.5, y + 0.5, float(region.sum()), overlaps[best]
    )


@cache
def _centroid_offset(shape: str) -> float:
    """How far below its nominal centre the shape's centroid lies, per unit of radius."""
    mask = coverage(shape, 64, 64, 30) > 0.5
    return (_centroid(mask)[0] + 0.5 - 64) / 30


def _touches_border(observation: Observation, shape: str, size: int) -> bool:
    reach = 1.05 * (observation.area / _unit_area(shape)) ** 0.5
    low, high = reach, size - reach
    return not (low <= observation.x <= high and low <= observation.y <= high)


def reference_path(clip: Clip, index: npt.NDArray[np.int64], size: int = 128) -> Array:
    """Where an observer would see the clip's object: as `Reading.path`, NaN where it is out of the frame."""
    path = clip.path[index].copy()
    reach = 0.6 * path[:, 2]
    hidden = ((path[:, :2] < -reach[:, None]) | (path[:, :2] > size + reach[:, None])).any(1)
    path[hidden] = np.nan
    return path


def _majority(values: list[str]) -> str | None:
    return max(sorted(set(values)), key=values.count) if values else None


def _path_distance(seen: Array, ideal: Array) -> float:
    """Mean distance between two paths in centre and radius, with a penalty where only one has an object."""
    here, there = ~np.isnan(seen[:, 0]), ~np.isnan(ideal[:, 0])
    both = here & there
    gaps = np.where(here ^ there, ABSENT_PENALTY, 0.0)
    centre = np.hypot(*(seen[both, :2] - ideal[both, :2]).T)
    gaps[both] = np.minimum(centre + np.abs(seen[both, 2] - ideal[both, 2]), 2 * ABSENT_PENALTY)
    return float(gaps.mean())


def read(frames: npt.NDArray[np.uint8], index: npt.NDArray[np.int64] | None = None) -> Reading:
    """Read a clip.

    Args:
        frames: uint8 `[N, H, W, 3]`.
        index: which frames of an 81-frame clip to look at; by default every fifth of `frames`.
    """
    if index is None:
        index = np.linspace(0, len(frames) - 1, min(OBSERVED_FRAMES, len(frames))).astype(np.int64)
    observations = [observe(frames[i]) for i in index]
    size = frames.shape[1]
    shown = [found for found in observations if found.colour is not None]
    shapes = [found for found in shown if found.is_shape]
    if 2 * len(shapes) < len(shown):
        shapes = []
    colour = _majority([str(found.colour) for found in shapes])
    whole = [found for found in shapes if not _touches_border(found, str(found.shape), size)] or shapes
    shape = _majority([str(found.shape) for found in whole])
    ground = _majority([found.ground for found in observations])
    path = np.full((len(index), 3), np.nan)
    for row, found in zip(path, observations, strict=True):
        if found.colour is not None and shape is not None:
            radius = (found.area / _unit_area(shape)) ** 0.5
            row[:] = found.x, found.y - radius * _centroid_offset(shape), radius
    motion, error = None, float("nan")
    if shape is not None and colour is not None:
        ideal = {
            variant: _path_distance(path, reference_path(Clip(colour, shape, "black", variant), index, size))
            for variant in MOTIONS
        }
        motion = min(ideal, key=lambda variant: ideal[variant])
        error = ideal[motion]
    inside = [found for found in shown if not _touches_border(found, str(found.shape), size)]
    steady = [found.is_shape and found.colour == colour and found.shape == shape for found in inside]
    return Reading(
        str(ground),
        colour,
        shape,
        motion,
        path,
        error,
        len(shown) / len(observations),
        float(np.mean(steady)) if steady else 0.0,
    )
