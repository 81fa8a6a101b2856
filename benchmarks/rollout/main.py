"""The speed ladder: clips generated end to end, from plain PyTorch to the finished runtime.

`python -m benchmarks.rollout` measures seven rungs in one run on one device: (0) dense PyTorch with the full decoder,
(1) + sparse attention in PyTorch and Triton, then the runtime (2) dense, (3) + its attention kernels, (4) + fp8,
(5) + LightVAE, (6) + overlap and CUDA graphs. Weights are random: the work does not depend on them. Without a GPU it
runs the same rungs with the tiny model, where only the ratios mean anything.

The result file is written again after every clip, so a run that is cut short keeps what it measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .ladder import LADDER, RESOLUTIONS, Case, Platform, Rung, bundle_spec

if TYPE_CHECKING:
    from .measure import Clip, Runner

FLAT_CHUNKS = 42
"""Length of the clip that shows whether the time per chunk stays flat."""
FLAT_EARLY, FLAT_LATE = 8, 40
NEEDED = ("numpy", "torch", "pydantic", "platformdirs", "rich", "ftfy", "safetensors", "ml_dtypes")
"""What every rung needs to import."""


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers, such as 81,243") from None


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    try:
        return tuple(
            (int(height), int(width))
            for height, _, width in (part.partition("x") for part in text.split(","))
        )
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of HEIGHTxWIDTH, such as 512x768") from None


def _listed(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rollout",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--preset", choices=sorted(RESOLUTIONS), help="default: wan-1.3b on a GPU, tiny on a CPU"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU, if there is one")
    parser.add_argument(
        "--backend", default="auto", help="of the bundles; default: the target's first that works"
    )
    parser.add_argument(
        "--rungs", type=_numbers, default=tuple(r.number for r in LADDER), metavar="N,N", help="default: all"
    )
    parser.add_argument("--frames", type=_numbers, default=(81, 243), metavar="N,N", help="default: 81,243")
    parser.add_argument("--resolution", type=_sizes, metavar="HxW,HxW", help="default: those of the preset")
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed clips of each rung; default: %(default)s"
    )
    parser.add_argument(
        "--flat-chunks", type=int, default=FLAT_CHUNKS, help="chunks of the long clip; 0: none"
    )
    parser.add_argument(
        "--budget-seconds", type=float, default=520.0, help="for everything; default: %(default)s"
    )
    parser.add_argument(
        "--bundles", type=Path, default=Path("build/ladder"), help="kept there; default: %(default)s"
    )
    parser.add_argument("--build-only", action="store_true", help="build the bundles and stop")
    parser.add_argument(
        "--packages-only",
        action="store_true",
        help="compile what holds no weights for the GPU that --gpu names, which need not be here, and stop",
    )
    parser.add_argument("--gpu", default="h200", help="target of --packages-only; default: %(default)s")
    parser.add_argument("--rebuild", action="store_true", help="build them again where they are there")
    parser.add_argument("--jobs", type=int, help="builds at a time; default: half the cores, 2 at least")
    parser.add_argument("--out", type=Path, help="folder of the results; default: $OUT or benchmarks/results")
    return parser


class Ladder:
    """One run: the cases in order, the rungs of a case open side by side and timed in turn."""

    def __init__(
        self, args: argparse.Namespace, platform: Platform, gpu: tuple[str, str], result: dict[str, Any]
    ):
        self._args, self._platform, self._gpu, self._result = args, platform, gpu, result
        self._end: float = time.monotonic() + args.budget_seconds
        self._rungs = [rung for rung in LADDER if rung.number in args.rungs]

    # ---- bundles ----

    def build(self, cases: Sequence[Case]) -> dict[Path, str]:
        """Build what is missing; the problems by folder."""
        from .bundles import build_bundles

        wanted = [(case, rung) for case in cases for rung in self._rungs if self._problem(rung) is None]
        return build_bundles(
            [(case, rung) for case, rung in wanted if rung.runner == "executor"],
            self._platform,
            self._gpu,
            self._args.bundles,
            jobs=self._args.jobs or max(2, (os.cpu_count() or 2) // 2),
            timeout=self._left(),
            rebuild=self._args.rebuild,
        )

    def _problem(self, rung: Rung) -> str | None:
        if rung.runner == "eager":
            return None
        # Later rungs go on in the base precision where the device has no fp8.
        is_fp8_step = rung.fp8 and not rung.light_vae
        return self._platform.problem or (self._platform.fp8_problem if is_fp8_step else None)

    # ---- measuring ----

    def measure(self, case: Case) -> None:
        """Measure all rungs of a case into the result."""
        from .measure import release

        rows = [self._new_row(rung) for rung in self._rungs]
        about = {"preset": case.preset, "height": case.height, "width": case.width}
        entry: dict[str, Any] = {
            **about,
            "asked_frames": case.asked_frames,
            "frames": case.frames,
            "rungs": rows,
        }
        self._result["cases"].append(entry)
        problems: dict[Path, str] | None = None
        open_rungs: dict[int, Runner] = {}
        clips: dict[int, list[Clip]] = {rung.number: [] for rung in self._rungs}
        by_number = {row["number"]: row for row in rows}
        for rung in self._rungs:
            row = by_number[rung.number]
            if rung.runner == "executor" and problems is None:  # the rungs without a bundle are safe by now
                problems = self.build([case])
            found = problems or {}
            if self._guarded(row, lambda r=rung, w=row, f=found: self._open(r, case, w, f, open_rungs)) and (
                self._guarded(row, lambda r=rung, w=row: self._inspect(r, case, w, open_rungs))
            ):
                self._time(rung, case, row, open_rungs, clips)
            self.write()
        for _ in range(self._args.repeats - 1):
            for rung in self._rungs:
                if rung.number in open_rungs:
                    self._time(rung, case, by_number[rung.number], open_rungs, clips)
        if case.is_long and self._args.flat_chunks:
            for rung in reversed(self._rungs):
                if rung.runner == "executor" and rung.number in open_rungs:
                    row = by_number[rung.number]
                    self._guarded(row, lambda r=rung, w=row: self._flat(r, w, open_rungs))
        for runner in open_rungs.values():
            with suppress(Exception):  # what failed before may fail again; it was recorded
                runner.close()
        open_rungs.clear()
        release()

    def _new_row(self, rung: Rung) -> dict[str, Any]:
        precision = self._platform.base_precision
        if rung.runner == "executor":
            precision = bundle_spec(rung, self._platform).precision
        row = {**asdict(rung), "precision": precision, "status": "skipped", "reason": None}
        return {**row, "ratio_to_rung_0": None, "notes": []}

    def _guarded(self, row: dict[str, Any], work: Any) -> Any:
        """The result of `work`; a failure is recorded in the row, and the other rungs go on."""
        from .measure import release

        if row["reason"] is not None:
            return None
        try:
            return work()
        except Exception as error:
            message = (str(error).splitlines() or [""])[0][:300]
            row["status"] = "measured" if "latency_s" in row else "failed"
            row["reason"] = f"{type(error).__name__}: {message}"
        finally:
            self.write()
        release()
        return None

    def _open(
        self, rung: Rung, case: Case, row: dict[str, Any], problems: dict[Path, str], into: dict[int, Runner]
    ) -> bool:
        from .bundles import BundleRollout, bundle_folder
        from .measure import MemoryWatch

        folder = bundle_folder(rung, case, self._platform, self._args.bundles)
        row["reason"] = self._problem(rung)
        if row["reason"] is None and rung.runner == "executor":
            row["reason"] = problems.get(folder)
        if row["reason"] is None and self._left() <= 0:
            row["reason"] = "the time budget was spent before it"
        if row["reason"] is not None:
            return False
        row["_watch"] = MemoryWatch(self._platform.device)
        if rung.runner == "executor":
            row["bundle"], into[rung.number] = folder.name, BundleRollout(folder, rung)
            return True
        import torch

        from .eager import EagerRollout, SdpaChoice, fastest_sdpa

        plan = bundle_spec(rung, self._platform).request(case, self._platform, self._args.bundles).plan
        choice = SdpaChoice()
        if self._platform.device == "cuda":
            choice = fastest_sdpa(plan, "cuda", torch.bfloat16)
        row["sdpa"] = asdict(choice)
        row["_watch"] = MemoryWatch(self._platform.device)
        into[rung.number] = EagerRollout(plan, self._platform.device, choice, sparse=rung.sparse)
        return True

    def _inspect(self, rung: Rung, case: Case, row: dict[str, Any], runners: dict[int, Runner]) -> bool:
        """The first clip warms up; memory and kernels are looked at while it runs, and its time does not count."""
        from .measure import inspected_clip

        watch = row.pop("_watch")
        started = time.monotonic()
        try:
            with watch.sampling():
                in_torch = rung.runner == "eager"
                found = inspected_clip(
                    runners[rung.number], case.chunks, self._platform.device, in_torch=in_torch
                )
        except BaseException:
            runners.pop(rung.number).close()
            raise
        row["memory"], row["inspection"] = watch.peaks(), asdict(found)
        row["warm_up_s"] = time.monotonic() - started
        return True

    def _time(
        self,
        rung: Rung,
        case: Case,
        row: dict[str, Any],
        runners: dict[int, Runner],
        clips: dict[int, list[Clip]],
    ) -> None:
        from .measure import summarise, timed_clip

        done = clips[rung.number]
        expected = done[-1].seconds if done else 0.0
        if row["reason"] is not None or self._left() < expected:
            return
        clip = self._guarded(row, lambda: timed_clip(runners[rung.number], case.chunks))
        if clip is None:
            return
        done.append(clip)
        row |= {**summarise(done), "status": "measured"}
        # Work on a GPU is queued, so there the time between kernels tells what the host cost.
        on_gpu = self._platform.device == "cuda"
        row["overhead_percent"] = row["inspection"]["host_gap_percent"] if on_gpu else row["runtime_percent"]
        self._set_ratios()
        self.write()

    def _flat(self, rung: Rung, row: dict[str, Any], runners: dict[int, Runner]) -> None:
        from statistics import median

        from .measure import timed_clip

        chunks = self._args.flat_chunks
        if self._left() < chunks * max(row["chunk_s"]):
            row["notes"].append(
                "no time was left for the clip that shows whether the time per chunk stays flat"
            )
            return
        times = timed_clip(runners[rung.number], chunks).per_chunk
        late = min(FLAT_LATE, chunks - 2)

        def around(chunk: int) -> float:
            return median(times[max(0, chunk - 1) : chunk + 2])

        drift = 100 * (around(late) / around(FLAT_EARLY) - 1)
        row["flatness"] = {"early": FLAT_EARLY, "late": late, "drift_percent": drift, "chunk_s": times}

    def _set_ratios(self) -> None:
        rows = self._result["cases"][-1]["rungs"]
        base = next((row.get("latency_s") for row in rows if row["number"] == 0), None)
        for row in rows:
            if base is not None and "latency_s" in row:
                row["ratio_to_rung_0"] = base / row["latency_s"]

    def _left(self) -> float:
        return self._end - time.monotonic()

    # ---- results ----

    def write(self) -> None:
        """Write the result file anew; it is complete at every moment."""
        from benchmarks.timing import write_json

        from .report import goals

        self._result["goals"] = goals(self._result["cases"], self._result["machine"]["device"])
        path = Path(self._result["file"])
        visible = json.loads(json.dumps(self._result, default=lambda value: None))
        for case in visible["cases"]:
            for row in case["rungs"]:
                row.pop("_watch", None)
        write_json(path, {k: v for k, v in visible.items() if k != "file"})

    def finish(self, stem: Path) -> int:
        """Plots and the table; the exit status: 1 if nothing could be measured."""
        from .report import plot, table

        machine, cases = self._result["machine"], self._result["cases"]
        for path in (
            Path(self._result["file"]),
            *plot(cases, stem, f"{machine['device']}, {machine['date']}"),
        ):
            print(path)
        print(table(cases, self._result["goals"]))
        return 0 if any(row["status"] == "measured" for case in cases for row in case["rungs"]) else 1


def _missing() -> list[str]:
    from importlib.util import find_spec

    return [name for name in NEEDED if find_spec(name) is None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    unknown = [number for number in args.rungs if not 0 <= number < len(LADDER)]
    if unknown or args.repeats < 1 or min(args.frames) < 1:
        print(
            f"error: rungs are 0 to {len(LADDER) - 1}, repeats and frames 1 or more; found "
            f"--rungs {_listed(args.rungs)} --repeats {args.repeats} --frames {_listed(args.frames)}",
            file=sys.stderr,
        )
        return 2
    if missing := _missing():
        print(
            f"error: every rung needs {', '.join(missing)}, not installed here (docs/benchmarks.md)",
            file=sys.stderr,
        )
        return 1
    if args.packages_only:
        return _compile(args)
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        print(
            "error: PyTorch finds no CUDA device; --device cpu runs the ladder with the tiny model",
            file=sys.stderr,
        )
        return 1
    return _run(args, device)


def _compile(args: argparse.Namespace) -> int:
    """Compile the packages of the chosen rungs' bundles for a GPU that need not be here."""
    from export import ExportError

    from .bundles import compile_packages

    preset = args.preset or "wan-1.3b"
    rungs = [rung for rung in LADDER if rung.number in args.rungs and rung.runner == "executor"]
    for frames in sorted(args.frames):
        for height, width in args.resolution or RESOLUTIONS[preset]:
            for rung in rungs:
                try:
                    print(compile_packages(Case(preset, height, width, frames), rung, args.gpu, args.bundles))
                except ExportError as error:
                    print(f"error: {error}", file=sys.stderr)
                    return 1
    return 0


