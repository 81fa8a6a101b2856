"""Where a bundle is built: a hidden folder beside its destination, renamed when complete.

An interrupted build leaves only that folder, which does not load (it has no manifest) and from which the same build
resumes: finished components are recorded with the hashes of their files and taken over if they still match.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from export.errors import BuildError
from export.units import readable_size
from runtime.bundle import MANIFEST_NAME, FileEntry, Manifest, file_entry, hash_file, write_manifest
from runtime.files import exchange, sync_to_disk, write_file

__all__ = ["Workspace", "open_workspace", "partial_folder"]

_STATE = ".finished.json"
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file is too large",
}


@dataclass
class Workspace:
    """The folder of one build in progress.

    Args:
        key: identifies what is being built; parts made for another key are not reused.
    """

    folder: Path
    destination: Path
    key: str

    def _state(self) -> dict[str, dict[str, Any]]:
        """What the workspace remembers of each finished component: key and files."""
        try:
            state = json.loads((self.folder / _STATE).read_text())["components"]
            return {name: {"key": entry["key"], "files": entry["files"]} for name, entry in state.items()}
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _finished(self, name: str, key: str) -> list[FileEntry] | None:
        entry = self._state().get(name)
        if entry is None or entry["key"] != key:
            return None
        try:
            files = [FileEntry.model_validate(file) for file in entry["files"]]
        except (ValueError, TypeError):
            return None
        return files if self._intact(files) else None

    def _intact(self, entries: Sequence[FileEntry]) -> bool:
        paths = [self.folder / entry.path for entry in entries]
        return all(
            path.is_file() and path.stat().st_size == entry.bytes and hash_file(path) == entry.sha256
            for path, entry in zip(paths, entries, strict=True)
        )

    def component(
        self, name: str, build: Callable[[Path], Sequence[str]], *, key: str | None = None
    ) -> tuple[list[FileEntry], bool]:
        """Build the component `name` unless an interrupted build finished it.

        Args:
            build: writes into the folder it is given and returns the paths of its files, relative to it.
            key: identifies what the component is made from, where that is less than the whole build.

        Returns:
            the component's files, and whether they were taken over.

        Raises:
            BuildError: the disk is full; names the component, and what to do.
        """
        key = key or self.key
        finished = self._finished(name, key)
        if finished is not None:
            return finished, True
        try:
            paths = build(self.folder)
            mode = _usual_mode(self.folder)
            for path in paths:
                (self.folder / path).chmod(mode)  # some writers leave files that only their owner can read
                sync_to_disk(self.folder / path)
            entries = [file_entry(self.folder, path) for path in paths]
            self._remember(name, key, entries)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise _full(error, name, self.folder) from error
        return entries, False

    def _remember(self, name: str, key: str, entries: Sequence[FileEntry]) -> None:
        components = self._state() | {name: {"key": key, "files": [entry.model_dump() for entry in entries]}}
        write_file(self.folder / _STATE, json.dumps({"components": components}), sync=True)

    def publish(self, files: Sequence[FileEntry], manifest: Manifest | None = None) -> Path:
        """Drop everything that is not among `files`, write the manifest, and move the folder to its destination.

        What was there under that name is replaced only now, when all that is new is on the disk, and in one step where
        the system has one: at every moment one of the two is there.
        """
        listed = {entry.path for entry in files}
        for path in sorted(self.folder.rglob("*"), reverse=True):
            if path.is_file() and path.relative_to(self.folder).as_posix() not in listed:
                path.unlink()
            elif path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        if manifest is not None:
            write_manifest(self.folder, manifest)
        for folder in [*(path for path in self.folder.rglob("*") if path.is_dir()), self.folder]:
            sync_to_disk(folder)
        replaced = _replaced(self.destination)
        shutil.rmtree(replaced, ignore_errors=True)
        if not self.destination.exists():
            os.replace(self.folder, self.destination)
        else:
            os.replace(self.folder, replaced)
            if not exchange(replaced, self.destination):
                older = self.folder  # a name that is free now
                os.replace(self.destination, older)
                os.replace(replaced, self.destination)
                os.replace(older, replaced)
        sync_to_disk(self.destination.parent)
        shutil.rmtree(replaced, ignore_errors=True)
        return self.destination


def _usual_mode(folder: Path) -> int:
    """The permissions that new files have here: those that the umask leaves."""
    probe = folder / ".mode"
    probe.touch()
    try:
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink()


def _full(error: OSError, name: str, folder: Path) -> BuildError:
    free = shutil.disk_usage(folder).free
    return BuildError(
        f"{_FULL[error.errno or 0]} while writing {name!r} to {folder} ({readable_size(free)} free); make room or "
        "choose another --out, then run the same command again: it resumes"
    )


def _separate(folder: Path) -> None:
    """Give files that have other names elsewhere, such as in a backup made of hard links, content of their own, and
    drop links.

    What is built here would otherwise be written into the other file too, and onnx-ir refuses to read such weights.

    Raises:
        BuildError: the disk is full.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            path.unlink()
        if not path.is_file() or path.stat().st_nlink == 1:
            continue
        copy = path.with_name(f".{path.name}.copy")
        try:
            shutil.copy2(path, copy)
        except OSError as error:
            copy.unlink(missing_ok=True)
            if error.errno not in _FULL:
                raise
            raise _full(error, path.name, folder) from error
        os.replace(copy, path)


def _replaced(destination: Path) -> Path:
    """Where the older result is while the new one takes its place."""
    return destination.with_name(f".{destination.name}.replaced")


def partial_folder(out: Path, name: str) -> Path:
    """Where the bundle `out/name` is while it is built."""
    return out / f".{name}.partial"


@contextmanager
def open_workspace(out: Path, name: str, key: str, *, marker: str = MANIFEST_NAME) -> Iterator[Workspace]:
    """The workspace of `out/name`, locked against a second build under the same name.

    Args:
        marker: file by which an older result is told from a folder that must not be replaced.

    Raises:
        BuildError: another process builds this bundle, the destination is no bundle and must not be replaced, or a
            name that the build writes to is a link.
    """
    destination, folder, lock_file = out / name, partial_folder(out, name), out / f".{name}.lock"
    for path in (destination, folder, lock_file, _replaced(destination)):
        if path.is_symlink():
            raise BuildError(
                f"{path} is a link, and a build would write where it leads, to {os.readlink(path)}; delete it, or "
                "choose another --name or --out"
            )
    if destination.exists() and not (destination / marker).is_file():
        raise BuildError(
            f"{destination} exists and is no result of an earlier build (it has no {marker}); choose another --name "
            "or --out, or move it away"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise BuildError(f"{out} is not a folder; choose another --out") from error
    lock = FileLock(lock_file, blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise BuildError(
            f"another process is building {destination}; wait for it, or choose another --name"
        ) from error
    try:
        if _replaced(destination).exists() and not destination.exists():  # killed between two renamings
            os.replace(_replaced(destination), destination)
        folder.mkdir(exist_ok=True)
        _separate(folder)
        yield Workspace(folder, destination, key)
    finally:
        lock.release()
