"""The causal Wan diffusion transformer, with its self-attention core injected.

State-dict keys are those of the public checkpoints (Self-Forcing, LongLive, Light Forcing, Wan-AI). The model owns
the projections; what happens between the merged QKV projection and the attention output is a callable
(`SelfAttentionCore`): the oracle with a cache, a training-time mask, or exportable operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import rms_norm
from .config import DiTConfig

__all__ = ["CausalWanModel", "CrossKV", "QKVParams", "SelfAttentionCore"]

CrossKV = tuple[Tensor, Tensor]
"""Cross-attention keys and values of one layer, each `[B, text_len, H, D]`; they depend on the prompt only."""


@dataclass(frozen=True)
class QKVParams:
    """What the core needs besides the projection: bias `[3 dim]`, RMS-norm weights `[dim]`, and epsilon.

    `linear` is weight `[head_dim, head_dim]` and bias `[head_dim]` of SLA's linear branch, of models that have it.
    """

    bias: Tensor
    norm_q: Tensor
    norm_k: Tensor
    eps: float
    linear: tuple[Tensor, ...] = ()


class SelfAttentionCore(Protocol):
    """Everything between the merged QKV projection and the output projection of one layer."""

    def __call__(self, layer: int, qkv: Tensor, params: QKVParams) -> Tensor:
        """Map `qkv` `[B, T, 3 dim]` (no bias added, ordered q | k | v) to the attention output `[B, T, dim]`."""


class RMSNorm(nn.Module):
    """RMS norm with a weight, float32 inside."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Projections shared by self- and cross-attention."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q = RMSNorm(config.dim, config.eps)
        self.norm_k = RMSNorm(config.dim, config.eps)


class SelfAttention(Attention):
    """Self-attention whose three input projections act as one merged matrix product."""

    qkv: nn.Linear
    qkv_bias: Tensor
    proj_l: nn.Linear | None

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        self.proj_l = nn.Linear(config.head_dim, config.head_dim) if config.linear_branch else None

    def merge(self) -> None:
        """Replace q, k, v by one bias-free `qkv` linear and a `qkv_bias`, in place, as deployment wants them.

        The state-dict keys change; checkpoints must be loaded before.
        """
        parts = (self.q, self.k, self.v)
        weight = torch.cat([part.weight.detach() for part in parts])
        self.qkv = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.qkv.weight = nn.Parameter(weight, requires_grad=False)
        self.qkv_bias = nn.Parameter(torch.cat([part.bias.detach() for part in parts]), requires_grad=False)
        del self.q, self.k, self.v

    def forward(self, x: Tensor, layer: int, core: SelfAttentionCore) -> Tensor:
        if hasattr(self, "qkv"):
            qkv: Tensor = self.qkv(x)
            bias = self.qkv_bias
        else:
            parts = (self.q, self.k, self.v)
            qkv = F.linear(x, torch.cat([part.weight for part in parts]))
            bias = torch.cat([part.bias for part in parts])
        linear = () if self.proj_l is None else (self.proj_l.weight, self.proj_l.bias)
        params = QKVParams(bias, self.norm_q.weight, self.norm_k.weight, self.norm_q.eps, linear)
        return self.o(core(layer, qkv, params))


class CrossAttention(Attention):
    """Attention to the prompt, without a mask: padding rows contribute through the biases, as upstream."""

    def keys_values(self, text: Tensor) -> CrossKV:
        """Keys and values of the embedded prompt `[B, text_len, dim]`, each `[B, text_len, H, D]`."""
        k, v = self.norm_k(self.k(text)), self.v(text)
        return k.unflatten(-1, (self.heads, -1)), v.unflatten(-1, (self.heads, -1))

    def forward(self, x: Tensor, keys_values: CrossKV) -> Tensor:
        q = self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1))
        q, k, v = (part.transpose(1, 2) for part in (q, *keys_values))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One transformer block: self-attention, cross-attention and feed-forward, modulated by the timestep."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.norm1 = nn.LayerNorm(dim, config.eps, elementwise_affine=False)
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(dim, config.eps)
        self.cross_attn = CrossAttention(config)
        self.norm2 = nn.LayerNorm(dim, config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self, x: Tensor, modulation: Sequence[Tensor], cross: CrossKV, layer: int, core: SelfAttentionCore
    ) -> Tensor:
        """Args: x `[B, T, dim]`; modulation: six tensors broadcastable to x, this block's own already added."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        x = x + gate1 * self.self_attn(self.norm1(x) * (1 + scale1) + shift1, layer, core)
        x = x + self.cross_attn(self.norm3(x), cross)
        return x + gate2 * self.ffn(self.norm2(x) * (1 + scale2) + shift2)


class Head(nn.Module):
    """Projection of tokens to latent patches."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        patch = config.patch[0] * config.patch[1] * config.patch[2]
        self.norm = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, patch * config.channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, modulation: Sequence[Tensor]) -> Tensor:
        shift, scale = modulation
        return self.head(self.norm(x) * (1 + scale) + shift)


