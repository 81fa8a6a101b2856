"""The bodies of the other methods' operators; see docs/policies.md.

Each says which groups of keys a query keeps: blocks in raster order, tiles, or blocks in time and space.
"""

from __future__ import annotations

import onnx_ir as ir

from plugins.contract import RadialAttributes
from plugins.maps import radial_blocks

from .attention import AttentionBody, AttentionForm

__all__ = ["RadialBody", "SlidingTileBody", "SpargeBody", "VMoBABody"]

_MOST_FRAMES = 256
"""Resident frames that a Radial table serves."""


class _RasterBlocks(AttentionBody):
    """Groups are the key blocks of all frames."""

    def key_blocks(self) -> ir.Value:
        """Block of each key, [tokens]."""
        b = self.b
        token = b("Range", b.scalar(0), self.frame_tokens, b.scalar(1))
        frame = b("Mul", b("Unsqueeze", self.count(self.frames), b.int_list(1)), self.k_blocks)
        return b("Reshape", b("Add", frame, b("Div", token, self.block_k)), b.int_list(-1))


class RadialBody(_RasterBlocks):
    """A table of what two frames at a distance see of each other, looked up for every pair of frames."""

    def __init__(self, made_for: RadialAttributes) -> None:
        super().__init__()
        self._table = radial_blocks(
            made_for.frame_tokens, made_for.block_q, made_for.block_k, made_for.decay, _MOST_FRAMES
        )

    def emit(self, form: AttentionForm) -> ir.Value:
        """The output [T, H, D]."""
        b = self.b
        frame = self.count(self.frames)
        query = b("Unsqueeze", b("Add", self.past, self.count(self.current)), b.int_list(1))
        table = b("Constant", value=ir.AttrTensor("value", ir.tensor(self._table)))
        seen = b("Gather", table, b("Abs", b("Sub", query, frame)), axis=0)  # [C, N, QB, KB]
        sink = b("Reshape", b("Less", frame, b.attribute("sink_frames")), b.int_list(1, -1, 1, 1))
        seen = b("Transpose", b("Or", seen, sink), perm=[0, 2, 1, 3])
        groups = b("Mul", self.frames, self.k_blocks)
        kept = b("Reshape", seen, b("Concat", b.int_list(1, -1, 1), groups, axis=0))
        return self.grouped(kept, self.key_blocks(), form)


class SlidingTileBody(AttentionBody):
    """Groups are tiles, counted frame by frame."""

    def emit(self, form: AttentionForm) -> ir.Value:
        """The output [T, H, D]."""
        b = self.b
        columns = b.attribute("columns")
        sides = b.attribute("tile", ir.AttributeType.INTS)
        tile_rows, tile_columns = (b("Gather", sides, b.scalar(axis)) for axis in (0, 1))
        token = b("Range", b.scalar(0), self.frame_tokens, b.scalar(1))
        row = b("Div", b("Div", token, columns), tile_rows)
        column = b("Div", b("Mod", token, columns), tile_columns)
        down = self.ceil_div(b("Div", self.frame_tokens, columns), tile_rows)
        across = self.ceil_div(columns, tile_columns)
        tile = b("Add", b("Mul", row, across), column)  # [frame_tokens]
        tiles = b("Mul", down, across)

        windows = b("Reshape", b.attribute("windows", ir.AttributeType.INTS), b.int_list(-1, 3))
        frame = self.count(self.frames)
        in_time = self._window(windows, 0, b("Add", self.past, self.count(self.current)), frame, self.frames)
        places = (self.count(down), self.count(across))
        in_height = self._window(windows, 1, places[0], places[0], down)
        in_width = self._window(windows, 2, places[1], places[1], across)
        # [windows, C, rows, columns of the query's tile, N, rows, columns of the key's tile]
        seen = b(
            "And",
            b("Unsqueeze", in_time, b.int_list(2, 3, 5, 6)),
            b("Unsqueeze", in_height, b.int_list(1, 3, 4, 6)),
        )
        seen = b("And", seen, b("Unsqueeze", in_width, b.int_list(1, 2, 4, 5)))
        sink = b("Less", frame, b.attribute("sink_frames"))
        seen = b("Or", seen, b("Reshape", sink, b.int_list(1, 1, 1, 1, -1, 1, 1)))
        groups = b("Mul", self.frames, tiles)
        by_tile = b("Reshape", seen, b("Concat", b.vector(0, -1, tiles), groups, axis=0))
        by_token = b("Gather", by_tile, tile, axis=2)  # [windows, C, frame_tokens, G]
        kept = self.by_query(b("Reshape", by_token, b("Concat", b.int_list(0, -1), groups, axis=0)))
        first = b("Unsqueeze", b("Mul", frame, tiles), b.int_list(1))
        return self.grouped(kept, b("Reshape", b("Add", first, tile), b.int_list(-1)), form)

    def _window(
        self, windows: ir.Value, axis: int, query: ir.Value, key: ir.Value, count: ir.Value
    ) -> ir.Value:
        """Which keys lie in the window of which queries on one axis, bool [windows, queries, keys]."""
        b = self.b
        size = b("Reshape", b("Gather", windows, b.scalar(axis), axis=1), b.int_list(-1, 1))
        reach = b("Div", size, b.scalar(2))
        last = b("Max", b("Sub", b("Sub", count, b.scalar(1)), reach), reach)
        centre = b("Min", b("Max", b("Unsqueeze", query, b.int_list(0)), reach), last)
        distance = b("Abs", b("Sub", b("Unsqueeze", centre, b.int_list(2)), key))
        near = b("LessOrEqual", distance, b("Unsqueeze", reach, b.int_list(2)))
        return b("Or", near, b("Unsqueeze", b("GreaterOrEqual", size, count), b.int_list(2)))


