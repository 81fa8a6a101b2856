"""Running a kernel on PyTorch tensors, and the lists that selection hands to attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from plugins.kernels.specs import KernelProblem, Variant, find_variant, image_arch, kernel_function

from .interpreter import mend_interpreter

__all__ = ["BlockLists", "Launcher", "TritonLauncher", "empty_lists"]


@dataclass(frozen=True)
class BlockLists:
    """Which key blocks each query block sees.

    Attributes:
        entries: int32 `[H, query_blocks, key_blocks]`; of each row the first `counts` entries are valid, ascending,
            each `frame << 16 | block` (logical frame: past oldest first, then current; block within the frame).
        counts: int32 `[H, query_blocks]`.
    """

    entries: Tensor
    counts: Tensor


class Launcher(Protocol):
    """Runs a kernel of `plugins.kernels.specs.KERNELS` on the current stream."""

    def launch(
        self,
        kernel: str,
        problem: KernelProblem,
        buffers: Mapping[str, Tensor],
        options: Mapping[str, int | float] | None = None,
    ) -> None:
        """Launch `kernel`; `buffers` and `options` hold its arguments by name, sizes come from `problem`."""
        ...


class TritonLauncher:
    """Compiles kernels just in time (or interprets them) and launches them."""

    def __init__(self, adjust: Callable[[Variant], Variant] = lambda variant: variant) -> None:
        """`adjust` may change a specialisation before it is compiled, to try other tile sizes."""
        self._adjust = adjust

    def launch(
        self,
        kernel: str,
        problem: KernelProblem,
        buffers: Mapping[str, Tensor],
        options: Mapping[str, int | float] | None = None,
    ) -> None:
        from triton import knobs

        interpret = bool(knobs.runtime.interpret)
        if interpret:
            mend_interpreter()
            # Every type runs in the interpreter; the table knows those of the GPU. This one has all kernels.
            arch, problem = 89, replace(problem, dtype="bfloat16")
        else:
            major, minor = torch.cuda.get_device_capability(next(iter(buffers.values())).device)
            arch = image_arch(10 * major + minor)
        variant = self._adjust(find_variant(kernel, problem, arch, triton_only=True))
        constants = dict(variant.constants)
        if "INTERPRET" in constants:
            constants["INTERPRET"] = interpret
        if interpret and "HARDWARE" in constants:
            constants["HARDWARE"] = False
        values = {**problem.sizes(), **buffers, **(options or {})}
        with torch.cuda.device_of(next(iter(buffers.values()))):
            kernel_function(kernel)[variant.grid_for(problem)](
                *(values[argument.name] for argument in variant.arguments),
                **constants,
                num_warps=variant.num_warps,
                num_stages=variant.num_stages,
                maxnreg=variant.max_registers,
                enable_fp_fusion=True,
            )


def empty_lists(problem: KernelProblem, device: torch.device) -> BlockLists:
    """Uninitialised lists with room for every resident block."""
    sizes = problem.sizes()
    shape = (problem.heads, sizes["query_blocks"], sizes["key_blocks"])
    return BlockLists(
        torch.empty(shape, dtype=torch.int32, device=device),
        torch.empty(shape[:2], dtype=torch.int32, device=device),
    )
