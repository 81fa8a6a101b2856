"""Time and quality of block-sparse attention: `python -m benchmarks.attention`.

On a GPU: *select*, *attend* and both against the fastest dense attention of the same run (SDPA's flash and cuDNN
backends, flash-attn where it is installed) and against FlexAttention with the same block mask. The efficiency is
eta = T_dense (1 - s) / T_sparse: 1 means that skipped work costs nothing. Kernels come from built images, so what is
measured is what ships.

`--method-table`, on a GPU or on a CPU (in Triton's interpreter, minutes): the error of each selection policy's output
against dense attention at equal sparsity, on structured synthetic queries and keys.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

GOALS = "goals: eta >= 0.60 (stretch 0.80), select <= 25 us and 5 % of dense, speed-up >= 3.3, at chunk 7 and 90 %"

# Past frames; a chunk adds three. The long mode keeps a window of twelve frames, the chunk included.
WINDOWS = {"chunk 2": 3, "chunk 4": 9, "chunk 7": 18, "long": 9}
SPARSITIES = (0.8, 0.9, 0.95)
FRAMES = {1536: (32, 48), 1560: (30, 52)}
BLOCKS = (64, 128)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--method-table", action="store_true", help="quality of the policies instead of times")
    what.add_argument(
        "--candidates", action="store_true", help="check and time every image that serves, at 1536 tokens"
    )
    parser.add_argument(
        "--budget-seconds", type=float, default=60.0, help="for the candidates; default: %(default)s"
    )
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)  # the measuring process of --candidates
    parser.add_argument("--images", type=Path, default=Path("build/kernels"), help="default: %(default)s")
    parser.add_argument("--just-in-time", action="store_true", help="compile the kernels here instead")
    parser.add_argument("--out", type=Path, help="folder of the results; default: $OUT or benchmarks/results")
    parser.add_argument("--frame-tokens", type=_numbers, default=tuple(FRAMES), metavar="N,N")
    parser.add_argument("--blocks", type=_numbers, default=BLOCKS, metavar="N,N")
    parser.add_argument("--windows", default=",".join(WINDOWS), help="default: %(default)s")
    parser.add_argument("--heads", type=int, help="default: 12, and 3 for the method table")
    parser.add_argument(
        "--flex", choices=("none", "one", "all"), default="one", help="sparsities for FlexAttention"
    )
    return parser


def _out(args: argparse.Namespace) -> Path:
    """The folder of the results."""
    out: Path = args.out or Path(os.environ.get("OUT") or "benchmarks/results")
    out.mkdir(parents=True, exist_ok=True)
    return out


def _times(args: argparse.Namespace, keep: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """All shapes in turn; `keep` gets what there is after each, so that a run that ends early leaves that."""
    from plugins.eager.launch import Launcher, TorchKernels, TritonLauncher

    from .inputs import Shape
    from .timing import HSA_LONG, HSA_SHORT, measure, measure_prepare

    launcher: Launcher = TritonLauncher()
    compiler: dict[str, str] = {"kernels": "compiled just in time"}
    if not args.just_in_time:
        from .launcher import ImageLauncher

        images = ImageLauncher(args.images)
        launcher, compiler = images, {"kernels": "images", **images.library.index.compiler}
    kernels = TorchKernels(launcher)
    flex = {"none": (), "one": (0.9,), "all": SPARSITIES}[args.flex]
    rows: list[dict[str, Any]] = []
    prepared: list[dict[str, Any]] = []
    for frame_tokens in args.frame_tokens:
        for block in args.blocks:
            for window in args.windows.split(","):
                shape = Shape(frame_tokens, WINDOWS[window], block, block, args.heads or 12)
                hsa = HSA_LONG if window == "long" else HSA_SHORT
                about = {"frame_tokens": frame_tokens, "block": block, "window": window, "past": shape.past}
                found = measure(kernels, shape, hsa, SPARSITIES, flex if window == "chunk 7" else ())
                rows += [{**about, **row} for row in found]
                keep({"images": compiler, "rows": rows, "prepare": prepared})
            prepared.append({"frame_tokens": frame_tokens, "block": block, **measure_prepare(kernels, shape)})
    return {"images": compiler, "rows": rows, "prepare": prepared}


def _candidates(args: argparse.Namespace) -> int:
    """Check and time all images, in a process of its own that may fail (`attention_candidates.watch`)."""
    from .candidates import table_rows, watch

    out = _out(args)
    state_file = out / "attention-candidates.json"
    state_file.unlink(missing_ok=True)
    options = ["--images", str(args.images), "--state", str(state_file)]
    command = [sys.executable, "-m", "benchmarks.attention", "--candidates", *options]
    try:
        state = watch(command, state_file, args.budget_seconds)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    columns = ["window", "q", "k", "name", *(f"{what} {s}" for s in SPARSITIES for what in ("us", "eta"))]
    print(state_file, state["running"], sep="\n")
    print(_table(columns, table_rows(state, SPARSITIES)))
    for name, reason in state.get("failed", {}).items():
        print(f"failed: {name}: {reason}")
    return 0


def _measure_candidates(args: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        print("PyTorch finds no CUDA device, and times are measured on one", file=sys.stderr)
        return 1
    from benchmarks.timing import machine_facts, write_json

    from .candidates import measure_candidates

    state = json.loads(args.state.read_text()) if args.state.exists() else {}
    state = {"benchmark": "attention candidates", "machine": machine_facts(), **state}
    windows = [(name, WINDOWS[name]) for name in ("chunk 7", "chunk 4")]
    blocks = [(128, 128), (64, 64), (128, 64)]
    measure_candidates(args.images, windows, blocks, state, lambda now: write_json(args.state, now))
    return 0


def _methods(args: argparse.Namespace, device: str) -> dict[str, Any]:
    from .inputs import Shape
    from .quality import method_table
    from .timing import HSA_SHORT

    rows = []
    for frame_tokens in args.frame_tokens:
        for block in args.blocks:
            shape = Shape(frame_tokens, WINDOWS["chunk 7"], block, block, args.heads or 3)
            found = method_table(shape, FRAMES[frame_tokens], HSA_SHORT, SPARSITIES, device, seed=0)
            rows += [{"frame_tokens": frame_tokens, "block": block, **row} for row in found]
    return {"inputs": "synthetic video, chunk 7, heads in turn local, tracking, mixed; seed 0", "rows": rows}


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    def cell(value: object) -> str:
        if isinstance(value, float):
            return f"{value:.3f}" if abs(value) < 10 else f"{value:.0f}"
        return "-" if value is None or (isinstance(value, str) and ":" in value) else str(value)

    lines = [list(columns), *([cell(value) for value in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines
    )


def _summary(kind: str, result: dict[str, Any]) -> str:
    rows = result["rows"]
    if kind == "methods":
        columns = ["frame_tokens", "block", "policy", "sparsity", "error", "weight", "best_weight"]
        return _table(columns, ([row[key] for key in columns] for row in rows))
    columns = ["tokens", "block", "window", "s", "dense", "own dense", "flex", "select", "attend", "both"]
    columns += ["eta", "eta_total", "speed-up", "error"]
    keys = [
        "frame_tokens",
        "block",
        "window",
        "sparsity",
        "best_dense_us",
        "own_dense_us",
        "flex_us",
        "select_us",
    ]
    keys += ["attend_us", "total_us", "eta", "eta_total", "speedup", "error"]
    lines = [
        _table(columns, ([row.get(key) for key in keys] for row in rows)),
        "times in microseconds; " + GOALS,
    ]
    lines += [
        f"prepare, {row['frame_tokens']} tokens, blocks of {row['block']}: {row['prepare_us']:.1f} us, "
        f"{row['terabytes_per_second']:.2f} TB/s"
        for row in result["prepare"]
    ]
    return "\n".join(lines)


def _plot(result: dict[str, Any], path: Path) -> None:
    """Efficiency over sparsity, one line for each shape. Skipped where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(WINDOWS), figsize=(4 * len(WINDOWS), 3.5), sharey=True, layout="constrained"
    )
    for axis, window in zip(axes, WINDOWS, strict=True):
        rows = [row for row in result["rows"] if row["window"] == window]
        for shape in dict.fromkeys((row["frame_tokens"], row["block"]) for row in rows):
            line = [row for row in rows if (row["frame_tokens"], row["block"]) == shape]
            x = [row["sparsity"] for row in line]
            (drawn,) = axis.plot(
                x, [row["eta"] for row in line], marker="o", label=f"{shape[0]} / {shape[1]}"
            )
            axis.plot(
                x, [row["eta_total"] for row in line], marker=".", linestyle="--", color=drawn.get_color()
            )
        axis.set(title=window, xlabel="sparsity", ylim=(0, 1.1))
        axis.axhline(0.6, color="grey", linewidth=0.8)
    axes[0].set_ylabel("efficiency (dashed: with selection)")
    axes[0].legend(title="tokens / block")
    figure.suptitle(f"{result['machine']['device']}, {result['machine']['date']}")
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    unknown = [name for name in args.windows.split(",") if name not in WINDOWS]
    unsized = [tokens for tokens in args.frame_tokens if tokens not in FRAMES]
    if unknown or unsized:
        print(
            f"unknown window(s) {unknown} or frame size(s) {unsized}; expected some of {', '.join(WINDOWS)} and of "
            f"{', '.join(map(str, FRAMES))}",
            file=sys.stderr,
        )
        return 2

    if args.candidates:
        return _measure_candidates(args) if args.state else _candidates(args)

    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        if not args.method_table:
            print(
                "PyTorch finds no CUDA device, and times are measured on one; on a CPU only --method-table runs",
                file=sys.stderr,
            )
            return 1
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    from benchmarks.timing import machine_facts, write_json

    kind = "methods" if args.method_table else "times"
    facts = machine_facts()
    out = _out(args)
    stem = f"attention-{kind}-{facts['device'].lower().replace(' ', '-')}-{facts['date']}"

    def write(found: dict[str, Any]) -> dict[str, Any]:
        whole = {"benchmark": f"attention {kind}", "machine": facts, **found}
        write_json(out / f"{stem}.json", whole)
        return whole

    found = _methods(args, device) if kind == "methods" else _times(args, write)
    result = write(found)
    if kind == "times":
        _plot(result, out / f"{stem}.png")
    print(f"{out / stem}.json")
    print(_summary(kind, result))
    return 0
