"""A rollout written the plain way, to compare the runtime with.

Everything is eager and copied: each frame's keys and values sit in a dict, each forward stacks what it may see,
prompts switch at once. It runs the bundle's graphs through `InferenceSession.run` and shares no code with the
runtime.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

Layers = list[tuple[np.ndarray, np.ndarray, np.ndarray]]


@functools.cache
def load_graphs(folder: Path) -> dict[str, ort.InferenceSession]:
    """The components that a rollout runs, by name."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return {
        path.stem: ort.InferenceSession(path, sess_options=options, providers=["CPUExecutionProvider"])
        for path in folder.glob("*.onnx")
        if path.stem != "text_encoder"
    }


class NaiveRollout:
    """Generates the clip of one seed; `embedding` is `[text_len, dim]`."""

    def __init__(self, folder: Path, embedding: np.ndarray, seed: int) -> None:
        self.manifest = json.loads((folder / "manifest.json").read_text())
        self.graphs = load_graphs(folder)
        model, cache = self.manifest["model"], self.manifest["cache"]
        self.per_chunk, self.layers = model["chunk_frames"], model["layers"]
        self.sinks, self.positions = cache["sink_frames"], cache["sink_positions"]
        self.capacity = cache["max_past_frames"]
        self.latent_shape = (
            model["latent_channels"],
            self.per_chunk,
            model["latent_height"],
            model["latent_width"],
        )
        self.seed = seed
        self.chunk = 0
        self.frames: dict[int, Layers] = {}
        self.latents: dict[int, np.ndarray] = {}
        self.committed: set[int] = set()
        self.jumps: dict[int, int] = {}  # first frame -> how far it and all later ones are moved in time
        self.vae_caches: list[np.ndarray] | None = None
        self.cross = self.condition(embedding)

    def run(self, name: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        graph = self.graphs[name]
        wanted = {item.name for item in graph.get_inputs()}
        values = graph.run(None, {key: value for key, value in inputs.items() if key in wanted})
        return dict(zip((item.name for item in graph.get_outputs()), values, strict=True))

    def condition(self, embedding: np.ndarray) -> dict[str, np.ndarray]:
        return self.run("conditioner", {"text": embedding.astype(np.float32)})

    def position(self, frame: int) -> int:
        return frame + sum(distance for first, distance in self.jumps.items() if first <= frame)

    def rope(self, positions: list[int]) -> tuple[np.ndarray, np.ndarray]:
        model = self.manifest["model"]
        rows, columns = model["latent_height"] // 2, model["latent_width"] // 2
        theta, dims = model["rope"]["theta"], model["rope"]["dims_thw"]
        table = []
        for position in positions:
            for row in range(rows):
                for column in range(columns):
                    axes = zip((position, row, column), dims, strict=True)
                    table.append([p * theta ** (-2 * j / d) for p, d in axes for j in range(d // 2)])
        angles = np.array(table, dtype=np.float64)
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def seen(self, frame: int, resident: list[int], own_first: int) -> Layers:
        """A cached frame as attention sees it: sinks turned to their place before the window."""
        if self.positions != "window" or frame >= self.sinks:
            return self.frames[frame]
        recent = [other for other in resident if other >= self.sinks]
        # Window-relative positions count from the first sink, and not all sinks exist from the start.
        sinks = len([f for f in resident if f < self.sinks])
        # A cut lies between what is left, sinks among it, and what follows.
        after = self.position(recent[0]) if recent else self.position(max(own_first, sinks) - 1) + 1
        shift = after - sinks
        time_dim = self.manifest["model"]["rope"]["dims_thw"][0]
        theta = self.manifest["model"]["rope"]["theta"]

        def turn(x: np.ndarray) -> np.ndarray:
            y = x.copy()
            for j in range(time_dim // 2):
                angle = shift * theta ** (-2 * j / time_dim)
                c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
                y[..., 2 * j] = x[..., 2 * j] * c - x[..., 2 * j + 1] * s
                y[..., 2 * j + 1] = x[..., 2 * j] * s + x[..., 2 * j + 1] * c
            return y

        return [(turn(k), v, turn(means)) for k, v, means in self.frames[frame]]

    def inputs(self, chunk: int, past: list[int]) -> dict[str, np.ndarray]:
        first = chunk * self.per_chunk
        cos, sin = self.rope([self.position(first) + i for i in range(self.per_chunk)])
        resident = sorted(self.frames)
        entries = [self.seen(frame, resident, first) for frame in past]
        order = np.random.default_rng(chunk).permutation(self.capacity)[
            : len(past)
        ]  # any physical order will do
        slots = np.full(self.capacity, -1, dtype=np.int32)
        slots[: len(past)] = order
        result = {
            "chunk": np.array(chunk, np.int32),
            "frame_slots": slots,
            "rope_cos": cos,
            "rope_sin": sin,
            **self.cross,
        }
        specs = {spec["name"]: spec for spec in self.manifest["components"]["step"]["inputs"]}
        for layer in range(self.layers):
            for index, stem in enumerate(("past_k", "past_v", "past_kmean")):
                shape = specs[f"{stem}.{layer}"]["shape"][1:]
                pool = np.full((self.capacity, *shape), 9.0, dtype=np.float32)
                for slot, entry in zip(order, entries, strict=True):
                    pool[slot] = entry[layer][index]
                result[f"{stem}.{layer}"] = pool
        return result

    def clean(self, chunk: int, past: list[int], keep: list[int]) -> None:
        out = self.run("clean", {"latent": self.latents[chunk], **self.inputs(chunk, past)})
        self.store(out, chunk, keep)

    def store(self, out: dict[str, np.ndarray], chunk: int, keep: Sequence[int]) -> None:
        for index in range(self.per_chunk):
            frame = chunk * self.per_chunk + index
            if frame in keep:
                self.frames[frame] = [
                    (
                        np.split(out[f"k.{layer}"], self.per_chunk)[index],
                        np.split(out[f"v.{layer}"], self.per_chunk)[index],
                        out[f"kmean.{layer}"][index],
                    )
                    for layer in range(self.layers)
                ]

    def commit(self) -> None:
        """Cache the last chunk, then drop the oldest frames that are no sinks."""
        if self.chunk == 0 or self.chunk - 1 in self.committed:
            return
        last = self.chunk - 1
        frames = [last * self.per_chunk + index for index in range(self.per_chunk)]
        self.clean(last, sorted(self.frames), frames)
        self.committed.add(last)
        self.evict()

    def evict(self) -> None:
        while len(self.frames) > self.capacity:
            del self.frames[min(frame for frame in self.frames if frame >= self.sinks)]

    def set_prompt(self, embedding: np.ndarray, recache: str) -> None:
        self.commit()
        self.cross = self.condition(embedding)
        if recache == "none":
            return
        if recache in ("flush", "cut"):
            recent = sorted(frame for frame in self.frames if frame >= self.sinks)
            for frame in recent[:-2]:
                del self.frames[frame]
            if recache == "cut" and self.chunk * self.per_chunk >= self.sinks:
                self.jumps[self.chunk * self.per_chunk] = 42
            return
        resident = sorted(self.frames)
        renewed = [frame for frame in resident if recache == "all" or frame >= self.sinks]
        for chunk in sorted({frame // self.per_chunk for frame in renewed}):
            self.clean(chunk, [frame for frame in resident if frame < chunk * self.per_chunk], renewed)

    def noise(self, chunk: int, step: int) -> np.ndarray:
        key = np.array([self.seed, chunk * 256 + step], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key)).standard_normal(self.latent_shape, np.float32)

    def next_chunk(self) -> np.ndarray:
        """Frames uint8 `[N, H, W, 3]` of the next chunk."""
        self.commit()
        chunk = self.chunk
        shared = self.inputs(chunk, sorted(self.frames))
        x = self.noise(chunk, 0)
        schedule = self.manifest["schedule"]
        own, other = schedule["first_timesteps"], len(schedule["timesteps"])
        steps = len(own) if chunk == 0 and own else other - 1
        before = (
            other if chunk == 0 and own else 0
        )  # rows of the first chunk lie behind the others and the clean one
        for step in range(steps):
            noise = self.noise(chunk, step + 1) if step < steps - 1 else np.zeros_like(x)
            row = np.array(before + step, np.int32)
            out = self.run("step", {"latent": x, "noise": noise, "step": row, **shared})
            x = out["next_latent"]
        self.latents[chunk] = out["x0"]
        self.chunk += 1
        if not schedule["clean_forward"]:
            self.store(out, chunk, range(chunk * self.per_chunk, self.chunk * self.per_chunk))
            self.committed.add(chunk)
            self.evict()
        return np.concatenate([self.decode(out["x0"][:, i : i + 1]) for i in range(self.per_chunk)])

    def give(self, frames: np.ndarray) -> np.ndarray:
        """Take whole chunks from a clip, uint8 `[N, H, W, 3]`, in place of denoising them.

        Returns:
            What the decoder makes of them, which a session does not show, of the clip's shape.
        """
        video = (frames.astype(np.float32) / 127.5 - 1).transpose(0, 3, 1, 2)
        out = self.run("vae_encode_first", {"video": video[:1]})
        latents = [out["latent"]]
        factor = self.manifest["vae"]["temporal_factor"]
        for start in range(1, len(video), factor):
            caches = {
                name.replace("cache_out.", "cache."): value
                for name, value in out.items()
                if "cache_out" in name
            }
            out = self.run("vae_encode_next", {"video": video[start : start + factor], **caches})
            latents.append(out["latent"])
        clip = np.concatenate(latents, axis=1)
        decoded = []
        for chunk in np.split(clip, clip.shape[1] // self.per_chunk, axis=1):
            self.commit()
            self.latents[self.chunk] = chunk
            self.chunk += 1
            decoded += [self.decode(chunk[:, index : index + 1]) for index in range(self.per_chunk)]
        return np.concatenate(decoded)

    def decode(self, latent: np.ndarray) -> np.ndarray:
        specs = self.manifest["vae"]["caches"]
        if self.vae_caches is None:
            out = self.run("vae_first", {"latent": latent})
            self.vae_caches = [np.zeros(spec["shape"], np.float32) for spec in specs]
        else:
            caches = {f"cache.{i}": cache for i, cache in enumerate(self.vae_caches)}
            out = self.run("vae_next", {"latent": latent, **caches})
        self.vae_caches = [out.get(f"cache_out.{i}", old) for i, old in enumerate(self.vae_caches)]
        return out["frames"]
