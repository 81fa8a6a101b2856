"""The attention kernels of a bundle: which specialisations its problem needs, compiled for the target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from export.errors import BuildError, InputError
from export.progress import StepCallback, no_steps
from export.request.geometry import StepPlan
from export.request.targets import Target
from plugins.compile import kernels as kernel_build
from plugins.compile.prebuilt import write_prebuilt
from plugins.errors import PluginError
from plugins.kernels import specs
from runtime import bundle

from .run import Run

__all__ = ["FOLDER", "kernel_arch", "kernel_variants", "write_kernels"]

FOLDER = "kernels"

_ALWAYS = ("prepare", "score", "select", "attend", "commit")
_OVER_CODES = {kernel: f"{kernel}_fp8" for kernel in ("prepare", "attend", "commit", "rope_sink")}
"""What takes a kernel's place where keys and values are codes."""


def kernel_arch(target: Target) -> int:
    """The architecture (compute capability times ten) whose kernels run on `target`.

    Raises:
        InputError: there are none.
    """
    capability = target.compute_capability
    arch = None if capability is None else int(capability.replace(".", ""))
    if arch not in specs.ARCHS:
        known = ", ".join(f"{known // 10}.{known % 10}" for known in specs.ARCHS)
        raise InputError(
            f"there are no attention kernels for {target.name} (compute capability {capability or 'none'}), only for "
            f"{known}; use --backend onnxruntime, or another --gpu"
        )
    return arch


def kernel_variants(target: Target, plan: StepPlan) -> frozenset[str]:
    """Names of the kernel specialisations that a bundle of `plan` launches.

    Raises:
        InputError: no kernel serves it; says what is served.
    """
    arch, geometry, cache = kernel_arch(target), plan.geometry, plan.variant.cache
    moves_sinks = cache.sink_positions == "window" and cache.sink_frames > 0
    problem = specs.KernelProblem(
        dtype="bfloat16",
        heads=plan.preset.dit.heads,
        head_dim=plan.preset.dit.head_dim,
        frame_tokens=geometry.frame_tokens,
        chunk_frames=plan.chunk_frames,
        past_frames=plan.max_past_frames,
        block_q=geometry.block_q,
        block_k=geometry.block_k,
        sinks=cache.sink_frames if moves_sinks else 0,
    )
    kernels = [*_ALWAYS, "rope_sink"] if moves_sinks else [*_ALWAYS]
    if plan.spec.kv is not None:
        kernels = [_OVER_CODES.get(kernel, kernel) for kernel in kernels]
    try:
        return frozenset(specs.find_variant(kernel, problem, arch).name for kernel in kernels)
    except PluginError as error:
        raise InputError(
            f"no attention kernel serves {plan.variant.name} on {target.name}: {error}"
        ) from error


def write_kernels(
    folder: Path, target: Target, plan: StepPlan, progress: StepCallback = no_steps
) -> tuple[list[str], bundle.Kernels]:
    """Put the kernels that a bundle of `plan` launches into `folder/kernels/ARCH/`: those that came with this package,
    or compiled now.

    Args:
        progress: called as kernels are compiled.

    Returns:
        the files, relative to `folder`, and the manifest's section.

    Raises:
        BuildError: a kernel does not compile, or keeps registers in memory.
    """
    arch, wanted = kernel_arch(target), kernel_variants(target, plan)

    def show(done: int, total: int) -> None:
        progress("compiling", done, total)

    index = write_prebuilt(arch, wanted, folder / FOLDER)
    if index is None:
        try:
            built = kernel_build.build(
                [arch], folder / FOLDER, only=lambda variant: variant.name in wanted, progress=show
            )
        except PluginError as error:
            raise BuildError(f"the attention kernels cannot be built: {error}") from error
        if spilled := kernel_build.spilling(built):
            raise BuildError(
                f"attention kernels run out of registers ({', '.join(spilled)}); use the Triton of the lock file"
            )
        index = built[arch]
    section = bundle.Kernels(folder=FOLDER, arch=f"sm_{arch}", driver=index.driver)
    stem = f"{FOLDER}/{section.arch}"
    names: Sequence[str] = ["kernels.json", *(image.file for image in index.images)]
    return [f"{stem}/{name}" for name in names], section


def kernels_part(run: Run, *, key: str | None = None) -> tuple[bundle.Kernels, list[bundle.FileEntry]]:
    """The part "kernels" of a build, made by `write_kernels`: the manifest's section, and the files."""
    target, plan = run.request.target, run.plan
    return run.section(
        "kernels", bundle.Kernels, lambda folder: write_kernels(folder, target, plan, run.within), key=key
    )
