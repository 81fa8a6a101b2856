"""The function bodies of both operators, written in standard ONNX operators.

Bodies compute in float32 and with integer block counts. Everything that follows from attributes alone (block tables,
reshape targets) is built from constants, so that a runtime folds it when it loads the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal

import onnx_ir as ir
from onnx_ir import tape

from plugins import contract

__all__ = ["OPSET", "AttentionForm", "hierarchical_sparse_attention", "qk_prepare"]

OPSET: Final = 23
"""Opset of the bodies; a model can hold them only if its own is the same."""

AttentionForm = Literal["dense", "scan"]
"""How the attention body computes.

- `"dense"`: all scores of all heads at once, masked. No control flow; memory grows with heads * tokens * keys.
- `"scan"`: gathers the selected blocks, one head and query block at a time. Work and memory follow the kept blocks, so
  that full-size layers fit.
"""


class _Body:
    """Records the nodes of a body: `b("Op", *inputs, **attributes)` returns the node's output.

    Every value gets a name of its own, so that subgraphs never shadow the values around them.
    """

    def __init__(self, numbers: Iterator[int] | None = None) -> None:
        self._tape = tape.Tape()
        self._numbers = itertools.count() if numbers is None else numbers
        self._constants: dict[tuple[Any, ...], ir.Value] = {}

    @property
    def nodes(self) -> Sequence[ir.Node]:
        return self._tape.nodes

    def subgraph(self) -> _Body:
        """A body for a nested graph, which may use the values of this one."""
        return _Body(self._numbers)

    def value(self, name: str) -> ir.Value:
        """An input of a nested graph."""
        return ir.Value(name=f"{name}_{next(self._numbers)}")

    def multi(
        self, op_type: str, inputs: Sequence[ir.Value], outputs: int, **attributes: Any
    ) -> list[ir.Value]:
        """Record a node with several outputs."""
        results = list(self._tape.op_multi_out(op_type, inputs, attributes, num_outputs=outputs))
        for result in results:
            result.name = f"{op_type.lower()}_{next(self._numbers)}"
        return results

    def __call__(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return self.multi(op_type, inputs, 1, **attributes)[0]

    def _constant(self, key: tuple[Any, ...], attribute: ir.Attr) -> ir.Value:
        if key not in self._constants:
            self._constants[key] = self("Constant", **{attribute.name: attribute})
        return self._constants[key]

    def scalar(self, value: int) -> ir.Value:
        """An int64 constant without dimensions."""
        return self._constant(("int", value), ir.AttrInt64("value_int", value))

    def int_list(self, *values: int) -> ir.Value:
        """An int64 constant with one dimension."""
        return self._constant(("ints", *values), ir.AttrInt64s("value_ints", values))

    def number(self, value: float) -> ir.Value:
        """A float32 constant without dimensions."""
        return self._constant(("float", value), ir.AttrFloat32("value_float", value))

    def attribute(self, name: str, kind: ir.AttributeType = ir.AttributeType.INT) -> ir.Value:
        """The value of one of the function's attributes."""
        field = f"value_{kind.name.lower()}"
        return self._constant(("attribute", name), ir.RefAttr(field, name, kind))

    def vector(self, *scalars: ir.Value | int) -> ir.Value:
        """A shape: integers, and scalar or one-element values."""
        parts = [
            self.int_list(x) if isinstance(x, int) else self("Reshape", x, self.int_list(1)) for x in scalars
        ]
        return self("Concat", *parts, axis=0)

    def shape(self, value: ir.Value, start: int, end: int) -> ir.Value:
        return self("Shape", value, start=start, end=end)

    def to_float32(self, value: ir.Value) -> ir.Value:
        return self("Cast", value, to=ir.DataType.FLOAT.value)


def _reference(attribute: str, to: str, kind: str) -> ir.Attr:
    """A node's attribute that takes the value of one of the function's attributes."""
    return ir.RefAttr(attribute, to, ir.AttributeType[kind])


def _function(
    body: _Body,
    name: str,
    inputs: Sequence[ir.Value],
    outputs: Mapping[str, ir.Value],
    attributes: Mapping[str, ir.AttributeType],
) -> ir.Function:
    for output_name, value in outputs.items():
        value.name = output_name
    graph = ir.Graph(inputs, list(outputs.values()), nodes=body.nodes, opset_imports={"": OPSET}, name=name)
    declared = [ir.Attr(attribute, kind, None) for attribute, kind in attributes.items()]
    return ir.Function(contract.DOMAIN, name, graph=graph, attributes=declared)


