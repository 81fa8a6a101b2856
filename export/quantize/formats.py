"""Quantization of the transformer's ONNX graphs: which linears, in which format, and what it costs.

    formats = choose_formats(linear_names(model), "fp8", skip=["blocks.0.*"])
    quantize(model, formats)
    save_quantized(model, folder / "step_fp8.onnx", "step_fp8.weights")

The graph runs on ONNX Runtime (FP8, in float32, with `ORT_SESSION_CONFIG`), and its products become FP8 or FP4 ones in
TensorRT-RTX.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from export.errors import InputError
from export.graph.tracing import EXTERNAL_BYTES
from export.request.linears import QuantPrecision, choose_formats
from export.tolerances import LINEAR

from .graph import find_linears, is_block_linear, quantize
from .numerics import Format

__all__ = [
    "ORT_SESSION_CONFIG",
    "QuantPrecision",
    "auto_formats",
    "choose_formats",
    "linear_names",
    "quantize",
    "save_quantized",
]

ORT_SESSION_CONFIG = {"session.disable_quant_qdq": "1"}
"""Session configuration that ONNX Runtime needs for FP8 graphs: its fusion of Q/DQ products knows integers only and
refuses the graph. Without this entry, the highest optimisation level that works is ORT_ENABLE_BASIC."""


def linear_names(model: ir.Model) -> list[str]:
    """Names of the graph's block linears, e.g. "blocks.3.ffn.0", in the order they run."""
    return [linear.name for linear in find_linears(model)]


def auto_formats(
    errors: Mapping[str, Mapping[Format, float]],
    precision: QuantPrecision,
    *,
    thresholds: Mapping[str, float] = LINEAR,
    same_in_all_layers: bool = True,
) -> dict[str, Format]:
    """The format of each linear that keeps its error within the threshold: as asked for, else FP8, else none.

    Args:
        errors: from `layer_errors`, which must have measured the formats in question.
        same_in_all_layers: decide once for all linears of a kind, by the worst one: layers that share an engine
            must have the same structure. False decides each one by itself, which needs an engine per layer.

    Raises:
        InputError: a format in question was not measured.
    """

    def within(name: str, format: Format) -> bool:
        kind = is_block_linear(name)
        judged = [other for other in errors if same_in_all_layers and is_block_linear(other) == kind] or [
            name
        ]
        # A NaN is within nothing.
        return all(errors[other][format] <= thresholds[format] for other in judged)

    chosen: dict[str, Format] = {}
    for name, measured in errors.items():
        candidates: tuple[Format, ...] = ("nvfp4", "fp8") if precision == "nvfp4" else ("fp8",)
        missing = [format for format in candidates if format not in measured]
        if missing:
            raise InputError(f"the error of {name} in {missing[0]} was not measured; give it to layer_errors")
        format = next((format for format in candidates if within(name, format)), None)
        if format is not None:
            chosen[name] = format
    return chosen


def save_quantized(model: ir.Model, path: Path, weights: str) -> None:
    """Write a quantized model to `path`, with all its weights in the new file `weights` beside it."""
    ir.save(model, path, external_data=weights, size_threshold_bytes=EXTERNAL_BYTES)
