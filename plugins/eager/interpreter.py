"""Triton's interpreter, which runs kernels on the CPU, with the NumPy that is installed."""

from __future__ import annotations

from functools import cache
from typing import Any

__all__ = ["mend_interpreter"]


@cache
def mend_interpreter() -> None:
    """Let loop counts be integers.

    The interpreter holds them as arrays of one element. Triton 3.6 hands these to `int()` as they are, and NumPy
    from 2.5 on refuses that; later releases of Triton take the element out.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend
