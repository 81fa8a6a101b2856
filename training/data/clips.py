"""Procedural captioned clips: one coloured shape on a plain ground, 81 frames of 128 x 128.

A caption names everything but a jitter of a few pixels, so that what a clip shows is a valid target for a model's own
rollout. Some combinations of colour, shape and kind of motion never occur in training (`is_held_out`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import pi, sqrt

import numpy as np
import numpy.typing as npt

__all__ = [
    "COLOURS",
    "FRAMES",
    "GROUNDS",
    "KINDS",
    "MOTIONS",
    "SHAPES",
    "SINGLE_KINDS",
    "SIZE",
    "Clip",
    "Motion",
    "all_clips",
    "coverage",
    "is_held_out",
    "motions",
    "random_clip",
]

SIZE = 128
"""Pixels per side."""
FRAMES = 81
"""Pixel frames: one for the first latent frame and four for each of the twenty others."""
RADIUS = 20.0
"""Radius of the circle whose size every shape roughly has, in pixels."""
NEAR, MIDDLE, FAR = 26.0, 64.0, 102.0
LANE = 26.0
"""Distance of the outer lanes from the middle one."""
ORBIT = 36.0

COLOURS = {
    "red": (222, 40, 40),
    "green": (40, 185, 60),
    "blue": (45, 80, 235),
    "yellow": (240, 220, 40),
    "pink": (235, 70, 205),
    "cyan": (40, 215, 225),
}
GROUNDS = {"black": (14, 14, 18), "grey": (122, 122, 122), "white": (240, 240, 240), "brown": (92, 58, 28)}
SHAPES = ("circle", "square", "triangle", "cross")
SINGLE_KINDS = ("moves", "bounces", "orbits", "grows")
"""Motions that keep the object in view."""
KINDS = (*SINGLE_KINDS, "leaves")
"""All motions; what leaves comes back unchanged."""

_STEPS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
_PLACES = {"centre": (0, 0), "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}

Array = npt.NDArray[np.float64]
Frames = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Motion:
    """A kind of motion with its direction and starting place, as the caption names them."""

    kind: str
    direction: str
    place: str

    @property
    def phrase(self) -> str:
        """The caption's verb phrase."""
        if self.kind == "grows":
            return f"grows at the {self.place}"
        if self.kind == "leaves":
            return f"leaves {self.direction} and returns"
        return f"{self.kind} {self.direction} from the {self.place}"

    def path(self, frames: int = FRAMES) -> Array:
        """Centre x, centre y and radius of the object in each frame, in pixels: `[frames, 3]`."""
        time = np.arange(frames) / (FRAMES - 1)
        radius = np.full(frames, RADIUS)
        if self.kind == "orbits":
            dx, dy = _PLACES[self.place]
            turn = 2 * pi * time * (1 if self.direction == "clockwise" else -1)
            x = MIDDLE + ORBIT * (dx * np.cos(turn) - dy * np.sin(turn))
            y = MIDDLE + ORBIT * (dx * np.sin(turn) + dy * np.cos(turn))
        elif self.kind == "grows":
            dx, dy = _PLACES[self.place]
            x, y = np.full(frames, MIDDLE + LANE * dx), np.full(frames, MIDDLE + LANE * dy)
            radius = 9 + 23 * np.minimum(time, 1)
        else:
            dx, dy = _STEPS[self.direction]
            x0, y0 = self._start()
            if self.kind == "moves":
                along = (FAR - NEAR) * time
            elif self.kind == "bounces":
                along = (FAR - NEAR) * (1 - np.abs(1 - (2 * time) % 2))
            else:
                along = 2.4 * (SIZE - MIDDLE) * (1 - np.abs(1 - (2 * time) % 2))
            x, y = x0 + dx * along, y0 + dy * along
        return np.stack([x, y, radius], axis=1)

    def _start(self) -> tuple[float, float]:
        if self.place == "centre":
            return MIDDLE, MIDDLE
        dx, dy = _STEPS[self.direction]
        words = self.place.split()
        lane = sum(sum(_PLACES[word]) for word in words) - (-dx - dy)
        start = MIDDLE - (FAR - NEAR) / 2 * (dx + dy)
        return (start, MIDDLE + LANE * lane) if dx else (MIDDLE + LANE * lane, start)


def motions(kinds: Sequence[str] = KINDS) -> list[Motion]:
    """Every motion of the given kinds."""
    found: list[Motion] = []
    sides = {"right": "left", "left": "right", "down": "top", "up": "bottom"}
    for kind in kinds:
        if kind == "orbits":
            turns = ("clockwise", "anticlockwise")
            found += [
                Motion(kind, turn, place) for turn in turns for place in ("top", "bottom", "left", "right")
            ]
        elif kind == "grows":
            found += [Motion(kind, "", place) for place in _PLACES]
        elif kind == "leaves":
            found += [Motion(kind, direction, "centre") for direction in _STEPS]
        else:
            for direction, side in sides.items():
                lanes = ("top", "bottom") if direction in ("left", "right") else ("left", "right")
                places = [side] + [
                    f"{lane} {side}" if lane in ("top", "bottom") else f"{side} {lane}" for lane in lanes
                ]
                found += [Motion(kind, direction, place) for place in places]
    return found


