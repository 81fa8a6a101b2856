"""Tiny bundles for an RTX 5090, built as the command line builds them, from graphs that are exported once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from export.build import build_bundle
from export.request.request import BuildRequest
from export.request.targets import load_target, load_variant
from export.request.weights import Weights
from lightforcing_ref.config import PRESETS
from runtime.bundle import load_bundle
from tests.conftest import shared

ENGINES = ("first", "layer", "last", "conditioner", "text_encoder", "vae_first", "vae_next")
PARTS = (
    *("tokenizer", "text encoder", "video decoder", "conditioner", "transformer", "quantization", "segments"),
    *(f"engine {name}" for name in ENGINES),
    *("kernels", "golden vectors", "manifest"),
)


class StopBuildError(Exception):
    """Raised in the middle of a build, where a user's Ctrl-C would be."""


def request(out: Path, precision: str, variant: str = "short", **changes: object) -> BuildRequest:
    preset = PRESETS["tiny"]
    settings: dict[str, object] = {
        "target": load_target("rtx5090"),
        "variant": load_variant(variant),
        "weights": Weights(preset, seed=0),
        "height": preset.height,
        "width": preset.width,
        "backend": "tensorrt-rtx",
        "precision": precision,
        "out": out,
        "name": f"{variant}-{precision}",
        "execution": "segmented",
    }
    return BuildRequest(**settings | changes)


Shown = list[tuple[str, float, float]]
"""What a build showed of its progress."""


def build_until(wanted: BuildRequest, part: str) -> Path:
    """Build up to `part`, which is not begun; returns the folder of the build in progress."""

    def stop(name: str, done: float, total: float) -> None:
        if name == part:
            raise StopBuildError

    try:
        build_bundle(wanted, stop)
    except StopBuildError:
        return partial(wanted)
    raise AssertionError(f"the build has no part {part!r}")


def exported(factory: pytest.TempPathFactory) -> Path:
    """A bf16 build for the RTX 5090 stopped before its golden vectors; made once in a run. Do not change it."""
    return shared(
        factory, "rtx", lambda out: build_until(request(out, "bf16", name="exported"), "golden vectors")
    )


@dataclass(frozen=True)
class Boundary:
    """What a killed build left.

    Attributes:
        signal: that ended it.
        parts: the finished ones, and the files of each.
        times: when these files were last written.
        shown: names of the steps that the progress bar showed.
    """

    folder: Path
    signal: int
    parts: dict[str, list[str]]
    times: dict[str, int]
    shown: list[str]


def build_killed(out: Path, name: str, steps: Sequence[str]) -> list[Boundary]:
    """Build `out/name` in bf16 again and again, each time killed (SIGKILL) when it shows the next of `steps`."""
    command = [sys.executable, "-m", __name__, str(out), name, *steps]
    root = Path(__file__).resolve().parents[3]
    output = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, check=True).stdout
    return [Boundary(Path(folder), *rest) for folder, *rest in json.loads(output)]


def _killed(wanted: BuildRequest, step: str) -> list[object]:
    reader, writer = os.pipe()

    def kill(name: str, done: float, total: float) -> None:
        os.write(writer, f"{name}\n".encode())
        if name == step:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()  # this process has started no threads: it has only imported what a build needs
    if not child:
        try:
            build_bundle(wanted, kill)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as steps:
        shown = steps.read().splitlines()
    _, status = os.waitpid(child, 0)
    folder = partial(wanted)
    parts = finished(folder)
    times = {path: (folder / path).stat().st_mtime_ns for files in parts.values() for path in files}
    return [str(folder), os.WTERMSIG(status), parts, times, list(dict.fromkeys(shown))]


def partial(wanted: BuildRequest) -> Path:
    return wanted.out / f".{wanted.name}.partial"


def finished(folder: Path) -> dict[str, list[str]]:
    """The finished parts of a build in progress, and the files of each."""
    try:
        state = json.loads((folder / ".finished.json").read_text())
    except FileNotFoundError:
        return {}
    return {name: [file["path"] for file in entry["files"]] for name, entry in state["components"].items()}


def forget(folder: Path, *parts: str) -> None:
    """Make a build in progress forget that it finished some parts."""
    state = json.loads((folder / ".finished.json").read_text())
    for part in parts:
        state["components"].pop(part)
    (folder / ".finished.json").write_text(json.dumps(state))


def hashes(folder: Path) -> dict[str, str]:
    """Digests of a bundle's files. TensorRT-RTX writes equal parts of this one engine in an order that varies."""
    entries = load_bundle(folder).manifest.files
    return {entry.path: entry.sha256 for entry in entries if entry.path != "vae_first.engine"}


@dataclass
class Bundles:
    """Builds bundles on demand, each from a copy of the same exported graphs."""

    root: Path
    exported: Path

    def start(self, wanted: BuildRequest) -> BuildRequest:
        """Give the build of `wanted` the exported graphs, as if it had been interrupted after them."""
        wanted.out.mkdir(parents=True, exist_ok=True)
        shutil.copytree(self.exported, partial(wanted))
        return wanted

    def build(self, precision: str, variant: str = "short", **changes: object) -> Path:
        """The bundle of these settings; built at the first call."""
        wanted = request(self.root / "bundles", precision, variant, **changes)
        folder = wanted.out / wanted.name
        return folder if folder.exists() else build_bundle(self.start(wanted))


if __name__ == "__main__":
    out, name, *steps = sys.argv[1:]
    print(json.dumps([_killed(request(Path(out), "bf16", name=name), step) for step in steps]))
