"""The pool of the model's own predictions, and the sparse attention that serves training."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from lightforcing_ref.attention import block_means, hsa_attention
from lightforcing_ref.config import PRESETS
from lightforcing_ref.sparsity import SparsityTable
from training.attention import attend
from training.config import CONFIGS, Run, TrainingConfig
from training.data.clips import SHAPES, Clip, motions
from training.data.dataset import LATENT_FRAMES, ClipSet, build_latents
from training.runner import save_tensors
from training.stages.dit import SPARSITY_BASE, SPARSITY_TARGET, RolloutStage, attention_spec
from training.stages.replay import Replay
from training.stages.text import CaptionEncoder, TextStage

PRESET = PRESETS["tiny"]


@pytest.mark.parametrize("chunk", [1, 3, 6])
def test_gathered_attention_is_the_references(chunk: int) -> None:
    torch.manual_seed(chunk)
    spec = attention_spec(PRESET, SparsityTable.chunk_aware(SPARSITY_TARGET, SPARSITY_BASE))
    geometry, past = spec.geometry, 3 * chunk
    tokens = geometry.frame_tokens
    q = torch.randn(2, 2, 3 * tokens, 64)
    k, v = torch.randn(2, 2, 2, (past + 3) * tokens, 64)
    found = attend(q, k, v, chunk, spec)
    for index in range(2):
        one_q, one_k, one_v = (x[index].transpose(0, 1) for x in (q, k, v))
        frames_k, frames_v = (x.unflatten(0, (-1, tokens)) for x in (one_k, one_v))
        means = block_means(one_k, tokens, geometry.block_k)
        expected = hsa_attention(
            one_q,
            one_k[past * tokens :],
            one_v[past * tokens :],
            block_means(one_q, tokens, geometry.block_q),
            means[past:],
            frames_k[:past],
            frames_v[:past],
            means[:past],
            torch.arange(past, dtype=torch.int32),
            chunk,
            frame_tokens=tokens,
            block_q=geometry.block_q,
            block_k=geometry.block_k,
            keep_frames=spec.hsa.keep_frames,
            sink_frames=spec.hsa.sink_frames,
            near_frames=spec.hsa.near_frames,
            scale=spec.scale,
            keep_q20=spec.keep_q20,
        )
        torch.testing.assert_close(found[index].transpose(0, 1), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = TrainingConfig.load(CONFIGS / "cpu.toml")
    few = config.model_copy(update={"data": config.data.model_copy(update={"clips": 3, "pca_clips": 1})})
    run = Run(tmp_path_factory.mktemp("run"))
    build_latents(few, run)
    return run.stage("latents")


@pytest.fixture(scope="module")
def clips(folder: Path) -> ClipSet:
    return ClipSet(folder)


def test_a_drawn_clip_is_true_until_it_has_been_predicted(clips: ClipSet) -> None:
    replay, generator = Replay(clips, 4, renewed=0.0, blended=0.0), np.random.default_rng(0)
    places = replay.draw(generator, 4)
    assert sorted(places) == [0, 1, 2, 3]
    for place in places:
        true = clips.latents[replay.members[place]].astype(np.float32)
        assert np.array_equal(replay.own[place].numpy(), true.swapaxes(0, 1))
    members, chosen = replay.members.copy(), places[:2]
    predicted = torch.full((2, 16, 3, 16, 16), 7.0)
    replay.put(chosen, predicted, 6)
    replay.draw(generator, 4)
    assert np.array_equal(replay.members, members)
    for place in range(4):
        is_seven = (replay.own[place] == 7).flatten(2).all(2).all(0).tolist()
        assert is_seven == [place in chosen and 6 <= frame < 9 for frame in range(LATENT_FRAMES)]


def test_renewed_clips_are_true_again(clips: ClipSet) -> None:
    replay, generator = Replay(clips, 2, renewed=1.0, blended=0.0), np.random.default_rng(0)
    replay.put(replay.draw(generator, 2), torch.full((2, 16, LATENT_FRAMES, 16, 16), 7.0))
    places = replay.draw(generator, 1)
    assert not (replay.own[places] == 7).any()
    assert (replay.own[1 - places] == 7).all()


@pytest.fixture
def numbered(folder: Path, tmp_path: Path) -> ClipSet:
    """One motion in four shapes on black and on white; the latents of each clip are its number."""
    motion = motions(["moves"])[0]
    made = [Clip("red", shape, ground, motion) for ground in ("black", "white") for shape in SHAPES]
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(asdict(clip)) + "\n" for clip in made))
    shutil.copy(folder / "pca.safetensors", tmp_path)
    values = np.arange(len(made), dtype=np.float16)  # 0..3 on black, 4..7 on white
    np.broadcast_to(values[:, None], (len(made), LATENT_FRAMES * 16**3)).tofile(tmp_path / "latents.f16")
    return ClipSet(tmp_path)


def test_new_clips_are_blended_with_other_shapes_of_the_same_clip(numbered: ClipSet) -> None:
    replay = Replay(numbered, 64, renewed=0.0, blended=0.5)
    places = replay.draw(np.random.default_rng(0), 64)
    found, true = replay.own[places].flatten(1).numpy(), replay.members[places]
    assert (np.ptp(found, axis=1) == 0).all()
    assert ((found[:, 0] > 3.5) == (true >= 4)).all()
    assert 0.2 < (found[:, 0] == true).mean() < 0.8


def test_rivals_are_other_shapes_of_the_same_clip(numbered: ClipSet) -> None:
    replay, generator = Replay(numbered, 64, renewed=0.0, blended=0.0), np.random.default_rng(0)
    places = replay.draw(generator, 64)
    found = replay.rivals(generator, places, 6)
    assert found.shape == (64, 16, 6, 16, 16)
    pairs = set(zip(replay.members[places].tolist(), found[:, 0, 0, 0, 0].int().tolist(), strict=True))
    assert all(one != other and one // 4 == other // 4 for one, other in pairs)
    assert len({other for _, other in pairs}) == 8


def test_a_clip_in_one_shape_only_is_its_own_rival(clips: ClipSet) -> None:
    replay, generator = Replay(clips, 3, renewed=0.0, blended=0.0), np.random.default_rng(0)
    places = replay.draw(generator, 3)
    assert torch.equal(replay.rivals(generator, places, LATENT_FRAMES), replay.own[places])


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> CaptionEncoder:
    text = TextStage(TrainingConfig.load(CONFIGS / "cpu.toml").text, PRESET, seed=0)
    state = {name: value.clone() for name, value in text.module.state_dict().items()}
    path = tmp_path_factory.mktemp("text") / "text.safetensors"
    save_tensors(state, path)
    return CaptionEncoder.load(PRESET, path)


def stage_on(clips: ClipSet, captions: CaptionEncoder, **loss: float) -> RolloutStage:
    """The stage on short windows, no more of them than needed."""
    config = TrainingConfig.load(CONFIGS / "cpu.toml")
    settings = config.rollout.model_copy(update={"batch": 1, "chunks": 2})
    weights = config.loss.model_copy(update={"first_window": 0.0, "own_rollouts": 0.0, "renewed": 0.0} | loss)
    return RolloutStage(settings, weights, PRESET, clips, captions, None)


@pytest.mark.parametrize("is_sparse", [False, True])
def test_rollouts_fill_the_pool_and_training_reads_it(
    clips: ClipSet, captions: CaptionEncoder, is_sparse: bool
) -> None:
    stage = stage_on(clips, captions, own_rollouts=1.0)
    if is_sparse:
        stage.spec = attention_spec(PRESET, SparsityTable.chunk_aware(SPARSITY_TARGET, SPARSITY_BASE))
    found, figures = stage.loss(np.random.default_rng(0))
    assert torch.isfinite(found)
    assert figures["drift"] > 0.1  # an untrained model's rollout is far from the clip


def test_mistakes_weigh_more_where_another_shape_differs(numbered: ClipSet, captions: CaptionEncoder) -> None:
    """The target is zero, its rivals differ in the upper half, and there the prediction is wrong."""
    stage = stage_on(numbered, captions, foreground=1.0, blended=0.0)
    true, rival, found = (torch.zeros(2, 16, 3, 16, 16) for _ in range(3))
    rival[..., :8, :] = 1.0
    found[..., :8, :] = 1.0
    even = torch.ones(2, 1, 3, 16, 16)
    weight = even + 3 * stage.difference(rival, true)
    assert stage.error(found, true, even) == pytest.approx(0.5)
    assert stage.error(found, true, weight) == pytest.approx(0.8)
    losses = []
    for outline in (0.0, 2.0):
        torch.manual_seed(0)
        losses.append(stage_on(numbered, captions, outline=outline).loss(np.random.default_rng(0))[0].item())
    assert losses[0] != losses[1]
