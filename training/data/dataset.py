"""The rendered training set: latents of clips, kept on disk so that no stage waits for the renderer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt

from training.config import Run, TrainingConfig

from .clips import Clip, Motion, all_clips, random_clip
from .latents import PatchPCA

__all__ = ["LATENT_FRAMES", "ClipSet", "build_latents", "foreground"]

LATENT_FRAMES = 21
LATENT_SIDE = 16
SHARES = {"moves": 1.0, "bounces": 1.0, "orbits": 2.5, "grows": 2.5, "leaves": 1.0}
"""How often each kind of motion is drawn. There are fewer clips that orbit or grow, and they are harder: every frame
shows the shape at another sub-pixel place or in another size."""
_SHAPE = (LATENT_FRAMES, 16, LATENT_SIDE, LATENT_SIDE)


def _clip_from(row: dict[str, object]) -> Clip:
    motion, jitter = row["motion"], row["jitter"]
    assert isinstance(motion, dict) and isinstance(jitter, list)
    return Clip(
        str(row["colour"]), str(row["shape"]), str(row["ground"]), Motion(**motion), (jitter[0], jitter[1])
    )


class ClipSet:
    """Clips and their latents, float16 `[N, 21, 16, 16, 16]` (frames before channels)."""

    def __init__(self, folder: Path) -> None:
        text = (folder / "clips.jsonl").read_text()
        self.clips = [_clip_from(json.loads(line)) for line in text.splitlines()]
        scale = PatchPCA.load(folder / "pca.safetensors").scale
        self.channel_weight = np.sqrt(scale) / np.sqrt(scale).mean()
        """Loss weight of each latent channel: between whitened latents (1 each) and pixels (their variance)."""
        self.latents = np.memmap(folder / "latents.f16", np.float16, "r", shape=(len(self.clips), *_SHAPE))
        kinds = [clip.motion.kind for clip in self.clips]
        odds = np.array([SHARES[kind] / kinds.count(kind) for kind in kinds])
        self._odds = odds / odds.sum()

    def __len__(self) -> int:
        return len(self.clips)

    def draw(self, generator: np.random.Generator, size: int) -> npt.NDArray[np.int64]:
        """Indices of `size` clips, each kind of motion in its share."""
        return generator.choice(len(self), size, p=self._odds)


def build_latents(
    config: TrainingConfig, run: Run, report: Callable[[str, float], None] | None = None
) -> None:
    """Fit the PCA unless it exists, then render and encode clips; goes on where it was interrupted.

    Every caption occurs at most once and without jitter: the transformer's clips are functions of their captions.
    """
    folder = run.stage("latents")
    folder.mkdir(parents=True, exist_ok=True)
    if not run.pca.exists():
        generator = np.random.default_rng([config.seed, 1])
        clips = (random_clip(generator, config.data.kinds) for _ in range(config.data.pca_clips))
        PatchPCA.fit(clip.render() for clip in clips).save(run.pca)
    pca = PatchPCA.load(run.pca)
    record, store = folder / "clips.jsonl", folder / "latents.f16"
    size = 2 * int(np.prod(_SHAPE))
    done = 0
    if record.exists() and store.exists():
        done = min(record.read_text().count("\n"), store.stat().st_size // size)
        lines = record.read_text().splitlines(keepends=True)[:done]
        record.write_text("".join(lines))
        with store.open("r+b") as file:
            file.truncate(done * size)
    captions = all_clips(config.data.kinds, held_out=False)
    order = np.random.default_rng([config.seed, 2]).permutation(len(captions))[: config.data.clips]
    with store.open("ab") as latents, record.open("a") as specs:
        for index in range(done, len(order)):
            clip = captions[order[index]]
            latents.write(pca.encode(clip.render()).astype(np.float16).tobytes())
            latents.flush()
            specs.write(json.dumps(asdict(clip)) + "\n")
            specs.flush()
            if report is not None:
                report(f"{index + 1} clips", (index + 1) / len(order))


def foreground(paths: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Latent pixels that the object touches, with a margin.

    Args:
        paths: centre x, y and radius of each pixel frame, `[B, 81, 3]`.

    Returns:
        `[B, 21, 16, 16]`.
    """
    by_latent = np.concatenate([np.repeat(paths[:, :1], 4, 1), paths[:, 1:]], axis=1)
    x, y, radius = np.moveaxis(by_latent.reshape(len(paths), LATENT_FRAMES, 4, 3), -1, 0)[..., None, None]
    centres = 8.0 * np.arange(LATENT_SIDE) + 4
    distance = np.maximum(np.abs(centres - x), np.abs(centres[:, None] - y))
    touched: npt.NDArray[np.bool_] = (distance < 1.05 * radius + 5).any(2)
    return touched
