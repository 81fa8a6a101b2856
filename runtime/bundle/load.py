"""Writing a bundle's manifest, and a loader that trusts nothing.

It checks schema version, field types and ranges, mutual consistency, that paths lead nowhere else, and size and SHA-256
of every file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from runtime.errors import BundleError, BundleIntegrityError, BundleSchemaError, InputError
from runtime.files import write_file
from runtime.host_memory import processors

from .files import BundleFile, HashRecord, Identity, OpenFile
from .manifest import ENCODER_COMPONENTS, SCHEMA_VERSION, Component, FileEntry, Manifest
from .strict_json import parse_json

__all__ = [
    "MANIFEST_NAME",
    "OPERATOR_COMPONENTS",
    "PERSIST",
    "REQUIRED_COMPONENTS",
    "Bundle",
    "file_entry",
    "hash_file",
    "load_bundle",
    "write_manifest",
]

MANIFEST_NAME = "manifest.json"
REQUIRED_COMPONENTS = ("step", "clean", "conditioner", "text_encoder", "vae_first", "vae_next")
OPERATOR_COMPONENTS = ("qk_prepare", "attention")
"""Executed by a kernel of this project, or by a graph of their own where there are no kernels."""
PERSIST = "persist"
"""What updates a persistent set: kernels everywhere, so that no file belongs to it."""

_HASH_CHUNK = 1 << 20
_MAX_MANIFEST = 16 << 20
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_MAX_PROBLEMS_SHOWN = 5
_MOST_AT_ONCE = 8
"""Files that are hashed at a time, where there are processors for them."""


@dataclass(frozen=True)
class Bundle:
    """A validated bundle: its folder and its manifest.

    `digest` is the SHA-256 of the manifest file that it was read from. `verified` tells by path what the files were
    when they had the contents that the manifest lists; one that is not in it is read when it is opened.
    """

    root: Path
    manifest: Manifest
    digest: str = ""
    verified: Mapping[str, Identity] = field(default_factory=dict, repr=False)

    def path(self, relative: str) -> Path:
        """Absolute path of a file that the manifest lists. Whoever uses what is in it takes `opened`."""
        return self.root / relative

    def opened(self, relative: str) -> BundleFile:
        """A file that the manifest lists, open; it is what was verified. Close it.

        Raises:
            BundleError: it cannot be read.
            BundleIntegrityError: the manifest does not list it, or it has other contents now.
        """
        entry = self._entries.get(relative)
        if entry is None:
            raise BundleIntegrityError(
                f"bundle {self.root}: {relative!r} is not among the manifest's files, so its contents cannot be "
                f"verified; rebuild the bundle"
            )
        return BundleFile(self.root, entry, self.verified.get(relative))

    @cached_property
    def _entries(self) -> dict[str, FileEntry]:
        return {entry.path: entry for entry in self.manifest.files}

    def component(self, name: str) -> Component:
        """The component called `name`.

        Raises:
            BundleError: there is none of that name.
        """
        try:
            return self.manifest.components[name]
        except KeyError:
            known = ", ".join(sorted(self.manifest.components))
            raise BundleError(
                f"bundle {self.root} has no component {name!r} (it has: {known}); rebuild it with "
                f"'python -m export build'"
            ) from None


def hash_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file as 64 lowercase hex digits, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(_HASH_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def file_entry(folder: str | os.PathLike[str], relative: str) -> FileEntry:
    """The manifest entry of `folder/relative`: path with forward slashes, SHA-256 and size in bytes."""
    path = Path(folder) / relative
    return FileEntry(
        path=PurePosixPath(relative).as_posix(), sha256=hash_file(path), bytes=path.stat().st_size
    )


def write_manifest(folder: str | os.PathLike[str], manifest: Manifest) -> Path:
    """Write `manifest.json` into `folder` and return its path.

    The file appears complete or not at all. Write it last: a folder without it does not load.
    """
    root = Path(folder)
    text = json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=False) + "\n"
    return write_file(root / MANIFEST_NAME, text, sync=True)


def load_bundle(
    folder: str | os.PathLike[str], *, verify: bool = True, expected: str | None = None, reread: bool = False
) -> Bundle:
    """Read and validate the bundle in `folder`. What is returned is valid as a whole.

    Args:
        folder: that of the bundle.
        verify: compare the SHA-256 of every file with the manifest. A file that is the same as when it was hashed last
            is not read again (`HashRecord`). Without, sizes and paths are still checked; use that only where the
            folder was just verified.
        expected: the SHA-256 that the manifest must have, which has those of all other files; they are all read.
        reread: read all files, whatever was recorded of them.

    Raises:
        BundleError: or a subclass; there is no bundle, or no valid one.
        InputError: `expected` is no SHA-256, or nothing is verified.
    """
    if expected is not None and not (verify and _SHA256.fullmatch(expected)):
        raise InputError(
            f"expected is {expected!r} with verify={verify}; it pins a bundle to 64 hex digits, the SHA-256 of its "
            f"{MANIFEST_NAME}, and its files must be verified with them"
        )
    root = Path(folder)
    if not root.is_dir():
        raise BundleError(
            f"no bundle at {root}: expected a folder with a {MANIFEST_NAME}; build one with "
            f"'python -m export build --gpu cpu'"
        )
    root = root.resolve()
    manifest, digest = _parse(root / MANIFEST_NAME, expected)
    for entry in manifest.files:
        _require_contained(root, entry.path)
    _check_components(root, manifest)
    found = {entry.path: _found(root, entry) for entry in manifest.files}
    if verify:
        _hash_files(root, manifest, found, reread=reread or expected is not None)
    return Bundle(root=root, manifest=manifest, digest=digest, verified=found)


def _parse(path: Path, expected: str | None) -> tuple[Manifest, str]:
    """The manifest in a file, and the file's SHA-256, which must be the one `expected`."""
    if not os.path.exists(path):
        raise BundleError(
            f"{path.parent} has no {MANIFEST_NAME}: it is not a bundle, or its build was interrupted; "
            f"run the build again"
        )
    with OpenFile(path) as file:
        size = file.identity.size
        if size > _MAX_MANIFEST:
            raise BundleSchemaError(
                f"{path} has {size:,} bytes, and no manifest has more than {_MAX_MANIFEST:,}; rebuild the bundle"
            )
        content = file.read(0, size)
    digest = hashlib.sha256(content).hexdigest()
    if expected is not None and digest != expected.lower():
        raise BundleIntegrityError(
            f"bundle {path.parent}: {MANIFEST_NAME} has SHA-256 {digest}, and {expected.lower()} is expected; this is "
            f"another bundle than the one that was pinned"
        )
    try:
        raw = parse_json(content)
    except ValueError as error:
        raise BundleSchemaError(f"{path} is not readable JSON ({error}); rebuild the bundle") from error
    if not isinstance(raw, dict):
        raise BundleSchemaError(
            f"{path} holds a {type(raw).__name__}, expected an object; rebuild the bundle"
        )
    version = raw.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BundleSchemaError(
            f"{path} has schema_version {version!r}, expected {SCHEMA_VERSION}; rebuild the bundle"
        )
    if version > SCHEMA_VERSION:
        raise BundleSchemaError(
            f"{path} has schema_version {version}, this runtime reads up to {SCHEMA_VERSION}; upgrade the "
            f"runtime, or rebuild the bundle with the exporter of this version"
        )
    try:
        return Manifest.model_validate_json(content, strict=True), digest
    except ValidationError as error:
        raise BundleSchemaError(f"{path} does not follow the schema: {_summary(error)}") from error


