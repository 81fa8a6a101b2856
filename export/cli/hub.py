"""The commands `models`, `push` and `pull`."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from export.errors import InputError
from runtime.terminal import console, write_out

from .command import Command
from .sources import fetch_sources, fill_model

if TYPE_CHECKING:
    from export.hub.bundles import BundleReference, Progress
    from export.hub.known import KnownFile

__all__ = ["Models", "Pull", "Push"]


class Models(Command):
    """List the known public models, or show the files of one, with sizes and licences; fetch them with --fetch.

    A TOML file of your own is accepted wherever a name is: FILE.toml, or FILE.toml:NAME where it holds several.
    """

    name = "models"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("model", nargs="?", metavar="NAME", help="one model (default: all of them)")
        parser.add_argument("--fetch", action="store_true", help="fetch the model's files into the cache")
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self, args: argparse.Namespace) -> int:
        from export.hub.known import ROLES, known_models, load_model
        from export.report.models import file_lines, model_document, model_table

        if args.fetch and args.model is None:
            raise InputError("--fetch needs the NAME of a model")
        if args.fetch:
            wanted = argparse.Namespace(model=args.model, resolution=None)
            vars(wanted).update({role.replace("-", "_"): None for role in ROLES})
            fetch_sources(wanted, fill_model(wanted))
        models = known_models() if args.model is None else (load_model(args.model),)
        if args.json:
            write_out(json.dumps([model_document(model, _here) for model in models], indent=1) + "\n")
            return 0
        shown = console()
        if args.model is None:
            shown.print(model_table(models))
            return 0
        for line in file_lines(models[0], _here):
            shown.print(line, markup=False, highlight=False, soft_wrap=True)
        command = f"python -m export build --gpu rtx5090 --model {shlex.quote(args.model)}"
        shown.print(f"build it with\n  {command}", markup=False, highlight=False, soft_wrap=True)
        return 0


def _here(file: KnownFile) -> bool:
    if isinstance(file.source, Path):
        return file.source.exists()
    from export.hub.download import Hub

    return Hub().cached(file.source) is not None


class Push(Command):
    """Send a bundle to a repository of the hub or into a folder; it is verified here and where it arrives."""

    name = "push"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("bundle", type=Path, help="folder of the bundle")
        parser.add_argument(
            "to", metavar="TO", help="org/repo, org/repo:folder (with @branch), or a folder here"
        )
        parser.add_argument("--public", action="store_true", help="make a new repository public")

    def run(self, args: argparse.Namespace) -> int:
        from export.hub.bundles import push_bundle
        from export.hub.download import Hub

        with _progress() as progress:
            where = push_bundle(args.bundle, _place(args.to), Hub(), public=args.public, progress=progress)
        write_out(f"{where}\n")
        return 0


class Pull(Command):
    """Bring a bundle here from a repository of the hub or from a folder, verify it, and print where it is.

    A bundle of the hub stays in the hub library's cache, from where it runs; --out copies it.
    """

    name = "pull"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "source", metavar="FROM", help="org/repo[:folder][@revision], or a bundle's folder"
        )
        parser.add_argument("--out", type=Path, metavar="FOLDER", help="copy it into this folder")

    def run(self, args: argparse.Namespace) -> int:
        from export.hub.bundles import pull_bundle
        from export.hub.download import Hub

        source = _place(args.source)
        if isinstance(source, Path) and not source.is_dir():
            raise InputError(
                f"{args.source} is neither a folder here nor a repository of the hub (org/repo[:folder][@revision])"
            )
        with _progress() as progress:
            found = pull_bundle(source, Hub(), out=args.out, progress=progress)
        write_out(f"{found.root}\n")
        return 0


def _place(text: str) -> BundleReference | Path:
    """A folder where there is one, or where the text can be nothing else; else a repository."""
    from export.hub.bundles import BundleReference

    path = Path(text)
    return path if path.exists() else BundleReference.parse(text) or path


@contextmanager
def _progress() -> Iterator[Progress]:
    from export.progress import progress_bars

    with progress_bars(console(stderr=True)) as show:
        yield show
