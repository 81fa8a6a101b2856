"""The kernels that make up a layer's attention: which ones, over which blocks, with what work space and tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from numpy.typing import NDArray

from runtime.bundle import Bundle, Dtype, Manifest, nbytes
from runtime.bundle.images import KernelProblem
from runtime.bundle.policies import (
    PbsaPolicy,
    RadialPolicy,
    SelectionTables,
    SpargePolicy,
    StaPolicy,
    VmobaPolicy,
    has_linear_branch,
)
from runtime.bundle.weights_file import WeightsFile
from runtime.errors import BundleError

__all__ = [
    "CLEARED",
    "TOKEN_SCALE",
    "AttentionLaunch",
    "attention_launches",
    "attention_work",
    "kernel_name",
    "kernel_problem",
    "map_sizes",
    "persist_launches",
    "persist_work",
    "read_tables",
    "table_buffer",
    "work_sizes",
]

Options = dict[str, int | float]

TOKEN_SCALE = "token_scale"
"""What *prepare* takes besides where a projection's scales are left to it; engines call it `qkv_scale`."""


@dataclass(frozen=True)
class AttentionLaunch:
    """One launch of an attention operator. `tables` goes from a kernel's buffer to a tensor of the file of tables."""

    kernel: str
    problem: KernelProblem
    options: Options
    tables: Mapping[str, str] = field(default_factory=dict)


def kernel_problem(manifest: Manifest, dtype: Dtype) -> KernelProblem:
    """The sizes of every kernel launch of a bundle that computes in `dtype`, but for blocks in orders of their own."""
    return KernelProblem(
        dtype=dtype,
        heads=manifest.model.heads,
        head_dim=manifest.model.head_dim,
        frame_tokens=manifest.model.frame_tokens,
        chunk_frames=manifest.model.chunk_frames,
        past_frames=manifest.cache.max_past_frames,
        block_q=manifest.attention.block_q,
        block_k=manifest.attention.block_k,
        sinks=manifest.cache.sink_frames,
    )


def kernel_name(manifest: Manifest, kernel: str) -> str:
    """The kernel that does what `kernel` does, on keys and values as the bundle holds them, and from the projection as
    its engines leave it.
    """
    if kernel == "prepare" and TOKEN_SCALE in {
        spec.name for spec in manifest.components["qk_prepare"].inputs
    }:
        kernel = "prepare_scaled"
    return f"{kernel}_fp8" if manifest.cache.kv == "fp8" else kernel


def table_buffer(tensor: str) -> str:
    """The buffer that holds a tensor of the file of tables."""
    return f"table.{tensor}"


def read_tables(bundle: Bundle) -> dict[str, NDArray[Any]]:
    """The tensors of a bundle's file of tables, by the buffer that holds each.

    Raises:
        BundleError: it cannot be read, or holds something else than the manifest says.
    """
    kernels = bundle.manifest.kernels
    if kernels is None or kernels.tables is None:
        return {}
    with WeightsFile(bundle.opened(kernels.tables)) as file:
        found = {name: (tensor.dtype, tensor.shape) for name, tensor in file.tensors.items()}
        if found != {spec.name: (spec.dtype, spec.shape) for spec in kernels.tensors}:
            raise BundleError(
                f"the tables {kernels.tables!r} hold {', '.join(found)}, which is not what the manifest lists; rebuild "
                "the bundle"
            )
        tables = {table_buffer(name): file[name] for name in found}
        file.check()
    return tables


def attention_launches(manifest: Manifest, dtype: Dtype, layer: int = 0) -> list[AttentionLaunch]:
    """The kernels of the attention operator of `layer`, in order.

    Raises:
        BundleError: the method selects by tables, and the manifest has none.
    """
    attention, problem = manifest.attention, _problem(manifest, dtype, layer)
    attend = kernel_name(manifest, "attend" if problem.ordered_blocks is None else "attend_ordered")
    if attention.products is not None:
        attend = "attend_e4m3"
    tables = _turn(manifest, layer).tensors
    launches = [
        AttentionLaunch(kernel, problem, options, tables)
        for kernel, options in _selection(manifest, layer, tables)
    ]
    launches.append(AttentionLaunch(attend, problem, {"scale": attention.scale}, tables))
    if has_linear_branch(attention.method):
        launches += [AttentionLaunch(kernel, problem, {}) for kernel in _LINEAR]
    return launches


