"""The bodies that rank blocks: `HierarchicalSparseAttention` (docs/operators.md has the numbered steps), and
`PersistentBlockAttention` and `SparseLinearAttention` (docs/policies.md).
"""

from __future__ import annotations

import onnx_ir as ir

from plugins.contract import LINEAR_EPSILON
from plugins.operators import PERSISTENT_BLOCK_INPUTS, SPARSE_LINEAR_INPUTS

from .attention import AttentionBody, AttentionForm

__all__ = ["HierarchicalBody", "PersistentBlockBody", "SparseLinearBody"]


class HierarchicalBody(AttentionBody):
    """Every query block keeps the same number of blocks, so that gathering needs no masks. R: tokens of these."""

    def emit(self, form: AttentionForm) -> ir.Value:
        """The output [T, H, D]."""
        return self._dense() if form == "dense" else self._gathered()

    def _select(self) -> tuple[ir.Value, ir.Value]:
        """Steps 1 to 4: logical indices [H, C*QB, keep] of the kept blocks, and the scores [H, C*QB, N*KB] of all.

        Blocks that are not eligible score -inf: all alike, so that a budget beyond the others takes them in order.
        """
        b = self.b
        means = self.means()
        query = b("Transpose", b("Reshape", self.q_mean, self.rows_heads_dim), perm=[1, 0, 2])
        keys = b("Transpose", b("Reshape", means, self.rows_heads_dim), perm=[1, 2, 0])
        scores = b("Reshape", b("MatMul", query, keys), b.vector(0, 0, -1, self.k_blocks))  # [H, C*QB, N, KB]
        scores = b("Where", b("Unsqueeze", self._eligible(query, means), b.int_list(-1)), scores, self.lowest)
        scores = b("Reshape", scores, b.int_list(0, 0, -1))
        _, indices = b.multi("TopK", [scores, self.kept_blocks()], 2, axis=-1)
        return indices, scores

    def _eligible(self, query: ir.Value, means: ir.Value) -> ir.Value:
        """Which frames are eligible, bool [H, C*QB, N].

        Sink, near and current frames win every comparison, and keep_frames + C frames win in all: that many are
        eligible in the second stage, and all of them as long as there is only one.
        """
        b = self.b
        frame_means = b("ReduceMean", means, b.int_list(1), keepdims=0)
        scores = b("MatMul", query, b("Transpose", frame_means, perm=[1, 2, 0]))
        frame = self.count(self.frames)
        sink = b("Less", frame, b.attribute("sink_frames"))
        near = b("GreaterOrEqual", frame, b("Sub", self.past, b.attribute("near_frames")))
        contest = b("Where", b("Or", sink, near), b.number(float("inf")), scores)
        count = b("Min", b("Add", self.current, b.attribute("keep_frames")), self.frames)
        _, winners = b.multi("TopK", [contest, count], 2, axis=-1)
        off_on = b("Constant", value_floats=ir.AttrFloat32s("value_floats", [0.0, 1.0]))
        one_hot = b("OneHot", winners, b("Squeeze", self.frames), off_on)
        chosen = b("ReduceMax", one_hot, b.int_list(2), keepdims=0)
        return b("Cast", chosen, to=ir.DataType.BOOL.value)

    def _selected_rows(self, indices: ir.Value) -> tuple[ir.Value, ir.Value]:
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
        head = self.count(self.heads)
        rows = b("Add", b("Mul", tokens, self.heads), b("Reshape", head, b.int_list(-1, 1, 1, 1)))
        rows = b("Reshape", rows, b.int_list(0, 0, -1))
        return rows, b("Reshape", b("Gather", inside, block), b.int_list(0, 0, 1, -1))

    def _dense(self) -> ir.Value:
        """From all scores with a bias of -inf on tokens that are not selected."""
        b = self.b
        indices, scores = self._select()
        seen = b("Expand", b.number(0.0), b("Shape", indices))
        unseen = b("Expand", self.lowest, b("Shape", scores))
        bias = b("ScatterElements", unseen, indices, seen, axis=-1)
        token = b("Range", b.scalar(0), self.frame_tokens, b.scalar(1))
        bias = b("Reshape", bias, b.vector(0, 0, -1, self.k_blocks))
        bias = b("Gather", bias, b("Div", token, self.block_k), axis=3)  # [H, C*QB, N, frame_tokens]
        return self.masked(b("Reshape", bias, b.int_list(0, 0, 1, -1)))

    def _gathered(self) -> ir.Value:
        """From the selected rows only, in a loop over heads and query blocks."""
        b = self.b
        indices, _ = self._select()
        rows, bias = self._selected_rows(indices)
        flat = self.keys_values(b("Concat", b.int_list(-1), self.dim, axis=0))
        tiles = self.query_tiles()
        count = b.shape(rows, 2, 3)

        one = b.subgraph()
        tile, tile_rows, tile_bias = (one.value(name) for name in ("tile", "rows", "bias"))
        k, v = (one.to_float32(one("Gather", x, tile_rows, axis=0)) for x in flat)
        logits = one("Mul", one("MatMul", tile, one("Transpose", k, perm=[1, 0])), self.scale)
        result = one("MatMul", self.softmax(one, one("Add", logits, tile_bias)), v)
        out = b(
            "Scan",
            b("Reshape", tiles, b("Concat", b.vector(-1, self.block_q), self.key_dim, axis=0)),
            b("Reshape", rows, b("Concat", b.int_list(-1), count, axis=0)),
            b("Reshape", bias, b("Concat", b.int_list(-1, 1), count, axis=0)),
            body=ir.Graph([tile, tile_rows, tile_bias], [result], nodes=one.nodes, name="one_tile"),
            num_scan_inputs=3,
        )
        return self.output(b("Reshape", out, b("Concat", b.shape(tiles, 0, 3), self.dim, axis=0)))


