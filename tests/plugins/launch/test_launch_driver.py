"""What the launch library asks of the CUDA driver, with a driver that writes it down instead of a GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.program import kernels as reader
from tests.plugins.launch import launch_interface as lf

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None or shutil.which("c++") is None,
    reason="there is no C and C++ compiler (cc, c++)",
)

ROOT = Path(__file__).parents[3]
ATTRIBUTES = {**lf.ATTRIBUTES, "keep_q20": [1 << 20, 200_000, 130_000]}
INPUTS = ("q", "k", "v", "q_mean", "k_mean", "past_k", "past_v", "past_kmean", "frame_slots", "chunk", "out")
ADDRESSES = {name: 4096 * (index + 1) for index, name in enumerate(INPUTS)}
WORKSPACE = 1 << 20
# 12 heads, 3 chunk and 18 past frames of 25 query and key blocks; scores, then lists, then counts.
ENTRIES = 12 * 75 * 525
# Of the images, those that may serve the attributes: heads and type come with the tensors.
ATTENTION_IMAGES = {
    *(f"score-d{dim}" for dim in (64, 128)),
    *(f"select-b{blocks}" for blocks in (32, 64)),
    *(f"attend-{dtype}-d{dim}-q64-ragged" for dtype in ("bf16", "fp16") for dim in (64, 128)),
}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernels")
    lf.write_stand_ins(folder, (86, 90))
    return folder


@pytest.fixture(scope="module")
def library(kernels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The launch library, with a driver beside it."""
    out = tmp_path_factory.mktemp("libraries")
    lf.build_stand_in_driver(out)
    return lf.compile_launch_library((86, 90), kernels, out)


# Runs in a process of its own, which finds the stand-in when the library opens libcuda.so.1.
PROGRAM = """
import json, sys
from tests.plugins.launch import launch_interface as lf

path, steps, attributes, addresses, workspace = json.loads(sys.argv[1])
library, handles, outcomes = lf.open_library(path), {}, []
shape = lf.Shape(lf.DTYPES["bfloat16"], 12, 128, 3, 18)
for step, name in steps:
    try:
        if step == "create attention":
            handles[name] = lf.Operator(library, "attention", lf.attention_attributes(attributes))
        elif step == "create prepare":
            handles[name] = lf.Operator(library, "prepare", lf.PrepareAttributes(12, 1560, 64, 64, 1e-6))
        elif step == "load":
            handles[name].load()
        elif step == "enqueue":
            size = handles[name].workspace(shape)
            handles[name].enqueue(shape, lf.AttentionBuffers(**addresses), workspace, size, 99)
        elif step == "enqueue prepare":
            buffers = {field: 16 * i for i, (field, _) in enumerate(lf.PrepareBuffers._fields_, 1)}
            handles[name].enqueue(shape, lf.PrepareBuffers(**buffers), 99)
        else:
            handles[name].close()
        outcomes.append("ok")
    except lf.LaunchError as error:
        outcomes.append(error.args)
    with open(sys.argv[2], "a") as log:
        print("=", step, name, file=log)
print(json.dumps(outcomes))
"""


