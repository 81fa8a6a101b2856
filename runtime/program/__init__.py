"""A rollout's step as a program of launches and engine calls, and the buffers that it works on."""

from .attention import attention_launches
from .buffers import plan_buffers
from .kernels import KernelLibrary

__all__ = ["KernelLibrary", "attention_launches", "plan_buffers"]