class SpargeBody(_RasterBlocks):
    """Blocks by the softmax of pooled products, and all that their means do not stand for."""

    def __init__(self, *, cumulative: bool) -> None:
        super().__init__()
        self._cumulative = cumulative

    def emit(self, form: AttentionForm) -> ir.Value:
        """The output [T, H, D]."""
        b = self.b
        k = b.to_float32(self.keys(self.rows_heads_dim))
        smooth = b.to_float32(b.attribute("smooth"))
        shift = b("Mul", b("ReduceMean", k, b.int_list(0), keepdims=0), smooth)  # [H, D]
        means = b("Sub", b("Reshape", self.means(), self.rows_heads_dim), shift)
        query = b("Transpose", b("Reshape", self.q_mean, self.rows_heads_dim), perm=[1, 0, 2])
        scores = b("MatMul", query, b("Transpose", means, perm=[1, 2, 0]))
        scores = b("Div", scores, b("Sqrt", b.to_float32(self.dim)))
        own = self._similar(b.to_float32(self.q), self.q_blocks, self.block_q)  # [H, C*QB]
        others = b("Unsqueeze", self._similar(b("Sub", k, shift), self.k_blocks, self.block_k), b.int_list(1))
        weights = b("Softmax", b("Where", others, scores, self.lowest), axis=-1)
        # Where no block is similar the row is undefined, and all blocks are kept below.
        weights = b("Where", b("IsNaN", weights), b.number(0.0), weights)
        alone = b("Not", b("And", others, b("Unsqueeze", own, b.int_list(2))))
        kept = b("Or", self._best(weights), alone)
        return self.grouped(b("Unsqueeze", kept, b.int_list(2)), self.key_blocks(), form)

    def _best(self, weights: ir.Value) -> ir.Value:
        b = self.b
        if not self._cumulative:
            _, best = b.multi("TopK", [weights, self.kept_blocks()], 2, axis=-1)
            return _scattered(self, weights, best, b("Expand", b.number(1.0), b("Shape", best)))
        sorted_weights, order = b.multi("TopK", [weights, b.shape(weights, 2, 3)], 2, axis=-1)
        before = b("Sub", b("CumSum", sorted_weights, b.scalar(2)), sorted_weights)
        enough = b("LessOrEqual", before, b.attribute("cumulative", ir.AttributeType.FLOAT))
        return _scattered(self, weights, order, b.to_float32(enough))

    def _similar(self, tokens: ir.Value, blocks: ir.Value, block: ir.Value) -> ir.Value:
        """Which blocks of `tokens` [n, H, D] resemble themselves: the square of the mean unit vector, [H, blocks]."""
        b = self.b
        length = b("Sqrt", b("ReduceSumSquare", tokens, b.int_list(2), keepdims=1))
        units = b("Div", tokens, b("Max", length, b.number(1e-12)))
        frames = b("Reshape", units, self.frames_rows_heads_dim)
        padding = b("Sub", b("Mul", blocks, block), self.frame_tokens)
        padded = b("Pad", frames, b.vector(0, padding), b.number(0.0), b.int_list(1))
        parts = b("Reshape", padded, b("Concat", b.vector(-1, block), self.heads_dim, axis=0))
        squares = b(
            "ReduceSumSquare", b("ReduceSum", parts, b.int_list(1), keepdims=0), b.int_list(2), keepdims=0
        )
        start = b("Mul", b("Range", b.scalar(0), blocks, b.scalar(1)), block)
        rows = b.to_float32(b("Min", b("Sub", self.frame_tokens, start), block))
        by_frame = b("Reshape", squares, b("Concat", b.vector(-1, blocks), self.heads, axis=0))
        mean = b("Div", by_frame, b("Unsqueeze", b("Mul", rows, rows), b.int_list(0, 2)))
        similar = b("Greater", mean, b.attribute("similarity", ir.AttributeType.FLOAT))
        return b(
            "Transpose", b("Reshape", similar, b("Concat", b.int_list(-1), self.heads, axis=0)), perm=[1, 0]
        )


