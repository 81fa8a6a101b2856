"""Sparse Forcing against a model of lists: which blocks were scored when, what stayed, what was evicted."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightforcing_ref.errors import ConfigError
from lightforcing_ref.policies import (
    PersistentBlocks,
    PersistentSet,
    block_weights,
    persistent_block_attention,
)
from lightforcing_ref.rollout import Rollout
from lightforcing_ref.rope import apply_rope, rope_tables
from lightforcing_ref.schedule import FlowSchedule
from lightforcing_ref.sparsity import BlockGeometry
from tests.lightforcing_ref.test_model import FRAME, GRID, SMALL, noise, rollout, small_model, spec, text
from tests.lightforcing_ref.test_policies import Case, cases, kept, margin, mask
from tests.lightforcing_ref.test_recaches import SIGMAS, projected

Q20 = 1 << 20
quick = settings(max_examples=30, deadline=None)

Label = tuple[int, int]
"""A block: its frame, and its number in the frame."""


@quick
@given(cases(), st.data())
def test_what_is_pinned_is_seen_and_the_best_of_the_rest(case: Case, data: st.DataObject) -> None:
    pinned = data.draw(st.integers(0, case.view.past_frames))
    result = mask(PersistentBlocks(), Case(replace(case.view, pinned=pinned)))
    geometry, tokens = case.view.geometry, case.view.geometry.frame_tokens
    local = case.runs(geometry.block_k, pinned)
    table = case.view.keep_q20
    count = max(1, table[min(case.view.chunk, len(table) - 1)] * len(local) // Q20)
    assert count <= kept(case, None)
    shift = len(case.k) - len(case.q)
    for head in range(case.heads):
        for run in case.runs(geometry.block_q, case.view.past_frames):
            rows = [token - shift for token in run]
            scores = [float(case.q[rows, head].mean(0) @ case.k[block, head].mean(0)) for block in local]
            if not margin(scores, count):
                continue
            best = sorted(range(len(local)), key=lambda i: -scores[i])[:count]
            seen = set(range(pinned * tokens)) | {token for i in best for token in local[i]}
            for row in rows:
                assert set(np.flatnonzero(result[head, row])) == seen


@st.composite
def contests(draw: st.DrawFn) -> dict[str, Any]:
    block = draw(st.integers(1, 6))
    tokens = draw(st.integers(1, 14))
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    frames = draw(st.integers(1, 7))
    heads, blocks = draw(st.integers(1, 3)), -(-tokens // block)
    # Few different scores, so that many are equal.
    scores = rng.integers(0, draw(st.sampled_from([3, 1000])), (heads, frames * blocks))
    return {
        "geometry": BlockGeometry(tokens, 4, block),
        "frames": frames,
        "kept": draw(st.integers(1, frames)),
        "scores": torch.from_numpy(scores).float(),
    }


@quick
@given(contests())
def test_the_best_blocks_of_a_size_stay(contest: dict[str, Any]) -> None:
    geometry, kept_frames, scores = contest["geometry"], contest["kept"], contest["scores"]
    tokens, size, blocks, heads = geometry.frame_tokens, geometry.block_k, geometry.k_blocks, len(scores)
    token = torch.arange(tokens)

    def labelled(frame: int) -> tuple[torch.Tensor, ...]:
        """Everything says which head's which block it belongs to."""
        head = torch.arange(heads)
        of_token = 1000 * head + 100 * frame + (token // size)[:, None]
        of_block = 1000 * head + 100 * frame + torch.arange(blocks)[:, None]
        k = of_token[..., None].expand(-1, -1, 2).clone()
        return k, -k, of_block[..., None].clone(), of_block.clone()

    frames = [labelled(frame) for frame in range(contest["frames"])]
    found = PersistentSet().contest(frames, kept_frames, scores, geometry)
    assert [part.tolist() for frame in frames for part in frame] == [
        part.tolist() for frame in range(contest["frames"]) for part in labelled(frame)
    ], "what it is given stays as it was"
    for head in range(heads):
        held: dict[Label, Label] = {}
        for place in range(kept_frames):
            k, v, mean, scale = (part[:, head] for part in found[place])
            assert torch.equal(k, -v)
            for block in range(blocks):
                (code,) = k[block * size : (block + 1) * size].unique().tolist()
                assert mean[block].item() == scale[block].item() == code
                assert code // 1000 == head
                held[place, block] = (code % 1000 // 100, code % 100)
        for group in ([b for b in range(blocks) if (b + 1) * size <= tokens], [blocks - 1]):
            if group == [blocks - 1] and tokens % size == 0:
                continue
            every = [(frame, block) for frame in range(contest["frames"]) for block in group]
            value = {label: scores[head, label[0] * blocks + label[1]].item() for label in every}
            best = set(sorted(every, key=lambda label: (-value[label], label))[: kept_frames * len(group)])
            places = [label for label in every if label[0] < kept_frames]
            moved = iter(sorted(label for label in best if label[0] >= kept_frames))
            assert [held[place] for place in places] == [
                place if place in best else next(moved) for place in places
            ]


# Rollouts.


@dataclass
class Labels:
    """Keys and values of every frame there ever was, and which blocks of them a head still has, by label."""

    sinks: int
    local: int
    capacity: int
    block: int
    fraction: float
    own: bool = True
    peak: bool = False
    turned: bool = False
    frames: list[int] = field(default_factory=list)
    keys: dict[tuple[int, int], Any] = field(default_factory=dict)
    values: dict[tuple[int, int], Any] = field(default_factory=dict)
    kept: dict[tuple[int, int], list[Label]] = field(default_factory=dict)
    queries: dict[int, Any] = field(default_factory=dict)
    roped: dict[tuple[int, int], Any] = field(default_factory=dict)
    first: int = 0

    @property
    def blocks(self) -> int:
        return -(-FRAME // self.block)

    def rows(self, number: int) -> slice:
        return slice(number * self.block, min((number + 1) * self.block, FRAME))

    def of_frame(self, frame: int) -> list[Label]:
        return [(frame, block) for block in range(self.blocks)]

    def key(self, layer: int, head: int, label: Label) -> torch.Tensor:
        """A block's keys; sinks that move sit just before the oldest recent frame."""
        frame, block = label
        whole, position = self.keys[layer, frame], frame
        if self.turned and frame < self.sinks and frame in self.frames:
            recent = [other for other in self.frames if other >= self.sinks]
            position = (recent[0] if recent else self.first) - self.sinks + frame
        if (found := self.roped.get((layer, frame))) is None or found[:2] != (id(whole), position):
            cos, sin = rope_tables(torch.tensor([position]), GRID, SMALL.head_dim)
            found = self.roped[layer, frame] = id(whole), position, apply_rope(whole, cos, sin)
        return found[2][self.rows(block), head]

    def __call__(self, layer: int, qkv: Any, params: Any) -> Any:
        q, k, v = projected(qkv, params)
        cos, sin = rope_tables(torch.arange(self.first, self.first + 3), GRID, SMALL.head_dim)
        q, own = apply_rope(q, cos, sin), range(self.first, self.first + 3)
        for index, frame in enumerate(own):
            rows = slice(index * FRAME, (index + 1) * FRAME)
            self.keys[layer, frame], self.values[layer, frame] = k[rows], v[rows]
            self.roped.pop((layer, frame), None)
        self.queries[layer] = q
        out = torch.empty_like(q)
        recent = [frame for frame in (*self.frames, *own) if frame >= self.sinks or frame in own]
        for head in range(SMALL.heads):
            always = [
                label
                for frame in self.frames
                if frame < self.sinks and frame not in own
                for label in self.of_frame(frame)
            ]
            always += self.kept.get((layer, head), [])
            local = [label for frame in recent for label in self.of_frame(frame)]
            count = len(local) if self.first == 0 else max(1, int(self.fraction * len(local)))
            means = torch.stack([self.key(layer, head, x).mean(0) for x in local])
            for rows in self.query_blocks():
                query = q[rows, head]
                score = dict(zip(local, (means @ query.mean(0)).tolist(), strict=True))
                seen = always + sorted(local, key=lambda x: -score[x])[:count]
                keys = torch.cat([self.key(layer, head, x) for x in seen])
                values = torch.cat([self.values[layer, f][self.rows(b), head] for f, b in seen])
                weights = (query @ keys.T / SMALL.head_dim**0.5).softmax(-1)
                out[rows, head] = weights @ values
        return out.flatten(1)[None]

    def query_blocks(self) -> list[slice]:
        starts = [(f, b) for f in range(3) for b in range(self.blocks)]
        return [slice(f * FRAME + self.rows(b).start, f * FRAME + self.rows(b).stop) for f, b in starts]

    def commit(self) -> None:
        own = list(range(self.first, self.first + 3))
        room = self.sinks + self.local - 3
        leave = max(0, len(self.frames) + 3 - room)
        evicted = [frame for frame in self.frames if frame >= self.sinks][:leave]
        if evicted:
            for layer in range(SMALL.layers):
                marks = [self.scores(layer, head, own) for head in range(SMALL.heads)]
                if not self.own:
                    assert len({tuple(marks[head]) for head in range(SMALL.heads)}) == 1
                    marks = [{x: sum(mark[x] for mark in marks) for x in marks[0]}] * SMALL.heads
                for head in range(SMALL.heads):
                    self.kept[layer, head] = self.chosen(layer, head, evicted, marks[head])
        self.frames = [frame for frame in self.frames if frame not in evicted] + own

    def scores(self, layer: int, head: int, own: list[int]) -> dict[Label, float]:
        """Per block, what the chunk's query blocks give it of their attention to all blocks."""
        every = [label for frame in (*self.frames, *own) for label in self.of_frame(frame)]
        every += self.kept.get((layer, head), [])
        shares: dict[Label, list[float]] = {label: [] for label in every}
        means = torch.stack([self.key(layer, head, x).mean(0) for x in every])
        for rows in self.query_blocks():
            query = self.queries[layer][rows, head].mean(0)
            logits = dict(zip(every, (means @ query / SMALL.head_dim**0.5).tolist(), strict=True))
            total = sum(np.exp(list(logits.values())))
            for label, logit in logits.items():
                shares[label].append(np.exp(logit) / total)
        return {label: (max if self.peak else sum)(values) for label, values in shares.items()}

    def chosen(self, layer: int, head: int, evicted: list[int], score: dict[Label, float]) -> list[Label]:
        before = self.kept.get((layer, head), [])
        candidates = before + [label for frame in evicted for label in self.of_frame(frame)]
        frames = min(self.capacity, len(candidates) // self.blocks)
        result = []
        for size in {FRAME % self.block, self.block} - {0}:
            group = [x for x in candidates if self.rows(x[1]).stop - self.rows(x[1]).start == size]
            count = frames * sum(self.rows(b).stop - self.rows(b).start == size for b in range(self.blocks))
            result += sorted(group, key=lambda x: -score[x])[:count]
        return result


def by_lists(model: Any, lists: Labels, chunks: int) -> list[torch.Tensor]:
    """The same rollout, driven here."""
    cross, made = model.embed_text(text()[None]), []

    def forward(x: torch.Tensor, t: float) -> torch.Tensor:
        return model(x[None], torch.full((1, 3), t, dtype=torch.float64), cross, lists)[0]

    for chunk in range(chunks):
        lists.first = 3 * chunk
        x = noise(chunk, 0)
        with torch.no_grad():
            for step, sigma in enumerate(SIGMAS):
                x0 = x - sigma * forward(x, 1000 * sigma)
                following = SIGMAS[step + 1] if step < 3 else 0.0
                x = x0 if step == 3 else (1 - following) * x0 + following * noise(chunk, step + 1)
            if chunk < chunks - 1:
                forward(x, 0.0)
                lists.commit()
        made.append(x)
    return made


def held_blocks(made: Rollout, lists: Labels, layer: int, head: int) -> set[Label]:
    """The labels of the blocks in the rollout's virtual frames, recognised by their values."""
    known = {
        tuple(lists.values[of, frame][lists.rows(block), head].flatten().tolist()): (frame, block)
        for of, frame in lists.values
        if of == layer
        for block in range(lists.blocks)
    }
    table = torch.tensor([[*key, *[0.0] * (lists.block * SMALL.head_dim - len(key))] for key in known])
    labels, found = list(known.values()), set()
    for frame in made.cache.virtual:
        for block in range(lists.blocks):
            value = frame[layer][1][lists.rows(block), head].flatten()
            row = torch.nn.functional.pad(value, (0, table.shape[1] - len(value)))
            distance = (table - row).abs().amax(1)
            assert distance.min() < 1e-3
            found.add(labels[int(distance.argmin())])
    return found


def persistent_rollout(model: Any, lists: Labels, **changes: Any) -> Rollout:
    keep = (Q20, round(lists.fraction * Q20))
    persistent = PersistentSet(
        lists.capacity, "own" if lists.own else "shared", "peak" if lists.peak else "sum"
    )
    return rollout(
        model,
        replace(spec(keep, block=lists.block), persistent_frames=lists.capacity),
        **{
            "window_frames": lists.sinks + lists.capacity + lists.local,
            "sink_frames": lists.sinks,
            "sink_positions": "window" if lists.turned else "absolute",
            "attend": persistent_block_attention,
            "persistent": persistent,
            **changes,
        },
    )


@pytest.mark.parametrize(
    "lists",
    [
        Labels(sinks=0, local=6, capacity=1, block=4, fraction=0.25),
        Labels(sinks=1, local=6, capacity=2, block=5, fraction=0.5),  # blocks of 5, 5 and 2
        Labels(sinks=2, local=7, capacity=4, block=4, fraction=0.25, own=False, peak=True),
        Labels(sinks=1, local=6, capacity=3, block=5, fraction=0.5, turned=True),
    ],
    ids=["one frame", "ragged", "shared, peak, parts of chunks", "sinks that move"],
)
def test_a_rollout_is_that_of_lists(lists: Labels) -> None:
    model, chunks = small_model(), 5
    made = persistent_rollout(model, lists)
    ours = list(made.stream(chunks))
    for chunk, (a, b) in enumerate(zip(ours, by_lists(model, lists, chunks), strict=True)):
        assert torch.allclose(a, b, atol=1e-4), f"chunk {chunk}"
    assert made.cache.resident() == lists.frames
    assert len(made.cache.virtual) == lists.capacity
    chosen = [
        held_blocks(made, lists, layer, head) == set(lists.kept[layer, head])
        for layer in range(SMALL.layers)
        for head in range(SMALL.heads)
    ]
    assert all(chosen)
    oldest = next(frame for frame in lists.frames if frame >= lists.sinks)
    gone = {label for frame in range(lists.sinks, oldest) for label in lists.of_frame(frame)}
    for labels in lists.kept.values():
        assert set(labels) < gone, "nothing was chosen"
    alike = len({frozenset(lists.kept[0, head]) for head in range(SMALL.heads)}) == 1
    assert alike is not lists.own


def test_weights_are_a_softmax_over_all_blocks() -> None:
    q, k = torch.randn(3, 2, 2, 4), torch.randn(5, 3, 2, 4)
    weights = block_weights(q, k, 0.5)
    assert weights.shape == (2, 6, 15)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 6))
    ratio = weights[1, 3, 7] / weights[1, 3, 0]
    expected = torch.exp(0.5 * q[1, 1, 1] @ (k[2, 1, 1] - k[0, 0, 1]))
    assert ratio.item() == pytest.approx(expected.item(), rel=1e-4)


SET = Labels(sinks=1, local=6, capacity=2, block=5, fraction=0.5)


@pytest.mark.parametrize(
    ("recache", "stays"), [("window", True), ("none", True), ("all", False), ("flush", False), ("cut", False)]
)
def test_what_a_switch_does_to_the_set(recache: Any, stays: bool) -> None:
    made = persistent_rollout(small_model(), SET)
    list(made.stream(4))
    made.set_prompt(text(9), recache)
    assert len(made.cache.virtual) == (2 if stays else 0)
    before = [tuple(part.clone() for part in layer) for frame in made.cache.virtual for layer in frame]
    assert made.generate_chunk().isfinite().all()
    after = [layer for frame in made.cache.virtual for layer in frame]
    for one, other in zip(before, after, strict=False):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True)), "before the next commit"
    list(made.stream(3))
    assert len(made.cache.virtual) == 2, "it fills again"


