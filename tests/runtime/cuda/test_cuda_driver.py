"""The driver and the launcher through the real cuda.bindings and cuda.core, on a driver made of host memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runtime.bundle import file_entry
from tests.runtime.device_bundles import build_device_bundle, write_kernels
from tests.runtime.handmade import edit_manifest

pytest.importorskip("cuda.core", exc_type=ImportError)
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler (cc)")

ROOT = Path(__file__).parents[3]

SHARED = 100_000
"""Bytes of shared memory of the stand-in's kernel: more than a kernel gets unasked."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for LD_LIBRARY_PATH."""
    folder = tmp_path_factory.mktemp("driver")
    source = ROOT / "tests" / "driver" / "host_memory_cuda.c"
    command = ["cc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", str(source), "-ldl"]
    subprocess.run([*command, "-o", str(folder / "libcuda.so.1")], check=True)
    return folder


def run(library: Path, program: str) -> None:
    """Run a program in a process that finds the stand-in where it looks for the driver."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(library)}
    result = subprocess.run(
        [sys.executable, "-c", PRELUDE + program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr


PRELUDE = """
import ctypes
import threading
import numpy as np
from runtime.cuda.driver import CudaDriver, RowCopy, free_memory, host_bytes
from runtime.errors import EngineError
from runtime.bundle.dtypes import numpy_dtype

driver = CudaDriver()
one, two = driver.create_stream(), driver.create_stream()
event = driver.create_event()
device, pinned = driver.alloc(4096), driver.alloc_pinned(4096)
memory, on_device = host_bytes(pinned, 4096), host_bytes(device, 4096)

def refused(call, *arguments):
    try:
        call(*arguments)
    except EngineError as error:
        return str(error)
    raise AssertionError("not refused")
"""


def test_every_call_is_made_as_the_driver_takes_it(library: Path) -> None:
    run(
        library,
        """
assert driver.capability == (9, 0) and driver.dlpack_device == (2, 0)
assert driver.memory() == (1000, 2000) and free_memory() == 1000
assert device % 256 == 0
memory[:] = np.arange(4096, dtype=np.uint8)
driver.zero(device, 4096, one)
driver.copy(device, pinned, 1024, one)
driver.record(event, one)
driver.wait(two, event)
assert driver.is_done(event)
driver.sync_event(event)
driver.copy_rows(RowCopy(device + 2048, 8, device, 32, 8, 4), two)
driver.sync(two)
assert np.array_equal(on_device[:1024], memory[:1024]) and not on_device[1024:2048].any()
assert np.array_equal(on_device[2048:2080].reshape(4, 8), memory[:128].reshape(4, 32)[:, :8])
assert "cuMemAlloc failed" in refused(driver.alloc, 1 << 50)
driver.free(device)
driver.free_pinned(pinned)
driver.destroy([one, two], [event])
""",
    )


def test_a_capture_is_replayed_and_a_spoiled_one_says_why(library: Path) -> None:
    run(
        library,
        """
memory[:] = 7
graph = driver.capture(lambda: driver.copy(device, pinned, 16, one), one)
driver.zero(device, 4096, one)
graph.launch(two)
assert (on_device[:16] == 7).all() and not on_device[16:].any()
assert ctypes.CDLL("libcuda.so.1").late_uploads() == 0, "the first launch allocates"
graph.close()
assert "cuMemAlloc failed" in refused(driver.capture, lambda: driver.alloc(16), one)
try:
    driver.capture(lambda: 1 / 0, one)
except ZeroDivisionError:
    pass
driver.sync(one)
""",
    )


def test_a_thread_enters_the_device_before_it_uses_it(library: Path) -> None:
    run(
        library,
        """
said = []

def work():
    said.append(refused(driver.zero, device, 16, one))
    driver.enter()
    driver.zero(device, 16, one)
    said.append("done")

thread = threading.Thread(target=work)
thread.start()
thread.join()
assert "cuMemsetD8Async failed" in said[0] and said[1:] == ["done"], said
""",
    )


def test_a_thread_that_turned_to_another_device_comes_back(library: Path) -> None:
    """As a product's thread does that calls the pipeline and works with a second GPU in turns."""
    run(
        library,
        """
from cuda.bindings import driver as cuda

driver.enter()
for _ in range(2):
    cuda.cuCtxSetCurrent(0)
    assert "cuMemsetD8Async failed" in refused(driver.zero, device, 16, one)
    driver.enter()
    driver.zero(device, 16, one)
    assert int(cuda.cuCtxGetCurrent()[1])
""",
    )


