"""What a bundle holds, as tables, as JSON or as a page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from export.page import bars, table, write_page
from export.units import readable_size
from runtime.bundle import Bundle, Component, Cost, Library, Manifest, load_bundle
from runtime.bundle.policies import AttentionPolicy, HsaPolicy
from runtime.program import KernelLibrary
from runtime.terminal import console, write_out
from runtime.verify import Verdict

from .bundle_figures import (
    bundle_document,
    compiled_kernels,
    forward_launches,
    memory_parts,
    peak_memory,
    quantized_kinds,
    recorded_verdict,
    sparsity_by_chunk,
    target_memory,
)

__all__ = ["inspect_bundle"]


def inspect_bundle(path: Path, *, as_json: bool = False, page: Path | None = None) -> None:
    """Print the contents of the bundle at `path`, whose files are verified first.

    Args:
        path: the bundle's folder.
        as_json: print JSON in place of tables.
        page: also write an HTML page to this file.

    Raises:
        BundleError: the bundle is missing, incomplete, changed, or of a newer schema.
    """
    bundle = load_bundle(path)
    if page is not None:
        write_page(page, bundle.manifest.name, _parts(bundle))
    if as_json:
        write_out(json.dumps(bundle_document(bundle), indent=1) + "\n")
        return
    shown = console()
    for _, shown_table in _tables(bundle):
        shown.print(shown_table)


def _parts(bundle: Bundle) -> Iterator[str]:
    """The page: the tables of the terminal, with bars where sizes are compared."""
    manifest = bundle.manifest
    for kind, shown in _tables(bundle):
        yield table(shown, "" if kind == "summary" else None)
        if kind == "memory":
            limit = target_memory(manifest)
            whole = limit or peak_memory(manifest)
            title = f"Of the {readable_size(limit)} of {manifest.target.name}" if limit else "Shares of it"
            parts = memory_parts(manifest).items()
            yield bars(title, [(name, size / whole, readable_size(size)) for name, size in parts])
        elif kind == "sparsity":
            rows = sparsity_by_chunk(manifest)
            largest = max(row["of"] for row in rows)
            bar = [
                (f"chunk {row['chunk']}", row["kept"] / largest, f"{row['kept']} of {row['of']}")
                for row in rows
            ]
            yield bars("Key blocks that attention looks at", bar)


def _tables(bundle: Bundle) -> Iterator[tuple[str, Table]]:
    """(what it is about, the table)."""
    manifest = bundle.manifest
    yield "summary", _summary(bundle)
    yield "components", _components(manifest)
    if any(component.cost for component in manifest.components.values()):
        yield "engines", _engines(manifest)
    if (kernels := compiled_kernels(bundle)) is not None:
        yield "kernels", _kernel_table(kernels)
    if manifest.quantization is not None:
        yield "quantization", _quantization_table(manifest)
    yield "memory", _memory_table(manifest)
    yield "sparsity", _sparsity_table(manifest)
    if manifest.golden is not None:
        yield "golden", _golden_table(manifest, recorded_verdict(bundle))
    yield "files", _files(manifest)


def _library(library: Library) -> str:
    text = f"{library.name} {library.version}, this version and no other"
    if library.triton:
        text += f"; kernels by Triton {library.triton}"
    return f"{text}; driver {library.driver} or newer" if library.driver else text


def _summary(bundle: Bundle) -> Table:
    manifest = bundle.manifest
    model, cache, attention = manifest.model, manifest.cache, manifest.attention
    size = f"{model.video_height}x{model.video_width}, {model.fps} FPS"
    capability = manifest.target.compute_capability
    library, launches = manifest.library, forward_launches(manifest)
    rows = {
        "target": manifest.target.name + (f" ({capability})" if capability else ""),
        "backend": f"{manifest.backend} in {manifest.precision}",
        "library": _library(library) if library else None,
        "status": manifest.status,
        "verdict": _judgement(recorded_verdict(bundle)) if manifest.golden else None,
        "execution": _execution(manifest),
        "launches": (
            f"{launches['engines']} by engines and {launches['kernels']} by kernels in a denoising forward"
            if launches
            else None
        ),
        "model": f"{model.preset}: {model.layers} layers of {model.heads} x {model.head_dim}",
        "video": f"{size}, {model.frame_tokens} tokens per latent frame",
        "variant": manifest.variant,
        "schedule": _schedule(manifest),
        "attention": (
            f"{_selection(attention.method)}, blocks of {attention.block_q} x {attention.block_k}, keep "
            f"{attention.keep_frames} frames (sink {attention.sink_frames}, near {attention.near_frames})"
            if isinstance(attention.method, HsaPolicy)
            else f"{_selection(attention.method)}, blocks of {attention.block_q} x {attention.block_k}"
        ),
        "cache": f"window {manifest.window_frames} frames, sink {cache.sink_frames} ({cache.sink_positions})"
        f"{', keys and values in fp8' if cache.kv else ''}{', multiplied in fp8' if attention.products else ''}",
        "weights": manifest.provenance.checkpoint.described,
        **{name.replace("_", " "): file.described for name, file in manifest.provenance.files.items()},
        "built": f"{manifest.created} by {manifest.provenance.command or 'the API'}",
        "tools": ", ".join(f"{name} {version}" for name, version in manifest.provenance.tools.items()),
    }
    table = Table(box=box.SIMPLE_HEAD, show_header=False, title=escape(manifest.name), title_justify="left")
    for name, value in rows.items():
        if value is not None:
            table.add_row(f"[bold]{name}[/]", escape(value))
    return table


def _schedule(manifest: Manifest) -> str:
    schedule, frames = manifest.schedule, manifest.model.chunk_frames

    def listed(timesteps: Sequence[float]) -> str:
        return ", ".join(f"{timestep:g}" for timestep in timesteps)

    first = f", {listed(schedule.first_timesteps)} for the first" if schedule.first_timesteps else ""
    clean = "then a clean forward" if schedule.clean_forward else "no clean forward"
    steps = listed(schedule.timesteps[:-1])
    return f"{frames} latent frame{'s' if frames > 1 else ''} a chunk at timesteps {steps}{first}; {clean}"


def _selection(method: AttentionPolicy) -> str:
    """The method and its parameters: `sta (windows ((5, 3, 3),), tile (8, 8), sink_frames 0)`."""
    parameters = ", ".join(f"{name} {value}" for name, value in method.model_dump(exclude={"policy"}).items())
    return f"{method.policy} ({parameters})" if parameters else method.policy


def _judgement(verdict: Verdict | None) -> str:
    if verdict is None:
        return "none recorded: run `python -m runtime verify` where it is to run"
    where = f"on {verdict.platform.device}, {verdict.created}"
    return f"passed {where}" if verdict.passed else f"FAILED {where}: {verdict.failures()}"


def _execution(manifest: Manifest) -> str:
    segments = manifest.segments
    if segments is None:
        return "the step as one graph"
    where = "inputs of one engine for all layers" if not segments.embedded else "inside, an engine per layer"
    return (
        f"the step in segments, weights {where}; operators by {'kernels' if manifest.kernels else 'graphs'}"
    )


def _tensors(component: Component, kind: str) -> str:
    """Inputs or outputs, those of all layers in one: `past_k.0..5 [slots, 64, 2, 64]`."""
    groups: dict[tuple[str, str], list[str]] = {}
    for spec in component.inputs if kind == "inputs" else component.outputs:
        stem, _, index = spec.name.rpartition(".")
        shape = f"{spec.dtype} [{', '.join(map(str, spec.shape))}]"
        groups.setdefault((stem or spec.name, shape), []).append(index if stem else "")
    return "\n".join(f"{_series(stem, indices)} {shape}" for (stem, shape), indices in groups.items())


def _series(stem: str, indices: list[str]) -> str:
    first = f".{indices[0]}" if indices[0] else ""
    return f"{stem}{first}{f'..{indices[-1]}' if len(indices) > 1 else ''}"


def _alike(manifest: Manifest) -> Iterator[tuple[str, Component, int]]:
    """Components in order, a run of engines per layer in one: (name, the first of them, how many)."""
    groups: dict[tuple[str, object], list[tuple[str, Component]]] = {}
    for name, component in manifest.components.items():
        stem, _, index = name.rpartition(".")
        key = (stem, (component.inputs, component.outputs)) if stem and index.isdigit() else (name, None)
        groups.setdefault(key, []).append((name, component))
    for (stem, _), members in groups.items():
        indices = [name.removeprefix(stem).lstrip(".") for name, _ in members]
        yield _series(stem, indices), members[0][1], len(members)


def _components(manifest: Manifest) -> Table:
    table = _table("Components", "name", "file", "inputs", "outputs")
    for name, component, _ in _alike(manifest):
        shapes = (_tensors(component, "inputs"), _tensors(component, "outputs"))
        table.add_row(name, escape(component.file or "-"), *map(escape, shapes))
    return table


def _engines(manifest: Manifest) -> Table:
    sizes = {entry.path: entry.bytes for entry in manifest.files}
    table = _table("Engines", "name", "", "size", "launches", "products", "activations", "build", "memory")
    table.caption = "each as its own plan says; build time and the builder's peak memory"
    for name, component, count in _alike(manifest):
        cost: Cost | None = component.cost
        if cost is None:
            continue
        table.add_row(
            name,
            f"x {count}" if count > 1 else "",
            readable_size(sizes.get(component.file or "", 0)),
            str(cost.launches),
            ", ".join(f"{number} {kind}" for kind, number in cost.gemms.items() if number) or "none",
            readable_size(cost.activation_bytes),
            f"{cost.seconds:.1f} s",
            readable_size(cost.peak_bytes),
        )
    return table


def _kernel_table(kernels: KernelLibrary) -> Table:
    index = kernels.index
    title = f"Kernels for {index.target}"
    table = _table(title, "image", "kernel", "threads", "registers", "shared memory", "spills", "size")
    for image in index.images:
        spills = image.spill_stores + image.spill_loads
        table.add_row(
            escape(image.name),
            image.kernel,
            str(image.threads),
            str(image.registers),
            readable_size(image.shared_memory),
            f"[red]{spills} B[/]" if spills else "none",
            readable_size(image.bytes),
        )
    return table


def _quantization_table(manifest: Manifest) -> Table:
    quantization = manifest.quantization
    assert quantization is not None
    table = _table("Quantization", "linear", "format", "layers", "relative error")
    for row in quantized_kinds(manifest) or ():
        least, largest = row["least"], row["largest"]
        error = "not measured" if least is None else f"{least:.3f} - {largest:.3f}"
        table.add_row(escape(row["kind"]), escape(row["format"]), str(row["layers"]), error)
    calibration = quantization.calibration
    source = (
        f", calibrated on {calibration.prompts} prompts and {calibration.chunks} chunks "
        f"({calibration.sha256[:12]})"
        if calibration
        else ""
    )
    skipped = ", ".join(quantization.skipped) or "none"
    table.caption = f"activations {quantization.activations}{source}; left in bf16: {escape(skipped)}"
    if (search := quantization.search) is not None:
        table.caption += f"; the fastest formats within an output error of {search.budget:g}"
    return table


def _memory_table(manifest: Manifest) -> Table:
    table = _table("Memory, one session", "", "size")
    for name, size in memory_parts(manifest).items():
        table.add_row(name, readable_size(size))
    peak, limit = peak_memory(manifest), target_memory(manifest)
    table.add_section()
    table.add_row("[bold]all[/]", f"[bold]{readable_size(peak)}[/]")
    if limit is not None:
        verdict = "fits into" if peak <= limit else "does not fit into"
        table.caption = f"{verdict} the {readable_size(limit)} of {escape(manifest.target.name)}"
    return table


def _sparsity_table(manifest: Manifest) -> Table:
    table = _table("Sparsity", "chunk", "sparsity", "key blocks kept", "of")
    rows = sparsity_by_chunk(manifest)
    assumption = rows[-1]["assumption"]
    if assumption is not None:
        table.caption = f"the data decides; this is what is kept if {escape(assumption)}"
    for row in rows:
        table.add_row(str(row["chunk"]), f"{row['sparsity']:.3f}", str(row["kept"]), str(row["of"]))
    return table


def _golden_table(manifest: Manifest, verdict: Verdict | None) -> Table:
    golden = manifest.golden
    assert golden is not None
    table = _table("Golden vectors", "component", "error allowed", "error found", "")
    for name, limit in golden.tolerances.items():
        found = verdict.components.get(name) if verdict else None
        if found is None:
            table.add_row(escape(name), f"{limit:.2g}", "-", "")
        else:
            error = "not finite" if found.error is None else f"{found.error:.1e}"
            table.add_row(
                escape(name), f"{limit:.2g}", error, "[green]pass[/]" if found.passed else "[red]FAIL[/]"
            )
    table.caption = f"in {escape(golden.file)}; relative L2"
    return table


def _files(manifest: Manifest) -> Table:
    table = _table("Files", "path", "size", "SHA-256")
    for entry in manifest.files:
        table.add_row(escape(entry.path), readable_size(entry.bytes), entry.sha256[:16])
    table.add_section()
    table.add_row("[bold]all[/]", readable_size(sum(entry.bytes for entry in manifest.files)), "")
    return table


_FIGURES = frozenset(
    {
        *(
            "size",
            "launches",
            "activations",
            "build",
            "memory",
            "threads",
            "registers",
            "shared memory",
            "spills",
        ),
        *("layers", "chunk", "sparsity", "key blocks kept", "of", "error allowed", "error found"),
    }
)
"""Headings of columns of numbers."""


def _table(title: str, *headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", caption_justify="left")
    for heading in headings:
        table.add_column(heading, justify="right" if heading in _FIGURES else "left", overflow="fold")
    return table
