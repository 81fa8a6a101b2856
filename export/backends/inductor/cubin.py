"""What compiled kernels say about themselves: registers, and memory on the stack, which is where registers spill to.

Read from the section `.nv.info` of a kernel's ELF file, whose entries are a format, an attribute, and for the
attributes of interest a symbol and a value, four bytes each.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from export.errors import BuildError

__all__ = ["CubinFacts", "read_cubin"]

_FRAME_SIZE, _REGISTERS = 0x11, 0x2F
_VALUE_FORMAT: Final = 4
_SECTION: Final = b".nv.info"


@dataclass(frozen=True)
class CubinFacts:
    """Of all kernels of a file, the largest: registers of a thread, and bytes that each thread keeps on the stack."""

    registers: int
    stack: int


def read_cubin(image: bytes) -> CubinFacts:
    """The facts of a compiled kernel.

    Raises:
        BuildError: this is no ELF file of a kernel.
    """
    found = {_FRAME_SIZE: 0, _REGISTERS: 0}
    info = _section(image)
    place = 0
    while place + 4 <= len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, place)
        place += 4
        if form != _VALUE_FORMAT:  # the others have their value where this one has a size
            continue
        if attribute in found and size == 8:
            found[attribute] = max(found[attribute], struct.unpack_from("<II", info, place)[1])
        place += size
    return CubinFacts(found[_REGISTERS], found[_FRAME_SIZE])


def _section(image: bytes) -> bytes:
    if image[:5] != b"\x7fELF\x02":
        raise BuildError("a compiled kernel is no 64-bit ELF file; rebuild it with a Triton that is known")
    (table,) = struct.unpack_from("<Q", image, 40)
    width, count, names = struct.unpack_from("<HHH", image, 58)
    headers = [struct.unpack_from("<IIQQQQ", image, table + index * width) for index in range(count)]
    strings = headers[names][4]
    for name, _, _, _, offset, size in headers:
        if image[strings + name : strings + name + len(_SECTION) + 1] == _SECTION + b"\0":
            return image[offset : offset + size]
    raise BuildError(
        f"a compiled kernel has no section {_SECTION.decode()}; rebuild it with a Triton that is known"
    )
