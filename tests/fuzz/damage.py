"""Ways to damage a file, and to change what a JSON document says."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["change_json", "damaged", "leaves", "pick"]

Keys = tuple[str | int, ...]

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 1.5, -0.0, 2**31, 2**63, -(2**63), 10**30, 1e300, float("nan"), float("inf"),
    "", "1", "x" * 5000, "../up", "/etc/passwd", "\u0000", "\x1b[31m", "[red]", [], [0], [[]], {}, {"a": 1},
)  # fmt: skip


def damaged(content: bytes, chance: random.Random) -> bytes:
    """The content with bits turned, bytes cut off, put in, taken out, moved or made zeros."""
    if not content:
        return b"x"
    at = chance.randrange(len(content))
    size = min(len(content) - at, chance.choice((1, 4, 64, 4096)))
    match chance.randrange(7):
        case 0:
            return content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :]
        case 1:
            return content[:at]
        case 2:
            return content[:at] + chance.randbytes(size) + content[at:]
        case 3:
            return content[:at] + content[at + size :]
        case 4:
            return content[:at] + bytes(size) + content[at + size :]
        case 5:
            return content[:at] + chance.randbytes(size) + content[at + size :]
        case _:
            return b"" if chance.random() < 0.3 else content[at:] + content[:at]


def leaves(value: Any, at: Keys = ()) -> Iterator[Keys]:
    """The way to everything in a document."""
    if at:
        yield at
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, (*at, key))


def change_json(document: Any, chance: random.Random) -> None:
    """Replace, take out, double or rename something somewhere."""
    keys = chance.choice(list(leaves(document)))
    part = document
    for key in keys[:-1]:
        part = part[key]
    key = keys[-1]
    what = chance.random()
    if what < 0.7:
        old = part[key]
        near = [old - 1, old + 1, old * 2] if type(old) in (int, float) else []
        part[key] = chance.choice((*VALUES, *near))
    elif what < 0.85:
        del part[key]
    elif isinstance(part, list):
        part.insert(int(key), part[int(key)])
    else:
        part[f"{key}x"] = part.pop(key)


def pick(folder: Path, chance: random.Random) -> Path:
    """A file of a folder."""
    return chance.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
