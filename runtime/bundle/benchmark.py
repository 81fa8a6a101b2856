"""What `python -m runtime bench` measured, as a file: of which bundle, on which device, chunk by chunk.

`python -m export plan --measured` reads it, so it says everything that the work of those chunks follows from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtime.errors import InputError

from .manifest import (
    Attention,
    BackendName,
    Cache,
    Manifest,
    Model,
    Precision,
    Quantization,
    Sparsity,
    Target,
    Vae,
)
from .rollout import Schedule

__all__ = ["BENCHMARK_VERSION", "Benchmark", "MeasuredBundle", "MeasuredChunk", "read_benchmark"]

BENCHMARK_VERSION: Final = 1

_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MeasuredChunk(_Part):
    """Times of one chunk in seconds; see `runtime.Chunk`."""

    index: Annotated[int, Field(ge=0)]
    frames: _Count
    latency: _Seconds
    denoise: _Seconds
    decode: _Seconds
    other: _Seconds


class MeasuredBundle(_Part):
    """The sections of the manifest that decide how much a chunk computes.

    Files that were written before `schedule` was kept have none; the variant's name stands for it.
    """

    name: str
    target: Target
    backend: BackendName
    precision: Precision
    variant: str
    model: Model
    attention: Attention
    sparsity: Sparsity
    cache: Cache
    vae: Vae
    schedule: Schedule | None = None
    quantization: Quantization | None = None

    @classmethod
    def of(cls, manifest: Manifest) -> MeasuredBundle:
        """What a benchmark keeps of `manifest`."""
        return cls(**{name: getattr(manifest, name) for name in cls.model_fields})


class Benchmark(_Part):
    """One run of `bench`. Times in seconds.

    `overhead_percent` is the time the runtime spends outside the engines, in percent of all the time spent on
    the measured chunks. `seconds` is wall time for all sessions together, and `fps` counts all their frames.
    `per_chunk` says, on a GPU, how often graphs were launched and how often the host waited; see
    `CudaCounters`. `chunks` are those of all sessions, one session after the other.
    """

    schema_version: Literal[1] = BENCHMARK_VERSION
    bundle: MeasuredBundle
    sessions: _Count
    frames: _Count
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    fps: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    denoise_per_chunk: _Seconds
    decode_per_chunk: _Seconds
    other_per_chunk: _Seconds
    median_latency: _Seconds
    overhead_percent: _Seconds
    per_chunk: dict[str, float]
    chunks: Annotated[tuple[MeasuredChunk, ...], Field(min_length=1)]
    environment: dict[str, Any]


def read_benchmark(path: Path) -> Benchmark:
    """Read the file that `bench --json` wrote.

    Raises:
        InputError: it cannot be read, or is none.
    """
    hint = "expected a file that `python -m runtime bench BUNDLE --json FILE` wrote"
    try:
        return Benchmark.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; {hint}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise InputError(f"{path} is no benchmark: {where}: {first['msg']}; {hint}") from error
