"""Reading tensors out of checkpoint files: safetensors (one file or shards with an index) and torch zip files.

Nothing here unpickles code: torch files are read with `weights_only=True`. Tensors are mapped from the file, not
copied, so opening a checkpoint costs no memory until its values are used.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
import zipfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from lightforcing_ref.errors import CheckpointError

__all__ = ["checkpoint_files", "checkpoint_sha256", "file_identity", "read_checkpoint"]

_INDEX_SUFFIX = ".index.json"
_INDEX_BYTES = 64 << 20
_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_MAGIC = b"\x80"  # of torch files written before the zip format
_FOREIGN = {
    b"version https://git-lfs": "a Git LFS pointer and not the file itself; fetch it with `git lfs pull`",
    b"GGUF": "a GGUF file, whose quantised tensors are not supported; use the safetensors or .pt release",
    b"<": "a web page; the download went wrong, fetch it again",
}


class _ShardIndex(BaseModel):
    """`*.index.json` beside a sharded checkpoint."""

    model_config = ConfigDict(extra="forbid")

    metadata: dict[str, Any] = {}
    weight_map: dict[str, str]


def checkpoint_files(path: str | Path) -> tuple[Path, ...]:
    """The files that make up a checkpoint: the file itself, or an index followed by its shards.

    `path` is a file, an index (`*.index.json`), or a folder that holds exactly one of either.

    Raises:
        CheckpointError: nothing is there, the folder is ambiguous, or the index is damaged or leads elsewhere.
    """
    path = Path(path)
    if path.is_dir():
        path = _file_in_folder(path)
    elif not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; expected a file, or a folder with one checkpoint")
    if not path.name.endswith(_INDEX_SUFFIX):
        return (path,)
    shards = sorted(set(_read_index(path).values()))
    for shard in shards:
        if Path(shard).name != shard:
            raise CheckpointError(
                f"{path} names the shard {shard!r}; expected plain file names beside the index"
            )
        if not (path.parent / shard).is_file():
            raise CheckpointError(
                f"{path} names the shard {shard!r}, which is not beside it; download the missing file"
            )
    return (path, *(path.parent / shard for shard in shards))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint: tensors by name, in torch files possibly grouped into nested mappings.

    Raises:
        CheckpointError: the checkpoint is missing, truncated, no checkpoint at all, or holds more than plain data.
    """
    first, *shards = checkpoint_files(path)
    if not shards:
        return _read_file(first)
    contents = {shard.name: _read_file(shard) for shard in shards}
    tensors: dict[str, Any] = {}
    for key, shard_name in _read_index(first).items():
        if key not in contents[shard_name]:
            raise CheckpointError(
                f"{first} lists {key!r} in {shard_name}, which lacks it; the files belong to different releases, "
                "download them again"
            )
        tensors[key] = contents[shard_name][key]
    return tensors


def checkpoint_sha256(path: str | Path) -> str:
    r"""Identify a checkpoint, in hexadecimal: the file's SHA-256.

    Of a sharded checkpoint, the SHA-256 of the lines `<sha256>  <name>\\n` of the index and then the shards in order of
    name, which is that of `sha256sum`'s own output.
    """
    files = checkpoint_files(path)
    digests = [_file_sha256(file) for file in files]
    if len(files) == 1:
        return digests[0]
    lines = "".join(f"{digest}  {file.name}\n" for digest, file in zip(digests, files, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def file_identity(path: Path) -> tuple[int, int, int]:
    """Size, time of the last change in nanoseconds, and inode: what was found of a file holds while these stay."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_in_folder(folder: Path) -> Path:
    for pattern in ("*.safetensors.index.json", "*.safetensors", "*.bin.index.json", "*.bin"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(file.name for file in found)
            raise CheckpointError(f"{folder} holds several checkpoints ({names}); name the one to load")
    raise CheckpointError(f"{folder} holds no .safetensors or .bin checkpoint; name the file to load")


def _read_index(path: Path) -> Mapping[str, str]:
    if path.stat().st_size > _INDEX_BYTES:
        raise CheckpointError(
            f"{path} has {path.stat().st_size} bytes; expected an index of at most {_INDEX_BYTES}"
        )
    try:
        return _ShardIndex.model_validate(json.loads(path.read_bytes())).weight_map
    except (ValueError, ValidationError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is no index of a sharded checkpoint ({error}); expected JSON with a `weight_map`"
        ) from error


def _read_file(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    if not head:
        raise CheckpointError(f"{path} is empty; the download did not finish, fetch it again")
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise CheckpointError(f"{path} is {what}")
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return _read_safetensors(path)
    if head.startswith((_ZIP_MAGIC, _PICKLE_MAGIC)):
        return _read_torch(path, mapped=head.startswith(_ZIP_MAGIC))
    raise CheckpointError(
        f"{path} is neither a safetensors nor a torch file (it starts with {head[:8]!r}); expected one of these"
    )


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the handle is no mapping
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise _damaged(path, error) from error


def _read_torch(path: Path, mapped: bool) -> dict[str, Any]:
    if mapped:
        _check_archive(path, file_identity(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's advice on what is refused below
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged file can fail anywhere inside torch's reader
        if code := _code_in(str(error)):
            raise CheckpointError(
                f"{path} holds more than tensors and plain data ({code}), and loading that could run code; where you "
                "trust its origin, convert it to safetensors"
            ) from error
        raise _damaged(path, error) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected tensors by name")
    return content


def _code_in(refusal: str) -> str:
    """What PyTorch refused to load because it is or may be code; empty where it failed for another reason."""
    if "TorchScript" in refusal:
        return "a TorchScript program"
    if named := re.search(r"GLOBAL ([\w.]+)", refusal):
        return f"it calls for {named[1]}"
    return _first_line(refusal.partition("WeightsUnpickler error: ")[2] or "")


@lru_cache(maxsize=64)
def _check_archive(path: Path, _identity: tuple[int, ...]) -> None:
    """Hold the records of a torch file against the checksums stored with them, once per file and process.

    PyTorch does not; it can also be told to write none, and such a file holds 0 in their place.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if not record.CRC:
                    continue
                with archive.open(record) as file:
                    while file.read(1 << 20):
                        pass
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} ({path.stat().st_size} bytes) is truncated or damaged ({_first_line(error)}); compare its size with "
        "the published one and fetch it again"
    )


def _first_line(error: Exception | str) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "" if isinstance(error, str) else type(error).__name__
