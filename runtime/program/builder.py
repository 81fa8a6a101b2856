"""From a bundle's manifest to the program that executes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from runtime.bundle import ENCODER_COMPONENTS, Bundle, Component, Manifest, TensorSpec
from runtime.bundle.weights_file import StoredTensor, WeightsFile
from runtime.errors import BundleError
from runtime.frame_table import LatentRing

from .attention import (
    CLEARED,
    TOKEN_SCALE,
    attention_launches,
    attention_work,
    kernel_name,
    kernel_problem,
    persist_launches,
    persist_work,
    table_buffer,
)
from .buffers import Buffer, BufferPlan, work_buffers
from .joint import joint_forwards, window_forwards
from .program import (
    ALIGNMENT,
    Copy,
    EngineRun,
    Fill,
    Forward,
    KernelLaunch,
    Operation,
    Placed,
    Program,
    Queue,
    View,
)

__all__ = ["build_program", "prepare_options"]

Views = Mapping[str, View]


def build_program(bundle: Bundle, plan: BufferPlan) -> Program:
    """The program that executes `bundle` over the buffers of `plan`.

    Raises:
        BundleError: the manifest names something that the program has no tensor for.
    """
    manifest = bundle.manifest
    segments = manifest.segments
    stored: Mapping[str, StoredTensor] = {}
    if segments is not None:
        with WeightsFile(bundle.opened(segments.weights)) as weights:
            stored = weights.tensors
    return _Builder(manifest, plan, stored).build()


def prepare_options(manifest: Manifest) -> dict[str, int | float]:
    """Scalar arguments of the kernel `prepare`."""
    return {"eps": manifest.attention.eps}


class _Builder:
    """Places the buffers, then writes down the forwards in terms of views."""

    def __init__(self, manifest: Manifest, plan: BufferPlan, stored: Mapping[str, StoredTensor]) -> None:
        self.manifest = manifest
        self.model = manifest.model
        self.sessions = plan.sessions
        self.stored = stored
        self.placed: dict[str, Placed] = {}
        self.shared_bytes = self._place(
            (*plan.pool, *plan.shared, *work_buffers(manifest)), per_session=False
        )
        self.session_bytes = self._place(plan.session, per_session=True)
        self.pool = [buffer.name for buffer in plan.pool]
        self.weights = self._place_weights()
        self.problem_dtype = self.view("cross_k.0").dtype
        self.problem = kernel_problem(manifest, self.problem_dtype)
        codes = manifest.cache.kv is not None
        self.scales = ("kscale", "vscale") if codes else ()
        """Stems of what belongs to keys and values that are codes."""

    def build(self) -> Program:
        manifest, caches = self.manifest, len(self.manifest.vae.caches)
        sides = {side: [self.view(f"cache.{index}.{side}") for index in range(caches)] for side in ("a", "b")}
        forwards = [
            self._load(),
            Forward("reset", "decode", (), tuple(Fill(view) for side in sides.values() for view in side)),
            self._forward("condition", ("text",), [self._whole("conditioner", self._outside("conditioner"))]),
            *self._encode_video(),
            self._forward("begin", (*self._placement, "noise"), []),
            *(self._forward(f"denoise.{row}", (), self._step(row)) for row in self._denoising()),
            *window_forwards(self, manifest),
            self._forward("begin_clean", self._placement, []),
            self._forward("clean", (), self._step(None)),
            *joint_forwards(self, manifest),
            *self._persist(),
            self._forward("commit", ("commit_slots",), self._commit()),
            *self._sinks(),
            self._decode("decode_first", "vae_first", "frames_first", [], sides["a"]),
            self._decode("decode_next.a", "vae_next", "frames_next", sides["a"], sides["b"]),
            self._decode("decode_next.b", "vae_next", "frames_next", sides["b"], sides["a"]),
            self._encode(),
        ]
        ring = LatentRing(
            chunk_frames=self.model.chunk_frames,
            sink_frames=manifest.cache.sink_frames,
            past_frames=manifest.held_frames - manifest.persistent_frames,
        )
        # In a window, the forward of the chunk after it overwrites x0.
        last = self.view("denoised").index(manifest.schedule.denoise_steps - 1)
        return Program(
            sessions=self.sessions,
            buffers=self.placed,
            shared_bytes=self.shared_bytes,
            session_bytes=self.session_bytes,
            forwards={forward.name: forward for forward in forwards},
            weights=self.weights,
            latent_slots=ring.slots,
            finished=last if manifest.schedule.rolling else self.view("x0"),
        )

    @property
    def _placement(self) -> tuple[str, ...]:
        """What says where a chunk stands."""
        pinned = ("pinned",) if self.manifest.persistent_frames else ()
        return ("chunk", "frame_slots", *pinned, "rope_cos", "rope_sin")

    def view(self, name: str) -> View:
        """A whole buffer.

        Raises:
            BundleError: there is none, since the component that it is sized by has no tensor of this name.
        """
        if name not in self.placed:
            raise BundleError(f"no component of the bundle has the tensor {name!r}; rebuild the bundle")
        return self.placed[name].view

    def _place(self, buffers: tuple[Buffer, ...], *, per_session: bool) -> int:
        offset = 0
        for buffer in buffers:
            self.placed[buffer.name] = Placed(buffer, offset, per_session)
            offset += -(-buffer.nbytes // ALIGNMENT) * ALIGNMENT
        return offset

    def _place_weights(self) -> dict[str, View]:
        """All tensors of the weights file in one buffer, which is placed last of the shared ones."""
        views, size = {}, 0
        for name, tensor in self.stored.items():
            views[name] = View("weights", tensor.dtype, tensor.shape, size)
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if size:
            self.placed["weights"] = Placed(Buffer("weights", "uint8", (size,)), self.shared_bytes, False)
            self.shared_bytes += size
        return views

    def _weight(self, component: str, tensor: str) -> View:
        if tensor not in self.weights:
            segments = self.manifest.segments
            file = None if segments is None else segments.weights
            raise BundleError(
                f"component {component!r} is bound to the tensor {tensor!r}, which the weights file {file!r} does "
                f"not hold; rebuild the bundle"
            )
        return self.weights[tensor]

    def _forward(
        self, name: str, feeds: tuple[str, ...], operations: list[Operation], queue: Queue = "forward"
    ) -> Forward:
        return Forward(name, queue, tuple(self.view(feed) for feed in feeds), tuple(operations))

    def _load(self) -> Forward:
        """Constants; the pool is cleared because a masked value that is not finite would still spoil a product."""
        constants = [f"step.{row}" for row in range(self.manifest.schedule.row_count)]
        constants += [name for name in ("keep_q20", "weights") if name in self.placed]
        constants += [name for name in self.placed if name.startswith(table_buffer(""))]
        cleared = [*self.pool, *(name for name in CLEARED if name in self.placed)]
        return self._forward("load", tuple(constants), [Fill(self.view(name)) for name in cleared])

    def _run(
        self,
        name: str,
        tensors: Callable[[str], View | None],
        *,
        queue: Queue = "forward",
        layer: int | None = None,
    ) -> EngineRun:
        """A run of component `name`; `tensors` finds the view of each input and output."""
        component = self.manifest.components.get(name)
        if component is None:
            raise BundleError(
                f"the bundle has no component {name!r} (it has: {', '.join(self.manifest.components)}); rebuild it"
            )

        def resolve(specs: tuple[TensorSpec, ...]) -> dict[str, View]:
            views = {}
            for spec in specs:
                view = tensors(spec.name)
                if view is None:
                    raise BundleError(
                        f"component {name!r} has a tensor {spec.name!r} that this runtime does not know; rebuild "
                        f"the bundle with the exporter of this version"
                    )
                views[spec.name] = view
            return views

        scratch = None
        if component.cost is not None and component.cost.activation_bytes:
            buffer = self.view(f"scratch.{queue}")
            scratch = View(buffer.buffer, "uint8", (component.cost.activation_bytes,))
        return EngineRun(name, resolve(component.inputs), resolve(component.outputs), scratch, layer)

    def _whole(self, name: str, own: Views | None = None) -> EngineRun:
        """A component whose tensors are buffers of the same name, but for `own`."""
        views = {**{key: self.view(key) for key in self.placed}, **(own or {})}
        return self._run(name, views.get)

    def _denoising(self) -> list[int]:
        """Rows of all denoising forwards of one chunk, the first chunk's own first; none in a rolling window."""
        schedule = self.manifest.schedule
        if schedule.rolling:
            return []
        return list(dict.fromkeys((*schedule.rows(0), *schedule.rows(1))))

    def _step(self, row: int | None) -> list[Operation]:
        """The denoising forward of a row of the schedule, or the clean one."""
        schedule = self.manifest.schedule
        if row is None:
            own = {"latent": self.view("clean_latent"), "step": self.view(f"step.{schedule.clean_step}")}
        else:
            own = self.row_tensors(row)
        if self.manifest.segments is None:
            return [self._whole("clean" if row is None else "step", own)]
        return self._segmented(own, clean=row is None)

    def row_tensors(self, row: int) -> dict[str, View]:
        """What a denoising forward in a row of the schedule takes and gives besides what all of them do."""
        schedule = self.manifest.schedule
        noise, denoised = self.view("noise"), self.view("denoised")
        place, _ = schedule.place(row)
        return {
            "latent": denoised.index(place - 1) if place else noise.index(0),
            "noise": noise.index(min(place + 1, schedule.noises - 1)),  # the last forward does not use it
            "step": self.view(f"step.{row}"),
            "next_latent": denoised.index(place),
        }

    def _segmented(self, own: Views, *, clean: bool) -> list[Operation]:
        segments = self.manifest.segments
        assert segments is not None
        layers = self.model.layers
        outs = {"x_out": self.view("residual.0"), **self.projected}
        operations: list[Operation] = [self.segment("first", {**own, **outs}, segments.first, None)]
        for layer in range(layers):
            operations.append(self.prepare(layer, segments.prepare[layer]))
            is_last = layer == layers - 1
            if clean and is_last:
                break
            operations += self.attention(layer)
            tensors = {
                **own,
                "x": self.view(f"residual.{layer % 2}"),
                "attention_out": self.view("attention_out"),
                "cross_k": self.view(f"cross_k.{layer}"),
                "cross_v": self.view(f"cross_v.{layer}"),
                "x0": self.view("x0"),
                **self.projected,
                "x_out": self.view(f"residual.{(layer + 1) % 2}"),
            }
            if is_last:
                operations.append(self.segment("last", tensors, segments.last, layer))
            else:
                name = segments.layer_component(layer)
                operations.append(self.segment(name, tensors, segments.layers[layer], layer))
        return operations

    def _outside(self, name: str) -> Views:
        """The weights of a component outside of the step."""
        segments = self.manifest.segments
        return self._bound(name, {} if segments is None else segments.outside.get(name, {}))

    def segment(self, name: str, tensors: Views, weights: Mapping[str, str], layer: int | None) -> EngineRun:
        """A run of a segment with its weights bound."""
        return self._run(name, {**tensors, **self._bound(name, weights)}.get, layer=layer)

    def _bound(self, name: str, weights: Mapping[str, str]) -> Views:
        bound = {key: self._weight(name, tensor) for key, tensor in weights.items()}
        component = self.manifest.components.get(name)
        unknown = sorted(bound.keys() - {spec.name for spec in component.inputs}) if component else []
        if unknown:
            raise BundleError(
                f"the manifest binds a weight to the input {unknown[0]!r} of component {name!r}, which has none of "
                f"that name; rebuild the bundle"
            )
        return bound

    @property
    def projected(self) -> dict[str, View]:
        """What segments leave for `prepare`: the projection, and its tokens' scales if these are yet to be applied."""
        return {name: self.view(name) for name in ("qkv", "qkv_scale") if name in self.placed}

    def prepare(self, layer: int, weights: Mapping[str, str], own: Views | None = None) -> Operation:
        """From a layer's projection to queries, keys and values; `own` stands for the buffers of the same names."""
        tensors = {
            "qkv": self.view("qkv"),
            **({TOKEN_SCALE: self.view("qkv_scale")} if "qkv_scale" in self.placed else {}),
            "cos": self.view("rope_cos"),
            "sin": self.view("rope_sin"),
            **{name: self._weight("qk_prepare", tensor) for name, tensor in weights.items()},
            **self._projections(layer),
            **(own or {}),
        }
        if self.manifest.kernels is None:
            return self._run("qk_prepare", tensors.get, layer=layer)
        kernel = kernel_name(self.manifest, "prepare")
        return KernelLaunch(kernel, self.problem, tensors, prepare_options(self.manifest), layer)

    def _projections(self, layer: int) -> dict[str, View]:
        return {"q": self.view("q"), "q_mean": self._query_means(layer), **self._staged(layer)}

    def _query_means(self, layer: int) -> View:
        return self.view(f"qmean.{layer}" if self.manifest.persistent_frames else "q_mean")

    def _staged(self, layer: int) -> dict[str, View]:
        """What a chunk leaves for the cache."""
        return {
            "k": self.view(f"k.{layer}"),
            "v": self.view(f"v.{layer}"),
            "k_mean": self.view(f"kmean.{layer}"),
            **{f"{stem[0]}_scale": self.view(f"{stem}.{layer}") for stem in self.scales},
        }

    def _past(self, layer: int) -> dict[str, View]:
        stems = ("k", "v", "kmean", *self.scales)
        return {f"past_{stem}": self.view(f"past_{stem}.{layer}") for stem in stems}

    def attention(self, layer: int, own: Views | None = None) -> list[Operation]:
        """The attention of a layer; `own` stands for the buffers of the same names."""
        shared = {name: self.view(name) for name in self._placement[:-2]}
        tensors = {
            **self._projections(layer),
            **self._past(layer),
            **shared,
            **self._attention_weights(layer),
            "out": self.view("attention_out"),
            **(own or {}),
        }
        if self.manifest.kernels is None:
            return [self._run("attention", tensors.get, layer=layer)]
        dtype = self.problem_dtype
        tensors["keep_q20"] = self.view("keep_q20")
        for name, (kind, shape) in attention_work(self.manifest, dtype, layer).items():
            tensors[name] = View(name, kind, shape)
        launches: list[Operation] = []
        for launch in attention_launches(self.manifest, dtype, layer):
            given = tensors | {name: self.view(table_buffer(table)) for name, table in launch.tables.items()}
            buffers = {name: given[name] for name in _BUFFERS[launch.kernel]}
            launches.append(KernelLaunch(launch.kernel, launch.problem, buffers, launch.options, layer))
        return launches

    def _attention_weights(self, layer: int) -> dict[str, View]:
        """Weights that attention itself reads, if any: those of SLA's linear branch."""
        segments = self.manifest.segments
        if segments is None or not segments.attention:
            return {}
        return {name: self._weight("attention", tensor) for name, tensor in segments.attention[layer].items()}

    def _persist(self) -> list[Forward]:
        """Scores of the chunk's query blocks, and the choice of the blocks that outlive the window, layer by layer."""
        launches = persist_launches(self.manifest, self.problem_dtype)
        if not launches:
            return []
        work = {name: View(name, *of_work) for name, of_work in persist_work(self.manifest).items()}
        operations: list[Operation] = []
        for layer in range(self.model.layers):
            views = {
                **self._past(layer),
                "q_mean": self._query_means(layer),
                "k_mean": self._staged(layer)["k_mean"],
                **{name: self.view(name) for name in ("frame_slots", "contest")},
                **work,
            }
            for launch in launches:
                taken = {name: views[name] for name in _BUFFERS[launch.kernel] if name in views}
                operations.append(KernelLaunch(launch.kernel, launch.problem, taken, launch.options, layer))
        return [self._forward("persist", ("contest",), operations)]

    def _commit(self) -> list[Operation]:
        slots = self.view("commit_slots")
        return [self.commit_layer(layer, slots) for layer in range(self.model.layers)]

    def commit_layer(self, layer: int, slots: View) -> Operation:
        """A layer's keys and values into the pool."""
        views = {**self._past(layer), **self._staged(layer), "commit_slots": slots}
        return KernelLaunch(kernel_name(self.manifest, "commit"), self.problem, views, layer=layer)

    def _sinks(self) -> list[Forward]:
        """Copies of the sinks as committed, one forward per chunk that holds some, and writing them turned."""
        sinks, frames = self.manifest.cache.sink_frames, self.model.chunk_frames
        if "sink_slots" not in self.placed:
            return []
        forwards = []
        for chunk in range(-(-sinks // frames)):
            first = chunk * frames
            count = min(frames, sinks - first)
            copies: list[Operation] = []
            for layer in range(self.model.layers):
                for stem in ("k", "kmean", *self.scales[:1]):
                    target = self.view(f"sink_{stem}.{layer}")
                    staged = self.view(f"{stem}.{layer}")
                    by_frame = View(staged.buffer, staged.dtype, (frames, *target.shape[1:]))
                    copies.append(Copy(by_frame.index(0, count), target.index(first, count), layer))
            forwards.append(self._forward(f"keep_sinks.{chunk}", (), copies))
        turn: list[Operation] = [
            KernelLaunch(
                kernel_name(self.manifest, "rope_sink"),
                self.problem,
                {
                    **{
                        f"{side}_{stem}": self.view(f"{side}_{stem}.{layer}")
                        for side in ("past", "sink")
                        for stem in ("k", "kmean", *self.scales[:1])
                    },
                    "sink_slots": self.view("sink_slots"),
                    "cos": self.view("sink_cos"),
                    "sin": self.view("sink_sin"),
                },
                {"turned_pairs": self.view("sink_cos").shape[1]},
                layer,
            )
            for layer in range(self.model.layers)
        ]
        return [*forwards, self._forward("place_sinks", ("sink_slots", "sink_cos", "sink_sin"), turn)]

    def _decode(self, forward: str, name: str, frames: str, reads: list[View], writes: list[View]) -> Forward:
        tensors = {
            "latent": self.view("vae_latent"),
            "frames": self.view(frames),
            **{f"cache.{index}": view for index, view in enumerate(reads)},
            **{f"cache_out.{index}": view for index, view in enumerate(writes)},
            **self._outside(name),
        }
        return self._forward(forward, (), [self._run(name, tensors.get, queue="decode")], "decode")

    def _encode_video(self) -> list[Forward]:
        """The video encoder on the first frame of a clip and on the frames after it, for a bundle that has one."""
        if "encoded" not in self.placed:
            return []
        first, following = ENCODER_COMPONENTS
        names = [spec.name for spec in self.manifest.components[following].inputs]
        caches = [name for name in names if name.startswith("cache.")]

        def encode(forward: str, name: str, video: str, reads: str, writes: str) -> Forward:
            tensors = {"video": self.view(video), "latent": self.view("encoded"), **self._outside(name)}
            for cache in caches:
                tensors[cache] = self.view(f"encode_{cache}.{reads}")
                tensors[cache.replace("cache.", "cache_out.")] = self.view(f"encode_{cache}.{writes}")
            return self._forward(forward, (video,), [self._run(name, tensors.get)])

        return [
            encode("encode_first", first, "video_first", "b", "a"),
            encode("encode_next.a", following, "video_next", "a", "b"),
            encode("encode_next.b", following, "video_next", "b", "a"),
        ]

    def _encode(self) -> Forward:
        component: Component = self.manifest.components["text_encoder"]
        run = self._run("text_encoder", lambda name: self.view(f"encoder.{name}"), queue="text")
        feeds = tuple(f"encoder.{spec.name}" for spec in component.inputs)
        return self._forward("encode_text_layer", feeds, [run], "text")


_BUFFERS: Mapping[str, tuple[str, ...]] = {
    "score": ("scores", "q_mean", "k_mean", "past_kmean", "frame_slots", "chunk", "keep_q20"),
    "select": ("lists", "counts", "scores", "frame_slots", "chunk", "keep_q20"),
    "select_pinned": ("lists", "counts", "scores", "frame_slots", "chunk", "keep_q20", "pinned"),
    "weigh": ("importance", "scores", "frame_slots"),
    "persist": ("past_k", "past_v", "past_kmean", "importance", "frame_slots", "contest"),
    "attend": ("out", "q", "k", "v", "past_k", "past_v", "frame_slots", "lists", "counts"),
    "expand": ("lists", "counts", "frame_slots", "frame_map", "block_map", "columns"),
    "mean_key": ("shift", "k_mean", "past_kmean", "frame_slots"),
    "resemble": ("unlike_q", "unlike_k", "q", "k", "past_k", "shift", "frame_slots"),
    "select_sparge": (
        *("lists", "counts", "scores", "unlike_q", "unlike_k"),
        *("frame_slots", "chunk", "keep_q20"),
    ),
    "pool": (
        *("q_pool", "k_pool", "q", "k", "past_k", "frame_slots"),
        *("q_order", "k_order", "patch_blocks"),
    ),
    "score_groups": ("scores", "q_pool", "k_pool"),
    "choose": ("block_map", "scores", "frame_slots", "q_patches"),
    "sum_linear": ("frame_state", "frame_features", "k", "v", "past_k", "past_v", "frame_slots"),
    "project_linear": (
        *("linear_state", "linear_features", "frame_state", "frame_features"),
        *("linear_weight", "frame_slots"),
    ),
    "add_linear": ("out", "q", "linear_state", "linear_features", "linear_bias"),
    "attend_ordered": (
        *("out", "q", "k", "v", "past_k", "past_v", "frame_slots", "lists", "counts"),
        *("q_order", "k_order"),
    ),
    **dict.fromkeys(
        ("attend_fp8", "attend_e4m3"),
        (
            *("out", "q", "k", "v", "k_mean", "k_scale", "v_scale"),
            *("past_k", "past_v", "past_kmean", "past_kscale", "past_vscale"),
            *("frame_slots", "lists", "counts"),
        ),
    ),
}
"""What kernels of attention may take; an image takes what it needs of it."""
