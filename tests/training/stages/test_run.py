"""Stages: they learn, resume exactly, compute what the reference computes, and hand their weights on."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightforcing_ref.cache import CachedAttention
from lightforcing_ref.checkpoint import (
    load_dit_state,
    load_umt5_state,
    load_vae_encoder_state,
    load_vae_state,
)
from lightforcing_ref.config import PRESETS
from lightforcing_ref.decoders.vae import VAEDecoder
from lightforcing_ref.model import CausalWanModel
from lightforcing_ref.rollout import Rollout
from lightforcing_ref.rope import rope_tables
from lightforcing_ref.schedule import FlowSchedule
from lightforcing_ref.sparsity import SparsityTable
from training.attention import causal_layout, forcing_layout
from training.cli import main
from training.config import CONFIGS, STAGES, Run, StageConfig, TrainingConfig
from training.data.dataset import ClipSet, build_latents
from training.data.latents import PatchPCA
from training.device import load_weights
from training.forward import BatchRollout, predict_flow, window_core
from training.optim import MuonAdam, orthogonalise
from training.runner import Stage, progress_factor, run_stage
from training.ship import adopt
from training.stages.decoder import use_planar_convolutions
from training.stages.dit import SPARSITY_BASE, SPARSITY_TARGET, attention_spec
from training.stages.qat import QATStage
from training.stages.run import DECODERS, PRESET, StageError, run
from training.stages.sharpen import SharpenStage
from training.stages.text import CaptionEncoder

GRID = (8, 8)
OPTIMISED = tuple(stage for stage in STAGES if stage not in ("latents", "encoder"))


class Regression(Stage):
    """A stage small enough to take many steps."""

    name = "regression"

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3))

    def loss(self, generator: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        x = torch.from_numpy(generator.normal(size=(32, 6)).astype(np.float32))
        target = torch.stack([x[:, 0] * x[:, 1], x[:, 2], x[:, 3].abs()], 1) + 0.01 * torch.randn(32, 3)
        return (self.module(x) - target).square().mean(), {"batch": 32.0}


def settings(**changes: float) -> StageConfig:
    return StageConfig(**{"steps": 60, "minutes": 5, "lr": 0.02, "adam_lr": 0.01, "warmup": 3} | changes)


def curve(folder: Path) -> list[float]:
    with (folder / "curve.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_a_stage_learns_and_writes_its_curve(tmp_path: Path) -> None:
    assert run_stage(Regression(), settings(), tmp_path, seed=0) == 60
    losses = curve(tmp_path)
    assert len(losses) == 60
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])


def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    class Killed(Regression):
        def loss(self, generator: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 11:
                raise KeyboardInterrupt
            return super().loss(generator)

    config = settings(steps=30, decay=0.0)
    run_stage(Regression(), config, tmp_path / "whole", seed=1)
    run_stage(Regression(), config.model_copy(update={"steps": 12}), tmp_path / "parts", seed=1)
    with pytest.raises(KeyboardInterrupt):  # ten steps after the checkpoint, all of them lost
        run_stage(Killed(), config, tmp_path / "parts", seed=1)
    run_stage(Regression(), config, tmp_path / "parts", seed=1)
    whole, parts = (
        torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "parts")
    )
    assert whole["step"] == parts["step"] == 30
    for name, value in whole["average"].items():
        torch.testing.assert_close(parts["average"][name], value, rtol=0, atol=0)
    assert curve(tmp_path / "whole") == curve(tmp_path / "parts")


def test_the_step_size_follows_steps_and_wall_time() -> None:
    config = settings(steps=100, minutes=1, warmup=9, decay=0.25)
    assert progress_factor(config, 0, 0) == pytest.approx(0.1)
    assert progress_factor(config, 50, 1) == 1
    assert progress_factor(config, 50, 52.5) == pytest.approx(0.5)
    assert progress_factor(config, 100, 1) == 0


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((2, 8, 32), (2, 32, 8), (1, 16, 16)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.3 and values.max() < 1.4


def test_optimizer_keeps_vectors_and_named_layers_for_adam() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = MuonAdam(model, lr=1, adam_lr=1, adam_only=("1.",))
    muon = next(group for group in optimizer.param_groups if group["is_muon"])
    assert [p.shape for p in muon["params"]] == [(4, 4)]


@pytest.fixture(scope="module")
def model() -> CausalWanModel:
    torch.manual_seed(0)
    return CausalWanModel(PRESET.dit)


@pytest.fixture(scope="module")
def text() -> Tensor:
    return torch.randn(
        2, PRESET.dit.text_len, PRESET.dit.text_dim, generator=torch.Generator().manual_seed(1)
    )


@pytest.mark.parametrize("is_sparse", [False, True])
def test_batched_rollouts_are_the_references(model: CausalWanModel, text: Tensor, is_sparse: bool) -> None:
    table = SparsityTable.chunk_aware(SPARSITY_TARGET, SPARSITY_BASE) if is_sparse else SparsityTable.dense()
    spec = attention_spec(PRESET, table)
    draws = torch.randn(2, 4, 16, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    chunks = 2
    expected = []
    for index in range(2):
        rollout = Rollout(
            model, spec, text[index], lambda chunk, step, i=index: draws[chunk, step] * (1 + i), GRID
        )
        expected.append(torch.cat(list(rollout.stream(chunks)), 1))
    batch = BatchRollout(model, text, GRID, spec if is_sparse else None)
    for chunk in range(chunks):
        noise = iter(draws[chunk])
        x0 = batch.few_steps(lambda noise=noise: torch.stack([(n := next(noise)), 2 * n]))
        batch.commit(x0)
        wanted = torch.stack(expected)[:, :, 3 * chunk : 3 * chunk + 3]
        assert (x0 - wanted).norm() < 2e-3 * wanted.norm()


def test_batched_rollouts_of_single_frames_are_the_references(model: CausalWanModel, text: Tensor) -> None:
    schedule = FlowSchedule.warped((1000, 500), first_steps=(1000, 750, 250), chunk_frames=1)
    draws = torch.randn(3, 3, 16, 1, 16, 16, generator=torch.Generator().manual_seed(5))
    rollout = Rollout(
        model,
        attention_spec(PRESET, SparsityTable.dense()),
        text[0],
        lambda chunk, step: draws[chunk, step],
        GRID,
        schedule=schedule,
    )
    batch = BatchRollout(model, text[:1], GRID, schedule=schedule)
    for chunk, expected in enumerate(rollout.stream(3)):
        noise = iter(draws[chunk])
        x0 = batch.few_steps(lambda noise=noise: next(noise)[None])
        batch.commit(x0)
        assert (x0[0] - expected).norm() < 2e-3 * expected.norm()


def test_a_window_computes_what_the_cache_computes(model: CausalWanModel, text: Tensor) -> None:
    torch.manual_seed(3)
    clean, noisy = torch.randn(2, 16, 3, 16, 16), torch.randn(2, 16, 6, 16, 16)
    cross = model.embed_text(text)
    t = torch.tensor([[0.0] * 3 + [700.0] * 3 + [300.0] * 3] * 2)
    with torch.no_grad():
        flow = predict_flow(
            model, torch.cat([clean, noisy], 2), t, cross, window_core(model, forcing_layout([0, 1]), GRID)
        )
        rollout = BatchRollout(model, text, GRID)
        first, _ = rollout.flow(noisy[:, :, :3], 0.7)
        rollout.commit(clean)
        second, _ = rollout.flow(noisy[:, :, 3:], 0.3)
    torch.testing.assert_close(flow[:, :, 3:], torch.cat([first, second], 2), rtol=1e-3, atol=1e-4)


def test_a_later_window_has_no_target_without_a_past() -> None:
    layout = forcing_layout([4, 5, 6])
    assert [(segment.chunk, segment.context) for segment in layout] == [
        (4, ()), (5, (0,)), (5, (0,)), (6, (0, 1)),
    ]  # fmt: skip
    assert [segment.chunk for segment in forcing_layout([0, 1, 2])] == [0, 1, 0, 1, 2]


def test_training_forward_is_the_models(model: CausalWanModel, text: Tensor) -> None:
    x, t = torch.randn(2, 16, 3, 16, 16), torch.tensor([[100.0, 500.0, 0.0]] * 2)
    core = window_core(model, causal_layout([4]), GRID)
    cross = model.embed_text(text)
    with torch.no_grad():
        torch.testing.assert_close(predict_flow(model, x, t, cross, core), model(x, t, cross, core))
        cos, sin = rope_tables(torch.arange(12, 15), GRID, 64)
        spec = attention_spec(PRESET, SparsityTable.dense())
        empty = torch.zeros(0, 64, 2, 64)
        past = [(empty, empty, torch.zeros(0, 2, 2, 64))] * PRESET.dit.layers
        cached = CachedAttention(spec, cos, sin, past, torch.zeros(0, dtype=torch.int32), 0)
        one = model(x[:1], t[:1], [(k[:1], v[:1]) for k, v in cross], cached)
        torch.testing.assert_close(predict_flow(model, x, t, cross, core)[:1], one, rtol=1e-3, atol=1e-4)


def test_planar_convolutions_decode_the_same_video() -> None:
    torch.manual_seed(0)
    plain = VAEDecoder(PRESETS["tiny"].vae)
    planar = VAEDecoder(PRESETS["tiny"].vae)
    planar.load_state_dict(plain.state_dict())
    use_planar_convolutions(planar)
    latents = torch.randn(3, 16, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(planar.decode(latents), plain.decode(latents), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingConfig, Run]:
    """A run in which every stage took one step, on two clips."""
    config = TrainingConfig.load(CONFIGS / "cpu.toml")
    small = {"steps": 1, "batch": 1, "minutes": 5, "warmup": 0}
    changes: dict[str, object] = {
        name: config.stage(name).model_copy(update=small | ({"chunks": 2} if name != "text" else {}))
        for name in OPTIMISED
    }
    changes["data"] = config.data.model_copy(update={"clips": 2, "pca_clips": 2})
    config = config.model_copy(update=changes)
    folder = Run(tmp_path_factory.mktemp("run"))
    for stage in STAGES:
        run(stage, config, folder)
    return config, folder


def test_every_stage_builds_on_the_one_before(trained: tuple[TrainingConfig, Run]) -> None:
    _, folder = trained
    for stage in OPTIMISED:
        assert len(curve(folder.stage(stage))) == 1
        assert folder.weights(stage).exists()


def test_windows_of_rollouts_fit_their_frames(
    trained: tuple[TrainingConfig, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.stages.sharpen.OWN", 1.0)
    config, folder = trained
    clips = ClipSet(folder.stage("latents"))
    captions = CaptionEncoder.load(PRESET, folder.weights("text"))
    pca, weights = PatchPCA.load(folder.pca), load_weights(folder.weights("rollout"))
    stage = SharpenStage(config.sharpen, config.data, pca, PRESET, clips, captions, weights, rollouts=1)
    assert stage.own.shape == (1, 21, 16, 16, 16)
    stage.own = torch.from_numpy(pca.encode(stage.chosen[0].render()))[None]  # a perfect rollout
    generator = np.random.default_rng(0)
    for _ in range(12):
        latents, pixels, _ = stage.sample(generator)
        assert len(pixels) == 4 * len(latents) - 3
        frames = np.rint((pixels.permute(0, 2, 3, 1).numpy() + 1) * 127.5).astype(np.uint8)
        again = torch.from_numpy(pca.encode(frames))
        torch.testing.assert_close(again[1:], latents[1:], rtol=1e-3, atol=1e-3)


def qat_stage(trained: tuple[TrainingConfig, Run]) -> QATStage:
    config, folder = trained
    clips = ClipSet(folder.stage("latents"))
    captions = CaptionEncoder.load(PRESET, folder.weights("text"))
    start = load_weights(folder.weights("hsa"))
    return QATStage(config.qat, config.loss, PRESET, clips, captions, start)


def test_what_rounds_nothing_is_right_from_the_start(
    trained: tuple[TrainingConfig, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Targets are made with the draws of the predictions that are compared with them."""
    monkeypatch.setattr("training.stages.qat.ROLLED_OUT", 1)
    stage = qat_stage(trained)
    assert stage.loss(np.random.default_rng(0))[0].item() > 0
    stage = qat_stage(trained)
    stage.model = stage.teacher
    assert stage.loss(np.random.default_rng(0))[0].item() == 0
    stage.roll_out(np.random.default_rng(3))
    assert torch.equal(stage.replay.own, stage.replay.taught)


