"""Quantize the linears of the transformer in an ONNX graph.

A linear is a MatMul whose weight is an initializer in [out, in] layout behind a Transpose. Its quantized form keeps
every Q and DQ at scale one and applies the scales beside them, so that nothing in the graph but initializers depends
on a layer: the weights may stay inside or become inputs, and TensorRT-RTX makes an FP8 (FP4) product of either.

    fp8, dynamic:  s = max(reduce_max(abs(x)) / 448, tiny);  x' = DQ(Q(x / s));  w' = DQ(w8);  y = (x' w'^T) * s * post
    fp8, static:   x' = DQ(Q(x * r));  y = (x' w'^T) * post
    nvfp4:         x' and w' in blocks of 16 with E4M3 block scales; TRT_FP4DynamicQuantize in place of Q

Weights are computed when they are written, one layer at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from torch import Tensor

from export.errors import ExportError
from export.graph.arrays import as_array, as_tensor
from runtime.bundle import dtypes_by

from .numerics import (
    FP4_BLOCK,
    RANGE,
    SMALLEST_SCALE,
    FoldedWeight,
    Format,
    fold_weight,
    input_reciprocal,
    pack_fp4,
)

__all__ = [
    "KINDS",
    "Linear",
    "Observer",
    "ProductType",
    "find_linears",
    "is_block_linear",
    "quantize",
    "quantized_products",
    "weight_tensor",
]

KINDS = (
    "self_attn.qkv",
    "self_attn.o",
    "cross_attn.q",
    "cross_attn.k",
    "cross_attn.v",
    "cross_attn.o",
    "ffn.0",
    "ffn.2",
)
"""The linears of a block; the cross-attention's k and v are in the conditioner, all others in the step graph."""

ProductType = Literal["fp8", "fp4"]

Observer = Callable[[str, Format, Tensor, FoldedWeight], None]
"""Called with a linear's name, format, weight `[out, in]`, and quantized weight."""

_LINEAR = re.compile(r"blocks\.\d+\.(?P<kind>" + "|".join(map(re.escape, KINDS)) + r")")
_WEIGHT = re.compile(r"(?:model\.)?(?P<name>blocks\..+)\.weight")
_QUANTIZABLE = (ir.DataType.FLOAT, ir.DataType.BFLOAT16)
_TRT_DOMAIN = "trt"


def is_block_linear(name: str) -> str | None:
    """Kind of the block linear called `name`, e.g. "blocks.3.ffn.0"; None if it is none."""
    match = _LINEAR.fullmatch(name)
    return match["kind"] if match else None


@dataclass(frozen=True)
class Linear:
    """A linear of the graph that can be quantized.

    Args:
        name: e.g. "blocks.3.ffn.0".
        weight: `[out, in]`, in the graph's type.
    """

    name: str
    kind: str
    matmul: ir.Node
    weight: ir.Value

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        shape = self.weight.shape
        assert shape is not None
        rows, columns = shape.numpy()
        return rows, columns

    @property
    def dtype(self) -> ir.DataType:
        assert self.weight.dtype is not None
        return self.weight.dtype

    @property
    def stem(self) -> str:
        """Name of the weight, which the quantized tensors' names begin with."""
        assert self.weight.name is not None
        return self.weight.name


def find_linears(model: ir.Model) -> list[Linear]:
    """The block linears of `model`, in the order they run.

    Raises:
        ExportError: a weight with a block linear's name is used in another way than `x @ weight.T`, or is float16,
            where the products of FP8 values overflow.
    """
    linears = []
    for value in model.graph.initializers.values():
        match = _WEIGHT.fullmatch(value.name or "")
        kind = is_block_linear(match["name"]) if match else None
        if match is None or kind is None or value.dtype not in (*_QUANTIZABLE, ir.DataType.FLOAT16):
            continue
        if value.dtype == ir.DataType.FLOAT16:
            raise ExportError(
                f"{value.name} is float16, where unscaled FP8 products overflow; export the graph in bf16 or fp32"
            )
        matmul = _matmul_of(value)
        if matmul is None:
            raise ExportError(
                f"{value.name} is not used as one x @ weight.T (Transpose, then MatMul), which is what can be "
                "quantized; export the graph with this project's exporter"
            )
        linears.append(Linear(match["name"], kind, matmul, value))
    order = {node: index for index, node in enumerate(model.graph)}
    return sorted(linears, key=lambda linear: order[linear.matmul])


