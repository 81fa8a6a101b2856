"""What each engine of a bundle must look like, checked against what it says of itself.

A build in the wrong type succeeds and exits 0; these committed figures make it fail. They are data of the `engines`
package, one file per backend and precision.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from export.errors import BuildError, InputError
from export.request.sizes import Sized
from lightforcing_ref.dimensions import DecoderConfig, TAEConfig

from .engine_text import EngineReport, Kind

__all__ = ["ComponentExpectation", "Expectations", "Structure", "decoder_kind", "load_expectations"]


@dataclass(frozen=True)
class Structure:
    """The sizes of a model that its engines' memory depends on, in elements.

    Attributes:
        layers: of the transformer.
        tokens: of a chunk, times the transformer's width.
        tokens_ffn: of a chunk, times the width of its feed-forward.
        text: tokens of the prompt, times the text encoder's width.
        text_ffn: the same times the width of its feed-forward.
        text_scores: its attention scores, all heads.
        conditioning: cross-attention keys of all layers.
        pixels: of a frame, times the video decoder's narrowest width.
    """

    layers: int
    tokens: int
    tokens_ffn: int
    text: int
    text_ffn: int
    text_scores: int
    conditioning: int
    pixels: int

    @classmethod
    def of(cls, plan: Sized) -> Structure:
        """The sizes of what `plan` builds.

        Raises:
            ConfigError: the resolution does not divide.
        """
        dit, text, vae = plan.preset.dit, plan.preset.text, plan.preset.vae
        tokens = plan.variant.schedule.chunk_frames * plan.preset.frame_tokens(plan.height, plan.width)
        return cls(
            layers=dit.layers,
            tokens=tokens * dit.dim,
            tokens_ffn=tokens * dit.ffn_dim,
            text=dit.text_len * text.d_model,
            text_ffn=dit.text_len * text.d_ff,
            text_scores=text.heads * dit.text_len**2,
            conditioning=dit.layers * dit.text_len * dit.dim,
            pixels=plan.height * plan.width * vae.dim,
        )


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


_Natural = Annotated[int, Field(ge=0)]
_Count = _Natural | tuple[_Natural, _Natural]


class ActivationBound(_Data):
    """Bytes: `base`, and bytes per element of the sizes that `Structure` defines."""

    base: _Natural
    tokens: _Natural = 0
    tokens_ffn: _Natural = 0
    text: _Natural = 0
    text_ffn: _Natural = 0
    text_scores: _Natural = 0
    conditioning: _Natural = 0
    pixels: _Natural = 0

    def bytes(self, structure: Structure) -> int:
        """The bound for one model."""
        sizes = type(self).model_fields.keys() - {"base"}
        needed: list[int] = [getattr(self, size) * getattr(structure, size) for size in sizes]
        return self.base + sum(needed)


class ComponentExpectation(_Data):
    """What the engine of one component must look like.

    Attributes:
        gemms, convolutions, attentions: launches by operand type; a type that is not listed must not occur. A key
            may name alternatives ("bf16|fp16").
        launches: least and most.
        launches_per_layer: added to the most for each layer of the transformer.
        launches_per_fp4: added to least and most for each product in FP4: its input is quantized by a launch of its
            own, and its scales are brought into the order of the tensor cores.
    """

    gemms: dict[str, _Count]
    convolutions: dict[str, _Count]
    attentions: dict[str, _Count]
    launches: tuple[_Natural, _Natural]
    launches_per_layer: _Natural = 0
    launches_per_fp4: tuple[_Natural, _Natural] = (0, 0)
    activation_bytes: ActivationBound

    def with_formats(self, moved: Mapping[tuple[str, str], int], *, merges: bool) -> ComponentExpectation:
        """The expectation where some products compute in another type than the precision gives them.

        Args:
            moved: how many, by (from, to).
            merges: whether products of one input may become one (as bf16 ones do where nothing is in between).
        """
        gemms = {
            types: count if isinstance(count, tuple) else (count, count)
            for types, count in self.gemms.items()
        }
        for (source, to), number in moved.items():
            least, most = gemms[source]
            gemms[source] = (max(0, least - number), most - number)
            least, most = gemms.get(to, (0, 0))
            gemms[to] = (least + (1 if merges else number), most + number)
        return self.model_copy(update={"gemms": gemms})

    def problems(self, report: EngineReport, structure: Structure) -> list[str]:
        """How `report` differs; empty if it does not."""
        expected: dict[Kind, Mapping[str, _Count]] = {
            "gemm": self.gemms,
            "convolution": self.convolutions,
            "attention": self.attentions,
        }
        problems = []
        for kind, counts in expected.items():
            found = report.count(kind)
            if not _counts_match(found, counts):
                problems.append(f"{kind}s: found {_list(found)}, expected {_list(counts)}")
        fp4 = report.gemms.get("fp4", 0)
        least, most = (
            bound + fp4 * each for bound, each in zip(self.launches, self.launches_per_fp4, strict=True)
        )
        most += self.launches_per_layer * structure.layers
        if not least <= len(report.launches) <= most:
            problems.append(f"launches: found {len(report.launches)}, expected {least} to {most}")
        bound = self.activation_bytes.bytes(structure)
        if report.activation_bytes > bound:
            problems.append(
                f"activation memory: found {report.activation_bytes} bytes, expected at most {bound}"
            )
        if report.weight_transposes:
            problems.append(
                f"weights transposed in every run: found {len(report.weight_transposes)}, expected none"
            )
        if not report.capturable:
            problems.append("CUDA graph: the engine cannot be captured, expected that it can")
        return problems


def _counts_match(found: Mapping[str, int], expected: Mapping[str, _Count]) -> bool:
    rest = dict(found)
    for types, count in expected.items():
        number = sum(rest.pop(name, 0) for name in types.split("|"))
        least, most = count if isinstance(count, tuple) else (count, count)
        if not least <= number <= most:
            return False
    return not any(rest.values())


def _list(counts: Mapping[str, _Count]) -> str:
    def text(count: _Count) -> str:
        if isinstance(count, tuple):
            return str(count[0]) if count[0] == count[1] else f"{count[0]} to {count[1]}"
        return str(count)

    shown = {name: count for name, count in counts.items() if count not in (0, (0, 0))}
    return ", ".join(f"{text(count)} {name}" for name, count in sorted(shown.items())) or "none"


class Expectations(_Data):
    """The expectations of one precision, by component."""

    schema_version: Literal[1]
    precision: str
    components: dict[str, ComponentExpectation]

    @model_validator(mode="after")
    def _not_empty(self) -> Expectations:
        if not self.components:
            raise ValueError("no components; expected at least one")
        return self

    def check(
        self,
        component: str,
        report: EngineReport,
        structure: Structure,
        moved: Mapping[tuple[str, str], int] | None = None,
    ) -> None:
        """Compare an engine with what is expected of it.

        Args:
            component: its name; engines of single layers ("layer.3") are expected to be like `layer`.
            moved: products that were left in another type; see `ComponentExpectation.with_formats`.

        Raises:
            BuildError: it differs, or nothing is known about this component; says how and what to do.
        """
        kind = component.partition(".")[0]
        if kind not in self.components:
            raise BuildError(
                f"{component}: no expectations for {self.precision}; known are {', '.join(self.components)}. Add it to "
                "engines/expectations with the figures of a build that was checked (docs/tensorrt_rtx.md)"
            )
        expected = self.components[kind].with_formats(moved or {}, merges=kind == "conditioner")
        problems = expected.problems(report, structure)
        if problems:
            raise BuildError(
                f"{component}: the engine for {report.architecture} is not what {self.precision} should give: "
                f"{'; '.join(problems)}. Products in a wider type than expected mean that a weight or its input is not "
                "quantized: look at the graph with `python -m export inspect`, or build with --precision bf16"
            )


def decoder_kind(component: str, decoder: DecoderConfig) -> str:
    """What a component's expectations are called: a tiny decoder has its own."""
    is_tiny = isinstance(decoder, TAEConfig) and component in ("vae_first", "vae_next")
    return component.replace("vae_", "tae_") if is_tiny else component


def load_expectations(precision: str) -> Expectations:
    """The expectations of TensorRT-RTX engines in `precision`.

    Raises:
        InputError: there are none, or the file is malformed.
    """
    source = resources.files("engines").joinpath("expectations", f"tensorrt_rtx_{precision}.toml")
    try:
        return Expectations.model_validate(tomllib.loads(source.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise InputError(
            f"no expectations of TensorRT-RTX engines in {precision!r}; there are some for bf16, fp8 and nvfp4"
        ) from error
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise InputError(f"the expectations for {precision} are not valid: {error}") from error
