"""Tensors of PyTorch as arrays of numpy and back, in every element type: numpy's bfloat16 and float8 are ml_dtypes'."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.bundle import dtype_name, numpy_dtype

__all__ = ["as_array", "as_tensor"]

_SAME_BITS = {torch.bfloat16: (torch.int16, np.int16), torch.float8_e4m3fn: (torch.uint8, np.uint8)}
"""Types that PyTorch does not exchange with numpy, and those that it does for their bits."""


def as_tensor(array: NDArray[Any]) -> Tensor:
    """A copy of `array` on the host, in its shape and type."""
    dtype = getattr(torch, dtype_name(array.dtype))
    copied = np.array(array, order="C")
    if dtype in _SAME_BITS:
        return torch.from_numpy(copied.view(_SAME_BITS[dtype][1])).view(dtype)
    return torch.from_numpy(copied)


def as_array(tensor: Tensor) -> NDArray[Any]:
    """`tensor`, which is on the host, in its shape and type; shares its memory where that has no gaps."""
    tensor = tensor.contiguous()
    if tensor.dtype in _SAME_BITS:
        return tensor.view(_SAME_BITS[tensor.dtype][0]).numpy().view(numpy_dtype(dtype_name(tensor.dtype)))
    return tensor.numpy()
