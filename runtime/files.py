"""Files that appear complete or not at all, and where files are kept between runs."""

from __future__ import annotations

import errno
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_output", "cache_folder", "write_file"]

_TEMPORARY, _SUFFIX = "partial", 16


@contextmanager
def atomic_output(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; renamed to ``path`` on success, removed on any error.

    Raises :class:`OSError` if something that is no file, such as a device, has that name: it would be replaced.
    """
    target = Path(path)
    if target.exists() and not target.is_file():
        raise FileExistsError(errno.EEXIST, "Expected the name of a file, and it is none", str(target))
    # Short, since names have a limit, and so does what a user chose.
    temporary = target.with_name(f".{_TEMPORARY}-{secrets.token_hex(6)}{target.suffix[:_SUFFIX]}")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, content: str | bytes, *, sync: bool = False) -> Path:
    """Write ``path`` in one step: a reader sees all of it, or what was there before. Text is UTF-8.

    ``sync`` waits until the content is on the disk, for files that say that others are complete.
    """
    data = content.encode() if isinstance(content, str) else content
    with atomic_output(path) as temporary, temporary.open("wb") as file:
        file.write(data)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    return path


def cache_folder(*parts: str) -> Path:
    """Where this project keeps what it can make again, or a folder in there; not created here."""
    variable, home = {
        "win32": ("LOCALAPPDATA", "AppData/Local"),
        "darwin": ("XDG_CACHE_HOME", "Library/Caches"),
    }.get(sys.platform, ("XDG_CACHE_HOME", ".cache"))
    base = os.environ.get(variable)
    return (Path(base) if base else Path.home() / home) / Path("lightforcing", *parts)
