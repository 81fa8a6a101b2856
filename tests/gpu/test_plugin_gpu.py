"""The launch library and the TensorRT plugin on a GPU, against the reference.

The launch library needs a C++ compiler. The plugin needs the headers of TensorRT besides (TENSORRT_ROOT) and no
TensorRT: the driver program of tests/driver calls it as TensorRT would. Set LIGHTFORCING_KERNELS to a folder that
`python -m plugins build` wrote to embed those images; otherwise images for this device are built first.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightforcing_ref import attention as oracle
from plugins.compile.libraries import BuiltLibraries, build_libraries
from plugins.kernels.specs import image_arch
from tests.gpu.test_kernels_gpu import KEEP, SMALL, TOLERANCE, Size, inputs, relative
from tests.plugins.launch import launch_interface as lf

NO_GPU = "" if torch.cuda.is_available() else "PyTorch finds no CUDA device"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU),
    pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler"),
]
HEADERS = lf.tensorrt_root()
needs_plugin = [
    lf.needs_tools,
    pytest.mark.skipif(
        HEADERS is None, reason="no headers of TensorRT: TENSORRT_ROOT names no folder that has them"
    ),
]

FULL = Size(1560, 64, 64, 12, 128, 18, 18)
SCALE = 0.1
GUARD = 256
NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32", torch.int32: "int32"}
# (chunk, past frames) of the replays of one graph: the first chunk, growth, a full window, past the table's end.
STEPS = ((0, 0), (1, 3), (2, 6), (3, 9), (1, 5))


@pytest.fixture(scope="module")
def arch() -> int:
    major, minor = torch.cuda.get_device_capability()
    return image_arch(10 * major + minor)


@pytest.fixture(scope="module")
def kernels(arch: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("LIGHTFORCING_KERNELS"):
        return Path(given)
    from plugins.compile.kernels import build

    out = tmp_path_factory.mktemp("kernels")
    build((arch,), out)
    return out


@pytest.fixture(scope="module")
def library(arch: int, kernels: Path, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    torch.zeros(1, device="cuda")  # the context that the library finds current
    return lf.open_library(lf.compile_launch_library((arch,), kernels, tmp_path_factory.mktemp("library")))


def attributes(size: Size) -> dict[str, Any]:
    geometry = {"frame_tokens": size.frame_tokens, "block_q": size.block_q, "block_k": size.block_k}
    frames = {"keep_frames": 4, "sink_frames": 1, "near_frames": 1}
    return {**geometry, **frames, "scale": SCALE, "keep_q20": list(KEEP)}


def expected(tensors: dict[str, Tensor], size: Size) -> Tensor:
    on_host = (x.cpu().float() if x.is_floating_point() else x.cpu() for x in tensors.values())
    return oracle.hsa_attention(*on_host, **attributes(size), form="gather")


def shape_of(size: Size, dtype: torch.dtype) -> lf.Shape:
    return lf.Shape(lf.DTYPES[NAMES[dtype]], size.heads, size.head_dim, 3, size.max_past)


class Attention:
    """The operator on torch tensors, with a workspace of exactly the size it asks for."""

    def __init__(self, library: ctypes.CDLL, size: Size, dtype: torch.dtype) -> None:
        self.operator = lf.Operator(library, "attention", lf.attention_attributes(attributes(size)))
        self.operator.load()
        self.shape = shape_of(size, dtype)
        self.bytes = self.operator.workspace(self.shape)
        self.workspace = torch.full((self.bytes + GUARD,), 0xFF, dtype=torch.uint8, device="cuda")

    def __call__(self, tensors: dict[str, Tensor], out: Tensor) -> None:
        buffers = lf.AttentionBuffers(
            **{name: x.data_ptr() for name, x in tensors.items()}, out=out.data_ptr()
        )
        stream = torch.cuda.current_stream().cuda_stream
        self.operator.enqueue(self.shape, buffers, self.workspace.data_ptr(), self.bytes, stream)


@pytest.fixture
def attention(library: ctypes.CDLL, request: pytest.FixtureRequest) -> Iterator[Attention]:
    """For the size and type that the test is parametrised with."""
    operator = Attention(library, request.getfixturevalue("size"), request.getfixturevalue("dtype"))
    yield operator
    torch.cuda.synchronize()
    operator.operator.close()


every_type = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


@every_type
@pytest.mark.parametrize("size", [*SMALL, FULL], ids=lambda size: size.id)
def test_attention(attention: Attention, size: Size, dtype: torch.dtype) -> None:
    tensors = inputs(size, dtype)
    out = torch.full_like(tensors["q"], float("nan"))
    attention(tensors, out)
    torch.cuda.synchronize()
    assert relative(out.cpu(), expected(tensors, size)) < TOLERANCE[dtype]
    assert (attention.workspace[attention.bytes :] == 0xFF).all(), "written past the end of the workspace"
    again = torch.full_like(out, float("nan"))
    attention(tensors, again)
    assert torch.equal(again, out), "the same inputs give other bits"


@every_type
@pytest.mark.parametrize("size", [*SMALL, FULL], ids=lambda size: size.id)
def test_prepare(library: ctypes.CDLL, size: Size, dtype: torch.dtype) -> None:
    values = prepare_inputs(size, dtype)
    blocks = [-(-size.frame_tokens // block) for block in (size.block_q, size.block_k)]
    tokens = (3 * size.frame_tokens, size.heads, size.head_dim)
    outputs = {name: torch.full(tokens, float("nan"), dtype=dtype, device="cuda") for name in "qkv"}
    for name, count in zip(("q_mean", "k_mean"), blocks, strict=True):
        outputs[name] = torch.full((3, count, *tokens[1:]), float("nan"), device="cuda")
    geometry = (size.heads, size.frame_tokens, size.block_q, size.block_k)
    operator = lf.Operator(library, "prepare", lf.PrepareAttributes(*geometry, 1e-6))
    operator.load()
    buffers = lf.PrepareBuffers(**{name: x.data_ptr() for name, x in (values | outputs).items()})
    operator.enqueue(shape_of(size, dtype), buffers, torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    operator.close()
    check_prepared(values, outputs, size, dtype)


def prepare_inputs(size: Size, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator("cuda").manual_seed(1)
    tokens, width = 3 * size.frame_tokens, size.heads * size.head_dim
    shapes = {"qkv": (tokens, 3 * width), "bias": (3 * width,), "norm_q": (width,), "norm_k": (width,)}
    values = {
        name: torch.randn(shape, generator=generator, device="cuda").to(dtype)
        for name, shape in shapes.items()
    }
    angle = torch.randn(tokens, size.head_dim // 2, generator=generator, device="cuda")
    return {**values, "cos": angle.cos(), "sin": angle.sin()}


def check_prepared(
    values: dict[str, Tensor], outputs: dict[str, Tensor], size: Size, dtype: torch.dtype
) -> None:
    geometry = {"frame_tokens": size.frame_tokens, "block_q": size.block_q, "block_k": size.block_k}
    exact = oracle.qk_prepare(
        *(x.cpu().float() for x in values.values()), heads=size.heads, eps=1e-6, **geometry
    )
    found = {name: tensor.cpu() for name, tensor in outputs.items()}
    for name, want in zip("qkv", exact[:3], strict=True):
        assert relative(found[name], want) < TOLERANCE[dtype]
    for name, rounded, block in (("q_mean", "q", size.block_q), ("k_mean", "k", size.block_k)):
        assert relative(found[name], oracle.block_means(found[rounded], size.frame_tokens, block)) < 1e-6


def place(tensors: dict[str, Tensor], chunk: int, past: int) -> None:
    """`past` frames in slots in any order, and the index of the chunk, in place."""
    slots = tensors["past_k"].shape[0]
    order = torch.randperm(slots, generator=torch.Generator().manual_seed(past))[:past]
    tensors["frame_slots"].fill_(-1)
    tensors["frame_slots"][:past] = order.to(tensors["frame_slots"])
    tensors["chunk"].fill_(chunk)


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [SMALL[2]], ids=lambda size: size.id)
def test_one_capture_is_right_for_every_chunk(attention: Attention, size: Size, dtype: torch.dtype) -> None:
    tensors = inputs(size, dtype)
    for name in ("past_k", "past_v", "past_kmean"):
        tensors[name].nan_to_num_(nan=0.5)  # every slot takes its turn
    out = torch.empty_like(tensors["q"])
    graph = torch.cuda.CUDAGraph()
    # The very first enqueue is captured: loading has left nothing to do.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        attention(tensors, out)
    for chunk, past in STEPS:
        place(tensors, chunk, past)
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert relative(out.cpu(), expected(tensors, size)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [SMALL[1]], ids=lambda size: size.id)
def test_enqueue_allocates_nothing(attention: Attention, size: Size, dtype: torch.dtype) -> None:
    tensors = inputs(size, dtype)
    out = torch.empty_like(tensors["q"])
    attention(tensors, out)
    torch.cuda.synchronize()
    free = torch.cuda.mem_get_info()[0]
    for _ in range(50):
        attention(tensors, out)
    torch.cuda.synchronize()
    assert torch.cuda.mem_get_info()[0] == free


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [SMALL[1]], ids=lambda size: size.id)
def test_bad_addresses_are_refused_before_a_launch(
    attention: Attention, size: Size, dtype: torch.dtype
) -> None:
    tensors = inputs(size, dtype)
    out = torch.empty_like(tensors["q"])
    addresses = {name: x.data_ptr() for name, x in tensors.items()} | {"out": out.data_ptr()}
    workspace, stream = attention.workspace.data_ptr(), torch.cuda.current_stream().cuda_stream
    for changes, rest, message in (
        ({"q": None}, (workspace, attention.bytes), "q is NULL"),
        ({"frame_slots": None}, (workspace, attention.bytes), "frame_slots is NULL"),
        (
            {"chunk": addresses["chunk"] + 4},
            (workspace, attention.bytes),
            "chunk does not start at a multiple of 16",
        ),
        (
            {},
            (workspace, attention.bytes - 1),
            f"has {attention.bytes - 1} bytes; expected {attention.bytes}",
        ),
        ({}, (None, attention.bytes), "workspace is NULL"),
    ):
        with pytest.raises(lf.LaunchError, match=message):
            attention.operator.enqueue(
                attention.shape, lf.AttentionBuffers(**addresses | changes), *rest, stream
            )


def test_loading_needs_a_current_context(library: ctypes.CDLL) -> None:
    operator = lf.Operator(library, "attention", lf.attention_attributes(attributes(SMALL[0])))
    failures: list[lf.LaunchError] = []

    def load() -> None:
        try:
            operator.load()
        except lf.LaunchError as error:
            failures.append(error)

    thread = threading.Thread(target=load)  # a thread that has not touched the GPU
    thread.start()
    thread.join()
    operator.close()
    assert "no CUDA context is current" in str(failures[0])


@pytest.fixture(scope="module")
def built(arch: int, kernels: Path, tmp_path_factory: pytest.TempPathFactory) -> BuiltLibraries:
    out = tmp_path_factory.mktemp("plugin")
    return build_libraries((arch,), kernels, out, tensorrt_root=HEADERS, fetch=False, tests=True)


def save(folder: Path, tensors: dict[str, Tensor], direction: str) -> list[str]:
    """Raw files of `tensors` and the lines of a driver script that name them."""
    lines = []
    for name, tensor in tensors.items():
        path = folder / name
        path.write_bytes(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        sizes = " ".join(str(dim) for dim in tensor.shape)
        lines.append(f"{direction} {name} {NAMES[tensor.dtype]} [ {sizes} ] {path}")
    return lines


def fetch(path: Path, like: Tensor) -> Tensor:
    raw = torch.from_numpy(np.frombuffer(path.read_bytes(), np.uint8).copy())
    return raw.view(like.dtype).reshape(like.shape)


def drive(built: BuiltLibraries, folder: Path, lines: list[str]) -> None:
    (folder / "script").write_text("\n".join(lines) + "\n")
    program = built.launch.parent / "work" / "cmake" / "plugin_driver"
    result = subprocess.run(
        [str(program), str(built.plugin), str(folder / "script")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


class TestPlugin:
    pytestmark = needs_plugin

    @every_type
    @pytest.mark.parametrize("size", [SMALL[1], FULL], ids=lambda size: size.id)
    def test_attention_enqueued(
        self, built: BuiltLibraries, tmp_path: Path, size: Size, dtype: torch.dtype
    ) -> None:
        tensors = inputs(size, dtype)
        lines = ["plugin HierarchicalSparseAttention", *fields(attributes(size))]
        lines += save(tmp_path, tensors, "input") + save(tmp_path, {"out": tensors["q"]}, "output")
        drive(built, tmp_path, [*lines, "enqueue"])
        out = fetch(tmp_path / "out", tensors["q"])
        assert relative(out, expected(tensors, size)) < TOLERANCE[dtype]

    def test_attention_captured_and_replayed(self, built: BuiltLibraries, tmp_path: Path) -> None:
        size = SMALL[2]
        tensors = inputs(size, torch.bfloat16)
        for name in ("past_k", "past_v", "past_kmean"):
            tensors[name].nan_to_num_(nan=0.5)
        lines = ["plugin HierarchicalSparseAttention", *fields(attributes(size))]
        lines += save(tmp_path, tensors, "input") + save(tmp_path, {"out": tensors["q"]}, "output")
        lines.append("capture")
        for step, (chunk, past) in enumerate(STEPS):
            place(tensors, chunk, past)
            folder = tmp_path / str(step)
            folder.mkdir()
            save(folder, {name: tensors[name] for name in ("frame_slots", "chunk")}, "input")
            files = " ".join(f"{name}={folder / name}" for name in ("frame_slots", "chunk", "out"))
            lines.append(f"replay {files}")
        drive(built, tmp_path, lines)
        for step, (chunk, past) in enumerate(STEPS):
            place(tensors, chunk, past)
            out = fetch(tmp_path / str(step) / "out", tensors["q"])
            assert relative(out, expected(tensors, size)) < TOLERANCE[torch.bfloat16]

    @every_type
    def test_prepare_enqueued(self, built: BuiltLibraries, tmp_path: Path, dtype: torch.dtype) -> None:
        size = SMALL[1]
        values = prepare_inputs(size, dtype)
        tokens = torch.empty(3 * size.frame_tokens, size.heads, size.head_dim, dtype=dtype)
        means = [
            torch.empty(3, -(-size.frame_tokens // b), *tokens.shape[1:])
            for b in (size.block_q, size.block_k)
        ]
        outputs = {**dict.fromkeys("qkv", tokens), "q_mean": means[0], "k_mean": means[1]}
        geometry = {"heads": size.heads, "frame_tokens": size.frame_tokens}
        geometry |= {"block_q": size.block_q, "block_k": size.block_k}
        lines = ["plugin QKPrepare", *fields({**geometry, "eps": 1e-6})]
        lines += save(tmp_path, values, "input") + save(tmp_path, outputs, "output")
        drive(built, tmp_path, [*lines, "enqueue"])
        found = {name: fetch(tmp_path / name, like) for name, like in outputs.items()}
        check_prepared(values, found, size, dtype)


def fields(values: dict[str, Any]) -> list[str]:
    """Lines of a driver script for an operator's attributes."""
    lines = []
    for name, value in values.items():
        kind = "float32" if isinstance(value, float) else "int32"
        listed = value if isinstance(value, list) else [value]
        lines.append(f"field {name} {kind} {' '.join(str(entry) for entry in listed)}")
    return lines
