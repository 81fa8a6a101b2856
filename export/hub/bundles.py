"""Bundles that travel: to a folder or a repository of the hub, and from there; checked where they leave and arrive."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from export.errors import DownloadError, InputError
from export.request.targets import validation_problems
from export.units import readable_size
from runtime.bundle import MANIFEST_NAME, Bundle, Manifest, file_entry, load_bundle
from runtime.errors import LightForcingError

from .download import Hub
from .reference import HubReference

__all__ = ["BundleReference", "pull_bundle", "push_bundle"]

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REFERENCE = re.compile(
    rf"(?P<repo>{_PART}/{_PART})(?::(?P<folder>[^\s@:\\]+))?(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]*))?"
)

Progress = Callable[[str, int, int], None]
"""Called with a file's name, and the bytes of the bundle that are done and that there are."""


@dataclass(frozen=True)
class BundleReference:
    """A bundle in a repository of the hub: `org/repo`, `org/repo:folder`, each with `@revision` or without.

    Attributes:
        folder: where in the repository it lies; empty = at its top.
    """

    repo: str
    folder: str = ""
    revision: str = "main"

    @classmethod
    def parse(cls, text: str) -> BundleReference | None:
        """The reference that `text` writes down; None where it has another form."""
        match = _REFERENCE.fullmatch(text)
        if match is None:
            return None
        folder = match["folder"] or ""
        if folder and not all(part not in ("", ".", "..") for part in folder.split("/")):
            return None
        return cls(match["repo"], folder, match["revision"] or "main")

    def file(self, name: str) -> HubReference:
        """A file of the bundle."""
        return HubReference(self.repo, f"{self.folder}/{name}" if self.folder else name, self.revision)

    def __str__(self) -> str:
        folder = f":{self.folder}" if self.folder else ""
        return f"{self.repo}{folder}" + ("" if self.revision == "main" else f"@{self.revision}")


def _no_progress(name: str, done: int, total: int) -> None:
    pass


# ---- away ----


def push_bundle(
    folder: Path,
    to: BundleReference | Path,
    hub: Hub,
    *,
    public: bool = False,
    progress: Progress = _no_progress,
) -> str:
    """Send a bundle to a repository, which is made where there is none, or into a folder.

    The bundle is verified first, and every file again where it has arrived: the hub's record of each is compared with
    the manifest, and a folder's copy is loaded.

    Args:
        to: a folder is where the bundle goes under its own name.
        public: what a repository that is made now is; it is private otherwise.

    Returns:
        where it is now: the folder, or the reference with the commit.

    Raises:
        BundleError: the bundle is damaged.
        DownloadError: the hub or the disk refuses, or something else arrived.
        InputError: a folder of that name is in the way.
    """
    found = load_bundle(folder, reread=True)
    if isinstance(to, Path):
        return str(_copy(found, to / found.manifest.name, progress))
    return _push(found, to, hub, public=public)


def _push(found: Bundle, to: BundleReference, hub: Hub, *, public: bool) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi, RepoFile, errors

    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    names = [*(entry.path for entry in found.manifest.files), MANIFEST_NAME]
    operations = [CommitOperationAdd(to.file(name).file, found.root / name) for name in names]
    try:
        api.create_repo(to.repo, private=not public, exist_ok=True)
        done = api.create_commit(
            to.repo,
            operations,
            commit_message=f"Bundle {found.manifest.name}",
            revision=None if to.revision == "main" else to.revision,
        )
        paths = [to.file(name).file for name in names]
        there = api.get_paths_info(to.repo, paths, revision=done.oid)
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        what = (
            "needs a token that may write ('hf auth login', HF_TOKEN)" if status in (401, 403) else "refuses"
        )
        raise DownloadError(f"{to.repo}: the hub {what}: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise DownloadError(f"{to.repo}: {str(error).splitlines()[0]}; run the same command again") from error
    arrived = {info.path: info for info in there if isinstance(info, RepoFile)}
    manifest = file_entry(found.root, MANIFEST_NAME)
    for entry in (*found.manifest.files, manifest):
        info = arrived.get(to.file(entry.path).file)
        digest = info.lfs.sha256 if info is not None and info.lfs is not None else entry.sha256
        if info is None or info.size != entry.bytes or digest != entry.sha256:
            raise DownloadError(
                f"{to.repo}: {entry.path} did not arrive as it is here (SHA-256 {entry.sha256}, {entry.bytes} bytes); "
                "push again"
            )
    return str(BundleReference(to.repo, to.folder, done.oid))


# ---- here ----


def pull_bundle(
    source: BundleReference | Path,
    hub: Hub,
    *,
    out: Path | None = None,
    progress: Progress = _no_progress,
) -> Bundle:
    """Bring a bundle here: the manifest, then every file that it lists, all from one commit; then load it.

    Args:
        out: folder to copy it into, under its own name; None leaves it in the hub's cache, from where it loads.

    Raises:
        BundleError: what arrived is no bundle, or not what its manifest says.
        DownloadError: the hub does not answer or refuses, or there is no room.
        InputError: a folder of that name is in the way.
    """
    found = load_bundle(source, reread=True) if isinstance(source, Path) else _pull(source, hub, progress)
    if out is None:
        return found
    return load_bundle(_copy(found, out / found.manifest.name, progress), verify=False)


def _pull(source: BundleReference, hub: Hub, progress: Progress) -> Bundle:
    path = hub.fetch(source.file(MANIFEST_NAME))
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise DownloadError(
            f"{source}: its {MANIFEST_NAME} is none that this release reads ({validation_problems(error)})"
        ) from error
    commit = path.parents[source.file(MANIFEST_NAME).file.count("/")].name
    at = BundleReference(source.repo, source.folder, commit)
    total, done = sum(entry.bytes for entry in manifest.files), 0
    for entry in manifest.files:
        progress(entry.path, done, total)
        hub.fetch(at.file(entry.path), sha256=entry.sha256)
        done += entry.bytes
    progress(MANIFEST_NAME, total, total)
    return load_bundle(path.parent)


def _copy(found: Bundle, destination: Path, progress: Progress) -> Path:
    """Copy a bundle to `destination`, which appears complete or not at all.

    Raises:
        DownloadError: no room, or the copy is not what it is a copy of.
        InputError: something is there already.
    """
    if destination.exists():
        raise InputError(f"{destination} exists; remove it, or choose another folder")
    partial = destination.with_name(f".{destination.name}.copy")
    shutil.rmtree(partial, ignore_errors=True)
    total, done = sum(entry.bytes for entry in found.manifest.files), 0
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(destination.parent).free
        if free < total:
            raise DownloadError(
                f"{found.root.name} has {readable_size(total)}, and {destination.parent} has {readable_size(free)} "
                "free; make room, or choose another folder"
            )
        for name in (*(entry.path for entry in found.manifest.files), MANIFEST_NAME):
            progress(name, done, total)
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found.root / name, partial / name)
            done += (partial / name).stat().st_size if name != MANIFEST_NAME else 0
        load_bundle(partial, reread=True)
        os.replace(partial, destination)
    except LightForcingError as error:
        raise DownloadError(f"the copy in {destination.parent} is damaged: {error}") from error
    except OSError as error:
        raise DownloadError(f"{destination} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    progress(MANIFEST_NAME, total, total)
    return destination
