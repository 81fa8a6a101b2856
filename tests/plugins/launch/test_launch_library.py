"""The launch library without a GPU: built by CMake for real, called through its C interface."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from ctypes import c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins import contract
from plugins.compile.embedding import EMBEDDED_KERNELS, EmbeddingError, write_embedded
from plugins.compile.libraries import build_libraries
from plugins.errors import ContractError
from plugins.kernels import specs
from runtime.bundle import images
from runtime.errors import BundleError, EngineError
from runtime.program import kernels as reader
from tests.plugins.launch import launch_interface as lf
from tests.plugins.launch.launch_interface import ATTRIBUTES, WAN

pytest.importorskip("triton")
pytestmark = lf.needs_tools

ROOT = Path(__file__).parents[3]
SOURCES = ROOT / "plugins" / "launch"
BY_HAND = "attend-by-hand"
WANTED = sorted({name for kernel in EMBEDDED_KERNELS for name in specs.KERNELS[kernel][1]})
BUFFERS = {name: 16 * (index + 1) for index, name in enumerate(WANTED)}
OPTIONS = {
    "eps": 1e-6,
    "scale": 0.08838834764831845,
    "table_entries": 7,
    "keep_frames": 6,
    "sink_frames": 1,
    "near_frames": 2,
}


def add_kernel_by_hand(folder: Path) -> None:
    """A kernel of another make, preferred to ours: other order of arguments, other grid, no scratch pointers."""
    index = json.loads((folder / images.INDEX_NAME).read_text())
    ours = next(image for image in index["images"] if image["kernel"] == "attend")
    arguments = {argument["name"]: argument for argument in ours["arguments"]}
    names = ("scale", "lists", "counts", "frame_slots", "past_v", "past_k", "v", "k", "q", "out", "heads")
    theirs = {
        **ours,
        "name": BY_HAND,
        "threads": 384,
        "grid": [{"size": "heads", "tile": 2}, {"size": "query_blocks", "tile": 4}, 7],
        "arguments": [arguments[name] for name in names],
        "limits": {"heads": 3},
    }
    (folder / images.INDEX_NAME).write_text(json.dumps({**index, "images": [theirs, *index["images"]]}))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernels")
    lf.write_stand_ins(folder)
    add_kernel_by_hand(folder / "sm_80")
    return folder


@pytest.fixture(scope="module")
def path(kernels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The launch library with every stand-in, built where there are no headers of TensorRT."""
    out = tmp_path_factory.mktemp("libraries")
    built = build_libraries(specs.ARCHS, kernels, out, tensorrt_root=out / "nowhere", fetch=False, jobs=2)
    assert built.plugin is None
    assert built.launch.parent == out
    assert built.header.read_bytes() == (SOURCES / built.header.name).read_bytes()
    assert built.targets == ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")
    return built.launch


@pytest.fixture(scope="module")
def library(path: Path) -> ctypes.CDLL:
    return lf.open_library(path)


@pytest.fixture
def attention(library: ctypes.CDLL) -> Iterator[lf.Operator]:
    operator = lf.Operator(library, "attention", lf.attention_attributes(ATTRIBUTES))
    yield operator
    operator.close()


def plan(
    library: ctypes.CDLL,
    capability: int,
    kernel: str,
    problem: dict[str, Any],
    options: dict[str, float] = OPTIONS,
) -> lf.Plan:
    """The launch library's plan. Raises LaunchError."""
    numbers = {**problem, "dtype": lf.DTYPES[problem["dtype"]]}
    values = [lf.Value(name.encode(), address, 0) for name, address in BUFFERS.items()]
    values += [lf.Value(name.encode(), 0, number) for name, number in options.items()]
    result = lf.Plan()
    status = library.lf_make_plan(
        capability,
        kernel.encode(),
        ctypes.byref(lf.Problem(**numbers)),
        (lf.Value * len(values))(*values),
        len(values),
        ctypes.byref(result),
    )
    if status:
        raise lf.LaunchError(status, library.lf_last_error().decode())
    return result


