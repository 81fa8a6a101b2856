"""Tiny bundles for an RTX 5090, built as the command line builds them, from graphs that are exported once."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from export.build import build_bundle
from export.request import BuildRequest
from export.targets import load_target, load_variant
from export.weights import Weights
from lightforcing_ref.config import PRESETS

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
