"""Reading what TensorRT's engine inspector says about an engine, and holding it against the graph."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.errors import BuildError
from export.quantize.graph import ProductType

__all__ = ["Inspection", "check_plugins", "check_precision", "read_inspection"]

_TYPES = (
    ("fp4", re.compile(r"fp4|e2m1|float4", re.I)),
    ("fp8", re.compile(r"fp8|e4m3|float8", re.I)),
    ("bf16", re.compile(r"bf16|bfloat16", re.I)),
    ("fp16", re.compile(r"fp16|half|float16", re.I)),
    ("fp32", re.compile(r"fp32|float", re.I)),
)
"""How types are written, across releases ("Row major linear FP16 format", "Half"); the first that matches counts."""

_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_PRODUCT = re.compile(r"gemm|matmul|matrixmultiply|matrix_multiply|fc_", re.I)
_PLUGIN = re.compile(r"plugin", re.I)
_SHOWN = 3


@dataclass(frozen=True)
class Layer:
    """A layer of an engine: the types of what it reads, the ONNX nodes that it computes, and what computes it."""

    name: str
    types: frozenset[str]
    nodes: frozenset[str]
    is_product: bool
    is_plugin: bool


@dataclass(frozen=True)
class Inspection:
    """The layers of an engine."""

    layers: tuple[Layer, ...]

    def products(self) -> dict[str, int]:
        """Layers that are matrix products, by the narrowest type that they read."""
        order = [name for name, _ in _TYPES]
        counts = Counter(
            min(layer.types, key=order.index, default="other") for layer in self.layers if layer.is_product
        )
        return dict(sorted(counts.items()))


def read_inspection(path: Path) -> Inspection:
    """Read the inspector's JSON.

    Raises:
        BuildError: it is not what an engine built with detailed profiling gives.
    """
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
        layers = tuple(_layer(entry) for entry in document["Layers"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BuildError(
            f"{path.name}: the engine inspector's output is not understood ({type(error).__name__}: {error}), so "
            "nothing tells what the engine computes in; this version reads that of TensorRT 11"
        ) from error
    if not layers:
        raise BuildError(f"{path.name}: the engine inspector names no layers")
    return Inspection(layers)


def _layer(entry: Mapping[str, Any]) -> Layer:
    name = str(entry["Name"])
    described = " ".join(str(entry.get(key, "")) for key in ("LayerType", "TacticName", "Name"))
    return Layer(
        name=name,
        types=frozenset(_types(entry.get("Inputs", ()))),
        nodes=frozenset(_NODE.findall(str(entry.get("Metadata", "")))),
        is_product=_PRODUCT.search(described) is not None,
        is_plugin=any(_PLUGIN.search(str(entry.get(key, ""))) for key in ("LayerType", "PluginType")),
    )


def _types(tensors: Any) -> Iterator[str]:
    for tensor in tensors:
        text = " ".join(str(tensor.get(key, "")) for key in ("Format/Datatype", "Datatype", "Format"))
        found = next((name for name, pattern in _TYPES if pattern.search(text)), None)
        if found is not None:
            yield found


def check_plugins(component: str, inspection: Inspection, expected: Mapping[str, str]) -> None:
    """Check that a plugin computes each of this project's operators.

    A parser that does not find the plugin takes the function body in its place without a word: right, and slow.

    Args:
        expected: as `operator_nodes` gives it.

    Raises:
        BuildError: a node is not in a layer that is a plugin.
    """
    found = {node for layer in inspection.layers if layer.is_plugin for node in (*layer.nodes, layer.name)}
    missing = [f"{name} ({operator})" for name, operator in expected.items() if name not in found]
    if missing:
        raise BuildError(
            f"{component}: {len(missing)} of {len(expected)} operators are not plugins in the engine, the first "
            f"{missing[0]}: TensorRT took its function body, or the inspector's output is of another release. Build "
            "the plugin library for this release of TensorRT: python -m plugins build --tensorrt"
        )


def check_precision(component: str, inspection: Inspection, expected: Mapping[str, ProductType]) -> None:
    """Check that each quantized product of the graph computes in its type.

    A weight whose activation is not quantized becomes a product in the wider type without any warning.

    Args:
        expected: as `quantized_products` gives it.

    Raises:
        BuildError: a product computes in another type, or no layer says that it computes it.
    """
    problems = []
    for node, wanted in expected.items():
        layers = [layer for layer in inspection.layers if node in layer.nodes]
        if not layers:
            problems.append(f"{node} is in none of the engine's layers")
        elif not any(wanted in layer.types for layer in layers):
            types = ", ".join(sorted({name for layer in layers for name in layer.types})) or "unknown types"
            problems.append(f"{node} reads {types} and not {wanted}")
    if problems:
        more = len(problems) - _SHOWN
        raise BuildError(
            f"{component}: {len(problems)} of {len(expected)} quantized products are not what they should be: "
            f"{'; '.join(problems[:_SHOWN])}{f'; and {more} more' if more > 0 else ''}. Use another TensorRT 11 "
            "release, or --precision bf16"
        )
