"""What the bodies of all attention operators share: geometry, keys and values, and attention over groups of keys."""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

from plugins import contract

from .tape import Body

__all__ = ["AttentionBody", "AttentionForm"]

AttentionForm = Literal["dense", "scan"]
"""How an attention body computes.

- `"dense"`: all scores of all heads at once, masked. No control flow; memory grows with heads * tokens * keys.
- `"scan"`: gathers the selected keys, one head and query block at a time. Work and memory follow the kept keys, so
  that full-size layers fit.
"""


class AttentionBody:
    """Emits the body of an attention operator; see docs/operators.md.

    Shapes in comments: T tokens, H heads, D head_dim, C frames of the chunk, P past frames, N = P + C, QB and KB
    query and key blocks per frame.
    """

    def __init__(self, inputs: tuple[str, ...] = contract.HSA_INPUTS) -> None:
        b = self.b = Body()
        named = self.named = {name: ir.Value(name=name) for name in inputs}
        self.inputs = list(named.values())
        (self.q, self.k, self.v, self.q_mean, self.k_mean) = (named[name] for name in contract.HSA_INPUTS[:5])
        (self.past_k, self.past_v, self.past_kmean, frame_slots, self.chunk) = (
            named[name] for name in contract.HSA_INPUTS[5:]
        )
        self.frame_tokens, self.block_q, self.block_k = map(
            b.attribute, ("frame_tokens", "block_q", "block_k")
        )
        self.q_blocks = self.ceil_div(self.frame_tokens, self.block_q)
        self.k_blocks = self.ceil_div(self.frame_tokens, self.block_k)
        self.lowest = b.number(float("-inf"))
        self.scale = b.attribute("scale", ir.AttributeType.FLOAT)
        self.heads = b.shape(self.q, 1, 2)
        self.dim = self.key_dim = b.shape(self.q, 2, 3)
        self.heads_dim = b.shape(self.q, 1, 3)
        present = b("GreaterOrEqual", frame_slots, b("CastLike", b.scalar(0), frame_slots))
        self.slots = b("Compress", frame_slots, present, axis=0)  # [P]
        self.past = b("Shape", self.slots)
        self.current = b.shape(self.q_mean, 0, 1)
        self.frames = b("Add", self.past, self.current)
        self.rows_heads_dim = b("Concat", b.int_list(-1), self.heads_dim, axis=0)
        self.frames_rows_heads_dim = b("Concat", b.vector(-1, self.frame_tokens), self.heads_dim, axis=0)

    def ceil_div(self, a: ir.Value, divisor: ir.Value) -> ir.Value:
        b = self.b
        return b("Div", b("Sub", b("Add", a, divisor), b.scalar(1)), divisor)

    def count(self, stop: ir.Value) -> ir.Value:
        """0, 1, ... up to a scalar or one-element value."""
        b = self.b
        return b("Range", b.scalar(0), b("Squeeze", stop), b.scalar(1))

    def means(self) -> ir.Value:
        """Block means of the keys of all frames, oldest first, [N, KB, H, D]."""
        b = self.b
        return b("Concat", b("Gather", self.past_kmean, self.slots, axis=0), self.k_mean, axis=0)

    def kept_blocks(self) -> ir.Value:
        """Number of blocks to keep, [1]."""
        return self.kept_of(self.b("Mul", self.frames, self.k_blocks))

    def kept_of(self, total: ir.Value) -> ir.Value:
        """Number of blocks to keep of so many, [1]."""
        b = self.b
        table = b.attribute("keep_q20", ir.AttributeType.INTS)
        last = b("Sub", b("Size", table), b.scalar(1))
        chunk = b("Cast", self.chunk, to=ir.DataType.INT64.value)
        entry = b("Gather", table, b("Clip", chunk, b.scalar(0), last))
        kept = b("Div", b("Mul", entry, total), b.scalar(contract.DENSE_Q20))
        kept = b("Min", b("Max", kept, b.scalar(1)), total)
        return b("Where", b("Equal", self.past, b.scalar(0)), total, kept)

    def keys_values(self, row_shape: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Keys and values of all N frames, oldest first, reshaped; in the compute type."""
        return self.keys(row_shape), self._frames_of(self.past_v, self.v, row_shape)

    def keys(self, row_shape: ir.Value) -> ir.Value:
        """Keys of all N frames."""
        return self._frames_of(self.past_k, self.k, row_shape)

    def _frames_of(self, cache: ir.Value, chunk: ir.Value, row_shape: ir.Value) -> ir.Value:
        b = self.b
        past = b("Gather", cache, self.slots, axis=0)
        current = b("Reshape", chunk, self.frames_rows_heads_dim)
        return b("Reshape", b("Concat", past, current, axis=0), row_shape)

    def softmax(self, on: Body, logits: ir.Value) -> ir.Value:
        """The weights of the last axis; `on` is the graph that it happens in."""
        return on("Softmax", logits, axis=-1)

    def query_tiles(self) -> ir.Value:
        """Q as float32 [H, C*QB, block_q, D], the rows of ragged tiles filled up with zeros."""
        b = self.b
        frames = b.to_float32(b("Reshape", self.q, self.frames_rows_heads_dim))
        padded = b("Pad", frames, b.vector(0, self._padding()), b.number(0.0), b.int_list(1))
        tiles = b("Reshape", padded, b("Concat", b.vector(-1, self.block_q), self.heads_dim, axis=0))
        return b("Transpose", tiles, perm=[2, 0, 1, 3])

    def _padding(self) -> ir.Value:
        """Rows that a frame's last query block lacks."""
        return self.b("Sub", self.b("Mul", self.q_blocks, self.block_q), self.frame_tokens)

    def by_query(self, kept: ir.Value) -> ir.Value:
        """What each token keeps, bool [H or 1, T, G], by query tile: [H or 1, C*QB, block_q, G].

        Rows that fill up ragged tiles keep everything: a softmax over nothing is no number.
        """
        b = self.b
        frames = b("Reshape", kept, b.vector(0, -1, self.frame_tokens, b.shape(kept, 2, 3)))
        filling = b("Constant", value=ir.AttrTensor("value", ir.tensor([True], dtype=ir.DataType.BOOL)))
        padded = b("Pad", frames, b.vector(0, self._padding()), b("Squeeze", filling), b.int_list(2))
        return b("Reshape", padded, b.vector(0, -1, self.block_q, b.shape(kept, 2, 3)))

    def output(self, tiles: ir.Value) -> ir.Value:
        """[H, C*QB, block_q, D] -> [T, H, D] in the type of q, without the rows that fill up ragged tiles."""
        b = self.b
        rows = b("Mul", self.q_blocks, self.block_q)
        frames = b(
            "Reshape",
            b("Transpose", tiles, perm=[1, 2, 0, 3]),
            b("Concat", b.vector(-1, rows), self.heads_dim, axis=0),
        )
        frames = b(
            "Slice", frames, b.int_list(0), b("Reshape", self.frame_tokens, b.int_list(1)), b.int_list(1)
        )
        return b("CastLike", b("Reshape", frames, self.rows_heads_dim), self.q)

    def masked(self, bias: ir.Value) -> ir.Value:
        """The output [T, H, D], from all scores and what is added to them, [H or 1, C*QB, block_q or 1, tokens]."""
        b = self.b
        k, v = map(b.to_float32, self.keys_values(self.rows_heads_dim))
        tiles = self.query_tiles()
        q = b("Reshape", tiles, b("Concat", b.int_list(0, -1), self.key_dim, axis=0))
        logits = b("Mul", b("MatMul", q, b("Transpose", k, perm=[1, 2, 0])), self.scale)
        tile_count = b("Mul", self.current, self.q_blocks)
        by_tile = b("Concat", self.heads, tile_count, b.vector(self.block_q, -1), axis=0)
        weights = self.softmax(b, b("Add", b("Reshape", logits, by_tile), bias))
        tokens = b("Mul", self.frames, self.frame_tokens)
        weights = b("Reshape", weights, b("Concat", b.int_list(0, -1), tokens, axis=0))
        out = b("MatMul", weights, b("Transpose", v, perm=[1, 0, 2]))
        rows = b("Concat", self.heads, tile_count, b.vector(self.block_q), self.dim, axis=0)
        return self.output(b("Reshape", out, rows))

    def grouped(self, kept: ir.Value, group: ir.Value, form: AttentionForm) -> ir.Value:
        """Attention to groups of keys; the first chunk, which has no past, sees everything.

        Args:
            kept: bool [H or 1, C*QB, block_q or 1, G], the groups that a query, or all of a query block, keeps.
            group: int64 [tokens], the group of each key.

        Returns:
            [T, H, D].
        """
        b = self.b
        kept = b("Or", kept, b("Equal", self.past, b.scalar(0)))
        if form == "dense":
            seen = b("Gather", kept, group, axis=3)
            return self.masked(b("Where", seen, b.number(0.0), self.lowest))
        return self._scan(kept, group)

    def _scan(self, kept: ir.Value, group: ir.Value) -> ir.Value:
        """The kept keys are gathered, one head and query block at a time; their number may differ every time."""
        b = self.b
        flat = self.keys_values(b("Concat", b.int_list(-1), self.dim, axis=0))
        tiles = self.query_tiles()
        tile_count = b("Mul", self.current, self.q_blocks)
        every = b("Expand", kept, b("Concat", self.heads, b.int_list(1, 1, 1), axis=0))
        head = b("Unsqueeze", self.count(self.heads), b.int_list(1))
        head = b("Reshape", b("Expand", head, b("Concat", self.heads, tile_count, axis=0)), b.int_list(-1))

        one = b.subgraph()
        tile, tile_kept, tile_head = (one.value(name) for name in ("tile", "kept", "head"))
        seen = one("Gather", tile_kept, group, axis=1)  # [block_q or 1, tokens]
        anyone = one("ReduceMax", one.to_float32(seen), one.int_list(0), keepdims=0)
        token = one("Reshape", one("NonZero", anyone), one.int_list(-1))
        rows = one("Add", one("Mul", token, self.heads), tile_head)
        k, v = (one.to_float32(one("Gather", x, rows, axis=0)) for x in flat)
        logits = one("Mul", one("MatMul", tile, one("Transpose", k, perm=[1, 0])), self.scale)
        bias = one("Where", one("Gather", seen, token, axis=1), one.number(0.0), self.lowest)
        result = one("MatMul", one("Softmax", one("Add", logits, bias), axis=-1), v)
        out = b(
            "Scan",
            b("Reshape", tiles, b("Concat", b.vector(-1, self.block_q), self.dim, axis=0)),
            b("Reshape", every, b("Concat", b.int_list(-1), b.shape(kept, 2, 4), axis=0)),
            head,
            body=ir.Graph([tile, tile_kept, tile_head], [result], nodes=one.nodes, name="one_tile"),
            num_scan_inputs=3,
        )
        return self.output(b("Reshape", out, b("Shape", tiles)))
