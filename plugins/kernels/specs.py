"""How the kernels are specialised and launched: the one table behind the just-in-time and the ahead-of-time path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import Any

from runtime.bundle.images import KernelProblem

from .tuning import (
    COMMIT_TILE,
    attend_variants,
    candidates,
    fp8_variants,
    ordered_variants,
    prepare_variant,
    scaled_prepare_variants,
)
from .variant import (
    ARCHS,
    DRIVERS,
    DTYPES,
    KERNELS,
    MAX_FRAMES,
    Argument,
    CudaSource,
    GridAxis,
    KernelError,
    Variant,
    kernel_arguments,
    least_driver,
)

__all__ = [
    "ARCHS",
    "DRIVERS",
    "DTYPES",
    "KERNELS",
    "MAX_FRAMES",
    "Argument",
    "CudaSource",
    "GridAxis",
    "KernelError",
    "KernelProblem",
    "Variant",
    "candidates",
    "find_variant",
    "image_arch",
    "kernel_function",
    "least_driver",
    "variants",
]

_POOLING: Mapping[str, tuple[GridAxis | int, ...]] = {
    "mean_key": (GridAxis("heads"), 1),
    "resemble": (GridAxis("key_blocks"), GridAxis("heads")),
    "pool": (GridAxis("groups"), GridAxis("heads")),
}
"""Kernels that take means of tokens, and their grids."""
_SELECTS: Mapping[str, Mapping[int, int]] = {
    "select": {16: 1, 32: 1, 64: 2},
    "select_pinned": {16: 1, 32: 1, 64: 2},
    "select_sparge": {16: 1, 32: 2, 64: 4},
}
"""Kernels that choose among the blocks of all frames: blocks of a frame, and warps."""
_ROPE_TILE = 64
_SCORE_Q, _SCORE_K = 32, 64


def kernel_function(kernel: str) -> Any:
    """The Triton function of `kernel`. Imports Triton."""
    return getattr(import_module(f".{KERNELS[kernel][0]}", __package__), kernel)


def _persistent_variants() -> Iterator[Variant]:
    """Of the kernels that update a persistent set, by the most blocks that are resident."""
    for blocks in (512, 1024, 2048):
        limits = {"frames": MAX_FRAMES, "key_blocks": blocks}
        yield Variant(
            "weigh",
            f"weigh-b{blocks}",
            {"FRAMES": MAX_FRAMES, "COLUMNS": blocks, "ROWS": 4096 // blocks},
            8,
            (GridAxis("heads"), 1),
            kernel_arguments("weigh", "float32"),
            {},
            limits,
        )
        for head_dim in (128, 64):
            yield Variant(
                "persist",
                f"persist-d{head_dim}-b{blocks}",
                {"HEAD_DIM": head_dim, "CONTENDERS": blocks, "TILE": 32},
                4,
                (GridAxis("key_blocks"), GridAxis("heads")),
                kernel_arguments("persist", "int16"),
                {"head_dim": (head_dim,)},
                limits,
            )


def _other_variants() -> Iterator[Variant]:
    for head_dim in (128, 64):
        for dtype, short in DTYPES.items():
            yield prepare_variant(dtype, head_dim)
            yield Variant(
                "rope_sink",
                f"rope_sink-{short}-d{head_dim}",
                {"HEAD_DIM": head_dim, "TILE": _ROPE_TILE},
                8,
                (GridAxis("frame_tokens", _ROPE_TILE), GridAxis("heads"), GridAxis("sinks")),
                kernel_arguments("rope_sink", dtype),
                {"dtype": (dtype,), "head_dim": (head_dim,)},
            )
        yield Variant(
            "commit",
            f"commit-d{head_dim}",
            {"HEAD_DIM": head_dim, "TILE": COMMIT_TILE},
            4,
            (GridAxis("frame_elements", COMMIT_TILE), GridAxis("chunk_frames"), 2),
            kernel_arguments("commit", "int16"),
            {"head_dim": (head_dim,)},
        )
        yield Variant(
            "score",
            f"score-d{head_dim}",
            {
                "HEAD_DIM": head_dim,
                "FRAMES": MAX_FRAMES,
                "Q_TILE": _SCORE_Q,
                "K_TILE": _SCORE_K,
                "D_TILE": 32,
            },
            4,
            (GridAxis("key_blocks", _SCORE_K), GridAxis("query_blocks", _SCORE_Q), GridAxis("heads")),
            kernel_arguments("score", "float32"),
            {"head_dim": (head_dim,)},
            {"past_frames": MAX_FRAMES},
        )
    for kernel, of_blocks in _SELECTS.items():
        for blocks, warps in of_blocks.items():
            yield Variant(
                kernel,
                f"{kernel}-b{blocks}",
                {"FRAMES": MAX_FRAMES, "BLOCKS": blocks},
                warps,
                (GridAxis("query_blocks"), GridAxis("heads")),
                kernel_arguments(kernel, "float32"),
                {},
                {"frames": MAX_FRAMES, "k_blocks": blocks},
            )
    yield from _persistent_variants()
    for groups, warps in ((256, 2), (1024, 4), (4096, 8)):
        yield Variant(
            "choose",
            f"choose-g{groups}",
            {"FRAMES": MAX_FRAMES, "GROUPS": groups},
            warps,
            (GridAxis("query_blocks"), GridAxis("heads")),
            kernel_arguments("choose", "float32"),
            {},
            {"frames": MAX_FRAMES, "groups": groups},
        )
    for head_dim in (128, 64):
        yield Variant(
            "score_groups",
            f"score_groups-d{head_dim}",
            {"HEAD_DIM": head_dim, "Q_TILE": _SCORE_Q, "K_TILE": _SCORE_K, "D_TILE": 32},
            4,
            (GridAxis("groups", _SCORE_K), GridAxis("query_blocks", _SCORE_Q), GridAxis("heads")),
            kernel_arguments("score_groups", "float32"),
            {"head_dim": (head_dim,)},
        )
        for kernel, axes in _POOLING.items():
            yield Variant(
                kernel,
                f"{kernel}-bf16-d{head_dim}",
                {"HEAD_DIM": head_dim, "FRAMES": MAX_FRAMES, "TILE": 32},
                4,
                axes,
                kernel_arguments(kernel, "bfloat16"),
                {"dtype": ("bfloat16",), "head_dim": (head_dim,)},
                {"frames": MAX_FRAMES},
            )
    yield from _linear_variants()
    for blocks, warps in ((32, 1), (128, 4), (256, 8)):
        yield Variant(
            "expand",
            f"expand-b{blocks}",
            {"FRAMES": MAX_FRAMES, "BLOCKS": blocks},
            warps,
            (GridAxis("query_blocks"), GridAxis("heads")),
            kernel_arguments("expand", "float32"),
            {},
            {"frames": MAX_FRAMES, "k_blocks": blocks},
        )


def _linear_variants() -> Iterator[Variant]:
    """SLA's linear branch: compute type bfloat16."""
    for head_dim in (128, 64):
        size, frames = {"HEAD_DIM": head_dim}, {"FRAMES": MAX_FRAMES}
        columns = min(head_dim, 64)
        for kernel, constants, warps, grid in (
            (
                "sum_linear",
                {**size, **frames, "TILE": 32, "V_TILE": columns, "INTERPRET": False},
                4,
                (GridAxis("frames"), GridAxis("heads"), head_dim // columns),
            ),
            (
                "project_linear",
                {**size, **frames, "TILE": 16, "D_TILE": 32},
                4,
                (GridAxis("heads"), head_dim // 16),
            ),
            (
                "add_linear",
                {**size, "TILE": 32, "INTERPRET": False},
                4,
                (GridAxis("query_blocks"), GridAxis("heads")),
            ),
        ):
            yield Variant(
                kernel,
                f"{kernel}-bf16-d{head_dim}",
                constants,
                warps,
                grid,
                kernel_arguments(kernel, "bfloat16"),
                {"dtype": ("bfloat16",), "head_dim": (head_dim,)},
                {"frames": MAX_FRAMES},
            )


@cache
def variants(arch: int) -> tuple[Variant, ...]:
    """Every specialisation that is built for compute capability `arch` (e.g. 90), preferred ones first.

    Raises:
        KernelError: there are no kernels for that architecture.
    """
    if arch not in ARCHS:
        known = ", ".join(f"sm_{a}" for a in ARCHS)
        raise KernelError(f"there are no kernels for sm_{arch}; expected one of {known}")
    of_methods = (*attend_variants(arch), *fp8_variants(arch), *ordered_variants(arch))
    return (*_other_variants(), *scaled_prepare_variants(arch), *of_methods)


def image_arch(capability: int) -> int:
    """The architecture whose specialisations suit a device of compute capability `capability` (e.g. 87 -> 80).

    Raises:
        KernelError: the device is older than all of them, or of an unknown generation.
    """
    same = [arch for arch in ARCHS if arch // 10 == capability // 10 and arch <= capability]
    if not same:
        known = ", ".join(f"sm_{arch}" for arch in ARCHS)
        raise KernelError(
            f"no kernels suit sm_{capability}; expected a device of one of {known} or a minor revision"
        )
    return same[-1]


def find_variant(kernel: str, problem: KernelProblem, arch: int, *, triton_only: bool = False) -> Variant:
    """The preferred specialisation of `kernel` for `problem` on compute capability `arch`.

    Args:
        triton_only: leave out those in CUDA C++, which Triton cannot compile just in time.

    Raises:
        KernelError: none serves it; the message lists what is served.
    """
    offered = [
        variant
        for variant in variants(arch)
        if variant.kernel == kernel and not (triton_only and variant.cuda)
    ]
    for variant in offered:
        if variant.fits(problem):
            return variant
    served = [
        f"{key} {', '.join(sorted({str(v) for variant in offered for v in variant.serves.get(key, ())}))}"
        for key in dict.fromkeys(key for variant in offered for key in variant.serves)
    ]
    served += [
        f"{key} up to {max(variant.limits.get(key, 0) for variant in offered)}"
        for key in dict.fromkeys(key for variant in offered for key in variant.limits)
    ]
    raise KernelError(
        f"no specialisation of {kernel!r} for sm_{arch} serves {problem}; its specialisations serve (not in every "
        f"combination) {'; '.join(served)}"
    )
