"""Golden vectors of what updates a persistent set: which blocks stay, after which chunk, by the reference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.graph.arrays import as_tensor
from export.request.geometry import StepPlan
from lightforcing_ref.policies import PersistentSet, block_weights
from runtime import bundle
from runtime.bundle.policies import PbsaPolicy

__all__ = ["PersistReference", "persist_component"]

_POOLS = ("past_k", "past_v", "past_kmean")


def persist_component(step: bundle.Component, frames: int) -> bundle.Component:
    """The component `persist`, which kernels execute: what it takes of the step, and the `frames` that it leaves."""
    named = {spec.name: spec for spec in (*step.inputs, *step.outputs)}

    def of(name: str, source: str) -> bundle.TensorSpec:
        return named[source].model_copy(update={"name": name})

    pools = [of(name, f"{name}.0") for name in _POOLS]
    return bundle.Component(
        file=None,
        inputs=(
            of("q_mean", "qmean.0"),
            of("k_mean", "kmean.0"),
            *pools,
            named["frame_slots"],
            bundle.TensorSpec(name="contest", dtype="int32", shape=(2,)),
        ),
        outputs=tuple(
            bundle.TensorSpec(
                name=spec.name.replace("past_", "kept_"), dtype=spec.dtype, shape=(frames, *spec.shape[1:])
            )
            for spec in pools
        ),
    )


class PersistReference:
    """A `GoldenGraph` of `component`: what `lightforcing_ref` makes of the set of a plan.

    Attributes:
        precision: float32: nothing but the choice is computed, and blocks are moved as they are.
    """

    def __init__(self, component: bundle.Component, plan: StepPlan) -> None:
        method = plan.variant.attention
        assert isinstance(method, PbsaPolicy)
        self.path, self.precision, self.layers = Path("persist"), "fp32", 0
        self.inputs, self.outputs = component.inputs, component.outputs
        self._set = PersistentSet(method.persistent_frames, method.heads, method.score)
        self._geometry, self._scale = plan.geometry, plan.spec.scale
        self._sinks = plan.variant.cache.sink_frames

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs, float32."""
        kept = self._set.frames
        pools = [_float32(inputs[name]) for name in _POOLS]
        frames = [tuple(pool[slot] for pool in pools) for slot in self._contenders(inputs)]
        left = self._set.contest(frames, kept, self._scores(inputs), self._geometry)
        parts = zip(*left, strict=True)
        return {spec.name: torch.stack(part).numpy() for spec, part in zip(self.outputs, parts, strict=True)}

    def margin(self, inputs: Mapping[str, NDArray[Any]]) -> float:
        """The least share by which the last block that stays of any head exceeds the first that does not.

        Args:
            inputs: all but keys and values, which have no say.
        """
        kept, geometry = self._set.frames, self._geometry
        whole = geometry.frame_tokens // geometry.block_k
        scores = self._scores(inputs)
        by_frame = scores.reshape(len(scores), -1, geometry.k_blocks)
        margins = []
        for of_size in (by_frame[..., :whole], by_frame[..., whole:]):
            if count := kept * of_size.shape[2]:
                best = of_size.flatten(1).sort(descending=True).values
                margins.append(float((1 - best[:, count] / best[:, count - 1]).min()))
        return min(margins)

    def _contenders(self, inputs: Mapping[str, NDArray[Any]]) -> list[int]:
        slots: list[int] = inputs["frame_slots"].tolist()
        return slots[self._sinks : self._sinks + int(inputs["contest"].sum())]

    def _scores(self, inputs: Mapping[str, NDArray[Any]]) -> Tensor:
        slots, contenders = inputs["frame_slots"], self._contenders(inputs)
        past = _float32(inputs["past_kmean"])[torch.from_numpy(slots[slots >= 0]).long()]
        means = torch.cat((past, _float32(inputs["k_mean"])))
        weights = block_weights(_float32(inputs["q_mean"]), means, self._scale)
        first, blocks = self._sinks * self._geometry.k_blocks, len(contenders) * self._geometry.k_blocks
        return self._set.scores(weights)[:, first : first + blocks]


def _float32(value: NDArray[Any]) -> Tensor:
    return as_tensor(value.astype(np.float32))
