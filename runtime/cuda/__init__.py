"""Execution on a CUDA device."""

from .kernels import KernelLauncher, cuda_core

__all__ = ["KernelLauncher", "cuda_core"]