def test_both_models_go_on_from_what_they_made(trained: tuple[TrainingConfig, Run]) -> None:
    stage = qat_stage(trained)
    places = np.arange(stage.replay.size)
    stage.replay.renew(np.random.default_rng(0), places)
    true = stage.replay.own.clone()
    assert torch.equal(stage.replay.taught, true)
    stage.loss(np.random.default_rng(1))
    changed = [(stage.replay.own[i] != true[i]).any() for i in places]
    assert any(changed)
    for place in places[changed]:
        assert (stage.replay.taught[place] != true[place]).any()
        assert (stage.replay.taught[place] != stage.replay.own[place]).any()


def test_latents_continue_where_they_were_interrupted(trained: tuple[TrainingConfig, Run]) -> None:
    config, folder = trained
    before = np.array(ClipSet(folder.stage("latents")).latents)
    store = folder.stage("latents") / "latents.f16"
    store.write_bytes(store.read_bytes()[:-1000])
    build_latents(config, folder)
    assert np.array_equal(ClipSet(folder.stage("latents")).latents, before)


def test_shipped_files_load_as_public_checkpoints(
    trained: tuple[TrainingConfig, Run], tmp_path: Path
) -> None:
    _, folder = trained
    assert main(["--run", str(folder.folder), "ship", "--to", str(tmp_path)]) == 0
    load_dit_state(tmp_path / "dit.safetensors", PRESET.dit)
    load_dit_state(tmp_path / "dit_framewise.safetensors", PRESET.dit)
    load_dit_state(tmp_path / "dit_nvfp4.safetensors", PRESET.dit)
    load_vae_state(tmp_path / "vae.safetensors", PRESET.vae)
    load_vae_encoder_state(tmp_path / "vae.safetensors", PRESET.vae)
    load_vae_state(tmp_path / "tae.safetensors", DECODERS["tae"])
    load_umt5_state(tmp_path / "text_encoder.safetensors", PRESET.text)
    again = Run(tmp_path / "again")
    assert main(["--run", str(again.folder), "adopt", "--of", str(tmp_path)]) == 0
    assert set(load_weights(again.start("student"))) == set(load_weights(folder.weights("hsa")))
    assert load_weights(again.weights("text")).keys() < load_weights(folder.weights("text")).keys()
    assert main(["--run", str(again.folder), "adopt", "--of", str(tmp_path)]) == 2
    assert main(["--run", str(again.folder), "ship", "--to", str(tmp_path / "shipped")]) == 0
    for file in ("dit", "dit_dense", "dit_framewise", "dit_nvfp4", "vae", "tae"):
        name = f"{file}.safetensors"
        assert (tmp_path / "shipped" / name).read_bytes() == (tmp_path / name).read_bytes()
    assert set(load_weights(again.weights("framewise"))) == set(load_weights(folder.weights("framewise")))
    for stage in ("hsa", "qat"):
        assert set(load_weights(again.weights(stage))) == set(load_weights(folder.weights(stage)))
    for name in ("dit", "dit_dense", "dit_framewise", "dit_nvfp4"):
        (tmp_path / f"{name}.safetensors").unlink()
    later = Run(tmp_path / "later")
    assert adopt(later, tmp_path) == ["text", "decoder", "encoder", "tae"]
    before = later.weights("text").read_bytes()
    run("text", TrainingConfig.load(CONFIGS / "cpu.toml"), later)
    assert later.weights("text").read_bytes() == before
    assert sum(path.stat().st_size for path in tmp_path.glob("*.*")) < 16 * 2**20


def test_a_stage_without_its_input_says_what_to_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainingConfig.load(CONFIGS / "cpu.toml")
    with pytest.raises(StageError, match="--stage latents"):
        run("still", config, Run(tmp_path))
    assert main(["--run", str(tmp_path), "run", "--stage", "student"]) == 2
    assert "run `python -m training" in capsys.readouterr().err
