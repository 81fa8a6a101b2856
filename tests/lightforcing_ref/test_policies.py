"""The policies of other methods against loops written from docs/policies.md, and in rollouts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from lightforcing_ref.attention import block_means, dense_attention, hsa_attention
from lightforcing_ref.cache import AttentionSpec
from lightforcing_ref.config import DiTConfig
from lightforcing_ref.errors import ConfigError
from lightforcing_ref.model import CausalWanModel
from lightforcing_ref.policies import (
    SLA,
    Policy,
    PolicyAttention,
    Radial,
    SlidingTile,
    SpargeAttention,
    View,
    VMoBA,
)
from lightforcing_ref.rollout import Rollout
from lightforcing_ref.sparsity import BlockGeometry, HSAConfig

Array = NDArray[np.float64]
Q20 = 1 << 20


@dataclass(frozen=True)
class Case:
    """Random queries and keys of one chunk, with everything as lists of tokens."""

    view: View

    @property
    def heads(self) -> int:
        return self.view.q.shape[1]

    @property
    def q(self) -> Array:
        return np.asarray(self.view.q.double())

    @property
    def k(self) -> Array:
        return np.asarray(self.view.k.double())

    def place(self, token: int) -> tuple[int, int, int]:
        """(frame, row, column) of a resident token; the queries are the last ones."""
        frame, inside = divmod(token, self.view.geometry.frame_tokens)
        return frame, *divmod(inside, self.view.grid[1])

    def runs(self, block: int, first: int) -> list[list[int]]:
        """Frame-aligned runs of `block` tokens, from frame `first` on."""
        tokens = self.view.geometry.frame_tokens
        return [
            list(range(frame * tokens + start, frame * tokens + min(start + block, tokens)))
            for frame in range(first, self.view.frames)
            for start in range(0, tokens, block)
        ]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    tokens = rows * columns
    geometry = BlockGeometry(tokens, draw(st.integers(1, 12)), draw(st.integers(1, 12)))
    past, current = draw(st.integers(1, 7)), draw(st.sampled_from([1, 3]))
    heads, dim = draw(st.integers(1, 2)), 4
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    q = torch.randn(current * tokens, heads, dim, generator=generator)
    # Keys with a common part, as real ones have: then some blocks are similar and others are not.
    common = draw(st.floats(0, 2)) * torch.randn(1, heads, dim, generator=generator)
    k = torch.randn((past + current) * tokens, heads, dim, generator=generator) + common
    return Case(
        View(
            q,
            k,
            block_means(q, tokens, geometry.block_q),
            block_means(k, tokens, geometry.block_k),
            past,
            draw(st.integers(0, 3)),
            (rows, columns),
            geometry,
            (Q20, Q20 // 3, Q20 // 7),
        )
    )


def seen_by(case: Case, sees: Callable[[int, int, int], bool]) -> NDArray[np.bool_]:
    """The mask of a predicate on (head, query token, key token), tokens counted among the resident ones."""
    queries, keys = case.view.q.shape[0], case.view.k.shape[0]
    return np.array(
        [
            [[sees(head, keys - queries + query, key) for key in range(keys)] for query in range(queries)]
            for head in range(case.heads)
        ]
    )


def mask(policy: Policy, case: Case) -> NDArray[np.bool_]:
    visible = policy.visible(case.view)
    return np.asarray(visible.expand(case.heads, -1, -1))


def kept(case: Case, fraction: float | None) -> int:
    total = len(case.runs(case.view.geometry.block_k, 0))
    if fraction is not None:
        return max(1, int(fraction * total))
    table = case.view.keep_q20
    return max(1, table[min(case.view.chunk, len(table) - 1)] * total // Q20)


def margin(scores: list[float], count: int) -> bool:
    """Whether the choice of the best `count` is beyond the rounding of float32."""
    ranked = sorted(scores, reverse=True)
    return count >= len(ranked) or ranked[count - 1] - ranked[count] > 1e-4


quick = settings(max_examples=25, deadline=None)


@quick
@given(cases(), st.data())
def test_sliding_tiles(case: Case, data: st.DataObject) -> None:
    tile = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    window = st.tuples(*[st.sampled_from([1, 3, 5]) for _ in range(3)])
    windows = data.draw(st.lists(window, min_size=case.heads, max_size=case.heads))
    sinks = data.draw(st.integers(0, 2))
    extents = (case.view.frames, *case.view.grid)
    counts = [math.ceil(extent / size) for extent, size in zip(extents, (1, *tile), strict=True)]

    def sees(head: int, query: int, key: int) -> bool:
        if case.place(key)[0] < sinks:
            return True
        for axis, (size, count) in enumerate(zip(windows[head], counts, strict=True)):
            index, other = (case.place(token)[axis] // (1, *tile)[axis] for token in (query, key))
            # A window of `size` tiles that lies inside and comes as close as it can to being centred.
            first = min(max(index - size // 2, 0), max(count - size, 0))
            if not first <= other < first + size:
                return False
        return True

    assert np.array_equal(mask(SlidingTile(tuple(windows), tile, sinks), case), seen_by(case, sees))


@quick
@given(cases(), st.floats(0.05, 2), st.integers(0, 2))
def test_radial(case: Case, decay: float, sinks: int) -> None:
    geometry = case.view.geometry
    tokens, block = geometry.frame_tokens, geometry.block_k
    queries = case.runs(geometry.block_q, 0)
    keys = case.runs(block, 0)

    def linked(query: int, key: int) -> bool:
        distance = abs(query // tokens - key // tokens)
        span = 2 ** len(f"{tokens:b}") / 2 ** len(f"{distance:b}")
        if span < block and distance % max(1, int(block / span)):
            return False
        return abs(query % tokens - key % tokens) <= max(span * decay, block)

    def stays(query_run: list[int], key_run: list[int]) -> bool:
        frames = query_run[0] // tokens, key_run[0] // tokens
        if frames[1] < sinks or abs(frames[0] - frames[1]) <= 1:
            return True
        columns = [sum(linked(query, key) for query in query_run) / len(query_run) for key in key_run]
        full = [density for density in columns if density > 0]
        return sum(density > 1 / 3 for density in full) > 0.6 * len(full)

    pairs = {
        (query, key)
        for query_run in queries
        if query_run[0] >= case.view.past_frames * tokens
        for key_run in keys
        if stays(query_run, key_run)
        for query in query_run
        for key in key_run
    }
    expected = seen_by(case, lambda _, query, key: (query, key) in pairs)
    assert np.array_equal(mask(Radial(decay, sinks), case), expected)


@quick
@given(cases(), st.none() | st.floats(0.05, 1))
def test_sla(case: Case, ratio: float | None) -> None:
    result = mask(SLA(ratio), case)
    geometry, first = case.view.geometry, case.view.past_frames
    keys, count = case.runs(geometry.block_k, 0), kept(case, ratio)
    shift = len(case.k) - len(case.q)
    for head in range(case.heads):
        mean = case.k[:, head].mean(0)
        for run in case.runs(geometry.block_q, first):
            rows = [token - shift for token in run]
            pooled = case.q[rows, head].mean(0)
            scores = [float(pooled @ (case.k[block, head] - mean).mean(0)) for block in keys]
            if not margin(scores, count):
                continue
            best = set(sorted(range(len(keys)), key=lambda i: -scores[i])[:count])
            tokens = {token for i in best for token in keys[i]}
            for row in rows:
                assert set(np.flatnonzero(result[head, row])) == tokens


def similar(tokens: Array, threshold: float) -> bool | None:
    """Mean cosine of all pairs above the threshold; None where it is too close to call."""
    units = [token / np.linalg.norm(token) for token in tokens]
    mean = np.mean([a @ b for a in units for b in units])
    return None if abs(mean - threshold) < 1e-4 else bool(mean > threshold)


@quick
@given(cases(), st.sampled_from(["top-k", "cdf"]), st.floats(-0.2, 0.9), st.floats(0.05, 0.99), st.booleans())
def test_sparge(case: Case, mode: str, threshold: float, level: float, smooth: bool) -> None:
    policy = SpargeAttention("cdf" if mode == "cdf" else "top-k", level, level, threshold, smooth)
    result = mask(policy, case)
    geometry, first = case.view.geometry, case.view.past_frames
    keys, count = case.runs(geometry.block_k, 0), kept(case, level)
    shift = len(case.k) - len(case.q)
    for head in range(case.heads):
        k = case.k[:, head] - (case.k[:, head].mean(0) if smooth else 0)
        alike = [similar(k[block], threshold) for block in keys]
        for run in case.runs(geometry.block_q, first):
            rows = [token - shift for token in run]
            own = similar(case.q[rows, head], threshold)
            if own is None or None in alike:
                continue
            chosen = {i for i in range(len(keys)) if not own or not alike[i]}
            logits = {
                i: float(case.q[rows, head].mean(0) @ k[keys[i]].mean(0)) / math.sqrt(4)
                for i in range(len(keys))
                if alike[i]
            }
            total = sum(math.exp(value) for value in logits.values())
            ranked = sorted(logits, key=lambda i: -logits[i])
            if mode == "top-k":
                if not margin(list(logits.values()), count):
                    continue
                chosen |= set(ranked[:count])
            else:
                running, close = 0.0, not margin(list(logits.values()), 1)
                for position, i in enumerate(ranked):
                    chosen.add(i)
                    running += math.exp(logits[i]) / total
                    close |= abs(running - level) < 1e-4 or not margin(list(logits.values()), position + 1)
                    if running > level:
                        break
                if close:
                    continue
            tokens = {token for i in chosen for token in keys[i]}
            for row in rows:
                assert set(np.flatnonzero(result[head, row])) == tokens


@quick
@given(cases(), st.data())
def test_vmoba(case: Case, data: st.DataObject) -> None:
    size = st.none() | st.integers(1, 4)
    block = data.draw(st.tuples(size, size, size))
    mode = data.draw(st.sampled_from(["top-k", "threshold"]))
    top, threshold = data.draw(st.integers(1, 5)), data.draw(st.floats(0.05, 0.95))
    pooled = data.draw(st.none() | st.integers(1, 7))
    policy = VMoBA(block, "top-k" if mode == "top-k" else "threshold", top, threshold, pooled)
    result = mask(policy, case)

    def block_of(token: int) -> tuple[int, ...]:
        return tuple(
            0 if size is None else index // size for index, size in zip(case.place(token), block, strict=True)
        )

    members: dict[tuple[int, ...], list[int]] = {}
    for token in range(len(case.k)):
        members.setdefault(block_of(token), []).append(token)
    shift, runs = len(case.k) - len(case.q), [[row] for row in range(len(case.q))]
    if pooled is not None:  # patch by patch, and in each in raster order
        by_frame: dict[int, list[int]] = {}
        for row in range(len(case.q)):
            by_frame.setdefault(case.place(shift + row)[0], []).append(row)
        ordered_rows = [
            sorted(rows, key=lambda row: (block_of(shift + row)[1:], row)) for rows in by_frame.values()
        ]
        runs = [rows[i : i + pooled] for rows in ordered_rows for i in range(0, len(rows), pooled)]
    for head in range(case.heads):
        for rows in runs:
            query = case.q[rows, head].mean(0)
            own = {block_of(shift + row) for row in rows}
            scores = {name: float(query @ case.k[tokens, head].mean(0)) for name, tokens in members.items()}
            others = sorted((name for name in scores if name not in own), key=lambda name: -scores[name])
            ordered = [scores[name] for name in others]
            if mode == "top-k":
                count = max(0, top - len(own))
                close = count > 0 and not margin(ordered, count)
            else:
                low, high = min(scores.values()), max(scores.values())
                share = {name: (scores[name] - low) / (high - low or 1) for name in scores}
                total, running, count, close = sum(share.values()), sum(share[name] for name in own), 0, False
                while running < threshold * total and count < len(others):
                    close |= abs(running - threshold * total) < 1e-4
                    running += share[others[count]]
                    count += 1
                close |= abs(running - threshold * total) < 1e-4 or (count > 0 and not margin(ordered, count))
            if close:
                continue
            chosen = {*own, *others[:count]}
            tokens = {token for name in chosen for token in members[name]}
            for row in rows:
                assert set(np.flatnonzero(result[head, row])) == tokens


@quick
@given(cases())
def test_every_token_sees_itself_or_something(case: Case) -> None:
    """No policy leaves a row of the softmax empty."""
    for policy in (SlidingTile(), Radial(), SLA(), SpargeAttention(), SpargeAttention("cdf"), VMoBA()):
        assert mask(policy, case).any(-1).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SlidingTile(((2, 3, 3),)), "odd"),
        (lambda: SlidingTile(tile=(0, 8)), "tile"),
        (lambda: Radial(decay=0), "decay"),
        (lambda: SLA(ratio=1.5), "ratio"),
        (lambda: SpargeAttention(cumulative=0), "cumulative"),
        (lambda: VMoBA((0, None, None)), "block"),
        (lambda: VMoBA(top=0), "top"),
        (lambda: VMoBA(pooled=0), "choose together"),
    ],
)
def test_values_out_of_range_are_refused(make: Callable[[], Policy], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


# In rollouts.

CONFIG = DiTConfig(dim=24, ffn_dim=32, heads=2, layers=3, text_dim=8, text_len=4, freq_dim=16)
GRID = (4, 5)
SPEC = AttentionSpec(2, BlockGeometry(20, 8, 8), HSAConfig(3, 1, 1), (Q20, Q20 // 3), 12**-0.5)


@pytest.fixture(scope="module")
def model() -> CausalWanModel:
    torch.manual_seed(5)
    return CausalWanModel(CONFIG).eval()


def rollout(model: CausalWanModel, **changes: object) -> Rollout:
    text = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))

    def noise(chunk: int, step: int) -> Tensor:
        return torch.randn(16, 3, 8, 10, generator=torch.Generator().manual_seed(10 * chunk + step))

    plain = Rollout(model, SPEC, text, noise, GRID, window_frames=9, sink_frames=1)
    return replace(plain, **changes)  # type: ignore[arg-type]


WHOLE: dict[str, Policy] = {
    "sta": SlidingTile(((99, 99, 99),)),
    "radial": Radial(decay=1e6, sink_frames=99),
    "sla": SLA(ratio=1),
    "sparge": SpargeAttention(similarity=1),
    "vmoba": VMoBA((1, 2, 2), "top-k", top=999),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_policy_that_sees_all_is_full_attention(model: CausalWanModel, name: str) -> None:
    dense = replace(SPEC, keep_q20=(Q20,), hsa=HSAConfig(99, 1, 1))
    expected = torch.cat(list(rollout(model, spec=dense).stream(4)), 1)
    actual = torch.cat(list(rollout(model, attend=PolicyAttention(WHOLE[name], GRID)).stream(4)), 1)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_sla_is_one_stage_of_hsa(model: CausalWanModel) -> None:
    """Subtracting the mean key moves all scores of a row alike: without its linear branch SLA is plain top-k."""
    one_stage = replace(SPEC, hsa=HSAConfig(99, 0, 0))
    expected = torch.cat(list(rollout(model, spec=one_stage).stream(4)), 1)
    actual = torch.cat(list(rollout(model, attend=PolicyAttention(SLA(), GRID)).stream(4)), 1)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_layers_may_have_operators_of_their_own(model: CausalWanModel) -> None:
    """One operator for each layer, as VMoBA alternates its blocks; every layer runs its own once per forward."""
    calls: list[int] = []

    def counted(layer: int) -> Callable[..., Tensor]:
        def attend(*inputs: Tensor, **attributes: object) -> Tensor:
            calls.append(layer)
            return hsa_attention(*inputs, **attributes)  # type: ignore[arg-type]

        return attend

    plain = torch.cat(list(rollout(model).stream(2)), 1)
    by_layer = torch.cat(list(rollout(model, attend=[counted(layer) for layer in range(3)]).stream(2)), 1)
    assert torch.equal(by_layer, plain)
    assert calls == [0, 1, 2] * 9  # two chunks of four forwards, and the clean one between them


def test_absent_slots_are_not_read() -> None:
    """Frames come by their slots, in any order; slots that are not named may hold anything."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(60, 2, 4, generator=generator) for _ in range(3))
    past_k, past_v = (torch.randn(4, 20, 2, 4, generator=generator) for _ in range(2))
    past_k[0], past_v[0] = torch.nan, torch.nan
    means = block_means(past_k.flatten(0, 1), 20, 8)
    out = PolicyAttention(SlidingTile(((99, 99, 99),)), GRID)(
        q, k, v, block_means(q, 20, 8), block_means(k, 20, 8), past_k, past_v, means,
        torch.tensor([3, 1, -1, -1]), 1, frame_tokens=20, block_q=8, block_k=8, scale=0.5, keep_q20=(Q20,),
    )  # fmt: skip
    order = [3, 1]
    keys, values = torch.cat((past_k[order].flatten(0, 1), k)), torch.cat((past_v[order].flatten(0, 1), v))
    torch.testing.assert_close(out, dense_attention(q, keys, values, 0.5))


def test_a_grid_that_does_not_fit_is_refused(model: CausalWanModel) -> None:
    with pytest.raises(ConfigError, match="grid 4x4 holds 16 tokens"):
        rollout(model, attend=PolicyAttention(SLA(), (4, 4))).generate_chunk()
