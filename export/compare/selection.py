"""What attention looks at in the reference: recorded while a rollout runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.graph.oracles import ORACLES
from lightforcing_ref.attention import hsa_selection, token_blocks
from lightforcing_ref.policies import MethodOperator
from lightforcing_ref.sparsity import HSAConfig
from plugins import contract
from plugins.operators import OPERATORS

__all__ = ["Recording", "seen_blocks"]

SeenBlocks = NDArray[np.float32]
"""`[H, query blocks, resident key blocks]`: the share of its pairs of tokens that a pair of blocks lets see."""


@dataclass
class Recording:
    """Attention operators that note what they look at.

    Attributes:
        chunks: chunk -> what each call saw, in the order of calls: the layers of the first forward, of the second, ...
    """

    chunks: dict[int, list[SeenBlocks]] = field(default_factory=dict)

    def kernels(self) -> Mapping[str, Callable[..., Tensor]]:
        """The oracles, recorded."""
        return {operator: self._recorded(operator, oracle) for operator, oracle in ORACLES.items()}

    def forward(self, chunk: int, step: int, layers: int) -> list[SeenBlocks]:
        """What every layer saw in one forward of a chunk."""
        return self.chunks[chunk][step * layers : (step + 1) * layers]

    def share(self, key_rows: NDArray[np.float32]) -> float | None:
        """The mean share of the resident keys that queries saw after the first chunk; None where there was none.

        Args:
            key_rows: tokens of each key block of a frame.
        """
        shares = [
            float((seen * (weights := np.resize(key_rows, seen.shape[2]))).sum(2).mean() / weights.sum())
            for chunk, calls in self.chunks.items()
            if chunk
            for seen in calls
        ]
        return float(np.mean(shares)) if shares else None

    def _recorded(self, operator: str, oracle: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*tensors: Any, **attributes: Any) -> Tensor:
            chunk = int(tensors[contract.HSA_INPUTS.index("chunk")])
            self.chunks.setdefault(chunk, []).append(seen_blocks(operator, tensors, attributes))
            return oracle(*tensors, **attributes)

        return call


def seen_blocks(operator: str, tensors: tuple[Any, ...], attributes: Mapping[str, Any]) -> SeenBlocks:
    """What one call of an attention operator looks at; arguments as for the oracle."""
    given = dict(zip(OPERATORS[operator].inputs, tensors, strict=True))
    oracle = ORACLES[operator]
    if isinstance(oracle, MethodOperator):
        return _pooled(oracle.visible(*tensors, **attributes), given["q"], attributes)
    slots = given["frame_slots"][given["frame_slots"] >= 0].long()
    mask = hsa_selection(
        given["q_mean"],
        torch.cat((given["past_kmean"][slots], given["k_mean"])),
        past_frames=slots.numel(),
        chunk=int(given["chunk"]),
        hsa=HSAConfig(attributes["keep_frames"], attributes["sink_frames"], attributes["near_frames"]),
        keep_q20=attributes["keep_q20"],
    )
    return mask.numpy().astype(np.float32)


def _pooled(visible: Tensor, q: Tensor, attributes: Mapping[str, Any]) -> SeenBlocks:
    """Means of a mask bool `[H, T, K]` over pairs of blocks."""
    sides = []
    for tokens, block in ((q.shape[0], attributes["block_q"]), (visible.shape[2], attributes["block_k"])):
        index = token_blocks(tokens, attributes["frame_tokens"], block, q.device)
        member = torch.nn.functional.one_hot(index).float()
        sides.append(member / member.sum(0))
    pooled: SeenBlocks = torch.einsum("htk,ta,kb->hab", visible.float(), *sides).numpy()
    return pooled
