"""Bundles for a GPU as the exporter describes them, with files of the right names: enough for everything that opens no
engine. Kernel indexes come from the kernels' own table; the cubins are placeholders.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from pydantic import TypeAdapter
from safetensors.numpy import save_file

from export.parts.kernels import SELECTS, write_tables
from export.request.methods import operator_of
from export.request.selection import selection_tables
from lightforcing_ref.sparsity import BlockGeometry
from plugins import maps
from plugins.compile import kernels as kernel_build
from plugins.kernels import specs
from runtime.bundle import AttentionPolicy, Manifest, file_entry, images, write_manifest

LAYERS, HEADS, HEAD_DIM, CHUNK, FRAME_TOKENS, BLOCK = 3, 2, 64, 3, 64, 32
DIM, FFN, TOKENS = HEADS * HEAD_DIM, 256, CHUNK * FRAME_TOKENS
LATENT = (16, 16, 16)
TEXT_LEN, TEXT_DIM, VOCAB, TEXT_LAYERS = 64, 64, 40, 2
CACHES = ((8, 2, 16, 16), (4, 1, 32, 32))
STEPS = 4
ACTIVATIONS = {
    "first": 1 << 12,
    "layer": 1 << 16,
    "last": 1 << 15,
    "vae_next": 1 << 14,
    "text_encoder": 1 << 13,
}
LAUNCHES = {"first": 4, "layer": 17, "last": 18, "conditioner": 10, "vae_first": 113, "vae_next": 118}
CACHE_KERNELS = ("prepare", "commit", "rope_sink")
KERNELS = (*CACHE_KERNELS, "score", "select", "attend")


def tensor(name: str, *shape: int | str, dtype: str = "bfloat16") -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape)}


def f32(name: str, *shape: int | str) -> dict[str, Any]:
    return tensor(name, *shape, dtype="float32")


def i32(name: str, *shape: int) -> dict[str, Any]:
    return tensor(name, *shape, dtype="int32")


def zeros(dtype: str, shape: Iterable[int]) -> np.ndarray:
    return np.zeros(tuple(shape), dtype=getattr(ml_dtypes, dtype, dtype))


def layer_weights() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Weight inputs of the `layer` engine; the exporter hands biases in as rows."""
    return {
        "o.weight": ("float8_e4m3fn", (DIM, DIM)),
        "o.scale": ("float32", (1, DIM)),
        "ffn.weight": ("bfloat16", (FFN, DIM)),
        "modulation": ("bfloat16", (STEPS + 1, 6, DIM)),
    }


def is_linear(method: dict[str, Any] | None) -> bool:
    """Whether a method has SLA's linear branch, whose projections are weights of attention."""
    return bool((method or {}).get("linear"))


