"""What the components' tensors must be for a rollout to feed and read them, whatever executes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from runtime.bundle import ENCODER_COMPONENTS, FLOATS, PERSIST, Bundle, Dtype, Manifest, TensorSpec
from runtime.bundle.policies import has_linear_branch
from runtime.bundle.weights_file import WeightsFile
from runtime.program.attention import TOKEN_SCALE

from .steps import Flaws

__all__ = ["check_contract"]

Dims = tuple[int | str, ...]

_TYPES: Final[Mapping[str, tuple[str, ...]]] = {
    **dict.fromkeys(("step", "chunk", "frame_slots", "pinned", "contest"), ("int32",)),
    **dict.fromkeys(
        (
            "kmean",
            "past_kmean",
            "kept_kmean",
            "qmean",
            "q_mean",
            "k_mean",
            "rope_cos",
            "rope_sin",
            "cos",
            "sin",
        ),
        ("float32",),
    ),
    **dict.fromkeys(("kscale", "vscale", "k_scale", "v_scale", "past_kscale", "past_vscale"), ("float32",)),
    "frames": ("uint8",),
}
"""Element types of tensors by name; all others are floating point."""
_LAYER: Final = re.compile(r"layers\.\d+\.")
_CODES: Final = dict.fromkeys(("k", "v", "past_k", "past_v"), ("uint8",))
"""The same where keys and values are codes."""
_BETWEEN: Final = ("x", "attention_out", "step", "cross_k", "cross_v")
_NEEDED: Final[Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "step": (
        ("latent", "noise", "step", "chunk", "frame_slots", "rope_cos", "rope_sin"),
        ("next_latent", "x0"),
    ),
    "first": (("latent", "step"), ("x_out", "qkv")),
    "layer": (_BETWEEN, ("x_out", "qkv")),
    "last": ((*_BETWEEN, "latent", "noise"), ("next_latent", "x0")),
    "qk_prepare": (("qkv", "bias", "norm_q", "norm_k", "cos", "sin"), ("q", "k", "v", "q_mean", "k_mean")),
    "attention": (
        ("q", "k", "v", "q_mean", "k_mean", "past_k", "past_v", "past_kmean", "frame_slots", "chunk"),
        ("out",),
    ),
    PERSIST: (
        ("q_mean", "k_mean", "past_k", "past_v", "past_kmean", "frame_slots", "contest"),
        ("kept_k", "kept_v", "kept_kmean"),
    ),
    "conditioner": (("text",), ()),
    "text_encoder": (("hidden", "mask"), ("hidden_out",)),
    "vae_first": (("latent",), ("frames",)),
    "vae_next": (("latent",), ("frames",)),
    **dict.fromkeys(ENCODER_COMPONENTS, (("video",), ("latent",))),
}
"""Inputs and outputs without which a component does not do its part. Layers' and caches' are checked apart."""
_CHUNK_SCALES: Final = ("k_scale", "v_scale")
_PAST_SCALES: Final = ("past_kscale", "past_vscale")
_NEEDED_SCALES: Final[Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "qk_prepare": ((), _CHUNK_SCALES),
    "attention": ((*_CHUNK_SCALES, *_PAST_SCALES), ()),
}
"""The same, besides, where keys and values are codes."""
_PROJECTION_SCALES: Final[Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    **dict.fromkeys(("first", "layer"), ((), ("qkv_scale",))),
    "qk_prepare": ((TOKEN_SCALE, "channel_scale"), ()),
}
"""The same, besides, where the scales of a projection are left to *prepare*."""


def check_contract(bundle: Bundle, flaws: Flaws) -> None:
    """Hold the components against the model's sizes, and the text encoder's weights against its layer."""
    manifest = bundle.manifest
    wanted = _shapes(manifest)
    types = _TYPES if manifest.cache.kv is None else {**_TYPES, **_CODES}
    for name, tensors in wanted.items():
        component = manifest.components[name]
        for kind, specs in (("input", component.inputs), ("output", component.outputs)):
            for spec in specs:
                where = f"component {name!r}, {kind} {spec.name!r}"
                stem, _, index = spec.name.partition(".")
                if stem in ("cache", "cache_out") and name not in ENCODER_COMPONENTS:
                    _check_cache(manifest, spec, index, where, flaws)
                elif stem in tensors:
                    _check(spec, tensors[stem], types.get(stem, FLOATS), where, flaws)
    _check_needed(manifest, flaws)
    _check_encoder(manifest, flaws)
    _check_layers(manifest, flaws)
    _check_text_weights(bundle, flaws)


def _shapes(manifest: Manifest) -> dict[str, dict[str, Dims]]:
    """Per component, the shape of every tensor by name (without the layer's number)."""
    model, text, vae = manifest.model, manifest.text, manifest.vae
    frames, tokens, head = model.chunk_frames, model.chunk_tokens, (model.heads, model.head_dim)
    size = (model.latent_height, model.latent_width)
    pixels = (model.video_height, model.video_width, 3)
    q_blocks = -(-model.frame_tokens // manifest.attention.block_q)
    k_blocks = manifest.key_blocks
    latent: Dims = (model.latent_channels, frames, *size)
    projected: dict[str, Dims] = dict.fromkeys(("q", "k", "v", "out"), (tokens, *head))
    past_values: Dims = ("slots", model.frame_tokens, *head)
    if manifest.cache.kv is not None:
        by_block = (k_blocks, *head, manifest.attention.block_k)
        projected["v"], past_values = (frames, *by_block), ("slots", *by_block)
    past: dict[str, Dims] = {
        "past_k": ("slots", model.frame_tokens, *head),
        "past_v": past_values,
        "past_kmean": ("slots", k_blocks, *head),
        **dict.fromkeys(_PAST_SCALES, ("slots", k_blocks, model.heads)),
        "frame_slots": (manifest.cache.max_past_frames,),
        "chunk": (),
        "pinned": (),
    }
    cross: dict[str, Dims] = dict.fromkeys(("cross_k", "cross_v"), (text.text_len, *head))
    angles: Dims = (tokens, model.head_dim // 2)
    step: dict[str, Dims] = {
        **dict.fromkeys(("latent", "noise", "next_latent", "x0"), latent),
        **past,
        **cross,
        "step": (),
        "rope_cos": angles,
        "rope_sin": angles,
        "k": projected["k"],
        "v": projected["v"],
        "kmean": (frames, k_blocks, *head),
        "qmean": (frames, q_blocks, *head),
        **dict.fromkeys(("kscale", "vscale"), (frames, k_blocks, model.heads)),
    }
    means: dict[str, Dims] = {
        "q_mean": (frames, q_blocks, *head),
        "k_mean": (frames, k_blocks, *head),
        **dict.fromkeys(_CHUNK_SCALES, (frames, k_blocks, model.heads)),
    }
    decoded: dict[str, Dims] = {"latent": (model.latent_channels, 1, *size)}
    shapes: dict[str, dict[str, Dims]] = {
        "step": step,
        "clean": step,
        "conditioner": {"text": (text.text_len, text.dim), **cross},
        "text_encoder": {
            "hidden": (text.text_len, text.dim),
            "mask": (text.text_len,),
            "hidden_out": (text.text_len, text.dim),
        },
        "vae_first": {**decoded, "frames": (1, *pixels)},
        "vae_next": {**decoded, "frames": (vae.temporal_factor, *pixels)},
    }
    if manifest.has_encoder:
        for name, count in zip(ENCODER_COMPONENTS, (1, vae.temporal_factor), strict=True):
            shapes[name] = {
                "video": (count, 3, *pixels[:2]),
                "latent": (model.latent_channels, 1, *size),
            }
    if kept := manifest.persistent_frames:
        pools = {name: past[name] for name in ("past_k", "past_v", "past_kmean")}
        left = {name.replace("past_", "kept_"): (kept, *shape[1:]) for name, shape in pools.items()}
        shapes[PERSIST] = {**means, **pools, **left, "frame_slots": past["frame_slots"], "contest": (2,)}
    if manifest.segments is not None:
        width = (model.dim,)
        shapes["qk_prepare"] = {
            **projected,
            **means,
            "qkv": (tokens, 3 * model.dim),
            "token_scale": (tokens,),
            "channel_scale": (3 * model.dim,),
            "bias": (3 * model.dim,),
            "norm_q": width,
            "norm_k": width,
            "cos": angles,
            "sin": angles,
        }
        linear: dict[str, Dims] = {
            "linear_weight": (model.head_dim, model.head_dim),
            "linear_bias": (model.head_dim,),
        }
        shapes["attention"] = {**projected, **means, **past, **linear}
    return shapes


def _check(spec: TensorSpec, shape: Dims, types: tuple[str, ...], where: str, flaws: Flaws) -> None:
    if spec.dtype not in types:
        flaws.add(where, f"it is {spec.dtype}, expected {' or '.join(types)}")
    if [dim for dim in spec.shape if dim != 1] != [dim for dim in shape if dim != 1]:
        flaws.add(where, f"it is {list(spec.shape)}, and the model makes it {list(shape)}")


def _check_cache(manifest: Manifest, spec: TensorSpec, index: str, where: str, flaws: Flaws) -> None:
    caches = manifest.vae.caches
    if not index.isdecimal() or int(index) >= len(caches):
        flaws.add(where, f"the manifest lists {len(caches)} caches of the decoder")
        return
    cache = caches[int(index)]
    if (spec.dtype, spec.shape) != (cache.dtype, cache.shape):
        flaws.add(
            where, f"it is {spec.dtype} {list(spec.shape)}, and the cache {cache.dtype} {list(cache.shape)}"
        )


def _check_needed(manifest: Manifest, flaws: Flaws) -> None:
    prepare = manifest.components.get("qk_prepare")
    scaled = prepare is not None and TOKEN_SCALE in {spec.name for spec in prepare.inputs}
    for name, component in manifest.components.items():
        stem = name.partition(".")[0]
        inputs, outputs = _NEEDED.get(stem, ((), ()))
        more: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
        if manifest.cache.kv is not None:
            more = _NEEDED_SCALES.get(stem, more)
        if manifest.persistent_frames and stem in ("step", "attention"):
            more = ((*more[0], "pinned"), more[1])
        if has_linear_branch(manifest.attention.method) and stem == "attention":
            more = ((*more[0], "linear_weight", "linear_bias"), more[1])
        if scaled and stem in _PROJECTION_SCALES:
            left_out, left = _PROJECTION_SCALES[stem]
            more = ((*more[0], *left_out), (*more[1], *left))
        for kind, specs, wanted in (
            ("input", component.inputs, (*inputs, *more[0])),
            ("output", component.outputs, (*outputs, *more[1])),
        ):
            for missing in sorted(set(wanted) - {spec.name for spec in specs}):
                flaws.add(f"component {name!r}, {kind} {missing!r}", "it is missing")


def _check_encoder(manifest: Manifest, flaws: Flaws) -> None:
    """Every cache that the video encoder reads for later frames is one that both of its graphs write."""
    if not manifest.has_encoder:
        return

    def caches(specs: tuple[TensorSpec, ...]) -> dict[str, TensorSpec]:
        return {
            spec.name.partition(".")[2]: spec
            for spec in specs
            if spec.name.startswith(("cache.", "cache_out."))
        }

    read = caches(manifest.components[ENCODER_COMPONENTS[1]].inputs)
    for name in ENCODER_COMPONENTS:
        written = caches(manifest.components[name].outputs)
        for index in sorted(read.keys() ^ written.keys()):
            kind = "missing" if index in read else "read by nothing"
            flaws.add(f"component {name!r}, output 'cache_out.{index}'", f"it is {kind}")
        for index in sorted(read.keys() & written.keys()):
            if (read[index].dtype, read[index].shape) != (written[index].dtype, written[index].shape):
                flaws.add(
                    f"component {name!r}, output 'cache_out.{index}'",
                    f"it is {written[index].dtype} {list(written[index].shape)}, and read as {read[index].dtype} "
                    f"{list(read[index].shape)}",
                )


def _check_layers(manifest: Manifest, flaws: Flaws) -> None:
    """Every layer has its tensors in the step, what it commits in the clean forward and its prompt in the conditioner;
    and every cache of the decoder is read and written.
    """
    layers = range(manifest.model.layers)
    inputs = {spec.name for spec in manifest.components["step"].inputs}
    codes = manifest.cache.kv is not None
    past = ("past_k", "past_v", "past_kmean", *(_PAST_SCALES if codes else ()))
    made = ("k", "v", "kmean", *(("kscale", "vscale") if codes else ()))
    if manifest.persistent_frames:
        made = (*made, "qmean")
    prompt = ("cross_k", "cross_v")
    wanted = {f"{stem}.{i}" for stem in (*past, *prompt) for i in layers}
    for name in sorted(wanted - inputs):
        flaws.add(f"component 'step', input {name!r}", "it is missing")
    for component, stems in (("step", made), ("clean", made), ("conditioner", prompt)):
        outputs = {spec.name for spec in manifest.components[component].outputs}
        for name in sorted({f"{stem}.{i}" for stem in stems for i in layers} - outputs):
            flaws.add(f"component {component!r}, output {name!r}", "it is missing")
    following = manifest.components["vae_next"]
    for index in range(len(manifest.vae.caches)):
        for kind, name, specs in (
            ("input", f"cache.{index}", following.inputs),
            ("output", f"cache_out.{index}", following.outputs),
        ):
            if name not in {spec.name for spec in specs}:
                flaws.add(f"component 'vae_next', {kind} {name!r}", "it is missing")


def _check_text_weights(bundle: Bundle, flaws: Flaws) -> None:
    text = bundle.manifest.text
    where = f"weights file {text.weights!r}"
    with WeightsFile(bundle.opened(text.weights)) as weights:
        stored = weights.tensors
    shapes: dict[str, Dims] = {"token_embedding": (text.vocab, text.dim), "norm": (text.dim,)}
    specs = {spec.name: spec for spec in bundle.manifest.components["text_encoder"].inputs}
    names = specs.keys() - set(_NEEDED["text_encoder"][0])
    for name in sorted({tensor.split(".", 2)[2] for tensor in stored if _LAYER.match(tensor)} - names):
        flaws.add(f"component 'text_encoder', input {name!r}", "it is missing, and the weights file has it")
    for name in sorted(names):
        if specs[name].dtype not in FLOATS:
            flaws.add(
                f"component 'text_encoder', input {name!r}",
                f"it is {specs[name].dtype}, expected a float type",
            )
        shapes |= {f"layers.{layer}.{name}": specs[name].shape for layer in range(text.layers)}
    for name, shape in shapes.items():
        if name not in stored:
            flaws.add(f"{where}, tensor {name!r}", "it is missing")
        elif not _widens(stored[name].dtype, specs.get(name.rpartition(".")[2])):
            flaws.add(
                f"{where}, tensor {name!r}",
                f"it is {stored[name].dtype}, which would lose digits or is no float",
            )
        elif [dim for dim in stored[name].shape if dim != 1] != [dim for dim in shape if dim != 1]:
            flaws.add(
                f"{where}, tensor {name!r}", f"it is {list(stored[name].shape)}, expected {list(shape)}"
            )
    for name in sorted(stored.keys() - shapes.keys()):
        flaws.add(f"{where}, tensor {name!r}", f"an encoder of {text.layers} layers has no such tensor")


def _widens(stored: Dtype, spec: TensorSpec | None) -> bool:
    """Whether a float as it is stored is the same number in the type that takes it; without a `spec` in float32."""
    wanted = "float32" if spec is None else spec.dtype
    return stored in FLOATS and wanted in (stored, "float32")
