"""A component's graph as the reference for golden vectors: in float32 on ONNX Runtime's CPU provider."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.errors import ExportError
from export.graph.components import precisions_of, tensor_specs
from export.graph.float32_twin import float32_twin
from export.quantize.emulation import emulate_fp4, unpack_fp4
from export.quantize.formats import ORT_SESSION_CONFIG
from plugins.contract import ATTENTION_OPERATORS
from runtime.bundle import TensorSpec

__all__ = ["GoldenGraph", "ReferenceGraph"]

_COARSEST = ("nvfp4", "fp8", "bf16", "fp16", "fp32")
_ERRORS_ONLY = 3
_TWIN = "twin.onnx"


class GoldenGraph(Protocol):
    """What golden vectors are computed with: a component in float32.

    Attributes:
        path: the file it comes from, for messages.
        inputs, outputs: as the component has them; floats may be given and returned wider.
        precision: the coarsest type that the component computes in: fp32, fp16, bf16, fp8 or nvfp4.
        layers: attentions in it.
    """

    path: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    precision: str
    layers: int

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs, float32 where they are floats."""


class ReferenceGraph:
    """The graph at `path`, ready to run. Inputs are given in the graph's own types and widened here.

    Attributes:
        inputs, outputs: as the graph has them before it is widened.
        precision: the coarsest type it computes in.
        layers: attentions in it.

    Args:
        scratch: an empty folder for the float32 twin, which is read as long as this object lives.

    Raises:
        ExportError: ONNX Runtime does not run the graph.
    """

    def __init__(self, path: Path, scratch: Path) -> None:
        import onnxruntime as ort

        self.path = path
        model = ir.load(path)
        self.inputs = tensor_specs(model.graph.inputs)
        self.outputs = tensor_specs(model.graph.outputs)
        found = precisions_of(model)
        self.precision = next((name for name in _COARSEST if name in found), "fp32")
        self.layers = sum(node.op_type in ATTENTION_OPERATORS for node in model.graph)
        if found & {"nvfp4", "bf16", "fp16"}:
            path = scratch / _TWIN
            emulate_fp4(float32_twin(model))
            ir.save(model, path, external_data=f"{_TWIN}.weights")
        options = ort.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        for key, value in ORT_SESSION_CONFIG.items():
            options.add_session_config_entry(key, value)
        try:
            self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ExportError(
                f"{self.path} does not load in ONNX Runtime {ort.__version__}: {error}"
            ) from error

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs, float32 where they are floats.

        Raises:
            ExportError: ONNX Runtime fails.
        """
        feed = {spec.name: _feed(inputs[spec.name], spec) for spec in self.inputs}
        names = [spec.name for spec in self.outputs]
        try:
            values = self._session.run_with_ort_values(names, feed)
        except Exception as error:
            raise ExportError(f"{self.path} fails in ONNX Runtime: {error}") from error
        return {name: value.numpy() for name, value in zip(names, values, strict=True)}


def _feed(value: NDArray[Any], spec: TensorSpec) -> Any:
    from onnxruntime import OrtValue

    if spec.dtype == "float4_e2m1":
        value = unpack_fp4(value)
    if value.dtype == ml_dtypes.float8_e4m3fn:
        kind = int(ir.DataType.FLOAT8E4M3FN)
        return OrtValue.ortvalue_from_numpy_with_onnx_type(value.view(np.uint8), kind)
    if value.dtype in (ml_dtypes.bfloat16, np.float16):
        value = value.astype(np.float32)
    return OrtValue.ortvalue_from_numpy(value)
