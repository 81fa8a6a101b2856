# mypy: allow-untyped-calls, no-warn-return-any
"""Rungs 0 and 1: the rollout in plain PyTorch, as the public pipelines run it.

A key-value cache in one buffer per layer, four denoising forwards and a clean one per chunk, attention by SDPA with
whichever backend is fastest here, frames decoded latent frame by latent frame. Where the public code does more work
than the model needs (rotary embedding in float64, three separate projections for q, k and v, window-relative keys
rotated again in each forward, a clean pass after the last chunk) this does not, so the baseline is no straw man.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from export import StepPlan
from lightforcing_ref.attention import rms_norm
from lightforcing_ref.config import CHUNK_FRAMES
from lightforcing_ref.decoders.tae import video_decoder
from lightforcing_ref.decoders.vae import to_uint8
from lightforcing_ref.model import CausalWanModel, CrossKV, QKVParams
from lightforcing_ref.rope import rope_tables

from .measure import ChunkRecord
from .sparse import sparse_attention

__all__ = ["EagerRollout", "SdpaChoice", "fastest_sdpa"]

Mark = float | torch.cuda.Event
"""A point in time: seconds of the host's clock, or an event on the device."""


@dataclass(frozen=True)
class SdpaChoice:
    """The attention backend of the eager rungs.

    Attributes:
        name: of `torch.nn.attention.SDPBackend`, or "default".
        microseconds: of each backend that was tried, or why it did not run.
    """

    name: str = "default"
    microseconds: dict[str, float | str] = field(default_factory=dict)

    def active(self) -> AbstractContextManager[Any]:
        """A context in which SDPA prefers this backend and falls back where it does not serve."""
        if self.name == "default":
            return nullcontext()
        from torch.nn.attention import SDPBackend, sdpa_kernel

        best = getattr(SDPBackend, self.name)
        others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        return sdpa_kernel([best, *(other for other in others if other != best)], set_priority=True)


