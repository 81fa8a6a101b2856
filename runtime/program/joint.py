"""Forwards of several chunks at once: every chunk sees every other one, in every layer.

There is no graph of several chunks. A layer of all chunks is computed before the next layer of any, with the segments
and operators that one chunk has. Keys and values lie in the pool but for the last chunk's. Attention without a budget
of blocks asks only which keys there are, so every chunk's queries are given the last chunk's keys as those of the
current chunk, and all others as past. Each chunk has a step of its own, so chunks may be at different noise levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from runtime.bundle import Manifest

from .program import EngineRun, Forward, Operation, View

__all__ = ["StepParts", "joint_forwards", "window_forwards"]

Views = Mapping[str, View]


class StepParts(Protocol):
    """The operations that one chunk's layer is made of; `own` stands for the buffers of the same names."""

    def view(self, name: str) -> View:
        """A whole buffer."""

    @property
    def projected(self) -> dict[str, View]:
        """What segments leave for `prepare`."""

    def row_tensors(self, row: int) -> dict[str, View]:
        """What a denoising forward in a row of the schedule takes and gives besides what all of them do."""

    def segment(self, name: str, tensors: Views, weights: Mapping[str, str], layer: int | None) -> EngineRun:
        """A run of a segment with these weights bound."""

    def prepare(self, layer: int, weights: Mapping[str, str], own: Views | None = None) -> Operation:
        """From a layer's projection to queries, keys and values."""

    def attention(self, layer: int, own: Views | None = None) -> list[Operation]:
        """The attention of a layer."""

    def commit_layer(self, layer: int, slots: View) -> Operation:
        """From a layer's keys and values into the pool."""


def joint_forwards(parts: StepParts, manifest: Manifest) -> list[Forward]:
    """`joint.N`: clean forwards that recompute the cache's keys and values of one, two, ... chunks."""
    forwards = []
    step = parts.view(f"step.{manifest.schedule.clean_step}")
    for count in range(1, manifest.joint_chunks + 1):
        chunks = [{"latent": parts.view(f"joint.{chunk}.latent"), "step": step} for chunk in range(count)]
        operations = _together(parts, manifest, chunks, denoises=False)
        forwards.append(Forward(f"joint.{count}", "forward", _feeds(parts, count), tuple(operations)))
    return forwards


def window_forwards(parts: StepParts, manifest: Manifest) -> list[Forward]:
    """`window.N`: denoising forwards of one, two, ... chunks of a rolling window, oldest first, the latest in row 0."""
    schedule = manifest.schedule
    if not schedule.rolling:
        return []
    forwards = []
    for count in range(1, schedule.window_chunks + 1):
        # Oldest first: each writes its latent where the one before has read its own.
        chunks = [parts.row_tensors(row) for row in reversed(range(count))]
        operations = _together(parts, manifest, chunks, denoises=True)
        feeds = (*_feeds(parts, count), parts.view("noise"))
        forwards.append(Forward(f"window.{count}", "forward", feeds, tuple(operations)))
    return forwards


def _feeds(parts: StepParts, count: int) -> tuple[View, ...]:
    names = ["chunk", "frame_slots"]
    for chunk in range(count):
        kinds = ("cos", "sin", "slots") if chunk < count - 1 else ("cos", "sin")
        names += [f"joint.{chunk}.{kind}" for kind in kinds]
    return tuple(parts.view(name) for name in names)


def _together(
    parts: StepParts, manifest: Manifest, chunks: Sequence[Views], *, denoises: bool
) -> list[Operation]:
    """All layers of `chunks`, of which each entry has `latent` and `step`, and, to denoise, `noise` and `next_latent`.

    Without `denoises`, it ends with the last layer's keys and values.
    """
    segments = manifest.segments
    assert segments is not None
    operations: list[Operation] = []
    layers = manifest.model.layers

    def own(chunk: int) -> dict[str, View]:
        return {kind: parts.view(f"joint.{chunk}.{kind}") for kind in ("cos", "sin", "q", "q_mean")}

    def behind(layer: int, chunk: int) -> dict[str, View]:
        """What a segment takes that comes behind the attention of `layer`."""
        return {
            **chunks[chunk],
            "x": parts.view(f"joint.{chunk}.x.{layer % 2}"),
            "attention_out": parts.view("attention_out"),
            "cross_k": parts.view(f"cross_k.{layer}"),
            "cross_v": parts.view(f"cross_v.{layer}"),
        }

    for layer in range(layers):
        for chunk in range(len(chunks)):
            outs = {"x_out": parts.view(f"joint.{chunk}.x.{layer % 2}"), **parts.projected}
            if layer == 0:
                operations.append(parts.segment("first", {**chunks[chunk], **outs}, segments.first, None))
            else:
                operations += parts.attention(layer - 1, own(chunk))
                name, weights = segments.layer_component(layer - 1), segments.layers[layer - 1]
                operations.append(
                    parts.segment(name, {**behind(layer - 1, chunk), **outs}, weights, layer - 1)
                )
            operations.append(parts.prepare(layer, segments.prepare[layer], own(chunk)))
            if chunk < len(chunks) - 1:
                operations.append(parts.commit_layer(layer, parts.view(f"joint.{chunk}.slots")))
    for chunk in range(len(chunks)) if denoises else ():
        operations += parts.attention(layers - 1, own(chunk))
        tensors = {**behind(layers - 1, chunk), "x0": parts.view("x0")}
        operations.append(parts.segment("last", tensors, segments.last, layers - 1))
    return operations
