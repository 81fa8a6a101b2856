"""The kernels over codes: keys and values as E4M3 with a scale per block and head, keys less the mean of their block.

What they compute is in docs/operators.md, "Eight bits". Codes are uint8 everywhere. `HARDWARE` says whether the
architecture converts E4M3 itself (sm_89 and later); without, a few integer instructions do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attend import load_if, load_rows, store_rows
from .cache import move
from .select import BLOCK_BITS, count_present

__all__ = ["attend_e4m3", "attend_fp8", "commit_fp8", "rope_sink_fp8", "scale_of", "to_codes", "to_half"]

_ENTRY_BITS = tl.constexpr(BLOCK_BITS)
_ENTRY_MASK = tl.constexpr((1 << BLOCK_BITS) - 1)
_E4M3_MAX = tl.constexpr(448.0)
_SMALLEST_SCALE = tl.constexpr(2.0**-24)
_TO_HALF = tl.constexpr(2.0**8)
"""What the bits of a code, moved to where float16 has them, are short of: the difference of the exponents' biases."""
_WEIGHT_BITS = tl.constexpr(8.0)
"""A weight of 1 is rounded as 2^8, the largest power of two that is a code."""
_MEAN_ROWS = tl.constexpr(8)
"""Columns of the smallest product; the mean of a block stands in all."""


@triton.jit
def to_codes(x, HARDWARE: tl.constexpr):
    """E4M3 of float32, to nearest even and saturating, as uint8."""
    x = tl.minimum(tl.maximum(x, -_E4M3_MAX), _E4M3_MAX)
    if HARDWARE:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    magnitude = tl.abs(x)
    bits = magnitude.to(tl.int32, bitcast=True)
    # The mantissa loses 20 bits, the exponent's bias 120. Below 2^-6, numbers are multiples of 2^-9: the sum with 2^23
    # has the nearest one in its last bits.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = (magnitude * 2.0**9 + 2.0**23).to(tl.int32, bitcast=True) & 0xFF
    code = tl.where(magnitude < 2.0**-6, subnormal, normal)
    return tl.where(x < 0, code | 0x80, code).to(tl.uint8)


@triton.jit
def to_half(codes, HARDWARE: tl.constexpr):
    """Codes as float16, exactly: their values, or these over `_TO_HALF` where integers do it."""
    if HARDWARE:
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    wide = codes.to(tl.int16)
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def scale_of(largest):
    """The scale of a block from its largest magnitude."""
    return tl.maximum(largest / _E4M3_MAX, _SMALLEST_SCALE)


@triton.jit
def _rounded(x, INTERPRET: tl.constexpr):
    """E4M3 of float32; the interpreter, which has no products of these, gets their numbers."""
    if INTERPRET:
        return to_half(to_codes(x, False), False).to(tl.float32) * _TO_HALF
    else:
        return x.to(tl.float8e4nv)


@triton.jit
def _operand(codes, E4M3: tl.constexpr, INTERPRET: tl.constexpr, HARDWARE: tl.constexpr):
    """Codes as products take them."""
    if INTERPRET:
        half = to_half(codes, False).to(tl.float32)
        return half * _TO_HALF if E4M3 else half
    elif E4M3:
        return codes.to(tl.float8e4nv, bitcast=True)
    elif HARDWARE:
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        # As `to_half`, four at a time: codes into the upper bytes of halves, then all but their signs one bit down.
        return tl.inline_asm_elementwise(
            """{ .reg .b32 a, b;
            prmt.b32 $0, 0, $2, 0x5040; prmt.b32 $1, 0, $2, 0x7060;
            shr.b32 a, $0, 1; shr.b32 b, $1, 1;
            and.b32 a, a, 0x3f803f80; and.b32 b, b, 0x3f803f80;
            and.b32 $0, $0, 0x80008000; and.b32 $1, $1, 0x80008000;
            or.b32 $0, $0, a; or.b32 $1, $1, b; }""",
            "=&r,=&r,r",
            [codes],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )


