"""The clips that have been generated and scored: written one by one, so that an interrupted benchmark goes on.

`clips.jsonl` has a line for each; frames lie in `frames/`, outside version control, because a row that is added later
is compared with the dense clips of before.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt

from runtime import atomic_output

from .scores import ClipScore

__all__ = ["Frames", "Key", "Ledger"]

Frames = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Key:
    """One clip.

    Attributes:
        identity: what the row's clips depend on besides.
        dense: the identity of the row that frames are compared with, which mostly is the dense one.
    """

    row: str
    identity: str
    dense: str
    caption: str
    seed: int
    chunks: int


class Ledger:
    """What lies in a folder of results.

    A line that was cut off by a kill is left out, and its clip is made anew.
    """

    def __init__(self, folder: Path) -> None:
        self._lines, self._frames = folder / "clips.jsonl", folder / "frames"
        self._known: dict[Key, tuple[ClipScore, float | None]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        text = self._lines.read_text() if self._lines.exists() else ""
        for line in text.splitlines(keepends=True):
            if line.endswith("\n"):
                content = json.loads(line)
                by_chunk = tuple(content["score"].pop("by_chunk"))
                score = ClipScore(**content["score"], by_chunk=by_chunk)
                self._known[Key(**content["key"])] = score, content["share"]
        if text and not text.endswith("\n"):
            self._lines.write_text(text[: text.rfind("\n") + 1])

    def score(self, key: Key) -> ClipScore | None:
        """The score of a clip; None = it is still to be made."""
        found = self._known.get(key)
        return None if found is None else found[0]

    def share(self, row: str, identity: str) -> float | None:
        """The share of the keys that a row saw when it was counted."""
        shares = [
            share for key, (_, share) in self._known.items() if (key.row, key.identity) == (row, identity)
        ]
        return next((share for share in shares if share is not None), None)

    def frames(self, key: Key) -> Frames | None:
        """The frames of a clip uint8 `[N, H, W, 3]`; None where they were not kept."""
        path = self._path(key)
        if not path.exists():
            return None
        with np.load(path) as content:
            frames: Frames = content["frames"]
        return frames

    def keep(self, key: Key, frames: Frames) -> None:
        """Keep a clip's frames uint8 `[N, H, W, 3]`."""
        self._frames.mkdir(parents=True, exist_ok=True)
        with atomic_output(self._path(key)) as path, path.open("wb") as file:
            np.savez_compressed(file, frames=frames)

    def add(self, key: Key, score: ClipScore, share: float | None) -> None:
        """Write a clip's score down, and the share of the keys that its row saw, where it was counted."""
        with self._lines.open("a") as lines:
            lines.write(json.dumps({"key": asdict(key), "share": share, "score": asdict(score)}) + "\n")
        self._known[key] = score, share

    def _path(self, key: Key) -> Path:
        name = "/".join((key.identity, key.caption, str(key.seed), str(key.chunks)))
        return self._frames / f"{sha256(name.encode()).hexdigest()[:24]}.npz"
