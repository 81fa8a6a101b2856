"""How *attend* and *prepare* are tuned: what ships, and the candidates that are timed against it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from .variant import (
    DTYPES,
    MAX_FRAMES,
    MAX_HEADS,
    Argument,
    CudaSource,
    GridAxis,
    Variant,
    kernel_arguments,
)

__all__ = [
    "COMMIT_TILE",
    "ORDERED_BLOCKS",
    "QUERY_BLOCKS",
    "Tiles",
    "Warpgroups",
    "attend_variant",
    "attend_variants",
    "candidates",
    "fp8_variants",
    "ordered_variants",
    "prepare_variant",
    "scaled_prepare_variants",
    "warp_prepare_variant",
    "warpgroup_variant",
]


COMMIT_TILE = 4096
"""Elements of a frame that a program of `commit` copies."""


class Tiles(NamedTuple):
    """Tuning of attend."""

    k_tile: int
    v_tile: int
    warps: int
    stages: int
    max_registers: int | None = None

    @property
    def short(self) -> str:
        """A name of its own among the candidates of one query block."""
        parts = f"k{self.k_tile}s{self.stages}w{self.warps}"
        return parts + (f"-r{self.max_registers}" if self.max_registers else "")


def _attend_tiles(arch: int, head_dim: int, block_q: int, even: bool) -> Tiles:
    """Timed on sm_90; elsewhere chosen from registers, shared memory and the generated code."""
    wgmma = arch in (90, 100)
    if block_q == 32:
        return Tiles(32, head_dim, 4, 3) if wgmma else Tiles(32, head_dim // 2, 2, 2)
    warps = block_q // 16
    if arch == 90 and block_q == 128 and head_dim == 128 and even:
        # Two thread blocks share a multiprocessor: one's softmax runs during the other's products.
        return Tiles(32, head_dim, warps, 3, max_registers=128)
    if wgmma:
        return Tiles(64, head_dim, warps, 3)
    # 100 KiB of shared memory per multiprocessor on sm_86, 89 and 120, 164 on sm_80.
    stages = 3 if arch == 80 else 2
    if block_q == 64:
        return Tiles(64, 64, warps, stages)
    if not even and head_dim == 128:
        return Tiles(32, head_dim, warps, 3)  # 64 keys and their masks would spill
    return Tiles(64, head_dim, warps, stages)


def attend_variant(
    dtype: str, head_dim: int, block_q: int, even: bool, tiles: Tiles, suffix: str = ""
) -> Variant:
    """*attend* with `tiles`; `even`: blocks divide the frame."""
    name = f"attend-{DTYPES[dtype]}-d{head_dim}-q{block_q}" + ("" if even else "-ragged") + suffix
    blocks = (32, 64, 128) if block_q == 32 else (64, 128)
    return Variant(
        "attend",
        name,
        {
            "HEAD_DIM": head_dim,
            "Q_TILE": block_q,
            "K_TILE": tiles.k_tile,
            "V_TILE": tiles.v_tile,
            "FRAMES": MAX_FRAMES,
            "EVEN": even,
            "STAGES": tiles.stages,
            "INTERPRET": False,
        },
        tiles.warps,
        (GridAxis("query_blocks"), GridAxis("heads")),
        kernel_arguments("attend", dtype),
        {
            "dtype": (dtype,),
            "head_dim": (head_dim,),
            "block_q": (block_q,),
            "block_k": tuple(block for block in blocks if block >= tiles.k_tile),
            "even": (1,) if even else (0, 1),
        },
        {"past_frames": MAX_FRAMES},
        max_registers=tiles.max_registers,
    )


_ATTEND_CANDIDATES: dict[int, tuple[Tiles, ...]] = {
    128: (
        Tiles(64, 128, 8, 3),
        Tiles(128, 128, 8, 2),
        Tiles(64, 128, 8, 2, max_registers=128),
    ),
    64: (
        Tiles(64, 128, 4, 2),
        Tiles(128, 128, 4, 2),
        Tiles(32, 128, 4, 3, max_registers=128),
    ),
}
"""Tiles of attend that are timed on sm_90 besides the shipped ones, by query block."""


class Warpgroups(NamedTuple):
    """Tuning of attend_sm90.cu, where one warpgroup loads and two compute."""

    k_tile: int
    stages: int
    turns: bool = True
    blocks: int | None = None
    """Thread blocks that stay and take several query blocks each; None: one for each query block."""

    @property
    def short(self) -> str:
        """A name of its own among the candidates of one query block."""
        parts = f"ws-k{self.k_tile}s{self.stages}" + "-turns" * self.turns
        return parts + (f"-p{self.blocks}" if self.blocks else "")


_H200_PROCESSORS = 132
# 128 keys at a time where key blocks allow it.
_WARPGROUPS = {
    "-ws": Warpgroups(128, 2, blocks=_H200_PROCESSORS),
    "-ws-k64": Warpgroups(64, 4, blocks=_H200_PROCESSORS),
}
_WARPGROUP_CANDIDATES = (
    Warpgroups(128, 2),
    Warpgroups(64, 4),
    Warpgroups(128, 2, turns=False, blocks=_H200_PROCESSORS),
)
"""Ways to run attend_sm90.cu that are timed besides the shipped ones."""


def warpgroup_variant(dtype: str, tuning: Warpgroups, suffix: str = "") -> Variant:
    """*attend* on sm_90 with specialised warps: head size 128, query blocks of 128, even blocks."""
    name = f"attend-{DTYPES[dtype]}-d128-q128{suffix}"
    arguments = {argument.name: argument for argument in kernel_arguments("attend", dtype)}
    buffers = [argument for argument in arguments.values() if argument.source == "buffer"]
    sizes = ("heads", "frame_tokens", "past_frames", "query_blocks", "q_blocks", "key_blocks", "block_k")
    q_bytes, tile_bytes, barriers = 128 * 128 * 2, tuning.k_tile * 128 * 2, 16 + 32 * tuning.stages
    return Variant(
        "attend",
        name,
        {
            "K_TILE": tuning.k_tile,
            "STAGES": tuning.stages,
            "TURNS": tuning.turns,
            "HALF": dtype == "float16",
        },
        12,
        (tuning.blocks, 1) if tuning.blocks else (GridAxis("query_blocks"), GridAxis("heads")),
        (*buffers, *(Argument(size, "int32", None, "size") for size in sizes), arguments["scale"]),
        {
            "dtype": (dtype,),
            "head_dim": (128,),
            "block_q": (128,),
            "block_k": tuple(block for block in (64, 128) if block >= tuning.k_tile),
            "even": (1,),
        },
        {"past_frames": MAX_FRAMES},
        # The tiles start at a multiple of 1024.
        cuda=CudaSource("attend_sm90.cu", 1024 + q_bytes + 2 * tuning.stages * tile_bytes + barriers),
    )


def attend_variants(arch: int) -> Iterator[Variant]:
    """Every specialisation of *attend* that is built for `arch`, preferred ones first."""
    if arch == 90:
        for dtype in DTYPES:
            for suffix, tuning in _WARPGROUPS.items():
                yield warpgroup_variant(dtype, tuning, suffix)
    for head_dim in (128, 64):
        for dtype in DTYPES:
            for block_q in (128, 64, 32):
                for even in (True, False):
                    tiles = _attend_tiles(arch, head_dim, block_q, even)
                    yield attend_variant(dtype, head_dim, block_q, even, tiles)


_CONVERTS_E4M3 = 89
"""The first architecture that converts and multiplies E4M3 in hardware."""


def _fp8_tiles(arch: int, head_dim: int, block_q: int) -> Tiles:
    """Chosen so that nothing spills: 64 keys a step, and the output in halves where its sums share the registers with
    the operands of its products.
    """
    if arch in (90, 100):
        return Tiles(32 if block_q == 32 else 64, head_dim, 4 if block_q == 32 else block_q // 16, 3)
    if block_q == 32:
        return Tiles(32, min(head_dim, 64), 4 if head_dim == 128 else 2, 2)
    return Tiles(64, min(head_dim, 64), block_q // 16, 2)


def fp8_variants(arch: int) -> Iterator[Variant]:
    """Every specialisation of the kernels over codes: compute type bfloat16."""
    dtype, hardware = "bfloat16", arch >= _CONVERTS_E4M3
    for head_dim in (128, 64):
        sizes: dict[str, tuple[int | str, ...]] = {"head_dim": (head_dim,)}
        yield replace(
            prepare_variant(dtype, head_dim),
            kernel="prepare_fp8",
            name=f"prepare_fp8-{DTYPES[dtype]}-d{head_dim}",
            constants={**prepare_variant(dtype, head_dim).constants, "HARDWARE": hardware},
            arguments=kernel_arguments("prepare_fp8", dtype),
        )
        yield Variant(
            "commit_fp8",
            f"commit_fp8-d{head_dim}",
            {"HEAD_DIM": head_dim, "TILE": COMMIT_TILE},
            4,
            (GridAxis("frame_elements", COMMIT_TILE), GridAxis("chunk_frames"), 2),
            kernel_arguments("commit_fp8", dtype),
            sizes,
        )
        yield Variant(
            "rope_sink_fp8",
            f"rope_sink_fp8-d{head_dim}",
            {"HEAD_DIM": head_dim, "TILE": 32, "HARDWARE": hardware},
            4,
            (GridAxis("k_blocks"), GridAxis("heads"), GridAxis("sinks")),
            kernel_arguments("rope_sink_fp8", dtype),
            sizes,
        )
        for block_q in (128, 64, 32):
            for even in (True, False):
                plain = attend_variant(dtype, head_dim, block_q, even, _fp8_tiles(arch, head_dim, block_q))
                for kernel in ("attend_fp8", "attend_e4m3")[: 1 + hardware]:
                    products = {"HARDWARE": hardware, "E4M3": kernel == "attend_e4m3"}
                    yield replace(
                        plain,
                        kernel=kernel,
                        name=plain.name.replace("attend", kernel),
                        constants={**plain.constants, **products},
                        arguments=kernel_arguments(kernel, dtype),
                    )


QUERY_BLOCKS = (32, 64, 128)
"""Query blocks of *attend*."""

ORDERED_BLOCKS = (8, 16, 32, 64)
"""Key blocks of an order of tokens. Small ones leave little room in them unused where patches are small."""


def _ordered_tiles(arch: int, head_dim: int, block_q: int) -> Tiles:
    """Chosen so that nothing spills: every row of a tile has an address of its own."""
    tiles = _attend_tiles(arch, head_dim, block_q, False)
    if (head_dim, block_q) != (128, 64):
        return tiles._replace(k_tile=32)
    return tiles if arch in (90, 100) else Tiles(64, 128, 8, 2)


def ordered_variants(arch: int) -> Iterator[Variant]:
    """Every specialisation of *attend* over orders of tokens: compute type bfloat16."""
    for head_dim in (128, 64):
        for block_q in QUERY_BLOCKS:
            tiles = _ordered_tiles(arch, head_dim, block_q)
            plain = attend_variant("bfloat16", head_dim, block_q, False, tiles)
            constants = {name: value for name, value in plain.constants.items() if name != "EVEN"}
            serves = {name: values for name, values in plain.serves.items() if name != "even"}
            yield replace(
                plain,
                kernel="attend_ordered",
                name=plain.name.replace("attend", "attend_ordered").removesuffix("-ragged"),
                constants=constants,
                arguments=kernel_arguments("attend_ordered", "bfloat16"),
                serves={**serves, "block_k": ORDERED_BLOCKS},
            )


_WARP_CANDIDATES = (12, 8, 6, 4)
"""Warps of prepare_sm90.cu, which no GPU has executed yet."""


def prepare_variant(dtype: str, head_dim: int) -> Variant:
    """*prepare* in Triton."""
    return Variant(
        "prepare",
        f"prepare-{DTYPES[dtype]}-d{head_dim}",
        {"HEAD_DIM": head_dim, "WIDTH": head_dim * MAX_HEADS, "ROWS": 4, "STAGES": 3},
        8,
        (GridAxis("row_blocks"), 3),
        kernel_arguments("prepare", dtype),
        {"dtype": (dtype,), "head_dim": (head_dim,)},
        {"heads": MAX_HEADS},
    )


_SCALED_ARCHS = (89, 120)
"""Where engines leave the scales of a projection to *prepare*: TensorRT-RTX's, of GPUs that multiply codes."""


