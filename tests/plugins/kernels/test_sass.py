"""What the assembler made of *attend*: the properties that each default was chosen for, read from its machine code.

Timings decide which specialisation ships; these tests say when one has silently lost what made it fast.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from plugins.compile import kernels as builder
from runtime.bundle import images

triton = pytest.importorskip("triton")
DISASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"

REGISTERS = 65_536
SHARED_MEMORY = {90: 227 << 10, 120: 99 << 10}
RESERVED_SHARED_MEMORY = 1 << 10  # of each thread block
NAMES = {
    90: (
        "attend-bf16-d128-q128-ws",
        "attend-bf16-d128-q128",
        "attend-bf16-d128-q64",
        "attend_e4m3-bf16-d128-q128",
    ),
    120: ("attend-bf16-d128-q128", "attend-bf16-d128-q64", "attend_e4m3-bf16-d128-q64"),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sass")
    for arch, names in NAMES.items():
        builder.build((arch,), out, cache=out / "cache", jobs=2, only=lambda v, names=names: v.name in names)
    return out


def image(built: Path, arch: int, name: str) -> tuple[images.Image, list[str]]:
    """The image and the instructions of the smallest loop that holds products."""
    index, _ = images.read_images(built / f"sm_{arch}")
    (found,) = (image for image in index.images if image.name == name)
    path = built / f"sm_{arch}" / found.file
    text = subprocess.run([DISASSEMBLER, "-c", path], capture_output=True, text=True, check=True).stdout
    return found, product_loop(text)


def product_loop(text: str) -> list[str]:
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", line):
            instructions.append(instruction[1])
    loops = []
    for end, instruction in enumerate(instructions):
        target = re.search(r"^BRA.*`\(\.(L_x_\d+)\)", instruction)
        if target and labels.get(target[1], end + 1) <= end:
            loop = instructions[labels[target[1]] : end + 1]
            if any(re.match(r"[HQ]G?MMA", one) for one in loop):
                loops.append(loop)
    return min(loops, key=len)


def count(loop: list[str]) -> Counter[str]:
    """Instructions by the first part of their name."""
    return Counter(re.split(r"[.\s]", instruction)[0] for instruction in loop)


def blocks_per_processor(image: images.Image, arch: int) -> int:
    registers = -(-image.registers // 8) * 8 * image.threads
    shared = image.shared_memory + RESERVED_SHARED_MEMORY
    return min(REGISTERS // registers, (SHARED_MEMORY[arch] + RESERVED_SHARED_MEMORY) // shared)


def test_exponentials_run_during_products_on_hopper(built: Path) -> None:
    found, loop = image(built, 90, "attend-bf16-d128-q128-ws")
    assert blocks_per_processor(found, 90) == 1
    counts = count(loop)
    # 64 rows, 128 keys, head size 128, 16 at a time: eight products for the logits, eight for the output.
    assert counts["HGMMA"] == 16
    assert counts["LDSM"] == counts["LDL"] == counts["STL"] == 0
    # One turn: waited for and passed on.
    assert counts["BAR"] == 2
    waits = [i for i, one in enumerate(loop) if one.startswith("WARPGROUP.DEPBAR")]
    products = [i for i, one in enumerate(loop) if one.startswith("HGMMA")]
    exponentials = [i for i, one in enumerate(loop) if one.startswith("MUFU.EX2")]
    assert len(waits) == 2, "the compiler waits for products one by one"
    # A weight for each of 64 logits of a thread, and how far two rows decay: while the output is computed.
    assert len(exponentials) == 66
    assert max(products) < waits[0] < min(exponentials)
    assert max(exponentials) < waits[1]


@pytest.mark.parametrize("arch", [90, 120])
@pytest.mark.parametrize("block_q", [64, 128])
def test_two_blocks_share_a_processor(built: Path, arch: int, block_q: int) -> None:
    """So that one's softmax runs during the other's products; with 128 rows on sm_120, eight warps do among them."""
    found, loop = image(built, arch, f"attend-bf16-d128-q{block_q}")
    assert blocks_per_processor(found, arch) >= (1 if (arch, block_q) == (120, 128) else 2)
    counts = count(loop)
    assert counts["LDL"] == counts["STL"] == 0
    if arch == 90:
        k_tile = {64: 64, 128: 32}[block_q]
        assert counts["HGMMA"] == 128 // 16 + k_tile // 16
        assert counts["LDSM"] == 0, "queries are read from shared memory at every step"
        assert sum(one.startswith("WARPGROUP.DEPBAR") for one in loop) <= 2


@pytest.mark.parametrize("block_q", [64, 128])
def test_products_are_what_limits_geforce_blackwell(built: Path, block_q: int) -> None:
    """By a step's issue slots: nothing but its products may take more than a quarter of their time."""
    _, loop = image(built, 120, f"attend-bf16-d128-q{block_q}")
    counts = count(loop)
    # A warp's 16 rows, 64 keys, head size 128, in products of 16 x 8 x 16: as many for the logits as for the output.
    assert counts["HMMA"] == 2 * (64 // 8) * (128 // 16)
    # 209.5 TFLOP/s with fp32 sums on 170 processors at 2.407 GHz: 512 FLOP a cycle, 128 in each quarter.
    cycles = 2 * 16 * 8 * 16 / 128 * counts["HMMA"]
    issued = sum(counts.values()) - counts["HMMA"] - counts["NOP"]
    assert issued < cycles / 4
    assert counts["MUFU"] * 32 / 4 < cycles / 4  # four lanes a cycle
    assert counts["LDSM"] * 4 * 4 < cycles / 2  # 512 bytes each, of 128 a cycle that four quarters share
    # Keys and values of the next step are on their way while this one is computed.
    copies = [i for i, one in enumerate(loop) if one.startswith("LDGSTS")]
    products = [i for i, one in enumerate(loop) if one.startswith("HMMA")]
    assert copies and min(copies) < max(products)


@pytest.mark.parametrize(("arch", "block_q", "product"), [(90, 128, "QGMMA"), (120, 64, "QMMA")])
def test_both_products_are_of_eight_bits(built: Path, arch: int, block_q: int, product: str) -> None:
    """Keys come out of shared memory as they are, values too, which lie channel by channel: no byte is moved to turn
    them. Only the means of blocks are multiplied in 16 bits.
    """
    _, loop = image(built, arch, f"attend_e4m3-bf16-d128-q{block_q}")
    counts = count(loop)
    operands = [one for one in loop if one.startswith(product)]
    assert all(".E4M3.E4M3" in one for one in operands)
    if arch == 90:
        # 64 rows of a warpgroup, 64 keys, head size 128, 32 of it at a time: four for logits, two for the output.
        assert [one.split()[0] for one in operands].count("QGMMA.64x64x32.F32.E4M3.E4M3") == 4
        assert [one.split()[0] for one in operands].count("QGMMA.64x128x32.F32.E4M3.E4M3") == 2
        # Of a warpgroup, or with Triton 3.6 of each warp.
        assert sorted((counts["HGMMA"], counts["HMMA"])) == [0, 128 // 16]
    else:
        # 16 rows of a warp times 8 keys or channels: 64 keys of 128, and 128 channels of 64 keys.
        assert len(operands) == 8 * 4 + 16 * 2
        assert counts["HMMA"] == 128 // 16
    # Weights are put in order by shuffles in fours; bytes are moved for them and nothing else.
    assert counts["PRMT"] <= 8
    assert counts["LDL"] == counts["STL"] == 0
    assert counts["LDG"] == 2, "only the scales of keys and values come past shared memory"
