"""Files of the hub, brought into the hub library's own cache: resumed where they broke off, checked when they arrive.

The library says where a file is and what it must be, and keeps the cache; the transfer is a plain one, because those
of the library itself begin anew after an interruption.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import urlsplit

from export.errors import DownloadError
from export.units import readable_size
from runtime.files import cache_folder, write_file

from .reference import HubReference, is_commit

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

__all__ = ["Hub", "hub_offline"]

_PIECE = 1 << 20
_SHARD_INDEX = ".index.json"
_LORA_SETTINGS = "adapter_config.json"


def hub_offline() -> bool:
    """Whether the hub library was told not to use the network (HF_HUB_OFFLINE)."""
    import huggingface_hub

    return bool(huggingface_hub.is_offline_mode())


@dataclass(frozen=True)
class Hub:
    """A hub and the cache of its files on this machine.

    Args:
        endpoint: its address; None = the library's (HF_ENDPOINT).
        cache: the cache's folder; None = the library's (HF_HUB_CACHE, HF_HOME).
        token: None = the one that `hf auth login` or HF_TOKEN gave.
    """

    endpoint: str | None = None
    cache: Path | None = None
    token: str | None = None

    @property
    def folder(self) -> Path:
        """The cache's folder."""
        from huggingface_hub import constants

        return self.cache or Path(constants.HF_HUB_CACHE)

    def cached(self, reference: HubReference) -> Path | None:
        """Where a file is in the cache, without asking the hub; None where it is not."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(
            reference.repo, reference.file, cache_dir=self.folder, revision=reference.revision
        )
        return Path(found) if isinstance(found, str) else None

    def size(self, reference: HubReference) -> int | None:
        """Bytes of a file, as the hub says.

        Raises:
            DownloadError: the hub does not answer, or has no such file.
        """
        return self._metadata(reference).size

    def fetch(self, reference: HubReference, *, sha256: str | None = None) -> Path:
        """Bring a file here, unless the cache has it; with a shard index, its shards too.

        Args:
            sha256: what its content must be; by default, what the hub says it is.

        Returns:
            its path in the cache: a link to the content, in a folder of the revision's files.

        Raises:
            DownloadError: no network, no access, no such file, no room, or other content than promised.
        """
        path = self._fetch(reference, sha256)
        if reference.file.endswith(_SHARD_INDEX):
            at = HubReference(reference.repo, reference.file, self._commit_of(path, reference))
            for shard in _shards(path):
                self._fetch(at.beside(shard), None)
        return path

    def fetch_lora(self, reference: HubReference, *, sha256: str | None = None) -> Path:
        """Bring a LoRA here, and the settings beside it where it has some.

        Raises:
            DownloadError: as `fetch`.
        """
        path = self.fetch(reference, sha256=sha256)
        with contextlib.suppress(_NoSuchFileError):
            self._fetch(reference.beside(_LORA_SETTINGS), None)
        return path

    # ---- one file ----

    def _fetch(self, reference: HubReference, sha256: str | None) -> Path:
        here = self.cached(reference)
        if hub_offline() or (here is not None and is_commit(reference.revision)):
            if here is None:
                raise DownloadError(
                    f"{reference} is not in the cache ({self.folder}), and the hub is switched off (HF_HUB_OFFLINE); "
                    "switch it on once, or copy the file here and name it by its path"
                )
            return _checked(here, sha256, reference)
        try:
            metadata = self._metadata(reference)
        except _UnreachableError:
            if here is None:
                raise
            return _checked(here, sha256, reference)
        assert metadata.etag is not None
        blob = self._blobs(reference) / metadata.etag
        digest = sha256 or _digest_of(metadata.etag)
        if not blob.exists():
            self._download(reference, metadata, blob, digest)
        return _checked(self._linked(reference, metadata), digest, reference)

    def _blobs(self, reference: HubReference) -> Path:
        from huggingface_hub.file_download import repo_folder_name

        return self.folder / repo_folder_name(repo_id=reference.repo, repo_type="model") / "blobs"

    def _linked(self, reference: HubReference, metadata: HfFileMetadata) -> Path:
        """The file under its name; the library makes the link, and notes which commit a branch is at."""
        from huggingface_hub import hf_hub_download

        try:
            return Path(
                hf_hub_download(
                    reference.repo,
                    reference.file,
                    revision=reference.revision,
                    cache_dir=self.folder,
                    endpoint=self.endpoint,
                    token=self.token,
                )
            )
        except Exception as error:
            _refuse(error, reference, self.endpoint)

    def _metadata(self, reference: HubReference) -> HfFileMetadata:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        url = hf_hub_url(reference.repo, reference.file, revision=reference.revision, endpoint=self.endpoint)
        try:
            metadata = get_hf_file_metadata(url, token=self.token, endpoint=self.endpoint)
        except Exception as error:
            _refuse(error, reference, self.endpoint)
        if metadata.etag is None or metadata.commit_hash is None:
            raise DownloadError(
                f"{url} does not answer as a hub does (no ETag and commit in its headers); is HF_ENDPOINT right, and "
                "does a proxy leave headers alone?"
            )
        return metadata

    def _download(
        self, reference: HubReference, metadata: HfFileMetadata, blob: Path, digest: str | None
    ) -> None:
        from filelock import FileLock
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils._headers import build_hf_headers

        headers = build_hf_headers(token=self.token)
        if urlsplit(metadata.location).netloc != urlsplit(self._origin(reference)).netloc:
            headers.pop("authorization", None)  # a storage service has its own way to know us
        try:
            blob.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DownloadError(
                f"the cache {self.folder} cannot be written ({error}); name another with HF_HOME, or copy the file "
                "here and name it by its path"
            ) from error
        partial = blob.with_name(f"{blob.name}.partial")
        with FileLock(f"{partial}.lock"):
            if blob.exists():  # another process was faster
                return
            done = partial.stat().st_size if partial.exists() else 0
            if metadata.size is not None and done > metadata.size:
                partial.unlink()
                done = 0
            _check_room(reference, metadata.size, done, blob.parent)
            try:
                with partial.open("ab") as file:
                    http_get(
                        metadata.location,
                        file,
                        resume_size=done,
                        headers=headers,
                        expected_size=metadata.size,
                        displayed_filename=reference.name,
                    )
            except Exception as error:
                _refuse(error, reference, self.endpoint, kept=partial)
            if digest is not None and (found := _sha256(partial)) != digest:
                partial.unlink()
                raise DownloadError(
                    f"{reference} arrived with SHA-256 {found}, expected {digest}; what arrived was removed: try "
                    "again, and if it stays so, the file there is not the one that is meant"
                )
            os.replace(partial, blob)

    def _origin(self, reference: HubReference) -> str:
        from huggingface_hub import hf_hub_url

        return str(hf_hub_url(reference.repo, reference.file, endpoint=self.endpoint))

    def _commit_of(self, path: Path, reference: HubReference) -> str:
        """The commit whose folder of the cache `path` is in."""
        return path.parents[reference.file.count("/")].name


class _NoSuchFileError(DownloadError):
    """The repository has no such file."""


class _UnreachableError(DownloadError):
    """The hub does not answer."""


def _refuse(
    error: Exception, reference: HubReference, endpoint: str | None, kept: Path | None = None
) -> NoReturn:
    """Say what went wrong, and what to do; `kept` holds what has arrived.

    Raises:
        DownloadError: always, but for errors that are no fault of a transfer.
    """
    from huggingface_hub import constants, errors

    hub = endpoint or constants.ENDPOINT
    page = f"{hub}/{reference.repo}"
    if isinstance(error, DownloadError):
        raise error
    if isinstance(error, errors.GatedRepoError):
        text = (
            f"{reference.repo} asks for its terms to be accepted; accept them at {page}, then 'hf auth login' or "
            "HF_TOKEN"
        )
    elif isinstance(error, errors.RepositoryNotFoundError):
        text = (
            f"there is no repository {reference.repo} on the hub, or it is private; check its name, or give a token "
            "that may read it ('hf auth login', HF_TOKEN)"
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        text = f"{reference.repo} has no revision {reference.revision!r}; leave it out for the newest"
    elif isinstance(error, errors.EntryNotFoundError) and not isinstance(
        error, errors.LocalEntryNotFoundError
    ):
        raise _NoSuchFileError(
            f"{reference.repo} has no file {reference.file!r} at {reference.revision}; see {page}/tree/"
            f"{reference.revision}"
        ) from error
    elif isinstance(error, errors.HfHubHTTPError):
        text = f"the hub refuses {reference}: {_first_line(error)}"
    elif isinstance(error, errors.LocalEntryNotFoundError) or _is_transport(error):
        text = f"{reference}: the hub at {hub} cannot be reached ({_first_line(error)})"
        text += (
            f"; run the same command again: it goes on from {readable_size(kept.stat().st_size)}"
            if kept is not None and kept.exists() and kept.stat().st_size
            else "; check the network and its proxy (HTTPS_PROXY), or copy the file here and name it by its path"
        )
        raise _UnreachableError(text) from error
    elif isinstance(error, OSError):
        text = f"{reference}: {_first_line(error)}; make room or mend the connection, and run the same command again"
    else:
        raise error
    raise DownloadError(text) from error


def _is_transport(error: Exception) -> bool:
    """Whether an error is one of the library's transport: it is httpx, by whatever name this release has it."""
    return any(cls.__module__.startswith("httpx") for cls in type(error).__mro__)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _check_room(reference: HubReference, size: int | None, done: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if size is not None and size - done > free:
        raise DownloadError(
            f"{reference} has {readable_size(size)}, {readable_size(size - done)} of it still to come, and {folder} "
            f"has {readable_size(free)} free; make room, or name another cache with HF_HOME"
        )


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DownloadError(f"{index} is no index of shards: it has no weight_map of file names") from error
    if not all(isinstance(name, str) and name and not set(name) & {"/", "\\"} for name in names):
        raise DownloadError(f"{index} names shards in other folders; expected plain file names")
    return names


# ---- what has arrived is what was promised ----


def _digest_of(etag: str) -> str | None:
    """The SHA-256 that an ETag is, as it is for every large file; None for the others."""
    return etag if len(etag) == 64 else None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _checked(path: Path, digest: str | None, reference: HubReference) -> Path:
    """`path`, whose content is `digest`; read once, and remembered as long as the file stays what it is."""
    if digest is None:
        return path
    note = _note(path)
    if _recorded(note) == digest:
        return path
    if (found := _sha256(path)) != digest:
        raise DownloadError(
            f"{path} has SHA-256 {found}, expected {digest} ({reference}); remove {path.resolve()} and run the same "
            "command again"
        )
    with contextlib.suppress(OSError):  # no writable home: it is read again the next time
        note.parent.mkdir(parents=True, exist_ok=True)
        write_file(note, digest)
    return path


def _note(path: Path) -> Path:
    content = path.resolve()
    status = content.stat()
    identity = f"{content}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"
    return cache_folder("arrived", hashlib.sha256(identity.encode()).hexdigest())


def _recorded(note: Path) -> str | None:
    try:
        return note.read_text(encoding="utf-8")
    except OSError:
        return None
