# mypy: allow-untyped-calls, no-warn-return-any
"""Clips together with what the model itself last made of them.

A model that was trained on true context takes its own for true as well: an object that came out blurred stays blurred,
and grows worse chunk by chunk. Rollouts of its own show it such context but cost as much as many training steps. Here a
rollout serves several steps, and every prediction that training makes anyway takes its place, so that it is the
context, and what noise is added to, when the clip is drawn again. The target is always the true clip.

Still the shape would be copied from context, since that is mostly right. New clips are therefore blended with the same
clip of another shape: context tells place and time, and only the caption tells the shape.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from training.data.clips import Motion
from training.data.dataset import ClipSet
from training.device import tensor

__all__ = ["Indices", "Replay"]

Indices = npt.NDArray[np.int64]


class Replay:
    """A pool of clips.

    Args:
        size: clips in the pool.
        renewed: probability that a clip, when drawn, gives its place to another one.
        blended: probability that a new clip is blended, to any degree, with the same of another shape.
    """

    def __init__(self, clips: ClipSet, size: int, renewed: float, blended: float) -> None:
        self.clips, self.size, self.renewed, self.blended = clips, size, renewed, blended
        self._alike: dict[tuple[str, str, Motion], list[int]] = {}
        for index, clip in enumerate(clips.clips):
            self._alike.setdefault((clip.colour, clip.ground, clip.motion), []).append(index)
        frames, channels, height, width = clips.latents.shape[1:]
        self.members: Indices = np.full(size, -1, np.int64)
        """Which clip each place holds; -1 = none yet."""
        self.own = torch.zeros(size, channels, frames, height, width)
        """The version of each, `[size, 16, 21, h, w]`: at first true or blended, later what `put` gave."""

    def draw(self, generator: np.random.Generator, count: int) -> Indices:
        """`count` different places, some with new clips."""
        places = generator.choice(self.size, count, replace=False)
        self.renew(generator, places[(self.members[places] < 0) | (generator.random(count) < self.renewed)])
        return places

    def renew(self, generator: np.random.Generator, places: Indices) -> None:
        """Put other clips, true or blended ones, into `places`."""
        self.members[places] = self.clips.draw(generator, len(places))
        for place in places:
            version = self.clips.latents[self.members[place]].astype(np.float32)
            if generator.random() < self.blended:
                other = generator.choice(self._alike_to(self.members[place]))
                version += generator.random() * (self.clips.latents[other] - version)
            self.own[place] = tensor(version).transpose(0, 1)

    def _alike_to(self, member: int) -> list[int]:
        """The clips that differ from `member` in shape at most, itself among them."""
        clip = self.clips.clips[member]
        return self._alike[clip.colour, clip.ground, clip.motion]

    def rivals(self, generator: np.random.Generator, places: Indices, frames: int) -> Tensor:
        """The first `frames` latent frames of the clips in `places` in another shape, `[count, 16, frames, h, w]`.

        A clip that the set holds in one shape only is its own rival.
        """
        found = []
        for member in self.members[places]:
            rivals = [other for other in self._alike_to(member) if other != member] or [member]
            found.append(self.clips.latents[generator.choice(rivals), :frames].astype(np.float32))
        return tensor(np.stack(found)).transpose(1, 2)

    def put(self, places: Indices, predicted: Tensor, first: int = 0) -> None:
        """Keep the latent frames from `first` on, `[count, 16, frames, h, w]`, as the model's own version."""
        self.own[places, :, first : first + predicted.shape[2]] = predicted.detach()
