"""The schema of `manifest.json`: what a bundle says about itself, field by field.

Every model refuses unknown fields, and validators check what fields must agree on.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field, field_validator, model_validator

from .dtypes import Dtype
from .fields import (
    BundlePath,
    Count,
    Finite,
    Fraction,
    FramesPerSecond,
    NonNegative,
    NonNegativeFloat,
    Part,
    Positive,
    PositiveFloat,
    Sha256,
    Shape,
    Size,
    Tolerance,
)
from .policies import Attention, SelectionTables, has_linear_branch, keeps_everything, persistent_frames
from .provenance import Provenance
from .rollout import RECACHE_MODES, Cache, Recache, Schedule, require_joint, require_room

__all__ = [
    "ENCODER_COMPONENTS",
    "SCHEMA_VERSION",
    "Attention",
    "BackendName",
    "Cache",
    "Calibration",
    "Component",
    "Cost",
    "FileEntry",
    "FormatSearch",
    "Golden",
    "Kernels",
    "Library",
    "Manifest",
    "Model",
    "Precision",
    "Quantization",
    "Rope",
    "Schedule",
    "Segments",
    "Sparsity",
    "Target",
    "TensorSpec",
    "Text",
    "Vae",
    "VaeCache",
]

SCHEMA_VERSION: Final = 1

ENCODER_COMPONENTS: Final = ("vae_encode_first", "vae_encode_next")
"""The video encoder of a bundle that can start from an image or a video: both, or none."""

BackendName = Literal["onnxruntime", "tensorrt-rtx", "tensorrt", "inductor"]
Precision = Literal["fp32", "bf16", "fp8", "nvfp4"]


class Target(Part):
    """What the bundle was built for. `compute_capability` is e.g. `"12.0"`, or null on a CPU."""

    name: str
    compute_capability: str | None = None


class Rope(Part):
    """Rotary embedding: base `theta` and the head dimensions given to time, height and width."""

    theta: PositiveFloat
    dims_thw: tuple[Count, Count, Count]

    @model_validator(mode="after")
    def _even(self) -> Rope:
        if any(d % 2 for d in self.dims_thw):
            raise ValueError(f"rope.dims_thw must be even (they hold pairs), found {self.dims_thw}")
        return self


class Model(Part):
    """Geometry of the diffusion transformer and of the video. Latent sizes in latent pixels."""

    preset: str
    layers: Count
    heads: Count
    head_dim: Count
    dim: Positive
    latent_channels: Count
    latent_height: Count
    latent_width: Count
    patch: tuple[Count, Count, Count]
    chunk_frames: Count
    frame_tokens: Positive
    rope: Rope
    video_height: Positive
    video_width: Positive
    fps: FramesPerSecond

    @model_validator(mode="after")
    def _consistent(self) -> Model:
        _, ph, pw = self.patch
        if self.latent_height % ph or self.latent_width % pw:
            raise ValueError(
                f"latent {self.latent_height}x{self.latent_width} does not divide by the patch {ph}x{pw}"
            )
        tokens = (self.latent_height // ph) * (self.latent_width // pw)
        if self.frame_tokens != tokens:
            raise ValueError(f"frame_tokens is {self.frame_tokens}, but latent and patch give {tokens}")
        if self.dim != self.heads * self.head_dim:
            raise ValueError(f"dim is {self.dim}, but heads * head_dim is {self.heads * self.head_dim}")
        if sum(self.rope.dims_thw) != self.head_dim:
            raise ValueError(f"rope.dims_thw {self.rope.dims_thw} must add up to head_dim {self.head_dim}")
        return self

    @property
    def chunk_tokens(self) -> int:
        """T: tokens of one chunk."""
        return self.chunk_frames * self.frame_tokens

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of a frame's tokens."""
        return self.latent_height // self.patch[1], self.latent_width // self.patch[2]


