"""What Inductor is told about the memory of packages: which results it need not copy, and which it should keep.

- A package writes its results into buffers that it is given. What Inductor generates for nobody else it writes there
  directly; the result of a library's product it puts into memory of its own, which a kernel then copies (of a layer's
  q, k and v, 85 MB), and a result that is read within the package, too, such as the residual stream, it writes twice.
  Here the library is given the buffer, and who reads within the package reads there.
- The sums along a decoder's residual stream Inductor adds up again wherever they are read, until the number of tensors
  read makes it keep something: the float32 quotient of the next norm, twice the size of the sum. Here it keeps the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import fx
from torch._inductor import ir
from torch._inductor.lowering import lowerings
from torch._inductor.virtualized import V
from torch.utils import _pytree as pytree

__all__ = ["package_lowerings"]

Lowering = Callable[..., Any]

_aten: Final = torch.ops.aten
_PRODUCTS: Final = (_aten.mm.default, _aten._scaled_mm.default)
_VIEWS: Final = (_aten.reshape.default, _aten.view.default, _aten.select.int, _aten.squeeze.dim)
_IMAGE_AXES: Final = 4


@contextmanager
def package_lowerings() -> Iterator[None]:
    """While the body runs, Inductor lowers copies and sums as packages want them."""
    changed = {_aten.copy_.default: _copy, _aten.add.Tensor: _add}
    before: dict[Any, Lowering] = {target: lowerings[target] for target in changed}
    lowerings.update({target: make(before[target]) for target, make in changed.items()})
    try:
        yield
    finally:
        lowerings.update(before)


def _copy(lower: Lowering) -> Lowering:
    def lowered(target: Any, source: Any, non_blocking: bool = False) -> Any:
        made = _unwrapped(source)
        product = isinstance(made, ir.ExternKernelOut)
        own = isinstance(source.data, ir.StorageBox) and isinstance(made, ir.ComputedBuffer)
        own = own and not _goes_to_library(made)
        if (
            not (product or own)
            or not _is_all(V.graph.current_node, product)
            or not _lies_alike(made, target)
        ):
            return lower(target, source, non_blocking)
        made.layout = ir.MutationLayoutSHOULDREMOVE(target.data)
        if product:
            made.output_view = ir.ReinterpretView(data=target.data, layout=target.data.get_layout())
        return target

    return lowered


def _unwrapped(value: Any) -> Any:
    while isinstance(value, (ir.MutableBox, ir.BaseView)):
        value = value.data
    return value


def _goes_to_library(made: Any) -> bool:
    """Whether a library reads it, whose call would name a buffer that is no more."""
    kernels = [op for op in V.graph.operations if isinstance(op, ir.ExternKernel)]
    given = [value for kernel in kernels for value in (*kernel.inputs, *kernel.kwargs.values())]
    return any(_unwrapped(value) is made for value in pytree.tree_leaves(given))


def _lies_alike(made: Any, target: Any) -> bool:
    """Whether what was made lies as the target does, or how it lies is still open."""
    if isinstance(made.layout, ir.FlexibleLayout):
        return True
    return isinstance(made.layout, ir.FixedLayout) and list(made.layout.stride) == list(target.get_stride())


def _is_all(copy: fx.Node, product: bool) -> bool:
    """Whether a copy brings its whole source, as it is, into an input of the graph that nobody else reads or writes.

    Args:
        product: whether the source is a library's product, which nobody else may read.
    """
    target: Any = copy.args[0]
    source: Any = copy.args[1]
    if target.op != "placeholder" or len(target.users) != 1:
        return False
    while product and source.target in _VIEWS and len(source.users) == 1:
        source = source.args[0]
    if product and (source.target not in _PRODUCTS or len(source.users) != 1):
        return False
    made, wanted = source.meta["val"], target.meta["val"]
    alike = made.shape == wanted.shape and made.dtype == wanted.dtype
    return bool(alike and made.is_contiguous() and wanted.is_contiguous())


def _add(lower: Lowering) -> Lowering:
    def lowered(*args: Any, **kwargs: Any) -> Any:
        result = lower(*args, **kwargs)
        node = V.graph.current_node
        shapes = [arg.meta["val"].shape for arg in node.args if isinstance(arg, fx.Node)]
        if len(shapes) == 2 and shapes[0] == shapes[1] and len(shapes[0]) >= _IMAGE_AXES:
            result.realize()
        return result

    return lowered
