"""The command `models`."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from export.errors import InputError
from runtime.terminal import console

from .command import Command
from .sources import fetch_sources, fill_model

if TYPE_CHECKING:
    from export.hub.known import KnownFile

__all__ = ["Models"]


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
            print(json.dumps([model_document(model, _here) for model in models], indent=1))
            return 0
        shown = console()
        if args.model is None:
            shown.print(model_table(models))
            return 0
        for line in file_lines(models[0], _here):
            shown.print(line, markup=False, highlight=False, soft_wrap=True)
        if models[0].unsupported is None:
            command = f"python -m export build --gpu rtx5090 --model {shlex.quote(args.model)}"
            shown.print(f"build it with\n  {command}", markup=False, highlight=False, soft_wrap=True)
        return 0


def _here(file: KnownFile) -> bool:
    if isinstance(file.source, Path):
        return file.source.exists()
    from export.hub.download import Hub

    return Hub().cached(file.source) is not None
