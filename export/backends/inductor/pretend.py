"""What PyTorch and Triton must be told in a process that has the library of `null_gpu.c` for a GPU.

PyTorch sees a GPU by itself. Triton would compile C code against the driver, load each kernel and time its choices:
here it loads nothing, and the first of several configurations, which is Inductor's own first choice, is taken untimed.
Code for the host, which only launches, is compiled for any processor of the last fifteen years, not for this one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["pretend"]


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

    def take_first(self: Any, *_: Any, **__: Any) -> None:
        self.launchers = self.launchers[:1]

    CachingAutotuner.autotune_to_one_config = take_first  # type: ignore[method-assign]
    flags_of = cpp_builder._get_optimization_cflags

    def portable(*args: Any, **options: Any) -> tuple[list[str], list[str]]:
        compiling, linking = flags_of(*args, **options)
        return ["march=x86-64-v2" if flag == "march=native" else flag for flag in compiling], linking

    cpp_builder._get_optimization_cflags = portable
    torch._inductor.config.cpp.vec_isa_ok = False
    torch._inductor.config.compile_threads = 1  # processes of their own would see no GPU
    torch._inductor.config.use_static_triton_launcher = False
