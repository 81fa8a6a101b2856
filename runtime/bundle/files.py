"""Files of a bundle, open: what is read is what was verified, whatever becomes of the folder meanwhile.

Nothing is mapped into memory. A file that is cut short while it is read gives an error, where a mapping would end the
process, and one that is written over cannot change what was read before.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BundleError, BundleIntegrityError

from .manifest import FileEntry

__all__ = ["BundleFile", "Identity", "OpenFile"]

_PIECE: Final = 1 << 20


@dataclass(frozen=True)
class Identity:
    """By what a file is known again without being read. Whatever is written to it changes `changed`; so do its
    permissions and links, which change nothing that is read.

    Times in nanoseconds.
    """

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        """The identity of the file with that status."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class OpenFile:
    """A regular file, open for reading anywhere in it; safe to use from several threads.

    It stays the same file when another takes its name. Close it, or use it in a `with` statement.

    Raises:
        BundleError: there is no such file, it cannot be read, or it is none with contents: a folder, pipe or device.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            # A pipe that nobody writes to would be waited for.
            descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _BINARY)
        except OSError as error:
            raise BundleError(f"cannot read {self.path}: {error.strerror or error}") from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise BundleError(f"cannot read {self.path}: it is no regular file")
        self._stream = os.fdopen(descriptor, "rb", buffering=0)
        self._lock = threading.Lock()

    @property
    def identity(self) -> Identity:
        """What the file is now."""
        return Identity.of(os.fstat(self._stream.fileno()))

    def read_into(self, offset: int, memory: NDArray[np.uint8]) -> None:
        """Fill `memory` with what stands from `offset` on.

        Raises:
            BundleError: the file is closed or shorter, or cannot be read.
        """
        view = memory.data
        done = 0
        with self._reading(offset):
            while done < len(view) and (count := self._stream.readinto(view[done:])):
                done += count
        self._require(offset, done, len(view))

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on; raises as `read_into`."""
        pieces: list[bytes] = []
        done = 0
        with self._reading(offset):
            while done < count and (piece := self._stream.read(count - done)):
                pieces.append(piece)
                done += len(piece)
        self._require(offset, done, count)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    @contextmanager
    def _reading(self, offset: int) -> Iterator[None]:
        try:
            with self._lock:
                self._stream.seek(offset)
                yield
        except (OSError, ValueError) as error:  # ValueError: it is closed
            raise BundleError(f"cannot read {self.path}: {error}") from error

    def _require(self, offset: int, done: int, count: int) -> None:
        if done < count:
            raise BundleIntegrityError(
                f"{self.path} ends after {offset + done} bytes, {offset + count} were expected: it was cut short; copy "
                f"the bundle again or rebuild it"
            )

    def digest(self) -> str:
        """SHA-256 of the contents, as 64 lowercase hex digits."""
        digest = hashlib.sha256()
        memory = np.empty(_PIECE, dtype=np.uint8)
        size = self.identity.size
        for start in range(0, size, _PIECE):
            piece = memory[: min(_PIECE, size - start)]
            self.read_into(start, piece)
            digest.update(piece.data)
        return digest.hexdigest()

    def close(self) -> None:
        """Close it. May be called twice."""
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_BINARY: Final = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


class BundleFile(OpenFile):
    """A file that a manifest lists, open. `verified` is what it was when it had the contents that are listed.

    Raises:
        BundleError: it cannot be opened.
        BundleIntegrityError: it is another file now, with other contents.
    """

    def __init__(self, root: Path, entry: FileEntry, verified: Identity | None) -> None:
        super().__init__(root / entry.path)
        self._root = root
        self._entry = entry
        self._verified = verified
        try:
            self.check()
        except BaseException:
            self.close()
            raise

    def check(self) -> None:
        """See that the contents are those that the manifest lists; they are read only if the file was touched.

        Raises:
            BundleIntegrityError: they are not.
        """
        found, entry = self.identity, self._entry
        if found == self._verified:
            return
        if found.size != entry.bytes or self.digest() != entry.sha256 or self.identity != found:
            raise BundleIntegrityError(
                f"bundle {self._root}: {entry.path!r} was changed since the bundle was loaded, and has other contents "
                f"than the manifest says; load the bundle again, or copy or rebuild it first"
            )
        self._verified = found

    def check_name(self) -> None:
        """See that the name still leads to this file, with the same contents: for libraries that take nothing but a
        name, after they have read it.

        Raises:
            BundleIntegrityError: it does not.
        """
        try:
            found: Identity | None = Identity.of(self.path.stat())
        except OSError:
            found = None
        if found != self._verified:
            with BundleFile(self._root, self._entry, None):
                pass

    def contents(self) -> bytes:
        """All of it, checked after it was read.

        Raises:
            BundleIntegrityError: it was changed meanwhile.
        """
        content = self.read(0, self._entry.bytes)
        self.check()
        return content
