"""Chunk-aware growth (CAG) tables, HSA budgets and block geometry. No dependencies.

Source: Light Forcing, arXiv 2602.04789v2 and its released inference code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt

from .errors import ConfigError

__all__ = ["DENSE_Q20", "BlockGeometry", "HSAConfig", "SparsityTable", "kept_blocks", "quantize_keep"]

DENSE_Q20 = 1 << 20
"""Fixed-point one: a kept fraction of 1.0, i.e. every block."""


@dataclass(frozen=True)
class BlockGeometry:
    """How one latent frame is cut into attention blocks.

    Blocks are frame-aligned runs of consecutive tokens in raster order; where `frame_tokens` is no multiple of
    the block size, the last block of every frame is shorter.
    """

    frame_tokens: int
    block_q: int
    block_k: int

    def __post_init__(self) -> None:
        for name in ("frame_tokens", "block_q", "block_k"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} is {value}; expected a positive number of tokens")

    @property
    def q_blocks(self) -> int:
        """Query blocks per frame."""
        return -(-self.frame_tokens // self.block_q)

    @property
    def k_blocks(self) -> int:
        """Key blocks per frame."""
        return -(-self.frame_tokens // self.block_k)


@dataclass(frozen=True)
class HSAConfig:
    """Frames that stay eligible in the second stage of hierarchical sparse attention.

    `keep_frames` past frames in all: the first `sink_frames`, the last `near_frames`, and the best of the rest.
    """

    keep_frames: int = 6
    sink_frames: int = 1
    near_frames: int = 2

    def __post_init__(self) -> None:
        if min(self.sink_frames, self.near_frames) < 0 or self.keep_frames < 1:
            raise ConfigError(
                f"keep/sink/near frames are {self.keep_frames}/{self.sink_frames}/{self.near_frames}; "
                "expected keep >= 1 and sink, near >= 0"
            )
        if self.keep_frames < self.sink_frames + self.near_frames:
            raise ConfigError(
                f"keep_frames {self.keep_frames} is smaller than sink_frames + near_frames = "
                f"{self.sink_frames + self.near_frames}; raise keep_frames or lower the other two"
            )


def kept_blocks(keep_q20: Sequence[int], chunk: int, total: int) -> int:
    """Key blocks that each query block of `chunk` sees, out of `total` resident ones.

    Integer arithmetic only, so that every execution (PyTorch, ONNX, GPU) computes the same number. `chunk` is
    clamped to the table.
    """
    entry = keep_q20[min(max(chunk, 0), len(keep_q20) - 1)]
    return min(max(1, (entry * total) >> 20), total)


def quantize_keep(sparsity: float, totals: Iterable[int]) -> int:
    """The fixed-point kept fraction that equals `int((1 - sparsity) * total)` for each of `totals`.

    Raises:
        ConfigError: no single 20-bit fraction reproduces the floating-point count for all totals.
    """
    if sparsity == 0:
        return DENSE_Q20
    exact = (1 - sparsity) * DENSE_Q20
    low, high = 1, DENSE_Q20
    for total in totals:
        kept = int((1 - sparsity) * total)
        if kept > 1:  # 0 and 1 are the same: at least one block is always kept
            low = max(low, -(-(kept << 20) // total))
        high = min(high, (((max(kept, 1) + 1) << 20) - 1) // total)
    if low > high:
        raise ConfigError(
            f"sparsity {sparsity} has no 20-bit fixed-point form that keeps int((1 - s) * K) blocks for every "
            "number of resident blocks K; change it in the sixth decimal"
        )
    return min(max(round(exact), low), high)


@dataclass(frozen=True)
class SparsityTable:
    """Per-chunk sparsity: `values[i]` is the fraction of key blocks that chunk `i` skips.

    Chunks past the end use the last entry.
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ConfigError("the sparsity table is empty; expected one value per chunk")
        for index, value in enumerate(self.values):
            if not 0 <= value < 1:
                raise ConfigError(f"the sparsity of chunk {index} is {value}; expected a value in [0, 1)")

    @classmethod
    def dense(cls) -> SparsityTable:
        """Full attention in every chunk."""
        return cls((0.0,))

    @classmethod
    def chunk_aware(
        cls,
        target: float,
        base: float,
        *,
        table_frames: int = 21,
        chunk_frames: int = 3,
        window_frames: int | None = None,
    ) -> SparsityTable:
        """The CAG table: dense first chunk, then sparsity that grows with the length of the history.

        s_i = base - beta / sqrt(f_i), where f_i is the number of latent frames at the end of chunk i, and beta
        makes the average over all key-value work equal `target`.

        Args:
            target: average sparsity over the chunks after the first, in [0, 1).
            base: sparsity in the limit of a long history, in [target, 1).
            table_frames: planned length of the clip in latent frames.
            window_frames: attention window in latent frames, the current chunk included; None = unlimited.

        Raises:
            ConfigError: a value lies outside its range.
        """
        for name, value in (("target", target), ("base", base)):
            if not 0 <= value < 1:
                raise ConfigError(f"sparsity {name} is {value}; expected a value in [0, 1)")
        if base < target:
            raise ConfigError(
                f"sparsity base {base} is below the target {target}; the base is the limit of a long history "
                "and must be at least the target"
            )
        if table_frames < chunk_frames or table_frames % chunk_frames:
            raise ConfigError(
                f"table_frames is {table_frames}; expected a positive multiple of {chunk_frames} latent frames"
            )
        if target == 0 and base == 0:
            return cls.dense()
        ends = range(2 * chunk_frames, table_frames + 1, chunk_frames)
        alphas = [1 / sqrt(end) for end in ends]
        work = [min(end, window_frames) if window_frames else end for end in ends]
        weighted = sum(a * w for a, w in zip(alphas, work, strict=True))
        beta = (base - target) * sum(work) / weighted if weighted else 0.0
        values = [base - alpha * beta for alpha in alphas]
        for index, value in enumerate(values, start=1):
            if value < 0:
                raise ConfigError(
                    f"target {target} and base {base} give chunk {index} the sparsity {value:.3f}; "
                    "bring base and target closer together"
                )
        return cls((0.0, *values))

    def keep_q20(self, totals: Iterable[int]) -> tuple[int, ...]:
        """The table in the fixed-point form that is baked into graphs; see `quantize_keep`."""
        totals = tuple(totals)
        return tuple(quantize_keep(value, totals) for value in self.values)
