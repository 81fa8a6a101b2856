"""What a bundle holds, as tables or as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from lightforcing_ref.sparsity import kept_blocks
from runtime.bundle import Bundle, Component, Manifest, RandomInit, load_bundle
from runtime.memory import plan_buffers

__all__ = ["inspect_bundle"]


def inspect_bundle(path: Path, *, as_json: bool = False) -> None:
    """Print the contents of the bundle at `path`, whose files are verified first.

    Raises:
        BundleError: the bundle is missing, incomplete, changed, or of a newer schema.
    """
    bundle = load_bundle(path)
    if as_json:
        print(json.dumps(_document(bundle), indent=1))
        return
    console = Console()
    for table in (
        _summary(bundle),
        _components(bundle.manifest),
        _sparsity(bundle.manifest),
        _files(bundle.manifest),
    ):
        console.print(table)


def _document(bundle: Bundle) -> dict[str, object]:
    memory = plan_buffers(bundle.manifest, 1)
    return {
        **bundle.manifest.model_dump(mode="json"),
        "bytes": {
            "files": sum(entry.bytes for entry in bundle.manifest.files),
            "buffers_shared": memory.total_bytes - memory.session_bytes,
            "buffers_per_session": memory.session_bytes,
        },
    }


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"


def _summary(bundle: Bundle) -> Table:
    manifest, memory = bundle.manifest, plan_buffers(bundle.manifest, 1)
    model, cache, attention = manifest.model, manifest.cache, manifest.attention
    shared = memory.total_bytes - memory.session_bytes
    size = f"{model.video_width}x{model.video_height}, {model.fps} FPS"
    origin = manifest.provenance.checkpoint
    weights = (
        f"random, seed {origin.random}"
        if isinstance(origin, RandomInit)
        else f"{origin.source} ({origin.sha256[:12]})"
    )
    table = Table(box=box.SIMPLE_HEAD, show_header=False, title=manifest.name, title_justify="left")
    rows = {
        "target": manifest.target.name
        + (f" ({manifest.target.compute_capability})" if manifest.target.compute_capability else ""),
        "backend": f"{manifest.backend} in {manifest.precision}",
        "status": manifest.status,
        "model": f"{model.preset}: {model.layers} layers of {model.heads} x {model.head_dim}",
        "video": f"{size}, {model.frame_tokens} tokens per latent frame",
        "attention": (
            f"blocks of {attention.block_q} x {attention.block_k}, keep {attention.keep_frames} frames "
            f"(sink {attention.sink_frames}, near {attention.near_frames})"
        ),
        "cache": f"window {manifest.window_frames} frames, sink {cache.sink_frames} ({cache.sink_positions})",
        "weights": weights,
        "memory": f"{_gib(memory.session_bytes)} per session, {_gib(shared)} shared buffers",
        "built": f"{manifest.created} by {manifest.provenance.command or 'the API'}",
        "tools": ", ".join(f"{name} {version}" for name, version in manifest.provenance.tools.items()),
    }
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/]", value)
    return table


def _tensors(component: Component, kind: str) -> str:
    """Inputs or outputs, those of all layers in one: `past_k.0..5 [slots, 64, 2, 64]`."""
    groups: dict[tuple[str, str], list[str]] = {}
    for spec in component.inputs if kind == "inputs" else component.outputs:
        stem, _, index = spec.name.rpartition(".")
        shape = f"{spec.dtype} [{', '.join(map(str, spec.shape))}]"
        groups.setdefault((stem or spec.name, shape), []).append(index if stem else "")
    lines = []
    for (stem, shape), indices in groups.items():
        layers = f".{indices[0]}" if indices[0] else ""
        lines.append(f"{stem}{layers}{f'..{indices[-1]}' if len(indices) > 1 else ''} {shape}")
    return "\n".join(lines)


def _components(manifest: Manifest) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="Components", title_justify="left")
    for heading in ("name", "file", "inputs", "outputs"):
        table.add_column(heading, overflow="fold")
    for name, component in manifest.components.items():
        table.add_row(name, component.file, _tensors(component, "inputs"), _tensors(component, "outputs"))
    return table


def _sparsity(manifest: Manifest) -> Table:
    sparsity, model = manifest.sparsity, manifest.model
    table = Table(box=box.SIMPLE_HEAD, title="Sparsity", title_justify="left")
    for heading in ("chunk", "sparsity", "key blocks kept", "of"):
        table.add_column(heading, justify="right")
    for chunk, value in enumerate(sparsity.values):
        frames = min((chunk + 1) * model.chunk_frames, manifest.window_frames)
        total = frames * manifest.key_blocks
        table.add_row(
            str(chunk), f"{value:.3f}", str(kept_blocks(sparsity.keep_q20, chunk, total)), str(total)
        )
    return table


def _files(manifest: Manifest) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="Files", title_justify="left")
    table.add_column("path")
    table.add_column("size", justify="right")
    table.add_column("SHA-256")
    for entry in manifest.files:
        table.add_row(entry.path, _gib(entry.bytes), entry.sha256[:16])
    return table