def scaled_prepare_variants(arch: int) -> Iterator[Variant]:
    """*prepare* on products of codes, keys and values in bfloat16 or as codes."""
    for head_dim in (128, 64) if arch in _SCALED_ARCHS else ():
        plain = prepare_variant("bfloat16", head_dim)
        for suffix, more in (("", {}), ("_fp8", {"HARDWARE": True})):
            kernel = f"prepare_scaled{suffix}"
            yield replace(
                plain,
                kernel=kernel,
                name=f"{kernel}-{DTYPES['bfloat16']}-d{head_dim}",
                constants={**plain.constants, **more},
                arguments=kernel_arguments(kernel, "bfloat16"),
            )


def warp_prepare_variant(dtype: str, warps: int, suffix: str) -> Variant:
    """*prepare* on sm_90, a row for each of `warps`: twelve heads of 128."""
    heads, head_dim = 12, 128
    width = heads * head_dim
    arguments = tuple(a for a in kernel_arguments("prepare", dtype) if a.name != "heads")
    return Variant(
        "prepare",
        f"prepare-{DTYPES[dtype]}-d{head_dim}{suffix}",
        {"HEADS": heads, "WARPS": warps, "HALF": dtype == "float16"},
        warps,
        (GridAxis("row_blocks"), 3),
        arguments,
        {"dtype": (dtype,), "head_dim": (head_dim,), "heads": (heads,)},
        # Bias and weights of the norm, and a sum for each warp.
        cuda=CudaSource("prepare_sm90.cu", 2 * width * 2 + warps * width * 4),
    )


def candidates(arch: int) -> tuple[Variant, ...]:
    """What is to be timed besides the shipped specialisations, named after its tuning."""
    if arch != 90:
        return ()
    return (
        *(warp_prepare_variant("bfloat16", warps, f"-w{warps}") for warps in _WARP_CANDIDATES),
        *(
            attend_variant("bfloat16", 128, block_q, True, tiles, f"-{tiles.short}")
            for block_q, offered in _ATTEND_CANDIDATES.items()
            for tiles in offered
        ),
        *(warpgroup_variant("bfloat16", tuning, f"-{tuning.short}") for tuning in _WARPGROUP_CANDIDATES),
    )