def test_the_clean_pass_of_a_replaced_prompt_chooses() -> None:
    """The chunk before a switch chooses with its own prompt, although its keys are recomputed with the new one."""
    made, other = (persistent_rollout(small_model(), SET) for _ in range(2))
    list(made.stream(4))
    list(other.stream(4))
    made.set_prompt(text(9), "window")
    other.set_prompt(text(9), "none")
    for one, two in zip(made.cache.virtual, other.cache.virtual, strict=True):
        assert all(torch.equal(a[0], b[0]) for a, b in zip(one, two, strict=True))


def test_a_chunk_recomputed_in_part_does_not_see_blocks_of_itself() -> None:
    """With 7 recent frames a chunk leaves in part: its last frame is resident, its first may be in the set."""
    lists = replace(SET, local=7)
    made = persistent_rollout(small_model(), lists)
    list(made.stream(4))
    made._commit_pending()
    assert (made.cache.resident()[:2], made.cache.gone) == ([0, 8], 8)
    assert made.past(0, 2, [0])[0].shape[0] == 1
    assert made.past(0, 3, [0, 8])[0].shape[0] == 4


def test_a_schedule_without_a_clean_pass_chooses_by_the_last_forward() -> None:
    schedule = FlowSchedule.warped((1000, 500), clean_forward=False)
    made = persistent_rollout(small_model(), SET, schedule=schedule)
    list(made.stream(5))
    assert len(made.cache.virtual) == 2


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="expected at least 9 frames: 1 sinks, 2 persistent ones, and two chunks"
    ):
        persistent_rollout(small_model(), SET, window_frames=8)
    with pytest.raises(ConfigError, match="operator counts 2 persistent frames, the set is None"):
        persistent_rollout(small_model(), SET, persistent=None)
    with pytest.raises(ConfigError, match="persistent set has frames 0"):
        PersistentSet(0)
    with pytest.raises(ConfigError, match="joint recache"):
        persistent_rollout(small_model(), SET).set_prompt(text(9), "joint")
