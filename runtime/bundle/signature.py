"""Signing a bundle, and checking whose it is, with OpenSSF model-signing (the extra `sign`).

A signature covers every file of the folder but itself and what is written on the machine that uses the bundle: the
verdict, and the record of hashes. It is of the format of `model_signing`, whose own command checks it as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from runtime.errors import BundleError, BundleIntegrityError, InputError
from runtime.files import atomic_output

from .files import HASHES_NAME

if TYPE_CHECKING:
    from model_signing import hashing

__all__ = ["SIGNATURE_NAME", "check_signature", "sign_bundle"]

SIGNATURE_NAME: Final = "model.sig"
_OF_THIS_MACHINE: Final = ("verdict.json", HASHES_NAME)


def sign_bundle(folder: Path, private_key: Path, password: str | None = None) -> Path:
    """Sign what is in `folder`, which the caller has verified, with an elliptic-curve key in a PEM file.

    Returns the signature's file, which is in the folder; an older one is replaced.

    Raises:
        InputError: model-signing is not installed, or the key cannot be used.
        OSError: the signature cannot be written.
    """
    signing = _library().signing
    _require_file(private_key, "key")
    target = folder / SIGNATURE_NAME
    with atomic_output(target) as temporary:
        try:
            secret = None if password is None else password.encode()  # whatever the library's annotation says
            config = signing.Config().use_elliptic_key_signer(private_key=private_key, password=secret)
            config.set_hashing_config(_hashing(folder, target, temporary)).sign(folder, temporary)
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"{private_key} does not sign: {error}; expected an elliptic-curve private key in PEM, and the "
                f"password that it may have"
            ) from error
    return target


def check_signature(folder: Path, public_key: Path, signature: Path | None = None) -> None:
    """See that `signature` (by default the folder's own) is of all that is in `folder`, by the key's owner.

    Raises:
        BundleError: there is no signature.
        BundleIntegrityError: it is of other files, or by another key.
        InputError: model-signing is not installed, or the key cannot be used.
    """
    verifying = _library().verifying
    _require_file(public_key, "public key")
    signature = signature or folder / SIGNATURE_NAME
    if not signature.is_file():
        raise BundleError(
            f"bundle {folder} has no signature {signature}; sign it with 'python -m export sign'"
        )
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{public_key} checks no signature: {error}; expected an elliptic-curve public key in PEM"
        ) from error
    try:
        config.set_hashing_config(_hashing(folder, signature)).verify(folder, signature)
    except Exception as error:  # the library lets those of what it is made of through
        raise BundleIntegrityError(
            f"bundle {folder} is not what {public_key.name}'s owner signed in {signature.name}: "
            f"{str(error) or type(error).__name__}; do not use it"
        ) from error


def _hashing(folder: Path, *ignored: Path) -> hashing.Config:
    root = folder.absolute()
    paths = [path.absolute() for path in (*ignored, *(folder / name for name in _OF_THIS_MACHINE))]
    inside = [path for path in paths if path.is_relative_to(root)]
    config: hashing.Config = _library().hashing.Config().set_ignored_paths(paths=inside)
    return config.set_allow_symlinks(True)  # of a hub cache; contents count


def _require_file(path: Path, what: str) -> None:
    if not path.is_file():
        raise InputError(f"there is no {what} {path}; expected a PEM file")


def _library() -> Any:
    try:
        import model_signing
    except ImportError as error:
        raise InputError(f"signatures need model-signing ({error}); install the extra `sign`") from error
    return model_signing