def bits(value: reader.Value) -> int:
    return int(value) if isinstance(value, np.uint64) else int(value.view(np.uint32))


PROBLEMS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(list(lf.DTYPES)),
        "heads": st.integers(1, 20),
        "head_dim": st.sampled_from([64, 64, 128, 128, 96]),
        "frame_tokens": st.sampled_from([64, 1536, 1560]) | st.integers(1, 5000),
        "chunk_frames": st.integers(1, 4),
        "past_frames": st.integers(0, 40),
        "block_q": st.sampled_from([32, 64, 128, 128, 256]),
        "block_k": st.sampled_from([32, 64, 64, 128, 16]),
    }
)
CAPABILITIES = (80, 86, 87, 88, 89, 90, 100, 103, 120, 121, 75)


@settings(max_examples=400, deadline=None)
@given(PROBLEMS, st.sampled_from(CAPABILITIES), st.sampled_from(EMBEDDED_KERNELS))
def test_chooses_and_lays_out_as_the_runtime_does(
    kernels: Path, library: ctypes.CDLL, problem: dict[str, Any], capability: int, kernel: str
) -> None:
    try:
        theirs = runtime_library(kernels, capability).plan(
            kernel, reader.KernelProblem(**problem), BUFFERS, OPTIONS
        )
    except EngineError:
        with pytest.raises(lf.LaunchError) as found:
            plan(library, capability, kernel, problem)
        assert found.value.status == lf.NOT_SERVED
        return
    ours = plan(library, capability, kernel, problem)
    assert ours.image.decode() == theirs.image.name
    assert tuple(ours.grid) == theirs.grid
    assert (ours.threads, ours.shared_memory) == (theirs.image.threads, theirs.image.shared_memory)
    assert list(ours.arguments[: ours.argument_count]) == [bits(value) for value in theirs.values]


LIBRARIES: dict[int, reader.KernelLibrary] = {}


def runtime_library(kernels: Path, capability: int) -> reader.KernelLibrary:
    if capability not in LIBRARIES:
        LIBRARIES[capability] = reader.KernelLibrary.load(kernels, divmod(capability, 10))
    return LIBRARIES[capability]


def test_plan_of_a_known_problem(library: ctypes.CDLL) -> None:
    found = plan(library, 90, "attend", WAN)
    assert found.image == b"attend-bf16-d128-q64-ragged"
    assert tuple(found.grid) == (75, 12, 1)  # 3 frames of 25 query blocks, 12 heads
    scale = int(np.float32(OPTIONS["scale"]).view(np.uint32))
    numbers = [12, 1560, 18, 25, 525, 64, scale, 0, 0]
    assert list(found.arguments[: found.argument_count])[-9:] == numbers


def test_kernel_of_another_make_takes_its_place(library: ctypes.CDLL) -> None:
    small = {**WAN, "heads": 3, "frame_tokens": 1536, "block_q": 128, "block_k": 128}
    found = plan(library, 80, "attend", small)
    assert found.image.decode() == BY_HAND
    assert (tuple(found.grid), found.threads, found.argument_count) == ((2, 9, 7), 384, 11)
    assert found.arguments[1] == BUFFERS["lists"]
    assert found.arguments[10] == 3
    assert plan(library, 80, "attend", {**small, "heads": 4}).image.decode() != BY_HAND


def test_cubins_are_inside_byte_for_byte(kernels: Path, library: ctypes.CDLL) -> None:
    for arch in specs.ARCHS:
        image_set, cubins = images.read_images(kernels / f"sm_{arch}")
        found = plan(library, arch, "select", WAN)
        name = found.image.decode()
        assert ctypes.string_at(found.cubin, found.cubin_bytes) == cubins[name]
        assert f"sm_{arch}".encode() in cubins[name]
        assert name in {image.name for image in image_set.images}


