"""The bundles of the tiny model that GPU tests share: `python -m tests.gpu.bundles NAME FOLDER` builds one.

Compiling one takes minutes, most of them on one core, so they are built side by side in processes of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from export.build import build_bundle
from export.request.request import BuildRequest
from export.request.targets import BackendName, Precision, Target, list_targets, load_target, load_variant
from export.request.weights import Weights
from lightforcing_ref.config import PRESETS

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Spec:
    """What a bundle is built with; for the CPU if it runs on ONNX Runtime, else for the GPU of this machine."""

    backend: BackendName
    precision: Precision
    execution: Literal["whole", "segmented"]


SPECS = {
    "host": Spec("onnxruntime", "fp32", "segmented"),
    "inductor-bf16": Spec("inductor", "bf16", "whole"),  # inductor has one way only
    "inductor-fp8": Spec("inductor", "fp8", "whole"),
    "tensorrt-rtx-bf16": Spec("tensorrt-rtx", "bf16", "segmented"),
}


def target_of(spec: Spec) -> Target | None:
    """The target that the bundle is for; None where it cannot be built for this GPU."""
    if spec.backend == "onnxruntime":
        return load_target("cpu")
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    for target in list_targets():
        fits = target.compute_capability == capability and spec.backend in target.backends
        if fits and spec.precision in target.precisions:
            return target
    return None


def build(name: str, out: Path, target_name: str | None = None) -> Path:
    """Build `tiny` in the long mode: within a few chunks its window slides and its sinks move."""
    spec, preset = SPECS[name], PRESETS["tiny"]
    target = load_target(target_name) if target_name else target_of(spec)
    assert target is not None, f"{name} cannot be built here"
    variant = load_variant("long").model_copy(update={"block": preset.block})
    size = (preset.height, preset.width)
    request = BuildRequest(
        target, variant, Weights(preset, seed=0), *size, spec.backend, spec.precision, out, name,
        execution=spec.execution,
    )  # fmt: skip
    return build_bundle(request)


class Builds:
    """Bundles in `folder`; what this machine needs and lacks is built from the moment the first one is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: dict[str, subprocess.Popen[str]] = {}

    def path(self, name: str) -> Path:
        """The folder of a bundle, once it is there."""
        if (self._folder / name / "manifest.json").is_file() and name not in self._running:
            return self._folder / name
        if not self._running:
            self._start()
        status = self._running[name].wait()
        said = (self._folder / f"{name}.log").read_text()
        assert status == 0, f"the build of {name} failed:\n{said[-4000:]}"
        return self._folder / name

    def _start(self) -> None:
        wanted = self._wanted()
        cores = str(max(1, (os.cpu_count() or 1) // len(wanted)))
        environment = {**os.environ, "OMP_NUM_THREADS": cores, "TORCHINDUCTOR_COMPILE_THREADS": cores}
        for name in wanted:
            with (self._folder / f"{name}.log").open("w") as log:
                self._running[name] = subprocess.Popen(
                    [sys.executable, "-m", "tests.gpu.bundles", name, str(self._folder)],
                    cwd=ROOT,
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    text=True,
                )

    def _wanted(self) -> list[str]:
        return [
            name
            for name, spec in SPECS.items()
            if target_of(spec) is not None
            and (spec.backend != "tensorrt-rtx" or has_rtx())
            and not (self._folder / name / "manifest.json").is_file()
        ]

    def close(self) -> None:
        """End what is still being built."""
        for process in self._running.values():
            process.kill()
            process.wait()


def has_rtx() -> bool:
    """Whether TensorRT-RTX is installed."""
    try:
        import tensorrt_rtx  # noqa: F401
    except ImportError:
        return False
    return True


if __name__ == "__main__":
    build(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
