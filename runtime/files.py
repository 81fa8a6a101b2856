"""Files that appear complete or not at all, where files are kept between runs, and how many may be open."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

__all__ = [
    "LEAST_FILES",
    "MORE_FILES",
    "allow_open_files",
    "atomic_output",
    "cache_folder",
    "exchange",
    "keep",
    "kept",
    "sealed",
    "state_folder",
    "sync_to_disk",
    "temporary_folder",
    "unsealed",
    "write_file",
]

LEAST_FILES = 64
"""Files that a command needs to have open at a time: a pipeline and its libraries about 16, a server one a client."""

MORE_FILES = (
    "raise the limit: ulimit -n 4096 in a shell, --ulimit nofile=4096 of docker, LimitNOFILE= of systemd"
)
"""What to do about it."""

_ENOUGH_FILES = 8192
"""As many as macOS lets a process ask for; nothing here comes near."""

_TEMPORARY, _SUFFIX = "partial", 16
_AT_FDCWD, _EXCHANGE = -100, 2
"""Of Linux's renameat2: relative to the working folder; both names change places."""


@contextmanager
def atomic_output(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path` to write to; renamed to `path` on success, removed on any error.

    Raises:
        FileExistsError: something that is no file, such as a device, has that name: it would be replaced.
        OSError: the file cannot be written.
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
    """Write `path` in one step: a reader sees all of it, or what was there before. Text is UTF-8.

    `sync` waits until the content and the name are on the disk, for files that say that others are complete.
    """
    data = content.encode() if isinstance(content, str) else content
    with atomic_output(path) as temporary:
        temporary.write_bytes(data)
        if sync:
            sync_to_disk(temporary)
    if sync:
        sync_to_disk(path.parent)
    return path


def keep(path: Path, content: bytes) -> None:
    """Write what can be made again, so that `kept` can tell whether it still is what was written."""
    write_file(path, sealed(content), sync=True)


def kept(path: Path) -> bytes | None:
    """What `keep` wrote; None if there is nothing, or it was damaged, and must be made again."""
    try:
        return unsealed(path.read_bytes())
    except OSError:
        return None


def sealed(content: bytes) -> bytes:
    """`content` behind its own digest, by which damage is found; it keeps nobody from writing another."""
    return hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def unsealed(file: bytes) -> bytes | None:
    """What was `sealed`; None if it was damaged."""
    digest, _, content = file.partition(b"\n")
    return content if hashlib.sha256(content).hexdigest().encode() == digest else None


def sync_to_disk(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk; systems that cannot are not asked."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(first: Path, second: Path) -> bool:
    """Give each of two paths the other's name, at once: at no moment is there nothing under either.

    False where the system or the file system has no such step; nothing has changed then.

    Raises:
        OSError: one of them is not there, or cannot be renamed.
    """
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # no Linux, or a C library of before 2018
        return False
    here = ctypes.c_int(_AT_FDCWD)
    names = (ctypes.c_char_p(os.fsencode(path)) for path in (first, second))
    if rename(here, next(names), here, next(names), ctypes.c_uint(_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(second))


def cache_folder(*parts: str) -> Path:
    """Where this project keeps what it can make again, or a folder in there; not created here.

    Raises:
        RuntimeError: this user has no home folder, and no other was named.
    """
    return _own(platformdirs.user_cache_path, parts)


def state_folder(*parts: str) -> Path:
    """Where this project keeps what it has made for its user, or a folder in there; not created here.

    Raises:
        RuntimeError: this user has no home folder, and no other was named.
    """
    return _own(platformdirs.user_state_path, parts)


def _own(folder: Callable[..., Path], parts: tuple[str, ...]) -> Path:
    path: Path = folder("lightforcing", appauthor=False)
    if not path.is_absolute():
        raise RuntimeError("this user has no home folder; set XDG_CACHE_HOME and XDG_STATE_HOME to folders")
    return path.joinpath(*parts)


def temporary_folder() -> str:
    """Where this process, and those that it starts, put files that do not outlast them.

    Python goes on to the system's folder where the variable that names another is wrong; PyTorch and compilers do not.

    Raises:
        OSError: nothing can be written there; says what to do.
    """
    named = next((name for name in ("TMPDIR", "TEMP", "TMP") if os.environ.get(name)), None)
    try:
        folder = tempfile.gettempdir() if named is None else os.environ[named]
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        if named is None:
            raise OSError(f"there is no folder for temporary files ({error}); set TMPDIR to one") from error
        raise OSError(
            f"{named} names the folder for temporary files, {os.environ[named]}, and none can be written there "
            f"({error.strerror}); set it to a folder on a disk with room, or unset it"
        ) from error


def allow_open_files(least: int = LEAST_FILES) -> None:
    """Let this process have as many files open as it may, for there is no reason for less in a command.

    Raises:
        OSError: it may have fewer than `least`; says what to do.
    """
    if sys.platform == "win32":
        return
    try:
        import resource
    except ModuleNotFoundError:  # a system that has no such limit
        return
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH_FILES if most == resource.RLIM_INFINITY else min(_ENOUGH_FILES, most)
    if allowed != resource.RLIM_INFINITY and allowed < wanted:
        with contextlib.suppress(OSError, ValueError):  # a system with a limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
            allowed = wanted
    if allowed != resource.RLIM_INFINITY and allowed < least:
        raise OSError(
            f"this process may have {allowed} files open at a time, and needs {least}; {MORE_FILES}"
        )