def test_refusals_say_what_is_served(library: ctypes.CDLL) -> None:
    with pytest.raises(
        lf.LaunchError, match=r"no 'attend' kernel for sm_120a serves .*block_q 256.*block_q 128, 32, 64"
    ):
        plan(library, 120, "attend", {**WAN, "block_q": 256})
    with pytest.raises(lf.LaunchError, match=r"dtype float32.*dtype bfloat16, float16"):
        plan(library, 90, "prepare", {**WAN, "dtype": "float32"})
    with pytest.raises(lf.LaunchError, match=r"holds kernels for sm_80, .*sm_120a; the device has .* 7\.5"):
        plan(library, 75, "attend", WAN)
    with pytest.raises(lf.LaunchError, match=r"needs argument.*scale that the caller") as missing:
        plan(library, 90, "attend", WAN, {})
    assert missing.value.status == lf.INVALID_ARGUMENT
    with pytest.raises(lf.LaunchError, match="no kernel has a buffer or option 'turned_pairs'"):
        plan(library, 90, "attend", WAN, {"turned_pairs": 3})
    with pytest.raises(lf.LaunchError, match="there is no kernel 'commit'"):
        plan(library, 90, "commit", WAN)


def test_sizes_out_of_range_are_refused(library: ctypes.CDLL) -> None:
    for name in set(WAN) - {"dtype"}:
        with pytest.raises(lf.LaunchError, match=f"{name} is -1"):
            plan(library, 90, "attend", {**WAN, name: -1})
    with pytest.raises(lf.LaunchError, match="query_blocks is larger than 2147483647"):
        plan(library, 90, "attend", {**WAN, "chunk_frames": 1 << 30})
    with pytest.raises(lf.LaunchError, match="is larger than 2147483647"):
        plan(library, 90, "attend", dict.fromkeys(WAN, (1 << 31) - 1) | {"dtype": "bfloat16", "block_k": 1})


INT32 = st.integers(-(1 << 31), (1 << 31) - 1)
SMALL = st.integers(-1, 9)
FLOAT32 = st.sampled_from([0.125, 1e-6]) | st.floats(width=32)


@settings(max_examples=300, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            **dict.fromkeys(("frame_tokens", "block_q", "block_k"), SMALL | INT32),
            **dict.fromkeys(("keep_frames", "sink_frames", "near_frames"), SMALL | INT32),
            "scale": FLOAT32,
            "keep_q20": st.lists(st.integers(0, 1 << 20) | INT32, max_size=4),
        }
    )
)
def test_accepts_the_attributes_that_the_contract_allows(
    library: ctypes.CDLL, values: dict[str, Any]
) -> None:
    try:
        contract.HSAAttributes(**values)
    except ContractError:
        with pytest.raises(
            lf.LaunchError, match=r"HierarchicalSparseAttention: .* expected|lower the other"
        ) as found:
            lf.Operator(library, "attention", lf.attention_attributes(values))
        assert found.value.status == lf.INVALID_ARGUMENT
        return
    lf.Operator(library, "attention", lf.attention_attributes(values)).close()


@settings(max_examples=100, deadline=None)
@given(
    st.fixed_dictionaries(
        {**dict.fromkeys(("heads", "frame_tokens", "block_q", "block_k"), SMALL | INT32), "eps": FLOAT32}
    )
)
def test_accepts_the_attributes_of_qk_prepare(library: ctypes.CDLL, values: dict[str, Any]) -> None:
    try:
        contract.QKPrepareAttributes(**values)
    except ContractError:
        with pytest.raises(lf.LaunchError, match=r"QKPrepare: .* expected"):
            lf.Operator(library, "prepare", lf.PrepareAttributes(**values))
        return
    lf.Operator(library, "prepare", lf.PrepareAttributes(**values)).close()


@pytest.mark.parametrize(("chunk_frames", "past_frames"), [(3, 18), (1, 0), (2, 5)])
def test_workspace_holds_scores_lists_and_counts(
    attention: lf.Operator, chunk_frames: int, past_frames: int
) -> None:
    shape = lf.Shape(lf.DTYPES["bfloat16"], 12, 128, chunk_frames, past_frames)
    rows = 12 * chunk_frames * 25
    entries = rows * (past_frames + chunk_frames) * 25
    padding = -4 * entries % 16
    assert attention.workspace(shape) == 2 * (4 * entries + padding) + 4 * rows


