"""The TensorRT plugin against the real headers: built, called as TensorRT calls it, fuzzed, and registered.

Needs the headers of TensorRT (set TENSORRT_ROOT) and no TensorRT. Nothing is launched here; tests/gpu does that.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from plugins import contract
from plugins.compile.libraries import BuiltLibraries, build_libraries, find_tool
from plugins.kernels import specs
from tests.plugins.launch import launch_interface as lf

pytest.importorskip("triton")

ROOT = Path(__file__).parents[3]
HEADERS = lf.tensorrt_root()
pytestmark = [
    lf.needs_tools,
    pytest.mark.skipif(
        HEADERS is None, reason="no headers of TensorRT: TENSORRT_ROOT names no folder that has them"
    ),
]
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed"
)

ATTENTION = {
    "frame_tokens": ("int32", "152"),
    "block_q": ("int32", "64"),
    "block_k": ("int64", "64"),
    "keep_frames": ("int32", "4"),
    "sink_frames": ("int32", "1"),
    "near_frames": ("int32", "1"),
    "scale": ("float32", "0.08838834764831845"),
    "keep_q20": ("int32", "1048576 200000 130000"),
}
# T 456, three heads of 128, 3 blocks of 64 in a frame of 152 tokens, 9 slots, up to 5 past frames.
ATTENTION_INPUTS = {
    **dict.fromkeys(("q", "k", "v"), "bfloat16 [ 456 3 128 ]"),
    **dict.fromkeys(("q_mean", "k_mean"), "float32 [ 3 3 3 128 ]"),
    **dict.fromkeys(("past_k", "past_v"), "bfloat16 [ 9 152 3 128 ]"),
    "past_kmean": "float32 [ 9 3 3 128 ]",
    "frame_slots": "int32 [ 5 ]",
    "chunk": "int32 [ ]",
}
ATTENTION_OUTPUTS = {"out": "bfloat16 [ 456 3 128 ]"}
PREPARE = {
    "heads": ("int32", "3"),
    "frame_tokens": ("int64", "152"),
    "block_q": ("int32", "64"),
    "block_k": ("int32", "128"),
    "eps": ("float64", "1e-6"),
}
PREPARE_INPUTS = {
    "qkv": "float16 [ 456 1152 ]",
    "bias": "float16 [ 1152 ]",
    **dict.fromkeys(("norm_q", "norm_k"), "float16 [ 384 ]"),
    **dict.fromkeys(("cos", "sin"), "float32 [ 456 64 ]"),
}
PREPARE_OUTPUTS = {
    **dict.fromkeys(("q", "k", "v"), "float16 [ 456 3 128 ]"),
    "q_mean": "float32 [ 3 3 3 128 ]",
    "k_mean": "float32 [ 3 2 3 128 ]",
}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernels")
    lf.write_stand_ins(folder)
    return folder


@pytest.fixture(scope="module")
def plugin(kernels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin as it ships, but for the code of its kernels. Compiled with warnings as errors."""
    out = tmp_path_factory.mktemp("plugin")
    built = build_libraries(specs.ARCHS, kernels, out, tensorrt_root=HEADERS, fetch=False, jobs=2)
    assert built.plugin is not None
    return built.plugin


@pytest.fixture(scope="module")
def sanitized(kernels: Path, tmp_path_factory: pytest.TempPathFactory) -> BuiltLibraries:
    """The plugin and the programs of tests/driver, which stop at an invalid access or undefined behaviour."""
    out = tmp_path_factory.mktemp("sanitized")
    program = out / "probe"
    probe = ["c++", "-fsanitize=address,undefined", "-x", "c++", "-", "-o", str(program)]
    works = not subprocess.run(
        probe, input="int main() {}", text=True, capture_output=True, check=False
    ).returncode
    sanitize = "address,undefined" if works else ""
    built = build_libraries(
        (80, 120), kernels, out, tensorrt_root=HEADERS, fetch=False, sanitize=sanitize, tests=True, jobs=2
    )
    assert built.plugin is not None
    return built


