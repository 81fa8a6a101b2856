"""By how much the ways to recompute the cache at a prompt switch differ: `python -m benchmarks.recaches --out FOLDER`.

The shipped tiny model with the cache of the variant `longlive`, in the reference: one rollout of one prompt, and at
each of several chunks another prompt, under each mode of `recache`. A figure is the distance of the latents of the
first chunk behind the switch from those under `window` (block-causal), relative L2; that of `none` says how much
recomputing matters at all.

What this shows: how far the modes are apart on synthetic shapes. What it cannot show: which of them looks better.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from lightforcing_ref.rollout import Recache, Rollout

__all__ = ["main"]

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "lightforcing_ref" / "assets" / "tiny"
PROMPTS = (
    (
        "a red circle on grey orbits clockwise from the top",
        "a blue square on grey moves right from the top left",
    ),
    (
        "a yellow square on black moves right from the top left",
        "a green triangle on white grows at the centre",
    ),
)
"""Before and after the switch."""
SWITCHES = (1, 2, 3, 4, 5, 7)
"""Chunks. The window of four chunks is full from chunk 4 on; from chunk 5 on a joint forward leaves the sinks alone."""
MODES: tuple[Recache, ...] = ("joint", "all", "none")
WINDOW, SINKS = 12, 3


def _fork(rollout: Rollout) -> Rollout:
    """A rollout that goes on from where `rollout` is."""
    twin = copy.copy(rollout)
    twin.cache = copy.copy(rollout.cache)
    twin.cache.frames = dict(rollout.cache.frames)
    twin.latents = dict(rollout.latents)
    return twin


def _distances(rollout: Rollout, text: Tensor) -> dict[int, dict[Recache, float]]:
    """By chunk of the switch and mode."""
    found: dict[int, dict[Recache, float]] = {}
    for chunk in range(max(SWITCHES) + 1):
        if chunk in SWITCHES:
            made: dict[Recache, Tensor] = {}
            modes: tuple[Recache, ...] = ("window", *MODES)
            for mode in modes:
                twin = _fork(rollout)
                twin.set_prompt(text, mode)
                made[mode] = twin.generate_chunk()
            found[chunk] = {
                mode: float((made[mode] - made["window"]).norm() / made["window"].norm()) for mode in MODES
            }
        rollout.generate_chunk()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recaches",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kv", choices=("fp8",), help="hold keys and values as codes of E4M3")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)

    import numpy as np
    import torch

    from lightforcing_ref.cache import AttentionSpec
    from lightforcing_ref.config import PRESETS
    from lightforcing_ref.rollout import Rollout
    from lightforcing_ref.sparsity import HSAConfig, SparsityTable
    from runtime.noise import fill_noise

    from .quality.rows import Weights

    torch.set_num_threads(1)
    preset = PRESETS["tiny"]
    weights, geometry = Weights.load(WEIGHTS, preset, "dit_dense.safetensors"), preset.geometry()
    spec = AttentionSpec(
        heads=preset.dit.heads,
        geometry=geometry,
        hsa=HSAConfig(WINDOW - SINKS, 0, 0),
        keep_q20=SparsityTable.dense().keep_q20(
            geometry.k_blocks * frames for frames in range(3, WINDOW + 1)
        ),
        scale=preset.dit.head_dim**-0.5,
        kv=options.kv,
    )
    shape = (preset.dit.channels, 3, *preset.latent_size(preset.height, preset.width))

    def noise(chunk: int, step: int) -> Tensor:
        out = np.empty(shape, dtype=np.float32)
        fill_noise(out, seed=options.seed, chunk=chunk, step=step)
        return torch.from_numpy(out)

    found = []
    for before, after in PROMPTS:
        rollout = Rollout(
            weights.model,
            spec,
            weights.embed(before),
            noise,
            preset.token_grid(preset.height, preset.width),
            window_frames=WINDOW,
            sink_frames=SINKS,
        )
        found.append(_distances(rollout, weights.embed(after)))
    result = {
        "seed": options.seed,
        "kv": options.kv,
        "prompts": PROMPTS,
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "distance_from_window": found,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"recaches{'-kv8' if options.kv else ''}.json"
    (options.out / name).write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'chunk':>6}" + "".join(f"{mode:>16}" for mode in MODES))
    for chunk in SWITCHES:
        cells = ("  ".join(f"{pair[chunk][mode]:.3f}" for pair in found) for mode in MODES)
        print(f"{chunk:>6}" + "".join(f"{cell:>16}" for cell in cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