@triton.jit
def _added(acc, decay, weights, v_tile, E4M3: tl.constexpr):
    """`decay` times the sums so far, and the products of one step.

    Tensor cores may hold sums of E4M3's products with fewer digits than float32 has, so steps are added up outside.
    """
    if E4M3:
        return tl.fma(acc, decay[:, None], tl.dot(weights, tl.trans(v_tile)))
    else:
        return tl.dot(weights, tl.trans(v_tile), acc * decay[:, None])


@triton.jit(
    do_not_specialize=[
        "heads",
        "frame_tokens",
        "past_frames",
        "q_blocks",
        "k_blocks",
        "key_blocks",
        "block_k",
    ]
)
def attend_fp8(
    out,
    q,
    k,
    v,
    k_mean,
    k_scale,
    v_scale,
    past_k,
    past_v,
    past_kmean,
    past_kscale,
    past_vscale,
    frame_slots,
    lists,
    counts,
    heads,
    frame_tokens,
    past_frames,
    q_blocks,
    k_blocks,
    key_blocks,
    block_k,
    scale,
    HEAD_DIM: tl.constexpr,
    Q_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
    V_TILE: tl.constexpr,
    FRAMES: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRET: tl.constexpr,
    HARDWARE: tl.constexpr,
    E4M3: tl.constexpr,
):
    """As `attend`, one query block of one head over its listed key blocks: grid (query_blocks, heads).

    Products are of float16, which holds every code exactly, or with `E4M3` of the codes; queries are rounded to a scale
    for each then. A logit is `s (q . code) + q . mean`; the product with the mean is of float16 in both. The output is
    kept in units of the last block's scale, so that scales of values cost nothing.
    """
    query_block = tl.program_id(0)
    head = tl.program_id(1)
    present = count_present(frame_slots, past_frames, FRAMES)
    stride = heads * HEAD_DIM
    column = tl.arange(0, HEAD_DIM)
    value_column = tl.arange(0, V_TILE)

    query = (query_block % q_blocks) * Q_TILE + tl.arange(0, Q_TILE)
    query_inside = query < frame_tokens
    query_base = ((query_block // q_blocks) * frame_tokens).to(tl.int64) * stride + head * HEAD_DIM
    q_tile = load_rows(q + query_base + query[:, None] * stride + column[None, :], query_inside, EVEN)
    to_log2 = scale * 1.4426950408889634
    code_to_log2 = tl.full([Q_TILE], 1.0, tl.float32) * to_log2
    if E4M3:
        wide = q_tile.to(tl.float32)
        q_scale = scale_of(tl.max(tl.abs(wide), 1))
        code_to_log2 = code_to_log2 * q_scale
        q_codes = _rounded(wide / q_scale[:, None], INTERPRET)
        q_tile = q_tile.to(tl.float16)
    else:
        q_tile = q_tile.to(tl.float16)
        q_codes = q_tile
        if not HARDWARE:
            code_to_log2 = code_to_log2 * _TO_HALF
    if INTERPRET:
        q_codes = q_codes.to(tl.float32)

    row = (head * tl.num_programs(0) + query_block).to(tl.int64)
    entries = lists + row * key_blocks
    # log2(block_k / K_TILE) for the ratios 1, 2 and 4.
    shift = block_k // K_TILE >> 1
    steps = tl.load(counts + row) << shift
    block_k = K_TILE << shift  # the same number, known to be a multiple
    key = tl.arange(0, K_TILE)
    key_offset = key[:, None] * stride + column[None, :]
    mean_offset = tl.zeros([_MEAN_ROWS], tl.int32)[:, None] + column[None, :]
    value_offset = value_column[:, None] * block_k + key[None, :]

    best = tl.full([Q_TILE], float("-inf"), tl.float32)
    norm = tl.zeros([Q_TILE], tl.float32)
    acc = tl.zeros([Q_TILE, V_TILE], tl.float32)
    acc_high = tl.zeros([Q_TILE, V_TILE], tl.float32)
    unit = 1.0
    for step in tl.range(0, steps, num_stages=STAGES):
        entry = load_if(entries + (step >> shift), step < steps, INTERPRET)
        frame = entry >> _ENTRY_BITS
        block = entry & _ENTRY_MASK
        within = (step & ((1 << shift) - 1)) * K_TILE
        start = block * block_k + within
        past = frame < present
        slot = load_if(frame_slots + frame, past, INTERPRET)
        place = tl.where(past, slot, frame - present)
        of_block = (place.to(tl.int64) * k_blocks + block) * heads + head
        token = place.to(tl.int64) * frame_tokens + start
        k_base = tl.where(past, past_k, k) + token * stride + head * HEAD_DIM
        v_base = tl.where(past, past_v, v) + of_block * (HEAD_DIM * block_k) + within

        key_inside = key < frame_tokens - start
        k_tile = _operand(load_rows(k_base + key_offset, key_inside, EVEN), E4M3, INTERPRET, HARDWARE)
        mean = tl.load(tl.where(past, past_kmean, k_mean) + of_block * HEAD_DIM + mean_offset).to(tl.float16)
        key_scale = tl.load(tl.where(past, past_kscale, k_scale) + of_block)
        value_scale = tl.load(tl.where(past, past_vscale, v_scale) + of_block)
        if INTERPRET:
            of_mean = tl.dot(q_tile.to(tl.float32), tl.trans(mean.to(tl.float32)))
        else:
            of_mean = tl.dot(q_tile, tl.trans(mean))
        of_mean = tl.max(of_mean, 1) * to_log2  # all columns are the same
        logits = tl.dot(q_codes, tl.trans(k_tile)) * (code_to_log2 * key_scale)[:, None] + of_mean[:, None]
        if not EVEN:
            logits = tl.where(key_inside[None, :], logits, float("-inf"))
        # The first step of a block always has a key inside the frame, so `new_best` is finite from then on.
        largest = tl.max(logits, 1)
        if E4M3:
            # A power of two: what a weight is rounded to does not depend on the order of blocks then.
            largest = tl.ceil(largest) - _WEIGHT_BITS
        new_best = tl.maximum(best, largest)
        weights = tl.exp2(logits - new_best[:, None])
        decay = tl.exp2(best - new_best)
        norm = norm * decay + tl.sum(weights, 1)
        best = new_best
        value_scale = tl.maximum(value_scale, _SMALLEST_SCALE)
        decay = decay * (unit / value_scale)
        unit = value_scale

        weights = _rounded(weights, INTERPRET) if E4M3 else weights.to(tl.float16)
        if INTERPRET:
            weights = weights.to(tl.float32)
        # Behind a frame's last key, values are zeros.
        v_tile = _operand(tl.load(v_base + value_offset), E4M3, INTERPRET, HARDWARE)
        acc = _added(acc, decay, weights, v_tile, E4M3)
        if V_TILE < HEAD_DIM:
            v_tile = tl.load(v_base + V_TILE * block_k + value_offset)
            acc_high = _added(acc_high, decay, weights, _operand(v_tile, E4M3, INTERPRET, HARDWARE), E4M3)

    # An empty list leaves zeros.
    if not HARDWARE and not E4M3:
        unit = unit * _TO_HALF
    inverse = (unit / tl.where(norm > 0, norm, 1.0))[:, None]
    o_pointers = out + query_base + query[:, None] * stride + value_column[None, :]
    store_rows(o_pointers, (acc * inverse).to(out.dtype.element_ty), query_inside, EVEN)
    if V_TILE < HEAD_DIM:
        store_rows(o_pointers + V_TILE, (acc_high * inverse).to(out.dtype.element_ty), query_inside, EVEN)


attend_e4m3 = attend_fp8
"""The kernel of that name is the same function with `E4M3`."""


@triton.jit(do_not_specialize=["heads", "frame_tokens", "k_blocks", "block_k"])
def commit_fp8(
    past_k,
    past_v,
    past_kmean,
    past_kscale,
    past_vscale,
    k,
    v,
    k_mean,
    k_scale,
    v_scale,
    commit_slots,
    heads,
    frame_tokens,
    k_blocks,
    block_k,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
):
    """As `commit`, the scales of keys and values included: grid (tiles of a frame's elements, chunk_frames, 2)."""
    frame = tl.program_id(1)
    slot = tl.load(commit_slots + frame).to(tl.int64)
    if slot < 0:
        return
    width = heads * HEAD_DIM
    element = tl.program_id(0) * TILE + tl.arange(0, TILE)
    values = tl.program_id(2) == 1
    if values:
        # Whole blocks: more than the frame's elements where the last one is short.
        size = k_blocks * block_k * width
        for first in range(0, size, tl.num_programs(0) * TILE):
            move(past_v, v, slot, frame, size, first + element)
    else:
        move(past_k, k, slot, frame, frame_tokens * width, element)
    # There are never more blocks than tokens, so the same tiles cover what belongs to blocks.
    scales = tl.where(values, v_scale, k_scale)
    move(tl.where(values, past_vscale, past_kscale), scales, slot, frame, k_blocks * heads, element)
    if not values:
        move(past_kmean, k_mean, slot, frame, k_blocks * width, element)


@triton.jit
def _turned(x, c, s, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    even, odd = tl.split(tl.reshape(x, [ROWS, HEAD_DIM // 2, 2]))
    turned = tl.join(even * c[None, :] - odd * s[None, :], even * s[None, :] + odd * c[None, :])
    return tl.reshape(turned, [ROWS, HEAD_DIM])


@triton.jit(do_not_specialize=["heads", "frame_tokens", "k_blocks", "block_k", "turned_pairs"])
def rope_sink_fp8(
    past_k,
    past_kmean,
    past_kscale,
    sink_k,
    sink_kmean,
    sink_kscale,
    sink_slots,
    cos,
    sin,
    heads,
    frame_tokens,
    k_blocks,
    block_k,
    turned_pairs,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """As `rope_sink`, one key block of one head of one sink frame: grid (k_blocks, heads, sinks).

    A rotation turns a key less its mean into the turned key less the turned mean, so the codes are turned, and rounded
    once more to a scale of their own.
    """
    block = tl.program_id(0)
    head = tl.program_id(1)
    sink = tl.program_id(2)
    slot = tl.load(sink_slots + sink).to(tl.int64)
    if slot < 0:
        return
    pair = tl.arange(0, HEAD_DIM // 2)
    c = tl.load(cos + sink * turned_pairs + pair, mask=pair < turned_pairs, other=1.0)
    s = tl.load(sin + sink * turned_pairs + pair, mask=pair < turned_pairs, other=0.0)
    column = tl.arange(0, HEAD_DIM)
    stride = heads * HEAD_DIM
    start = block * block_k
    rows_here = tl.minimum(block_k, frame_tokens - start)
    size = frame_tokens * stride
    offset = start * stride + head * HEAD_DIM
    from_block = (sink.to(tl.int64) * k_blocks + block) * heads + head
    to_block = (slot * k_blocks + block) * heads + head
    old = tl.load(sink_kscale + from_block)

    largest = 0.0
    for first in tl.range(0, rows_here, TILE):
        row = first + tl.arange(0, TILE)
        inside = (row < rows_here)[:, None]
        at = sink_k + sink.to(tl.int64) * size + offset + row[:, None] * stride + column[None, :]
        x = to_half(tl.load(at, mask=inside, other=0), HARDWARE).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(_turned(x, c, s, TILE, HEAD_DIM))))
    if not HARDWARE:
        old = old * _TO_HALF
    new = scale_of(largest * old)
    tl.store(past_kscale + to_block, new)
    for first in tl.range(0, rows_here, TILE):
        row = first + tl.arange(0, TILE)
        inside = (row < rows_here)[:, None]
        at = sink_k + sink.to(tl.int64) * size + offset + row[:, None] * stride + column[None, :]
        x = to_half(tl.load(at, mask=inside, other=0), HARDWARE).to(tl.float32) * old
        codes = to_codes(_turned(x, c, s, TILE, HEAD_DIM) / new, HARDWARE)
        tl.store(past_k + slot * size + offset + row[:, None] * stride + column[None, :], codes, mask=inside)
    mean = tl.load(sink_kmean + from_block * HEAD_DIM + column)
    turned = _turned(tl.reshape(mean, [1, HEAD_DIM]), c, s, 1, HEAD_DIM)
    tl.store(past_kmean + to_block * HEAD_DIM + column[None, :], turned)
