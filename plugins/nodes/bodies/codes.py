"""What bodies over codes do besides: keys and values into E4M3, and back, and products of eight bits.

See docs/operators.md, "Eight bits".
"""

from __future__ import annotations

import math
from typing import Final

import onnx_ir as ir

from plugins.operators import Operator

from .hsa import HierarchicalBody
from .tape import Body

__all__ = ["HierarchicalCodesBody", "HierarchicalE4M3Body", "by_channel", "codes_of"]

_E4M3_MAX: Final = 448.0
_SMALLEST_SCALE: Final = 2.0**-24
_WEIGHT_BITS: Final = 8
"""A weight of 1 is rounded as 2^8."""


class HierarchicalCodesBody(HierarchicalBody):
    """The same over codes, which are widened before anything else: see docs/operators.md, "Eight bits"."""

    def __init__(self, operator: Operator) -> None:
        super().__init__(operator.inputs)

    def keys_values(self, row_shape: ir.Value) -> tuple[ir.Value, ir.Value]:
        keys = self.b("Add", *self.codes_and_means())
        return self.b("Reshape", keys, row_shape), self.values(row_shape)

    def codes_and_means(self) -> tuple[ir.Value, ir.Value]:
        """What keys are the sums of, float32 [N, frame_tokens, H, D]: codes times scales, and means of blocks."""
        b, given = self.b, self.named
        current = b("Reshape", self.k, self.frames_rows_heads_dim)
        keys = b("Concat", b("Gather", self.past_k, self.slots, axis=0), current, axis=0)
        means = b("Gather", self.means(), self._block_of_token(), axis=1)
        return self._widened(keys, given["past_kscale"], given["k_scale"]), means

    def values(self, row_shape: ir.Value) -> ir.Value:
        """Values of all N frames, reshaped; their codes lie by block, [N, KB, H, D, block_k]."""
        b, given = self.b, self.named
        codes = b("Concat", b("Gather", self.past_v, self.slots, axis=0), self.v, axis=0)
        rows = b(
            "Reshape",
            b("Transpose", codes, perm=[0, 1, 4, 2, 3]),
            b("Concat", b.int_list(0, -1), self.heads_dim, axis=0),
        )
        length = b("Reshape", self.frame_tokens, b.int_list(1))
        rows = b("Slice", rows, b.int_list(0), length, b.int_list(1))
        return b("Reshape", self._widened(rows, given["past_vscale"], given["v_scale"]), row_shape)

    def _block_of_token(self) -> ir.Value:
        b = self.b
        return b("Div", b("Range", b.scalar(0), self.frame_tokens, b.scalar(1)), self.block_k)

    def _widened(self, codes: ir.Value, cache_scales: ir.Value, chunk_scales: ir.Value) -> ir.Value:
        """Codes [N, frame_tokens, H, D] times the scales of their blocks, float32."""
        b = self.b
        scales = b("Concat", b("Gather", cache_scales, self.slots, axis=0), chunk_scales, axis=0)
        scales = b("Gather", scales, self._block_of_token(), axis=1)  # [N, frame_tokens, H]
        table = b("Constant", value_floats=ir.AttrFloat32s("value_floats", _e4m3_values()))
        wide = b("Gather", table, b("Cast", codes, to=ir.DataType.INT32.value), axis=0)
        return b("Mul", wide, b("Unsqueeze", scales, b.int_list(-1)))


class HierarchicalE4M3Body(HierarchicalCodesBody):
    """The same with products of eight bits: queries and weights are rounded.

    Keys are [.., 2 D], codes and means apart, and so are queries: rounded for the one, as they are for the other.
    """

    def __init__(self, operator: Operator) -> None:
        super().__init__(operator)
        self.key_dim = self.b("Mul", self.dim, self.b.scalar(2))

    def keys_values(self, row_shape: ir.Value) -> tuple[ir.Value, ir.Value]:
        b = self.b
        leading = b("Slice", row_shape, b.int_list(0), b.int_list(-1), b.int_list(0))
        keys = b("Concat", *self.codes_and_means(), axis=-1)
        return b("Reshape", keys, b("Concat", leading, self.key_dim, axis=0)), self.values(row_shape)

    def query_tiles(self) -> ir.Value:
        b, tiles = self.b, super().query_tiles()
        largest = b("ReduceMax", b("Abs", tiles), b.int_list(-1), keepdims=1)
        scale = b("Max", b("Div", largest, b.number(_E4M3_MAX)), b.number(_SMALLEST_SCALE))
        return b("Concat", b("Mul", _rounded(b, b("Div", tiles, scale)), scale), tiles, axis=-1)

    def softmax(self, on: Body, logits: ir.Value) -> ir.Value:
        """Weights relative to the power of two at or above the largest are rounded, and normalised by what they were
        before.
        """
        two = on.number(math.log(2.0))
        largest = on("Div", on("ReduceMax", logits, on.int_list(-1), keepdims=1), two)
        unit = on("Mul", on("Sub", on("Ceil", largest), on.number(float(_WEIGHT_BITS))), two)
        weights = on("Exp", on("Sub", logits, unit))
        total = on("ReduceSum", weights, on.int_list(-1), keepdims=1)
        return on("Div", _rounded(on, weights), total)


