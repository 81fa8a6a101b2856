"""The arithmetic floor of a rollout: operations and bytes of every chunk, and the time they take at peak rates.

Counted: the matrix products of the linears (weights, inputs and outputs moved once), self-attention over the key blocks
that a query block sees (every resident key and value moved once), cross-attention, the decoder's convolutions, and the
element-wise passes between all of these, which move bytes and compute nothing worth counting (`export.estimate
.elementwise`). Not counted: the selection of key blocks, launch gaps, the text encoder and the conditioner (once per
prompt). Each operation takes the longer of its arithmetic and its traffic; nothing overlaps, and no cache keeps what
the next operation reads. No figure here was measured. Nothing here needs PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, get_args

from export.errors import InputError
from export.request.linears import linear_precisions
from export.request.sizes import decoder_convs, item_bytes, layer_linears
from export.request.targets import Operands, Peak
from lightforcing_ref.dimensions import VAEConfig
from lightforcing_ref.sparsity import BlockGeometry
from runtime.bundle.policies import has_linear_branch

from .elementwise import Pass, StepPasses, activation_bytes, decoder_passes
from .memory import Planned
from .selection import Share, own_share, visible_blocks

__all__ = [
    "DECODER",
    "ELEMENT_WISE",
    "KINDS",
    "PUBLISHED",
    "PUBLISHED_FRAMES",
    "PUBLISHED_PRECISION",
    "PUBLISHED_PRESET",
    "PUBLISHED_SIZE",
    "PUBLISHED_VARIANT",
    "ChunkPrediction",
    "ClipPrediction",
    "Format",
    "Kind",
    "Part",
    "Published",
    "Work",
    "Workload",
    "predict",
    "predict_chunks",
    "rate_of",
]

Kind = Literal[
    "linears", "self-attention", "cross-attention", "element-wise", "decoder", "decoder, element-wise"
]
KINDS: tuple[Kind, ...] = get_args(Kind)
ELEMENT_WISE: tuple[Kind, ...] = ("element-wise", "decoder, element-wise")
"""Kinds that only move data."""
DECODER: tuple[Kind, ...] = ("decoder", "decoder, element-wise")
"""Kinds that the decoder does; the transformer does the others."""

Format = Operands | Literal["fp32"]
"""What a product computes in, with the accumulator that we use; no tensor core has fp32."""


@dataclass(frozen=True)
class Published:
    """What the authors of Light Forcing report for their release: 81 frames, 512x768, fp8 linears, LightVAE."""

    title: str
    seconds: float
    fps: float


PUBLISHED: Mapping[str, Published] = {
    "rtx5090": Published("RTX 5090", 2.96, 27.4),
    "h100": Published("H100", 2.39, 33.9),
}
PUBLISHED_FRAMES = 81
PUBLISHED_PRESET = "wan-1.3b"
PUBLISHED_VARIANT = "short"
PUBLISHED_SIZE = (512, 768)
PUBLISHED_PRECISION = "fp8"


@dataclass(frozen=True)
class Work:
    """Operations of one kind in one format: multiplications and additions, and bytes between chip and memory."""

    kind: Kind
    format: Format
    flops: int
    bytes: int

    def seconds(self, peak: Peak) -> float:
        """Time at the peak rates."""
        return max(self.flops / rate_of(peak, self.format), self.bytes / (peak.memory_gb_s * 1e9))

    def is_compute_bound(self, peak: Peak) -> bool:
        return self.flops / rate_of(peak, self.format) >= self.bytes / (peak.memory_gb_s * 1e9)


def rate_of(peak: Peak, format: Format) -> float:
    """Operations per second of a format.

    Raises:
        InputError: the target's peak rate of this format is not known.
    """
    rate = None if format == "fp32" else peak.tflops(format)
    if rate is None:
        known = ", ".join(f"{one.operands} with {one.accumulator} sums" for one in peak.rates)
        raise InputError(f"no peak rate in {format} is known for this target; there is one for {known}")
    return rate * 1e12


class Workload:
    """What one variant of one model has to compute.

    `built` holds bytes of element-wise work per run by component, as built engines have it (`export.estimate.built`);
    what it does not name is as `export.estimate.elementwise` counts it.
    """

    def __init__(self, request: Planned, built: Mapping[str, int] | None = None) -> None:
        self.request = request
        self._built = built or {}
        self.dit = request.preset.dit
        self.item = item_bytes(request.precision)
        self.wide: Format = "fp32" if request.precision == "fp32" else "bf16"
        self.products: Format = self.wide if request.variant.products is None else "fp8"
        """What self-attention multiplies."""
        blocks = request.variant.blocks(request.target, request.preset.block)
        frame_tokens = request.preset.frame_tokens(request.height, request.width)
        self.geometry = BlockGeometry(frame_tokens, blocks.query, blocks.key)
        self.schedule = request.variant.schedule.resolved()
        self.tokens = self.schedule.chunk_frames * frame_tokens
        codes = request.variant.cache.kv is not None
        self._linears = linear_precisions(request)
        self.passes = StepPasses(
            self.dit, self.geometry, self.tokens, request.precision, self._linears, codes=codes
        )

    @property
    def planned_chunks(self) -> int:
        """Chunks of the clip that the sparsity table was planned for."""
        return self.request.variant.sparsity.table_frames // self.schedule.chunk_frames

    @property
    def formats(self) -> set[Format]:
        """What its products compute in."""
        return {self.wide, self.products, *self._linears.values()}

    @cached_property
    def _keep_q20(self) -> tuple[int, ...]:
        resident = range(self.schedule.chunk_frames, self.request.variant.window_frames + 1)
        return self.request.variant.table().keep_q20(frames * self.geometry.k_blocks for frames in resident)

    def resident_frames(self, chunk: int) -> int:
        """Latent frames in the cache and the chunk."""
        return (
            min(chunk * self.schedule.chunk_frames, self.request.variant.max_past_frames)
            + self.schedule.chunk_frames
        )

    def window(self, chunk: int, members: int) -> int:
        """Latent frames that a rolling window of so many chunks sees, `chunk` the oldest: itself, the first chunk and
        the latest clean ones.
        """
        frames = self.schedule.chunk_frames
        return frames * members + min(chunk * frames, self.request.variant.window_frames - frames * members)

    def windows(self, chunk: int) -> range:
        """Chunks in each denoising forward that comes before `chunk` leaves, of a rolling schedule."""
        full = self.request.variant.schedule.window_chunks
        return range(full if chunk else 1, full + 1)

    def visible_blocks(self, chunk: int) -> tuple[int, int]:
        """Key blocks that each query block of `chunk` sees, and how many there are."""
        resident, per_frame = self.resident_frames(chunk), self.geometry.k_blocks
        if self.request.variant.schedule.rolling:
            resident = self.window(chunk, self.request.variant.schedule.window_chunks)
            return resident * per_frame, resident * per_frame
        total = resident * per_frame
        if resident == self.schedule.chunk_frames:
            return total, total
        share = self.own_share(chunk)
        if share is not None:
            return max(1, round(share.value * total)), total
        variant, current = self.request.variant, self.schedule.chunk_frames
        method, sinks = variant.attention, variant.cache.sink_frames
        past = resident - current
        kept = visible_blocks(method, self._keep_q20, chunk, per_frame, sinks, past, current)
        return kept, total

    def own_share(self, chunk: int) -> Share | None:
        """What a query of `chunk` sees under a method with a rule of its own; None where a budget of blocks decides."""
        request, past = self.request, self.resident_frames(chunk) - self.schedule.chunk_frames
        grid = request.preset.token_grid(request.height, request.width)
        frames = self.schedule.chunk_frames
        return own_share(request.variant.attention, self.geometry, grid, past, frames)

    def attention(self, chunk: int, *, dense: bool = False, seen: int | None = None) -> Work:
        """Self-attention of one layer in one forward of `chunk`; `seen` are the frames that it sees, by default those
        that are resident.
        """
        kept, total = self.visible_blocks(chunk)
        keys = (seen or self.resident_frames(chunk)) * self.geometry.frame_tokens
        flops = 4 * self.tokens * keys * self.dit.dim
        held = self.item if self.request.variant.cache.kv is None else 1
        moved = 2 * (self.tokens * self.item + keys * held) * self.dit.dim
        return Work("self-attention", self.products, flops if dense else flops * kept // total, moved)

    def linear_branch(self, chunk: int) -> Work:
        """SLA's linear branch of one layer in one forward of `chunk`: it reads every key and value once."""
        dit, frames = self.dit, self.resident_frames(chunk)
        keys, state = frames * self.geometry.frame_tokens, dit.dim * dit.head_dim
        flops = 2 * (keys + self.tokens + dit.head_dim) * state
        # What each frame leaves is written and read in float32, the output twice.
        moved = (2 * keys + 3 * self.tokens) * dit.dim * self.item + 8 * frames * state
        return Work("self-attention", self.wide, flops, moved)

    def linear(self, kind: str, tokens: int | None = None, layer: int = 0) -> Work:
        """One block linear on so many tokens, by default those of a chunk."""
        tokens = self.tokens if tokens is None else tokens
        precision = self._linears[f"blocks.{layer}.{kind}"]
        (linear,) = (linear for linear in layer_linears(self.dit) if linear.kind == kind)
        moved = linear.bytes(precision) + tokens * linear.rows * self.item
        moved += activation_bytes(precision, tokens, linear.columns)
        return Work("linears", precision, 2 * tokens * linear.elements, moved)

    @property
    def cross_attention(self) -> Work:
        """Cross-attention of one layer in one forward."""
        dit = self.dit
        flops = 4 * self.tokens * dit.text_len * dit.dim
        moved = 2 * (self.tokens + dit.text_len) * dit.dim * self.item
        return Work("cross-attention", self.wide, flops, moved)

    def forward(self, chunk: int, *, clean: bool = False, seen: int | None = None) -> Iterator[Work]:
        """One forward of one chunk, operation by operation. The clean one ends with the last layer's keys; `seen` is as
        `attention` takes it.
        """
        dit, tokens = self.dit, self.tokens
        kinds = [linear.kind for linear in layer_linears(dit)][:-2]  # the conditioner has the last two
        patch = dit.patch[0] * dit.patch[1] * dit.patch[2] * dit.channels
        outer = Work(
            "linears",
            self.wide,
            2 * tokens * patch * dit.dim,
            (tokens * (patch + dit.dim) + patch * dit.dim) * self.item,
        )
        yield outer
        yield from self._part("first", self.passes.first())
        for layer in range(dit.layers):
            is_last = layer == dit.layers - 1
            yield self.linear(kinds[0], layer=layer)
            yield from self.moved((self.passes.prepare(),))
            if clean and is_last:
                return
            yield self.attention(chunk, seen=seen)
            if has_linear_branch(self.request.variant.attention):
                yield self.linear_branch(chunk)
            for kind in kinds[1:]:
                yield self.linear(kind, layer=layer)
            yield self.cross_attention
            if not is_last:
                yield from self._part("layer", self.passes.layer(layer))
        yield outer
        yield from self._part("last", (*self.passes.layer(dit.layers - 1), *self.passes.last()))

    def _part(self, name: str, passes: Iterable[Pass], kind: Kind = "element-wise") -> Iterator[Work]:
        """A component's element-wise work: as built, or pass by pass."""
        if name in self._built:
            return iter((Work(kind, self.wide, 0, self._built[name]),))
        return self.moved(passes, kind)

    def moved(self, passes: Iterable[Pass], kind: Kind = "element-wise") -> Iterator[Work]:
        """Passes as work."""
        return (Work(kind, self.wide, 0, one.bytes) for one in passes)

    def decode(self, *, first: bool) -> Iterator[Work]:
        """The decoder's work on one latent frame, in 16-bit numbers; every tensor moves once."""
        vae = self.request.preset.vae
        height, width = self.request.preset.latent_size(self.request.height, self.request.width)
        for conv in decoder_convs(vae):
            flops = conv.flops(height, width, first=first)
            if flops:
                moved = (
                    conv.pixels(height, width, first=first) * (conv.inputs + conv.outputs) + conv.parameters
                )
                yield Work("decoder", self.wide, flops, moved * self.item)
        if isinstance(vae, VAEConfig):
            middle, pixels = vae.widths[0], height * width
            yield Work("decoder", self.wide, 4 * pixels**2 * middle, 4 * pixels * middle * self.item)
        passes = decoder_passes(vae, height, width, self.item, first=first)
        yield from self._part("vae_first" if first else "vae_next", passes, "decoder, element-wise")

    def chunk(self, chunk: int) -> Iterator[Work]:
        """Everything between asking for a chunk and having its frames: the clean forward of the chunk before, the
        denoising forwards, and the decoding.
        """
        if chunk and self.schedule.clean_forward:
            yield from self.forward(chunk - 1, clean=True)
        if self.request.variant.schedule.rolling:
            for members in self.windows(chunk):
                for _ in range(members):  # one by one, layer by layer
                    yield from self.forward(chunk, seen=self.window(chunk, members))
        else:
            forward = tuple(self.forward(chunk))
            for _ in self.schedule.rows(chunk):
                yield from forward
        for frame in range(self.schedule.chunk_frames):
            yield from self.decode(first=chunk == 0 and frame == 0)

    def pixel_frames(self, chunk: int) -> int:
        """Frames of video that a chunk gives: the first latent frame of a clip gives one."""
        factor = self.request.preset.vae.temporal_factor
        return self.schedule.chunk_frames * factor - (factor - 1 if chunk == 0 else 0)


