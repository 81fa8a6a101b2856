"""Names in exported graphs: those of the modules that nodes come from, the same in every export."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from export.graph.tracing import trace


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.q, self.o = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.q(self.norm(x)).chunk(2, dim=-1)
        return x + self.o(torch.cat([second, first], dim=-1))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.clamp(-1, 1)


def exported(module: nn.Module) -> bytes:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    model = trace(module, (torch.zeros(2, 4),), input_names=["x"], output_names=["y"])
    return ir.to_proto(model).SerializeToString()


def test_nodes_are_named_after_their_modules() -> None:
    nodes = onnx.load_from_string(exported(Stack())).graph.node
    names = [node.name for node in nodes]
    assert len(set(names)) == len(names)
    for index in range(2):
        of_block = [name for name in names if name.startswith(f"/blocks.{index}/")]
        layers = [name.split("/")[2] for name in of_block]
        assert layers[0] == "norm" and {"norm", "q", "o"} <= set(layers)
    assert names[-1] == "/Clip"
    assert all(node.op_type in node.name.rpartition("/")[2] for node in nodes)


def test_what_was_exported_before_does_not_show() -> None:
    first = exported(Stack())
    exported(nn.Sequential(Stack(), Block()))
    assert exported(Stack()) == first


@pytest.mark.parametrize("component", ["step", "clean", "conditioner"])
def test_a_weight_is_read_in_the_scope_that_it_is_named_after(tiny_bundle: Path, component: str) -> None:
    graph = onnx.load(tiny_bundle / f"{component}.onnx", load_external_data=False).graph
    weights = {weight.name for weight in graph.initializer if weight.name.endswith(".weight")}
    readers = [(name, node.name) for node in graph.node for name in node.input if name in weights]
    layered = [(name, reader) for name, reader in readers if ".blocks." in name or ".middle." in name]
    assert layered
    for name, reader in layered:
        module = name.removesuffix(".weight").removeprefix("model.")
        assert reader.rpartition("/")[0].lstrip("/").replace("/", ".") in (module, module.rpartition(".")[0])
