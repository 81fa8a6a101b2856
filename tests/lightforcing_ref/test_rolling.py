"""Rolling Forcing against its description written literally: every window runs the whole video again."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightforcing_ref.attention import rms_norm
from lightforcing_ref.rolling import RollingRollout
from lightforcing_ref.rope import apply_rope, rope_tables
from tests.lightforcing_ref.test_model import FRAME, GRID, SMALL, noise, small_model, spec, text

TIMESTEPS = (1000, 952.3810, 882.3529, 769.2308, 555.5556)
"""As published."""
SIGMAS = [5 * s / (1 + 4 * s) for s in (1, 0.8, 0.6, 0.4, 0.2)]
CHUNK = 3 * FRAME


class WholeVideo:
    """All chunks up to the window's last in one forward, the clean ones at t = 0.

    A clean chunk sees itself and the six before it. A chunk of the window sees the window; and unless that begins the
    video, the clean chunks just before it and, turned to the frames before those, the first chunk, in all seven chunks.
    """

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count
        self.recent = max(0, min(7 - (count - first) - 1, first - 1))

    def __call__(self, layer, qkv, params):
        q, k, v = (qkv[0] + params.bias).chunk(3, -1)
        q, k = rms_norm(q, params.norm_q, params.eps), rms_norm(k, params.norm_k, params.eps)
        q, k, v = (x.unflatten(-1, (SMALL.heads, -1)) for x in (q, k, v))
        at = rope_tables(torch.arange(3 * self.count), GRID, SMALL.head_dim)
        q, roped = apply_rope(q, *at), apply_rope(k, *at)
        start = 3 * (self.first - self.recent - 1)
        anchor = apply_rope(k[:CHUNK], *rope_tables(torch.arange(start, start + 3), GRID, SMALL.head_dim))

        def rows(x, chunks):
            return torch.cat([x[c * CHUNK : (c + 1) * CHUNK] for c in chunks])

        outs = []
        for chunk in range(self.count):
            if chunk < self.first:
                seen = range(max(0, chunk - 6), chunk + 1)
                keys, values = rows(roped, seen), rows(v, seen)
            else:
                seen = range(self.first - self.recent, self.count)
                keys, values = rows(roped, seen), rows(v, seen)
                if self.first:
                    keys, values = torch.cat([anchor, keys]), torch.cat([v[:CHUNK], values])
            parts = (x.transpose(0, 1)[None] for x in (rows(q, [chunk]), keys, values))
            outs.append(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
        return torch.cat(outs, dim=1)


def literally(model, chunks):

    clean: list[torch.Tensor] = []
    latents: dict[int, torch.Tensor] = {}
    for window in range(chunks + 4):
        first, last = max(0, window - 4), min(chunks - 1, window)
        if window < chunks:
            latents[window] = noise(window, 0)
        x = torch.cat([*clean[:first], *(latents[c] for c in range(first, last + 1))], dim=1)
        steps = {c: window - c for c in range(first, last + 1)}
        t = torch.tensor([0.0] * first + [1000 * SIGMAS[step] for step in steps.values()]).repeat_interleave(
            3
        )
        cross = model.embed_text(text()[None])
        flow = model(x[None], t[None], cross, WholeVideo(first, last + 1))[0]
        for c, step in steps.items():
            x0 = latents[c] - SIGMAS[step] * flow[:, 3 * c : 3 * c + 3]
            if step == 4:
                clean.append(x0)
            else:
                sigma = SIGMAS[step + 1]
                latents[c] = (1 - sigma) * x0 + sigma * noise(c, step + 1)
    return clean


@pytest.mark.parametrize("chunks", [1, 3, 5, 11])
def test_windows_equal_forwards_of_the_whole_video(chunks):
    """Eleven chunks: the cache is full, and the anchor has left the clean forward's sight."""
    model = small_model()
    ours = RollingRollout(model, spec(), text(), noise, GRID)
    made = list(ours.generate(chunks))
    with torch.no_grad():
        theirs = literally(model, chunks)
    assert len(made) == len(theirs) == chunks
    for chunk, (a, b) in enumerate(zip(made, theirs, strict=True)):
        assert torch.allclose(a, b, atol=1e-4), f"chunk {chunk}"


def test_levels_are_the_published_ones():
    ours = RollingRollout(small_model(), spec(), text(), noise, GRID)
    assert ours.window_chunks == 5
    assert ours.schedule.timesteps[:-1] == pytest.approx(TIMESTEPS)


def test_eviction_against_a_list():
    """24 frames at most, the first three for ever."""
    ours = RollingRollout(small_model(), spec(), text(), noise, GRID)
    made: list[int] = []
    for chunk, _ in enumerate(ours.generate(10)):
        if chunk:
            made += range(3 * chunk - 3, 3 * chunk)
            recent = [frame for frame in made if frame >= 3]
            assert ours.cache.resident() == [0, 1, 2, *recent[-21:]]


def test_a_new_prompt_reaches_chunks_that_are_in_the_window():
    model = small_model()

    def video(switch):
        ours, made = RollingRollout(model, spec(), text(), noise, GRID), []
        for chunk, latents in enumerate(ours.generate(6)):
            made.append(latents)
            if switch and chunk == 1:
                ours.set_prompt(text(9))
        return made

    plain, switched = video(False), video(True)
    assert [torch.equal(a, b) for a, b in zip(plain, switched, strict=True)] == [True, True, *[False] * 4]
    # Chunk 2 had four of its five forwards before; the later a chunk, the more of it is the new prompt's.
    gaps = [(a - b).norm().item() for a, b in zip(plain[2:], switched[2:], strict=True)]
    assert gaps[0] < gaps[-1]