def _rounded(b: Body, x: ir.Value) -> ir.Value:
    """E4M3 of float32, as float32 again."""
    return b.to_float32(b("Cast", x, to=ir.DataType.FLOAT8E4M3FN.value))


def _e4m3_values() -> list[float]:
    """What each code of E4M3 stands for; the two that are no number stand for 480, which no code of ours is."""
    magnitudes = [
        (code & 7) * 2.0**-9 if code < 8 else (8 + (code & 7)) * 2.0 ** ((code >> 3) - 10)
        for code in range(128)
    ]
    return [*magnitudes, *(-value for value in magnitudes)]


def codes_of(
    b: Body, x: ir.Value, block: ir.Value, frame_tokens: ir.Value, means: ir.Value | None
) -> tuple[ir.Value, ir.Value]:
    """Codes of x [T, H, D], less the means [C, blocks, H, D] if there are any, and scales [C, blocks, H]."""
    zero, one = b.scalar(0), b.scalar(1)
    heads_dim = b.shape(x, 1, 3)
    wide = b.to_float32(b("Reshape", x, b("Concat", b.vector(-1, frame_tokens), heads_dim, axis=0)))
    of_token = b("Div", b("Range", zero, frame_tokens, one), block)
    if means is not None:
        wide = b("Sub", wide, b("Gather", means, of_token, axis=1))
    largest = b("ReduceMax", b("Abs", wide), b.int_list(-1), keepdims=0)  # [C, frame_tokens, H]
    blocks = b("Div", b("Sub", b("Add", frame_tokens, block), one), block)
    padding = b("Sub", b("Mul", blocks, block), frame_tokens)
    largest = b("Pad", largest, b.vector(0, padding), b.number(0.0), b.int_list(1))
    largest = b("Reshape", largest, b("Concat", b.vector(-1, blocks, block), b.shape(x, 1, 2), axis=0))
    largest = b("ReduceMax", largest, b.int_list(2), keepdims=0)
    scales = b("Max", b("Div", largest, b.number(_E4M3_MAX)), b.number(_SMALLEST_SCALE))
    scaled = b("Div", wide, b("Unsqueeze", b("Gather", scales, of_token, axis=1), b.int_list(-1)))
    scaled = b("Clip", scaled, b.number(-_E4M3_MAX), b.number(_E4M3_MAX))
    rounded = _rounded(b, scaled)
    # With e the exponent, 2^e <= |y|, the code is 8 (e + 6) + |y| 2^(3 - e); an e that is one too small for a power
    # of two gives the same code, so the logarithm may be off there. What is below 2^-6 counts in steps of 2^-9.
    magnitude = b("Abs", rounded)
    floor = b("Max", magnitude, b.number(2.0**-6))
    exponent = b("Floor", b("Div", b("Log", floor), b.number(math.log(2.0))))
    steps = b("Mul", magnitude, b("Pow", b.number(2.0), b("Sub", b.number(3.0), exponent)))
    code = b("Add", b("Mul", b("Add", exponent, b.number(6.0)), b.number(8.0)), steps)
    code = b("Add", code, b("Where", b("Less", rounded, b.number(0.0)), b.number(128.0), b.number(0.0)))
    codes = b("Cast", b("Round", code), to=ir.DataType.UINT8.value)
    return b("Reshape", codes, b("Shape", x)), scales


def by_channel(b: Body, codes: ir.Value, block: ir.Value, frame_tokens: ir.Value) -> ir.Value:
    """Codes [T, H, D] block by block, [C, blocks, H, D, block], with zeros behind the last token of a frame."""
    heads_dim = b.shape(codes, 1, 3)
    frames = b("Reshape", codes, b("Concat", b.vector(-1, frame_tokens), heads_dim, axis=0))
    blocks = b("Div", b("Sub", b("Add", frame_tokens, block), b.scalar(1)), block)
    padding = b("Sub", b("Mul", blocks, block), frame_tokens)
    zero = b("Constant", value=ir.AttrTensor("value", ir.tensor(0, dtype=ir.DataType.UINT8)))
    padded = b("Pad", frames, b.vector(0, padding), zero, b.int_list(1))
    tiles = b("Reshape", padded, b("Concat", b.vector(-1, blocks, block), heads_dim, axis=0))
    return b("Transpose", tiles, perm=[0, 1, 3, 4, 2])