class VMoBABody(AttentionBody):
    """Every token chooses, or every run of tokens; groups are blocks of frames, rows and columns."""

    def __init__(self, *, by_count: bool, pooled: bool) -> None:
        super().__init__()
        self._by_count, self._pooled = by_count, pooled

    def emit(self, form: AttentionForm) -> ir.Value:
        """The output [T, H, D]."""
        b = self.b
        group, groups = self._groups()
        k = b.to_float32(self.keys(self.rows_heads_dim))
        member = b.to_float32(b("Equal", b("Unsqueeze", self.count(groups), b.int_list(1)), group))
        sums = b("MatMul", member, b("Reshape", k, b.int_list(0, -1)))
        means = b("Div", sums, b("ReduceSum", member, b.int_list(1), keepdims=1))
        means = b("Transpose", b("Reshape", means, self.rows_heads_dim), perm=[1, 2, 0])
        past_tokens = b("Mul", self.past, self.frame_tokens)
        tokens = b("Mul", self.frames, self.frame_tokens)
        own_group = b("Slice", group, past_tokens, tokens)
        own = b("Equal", b("Unsqueeze", own_group, b.int_list(1)), self.count(groups))  # [T, G]
        queries = b.to_float32(self.q)
        if self._pooled:  # a run of tokens takes the place of each token
            run, share = self._runs()
            queries = self._by_run(share, queries, self.rows_heads_dim)
            owned = self._by_run(share, b.to_float32(own), b("Concat", b.int_list(-1), groups, axis=0))
            own = b("Greater", owned, b.number(0.0))
        scores = b("MatMul", b("Transpose", queries, perm=[1, 0, 2]), means)  # [H, T, G]
        kept = self._top(scores, own, groups) if self._by_count else self._share(scores, own, groups)
        kept = b("Or", kept, own)
        if self._pooled:
            kept = b("Gather", kept, run, axis=1)
        return self.grouped(self.by_query(kept), group, form)

    def _runs(self) -> tuple[ir.Value, ir.Value]:
        """Run of each query, [T], and what each token adds to the mean of a frame's runs, [runs of a frame, FT]."""
        b = self.b
        token = b("Range", b.scalar(0), self.frame_tokens, b.scalar(1))
        patch = b(
            "Slice",
            self._groups(whole_time=True)[0],
            b.int_list(0),
            b("Reshape", self.frame_tokens, b.int_list(1)),
        )
        key = b("Add", b("Mul", patch, self.frame_tokens), token)
        earlier = b("Less", b("Unsqueeze", key, b.int_list(0)), b("Unsqueeze", key, b.int_list(1)))
        place = b("ReduceSum", b("Cast", earlier, to=ir.DataType.INT64.value), b.int_list(1), keepdims=0)
        size = b.attribute("query_block")
        of_frame = b("Div", place, size)
        count = self.ceil_div(self.frame_tokens, size)
        runs = b("Unsqueeze", b("Range", b.scalar(0), count, b.scalar(1)), b.int_list(1))
        member = b.to_float32(b("Equal", runs, of_frame))
        share = b("Div", member, b("ReduceSum", member, b.int_list(1), keepdims=1))
        frame = b("Mul", b("Unsqueeze", self.count(self.current), b.int_list(1)), count)
        return b("Reshape", b("Add", frame, of_frame), b.int_list(-1)), share

    def _by_run(self, share: ir.Value, tokens: ir.Value, shape: ir.Value) -> ir.Value:
        """The means over runs of `tokens` [T, ...], reshaped to `shape`."""
        b = self.b
        frames = b("Reshape", tokens, b.vector(self.current, self.frame_tokens, -1))
        return b("Reshape", b("MatMul", share, frames), shape)

    def _groups(self, *, whole_time: bool = False) -> tuple[ir.Value, ir.Value]:
        """Block of each resident token, [tokens], and their number, [1]; `whole_time`: blocks have all frames."""
        b = self.b
        columns = b.attribute("columns")
        token = b("Range", b.scalar(0), self.frame_tokens, b.scalar(1))
        axes = (
            (b("Unsqueeze", self.count(self.frames), b.int_list(1)), self.frames),
            (b("Div", token, columns), b("Div", self.frame_tokens, columns)),
            (b("Mod", token, columns), columns),
        )
        extents = b.attribute("extent", ir.AttributeType.INTS)
        index, count = b.scalar(0), b.int_list(1)
        for axis, (place, size) in enumerate(axes):
            extent = b.scalar(0) if whole_time and axis == 0 else b("Gather", extents, b.scalar(axis))
            step = b("Where", b("Equal", extent, b.scalar(0)), size, extent)
            parts = self.ceil_div(size, step)
            index = b("Add", b("Mul", index, parts), b("Div", place, step))
            count = b("Mul", count, parts)
        return b("Reshape", index, b.int_list(-1)), count

    def _top(self, scores: ir.Value, own: ir.Value, groups: ir.Value) -> ir.Value:
        b = self.b
        contest = b("Where", own, b.number(float("inf")), scores)
        _, best = b.multi("TopK", [contest, b("Min", b.attribute("top"), groups)], 2, axis=-1)
        return _scattered(self, scores, best, b("Expand", b.number(1.0), b("Shape", best)))

    def _share(self, scores: ir.Value, own: ir.Value, groups: ir.Value) -> ir.Value:
        b = self.b
        last = b.int_list(2)
        low, high = (b(kind, scores, last, keepdims=1) for kind in ("ReduceMin", "ReduceMax"))
        spread = b("Greater", high, low)
        # Equal scores share alike.
        stretched = b("Div", b("Sub", scores, low), b("Where", spread, b("Sub", high, low), b.number(1.0)))
        weights = b("Where", spread, stretched, b.number(1.0))
        contest = b("Where", own, b.number(float("inf")), weights)
        _, order = b.multi("TopK", [contest, groups], 2, axis=-1)
        wide = b("Cast", weights, to=ir.DataType.DOUBLE.value)
        sorted_weights = b("GatherElements", wide, order, axis=2)
        before = b("Sub", b("CumSum", sorted_weights, b.scalar(2)), sorted_weights)
        share = b("Cast", b.attribute("threshold", ir.AttributeType.FLOAT), to=ir.DataType.DOUBLE.value)
        wanted = b("Less", before, b("Mul", b("ReduceSum", wide, last, keepdims=1), share))
        return _scattered(self, scores, order, b.to_float32(wanted))


def _scattered(body: AttentionBody, like: ir.Value, order: ir.Value, chosen: ir.Value) -> ir.Value:
    """Bool of the shape of `like`: what `chosen` [..., n] says of the columns `order`, false elsewhere."""
    b = body.b
    nothing = b("Expand", b.number(0.0), b("Shape", like))
    return b("Cast", b("ScatterElements", nothing, order, chosen, axis=-1), to=ir.DataType.BOOL.value)