class Sparsity(Part):
    """Chunk-aware sparsity table, planned for `table_frames` latent frames.

    `values[i]` is the sparsity of chunk i and `keep_q20[i]` the kept fraction in units of 2**-20.
    """

    table_frames: Positive
    target: Fraction
    base: Fraction
    values: Annotated[tuple[Fraction, ...], Field(min_length=1)]
    keep_q20: Annotated[tuple[Annotated[int, Field(gt=0, le=1 << 20)], ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> Sparsity:
        if len(self.values) != len(self.keep_q20):
            raise ValueError(f"{len(self.values)} sparsity values but {len(self.keep_q20)} keep_q20 entries")
        return self


class Text(Part):
    """Text encoder. `tokenizer` and `weights` are files of the bundle; `words`, if any, all that it has seen."""

    encoder: Literal["umt5"]
    text_len: Annotated[int, Field(gt=0, le=1 << 16)]
    dim: Positive
    vocab: Positive
    layers: Count
    heads: Count
    eps: PositiveFloat
    tokenizer: BundlePath
    weights: BundlePath
    pad_id: NonNegative
    eos_id: NonNegative
    words: Annotated[tuple[str, ...], Field(max_length=1000)] = ()

    @model_validator(mode="after")
    def _in_vocabulary(self) -> Text:
        if max(self.pad_id, self.eos_id) >= self.vocab:
            raise ValueError(
                f"pad_id {self.pad_id} and eos_id {self.eos_id} must be below vocab {self.vocab}"
            )
        return self


class VaeCache(Part):
    """One streaming cache of the decoder; starts as zeros."""

    name: str
    shape: Annotated[tuple[Positive, ...], Field(max_length=8)]
    dtype: Dtype


class Vae(Part):
    """Streaming video decoder: what it is, its caches, and how it scales time and space.

    Its engines take latents as the transformer leaves them and give bytes; `denormalise` and `pixel_range` say what
    they do in between.
    """

    caches: tuple[VaeCache, ...]
    temporal_factor: Count
    spatial_factor: Count
    kind: Literal["wan", "tae"] = "wan"
    """Wan's decoder of any width, or a tiny one (TAEHV, LightTAE)."""
    denormalise: bool = True
    """Whether the network takes `latent * std + mean` of the latents' statistics."""
    widths: tuple[Positive, ...] | None = None
    """Channels from the latent's resolution upwards; None in bundles that do not say."""
    pixel_range: tuple[Finite, Finite] = (-1.0, 1.0)
    """What black and white are in the network's output."""


class TensorSpec(Part):
    """One input or output. Dimensions are integers or names of symbolic dimensions."""

    name: str
    dtype: Dtype
    shape: Shape


class Cost(Part):
    """What an engine says about itself: GPU launches of one run, bytes of activation memory, matrix products by
    operand type, and what its build took.
    """

    launches: NonNegative
    activation_bytes: Size
    gemms: dict[str, NonNegative]
    seconds: NonNegativeFloat
    peak_bytes: Size


class Component(Part):
    """One engine of the bundle: its file and the tensors that go in and come out.

    `file` is null for `step` and `clean` of a bundle that executes them as segments, and for an operator that
    a kernel executes; the tensors are the same either way. `cost` is null where the backend does not tell.
    """

    file: BundlePath | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    cost: Cost | None = None


class Segments(Part):
    """The step cut at its operators: components `first`, `layer` and `last`, with `qk_prepare` and
    `attention` in between.

    `weights` is a safetensors file. Each mapping goes from a component's input to the tensor of that file:
    `layers[i]` serves the run of `layer` between the operators of layer i and i + 1, `prepare[i]` the run of
    `qk_prepare` in layer i, `attention[i]`, if attention has weights, that of `attention`. Where engines hold their
    weights, their mappings are empty and there is an engine for every layer: `layer.0`, `layer.1`, ... `outside` has
    the mappings of components outside of the step whose weights are inputs too, by component.
    """

    weights: BundlePath
    first: dict[str, str]
    layers: tuple[dict[str, str], ...]
    last: dict[str, str]
    prepare: tuple[dict[str, str], ...]
    attention: tuple[dict[str, str], ...] = ()
    outside: dict[str, dict[str, str]] = Field(default={})

    @property
    def embedded(self) -> bool:
        """Whether the engines hold their weights."""
        return not self.first

    def layer_component(self, index: int) -> str:
        """The component that runs between the operators of layers `index` and `index` + 1."""
        return f"layer.{index}" if self.embedded else "layer"

    @property
    def components(self) -> tuple[str, ...]:
        """The components that the step was cut into: one `layer` whose weights are inputs, or one for every run."""
        layers = dict.fromkeys(self.layer_component(index) for index in range(len(self.layers)))
        return ("first", *layers, "last")


class Library(Part):
    """The library that built the engines. They run with this version and no other.

    Of PyTorch's packages for a GPU, `triton` is the version that compiled their kernels, and `driver` the branch of
    the oldest driver that runs them (580).
    """

    name: Literal["tensorrt-rtx", "tensorrt", "torch"]
    version: str
    triton: str | None = None
    driver: Positive | None = None


class Kernels(Part):
    """Compiled attention kernels, `ARCH/kernels.json` in `folder`; `driver` is the oldest branch that loads them (525).

    Methods that select by tables have them in the file `tables`, which holds `tensors`; layers take `turns` in order.
    """

    folder: BundlePath
    arch: Annotated[str, Field(pattern=r"^sm_\d+$")]
    driver: Positive
    tables: BundlePath | None = None
    tensors: tuple[TensorSpec, ...] = ()
    turns: tuple[SelectionTables, ...] = ()


class Calibration(Part):
    """Where static activation scales come from."""

    sha256: Sha256
    prompts: Positive
    chunks: Positive


class FormatSearch(Part):
    """How the formats of the linears were found: the least predicted time within a budget of output error.

    `error` is the predicted relative L2 error of what the model predicts in a forward, `seconds` the predicted time of
    the linears in a clip at peak rates, and `frontier` what other budgets give: pairs of seconds and error.
    """

    budget: NonNegativeFloat
    error: NonNegativeFloat
    seconds: NonNegativeFloat
    frontier: tuple[tuple[NonNegativeFloat, NonNegativeFloat], ...]


class Quantization(Part):
    """How the block linears are quantized.

    `errors` is the relative L2 error of each linear's output on calibration or seeded inputs; `skipped` stayed in
    bf16; `search` is there where the formats were searched for.
    """

    activations: Literal["dynamic", "static"]
    calibration: Calibration | None = None
    formats: dict[str, str]
    errors: dict[str, NonNegativeFloat]
    skipped: tuple[str, ...] = ()
    search: FormatSearch | None = None


class Golden(Part):
    """Golden vectors: what each component must compute from seeded inputs, see `runtime.bundle.golden`.

    `file` is a safetensors file of samples of the expected outputs, with the recipes of the inputs in its metadata.
    `tolerances` gives for each component that has them the largest error: relative L2, see
    `runtime.bundle.golden.error_of`. `measured` is the error of each component on the GPU that built it, for
    backends that build there.
    """

    file: BundlePath
    tolerances: dict[str, Tolerance]
    measured: dict[str, NonNegativeFloat] = Field(default={})


class FileEntry(Part):
    """A file of the bundle, with the hash and size it must have."""

    path: BundlePath
    sha256: Sha256
    bytes: Size


class Manifest(Part):
    """Contents of `manifest.json`, schema version 1."""

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str
    created: str
    target: Target
    backend: BackendName
    precision: Precision
    library: Library | None = None
    variant: str
    status: str
    model: Model
    schedule: Schedule
    attention: Attention
    sparsity: Sparsity
    cache: Cache
    text: Text
    vae: Vae
    components: dict[str, Component]
    segments: Segments | None = None
    kernels: Kernels | None = None
    quantization: Quantization | None = None
    golden: Golden | None = None
    files: tuple[FileEntry, ...]
    provenance: Provenance

    @field_validator("files")
    @classmethod
    def _unique(cls, files: tuple[FileEntry, ...]) -> tuple[FileEntry, ...]:
        seen: set[str] = set()
        for entry in files:
            if entry.path in seen:
                raise ValueError(f"file {entry.path!r} is listed twice")
            seen.add(entry.path)
        return files

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        window = self.window_frames
        past = window - self.model.chunk_frames
        if past < 0 or self.cache.max_past_frames != past:
            raise ValueError(
                f"cache.max_past_frames is {self.cache.max_past_frames}, but a window of {window} frames "
                f"with chunks of {self.model.chunk_frames} leaves {past}"
            )
        factor = self.vae.spatial_factor
        expected = (self.model.latent_height * factor, self.model.latent_width * factor)
        if (self.model.video_height, self.model.video_width) != expected:
            raise ValueError(
                f"video is {self.model.video_height}x{self.model.video_width}, but the latent and the "
                f"decoder's factor {factor} give {expected[0]}x{expected[1]}"
            )
        if self.attention.products is not None and self.cache.kv is None:
            raise ValueError(
                "attention.products is 'fp8', but cache.kv is null: only codes are multiplied so"
            )
        if self.cache.recache == "joint":
            require_joint(self.cache, self.window_frames, self.model.chunk_frames, self.segments is not None)
        if self.schedule.rolling:
            self._require_rolling()
        require_room(self.attention.method, self.cache, self.model.chunk_frames)
        if self.segments is not None:
            layers = self.model.layers
            if (len(self.segments.layers), len(self.segments.prepare)) != (layers - 1, layers):
                raise ValueError(
                    f"segments bind {len(self.segments.layers)} runs of layer and {len(self.segments.prepare)} of "
                    f"qk_prepare, but {layers} layers need {layers - 1} and {layers}"
                )
            wanted = layers if has_linear_branch(self.attention.method) else 0
            if len(self.segments.attention) != wanted:
                raise ValueError(
                    f"segments bind the weights of {len(self.segments.attention)} runs of attention; expected {wanted} "
                    f"of the policy {self.attention.method.policy}"
                )
        return self

    def _require_rolling(self) -> None:
        cache, frames = self.cache, self.model.chunk_frames
        dense = keeps_everything(self.attention.method, self.sparsity.target)
        if self.segments is None or not dense or cache.recache != "none":
            raise ValueError(
                "schedule.rolling needs a step in segments, full attention, and cache.recache 'none'; found "
                f"{'segments' if self.segments else 'no segments'}, the policy {self.attention.method.policy} at a "
                f"sparsity of {self.sparsity.target:g}, and {cache.recache!r}"
            )
        least = frames * (self.schedule.window_chunks + 1)
        anchored = (cache.sink_frames, cache.sink_positions) == (frames, "window")
        if self.window_frames % frames or self.window_frames < least or not anchored:
            raise ValueError(
                f"schedule.rolling needs a window of whole chunks of {frames} frames, {least} or more, and sinks that "
                f"are the first chunk and move with the window; found a window of {self.window_frames} and "
                f"{cache.sink_frames} sinks, {cache.sink_positions!r}"
            )

    @property
    def recache_modes(self) -> tuple[Recache, ...]:
        """What a prompt switch may do to cached frames."""
        if self.schedule.rolling:
            return ("none",)
        return tuple(mode for mode in RECACHE_MODES if mode != "joint" or self.joint_chunks)

    @property
    def held_frames(self) -> int:
        """Past frames that a session keeps. In a rolling rollout the first chunk is kept besides what the clean forward
        sees.
        """
        return self.cache.max_past_frames + (self.cache.sink_frames if self.schedule.rolling else 0)

    @property
    def window_slots(self) -> int:
        """Slots of the pool, before those of the sessions, that hold a rolling window's chunks while they are denoised:
        all but the latest chunk, whose keys and values stay where the forward leaves them.
        """
        return (self.schedule.window_chunks - 1) * self.model.chunk_frames

    @property
    def persistent_frames(self) -> int:
        """Past frames that are virtual: packed from blocks that outlive the window."""
        return persistent_frames(self.attention.method)

    @property
    def joint_chunks(self) -> int:
        """Chunks that a joint forward may recompute at once; 0 where there is no such forward."""
        return self.window_frames // self.model.chunk_frames if self.cache.recache == "joint" else 0

    @property
    def window_frames(self) -> int:
        """Frames that attention may see, the current chunk included."""
        return self.cache.window_frames or self.sparsity.table_frames

    @property
    def has_encoder(self) -> bool:
        """Whether a rollout can start from an image or a video."""
        return not self.components.keys().isdisjoint(ENCODER_COMPONENTS)

    @property
    def key_blocks(self) -> int:
        """KB: key blocks per frame (the last one may be ragged)."""
        return -(-self.model.frame_tokens // self.attention.block_k)
