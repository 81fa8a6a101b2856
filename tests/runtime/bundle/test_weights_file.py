"""Weights files: every type a bundle uses, read without a copy, and refused where they are damaged."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from runtime.bundle import numpy_dtype
from runtime.bundle.weights_file import WeightsFile
from runtime.errors import BundleError

TENSORS = {
    "full": torch.arange(6.0).reshape(2, 3),
    "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
    "brain": torch.tensor([1.5, -2.0, 3.0], dtype=torch.bfloat16),
    "eight": torch.tensor([[0.5, -448.0, 1.0]]).to(torch.float8_e4m3fn),
    "packed": torch.tensor([18, 255], dtype=torch.uint8),
    "whole": torch.tensor([7, -1], dtype=torch.int32),
    "long": torch.tensor(9, dtype=torch.int64),
    "flag": torch.tensor([True, False]),
    "none": torch.zeros(0, 4),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_file(TENSORS, path, metadata={"golden": "{}"})
    return path


def test_every_type_is_read_as_it_was_written(path: Path) -> None:
    with WeightsFile(path) as weights:
        assert set(weights) == set(TENSORS)
        assert len(weights) == len(TENSORS)
        assert weights.metadata == {"golden": "{}"}
        for name, tensor in TENSORS.items():
            assert weights[name].shape == tuple(tensor.shape), name
            assert np.array_equal(weights[name].astype(np.float64), tensor.double().numpy()), name
        assert weights["eight"].dtype == ml_dtypes.float8_e4m3fn
        assert weights["brain"].dtype == ml_dtypes.bfloat16


def test_arrays_outlive_the_file(path: Path) -> None:
    weights = WeightsFile(path)
    array = weights["full"]
    assert not array.flags.writeable
    stored = weights.tensors["full"]
    assert path.read_bytes()[stored.offset :][: stored.nbytes] == array.tobytes()
    weights.close()
    weights.close()
    assert array.sum() == 15
    with pytest.raises(BundleError, match="closed"):
        weights["full"]


def test_a_missing_tensor_or_file_is_named(path: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no tensor 'other'"):
        WeightsFile(path).get_required("other")
    assert WeightsFile(path).get("other") is None
    with pytest.raises(BundleError, match="cannot read"):
        WeightsFile(tmp_path / "absent")


def header(entries: object, data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: object = (2,), begin: int = 0, end: int = 8) -> dict[str, object]:
    return {"t": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has 0 bytes"),
        (b"\xff" * 20, "header claims"),
        ((10**6).to_bytes(8, "little") + b"{}", "header claims 1000000 bytes"),
        ((4).to_bytes(8, "little") + b"nope", "not a weights file"),
        (header([]), "not a weights file"),
        (header({"t": 3}), "not a weights file"),
        (header(entry()), "its tensors take 8 bytes and it has 0"),
        (header(entry(end=4), bytes(8)), "claims the bytes 0 to 4"),
        (header(entry(begin=-8, end=0), bytes(8)), r"the bytes \[-8, 0\]"),
        (header(entry(shape=(-2, -1)), bytes(8)), r"the shape \[-2, -1\]"),
        (header(entry(dtype="F8_E5M2"), bytes(8)), "has the type 'F8_E5M2'"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(BundleError, match=message):
        WeightsFile(tmp_path / "w")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_damage_reads_past_the_file(path: Path, data: st.DataObject) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    damaged = path.with_name("damaged")
    damaged.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        for array in WeightsFile(damaged).values():
            array.tobytes()
    except BundleError:
        pass


def test_packed_float4_is_bytes() -> None:
    assert numpy_dtype("float4_e2m1") == np.uint8


def library_takes(path: Path) -> bool:
    try:
        with safe_open(path, framework="np"):
            return True
    except SafetensorError:
        return False


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_what_the_library_refuses_is_refused(path: Path, data: st.DataObject) -> None:
    """Headers with other offsets, shapes, types and names than the data have: its check is the measure."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + length])
    for _ in range(data.draw(st.integers(0, 2))):
        entry = entries[data.draw(st.sampled_from(sorted(TENSORS)))]
        field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "swap", "drop"]))
        if field == "dtype":
            entry["dtype"] = data.draw(st.sampled_from(["F32", "I32", "BF16", "U8", "f32", 7, None]))
        elif field in ("shape", "data_offsets") and entry.get(field):
            at = data.draw(st.integers(0, len(entry[field]) - 1))
            entry[field][at] += data.draw(st.sampled_from([-8, -1, 1, 4, 2**40, 2**63, 0.0, 0.5]))
        elif field == "swap":
            other = entries[data.draw(st.sampled_from(sorted(TENSORS)))]
            entry["data_offsets"], other["data_offsets"] = (
                other.get("data_offsets"),
                entry.get("data_offsets"),
            )
        else:
            entry.pop(data.draw(st.sampled_from(["dtype", "shape", "data_offsets"])), None)
    text = json.dumps(entries).encode()
    tail = data.draw(st.sampled_from([b"", b"", b"x"]))
    changed = path.with_name("changed")
    changed.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :] + tail)
    try:
        with WeightsFile(changed) as weights:
            for name in weights:
                weights[name].tobytes()
        taken = True
    except BundleError:
        taken = False
    assert taken <= library_takes(changed), "the library refuses it"


def test_a_header_with_a_tensor_twice_is_refused(tmp_path: Path) -> None:
    text = b'{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    (tmp_path / "w").write_bytes(len(text).to_bytes(8, "little") + text + b"x")
    with pytest.raises(BundleError, match="the key 't' twice"):
        WeightsFile(tmp_path / "w")


@pytest.mark.parametrize("shape", [[0, 2**63], [0, 2**47, 2**47]])
def test_sizes_that_numpy_cannot_hold_are_refused(tmp_path: Path, shape: list[int]) -> None:
    """Beside a size of 0, they make a tensor of no bytes."""
    path = tmp_path / "w.safetensors"
    path.write_bytes(header(entry(shape=shape, end=0)))
    with pytest.raises(BundleError, match=r"has the shape \[0, "):
        WeightsFile(path)
