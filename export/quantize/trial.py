"""Short reference rollouts over given prompts, from which quantization is calibrated and judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from export.errors import InputError
from export.request.geometry import StepPlan
from export.request.weights import Weights
from lightforcing_ref.model import CausalWanModel
from lightforcing_ref.rollout import Rollout
from lightforcing_ref.text import build_encoder, byte_tokenizer, encode_prompts, load_tokenizer

from .graph import is_block_linear

__all__ = ["Trial", "block_linears", "embed_prompts", "read_prompts"]


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one a line; empty lines and lines that begin with # do not count.

    Raises:
        InputError: the file cannot be read, or holds no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the prompts of {path}: {error}; give a UTF-8 text file") from error
    prompts = [stripped for line in lines if (stripped := line.strip()) and not stripped.startswith("#")]
    if not prompts:
        raise InputError(f"{path} holds no prompt; expected one a line")
    return prompts


def embed_prompts(weights: Weights, prompts: Sequence[str]) -> list[Tensor]:
    """Text-encoder output of each prompt, float32 `[text_len, text_dim]`."""
    preset = weights.preset
    tokenizer = byte_tokenizer() if weights.tokenizer is None else load_tokenizer(weights.tokenizer)
    encoder = build_encoder(preset.text, weights.text_weights())
    embeddings = encode_prompts(encoder, tokenizer, list(prompts), preset.dit.text_len, preset.text)
    return list(embeddings.float())


def block_linears(model: CausalWanModel) -> dict[str, nn.Linear]:
    """The linears of the blocks that quantization is about, by name; the projections of q, k, v must be merged.

    Raises:
        InputError: they are not merged, and so run without their modules, where nothing can be observed.
    """
    if not all(hasattr(block.self_attn, "qkv") for block in model.layers):
        raise InputError("the model's q, k, v projections are separate; merge them first (merge_qkv)")
    return {
        name: module
        for name, module in model.named_modules()
        if is_block_linear(name) and isinstance(module, nn.Linear)
    }


@dataclass(frozen=True)
class Trial:
    """Rollouts that exercise every kind of forward: all five timesteps of each chunk, the clean pass included.

    Args:
        embeddings: text-encoder output of each prompt, `[text_len, text_dim]`.
        chunks: length of each rollout; from the second chunk on there is a cache to attend to.
        seed: of the noise.
    """

    plan: StepPlan
    embeddings: tuple[Tensor, ...]
    chunks: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.embeddings or self.chunks < 1:
            raise InputError(
                f"a trial of {len(self.embeddings)} prompts and {self.chunks} chunks observes nothing; expected at "
                "least one of each"
            )

    def run(self, model: CausalWanModel, play: type[Rollout] = Rollout) -> list[Tensor]:
        """Clean latents of each prompt's rollout, `[channels, chunks * 3, h, w]` float32.

        Args:
            play: what makes them; a subclass sees every forward.
        """
        return [self._rollout(model, index, play) for index in range(len(self.embeddings))]

    def _rollout(self, model: CausalWanModel, prompt: int, play: type[Rollout]) -> Tensor:
        plan = self.plan
        height, width = plan.latent_size
        _, ph, pw = plan.preset.dit.patch
        shape = (plan.preset.dit.channels, plan.chunk_frames, height, width)

        def noise(chunk: int, step: int) -> Tensor:
            key = ((self.seed * 1009 + prompt) * 1009 + chunk) * 8 + step
            return torch.randn(shape, generator=torch.Generator().manual_seed(key))

        cache = plan.variant.cache
        rollout = play(
            model,
            plan.spec,
            self.embeddings[prompt],
            noise,
            (height // ph, width // pw),
            window_frames=plan.variant.window_frames,
            sink_frames=cache.sink_frames,
            sink_positions=cache.sink_positions,
            schedule=plan.schedule,
        )
        latents = list(rollout.stream(self.chunks))
        # A rollout never runs the clean pass of its last chunk; here it counts like the others.
        if plan.schedule.clean_forward:
            rollout.commit(latents[-1], self.chunks - 1)
        return torch.cat(latents, dim=1)
