"""Where a bundle came from: the weights' files, the tools, the command."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .fields import Finite, Part, Sha256

__all__ = ["Checkpoint", "MergedLora", "Provenance", "RandomInit", "SourceFile"]


class SourceFile(Part):
    """A file that weights came from."""

    source: str
    sha256: Sha256

    @property
    def described(self) -> str:
        """In words."""
        return f"{self.source} (SHA-256 {self.sha256[:12]}...)"


class MergedLora(SourceFile):
    """A LoRA that was merged, and how strongly on top of the scale that it states itself."""

    strength: Finite = 1.0

    @property
    def described(self) -> str:
        """In words."""
        return super().described if self.strength == 1 else f"{super().described} at {self.strength:g}"


class Checkpoint(SourceFile):
    """The checkpoint the weights came from, and the LoRAs that were merged into it, in this order.

    `section` is the group of a training checkpoint that was asked for, where one was.
    """

    section: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    lora: MergedLora | None = None
    further_loras: Annotated[tuple[MergedLora, ...], Field(max_length=64)] = ()

    @property
    def loras(self) -> tuple[MergedLora, ...]:
        """All of them."""
        return (() if self.lora is None else (self.lora,)) + self.further_loras

    @property
    def described(self) -> str:
        """In words."""
        section = "" if self.section is None else f", {self.section}"
        return " with ".join([super().described + section, *(lora.described for lora in self.loras)])


class RandomInit(Part):
    """Weights drawn from a seed instead of a checkpoint."""

    random: Annotated[int, Field(gt=-(1 << 63), lt=1 << 63)]

    @property
    def described(self) -> str:
        """In words."""
        return f"random, seed {self.random}"


class Provenance(Part):
    """Where a bundle came from."""

    checkpoint: Checkpoint | RandomInit
    files: dict[Literal["vae", "text_encoder", "tokenizer"], SourceFile] = Field(default_factory=dict)
    tools: dict[str, str]
    command: str