@dataclass(frozen=True)
class Part:
    """One kind of work in a chunk: operations, bytes, and seconds at peak rates (`compute_bound`: of these)."""

    flops: int
    bytes: int
    seconds: float
    compute_bound: float


@dataclass(frozen=True)
class ChunkPrediction:
    """One chunk at peak rates.

    Attributes:
        frames: of video.
        kept, total: key blocks that a query block sees, and how many there are.
    """

    chunk: int
    frames: int
    kept: int
    total: int
    parts: dict[Kind, Part]

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts.values())

    @property
    def decoder_seconds(self) -> float:
        """What of `seconds` the decoder takes; the transformer takes the rest."""
        return sum(self.parts[kind].seconds for kind in DECODER)


@dataclass(frozen=True)
class ClipPrediction:
    """A clip at peak rates. PREDICTED from sizes and published rates, not measured."""

    chunks: tuple[ChunkPrediction, ...]

    def first(self, frames: int) -> ClipPrediction:
        """The clip's beginning: the whole chunks that give at most so many frames of video."""
        ends = accumulate(chunk.frames for chunk in self.chunks)
        return ClipPrediction(
            tuple(chunk for chunk, end in zip(self.chunks, ends, strict=True) if end <= frames)
        )

    @property
    def frames(self) -> int:
        return sum(chunk.frames for chunk in self.chunks)

    @property
    def seconds(self) -> float:
        """At 100 % of the peak rates."""
        return sum(chunk.seconds for chunk in self.chunks)

    @property
    def flops(self) -> int:
        return sum(part.flops for chunk in self.chunks for part in chunk.parts.values())

    @property
    def compute_bound(self) -> float:
        """Share of the time in operations that arithmetic limits, not memory."""
        bound = sum(part.compute_bound for chunk in self.chunks for part in chunk.parts.values())
        return bound / self.seconds

    def part(self, kind: Kind) -> Part:
        """One kind of work in all chunks."""
        parts = [chunk.parts[kind] for chunk in self.chunks]
        return Part(
            sum(part.flops for part in parts),
            sum(part.bytes for part in parts),
            sum(part.seconds for part in parts),
            sum(part.compute_bound for part in parts),
        )

    @property
    def fps(self) -> float:
        """Frames per second at 100 % of the peak rates."""
        return self.frames / self.seconds

    @property
    def decoder_seconds(self) -> float:
        """What of `seconds` the decoder takes; the transformer takes the rest."""
        return sum(chunk.decoder_seconds for chunk in self.chunks)

    def as_dict(self) -> dict[str, Any]:
        """The prediction as plain data."""
        return {
            "predicted": True,
            "frames": self.frames,
            "seconds": self.seconds,
            "fps": self.fps,
            "compute_bound": self.compute_bound,
            "chunks": [{**asdict(chunk), "seconds": chunk.seconds} for chunk in self.chunks],
        }


