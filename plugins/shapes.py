"""The shapes of the operators' inputs and outputs, derived from their attributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .contract import ATTENTION_OPERATORS, QK_PREPARE, AttentionAttributes, QKPrepareAttributes
from .errors import ContractError

__all__ = ["hsa_output_shapes", "qk_prepare_output_shapes"]

Dim = Any
"""An int, or PyTorch's symbolic int while a graph is traced."""
Shape = Sequence[Dim]


def _expect(owner: str, shapes: Mapping[str, Shape], name: str, expected: Sequence[Dim | str]) -> None:
    """Check one shape; a string stands for a dimension of any size."""
    found = tuple(shapes[name])
    fits = len(found) == len(expected) and all(
        isinstance(want, str) or have == want for have, want in zip(found, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(dim) for dim in expected)
        raise ContractError(f"{owner}: {name} has shape {list(found)}; expected [{wanted}]")


def _frames(owner: str, name: str, tokens: Dim, frame_tokens: int) -> Dim:
    if tokens == 0 or tokens % frame_tokens:
        raise ContractError(
            f"{owner}: {name} has {tokens} tokens; expected whole frames, a positive multiple of frame_tokens = "
            f"{frame_tokens}"
        )
    return tokens // frame_tokens


def hsa_output_shapes(
    attributes: AttentionAttributes, shapes: Mapping[str, Shape]
) -> dict[str, tuple[Dim, ...]]:
    """Check the input shapes of an attention operator, over codes or not, and derive its output shapes.

    The number of slots may be symbolic and is not compared between the caches.

    Args:
        shapes: shape of every input of the operator.

    Raises:
        ContractError: a shape does not fit; the message names the input and both shapes.
    """
    owner = next(name for name, kind in ATTENTION_OPERATORS.items() if isinstance(attributes, kind))
    _expect(owner, shapes, "q", ("tokens", "heads", "head_dim"))
    tokens, heads, dim = shapes["q"]
    frames = _frames(owner, "q", tokens, attributes.frame_tokens)
    by_token, in_slots = (tokens, heads, dim), ("slots", attributes.frame_tokens, heads, dim)
    by_block = (attributes.k_blocks, heads, dim, attributes.block_k)
    codes = "v_scale" in shapes
    _expect(owner, shapes, "k", by_token)
    _expect(owner, shapes, "v", (frames, *by_block) if codes else by_token)
    _expect(owner, shapes, "q_mean", (frames, attributes.q_blocks, heads, dim))
    _expect(owner, shapes, "k_mean", (frames, attributes.k_blocks, heads, dim))
    _expect(owner, shapes, "past_k", in_slots)
    _expect(owner, shapes, "past_v", ("slots", *by_block) if codes else in_slots)
    _expect(owner, shapes, "past_kmean", ("slots", attributes.k_blocks, heads, dim))
    for name, count in (
        ("k_scale", frames),
        ("v_scale", frames),
        ("past_kscale", "slots"),
        ("past_vscale", "slots"),
    ):
        if name in shapes:
            _expect(owner, shapes, name, (count, attributes.k_blocks, heads))
    _expect(owner, shapes, "frame_slots", ("past frames",))
    _expect(owner, shapes, "chunk", ())
    if "pinned" in shapes:
        _expect(owner, shapes, "pinned", ())
    if "linear_weight" in shapes:
        _expect(owner, shapes, "linear_weight", (dim, dim))
        _expect(owner, shapes, "linear_bias", (dim,))
    return {"out": (tokens, heads, dim)}


def qk_prepare_output_shapes(
    attributes: QKPrepareAttributes, shapes: Mapping[str, Shape], *, codes: bool = False
) -> dict[str, tuple[Dim, ...]]:
    """Check the input shapes of `QKPrepare` and derive its output shapes.

    Args:
        shapes: shape of every input in `QK_PREPARE_INPUTS`.
        codes: whether keys and values are codes in its results.

    Raises:
        ContractError: a shape does not fit; the message names the input and both shapes.
    """
    owner = QK_PREPARE
    _expect(owner, shapes, "qkv", ("tokens", "3 * heads * head_dim"))
    tokens, width = shapes["qkv"]
    frames = _frames(owner, "qkv", tokens, attributes.frame_tokens)
    heads = attributes.heads
    if width == 0 or width % (6 * heads):
        raise ContractError(
            f"{owner}: qkv has width {width}; expected 3 * heads * head_dim with heads = {heads} and an even "
            "head_dim (RoPE rotates pairs)"
        )
    dim = width // (3 * heads)
    _expect(owner, shapes, "bias", (width,))
    for name in ("norm_q", "norm_k"):
        _expect(owner, shapes, name, (heads * dim,))
    for name in ("cos", "sin"):
        _expect(owner, shapes, name, (tokens, dim // 2))
    head = (tokens, heads, dim)
    return {
        "q": head,
        "k": head,
        "v": (frames, attributes.k_blocks, heads, dim, attributes.block_k) if codes else head,
        "q_mean": (frames, attributes.q_blocks, heads, dim),
        "k_mean": (frames, attributes.k_blocks, heads, dim),
        **dict.fromkeys(("k_scale", "v_scale"), (frames, attributes.k_blocks, heads)),
    }
