"""What remedies for NVFP4's errors are worth: `python -m benchmarks.fp4_remedies --out FILE`.

The block linears of the shipped tiny model on what they see in rollouts under sparse attention, and each remedy of
NVIDIA ModelOpt's where it is exact in unquantized numbers: scales of channels moved from activations into weights
(SmoothQuant; AWQ-lite, whose exponent is searched by the output's error), a Hadamard rotation of groups of channels,
and SVDQuant's low-rank branch beside the FP4 product. A figure is the relative L2 error of a linear's output, weights
and activations quantized as the exporter quantizes them; remedies are judged on the inputs that they were fitted to. A
branch costs time, which may as well go into FP8 for some of the linears: "same time" is the error of that mix, times
predicted for a square linear of the 1.3B model at the peak rates of an RTX 5090.

What this shows: which remedy this model's linears answer to. What it cannot show: that of a model with outlying
channels, which this one has not.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["main"]

PROMPTS = (
    "a red circle on grey orbits clockwise from the top",
    "a yellow square on black moves right from the top left",
)
ALPHAS = tuple(index / 10 for index in range(11))
"""Exponents that AWQ-lite tries."""
GROUPS = (16, 128)
"""Channels that a rotation mixes."""
RANKS = (4, 8, 16)
KEPT = 512
"""Tokens of each linear's inputs that are looked at."""
WIDTH, TOKENS = 1536, 4608
"""Of the 1.3B model at 512x768."""