_LINEAR = ("sum_linear", "project_linear", "add_linear")
"""SLA's linear branch, which is added to what *attend* left."""


def _selection(manifest: Manifest, layer: int, tables: Mapping[str, str]) -> list[tuple[str, Options]]:
    """The kernels that choose blocks, with their scalar arguments."""
    attention = manifest.attention
    method = attention.method
    if isinstance(method, StaPolicy | RadialPolicy):
        return [("expand", _map_options(manifest, tables))]
    if isinstance(method, VmobaPolicy):
        times = _times(manifest, layer)
        own: Options = {"group_frames": times.frames, "patches": times.patches}
        top = method.tops[layer % len(method.blocks)] if method.mode == "top-k" else 0
        share: Options = {"top": top, "threshold": method.threshold}
        heads, rows = manifest.model.heads, _problem(manifest, "bfloat16", layer).sizes()["query_blocks"]
        maps: Options = {"map_heads": 1, "map_rows": heads * rows, "map_columns": times.patches}
        return [("pool", own), ("score_groups", {}), ("choose", {**own, **share}), ("expand", maps)]
    table: Options = {"table_entries": len(manifest.sparsity.keep_q20)}
    if isinstance(method, SpargePolicy) and not method.plain:
        judged: list[tuple[str, Options]] = []
        if method.similarity >= 0:
            judged = [
                ("mean_key", {}),
                ("resemble", {"similarity": method.similarity, "smooth": int(method.smooth)}),
            ]
        cumulative = method.cumulative if method.mode == "cdf" else 0.0
        return [("score", table), *judged, ("select_sparge", {**table, "cumulative": cumulative})]
    if isinstance(method, PbsaPolicy):
        return [("score", table), ("select_pinned", table)]
    choice: Options = {
        **table,
        "keep_frames": attention.keep_frames,
        "sink_frames": attention.sink_frames,
        "near_frames": attention.near_frames,
    }
    return [("score", choice), ("select", choice)]