def test_shapes_without_a_kernel_are_refused(library: ctypes.CDLL, attention: lf.Operator) -> None:
    for shape, message in (
        (lf.Shape(lf.DTYPES["float32"], 12, 128, 3, 18), "no 'attend' kernel .*dtype float32"),
        (lf.Shape(lf.DTYPES["bfloat16"], 12, 128, 3, 33), "past_frames 33"),
        (lf.Shape(77, 12, 128, 3, 18), "dtype is 77; expected 0"),
        (lf.Shape(-1, 12, 128, 3, 18), "dtype is -1; expected 0"),
        (lf.Shape(lf.DTYPES["bfloat16"], 0, 128, 3, 18), "heads is 0; expected at least 1"),
    ):
        with pytest.raises(lf.LaunchError, match=message):
            attention.workspace(shape)
    prepare = lf.Operator(library, "prepare", lf.PrepareAttributes(12, 1560, 64, 64, 1e-6))
    prepare.check(lf.Shape(lf.DTYPES["float16"], 12, 64, 3, 0))
    with pytest.raises(lf.LaunchError, match="tensors have 3 heads; expected its attribute heads = 12"):
        prepare.check(lf.Shape(lf.DTYPES["float16"], 3, 64, 3, 0))
    prepare.close()
    assert [library.lf_serves_dtype(dtype) for dtype in (0, 1, 2, 3, -1)] == [0, 1, 1, 0, 0]


def test_null_pointers_are_refused(library: ctypes.CDLL, attention: lf.Operator) -> None:
    shape, size = lf.Shape(2, 12, 128, 3, 18), c_size_t()
    for status in (
        library.lf_attention_create(None, ctypes.byref(c_void_p())),
        library.lf_attention_create(ctypes.byref(lf.attention_attributes(ATTRIBUTES)), None),
        library.lf_attention_workspace(None, ctypes.byref(shape), ctypes.byref(size)),
        library.lf_attention_workspace(attention.handle, None, ctypes.byref(size)),
        library.lf_attention_workspace(attention.handle, ctypes.byref(shape), None),
        library.lf_attention_load(None),
        library.lf_prepare_enqueue(None, None, None, None),
        library.lf_make_plan(90, None, None, None, 0, None),
        library.lf_make_plan(90, b"attend", None, None, 1, None),
    ):
        assert status == lf.INVALID_ARGUMENT
        assert library.lf_last_error().endswith(b"is NULL")
    library.lf_attention_destroy(None)
    library.lf_prepare_destroy(None)


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has an NVIDIA driver")
def test_without_a_driver_only_loading_fails(library: ctypes.CDLL, attention: lf.Operator) -> None:
    with pytest.raises(lf.LaunchError, match=r"libcuda\.so\.1.*NVIDIA GPU and its driver") as refused:
        attention.load()
    assert refused.value.status == lf.NO_DRIVER
    with pytest.raises(lf.LaunchError, match="call lf_attention_load first") as early:
        attention.enqueue(lf.Shape(2, 12, 128, 3, 18), lf.AttentionBuffers(), None, 0, None)
    assert early.value.status == lf.NOT_LOADED


def test_every_architecture_is_named(library: ctypes.CDLL) -> None:
    assert library.lf_architectures() == b"sm_80 sm_86 sm_89 sm_90a sm_100a sm_120a"


@lf.needs_readelf
def test_links_no_cuda_and_exports_its_interface_only(path: Path) -> None:
    found = lf.linked(path)
    assert not [name for name in found.needed if re.search("cuda|nvinfer|nvrtc|python", name)], found
    assert "RUNPATH" not in found.dynamic
    header = (SOURCES / "lightforcing_launch.h").read_text()
    declared = set(re.findall(r"^LF_API .*?\b(lf_\w+)\(", header, re.MULTILINE))
    assert found.exported == declared
    content = path.read_bytes()
    assert str(path.parent).encode() not in content, "paths of this machine leak into the library"
    assert str(ROOT).encode() not in content