def _summary(error: ValidationError) -> str:
    problems = [
        f"{'.'.join(str(part) for part in item['loc']) or 'manifest'}: {item['msg']}"
        for item in error.errors()
    ]
    more = len(problems) - _MAX_PROBLEMS_SHOWN
    return "; ".join(problems[:_MAX_PROBLEMS_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _check_components(root: Path, manifest: Manifest) -> None:
    segments = manifest.segments
    required = REQUIRED_COMPONENTS + ((*segments.components, *OPERATOR_COMPONENTS) if segments else ())
    if manifest.has_encoder:
        required += ENCODER_COMPONENTS
    virtual: tuple[str, ...] = ("step", "clean") if segments else ()
    if segments and manifest.kernels:
        virtual += OPERATOR_COMPONENTS
    if manifest.persistent_frames:
        required += (PERSIST,)
        virtual += (PERSIST,)
    missing = [
        name
        for name in required
        if name not in manifest.components or (manifest.components[name].file is None) != (name in virtual)
    ]
    if missing:
        raise BundleError(
            f"bundle {root} lacks the component(s) {', '.join(missing)}; expected {', '.join(required)}; rebuild it"
        )
    listed = {entry.path for entry in manifest.files}
    used = {
        f"component {name!r}": component.file
        for name, component in manifest.components.items()
        if component.file is not None
    }
    used |= {"the tokenizer": manifest.text.tokenizer, "the text encoder's weights": manifest.text.weights}
    if segments:
        used["the segments' weights"] = segments.weights
    if manifest.kernels:
        used["the kernels"] = f"{manifest.kernels.folder}/{manifest.kernels.arch}/kernels.json"
        if manifest.kernels.tables is not None:
            used["the kernels' tables"] = manifest.kernels.tables
    if manifest.golden:
        used["the golden vectors"] = manifest.golden.file
    for owner, path in used.items():
        _require_contained(root, path)
        if path not in listed:
            raise BundleIntegrityError(
                f"bundle {root}: {owner} uses {path!r}, which is not among the manifest's files, so its "
                f"contents cannot be verified; rebuild the bundle"
            )


def _contained(path: str) -> str:
    """Return `path` if it is a plain relative POSIX path that stays inside its folder."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or ":" in path or "\0" in path:
        raise ValueError(
            f"path {path!r} leads out of the bundle; expected a relative path with '/' and no '..'"
        )
    return path


def _require_contained(root: Path, relative: str) -> Path:
    try:
        path = root / _contained(relative)
    except ValueError as error:
        raise BundleIntegrityError(f"bundle {root}: {error}") from None
    return path


def _found(root: Path, entry: FileEntry) -> Identity:
    """What a file is, of the size that it must have. Links are followed wherever they lead: contents count."""
    path = root / entry.path
    if not os.path.exists(path):
        raise BundleIntegrityError(
            f"bundle {root}: {entry.path!r} is missing; copy the bundle again or rebuild it"
        )
    with OpenFile(path) as file:
        found = file.identity
    if found.size != entry.bytes:
        raise BundleIntegrityError(
            f"bundle {root}: {entry.path!r} has {found.size} bytes, the manifest says {entry.bytes}; copy the "
            f"bundle again or rebuild it"
        )
    return found


def _hash_files(root: Path, manifest: Manifest, found: Mapping[str, Identity], *, reread: bool) -> None:
    """See that every file has the contents that the manifest says, and record that it has; several at a time."""
    record, begun, stopped = HashRecord(root), time.time_ns(), threading.Event()
    unread = [
        entry for entry in manifest.files if reread or record.get(found[entry.path]) != entry.sha256
    ]  # one that was recorded with other contents is read too, so that the error is of what is there now
    if not unread:
        return
    unread.sort(key=lambda entry: -entry.bytes)  # the longest first, so that none is left over at the end
    with ThreadPoolExecutor(min(processors(), _MOST_AT_ONCE), "hash") as pool:
        try:
            jobs = [pool.submit(_hash_file, root, entry, found[entry.path], stopped) for entry in unread]
            wait(jobs, return_when=FIRST_EXCEPTION)
        finally:
            stopped.set()  # also where someone pressed Ctrl+C
    failed = [error for error in (job.exception() for job in jobs) if error is not None]
    for error in sorted(failed, key=lambda error: not isinstance(error, BundleIntegrityError)):
        raise error
    record.keep({found[entry.path]: entry.sha256 for entry in manifest.files}, begun, found)


def _hash_file(root: Path, entry: FileEntry, found: Identity, stopped: threading.Event) -> None:
    with OpenFile(root / entry.path) as file:
        digest = file.digest(stopped)
        if digest != entry.sha256 or file.identity != found:
            raise BundleIntegrityError(
                f"bundle {root}: {entry.path!r} has SHA-256 {digest}, the manifest says {entry.sha256}; the "
                f"file was changed: copy the bundle again or rebuild it"
            )
