"""Files of a bundle, open: what is read is what was verified, whatever becomes of the folder meanwhile.

Nothing is mapped into memory. A file that is cut short while it is read gives an error, where a mapping would end the
process, and one that is written over cannot change what was read before.

A file is hashed once: `HashRecord` keeps, beside the bundle or in the user's cache, which file had which contents, and
a file that still is the one that was hashed need not be read again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Final, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from runtime.errors import BundleError, BundleIntegrityError
from runtime.files import cache_folder, sealed, unsealed, write_file

from .fields import Part, Sha256
from .manifest import FileEntry

__all__ = ["HASHES_NAME", "BundleFile", "HashRecord", "Identity", "OpenFile"]

HASHES_NAME: Final = "hashes.record"
"""Beside the manifest: what `HashRecord` has written. It is of this machine, and no part of the bundle."""

_PIECE: Final = 1 << 20
_MAX_RECORD: Final = 16 << 20
_SETTLED: Final = 2_000_000_000
"""Nanoseconds after which a file's times tell of every later change: the coarsest file system counts in two seconds."""

_log = logging.getLogger(__name__)


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

    def digest(self, stopped: threading.Event | None = None) -> str:
        """SHA-256 of the contents, as 64 lowercase hex digits. Other threads run meanwhile.

        Raises:
            BundleError: the file cannot be read, or `stopped` was set before it was.
        """
        digest = hashlib.sha256()
        memory = np.empty(_PIECE, dtype=np.uint8)
        size = self.identity.size
        for start in range(0, size, _PIECE):
            if stopped is not None and stopped.is_set():
                raise BundleError(f"{self.path} was not read to its end: hashing was stopped")
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


# ---- hashed once ----

_Word = Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)]


class _HashedFile(Part):
    """A file as it was when it was hashed; see `Identity`."""

    device: _Word
    inode: Annotated[int, Field(ge=0, lt=1 << 128)]
    size: _Word
    modified: _Word
    changed: _Word
    sha256: Sha256

    @property
    def identity(self) -> Identity:
        return Identity(self.device, self.inode, self.size, self.modified, self.changed)


class _Hashes(Part):
    """Contents of a record."""

    schema_version: Literal[1] = 1
    files: Annotated[tuple[_HashedFile, ...], Field(max_length=1 << 16)]


class HashRecord:
    """Which files had which SHA-256, kept between loads of the bundle in `root`.

    It lies in the bundle's folder, or in the user's cache where that cannot be written, with a digest of its own. One
    that is damaged counts as none. Whoever may write to either can have a file taken for what it is not, as they can
    write another manifest: a pin, a signature and `verify` on the command line go by no record.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known = {found: digest for place in self._places() for found, digest in _recorded(place)}

    def get(self, identity: Identity) -> str | None:
        """The SHA-256 of that file; None if it is not known, or was changed since."""
        return self._known.get(identity)

    def keep(self, hashes: Mapping[Identity, str], begun: int, listed: Iterable[str]) -> None:
        """Record `hashes` in place of what was known.

        A file that was written shortly before `begun`, in nanoseconds since the epoch, when hashing began, is left
        out: a change right after it might not show in its times. `listed` are the manifest's own files, which are not
        written over. Where nothing can be written, the next load hashes again.
        """
        settled = {
            found: digest
            for found, digest in hashes.items()
            if max(found.modified, found.changed) < begun - _SETTLED
        }
        if not settled or settled == self._known:
            return
        files = tuple(
            _HashedFile(
                device=found.device,
                inode=found.inode,
                size=found.size,
                modified=found.modified,
                changed=found.changed,
                sha256=digest,
            )
            for found, digest in settled.items()
        )
        content = sealed(_Hashes(files=files).model_dump_json(indent=1).encode() + b"\n")
        problems = []
        for place in self._places(listed):
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                write_file(place, content, sync=True)
            except OSError as error:
                problems.append(str(error))
            else:
                return
        _log.info(
            "the hashes of %s cannot be recorded, so its files are read at each load: %s",
            self._root,
            "; ".join(problems),
        )

    def _places(self, listed: Iterable[str] = ()) -> Iterator[Path]:
        if HASHES_NAME not in listed:
            yield self._root / HASHES_NAME
        try:
            folder = cache_folder("hashes")
        except RuntimeError:  # there is no home
            return
        yield folder / f"{hashlib.sha256(os.fsencode(self._root)).hexdigest()}.record"


def _recorded(place: Path) -> Iterator[tuple[Identity, str]]:
    """What a record says; nothing if it is not there or not whole."""
    try:
        with OpenFile(place) as file:
            size = file.identity.size
            content = unsealed(file.read(0, size)) if size <= _MAX_RECORD else None
        record = None if content is None else _Hashes.model_validate_json(content, strict=True)
    except (BundleError, ValidationError):
        return
    if record is not None:
        yield from ((file.identity, file.sha256) for file in record.files)