def smoothed(x: Tensor, weight: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """SmoothQuant: largest activations to `alpha`, against largest weights; scales are powers of two, so that moving
    them is exact.
    """
    import torch

    inputs, weights = (t.abs().flatten(0, -2).amax(0).clamp_min(1e-5) for t in (x, weight))
    scale = torch.exp2((inputs.pow(alpha) / weights.pow(1 - alpha)).log2().round())
    return x / scale, weight * scale


def activation_aware(x: Tensor, weight: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """AWQ-lite: mean activations to `alpha`; powers of two."""
    import torch

    scale = x.abs().flatten(0, -2).mean(0).clamp_min(1e-5).pow(alpha)
    scale = torch.exp2((scale / (scale.max() * scale.min()).sqrt()).log2().round())
    return x / scale, weight * scale


def rotated(x: Tensor, weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Both by the orthonormal Hadamard matrix, `group` channels at a time."""
    import torch

    matrix = torch.ones(1, 1)
    while len(matrix) < group:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    matrix = matrix / group**0.5
    turned = [(t.reshape(len(t), -1, group) @ matrix).reshape(t.shape) for t in (x, weight)]
    return turned[0], turned[1]


def product_error(x: Tensor, weight: Tensor, rank: int = 0) -> float:
    """Relative error of the product in NVFP4, scales searched for and weighed by the inputs.

    Args:
        rank: of a branch in bf16 that takes the largest part of what the weight does to these inputs.
    """
    import torch

    from export.quantize import fake_linear, fold_weight, importance_of, relative_error

    rms = x.square().mean(0).sqrt()
    branch = torch.zeros(())
    residual = weight
    if rank:
        weighed = rms.clamp_min(1e-3 * float(rms.max()))
        left, values, right = torch.linalg.svd(weight * weighed, full_matrices=False)
        up, down = (left[:, :rank] * values[:rank]).bfloat16(), (right[:rank] / weighed).bfloat16()
        residual = weight - up.float() @ down.float()
        branch = (x.bfloat16() @ down.T @ up.T).float()
    folded = fold_weight(residual, "nvfp4", importance=importance_of(rms.tolist()))
    return relative_error(fake_linear(x, folded, "nvfp4") + branch, x @ weight.T)


def remedies(x: Tensor, weight: Tensor) -> dict[str, float]:
    """The error with each remedy; AWQ-lite's exponent is the best for this linear."""
    from export.quantize import fake_linear, fold_weight, relative_error

    best = min(ALPHAS, key=lambda alpha: product_error(*activation_aware(x, weight, alpha)))
    scaled = activation_aware(x, weight, best)
    fp8 = relative_error(fake_linear(x, fold_weight(weight, "fp8"), "fp8"), x @ weight.T)
    plain = product_error(x, weight)
    return {
        "fp8": fp8,
        "searched, weighed": plain,
        "SmoothQuant": product_error(*smoothed(x, weight, 0.5)),
        "AWQ-lite": product_error(*scaled),
        **{f"Hadamard {group}": product_error(*rotated(x, weight, group)) for group in GROUPS},
        **{f"rank {rank}": product_error(x, weight, rank) for rank in RANKS},
        **{
            f"rank {rank}, same time": mixed(plain, fp8, rank * sum(weight.shape) / weight.numel())
            for rank in RANKS
        },
        "AWQ-lite, rank 8": product_error(*scaled, rank=8),
    }


def mixed(nvfp4: float, fp8: float, share: float) -> float:
    """The error where as much time as a branch takes goes into FP8 for a part of the products, squares added up."""
    times = seconds(share)
    part = min(1.0, times["branch"] / (times["fp8"] - times["nvfp4"]))
    return float(((1 - part) * nvfp4**2 + part * fp8**2) ** 0.5)


def seconds(share: float) -> dict[str, float]:
    """Times of a square linear in NVFP4 and in FP8, and of a branch in bf16 whose two thin products have `share` of its
    operations. What these move is not counted.
    """
    from export import load_target

    peak = load_target("rtx5090").peak
    assert peak is not None

    def alone(format: Literal["nvfp4", "fp8", "bf16"]) -> float:
        rate = peak.tflops(format)
        assert rate is not None
        return 2 * TOKENS * WIDTH**2 / (rate * 1e12)

    return {"nvfp4": alone("nvfp4"), "fp8": alone("fp8"), "branch": share * alone("bf16")}


def _inputs(prompts: Sequence[str], chunks: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs `[tokens, K]` and weights of every block linear, by name."""
    import torch

    from export import StepPlan, load_target, load_variant, shipped_weights
    from export.quantize import Trial, block_linears, embed_prompts, merge_qkv
    from lightforcing_ref.config import PRESETS

    tiny = PRESETS["tiny"]
    weights = shipped_weights(tiny, dense=False)
    assert weights is not None
    short = load_variant("short")
    blocks = short.blocks(load_target("rtx5090"), tiny.block)
    plan = StepPlan.of(tiny, short, tiny.height, tiny.width, block_q=blocks.query, block_k=blocks.key)
    model = weights.dit(torch.float32)
    merge_qkv(model)
    linears = block_linears(model)
    seen: dict[str, list[Tensor]] = {name: [] for name in linears}

    def watch(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: seen[name].append(inputs[0].detach().flatten(0, -2))

    for name, linear in linears.items():
        linear.register_forward_hook(watch(name))
    with torch.no_grad():
        Trial(plan, tuple(embed_prompts(weights, prompts)), chunks=chunks).run(model)
    generator = torch.Generator().manual_seed(0)
    kept = {}
    for name, parts in seen.items():
        every = torch.cat(parts)
        kept[name] = every[torch.randperm(len(every), generator=generator)[:KEPT]]
    return kept, {name: linear.weight.detach() for name, linear in linears.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fp4_remedies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--chunks", type=int, default=3, help="length of each rollout (default: %(default)s)")
    options = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)
    inputs, weights = _inputs(PROMPTS, options.chunks)
    found = {name: remedies(x, weights[name]) for name, x in inputs.items()}
    by_kind = {
        kind: {remedy: sum(errors[remedy] for errors in own) / len(own) for remedy in own[0]}
        for kind in dict.fromkeys(name.split(".", 2)[2] for name in found)
        for own in ([errors for name, errors in found.items() if name.endswith(f".{kind}")],)
    }
    document = {
        "command": shlex.join(
            ["python", "-m", "benchmarks.fp4_remedies", *(sys.argv[1:] if arguments is None else arguments)]
        ),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "tokens": KEPT,
        "errors": by_kind,
        "seconds": {f"1/{part}": seconds(1 / part) for part in (16, 8, 4)},
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    for kind, errors in by_kind.items():
        print(kind, {remedy: round(error, 3) for remedy, error in errors.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