MOTIONS = motions()


@dataclass(frozen=True)
class Clip:
    """What one clip shows. `jitter` moves the object's whole path, in pixels; the caption does not tell it."""

    colour: str
    shape: str
    ground: str
    motion: Motion
    jitter: tuple[float, float] = (0.0, 0.0)

    @property
    def caption(self) -> str:
        """At most 63 bytes, so that it fits the text encoder."""
        return f"a {self.colour} {self.shape} on {self.ground} {self.motion.phrase}"

    @cached_property
    def path(self) -> Array:
        """Centre and radius in each frame, `[81, 3]`."""
        path: Array = self.motion.path() + np.array([*self.jitter, 0.0])
        return path

    def render(self, first: int = 0, count: int = FRAMES) -> Frames:
        """`count` frames from frame `first` on, uint8 `[count, 128, 128, 3]`."""
        ground, colour = (np.array(x, np.float32) for x in (GROUNDS[self.ground], COLOURS[self.colour]))
        frames = np.empty((count, SIZE, SIZE, 3), np.uint8)
        frames[:] = ground.astype(np.uint8)
        for frame, (x, y, radius) in zip(frames, self.path[first : first + count], strict=True):
            reach = 1.3 * radius + 2
            rows, columns = (slice(max(0, int(c - reach)), max(0, int(c + reach) + 1)) for c in (y, x))
            patch = frame[rows, columns]
            if patch.size:
                size = patch.shape[:2]
                alpha = coverage(self.shape, x - columns.start, y - rows.start, radius, size)[..., None]
                patch[:] = np.rint(ground + alpha * (colour - ground))
        return frames


def coverage(
    shape: str, x: float, y: float, radius: float, size: tuple[int, int] = (SIZE, SIZE)
) -> npt.NDArray[np.float32]:
    """How much of each pixel of an image of `size` (height, width) the shape centred at (x, y) covers, 0..1.

    Raises:
        ValueError: there is no such shape.
    """
    v, u = np.ogrid[: size[0], : size[1]]
    u, v = (u + 0.5 - x).astype(np.float32), (v + 0.5 - y).astype(np.float32)

    def box(width: float, height: float) -> npt.NDArray[np.float32]:
        return np.maximum(np.abs(u) - width, np.abs(v) - height)

    if shape == "circle":
        distance = np.sqrt(u * u + v * v) - radius
    elif shape == "square":
        distance = box(0.88 * radius, 0.88 * radius)
    elif shape == "triangle":
        slanted = sqrt(0.75) * np.abs(u) - 0.5 * v
        distance = np.maximum(slanted, v) - 0.66 * radius
    elif shape == "cross":
        distance = np.minimum(box(1.05 * radius, 0.36 * radius), box(0.36 * radius, 1.05 * radius))
    else:
        raise ValueError(f"unknown shape {shape!r}; expected one of {', '.join(SHAPES)}")
    covered: npt.NDArray[np.float32] = np.clip(0.5 - distance, 0, 1)
    return covered


def is_held_out(clip: Clip) -> bool:
    """Whether the clip's combination of colour, shape and kind of motion is kept for evaluation (one in eight)."""
    colour, shape = list(COLOURS).index(clip.colour), SHAPES.index(clip.shape)
    return (colour + 2 * shape + 3 * KINDS.index(clip.motion.kind)) % 8 == 0


def all_clips(kinds: Sequence[str] = SINGLE_KINDS, *, held_out: bool | None = None) -> list[Clip]:
    """Every clip without jitter; `held_out` restricts to the combinations kept for evaluation, or to the others."""
    clips = (Clip(*parts) for parts in product(COLOURS, SHAPES, GROUNDS, motions(kinds)))
    return [clip for clip in clips if held_out is None or is_held_out(clip) == held_out]


def random_clip(
    generator: np.random.Generator,
    kinds: Sequence[str] = SINGLE_KINDS,
    *,
    held_out: bool = False,
    jitter: float = 2.0,
) -> Clip:
    """A clip with every kind of motion equally likely, jittered uniformly by up to `jitter` pixels."""
    while True:
        kind = kinds[int(generator.integers(len(kinds)))]
        choices = motions([kind])
        clip = Clip(
            list(COLOURS)[generator.integers(len(COLOURS))],
            SHAPES[int(generator.integers(len(SHAPES)))],
            list(GROUNDS)[generator.integers(len(GROUNDS))],
            choices[int(generator.integers(len(choices)))],
            (float(generator.uniform(-jitter, jitter)), float(generator.uniform(-jitter, jitter))),
        )
        if is_held_out(clip) == held_out:
            return clip
