"""Independent judge of both operators: plain loops in float64, written from the definition in docs/operators.md.

Nothing here imports the code under test. Sets are Python sets, sorting is Python's, and every sum runs over the
rows it is defined over. Slow, so keep shapes small.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

Array = NDArray[Any]
Pair = tuple[int, int]
"""(head, query block), the query block counted over the whole chunk."""

DENSE = 1 << 20


@dataclass(frozen=True, repr=False)
class HSACase:
    """One call of HierarchicalSparseAttention: inputs by name, in the operator's order, and attributes by name."""

    inputs: dict[str, Array]
    attributes: dict[str, Any]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in self.inputs.items())
        chunk, slots = int(self.inputs["chunk"]), self.inputs["frame_slots"].tolist()
        return f"HSACase({shapes}; chunk {chunk}, frame_slots {slots}, {self.attributes})"

    @property
    def heads(self) -> int:
        return int(self.inputs["q"].shape[1])

    @property
    def chunk_frames(self) -> int:
        return int(self.inputs["q"].shape[0]) // int(self.attributes["frame_tokens"])

    @property
    def past_slots(self) -> list[int]:
        return [int(slot) for slot in self.inputs["frame_slots"] if slot >= 0]

    @property
    def q_blocks(self) -> int:
        """Query blocks of the whole chunk."""
        return self.chunk_frames * len(_blocks(self.attributes["frame_tokens"], self.attributes["block_q"]))

    @property
    def k_blocks(self) -> int:
        """Key blocks of one frame."""
        return len(_blocks(self.attributes["frame_tokens"], self.attributes["block_k"]))

    @property
    def total_blocks(self) -> int:
        """Resident key blocks: past and current."""
        return (len(self.past_slots) + self.chunk_frames) * self.k_blocks

    def pairs(self) -> Iterator[Pair]:
        return ((head, block) for head in range(self.heads) for block in range(self.q_blocks))


@dataclass(frozen=True)
class Choice:
    """What one (head, query block) sees, with what is needed to judge rounding.

    Attributes:
        blocks: logical indices of the selected key blocks; where they are more than the eligible frames have, the
            first ones of the other frames are among them.
        block_scores: score of every resident key block, eligible or not.
        eligible: frames whose blocks are selected by score.
        frame_scores: score of each candidate frame; empty if every frame is eligible without a contest.
        frame_gap: distance between the scores of the last chosen and the first rejected candidate frame.
        block_gap: the same for blocks of eligible frames.
    """

    blocks: frozenset[int]
    block_scores: tuple[float, ...]
    eligible: frozenset[int]
    frame_scores: dict[int, float]
    frame_gap: float
    block_gap: float


Selection = dict[Pair, Choice]


def _blocks(frame_tokens: int, block: int) -> list[range]:
    """Token ranges of one frame's blocks."""
    return [range(start, min(start + block, frame_tokens)) for start in range(0, frame_tokens, block)]


def _top(scores: Mapping[int, float], count: int) -> tuple[list[int], float]:
    """Indices of the `count` largest scores, lowest index first among equals, and the gap to the next one."""
    ranked = sorted(scores, key=lambda index: (-scores[index], index))
    if count <= 0 or count >= len(ranked):
        return ranked[: max(count, 0)], np.inf
    return ranked[:count], scores[ranked[count - 1]] - scores[ranked[count]]


