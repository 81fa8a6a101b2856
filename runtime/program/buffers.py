"""Every buffer of a pipeline, sized from the manifest before anything is allocated.

An engine allocates exactly the buffers listed here, so the sizes that are checked are the sizes that are used.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.bundle import ENCODER_COMPONENTS, Bundle, Component, Dtype, Manifest, TensorSpec, nbytes
from runtime.errors import BundleError, CapacityError, InputError
from runtime.frame_table import LatentRing

from .attention import persist_work, table_buffer, work_sizes

__all__ = [
    "Buffer",
    "BufferPlan",
    "check_memory",
    "plan_buffers",
    "runs_on_gpu",
    "work_buffers",
]

_OTHER_QUEUES = {"vae_first": "decode", "vae_next": "decode", "text_encoder": "text"}
"""Components that run at the same time as the transformer, and the queue they run in."""


@dataclass(frozen=True)
class Buffer:
    """One array: its name, element type and shape."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return nbytes(self.dtype, self.shape)


@dataclass(frozen=True)
class BufferPlan:
    """The buffers of a pipeline that serves `sessions` sessions.

    `pool` holds the frame slots of all sessions, and first those of a rolling window's chunks. `shared` is what one
    chunk needs while it is computed (the session that is served uses it), `session` what each session keeps for itself,
    and `work` what passes between engines, scalars, and on a GPU the activation memory that engines are given.
    """

    sessions: int
    session_slots: int
    """Frame slots of one session."""
    pool: tuple[Buffer, ...]
    shared: tuple[Buffer, ...]
    session: tuple[Buffer, ...]
    work: tuple[Buffer, ...]

    @property
    def session_bytes(self) -> int:
        """Bytes one more session costs: its buffers and its part of the pool."""
        slot = sum(buffer.nbytes // buffer.shape[0] for buffer in self.pool)
        return _total(self.session) + self.session_slots * slot

    @property
    def total_bytes(self) -> int:
        """Bytes of all buffers together."""
        return (
            _total(self.pool) + _total(self.shared) + _total(self.work) + self.sessions * _total(self.session)
        )


def runs_on_gpu(manifest: Manifest) -> bool:
    """Whether engines run on a GPU. ONNX Runtime's run on the host, whatever their target has."""
    return manifest.backend != "onnxruntime" and manifest.target.compute_capability is not None


def plan_buffers(manifest: Manifest, sessions: int) -> BufferPlan:
    """Plan the buffers for `sessions` sessions.

    Raises:
        BundleError: a component's inputs or outputs are unusable.
        InputError: the engines are built for fewer sessions.
    """
    session_slots = max(1, manifest.held_frames)
    slots = max(1, manifest.window_slots + sessions * manifest.held_frames)
    step, clean = manifest.components["step"], manifest.components["clean"]
    conditioner = manifest.components["conditioner"]
    vae_first, vae_next = manifest.components["vae_first"], manifest.components["vae_next"]
    inputs, outputs = _named(step.inputs), _named(step.outputs)
    latent = _require(inputs, "latent", step)
    schedule = manifest.schedule
    cache = manifest.cache
    ring = LatentRing(
        chunk_frames=manifest.model.chunk_frames,
        sink_frames=cache.sink_frames,
        past_frames=manifest.held_frames - manifest.persistent_frames,
    )

    pool = [_resolve(spec, slots) for name, spec in inputs.items() if name.startswith("past_")]
    if any(buffer.shape[0] < slots for buffer in pool):
        raise InputError(
            f"the engines of this bundle have {pool[0].shape[0]} frame slots, which is one rollout, and {sessions} "
            f"sessions need {slots}; load one session, or use a bundle of another backend"
        )
    denoised = Buffer("denoised", latent.dtype, (schedule.most_steps, *_fixed(latent)))
    shared = [
        Buffer("noise", latent.dtype, (schedule.noises, *_fixed(latent))),
        *([] if schedule.rolling else [denoised]),
        _renamed(latent, "clean_latent"),
        *(
            _resolve(_require(inputs, name, step), slots)
            for name in ("chunk", "frame_slots", "rope_cos", "rope_sin", *_pinned(manifest))
        ),
        *(_resolve(spec, slots) for name, spec in outputs.items() if name != "next_latent"),
        _resolve(_require(_named(conditioner.inputs), "text", conditioner), slots),
        _renamed(_require(_named(vae_next.inputs), "latent", vae_next), "vae_latent"),
        _renamed(_require(_named(vae_first.outputs), "frames", vae_first), "frames_first"),
        _renamed(_require(_named(vae_next.outputs), "frames", vae_next), "frames_next"),
    ]
    shared += _encoder_buffers(manifest)
    _require(outputs, "next_latent", step)
    _require(_named(clean.inputs), "latent", clean)
    session = [
        Buffer("latents", latent.dtype, (ring.slots, *_fixed(latent))),
        *([denoised] if schedule.rolling else []),  # chunks of the window stay there between forwards
        *(_resolve(spec, slots) for name, spec in inputs.items() if name.startswith("cross_")),
        *(
            Buffer(f"cache.{index}.{side}", decoder_cache.dtype, decoder_cache.shape)
            for side in ("a", "b")
            for index, decoder_cache in enumerate(manifest.vae.caches)
        ),
    ]
    if cache.sink_positions == "window":
        session += [
            Buffer(
                buffer.name.replace("past_", "sink_"), buffer.dtype, (cache.sink_frames, *buffer.shape[1:])
            )
            for buffer in pool
            if not buffer.name.startswith("past_v")  # values do not turn, nor do their scales
        ]
    return BufferPlan(
        sessions=sessions,
        session_slots=session_slots,
        pool=tuple(pool),
        shared=tuple(shared),
        session=tuple(session),
        work=tuple(
            buffer
            for buffer in work_buffers(manifest)
            # The host hands the text encoder the arrays that it is called with.
            if runs_on_gpu(manifest) or not buffer.name.startswith("encoder.")
        ),
    )


def _pinned(manifest: Manifest) -> tuple[str, ...]:
    return ("pinned",) if manifest.persistent_frames else ()


def _encoder_buffers(manifest: Manifest) -> list[Buffer]:
    """What the video encoder reads, writes and keeps while a session starts from frames; its caches have two sides."""
    if not manifest.has_encoder:
        return []
    first, following = (manifest.components[name] for name in ENCODER_COMPONENTS)
    inputs = _named(following.inputs)
    return [
        _renamed(_require(_named(first.inputs), "video", first), "video_first"),
        _renamed(_require(inputs, "video", following), "video_next"),
        _renamed(_require(_named(following.outputs), "latent", following), "encoded"),
        *(
            _renamed(spec, f"encode_{name}.{side}")
            for side in ("a", "b")
            for name, spec in inputs.items()
            if name.startswith("cache.")
        ),
    ]


def work_buffers(manifest: Manifest) -> tuple[Buffer, ...]:
    """What a forward needs besides the buffers that every engine has, if its parts are run one by one.

    Scalars and tables that are constant, what the host feeds besides chunks, what passes between segments, and the
    activation memory: one piece for all components that never run at once.
    """
    cache = manifest.cache
    buffers = [Buffer(f"step.{row}", "int32", ()) for row in range(manifest.schedule.row_count)]
    buffers.append(Buffer("commit_slots", "int32", (manifest.model.chunk_frames,)))
    if cache.sink_positions == "window" and cache.sink_frames:
        pairs = (cache.sink_frames, manifest.model.rope.dims_thw[0] // 2)
        buffers.append(Buffer("sink_slots", "int32", (cache.sink_frames,)))
        buffers += [Buffer(name, "float32", pairs) for name in ("sink_cos", "sink_sin")]
    if manifest.persistent_frames:
        buffers.append(Buffer("contest", "int32", (2,)))
        own = [Buffer(name, *of_work) for name, of_work in persist_work(manifest).items()]
        # Kernels of attention have the scores anyway.
        buffers += [buffer for buffer in own if manifest.kernels is None or buffer.name != "scores"]
    if manifest.segments is not None:
        buffers += _segment_buffers(manifest)
        buffers += _joint_buffers(manifest, max(manifest.joint_chunks, _window_chunks(manifest)))
    encoder = manifest.components["text_encoder"]
    buffers += [_renamed(spec, f"encoder.{spec.name}") for spec in (*encoder.inputs, *encoder.outputs)]
    scratch: dict[str, int] = {}
    for name, component in manifest.components.items():
        queue = _OTHER_QUEUES.get(name, "forward")
        if component.cost is not None:
            scratch[queue] = max(scratch.get(queue, 0), component.cost.activation_bytes)
    return (
        *buffers,
        *(Buffer(f"scratch.{queue}", "uint8", (size,)) for queue, size in scratch.items() if size),
    )


def _window_chunks(manifest: Manifest) -> int:
    """Chunks that are denoised together; 0 where it is one by one."""
    return manifest.schedule.window_chunks if manifest.schedule.rolling else 0


def _joint_buffers(manifest: Manifest, chunks: int) -> list[Buffer]:
    """What each chunk keeps of so many that one forward computes together; a rolling window's latents are elsewhere."""
    components = manifest.components
    first, prepare = components["first"], components["qk_prepare"]
    latent, taken = _require(_named(first.inputs), "latent", first), _named(prepare.inputs)
    residual, query = _require(_named(first.outputs), "x_out", first), _named(prepare.outputs)
    return [
        buffer
        for chunk in range(chunks)
        for buffer in (
            *([_renamed(latent, f"joint.{chunk}.latent")] if manifest.joint_chunks else []),
            *(_renamed(_require(taken, name, prepare), f"joint.{chunk}.{name}") for name in ("cos", "sin")),
            *(_renamed(residual, f"joint.{chunk}.x.{side}") for side in (0, 1)),
            *(_renamed(_require(query, name, prepare), f"joint.{chunk}.{name}") for name in ("q", "q_mean")),
            Buffer(f"joint.{chunk}.slots", "int32", (manifest.model.chunk_frames,)),
        )
    ]


def _segment_buffers(manifest: Manifest) -> list[Buffer]:
    """What passes between the segments of a step; the residual stream alternates between two buffers."""
    components = manifest.components
    first, prepare = components["first"], components["qk_prepare"]
    outputs = _named(first.outputs)
    residual = _require(outputs, "x_out", first)
    query = _named(prepare.outputs)
    q = _require(query, "q", prepare)
    buffers = [
        _renamed(residual, "residual.0"),
        _renamed(residual, "residual.1"),
        _renamed(_require(outputs, "qkv", first), "qkv"),
        _renamed(q, "q"),
        _renamed(q, "attention_out"),
    ]
    if "qkv_scale" in outputs:
        buffers.append(_renamed(outputs["qkv_scale"], "qkv_scale"))
    if not manifest.persistent_frames:  # else every layer's are kept
        buffers.append(_renamed(_require(query, "q_mean", prepare), "q_mean"))
    if manifest.kernels is not None:
        buffers += [Buffer(name, dtype, shape) for name, (dtype, shape) in work_sizes(manifest).items()]
        buffers.append(Buffer("keep_q20", "int32", (len(manifest.sparsity.keep_q20),)))
        buffers += [_renamed(spec, table_buffer(spec.name)) for spec in manifest.kernels.tensors]
    return buffers


def check_memory(bundle: Bundle, plan: BufferPlan, free: int | None) -> None:
    """Hold what engines and buffers need against `free` bytes; `None` means unknown.

    Engines and weights are counted with the size of their files; the text encoder's weights are streamed and not
    counted, nor are golden vectors. On a GPU, activation memory is among the buffers.

    Raises:
        CapacityError: engines and buffers do not fit.
    """
    manifest = bundle.manifest
    outside = {manifest.text.weights, manifest.golden.file if manifest.golden else ""}
    engines = sum(entry.bytes for entry in manifest.files if entry.path not in outside)
    needed = engines + plan.total_bytes
    if free is None or needed <= free:
        return
    raise CapacityError(
        f"{plan.sessions} session(s) of {manifest.name!r} need {needed:,} bytes ({engines:,} for engines, "
        f"{plan.total_bytes:,} for buffers, of which {plan.session_bytes:,} per session), but {free:,} are free; "
        f"load fewer sessions or free memory",
        needed=needed,
        free=free,
    )


def _total(buffers: tuple[Buffer, ...]) -> int:
    return sum(buffer.nbytes for buffer in buffers)


def _named(specs: tuple[TensorSpec, ...]) -> dict[str, TensorSpec]:
    return {spec.name: spec for spec in specs}


def _require(specs: dict[str, TensorSpec], name: str, component: Component) -> TensorSpec:
    if name not in specs:
        raise BundleError(
            f"component {component.file!r} has no tensor {name!r} (it has: {', '.join(specs)}); rebuild the bundle"
        )
    return specs[name]


def _resolve(spec: TensorSpec, slots: int) -> Buffer:
    shape = []
    for dim in spec.shape:
        if isinstance(dim, str) and dim != "slots":
            raise BundleError(
                f"tensor {spec.name!r} has the symbolic dimension {dim!r}, expected sizes or 'slots'; rebuild "
                f"the bundle"
            )
        shape.append(slots if isinstance(dim, str) else dim)
    return Buffer(spec.name, spec.dtype, tuple(shape))


def _fixed(spec: TensorSpec) -> tuple[int, ...]:
    return _resolve(spec, slots=0).shape


def _renamed(spec: TensorSpec, name: str) -> Buffer:
    return Buffer(name, spec.dtype, _fixed(spec))
