"""The kernels in CUDA C++ on a CPU, over an emulation of Hopper's barriers, copies and products (`emulated/`).

The kernels' own sources run, a thread of the machine for each of theirs, against the reference: layouts, rings and
hand-overs are checked, speed and the PTX underneath are not.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightforcing_ref import attention as oracle
from plugins.eager.policies import lists_from_mask
from plugins.kernels import specs
from plugins.kernels.tuning import Warpgroups, warp_prepare_variant, warpgroup_variant

EMULATED = Path(__file__).parent / "emulated"
COMPILER = shutil.which("c++") or shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")

HEADS, HEAD_DIM, FRAME = 2, 128, 256
PAST, MAX_PAST, CHUNK = 2, 3, 1


def library(folder: Path, variant: specs.Variant) -> ctypes.CDLL:
    """The kernel of `variant`, compiled for this machine."""
    assert variant.cuda is not None
    for file in EMULATED.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    source = folder / f"{variant.cuda.file}.inc"
    source.write_bytes((Path(specs.__file__).parent / variant.cuda.file).read_bytes())
    macros = {name: str(int(value)) for name, value in variant.constants.items()}
    macros["KERNEL_SOURCE"] = f'"{source.name}"'
    command = [str(COMPILER), "-std=c++20", "-O2", "-shared", "-fPIC", "-pthread"]
    command += [f"-D{name}={value}" for name, value in macros.items()]
    command += [str(folder / f"{variant.kernel}.cpp"), "-o", str(folder / "kernel.so")]
    subprocess.run(command, check=True, timeout=300)
    return ctypes.CDLL(str(folder / "kernel.so"))


def run(
    folder: Path,
    variant: specs.Variant,
    problem: specs.KernelProblem,
    buffers: dict[str, Tensor],
    option: float,
) -> None:
    """Compile and launch `variant`; `option` is its only option."""
    assert variant.cuda is not None
    values: list[object] = []
    for argument in variant.arguments:
        if argument.source == "buffer":
            values.append(ctypes.c_void_p(buffers[argument.name].data_ptr()))
        elif argument.source == "size":
            values.append(ctypes.c_int(problem.sizes()[argument.name]))
        else:
            values.append(ctypes.c_float(option))
    shape = (*variant.grid_for(problem)[:2], 32 * variant.num_warps, variant.cuda.shared_memory)
    library(folder, variant).run(*(ctypes.c_uint(size) for size in shape), *values)


@pytest.mark.parametrize(
    ("tuning", "block_k"),
    [
        (Warpgroups(128, 2), 128),
        (Warpgroups(128, 2, blocks=3), 128),
        (Warpgroups(64, 4, turns=False), 64),
        (Warpgroups(64, 4, blocks=3), 128),
    ],
    ids=str,
)
@pytest.mark.timeout(120)
def test_kernel_computes_the_listed_blocks(tuning: Warpgroups, block_k: int, tmp_path: Path) -> None:
    """Three thread blocks that stay share the last of the four query blocks by halves."""
    variant = warpgroup_variant("bfloat16", tuning)
    problem = specs.KernelProblem("bfloat16", HEADS, HEAD_DIM, FRAME, CHUNK, MAX_PAST, 128, block_k)
    assert variant.fits(problem)
    sizes = problem.sizes()
    generator = torch.Generator().manual_seed(tuning.k_tile + block_k)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, HEADS, HEAD_DIM, generator=generator).bfloat16()

    slots = torch.tensor([3, 1, -1], dtype=torch.int32)
    past_k, past_v = (torch.full((4, FRAME, HEADS, HEAD_DIM), float("nan")).bfloat16() for _ in range(2))
    for cache in (past_k, past_v):
        for slot in slots[:PAST]:
            cache[slot] = normal(FRAME)
    buffers = {name: normal(CHUNK * FRAME) for name in ("q", "k", "v")}
    buffers |= {"past_k": past_k, "past_v": past_v, "frame_slots": slots}
    resident = (PAST + CHUNK) * sizes["k_blocks"]
    # Rows of different lengths, one of them empty and one of a single block.
    mask = torch.rand(HEADS, sizes["query_blocks"], resident, generator=generator) < 0.7
    mask[0, 0], mask[1, 1] = False, False
    mask[1, 1, 4] = True
    lists = lists_from_mask(mask, sizes["k_blocks"], sizes["key_blocks"])
    out = torch.full((CHUNK * FRAME + 2, HEADS, HEAD_DIM), float("nan")).bfloat16()
    buffers |= {"lists": lists.entries, "counts": lists.counts, "out": out[1:-1]}

    run(tmp_path, variant, problem, buffers, HEAD_DIM**-0.5)

    keys, values = (
        torch.cat((buffers[f"past_{x}"][slots[:PAST].long()].flatten(0, 1), buffers[x])).float()
        for x in ("k", "v")
    )
    seen = mask.repeat_interleave(128, 1).repeat_interleave(block_k, 2)
    expected = oracle.dense_attention(buffers["q"].float(), keys, values, HEAD_DIM**-0.5, seen)
    expected[:128, 0] = 0.0
    assert out[0].isnan().all(), "written in front of the output"
    assert out[-1].isnan().all(), "written behind the output"
    error = float((out[1:-1].float() - expected).norm() / expected.norm())
    assert error < 5e-3


@pytest.mark.parametrize("warps", [4, 12])
@pytest.mark.timeout(120)
def test_prepare(warps: int, tmp_path: Path) -> None:
    """A frame of which the last blocks are short, and one role with more blocks than the other."""
    variant = warp_prepare_variant("bfloat16", warps, "")
    problem = specs.KernelProblem("bfloat16", 12, HEAD_DIM, 104, 2, 0, 64, 32)
    assert variant.fits(problem)
    tokens, width = 2 * 104, 12 * HEAD_DIM
    generator = torch.Generator().manual_seed(warps)
    shapes = {"qkv": (tokens, 3 * width), "bias": (3 * width,), "norm_q": (width,), "norm_k": (width,)}
    inputs = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    angle = torch.randn(tokens, HEAD_DIM // 2, generator=generator)
    inputs |= {"cos": angle.cos(), "sin": angle.sin()}
    out = {
        name: torch.full((tokens, 12, HEAD_DIM), float("nan"), dtype=torch.bfloat16)
        for name in ("q", "k", "v")
    }
    out |= {
        name: torch.full((2, blocks, 12, HEAD_DIM), float("nan"))
        for name, blocks in (("q_mean", 2), ("k_mean", 4))
    }

    run(tmp_path, variant, problem, {**inputs, **out}, 1e-6)

    geometry = {"heads": 12, "frame_tokens": 104, "block_q": 64, "block_k": 32}
    want = oracle.qk_prepare(*(x.float() for x in inputs.values()), **geometry, eps=1e-6)
    for found, expected in zip(list(out.values())[:3], want[:3], strict=True):
        assert float((found.float() - expected).norm() / expected.norm()) < 3e-3
    for name, block in (("q", 64), ("k", 32)):
        means = oracle.block_means(out[name], 104, block)
        assert float((out[f"{name}_mean"] - means).norm() / means.norm()) < 1e-6
