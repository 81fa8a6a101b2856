"""What a backend is to the build: a few functions, and the run they work with.

A backend's module defines a `Builder`; `export.build` lists it in one table. The build calls `check` before any long
work, asks for the `parts` there will be, and lets `build` make them, each through `Run.part`, which skips what an
interrupted build finished.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import TypeAdapter

from export.progress import ProgressCallback
from export.quantize.decision import QuantizationPlan
from export.request.geometry import StepPlan
from export.request.request import BuildRequest
from export.request.weights import Weights
from lightforcing_ref.decoders.tae import VideoDecoder
from lightforcing_ref.model import CausalWanModel
from runtime import bundle

from .keys import BuildKeys
from .workspace import Workspace

__all__ = ["Builder", "Built", "BuiltEngine", "Models", "Run"]

T = TypeVar("T")


class Models:
    """The models, each loaded at most once, and only if something that is built needs it."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self._dit: dict[torch.dtype, CausalWanModel] = {}
        self._decoder: dict[torch.dtype, VideoDecoder] = {}

    def dit(self, dtype: torch.dtype) -> CausalWanModel:
        """The transformer."""
        if dtype not in self._dit:
            self._dit[dtype] = self.weights.dit(dtype)
        return self._dit[dtype]

    def take_dit(self, dtype: torch.dtype) -> CausalWanModel:
        """The transformer, to be used up: it is loaded again if it is asked for again."""
        model = self.dit(dtype)
        self._dit.clear()
        return model

    def decoder(self, dtype: torch.dtype) -> VideoDecoder:
        """The video decoder."""
        if dtype not in self._decoder:
            self._decoder[dtype] = self.weights.vae_decoder(dtype)
        return self._decoder[dtype]


class Run:
    """One build under way.

    Attributes:
        workspace: folder of the bundle in the making; what is not among the published files disappears at the end.
        models: of `request.weights`.
        keys: what the parts are made from.
        quantization: what the builder's check decided.
    """

    def __init__(
        self,
        workspace: Workspace,
        request: BuildRequest,
        plan: StepPlan,
        keys: BuildKeys,
        parts: Mapping[str, float],
        progress: ProgressCallback,
        quantization: QuantizationPlan | None,
    ) -> None:
        self.quantization = quantization
        self.workspace, self.request, self.plan, self.keys = workspace, request, plan, keys
        self.models = Models(request.weights)
        self._parts, self._progress = parts, progress
        self._done, self._total = 0.0, sum(parts.values())
        self._current, self._within = "", 0.0

    @property
    def folder(self) -> Path:
        """Where parts are written."""
        return self.workspace.folder

    def part(
        self, name: str, build: Callable[[Path], Sequence[str]], *, key: str | None = None
    ) -> list[bundle.FileEntry]:
        """Make the part `name`, or take it over from an interrupted build; that costs no effort, and is none.

        Args:
            build: writes into the folder it is given and returns the paths of its files, relative to it.
            key: one of `keys`, for a part that depends on less than the whole request.

        Returns:
            the part's files.
        """
        self._current, self._within = name, 0.0
        self._progress(name, self._done, self._total)
        entries, taken_over = self.workspace.component(name, build, key=key)
        if taken_over:
            self._total -= self._parts[name]
        else:
            self._done += self._parts[name]
        return entries

    def section(
        self,
        name: str,
        kind: type[T],
        build: Callable[[Path], tuple[Sequence[str], T]],
        *,
        key: str | None = None,
    ) -> tuple[T, list[bundle.FileEntry]]:
        """Make a part that also says something, such as a section of the manifest; see `part`.

        Args:
            kind: of what it says; kept as JSON beside the part's files, so that it outlasts an interruption.
            build: returns its files, and that.

        Returns:
            what the part says, and its files.
        """
        adapter, note = TypeAdapter(kind), f"{name.replace(' ', '_')}.section.json"

        def write(folder: Path) -> list[str]:
            files, said = build(folder)
            (folder / note).write_bytes(adapter.dump_json(said))
            return [*files, note]

        entries = self.part(name, write, key=key)
        said = adapter.validate_json((self.folder / note).read_bytes())
        return said, [entry for entry in entries if entry.path != note]

    def within(self, phase: str, done: int, total: int) -> None:
        """Show how far the part under way is, where what makes it tells: a `StepCallback`.

        A part never goes back: where its phases count their steps from the start again, it waits.
        """
        self._within = max(self._within, done / max(1, total))
        share = self._parts[self._current] * self._within
        self._progress(f"{self._current}: {phase}", self._done + share, self._total)

    def finish(self, name: str) -> None:
        """Show that all parts are done, and what comes now."""
        whole = sum(self._parts.values())
        self._progress(name, whole, whole)


@dataclass(frozen=True)
class BuiltEngine:
    """What a part says that a vendor's library built: the manifest's entry, and the library's version."""

    component: bundle.Component
    version: str


@dataclass(frozen=True)
class Built:
    """What a backend made.

    Attributes:
        components: the manifest's entries.
        files: of the bundle; what else lies in the workspace is dropped.
        graphs: component -> ONNX file that its engine was built from, for reference results.
        status: "built", or what is still to be shown.
        segments, library, kernels, quantization, golden: the manifest's sections.
    """

    components: Mapping[str, bundle.Component]
    files: Sequence[bundle.FileEntry]
    graphs: Mapping[str, Path]
    status: str = "built"
    segments: bundle.Segments | None = None
    library: bundle.Library | None = None
    kernels: bundle.Kernels | None = None
    quantization: bundle.Quantization | None = None
    golden: bundle.Golden | None = None


def _nothing_to_check(request: BuildRequest, plan: StepPlan) -> None:
    pass


@dataclass(frozen=True)
class Builder:
    """A backend's side of the build.

    Attributes:
        parts: name -> rough effort (seconds at full size, on two cores), in the order in which `build` makes them.
        build: makes the parts.
        check: refuses, before any long work, what cannot be built (InputError, BuildError); returns what is quantized.
        golden: whether the bundle gets golden vectors, from `Built.graphs`.
        compile: makes the parts that hold no weights, for a backend that has such; `build` takes them over.
    """

    parts: Callable[[BuildRequest, StepPlan], Mapping[str, float]]
    build: Callable[[Run], Built]
    check: Callable[[BuildRequest, StepPlan], QuantizationPlan | None] = field(default=_nothing_to_check)
    golden: bool = True
    compile: Callable[[Run], object] | None = None
