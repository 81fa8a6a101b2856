"""The command `sign`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from runtime.terminal import write_out

from .command import Command

__all__ = ["Sign"]

_PASSWORD = "LIGHTFORCING_SIGNING_PASSWORD"


class Sign(Command):
    """Sign a bundle, so that others can see whose it is: `python -m runtime verify BUNDLE --public-key FILE`.

    Makes `model.sig` in the bundle, in the format of OpenSSF model-signing (the extra `sign`). Files are verified
    first. A key: `openssl ecparam -name prime256v1 -genkey -noout -out key.pem`; for those who check, `openssl ec
    -in key.pem -pubout -out key.pub`. The password of a key that has one comes from LIGHTFORCING_SIGNING_PASSWORD.
    """

    name = "sign"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("bundle", type=Path, help="folder of the bundle")
        parser.add_argument("--key", type=Path, required=True, metavar="FILE", help="private key, PEM")

    def run(self, args: argparse.Namespace) -> int:
        from runtime.bundle import load_bundle
        from runtime.bundle.signature import sign_bundle

        bundle = load_bundle(args.bundle, reread=True)
        path = sign_bundle(bundle.root, args.key, os.environ.get(_PASSWORD))
        write_out(f"{path}\nSHA-256 of the manifest: {bundle.digest}\n")
        return 0
