"""Problems, specialisations of kernels, and their arguments.

A *problem* holds the sizes of a call. A *variant* is one specialisation of a kernel: its compile-time constants, the
problems it serves, its grid, and the order and types of its arguments. Argument and size names are the vocabulary
of the image format (docs/kernels.md); a kernel that replaces one of these keeps to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from plugins.errors import PluginError
from runtime.bundle import ELEMENT_TYPES
from runtime.bundle.images import KernelProblem

__all__ = [
    "ARCHS",
    "DRIVERS",
    "DTYPES",
    "KERNELS",
    "MAX_FRAMES",
    "MAX_HEADS",
    "Argument",
    "CudaSource",
    "GridAxis",
    "KernelError",
    "Variant",
    "kernel_arguments",
    "least_driver",
]

ARCHS = (80, 86, 89, 90, 100, 120)
"""Compute capabilities (times ten) that images are built for."""

DTYPES = {"bfloat16": ELEMENT_TYPES["bfloat16"].short, "float16": ELEMENT_TYPES["float16"].short}
"""Compute types and their short names."""

MAX_FRAMES = 32
MAX_HEADS = 16


DRIVERS = {525: (12, 0), 570: (12, 8), 580: (13, 0)}
"""Driver branches, and the version of CUDA that each came with. Within a major version, images of a newer compiler load
on an older driver, if that knows the architecture."""


def least_driver(arch: int) -> int:
    """The branch of the oldest driver that loads shipped images for `arch`: CUDA 12's first, or Blackwell's first."""
    return 570 if arch >= 100 else 525


class KernelError(PluginError, ValueError):
    """No kernel serves what was asked for."""


@dataclass(frozen=True)
class Argument:
    """One kernel argument.

    `type` is `"pointer"`, `"int32"` or `"float32"`; `element` what a pointer points to. `source` says who supplies the
    value: a `"buffer"` (device address) or `"option"` (scalar) of the caller, or a `"size"` of the problem.
    """

    name: str
    type: Literal["pointer", "int32", "float32"]
    element: str | None
    source: Literal["buffer", "option", "size"]


@dataclass(frozen=True)
class GridAxis:
    """`ceil(size / tile)` programs along one axis of the grid."""

    size: str
    tile: int = 1


class CudaSource(NamedTuple):
    """A kernel in CUDA C++: its file beside this one, and the shared memory that a thread block asks for."""

    file: str
    shared_memory: int


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel: of the Triton function of that name, or of the source in `cuda`.

    It serves a problem whose sizes (and `dtype`) are among `serves` and do not exceed `limits`.
    """

    kernel: str
    name: str
    constants: Mapping[str, int]
    num_warps: int
    grid: tuple[GridAxis | int, ...]
    arguments: tuple[Argument, ...]
    serves: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)
    num_stages: int = 2
    max_registers: int | None = None
    cuda: CudaSource | None = None

    def fits(self, problem: KernelProblem) -> bool:
        """Whether this variant serves `problem`."""
        facts: dict[str, int | str] = {**problem.sizes(), "dtype": problem.dtype}
        sizes = problem.sizes()
        return all(facts[key] in values for key, values in self.serves.items()) and all(
            sizes[key] <= limit for key, limit in self.limits.items()
        )

    def grid_for(self, problem: KernelProblem) -> tuple[int, ...]:
        """Programs along each axis."""
        sizes = problem.sizes()
        return tuple(
            axis if isinstance(axis, int) else -(-sizes[axis.size] // axis.tile) for axis in self.grid
        )


_F32, _I32, _CODES = "float32", "int32", "uint8"
_OPTIONS = {
    "eps": _F32,
    "scale": _F32,
    "table_entries": _I32,
    "keep_frames": _I32,
    "sink_frames": _I32,
    "near_frames": _I32,
    "turned_pairs": _I32,
    "cumulative": _F32,
    "similarity": _F32,
    "smooth": _I32,
    "group_frames": _I32,
    "patches": _I32,
    "top": _I32,
    "threshold": _F32,
    "map_heads": _I32,
    "map_rows": _I32,
    "map_columns": _I32,
    "peak": _I32,
    "shared_heads": _I32,
}

# Kernel -> (module, buffers with their element types in order, scalars in order). "compute" is the variant's type.
KERNELS: dict[str, tuple[str, dict[str, str], tuple[str, ...]]] = {
    "prepare": (
        "prepare",
        {
            "q": "compute",
            "k": "compute",
            "v": "compute",
            "q_mean": _F32,
            "k_mean": _F32,
            "qkv": "compute",
            "bias": "compute",
            "norm_q": "compute",
            "norm_k": "compute",
            "cos": _F32,
            "sin": _F32,
        },
        ("heads", "frame_tokens", "block_q", "block_k", "q_blocks", "k_blocks", "chunk_frames", "eps"),
    ),
    "score": (
        "select",
        {"scores": _F32, "q_mean": _F32, "k_mean": _F32, "past_kmean": _F32, "frame_slots": _I32},
        ("heads", "chunk_frames", "past_frames", "q_blocks", "k_blocks", "key_blocks"),
    ),
    "select": (
        "select",
        {"lists": _I32, "counts": _I32, "scores": _F32, "frame_slots": _I32, "chunk": _I32, "keep_q20": _I32},
        (
            "chunk_frames",
            "past_frames",
            "k_blocks",
            "key_blocks",
            "table_entries",
            "keep_frames",
            "sink_frames",
            "near_frames",
        ),
    ),
    "attend": (
        "attend",
        {
            "out": "compute",
            "q": "compute",
            "k": "compute",
            "v": "compute",
            "past_k": "compute",
            "past_v": "compute",
            "frame_slots": _I32,
            "lists": _I32,
            "counts": _I32,
        },
        ("heads", "frame_tokens", "past_frames", "q_blocks", "key_blocks", "block_k", "scale"),
    ),
    "commit": (
        "cache",
        {
            "past_k": "int16",
            "past_v": "int16",
            "past_kmean": _F32,
            "k": "int16",
            "v": "int16",
            "k_mean": _F32,
            "commit_slots": _I32,
        },
        ("heads", "frame_tokens", "k_blocks"),
    ),
    "rope_sink": (
        "cache",
        {
            "past_k": "compute",
            "past_kmean": _F32,
            "sink_k": "compute",
            "sink_kmean": _F32,
            "sink_slots": _I32,
            "cos": _F32,
            "sin": _F32,
        },
        ("heads", "frame_tokens", "k_blocks", "turned_pairs"),
    ),
}


KERNELS |= {
    "expand": (
        "ordered",
        {
            "lists": _I32,
            "counts": _I32,
            "frame_slots": _I32,
            "frame_map": _I32,
            "block_map": _CODES,
            "columns": _I32,
        },
        (
            "chunk_frames",
            "past_frames",
            "q_blocks",
            "k_blocks",
            "key_blocks",
            "map_heads",
            "map_rows",
            "map_columns",
        ),
    ),
    "attend_ordered": (
        "ordered",
        {**KERNELS["attend"][1], "q_order": _I32, "k_order": _I32},
        KERNELS["attend"][2],
    ),
    "mean_key": (
        "sparge",
        {"shift": _F32, "k_mean": _F32, "past_kmean": _F32, "frame_slots": _I32},
        ("heads", "frame_tokens", "chunk_frames", "past_frames", "k_blocks", "block_k"),
    ),
    "resemble": (
        "sparge",
        {
            "unlike_q": _CODES,
            "unlike_k": _CODES,
            "q": "compute",
            "k": "compute",
            "past_k": "compute",
            "shift": _F32,
            "frame_slots": _I32,
        },
        (
            "heads",
            "frame_tokens",
            "chunk_frames",
            "past_frames",
            "q_blocks",
            "k_blocks",
            "key_blocks",
            "block_q",
            "block_k",
            "similarity",
            "smooth",
        ),
    ),
    "select_sparge": (
        "sparge",
        {
            "lists": _I32,
            "counts": _I32,
            "scores": _F32,
            "unlike_q": _CODES,
            "unlike_k": _CODES,
            "frame_slots": _I32,
            "chunk": _I32,
            "keep_q20": _I32,
        },
        (
            "head_dim",
            "chunk_frames",
            "past_frames",
            "k_blocks",
            "key_blocks",
            "table_entries",
            "cumulative",
        ),
    ),
    "pool": (
        "vmoba",
        {
            "q_pool": _F32,
            "k_pool": _F32,
            "q": "compute",
            "k": "compute",
            "past_k": "compute",
            "frame_slots": _I32,
            "q_order": _I32,
            "k_order": _I32,
            "patch_blocks": _I32,
        },
        (
            "heads",
            "frame_tokens",
            "chunk_frames",
            "past_frames",
            "q_blocks",
            "block_q",
            "block_k",
            "groups",
            "group_frames",
            "patches",
        ),
    ),
    "score_groups": (
        "vmoba",
        {"scores": _F32, "q_pool": _F32, "k_pool": _F32},
        ("heads", "query_blocks", "groups"),
    ),
    "choose": (
        "vmoba",
        {"block_map": _CODES, "scores": _F32, "frame_slots": _I32, "q_patches": _I32},
        (
            "chunk_frames",
            "past_frames",
            "q_blocks",
            "groups",
            "group_frames",
            "patches",
            "top",
            "threshold",
        ),
    ),
    "select_pinned": (
        "pbsa",
        {**KERNELS["select"][1], "pinned": _I32},
        ("chunk_frames", "past_frames", "k_blocks", "key_blocks", "table_entries"),
    ),
    "weigh": (
        "pbsa",
        {"importance": _F32, "scores": _F32, "frame_slots": _I32},
        ("chunk_frames", "past_frames", "query_blocks", "k_blocks", "key_blocks", "scale", "peak"),
    ),
    "persist": (
        "pbsa",
        {
            "past_k": "int16",
            "past_v": "int16",
            "past_kmean": _F32,
            "importance": _F32,
            "frame_slots": _I32,
            "contest": _I32,
        },
        (
            "heads",
            "frame_tokens",
            "k_blocks",
            "key_blocks",
            "block_k",
            "sink_frames",
            "shared_heads",
        ),
    ),
    "sum_linear": (
        "linear",
        {
            "frame_state": _F32,
            "frame_features": _F32,
            "k": "compute",
            "v": "compute",
            "past_k": "compute",
            "past_v": "compute",
            "frame_slots": _I32,
        },
        ("heads", "frame_tokens", "chunk_frames", "past_frames"),
    ),
    "project_linear": (
        "linear",
        {
            "linear_state": _F32,
            "linear_features": _F32,
            "frame_state": _F32,
            "frame_features": _F32,
            "linear_weight": "compute",
            "frame_slots": _I32,
        },
        ("heads", "chunk_frames", "past_frames"),
    ),
    "add_linear": (
        "linear",
        {
            "out": "compute",
            "q": "compute",
            "linear_state": _F32,
            "linear_features": _F32,
            "linear_bias": "compute",
        },
        ("heads", "frame_tokens", "q_blocks", "block_q"),
    ),
}
"""The kernels of other methods."""

_SCALES = dict.fromkeys(("k_scale", "v_scale"), _F32)
_PAST_SCALES = dict.fromkeys(("past_kscale", "past_vscale"), _F32)


def _over_codes(kernel: str, codes: tuple[str, ...], more: dict[str, dict[str, str]]) -> dict[str, str]:
    """The buffers of `kernel` where `codes` hold such; `more` gives what comes behind a buffer."""
    buffers: dict[str, str] = {}
    for name, element in KERNELS[kernel][1].items():
        buffers[name] = _CODES if name in codes else element
        buffers |= more.get(name, {})
    return buffers


KERNELS |= {
    "prepare_fp8": (
        "prepare_fp8",
        _over_codes("prepare", ("k", "v"), {"k_mean": _SCALES}),
        KERNELS["prepare"][2],
    ),
    "attend_fp8": (
        "fp8",
        _over_codes(
            "attend",
            ("k", "v", "past_k", "past_v"),
            {"v": {"k_mean": _F32, **_SCALES}, "past_v": {"past_kmean": _F32, **_PAST_SCALES}},
        ),
        ("heads", "frame_tokens", "past_frames", "q_blocks", "k_blocks", "key_blocks", "block_k", "scale"),
    ),
    "commit_fp8": (
        "fp8",
        _over_codes(
            "commit", ("past_k", "past_v", "k", "v"), {"past_kmean": _PAST_SCALES, "k_mean": _SCALES}
        ),
        (*KERNELS["commit"][2], "block_k"),
    ),
    "rope_sink_fp8": (
        "fp8",
        _over_codes(
            "rope_sink",
            ("past_k", "sink_k"),
            {"past_kmean": {"past_kscale": _F32}, "sink_kmean": {"sink_kscale": _F32}},
        ),
        ("heads", "frame_tokens", "k_blocks", "block_k", "turned_pairs"),
    ),
}

KERNELS["attend_e4m3"] = KERNELS["attend_fp8"]


def _scaled(kernel: str) -> tuple[str, dict[str, str], tuple[str, ...]]:
    """*prepare* on a product of codes: with the scale of each token and of each channel behind it."""
    module, buffers, scalars = KERNELS[kernel]
    scales = dict.fromkeys(("token_scale", "channel_scale"), "compute")
    with_scales: dict[str, str] = {}
    for name, element in buffers.items():
        with_scales[name] = element
        with_scales |= scales if name == "qkv" else {}
    return module, with_scales, scalars


KERNELS |= {"prepare_scaled": _scaled("prepare"), "prepare_scaled_fp8": _scaled("prepare_fp8")}


def kernel_arguments(kernel: str, dtype: str) -> tuple[Argument, ...]:
    """The arguments of a kernel in order; `dtype` is its compute type."""
    _, buffers, scalars = KERNELS[kernel]
    pointers = (
        Argument(name, "pointer", dtype if element == "compute" else element, "buffer")
        for name, element in buffers.items()
    )
    values = (
        Argument(name, "float32" if _OPTIONS[name] == _F32 else "int32", None, "option")
        if name in _OPTIONS
        else Argument(name, "int32", None, "size")
        for name in scalars
    )
    return (*pointers, *values)