class PersistentBlockBody(HierarchicalBody):
    """What is pinned wins every comparison, and the budget counts the other blocks."""

    def __init__(self) -> None:
        super().__init__(PERSISTENT_BLOCK_INPUTS)
        self._pinned = self.b("Cast", self.named["pinned"], to=ir.DataType.INT64.value)

    def _select(self) -> tuple[ir.Value, ir.Value]:
        """Logical indices of what is pinned and of the best of the other blocks, and the scores of all."""
        b = self.b
        query = b("Transpose", b("Reshape", self.q_mean, self.rows_heads_dim), perm=[1, 0, 2])
        keys = b("Transpose", b("Reshape", self.means(), self.rows_heads_dim), perm=[1, 2, 0])
        pinned = b("Reshape", b("Mul", self._pinned, self.k_blocks), b.int_list(1))
        total = b("Mul", self.frames, self.k_blocks)
        scores = b(
            "Where", b("Less", self.count(total), pinned), b.number(float("inf")), b("MatMul", query, keys)
        )
        count = b("Add", pinned, self.kept_of(b("Sub", total, pinned)))
        _, indices = b.multi("TopK", [scores, count], 2, axis=-1)
        return indices, scores


class SparseLinearBody(HierarchicalBody):
    """The best blocks of all frames, and linear attention over all keys beside them."""

    def __init__(self) -> None:
        super().__init__(SPARSE_LINEAR_INPUTS)

    def emit(self, form: AttentionForm) -> ir.Value:
        """The output [T, H, D]."""
        b = self.b
        both = b("Add", b.to_float32(super().emit(form)), self._linear())
        return b("CastLike", both, self.q)

    def _select(self) -> tuple[ir.Value, ir.Value]:
        """Logical indices of the best blocks, and the scores of all."""
        b = self.b
        query = b("Transpose", b("Reshape", self.q_mean, self.rows_heads_dim), perm=[1, 0, 2])
        keys = b("Transpose", b("Reshape", self.means(), self.rows_heads_dim), perm=[1, 2, 0])
        scores = b("MatMul", query, keys)
        _, indices = b.multi("TopK", [scores, self.kept_blocks()], 2, axis=-1)
        return indices, scores

    def _linear(self) -> ir.Value:
        """The linear branch, projected: float32 [T, H, D]."""
        b = self.b
        k, v = map(b.to_float32, self.keys_values(self.rows_heads_dim))
        query = b("Transpose", b("Softmax", b.to_float32(self.q), axis=-1), perm=[1, 0, 2])  # [H, T, D]
        key = b("Transpose", b("Softmax", k, axis=-1), perm=[1, 2, 0])  # [H, D, tokens]
        state = b("MatMul", key, b("Transpose", v, perm=[1, 0, 2]))  # [H, D, D]
        total = b("MatMul", query, b("ReduceSum", key, b.int_list(2), keepdims=1))  # [H, T, 1]
        mixed = b("Div", b("MatMul", query, state), b("Add", total, b.number(LINEAR_EPSILON)))
        weight, bias = (b.to_float32(self.named[name]) for name in SPARSE_LINEAR_INPUTS[-2:])
        projected = b("Add", b("MatMul", mixed, b("Transpose", weight, perm=[1, 0])), bias)
        return b("Transpose", projected, perm=[1, 0, 2])
