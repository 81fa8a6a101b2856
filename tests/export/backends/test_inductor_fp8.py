"""FP8 linears of the inductor backend: what the format says, alone and in the segments."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from export.backends.inductor import bundle as inductor
from export.backends.inductor.modules import Fp8Linear, step_segments, tensor_name
from export.quantize.numerics import fake_linear, fold_weight, relative_error
from export.request.geometry import StepPlan
from export.request.weights import Weights
from tests.export.backends.test_inductor import ALL_LINEARS, TINY, request_for


@pytest.fixture(scope="module")
def plan() -> StepPlan:
    return request_for().plan


def multiplies_scaled_rows() -> bool:
    """Whether this PyTorch has the product of FP8 linears on a CPU, too: 2.11, which GPU machines have, does not."""
    rows = torch.zeros(16, 16).to(torch.float8_e4m3fn)
    try:
        torch._scaled_mm(rows, rows.t(), scale_a=torch.ones(16, 1), scale_b=torch.ones(1, 16))
    except RuntimeError:
        return False
    return True


needs_scaled_rows = pytest.mark.skipif(
    not multiplies_scaled_rows(), reason=f"PyTorch {torch.__version__} scales whole tensors only on a CPU"
)
either_product = pytest.mark.parametrize(
    "emulated", [True, pytest.param(False, marks=needs_scaled_rows)], ids=["emulated", "scaled_mm"]
)


@either_product
@pytest.mark.parametrize("bias", [True, False])
def test_an_fp8_linear_computes_what_the_format_says(bias: bool, emulated: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(64, 48, bias=bias)
    x = torch.randn(2, 16, 64) * torch.logspace(-3, 3, 16)[:, None]
    x[0, 3] = 0
    folded = fold_weight(plain.weight.detach(), "fp8")
    linear = Fp8Linear(plain)
    linear.emulated = emulated
    linear.weight.data, linear.post.data = folded.values, folded.post
    want = fake_linear(x, folded, "fp8")
    if plain.bias is not None:
        want = want + plain.bias
    assert relative_error(linear(x).detach(), want.detach()) < 1e-6


@either_product
def test_fp8_segments_differ_from_plain_ones_by_the_formats_error(plan: StepPlan, emulated: bool) -> None:
    """All three segments, run without compiling them, on the same random inputs."""
    found = {
        linears: run_segments(plan, linears, emulated=emulated) for linears in (frozenset(), ALL_LINEARS)
    }
    for name, plain in found[frozenset()].items():
        error = relative_error(found[ALL_LINEARS][name], plain)
        assert error < 0.05, (name, error)
        assert error > 1e-4 or name == "first/x_out", name


def run_segments(plan: StepPlan, linears: frozenset[str], *, emulated: bool) -> dict[str, torch.Tensor]:
    weights = Weights(TINY, 0)
    tensors = {
        t.name: torch.frombuffer(bytearray(t.read()), dtype=torch.uint8)
        for t in inductor._weight_tensors(weights.dit(torch.float32), weights.vae_decoder(), plan, linears)
    }
    results = {}
    for (name, part), layer in zip(
        step_segments(plan, torch.float32, linears).by_name.items(), (-1, 0, 5), strict=True
    ):
        generator = torch.Generator().manual_seed(7)
        values = []
        for spec in part.inputs:
            dtype = getattr(torch, spec.dtype)
            if spec.name in part.weights.values():
                raw = tensors[tensor_name(spec.name, layer, linears)]
                values.append(raw.view(dtype).reshape(spec.shape))
            elif spec.name == "step":
                values.append(torch.tensor(1, dtype=torch.int32))
            else:
                values.append(torch.randn(spec.shape, generator=generator))
        for module in part.modules():
            if isinstance(module, Fp8Linear):
                module.emulated = emulated
        outputs = [torch.empty(spec.shape) for spec in part.outputs]
        with torch.no_grad():
            part(*values, *outputs)
        results |= {f"{name}/{spec.name}": out for spec, out in zip(part.outputs, outputs, strict=True)}
    return results
