"""A session's state in a file: what a rollout needs to go on, bit for bit, later or in another process."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtime.bundle import Manifest, Recache
from runtime.errors import InputError
from runtime.files import atomic_output

__all__ = ["SavedChunk", "SavedMeta", "SavedPrompt", "SavedSession", "SavedTable", "bundle_digest"]

_META = "meta"
_BUFFER, _PROMPT, _FRAMES = "buffer.", "prompt.", "frames."
Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SavedTable(_Part):
    """The frame table; slots are counted from the session's first."""

    next_chunk: Count
    in_flight: int | None
    slots: tuple[tuple[Count, Count], ...]
    free: tuple[Count, ...]
    jumps: tuple[tuple[Count, Count], ...] = ()
    persistent: tuple[Count, ...] = ()
    gone: Count = 0


class SavedPrompt(_Part):
    """A prompt in force (`at` is null) or to come; its embedding is an array of the file."""

    at: Count | None
    recache: Recache
    label: str | None
    step: bool


class SavedChunk(_Part):
    """A chunk that was finished and not delivered; its frames are an array of the file."""

    index: Count
    latency: float
    denoise: float
    decode: float
    other: float
    label: str | None


class SavedMeta(_Part):
    """Everything but the arrays."""

    schema_version: Literal[1] = 1
    bundle: str
    seed: Count
    side: Literal[0, 1]
    table: SavedTable
    started: Count
    delivered: Count
    flushed: Count
    statistics: dict[str, float]
    prompts: tuple[SavedPrompt, ...]
    done: tuple[SavedChunk, ...]


@dataclass(frozen=True, eq=False)
class SavedSession:
    """A session's state: `buffers` by name, as bytes, prompt embeddings and frames in the order of the lists."""

    meta: SavedMeta
    buffers: Mapping[str, NDArray[np.uint8]]
    prompts: tuple[NDArray[np.float32], ...]
    frames: tuple[NDArray[np.uint8], ...]

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write a file; it appears complete or not at all."""
        arrays: dict[str, NDArray[Any]] = {f"{_BUFFER}{name}": array for name, array in self.buffers.items()}
        arrays |= {f"{_PROMPT}{index}": array for index, array in enumerate(self.prompts)}
        arrays |= {f"{_FRAMES}{index}": array for index, array in enumerate(self.frames)}
        arrays[_META] = np.frombuffer(self.meta.model_dump_json().encode(), dtype=np.uint8)
        with atomic_output(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # its stub takes the names for options

    @classmethod
    def read(cls, path: str | os.PathLike[str], manifest: Manifest) -> SavedSession:
        """Read a file.

        Raises:
            InputError: it is no such file, or one of another bundle.
        """
        name = Path(path).name
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
            meta = SavedMeta.model_validate_json(arrays.pop(_META).tobytes())
            prompts = tuple(arrays.pop(f"{_PROMPT}{index}") for index in range(len(meta.prompts)))
            frames = tuple(arrays.pop(f"{_FRAMES}{index}") for index in range(len(meta.done)))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, ValidationError) as error:
            raise InputError(
                f"{name} is no saved session: {error}; expected a file that Session.save wrote"
            ) from error
        if meta.bundle != bundle_digest(manifest):
            raise InputError(
                f"{name} was saved with another bundle than {manifest.name!r}; load the one that it was saved with"
            )
        buffers = {key.removeprefix(_BUFFER): array for key, array in arrays.items()}
        return cls(meta, buffers, prompts, frames)


def bundle_digest(manifest: Manifest) -> str:
    """Names a bundle by what its files hold."""
    lines = sorted(f"{entry.path} {entry.sha256}" for entry in manifest.files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
