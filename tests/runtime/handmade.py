"""A small real bundle, written by hand: ONNX graphs with the components' full inputs and outputs.

Two layers of one head of 8, frames of 4 tokens. Attention is dense over the frames that `frame_slots` names, and
every input (cached block means and the chunk's index too) has a say in the result, so that a frame committed to the
wrong slot, a stale prompt or a shifted position shows in the video.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from runtime.bundle import Component, Manifest, TensorSpec, file_entry, load_bundle, write_manifest

CHANNELS, CHUNK, SIZE, LAYERS, DIM, FRAME_TOKENS = 2, 3, 4, 2, 8, 4
TEXT_LEN, TEXT_DIM, FFN = 6, 8, 16
PIXELS = SIZE * 8
SIGMAS = (1.0, 0.9375, 0.8333333, 0.625, 0.0)
VOCAB = ["<pad>", "</s>", "<unk>", "a", "red", "fox", "in", "snow", "jumps", "sea", "&"]
_TYPES = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32, "uint8": TensorProto.UINT8}
_CACHES = {"cache.0": (CHANNELS, 2, SIZE, SIZE), "cache.1": (CHANNELS, 1, SIZE, SIZE)}


class Graph:
    """Collects the nodes of one component."""

    def __init__(self) -> None:
        self.nodes, self.weights = [], []
        self.inputs: list[TensorSpec] = []
        self.outputs: list[TensorSpec] = []

    def input(self, name: str, *shape: int | str, dtype: str = "float32") -> str:
        self.inputs.append(TensorSpec(name=name, dtype=dtype, shape=shape))
        return name

    def output(self, name: str, value: str, *shape: int | str, dtype: str = "float32") -> None:
        self.nodes.append(helper.make_node("Identity", [value], [name]))
        self.outputs.append(TensorSpec(name=name, dtype=dtype, shape=shape))

    def const(self, value: object, dtype: type = np.float32) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value, dtype=dtype), name))
        return name

    def op(self, kind: str, *inputs: str, **attributes: object) -> str:
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def shape(self, value: str, *dims: int) -> str:
        return self.op("Reshape", value, self.const(dims, np.int64))

    def move(self, value: str, *order: int) -> str:
        return self.op("Transpose", value, perm=order)

    def mean(self, value: str, *axes: int, keep: int = 1) -> str:
        return self.op("ReduceMean", value, self.const(axes, np.int64), keepdims=keep)

    def save(self, path: Path) -> Component:
        def info(spec: TensorSpec) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(spec.name, _TYPES[spec.dtype], list(spec.shape))

        graph = helper.make_graph(
            self.nodes,
            path.stem,
            [info(s) for s in self.inputs],
            [info(s) for s in self.outputs],
            self.weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, path)
        return Component(file=path.name, inputs=tuple(self.inputs), outputs=tuple(self.outputs))


def _rope(g: Graph, x: str, cos: str, sin: str) -> str:
    """Interleaved pairs of x `[T, D]`."""
    pairs = g.shape(x, -1, DIM // 2, 2)
    even = g.op("Gather", pairs, g.const(0, np.int64), axis=2)
    odd = g.op("Gather", pairs, g.const(1, np.int64), axis=2)
    a = g.op("Sub", g.op("Mul", even, cos), g.op("Mul", odd, sin))
    b = g.op("Add", g.op("Mul", even, sin), g.op("Mul", odd, cos))
    last = g.const([-1], np.int64)
    both = g.op("Concat", g.op("Unsqueeze", a, last), g.op("Unsqueeze", b, last), axis=-1)
    return g.shape(both, -1, DIM)


def transformer(
    rng: np.random.Generator,
    past: int,
    *,
    clean: bool,
    fail_at_chunk: int | None = None,
    frames: int = CHUNK,
    sigmas: tuple[float, ...] = SIGMAS,
    first_sigmas: tuple[float, ...] = (),
) -> Graph:
    """The `step` component, or the `clean` one; the same `rng` state gives both the same weights.

    From `fail_at_chunk` on its forwards fail: they look up a table that ends there.
    """
    g = Graph()
    tokens = frames * FRAME_TOKENS
    rows = (*sigmas, *first_sigmas)
    followed_by = [*sigmas[1:], 0.0, *first_sigmas[1:], *[0.0 for _ in first_sigmas[:1]]]
    latent = g.input("latent", CHANNELS, frames, SIZE, SIZE)
    noise = "" if clean else g.input("noise", CHANNELS, frames, SIZE, SIZE)
    step = g.const(len(sigmas) - 1, np.int32) if clean else g.input("step", dtype="int32")
    chunk = g.input("chunk", dtype="int32")
    frame_slots = g.input("frame_slots", past, dtype="int32")
    cos, sin = g.input("rope_cos", tokens, DIM // 2), g.input("rope_sin", tokens, DIM // 2)

    patches = g.move(g.shape(latent, CHANNELS, frames, 2, 2, 2, 2), 1, 2, 4, 3, 5, 0)
    x = g.shape(patches, tokens, DIM)
    x = g.op("Add", x, g.op("Gather", g.const(rng.normal(size=(len(rows), DIM))), step))
    growth = g.op("Div", g.op("Cast", chunk, to=TensorProto.FLOAT), g.const(50.0))
    x = g.op("Add", x, g.op("Tanh", growth))
    if fail_at_chunk is not None:
        x = g.op("Add", x, g.op("Gather", g.const(np.zeros(fail_at_chunk)), chunk))

    present = g.op("Cast", g.op("GreaterOrEqual", frame_slots, g.const(0, np.int32)), to=TensorProto.FLOAT)
    slots = g.op("Max", frame_slots, g.const(0, np.int32))
    absent = g.op("Mul", g.op("Sub", present, g.const(1.0)), g.const(1e9))
    bias = g.shape(
        g.op("Expand", g.shape(absent, past, 1), g.const([past, FRAME_TOKENS], np.int64)), past * FRAME_TOKENS
    )
    bias = g.op("Concat", bias, g.const(np.zeros(tokens)), axis=0)
    results = []
    for layer in range(LAYERS):
        qkv = [g.op("MatMul", x, g.const(rng.normal(size=(DIM, DIM)) / 2)) for _ in range(3)]
        q, k, v = _rope(g, qkv[0], cos, sin), _rope(g, qkv[1], cos, sin), qkv[2]
        kmean = g.mean(g.shape(k, frames, 1, FRAME_TOKENS, 1, DIM), 2, keep=0)
        results.append((k, v, kmean))
        if clean and layer == LAYERS - 1:
            break
        past_k = g.input(f"past_k.{layer}", "slots", FRAME_TOKENS, 1, DIM)
        past_v = g.input(f"past_v.{layer}", "slots", FRAME_TOKENS, 1, DIM)
        past_kmean = g.input(f"past_kmean.{layer}", "slots", 1, 1, DIM)
        cross_k = g.input(f"cross_k.{layer}", TEXT_LEN, 1, DIM)
        cross_v = g.input(f"cross_v.{layer}", TEXT_LEN, 1, DIM)
        keys = g.op("Concat", g.shape(g.op("Gather", past_k, slots, axis=0), -1, DIM), k, axis=0)
        values = g.op("Concat", g.shape(g.op("Gather", past_v, slots, axis=0), -1, DIM), v, axis=0)
        scores = g.op("Add", g.op("MatMul", q, g.move(keys, 1, 0)), bias)
        x = g.op("Add", x, g.op("MatMul", g.op("Softmax", scores, axis=-1), values))
        means = g.shape(g.op("Gather", past_kmean, slots, axis=0), past, DIM)
        means = g.op("Mul", means, g.shape(present, past, 1))
        x = g.op("Add", x, g.op("Tanh", g.mean(means, 0)))
        cross = g.op("MatMul", x, g.move(g.shape(cross_k, TEXT_LEN, DIM), 1, 0))
        x = g.op("Add", x, g.op("MatMul", g.op("Softmax", cross, axis=-1), g.shape(cross_v, TEXT_LEN, DIM)))
    if not clean:
        flow = g.op("Tanh", g.op("MatMul", x, g.const(rng.normal(size=(DIM, DIM)) / 2)))
        flow = g.shape(
            g.move(g.shape(flow, frames, 2, 2, 2, 2, CHANNELS), 5, 0, 1, 3, 2, 4),
            CHANNELS,
            frames,
            SIZE,
            SIZE,
        )
        sigma = g.op("Gather", g.const(rows), step)
        following = g.op("Gather", g.const(followed_by), step)
        x0 = g.op("Sub", latent, g.op("Mul", sigma, flow))
        kept = g.op("Mul", g.op("Sub", g.const(1.0), following), x0)
        g.output(
            "next_latent", g.op("Add", kept, g.op("Mul", following, noise)), CHANNELS, frames, SIZE, SIZE
        )
        g.output("x0", x0, CHANNELS, frames, SIZE, SIZE)
    for layer, (k, v, kmean) in enumerate(results):
        g.output(f"k.{layer}", g.shape(k, tokens, 1, DIM), tokens, 1, DIM)
        g.output(f"v.{layer}", g.shape(v, tokens, 1, DIM), tokens, 1, DIM)
        g.output(f"kmean.{layer}", kmean, frames, 1, 1, DIM)
    return g


def conditioner(rng: np.random.Generator) -> Graph:
    g = Graph()
    text = g.input("text", TEXT_LEN, TEXT_DIM)
    for stem in ("cross_k", "cross_v"):
        for layer in range(LAYERS):
            value = g.op("MatMul", text, g.const(rng.normal(size=(TEXT_DIM, DIM))))
            g.output(f"{stem}.{layer}", g.shape(value, TEXT_LEN, 1, DIM), TEXT_LEN, 1, DIM)
    return g


def text_layer() -> Graph:
    """Hidden + attention(hidden * norm1) + gated FFN(that * norm2); see `encode` in test_text.py."""
    g = Graph()
    hidden, mask = g.input("hidden", TEXT_LEN, TEXT_DIM), g.input("mask", TEXT_LEN)
    shapes = {"norm1": (TEXT_DIM,), "rel_bias": (32, 1), "norm2": (TEXT_DIM,)}
    shapes |= dict.fromkeys("qkvo", (TEXT_DIM, TEXT_DIM))
    shapes |= {"gate": (FFN, TEXT_DIM), "fc1": (FFN, TEXT_DIM), "fc2": (TEXT_DIM, FFN)}
    order = ("norm1", "q", "k", "v", "o", "rel_bias", "norm2", "gate", "fc1", "fc2")
    weights = {name: g.input(name, *shapes[name]) for name in order}

    def linear(x: str, name: str) -> str:
        return g.op("MatMul", x, g.move(weights[name], 1, 0))

    x = g.op("Mul", hidden, weights["norm1"])
    scores = g.op("MatMul", linear(x, "q"), g.move(linear(x, "k"), 1, 0))
    scores = g.op("Add", scores, g.mean(weights["rel_bias"], 0, 1, keep=0))
    scores = g.op("Add", scores, g.op("Mul", g.op("Sub", mask, g.const(1.0)), g.const(1e9)))
    x = g.op("Add", hidden, linear(g.op("MatMul", g.op("Softmax", scores, axis=-1), linear(x, "v")), "o"))
    y = g.op("Mul", x, weights["norm2"])
    y = linear(g.op("Mul", g.op("Tanh", linear(y, "gate")), linear(y, "fc1")), "fc2")
    g.output("hidden_out", g.op("Add", x, y), TEXT_LEN, TEXT_DIM)
    return g


def decoder(*, first: bool) -> Graph:
    """Pixels from the latent and, after the first frame, from caches of earlier ones."""
    g = Graph()
    latent = g.input("latent", CHANNELS, 1, SIZE, SIZE)
    if first:
        base, cache = latent, g.const(np.zeros(_CACHES["cache.0"]))
    else:
        cache = g.input("cache.0", *_CACHES["cache.0"])
        previous = g.input("cache.1", *_CACHES["cache.1"])
        history = g.op("Add", g.mean(cache, 1), g.op("Mul", previous, g.const(0.25)))
        base = g.op("Add", latent, g.op("Mul", history, g.const(0.5)))
    count = 1 if first else 4
    gray = g.shape(g.mean(base, 0, keep=0), 1, SIZE, 1, SIZE, 1, 1)
    tint = g.const(np.linspace(20, 60, count * 3).reshape(count, 1, 1, 1, 1, 3))
    pixels = g.op("Add", g.op("Mul", gray, tint), g.const(128.0))
    pixels = g.op("Expand", pixels, g.const([count, SIZE, 8, SIZE, 8, 3], np.int64))
    pixels = g.op("Clip", g.shape(pixels, count, PIXELS, PIXELS, 3), g.const(0.0), g.const(255.0))
    g.output("frames", g.op("Cast", pixels, to=TensorProto.UINT8), count, PIXELS, PIXELS, 3, dtype="uint8")
    newest = g.op("Gather", cache, g.const([1], np.int64), axis=1)
    g.output("cache_out.0", g.op("Concat", newest, latent, axis=1), *_CACHES["cache.0"])
    if not first:
        g.output("cache_out.1", base, *_CACHES["cache.1"])
    return g


def encoder(*, first: bool) -> Graph:
    """A latent from the mean of pixels and, after the first frame, from the latent before it."""
    g = Graph()
    count = 1 if first else 4
    video = g.input("video", count, 3, PIXELS, PIXELS)
    gray = g.mean(g.shape(video, count * 3, SIZE, 8, SIZE, 8), 0, 2, 4, keep=0)
    latent = g.op(
        "Mul", g.shape(gray, 1, 1, SIZE, SIZE), g.const(np.linspace(1, 2, CHANNELS)[:, None, None, None])
    )
    if not first:
        latent = g.op("Sub", latent, g.op("Mul", g.input("cache.0", CHANNELS, 1, SIZE, SIZE), g.const(0.25)))
    g.output("latent", latent, CHANNELS, 1, SIZE, SIZE)
    g.output("cache_out.0", latent, CHANNELS, 1, SIZE, SIZE)
    return g


def text_weights(layers: int = 2) -> dict[str, np.ndarray]:
    """Weights of the text encoder, float32."""
    rng = np.random.default_rng(3)
    weights = {"token_embedding": rng.normal(size=(len(VOCAB), TEXT_DIM)), "norm": rng.normal(size=TEXT_DIM)}
    for layer in range(layers):
        for spec in text_layer().inputs[2:]:
            weights[f"layers.{layer}.{spec.name}"] = rng.normal(size=spec.shape) / 4
    return {name: value.astype(np.float32) for name, value in weights.items()}


def build_bundle(
    folder: Path,
    *,
    window_frames: int | None = 8,
    sink_frames: int = 1,
    sink_positions: str = "window",
    table_frames: int = 21,
    fail_at_chunk: int | None = None,
    with_encoder: bool = False,
    chunk_frames: int = CHUNK,
    sigmas: tuple[float, ...] = SIGMAS,
    first_sigmas: tuple[float, ...] = (),
    clean_forward: bool = True,
) -> Manifest:
    """Write a complete bundle into `folder` and return its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    past = (window_frames or table_frames) - chunk_frames
    schedule: dict[str, Any] = {"frames": chunk_frames, "sigmas": sigmas, "first_sigmas": first_sigmas}
    failing = {"fail_at_chunk": fail_at_chunk}
    graphs = {
        "step": transformer(np.random.default_rng(0), past, clean=False, **failing, **schedule),
        "clean": transformer(np.random.default_rng(0), past, clean=True, **schedule),
        "conditioner": conditioner(np.random.default_rng(1)),
        "text_encoder": text_layer(),
        "vae_first": decoder(first=True),
        "vae_next": decoder(first=False),
    }
    if with_encoder:
        graphs |= {"vae_encode_first": encoder(first=True), "vae_encode_next": encoder(first=False)}
    components = {name: graph.save(folder / f"{name}.onnx") for name, graph in graphs.items()}
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCAB)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file(text_weights(), folder / "text_encoder.safetensors")
    values = [0.0] + [0.5] * (table_frames // chunk_frames - 1)
    files = [component.file for component in components.values()]
    manifest = Manifest.model_validate(
        {
            "name": "handmade",
            "created": "2026-01-01T00:00:00+00:00",
            "target": {"name": "cpu"},
            "backend": "onnxruntime",
            "precision": "fp32",
            "variant": "short" if window_frames is None else "long",
            "status": "built",
            "model": {
                "preset": "handmade",
                "layers": LAYERS,
                "heads": 1,
                "head_dim": DIM,
                "dim": DIM,
                "latent_channels": CHANNELS,
                "latent_height": SIZE,
                "latent_width": SIZE,
                "patch": [1, 2, 2],
                "chunk_frames": chunk_frames,
                "frame_tokens": FRAME_TOKENS,
                "rope": {"theta": 10000.0, "dims_thw": [4, 2, 2]},
                "video_height": PIXELS,
                "video_width": PIXELS,
                "fps": 16,
            },
            "schedule": {
                "timesteps": [1000 * sigma for sigma in sigmas],
                "sigmas": sigmas,
                "first_timesteps": [1000 * sigma for sigma in first_sigmas],
                "first_sigmas": first_sigmas,
                "clean_forward": clean_forward,
            },
            "attention": {
                "block_q": 4,
                "block_k": 4,
                "keep_frames": 6,
                "sink_frames": 1,
                "near_frames": 2,
                "scale": DIM**-0.5,
            },
            "sparsity": {
                "table_frames": table_frames,
                "target": 0.5,
                "base": 0.6,
                "values": values,
                "keep_q20": [int((1 - value) * (1 << 20)) for value in values],
            },
            "cache": {
                "window_frames": window_frames,
                "max_past_frames": past,
                "sink_frames": sink_frames,
                "sink_positions": sink_positions,
            },
            "text": {
                "encoder": "umt5",
                "text_len": TEXT_LEN,
                "dim": TEXT_DIM,
                "vocab": len(VOCAB),
                "layers": 2,
                "heads": 1,
                "eps": 1e-6,
                "tokenizer": "tokenizer.json",
                "weights": "text_encoder.safetensors",
                "pad_id": 0,
                "eos_id": 1,
            },
            "vae": {
                "caches": [{"name": n, "shape": s, "dtype": "float32"} for n, s in _CACHES.items()],
                "temporal_factor": 4,
                "spatial_factor": 8,
            },
            "components": {name: component.model_dump() for name, component in components.items()},
            "files": [
                file_entry(folder, name).model_dump()
                for name in (*files, "tokenizer.json", "text_encoder.safetensors")
            ],
            "provenance": {
                "checkpoint": {"random": 0},
                "tools": {"onnx": onnx.__version__},
                "command": "by hand",
            },
        }
    )
    write_manifest(folder, manifest)
    return manifest


def edit_manifest(folder: Path, edit: object) -> None:
    """Apply `edit(dict)` to a bundle's manifest, unchecked."""
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    edit(raw)  # type: ignore[operator]
    path.write_text(json.dumps(raw))


def relist(folder: Path, *changed: str) -> Path:
    """List files of a bundle anew, with the sizes and hashes that they have now."""

    def edit(raw: dict[str, Any]) -> None:
        entries = {entry["path"]: entry for entry in raw["files"]}
        entries |= {name: file_entry(folder, name).model_dump() for name in changed}
        raw["files"] = list(entries.values())

    edit_manifest(folder, edit)
    return folder


def add_golden(folder: Path) -> Path:
    """Give a bundle golden vectors."""
    from export.parts.golden import write_golden
    from lightforcing_ref.schedule import FlowSchedule

    manifest = load_bundle(folder).manifest
    parts = {name: folder / str(component.file) for name, component in manifest.components.items()}
    files, section = write_golden(folder, parts, FlowSchedule.warped())
    entries = (*manifest.files, *(file_entry(folder, file) for file in files))
    write_manifest(folder, manifest.model_copy(update={"files": entries, "golden": section}))
    return folder
