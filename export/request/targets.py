"""Targets (what a bundle is built for) and variants (how its attention is sparse), read from TOML files.

The shipped ones are data of the `engines` package; a path to a file of one's own is accepted wherever a name is.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from export.errors import InputError
from lightforcing_ref.sparsity import SparsityTable
from runtime.bundle import AttentionPolicy, BackendName, Precision, Recache, policies

from .schedules import SchedulePolicy

__all__ = [
    "BackendName",
    "Blocks",
    "CachePolicy",
    "Operands",
    "Peak",
    "Precision",
    "Rate",
    "SparsityPolicy",
    "Target",
    "Variant",
    "list_targets",
    "list_variants",
    "load_target",
    "load_variant",
    "too_old",
    "unknown_name",
    "validation_problems",
]

_MAX_BASE = 0.999

Operands = Literal["bf16", "fp16", "fp8", "mxfp8", "nvfp4", "int8"]
"""What tensor cores multiply."""

_Tokens = Annotated[int, Field(ge=16, le=1024)]
_Count = Annotated[int, Field(ge=0)]
_Frames = Annotated[int, Field(ge=1, le=100_000)]
_Positive = Annotated[float, Field(gt=0)]
_Fraction = Annotated[float, Field(ge=0, lt=1)]
_Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Blocks(_Spec):
    """Attention blocks: tokens of one query block and of one key block."""

    query: _Tokens
    key: _Tokens


class Rate(_Spec):
    """Dense tensor rate of one kind of product, in TFLOPS.

    Attributes:
        operands: what is multiplied; `mxfp8` and `nvfp4` are block-scaled: the tensor cores apply the scales.
        accumulator: what sums are held in. GeForce cards halve the rate of fp32 sums, but for block-scaled operands.
        source: who says so.
    """

    operands: Operands
    accumulator: Literal["fp32", "fp16", "int32"]
    tflops: _Positive
    source: Annotated[str, Field(min_length=1)]


class Peak(_Spec):
    """Peak rates of the hardware: products, and memory bandwidth in GB/s (1e9)."""

    memory_gb_s: _Positive
    memory_source: Annotated[str, Field(min_length=1)]
    rates: Annotated[tuple[Rate, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _unique(self) -> Peak:
        seen = [(rate.operands, rate.accumulator) for rate in self.rates]
        for one in seen:
            if seen.count(one) > 1:
                raise ValueError(
                    f"there are {seen.count(one)} rates of {one[0]} with {one[1]} sums; expected one"
                )
        return self

    def tflops(self, operands: Operands, accumulator: str | None = None) -> float | None:
        """The rate of products of `operands`; None where it is not known.

        Args:
            accumulator: None = as we compute, fp32 (int32 for int8).
        """
        wanted = accumulator or ("int32" if operands == "int8" else "fp32")
        return next((r.tflops for r in self.rates if (r.operands, r.accumulator) == (operands, wanted)), None)


class Target(_Spec):
    """What a bundle is built for.

    Attributes:
        compute_capability: of the GPU, as "major.minor"; None on a CPU.
        driver_names: what the driver calls such a GPU, without "NVIDIA"; by default its title.
        memory_gib: device memory in GiB as the driver reports it, rounded; None = the machine's own.
        blocks: what the target's attention kernels are fastest with; None = what suits the preset's frames.
        precisions: what the hardware computes in.
        backends: in order of preference.
        peak: None where it is not known.
        default_variant: the variant where none is asked for.
    """

    schema_version: Literal[1]
    name: _Name
    title: str
    compute_capability: Annotated[str, Field(pattern=r"^\d+\.\d$")] | None = None
    driver_names: tuple[str, ...] = ()
    memory_gib: Annotated[float, Field(gt=0)] | None = None
    blocks: Blocks | None = None
    precisions: Annotated[tuple[Precision, ...], Field(min_length=1)]
    backends: Annotated[tuple[BackendName, ...], Field(min_length=1)]
    peak: Peak | None = None
    default_variant: str = "short"

    @property
    def sm(self) -> str | None:
        """The architecture as compilers name it, e.g. "sm_120"; None on a CPU."""
        return None if self.compute_capability is None else f"sm_{self.compute_capability.replace('.', '')}"


class SparsityPolicy(_Spec):
    """Sparsity of the attention: the chunk-aware table, and the frames its first stage keeps.

    Attributes:
        target: average fraction of key blocks that the chunks after the first skip.
        base: the fraction in the limit of a long history, at least `target`.
        table_frames: planned length of the clip in latent frames; a whole number of chunks.
        keep_frames: past frames that stay eligible, `sink_frames` and `near_frames` among them; None = all of them.
    """

    target: _Fraction
    base: _Fraction
    table_frames: _Frames
    keep_frames: Annotated[int, Field(ge=1)] | None = None
    sink_frames: _Count = 0
    near_frames: _Count = 0

    @model_validator(mode="after")
    def _consistent(self) -> SparsityPolicy:
        if self.base < self.target:
            raise ValueError(f"base is {self.base}, below the target {self.target}; expected base >= target")
        reserved = self.sink_frames + self.near_frames
        if self.keep_frames is not None and self.keep_frames < reserved:
            raise ValueError(
                f"keep_frames is {self.keep_frames}; expected at least sink + near = {reserved} frames"
            )
        return self


class CachePolicy(_Spec):
    """Which past frames stay in the cache.

    Attributes:
        window_frames: latent frames that attention may see, the current chunk included; None = the planned clip.
        sink_frames: first frames of the rollout, which are never evicted.
        sink_positions: "absolute" leaves them where they were, "window" moves them to just before the oldest
            recent frame whenever the window slides.
        recache: what a prompt switch does to cached frames where the switch does not say; "joint" is for full attention
            and for bundles whose step is cut into segments.
        flush_frames: latest frames that outlive a flush or a cut, besides the sinks.
        cut_frames: how far a cut moves what follows it in time, in latent frames.
        kv: what keys and values are held in; None = the type that the model computes in.
    """

    window_frames: _Frames | None = None
    sink_frames: _Count = 0
    sink_positions: Literal["absolute", "window"] = "absolute"
    recache: Recache = "window"
    flush_frames: Annotated[int, Field(ge=0, le=1000)] = 2
    cut_frames: Annotated[int, Field(ge=1, le=1000)] = 42
    kv: Literal["fp8"] | None = None


class Variant(_Spec):
    """How chunks are made, how their attention is sparse, and what the cache keeps.

    Attributes:
        block: tokens of a block, where the variant's weights were trained with one size; None = the target's.
        attention: the method that selects, with its parameters (docs/policies.md).
        products: what attention multiplies; None = the type that the model computes in.
    """

    schema_version: Literal[1]
    name: _Name
    title: str
    block: _Tokens | None = None
    schedule: SchedulePolicy = SchedulePolicy()
    attention: AttentionPolicy = policies.HsaPolicy()
    products: Literal["fp8"] | None = None
    sparsity: SparsityPolicy
    cache: CachePolicy

    @model_validator(mode="after")
    def _multiplies_codes(self) -> Variant:
        if self.products is not None and self.cache.kv is None:
            raise ValueError("products is 'fp8', which multiplies codes; expected cache.kv 'fp8', too")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Variant:
        frames = self.schedule.chunk_frames
        if self.sparsity.table_frames % frames:
            raise ValueError(
                f"sparsity.table_frames is {self.sparsity.table_frames}; expected a whole number of chunks of {frames} "
                f"frames"
            )
        if self.window_frames < frames:
            raise ValueError(
                f"cache.window_frames is {self.window_frames}; expected at least the {frames} frames of a chunk"
            )
        policies.check_window(self.attention, frames)
        if self.cache.sink_frames > self.max_past_frames:
            raise ValueError(
                f"cache.sink_frames is {self.cache.sink_frames}; expected at most the {self.max_past_frames} past "
                f"frames of a window of {self.window_frames}"
            )
        return self

    @model_validator(mode="after")
    def _recomputes_jointly(self) -> Variant:
        cache, frames = self.cache, self.schedule.chunk_frames
        if cache.recache != "joint":
            return self
        if not self.is_dense:
            raise ValueError(
                "cache.recache is 'joint', which is for full attention; use 'window', or a sparsity of 0"
            )
        if self.window_frames % frames or cache.sink_frames % frames:
            raise ValueError(
                f"cache.recache is 'joint', and the window of {self.window_frames} frames or the {cache.sink_frames} "
                f"sinks are no whole chunks of {frames}; expected whole chunks, or another recache"
            )
        if cache.sink_frames and cache.sink_positions != "absolute":
            raise ValueError(
                "cache.recache is 'joint', which needs sinks that stay where they are: 'absolute'"
            )
        return self

    @model_validator(mode="after")
    def _rolls(self) -> Variant:
        cache, frames, chunks = self.cache, self.schedule.chunk_frames, self.schedule.window_chunks
        if not self.schedule.rolling:
            return self
        if not self.is_dense:
            raise ValueError(
                f"schedule.rolling is for full attention, and the policy {self.attention.policy} skips blocks; use "
                "a sparsity of 0, or the policy dense"
            )
        if self.window_frames % frames or self.window_frames < frames * (chunks + 1):
            raise ValueError(
                f"schedule.rolling has {chunks} chunks of {frames} frames in a forward, and cache.window_frames is "
                f"{self.window_frames}; expected a whole number of chunks, {frames * (chunks + 1)} frames or more"
            )
        if (cache.sink_frames, cache.sink_positions, cache.recache) != (frames, "window", "none"):
            raise ValueError(
                f"schedule.rolling keeps the first chunk, moves it with the window, and recomputes nothing at a prompt "
                f"switch; expected cache.sink_frames {frames}, sink_positions 'window' and recache 'none', found "
                f"{cache.sink_frames}, {cache.sink_positions!r} and {cache.recache!r}"
            )
        return self

    @property
    def held_frames(self) -> int:
        """Past frames that a session keeps: where chunks roll, the first one besides what a clean forward sees."""
        return self.max_past_frames + (self.cache.sink_frames if self.schedule.rolling else 0)

    @property
    def window_frames(self) -> int:
        """Latent frames that attention may see, the current chunk included."""
        stated = policies.stated_window(self.attention, self.cache.sink_frames, self.cache.window_frames)
        return stated or self.sparsity.table_frames

    @property
    def max_past_frames(self) -> int:
        """Latent frames the cache holds at most."""
        return self.window_frames - self.schedule.chunk_frames

    @property
    def frame_choice(self) -> tuple[int, int, int]:
        """Past frames that stay eligible in the attention's first stage, and how many first and last ones always do.

        All of them where the variant states none, or its method has no such stage.
        """
        if not isinstance(self.attention, policies.HsaPolicy):
            return max(1, self.max_past_frames), 0, 0
        sink, near = self.sparsity.sink_frames, self.sparsity.near_frames
        return self.sparsity.keep_frames or max(1, self.max_past_frames, sink + near), sink, near

    @property
    def keep_frames(self) -> int:
        """The first of `frame_choice`."""
        return self.frame_choice[0]

    @property
    def is_dense(self) -> bool:
        """Whether every token sees everything, so that weights that were never finetuned for sparsity suit it."""
        return policies.keeps_everything(self.attention, self.sparsity.target)

    @property
    def _idle(self) -> frozenset[str]:
        """Fields of `sparsity`, and `window_frames`, that the method does not look at."""
        method, idle = self.attention, set()
        if not isinstance(method, policies.HsaPolicy):
            idle |= {"keep_frames", "sink_frames", "near_frames"}
        if not isinstance(getattr(method, "budget", None), str):
            idle |= {"target", "base"}
        idle |= {"window_frames"} if policies.persistent_frames(method) else set()
        return frozenset(idle)

    def blocks(self, target: Target, preset_block: int) -> Blocks:
        """Attention blocks: the variant's own, else the target's, else what suits the preset's frames."""
        if self.block is not None:
            return Blocks(query=self.block, key=self.block)
        return target.blocks or Blocks(query=preset_block, key=preset_block)

    def table(self) -> SparsityTable:
        """Sparsity of every chunk: what the method's budget says. Methods without a budget have rules of their own,
        and a table that keeps everything.

        Raises:
            ConfigError: target and base are so far apart that a chunk's sparsity would be negative.
        """
        method = self.attention
        if not isinstance(method, policies.BUDGETED):
            return SparsityTable.dense()
        if not isinstance(method.budget, str):
            return SparsityTable((0.0, 1 - method.budget) if method.budget < 1 else (0.0,))
        if method.budget == "uniform":
            return SparsityTable((0.0, self.sparsity.target) if self.sparsity.target else (0.0,))
        return SparsityTable.chunk_aware(
            self.sparsity.target,
            self.sparsity.base,
            table_frames=self.sparsity.table_frames,
            chunk_frames=self.schedule.chunk_frames,
            window_frames=getattr(method, "local_frames", self.cache.window_frames),
        )

    def with_policy(self, name: str) -> Variant:
        """This variant with another method at its defaults, called `NAME-METHOD`; itself where it has that method.

        Raises:
            InputError: no such method.
        """
        if name not in policies.POLICIES:
            raise unknown_name("policy", name, policies.POLICIES)
        if self.attention.policy == name:
            return self
        document = self.model_dump() | {"attention": {"policy": name}, "name": f"{self.name}-{name}"}
        return _validated(Variant, document, f"variant {self.name!r} with the policy {name}")

    def holding(self, kv: Literal["fp8"] | None, products: Literal["fp8"] | None = None) -> Variant:
        """This variant with keys and values held as `kv` says, and multiplied as `products` says: `NAME-kv8-att8`."""
        if (kv, products) == (self.cache.kv, self.products):
            return self
        plain = self.name.removesuffix("-att8").removesuffix("-kv8")
        name = plain + "-kv8" * bool(kv) + "-att8" * bool(products)
        document = self.model_dump() | {"name": name, "products": products}
        document["cache"] |= {"kv": kv}
        return _validated(Variant, document, f"variant {self.name!r} with codes")

    def switching(self, recache: Recache) -> Variant:
        """This variant with another usual way to switch prompts, called `NAME-RECACHE`; itself where it has that one.

        Raises:
            InputError: it has no such way.
        """
        if recache == self.cache.recache:
            return self
        document = self.model_dump()
        document["cache"]["recache"] = recache
        document["name"] = f"{self.name}-{recache}"
        return _validated(Variant, document, f"variant {self.name!r} with --recache {recache}")

    def changed(self, **changes: int | float | None) -> Variant:
        """This variant with other values, called `NAME-custom`; itself where every value is None.

        Args:
            changes: fields of `sparsity`, and `window_frames`. A `target` without a `base` takes the base along at
                the variant's own distance (target 0 is dense: base 0).

        Raises:
            InputError: the values do not go together, or the variant's method does not look at them.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        if not given:
            return self
        idle = [name for name in given if name in self._idle]
        if idle:
            raise InputError(
                f"the policy {self.attention.policy} of the variant {self.name} does not look at {', '.join(idle)}; "
                "leave that out, or choose --policy hsa"
            )
        if "target" in given and "base" not in given:
            target, distance = given["target"], self.sparsity.base - self.sparsity.target
            given["base"] = min(round(target + distance, 6), _MAX_BASE) if target else 0.0
        document = self.model_dump()
        for name, value in given.items():
            document["cache" if name == "window_frames" else "sparsity"][name] = value
        document["name"] = f"{self.name.removesuffix('-custom')}-custom"
        return _validated(Variant, document, f"variant {self.name!r} with {_flags(given)}")


_SpecT = TypeVar("_SpecT", Target, Variant)


def load_target(name: str) -> Target:
    """The target called `name`, or the one in the file `name`.

    Raises:
        InputError: there is none (the message lists the shipped ones), or the file is malformed.
    """
    return _load(Target, "target", name)


def load_variant(name: str) -> Variant:
    """The variant called `name`, or the one in the file `name`.

    Raises:
        InputError: there is none (the message lists the shipped ones), or the file is malformed.
    """
    return _load(Variant, "variant", name)


def list_targets() -> tuple[Target, ...]:
    """The shipped targets, by name."""
    return tuple(load_target(name) for name in _names("target"))


def list_variants() -> tuple[Variant, ...]:
    """The shipped variants, by name."""
    return tuple(load_variant(name) for name in _names("variant"))


def unknown_name(kind: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name that is none of `known`: suggests close ones and lists all."""
    names = sorted(known)
    close = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return InputError(f"unknown {kind} {name!r}; {hint}the {kind}s are {', '.join(names)}")


