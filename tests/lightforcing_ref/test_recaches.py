"""Prompt switches that recompute jointly, flush or cut, against caches written literally: lists of frames."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F

from lightforcing_ref.attention import rms_norm
from lightforcing_ref.rope import apply_rope, rope_tables
from tests.lightforcing_ref.test_model import FRAME, GRID, SMALL, noise, rollout, small_model, spec, text

SIGMAS = [5 * s / (1 + 4 * s) for s in (1, 0.75, 0.5, 0.25)]


def projected(qkv, params):
    q, k, v = (qkv[0] + params.bias).chunk(3, -1)
    q, k = rms_norm(q, params.norm_q, params.eps), rms_norm(k, params.norm_k, params.eps)
    return (x.unflatten(-1, (SMALL.heads, -1)) for x in (q, k, v))


def attended(q, keys, values):
    q, keys, values = (x.transpose(0, 1)[None] for x in (q, keys, values))
    return F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(2)


def by_frame(x):
    return list(x.split(FRAME))


@dataclass
class LongLive:
    """A cache of `window` frames per layer as LongLive's code has it: keys roped where they are, new ones behind the
    sinks, a shift when they do not fit. A recompute is recognised by ending where the cache ends and not at 0.
    """

    window: int
    sinks: int
    keys: list = field(default_factory=lambda: [[] for _ in range(SMALL.layers)])
    values: list = field(default_factory=lambda: [[] for _ in range(SMALL.layers)])
    end: int = 0
    first: int = 0
    frames: int = 0

    def __call__(self, layer, qkv, params):
        q, k, v = projected(qkv, params)
        cos, sin = rope_tables(torch.arange(self.first, self.first + self.frames), GRID, SMALL.head_dim)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        keys, values = self.keys[layer], self.values[layer]
        last = self.first + self.frames
        again = last <= self.end and self.first > 0
        if last > self.end and len(keys) + self.frames > self.window:
            evicted = len(keys) + self.frames - self.window
            for store in (keys, values):
                del store[self.sinks : self.sinks + evicted]
        local_end = len(keys) if last <= self.end else len(keys) + last - self.end
        start = local_end - self.frames
        for index, (key, value) in enumerate(zip(by_frame(k), by_frame(v), strict=True)):
            place = start + index
            if place < self.sinks and again:
                continue
            for store, new in ((keys, key), (values, value)):
                store[place : place + 1] = [new]
        seen = [
            *range(self.sinks),
            *range(max(self.sinks, local_end - (self.window - self.sinks)), local_end),
        ]
        return attended(q, torch.cat([keys[i] for i in seen]), torch.cat([values[i] for i in seen]))


def longlive(model, window, sinks, switch_at, chunks):
    """Clean latents of a rollout that switches its prompt before chunk `switch_at`."""
    cache, cross, clean = LongLive(window, sinks), model.embed_text(text()[None]), []

    def forward(x, t, first):
        cache.first, cache.frames = first, x.shape[1]
        flow = model(x[None], torch.full((1, x.shape[1]), t, dtype=torch.float64), cross, cache)[0]
        cache.end = max(cache.end, first + x.shape[1])
        return flow

    for chunk in range(chunks):
        if chunk == switch_at:
            cross = model.embed_text(text(9)[None])
            latents = torch.cat(clean, dim=1)[:, -window:]
            forward(latents, 0.0, 3 * chunk - latents.shape[1])
        x = noise(chunk, 0)
        for step, sigma in enumerate(SIGMAS):
            x0 = x - sigma * forward(x, 1000 * sigma, 3 * chunk)
            following = SIGMAS[step + 1] if step < 3 else 0.0
            x = x0 if step == 3 else (1 - following) * x0 + following * noise(chunk, step + 1)
        forward(x, 0.0, 3 * chunk)
        clean.append(x)
    return clean


@pytest.mark.parametrize("window", [12, 9])
@pytest.mark.parametrize("switch_at", [1, 2, 3, 4, 5, 6])
def test_a_joint_recache_is_longlives(window, switch_at):
    """Before the window is full, sinks are overwritten, too; after it, they are kept."""
    model = small_model()
    ours = rollout(model, spec(), window_frames=window, sink_frames=3)
    chunks = list(ours.stream(switch_at))
    assert ours.set_prompt(text(9), "joint") == switch_at
    chunks += ours.stream(8 - switch_at)
    with torch.no_grad():
        theirs = longlive(model, window, 3, switch_at, 8)
    for chunk, (a, b) in enumerate(zip(chunks, theirs, strict=True)):
        assert torch.allclose(a, b, atol=1e-4), f"chunk {chunk}"


def test_a_joint_recache_is_not_the_block_causal_one():
    model = small_model()

    def after(recache):
        made = rollout(model, spec(), window_frames=12, sink_frames=3)
        list(made.stream(5))
        made.set_prompt(text(9), recache)
        return made.generate_chunk()

    joint, causal = after("joint"), after("window")
    assert 1e-5 < ((joint - causal).norm() / causal.norm()).item() < 0.2


@dataclass
class InfinityRope:
    """Keys are kept without positions; those of a forward are 0, 1, ... in the cache's order, and then its own."""

    cut: bool = False
    kept: list = field(default_factory=lambda: [[] for _ in range(SMALL.layers)])
    new: list = field(default_factory=list)

    def __call__(self, layer, qkv, params):
        q, k, v = projected(qkv, params)
        self.new.append((k, v))
        past = self.kept[layer]
        own = 45 if self.cut else len(past)
        positions = torch.tensor([*range(len(past)), own, own + 1, own + 2])
        cos, sin = rope_tables(positions, GRID, SMALL.head_dim)
        keys = apply_rope(torch.cat([*(key for _, key, _ in past), k]), cos, sin)
        values = torch.cat([*(value for _, _, value in past), v])
        return attended(apply_rope(q, cos[-3 * FRAME :], sin[-3 * FRAME :]), keys, values)


