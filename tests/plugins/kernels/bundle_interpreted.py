"""A bundle of ONNX graphs whose operators are executed by the Triton kernels, in Triton's interpreter.

Not collected by name: test_methods_interpreted.py runs `main` in a process of its own. What a GPU would launch, with
the tables that a build writes, is launched here, in the program of that bundle.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.compare.trials import SEED
from export.parts.kernels import write_tables
from export.request.selection import selection_tables
from lightforcing_ref.sparsity import BlockGeometry
from plugins.eager.launch import TritonLauncher
from runtime import Pipeline
from runtime.bundle import OPERATOR_COMPONENTS, Bundle, Manifest, load_bundle
from runtime.host.executor import HostExecutor
from runtime.program.attention import read_tables
from runtime.program.buffers import plan_buffers
from runtime.program.builder import build_program
from runtime.program.engine import ProgramEngine
from runtime.program.program import KernelLaunch, Operation, Program
from tests.runtime.device_bundles import write_kernels
from tests.runtime.handmade import edit_manifest, relist


class InterpretedExecutor(HostExecutor):
    """Runs every kernel in Triton's interpreter, those of the cache included."""

    def __init__(self, bundle: Bundle, program: Program) -> None:
        super().__init__(bundle, program, threads=1)
        keep = np.array(bundle.manifest.sparsity.keep_q20, dtype=np.int32)
        for name, values in {"keep_q20": keep, **read_tables(bundle)}.items():
            self.array(program.buffers[name].view)[...] = values

    def _bind(self, operation: Operation, session: int) -> Callable[[], float]:
        if not isinstance(operation, KernelLaunch):
            return super()._bind(operation, session)
        buffers = {
            name: torch.from_numpy(self.array(view, session)) for name, view in operation.buffers.items()
        }
        if operation.kernel == "commit":  # moves bits, of half as many bytes on a GPU
            return super()._bind(operation, session)

        def launch() -> float:
            TritonLauncher().launch(operation.kernel, operation.problem, buffers, operation.options)
            return 0.0

        return launch


def with_kernels(folder: Path) -> Bundle:
    """The bundle in `folder`, changed so that kernels execute its operators."""
    manifest = load_bundle(folder).manifest
    attention, model = manifest.attention, manifest.model
    geometry = BlockGeometry(model.frame_tokens, attention.block_q, attention.block_k)
    turns = selection_tables(
        attention.method,
        geometry,
        model.token_grid[1],
        manifest.cache.max_past_frames,
        model.chunk_frames,
    )
    tables = write_tables(folder, turns)
    section = {"folder": "kernels", "arch": "sm_120", "driver": 570, **tables}
    dumped = {
        name: [part.model_dump(mode="json") for part in value] if isinstance(value, tuple) else value
        for name, value in section.items()
    }

    images = write_kernels(folder / "kernels", kernels=())

    def edit(raw: dict[str, Any]) -> None:
        raw["kernels"] = dumped
        for name in OPERATOR_COMPONENTS:
            raw["components"][name]["file"] = None

    edit_manifest(folder, edit)
    return load_bundle(relist(folder, *images, *([tables["tables"]] if tables else [])))


def play(bundle: Bundle, prompt: str, chunks: int) -> NDArray[np.uint8]:
    """Frames of a rollout."""
    plan = plan_buffers(bundle.manifest, 1)
    program = build_program(bundle, plan)
    engine = _Engine(bundle.manifest, program, InterpretedExecutor(bundle, program))
    with (
        Pipeline.load(bundle.root, warmup=False, engine=engine) as pipeline,
        pipeline.session(prompt, seed=SEED) as session,
    ):
        return np.concatenate([chunk.frames for chunk in session.stream(chunks=chunks)])


class _Engine(ProgramEngine):
    on_device = False

    def __init__(self, manifest: Manifest, program: Program, executor: InterpretedExecutor) -> None:
        super().__init__(manifest, program, executor)


def main() -> None:
    """Arguments: the folder of a bundle, which is changed; a prompt; chunks; where frames go."""
    folder, prompt, chunks, out = sys.argv[1:]
    bundle = with_kernels(Path(folder))
    np.save(out, play(bundle, prompt, int(chunks)))
    launched = {
        operation.kernel
        for _, operation in build_program(bundle, plan_buffers(bundle.manifest, 1)).walk()
        if isinstance(operation, KernelLaunch)
    }
    print(json.dumps(sorted(launched)))


if __name__ == "__main__":
    main()