def test_a_kernel_gets_its_arguments_and_its_shared_memory(library: Path) -> None:
    run(
        library,
        f"""
from runtime.bundle.images import Argument, GridAxis, Image, ImageSet
from runtime.cuda.kernels import KernelLauncher, cuda_core
from runtime.program.kernels import KernelLibrary, KernelProblem

pointer = dict(type="pointer", source="buffer", element="float32")
image = Image(
    name="scale", kernel="scale", file="scale.cubin", sha256="0" * 64, bytes=1, entry="entry", threads=128,
    shared_memory={SHARED}, grid=(GridAxis(size="heads", tile=4), GridAxis(size="sinks", tile=1), 3),
    arguments=(
        Argument(name="out", **pointer), Argument(name="in", **pointer),
        Argument(name="heads", type="int32", source="size"), Argument(name="eps", type="float32", source="option"),
        Argument(name="one", type="pointer", source="null"), Argument(name="other", type="pointer", source="null"),
    ),
    serves={{}}, limits={{}}, registers=1, stack=0, spill_stores=0, spill_loads=0, source_sha256="0" * 64,
)
index = ImageSet(arch="sm_90", target="sm_90a", driver=525, compiler={{}}, images=(image,))
kernels = KernelLibrary(index, {{"scale": b"code of a kernel"}})
launcher = KernelLauncher(kernels, driver.device)
problem = KernelProblem("float32", 10, 64, 64, 3, 3, 32, 32, sinks=2)
plan = kernels.plan("scale", problem, {{"out": device, "in": device + 2048}}, {{"eps": 0.1}})
floats = on_device.view(np.float32)
floats[512:522] = np.arange(10)
stream = cuda_core().Stream.from_handle(one)
said = refused(driver.capture, lambda: launcher.launch(plan, stream), one)  # loads the image, which a capture forbids
assert "kernel image scale for sm_90a does not load on CUDA device 0" in said, said
launcher.warm_up()
thread = threading.Thread(target=lambda: messages.append(refused(launcher.launch, plan, stream)))
messages = []  # of a thread that has not entered the device
thread.start()
thread.join()
assert "kernel image scale cannot be launched on CUDA device 0" in messages[0]
graph = driver.capture(lambda: launcher.launch(plan, stream), one)
graph.launch(one)
assert np.array_equal(floats[:10], np.arange(10, dtype=np.float32) * np.float32(0.1))
assert list(floats[10:17]) == [3, 2, 3, 128, 1, 1, {SHARED}]
""",
    )


def test_a_bundle_is_loaded_and_rolled_out_through_the_real_bindings(library: Path, tmp_path: Path) -> None:
    """Everything that happens on a GPU but what it computes: every thread enters the device before it calls the driver,
    and no capture holds what a capture must not.
    """
    folder = build_device_bundle(tmp_path / "bundle")
    shutil.rmtree(folder / "kernels")
    names = write_kernels(folder / "kernels", arch=90)

    def edit(raw: dict[str, Any]) -> None:
        raw["target"], raw["kernels"]["arch"] = {"name": "h200", "compute_capability": "9.0"}, "sm_90"
        kept = [entry for entry in raw["files"] if not entry["path"].startswith("kernels/")]
        raw["files"] = kept + [file_entry(folder, name).model_dump() for name in names]

    edit_manifest(folder, edit)
    run(
        library,
        f"""
import sys
from runtime import Pipeline
from runtime.bundle import load_bundle
from runtime.cuda.tensorrt_rtx import cache_file
from tests.runtime.cuda.stand_in_rtx import StandIn

bundle = load_bundle({str(folder)!r})
sys.modules["tensorrt_rtx"] = StandIn(bundle)
text = bundle.manifest.text
embedding = np.zeros((text.text_len, text.dim), dtype=np.float32)
options = dict(sessions=2, text_encoder="external", verify=False, golden=False, memory_limit=1 << 40)
for warmup in (True, False):
    with Pipeline.load({str(folder)!r}, warmup=warmup, **options) as pipe:
        counters = pipe.engine.executor.counters
        with pipe.session(embedding=embedding) as one, pipe.session(embedding=embedding, frames="device") as two:
            before = counters.operations
            streams = one.stream(chunks=4), two.stream(chunks=4)
            for index in range(4):
                for stream in streams:
                    chunk = next(stream)
                    assert chunk.frames.shape == (12 if index else 9, 128, 128, 3)
                one.set_prompt(embedding=embedding, recache="all" if index else "window")
            assert counters.graph_launches > 0 and (counters.operations == before) == warmup
        runner = pipe.engine.component_runner()
        for name, part in bundle.manifest.components.items():
            if name in ("step", "clean"):
                continue
            arrays = {{
                spec.name: np.zeros([6 if dim == "slots" else dim for dim in spec.shape], numpy_dtype(spec.dtype))
                for spec in part.inputs
            }}
            assert set(runner.run(name, arrays)) == {{spec.name for spec in part.outputs}}
        assert ctypes.CDLL("libcuda.so.1").late_uploads() == 0
    assert cache_file(bundle, "Host Memory").is_file()
""",
    )
