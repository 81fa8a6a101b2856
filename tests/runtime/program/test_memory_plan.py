from __future__ import annotations

from pathlib import Path

import pytest

from runtime import BundleError, CapacityError, EngineError, InputError, Pipeline
from runtime.bundle import Manifest, load_bundle
from runtime.host.executor import HostExecutor
from runtime.program.buffers import check_memory, plan_buffers
from runtime.program.builder import build_program
from runtime.verify.verdict import gpu_problem
from tests.runtime import device_bundles as device
from tests.runtime.conftest import MakeBundle

FLOAT = 4
LATENT = 2 * 3 * 4 * 4 * FLOAT
SLOT = 2 * (2 * 4 * 8 + 8) * FLOAT  # per layer: keys and values of 4 tokens of 8, one block mean


def test_sizes_added_up_by_hand(bundle: Path) -> None:
    """Window 8, one window-relative sink: 5 slots, latents of 1 + 3 + 2 chunks."""
    manifest = load_bundle(bundle).manifest
    one, three = plan_buffers(manifest, 1), plan_buffers(manifest, 3)
    cross = 2 * 2 * 6 * 8 * FLOAT
    decoder = 2 * (2 * 2 * 16 + 2 * 16) * FLOAT
    sink_copy = 2 * (4 * 8 + 8) * FLOAT
    assert one.session_bytes == 5 * SLOT + 6 * LATENT + cross + decoder + sink_copy
    assert three.session_bytes == one.session_bytes
    assert three.total_bytes - one.total_bytes == 2 * one.session_bytes
    staging = 2 * (2 * 12 * 8 + 3 * 8) * FLOAT  # k, v and means of both layers
    tables = 2 * 12 * 4 * FLOAT + 5 * 4 + 4
    pixels = (1 + 4) * 32 * 32 * 3
    shared = 10 * LATENT + staging + tables + 6 * 8 * FLOAT + 2 * 16 * FLOAT + pixels
    fed = (
        5 * 4 + 3 * 4 + 4 + 2 * 2 * FLOAT
    )  # steps, slots to commit to, the sink's slot, two cosines and sines
    assert one.total_bytes - one.session_bytes == shared + fed


@pytest.mark.parametrize("options", [{}, {"sink_positions": "absolute"}], ids=str)
def test_the_host_allocates_what_was_planned(make_bundle: MakeBundle, options: dict[str, object]) -> None:
    assert (
        allocated(make_bundle(**options), 3)
        == plan_buffers(load_bundle(make_bundle(**options)).manifest, 3).total_bytes
    )


def allocated(path: Path, sessions: int) -> int:
    """Bytes of the arrays that an executor on the host makes."""
    bundle = load_bundle(path)
    executor = HostExecutor(bundle, build_program(bundle, plan_buffers(bundle.manifest, sessions)), threads=1)
    return sum(array.nbytes for arrays in executor._arrays for array in arrays.values())


def test_absolute_sinks_need_no_copies(make_bundle: MakeBundle) -> None:
    plan = plan_buffers(load_bundle(make_bundle(sink_positions="absolute")).manifest, 1)
    assert not [buffer for buffer in plan.session if buffer.name.startswith("sink_")]


def edited(manifest: Manifest, component: str, **changes: object) -> Manifest:
    parts = dict(manifest.components)
    parts[component] = parts[component].model_copy(update=changes)
    return manifest.model_copy(update={"components": parts})


def test_missing_tensor_and_unknown_dimension_are_named(bundle: Path) -> None:
    manifest = load_bundle(bundle).manifest
    step = manifest.components["step"]
    without = edited(manifest, "step", inputs=tuple(spec for spec in step.inputs if spec.name != "rope_cos"))
    with pytest.raises(BundleError, match=r"component 'step\.onnx' has no tensor 'rope_cos'"):
        plan_buffers(without, 1)
    strange = tuple(
        spec.model_copy(update={"shape": ("batch", 4, 1, 8)}) if spec.name == "past_k.1" else spec
        for spec in step.inputs
    )
    with pytest.raises(BundleError, match=r"tensor 'past_k\.1' has the symbolic dimension 'batch'"):
        plan_buffers(edited(manifest, "step", inputs=strange), 1)


def test_engines_for_one_rollout_refuse_several_sessions(bundle: Path) -> None:
    manifest = load_bundle(bundle).manifest
    past = manifest.cache.max_past_frames
    fixed = tuple(
        spec.model_copy(update={"shape": (past, *spec.shape[1:])}) if spec.name.startswith("past_") else spec
        for spec in manifest.components["step"].inputs
    )
    one_rollout = edited(manifest, "step", inputs=fixed)
    assert plan_buffers(one_rollout, 1) == plan_buffers(manifest, 1)
    with pytest.raises(
        InputError, match=rf"{past} frame slots.*2 sessions need {2 * past}; load one session"
    ):
        plan_buffers(one_rollout, 2)


def test_a_gpu_needs_work_buffers_and_activation_memory(tmp_path: Path) -> None:
    bundle = load_bundle(device.build_device_bundle(tmp_path / "bundle"))
    plan = plan_buffers(bundle.manifest, 2)
    work = {buffer.name: buffer.nbytes for buffer in plan.work}
    # One piece for all components that take turns, one for the decoder, one for the text encoder.
    scratch = {name: size for name, size in work.items() if name.startswith("scratch.")}
    assert scratch == {"scratch.forward": 1 << 16, "scratch.decode": 1 << 14, "scratch.text": 1 << 13}
    assert work["residual.0"] == work["residual.1"] == work["attention_out"] == 192 * 128 * 2
    lists = (
        2 * (3 * 2) * (9 * 2) * 4
    )  # heads, query blocks, key blocks of 6 past and 3 present frames, 4 bytes
    assert work["scores"] == work["lists"] == lists
    weights = sum(entry.bytes for entry in bundle.manifest.files if entry.path != "text.safetensors")
    needed = weights + plan.total_bytes
    check_memory(bundle, plan, needed)
    with pytest.raises(CapacityError, match="2 session") as caught:
        check_memory(bundle, plan, needed - 1)
    assert caught.value.needed == needed
    arena = build_program(bundle, plan).arena_bytes
    stored = (bundle.root / "transformer.safetensors").stat().st_size
    assert abs(arena - plan.total_bytes - stored) < 256 * 200  # but for alignment and the file's header


def test_a_gpu_bundle_is_refused_where_there_is_no_gpu(tmp_path: Path) -> None:
    pytest.importorskip("cuda.core", exc_type=ImportError)
    if gpu_problem() is None:
        pytest.skip("there is a GPU")
    path = device.build_device_bundle(tmp_path / "bundle")
    with pytest.raises(EngineError, match=r"was built for .*, and no CUDA device 0 can be used here"):
        Pipeline.load(path)
    for limit in (None, 1 << 40):  # asked for free memory, or for the engine only
        with pytest.raises(EngineError, match="no CUDA device 3 can be used here"):
            Pipeline.load(path, device=3, verify=False, golden=False, memory_limit=limit)
