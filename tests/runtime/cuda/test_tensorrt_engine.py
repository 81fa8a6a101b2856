"""What both TensorRTs' engines share, on a context that writes down what it is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from runtime.cuda.tensorrt import TENSORRT, TENSORRT_RTX, EngineComponent, require_same_tensors
from runtime.errors import BundleError, EngineError


class Context:
    """Stands in for an execution context; refuses address 13 and stream 13."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def set_device_memory(self, address: int, size: int) -> None:
        self.told.append(("memory", address, size))

    def set_tensor_address(self, tensor: str, address: int) -> bool:
        self.told.append((tensor, address))
        return address != 13

    def execute_async_v3(self, stream: int) -> bool:
        self.told.append(("run", stream))
        return stream != 13


def test_only_what_changed_is_set_anew() -> None:
    context = Context()
    component = EngineComponent("step", TENSORRT, SimpleNamespace(device_memory_size_v2=64), context)
    component.enqueue({"a": 1, "b": 2}, 256, 7)
    component.enqueue({"a": 1, "b": 3}, 256, 7)
    component.enqueue({"a": 1, "b": 3}, 512, 8)
    first = [("memory", 256, 64), ("a", 1), ("b", 2), ("run", 7)]
    assert context.told == [*first, ("b", 3), ("run", 7), ("memory", 512, 64), ("run", 8)]


def test_refusals_name_component_and_library() -> None:
    component = EngineComponent("step", TENSORRT_RTX, SimpleNamespace(device_memory_size_v2=0), Context())
    with pytest.raises(EngineError, match="'step' refuses the address 0xd for 'a'"):
        component.enqueue({"a": 13}, 0, 1)
    with pytest.raises(EngineError, match="'step' failed; the message of TensorRT-RTX itself"):
        component.enqueue({}, 0, 13)


def test_tensors_that_differ_are_counted_and_the_first_is_shown() -> None:
    require_same_tensors("step", {"a": "input [1]"}, {"a": "input [1]"})
    found = {"a": "input [1]", "b": "output [2]", "only": "output [3]"}
    with pytest.raises(
        BundleError, match=r"2 tensor.*'b': input \[2\] in the manifest, output \[2\] in the eng"
    ):
        require_same_tensors(
            "step", found, {"a": "input [1]", "b": "input [2]"} | {"only": "output [3]", "c": "x"}
        )