def _matmul_of(weight: ir.Value) -> ir.Node | None:
    transposes = [use.node for use in weight.uses()]
    if len(transposes) != 1 or transposes[0].op_type != "Transpose":
        return None
    users = list(transposes[0].outputs[0].uses())
    if len(users) != 1 or users[0].node.op_type != "MatMul" or users[0].idx != 1:
        return None
    return users[0].node


def _torch_dtype(dtype: ir.DataType) -> torch.dtype:
    found: torch.dtype = getattr(torch, dtypes_by("onnx")[dtype.name])
    return found


def weight_tensor(value: ir.Value) -> Tensor:
    """A copy of an initializer; what lies in a file is mapped read-only, which tensors cannot be."""
    assert value.const_value is not None
    return as_tensor(value.const_value.numpy())


def _onnx_tensor(tensor: Tensor, name: str) -> ir.TensorProtocol:
    return ir.tensor(as_array(tensor), name=name)


class _Foldings:
    """Quantized weights. Of the tensors of one layer, which are written one after the other, only the first computes
    it; only the layer read last is kept.
    """

    def __init__(self, observe: Observer | None) -> None:
        self._observe = observe
        self._latest: tuple[str, FoldedWeight] | None = None

    def of(
        self, linear: Linear, format: Format, amax: float | None, importance: Tensor | None
    ) -> FoldedWeight:
        if self._latest is None or self._latest[0] != linear.name:
            dtype = _torch_dtype(linear.dtype)
            weight = weight_tensor(linear.weight)
            folded = fold_weight(weight, format, dtype=dtype, amax=amax, importance=importance)
            if self._observe is not None:
                self._observe(linear.name, format, weight, folded)
            self._latest = (linear.name, folded)
        return self._latest[1]


