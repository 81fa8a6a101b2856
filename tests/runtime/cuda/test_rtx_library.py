"""TensorRT-RTX engines in the CUDA executor, with a stand-in for the library: memory, captures, compiled kernels."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from runtime import files
from runtime.bundle import Bundle, load_bundle
from runtime.bundle.files import Identity
from runtime.bundle.weights_file import WeightsFile
from runtime.cuda.engine import CudaEngine, constants
from runtime.cuda.executor import CudaExecutor
from runtime.cuda.tensorrt_rtx import TensorRtRtxLibrary, cache_file
from runtime.errors import EngineError
from runtime.program.buffers import plan_buffers
from runtime.program.builder import build_program
from runtime.program.program import KernelLaunch
from tests.runtime.cuda.stand_in_rtx import StandIn
from tests.runtime.device_bundles import build_device_bundle
from tests.runtime.handmade import relist
from tests.runtime.simulated_gpu import SimulatedDriver

GPU = "NVIDIA GeForce RTX 5090"
RUN_AT_LOAD = {"first", "layer", "last", "conditioner", "vae_first", "vae_next"}

Load = Callable[..., CudaEngine]


@pytest.fixture
def loaded(tmp_path: Path) -> Bundle:
    return load_bundle(build_device_bundle(tmp_path / "bundle"))


@pytest.fixture
def module(loaded: Bundle, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return replaced(loaded, monkeypatch)


def replaced(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """A new process, as it were: with the module, nothing is remembered."""
    module = StandIn(bundle, SimulatedDriver())
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)  # type: ignore[arg-type]
    return module


def no_kernel(launch: KernelLaunch, addresses: Mapping[str, int], stream: int) -> None:
    pass


def load(module: StandIn) -> CudaEngine:
    bundle, driver = module.bundle, module.driver
    segments = bundle.manifest.segments
    assert segments is not None
    program = build_program(bundle, plan_buffers(bundle.manifest, 1))
    with WeightsFile(bundle.path(segments.weights)) as weights:
        fed = constants(bundle.manifest, weights)
        library = TensorRtRtxLibrary(bundle, driver, GPU)
        executor = CudaExecutor(program, driver, library, no_kernel, fed)
    return CudaEngine(bundle, program, driver, executor)


def kept(bundle: Bundle) -> set[str]:
    return set(json.loads(files.kept(cache_file(bundle, GPU)) or b"[]"))


def test_everything_is_compiled_before_it_is_recorded_and_kept_by_then(
    loaded: Bundle, module: StandIn
) -> None:
    """The memory that engines are given, and addresses, are held to the library's rules by the stand-in."""
    engine = load(module)
    assert not cache_file(loaded, GPU).exists()
    engine.warmup()
    assert module.driver.captures > 0
    assert set(module.compiled) == kept(loaded) == RUN_AT_LOAD, "what is killed after loading loses nothing"
    engine.close()
    assert not module.driver._memory


def test_what_runs_after_loading_is_kept_at_the_end(loaded: Bundle, module: StandIn) -> None:
    engine = load(module)
    engine.executor.run(0, "encode_text_layer")
    assert not cache_file(loaded, GPU).exists()
    engine.close()
    assert kept(loaded) == {"text_encoder"}


def test_the_next_process_compiles_nothing_and_writes_nothing(
    loaded: Bundle, module: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(module)
    engine.warmup()
    engine.close()
    written = Identity.of(cache_file(loaded, GPU).stat())
    again = replaced(loaded, monkeypatch)
    engine = load(again)
    engine.warmup()
    engine.close()
    assert again.compiled == []
    assert Identity.of(cache_file(loaded, GPU).stat()) == written
    assert [path.name for path in loaded.root.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("damage", ["cut", "bit", "none of ours"])
def test_a_damaged_cache_is_never_read_and_is_mended(
    loaded: Bundle, module: StandIn, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    engine = load(module)
    engine.warmup()
    engine.close()
    good = cache_file(loaded, GPU).read_bytes()
    bad = {"cut": good[:-1], "bit": good[:-1] + bytes([good[-1] ^ 1]), "none of ours": b'["layer"]'}[damage]
    cache_file(loaded, GPU).write_bytes(bad)
    again = replaced(loaded, monkeypatch)
    engine = load(again)
    engine.warmup()
    engine.close()
    assert set(again.compiled) == RUN_AT_LOAD
    assert cache_file(loaded, GPU).read_bytes() == good


def test_kernels_of_another_machine_are_compiled_anew(loaded: Bundle, module: StandIn) -> None:
    files.keep(cache_file(loaded, GPU), b"\x00 compiled elsewhere")
    engine = load(module)
    engine.warmup()
    engine.close()
    assert set(module.compiled) == kept(loaded) == RUN_AT_LOAD


@pytest.mark.parametrize("why", ["nothing is serialized", "the folder cannot be written"])
def test_kernels_that_cannot_be_kept_are_no_error(
    loaded: Bundle, module: StandIn, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "nothing is serialized":
        module.serializes = False
    else:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        monkeypatch.setattr("os.access", lambda path, mode: False)
    engine = load(module)
    engine.warmup()
    engine.close()
    assert not cache_file(loaded, GPU).exists()
    assert not module.driver._memory


def test_an_engine_that_wants_more_memory_than_promised_is_refused(module: StandIn) -> None:
    module.greed = 1
    with pytest.raises(EngineError, match=r"wants [\d,]+ bytes of activation memory, the manifest promises"):
        load(module)
    assert not module.driver._memory


def test_an_engine_that_does_not_load_is_named(loaded: Bundle, module: StandIn) -> None:
    (loaded.root / "layer.engine").write_bytes(b"of another GPU")
    module.bundle = load_bundle(relist(loaded.root, "layer.engine"))
    with pytest.raises(EngineError, match=r"component 'layer' does not load in TensorRT-RTX 1\.7\.1\.116"):
        load(module)
    assert not module.driver._memory
