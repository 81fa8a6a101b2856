"""What keys and values in eight bits cost, layer by layer and over rollouts: `python -m benchmarks.codes --out FOLDER`.

The shipped tiny model, finetuned under sparse attention, in the reference. Each attention of a rollout in float32 is
computed again on the same queries, keys and values and the same choice of blocks: as bf16 holds them, as `--kv fp8`
does, as it would with sinks in bf16, and as `--attention fp8` does. A figure is the distance from attention in float64.
The mass that softmax gives to sinks, to other past frames and to the chunk itself is compared likewise, and how much of
it lies on another block. Then whole rollouts are played in each form from the same noise.

What this shows: what the formats do to activations of a trained model, on synthetic shapes. What it cannot show: the
activations of the 1.3B model. Sinks that move are rounded once more in a rollout, which the comparison of single layers
does not see.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from lightforcing_ref.cache import AttentionSpec
    from lightforcing_ref.rollout import Rollout
    from lightforcing_ref.sparsity import BlockGeometry

    from .quality.rows import Weights

__all__ = ["FORMATS", "GROUPS", "Probe", "main"]

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "lightforcing_ref" / "assets" / "tiny"
FORMATS = ("bf16", "kv fp8", "kv fp8, sinks bf16", "attention fp8")
"""In order: all in bf16; keys and values as codes; the same but for sinks; and products of codes."""
GROUPS = ("sinks", "other past frames", "chunk")
CHUNKS = {"short": 7, "long": 40}
"""Of a clip, by variant."""


def _exact(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor) -> Tensor:
    """Attention in float64, `[T, H, ...]`; arguments as for `dense_attention`."""
    query, key, value = (x.double().transpose(0, 1) for x in (q, k, v))
    logits = (query @ key.transpose(1, 2) * scale).masked_fill(~mask, -math.inf)
    return (logits.softmax(-1) @ value).transpose(0, 1)


@dataclass
class Probe:
    """The attention of one layer, judged in every format whenever it is called; returns it in float32.

    Args:
        sink_frames, chunk_frames: of the cache, and of a chunk.
    """

    geometry: BlockGeometry
    sink_frames: int
    chunk_frames: int
    calls: int = 0
    """Calls with a past; those without are not judged."""
    error: dict[str, float] = field(default_factory=dict)
    """By format: the sum of squares of what the output is off by; under "" that of the output."""
    mass: dict[str, Tensor] = field(default_factory=dict)
    """By format, and exact under "": the mean mass of each of `GROUPS`, summed over calls, float64 `[3]`."""
    moved: dict[str, float] = field(default_factory=dict)
    """By format: the mean share of a query's mass that lies on another block, summed over calls."""

    def __call__(self, *tensors: Any, **attributes: Any) -> Tensor:
        from lightforcing_ref.attention import hsa_attention

        return hsa_attention(*tensors, **attributes, attend=self._attend)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor) -> Tensor:
        from lightforcing_ref.attention import dense_attention

        frames = len(k) // self.geometry.frame_tokens
        if frames > self.chunk_frames:
            self._judge(q, k, v, scale, mask, frames)
        return dense_attention(q, k, v, scale, mask)

    def _judge(self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor, frames: int) -> None:
        import torch
        import torch.nn.functional as F

        from lightforcing_ref.attention import token_blocks

        block = token_blocks(len(k), self.geometry.frame_tokens, self.geometry.block_k, k.device)
        blocks = frames * self.geometry.k_blocks
        member = F.one_hot(block, blocks).double()[:, None].expand(-1, k.shape[1], -1)
        of_frame = torch.arange(blocks) // self.geometry.k_blocks
        past = frames - self.chunk_frames
        groups = torch.where(of_frame >= past, 2, (of_frame >= min(self.sink_frames, past)).long())
        exact, exact_mass = (_exact(q, k, x, scale, mask) for x in (v, member))
        self.calls += 1
        self._add(self.error, "", float(exact.square().sum()))
        self._add(self.mass, "", self._by_group(exact_mass, groups))
        for name, (attend, values) in self._formats(q, k, v, frames).items():
            out, mass = (attend(v=x, scale=scale, mask=mask).double() for x in (values, member))
            self._add(self.error, name, float((out - exact).square().sum()))
            self._add(self.mass, name, self._by_group(mass, groups))
            self._add(self.moved, name, float((mass - exact_mass).abs().sum(-1).mean()) / 2)

    @staticmethod
    def _by_group(mass: Tensor, groups: Tensor) -> Tensor:
        return mass.new_zeros(len(GROUPS)).index_add_(0, groups, mass.mean((0, 1)))

    @staticmethod
    def _add(sums: dict[str, Any], name: str, value: Any) -> None:
        sums[name] = sums[name] + value if name in sums else value

    def _formats(
        self, q: Tensor, k: Tensor, v: Tensor, frames: int
    ) -> Mapping[str, tuple[Callable[..., Tensor], Tensor]]:
        """By format: attention but for its values, and what it has for values."""
        import torch

        from lightforcing_ref.fp8_cache import e4m3_attention

        query, key, value = (x.bfloat16().float() for x in (q, k, v))
        sinks = min(self.sink_frames, frames - self.chunk_frames)
        residual, mean, held = as_codes(key, value, self.geometry)
        some, some_mean, some_held = as_codes(key, value, self.geometry, sinks)
        return {
            "bf16": (partial(_exact, query, key), value),
            "kv fp8": (partial(_exact, query, residual + mean), held),
            "kv fp8, sinks bf16": (partial(_exact, query, some + some_mean), some_held),
            "attention fp8": (partial(e4m3_attention, query, torch.cat((residual, mean), -1)), held),
        }


