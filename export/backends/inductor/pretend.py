"""What PyTorch and Triton must be told in a process that has the library of `null_gpu.c` for a GPU.

PyTorch sees a GPU by itself. Triton would compile C code against the driver, load each kernel and time its choices:
here it loads nothing, and the choice is made by rule.
Code for the host, which only launches, is compiled for any processor of the last fifteen years, not for this one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["best_config", "pretend"]


class _Utils:
    """What Triton's driver does with a device."""

    def load_binary(
        self, name: str, kernel: bytes, shared: int, device: int
    ) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spilled registers, threads of a block: nothing is loaded."""
        return 1, 1, 0, 0, _THREADS

    def get_device_properties(self, device: int) -> dict[str, int]:
        import torch

        found: Any = torch.cuda.get_device_properties(device)
        return {
            "max_shared_mem": found.shared_memory_per_block_optin,
            "max_num_regs": found.regs_per_multiprocessor,
            "multiprocessor_count": found.multi_processor_count,
            "warpSize": found.warp_size,
        }


_THREADS = 1024


def _launches_nothing(*_: Any, **__: Any) -> Callable[..., None]:
    return lambda *_, **__: None


_ACCESS = re.compile(r"tl\.(?:load|store)\(\w+ \+ \((.*?)\), ")
_STEP = re.compile(r"(?:(\d+)\*)?r0_\d+")
_LENGTH = re.compile(r"r0_numel = (\d+)")
_ELEMENTS = 1024


def best_config(
    kind: str, source: str, sizes: Mapping[str, int], configs: Sequence[Mapping[str, int]]
) -> int:
    """Which of a kernel's configurations to take where none can be timed.

    Neighbouring threads should read neighbouring elements: if the reduced index is not the one that runs fastest in
    memory, the other one must be, in blocks as large as are offered. Else a block should have enough elements for its
    threads.

    Args:
        kind: Inductor's `HeuristicType`, by name.
        source: the kernel's code.
        sizes: elements by axis, rounded up to powers of two.
        configs: block sizes and warps.
    """
    order = range(len(configs))
    if kind == "POINTWISE" and len(sizes) == 1:
        return max(order, key=lambda i: configs[i]["XBLOCK"])
    if kind not in ("REDUCTION", "PERSISTENT_REDUCTION"):
        return 0
    both = [found for found in _ACCESS.findall(source) if "x" in found and "r0_" in found]
    steps = [int(found.group(1) or 1) for access in both if (found := _STEP.search(access))]
    if any(step > 1 for step in steps):
        return max(order, key=lambda i: configs[i].get("XBLOCK", 1))
    rows = max(1, math.prod(size for axis, size in sizes.items() if axis.startswith("r")))
    if kind == "PERSISTENT_REDUCTION":
        enough = [i for i in order if configs[i].get("XBLOCK", 1) * rows >= _ELEMENTS]
        return min(enough, key=lambda i: configs[i].get("XBLOCK", 1), default=len(configs) - 1)
    length = _LENGTH.search(source)
    reduced = int(length.group(1)) if length else rows
    # A block that is longer than what is left of a row works for nothing.
    return min(
        order, key=lambda i: -(-reduced // configs[i].get("R0_BLOCK", 1)) * configs[i].get("R0_BLOCK", 1)
    )


def pretend() -> None:
    """Make Triton and Inductor of this process content with a GPU that does nothing."""
    import torch
    from torch._inductor import cpp_builder
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from triton.backends import backends
    from triton.backends.driver import GPUDriver
    from triton.backends.nvidia.driver import CudaDriver

    class Driver(CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            self.utils = _Utils()
            self.launcher_cls = _launches_nothing
            GPUDriver.__init__(self)

    object.__setattr__(backends["nvidia"], "driver", Driver)

    def choose(self: Any, *_: Any, **__: Any) -> None:
        configs = [
            {**launcher.config.kwargs, "warps": launcher.config.num_warps} for launcher in self.launchers
        ]
        chosen = best_config(self.heuristic_type.name, self.fn.src, self.size_hints, configs)
        self.launchers = [self.launchers[chosen]]

    CachingAutotuner.autotune_to_one_config = choose  # type: ignore[method-assign]
    flags_of = cpp_builder._get_optimization_cflags

    def portable(*args: Any, **options: Any) -> tuple[list[str], list[str]]:
        compiling, linking = flags_of(*args, **options)
        return ["march=x86-64-v2" if flag == "march=native" else flag for flag in compiling], linking

    cpp_builder._get_optimization_cflags = portable
    torch._inductor.config.cpp.vec_isa_ok = False
    torch._inductor.config.compile_threads = 1  # processes of their own would see no GPU
    torch._inductor.config.use_static_triton_launcher = False
