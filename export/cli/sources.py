"""The files a model is made of, on the command line: paths, references to the hub, and `--model`, which names them all.

Nothing is fetched before everything else about the arguments is known to be good.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from export.errors import InputError
from export.hub.reference import FORM, HubReference
from runtime.terminal import console

if TYPE_CHECKING:
    from export.hub.known import KnownFile, KnownModel, Role, Source
    from export.request.targets import Target
    from lightforcing_ref.checkpoint.lora import MergedLoRA

__all__ = [
    "add_decoder_and_text_files",
    "add_text_files",
    "add_transformer_files",
    "check_pairing",
    "check_sources",
    "fetch_sources",
    "fill_model",
    "lora",
    "merged_loras",
    "source",
    "usual_variant",
]

_STRONGEST = 100.0
"""Largest strength of a LoRA that is believed."""


def source(text: str) -> Path | HubReference:
    """A file or folder that exists, or a reference to the hub."""
    path = Path(text)
    if path.exists():
        return path
    reference = HubReference.parse(text)
    if reference is None:
        raise argparse.ArgumentTypeError(f"{text} does not exist, and is no hub reference ({FORM})")
    return reference


@dataclass(frozen=True)
class LoRAArgument:
    """A LoRA on the command line."""

    source: Source
    strength: float = 1.0


def lora(text: str) -> LoRAArgument:
    """A file or a reference, with its strength behind a colon, unless a file has that very name."""
    head, colon, tail = text.rpartition(":")
    try:
        strength = float(tail) if colon and not Path(text).exists() else None
    except ValueError:
        strength = None
    if strength is None:
        return LoRAArgument(source(text))
    if not 0 < abs(strength) <= _STRONGEST:
        raise argparse.ArgumentTypeError(
            f"{text} has the strength {tail}; expected a number up to {_STRONGEST:g} that is not 0 (1 is as trained)"
        )
    return LoRAArgument(source(head), strength)


def add_transformer_files(parser: argparse._ActionsContainer) -> None:
    """`--model`, the transformer's files, and what may be wrong with them."""
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="a known model, or FILE.toml[:NAME]: its files, size, resolution and variant (see 'models')",
    )
    parser.add_argument(
        "--checkpoint", type=source, metavar="FILE", help=f"weights of the transformer; also {FORM}"
    )
    parser.add_argument(
        "--lora",
        type=lora,
        action="append",
        metavar="FILE[:STRENGTH]",
        help="LoRA to merge into the checkpoint, such as style.safetensors:0.8; repeatable, merged in order",
    )
    parser.add_argument(
        "--allow-values", action="store_true", help="take weights that no trained model has: NaN, zeros, 1e38"
    )


def add_text_files(parser: argparse._ActionsContainer) -> None:
    """Text encoder and tokenizer."""
    parser.add_argument(
        "--text-encoder", type=source, metavar="PATH", help="UMT5 encoder: a file, a folder or a reference"
    )
    parser.add_argument(
        "--tokenizer", type=source, metavar="PATH", help="tokenizer.json, its folder or a reference"
    )


def add_decoder_and_text_files(parser: argparse._ActionsContainer) -> None:
    """Everything that a bundle is made of besides the transformer."""
    parser.add_argument(
        "--vae",
        type=source,
        metavar="FILE",
        help="decoder: Wan2.1_VAE, lightvaew2_1, taew2_1, lighttaew2_1; also a reference",
    )
    parser.add_argument(
        "--encoder", type=source, metavar="FILE", help="video encoder, where it is not in the decoder's file"
    )
    add_text_files(parser)


def check_sources(args: argparse.Namespace) -> None:
    """Weights come from files or from a seed, never partly from either."""
    files = {
        name: getattr(args, name)
        for name in ("checkpoint", "vae", "text_encoder", "tokenizer")
        if hasattr(args, name)
    }
    missing = [_flag(name) for name, path in files.items() if path is None]
    given = [_flag(name) for name, path in files.items() if path is not None]
    if given and (getattr(args, "init", None) or getattr(args, "seed", None) is not None):
        first = "--model" if args.model else given[0]
        raise InputError(f"{first} and random weights exclude each other; drop --init and --seed, or {first}")
    if given and missing:
        raise InputError(f"{', '.join(given)} without {', '.join(missing)}; give all of them, or none")
    if getattr(args, "encoder", None) and not args.checkpoint:
        raise InputError(
            "--encoder is a file, and the other weights come from none; give --checkpoint and its files"
        )
    if args.lora and not args.checkpoint:
        raise InputError("--lora needs the --checkpoint it belongs to")
    if getattr(args, "section", None) and not args.checkpoint:
        raise InputError("--section is one of a --checkpoint; give that, or drop it")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# ---- known models ----


