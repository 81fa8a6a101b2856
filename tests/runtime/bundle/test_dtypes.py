"""The table of element types, against the libraries whose names it holds."""

from __future__ import annotations

from typing import get_args

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load, save

from export.graph.arrays import as_array, as_tensor
from runtime.bundle import ELEMENT_TYPES, FLOATS, Dtype, dtype_name, dtypes_by, nbytes, numpy_dtype

IN_TORCH = [dtype for dtype in get_args(Dtype) if dtype != "float4_e2m1"]


@pytest.mark.parametrize("dtype", ELEMENT_TYPES)
def test_onnx_has_each_type_in_its_size(dtype: Dtype) -> None:
    assert ir.DataType[ELEMENT_TYPES[dtype].onnx].bitwidth == ELEMENT_TYPES[dtype].bits


@pytest.mark.parametrize("dtype", IN_TORCH)
def test_pytorch_numpy_and_safetensors_have_each_type(dtype: Dtype) -> None:
    tensor = torch.tensor([[0, 1, 1]]).to(getattr(torch, dtype))
    assert dtype_name(tensor.dtype) == dtype_name(numpy_dtype(dtype)) == dtype
    assert nbytes(dtype, tensor.shape) == tensor.nbytes == numpy_dtype(dtype).itemsize * 3
    header = save({"x": tensor})[8:]
    assert f'"dtype":"{ELEMENT_TYPES[dtype].safetensors}"'.encode() in header
    assert torch.equal(load(save({"x": tensor}))["x"].float(), torch.tensor([[0.0, 1.0, 1.0]]))


@pytest.mark.parametrize("dtype", IN_TORCH)
def test_arrays_and_tensors_become_one_another(dtype: Dtype) -> None:
    tensor = torch.tensor([[0, 1, 1]]).to(getattr(torch, dtype))
    array = as_array(tensor)
    assert (array.dtype, array.shape) == (numpy_dtype(dtype), (1, 3))
    assert array.astype(np.float32).tolist() == [[0.0, 1.0, 1.0]]
    again = as_tensor(array)
    assert again.dtype == tensor.dtype and torch.equal(again.float(), tensor.float())
    array.flags.writeable = False
    as_tensor(array)[0, 0] = 1
    assert not array.astype(np.float32)[0, 0], "what is mapped read-only is copied"


def test_arrays_of_no_dimension_keep_it() -> None:
    assert as_tensor(as_array(torch.tensor(2.0, dtype=torch.bfloat16))).shape == ()


def test_tensorrt_rtx_has_every_type_that_engines_may_be_bound_to() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    assert set(dtypes_by("tensorrt")) <= set(trt.DataType.__members__)
    assert dtypes_by("tensorrt").keys() == {ELEMENT_TYPES[dtype].tensorrt for dtype in get_args(Dtype)}


def test_packed_types_take_half_a_byte() -> None:
    assert nbytes("float4_e2m1", (3, 16)) == 24
    assert numpy_dtype("float4_e2m1") == np.uint8
    assert "U8" in dtypes_by("safetensors") and dtypes_by("safetensors")["U8"] == "uint8"


def test_names_of_libraries_lead_back() -> None:
    for column in ("short", "onnx", "tensorrt"):
        found = dtypes_by(column)
        assert sorted(found.values()) == sorted(get_args(Dtype))
    assert dtypes_by("triton")["fp8e4nv"] == "float8_e4m3fn"
    assert [ELEMENT_TYPES[dtype].onnxruntime for dtype in FLOATS] == [
        "tensor(float)",
        "tensor(float16)",
        "tensor(bfloat16)",
    ]


def test_types_of_no_bundle_are_refused() -> None:
    with pytest.raises(KeyError, match=r"bundles hold no torch\.complex64; expected one of float32"):
        dtype_name(torch.complex64)