def attention_work(manifest: Manifest, dtype: Dtype, layer: int) -> dict[str, tuple[Dtype, tuple[int, ...]]]:
    """Type and shape of what the kernels of a layer's attention hand to each other, by buffer."""
    sizes, method = _problem(manifest, dtype, layer).sizes(), manifest.attention.method
    heads, rows = (manifest.model.heads, manifest.model.head_dim), (sizes["heads"], sizes["query_blocks"])
    lists = (*rows, sizes["key_blocks"])
    work: dict[str, tuple[Dtype, tuple[int, ...]]] = {"lists": ("int32", lists), "counts": ("int32", rows)}
    if isinstance(method, VmobaPolicy):
        times = _times(manifest, layer)
        work["q_pool"] = ("float32", (sizes["query_blocks"], *heads))
        work["k_pool"] = ("float32", (sizes["groups"], *heads))
        work["scores"] = ("float32", (*rows, sizes["groups"]))
        work["block_map"] = ("uint8", (sizes["groups"] // times.patches, rows[0] * rows[1], times.patches))
    elif not isinstance(method, StaPolicy | RadialPolicy):
        work["scores"] = ("float32", lists)
    if isinstance(method, SpargePolicy) and not method.plain:
        work |= {
            "shift": ("float32", heads),
            "unlike_q": ("uint8", rows),
            "unlike_k": ("uint8", (sizes["heads"], sizes["key_blocks"])),
        }
    if has_linear_branch(method):
        square = (*heads, manifest.model.head_dim)
        work |= {
            "frame_state": ("float32", (sizes["frames"], *square)),
            "frame_features": ("float32", (sizes["frames"], *heads)),
            "linear_state": ("float32", square),
            "linear_features": ("float32", heads),
        }
    return work


def persist_launches(manifest: Manifest, dtype: Dtype) -> list[AttentionLaunch]:
    """The kernels that choose, in every layer, which blocks outlive the window, in order; none without such blocks."""
    method = manifest.attention.method
    if not isinstance(method, PbsaPolicy):
        return []
    problem = kernel_problem(manifest, dtype)
    marks: Options = {"scale": manifest.attention.scale, "peak": int(method.score == "peak")}
    places: Options = {
        "sink_frames": manifest.cache.sink_frames,
        "shared_heads": int(method.heads == "shared"),
    }
    steps: dict[str, Options] = {"score": {}, "weigh": marks, "persist": places}
    return [AttentionLaunch(kernel, problem, options) for kernel, options in steps.items()]


def persist_work(manifest: Manifest) -> dict[str, tuple[Dtype, tuple[int, ...]]]:
    """Type and shape of what these kernels hand to each other, by buffer; attention has the same scores."""
    if not manifest.persistent_frames:
        return {}
    sizes = kernel_problem(manifest, "bfloat16").sizes()
    pairs = (sizes["heads"], sizes["query_blocks"], sizes["key_blocks"])
    return {"scores": ("float32", pairs), "importance": ("float32", (pairs[0], pairs[2]))}


CLEARED = ("unlike_q", "unlike_k")
"""Of `attention_work`, what must be zero where nothing writes it."""


def work_sizes(manifest: Manifest) -> dict[str, tuple[Dtype, tuple[int, ...]]]:
    """The largest of `attention_work` over all layers, by buffer."""
    largest: dict[str, tuple[Dtype, tuple[int, ...]]] = {}
    for layer in range(manifest.model.layers):
        for name, (dtype, shape) in attention_work(manifest, "bfloat16", layer).items():
            if name not in largest or nbytes(dtype, shape) > nbytes(*largest[name]):
                largest[name] = (dtype, shape)
    return largest


def _turn(manifest: Manifest, layer: int) -> SelectionTables:
    kernels = manifest.kernels
    if kernels is None or not kernels.turns:
        return SelectionTables(tensors={})
    turn = kernels.turns[layer % len(kernels.turns)]
    if unknown := sorted(set(turn.tensors.values()) - {spec.name for spec in kernels.tensors}):
        raise BundleError(
            f"turns of attention name the table(s) {', '.join(unknown)}, which the manifest does not list; rebuild the "
            "bundle"
        )
    return turn


def _problem(manifest: Manifest, dtype: Dtype, layer: int) -> KernelProblem:
    problem, blocks = kernel_problem(manifest, dtype), _turn(manifest, layer).blocks
    if blocks is not None:
        problem = replace(
            problem,
            block_q=blocks.block_q,
            block_k=blocks.block_k,
            ordered_blocks=(blocks.q_blocks, blocks.k_blocks),
        )
    if isinstance(manifest.attention.method, VmobaPolicy):
        times = _times(manifest, layer)
        frames = problem.past_frames + problem.chunk_frames
        problem = replace(problem, groups=-(-frames // times.frames) * times.patches)
    return problem


class _Times(NamedTuple):
    """Groups of keys among which queries choose: patches of a frame, over so many frames."""

    frames: int
    patches: int


def _times(manifest: Manifest, layer: int) -> _Times:
    method = manifest.attention.method
    assert isinstance(method, VmobaPolicy)
    frames, *sides = method.blocks[layer % len(method.blocks)]
    patches = 1
    for extent, side in zip(manifest.model.token_grid, sides, strict=True):
        patches *= -(-extent // side) if side else 1
    return _Times(frames or manifest.cache.max_past_frames + manifest.model.chunk_frames, patches)


def map_sizes(manifest: Manifest, layer: int) -> dict[str, int]:
    """Of the tables of a layer's turn that are indices: how many there are of what."""
    if isinstance(manifest.attention.method, VmobaPolicy):
        times = _times(manifest, layer)
        frames = manifest.cache.max_past_frames + manifest.model.chunk_frames
        return {
            "frame_map": -(-frames // times.frames),
            "columns": times.patches,
            "q_patches": times.patches,
        }
    kernels, name = manifest.kernels, _turn(manifest, layer).tensors.get("block_map")
    shapes = {} if kernels is None else {spec.name: spec.shape for spec in kernels.tensors}
    if name not in shapes or len(shapes[name]) != _MAP_AXES:
        return {}
    maps, _, columns = shapes[name]
    return {"frame_map": int(maps), "columns": int(columns)}


_MAP_AXES = 3


def _map_options(manifest: Manifest, tables: Mapping[str, str]) -> Options:
    """What *expand* must know of its maps' shapes."""
    shapes = {} if manifest.kernels is None else {spec.name: spec.shape for spec in manifest.kernels.tensors}
    frames, blocks = (shapes.get(tables.get(name, ""), ()) for name in ("frame_map", "block_map"))
    if (len(frames), len(blocks)) != (4, _MAP_AXES):
        raise BundleError(
            f"the policy {manifest.attention.method.policy} selects by tables, and the manifest has none; rebuild the "
            "bundle"
        )
    return {"map_heads": int(frames[1]), "map_rows": int(blocks[1]), "map_columns": int(blocks[2])}
