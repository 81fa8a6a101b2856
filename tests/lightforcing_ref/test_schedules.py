"""Schedules: what a list of steps means, and rollouts under every kind against one without a cache."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightforcing_ref.attention import rms_norm
from lightforcing_ref.model import CausalWanModel
from lightforcing_ref.rollout import Rollout
from lightforcing_ref.rope import apply_rope, rope_tables
from lightforcing_ref.schedule import FlowSchedule
from tests.lightforcing_ref.test_model import FRAME, GRID, SMALL, small_model, spec, text

CHANNELS, SIZE = SMALL.channels, (2 * GRID[0], 2 * GRID[1])


def noise(frames: int):
    def draw(chunk: int, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * chunk + step)
        return torch.randn(CHANNELS, frames, *SIZE, generator=generator)

    return draw


def test_lists_are_warped_and_their_rows_follow_each_other():
    schedule = FlowSchedule.warped((1000, 500), first_steps=(1000, 750, 250), chunk_frames=1)
    # By hand: 5 s / (1 + 4 s).
    assert schedule.row_timesteps == pytest.approx((1000, 833.33333, 0, 1000, 937.5, 625))
    assert schedule.row_sigmas == pytest.approx((1, 0.83333333, 0, 1, 0.9375, 0.625))
    assert schedule.row_following == pytest.approx((0.83333333, 0, 0, 0.9375, 0.625, 0))
    assert [list(schedule.rows(chunk)) for chunk in (0, 1, 9)] == [[3, 4, 5], [0, 1], [0, 1]]
    assert (schedule.denoise_steps, schedule.most_steps, schedule.clean_step) == (2, 3, 2)
    assert FlowSchedule.warped((1000,), shift=1).row_following == (0, 0)
    assert list(FlowSchedule.warped().rows(0)) == [0, 1, 2, 3]


class WholeClip:
    """All frames in one forward, each at its own noise level, under a mask of which frame sees which."""

    def __init__(self, sees: torch.Tensor) -> None:
        frames = len(sees)
        self.cos, self.sin = rope_tables(torch.arange(frames), GRID, SMALL.head_dim)
        self.mask = sees.repeat_interleave(FRAME, 0).repeat_interleave(FRAME, 1)

    def __call__(self, layer, qkv, params):
        q, k, v = (qkv + params.bias).chunk(3, -1)
        q, k = rms_norm(q, params.norm_q, params.eps), rms_norm(k, params.norm_k, params.eps)
        q, k, v = (x.unflatten(-1, (SMALL.heads, -1)) for x in (q, k, v))
        q, k = apply_rope(q, self.cos, self.sin), apply_rope(k, self.cos, self.sin)
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), self.mask)
        return out.transpose(1, 2).flatten(2)


def literally(
    model: CausalWanModel,
    steps: list[list[float]],
    frames: int,
    *,
    clean_forward: bool,
) -> list[torch.Tensor]:
    """A rollout without a cache: every forward runs all frames again. `steps` are each chunk's sigmas.

    Without clean forwards, the past of a chunk is what its last denoising forward saw: noisy latents at that level.
    """
    draw, past, levels, chunks = noise(frames), [], [], []
    for chunk, sigmas in enumerate(steps):
        x = draw(chunk, 0)
        cross = model.embed_text(text()[None])
        for index, sigma in enumerate(sigmas):
            latents = torch.cat((*past, x), dim=1)
            count = latents.shape[1] // frames
            t = torch.tensor([*levels, 1000 * sigma]).repeat_interleave(frames)[None]
            sees = (
                torch.ones(count, count)
                .tril()
                .bool()
                .repeat_interleave(frames, 0)
                .repeat_interleave(frames, 1)
            )
            flow = model(latents[None], t, cross, WholeClip(sees))[0, :, -frames:]
            seen, x0 = x, x - sigma * flow
            following = sigmas[index + 1] if index + 1 < len(sigmas) else 0.0
            x = x0 if not following else (1 - following) * x0 + following * draw(chunk, index + 1)
        past.append(x if clean_forward else seen)
        levels.append(0.0 if clean_forward else 1000 * sigmas[-1])
        chunks.append(x)
    return chunks


@pytest.mark.parametrize("clean_forward", [True, False])
@pytest.mark.parametrize(
    ("steps", "first", "frames"),
    [
        ((1000, 500), (1000, 750, 500, 250), 1),
        ((1000,), (1000, 500), 3),
        ((1000, 750, 500), (), 1),
        ((1000,), (), 3),
    ],
)
def test_rollouts_equal_forwards_of_everything(steps, first, frames, clean_forward):
    model = small_model()
    schedule = FlowSchedule.warped(steps, first_steps=first, chunk_frames=frames, clean_forward=clean_forward)
    ours = list(Rollout(model, spec(), text(), noise(frames), GRID, schedule=schedule).stream(4))

    def warp(values):
        return [5 * (value / 1000) / (1 + 4 * value / 1000) for value in values]

    levels = [warp(first or steps), *[warp(steps)] * 3]
    with torch.no_grad():
        theirs = literally(model, levels, frames, clean_forward=clean_forward)
    for chunk, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.shape == (CHANNELS, frames, *SIZE)
        assert torch.allclose(a, b, atol=5e-5), f"chunk {chunk}"


def test_frames_made_one_by_one_see_a_prompt_at_once():
    """A switch before frame 2 leaves frames 0 and 1 and changes frame 2."""
    model = small_model()
    schedule = FlowSchedule.warped((1000, 500), chunk_frames=1)

    def frames(switch: bool) -> list[torch.Tensor]:
        rollout = Rollout(model, spec(), text(), noise(1), GRID, schedule=schedule)
        made = list(rollout.stream(2))
        if switch:
            assert rollout.set_prompt(text(9)) == 2
        return [*made, *rollout.stream(1)]

    plain, switched = frames(False), frames(True)
    assert all(torch.equal(a, b) for a, b in zip(plain[:2], switched[:2], strict=True))
    assert not torch.allclose(plain[2], switched[2], atol=1e-3)
