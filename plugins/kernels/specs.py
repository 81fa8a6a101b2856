"""How the kernels are specialised and launched: the one table behind the just-in-time and the ahead-of-time path.

A *problem* holds the sizes of a call. A *variant* is one specialisation of a kernel: its compile-time constants, the
problems it serves, its grid, and the order and types of its arguments. Argument and size names are the vocabulary
of the image format (docs/kernels.md); a kernel that replaces one of these keeps to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any, Literal, NamedTuple

from plugins.errors import PluginError

__all__ = [
    "ARCHS",
    "ATTEND_CANDIDATES",
    "DTYPES",
    "KERNELS",
    "PREPARE_CANDIDATES",
    "WARPGROUP_CANDIDATES",
    "Argument",
    "CudaSource",
    "GridAxis",
    "KernelError",
    "Problem",
    "Rows",
    "Tiles",
    "Variant",
    "Warpgroups",
    "attend_variant",
    "candidates",
    "find_variant",
    "image_arch",
    "kernel_function",
    "prepare_variant",
    "variants",
    "warpgroup_variant",
]

ARCHS = (80, 86, 89, 90, 100, 120)
"""Compute capabilities (times ten) that images are built for."""

DTYPES = {"bfloat16": "bf16", "float16": "fp16"}
"""Compute types and their short names."""

MAX_FRAMES = 32
MAX_HEADS = 16
_ROPE_TILE = 64
_COMMIT_TILE = 4096
_SCORE_Q, _SCORE_K = 32, 64


class KernelError(PluginError, ValueError):
    """No kernel serves what was asked for."""


@dataclass(frozen=True)
class Problem:
    """Sizes of one call. `past_frames` is the length of `frame_slots`, the largest number of past frames."""

    dtype: str
    heads: int
    head_dim: int
    frame_tokens: int
    chunk_frames: int
    past_frames: int
    block_q: int
    block_k: int
    sinks: int = 0

    def sizes(self) -> dict[str, int]:
        """The integers that grids and integer arguments are made of, and that choose a variant."""
        q_blocks = -(-self.frame_tokens // self.block_q)
        k_blocks = -(-self.frame_tokens // self.block_k)
        frames = self.past_frames + self.chunk_frames
        return {
            "heads": self.heads,
            "head_dim": self.head_dim,
            "frame_tokens": self.frame_tokens,
            "chunk_frames": self.chunk_frames,
            "past_frames": self.past_frames,
            "frames": frames,
            "block_q": self.block_q,
            "block_k": self.block_k,
            "q_blocks": q_blocks,
            "k_blocks": k_blocks,
            "query_blocks": self.chunk_frames * q_blocks,
            "key_blocks": frames * k_blocks,
            "row_blocks": self.chunk_frames * max(q_blocks, k_blocks),
            "frame_elements": self.frame_tokens * self.heads * self.head_dim,
            "even": int(self.frame_tokens % self.block_q == 0 and self.frame_tokens % self.block_k == 0),
            "sinks": self.sinks,
        }


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

    def fits(self, problem: Problem) -> bool:
        """Whether this variant serves `problem`."""
        facts: dict[str, int | str] = {**problem.sizes(), "dtype": problem.dtype}
        sizes = problem.sizes()
        return all(facts[key] in values for key, values in self.serves.items()) and all(
            sizes[key] <= limit for key, limit in self.limits.items()
        )

    def grid_for(self, problem: Problem) -> tuple[int, ...]:
        """Programs along each axis."""
        sizes = problem.sizes()
        return tuple(
            axis if isinstance(axis, int) else -(-sizes[axis.size] // axis.tile) for axis in self.grid
        )


_F32, _I32 = "float32", "int32"
_OPTIONS = {
    "eps": _F32,
    "scale": _F32,
    "table_entries": _I32,
    "keep_frames": _I32,
    "sink_frames": _I32,
    "near_frames": _I32,
    "turned_pairs": _I32,
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


def kernel_function(kernel: str) -> Any:
    """The Triton function of `kernel`. Imports Triton."""
    return getattr(import_module(f".{KERNELS[kernel][0]}", __package__), kernel)


def _arguments(kernel: str, dtype: str) -> tuple[Argument, ...]:
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


class Tiles(NamedTuple):
    """Tuning of attend."""

    k_tile: int
    v_tile: int
    warps: int
    stages: int
    hold_q: bool = False
    max_registers: int | None = None

    @property
    def short(self) -> str:
        """A name of its own among the candidates of one query block."""
        parts = [f"k{self.k_tile}", f"s{self.stages}", f"w{self.warps}"]
        return (
            "".join(parts) + "-held" * self.hold_q + (f"-r{self.max_registers}" if self.max_registers else "")
        )


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
        _arguments("attend", dtype),
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


ATTEND_CANDIDATES: dict[int, tuple[Tiles, ...]] = {
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
_WARPGROUPS = Warpgroups(128, 2, blocks=_H200_PROCESSORS)
WARPGROUP_CANDIDATES = (
    Warpgroups(128, 2),
    Warpgroups(64, 4, blocks=_H200_PROCESSORS),
    Warpgroups(128, 2, turns=False, blocks=_H200_PROCESSORS),
)
"""Ways to run attend_sm90.cu that are timed besides the shipped one."""


def warpgroup_variant(dtype: str, tuning: Warpgroups, suffix: str = "") -> Variant:
    """*attend* on sm_90 with specialised warps: head size 128, query blocks of 128, even blocks."""
    name = f"attend-{DTYPES[dtype]}-d128-q128{suffix}"
    arguments = {argument.name: argument for argument in _arguments("attend", dtype)}
    buffers = [argument for argument in arguments.values() if argument.source == "buffer"]
    sizes = ("heads", "frame_tokens", "past_frames", "query_blocks", "q_blocks", "key_blocks", "block_k")
    q_bytes, tile_bytes, barriers = 128 * 128 * 2, tuning.k_tile * 128 * 2, 32 + 32 * tuning.stages
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
            "block_k": (64, 128),
            "even": (1,),
        },
        {"past_frames": MAX_FRAMES},
        # The tiles start at a multiple of 1024.
        cuda=CudaSource("attend_sm90.cu", 1024 + 2 * q_bytes + 2 * tuning.stages * tile_bytes + barriers),
    )


def _attend_variants(arch: int) -> Iterator[Variant]:
    if arch == 90:
        for dtype in DTYPES:
            yield warpgroup_variant(dtype, _WARPGROUPS, "-ws")
    for head_dim in (128, 64):
        for dtype in DTYPES:
            for block_q in (128, 64, 32):
                for even in (True, False):
                    tiles = _attend_tiles(arch, head_dim, block_q, even)
                    yield attend_variant(dtype, head_dim, block_q, even, tiles)


class Rows(NamedTuple):
    """Tuning of prepare."""

    heads: int
    """Heads of a program."""
    rows: int
    """Rows that it takes at once."""
    warps: int
    stages: int


PREPARE_CANDIDATES = (
    Rows(4, 4, 8, 3),
    Rows(4, 8, 8, 2),
    Rows(4, 4, 4, 3),
    Rows(2, 4, 4, 3),
    Rows(MAX_HEADS, 8, 16, 3),
)
"""Ways to run prepare that are to be timed."""


def prepare_variant(dtype: str, head_dim: int, rows: Rows, suffix: str = "") -> Variant:
    """*prepare* with `rows`."""
    return Variant(
        "prepare",
        f"prepare-{DTYPES[dtype]}-d{head_dim}{suffix}",
        {
            "HEAD_DIM": head_dim,
            "WIDTH": head_dim * MAX_HEADS,
            "PART": head_dim * rows.heads,
            "ROWS": rows.rows,
            "STAGES": rows.stages,
        },
        rows.warps,
        (GridAxis("row_blocks"), 3, GridAxis("heads", rows.heads)),
        _arguments("prepare", dtype),
        {"dtype": (dtype,), "head_dim": (head_dim,)},
        {"heads": MAX_HEADS},
    )


def candidates(arch: int) -> tuple[Variant, ...]:
    """What is to be timed besides the shipped specialisations, named after its tuning."""
    if arch != 90:
        return ()
    return (
        *(
            prepare_variant("bfloat16", 128, rows, "-h{}r{}w{}s{}".format(*rows))
            for rows in PREPARE_CANDIDATES
        ),
        *(
            attend_variant("bfloat16", 128, block_q, True, tiles, f"-{tiles.short}")
            for block_q, offered in ATTEND_CANDIDATES.items()
            for tiles in offered
        ),
        *(warpgroup_variant("bfloat16", tuning, f"-{tuning.short}") for tuning in WARPGROUP_CANDIDATES),
    )


def _other_variants() -> Iterator[Variant]:
    for head_dim in (128, 64):
        for dtype, short in DTYPES.items():
            yield prepare_variant(dtype, head_dim, Rows(MAX_HEADS, 4, 8, 3))
            yield Variant(
                "rope_sink",
                f"rope_sink-{short}-d{head_dim}",
                {"HEAD_DIM": head_dim, "TILE": _ROPE_TILE},
                8,
                (GridAxis("frame_tokens", _ROPE_TILE), GridAxis("heads"), GridAxis("sinks")),
                _arguments("rope_sink", dtype),
                {"dtype": (dtype,), "head_dim": (head_dim,)},
            )
        yield Variant(
            "commit",
            f"commit-d{head_dim}",
            {"HEAD_DIM": head_dim, "TILE": _COMMIT_TILE},
            4,
            (GridAxis("frame_elements", _COMMIT_TILE), GridAxis("chunk_frames"), 2),
            _arguments("commit", "int16"),
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
            _arguments("score", _F32),
            {"head_dim": (head_dim,)},
            {"past_frames": MAX_FRAMES},
        )
    for blocks, warps in ((16, 1), (32, 1), (64, 2)):
        yield Variant(
            "select",
            f"select-b{blocks}",
            {"FRAMES": MAX_FRAMES, "BLOCKS": blocks},
            warps,
            (GridAxis("query_blocks"), GridAxis("heads")),
            _arguments("select", _F32),
            {},
            {"frames": MAX_FRAMES, "k_blocks": blocks},
        )


@cache
def variants(arch: int) -> tuple[Variant, ...]:
    """Every specialisation that is built for compute capability `arch` (e.g. 90), preferred ones first."""
    if arch not in ARCHS:
        known = ", ".join(f"sm_{a}" for a in ARCHS)
        raise KernelError(f"there are no kernels for sm_{arch}; expected one of {known}")
    return (*_other_variants(), *_attend_variants(arch))


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


def find_variant(kernel: str, problem: Problem, arch: int, *, triton_only: bool = False) -> Variant:
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
