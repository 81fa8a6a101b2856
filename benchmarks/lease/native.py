"""Packages compiled on the GPU, whose kernels were timed, beside those compiled without one, chosen by rule.

`python -m benchmarks.lease.native BUNDLE --out FOLDER` compiles some packages of the ladder's last rung again, times
both kinds, and says for which kernels another configuration was chosen: what the rules of
`export.backends.inductor.pretend` should say instead.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.timing import machine_facts, write_json

from .packages import measure_apart

if TYPE_CHECKING:
    from export.backends.inductor.generated import Configuration

__all__ = ["chosen_otherwise"]

PACKAGES = ("layer", "last", "vae_next")


def chosen_otherwise(
    ours: Mapping[str, Configuration], timed: Mapping[str, Configuration]
) -> dict[str, dict[str, Any]]:
    """Kernels for which timing chose another configuration, or that only one of the two packages has."""
    found = {}
    for name in sorted({*ours, *timed}):
        by_rule, by_time = ours.get(name), timed.get(name)
        if by_rule != by_time:
            found[name] = {
                "by rule": asdict(by_rule) if by_rule else None,
                "timed": asdict(by_time) if by_time else None,
            }
    return found


def main() -> int:
    """Compile and measure; the exit code tells whether all packages ran."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lease.native", description=__doc__)
    parser.add_argument("bundle", type=Path, help="the ladder's last rung, compiled without a GPU")
    parser.add_argument("--gpu", default="h200", help="target; default: %(default)s")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--resolution", default="512x768")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    args = parser.parse_args()

    from benchmarks.rollout.bundles import request_for
    from benchmarks.rollout.ladder import LADDER, Case
    from export.backends.inductor.generated import parse_configurations, wrapper_code
    from export.backends.inductor.packages import compile_packages

    packages = args.out / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    height, width = (int(side) for side in args.resolution.split("x"))
    request = request_for(Case("wan-1.3b", height, width, args.frames), LADDER[-1], args.gpu, args.out)
    start = time.perf_counter()

    def progress(phase: str, done: int, total: int) -> None:
        print(f"{time.perf_counter() - start:.0f} s: {phase} ({done} of {total})", flush=True)

    compile_packages(request, packages, "native", progress, PACKAGES)
    result: dict[str, Any] = {"machine": machine_facts(), "compile_s": time.perf_counter() - start}
    for name in PACKAGES:
        file = f"{name}.pt2"
        codes = [wrapper_code(folder / file) for folder in (args.bundle, packages)]
        result[name] = {
            "by rule": measure_apart(args.bundle, name),
            "timed": measure_apart(args.bundle, name, packages=packages),
            "kernels": chosen_otherwise(*map(parse_configurations, codes)),
        }
        write_json(args.out / "native.json", result)
        print(f"{name}: {result[name]}", flush=True)
    kinds = [result[name][kind] for name in PACKAGES for kind in ("by rule", "timed")]
    return 1 if any("problem" in found for found in kinds) else 0


if __name__ == "__main__":
    sys.exit(main())
