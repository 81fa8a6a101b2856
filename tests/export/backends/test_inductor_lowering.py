"""What packages are told not to copy, and what to keep, in packages compiled for this machine's CPU."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from export.backends.inductor.lowering import package_lowerings
from export.backends.inductor.modules import Compiled, tensor_spec
from export.backends.inductor.packages import compile_package

pytestmark = pytest.mark.timeout(600)


class Product(nn.Module):
    """A product as a package's result, as q, k and v are; with `twice`, something else reads it, too."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(24, 16), requires_grad=False)
        self.twice = twice

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        product = (x @ self.weight.t())[0]
        return (product, product + 1) if self.twice else (product,)


def compiled(twice: bool, path: Path) -> str:
    """Compile and check on two inputs; the generated code that runs the package."""
    outputs = [tensor_spec(name, (8, 24), torch.float32) for name in ("y", "z")[: 1 + twice]]
    module = Compiled(
        Product(twice), [tensor_spec("x", (1, 8, 16), torch.float32)], outputs, {"weight": "weight"}
    )
    compile_package(module, path, "cpu")
    loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        x, weight = (torch.randn(shape, generator=generator) for shape in ((1, 8, 16), (24, 16)))
        results = [torch.full((8, 24), torch.nan) for _ in outputs]
        loader.run([x, weight, *results])
        expected = torch.einsum("ti,oi->to", x[0].double(), weight.double()).float()
        for offset, result in enumerate(results):
            torch.testing.assert_close(result, expected + offset)
    with zipfile.ZipFile(path) as package:
        (name,) = [name for name in package.namelist() if name.endswith(".wrapper.cpp")]
        return package.read(name).decode().partition("::run_impl(")[2]


def test_a_product_is_written_where_its_reader_wants_it(tmp_path: Path) -> None:
    code = compiled(False, tmp_path / "once.pt2")
    assert code.count("mm_out(") == 1
    assert "cpp_fused" not in code, "a kernel copies the product"
    assert "aoti_torch_empty_strided" not in code, "the product has memory of its own"


def test_a_product_that_is_read_twice_is_copied_once(tmp_path: Path) -> None:
    code = compiled(True, tmp_path / "twice.pt2")
    assert code.count("mm_out(") == 1
    assert "cpp_fused" in code


def test_inductor_is_left_as_it_was() -> None:
    from torch._inductor.lowering import lowerings

    copy = torch.ops.aten.copy_.default
    before = lowerings[copy]
    with pytest.raises(ValueError, match="inside"), package_lowerings():
        assert lowerings[copy] is not before
        raise ValueError("inside")
    assert lowerings[copy] is before