def _folder(kind: str) -> Traversable:
    return resources.files("engines").joinpath(f"{kind}s")


def _names(kind: str) -> list[str]:
    entries = (entry.name for entry in _folder(kind).iterdir())
    return sorted(entry.removesuffix(".toml") for entry in entries if entry.endswith(".toml"))


def too_old(name: str) -> InputError:
    """The refusal of a GPU of compute capability 7.5 or less."""
    return InputError(
        f"{name} is older than compute capability 8.0: it does not compute in bf16, and there are no attention "
        "kernels for it; use --gpu cpu, or an RTX 30 card or newer"
    )


def _load(model: type[_SpecT], kind: str, name: str) -> _SpecT:
    known = _names(kind)
    if kind == "target" and re.fullmatch(r"(?:rtx20[5-8]0|gtx|titan|quadro|t4$|v100)[a-z0-9-]*", name):
        raise too_old(name)
    if name in known:
        source: Traversable = _folder(kind).joinpath(f"{name}.toml")
    elif name.endswith(".toml") or "/" in name or "\\" in name:
        source = Path(name)
        if not source.is_file():
            raise InputError(
                f"no {kind} file at {name}; expected a TOML file, or one of the {kind}s {', '.join(known)}"
            )
    else:
        raise unknown_name(kind, name, known)
    try:
        document = tomllib.loads(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"the {kind} file {source} is not readable TOML: {error}") from error
    return _validated(model, document, f"the {kind} file {source}")


def _validated(model: type[_SpecT], document: dict[str, Any], what: str) -> _SpecT:
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise InputError(f"{what} is not valid: {validation_problems(error)}") from error


def validation_problems(error: ValidationError) -> str:
    """What is wrong with a document that was read from a file, every field in its place."""
    return "; ".join(
        ": ".join(filter(None, (".".join(map(str, item["loc"])), item["msg"].removeprefix("Value error, "))))
        for item in error.errors()
    )


def _flags(values: dict[str, int | float]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())