def predict(request: Planned, built: Mapping[str, int] | None = None) -> ClipPrediction | None:
    """The floor of the clip that the variant's table was planned for; None where a peak rate that it needs is not
    known. `built` is what `Workload` takes.
    """
    workload = Workload(request, built)
    return predict_chunks(request, range(workload.planned_chunks), built)


def predict_chunks(
    request: Planned, indices: Iterable[int], built: Mapping[str, int] | None = None
) -> ClipPrediction | None:
    """The floor of some chunks of a rollout, as `predict` has it."""
    peak, workload = request.target.peak, Workload(request, built)
    if peak is None or any(f == "fp32" or peak.tflops(f) is None for f in workload.formats):
        return None
    chunks = []
    for index in indices:
        kept, total = workload.visible_blocks(index)
        parts = _parts(workload.chunk(index), peak)
        chunks.append(ChunkPrediction(index, workload.pixel_frames(index), kept, total, parts))
    return ClipPrediction(tuple(chunks))


def _parts(works: Iterable[Work], peak: Peak) -> dict[Kind, Part]:
    sums = {kind: [0, 0, 0.0, 0.0] for kind in KINDS}
    for work in works:
        total, seconds = sums[work.kind], work.seconds(peak)
        total[0] += work.flops
        total[1] += work.bytes
        total[2] += seconds
        total[3] += seconds if work.is_compute_bound(peak) else 0.0
    return {kind: Part(int(a), int(b), float(c), float(d)) for kind, (a, b, c, d) in sums.items()}
