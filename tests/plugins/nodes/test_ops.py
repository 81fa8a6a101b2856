"""The PyTorch ops of both operators: binding, checks at the door, shape inference, repeated imports."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightforcing_ref.attention import hsa_attention, qk_prepare
from plugins.errors import ContractError, PluginError
from plugins.nodes import ops
from tests import brute_force


@pytest.fixture(autouse=True)
def bound() -> Iterator[None]:
    """The reference as CPU kernels, whatever a test binds."""
    ops.bind("cpu", hsa=hsa_attention, qk_prepare=qk_prepare)
    yield
    ops.bind("cpu", hsa=hsa_attention, qk_prepare=qk_prepare)


def attention_call(seed: int = 0, **options: Any) -> tuple[brute_force.HSACase, list[Tensor]]:
    case = brute_force.random_case(np.random.default_rng(seed), **options)
    return case, [torch.from_numpy(value) for value in case.inputs.values()]


def prepare_call() -> tuple[list[Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    tokens, heads, dim = 26, 2, 6
    angles = torch.rand(tokens, dim // 2, generator=generator) * 6
    shapes = ((tokens, 3 * heads * dim), (3 * heads * dim,), (heads * dim,), (heads * dim,))
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    attributes = {"heads": heads, "frame_tokens": 13, "block_q": 4, "block_k": 8, "eps": 1e-6}
    return [*tensors, angles.cos(), angles.sin()], attributes


def test_bound_kernels_get_tensors_by_position_and_attributes_by_name() -> None:
    case, tensors = attention_call()
    out = torch.ops.lightforcing.hierarchical_sparse_attention(*tensors, **case.attributes)
    np.testing.assert_allclose(out.numpy(), brute_force.hsa(case)[0], atol=2e-6)

    tensors, attributes = prepare_call()
    results = torch.ops.lightforcing.qk_prepare(*tensors, *attributes.values())
    names = ("qkv", "bias", "norm_q", "norm_k", "cos", "sin")
    expected = brute_force.qk_prepare(dict(zip(names, (t.numpy() for t in tensors), strict=True)), attributes)
    for found, (name, want) in zip(results, expected.items(), strict=True):
        np.testing.assert_allclose(found.numpy(), want, atol=2e-6, err_msg=name)
        assert found.is_contiguous(), name


def test_binding_again_replaces_the_kernel() -> None:
    case, tensors = attention_call()
    ops.bind("cpu", hsa=lambda q, *_, **__: q + 1, qk_prepare=qk_prepare)
    out = torch.ops.lightforcing.hierarchical_sparse_attention(*tensors, **case.attributes)
    torch.testing.assert_close(out, tensors[0] + 1)


def test_binding_an_unknown_device_lists_the_valid_ones() -> None:
    with pytest.raises(PluginError, match="device 'mps'; expected 'cpu' or 'cuda'"):
        ops.bind("mps", hsa=hsa_attention, qk_prepare=qk_prepare)


def test_calls_are_checked_before_a_kernel_sees_them() -> None:
    case, tensors = attention_call()
    call = torch.ops.lightforcing.hierarchical_sparse_attention
    with pytest.raises(ContractError, match="keep_frames 1 is smaller"):
        call(*tensors, **{**case.attributes, "keep_frames": 1})
    with pytest.raises(ContractError, match="k_mean has shape"):
        call(*tensors, **{**case.attributes, "block_k": 3})
    tensors, attributes = prepare_call()
    with pytest.raises(ContractError, match="expected whole frames"):
        torch.ops.lightforcing.qk_prepare(*tensors, **{**attributes, "frame_tokens": 12})


def test_shape_inference_equals_the_kernels() -> None:
    case, tensors = attention_call(block_k=8)
    torch.library.opcheck(
        torch.ops.lightforcing.hierarchical_sparse_attention.default, tuple(tensors), case.attributes
    )
    tensors, attributes = prepare_call()
    torch.library.opcheck(torch.ops.lightforcing.qk_prepare.default, tuple(tensors), attributes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shape_inference_keeps_the_compute_type_and_float32_means(dtype: torch.dtype) -> None:
    tensors, attributes = prepare_call()
    tensors = [t.to("meta", dtype) for t in tensors[:4]] + [t.to("meta") for t in tensors[4:]]
    results = torch.ops.lightforcing.qk_prepare(*tensors, **attributes)
    assert [r.dtype for r in results] == [dtype] * 3 + [torch.float32] * 2


def test_unbound_calls_say_what_to_do_and_imports_can_be_repeated() -> None:
    code = """
import importlib, importlib.util, sys, torch
from plugins.nodes import ops
from plugins.errors import UnboundOperatorError

x = torch.ones(4, 12)
args = (x, x[0], x[0, :4], x[0, :4], x[:, :1], x[:, :1], 2, 2, 1, 1, 1e-6)
try:
    torch.ops.lightforcing.qk_prepare(*args)
except UnboundOperatorError as error:
    print(error)

ops.bind("cpu", hsa=None, qk_prepare=lambda *_, **__: [x] * 5)
importlib.reload(ops)
assert torch.equal(torch.ops.lightforcing.qk_prepare(*args)[0], x)  # a reload keeps what is bound
del sys.modules["plugins.nodes.ops"]
again = importlib.import_module("plugins.nodes.ops")
assert again is not ops
again.bind("cpu", hsa=None, qk_prepare=lambda *_, **__: [x + 1] * 5)
assert torch.equal(torch.ops.lightforcing.qk_prepare(*args)[0], x + 1)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "lightforcing::qk_prepare was called on device 'cpu'" in done.stdout
    assert "plugins.nodes.ops.bind" in done.stdout
