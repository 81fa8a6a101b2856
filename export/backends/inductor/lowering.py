"""What Inductor is told about the memory of packages: which results it need not copy, and which it should keep.

- A package writes its results into buffers that it is given. What Inductor generates itself it writes there directly;
  the result of a library's product it puts into memory of its own, which a kernel then copies: of a layer's q, k and v,
  85 MB. Here the library is given the buffer.
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
        made = source
        while isinstance(made, (ir.MutableBox, ir.BaseView)):
            made = made.data
        if not isinstance(made, ir.ExternKernelOut) or not _copies_product(V.graph.current_node):
            return lower(target, source, non_blocking)
        made.layout = ir.MutationLayoutSHOULDREMOVE(target.data)
        made.output_view = ir.ReinterpretView(data=target.data, layout=target.data.get_layout())
        return target

    return lowered


def _copies_product(copy: fx.Node) -> bool:
    """Whether a copy brings a product that nobody else reads into an input of the graph as it is."""
    target: Any = copy.args[0]
    source: Any = copy.args[1]
    while source.target in _VIEWS and len(source.users) == 1:
        source = source.args[0]
    if target.op != "placeholder" or source.target not in _PRODUCTS or len(source.users) != 1:
        return False
    made, wanted = source.meta["val"], target.meta["val"]
    return made.shape == wanted.shape and made.dtype == wanted.dtype and bool(wanted.is_contiguous())


def _add(lower: Lowering) -> Lowering:
    def lowered(*args: Any, **kwargs: Any) -> Any:
        result = lower(*args, **kwargs)
        node = V.graph.current_node
        shapes = [arg.meta["val"].shape for arg in node.args if isinstance(arg, fx.Node)]
        if len(shapes) == 2 and shapes[0] == shapes[1] and len(shapes[0]) >= _IMAGE_AXES:
            result.realize()
        return result

    return lowered
