"""Rungs 2 to 6: bundles with random weights, built once and run through the public API of the runtime."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from .ladder import LADDER, Case, Platform, Rung, bundle_spec
from .measure import ChunkRecord

if TYPE_CHECKING:
    from export import BuildRequest

__all__ = ["BundleRollout", "build_bundles", "build_here", "bundle_folder", "compile_packages"]

_PROGRAM = "import sys; from benchmarks.rollout.bundles import build_here; build_here(sys.argv[1:])"
_THREADS = ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
"""Environment variables: threads that compute golden vectors, processes that compile kernels."""


def bundle_folder(rung: Rung, case: Case, platform: Platform, folder: Path) -> Path:
    """Where the bundle of a rung lies."""
    return folder / bundle_spec(rung, platform).name(case, platform)


def build_here(arguments: Sequence[str]) -> None:
    """Build one bundle in this process; the arguments are those that `build_bundles` passes."""
    from export import build_bundle

    preset, height, width, frames, rung, backend, device, gpu, capability, folder = arguments
    case = Case(preset, int(height), int(width), int(frames))
    platform = Platform.here("cuda" if device == "cuda" else "cpu", backend, (gpu, capability))
    build_bundle(bundle_spec(LADDER[int(rung)], platform).request(case, platform, folder))


def request_for(case: Case, rung: Rung, target: str, folder: Path) -> BuildRequest:
    """What is asked for to build the rung's compiled bundle for a GPU that need not be here.

    Raises:
        InputError: there is no such target.
    """
    from export import load_target

    platform = Platform("cuda", load_target(target), "inductor", "bf16")
    return bundle_spec(rung, platform).request(case, platform, folder)


def compile_packages(case: Case, rung: Rung, target: str, folder: Path) -> Path:
    """Compile what holds no weights of the rung's bundle for a GPU that need not be here; the build resumes from it.

    Raises:
        BuildError, InputError: it cannot be compiled; there is no such target.
    """
    from export import compile_bundle

    return compile_bundle(request_for(case, rung, target, folder))


def build_bundles(
    wanted: Sequence[tuple[Case, Rung]],
    platform: Platform,
    gpu: tuple[str, str],
    folder: Path,
    *,
    jobs: int,
    timeout: float,
    rebuild: bool = False,
) -> dict[Path, str]:
    """Build the bundles that are not there, each in a process of its own; an interrupted build resumes.

    Args:
        gpu: name and compute capability of the device.
        timeout: seconds for all of them together.

    Returns:
        Why a bundle could not be built, by its folder; empty if all are there.
    """
    end = time.monotonic() + timeout
    missing: dict[Path, tuple[Case, Rung]] = {}
    for case, rung in wanted:
        path = bundle_folder(rung, case, platform, folder)
        if rebuild or not (path / "manifest.json").is_file():
            missing.setdefault(path, (case, rung))

    def build(item: tuple[Path, tuple[Case, Rung]]) -> tuple[Path, str]:
        path, (case, rung) = item
        numbers = [case.height, case.width, case.asked_frames, rung.number]
        arguments = [case.preset, *map(str, numbers), platform.backend, platform.device, *gpu, str(folder)]
        left = end - time.monotonic()
        late = f"its build does not fit into the time budget; build first (--build-only), it resumes: {path.name}"
        if left <= 0:
            return path, late
        try:
            command = [sys.executable, "-c", _PROGRAM, *arguments]
            result = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=left, check=False
            )
        except subprocess.TimeoutExpired:
            return path, late
        if result.returncode:
            lines = result.stderr.strip().splitlines() or ["no message"]
            return path, f"the build of {path.name} failed: {lines[-1]}"
        return path, ""

    # Beside each other, builds that take all cores each would mostly wait for one another.
    cores = max(1, (os.cpu_count() or 1) // max(1, min(jobs, len(missing))))
    environment = {name: str(cores) for name in _THREADS} | os.environ
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        return {path: problem for path, problem in pool.map(build, missing.items()) if problem}


class BundleRollout:
    """A loaded bundle that generates clips from a random prompt embedding."""

    def __init__(self, folder: Path, rung: Rung, seed: int = 0) -> None:
        import numpy as np

        from runtime import Pipeline

        self._overlap = rung.overlap
        self._pipeline = Pipeline.load(
            folder, text_encoder="external", verify=False, golden=False, graphs=rung.graphs
        )
        text = self._pipeline.manifest.text
        random = np.random.default_rng(seed)
        self._embedding = random.standard_normal((text.text_len, text.dim), dtype=np.float32)

    def clip(self, chunks: int, *, overlap: bool | None = None) -> Iterator[ChunkRecord]:
        """A new session. Without overlap, a chunk is asked for when the one before is there, so nothing runs ahead.

        Args:
            overlap: other than the rung's.
        """
        streams = (chunks,) if (self._overlap if overlap is None else overlap) else (1,) * chunks
        with self._pipeline.session(embedding=self._embedding) as session:
            for count in streams:
                for chunk in session.stream(chunks=count):
                    yield ChunkRecord(len(chunk.frames), chunk.denoise, chunk.decode, chunk.other)

    def close(self) -> None:
        """Free the pipeline."""
        self._pipeline.close()
