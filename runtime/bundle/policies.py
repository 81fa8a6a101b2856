"""How attention chooses what it looks at, as data: the table `[attention]` of a variant, and a field of the manifest.

docs/policies.md says what each method does and where its parameters come from.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field, model_validator

from .fields import NonNegative, Part, Positive, PositiveFloat

__all__ = [
    "BUDGETED",
    "POLICIES",
    "Attention",
    "AttentionPolicy",
    "Budget",
    "DensePolicy",
    "HsaPolicy",
    "PbsaPolicy",
    "RadialPolicy",
    "SelectionTables",
    "SlaPolicy",
    "SpargePolicy",
    "StaPolicy",
    "TokenBlocks",
    "VmobaPolicy",
    "check_window",
    "has_linear_branch",
    "keeps_everything",
    "persistent_frames",
    "stated_window",
]

Budget = Literal["growth", "uniform"] | Annotated[float, Field(gt=0, le=1)]
"""How many key blocks a method keeps after the first chunk: by the chunk-aware table, the table's average in every
chunk, or a fraction of its own."""

_Count = Annotated[int, Field(ge=0, le=4096)]
_Positive = Annotated[int, Field(ge=1, le=4096)]
_Odd = Annotated[int, Field(ge=1, le=4095)]
_Share = Annotated[float, Field(gt=0, le=1)]


class HsaPolicy(Part):
    """Hierarchical sparse attention: the best frames, and of these the best blocks (`[sparsity]` says how many)."""

    policy: Literal["hsa"] = "hsa"
    budget: Budget = "growth"


class DensePolicy(Part):
    """Everything."""

    policy: Literal["dense"] = "dense"


class SlaPolicy(Part):
    """SLA: the best blocks of all frames, and beside them, where it is `linear`, linear attention over all keys.

    The linear branch has a trained projection; a build sets `linear` where the checkpoint holds one for each layer.
    """

    policy: Literal["sla"] = "sla"
    budget: Budget = "growth"
    linear: bool = False


class SpargePolicy(Part):
    """SpargeAttn: the best blocks of all frames, and those that their means do not stand for.

    `mode`: `"top-k"` keeps `budget`, `"cdf"` as many as make up `cumulative` of the weights. A block is
    similar if the mean cosine of its tokens exceeds `similarity`; below 0 all are. `smooth` subtracts the mean key.
    """

    policy: Literal["sparge"] = "sparge"
    mode: Literal["top-k", "cdf"] = "top-k"
    budget: Budget = "growth"
    cumulative: _Share = 0.98
    similarity: Annotated[float, Field(ge=-1, le=1)] = -0.1
    smooth: bool = True

    @property
    def plain(self) -> bool:
        """Whether it keeps the best blocks and nothing else: every block is similar."""
        return self.mode == "top-k" and self.similarity < 0


class StaPolicy(Part):
    """Sliding tiles: `windows` of (time, height, width) in tiles, one or one for each head.

    A `tile` is one frame deep, and (rows, columns) of tokens.
    """

    policy: Literal["sta"] = "sta"
    windows: Annotated[tuple[tuple[_Odd, _Odd, _Odd], ...], Field(min_length=1, max_length=4096)] = (
        (5, 3, 3),
    )
    tile: tuple[_Positive, _Positive] = (8, 8)
    sink_frames: _Count = 0

    @model_validator(mode="after")
    def _odd(self) -> StaPolicy:
        even = [window for window in self.windows if not all(size % 2 for size in window)]
        if even:
            raise ValueError(f"windows has {even[0]}; expected odd numbers of tiles in (time, height, width)")
        return self


class RadialPolicy(Part):
    """Bands that narrow with the distance of frames."""

    policy: Literal["radial"] = "radial"
    decay: Annotated[float, Field(gt=0, le=1e6)] = 0.2
    sink_frames: _Count = 1


class VmobaPolicy(Part):
    """VMoBA: layers take `blocks` of (frames, rows, columns) in turns, 0 for all of an axis.

    `mode`: `"top-k"` keeps `tops[i]` blocks where `blocks[i]` is in turn, `"threshold"` blocks up to a share
    of the stretched scores. `gating`: by `"token"`, or `"pooled"`, with one choice for the next `query_block` tokens of
    a frame, patch by patch; a build decides where it is not said, and the manifest says which.
    """

    policy: Literal["vmoba"] = "vmoba"
    blocks: Annotated[tuple[tuple[_Count, _Count, _Count], ...], Field(min_length=1, max_length=4096)] = (
        (2, 0, 0),
        (0, 3, 4),
        (4, 6, 4),
    )
    mode: Literal["top-k", "threshold"] = "threshold"
    tops: Annotated[tuple[_Positive, ...], Field(min_length=1, max_length=4096)] = (3, 20, 15)
    threshold: _Share = 0.25
    gating: Literal["token", "pooled"] | None = None
    query_block: Literal[32, 64, 128] = 64

    @model_validator(mode="after")
    def _consistent(self) -> VmobaPolicy:
        if self.mode == "top-k" and len(self.tops) != len(self.blocks):
            raise ValueError(
                f"there are {len(self.tops)} tops for {len(self.blocks)} blocks; expected one for each"
            )
        return self


class PbsaPolicy(Part):
    """Sparse Forcing: the sinks and a persistent set of blocks whole, and of the recent frames the best blocks.

    `budget` counts blocks of the `local_frames` recent frames, the chunk's own among them. The set has the blocks of
    `persistent_frames` frames. Each head has a set of its `heads`: `"own"`, or one that is `"shared"` by a layer's.
    `score`: a block counts by the `"sum"` of what a chunk's query blocks give it, or by its `"peak"`.
    """

    policy: Literal["pbsa"] = "pbsa"
    budget: Budget = 0.25
    persistent_frames: _Positive = 6
    local_frames: _Positive = 6
    heads: Literal["own", "shared"] = "own"
    score: Literal["sum", "peak"] = "sum"


AttentionPolicy = Annotated[
    HsaPolicy | DensePolicy | SlaPolicy | SpargePolicy | StaPolicy | RadialPolicy | VmobaPolicy | PbsaPolicy,
    Field(discriminator="policy"),
]


class Attention(Part):
    """The sparse attention: its operator's attributes, and what it selects by. Blocks in tokens, the rest in frames.

    `eps` is that of the RMS norm of queries and keys before it; bundles that do not tell have the default, and
    hierarchical selection. `keep_frames` and the two after it belong to the methods that the operator of
    hierarchical sparse attention executes. `products` is null where it multiplies in the type that the model computes
    in, and `"fp8"` where it multiplies codes of E4M3, which keys and values are then (`cache.kv`; docs/operators.md).
    """

    block_q: Positive
    block_k: Positive
    keep_frames: Positive
    sink_frames: NonNegative
    near_frames: NonNegative
    scale: PositiveFloat
    eps: PositiveFloat = 1e-6
    method: AttentionPolicy = HsaPolicy()
    products: Literal["fp8"] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Attention:
        if self.keep_frames < self.sink_frames + self.near_frames:
            raise ValueError(
                f"keep_frames ({self.keep_frames}) is below sink_frames + near_frames "
                f"({self.sink_frames} + {self.near_frames})"
            )
        return self


POLICIES: Final[dict[str, type[Part]]] = {
    "hsa": HsaPolicy,
    "dense": DensePolicy,
    "sla": SlaPolicy,
    "sparge": SpargePolicy,
    "sta": StaPolicy,
    "radial": RadialPolicy,
    "vmoba": VmobaPolicy,
    "pbsa": PbsaPolicy,
}
"""By name."""

BUDGETED = HsaPolicy | SlaPolicy | SpargePolicy | PbsaPolicy
"""Methods with a budget."""


class TokenBlocks(Part):
    """Blocks of a frame's tokens that are no runs of consecutive ones: tokens of a block, and blocks of a frame."""

    block_q: _Positive
    block_k: _Positive
    q_blocks: _Positive
    k_blocks: _Positive