def test_header_is_c_and_its_structures_are_those_of_the_tests(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    lines = ['#include "lightforcing_launch.h"', "#include <stdio.h>", "int main(void) {"]
    expected = []
    for name, structure in lf.STRUCTURES.items():
        lines.append(f'    printf("%zu\\n", sizeof({name}));')
        expected.append(ctypes.sizeof(structure))
        for field, *_ in structure._fields_:
            lines.append(f'    printf("%zu\\n", offsetof({name}, {field}));')
            expected.append(getattr(structure, field).offset)
    (tmp_path / "sizes.c").write_text("\n".join([*lines, "    return 0;", "}", ""]))
    program = str(tmp_path / "sizes")
    strict = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    subprocess.run([compiler, *strict, f"-I{SOURCES}", str(tmp_path / "sizes.c"), "-o", program], check=True)
    assert [int(line) for line in subprocess.check_output([program]).split()] == expected


def test_driver_is_declared_as_the_vendor_declares_it() -> None:
    import triton

    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    if not (include / "cuda.h").exists():
        pytest.skip("this Triton brings no cuda.h")
    checked = ROOT / "tests" / "driver" / "driver_declarations.cpp"
    subprocess.run(
        ["c++", "-std=c++17", "-fsyntax-only", f"-I{SOURCES}", "-isystem", str(include), str(checked)],
        check=True,
    )


def test_vocabulary_is_that_of_the_image_format() -> None:
    header = (SOURCES / "images.h").read_text()

    def enumerators(name: str) -> set[str]:
        match = re.search(rf"enum class {name} : \S+ {{(.*?)}}", header, re.DOTALL)
        assert match is not None
        return {word.strip() for word in match[1].split(",") if word.strip()}

    elsewhere = {"sinks", "groups"}  # of kernels that are not embedded
    sizes = set(specs.KernelProblem("bfloat16", 1, 1, 1, 1, 0, 1, 1).sizes()) - elsewhere
    scalars = {name for kernel in EMBEDDED_KERNELS for name in specs.KERNELS[kernel][2]}
    assert enumerators("Kernel") == set(EMBEDDED_KERNELS)
    assert enumerators("Size") == sizes | {"dtype"}
    assert enumerators("Buffer") == set(WANTED)
    assert enumerators("Option") == scalars - sizes


def test_images_that_the_library_cannot_launch_are_refused(kernels: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sm_90"
    shutil.copytree(kernels / "sm_90", folder)
    index = json.loads((folder / images.INDEX_NAME).read_text())
    attend = next(image for image in index["images"] if image["kernel"] == "attend")
    attend["arguments"][0]["name"] = "somewhere"
    attend["limits"] = {"colour": 3}
    (folder / images.INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(EmbeddingError, match=f"{attend['name']} uses colour, somewhere, which"):
        write_embedded((90,), tmp_path, tmp_path / "out")
    with pytest.raises(BundleError, match="does not exist"):
        write_embedded((120,), tmp_path, tmp_path / "out")


def test_sources_change_only_with_the_images(kernels: Path, tmp_path: Path) -> None:
    def state() -> dict[str, int]:
        return {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir() if file.suffix != ".cubin"}

    assert write_embedded((90, 120), kernels, tmp_path) == ["sm_90a", "sm_120a"]
    first = state()
    write_embedded((90, 120), kernels, tmp_path)
    assert state() == first
    assert write_embedded((90,), kernels, tmp_path) == ["sm_90a"]
    assert state() != first
    index = json.loads((kernels / "sm_90" / images.INDEX_NAME).read_text())
    left = {file.stem for file in tmp_path.glob("*.cubin")}
    assert left
    assert left <= {image["sha256"] for image in index["images"]}, (
        "images of the other architecture stay behind"
    )
