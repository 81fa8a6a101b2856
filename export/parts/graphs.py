"""The parts of a bundle that are exported the same way for every backend that starts from ONNX."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from export.graph import components
from export.graph.encoder import write_vae_encoder
from export.request.graph_types import graph_types
from export.request.request import BuildRequest
from runtime import bundle

if TYPE_CHECKING:
    from .run import Run

__all__ = ["export_graphs", "graph_parts", "tokenizer_part"]


def graph_parts(request: BuildRequest) -> Mapping[str, float]:
    """The parts that `export_graphs` makes, with their efforts."""
    encoder = {"video encoder": 8} if request.with_encoder else {}
    return {
        "tokenizer": 1,
        "text encoder": 60,
        "video decoder": 8,
        **encoder,
        "conditioner": 8,
        "transformer": 20,
    }


def tokenizer_part(run: Run) -> list[bundle.FileEntry]:
    """Make the tokenizer's file."""

    def write(folder: Path) -> list[str]:
        run.models.weights.write_tokenizer(folder / components.TOKENIZER)
        return [components.TOKENIZER]

    return run.part("tokenizer", write, key=run.keys.model)


def export_graphs(run: Run) -> dict[str, list[bundle.FileEntry]]:
    """Make the ONNX graphs of all components, by part.

    The transformer is `step.onnx` with `clean.onnx` and, where the request says so, a graph per chunk; all share one
    file of weights.
    """
    types, plan, models = graph_types(run.request), run.plan, run.models
    parts = {"tokenizer": tokenizer_part(run)}
    parts["text encoder"] = run.part(
        "text encoder",
        lambda folder: components.write_text_encoder(
            folder, plan, models.weights.text_tensors(), types.text, run.within
        ),
        key=run.keys.model,
    )
    parts["video decoder"] = run.part(
        "video decoder",
        lambda folder: components.write_vae(folder, models.decoder(types.decoder), plan, run.within),
        key=run.keys.model,
    )
    if run.request.with_encoder:
        parts["video encoder"] = run.part(
            "video encoder",
            lambda folder: write_vae_encoder(
                folder, models.weights.vae_encoder(types.decoder), plan, run.within
            ),
            key=run.keys.model,
        )
    parts["conditioner"] = run.part(
        "conditioner",
        lambda folder: components.write_conditioner(folder, models.dit(types.transformer), run.within),
        key=run.keys.model,
    )
    # Last, because it uses the model up.
    parts["transformer"] = run.part(
        "transformer",
        lambda folder: components.write_step(
            folder,
            models.take_dit(types.transformer),
            plan,
            per_chunk=run.request.per_chunk,
            progress=run.within,
        ),
        key=run.keys.graphs,
    )
    return parts
