"""Verdicts: whether each component of a bundle computes what it should, on this machine.

A verdict is found by running the golden vectors (`runtime.bundle.golden`) and recorded beside the bundle. It
holds for the manifest, device, driver and libraries it was found with, and says nothing about any other.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from runtime.backends import runs_on_host
from runtime.bundle import Bundle
from runtime.bundle.fields import NonNegative, Part, Sha256
from runtime.bundle.golden import ComponentRunner, GoldenVectors, Platform
from runtime.engine import Engine
from runtime.errors import BundleError, EngineError
from runtime.files import cache_folder, write_file

__all__ = [
    "VERDICT_NAME",
    "ComponentVerdict",
    "Verdict",
    "VerificationError",
    "ensure_verified",
    "find_verdict",
    "gpu_problem",
    "judge",
    "record",
    "refusal",
]

VERDICT_NAME = "verdict.json"

Progress = Callable[[str, int, int], None]


class VerificationError(EngineError):
    """A component does not compute what it should on this machine, or nothing tells whether it does."""


class PlatformRecord(Part):
    """A `Platform`, as it is recorded."""

    device: str
    driver: str | None
    libraries: dict[str, str]

    @classmethod
    def of(cls, platform: Platform) -> PlatformRecord:
        """The record of `platform`."""
        return cls(device=platform.device, driver=platform.driver, libraries=dict(platform.libraries))


class ComponentVerdict(Part):
    """How a component did.

    `error` is the largest of its outputs over its cases, null if it did not run or gave something that is not
    finite; `worst` is that output, as `CASE/OUTPUT`, and `problem` what it said.
    """

    error: float | None
    tolerance: float
    passed: bool
    cases: NonNegative
    worst: str
    problem: str | None = None


class Verdict(Part):
    """Contents of `verdict.json`. `created` in ISO 8601, `manifest` the SHA-256 of the manifest file."""

    schema_version: Literal[1] = 1
    created: str
    manifest: Sha256
    backend: str
    platform: PlatformRecord
    passed: bool
    components: dict[str, ComponentVerdict]

    def failures(self) -> str:
        """The components that failed with their errors, in words."""
        return "; ".join(
            f"component {name!r}: "
            + (
                component.problem or "its output is not finite"
                if component.error is None
                else f"relative error {component.error:.2e} in {component.worst!r}, at most "
                f"{component.tolerance:.0e} is allowed"
            )
            for name, component in self.components.items()
            if not component.passed
        )


def judge(bundle: Bundle, runner: ComponentRunner, progress: Progress | None = None) -> Verdict:
    """Run every golden case of `bundle`.

    A component that does not run has failed like one that computes something else; the others are still run.
    `progress` is called with a case, the cases done, and their number.

    Raises:
        BundleError: the bundle has no golden vectors, or they do not fit it.
    """
    with GoldenVectors(bundle) as vectors:
        found = _judged(vectors, runner, progress)
    return Verdict(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        manifest=bundle.digest,
        backend=bundle.manifest.backend,
        platform=PlatformRecord.of(runner.platform),
        passed=all(component.passed for component in found.values()),
        components=found,
    )


def _judged(
    vectors: GoldenVectors, runner: ComponentRunner, progress: Progress | None
) -> dict[str, ComponentVerdict]:
    found: dict[str, ComponentVerdict] = {}
    for done, case in enumerate(vectors.cases):
        if progress is not None:
            progress(case.name, done, len(vectors.cases))
        tolerance = vectors.tolerances[case.component]
        problem = None
        try:
            errors = vectors.errors(case, runner.run(case.component, vectors.inputs(case)))
        except EngineError as failure:
            errors, problem = {"": float("inf")}, str(failure)
        worst = max(errors, key=lambda name: errors[name])
        largest = errors[worst]
        verdict = ComponentVerdict(
            error=None if largest == float("inf") else largest,
            tolerance=tolerance,
            passed=largest <= tolerance,
            cases=1,
            worst=f"{case.name}/{worst}".rstrip("/"),
            problem=problem,
        )
        found[case.component] = _worse(found.get(case.component), verdict)
    return found


def _worse(first: ComponentVerdict | None, second: ComponentVerdict) -> ComponentVerdict:
    """The worse of two runs of one component, counting both."""
    if first is None:
        return second
    infinite = float("inf")
    ordered = sorted(
        (first, second), key=lambda run: infinite if run.error is None else run.error, reverse=True
    )
    return ordered[0].model_copy(update={"cases": first.cases + second.cases})


# ---- the record ----


def record(bundle: Bundle, verdict: Verdict) -> Path | None:
    """Write the verdict beside the manifest, or where that cannot be written, into the user's cache.

    Returns where it was written; None, with a warning, where neither can be: it then holds for this process only.
    """
    text = verdict.model_dump_json(indent=1) + "\n"
    try:
        return write_file(bundle.root / VERDICT_NAME, text)
    except OSError as beside:
        try:
            path = _cached(verdict.manifest)
            path.parent.mkdir(parents=True, exist_ok=True)
            return write_file(path, text)
        except (OSError, RuntimeError) as cached:  # RuntimeError: there is no home
            warnings.warn(
                f"the verdict cannot be recorded, neither beside the bundle ({beside}) nor in the cache ({cached}); it "
                "will be found again at the next load: set XDG_CACHE_HOME to a folder that can be written",
                stacklevel=2,
            )
            return None


def _cached(manifest: str) -> Path:
    return cache_folder("verdicts") / f"{manifest}.json"


def _places(bundle: Bundle) -> Iterator[Path]:
    yield bundle.root / VERDICT_NAME
    with contextlib.suppress(RuntimeError):  # there is no home
        yield _cached(bundle.digest)


def find_verdict(bundle: Bundle, platform: Platform) -> Verdict | None:
    """The recorded verdict on this manifest and platform; None if there is none. One that cannot be read is none."""
    wanted = PlatformRecord.of(platform)
    for path in _places(bundle):
        try:
            verdict = Verdict.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            continue
        if verdict.manifest == bundle.digest and verdict.platform == wanted:
            return verdict
    return None


# ---- at load ----


def ensure_verified(bundle: Bundle, engine: Engine, progress: Progress | None = None) -> None:
    """Let a bundle pass that has passed its golden vectors on this machine; without a verdict, find it now.

    Bundles for the host pass at once: golden vectors were computed there.

    Raises:
        VerificationError: a component failed, or the bundle has no golden vectors; the bundle must not be used.
    """
    if runs_on_host(bundle):
        return
    runner = engine.component_runner()
    verdict = find_verdict(bundle, runner.platform)
    if verdict is None or not verdict.passed:
        try:
            verdict = judge(bundle, runner, progress)
        except BundleError as error:
            raise VerificationError(str(error)) from error
        record(bundle, verdict)
    if not verdict.passed:
        raise VerificationError(refusal(bundle, verdict))


def refusal(bundle: Bundle, verdict: Verdict) -> str:
    """Why a bundle must not be used, and what to do."""
    return (
        f"bundle {bundle.root} does not compute what it should on {verdict.platform.device}: {verdict.failures()}. "
        f"Update the driver, rebuild the bundle for this GPU, or use another backend; 'python -m runtime verify' "
        f"runs this check again"
    )


def gpu_problem(library: str | None = None) -> str | None:
    """Why no CUDA device can be used here; None if one can. `library` is the driver's, by default the system's."""
    library = library or ("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return f"no NVIDIA driver ({library} is not there)"
    count = ctypes.c_int()
    if code := cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return f"the NVIDIA driver does not start (CUDA error {code})"
    return None if count.value else "the NVIDIA driver shows no device"
