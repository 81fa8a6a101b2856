"""The types that a bundle's graphs compute in, before anything is quantized."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .request import BuildRequest

__all__ = ["GraphTypes", "graph_types"]


@dataclass(frozen=True)
class GraphTypes:
    """Types that the graphs compute in. Boundaries are float32 where the runtime's own arithmetic meets them."""

    transformer: torch.dtype = torch.float32
    decoder: torch.dtype = torch.float32
    text: torch.dtype = torch.float32


_HOST = GraphTypes()
_DEVICE = GraphTypes(torch.bfloat16, torch.float16, torch.bfloat16)


def graph_types(request: BuildRequest) -> GraphTypes:
    """The types of a bundle: float32 on a host, bf16 with an fp16 decoder on a device, whatever is quantized later."""
    return _HOST if request.precision == "fp32" else _DEVICE
