"""The contract of the operators: names and attributes; `shapes` has what follows from them. No dependencies.

The meaning of every input, output and attribute is defined in docs/operators.md, and in docs/policies.md for the
methods of other authors: each is an operator with the inputs and the output of hierarchical sparse attention, and
attributes of its own; one takes an input more, and one two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Literal

from .errors import ContractError

__all__ = [
    "ATTENTION_OPERATORS",
    "DENSE_Q20",
    "DOMAIN",
    "HIERARCHICAL_SPARSE_ATTENTION",
    "HSA_ATTRIBUTES",
    "HSA_INPUTS",
    "HSA_OUTPUTS",
    "LINEAR_EPSILON",
    "PERSISTENT_BLOCK",
    "QK_PREPARE",
    "QK_PREPARE_ATTRIBUTES",
    "QK_PREPARE_INPUTS",
    "QK_PREPARE_OUTPUTS",
    "RADIAL",
    "SLIDING_TILE",
    "SPARGE",
    "SPARSE_LINEAR",
    "VERSION",
    "VMOBA",
    "AttentionAttributes",
    "AttributeKind",
    "HSAAttributes",
    "PersistentBlockAttributes",
    "QKPrepareAttributes",
    "RadialAttributes",
    "SlidingTileAttributes",
    "SpargeAttributes",
    "SparseLinearAttributes",
    "VMoBAAttributes",
    "attribute_kinds",
]

DOMAIN: Final = "lightforcing"
"""ONNX domain and PyTorch namespace of the operators."""

VERSION: Final = 1
"""Version of the domain; it changes when the meaning of an existing graph would."""

HIERARCHICAL_SPARSE_ATTENTION: Final = "HierarchicalSparseAttention"
QK_PREPARE: Final = "QKPrepare"
SLIDING_TILE: Final = "SlidingTileAttention"
RADIAL: Final = "RadialAttention"
SPARGE: Final = "SpargeAttention"
VMOBA: Final = "VMoBAAttention"
PERSISTENT_BLOCK: Final = "PersistentBlockAttention"
SPARSE_LINEAR: Final = "SparseLinearAttention"

HSA_INPUTS: Final[tuple[str, ...]] = (
    "q",
    "k",
    "v",
    "q_mean",
    "k_mean",
    "past_k",
    "past_v",
    "past_kmean",
    "frame_slots",
    "chunk",
)
HSA_OUTPUTS: Final[tuple[str, ...]] = ("out",)
QK_PREPARE_INPUTS: Final[tuple[str, ...]] = ("qkv", "bias", "norm_q", "norm_k", "cos", "sin")
QK_PREPARE_OUTPUTS: Final[tuple[str, ...]] = ("q", "k", "v", "q_mean", "k_mean")

HSA_ATTRIBUTES: Final[tuple[str, ...]] = (
    "frame_tokens",
    "block_q",
    "block_k",
    "keep_frames",
    "sink_frames",
    "near_frames",
    "scale",
    "keep_q20",
)
QK_PREPARE_ATTRIBUTES: Final[tuple[str, ...]] = ("heads", "frame_tokens", "block_q", "block_k", "eps")

LINEAR_EPSILON: Final = 1e-5
"""What SLA's linear branch adds to the sum of its weights."""

DENSE_Q20: Final = 1 << 20
"""The kept fraction 1.0 in the fixed-point form of `keep_q20`: every block is kept."""