class CausalWanModel(nn.Module):
    """Flow predictor for the latent frames of a chunk (or, in training, of a whole clip).

    Pieces are public so that export and training can drive them: `modulations`, `embed_text`, `tokens`, `blocks`,
    `latents`. `forward` composes them.
    """

    text_embedding: nn.Sequential
    time_embedding: nn.Sequential

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.channels, dim, config.patch, config.patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = Head(config)

    @property
    def layers(self) -> list[Block]:
        """The blocks, as what they are."""
        return cast(list[Block], list(self.blocks))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, in which the model computes."""
        return self.head.head.weight.dtype

    def modulations(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Time embedding e `[..., dim]` and its projection e0 `[..., 6, dim]` for timesteps `t` `[...]`."""
        half = self.config.freq_dim // 2
        exponents = torch.arange(half, dtype=torch.float64, device=t.device) / half
        angles = t.double()[..., None] * torch.pow(10000.0, -exponents)
        sinusoid = torch.cat((angles.cos(), angles.sin()), dim=-1).to(self.dtype)
        e = self.time_embedding(sinusoid)
        return e, self.time_projection(e).unflatten(-1, (6, -1))

    def embed_text(self, text: Tensor) -> list[CrossKV]:
        """Cross-attention keys and values of every layer for text-encoder output `[B, text_len, text_dim]`."""
        context = self.text_embedding(text.to(self.dtype))
        return [block.cross_attn.keys_values(context) for block in self.layers]

    def tokens(self, x: Tensor) -> Tensor:
        """Latent frames `[B, channels, F, h, w]` to tokens `[B, T, dim]`, frame by frame in raster order.

        The strided convolution is written as one matrix product, which every engine runs well.
        """
        weight = self.patch_embedding.weight
        batch, channels, frames, height, width = x.shape
        _, ph, pw = self.config.patch
        patches = x.reshape(batch, channels, frames, height // ph, ph, width // pw, pw)
        patches = patches.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)
        return F.linear(patches.to(self.dtype), weight.flatten(1), self.patch_embedding.bias)

    def latents(self, tokens: Tensor, frames: int, height: int, width: int) -> Tensor:
        """Head output `[B, T, patch * channels]` (channels innermost) to `[B, channels, F, height, width]`."""
        _, ph, pw = self.config.patch
        x = tokens.unflatten(1, (frames, height // ph, width // pw)).unflatten(-1, (ph, pw, -1))
        return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(tokens.shape[0], -1, frames, height, width)

    def forward(self, x: Tensor, t: Tensor, cross: Sequence[CrossKV], core: SelfAttentionCore) -> Tensor:
        """Predict the flow.

        Args:
            x: noisy latents `[B, channels, F, h, w]`.
            t: timestep of each latent frame `[B, F]`, in 0..1000.
            cross: from `embed_text`.
            core: the self-attention core.

        Returns:
            flow in the shape of `x`.
        """
        frames, height, width = x.shape[2:]
        tokens = self.tokens(x)
        e, e0 = self.modulations(t)
        per_frame = tokens.shape[1] // frames

        def spread(modulation: Tensor) -> list[Tensor]:
            """`[B, F, n, dim]` to n tensors `[B, T, dim]`."""
            return list(modulation.repeat_interleave(per_frame, dim=1).unbind(2))

        for layer, block in enumerate(self.layers):
            tokens = block(tokens, spread(block.modulation + e0), cross[layer], layer, core)
        out = self.head(tokens, spread(self.head.modulation + e[:, :, None]))
        return self.latents(out, frames, height, width)
