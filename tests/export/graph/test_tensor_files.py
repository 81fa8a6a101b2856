"""Weights files written tensor by tensor: what the library reads back is what went in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from export.graph.tensor_files import StoredTensor, store, write_tensors

TYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.uint8,
    torch.int32,
    torch.bool,
)


def made(index: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    values = torch.randint(
        0, 2 if dtype == torch.bool else 100, shape, generator=torch.Generator().manual_seed(index)
    )
    return values.to(dtype)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(TYPES), st.lists(st.integers(1, 5), max_size=3)), min_size=1, max_size=6
    )
)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, wanted) -> None:
    path = tmp_path_factory.mktemp("tensors") / "weights.safetensors"
    tensors = {f"t{index}": made(index, dtype, tuple(shape)) for index, (dtype, shape) in enumerate(wanted)}
    entries = [store(name, tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()]
    write_tensors(path, entries)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)) if tensor.dim() else True
        assert torch.equal(found[name].float(), tensor.float())


def test_tensors_are_made_one_at_a_time_and_converted(tmp_path: Path) -> None:
    made_now: list[str] = []

    def make(name: str) -> torch.Tensor:
        made_now.append(name)
        return torch.full((4, 4), 1 / 3)

    entries = [store(name, (4, 4), torch.bfloat16, lambda name=name: make(name)) for name in "ab"]
    assert made_now == []
    write_tensors(tmp_path / "w.safetensors", entries)
    assert made_now == ["a", "b"]
    assert torch.equal(
        load_file(tmp_path / "w.safetensors")["b"], torch.full((4, 4), 1 / 3, dtype=torch.bfloat16)
    )


def test_tensors_stay_aligned(tmp_path: Path) -> None:
    """An odd number of bytes would move all that follows it to odd addresses."""
    entries = [
        StoredTensor("odd", "uint8", (3,), lambda: memoryview(b"abc")),
        store("wide", (2,), torch.float32, lambda: torch.tensor([1.0, 2.0])),
    ]
    write_tensors(tmp_path / "w.safetensors", entries)
    raw = (tmp_path / "w.safetensors").read_bytes()
    header = int.from_bytes(raw[:8], "little")
    assert (8 + header) % 8 == 0
    assert raw[8 + header : 16 + header] == torch.tensor([1.0, 2.0]).numpy().tobytes()
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert bytes(file.get_tensor("odd").numpy()) == b"abc"


def test_a_tensor_of_another_size_is_caught(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="short"):
        write_tensors(tmp_path / "w", [StoredTensor("short", "uint8", (4,), lambda: memoryview(b"abc"))])
