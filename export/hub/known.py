"""The known public checkpoints: which files make a model, what their licences say, and what they are built as."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from export.errors import InputError
from export.request.targets import unknown_name, validation_problems
from lightforcing_ref.dimensions import DECODERS

from .reference import FORM, HubReference

__all__ = [
    "ROLES",
    "KnownFile",
    "KnownModel",
    "Products",
    "Role",
    "Source",
    "known_models",
    "load_model",
]

Role = Literal["checkpoint", "lora", "vae", "encoder", "text-encoder", "tokenizer"]
Products = Literal["allowed", "forbidden", "unstated"]
Source = Path | HubReference
"""Where a file is: here, or on the hub."""

ROLES: tuple[Role, ...] = ("checkpoint", "lora", "vae", "encoder", "text-encoder", "tokenizer")

_Text = Annotated[str, Field(min_length=1)]


class _Spec(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, alias_generator=lambda name: name.replace("_", "-")
    )


class _File(_Spec):
    role: Role
    source: _Text
    bytes: Annotated[int, Field(gt=0)] | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    licence: _Text
    products: Products
    base: str | None = None
    decoder: str | None = None


class _Model(_Spec):
    title: _Text
    preset: str
    variants: Annotated[tuple[str, ...], Field(min_length=1)]
    resolution: Annotated[str, Field(pattern=r"^\d{1,5}x\d{1,5}$")]
    checkpoint: str
    lora: str | None = None
    vae: str
    encoder: str | None = None
    text_encoder: str
    tokenizer: str


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1]
    files: dict[str, _File] = {}
    models: dict[str, _Model] = {}


@dataclass(frozen=True)
class KnownFile:
    """A file that models are made of.

    Attributes:
        bytes: its size, as the hub shows it.
        sha256: of its content, where it was published.
        products: whether its licence lets a product use it; "unstated" where no licence is given with it.
        base: of a LoRA, the checkpoint that it changes.
        decoder: of a decoder's file, its kind as `--decoder` names it.
    """

    name: str
    role: Role
    source: Source
    bytes: int | None
    sha256: str | None
    licence: str
    products: Products
    base: str | None = None
    decoder: str | None = None

    def is_at(self, source: Source) -> bool:
        """Whether `source` is this file: the same reference at any revision, or a local file of its name and size."""
        if isinstance(source, HubReference):
            own = self.source
            return isinstance(own, HubReference) and (own.repo, own.file) == (source.repo, source.file)
        if source == self.source:
            return True
        return self.sha256 is not None and source.name == self.source.name and _size(source) == self.bytes


@dataclass(frozen=True)
class KnownModel:
    """A model, with all that a build needs to know of it.

    Attributes:
        variants: those that its weights were made for, the usual one first.
        height, width: of its videos as it was trained, in pixels.
        files: by role; without a LoRA where it needs none.
    """

    name: str
    title: str
    preset: str
    variants: tuple[str, ...]
    height: int
    width: int
    files: Mapping[Role, KnownFile]

    @property
    def resolution(self) -> str:
        """Height and width as the command line takes them."""
        return f"{self.height}x{self.width}"

    @property
    def bytes(self) -> int | None:
        """Size of all its files; None where one is not known."""
        sizes = [file.bytes for file in self.files.values()]
        return None if None in sizes else sum(size for size in sizes if size is not None)


def known_models() -> tuple[KnownModel, ...]:
    """The shipped models, by name."""
    return tuple(_models(_shipped(), Path()))


def load_model(name: str) -> KnownModel:
    """The model called `name`; or that of a TOML file, `FILE.toml`, with `:NAME` where it holds several.

    Raises:
        InputError: there is none (the message lists the known ones), or the file is malformed.
    """
    match = re.fullmatch(r"(?P<path>.+\.toml)(?::(?P<name>[^:/\\]+))?", name)
    if match is None:
        models = {model.name: model for model in known_models()}
        if name not in models:
            raise unknown_name("model", name, models)
        return models[name]
    path = Path(match["path"])
    own = _parse(path)
    shipped = _shipped()
    merged = _Document(schema_version=1, files={**shipped.files, **own.files}, models=own.models)
    models = {model.name: model for model in _models(merged, path.parent, frozenset(own.files))}
    if match["name"] is None and len(models) == 1:
        return next(iter(models.values()))
    if match["name"] not in models:
        raise InputError(
            f"{path} holds {len(models)} models ({', '.join(models) or 'none'}); name one as {path}:NAME"
        )
    return models[match["name"]]


def _shipped() -> _Document:
    text = resources.files("engines").joinpath("models.toml").read_text(encoding="utf-8")
    return _validated(tomllib.loads(text), "the list of models")


def _parse(path: Path) -> _Document:
    if not path.is_file():
        raise InputError(
            f"no models file at {path}; expected a TOML file, or one of the models "
            f"{', '.join(model.name for model in known_models())}"
        )
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"the models file {path} is not readable TOML: {error}") from error
    return _validated(document, f"the models file {path}")


def _validated(document: dict[str, object], what: str) -> _Document:
    try:
        return _Document.model_validate(document)
    except ValidationError as error:
        raise InputError(f"{what} is not valid: {validation_problems(error)}") from error


def _models(document: _Document, folder: Path, local: frozenset[str] = frozenset()) -> Iterator[KnownModel]:
    for name, entry in sorted(document.models.items()):
        files: dict[Role, KnownFile] = {}
        for role in ROLES:
            wanted = getattr(entry, role.replace("-", "_"))
            if wanted is None:
                continue
            if wanted not in document.files:
                raise InputError(
                    f"model {name!r} names the file {wanted!r}, and there is no [files.{wanted}]; the files are "
                    f"{', '.join(sorted(document.files))}"
                )
            found = _file(wanted, document.files[wanted], folder if wanted in local else Path())
            if found.role != role:
                raise InputError(f"model {name!r} takes {wanted!r} as its {role}, and it is a {found.role}")
            files[role] = found
        height, _, width = entry.resolution.partition("x")
        yield KnownModel(
            name=name,
            title=entry.title,
            preset=entry.preset,
            variants=entry.variants,
            height=int(height),
            width=int(width),
            files=files,
        )


def _file(name: str, entry: _File, folder: Path) -> KnownFile:
    reference = HubReference.parse(entry.source)
    if reference is None and not (folder / entry.source).exists():
        raise InputError(
            f"the source of [files.{name}] is {entry.source!r}, neither a file beside the list nor {FORM}"
        )
    if entry.decoder is not None and entry.decoder not in DECODERS:
        raise InputError(
            f"[files.{name}] has the decoder {entry.decoder!r}; expected one of {', '.join(DECODERS)}"
        )
    return KnownFile(
        name=name,
        role=entry.role,
        source=reference or folder / entry.source,
        bytes=entry.bytes,
        sha256=entry.sha256,
        licence=entry.licence,
        products=entry.products,
        base=entry.base,
        decoder=entry.decoder,
    )


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
