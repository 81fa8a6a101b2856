"""Quantization of the transformer's ONNX graphs: which linears, in which format, and what it costs.

    formats = choose_formats(names, "fp8", skip=["blocks.0.*"])
    report = quantize(model, formats)
    save_quantized(model, folder / "step.onnx", "step.fp8.weights")

The graph runs on ONNX Runtime (FP8, in float32, with `ORT_SESSION_CONFIG`), and its products become FP8 or FP4 ones in
TensorRT-RTX.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from export.errors import InputError
from export.graph.tracing import EXTERNAL_BYTES

from .graph import Observer, find_linears, is_block_linear, lazy_initializers, rewrite_linears
from .numerics import Format

__all__ = [
    "ORT_SESSION_CONFIG",
    "THRESHOLDS",
    "LayerReport",
    "QuantPrecision",
    "QuantReport",
    "auto_formats",
    "choose_formats",
    "linear_names",
    "quantize",
    "quantize_fp8",
    "save_quantized",
    "wanted_format",
]

QuantPrecision = Literal["fp8", "nvfp4"]

NVFP4_KINDS = ("ffn.0", "ffn.2")
"""The linears that `nvfp4` holds in FP4, where two thirds of the work is; the others are in FP8."""

THRESHOLDS: Mapping[Format, float] = {"fp8": 0.08, "nvfp4": 0.25}
"""Largest relative output error of a linear that `skip="auto"` accepts, by format. On Gaussian data the formats'
own errors are 0.037 and 0.134."""

ORT_SESSION_CONFIG = {"session.disable_quant_qdq": "1"}
"""Session configuration that ONNX Runtime needs for FP8 graphs: its fusion of Q/DQ products knows integers only and
refuses the graph. Without this entry, the highest optimisation level that works is ORT_ENABLE_BASIC."""


@dataclass(frozen=True)
class LayerReport:
    """One block linear.

    Attributes:
        format: None = left as it was.
        shape: (out, in)
    """

    name: str
    kind: str
    format: Format | None
    shape: tuple[int, int]


@dataclass(frozen=True)
class QuantReport:
    """What quantization did to one graph.

    Attributes:
        bytes_before, bytes_after: of the block linears' weights, scales included.
    """

    activations: Literal["dynamic", "static"]
    layers: tuple[LayerReport, ...]
    bytes_before: int
    bytes_after: int

    @property
    def skipped(self) -> tuple[str, ...]:
        """Names of the linears that stayed as they were."""
        return tuple(layer.name for layer in self.layers if layer.format is None)

    @property
    def products(self) -> dict[str, int]:
        """Matrix products by format; an engine must show as many."""
        formats = [layer.format or "unquantized" for layer in self.layers]
        return {format: formats.count(format) for format in ("fp8", "nvfp4", "unquantized")}


def linear_names(model: ir.Model) -> list[str]:
    """Names of the graph's block linears, e.g. "blocks.3.ffn.0", in the order they run."""
    return [linear.name for linear in find_linears(model)]


def wanted_format(name: str, precision: QuantPrecision) -> Format:
    """The format that `precision` gives the linear called `name`."""
    return "nvfp4" if precision == "nvfp4" and is_block_linear(name) in NVFP4_KINDS else "fp8"


def choose_formats(
    names: Iterable[str], precision: QuantPrecision, *, skip: Sequence[str] = ()
) -> dict[str, Format]:
    """The format of each linear; those that match a pattern of `skip` ("blocks.0.*", "*.ffn.2") have none.

    Raises:
        InputError: a pattern matches nothing.
    """
    names = list(names)
    skipped: set[str] = set()
    for pattern in skip:
        matches = fnmatch.filter(names, pattern)
        if not matches:
            raise InputError(
                f"--skip {pattern!r} matches none of the {len(names)} linears; they are called "
                f"{', '.join(names[:2])}, ... (* matches anything)"
            )
        skipped.update(matches)
    return {name: wanted_format(name, precision) for name in names if name not in skipped}


def auto_formats(
    errors: Mapping[str, Mapping[Format, float]],
    precision: QuantPrecision,
    *,
    thresholds: Mapping[Format, float] = THRESHOLDS,
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
        candidates: tuple[Format, ...] = (
            ("nvfp4", "fp8") if wanted_format(name, precision) == "nvfp4" else ("fp8",)
        )
        missing = [format for format in candidates if format not in measured]
        if missing:
            raise InputError(f"the error of {name} in {missing[0]} was not measured; give it to layer_errors")
        format = next((format for format in candidates if within(name, format)), None)
        if format is not None:
            chosen[name] = format
    return chosen


def quantize(
    model: ir.Model,
    formats: Mapping[str, Format],
    *,
    amax: Mapping[str, float] | None = None,
    observe: Observer | None = None,
) -> QuantReport:
    """Quantize the block linears of `model` that `formats` names, in place.

    Quantized weights are computed when the model is saved, one layer at a time, from weights that may lie in a file.
    Everything else is left as it is.

    Args:
        model: the step graph, one derived from it, or the conditioner; in float32 or bfloat16.
        amax: static ranges of the linears' inputs, for FP8, from a calibration; None = a scale per token.
        observe: called with every weight when it has been quantized, which is when the model is saved.

    Raises:
        ExportError: see `rewrite_linears`.
    """
    linears = find_linears(model)
    before = sum(_bytes(linear.weight) for linear in linears)
    kept = sum(_bytes(linear.weight) for linear in linears if linear.name not in formats)
    layers = tuple(
        LayerReport(linear.name, linear.kind, formats.get(linear.name), linear.shape) for linear in linears
    )
    after = kept + sum(_bytes(value) for value in rewrite_linears(model, formats, amax=amax, observe=observe))
    return QuantReport("dynamic" if amax is None else "static", layers, before, after)


def quantize_fp8(
    model: ir.Model, *, skip: Sequence[str] = (), amax: Mapping[str, float] | None = None
) -> QuantReport:
    """Quantize all block linears of `model` to FP8, in place, but those that match a pattern of `skip`.

    Raises:
        As `choose_formats` and `quantize`.
    """
    return quantize(model, choose_formats(linear_names(model), "fp8", skip=skip), amax=amax)


def _bytes(value: ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.nbytes


def save_quantized(model: ir.Model, path: Path, weights: str, *, alone: bool = False) -> None:
    """Write a quantized model to `path`, and its quantized weights to the new file `weights` beside it.

    All other tensors stay in the weights file that the model was loaded from, which must lie in the same folder.

    Args:
        alone: copy them too, so that the new file is all the model needs.
    """
    if alone:
        ir.save(model, path, external_data=weights, size_threshold_bytes=EXTERNAL_BYTES)
        return
    values = [value for value in lazy_initializers(model) if _bytes(value) >= EXTERNAL_BYTES]
    tensors = [value.const_value for value in values if value.const_value is not None]
    external = ir.external_data.convert_tensors_to_external(tensors, path.parent, weights)
    for value, tensor in zip(values, external, strict=True):
        value.const_value = tensor
    ir.save(model, path)
