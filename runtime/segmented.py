"""The step as segments on the host: `first`, then operators and `layer` in turn, then `last`.

One `layer` graph serves all layers: each run of it is bound to other weights, which are mapped from the bundle's
weights file and never copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle
from .errors import BundleError

if TYPE_CHECKING:
    from .manifest import Segments, TensorSpec

__all__ = ["Graph", "SegmentedForward", "load_segments"]

Arrays = Mapping[str, NDArray[Any]]


class Graph(Protocol):
    """A component loaded on the host, which runs bound to fixed addresses."""

    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]

    def bind(self, inputs: Arrays, outputs: Arrays) -> Any:
        """Bind inputs and outputs to arrays, which must stay alive and in place; more may be given than needed."""

    def run(self, binding: Any) -> float:
        """Run a binding; the seconds it took."""

    def call(self, inputs: Arrays) -> list[NDArray[Any]]:
        """Run on arbitrary arrays; the outputs in order."""


class _Parts:
    """What the forwards of one bundle share: graphs, weights, and the arrays that pass between segments."""

    def __init__(self, bundle: Bundle, segments: Segments, load: Callable[[str], Graph]) -> None:
        self.segments = segments
        self.layers = bundle.manifest.model.layers
        self.first, self.layer, self.last = load("first"), load("layer"), load("last")
        self.prepare, self.attention = load("qk_prepare"), load("attention")
        self.weights = _read_weights(bundle, segments.weights) if segments.weights else {}
        self.residual = [_allocate(self.first.outputs["x_out"]) for _ in range(2)]
        self.qkv = _allocate(self.first.outputs["qkv"])
        self.attended = _allocate(self.attention.outputs["out"])
        self.query = {name: _allocate(self.prepare.outputs[name]) for name in ("q", "q_mean")}

    def weight(self, name: str) -> NDArray[Any]:
        try:
            return self.weights[name]
        except KeyError:
            raise BundleError(
                f"the weights file {self.segments.weights!r} has no tensor {name!r}; rebuild the bundle"
            ) from None


class SegmentedForward:
    """A forward made of segments, which binds and runs like a single graph. See :func:`load_segments`."""

    def __init__(self, parts: _Parts, *, clean: bool) -> None:
        self._parts = parts
        self._clean = clean

    def bind(self, inputs: Arrays, outputs: Arrays) -> list[tuple[Graph, Any]]:
        """Bind a whole forward; the names are those of the ``step`` component."""
        parts, segments = self._parts, self._parts.segments
        runs: list[tuple[Graph, Any]] = []

        def add(graph: Graph, weights: Mapping[str, str], takes: Arrays, gives: Arrays) -> None:
            bound = {name: parts.weight(tensor) for name, tensor in weights.items()}
            runs.append((graph, graph.bind({**inputs, **takes, **bound}, gives)))

        add(parts.first, segments.first, {}, {"x_out": parts.residual[0], "qkv": parts.qkv})
        rope = {"cos": inputs["rope_cos"], "sin": inputs["rope_sin"]}
        for layer in range(parts.layers):
            new = {
                "k": outputs[f"k.{layer}"],
                "v": outputs[f"v.{layer}"],
                "k_mean": outputs[f"kmean.{layer}"],
                **parts.query,
            }
            add(parts.prepare, segments.prepare[layer], {"qkv": parts.qkv, **rope}, new)
            is_last = layer == parts.layers - 1
            if is_last and self._clean:
                break
            past = {name: inputs[f"{name}.{layer}"] for name in ("past_k", "past_v", "past_kmean")}
            add(parts.attention, {}, new | past, {"out": parts.attended})
            takes = {
                "x": parts.residual[layer % 2],
                "attention_out": parts.attended,
                "cross_k": inputs[f"cross_k.{layer}"],
                "cross_v": inputs[f"cross_v.{layer}"],
            }
            if is_last:
                add(parts.last, segments.last, takes, outputs)
            else:
                gives = {"x_out": parts.residual[(layer + 1) % 2], "qkv": parts.qkv}
                add(parts.layer, segments.layers[layer], takes, gives)
        return runs

    def run(self, binding: list[tuple[Graph, Any]]) -> float:
        """Run a binding; the seconds spent in the backend."""
        return sum(graph.run(bound) for graph, bound in binding)


def load_segments(
    bundle: Bundle, segments: Segments, load: Callable[[str], Graph]
) -> tuple[SegmentedForward, SegmentedForward]:
    """The denoising and the clean forward of a segmented bundle; the clean one ends with the last keys and values.

    ``load`` loads one component. The two share the arrays between segments, so only one forward may run at a time,
    which holds for a pipeline's denoising thread.
    """
    parts = _Parts(bundle, segments, load)
    return SegmentedForward(parts, clean=False), SegmentedForward(parts, clean=True)


def _allocate(spec: TensorSpec) -> NDArray[Any]:
    return np.zeros([int(dim) for dim in spec.shape], dtype=spec.dtype)


def _read_weights(bundle: Bundle, file: str) -> dict[str, NDArray[Any]]:
    from safetensors import safe_open

    with safe_open(bundle.path(file), "np") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - no mapping