def fill_model(args: argparse.Namespace) -> KnownModel | None:
    """Put what `--model` says in the place of what was not given; the known model that is meant, if any.

    A known checkpoint that is given by itself is recognised, too; only its size is filled in.

    Raises:
        InputError: no such model, or other arguments say that it is something else.
    """
    from export.hub.known import ROLES, load_model

    known = load_model(args.model) if args.model else _recognised(args.checkpoint)
    args.expected = {}
    if known is not None and args.model:
        for role in ROLES:
            name, file = role.replace("-", "_"), known.files.get(role)
            if file is not None and getattr(args, name, "") is None:
                setattr(args, name, [LoRAArgument(file.source)] if role == "lora" else file.source)
                args.expected["lora.0" if role == "lora" else name] = file.sha256
        if getattr(args, "resolution", "") is None:
            args.resolution = (known.height, known.width)
    if hasattr(args, "preset"):
        wanted = known.preset if known is not None else "tiny"
        if known is not None and args.preset not in (None, wanted):
            raise InputError(f"{known.name} is a {wanted}, not a {args.preset}; drop --preset")
        args.preset = args.preset or wanted
    return known


def usual_variant(args: argparse.Namespace, known: KnownModel | None, target: Target) -> str:
    """The variant where none is asked for: the target's own, unless the model's weights were made for others."""
    if args.variant:
        return str(args.variant)
    if known is None or target.default_variant in known.variants:
        return target.default_variant
    return known.variants[0]


def check_pairing(args: argparse.Namespace, known: KnownModel | None, variant: str) -> None:
    """Refuse files and variants that do not belong together, where they are known.

    Raises:
        InputError: says what the checkpoint is usually built as.
    """
    if known is None or args.any_pairing:
        return
    if variant not in known.variants and not variant.endswith(".toml"):
        raise InputError(
            f"the weights of {known.name} were made for {_or(known.variants)}, not for the variant {variant}; use "
            f"--variant {known.variants[0]} --resolution {known.resolution}, or --any-pairing"
        )
    checkpoint = known.files["checkpoint"]
    for given in args.lora or ():
        file = _known_file(given.source, "lora", known)
        if file is None or file.base in (None, checkpoint.name):
            continue
        raise InputError(
            f"the LoRA {given.source} changes {file.base}, and the checkpoint is {checkpoint.name}; give the one it "
            "belongs to, or --any-pairing"
        )


def _recognised(checkpoint: Source | None) -> KnownModel | None:
    from export.hub.known import known_models

    if checkpoint is None:
        return None
    return next((model for model in known_models() if model.files["checkpoint"].is_at(checkpoint)), None)


def _known_file(where: Source, role: Role, known: KnownModel | None) -> KnownFile | None:
    """The file at `where`: of the model that is asked for, or of the shipped ones."""
    from export.hub.known import known_models

    files = (model.files.get(role) for model in (known, *known_models()) if model is not None)
    return next((file for file in files if file is not None and file.is_at(where)), None)


def _or(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


# ---- the download ----


def fetch_sources(args: argparse.Namespace, known: KnownModel | None = None) -> dict[str, str]:
    """Replace every reference among the arguments by the path of the file, fetching what is not in the cache.

    What is to be fetched, and what its licence forbids, is said first.

    Returns:
        the references by role, as a manifest names them.

    Raises:
        DownloadError: a file cannot be fetched.
    """
    from export.hub.known import ROLES

    if known is not None and getattr(args, "resolution", None) not in (None, (known.height, known.width)):
        _say(
            f"{known.name} was trained at {known.resolution}; other sizes work, and may look worse", "yellow"
        )
    given: list[tuple[Role, str, Source | None]] = [
        (role, role.replace("-", "_"), getattr(args, role.replace("-", "_"), None))
        for role in ROLES
        if role != "lora"
    ]
    given += [("lora", f"lora.{i}", one.source) for i, one in enumerate(getattr(args, "lora", None) or ())]
    wanted = [(role, name, where) for role, name, where in given if isinstance(where, HubReference)]
    if not wanted:
        return {}
    from export.hub.download import Hub
    from export.units import readable_size

    hub = Hub()
    for role, _, where in wanted:
        file = _known_file(where, role, known)
        size = "" if file is None or file.bytes is None else f", {readable_size(file.bytes)}"
        here = hub.cached(where)
        _say(f"{role}: {where}{size} ({'in the cache' if here else 'to be fetched'})")
        if file is not None and file.products == "forbidden":
            _say(f"  licence: {file.licence}; it forbids use in products", "bold red")
        elif file is not None and file.products == "unstated":
            _say(f"  licence: {file.licence}; ask its authors before you use it in a product", "yellow")
    for role, name, where in wanted:
        if role == "lora":
            index = int(name.removeprefix("lora."))
            path = hub.fetch_lora(where, sha256=args.expected.get(name))
            args.lora[index] = replace(args.lora[index], source=path)
        else:
            setattr(args, name, hub.fetch(where, sha256=args.expected.get(name)))
    return {name: str(where) for _, name, where in wanted}


def merged_loras(args: argparse.Namespace) -> tuple[MergedLoRA, ...]:
    """The LoRAs among the arguments, whose files are here."""
    from lightforcing_ref.checkpoint.lora import MergedLoRA

    return tuple(MergedLoRA(Path(one.source), one.strength) for one in args.lora or ())


def _say(text: str, style: str | None = None) -> None:
    console(stderr=True).print(text, style=style, markup=False, highlight=False, soft_wrap=True)