def components(past: int, *, embedded: bool, kept: int = 0, linear: bool = False) -> dict[str, Any]:
    """`kept`: frames of a persistent set."""
    latent, head = (LATENT[0], CHUNK, *LATENT[1:]), (HEADS, HEAD_DIM)
    blocks = FRAME_TOKENS // BLOCK
    layers = range(LAYERS)
    projected = [tensor(name, TOKENS, *head) for name in ("q", "k", "v")]
    means = [f32(name, CHUNK, blocks, *head) for name in ("q_mean", "k_mean")]
    pool = [tensor(name, "slots", FRAME_TOKENS, *head) for name in ("past_k", "past_v")]
    pool.append(f32("past_kmean", "slots", blocks, *head))
    cross = [tensor(name, TEXT_LEN, *head) for name in ("cross_k", "cross_v")]
    projection = [tensor("linear_weight", HEAD_DIM, HEAD_DIM), tensor("linear_bias", HEAD_DIM)] * linear
    scalars = [i32("chunk"), i32("frame_slots", past)]
    angles = [f32(name, TOKENS, HEAD_DIM // 2) for name in ("cos", "sin")]

    def of(spec: dict[str, Any], layer: int) -> dict[str, Any]:
        return {**spec, "name": f"{spec['name']}.{layer}"}

    def weights(shared: bool) -> list[dict[str, Any]]:
        return [tensor(n, *s, dtype=d) for n, (d, s) in layer_weights().items()] if shared else []

    per_layer = [of(spec, i) for i in layers for spec in (*cross, *pool)]
    rope = [{**spec, "name": f"rope_{spec['name']}"} for spec in angles]
    keys = [of({**spec, "name": name}, i) for i in layers for name, spec in
            (("k", projected[1]), ("v", projected[2]), ("kmean", means[1]))]  # fmt: skip
    stream, qkv = tensor("x_out", TOKENS, DIM), tensor("qkv", TOKENS, 3 * DIM)
    between = [tensor("x", TOKENS, DIM), tensor("attention_out", TOKENS, *head), i32("step"), *cross]
    first_weights = [] if embedded else [tensor("patch.weight", DIM, 64)]
    last_weights = [] if embedded else [tensor("head.weight", 64, DIM), f32("head.bias", 1, 64)]
    parts = {
        "step": ([f32("latent", *latent), f32("noise", *latent), i32("step"), *scalars, *rope, *per_layer],
                 [f32("next_latent", *latent), f32("x0", *latent), *keys]),
        "clean": ([f32("latent", *latent), *scalars, *rope, *per_layer], keys),
        "first": ([f32("latent", *latent), i32("step"), *first_weights], [stream, qkv]),
        "last": ([*between, f32("latent", *latent), f32("noise", *latent), *last_weights],
                 [f32("next_latent", *latent), f32("x0", *latent)]),
        "qk_prepare": ([qkv, tensor("bias", 3 * DIM), tensor("norm_q", DIM), tensor("norm_k", DIM), *angles],
                       [*projected, *means]),
        "attention": ([*projected, *means, *pool, *scalars, *projection], [tensor("out", TOKENS, *head)]),
        "conditioner": ([f32("text", TEXT_LEN, TEXT_DIM)], [of(spec, i) for i in layers for spec in cross]),
        "text_encoder": ([tensor("hidden", TEXT_LEN, TEXT_DIM), tensor("mask", TEXT_LEN), *text_weights()],
                         [tensor("hidden_out", TEXT_LEN, TEXT_DIM)]),
        "vae_first": ([f32("latent", LATENT[0], 1, *LATENT[1:])], [video(1), *caches("cache_out")[:1]]),
        "vae_next": ([f32("latent", LATENT[0], 1, *LATENT[1:]), *caches("cache")],
                     [video(4), *caches("cache_out")]),
    }  # fmt: skip
    for i in range(LAYERS - 1) if embedded else (0,):
        name = f"layer.{i}" if embedded else "layer"
        parts[name] = ([*between, *weights(not embedded)], [stream, qkv])
    if kept:
        for name in ("step", "clean", "attention"):
            parts[name][0].append(i32("pinned"))
        for name in ("step", "clean"):
            parts[name] = (
                parts[name][0],
                [*parts[name][1], *(of({**means[0], "name": "qmean"}, i) for i in layers)],
            )
        left = [
            {**s, "name": s["name"].replace("past", "kept"), "shape": [kept, *s["shape"][1:]]} for s in pool
        ]
        parts["persist"] = ([*means, *pool, scalars[1], i32("contest", 2)], left)
    virtual = ("step", "clean", "qk_prepare", "attention", "persist")
    return {
        name: {
            "file": None if name in virtual else f"{name}.engine",
            "inputs": inputs,
            "outputs": outputs,
            "cost": None if name in virtual else cost(name.split(".")[0]),
        }
        for name, (inputs, outputs) in parts.items()
    }


def cost(name: str) -> dict[str, Any]:
    return {
        "launches": LAUNCHES.get(name, 1),
        "activation_bytes": ACTIVATIONS.get(name, 0),
        "gemms": {},
        "seconds": 0.1,
        "peak_bytes": 1,
    }


def caches(stem: str) -> list[dict[str, Any]]:
    return [tensor(f"{stem}.{i}", *shape, dtype="float16") for i, shape in enumerate(CACHES)]


def video(frames: int) -> dict[str, Any]:
    return tensor("frames", frames, 128, 128, 3, dtype="uint8")


def text_weights() -> list[dict[str, Any]]:
    square, wide = (TEXT_DIM, TEXT_DIM), (128, TEXT_DIM)
    shapes = {
        "norm1": (TEXT_DIM,),
        **dict.fromkeys("qkvo", square),
        "rel_bias": (32, 4),
        "norm2": (TEXT_DIM,),
    }
    shapes |= {"gate": wide, "fc1": wide, "fc2": wide[::-1]}
    return [tensor(name, *shape) for name, shape in shapes.items()]


def stored_weights(*, embedded: bool, linear: bool = False) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The weights file's tensors, and the manifest's bindings."""
    tensors, prepare, layers, attention = {}, [], [], []
    for i in range(LAYERS):
        for name, size in (("bias", 3 * DIM), ("norm_q", DIM), ("norm_k", DIM)):
            tensors[f"blocks.{i}.{name}"] = zeros("bfloat16", (size,))
        prepare.append({name: f"blocks.{i}.{name}" for name in ("bias", "norm_q", "norm_k")})
        if linear:
            tensors[f"blocks.{i}.linear_weight"] = zeros("bfloat16", (HEAD_DIM, HEAD_DIM))
            tensors[f"blocks.{i}.linear_bias"] = zeros("bfloat16", (HEAD_DIM,))
            attention.append({name: f"blocks.{i}.{name}" for name in ("linear_weight", "linear_bias")})
    first, last = {}, {}
    if not embedded:
        for i in range(LAYERS - 1):
            for name, (dtype, shape) in layer_weights().items():
                # Biases are stored as vectors.
                tensors[f"blocks.{i}.{name}"] = zeros(dtype, [size for size in shape if size != 1])
            layers.append({name: f"blocks.{i}.{name}" for name in layer_weights()})
        first, last = {"patch.weight": "patch"}, {"head.weight": "head", "head.bias": "head_bias"}
        tensors["patch"], tensors["head"] = zeros("bfloat16", (DIM, 64)), zeros("bfloat16", (64, DIM))
        tensors["head_bias"] = zeros("float32", (64,))
    else:
        layers = [{} for _ in range(LAYERS - 1)]
    segments = {"weights": "transformer.safetensors", "first": first, "layers": layers, "last": last}
    return tensors, {**segments, "prepare": prepare, "attention": attention}


def write_kernels(folder: Path, arch: int = 120, kernels: Iterable[str] = KERNELS) -> list[str]:
    """An index with every specialisation of `kernels`, as the build writes it; files relative to `folder`'s parent."""
    target = folder / f"sm_{arch}"
    target.mkdir(parents=True)
    listed = []
    for variant in specs.variants(arch):
        if variant.kernel not in kernels:
            continue
        cubin = b"\x7fELF" + variant.name.encode()
        entry: Any = {
            "cubin": base64.b64encode(cubin).decode(),
            "entry": variant.kernel,
            "target": f"sm_{arch}a",
            "threads": 32 * variant.num_warps,
            "shared_memory": 40_000,
            "registers": 128,
            "stack": 0,
            "spill_stores": 0,
            "spill_loads": 0,
        }
        image = kernel_build._image(variant, entry, cubin, hashlib.sha256(b"source").hexdigest())
        (target / image.file).write_bytes(cubin)
        listed.append(image)
    index = images.ImageSet(
        arch=f"sm_{arch}", target=f"sm_{arch}a", driver=570, compiler={"triton": "3"}, images=tuple(listed)
    )
    (target / "kernels.json").write_text(index.model_dump_json())
    return [f"{folder.name}/sm_{arch}/{path.name}" for path in sorted(target.iterdir())]


def selection_of(method: dict[str, Any], past: int) -> tuple[tuple[str, ...], Sequence[maps.Tables]]:
    """The kernels that select under a method, and its tables by turn."""
    policy = TypeAdapter(AttentionPolicy).validate_python(method)
    geometry = BlockGeometry(FRAME_TOKENS, BLOCK, BLOCK)
    return SELECTS[operator_of(policy)], selection_tables(policy, geometry, 8, past, CHUNK)


def engine(content: str) -> bytes:
    """What looks like an engine of TensorRT-RTX from outside: the letters it begins with, and its size."""
    return b"vtrt".ljust(16, b"\0") + (24 + len(content)).to_bytes(8, "little") + content.encode()


def build_device_bundle(
    folder: Path,
    *,
    sink_positions: str = "window",
    embedded: bool = False,
    sinks: int = 3,
    whole: bool = False,
    method: dict[str, Any] | None = None,
) -> Path:
    """Write a bundle for an RTX 5090 into `folder`; a `whole` one has engines for the step, as with the plugin.

    `method` is the table `[attention]` of a variant.
    """
    folder.mkdir(parents=True)
    past = 6
    tensors, segments = stored_weights(embedded=embedded, linear=is_linear(method))
    save_file(tensors, folder / "transformer.safetensors")
    text = {
        "token_embedding": zeros("bfloat16", (VOCAB, TEXT_DIM)),
        "norm": zeros("bfloat16", (TEXT_DIM,)),
    }
    for layer in range(TEXT_LAYERS):
        for spec in text_weights():
            text[f"layers.{layer}.{spec['name']}"] = zeros("bfloat16", tuple(spec["shape"]))
    save_file(text, folder / "text.safetensors")
    (folder / "tokenizer.json").write_text("{}")
    kept = (method or {}).get("persistent_frames", 0)
    parts = components(past, embedded=embedded, kept=kept, linear=is_linear(method))
    if whole:
        for name in ("first", "layer", "last", "qk_prepare", "attention"):
            del parts[name]
        for name in ("step", "clean"):
            parts[name] |= {"file": f"{name}.engine", "cost": cost(name)}
    files = ["transformer.safetensors", "text.safetensors", "tokenizer.json"]
    for part in parts.values():
        if part["file"] is not None:
            (folder / part["file"]).write_bytes(engine(part["file"]))
            files.append(part["file"])
    selects, turns = selection_of(method or {"policy": "hsa"}, past)
    files += write_kernels(folder / "kernels", kernels=(*CACHE_KERNELS, *selects))
    tables = write_tables(folder, turns)
    files += [tables["tables"]] if tables else []
    sigmas = (1.0, 0.9375, 0.8333, 0.625, 0.0)
    manifest = {
        "name": "device",
        "created": "2026-01-01T00:00:00+00:00",
        "target": {"name": "rtx5090", "compute_capability": "12.0"},
        "backend": "tensorrt-rtx",
        "precision": "fp8",
        "library": {"name": "tensorrt-rtx", "version": "1.7.1.116"},
        "variant": "long",
        "status": "built, not executed",
        "model": {
            "preset": "tiny",
            "layers": LAYERS,
            "heads": HEADS,
            "head_dim": HEAD_DIM,
            "dim": DIM,
            "latent_channels": LATENT[0],
            "latent_height": LATENT[1],
            "latent_width": LATENT[2],
            "patch": [1, 2, 2],
            "chunk_frames": CHUNK,
            "frame_tokens": FRAME_TOKENS,
            "rope": {"theta": 10000.0, "dims_thw": [24, 20, 20]},
            "video_height": 128,
            "video_width": 128,
            "fps": 16,
        },
        "schedule": {"timesteps": [1000 * sigma for sigma in sigmas], "sigmas": sigmas},
        "attention": {
            "block_q": BLOCK,
            "block_k": BLOCK,
            "keep_frames": 6,
            "sink_frames": sinks,
            "near_frames": 1,
            "scale": HEAD_DIM**-0.5,
            "method": method or {"policy": "hsa"},
        },
        "sparsity": {"table_frames": 9, "target": 0.5, "base": 0.6, "values": [0.0, 0.5, 0.5],
                     "keep_q20": [1 << 20, 1 << 19, 1 << 19]},
        "cache": {
            "window_frames": past + CHUNK,
            "max_past_frames": past,
            "sink_frames": sinks,
            "sink_positions": sink_positions,
        },
        "text": {
            "encoder": "umt5",
            "text_len": TEXT_LEN,
            "dim": TEXT_DIM,
            "vocab": VOCAB,
            "layers": TEXT_LAYERS,
            "heads": 4,
            "eps": 1e-6,
            "tokenizer": "tokenizer.json",
            "weights": "text.safetensors",
            "pad_id": 0,
            "eos_id": 1,
        },
        "vae": {
            "caches": [{"name": f"cache.{i}", "shape": s, "dtype": "float16"} for i, s in enumerate(CACHES)],
            "temporal_factor": 4,
            "spatial_factor": 8,
        },
        "components": parts,
        "segments": None if whole else segments,
        "kernels": {"folder": "kernels", "arch": "sm_120", "driver": 570, **tables},
        "files": [file_entry(folder, name).model_dump() for name in files],
        "provenance": {"checkpoint": {"random": 0}, "tools": {}, "command": "test"},
    }  # fmt: skip
    write_manifest(folder, Manifest.model_validate(manifest))
    return folder