def _require_int(owner: str, name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ContractError(f"{owner}: {name} is {value!r}; expected an integer of at least {minimum}")
    if value < minimum:
        raise ContractError(f"{owner}: {name} is {value}; expected at least {minimum}")


def _require_positive(owner: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
        raise ContractError(f"{owner}: {name} is {value!r}; expected a positive finite number")


def _require_grid(owner: str, frame_tokens: int, columns: int) -> None:
    _require_int(owner, "columns", columns, 1)
    if frame_tokens % columns:
        raise ContractError(
            f"{owner}: columns is {columns}; expected a divisor of frame_tokens = {frame_tokens}, the columns of a "
            "frame's tokens"
        )


def _require_table(owner: str, table: tuple[int, ...]) -> None:
    if not table:
        raise ContractError(
            f"{owner}: keep_q20 is empty; expected one entry per chunk (one entry of {DENSE_Q20} is dense)"
        )
    for index, entry in enumerate(table):
        _require_int(owner, f"keep_q20[{index}]", entry, 0)
        if entry > DENSE_Q20:
            raise ContractError(
                f"{owner}: keep_q20[{index}] is {entry}; expected a kept fraction times 2^20, at most "
                f"{DENSE_Q20} (every block)"
            )


@dataclass(frozen=True, kw_only=True)
class _BlockAttributes:
    """Geometry that all operators share: frames of `frame_tokens` tokens, cut into frame-aligned blocks."""

    frame_tokens: int
    block_q: int
    block_k: int

    @property
    def q_blocks(self) -> int:
        """Query blocks per frame; the last one is shorter where the block size does not divide the frame."""
        return -(-self.frame_tokens // self.block_q)

    @property
    def k_blocks(self) -> int:
        """Key blocks per frame; the last one is shorter where the block size does not divide the frame."""
        return -(-self.frame_tokens // self.block_k)

    def _check_geometry(self, owner: str) -> None:
        for name in ("frame_tokens", "block_q", "block_k"):
            _require_int(owner, name, getattr(self, name), 1)

    def as_dict(self) -> dict[str, Any]:
        """Attribute name -> value, in the order of the operator's schema."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, kw_only=True)
class HSAAttributes(_BlockAttributes):
    """Attributes of `HierarchicalSparseAttention`.

    Attributes:
        frame_tokens: tokens of one latent frame.
        block_q, block_k: tokens of a query block and of a key block.
        keep_frames: past frames that stay eligible once there are more than this many; sink and near included.
        sink_frames: oldest past frames that are always eligible.
        near_frames: newest past frames that are always eligible.
        scale: factor on the logits of the softmax, usually 1/sqrt(head_dim). Block scores are not scaled.
        keep_q20: per chunk, the kept fraction of the resident key blocks times 2^20.

    Raises:
        ContractError: a value lies outside its range.
    """

    keep_frames: int
    sink_frames: int
    near_frames: int
    scale: float
    keep_q20: tuple[int, ...]

    def __post_init__(self) -> None:
        owner = HIERARCHICAL_SPARSE_ATTENTION
        object.__setattr__(self, "keep_q20", tuple(self.keep_q20))
        self._check_geometry(owner)
        _require_int(owner, "keep_frames", self.keep_frames, 1)
        _require_int(owner, "sink_frames", self.sink_frames, 0)
        _require_int(owner, "near_frames", self.near_frames, 0)
        if self.keep_frames < self.sink_frames + self.near_frames:
            raise ContractError(
                f"{owner}: keep_frames {self.keep_frames} is smaller than sink_frames + near_frames = "
                f"{self.sink_frames} + {self.near_frames}; raise keep_frames or lower the other two"
            )
        _require_positive(owner, "scale", self.scale)
        _require_table(owner, self.keep_q20)

    def kept_blocks(self, chunk: int, past_frames: int, chunk_frames: int) -> int:
        """Key blocks that each query block may see, before eligibility; integer arithmetic only."""
        total = (past_frames + chunk_frames) * self.k_blocks
        if past_frames == 0:
            return total
        entry = self.keep_q20[min(max(chunk, 0), len(self.keep_q20) - 1)]
        return min(max(1, (entry * total) >> 20), total)


@dataclass(frozen=True, kw_only=True)
class QKPrepareAttributes(_BlockAttributes):
    """Attributes of `QKPrepare`.

    Attributes:
        heads: attention heads; the width of `qkv` is 3 * heads * head_dim.
        frame_tokens: tokens of one latent frame.
        block_q, block_k: tokens of a query block and of a key block.
        eps: added to the mean square inside the RMS norm.

    Raises:
        ContractError: a value lies outside its range.
    """

    heads: int
    eps: float

    def __post_init__(self) -> None:
        self._check_geometry(QK_PREPARE)
        _require_int(QK_PREPARE, "heads", self.heads, 1)
        _require_positive(QK_PREPARE, "eps", self.eps)

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in QK_PREPARE_ATTRIBUTES}


@dataclass(frozen=True, kw_only=True)
class SlidingTileAttributes(_BlockAttributes):
    """Attributes of `SlidingTileAttention`.

    Attributes:
        scale: factor on the logits of the softmax.
        columns: tokens of a frame's row.
        tile: rows and columns of a tile, which is one frame deep.
        windows: odd numbers of tiles in (time, height, width), one triple for all heads or one for each, in a row.
        sink_frames: oldest resident frames that everybody sees.

    Raises:
        ContractError: a value lies outside its range.
    """

    scale: float
    columns: int
    tile: tuple[int, ...]
    windows: tuple[int, ...]
    sink_frames: int

    def __post_init__(self) -> None:
        owner = SLIDING_TILE
        object.__setattr__(self, "tile", tuple(self.tile))
        object.__setattr__(self, "windows", tuple(self.windows))
        self._check_geometry(owner)
        _require_positive(owner, "scale", self.scale)
        _require_grid(owner, self.frame_tokens, self.columns)
        _require_int(owner, "sink_frames", self.sink_frames, 0)
        if len(self.tile) != 2 or min(self.tile) < 1:
            raise ContractError(f"{owner}: tile is {self.tile}; expected positive (rows, columns)")
        if (
            not self.windows
            or len(self.windows) % 3
            or not all(size > 0 and size % 2 for size in self.windows)
        ):
            raise ContractError(
                f"{owner}: windows are {self.windows}; expected triples of odd, positive numbers of tiles"
            )


@dataclass(frozen=True, kw_only=True)
class RadialAttributes(_BlockAttributes):
    """Attributes of `RadialAttention`.

    Attributes:
        scale: factor on the logits of the softmax.
        decay: factor on the width of the bands.
        sink_frames: oldest resident frames that everybody sees whole.

    Raises:
        ContractError: a value lies outside its range.
    """

    scale: float
    decay: float
    sink_frames: int

    def __post_init__(self) -> None:
        self._check_geometry(RADIAL)
        _require_positive(RADIAL, "scale", self.scale)
        _require_positive(RADIAL, "decay", self.decay)
        _require_int(RADIAL, "sink_frames", self.sink_frames, 0)


@dataclass(frozen=True, kw_only=True)
class SpargeAttributes(_BlockAttributes):
    """Attributes of `SpargeAttention`.

    Attributes:
        scale: factor on the logits of the softmax.
        similarity: a block whose mean cosine of all pairs of tokens is not above it is always seen, or sees everything.
        cumulative: keep the fewest blocks whose weights exceed this share; 0 = as many as `keep_q20` says.
        smooth: 1 = subtract the mean of all resident keys first, 0 = do not.
        keep_q20: per chunk, the kept fraction of the resident key blocks times 2^20.

    Raises:
        ContractError: a value lies outside its range.
    """

    scale: float
    similarity: float
    cumulative: float
    smooth: int
    keep_q20: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep_q20", tuple(self.keep_q20))
        self._check_geometry(SPARGE)
        _require_positive(SPARGE, "scale", self.scale)
        _require_table(SPARGE, self.keep_q20)
        if not 0 <= self.cumulative <= 1 or self.smooth not in (0, 1) or not abs(self.similarity) <= 1:
            raise ContractError(
                f"{SPARGE}: cumulative, smooth and similarity are {self.cumulative}, {self.smooth} and "
                f"{self.similarity}; expected values in [0, 1], 0 or 1, and [-1, 1]"
            )


@dataclass(frozen=True, kw_only=True)
class VMoBAAttributes(_BlockAttributes):
    """Attributes of `VMoBAAttention`.

    Attributes:
        scale: factor on the logits of the softmax.
        columns: tokens of a frame's row.
        extent: frames, rows and columns of a block; 0 = all there are.
        top: blocks that each token keeps, its own among them; 0 = until `threshold` is reached.
        threshold: share of the stretched scores.
        query_block: tokens that choose together, by their mean query; 0 = every token by itself.

    Raises:
        ContractError: a value lies outside its range.
    """

    scale: float
    columns: int
    extent: tuple[int, ...]
    top: int
    threshold: float
    query_block: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "extent", tuple(self.extent))
        self._check_geometry(VMOBA)
        _require_positive(VMOBA, "scale", self.scale)
        _require_grid(VMOBA, self.frame_tokens, self.columns)
        _require_int(VMOBA, "top", self.top, 0)
        _require_int(VMOBA, "query_block", self.query_block, 0)
        if len(self.extent) != 3 or min(self.extent) < 0:
            raise ContractError(
                f"{VMOBA}: extent is {self.extent}; expected (frames, rows, columns), 0 for all of an axis"
            )
        if not 0 < self.threshold <= 1:
            raise ContractError(f"{VMOBA}: threshold is {self.threshold}; expected a share in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class _BudgetAttributes(_BlockAttributes):
    """Of operators with nothing but a share of the blocks to choose by."""

    scale: float
    keep_q20: tuple[int, ...]

    def _check_budget(self, owner: str) -> None:
        object.__setattr__(self, "keep_q20", tuple(self.keep_q20))
        self._check_geometry(owner)
        _require_positive(owner, "scale", self.scale)
        _require_table(owner, self.keep_q20)


@dataclass(frozen=True, kw_only=True)
class PersistentBlockAttributes(_BudgetAttributes):
    """Attributes of `PersistentBlockAttention`.

    Attributes:
        scale: factor on the logits of the softmax.
        keep_q20: per chunk, the kept fraction of the key blocks that are not pinned, times 2^20.

    Raises:
        ContractError: a value lies outside its range.
    """

    def __post_init__(self) -> None:
        self._check_budget(PERSISTENT_BLOCK)


@dataclass(frozen=True, kw_only=True)
class SparseLinearAttributes(_BudgetAttributes):
    """Attributes of `SparseLinearAttention`.

    Attributes:
        scale: factor on the logits of the sparse branch's softmax.
        keep_q20: per chunk, the kept fraction of the resident key blocks times 2^20.

    Raises:
        ContractError: a value lies outside its range.
    """

    def __post_init__(self) -> None:
        self._check_budget(SPARSE_LINEAR)


AttentionAttributes = (
    HSAAttributes
    | SlidingTileAttributes
    | RadialAttributes
    | SpargeAttributes
    | VMoBAAttributes
    | PersistentBlockAttributes
    | SparseLinearAttributes
)

ATTENTION_OPERATORS: Final[Mapping[str, type[AttentionAttributes]]] = {
    HIERARCHICAL_SPARSE_ATTENTION: HSAAttributes,
    SLIDING_TILE: SlidingTileAttributes,
    RADIAL: RadialAttributes,
    SPARGE: SpargeAttributes,
    VMOBA: VMoBAAttributes,
    PERSISTENT_BLOCK: PersistentBlockAttributes,
    SPARSE_LINEAR: SparseLinearAttributes,
}
"""Operators in the place of attention, with their attributes. All have `HSA_OUTPUTS`, and at least `HSA_INPUTS`."""

AttributeKind = Literal["int", "float", "ints"]

_KINDS: Final[Mapping[str, AttributeKind]] = {"int": "int", "float": "float", "tuple[int, ...]": "ints"}


def attribute_kinds(attributes: type[AttentionAttributes | QKPrepareAttributes]) -> dict[str, AttributeKind]:
    """Attribute name -> kind, in the order of the operator's schema."""
    return {field.name: _KINDS[str(field.type)] for field in fields(attributes)}
