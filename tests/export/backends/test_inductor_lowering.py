"""What packages are told not to copy, and what to keep, in packages compiled for this machine's CPU."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

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


class Stream(nn.Module):
    """A residual stream of images as a package's result, which a library or Inductor's own kernels read, too."""

    def __init__(self, library: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(24, 16), requires_grad=False)
        self.library = library

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        images = x.unflatten(1, (2, 4))
        stream = images + images.flip(2)
        if self.library:
            return stream, (stream.flatten(0, 2) @ self.weight.t())
        return stream, stream / stream.abs().amax(-1, keepdim=True)


def compiled(body: nn.Module, shapes: list[tuple[int, ...]], path: Path) -> str:
    """Compile and compare with `body` on two inputs; the generated code that runs the package.

    Args:
        shapes: of the outputs.
    """
    outputs = [tensor_spec(f"y{place}", shape, torch.float32) for place, shape in enumerate(shapes)]
    inputs = [tensor_spec("x", (1, 8, 16), torch.float32)]
    compile_package(Compiled(body, inputs, outputs, {"weight": "weight"}), path, "cpu")
    loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        x, weight = (torch.randn(shape, generator=generator) for shape in ((1, 8, 16), (24, 16)))
        results = [torch.full(shape, torch.nan) for shape in shapes]
        loader.run([x, weight, *results])
        expected = functional_call(body.double(), {"weight": weight.double()}, (x.double(),))
        for result, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(result, wanted.float())
    with zipfile.ZipFile(path) as package:
        (name,) = [name for name in package.namelist() if name.endswith(".wrapper.cpp")]
        return package.read(name).decode().partition("::run_impl(")[2]


def test_a_product_is_written_where_its_reader_wants_it(tmp_path: Path) -> None:
    code = compiled(Product(twice=False), [(8, 24)], tmp_path / "once.pt2")
    assert code.count("mm_out(") == 1
    assert "cpp_fused" not in code, "a kernel copies the product"
    assert "aoti_torch_empty_strided" not in code, "the product has memory of its own"


def test_a_product_that_is_read_twice_is_copied_once(tmp_path: Path) -> None:
    code = compiled(Product(twice=True), [(8, 24), (8, 24)], tmp_path / "twice.pt2")
    assert code.count("mm_out(") == 1
    assert "cpp_fused" in code


def test_a_result_that_is_read_within_is_written_once(tmp_path: Path) -> None:
    code = compiled(Stream(library=False), [(1, 2, 4, 16), (1, 2, 4, 16)], tmp_path / "stream.pt2")
    assert code.count("aoti_torch_empty_strided") == 1, (
        "the stream has memory of its own, beside its largest values"
    )


def test_a_result_that_a_library_reads_is_right(tmp_path: Path) -> None:
    code = compiled(Stream(library=True), [(1, 2, 4, 16), (8, 24)], tmp_path / "library.pt2")
    assert code.count("mm_out(") == 1


def test_inductor_is_left_as_it_was() -> None:
    from torch._inductor.lowering import lowerings

    copy = torch.ops.aten.copy_.default
    before = lowerings[copy]
    with pytest.raises(ValueError, match="inside"), package_lowerings():
        assert lowerings[copy] is not before
        raise ValueError("inside")
    assert lowerings[copy] is before