def run(
    library: Path, folder: Path, steps: Sequence[tuple[str, str]], capability: int = 90, **environment: str
) -> tuple[list[Any], list[list[str]]]:
    """The outcome of each step, and what the driver was asked in it."""
    log = folder / "log"
    log.write_text("")
    arguments = json.dumps([str(library), steps, ATTRIBUTES, ADDRESSES, WORKSPACE])
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, arguments, str(log)],
        cwd=ROOT,
        env={
            **os.environ,
            "LD_LIBRARY_PATH": str(library.parent),
            "STAND_IN_LOG": str(log),
            "STAND_IN_CAPABILITY": str(capability),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    asked: list[list[str]] = [[]]
    for line in log.read_text().splitlines():
        if line.startswith("="):
            asked.append([])
        else:
            asked[-1].append(line.strip())
    return json.loads(result.stdout), asked[:-1]


def functions(lines: list[str]) -> list[str]:
    return [line.split()[0] for line in lines]


def subjects(lines: list[str], function: str) -> set[str]:
    return {line.split()[1] for line in lines if line.startswith(function + " ")}


def test_life_of_attention(library: Path, kernels: Path, tmp_path: Path) -> None:
    names = ("create attention", "load", "load", "enqueue", "enqueue", "destroy")
    outcomes, asked = run(library, tmp_path, [(name, "a") for name in names])
    assert outcomes == ["ok"] * 6
    create, load, again, enqueue, repeated, destroy = asked
    assert create == []
    assert again == []

    assert functions(load)[0] == "cuInit"
    assert subjects(load, "cuLibraryLoadData") == ATTENTION_IMAGES
    assert subjects(load, "cuFuncLoad") == ATTENTION_IMAGES, "left to the first launch, which may be captured"
    large = {line for line in load if line.startswith("cuKernelSetAttribute")}
    sizes = {name: 3 * 1024 * len(name) for name in ATTENTION_IMAGES if name.startswith("attend")}
    assert large == {
        f"cuKernelSetAttribute {name} attribute 8 value {size} device 3" for name, size in sizes.items()
    }
    table = ["cuMemAlloc 12", "cuMemcpyHtoD 12 first 1048576", "cuStreamSynchronize 0"]
    assert load[-3:] == table

    assert functions(enqueue) == ["cuLaunchKernel"] * 3, "an enqueue launches and does nothing else"
    assert enqueue == repeated
    launched = [re.fullmatch(r"cuLaunchKernel (\S+) (.*) arguments (.*)", line) for line in enqueue]
    problem = {
        **{key: ATTRIBUTES[key] for key in ("frame_tokens", "block_q", "block_k")},
        "dtype": "bfloat16",
    }
    problem |= {"heads": 12, "head_dim": 128, "chunk_frames": 3, "past_frames": 18}
    buffers = dict(ADDRESSES)
    buffers |= {"scores": WORKSPACE, "lists": WORKSPACE + 4 * ENTRIES, "counts": WORKSPACE + 8 * ENTRIES}
    options = {key: ATTRIBUTES[key] for key in ("keep_frames", "sink_frames", "near_frames", "scale")}
    images = reader.KernelLibrary.load(kernels, (9, 0))
    for kernel, found in zip(("score", "select", "attend"), launched, strict=True):
        assert found is not None
        values = found[3].split()
        names_of = [
            argument.name for argument in images.serving(kernel, reader.KernelProblem(**problem)).arguments
        ]
        if kernel == "select":
            buffers["keep_q20"] = int(values[names_of.index("keep_q20")])  # wherever it was allocated
        plan = images.plan(kernel, reader.KernelProblem(**problem), buffers, {**options, "table_entries": 3})
        grid = " ".join(str(axis) for axis in plan.grid)
        shared = plan.image.shared_memory
        assert found[1] == plan.image.name
        assert found[2] == f"grid {grid} block {plan.image.threads} 1 1 shared {shared} stream 99 extra 0"
        wanted = [int(v) if isinstance(v, np.uint64) else int(v.view(np.uint32)) for v in plan.values]
        assert [int(value) for value in values] == wanted

    assert functions(destroy)[:3] == ["cuCtxPushCurrent", "cuMemFree", "cuCtxPopCurrent"]
    assert subjects(destroy, "cuLibraryUnload") == ATTENTION_IMAGES


def test_layers_share_one_copy_of_each_image(library: Path, tmp_path: Path) -> None:
    steps = [("create attention", "a"), ("create attention", "b"), ("load", "a"), ("load", "b")]
    steps += [("destroy", "a"), ("enqueue", "b"), ("destroy", "b")]
    outcomes, asked = run(library, tmp_path, steps)
    assert outcomes == ["ok"] * 7
    assert len(subjects(asked[2], "cuLibraryLoadData")) == 8
    assert not subjects(asked[3], "cuLibraryLoadData")
    assert not subjects(asked[4], "cuLibraryUnload")
    assert subjects(asked[6], "cuLibraryUnload") == ATTENTION_IMAGES


def test_life_of_prepare(library: Path, tmp_path: Path) -> None:
    steps = [(name, "p") for name in ("create prepare", "load", "enqueue prepare", "destroy")]
    outcomes, asked = run(library, tmp_path, steps)
    # The shape of the program has past frames; QKPrepare does not look at them.
    assert outcomes == ["ok"] * 4
    loaded = {f"prepare-{t}-{d}" for t in ("bf16", "fp16") for d in ("d64", "d128")}
    assert subjects(asked[1], "cuLibraryLoadData") == loaded
    assert "cuMemAlloc" not in functions(asked[1])
    assert asked[2][0].startswith("cuLaunchKernel prepare-bf16-d128 grid 75 3 1 block 256 1 1")
    assert len(asked[2]) == 1
    assert len(subjects(asked[3], "cuLibraryUnload")) == len(loaded)


LIFE = [(name, "a") for name in ("create attention", "load", "enqueue", "destroy")]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("cuLibraryLoadData", "cannot load kernel image"),
        ("cuLibraryGetKernel", "cannot load kernel image"),
        ("cuKernelGetFunction", "into the current context"),
        ("cuFuncLoad", "into the current context"),
        ("cuKernelSetAttribute", "bytes of shared memory"),
        ("cuMemAlloc", "cannot allocate device memory for the table"),
        ("cuMemcpyHtoD", "cannot copy the table"),
        ("cuStreamSynchronize", "cannot copy the table"),
        ("cuLaunchKernel", "cannot launch kernel score-d128"),
    ],
)
def test_failures_name_what_failed_and_leave_nothing_behind(
    library: Path, tmp_path: Path, function: str, message: str
) -> None:
    outcomes, asked = run(library, tmp_path, LIFE, STAND_IN_FAIL=function)
    status, text = outcomes[2 if function == "cuLaunchKernel" else 1]
    assert status == lf.CUDA_FAILURE
    assert message in text
    assert "CUDA_ERROR_OUT_OF_MEMORY (out of memory)" in text
    everything = functions([line for lines in asked for line in lines])
    loaded = 0 if function == "cuLibraryLoadData" else everything.count("cuLibraryLoadData")
    assert everything.count("cuLibraryUnload") == loaded
    assert everything.count("cuMemFree") == (
        0 if function == "cuMemAlloc" else everything.count("cuMemAlloc")
    )
    if function != "cuLaunchKernel":
        assert outcomes[2][0] == lf.NOT_LOADED


