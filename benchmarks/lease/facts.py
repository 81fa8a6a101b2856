# mypy: allow-untyped-calls, no-warn-return-any
"""What the device is and what it can do at most: `python -m benchmarks.lease.facts`.

Ceilings are those of PyTorch's own libraries on random data: a device-to-device copy, and square products in bf16 and
fp8 (with a scale per row and column, as the linears of a bundle are computed).
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import machine_facts, microseconds, write_json

COPY_BYTES = 2 << 30
PRODUCT = 8192
# Tokens of a chunk at 512x768, and the layers' linears: (output features, input features).
TOKENS = 4608
LINEARS = {"qkv": (4608, 1536), "o": (1536, 1536), "ffn.0": (8960, 1536), "ffn.2": (1536, 8960)}


def copy_ceiling(device: str, nbytes: int) -> float:
    """Terabytes per second, read and written, of a copy larger than every cache."""
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / _time(device, [lambda: target.copy_(source)]) / 1e6


def product(device: str, tokens: int, features: int, inner: int, dtype: torch.dtype) -> float:
    """Teraflops of `[tokens, inner] @ [inner, features]`."""
    sets = [
        (torch.randn(tokens, inner, device=device), torch.randn(features, inner, device=device))
        for _ in range(2)
    ]
    if dtype == torch.float8_e4m3fn:
        works = [partial(torch._scaled_mm, *_scaled(a, b), out_dtype=torch.bfloat16, use_fast_accum=True)
                 for a, b in sets]  # fmt: skip
    else:
        works = [partial(torch.matmul, a.to(dtype), b.to(dtype).t()) for a, b in sets]
    return 2 * tokens * features * inner / _time(device, works) / 1e6


def _scaled(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scales = [x.abs().amax(-1, keepdim=True) / 448 for x in (a, b)]
    left, right = ((x / scale).to(torch.float8_e4m3fn) for x, scale in zip((a, b), scales, strict=True))
    return left, right.t(), scales[0], scales[1].t()


def _time(device: str, works: Sequence[Callable[[], Any]]) -> float:
    """Median microseconds of one work item."""
    if device == "cuda":
        return microseconds(works, repeats=10, target_us=10_000)
    from torch.utils.benchmark import Timer

    return 1e6 * Timer("work()", globals={"work": works[0]}).timeit(3).median


def _smi() -> dict[str, str]:
    fields = (
        "name",
        "driver_version",
        "clocks.sm",
        "clocks.mem",
        "clocks.max.sm",
        "power.limit",
        "memory.total",
    )
    if shutil.which("nvidia-smi") is None:
        return {}
    result = subprocess.run(
        ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"],
        capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    return dict(zip(fields, (value.strip() for value in result.stdout.split(",")), strict=False))


def main() -> int:
    """Write facts, then each ceiling as it is known."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lease.facts", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    args = parser.parse_args()
    machine: dict[str, Any] = {**machine_facts(), "cores": os.cpu_count(), "libc": platform.libc_ver()[1]}
    result: dict[str, Any] = {"machine": machine, "nvidia-smi": _smi()}

    def keep(name: str, measure: Callable[[], float]) -> None:
        try:
            result[name] = round(measure(), 4)
        except Exception as error:  # one ceiling that cannot be measured must not cost the others
            result[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        write_json(args.out / "facts.json", result)
        print(f"{name}: {result[name]}", flush=True)

    device, on_gpu = args.device, args.device == "cuda"
    side = PRODUCT if on_gpu else 512
    keep("copy_tb_s", lambda: copy_ceiling(device, COPY_BYTES if on_gpu else 64 << 20))
    keep("bf16_tflops", lambda: product(device, side, side, side, torch.bfloat16))
    keep("fp8_tflops", lambda: product(device, side, side, side, torch.float8_e4m3fn))
    for name, (features, inner) in LINEARS.items() if on_gpu else ():
        for kind, dtype in (("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn)):
            keep(f"{name}_{kind}_tflops", partial(product, device, TOKENS, features, inner, dtype))
    result["nvidia-smi after"] = _smi()
    write_json(args.out / "facts.json", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
