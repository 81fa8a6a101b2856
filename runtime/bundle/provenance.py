"""Where a bundle came from: the weights' files, the tools, the command."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .fields import Part, Sha256

__all__ = ["Checkpoint", "Provenance", "RandomInit", "SourceFile"]


class SourceFile(Part):
    """A file that weights came from."""

    source: str
    sha256: Sha256

    @property
    def described(self) -> str:
        """In words."""
        return f"{self.source} (SHA-256 {self.sha256[:12]}...)"


class Checkpoint(SourceFile):
    """The checkpoint the weights came from, and the LoRA that was merged into it."""

    lora: SourceFile | None = None

    @property
    def described(self) -> str:
        """In words."""
        alone = super().described
        return alone if self.lora is None else f"{alone} with {self.lora.described}"


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
