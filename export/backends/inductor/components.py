"""A compiled bundle as its manifest describes it: names, types and shapes of its components, without any file read."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from export.graph.modules import QUERY_MEANS, chunk_stems, layer_names, layer_stems
from export.parts.golden_persistent import persist_component
from export.request.geometry import StepPlan
from export.request.graph_types import graph_types
from export.request.methods import operator_of
from export.request.request import BuildRequest
from plugins import operators
from runtime import bundle

from .modules import StepSegments, step_segments
from .packages import package_modules

__all__ = ["OPERATORS", "describe", "operator_components", "step_components"]

OPERATORS = ("qk_prepare", "attention")


def describe(request: BuildRequest, linears: frozenset[str]) -> dict[str, bundle.Component]:
    """The manifest's components of a compiled bundle; operators without a file, as where kernels execute them."""
    plan, types = request.plan, graph_types(request)
    segments = step_segments(plan, types.transformer, linears)
    step = step_components(plan, segments, types.transformer)
    kept = plan.spec.persistent_frames
    return {
        **step,
        **({bundle.PERSIST: persist_component(step["step"], kept)} if kept else {}),
        **operator_components(plan, types.transformer),
        **{name: make().component(f"{name}.pt2") for name, make in package_modules(request).items()},
    }


def operator_components(plan: StepPlan, dtype: torch.dtype) -> dict[str, bundle.Component]:
    """What goes into and comes out of the operators; no files."""
    dit, geometry = plan.preset.dit, plan.geometry
    heads = (dit.heads, dit.head_dim)
    tokens, frames = plan.chunk_tokens, plan.chunk_frames
    shapes: dict[str, tuple[int | str, ...]] = {
        "qkv": (tokens, 3 * dit.dim),
        "bias": (3 * dit.dim,),
        **dict.fromkeys(("norm_q", "norm_k"), (dit.dim,)),
        **dict.fromkeys(("cos", "sin"), (tokens, dit.head_dim // 2)),
        **dict.fromkeys(("q", "k", "v", "out"), (tokens, *heads)),
        "q_mean": (frames, geometry.q_blocks, *heads),
        "k_mean": (frames, geometry.k_blocks, *heads),
        **dict.fromkeys(("past_k", "past_v"), ("slots", geometry.frame_tokens, *heads)),
        "past_kmean": ("slots", geometry.k_blocks, *heads),
        **(_values_by_block(plan) if plan.spec.kv else {}),
        **dict.fromkeys(("k_scale", "v_scale"), (frames, geometry.k_blocks, dit.heads)),
        **dict.fromkeys(("past_kscale", "past_vscale"), ("slots", geometry.k_blocks, dit.heads)),
        "frame_slots": (plan.max_past_frames,),
        "chunk": (),
        "pinned": (),
        "linear_weight": (dit.head_dim, dit.head_dim),
        "linear_bias": (dit.head_dim,),
    }
    fixed = {
        **dict.fromkeys(
            ("cos", "sin", *(name for name in shapes if name.endswith(("mean", "scale")))), "float32"
        ),
        **dict.fromkeys(("frame_slots", "chunk", "pinned"), "int32"),
        **dict.fromkeys(("k", "v", "past_k", "past_v") if plan.spec.kv else (), "uint8"),
    }
    method = operator_of(plan.variant.attention)
    prepare, attention = operators.operators(plan.spec.kv, plan.spec.products, method)

    def specs(names: Iterable[str]) -> tuple[bundle.TensorSpec, ...]:
        kinds = {name: fixed.get(name) for name in names}
        return tuple(
            bundle.TensorSpec.model_validate(
                {"name": n, "dtype": kind or bundle.dtype_name(dtype), "shape": shapes[n]}
            )
            for n, kind in kinds.items()
        )

    return {
        "qk_prepare": bundle.Component(
            file=None, inputs=specs(prepare.inputs), outputs=specs(prepare.outputs)
        ),
        "attention": bundle.Component(
            file=None, inputs=specs(attention.inputs), outputs=specs(attention.outputs)
        ),
    }


def _values_by_block(plan: StepPlan) -> dict[str, tuple[int | str, ...]]:
    """Shapes of values that are codes."""
    dit, geometry = plan.preset.dit, plan.geometry
    block = (geometry.k_blocks, dit.heads, dit.head_dim, geometry.block_k)
    return {"v": (plan.chunk_frames, *block), "past_v": ("slots", *block)}


def step_components(
    plan: StepPlan, segments: StepSegments, dtype: torch.dtype
) -> dict[str, bundle.Component]:
    """The step and its clean variant as a whole: what goes in and comes out. No files."""
    layers = plan.preset.dit.layers
    known = {spec.name: spec for spec in (*segments.last.inputs, *segments.last.outputs)}
    for component in operator_components(plan, dtype).values():
        known |= {spec.name: spec for spec in (*component.inputs, *component.outputs)}

    def named(source: str, *names: str) -> list[bundle.TensorSpec]:
        return [known[source].model_copy(update={"name": name}) for name in names]

    def per_layer(source: str, stem: str, count: int = layers) -> list[bundle.TensorSpec]:
        return named(source, *layer_names(stem, count))

    placement = [*named("chunk", "chunk"), *named("frame_slots", "frame_slots")]
    placement += [*named("cos", "rope_cos"), *named("sin", "rope_sin")]

    persistent = plan.spec.persistent_frames > 0

    def inputs(first: list[bundle.TensorSpec], count: int) -> tuple[bundle.TensorSpec, ...]:
        return (
            *first,
            *placement,
            *(spec for stem in layer_stems(plan.spec.kv) for spec in per_layer(stem, stem, count)),
            *(named("pinned", "pinned") if persistent else ()),
        )

    cache = [
        spec
        for stem in chunk_stems(plan.spec.kv)
        for spec in per_layer(stem if stem in ("k", "v") else f"{stem[0]}_{stem[1:]}", stem)
    ]
    if persistent:
        cache += per_layer("q_mean", QUERY_MEANS)
    step = [*named("latent", "latent"), *named("noise", "noise"), *named("step", "step")]
    return {
        "step": bundle.Component(
            file=None,
            inputs=inputs(step, layers),
            outputs=(*named("next_latent", "next_latent"), *named("x0", "x0"), *cache),
        ),
        "clean": bundle.Component(
            file=None, inputs=inputs(named("latent", "latent"), layers - 1), outputs=tuple(cache)
        ),
    }
