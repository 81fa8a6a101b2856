"""Training in a quantized format: the numbers are the exported graph's, the gradients straight-through."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrize

from export.quantize import block_linears, choose_formats, fake_quantized, merge_qkv
from export.quantize.numerics import Format, dequantize_weight, fake_activation, fold_weight
from lightforcing_ref.config import PRESETS
from lightforcing_ref.model import CausalWanModel
from training.attention import causal_layout
from training.forward import predict_flow, window_core
from training.quantization import quantized_twin

DIT = replace(PRESETS["tiny"].dit, layers=2)
GRID = (8, 8)


@pytest.fixture
def model() -> CausalWanModel:
    torch.manual_seed(0)
    return CausalWanModel(DIT)


def flow(model: CausalWanModel) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(1, 16, 3, 16, 16, generator=draw)
    text = torch.randn(1, DIT.text_len, DIT.text_dim, generator=draw)
    core = window_core(model, causal_layout([0]), GRID)
    return predict_flow(model, x, torch.tensor([[900.0, 500.0, 0.0]]), model.embed_text(text), core)


@pytest.mark.parametrize("format", ["fp8", "nvfp4"])
@torch.no_grad()
def test_a_twin_computes_what_the_quantized_graph_does(model: CausalWanModel, format: Format) -> None:
    merged = copy.deepcopy(model)
    merge_qkv(merged)
    with fake_quantized(merged, choose_formats(block_linears(merged), format)):
        expected = flow(merged)
    with parametrize.cached():
        found = flow(quantized_twin(model, format))
    # Sums in another order put single values to the other side of a rounding boundary.
    assert (found - expected).norm() < 0.1 * (flow(model) - expected).norm()


def test_a_twin_has_the_parameters_of_the_model(model: CausalWanModel) -> None:
    names = list(model.state_dict())
    twin = quantized_twin(model, "nvfp4")
    flow(twin).square().mean().backward()
    assert list(model.state_dict()) == names
    assert {id(p) for p in twin.parameters()} == {id(p) for p in model.parameters()}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.ndim > 1)


def test_gradients_are_those_of_the_product_of_rounded_values(model: CausalWanModel) -> None:
    block = quantized_twin(model, "nvfp4").layers[0]
    linear = model.layers[0].self_attn.o
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(5, DIT.dim, generator=draw, requires_grad=True)
    upstream = torch.randn(5, DIT.dim, generator=draw)
    block.self_attn.o(x).backward(upstream)

    values, scale = fake_activation(x.detach(), "nvfp4")
    folded = fold_weight(linear.weight.detach(), "nvfp4")
    rounded_x = (values * scale).requires_grad_()
    rounded_w = (dequantize_weight(folded) * folded.post[:, None]).requires_grad_()
    F.linear(rounded_x, rounded_w).backward(upstream)
    torch.testing.assert_close(x.grad, rounded_x.grad)
    torch.testing.assert_close(linear.weight.grad, rounded_w.grad)