def _run(args: argparse.Namespace, device: Any) -> int:
    from benchmarks.timing import machine_facts
    from export import InputError
    from lightforcing_ref.errors import ConfigError

    facts = machine_facts()
    if device == "cpu":
        facts |= {"device": f"{os.cpu_count()}-core CPU", "threads": os.environ.get("OMP_NUM_THREADS", "all")}
    gpu = (facts["device"], facts.get("compute_capability", "")) if device == "cuda" else ("", "")
    preset = args.preset or ("wan-1.3b" if device == "cuda" else "tiny")
    sizes = args.resolution or RESOLUTIONS[preset]
    # What the goals are about comes first, in case the budget ends.
    cases = [Case(preset, height, width, frames) for frames in sorted(args.frames) for height, width in sizes]
    out = args.out or Path(os.environ.get("OUT") or "benchmarks/results")
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"rollout-{facts['device'].lower().replace(' ', '-')}-{facts['date']}"
    try:
        platform = Platform.here(device, args.backend, gpu)
        for case in cases:
            bundle_spec(LADDER[-1], platform).request(case, platform, args.bundles).plan  # noqa: B018 (it checks)
    except (ConfigError, InputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    about = {"target": platform.target.name, "backend": platform.backend, "weights": "random"}
    result: dict[str, Any] = {"benchmark": "rollout", "machine": facts, **about, "goals": [], "cases": []}
    ladder = Ladder(args, platform, gpu, {**result, "file": f"{stem}.json"})
    if args.build_only:
        problems = ladder.build(cases)
        print("\n".join(problems.values()) or f"all bundles are in {args.bundles}")
        return 1 if problems else 0
    for case in cases:
        ladder.measure(case)
    return ladder.finish(stem)
