"""Where training computes: PyTorch's default device, which `stages.run` sets from the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["load_weights", "tensor"]


def tensor(array: npt.NDArray[Any]) -> Tensor:
    """A NumPy array on the default device."""
    return torch.from_numpy(array).to(torch.get_default_device())


def load_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a safetensors file, on the default device."""
    from safetensors.torch import load_file

    return dict(load_file(path, device=str(torch.get_default_device())))