class SelectionTables(Part):
    """What kernels select by beside a method's numbers, in the layers that take one turn.

    `tensors` goes from a buffer of the kernels to a tensor of the file of tables. Without `blocks`, blocks are those of
    the manifest's attention.
    """

    blocks: TokenBlocks | None = None
    tensors: dict[str, str]


def persistent_frames(method: AttentionPolicy) -> int:
    """Past frames that are virtual: packed from blocks that outlive the window."""
    return method.persistent_frames if isinstance(method, PbsaPolicy) else 0


def has_linear_branch(method: AttentionPolicy) -> bool:
    """Whether attention adds a linear branch, whose projection is among a layer's weights."""
    return isinstance(method, SlaPolicy) and method.linear


def check_window(method: AttentionPolicy, chunk_frames: int) -> None:
    """Refuse a window in which a frame would leave before it was resident.

    Raises:
        ValueError: it is shorter than two chunks.
    """
    if isinstance(method, PbsaPolicy) and method.local_frames < 2 * chunk_frames:
        raise ValueError(
            f"attention.local_frames is {method.local_frames}; expected at least two chunks of {chunk_frames} frames, "
            "so that every frame is resident before it leaves"
        )


def stated_window(method: AttentionPolicy, sink_frames: int, window_frames: int | None) -> int | None:
    """The window in frames: what a method says that has one of its own, else `window_frames`, the cache's."""
    if isinstance(method, PbsaPolicy):
        return sink_frames + method.persistent_frames + method.local_frames
    return window_frames


def keeps_everything(method: AttentionPolicy, target: float) -> bool:
    """Whether every token sees everything, so that weights that were never finetuned for sparsity suit it.

    Args:
        target: average sparsity of the chunk-aware table.
    """
    if isinstance(method, DensePolicy):
        return True
    if not isinstance(method, HsaPolicy | SlaPolicy | SpargePolicy) or has_linear_branch(method):
        return False
    return method.budget == 1 or (isinstance(method.budget, str) and target == 0)