def fastest_sdpa(plan: StepPlan, device: str, dtype: torch.dtype) -> SdpaChoice:
    """The SDPA backend that is fastest at the size of the last chunk; on a CPU there is nothing to choose."""
    if device == "cpu":
        return SdpaChoice()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from benchmarks.timing import microseconds

    dit, frame_tokens = plan.preset.dit, plan.geometry.frame_tokens
    tokens = [CHUNK_FRAMES * frame_tokens, *2 * [plan.variant.window_frames * frame_tokens]]
    q, k, v = (
        torch.randn(1, n, dit.heads, dit.head_dim, device=device, dtype=dtype).transpose(1, 2) for n in tokens
    )
    found: dict[str, float | str] = {}
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
        try:
            with sdpa_kernel(getattr(SDPBackend, name)):
                found[name] = microseconds([lambda: F.scaled_dot_product_attention(q, k, v)], repeats=5)
        except Exception as error:  # a backend that does not run here is a note, not a failure
            found[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    times = {name: value for name, value in found.items() if isinstance(value, float)}
    return SdpaChoice(min(times, key=lambda name: times[name]) if times else "default", found)


class _Cache:
    """Keys and values of past frames and the current chunk, contiguous and in logical order, one buffer per layer.

    When the window slides, what stays is moved down; sink frames stay where they are.
    """

    def __init__(self, plan: StepPlan, device: str, dtype: torch.dtype) -> None:
        dit = plan.preset.dit
        self._frame_tokens, self._window = plan.geometry.frame_tokens, plan.variant.window_frames
        self._sinks = plan.variant.cache.sink_frames
        shape = (dit.layers, self._window * self._frame_tokens, dit.heads, dit.head_dim)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.past_frames = 0

    def make_room(self) -> None:
        """Evict the oldest frames that are no sinks until a chunk fits."""
        evicted = self.past_frames + CHUNK_FRAMES - self._window
        if evicted <= 0:
            return
        first, end = self._sinks * self._frame_tokens, self.past_frames * self._frame_tokens
        step = evicted * self._frame_tokens
        for buffer in (self.k, self.v):
            for layer in buffer:
                layer[first : end - step] = layer[first + step : end].clone()
        self.past_frames -= evicted

    def put(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the current chunk behind the past and return all that it may attend to."""
        start = self.past_frames * self._frame_tokens
        end = start + k.shape[0]
        self.k[layer, start:end], self.v[layer, start:end] = k, v
        return self.k[layer, :end], self.v[layer, :end]


class EagerRollout:
    """A model with random weights, and clips made with it.

    Attributes:
        kept: key blocks that each query block attended to, one entry per forward and layer of the last clip; dense
            attention counts all resident blocks.
    """

    def __init__(
        self,
        plan: StepPlan,
        device: str,
        sdpa: SdpaChoice,
        *,
        sparse: bool,
        seed: int = 0,
        scale_weights: Callable[[CausalWanModel], None] = lambda model: None,
    ) -> None:
        """`scale_weights` may change the weights, to try other statistics."""
        self._plan, self._device, self._sdpa, self._sparse = plan, device, sdpa, sparse
        self._dtype = torch.bfloat16 if device == "cuda" else torch.float32
        with _drawn_on(device, self._dtype, seed):
            self._model = CausalWanModel(plan.preset.dit).eval().requires_grad_(False)
            self._decoder = video_decoder(plan.preset.vae).eval().requires_grad_(False)
        scale_weights(self._model)
        for block in self._model.layers:
            block.self_attn.merge()
        dit = plan.preset.dit
        generator = torch.Generator().manual_seed(seed)
        self._text = torch.randn(1, dit.text_len, dit.text_dim, generator=generator).to(device, self._dtype)
        self._cache = _Cache(plan, device, self._dtype)
        self._random = torch.Generator(device).manual_seed(seed)
        self.kept: list[int] = []

    def close(self) -> None:
        """Let go of the model."""
        self.__dict__.clear()

    @torch.inference_mode()
    def clip(self, chunks: int) -> Iterator[ChunkRecord]:
        """Generate a clip from the encoded prompt on; yields when a chunk's frames are on the host."""
        with self._sdpa.active():
            yield from self._clip(chunks)

    def _clip(self, chunks: int) -> Iterator[ChunkRecord]:
        plan, cache, clean = self._plan, self._cache, self._plan.schedule.clean_step
        cache.past_frames, self.kept = 0, []
        cross = self._model.embed_text(self._text)
        pending: Tensor | None = None
        history: list[Tensor] | None = None
        for chunk in range(chunks):
            started = self._mark()
            if pending is not None:
                self._forward(pending, clean, chunk - 1, cross)
                cache.past_frames += CHUNK_FRAMES
            cache.make_room()
            x = self._noise()
            for step in range(plan.schedule.denoise_steps):
                x0 = x - plan.schedule.sigmas[step] * self._forward(x, step, chunk, cross)
                sigma = plan.schedule.sigmas[step + 1]
                x = x0 if step + 1 == clean else (1 - sigma) * x0 + sigma * self._noise()
            pending, denoised = x, self._mark()
            parts = []
            for frame in x.to(self._dtype).split(1, dim=1):
                if history is None:
                    pixels, history = self._decoder.decode_first(frame)
                else:
                    pixels, history = self._decoder.decode_next(frame, history)
                parts.append(to_uint8(pixels))
            video, decoded = torch.cat(parts), self._mark()
            frames = video.cpu()  # the only wait of the chunk
            yield ChunkRecord(len(frames), _between(started, denoised), _between(denoised, decoded))

    def _mark(self) -> Mark:
        """Now; on a GPU when the work queued so far is done, without waiting for it."""
        if self._device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _noise(self) -> Tensor:
        height, width = self._plan.latent_size
        shape = (self._plan.preset.dit.channels, CHUNK_FRAMES, height, width)
        return torch.randn(shape, generator=self._random, device=self._device)

    def _forward(self, latent: Tensor, step: int, chunk: int, cross: list[CrossKV]) -> Tensor:
        """Flow of a latent `[channels, frames, h, w]`, float32. All frames of a chunk are at the same timestep."""
        model, plan = self._model, self._plan
        height, width = plan.latent_size
        patch = plan.preset.dit.patch
        if step == 0:  # the clean pass follows with the same positions
            dit, grid = plan.preset.dit, (height // patch[1], width // patch[2])
            with torch.device(self._device):
                positions = torch.arange(chunk * CHUNK_FRAMES, (chunk + 1) * CHUNK_FRAMES)
                cos, sin = rope_tables(positions, grid, dit.head_dim, theta=dit.rope_theta)
            self._rotation = torch.complex(cos, sin)[:, None]

        def core(layer: int, qkv: Tensor, params: QKVParams) -> Tensor:
            return self._attend(layer, qkv, params, chunk)

        t = torch.full((1,), plan.schedule.timesteps[step], device=self._device)
        e, e0 = model.modulations(t)
        x = model.tokens(latent[None])
        for layer, block in enumerate(model.layers):
            modulation = (block.modulation + e0)[:, :, None].unbind(1)
            x = block(x, modulation, cross[layer], layer, core)
        out = model.head(x, (model.head.modulation + e[:, None])[:, :, None].unbind(1))
        return model.latents(out, CHUNK_FRAMES, height, width)[0].float()

    def _attend(self, layer: int, qkv: Tensor, params: QKVParams, chunk: int) -> Tensor:
        spec = self._plan.spec
        q, k, v = (qkv[0] + params.bias).chunk(3, dim=-1)
        q, k = (
            self._rotate(rms_norm(part, weight, params.eps).unflatten(-1, (spec.heads, -1)))
            for part, weight in ((q, params.norm_q), (k, params.norm_k))
        )
        past_frames = self._cache.past_frames
        keys, values = self._cache.put(layer, k, v.unflatten(-1, (spec.heads, -1)))
        if self._sparse and past_frames:
            out, kept = sparse_attention(q, keys, values, chunk, spec)
        else:
            kept = (past_frames + CHUNK_FRAMES) * spec.geometry.k_blocks
            q, keys, values = (part[None].transpose(1, 2) for part in (q, keys, values))
            out = F.scaled_dot_product_attention(q, keys, values, scale=spec.scale)[0].transpose(0, 1)
        self.kept.append(kept)
        return out.flatten(1)[None]

    def _rotate(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * self._rotation).flatten(-2).to(x.dtype)


def _between(start: Mark, end: Mark) -> float:
    """Seconds between two marks that have passed."""
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return start.elapsed_time(end) / 1000
    assert isinstance(start, float) and isinstance(end, float)
    return end - start


@contextmanager
def _drawn_on(device: str, dtype: torch.dtype, seed: int) -> Iterator[None]:
    """Models made in this context are drawn from `seed` on the device and in the type given."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[0] if device == "cuda" else []), torch.device(device):
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
