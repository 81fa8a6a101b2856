"""One component on the host, whatever executes it."""

from __future__ import annotations

from typing import Any, Protocol

from runtime.bundle import Bundle, TensorSpec
from runtime.bundle.golden import Arrays
from runtime.errors import BundleError

from .inductor import SUFFIX as PACKAGE_SUFFIX
from .inductor import InductorGraph
from .onnxruntime import OnnxGraph

__all__ = ["Graph", "load_graph"]


class Graph(Protocol):
    """A component loaded on the host, which runs bound to fixed addresses."""

    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]

    def bind(self, inputs: Arrays, outputs: Arrays) -> Any:
        """Bind inputs and outputs to arrays, which must stay alive and in place; more may be given than needed."""

    def run(self, binding: Any) -> float:
        """Run a binding; the seconds it took."""


def load_graph(bundle: Bundle, name: str, threads: int) -> Graph:
    """Load a component with what its file is for: ONNX Runtime, or PyTorch for a package of Inductor's.

    Raises:
        BundleError: the component has no file, or another graph than the manifest says.
        EngineError: it does not load.
    """
    file = bundle.component(name).file
    if file is None:
        raise BundleError(
            f"component {name!r} of bundle {bundle.root} is executed as segments or by a kernel and has no file"
        )
    return (InductorGraph if file.endswith(PACKAGE_SUFFIX) else OnnxGraph)(bundle, name, threads)
