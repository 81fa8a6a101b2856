"""The models a bundle is made of, from checkpoints or from a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from export.errors import InputError
from lightforcing_ref.checkpoint import (
    checkpoint_sha256,
    has_linear_branch,
    in_pipeline,
    load_dit_state,
    load_lora,
    load_umt5_state,
    load_vae_encoder_state,
    load_vae_state,
    vae_config_of,
)
from lightforcing_ref.checkpoint.lora import MergedLoRA, lora_sha256
from lightforcing_ref.checkpoint.spec import umt5_shapes
from lightforcing_ref.config import CHUNK_FRAMES, DiTConfig, Preset
from lightforcing_ref.decoders.tae import VideoDecoder, video_decoder
from lightforcing_ref.decoders.vae_encoder import VAEEncoder
from lightforcing_ref.dimensions import LIGHT_VAE, DecoderConfig, VAEConfig
from lightforcing_ref.model import CausalWanModel
from lightforcing_ref.shipped import ASSETS, CAPTIONS, WORDS, shipped
from lightforcing_ref.text import byte_tokenizer, check_tokenizer, load_tokenizer

__all__ = ["Weights", "shipped_weights"]

ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass(frozen=True)
class Weights:
    """Where the weights come from: a seed, or a file for each model.

    Args:
        seed: draws all weights; None = from the files.
        checkpoint, loras: transformer, and LoRAs to merge into it.
        section: the group of a training checkpoint that holds the transformer; None = the best that it has.
        encoder: file of the video encoder where that is not `vae`.
        any_values: take values that no trained model holds, too.
        named: references to the hub that files were fetched by, by role; a manifest names those files so.
    """

    preset: Preset
    seed: int | None = None
    checkpoint: Path | None = None
    section: str | None = None
    loras: tuple[MergedLoRA, ...] = ()
    vae: Path | None = None
    encoder: Path | None = None
    text_encoder: Path | None = None
    tokenizer: Path | None = None
    any_values: bool = False
    named: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Where the folder of one of Diffusers' pipelines is named, its models are meant.
        folders = {
            "checkpoint": "transformer", "vae": "vae", "encoder": "vae", "text_encoder": "text_encoder",
            "tokenizer": "tokenizer",
        }  # fmt: skip
        for role, folder in folders.items():
            if (path := getattr(self, role)) is not None:
                object.__setattr__(self, role, in_pipeline(path, folder))

    @property
    def _shipped(self) -> bool:
        return self.checkpoint is not None and self.checkpoint.is_relative_to(ASSETS)

    @cached_property
    def transformer(self) -> DiTConfig:
        """The transformer's dimensions: the preset's, with SLA's linear branch where the checkpoint has it.

        Raises:
            CheckpointError: the file cannot be read.
        """
        dit = self.preset.dit
        if self.checkpoint is None or self._shipped:
            return dit
        return replace(dit, linear_branch=has_linear_branch(self.checkpoint, section=self.section))

    @property
    def source(self) -> str:
        """What the transformer's weights are called in a manifest."""
        if self.checkpoint is None:
            return f"random:{self.seed or 0}"
        return f"shipped:{self.preset.name}" if self._shipped else self._name("checkpoint", self.checkpoint)

    @property
    def lora_sources(self) -> tuple[str, ...]:
        """What merged LoRAs are called in a manifest."""
        return tuple(self._name(f"lora.{i}", Path(lora.path)) for i, lora in enumerate(self.loras))

    @property
    def other_sources(self) -> dict[str, str]:
        """What the decoder's, the text encoder's and the tokenizer's files are called in a manifest, by role."""
        files = {"vae": self.vae, "text_encoder": self.text_encoder, "tokenizer": self.tokenizer}
        return {
            role: self.source if self._shipped else self._name(role, path)
            for role, path in files.items()
            if path is not None
        }

    @property
    def words(self) -> tuple[str, ...]:
        """All words that these weights were trained on, where they are few; empty where they are not."""
        return WORDS.get(self.preset.name, ()) if self._shipped else ()

    def _name(self, role: str, path: Path) -> str:
        return self.named.get(role, path.name)

    @property
    def example_prompt(self) -> str:
        """A prompt that these weights can show something for."""
        return CAPTIONS[self.preset.name] if self._shipped else "a red fox in snow"

    @property
    def described(self) -> str:
        """Where the weights come from, in words."""
        if self.checkpoint is None:
            return f"random, from seed {self.seed or 0} (--checkpoint and the other files give trained ones)"
        if self._shipped:
            return f"the trained {self.preset.name} model that comes with this package (--init random for others)"
        loras = (
            f"{self.named.get(f'lora.{i}', one.path)} at {one.strength:g}" for i, one in enumerate(self.loras)
        )
        section = "" if self.section is None else f" ({self.section})"
        return " with ".join([f"{self.named.get('checkpoint', self.checkpoint)}{section}", *loras])

    def check(self, *, with_encoder: bool = False) -> None:
        """Hold every file's tensors, and their values, against the models they are for.

        Args:
            with_encoder: the video encoder's, too.

        Raises:
            CheckpointError: a file cannot be read, or holds something else.
            InputError: the video encoder's file is none of Wan's.
        """
        if self.checkpoint is not None:
            load_dit_state(
                self.checkpoint, self.transformer, section=self.section, any_values=self.any_values
            )
        for lora in self.loras:
            load_lora(lora.path, self.preset.dit, any_values=self.any_values)
        if self.vae is not None:
            load_vae_state(self.vae, vae_config_of(self.vae), any_values=self.any_values)
        if with_encoder and (encoder := self.encoder or self.vae) is not None:
            load_vae_encoder_state(encoder, self.vae_encoder_config(), any_values=self.any_values)
        if self.text_encoder is not None:
            load_umt5_state(self.text_encoder, self.preset.text, any_values=self.any_values)
        if self.tokenizer is not None:
            check_tokenizer(self.tokenizer, self.preset.text)

    def dit(self, dtype: torch.dtype) -> CausalWanModel:
        """The transformer, in evaluation mode and without gradients.

        Raises:
            CheckpointError: the file cannot be read, or does not hold this model.
        """
        if self.checkpoint is None:
            model = self._drawn(lambda: CausalWanModel(self.transformer), dtype)
        else:
            with torch.device("meta"):
                model = CausalWanModel(self.transformer)
            state = load_dit_state(
                self.checkpoint,
                self.transformer,
                section=self.section,
                loras=self.loras,
                dtype=dtype,
                any_values=self.any_values,
            )
            model.load_state_dict(state, strict=True, assign=True)
        return model.eval().requires_grad_(False)

    def with_linear_branch(self) -> Weights:
        """These weights, which are drawn, with those of SLA's linear branch."""
        return replace(self, preset=replace(self.preset, dit=replace(self.preset.dit, linear_branch=True)))

    def vae_decoder(self, dtype: torch.dtype = torch.float32) -> VideoDecoder:
        """The video decoder, of whatever kind and width the checkpoint has."""
        if self.vae is None:
            self._require_seed("vae")
            model = self._drawn(lambda: video_decoder(self.preset.vae), dtype)
        else:
            config = vae_config_of(self.vae)
            with torch.device("meta"):
                model = video_decoder(config)
            state = load_vae_state(self.vae, config, dtype=dtype, any_values=self.any_values)
            model.load_state_dict(state, strict=True, assign=True)
        return model.eval().requires_grad_(False)

    def vae_config(self) -> DecoderConfig:
        """The video decoder's kind and widths: the checkpoint's, or the preset's where weights are drawn."""
        return self.preset.vae if self.vae is None else vae_config_of(self.vae)

    def vae_encoder(self, dtype: torch.dtype = torch.float32) -> VAEEncoder:
        """The video encoder, out of `encoder` or of `vae`.

        Raises:
            CheckpointError: the file holds no encoder.
            InputError: it holds a tiny autoencoder, whose latents are only nearly those of the transformer.
        """
        config, path = self.vae_encoder_config(), self.encoder or self.vae
        if path is None:
            model = self._drawn(lambda: VAEEncoder(config), dtype)
        else:
            with torch.device("meta"):
                model = VAEEncoder(config)
            state = load_vae_encoder_state(path, config, dtype=dtype, any_values=self.any_values)
            model.load_state_dict(state, strict=True, assign=True)
        return model.eval().requires_grad_(False)

    def vae_encoder_config(self) -> VAEConfig:
        """The video encoder's widths: those of its file; see `vae_encoder` for the errors.

        Raises:
            InputError: the file is a tiny autoencoder's.
        """
        path = self.encoder or self.vae
        if path is None:
            return self.preset.vae if isinstance(self.preset.vae, VAEConfig) else LIGHT_VAE
        config = vae_config_of(path)
        if not isinstance(config, VAEConfig):
            raise InputError(
                f"{path} is a tiny autoencoder, and videos are encoded by Wan's; name a file that has its encoder: "
                "--with-encoder Wan2.1_VAE.pth, or lightvaew2_1.pth"
            )
        return config

    def text_tensors(self) -> dict[str, Callable[[], Tensor]]:
        """The text encoder's weights under the names of the bundle's weights file, each made when it is called for.

        UMT5-XXL does not fit into memory twice: weights of a file are mapped, random ones drawn one by one.
        """
        if self.text_encoder is None:
            self._require_seed("text-encoder")
            shapes = umt5_shapes(self.preset.text)
            return {name: partial(self._draw, name, shape) for name, shape in shapes.items()}
        state = load_umt5_state(self.text_encoder, self.preset.text, any_values=self.any_values)
        return {name: partial(state.__getitem__, name) for name in state}

    def text_weights(self) -> dict[str, Tensor]:
        """All weights of the text encoder at once, in the type they are stored in; see `text_tensors`."""
        return {name: make() for name, make in self.text_tensors().items()}

    def write_tokenizer(self, path: Path) -> None:
        """Write `tokenizer.json` to `path`."""
        if self.tokenizer is None:
            byte_tokenizer().save(str(path))
        else:
            load_tokenizer(self.tokenizer).save(str(path))

    def digests(self) -> dict[str, str]:
        """SHA-256 of every file in use, by role."""
        roles = ("checkpoint", "vae", "encoder", "text_encoder")
        digests = {
            role: checkpoint_sha256(path) for role in roles if (path := getattr(self, role)) is not None
        }
        if self.section is not None:
            digests["section"] = self.section
        for index, lora in enumerate(self.loras):
            digests[f"lora.{index}"] = lora_sha256(lora.path)
            digests[f"lora.{index} strength"] = str(lora.strength)
        if self.tokenizer is not None:
            text = load_tokenizer(self.tokenizer).to_str()
            digests["tokenizer"] = hashlib.sha256(text.encode()).hexdigest()
        return digests

    def _require_seed(self, option: str) -> None:
        if self.seed is None:
            raise InputError(
                f"no {option} was given; pass --{option}, or build with random weights (--init random)"
            )

    def _drawn(self, make: Callable[[], ModelT], dtype: torch.dtype) -> ModelT:
        """A model with weights from the seed, the same ones in every type; each model draws from its own stream."""
        self._require_seed("checkpoint")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed or 0)
            return make().to(dtype)

    def _draw(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A weight of the text encoder, of a size that keeps the hidden states in range."""
        if len(shape) == 1:
            return torch.ones(shape)
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        drawn = torch.empty(shape).normal_(generator=generator)
        if name == "token_embedding" or name.endswith("rel_bias"):
            return drawn
        # Attention scores are not scaled, so the queries are.
        fan_in = shape[1] * (self.preset.text.d_kv if name.endswith(".q") else 1)
        return drawn.mul_(fan_in**-0.5)


def shipped_weights(preset: Preset, *, dense: bool, chunk_frames: int = CHUNK_FRAMES) -> Weights | None:
    """The trained weights that come with this package for `preset`, for dense or for sparse attention and for chunks of
    so many latent frames; None if there are none.
    """
    files = shipped(preset.name)
    if files is None:
        return None
    trained_dense = files.framewise_transformer if chunk_frames == 1 else files.dense_transformer
    return Weights(
        preset,
        checkpoint=trained_dense if dense else files.transformer,
        vae=files.vae,
        text_encoder=files.text_encoder,
        tokenizer=files.tokenizer,
    )
