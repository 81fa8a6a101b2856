"""Packages compiled by Inductor on a GPU: built here, verified, rolled out, replayed from CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.compare.reference import Reference
from lightforcing_ref.decoders.vae import to_uint8
from runtime.backends import load_engine
from runtime.bundle import load_bundle
from runtime.cuda.inductor import device_tensor
from runtime.pipeline import Pipeline
from runtime.program.buffers import plan_buffers
from runtime.verify import judge

NO_GPU = "" if torch.cuda.is_available() else "PyTorch finds no CUDA device"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)]

EMBEDDING = np.random.default_rng(4).standard_normal((64, 64), dtype=np.float32)
CHUNKS = 4


@pytest.fixture(scope="module", params=["bf16", "fp8"])
def bundle(request: pytest.FixtureRequest, bundle_named: Callable[[str], Path]) -> Path:
    return bundle_named(f"inductor-{request.param}")


def loaded(path: Path, **options: Any) -> Pipeline:
    """Without verification: whether components compute their golden vectors is a test of its own."""
    return Pipeline.load(path, **{"text_encoder": "external", "verify": False, **options})


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("bfloat16", (3, 8)),
        ("float8_e4m3fn", (4, 16)),
        ("float32", (2, 3, 4)),
        ("int32", ()),
        ("uint8", (5,)),
        ("float16", (1, 8)),
    ],
)
def test_tensors_lie_over_the_memory_they_are_given(dtype: str, shape: tuple[int, ...]) -> None:
    memory = torch.zeros(256, dtype=torch.uint8, device="cuda")
    tensor = device_tensor(memory.data_ptr(), dtype, shape, 0)
    assert (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape)) == (
        memory.data_ptr(),
        getattr(torch, dtype),
        shape,
    )
    tensor.copy_(torch.ones(shape, device="cuda").to(tensor.dtype))
    assert int((memory != 0).sum()) > 0
    assert int((memory[tensor.nbytes :] != 0).sum()) == 0


def test_every_component_computes_its_golden_vectors(bundle: Path) -> None:
    opened = load_bundle(bundle)
    engine = load_engine(opened, plan_buffers(opened.manifest, 1))
    try:
        verdict = judge(opened, engine.component_runner())  # type: ignore[attr-defined]
        assert verdict.passed, verdict.failures()
    finally:
        engine.close()


def test_rollouts_repeat_and_are_isolated_bit_for_bit(bundle: Path) -> None:
    """The first forward of each kind runs one by one, later ones from graphs, and each session has its own."""
    with loaded(bundle, sessions=2) as pipe:
        first = frames(pipe, seed=3)
        assert np.array_equal(first, frames(pipe, seed=3))
        with (
            pipe.session(embedding=EMBEDDING, seed=3) as one,
            pipe.session(embedding=-EMBEDDING, seed=5) as two,
        ):
            pairs = zip(one.stream(chunks=CHUNKS), two.stream(chunks=CHUNKS), strict=True)
            beside = np.concatenate([a.frames for a, _ in pairs])
        assert np.array_equal(first, beside)


def frames(pipe: Pipeline, seed: int) -> np.ndarray:
    with pipe.session(embedding=EMBEDDING, seed=seed) as session:
        return np.concatenate([chunk.frames for chunk in session.stream(chunks=CHUNKS)])


def test_the_rollout_is_near_the_reference(bundle: Path) -> None:
    with loaded(bundle) as pipe, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        manifest, found = pipe.manifest, frames(pipe, seed=3)
    reference = Reference.of(manifest)
    rollout = reference.rollout(manifest, torch.from_numpy(EMBEDDING), 3)
    latents = torch.cat(list(rollout.stream(CHUNKS)), dim=1).transpose(0, 1)
    with torch.no_grad():
        wanted = to_uint8(reference.decoder.decode(latents)).numpy()
    gap = np.abs(found.astype(int) - wanted.astype(int)).mean()
    assert gap < 3, f"frames differ by {gap:.2f} levels on average"


def test_the_first_clip_allocates_nothing(bundle: Path) -> None:
    """Graphs are on the device when loading ends; a first launch would put them there, and allocate."""
    with loaded(bundle) as pipe:
        before = torch.cuda.mem_get_info()[0]
        frames(pipe, seed=3)
        assert before - torch.cuda.mem_get_info()[0] <= 2 << 20


def test_a_chunk_waits_for_its_frames_and_for_nothing_else(bundle: Path) -> None:
    with (
        loaded(bundle) as pipe,
        pipe.session(embedding=EMBEDDING, seed=0) as session,
    ):
        counters = pipe._engine.executor.counters  # type: ignore[attr-defined]
        stream = session.stream(chunks=CHUNKS)
        next(stream)
        waits, launches = counters.waits, counters.graph_launches
        rest = list(stream)
        # Three fetched pieces of video a chunk; the first chunk's last ones may be counted here.
        assert counters.waits - waits <= 3 * (len(rest) + 1)
        assert counters.graph_launches > launches
