"""The attention kernels of a bundle: which specialisations its problem needs, compiled for the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from export.errors import BuildError, InputError
from export.progress import StepCallback, no_steps
from export.request.geometry import StepPlan
from export.request.methods import operator_of
from export.request.selection import selection_tables
from export.request.targets import Target
from plugins import contract, maps
from plugins.compile import kernels as kernel_build
from plugins.compile.prebuilt import write_prebuilt
from plugins.errors import PluginError
from plugins.kernels import specs
from runtime import bundle
from runtime.bundle.policies import SelectionTables, TokenBlocks

from .run import Run

__all__ = ["FOLDER", "SELECTS", "kernel_arch", "kernel_variants", "write_kernels", "write_tables"]

FOLDER = "kernels"

_ALWAYS = ("prepare", "commit")
SELECTS: Mapping[str, tuple[str, ...]] = {
    contract.HIERARCHICAL_SPARSE_ATTENTION: ("score", "select", "attend"),
    contract.SLIDING_TILE: ("expand", "attend_ordered"),
    contract.RADIAL: ("expand", "attend"),
    contract.SPARGE: ("score", "mean_key", "resemble", "select_sparge", "attend"),
    contract.SPARSE_LINEAR: ("score", "select", "attend", "sum_linear", "project_linear", "add_linear"),
    contract.VMOBA: ("pool", "score_groups", "choose", "expand", "attend_ordered"),
    contract.PERSISTENT_BLOCK: ("score", "select_pinned", "attend", "weigh", "persist"),
}
"""What the attention operators are made of, at most; and what updates a persistent set."""
_TABLES = "tables.safetensors"
_OVER_CODES = {kernel: f"{kernel}_fp8" for kernel in ("prepare", "attend", "commit", "rope_sink")}
"""What takes a kernel's place where keys and values are codes."""
_OVER_PRODUCTS = _OVER_CODES | {"attend": "attend_e4m3"}
"""The same where attention multiplies codes."""


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


def kernel_variants(target: Target, plan: StepPlan, *, scaled: bool = False) -> frozenset[str]:
    """Names of the kernel specialisations that a bundle of `plan` launches.

    Args:
        scaled: whether *prepare* applies the scales of the projection.

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
    problems = {kernel: [problem] for kernel in (*_ALWAYS, *(("rope_sink",) if moves_sinks else ()))}
    by_turn = [_over_tables(problem, tables) for tables in _tables(plan)] or [problem]
    problems |= dict.fromkeys(SELECTS[operator_of(plan.variant.attention)], by_turn)
    if plan.spec.kv is not None:
        replaced = _OVER_CODES if plan.spec.products is None else _OVER_PRODUCTS
        problems = {replaced.get(kernel, kernel): of_kernel for kernel, of_kernel in problems.items()}
    if scaled:
        renamed = {kernel: kernel.replace("prepare", "prepare_scaled") for kernel in problems}
        problems = {renamed[kernel]: of_kernel for kernel, of_kernel in problems.items()}
    try:
        return frozenset(
            specs.find_variant(kernel, one, arch).name
            for kernel, of_kernel in problems.items()
            for one in of_kernel
        )
    except PluginError as error:
        raise InputError(
            f"no attention kernel serves {plan.variant.name} on {target.name}: {error}"
        ) from error


def _ordered(tables: maps.Tables) -> TokenBlocks | None:
    """The blocks of tables that cut a frame's tokens in an order of their own."""
    if tables.blocks is None:
        return None
    (q_blocks, block_q), (k_blocks, block_k) = (tables.arrays[name].shape for name in ("q_order", "k_order"))
    return TokenBlocks(block_q=block_q, block_k=block_k, q_blocks=q_blocks, k_blocks=k_blocks)


def _over_tables(problem: specs.KernelProblem, tables: maps.Tables) -> specs.KernelProblem:
    blocks = _ordered(tables)
    if blocks is None:
        return problem
    return replace(
        problem,
        block_q=blocks.block_q,
        block_k=blocks.block_k,
        ordered_blocks=(blocks.q_blocks, blocks.k_blocks),
        groups=tables.groups,
    )


def _tables(plan: StepPlan) -> Sequence[maps.Tables]:
    columns = plan.preset.token_grid(plan.height, plan.width)[1]
    return selection_tables(
        plan.variant.attention, plan.geometry, columns, plan.max_past_frames, plan.chunk_frames
    )


def write_tables(folder: Path, by_turn: Sequence[maps.Tables]) -> dict[str, Any]:
    """Write the tables that attention selects by into `folder`, a bundle's.

    Returns:
        the fields of the manifest's section that tell of them.
    """
    turns, tensors = [], dict[str, np.ndarray[Any, Any]]()
    for turn, tables in enumerate(by_turn):
        names = {buffer: f"{buffer}.{turn}" for buffer in tables.arrays}
        tensors |= {names[buffer]: np.ascontiguousarray(array) for buffer, array in tables.arrays.items()}
        turns.append(SelectionTables(blocks=_ordered(tables), tensors=names))
    if not tensors:
        return {}
    (folder / FOLDER).mkdir(exist_ok=True)
    save_file(tensors, folder / FOLDER / _TABLES)
    listed = (
        bundle.TensorSpec(name=name, dtype=bundle.dtype_name(array.dtype), shape=array.shape)
        for name, array in tensors.items()
    )
    return {"tables": f"{FOLDER}/{_TABLES}", "tensors": tuple(listed), "turns": tuple(turns)}


def write_kernels(
    folder: Path, target: Target, plan: StepPlan, progress: StepCallback = no_steps, *, scaled: bool = False
) -> tuple[list[str], bundle.Kernels]:
    """Put the kernels that a bundle of `plan` launches into `folder/kernels/ARCH/`: those that came with this package,
    or compiled now. Beside that folder go the tables that they select by.

    Args:
        progress: called as kernels are compiled.
        scaled: as `kernel_variants` takes it.

    Returns:
        the files, relative to `folder`, and the manifest's section.

    Raises:
        BuildError: a kernel does not compile, or keeps registers in memory.
    """
    arch, wanted = kernel_arch(target), kernel_variants(target, plan, scaled=scaled)

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
    tables = write_tables(folder, _tables(plan))
    section = bundle.Kernels(folder=FOLDER, arch=f"sm_{arch}", driver=index.driver, **tables)
    stem = f"{FOLDER}/{section.arch}"
    names: Sequence[str] = ["kernels.json", *(image.file for image in index.images)]
    files = [f"{stem}/{name}" for name in names]
    return [*files, *([] if section.tables is None else [section.tables])], section


def kernels_part(
    run: Run, *, key: str | None = None, scaled: bool = False
) -> tuple[bundle.Kernels, list[bundle.FileEntry]]:
    """The part "kernels" of a build, made by `write_kernels`: the manifest's section, and the files."""
    target, plan = run.request.target, run.plan

    def write(folder: Path) -> tuple[list[str], bundle.Kernels]:
        return write_kernels(folder, target, plan, run.within, scaled=scaled)

    return run.section("kernels", bundle.Kernels, write, key=key)
