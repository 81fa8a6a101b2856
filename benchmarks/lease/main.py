"""`python -m benchmarks.lease`: stages that yield the most valuable facts first, within one budget.

Every stage has a limit of its own and runs in a process of its own; one that hangs or crashes costs only itself, and
what was measured is on disk after each. At the end there is `lease-CALL.json` with everything, a log, and a table.

    python -m benchmarks.lease --call first          # at most 470 s
    python -m benchmarks.lease --call second         # at most 170 s
    python -m benchmarks.lease --call third          # at most 175 s, where time is left
    python -m benchmarks.lease --device cpu          # the rehearsal, where there is no GPU
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .archive import unpack, unpack_wheels
from .runner import Lease
from .stages import CALLS, stages_of

__all__ = ["main", "table"]

ROOT = Path(__file__).resolve().parents[2]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lease",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--call", choices=sorted(CALLS), default="first", help="default: %(default)s")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    parser.add_argument("--stages", default="", metavar="NAME,NAME", help="only these; default: all")
    parser.add_argument("--seconds", type=float, help="for all stages together; default: the call's")
    parser.add_argument(
        "--build", type=Path, default=ROOT / "build", help="kernels, bundles, wheels; default: build"
    )
    parser.add_argument(
        "--archive", type=Path, help="unpacked into the build folder first; default: lease.tar.xz in it"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the results; default: $OUT or build/lease-results"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a call; the exit code tells whether every stage ended well."""
    args = _parser().parse_args(argv)
    call = CALLS[args.call]
    try:
        stages = stages_of(call, args.device, [name for name in args.stages.split(",") if name])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    build = args.build.absolute()
    out = args.out or Path(os.environ.get("OUT") or build / "lease-results")
    out.mkdir(parents=True, exist_ok=True)
    archive = args.archive or build / "lease.tar.xz"
    if archive.is_file():
        _say(f"unpacked {unpack(archive, build)} files from {archive.name}")
    elif args.archive:
        print(f"error: there is no archive {archive}; make one with `make lease-archive`", file=sys.stderr)
        return 2
    unpack_wheels(build)
    began = datetime.now(UTC)
    records: dict[str, Any] = {}

    def write(found: Mapping[str, Any]) -> None:
        records.update(found)
        about = {"benchmark": "lease", "call": call.name, "device": args.device}
        _write(
            out / f"lease-{call.name}.json",
            {**about, "began": began.isoformat(timespec="seconds"), "stages": records},
        )

    log = out / f"lease-{call.name}.log"
    log.unlink(missing_ok=True)
    work = build / "lease" / began.strftime("%H%M%S")
    seconds = args.seconds or call.seconds
    lease = Lease(stages, work=work, build=build, log=log, seconds=seconds, write=write, say=_say)
    well = lease.run()
    print(table(records))
    return 0 if well else 1


def _say(line: str) -> None:
    print(line, flush=True)


def _write(path: Path, content: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


# ---- the table ----


def table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """One line for each stage: how it ended, how long it took, and its most telling figures."""
    rows = [("stage", "status", "s", "figures")]
    for name, record in records.items():
        figures = _figures(record["results"]) or record["tail"].strip().splitlines()[-1:]
        rows.append((name, record["status"], f"{record['seconds']:.0f}", "; ".join(figures)[:300]))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join((*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]))
        for row in rows
    )


def _best_images(content: Mapping[str, Any]) -> list[str]:
    """The fastest right image of each window and block size at a sparsity of 0.9, and what is wrong or failed."""
    rows = [row for row in content["rows"] if row.get("sparsity") == 0.9 and "attend_us" in row]
    cases: dict[tuple[Any, ...], list[Any]] = {}
    for row in rows:
        cases.setdefault((row["window"], row["block_q"], row["block_k"]), []).append(row)
    found = []
    for (window, block_q, block_k), of_case in cases.items():
        right = [row for row in of_case if row["attend_us"] is not None]
        best = min(right, key=lambda row: float(row["attend_us"]), default=None)
        told = f"{best['name']} {best['attend_us']:.0f} us" if best else "no image is right"
        found.append(f"{window}, blocks {block_q} x {block_k}: {told}")
    wrong = sorted({row["name"] for row in rows if row["attend_us"] is None})
    return found + [f"wrong: {name}" for name in wrong] + [f"failed: {name}" for name in content["failed"]]


def _figures(results: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    for stem, content in results.items():
        if stem == "tests":
            found.append(f"{content.get('passed', 0)} passed, {len(content.get('failed', {}))} failed")
            found += list(content.get("failed", {}))[:3]
        elif stem == "facts":
            found += [
                f"{key} {content[key]}"
                for key in ("copy_tb_s", "bf16_tflops", "fp8_tflops")
                if key in content
            ]
        elif stem == "clips":
            clips = content.get("clips", {})
            if "fps" in clips:
                found.append(
                    f"{clips['frames']} frames in {clips['latency_s']:.3f} s, {clips['fps']:.1f} FPS"
                )
                found.append(f"first frames after {clips['first_frames_s']:.3f} s")
        elif stem == "packages":
            parts = {name: part for name, part in content.items() if isinstance(part, dict)}
            found += [f"{name} {part.get('us') or part.get('problem')}" for name, part in parts.items()]
        elif stem == "convolutions":
            found += [f"{form} {us / 1000:.1f} ms a latent frame" for form, us in content["frame_us"].items()]
        elif stem == "native":
            for name, part in content.items():
                if isinstance(part, dict) and "timed" in part:
                    times = [
                        part[kind].get("us") or part[kind].get("problem") for kind in ("by rule", "timed")
                    ]
                    found.append(
                        f"{name} by rule {times[0]}, timed {times[1]}, {len(part['kernels'])} kernels otherwise"
                    )
        elif stem == "golden":
            found += [
                f"{name} {part['error']}"
                for name, part in content["components"].items()
                if not part["passed"]
            ]
            found.append("passed" if content["passed"] else "failed")
        elif stem == "attention-candidates":
            found += _best_images(content)
        elif stem.startswith("attention-times"):
            chosen = [r for r in content["rows"] if r["window"] == "chunk 7" and r["sparsity"] == 0.9]
            found += [
                f"block {row['block']}: eta {row['eta']}, attend {row['attend_us']} us" for row in chosen
            ]
        elif stem.startswith("rollout"):
            found += [
                f"rung {rung['number']}: {rung.get('latency_s') or rung.get('reason')}"
                for case in content["cases"]
                for rung in case["rungs"]
            ]
    return found