def as_codes(
    k: Tensor, v: Tensor, geometry: BlockGeometry, exact_frames: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """What codes keep of keys less their block's mean, that mean, and what they keep of values, `[K, H, D]` each; the
    first `exact_frames` frames stay in bfloat16.
    """
    import torch

    from lightforcing_ref import fp8_cache
    from lightforcing_ref.attention import block_means

    tokens, block = geometry.frame_tokens, geometry.block_k
    of_frames, kept = (len(k) // tokens, tokens), exact_frames * tokens
    means = block_means(k, tokens, block)
    mean = fp8_cache.per_token(means, tokens, block).flatten(0, 1)
    codes, scales = fp8_cache.quantize_blocks(k.view(*of_frames, *k.shape[1:]), block, means)
    residual = fp8_cache.dequantize_blocks(codes, scales, block).flatten(0, 1)
    codes, scales = fp8_cache.quantize_values(v.view(*of_frames, *v.shape[1:]), block)
    held = fp8_cache.dequantize_values(codes, scales, tokens).flatten(0, 1)
    exact_k, exact_v = (x[:kept].bfloat16().float() for x in (k, v))
    return torch.cat((exact_k - mean[:kept], residual[kept:])), mean, torch.cat((exact_v, held[kept:]))


@dataclass(frozen=True)
class _SinksInBf16:
    """Attention over codes but for the sinks, which are held in bfloat16."""

    geometry: BlockGeometry
    sink_frames: int
    chunk_frames: int

    def __call__(self, *tensors: Any, **attributes: Any) -> Tensor:
        from lightforcing_ref.attention import hsa_attention

        return hsa_attention(*tensors, **attributes, attend=self._attend)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor) -> Tensor:
        from lightforcing_ref.attention import dense_attention

        past = len(k) // self.geometry.frame_tokens - self.chunk_frames
        residual, mean, held = as_codes(k, v, self.geometry, min(self.sink_frames, past))
        return dense_attention(q, residual + mean, held, scale, mask)


@dataclass(frozen=True)
class _Mode:
    """A variant of the shipped model, and what plays it."""

    variant: str
    weights: Weights

    def spec(self, kv: Any = None, products: Any = None) -> AttentionSpec:
        from export import load_variant
        from lightforcing_ref.cache import AttentionSpec
        from lightforcing_ref.sparsity import HSAConfig

        variant, preset = load_variant(self.variant), self.weights.preset
        geometry, frames = preset.geometry(), self.chunk_frames
        resident = range(frames, variant.window_frames + 1)
        return AttentionSpec(
            preset.dit.heads,
            geometry,
            HSAConfig(*variant.frame_choice),
            variant.table().keep_q20(count * geometry.k_blocks for count in resident),
            preset.dit.head_dim**-0.5,
            kv,
            products,
        )

    @property
    def chunk_frames(self) -> int:
        from lightforcing_ref.config import CHUNK_FRAMES

        return CHUNK_FRAMES

    def rollout(self, prompt: str, seed: int, spec: AttentionSpec, **attend: Any) -> Rollout:
        import numpy as np
        import torch

        from export import load_variant
        from lightforcing_ref.rollout import Rollout
        from runtime.noise import fill_noise

        variant, preset = load_variant(self.variant), self.weights.preset
        shape = (preset.dit.channels, self.chunk_frames, *preset.latent_size())

        def noise(chunk: int, step: int) -> Tensor:
            out = np.empty(shape, dtype=np.float32)
            fill_noise(out, seed=seed, chunk=chunk, step=step)
            return torch.from_numpy(out)

        return Rollout(
            self.weights.model,
            spec,
            self.weights.embed(prompt),
            noise,
            preset.token_grid(),
            window_frames=variant.window_frames,
            sink_frames=variant.cache.sink_frames,
            sink_positions=variant.cache.sink_positions,
            **attend,
        )

    @property
    def _frames(self) -> tuple[BlockGeometry, int, int]:
        """Blocks, sinks and frames of a chunk."""
        from export import load_variant

        return self.weights.preset.geometry(), load_variant(self.variant).cache.sink_frames, self.chunk_frames

    def probes(self) -> list[Probe]:
        return [Probe(*self._frames) for _ in range(self.weights.preset.dit.layers)]

    def sinks_in_bf16(self) -> _SinksInBf16:
        return _SinksInBf16(*self._frames)


def _rounding(*tensors: Any, **attributes: Any) -> Tensor:
    """Attention over queries, keys and values as bfloat16 holds them."""
    from lightforcing_ref.attention import hsa_attention

    q, k, v, q_mean, k_mean, past_k, past_v, *rest = tensors
    q, k, v, past_k, past_v = (x.bfloat16().float() for x in (q, k, v, past_k, past_v))
    return hsa_attention(q, k, v, q_mean, k_mean, past_k, past_v, *rest, **attributes)


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and standard error over clips, None of a single one."""
    from statistics import mean, stdev

    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": mean(values), "standard_error": error}


def _mass(clip: Sequence[Probe], name: str, group: int) -> float:
    """The mean mass of a group in a clip, over layers and calls."""
    return sum(float(probe.mass[name][group]) / probe.calls for probe in clip) / len(clip)


def _layers(clips: Sequence[Sequence[Probe]]) -> dict[str, Any]:
    """By format: each layer's error, and what moved; clips are the sample."""
    found: dict[str, Any] = {}
    for name in FORMATS:
        layers = list(zip(*clips, strict=True))
        found[name] = {
            "error_by_layer": [
                math.sqrt(sum(p.error[name] for p in layer) / sum(p.error[""] for p in layer)) for layer in layers
            ],
            "moved": _spread([sum(p.moved[name] / p.calls for p in clip) / len(clip) for clip in clips]),
            "mass": {
                group: {
                    "exact": _spread([_mass(clip, "", at) for clip in clips]),
                    "difference": _spread([_mass(clip, name, at) - _mass(clip, "", at) for clip in clips]),
                }
                for at, group in enumerate(GROUPS)
            },
        }  # fmt: skip
    return found


def _rollouts(mode: _Mode, prompts: Sequence[str], chunks: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Layers over rollouts in float32, and the distance of the other forms' latents from these, chunk by chunk."""
    clips: list[list[Probe]] = []
    distance: dict[str, list[list[float]]] = {name: [] for name in FORMATS}
    for seed, prompt in enumerate(prompts):
        clips.append(mode.probes())
        exact = list(mode.rollout(prompt, seed, mode.spec(), attend=clips[-1]).stream(chunks))
        played = {
            "bf16": mode.rollout(prompt, seed, mode.spec(), attend=_rounding),
            "kv fp8": mode.rollout(prompt, seed, mode.spec("fp8")),
            "kv fp8, sinks bf16": mode.rollout(prompt, seed, mode.spec(), attend=mode.sinks_in_bf16()),
            "attention fp8": mode.rollout(prompt, seed, mode.spec("fp8", "fp8")),
        }
        for name, rollout in played.items():
            pairs = zip(exact, rollout.stream(chunks), strict=True)
            distance[name].append([float((other - x).norm() / x.norm()) for x, other in pairs])
        print(f"{mode.variant}: {prompt}", file=sys.stderr)
    by_chunk = {
        name: [sum(at) / len(at) for at in zip(*rows, strict=True)] for name, rows in distance.items()
    }
    return _layers(clips), by_chunk


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.codes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--variants", default="short,long", help="comma-separated (default: short,long)")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--chunks", type=int, help="of a clip (default: 7, in the long mode 40)")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)

    import torch

    from lightforcing_ref.config import PRESETS

    from .quality.main import prompts
    from .quality.rows import Weights

    torch.set_num_threads(1)
    weights = Weights.load(WEIGHTS, PRESETS["tiny"])
    captions = [clip.caption for clip in prompts(options.prompts, ("moves", "bounces", "orbits", "grows"))]
    results: dict[str, Any] = {}
    for variant in options.variants.split(","):
        chunks = options.chunks or CHUNKS[variant]
        layers, latents = _rollouts(_Mode(variant, weights), captions, chunks)
        results[variant] = {"chunks": chunks, "layers": layers, "latents_by_chunk": latents}
        for name in FORMATS:
            worst, moved = max(layers[name]["error_by_layer"]), layers[name]["moved"]["mean"]
            last = latents[name][-1]
            print(
                f"{variant:6}{name:14} layer at worst {worst:.4f}, mass moved {moved:.5f}, last chunk {last:.3f}"
            )
    command = f"python -m benchmarks.codes --variants {options.variants} --prompts {options.prompts}"
    command += "" if options.chunks is None else f" --chunks {options.chunks}"
    options.out.mkdir(parents=True, exist_ok=True)
    document = {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "prompts": captions,
        "results": results,
    }
    (options.out / "codes.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
