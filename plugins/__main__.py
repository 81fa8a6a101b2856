"""Command line of the kernels: `python -m plugins build --arch sm_90,sm_120`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.terminal import console, run_command, say

if TYPE_CHECKING:
    from rich.console import Console

    from runtime.bundle.images import Image

ALL_ARCHS = "sm_80,sm_86,sm_89,sm_90,sm_100,sm_120"
NO_SPILL = ("sm_90", "sm_120")


def _resources(image: Image) -> str:
    return f"{image.registers}" + (f" ({image.spill_stores})" if image.spill_stores else "")


def _build(args: argparse.Namespace) -> int:
    from rich.markup import escape
    from rich.progress import Progress
    from rich.table import Table

    from plugins.compile.kernels import BuildError, build, parse_archs, spilling

    notes = console()
    start = time.monotonic()
    try:
        archs = parse_archs(args.arch)
    except BuildError as error:
        notes.print("[red]error:[/red]", escape(str(error)), highlight=False)
        return 2
    try:
        with Progress(console=notes, transient=True) as bar:
            task = bar.add_task("compiling", total=None)
            compiled = 0

            def show(done: int, total: int) -> None:
                nonlocal compiled
                compiled = total
                bar.update(task, completed=done, total=total)

            built = build(
                archs, args.out, cache=args.cache, jobs=args.jobs, progress=show, candidates=args.candidates
            )
    except BuildError as error:
        notes.print("[red]error:[/red]", escape(str(error)), highlight=False)
        return 1

    table = Table(title="Registers per thread (bytes spilled)", box=None)
    table.add_column("kernel", no_wrap=True)
    for image_set in built.values():
        table.add_column(image_set.arch, justify="right")
    by_arch = [{image.name: image for image in image_set.images} for image_set in built.values()]
    for name in dict.fromkeys(name for of_arch in by_arch for name in of_arch):
        cells = (of_arch.get(name) for of_arch in by_arch)
        table.add_row(name, *("-" if image is None else _resources(image) for image in cells))
    notes.print(table)
    count = sum(len(image_set.images) for image_set in built.values())
    notes.print(
        f"{count} images in {args.out}, {compiled} compiled and {count - compiled} from the cache, "
        f"{time.monotonic() - start:.0f} s",
        highlight=False,
    )
    bad = [] if args.candidates else [line for line in spilling(built) if line.startswith(NO_SPILL)]
    if bad:
        notes.print("[red]error:[/red] these images must not spill registers:", *bad, sep="\n  ")
        return 1
    return _build_libraries(args, notes) if args.tensorrt else 0


def _build_libraries(args: argparse.Namespace, notes: Console) -> int:
    from rich.markup import escape

    from plugins.compile.kernels import parse_archs
    from plugins.compile.libraries import HEADERS_HINT, build_libraries
    from runtime.errors import BundleError

    from .errors import PluginError

    start = time.monotonic()
    try:
        with notes.status("building the TensorRT plugin"):
            libraries = build_libraries(
                parse_archs(args.arch),
                args.out,
                args.tensorrt_out,
                tensorrt_root=args.tensorrt_root,
                fetch=args.fetch,
                jobs=args.jobs,
            )
    except (BundleError, PluginError) as error:
        notes.print("[red]error:[/red]", escape(str(error)), highlight=False)
        return 1
    targets = ", ".join(libraries.targets)
    for path in (libraries.launch, libraries.plugin):
        if path is not None:
            notes.print(f"{path} ({path.stat().st_size / 2**20:.1f} MiB, {targets})", highlight=False)
    notes.print(f"built in {time.monotonic() - start:.0f} s", highlight=False)
    if libraries.plugin is None:
        notes.print(
            f"[yellow]the TensorRT plugin is skipped:[/yellow] its headers are not here; {HEADERS_HINT}",
            highlight=False,
        )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m plugins", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser(
        "build",
        help="compile the GPU kernels to cubins (no GPU needed)",
        description="Compile every kernel for each architecture into OUT/sm_XX/, with an index kernels.json. Needs "
        "Triton, no GPU and no network. Fails if a kernel spills registers on sm_90 or sm_120.",
    )
    build.add_argument("--arch", default=ALL_ARCHS, help="comma-separated, default %(default)s")
    build.add_argument("--out", type=Path, default=Path("build/kernels"), help="default %(default)s")
    build.add_argument("--cache", type=Path, help="compiled kernels are kept here between builds")
    build.add_argument("--jobs", type=int, help="worker processes, default: one per processor")
    build.add_argument(
        "--candidates",
        action="store_true",
        help="build the tiles that await timing as well (benchmarks.attention)",
    )
    build.add_argument(
        "--tensorrt",
        action="store_true",
        help="then embed them into the TensorRT plugin and the launch library (needs a C++ compiler and CMake)",
    )
    build.add_argument(
        "--tensorrt-out", type=Path, default=Path("build/tensorrt"), help="where to, default %(default)s"
    )
    build.add_argument(
        "--tensorrt-root",
        type=Path,
        help="holds include/NvInferRuntime.h; default: the environment's TENSORRT_ROOT, then the system",
    )
    build.add_argument(
        "--no-fetch",
        dest="fetch",
        action="store_false",
        help="do not fetch the TensorRT headers from the vendor's repository where there are none",
    )
    build.add_argument("--debug", action="store_true", help="show the traceback of an error")
    build.set_defaults(run=_build)
    args = parser.parse_args(argv)
    return run_command(
        lambda: int(args.run(args)),
        say,
        expected=lambda error: None,
        install="pip install '.[kernels,plugin]'",
        debug=args.debug,
        left=lambda: "what was compiled is kept in the cache",
    )


if __name__ == "__main__":
    sys.exit(main())