def kept_blocks(keep_q20: Sequence[int], chunk: int, total: int, past: int) -> int:
    """Number of key blocks that each query block keeps."""
    if past == 0:
        return total
    entry = keep_q20[max(0, min(chunk, len(keep_q20) - 1))]
    return min(max(1, entry * total // 2**20), total)


def hsa_select(case: HSACase, pairs: Iterable[Pair] | None = None) -> Selection:
    """Which key blocks each (head, query block) sees; `pairs` restricts the work to some of them."""
    a = case.attributes
    past, current, per_frame = len(case.past_slots), case.chunk_frames, case.k_blocks
    frames = past + current
    q_mean = case.inputs["q_mean"].astype(np.float64)
    frame_means = [case.inputs["past_kmean"][slot].astype(np.float64) for slot in case.past_slots]
    frame_means += [case.inputs["k_mean"][frame].astype(np.float64) for frame in range(current)]
    keep = kept_blocks(a["keep_q20"], int(case.inputs["chunk"]), case.total_blocks, past)

    selection: Selection = {}
    per_chunk_frame = case.q_blocks // current
    for head, block in case.pairs() if pairs is None else pairs:
        query = q_mean[block // per_chunk_frame, block % per_chunk_frame, head]
        scores = {
            frame * per_frame + b: float(np.dot(query, frame_means[frame][b, head]))
            for frame in range(frames)
            for b in range(per_frame)
        }
        eligible, frame_scores, frame_gap = set(range(frames)), {}, np.inf
        if past > a["keep_frames"]:
            sink = set(range(a["sink_frames"]))
            near = set(range(past - a["near_frames"], past))
            frame_scores = {
                frame: float(
                    np.dot(query, sum(frame_means[frame][b, head] for b in range(per_frame)) / per_frame)
                )
                for frame in range(past)
                if frame not in sink | near
            }
            room = a["keep_frames"] - a["sink_frames"] - a["near_frames"]
            best, frame_gap = _top(frame_scores, room)
            eligible = sink | near | set(range(past, frames)) | set(best)
        contest = {index: score for index, score in scores.items() if index // per_frame in eligible}
        blocks, block_gap = _top(contest, keep)
        others = sorted(index for index in scores if index not in contest)
        blocks += others[: keep - len(blocks)]
        selection[head, block] = Choice(
            frozenset(blocks),
            tuple(scores[index] for index in range(len(scores))),
            frozenset(eligible),
            frame_scores,
            frame_gap,
            block_gap,
        )
    return selection


def hsa_attend(case: HSACase, selection: Mapping[Pair, Iterable[int]]) -> Array:
    """Exact softmax attention over the given key blocks, as float64 `[T, H, D]`.

    Query blocks that `selection` does not name stay NaN.
    """
    a = case.attributes
    frame_tokens, slots, past = a["frame_tokens"], case.past_slots, len(case.past_slots)
    q = case.inputs["q"].astype(np.float64)
    out = np.full(q.shape, np.nan)
    query_ranges, key_ranges = _blocks(frame_tokens, a["block_q"]), _blocks(frame_tokens, a["block_k"])
    for (head, block), chosen in selection.items():
        keys, values = [], []
        for index in sorted(chosen):
            frame, rows = index // len(key_ranges), key_ranges[index % len(key_ranges)]
            if frame < past:
                keys += [case.inputs["past_k"][slots[frame], row, head] for row in rows]
                values += [case.inputs["past_v"][slots[frame], row, head] for row in rows]
            else:
                start = (frame - past) * frame_tokens
                keys += [case.inputs["k"][start + row, head] for row in rows]
                values += [case.inputs["v"][start + row, head] for row in rows]
        key, value = np.array(keys, np.float64), np.array(values, np.float64)
        start = block // len(query_ranges) * frame_tokens
        for row in query_ranges[block % len(query_ranges)]:
            logits = key @ q[start + row, head] * a["scale"]
            weights = np.exp(logits - logits.max())
            out[start + row, head] = weights @ value / weights.sum()
    return out


def hsa(case: HSACase) -> tuple[Array, Selection]:
    """The operator: float64 output `[T, H, D]` and what each query block saw."""
    selection = hsa_select(case)
    return hsa_attend(case, {pair: choice.blocks for pair, choice in selection.items()}), selection


def selection_errors(
    case: HSACase, selection: Selection, found: Mapping[Pair, Iterable[int]], tolerance: float = 1e-5
) -> list[str]:
    """Where `found` differs from `selection` by more than rounding; empty if it agrees.

    A difference is excused only if it can come from scores closer than `tolerance` to the threshold they were
    compared with (frame scores or block scores); exact ties are never excused, they must go to the lowest index.
    """
    errors = []
    for pair, choice in selection.items():
        have = frozenset(int(index) for index in found[pair])
        if have == choice.blocks:
            continue
        missing, extra = sorted(choice.blocks - have), sorted(have - choice.blocks)
        if 0 < choice.frame_gap <= tolerance or (
            0 < choice.block_gap <= tolerance
            and len(have) == len(choice.blocks)
            and all(index // case.k_blocks in choice.eligible for index in extra)
            and all(
                abs(choice.block_scores[i] - choice.block_scores[j]) <= 2 * tolerance
                for i in missing
                for j in extra
            )
        ):
            continue
        errors.append(
            f"head, query block {pair}: missing {missing}, unexpected {extra}; "
            f"gaps {choice.frame_gap:.3g} (frames), {choice.block_gap:.3g} (blocks)"
        )
    return errors


def is_ambiguous(selection: Selection, tolerance: float = 1e-5) -> bool:
    """Whether rounding could change the selection: two compared scores differ by at most `tolerance`, but differ."""
    return any(
        0 < choice.frame_gap <= tolerance or 0 < choice.block_gap <= tolerance
        for choice in selection.values()
    )


def mask_to_sets(mask: Array) -> dict[Pair, frozenset[int]]:
    """Bool `[H, query blocks, key blocks]` -> what each (head, query block) sees."""
    return {
        (head, block): frozenset(np.flatnonzero(mask[head, block]).tolist())
        for head in range(mask.shape[0])
        for block in range(mask.shape[1])
    }


def block_means(x: Array, frame_tokens: int, block: int) -> Array:
    """Mean of `x` `[T, H, D]` over each frame-aligned block's own rows, float64 `[frames, blocks, H, D]`."""
    frames, ranges = x.shape[0] // frame_tokens, _blocks(frame_tokens, block)
    out = np.zeros((frames, len(ranges), *x.shape[1:]))
    for frame in range(frames):
        for index, rows in enumerate(ranges):
            for row in rows:
                out[frame, index] += x[frame * frame_tokens + row].astype(np.float64)
            out[frame, index] /= len(rows)
    return out


def qk_prepare(
    inputs: Mapping[str, Array], attributes: Mapping[str, Any], dtype: Any = None
) -> dict[str, Array]:
    """The operator QKPrepare, float64 except that q and k are rounded to `dtype` before their means are taken.

    Args:
        inputs: qkv `[T, 3HD]`, bias `[3HD]`, norm_q and norm_k `[HD]`, cos and sin `[T, D/2]`.
        dtype: numpy type of q, k, v; None = the type of `qkv`.
    """
    dtype = inputs["qkv"].dtype if dtype is None else dtype
    heads = attributes["heads"]
    tokens, width = inputs["qkv"].shape
    dim = width // 3 // heads
    x = inputs["qkv"].astype(np.float64) + inputs["bias"].astype(np.float64)
    parts = {name: x[:, i * heads * dim : (i + 1) * heads * dim] for i, name in enumerate("qkv")}
    out: dict[str, Array] = {}
    for name in ("q", "k"):
        result = np.zeros((tokens, heads, dim))
        for token in range(tokens):
            row = parts[name][token]
            normed = row / np.sqrt(np.dot(row, row) / len(row) + attributes["eps"])
            normed = normed * inputs[f"norm_{name}"].astype(np.float64)
            for head in range(heads):
                for pair in range(dim // 2):
                    first, second = normed[head * dim + 2 * pair], normed[head * dim + 2 * pair + 1]
                    c, s = float(inputs["cos"][token, pair]), float(inputs["sin"][token, pair])
                    result[token, head, 2 * pair] = first * c - second * s
                    result[token, head, 2 * pair + 1] = first * s + second * c
        out[name] = result.astype(dtype)
    out["v"] = parts["v"].reshape(tokens, heads, dim).astype(dtype)
    out["q_mean"] = block_means(out["q"], attributes["frame_tokens"], attributes["block_q"])
    out["k_mean"] = block_means(out["k"], attributes["frame_tokens"], attributes["block_k"])
    return out


# ------------------------------------------------------------------------------------------------ random cases


def random_case(
    rng: np.random.Generator,
    *,
    heads: int = 2,
    head_dim: int = 8,
    frame_tokens: int = 12,
    block_q: int = 4,
    block_k: int = 4,
    chunk_frames: int = 3,
    past: int = 4,
    max_past: int | None = None,
    slots: int | None = None,
    keep_frames: int = 3,
    sink_frames: int = 1,
    near_frames: int = 1,
    keep_q20: Sequence[int] = (DENSE, DENSE // 2, DENSE // 4),
    chunk: int = 1,
    scale: float | None = None,
    ties: bool = False,
    poison: bool = True,
    dtype: Any = np.float32,
) -> HSACase:
    """A random call of the operator.

    Args:
        past: valid entries of `frame_slots`, in random physical slots.
        max_past: length of `frame_slots` (>= past); None = `past`.
        slots: slots of the pool (>= past); None = `max_past` + 2.
        ties: draw block means from few small integers (multiples of the blocks per frame, so that frame means
            are integers too): scores are exact in float32 and often equal. Otherwise means are those of q and k.
        poison: fill every slot that `frame_slots` does not name with NaN.
        dtype: numpy type of q, k, v and the cache.
    """
    max_past = past if max_past is None else max_past
    slots = max_past + 2 if slots is None else slots
    k_blocks = len(_blocks(frame_tokens, block_k))

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(dtype)

    tokens = chunk_frames * frame_tokens
    q, k, v = (normal(tokens, heads, head_dim) for _ in range(3))
    past_k, past_v = (normal(slots, frame_tokens, heads, head_dim) for _ in range(2))
    q_mean = block_means(q, frame_tokens, block_q)
    k_mean = block_means(k, frame_tokens, block_k)
    past_kmean = block_means(past_k.reshape(-1, heads, head_dim), frame_tokens, block_k)
    if ties:
        q_mean = rng.integers(-1, 2, q_mean.shape).astype(np.float64)
        k_mean = k_blocks * rng.integers(-1, 2, k_mean.shape).astype(np.float64)
        past_kmean = k_blocks * rng.integers(-1, 2, (slots, *k_mean.shape[1:])).astype(np.float64)
    physical = rng.permutation(slots)[:past]
    if poison:
        unused = np.setdiff1d(np.arange(slots), physical)
        for cache in (past_k, past_v, past_kmean):
            cache[unused] = np.nan
    return HSACase(
        inputs={
            "q": q,
            "k": k,
            "v": v,
            "q_mean": q_mean.astype(np.float32),
            "k_mean": k_mean.astype(np.float32),
            "past_k": past_k,
            "past_v": past_v,
            "past_kmean": past_kmean.astype(np.float32),
            "frame_slots": np.concatenate([physical, np.full(max_past - past, -1)]).astype(np.int32),
            "chunk": np.array(chunk, np.int32),
        },
        attributes={
            "frame_tokens": frame_tokens,
            "block_q": block_q,
            "block_k": block_k,
            "keep_frames": keep_frames,
            "sink_frames": sink_frames,
            "near_frames": near_frames,
            "scale": float(head_dim**-0.5 if scale is None else scale),
            "keep_q20": tuple(int(entry) for entry in keep_q20),
        },
    )


@st.composite
def hsa_attributes(draw: st.DrawFn) -> dict[str, Any]:
    """Attributes of HierarchicalSparseAttention: ragged and exact frames, sink and near up to covering everything."""
    sink, near = draw(st.integers(0, 2)), draw(st.integers(0, 3))
    entry = st.one_of(st.sampled_from([0, 1, DENSE // 3, DENSE // 2, DENSE]), st.integers(0, DENSE))
    return {
        "frame_tokens": draw(st.integers(5, 20)),
        "block_q": draw(st.sampled_from([4, 8])),
        "block_k": draw(st.sampled_from([4, 8])),
        "keep_frames": max(1, sink + near + draw(st.integers(0, 3))),
        "sink_frames": sink,
        "near_frames": near,
        "scale": draw(st.sampled_from([0.25, 0.5, 1.0])),
        "keep_q20": tuple(draw(st.lists(entry, min_size=1, max_size=4))),
    }


@st.composite
def hsa_cases(
    draw: st.DrawFn, attributes: st.SearchStrategy[dict[str, Any]] | None = None, dtype: Any = np.float32
) -> HSACase:
    """Small calls of the operator; `attributes` restricts the attribute sets (sessions can be reused then)."""
    attrs = draw(hsa_attributes() if attributes is None else attributes)
    past = draw(st.integers(0, 7))
    max_past = past + draw(st.integers(0, 2))
    return random_case(
        np.random.default_rng(draw(st.integers(0, 2**32 - 1))),
        heads=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([4, 6, 16])),
        chunk_frames=draw(st.sampled_from([1, 2, 3])),
        past=past,
        max_past=max_past,
        slots=past + draw(st.integers(0, 4)),
        chunk=draw(st.integers(-1, 6)),
        ties=draw(st.booleans()),
        dtype=dtype,
        **attrs,
    )