def test_device_decides_over_the_images(library: Path, tmp_path: Path) -> None:
    outcomes, asked = run(library, tmp_path, LIFE, capability=87)
    assert outcomes == ["ok"] * 4
    assert all(line.endswith("sm_86") for line in asked[1] if line.startswith("cuLibraryLoadData"))
    outcomes, _ = run(library, tmp_path, LIFE, capability=121)
    assert outcomes[1][0] == lf.NOT_SERVED
    assert "holds kernels for sm_86, sm_90a; the device has compute capability 12.1" in outcomes[1][1]


def test_states_without_a_device_are_explained(library: Path, tmp_path: Path) -> None:
    outcomes, _ = run(library, tmp_path, LIFE, STAND_IN_NO_CONTEXT="1")
    assert outcomes[1] == [
        lf.INVALID_ARGUMENT,
        "no CUDA context is current in this thread; select a device first (cudaSetDevice or cuCtxSetCurrent)",
    ]
    outcomes, asked = run(library, tmp_path, [*LIFE[:2], *LIFE[1:]], STAND_IN_FAIL="cuInit")
    assert outcomes[1][0] == lf.NO_DRIVER
    assert "does not start: CUDA_ERROR_OUT_OF_MEMORY" in outcomes[1][1]
    assert functions(asked[2]) == ["cuInit"], "a driver that did not start is asked again"