class _Rewriter:
    """Builds the nodes of one quantized linear in front of its MatMul."""

    def __init__(self, model: ir.Model, linear: Linear) -> None:
        self.graph, self.linear = model.graph, linear

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """A small constant that all linears of the graph share."""
        name = f"quantize.{name}"
        if name not in self.graph.initializers:
            tensor = ir.tensor(array, name=name)
            self.graph.register_initializer(
                ir.Value(
                    name=name,
                    shape=ir.Shape(array.shape),
                    type=ir.TensorType(tensor.dtype),
                    const_value=tensor,
                )
            )
        return self.graph.initializers[name]

    def scalar(self, name: str, value: float) -> ir.Value:
        return self.constant(name, np.array(value, dtype=self.linear.dtype.numpy()))

    def weight(
        self, suffix: str, dtype: ir.DataType, shape: tuple[int, ...], make: Callable[[], ir.TensorProtocol]
    ) -> ir.Value:
        """An initializer that is computed when it is written."""
        name = f"{self.linear.stem}.{suffix}"
        tensor = ir.LazyTensor(make, dtype=dtype, shape=ir.Shape(shape), name=name)
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def node(
        self,
        op_type: str,
        inputs: list[ir.Value],
        suffix: str,
        dtype: ir.DataType,
        shape: ir.Shape | None,
        attributes: Mapping[str, int | list[int]] | None = None,
    ) -> ir.Value:
        name = f"{self.linear.name}.{suffix}"
        output = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype))
        node = ir.node(op_type, inputs, attributes, outputs=[output], name=name)
        self.graph.insert_before(self.linear.matmul, node)
        return output

    def normalised(self, x: ir.Value, format: Format, amax: float | None) -> tuple[ir.Value, ir.Value | None]:
        """`x` scaled into the format's range, and the scale per token that undoes it (None for a static scale)."""
        dtype = self.linear.dtype
        if amax is not None:
            reciprocal = input_reciprocal(amax, _torch_dtype(dtype))
            factor = self.weight("input", dtype, (1,), lambda: _onnx_tensor(reciprocal, "input"))
            return self.node("Mul", [x, factor], "scaled", dtype, x.shape), None
        assert x.shape is not None
        rows = ir.Shape([*x.shape[:-1], 1])
        last = self.constant("last_axis", np.array([-1], dtype=np.int64))
        magnitude = self.node("Abs", [x], "abs", dtype, x.shape)
        largest = self.node("ReduceMax", [magnitude, last], "amax", dtype, rows, {"keepdims": 1})
        limit = self.scalar(f"{format}.range", RANGE[format])
        scale = self.node("Div", [largest, limit], "scale_raw", dtype, rows)
        scale = self.node("Max", [scale, self.scalar("tiny", SMALLEST_SCALE)], "scale", dtype, rows)
        return self.node("Div", [x, scale], "scaled", dtype, x.shape), scale

    def fp8(self, x: ir.Value, folding: Callable[[], FoldedWeight]) -> tuple[ir.Value, ir.Value]:
        """Activation and weight behind their Q and DQ."""
        dtype, stem, shape = self.linear.dtype, self.linear.stem, self.linear.shape
        one = self.scalar("one", 1.0)
        zero = self.constant("zero_point", np.array(0, dtype=ml_dtypes.float8_e4m3fn))
        kind = ir.DataType.FLOAT8E4M3FN
        quantized = self.node("QuantizeLinear", [x, one, zero], "q", kind, x.shape)
        activation = self.node("DequantizeLinear", [quantized, one, zero], "dq", dtype, x.shape)
        values = self.weight("fp8", kind, shape, lambda: _onnx_tensor(folding().values, f"{stem}.fp8"))
        weight = self.node("DequantizeLinear", [values, one, zero], "weight_dq", dtype, ir.Shape(shape))
        return activation, weight

    def nvfp4(self, x: ir.Value, folding: Callable[[], FoldedWeight]) -> tuple[ir.Value, ir.Value]:
        """Activation and weight behind block quantization; TensorRT only."""
        dtype, stem, (rows, columns) = self.linear.dtype, self.linear.stem, self.linear.shape
        one = self.scalar("one", 1.0)
        four, eight = ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT8E4M3FN
        blocks = {"axis": -1, "block_size": FP4_BLOCK}
        name = f"{self.linear.name}.dynamic"
        assert x.shape is not None
        width = x.shape[-1]
        assert isinstance(width, int)
        scale_shape = ir.Shape([*x.shape[:-1], width // FP4_BLOCK])
        quantized = ir.Value(name=f"{name}.q", shape=x.shape, type=ir.TensorType(four))
        scales = ir.Value(name=f"{name}.scales", shape=scale_shape, type=ir.TensorType(eight))
        node = ir.node(
            "TRT_FP4DynamicQuantize",
            [x, one],
            {**blocks, "scale_type": int(eight)},
            domain=_TRT_DOMAIN,
            outputs=[quantized, scales],
            name=name,
        )
        self.graph.insert_before(self.linear.matmul, node)
        wide = self.node("DequantizeLinear", [scales, one], "scales_dq", dtype, scale_shape)
        activation = self.node("DequantizeLinear", [quantized, wide], "dq", dtype, x.shape, blocks)

        def packed() -> ir.TensorProtocol:
            codes = pack_fp4(folding().values).numpy()
            return ir.PackedTensor(codes, four, shape=ir.Shape((rows, columns)), name=f"{stem}.fp4")

        def block_scales() -> ir.TensorProtocol:
            scales = folding().block_scales
            assert scales is not None
            return _onnx_tensor(scales, f"{stem}.block_scales")

        codes = self.weight("fp4", four, (rows, columns), packed)
        shape = (rows, columns // FP4_BLOCK)
        small = self.weight("block_scales", eight, shape, block_scales)
        wide = self.node("DequantizeLinear", [small, one], "weight_scales_dq", dtype, ir.Shape(shape))
        weight = self.node(
            "DequantizeLinear", [codes, wide], "weight_dq", dtype, ir.Shape((rows, columns)), blocks
        )
        return activation, weight

    def rewrite(self, format: Format, amax: float | None, folding: Callable[[], FoldedWeight]) -> None:
        linear, graph = self.linear, self.graph
        dtype, (rows, columns) = linear.dtype, linear.shape
        x, old = linear.matmul.inputs[0], linear.matmul.outputs[0]
        assert x is not None
        scaled, scale = self.normalised(x, format, amax)
        activation, weight = (self.fp8 if format == "fp8" else self.nvfp4)(scaled, folding)
        shape = ir.Shape((columns, rows))
        weight = self.node("Transpose", [weight], "weight_t", dtype, shape, {"perm": [1, 0]})
        result = self.node("MatMul", [activation, weight], "product", dtype, old.shape)
        if scale is not None:
            result = self.node("Mul", [result, scale], "row_scaled", dtype, old.shape)
        post = self.weight(
            "post", dtype, (rows,), lambda: _onnx_tensor(folding().post, f"{linear.stem}.post")
        )
        result = self.node("Mul", [result, post], "out", dtype, old.shape)
        # Cut graphs and outputs are known by the name of this tensor.
        name = old.name
        old.replace_all_uses_with(result, replace_graph_outputs=True)
        old.name, result.name = f"{name}.unquantized", name
        graph.remove(linear.matmul, safe=True)


def _check(linear: Linear, format: Format, amax: float | None) -> None:
    if amax is not None and not 0 < amax < float("inf"):
        raise ExportError(
            f"the calibrated input range of {linear.name} is {amax:g}; expected a positive number; calibrate this "
            "model again, or skip the layer"
        )
    if format == "nvfp4" and linear.shape[1] % FP4_BLOCK:
        raise ExportError(
            f"{linear.name} has {linear.shape[1]} inputs; NVFP4 needs a multiple of {FP4_BLOCK}; skip it"
        )


def quantize(
    model: ir.Model,
    formats: Mapping[str, Format],
    *,
    amax: Mapping[str, float] | None = None,
    importance: Mapping[str, Tensor] | None = None,
    observe: Observer | None = None,
) -> None:
    """Replace linears by their quantized form, in place; their weights leave the graph.

    Quantized weights are computed when the model is saved, one layer at a time, from weights that may lie in a file.
    Everything else is left as it is.

    Args:
        formats: by the linears' names.
        amax: static range of each FP8 linear's input; None = a scale per token, computed in the graph. NVFP4 has one
            per token in any case: TensorRT derives block scales from the values at hand.
        importance: of each linear's input channels, for NVFP4; see `fold_weight`.
        observe: called with every weight when it has been quantized, which is when the model is written.

    Raises:
        ExportError: as `find_linears`; or the static range of a linear is missing or not positive, or NVFP4 is asked
            for where blocks of 16 do not fit. The model is then unchanged.
    """
    plan: list[tuple[Linear, Format, float | None]] = []
    for linear in find_linears(model):
        format = formats.get(linear.name)
        if format is not None:
            limit = None if amax is None or format == "nvfp4" else amax.get(linear.name, 0.0)
            _check(linear, format, limit)
            plan.append((linear, format, limit))
    foldings = _Foldings(observe)
    for linear, format, limit in plan:
        if format == "nvfp4":
            model.graph.opset_imports.setdefault(_TRT_DOMAIN, 1)
        important = None if importance is None else importance.get(linear.name)
        folding = partial(foldings.of, linear, format, limit, important)
        _Rewriter(model, linear).rewrite(format, limit, folding)
    passes.RemoveUnusedNodesPass()(model)


def quantized_products(model: ir.Model) -> dict[str, ProductType]:
    """Matrix products that have a quantized operand: node name -> the type that an engine must compute it in.

    The product of the linear `blocks.0.ffn.2` is called `blocks.0.ffn.2.product`. Where the other operand is not
    quantized, no engine computes it in that type.

    Raises:
        ExportError: a product has no name.
    """
    products: dict[str, ProductType] = {}
    for node in model.graph:
        if node.op_type != "MatMul":
            continue
        sources = [source for value in node.inputs if (source := _dequantized(value)) is not None]
        if not sources:
            continue
        if not node.name:
            raise ExportError("a quantized product has no name, by which it would be found in the engine")
        products[node.name] = "fp4" if any("block_size" in source.attributes for source in sources) else "fp8"
    return products


def _dequantized(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that `value` comes out of, perhaps transposed."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "Transpose" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node if node is not None and node.op_type == "DequantizeLinear" else None
