"""The body of `QKPrepare`."""

from __future__ import annotations

import onnx_ir as ir

from plugins import contract
from plugins.operators import Operator

from .codes import by_channel, codes_of
from .tape import Body, function, reference

__all__ = ["qk_prepare"]


def qk_prepare(operator: Operator) -> ir.Function:
    """The body of `QKPrepare`, or of the one that gives keys and values as codes."""
    b = Body()
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
            "RMSNormalization", x, b.to_float32(norm), axis=-1, epsilon=reference("epsilon", "eps", "FLOAT")
        )
        turned = b(
            "RotaryEmbedding",
            b("Unsqueeze", normed, batch),
            cos,
            sin,
            interleaved=1,
            num_heads=reference("num_heads", "heads", "INT"),
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
    block_k = b.attribute("block_k")
    q_mean, k_mean = means(q, b.attribute("block_q")), means(k, block_k)
    outputs: tuple[ir.Value, ...] = (q, k, v, q_mean, k_mean)
    if operator.over_codes:
        k, k_scale = codes_of(b, k, block_k, frame_tokens, k_mean)
        v, v_scale = codes_of(b, v, block_k, frame_tokens, None)
        v = by_channel(b, v, block_k, frame_tokens)
        outputs = (q, k, v, q_mean, k_mean, k_scale, v_scale)
    return function(
        b,
        operator.name,
        inputs,
        dict(zip(operator.outputs, outputs, strict=True)),
        {
            name: ir.AttributeType.FLOAT if name == "eps" else ir.AttributeType.INT
            for name in contract.QK_PREPARE_ATTRIBUTES
        },
    )