def script(
    name: str,
    fields: dict[str, tuple[str, str]],
    inputs: dict[str, str],
    outputs: dict[str, str],
    *actions: str,
) -> str:
    lines = [f"plugin {name}"]
    lines += [f"field {field} {kind} {values}" for field, (kind, values) in fields.items()]
    lines += [f"input {tensor} {text}" for tensor, text in inputs.items()]
    lines += [f"output {tensor} {text}" for tensor, text in outputs.items()]
    return "\n".join([*lines, *actions]) + "\n"


def drive(built: BuiltLibraries, folder: Path, text: str, **environment: str) -> tuple[int, list[str]]:
    """Exit status and lines of the driver program."""
    (folder / "script").write_text(text)
    program = built.launch.parent / "work" / "cmake" / "plugin_driver"
    result = subprocess.run(
        [str(program), str(built.plugin), str(folder / "script")],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode in (0, 1), result.stderr
    return result.returncode, result.stdout.splitlines()


def test_attention_answers_a_builder(sanitized: BuiltLibraries, tmp_path: Path) -> None:
    text = script("HierarchicalSparseAttention", ATTENTION, ATTENTION_INPUTS, ATTENTION_OUTPUTS)
    status, lines = drive(sanitized, tmp_path, text)
    assert status == 0, lines
    # 3 heads, 9 query blocks, 8 frames of 3 key blocks: scores, lists and counts of 4 bytes.
    assert "workspace 5292" in lines
    assert "output out bfloat16 456 3 128" in lines
    types = [
        "bfloat16 float16",
        "bfloat16",
        "bfloat16",
        "float32",
        "float32",
        "bfloat16",
        "bfloat16",
        "float32",
    ]
    types += ["int32", "int32", "bfloat16"]
    assert [line for line in lines if line.startswith("types")] == [
        f"types {position} {names}" for position, names in enumerate(types)
    ]
    attributes = (
        "frame_tokens=152 block_q=64 block_k=64 keep_frames=4 sink_frames=1 near_frames=1 scale=0.0883883461 "
        "keep_q20=1048576,200000,130000"
    )
    assert f"metadata {attributes}" in lines
    assert f"restored {attributes}" in lines, "an engine's copy must be the same plugin"
    creators = [f"creator {name} 1 lightforcing" for name in ("HierarchicalSparseAttention", "QKPrepare")]
    assert lines[:2] == creators


def test_prepare_answers_a_builder(sanitized: BuiltLibraries, tmp_path: Path) -> None:
    status, lines = drive(sanitized, tmp_path, script("QKPrepare", PREPARE, PREPARE_INPUTS, PREPARE_OUTPUTS))
    assert status == 0, lines
    assert "workspace 0" in lines
    for name, described in PREPARE_OUTPUTS.items():
        kind, sizes = re.fullmatch(r"(\S+) \[ (.*) \]", described).groups()  # type: ignore[union-attr]
        assert f"output {name} {kind} {sizes}" in lines
        assert "aliased -1" in lines
    assert "restored heads=3 frame_tokens=152 block_q=64 block_k=128 eps=9.99999997e-07" in lines
    types = [f"types {position} float16" for position in (1, 2, 3, 6, 7, 8)]
    assert set(types) <= set(lines)


def test_names_and_order_are_those_of_the_contract(sanitized: BuiltLibraries, tmp_path: Path) -> None:
    assert tuple(ATTENTION) == contract.HSA_ATTRIBUTES
    assert tuple(ATTENTION_INPUTS) == contract.HSA_INPUTS
    assert set(PREPARE) == set(contract.QK_PREPARE_ATTRIBUTES)
    assert tuple(PREPARE_INPUTS) == contract.QK_PREPARE_INPUTS
    assert tuple(PREPARE_OUTPUTS) == contract.QK_PREPARE_OUTPUTS
    # The plugin names a tensor in its messages: each must be the one in that place.
    for name, fields, inputs, outputs in (
        ("HierarchicalSparseAttention", ATTENTION, ATTENTION_INPUTS, ATTENTION_OUTPUTS),
        ("QKPrepare", PREPARE, PREPARE_INPUTS, PREPARE_OUTPUTS),
    ):
        for tensor in inputs:
            if tensor in ("q", "qkv", "norm_q", "past_k", "frame_slots"):
                continue  # the sizes come from these
            changed = inputs | {tensor: inputs[tensor].replace("[", "[ 7")}
            status, lines = drive(sanitized, tmp_path, script(name, fields, changed, outputs))
            assert status == 1
            assert any(re.search(rf"{name}: {tensor} has shape \[7", line) for line in lines), lines


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": "bfloat16 [ 457 3 128 ]"}, "q has 457 tokens; expected whole frames"),
        ({"frame_slots": "int32 [ 33 ]"}, "no 'score' kernel .*past_frames 33.*past_frames up to 32"),
        ({"past_k": "bfloat16 [ 9 152 384 ]"}, "past_k has shape .*expected 4 known dimensions"),
        ({"q": "float32 [ 456 3 128 ]"}, "no 'attend' kernel .*dtype float32"),
    ],
)
def test_builder_is_told_what_does_not_fit(
    sanitized: BuiltLibraries, tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    inputs = ATTENTION_INPUTS | changes
    status, lines = drive(
        sanitized, tmp_path, script("HierarchicalSparseAttention", ATTENTION, inputs, ATTENTION_OUTPUTS)
    )
    assert status == 1
    assert any(re.search(f"^log lightforcing: .*{message}", line) for line in lines), lines


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has an NVIDIA driver")
def test_attaching_without_a_driver_is_an_error_with_a_reason(
    sanitized: BuiltLibraries, tmp_path: Path
) -> None:
    text = script("HierarchicalSparseAttention", ATTENTION, ATTENTION_INPUTS, ATTENTION_OUTPUTS, "enqueue")
    status, lines = drive(sanitized, tmp_path, text)
    assert status == 1
    assert "attachToContext: the NVIDIA driver cannot be opened: libcuda.so.1" in lines[-1]


def with_files(tensors: dict[str, str], folder: Path) -> dict[str, str]:
    """The tensors of a script with a file each, of the right size and full of zeros."""
    described = {}
    for name, text in tensors.items():
        kind, *sizes = text.replace("[", "").replace("]", "").split()
        count = math.prod(int(size) for size in sizes)
        (folder / name).write_bytes(bytes(count * (2 if kind.endswith("16") else 4)))
        described[name] = f"{text} {folder / name}"
    return described


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_enqueue_only_launches_and_can_be_captured(sanitized: BuiltLibraries, tmp_path: Path) -> None:
    """With a driver that writes down what it is asked; tests/gpu has a real one compute."""
    log = tmp_path / "log"
    inputs, outputs = (with_files(tensors, tmp_path) for tensors in (ATTENTION_INPUTS, ATTENTION_OUTPUTS))
    replay = f"replay chunk={tmp_path / 'chunk'} out={tmp_path / 'replayed'}"
    status, lines = drive(
        sanitized,
        tmp_path,
        script("HierarchicalSparseAttention", ATTENTION, inputs, outputs, "enqueue", "capture", replay),
        LD_LIBRARY_PATH=str(lf.build_stand_in_driver(tmp_path)),
        STAND_IN_LOG=str(log),
        STAND_IN_CAPABILITY="120",
    )
    assert status == 0, lines
    assert [line for line in lines if line.endswith("done")] == ["enqueue done", "replay done"]
    asked = [line.split() for line in log.read_text().splitlines()]
    functions = [words[0] for words in asked]
    begin, end = functions.index("cuStreamBeginCapture"), functions.index("cuStreamEndCapture")
    kernels = ["score-d128", "select-b16", "attend-bf16-d128-q64-ragged"]
    assert [words[:2] for words in asked[begin + 1 : end]] == [["cuLaunchKernel", name] for name in kernels]
    first = functions.index("cuLaunchKernel")
    assert asked[first : first + 3] == asked[begin + 1 : end]
    assert asked[first][asked[first].index("stream") + 1] == "4242"
    # 456 tokens are 9 query blocks; 8 frames of 3 key blocks: lists of 27 rows and 24 entries behind the scores.
    scores, lists = (int(words[words.index("arguments") + 1]) for words in asked[first : first + 2])
    assert lists - scores == 4 * 27 * 24
    assert functions.count("cuLibraryUnload") == functions.count("cuLibraryLoadData") > 0
    assert functions[-1] == "cuLibraryUnload"
    assert (tmp_path / "replayed").stat().st_size == 456 * 3 * 128 * 2


@pytest.mark.parametrize("seed", [1, 2])
def test_damaged_fields_end_in_a_message(sanitized: BuiltLibraries, seed: int) -> None:
    program = sanitized.launch.parent / "work" / "cmake" / "plugin_fuzz"
    result = subprocess.run(
        [str(program), str(sanitized.plugin), "6000", str(seed)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    counts = dict(line.split() for line in result.stdout.splitlines())
    assert int(counts["created"]) > 1000
    assert int(counts["refused"]) > 1000


@lf.needs_readelf
def test_plugin_links_no_tensorrt_and_exports_entry_points_only(plugin: Path) -> None:
    found = lf.linked(plugin)
    assert not [name for name in found.needed if re.search("cuda|nvinfer|tensorrt|python", name)], found
    others = {name for name in found.exported if not name.startswith("lf_")}
    assert others == {"getCreators", "setLoggerFinder"}
    content = plugin.read_bytes()
    for folder in (str(plugin.parent), str(ROOT), str(HEADERS)):
        assert folder.encode() not in content, "paths of this machine leak into the plugin"


# Runs in a process of its own: TensorRT-RTX has no plugins, and its parser aborts where one is registered.
REGISTRY = """
import ctypes, json, sys
import numpy as np
import tensorrt_rtx as trt

how, path = sys.argv[1:]
ours = lambda: sorted(c.name for c in registry.all_creators if c.plugin_namespace == "lightforcing")
registry, seen, handle = trt.get_plugin_registry(), {}, None
if how in ("open", "open and load"):
    ctypes.CDLL(path)
    seen["opened"] = ours()
if how in ("load", "open and load"):
    handle = registry.load_library(path)
    seen["loaded"] = ours()
if seen.get("loaded"):
    def field(name, *values):
        real = isinstance(values[0], float)
        kind = trt.PluginFieldType.FLOAT32 if real else trt.PluginFieldType.INT32
        return trt.PluginField(name, np.array(values, np.float32 if real else np.int32), kind)

    creator = registry.get_creator("HierarchicalSparseAttention", "1", "lightforcing")
    seen["fields"] = [f.name for f in creator.field_names]
    values = {"frame_tokens": [64], "block_q": [32], "block_k": [32], "keep_frames": [4], "sink_frames": [1]}
    values |= {"near_frames": [1], "scale": [0.125], "keep_q20": [1 << 20, 200000]}
    def create(values):
        fields = [field(name, *value) for name, value in values.items()]
        return creator.create_plugin("node", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)
    seen["created"] = create(values) is not None
    seen["refused"] = create(values | {"keep_frames": [1]}) is None
    del creator
if how == "load":
    registry.deregister_library(handle)
    seen["left"] = ours()
print(json.dumps(seen))
"""


def registry(how: str, plugin: Path, **environment: str) -> tuple[dict[str, object], str]:
    result = subprocess.run(
        [sys.executable, "-c", REGISTRY, how, str(plugin)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]), result.stderr


BOTH = ["HierarchicalSparseAttention", "QKPrepare"]


@needs_rtx
def test_registry_loads_the_library_and_makes_plugins(plugin: Path) -> None:
    seen, log = registry("load", plugin)
    assert seen == {
        "loaded": BOTH,
        "fields": list(contract.HSA_ATTRIBUTES),
        "created": True,
        "refused": True,
        "left": [],
    }
    assert "keep_frames 1 is smaller than sink_frames + near_frames" in log


@needs_rtx
def test_nothing_registers_itself_with_tensorrt_rtx(plugin: Path) -> None:
    assert registry("open", plugin)[0] == {"opened": []}


@needs_rtx
def test_registers_itself_where_it_is_only_opened(plugin: Path, tmp_path: Path) -> None:
    """As Polygraphy, Triton and `trtexec --staticPlugins` do. TensorRT-RTX's library stands in for libnvinfer."""
    folder = importlib.util.find_spec("tensorrt_rtx_libs")
    assert folder is not None
    assert folder.submodule_search_locations is not None
    (library,) = Path(folder.submodule_search_locations[0]).glob("libtensorrt_rtx.so*")
    assert HEADERS is not None
    version = (HEADERS / "include" / "NvInferVersion.h").read_text()
    major = re.search(r"define \w*TRT_MAJOR\w* (\d+)|define NV_TENSORRT_MAJOR (\d+)", version)
    assert major is not None
    name = f"libnvinfer.so.{major[1] or major[2]}"
    (tmp_path / name).symlink_to(library)
    # Before or after TensorRT, or by the registry after all.
    for first in ("", f"import ctypes; ctypes.CDLL({name!r})\n"):
        for how, expected in (
            ("open", {"opened": BOTH}),
            ("open and load", {"opened": BOTH, "loaded": BOTH}),
        ):
            program = first + f"import ctypes; ctypes.CDLL({str(plugin)!r})\n" + REGISTRY
            result = subprocess.run(
                [sys.executable, "-c", program, how, str(plugin)],
                env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            assert result.returncode == 0, result.stderr
            seen = json.loads(result.stdout.splitlines()[-1])
            assert {key: seen[key] for key in expected} == expected


def test_headers_are_fetched_from_a_repository_of_the_release(plugin: Path, tmp_path: Path) -> None:
    git, cmake = shutil.which("git"), find_tool("cmake")
    if git is None:
        pytest.skip("git is not installed")
    assert HEADERS is not None
    assert cmake is not None
    mirror = tmp_path / "mirror"
    shutil.copytree(HEADERS / "include", mirror / "include")
    author = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    for arguments in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "headers"], ["tag", "v11.1"]):
        subprocess.run([git, *arguments], cwd=mirror, check=True, capture_output=True)

    def configure(repository: str, commit: str) -> str:
        command = [cmake, "-S", str(ROOT / "plugins"), "-B", str(tmp_path / "build"), "-DTENSORRT_ROOT="]
        command += [f"-DLIGHTFORCING_EMBEDDED={plugin.parent / 'work' / 'embedded'}"]
        command += ["-DCMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit=ON", "-DCMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF"]
        command += [
            f"-DLIGHTFORCING_TENSORRT_REPOSITORY={repository}",
            f"-DLIGHTFORCING_TENSORRT_COMMIT={commit}",
            f"-DLIGHTFORCING_CUDA_INCLUDE={cuda_headers()}",
        ]
        environment = {k: v for k, v in os.environ.items() if k != "TENSORRT_ROOT"}
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert (result.returncode == 0) != ("was expected" in result.stderr)
        shutil.rmtree(tmp_path / "build")
        return result.stdout + " ".join(result.stderr.split())

    show = subprocess.run([git, "rev-parse", "HEAD"], cwd=mirror, check=True, capture_output=True, text=True)
    commit, other = show.stdout.strip(), "0" * 40
    headers = f"TensorRT headers: {tmp_path}/build/_deps/tensorrt-src/include"
    assert headers in configure(f"file://{mirror}", commit)
    moved = configure(f"file://{mirror}", other)
    assert headers not in moved
    assert f"are of commit {commit}, and {other} was expected" in moved
    skipped = configure(f"file://{tmp_path}/nowhere", commit)
    assert "The TensorRT plugin is skipped: there is no NvInferRuntime.h (set TENSORRT_ROOT" in skipped


def cuda_headers() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "include"
