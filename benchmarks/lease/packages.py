# mypy: allow-untyped-calls, no-warn-return-any
"""Each package of a compiled bundle alone: whether it runs, and how long it takes.

`python -m benchmarks.lease.packages BUNDLE --out FOLDER` needs the manifest and the packages, no weights: inputs are
random. Every package has a process of its own; one that dies is run once more under a debugger, for its stack.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.timing import write_json

LIMIT = 60.0
"""Seconds for one package; most of it is PyTorch's start."""
SUFFIX = ".pt2"


def measure(bundle: Path, name: str, packages: Path | None = None) -> dict[str, Any]:
    """Run component `name` on random inputs: microseconds in a CUDA graph, and whether every output is finite.

    Args:
        packages: folder of the packages, where it is not the bundle's own.
    """
    import torch

    from benchmarks.timing import microseconds
    from runtime.bundle import MANIFEST_NAME, Manifest
    from runtime.host import load_package_file

    # Without looking for the weights, which may not be there.
    manifest = Manifest.model_validate_json((bundle / MANIFEST_NAME).read_bytes())
    component = manifest.components[name]
    torch.cuda.init()
    generator = torch.Generator("cuda").manual_seed(0)

    def tensor(dtype: str, shape: Sequence[int | str]) -> torch.Tensor:
        kind = getattr(torch, dtype)
        dims = [int(dim) for dim in shape]
        if not kind.is_floating_point:
            return torch.zeros(dims, dtype=kind, device="cuda")
        # Small, so that what is multiplied many times over stays finite in float16.
        return (0.05 * torch.randn(dims, generator=generator, device="cuda")).to(kind)

    tensors = [tensor(spec.dtype, spec.shape) for spec in (*component.inputs, *component.outputs)]
    outputs = tensors[len(component.inputs) :]
    loader = load_package_file((packages or bundle) / f"{name}{SUFFIX}", name, 0)
    loader.run(tensors)
    torch.cuda.synchronize()
    found: dict[str, Any] = {"finite": all(bool(torch.isfinite(t.float()).all()) for t in outputs)}
    found["us"] = round(microseconds([lambda: loader.run(tensors)], repeats=5), 1)
    return found


def measure_apart(
    bundle: Path, name: str, *, packages: Path | None = None, debugger: str | None = None
) -> dict[str, Any]:
    """`measure` in a process of its own; a process that dies is a `problem`, with what it said."""
    command = [sys.executable, "-X", "faulthandler", "-m", "benchmarks.lease.packages"]
    command += [str(bundle), "--component", name, *(["--packages", str(packages)] if packages else [])]
    if debugger:
        command = [debugger, "-batch", "-ex", "run", "-ex", "bt 40", "--args", *command]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return {"problem": f"ran longer than {LIMIT:.0f} s"}
    said = result.stdout + result.stderr
    if debugger:
        return {"stack": said[-6000:]}
    if result.returncode == 0:
        found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
        return found
    killed = result.returncode < 0
    why = signal.Signals(-result.returncode).name if killed else f"exit status {result.returncode}"
    return {"problem": why, "said": said[-3000:]}


def main() -> int:
    """Measure all packages, or one; the exit code tells whether all ran."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lease.packages", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--component", help="this one, in this process")
    parser.add_argument("--packages", type=Path, help="folder of the packages; default: the bundle")
    parser.add_argument("--out", type=Path, help="folder of the results")
    args = parser.parse_args()
    if args.component:
        print(json.dumps(measure(args.bundle, args.component, args.packages)))
        return 0
    debugger = shutil.which("cuda-gdb", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    results: dict[str, Any] = {"bundle": args.bundle.name}
    for path in sorted(args.bundle.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_size):
        found = measure_apart(args.bundle, path.stem)
        results[path.stem] = found
        if found.get("problem", "").startswith("SIG") and debugger:
            found |= measure_apart(args.bundle, path.stem, debugger=debugger)
        write_json(args.out / "packages.json", results)
        print(f"{path.stem}: {found.get('problem') or found}", flush=True)
    return 1 if any("problem" in found for found in results.values() if isinstance(found, dict)) else 0


if __name__ == "__main__":
    sys.exit(main())
