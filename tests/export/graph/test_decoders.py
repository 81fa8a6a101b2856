"""The graphs of every kind of decoder in ONNX Runtime, streamed, against the whole clip in PyTorch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export.compare.reference import Reference
from export.graph.components import write_vae
from export.request.geometry import StepPlan
from export.request.targets import load_variant
from export.request.weights import Weights
from lightforcing_ref.config import PRESETS
from lightforcing_ref.decoders.tae import video_decoder
from lightforcing_ref.decoders.vae import to_uint8
from lightforcing_ref.dimensions import TINY_TAE, TAEConfig
from runtime.bundle import load_bundle
from tests.conftest import build

SMALL = TAEConfig(widths=(8, 6, 4, 4), denormalise=True)
HEIGHT, WIDTH = 32, 48


@pytest.mark.parametrize(
    "config", [pytest.param(TINY_TAE, marks=pytest.mark.slow), SMALL], ids=["taehv", "light"]
)
def test_both_graphs_stream_in_onnxruntime(config: TAEConfig, tmp_path: Path) -> None:
    import onnxruntime

    preset = replace(PRESETS["tiny"], vae=config)
    plan = StepPlan.of(preset, load_variant("short"), HEIGHT, WIDTH, block_q=32, block_k=32)
    torch.manual_seed(5)
    decoder = video_decoder(config).eval().requires_grad_(False)
    names = write_vae(tmp_path, decoder, plan)
    latents = torch.randn(4, 16, HEIGHT // 8, WIDTH // 8)
    # Zeros for the frame before the first would be as large as the caches; the graph must make them itself.
    stored = sum((tmp_path / name).stat().st_size for name in names if name.startswith("vae_first"))
    weights = sum(4 * value.numel() for value in decoder.state_dict().values())
    assert stored < 2 * weights + 100_000
    first, later = (
        onnxruntime.InferenceSession(tmp_path / f"{name}.onnx", providers=["CPUExecutionProvider"])
        for name in ("vae_first", "vae_next")
    )
    given = [latents[i : i + 1].transpose(0, 1).contiguous().numpy() for i in range(4)]
    outputs = [value.name for value in first.get_outputs()]
    state = dict(zip(outputs, first.run(None, {"latent": given[0]}), strict=True))
    frames = [state["frames"]]
    for latent in given[1:]:
        caches = {f"cache.{i}": state[f"cache_out.{i}"] for i in range(9)}
        outputs = [value.name for value in later.get_outputs()]
        state = dict(zip(outputs, later.run(None, {"latent": latent, **caches}), strict=True))
        frames.append(state["frames"])
    assert [len(part) for part in frames] == [1, 4, 4, 4]
    expected = to_uint8(decoder.decode(latents)).numpy()
    difference = np.abs(np.concatenate(frames).astype(int) - expected.astype(int))
    assert difference.max() <= 1  # a value beside the middle between two bytes
    assert (difference > 0).mean() < 1e-3
    assert expected.std() > 1, "the decoder's output must say something"


@pytest.mark.slow
def test_a_bundle_with_a_tiny_decoder_is_what_the_reference_computes(tmp_path: Path) -> None:
    from export.compare.against_reference import decoded, play
    from export.compare.trials import SEED

    preset = replace(PRESETS["tiny"], vae=TINY_TAE)
    bundle = load_bundle(build(tmp_path, "short", weights=Weights(preset, seed=0)))
    vae = bundle.manifest.vae
    assert (vae.kind, vae.denormalise, vae.pixel_range) == ("tae", False, (0.0, 1.0))
    assert (vae.widths, len(vae.caches)) == (TINY_TAE.widths, 9)
    onnx.checker.check_model(bundle.path("vae_next.onnx"))
    reference = Reference.of(bundle.manifest)
    assert reference.preset.vae == TINY_TAE
    text = np.zeros((preset.dit.text_len, preset.dit.text_dim), dtype=np.float32)
    frames = play(bundle, 2, embedding=text)
    assert frames.shape == (21, preset.height, preset.width, 3)
    latents = torch.cat(
        list(reference.rollout(bundle.manifest, torch.from_numpy(text), SEED).stream(2)), dim=1
    )
    difference = np.abs(frames.astype(int) - decoded(reference, latents).astype(int))
    assert difference.max() <= 2
