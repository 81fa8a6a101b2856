"""What the commands print about known models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.table import Table

from export.hub.known import KnownFile, KnownModel
from export.units import readable_size

from .tables import titled_table

__all__ = ["file_lines", "model_document", "model_table"]

Cached = Callable[[KnownFile], bool]
"""Whether a file is on this machine."""


def model_table(models: Iterable[KnownModel]) -> Table:
    """One line per model."""
    table = titled_table("Known models", "name", "variant", "size", "files", "in products", "what")
    table.caption = (
        "files: of all a bundle needs; 'python -m export models NAME' shows them and their licences"
    )
    for model in models:
        table.add_row(
            model.name,
            model.variants[0],
            model.resolution,
            readable_size(model.bytes) if model.bytes else "?",
            _products(model),
            model.title,
        )
    return table


def file_lines(model: KnownModel, cached: Cached) -> Iterator[str]:
    """A model and its files, in lines that may be copied from."""
    yield f"{model.name}: {model.title}"
    yield f"  {model.preset}, {model.resolution}, variant {' or '.join(model.variants)}"
    for role, file in model.files.items():
        size = readable_size(file.bytes) if file.bytes else "size not published"
        yield f"{role}: {size}{', here' if cached(file) else ''}"
        yield f"  {file.source}"
        if file.sha256 is not None:
            yield f"  SHA-256 {file.sha256}"
        yield f"  licence: {file.licence}; use in products: {file.products}"


def model_document(model: KnownModel, cached: Cached) -> dict[str, Any]:
    """A model as plain data."""
    return {
        "name": model.name,
        "title": model.title,
        "preset": model.preset,
        "variants": list(model.variants),
        "resolution": model.resolution,
        "files": {
            role: {
                "source": str(file.source),
                "bytes": file.bytes,
                "sha256": file.sha256,
                "licence": file.licence,
                "products": file.products,
                "here": cached(file),
            }
            for role, file in model.files.items()
        },
    }


def _products(model: KnownModel) -> str:
    """What the strictest of the files' licences says."""
    said = {file.products for file in model.files.values()}
    return next(what for what in ("forbidden", "unstated", "allowed") if what in said)
