"""What a bundle holds, in figures: memory, launches, what attention keeps, errors of quantization, its verdict."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from export.errors import InputError
from export.estimate.selection import own_share, visible_blocks
from export.request.targets import load_target
from lightforcing_ref.sparsity import BlockGeometry
from runtime.bundle import Bundle, Manifest
from runtime.program import KernelLibrary, attention_launches, plan_buffers
from runtime.verify import VERDICT_NAME, Verdict

__all__ = [
    "bundle_document",
    "compiled_kernels",
    "forward_launches",
    "memory_parts",
    "peak_memory",
    "quantized_kinds",
    "recorded_verdict",
    "sparsity_by_chunk",
    "target_memory",
]


def bundle_document(bundle: Bundle) -> dict[str, object]:
    manifest, kernels, verdict = bundle.manifest, compiled_kernels(bundle), recorded_verdict(bundle)
    memory = plan_buffers(manifest, 1)
    return {
        **manifest.model_dump(mode="json"),
        "bytes": {
            "files": sum(entry.bytes for entry in manifest.files),
            "buffers_shared": memory.total_bytes - memory.session_bytes,
            "buffers_per_session": memory.session_bytes,
        },
        "memory": {
            "parts": memory_parts(manifest),
            "peak": peak_memory(manifest),
            "target": target_memory(manifest),
        },
        "launches_per_forward": forward_launches(manifest),
        "sparsity_per_chunk": sparsity_by_chunk(manifest),
        "quantization_by_kind": quantized_kinds(manifest),
        "verdict": None if verdict is None else verdict.model_dump(mode="json"),
        "kernel_images": None if kernels is None else kernels.index.model_dump(mode="json"),
    }


def _engine_bytes(manifest: Manifest) -> int:
    """Files that are loaded and stay: all but the text encoder's weights, which are streamed, and golden vectors."""
    apart = {manifest.text.weights, manifest.golden.file if manifest.golden else None}
    return sum(entry.bytes for entry in manifest.files if entry.path not in apart)


def memory_parts(manifest: Manifest) -> dict[str, int]:
    plan = plan_buffers(manifest, 1)
    parts = {
        "engines and weights": _engine_bytes(manifest),
        "activations": sum(b.nbytes for b in plan.work if b.name.startswith("scratch.")),
        "between engines": sum(b.nbytes for b in plan.work if not b.name.startswith("scratch.")),
        "buffers of a chunk": sum(b.nbytes for b in plan.shared),
        "keys and values of a session": sum(b.nbytes for b in plan.pool),
        "the rest of a session": sum(b.nbytes for b in plan.session),
    }
    return {name: size for name, size in parts.items() if size}


def peak_memory(manifest: Manifest) -> int:
    return sum(memory_parts(manifest).values())


def target_memory(manifest: Manifest) -> int | None:
    """Bytes of the target's memory; None for a machine's own, or a target that is not shipped."""
    try:
        size = load_target(manifest.target.name).memory_gib
    except InputError:
        return None
    return None if size is None else int(size * 2**30)


def forward_launches(manifest: Manifest) -> dict[str, int] | None:
    """GPU launches of one denoising forward; None where the engines do not tell."""
    costs = {name: c.cost for name, c in manifest.components.items() if c.cost}
    layers = manifest.model.layers
    if manifest.segments is None:
        return {"engines": costs["step"].launches, "kernels": 0} if "step" in costs else None
    runs = ["layer"] * (layers - 1) if "layer" in costs else [f"layer.{i}" for i in range(layers - 1)]
    needed = ["first", *runs, "last"]
    if any(name not in costs for name in needed):
        return None
    kernels = 0
    if manifest.kernels is not None:  # one prepares queries, keys and values
        kernels = sum(1 + len(attention_launches(manifest, "bfloat16", layer)) for layer in range(layers))
    return {"engines": sum(costs[name].launches for name in needed), "kernels": kernels}


def sparsity_by_chunk(manifest: Manifest) -> list[dict[str, Any]]:
    sparsity, model, attention = manifest.sparsity, manifest.model, manifest.attention
    geometry = BlockGeometry(model.frame_tokens, attention.block_q, attention.block_k)
    rows = []
    for chunk in range(max(len(sparsity.values), sparsity.table_frames // model.chunk_frames)):
        value = sparsity.values[min(chunk, len(sparsity.values) - 1)]
        frames = min((chunk + 1) * model.chunk_frames, manifest.window_frames)
        total = frames * manifest.key_blocks
        row: dict[str, Any] = {"chunk": chunk, "sparsity": value, "of": total, "assumption": None}
        own = own_share(
            attention.method, geometry, model.token_grid, frames - model.chunk_frames, model.chunk_frames
        )
        if own is not None:
            row |= {"sparsity": 1 - own.value, "kept": round(own.value * total), "assumption": own.assumption}
        else:
            past, current = frames - model.chunk_frames, model.chunk_frames
            row["kept"] = visible_blocks(
                attention.method,
                sparsity.keep_q20,
                chunk,
                manifest.key_blocks,
                manifest.cache.sink_frames,
                past,
                current,
            )
            if manifest.persistent_frames:  # its budget is one of recent blocks
                row["sparsity"] = 1 - row["kept"] / total
        rows.append(row)
    return rows


def quantized_kinds(manifest: Manifest) -> list[dict[str, Any]] | None:
    """The block linears by kind and format, with the range of their errors."""
    quantization = manifest.quantization
    if quantization is None:
        return None
    groups: dict[tuple[str, str], list[str]] = {}
    for name in (*quantization.formats, *quantization.skipped):
        kind = name.split(".", 2)[-1] if name.startswith("blocks.") else name
        groups.setdefault((kind, quantization.formats.get(name, "bf16, skipped")), []).append(name)
    rows = []
    for (kind, format), names in groups.items():
        errors = [quantization.errors[name] for name in names if name in quantization.errors]
        row = {"kind": kind, "format": format, "layers": len(names)}
        rows.append({**row, "least": min(errors, default=None), "largest": max(errors, default=None)})
    return rows


def compiled_kernels(bundle: Bundle) -> KernelLibrary | None:
    """The compiled kernels, verified; None where the bundle has none."""
    kernels, capability = bundle.manifest.kernels, bundle.manifest.target.compute_capability
    if kernels is None or capability is None:
        return None
    major, _, minor = capability.partition(".")
    return KernelLibrary.of(bundle, (int(major), int(minor)))


def recorded_verdict(bundle: Bundle) -> Verdict | None:
    """The verdict recorded beside this very manifest, on whatever machine; None if there is none."""
    try:
        verdict = Verdict.model_validate_json((bundle.root / VERDICT_NAME).read_bytes())
    except (OSError, ValidationError):
        return None
    return verdict if verdict.manifest == bundle.digest else None