class _Attention:
    """Emits the body of HierarchicalSparseAttention; see docs/operators.md for the numbered steps.

    Shapes in comments: T tokens, H heads, D head_dim, C frames of the chunk, P past frames, N = P + C, QB and KB
    query and key blocks per frame, R = tokens of the kept key blocks.
    """

    def __init__(self) -> None:
        b = self.b = _Body()
        self.inputs = [ir.Value(name=name) for name in contract.HSA_INPUTS]
        (self.q, self.k, self.v, self.q_mean, self.k_mean) = self.inputs[:5]
        (self.past_k, self.past_v, self.past_kmean, frame_slots, self.chunk) = self.inputs[5:]
        self.frame_tokens, self.block_q, self.block_k = map(
            b.attribute, ("frame_tokens", "block_q", "block_k")
        )
        self.q_blocks = self._ceil_div(self.frame_tokens, self.block_q)
        self.k_blocks = self._ceil_div(self.frame_tokens, self.block_k)
        self.lowest = b.number(float("-inf"))
        self.scale = b.attribute("scale", ir.AttributeType.FLOAT)
        self.heads = b.shape(self.q, 1, 2)
        self.dim = b.shape(self.q, 2, 3)
        self.heads_dim = b.shape(self.q, 1, 3)
        present = b("GreaterOrEqual", frame_slots, b("CastLike", b.scalar(0), frame_slots))
        self.slots = b("Compress", frame_slots, present, axis=0)  # [P]
        self.past = b("Shape", self.slots)
        self.current = b.shape(self.q_mean, 0, 1)
        self.frames = b("Add", self.past, self.current)
        self.rows_heads_dim = b("Concat", b.int_list(-1), self.heads_dim, axis=0)
        self.frames_rows_heads_dim = b("Concat", b.vector(-1, self.frame_tokens), self.heads_dim, axis=0)

    def _ceil_div(self, a: ir.Value, divisor: ir.Value) -> ir.Value:
        b = self.b
        return b("Div", b("Sub", b("Add", a, divisor), b.scalar(1)), divisor)

    def select(self) -> tuple[ir.Value, ir.Value]:
        """Steps 1 to 4: logical indices [H, C*QB, keep] of the kept blocks, and the scores [H, C*QB, N*KB] of all.

        Blocks that are not eligible score -inf: all alike, so that a budget beyond the others takes them in order.
        """
        b = self.b
        means = b("Concat", b("Gather", self.past_kmean, self.slots, axis=0), self.k_mean, axis=0)
        query = b("Transpose", b("Reshape", self.q_mean, self.rows_heads_dim), perm=[1, 0, 2])
        keys = b("Transpose", b("Reshape", means, self.rows_heads_dim), perm=[1, 2, 0])
        scores = b("Reshape", b("MatMul", query, keys), b.vector(0, 0, -1, self.k_blocks))  # [H, C*QB, N, KB]
        scores = b("Where", b("Unsqueeze", self._eligible(query, means), b.int_list(-1)), scores, self.lowest)
        scores = b("Reshape", scores, b.int_list(0, 0, -1))
        _, indices = b.multi("TopK", [scores, self._kept_blocks()], 2, axis=-1)
        return indices, scores

    def _eligible(self, query: ir.Value, means: ir.Value) -> ir.Value:
        """Which frames are eligible, bool [H, C*QB, N].

        Sink, near and current frames win every comparison, and keep_frames + C frames win in all: that many are
        eligible in the second stage, and all of them as long as there is only one.
        """
        b = self.b
        frame_means = b("ReduceMean", means, b.int_list(1), keepdims=0)
        scores = b("MatMul", query, b("Transpose", frame_means, perm=[1, 2, 0]))
        frames = b("Squeeze", self.frames)
        frame = b("Range", b.scalar(0), frames, b.scalar(1))
        sink = b("Less", frame, b.attribute("sink_frames"))
        near = b("GreaterOrEqual", frame, b("Sub", self.past, b.attribute("near_frames")))
        contest = b("Where", b("Or", sink, near), b.number(float("inf")), scores)
        count = b("Min", b("Add", self.current, b.attribute("keep_frames")), self.frames)
        _, winners = b.multi("TopK", [contest, count], 2, axis=-1)
        off_on = b("Constant", value_floats=ir.AttrFloat32s("value_floats", [0.0, 1.0]))
        chosen = b("ReduceMax", b("OneHot", winners, frames, off_on), b.int_list(2), keepdims=0)
        return b("Cast", chosen, to=ir.DataType.BOOL.value)

    def _kept_blocks(self) -> ir.Value:
        """Number of blocks to keep, [1]."""
        b = self.b
        table = b.attribute("keep_q20", ir.AttributeType.INTS)
        last = b("Sub", b("Size", table), b.scalar(1))
        chunk = b("Cast", self.chunk, to=ir.DataType.INT64.value)
        entry = b("Gather", table, b("Clip", chunk, b.scalar(0), last))
        total = b("Mul", self.frames, self.k_blocks)
        kept = b("Div", b("Mul", entry, total), b.scalar(contract.DENSE_Q20))
        kept = b("Min", b("Max", kept, b.scalar(1)), total)
        return b("Where", b("Equal", self.past, b.scalar(0)), total, kept)

    def keys_values(self, row_shape: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Keys and values of all N frames, oldest first, reshaped; in the compute type."""
        return self._frames_of(self.past_k, self.k, row_shape), self._frames_of(
            self.past_v, self.v, row_shape
        )

    def _frames_of(self, cache: ir.Value, chunk: ir.Value, row_shape: ir.Value) -> ir.Value:
        b = self.b
        past = b("Gather", cache, self.slots, axis=0)
        current = b("Reshape", chunk, self.frames_rows_heads_dim)
        return b("Reshape", b("Concat", past, current, axis=0), row_shape)

    def query_tiles(self) -> ir.Value:
        """q as float32 [H, C*QB, block_q, D], the rows of ragged tiles filled up with zeros."""
        b = self.b
        padding = b("Sub", b("Mul", self.q_blocks, self.block_q), self.frame_tokens)
        frames = b.to_float32(b("Reshape", self.q, self.frames_rows_heads_dim))
        padded = b("Pad", frames, b.vector(0, padding), b.number(0.0), b.int_list(1))
        tiles = b("Reshape", padded, b("Concat", b.vector(-1, self.block_q), self.heads_dim, axis=0))
        return b("Transpose", tiles, perm=[2, 0, 1, 3])

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

    def selected_rows(self, indices: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Rows of the selected tokens in keys flattened to [tokens * heads, D], and their logit bias.

        Returns int64 [H, C*QB, R] and float32 [H, C*QB, 1, R]: the bias is -inf for rows past the end of a ragged
        block, which are taken from tokens that exist.
        """
        b = self.b
        one = b.scalar(1)
        start = b("Mul", b("Range", b.scalar(0), self.k_blocks, one), self.block_k)
        token = b("Add", b("Unsqueeze", start, b.int_list(1)), b("Range", b.scalar(0), self.block_k, one))
        inside = b("Where", b("Less", token, self.frame_tokens), b.number(0.0), self.lowest)
        token = b("Min", token, b("Sub", self.frame_tokens, one))

        block = b("Mod", indices, self.k_blocks)
        first = b("Mul", b("Div", indices, self.k_blocks), self.frame_tokens)
        # Token in the whole sequence, [H, C*QB, keep, block_k].
        tokens = b("Add", b("Unsqueeze", first, b.int_list(-1)), b("Gather", token, block))
        head = b("Range", b.scalar(0), b("Squeeze", self.heads), one)
        rows = b("Add", b("Mul", tokens, self.heads), b("Reshape", head, b.int_list(-1, 1, 1, 1)))
        rows = b("Reshape", rows, b.int_list(0, 0, -1))
        return rows, b("Reshape", b("Gather", inside, block), b.int_list(0, 0, 1, -1))

    def dense(self) -> ir.Value:
        """The output [T, H, D], from all scores with a bias of -inf on tokens that are not selected."""
        b = self.b
        indices, scores = self.select()
        seen = b("Expand", b.number(0.0), b("Shape", indices))
        unseen = b("Expand", self.lowest, b("Shape", scores))
        bias = b("ScatterElements", unseen, indices, seen, axis=-1)
        token = b("Range", b.scalar(0), self.frame_tokens, b.scalar(1))
        bias = b("Reshape", bias, b.vector(0, 0, -1, self.k_blocks))
        bias = b("Gather", bias, b("Div", token, self.block_k), axis=3)  # [H, C*QB, N, frame_tokens]
        bias = b("Reshape", bias, b.int_list(0, 0, 1, -1))

        k, v = map(b.to_float32, self.keys_values(self.rows_heads_dim))
        tiles = self.query_tiles()
        q = b("Reshape", tiles, b("Concat", b.int_list(0, -1), self.dim, axis=0))
        logits = b("Mul", b("MatMul", q, b("Transpose", k, perm=[1, 2, 0])), self.scale)
        tile_count = b("Mul", self.current, self.q_blocks)
        by_tile = b("Concat", self.heads, tile_count, b.vector(self.block_q, -1), axis=0)
        weights = b("Softmax", b("Add", b("Reshape", logits, by_tile), bias), axis=-1)
        weights = b(
            "Reshape",
            weights,
            b("Concat", b.int_list(0, -1), b("Mul", self.frames, self.frame_tokens), axis=0),
        )
        out = b("MatMul", weights, b("Transpose", v, perm=[1, 0, 2]))
        return self.output(b("Reshape", out, by_tile))

    def scan(self) -> ir.Value:
        """The output [T, H, D], from the selected rows only, in a loop over heads and query blocks."""
        b = self.b
        indices, _ = self.select()
        rows, bias = self.selected_rows(indices)
        flat = self.keys_values(b("Concat", b.int_list(-1), self.dim, axis=0))
        tiles = self.query_tiles()
        count = b.shape(rows, 2, 3)

        one = b.subgraph()
        tile, tile_rows, tile_bias = (one.value(name) for name in ("tile", "rows", "bias"))
        k, v = (one.to_float32(one("Gather", x, tile_rows, axis=0)) for x in flat)
        logits = one("Mul", one("MatMul", tile, one("Transpose", k, perm=[1, 0])), self.scale)
        result = one("MatMul", one("Softmax", one("Add", logits, tile_bias), axis=-1), v)
        out = b(
            "Scan",
            b("Reshape", tiles, b("Concat", b.vector(-1, self.block_q), self.dim, axis=0)),
            b("Reshape", rows, b("Concat", b.int_list(-1), count, axis=0)),
            b("Reshape", bias, b("Concat", b.int_list(-1, 1), count, axis=0)),
            body=ir.Graph([tile, tile_rows, tile_bias], [result], nodes=one.nodes, name="one_tile"),
            num_scan_inputs=3,
        )
        return self.output(b("Reshape", out, b("Shape", tiles)))


def hierarchical_sparse_attention(form: AttentionForm) -> ir.Function:
    """The body of `HierarchicalSparseAttention` in one of its forms; both compute the same."""
    attention = _Attention()
    out = attention.dense() if form == "dense" else attention.scan()
    kinds = {"scale": ir.AttributeType.FLOAT, "keep_q20": ir.AttributeType.INTS}
    return _function(
        attention.b,
        contract.HIERARCHICAL_SPARSE_ATTENTION,
        attention.inputs,
        dict(zip(contract.HSA_OUTPUTS, [out], strict=True)),
        {name: kinds.get(name, ir.AttributeType.INT) for name in contract.HSA_ATTRIBUTES},
    )


def qk_prepare() -> ir.Function:
    """The body of `QKPrepare`."""
    b = _Body()
    inputs = [ir.Value(name=name) for name in contract.QK_PREPARE_INPUTS]
    qkv, bias, norm_q, norm_k, cos, sin = inputs
    frame_tokens = b.attribute("frame_tokens")
    head_shape = b.vector(0, b.attribute("heads"), -1)
    batch = b.int_list(0)
    cos, sin = b("Unsqueeze", cos, batch), b("Unsqueeze", sin, batch)
    biased = b("Add", b.to_float32(qkv), b.to_float32(bias))
    q, k, v = b.multi("Split", [biased], 3, axis=1, num_outputs=3)

    def rotated(x: ir.Value, norm: ir.Value) -> ir.Value:
        """RMS norm over the full width, RoPE, and the one rounding; [T, H, D]."""
        normed = b(
            "RMSNormalization", x, b.to_float32(norm), axis=-1, epsilon=_reference("epsilon", "eps", "FLOAT")
        )
        turned = b(
            "RotaryEmbedding",
            b("Unsqueeze", normed, batch),
            cos,
            sin,
            interleaved=1,
            num_heads=_reference("num_heads", "heads", "INT"),
        )
        return b("CastLike", b("Reshape", b("Squeeze", turned, batch), head_shape), qkv)

    def means(x: ir.Value, block: ir.Value) -> ir.Value:
        """Block means of the rounded x, as a product with the [blocks, frame_tokens] averaging matrix."""
        zero, one = b.scalar(0), b.scalar(1)
        blocks = b("Div", b("Sub", b("Add", frame_tokens, block), one), block)
        of_token = b("Div", b("Range", zero, frame_tokens, one), block)
        member = b("Equal", b("Unsqueeze", b("Range", zero, blocks, one), b.int_list(1)), of_token)
        member = b.to_float32(member)
        average = b("Div", member, b("ReduceSum", member, b.int_list(1), keepdims=1))
        wide = b(
            "Reshape", b.to_float32(x), b("Concat", b.vector(-1, frame_tokens), b("Shape", norm_q), axis=0)
        )
        return b(
            "Reshape", b("MatMul", average, wide), b("Concat", b.int_list(0, 0), b.shape(x, 1, 3), axis=0)
        )

    q, k = rotated(q, norm_q), rotated(k, norm_k)
    v = b("CastLike", b("Reshape", v, head_shape), qkv)
    outputs = (q, k, v, means(q, b.attribute("block_q")), means(k, b.attribute("block_k")))
    return _function(
        b,
        contract.QK_PREPARE,
        inputs,
        dict(zip(contract.QK_PREPARE_OUTPUTS, outputs, strict=True)),
        {
            name: ir.AttributeType.FLOAT if name == "eps" else ir.AttributeType.INT
            for name in contract.QK_PREPARE_ATTRIBUTES
        },
    )