@pytest.mark.parametrize("recache", ["flush", "cut"])
@pytest.mark.parametrize("switch_at", [1, 3])
def test_flush_and_cut_are_infinity_ropes(recache, switch_at):
    """Window 6, sink 1: a flush keeps the first frame and the last two, a cut puts the next chunk at 45 to 47."""
    model = small_model()
    ours = rollout(model, spec(), window_frames=6, sink_frames=1, sink_positions="window")
    made = list(ours.stream(switch_at))
    assert ours.set_prompt(text(9), recache) == switch_at
    made += ours.stream(6 - switch_at)

    cache, cross = InfinityRope(), model.embed_text(text()[None])

    def forward(x, t):
        cache.new = []
        return model(x[None], torch.full((1, 3), t, dtype=torch.float64), cross, cache)[0]

    for chunk in range(6):
        if chunk == switch_at:
            cross = model.embed_text(text(9)[None])
        for layer in cache.kept:
            keep = 2 if chunk == switch_at else 6 - 3 - 1
            recent = [entry for entry in layer if entry[0] > 0]
            layer[:] = [entry for entry in layer if entry[0] == 0] + recent[max(0, len(recent) - keep) :]
        cache.cut = recache == "cut" and chunk == switch_at
        x = noise(chunk, 0)
        with torch.no_grad():
            for step, sigma in enumerate(SIGMAS):
                x0 = x - sigma * forward(x, 1000 * sigma)
                following = SIGMAS[step + 1] if step < 3 else 0.0
                x = x0 if step == 3 else (1 - following) * x0 + following * noise(chunk, step + 1)
            forward(x, 0.0)
        for layer, (k, v) in zip(cache.kept, cache.new, strict=True):
            layer += [
                (3 * chunk + i, *pair) for i, pair in enumerate(zip(by_frame(k), by_frame(v), strict=True))
            ]
        assert torch.allclose(made[chunk], x, atol=1e-4), f"chunk {chunk}"


def test_a_flush_forgets_what_was_long_ago():
    model = small_model()
    ours = rollout(model, spec(), window_frames=12, sink_frames=1)
    list(ours.stream(3))
    ours.set_prompt(text(9), "flush")
    assert ours.cache.resident() == [0, 7, 8]
    ours.set_prompt(text(3), "cut")
    assert [ours.position(frame) for frame in (0, 8, 9, 10)] == [0, 8, 51, 52]
