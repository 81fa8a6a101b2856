"""The library of packages on a GPU, as far as it goes with a stand-in for PyTorch's graphs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from runtime.bundle import Bundle, Library, load_bundle
from runtime.cuda.inductor import InductorLibrary
from runtime.errors import EngineError
from tests.runtime.simulated_gpu import SimulatedDriver

torch = pytest.importorskip("torch")

STREAM, EXECUTABLE = 7, 8


class Graph:
    """Stands in for `torch.cuda.CUDAGraph`; `fails_at` names the call that finds the device broken."""

    fails_at = ""
    calls: list[str] = []  # noqa: RUF012

    def _call(self, name: str) -> None:
        Graph.calls.append(name)
        if name == Graph.fails_at:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def capture_begin(self, pool: object, *, capture_error_mode: str) -> None:
        assert (pool, capture_error_mode) == ("pool", "thread_local")
        self._call("begin")

    def capture_end(self) -> None:
        self._call("end")

    def raw_cuda_graph_exec(self) -> int:
        self._call("executable")
        return EXECUTABLE

    def replay(self) -> None:
        self._call("replay")

    def reset(self) -> None:
        self._call("reset")


@pytest.fixture
def library(bundle: Path, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> InductorLibrary:
    changes: dict[str, Any] = {
        "is_available": lambda: True,
        "init": lambda: None,
        "ExternalStream": lambda handle, device: handle,
        "stream": lambda stream: nullcontext(),
        "graph_pool_handle": lambda: "pool",
        "CUDAGraph": Graph,
    }
    for name, value in changes.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(Graph, "fails_at", "")
    monkeypatch.setattr(Graph, "calls", [])
    loaded = load_bundle(bundle)
    manifest = loaded.manifest.model_copy(
        update={"library": Library(name="torch", version=torch.__version__)}
    )
    return InductorLibrary(Bundle(loaded.root, manifest), driver)


@pytest.fixture
def driver() -> Driver:
    return Driver()


class Driver(SimulatedDriver):
    """Notes what is uploaded, among what happens to graphs."""

    def upload(self, executable: int, stream: int) -> None:
        assert executable == EXECUTABLE
        Graph.calls.append("upload")
        if Graph.fails_at == "upload":
            raise EngineError("cuGraphUpload failed")


def test_a_forward_is_recorded_without_collecting_and_replayed(library: InductorLibrary) -> None:
    collected: list[bool] = []
    graph = library.record(lambda: collected.append(gc.isenabled()), STREAM)
    graph.launch(STREAM)
    graph.close()
    assert Graph.calls == ["begin", "end", "executable", "upload", "replay", "reset"]
    assert collected == [False] and gc.isenabled()


@pytest.mark.parametrize("call", ["begin", "end", "replay"])
def test_what_pytorch_refuses_is_an_error_of_the_runtime(
    library: InductorLibrary, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Graph, "fails_at", call)
    with pytest.raises(EngineError, match="operation failed due to a previous error"):
        library.record(lambda: None, STREAM).launch(STREAM)


def test_a_graph_that_cannot_be_uploaded_is_freed(
    library: InductorLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Graph, "fails_at", "upload")
    with pytest.raises(EngineError, match="cuGraphUpload failed"):
        library.record(lambda: None, STREAM)
    assert Graph.calls[-2:] == ["upload", "reset"]


def test_pytorch_has_what_the_stand_in_has() -> None:
    wanted = {name for name in vars(Graph) if not name.startswith("_")} - {"fails_at", "calls"}
    assert wanted <= set(dir(torch.cuda.CUDAGraph)) and "raw_cuda_graph_exec" in wanted


def fail_in_a_component() -> None:
    raise EngineError("component 'layer' failed")


def stop() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("ends", ["", "end"], ids=["the capture ends", "the capture does not end"])
@pytest.mark.parametrize(("work", "error"), [(fail_in_a_component, EngineError), (stop, KeyboardInterrupt)])
def test_a_capture_that_fails_is_ended_and_says_why(
    library: InductorLibrary,
    work: Callable[[], None],
    error: type[BaseException],
    ends: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Graph, "fails_at", ends)
    with pytest.raises(error, match="layer" if error is EngineError else None):
        library.record(work, STREAM)
    assert Graph.calls == (["begin", "end"] if ends else ["begin", "end", "reset"])
    assert gc.isenabled()
