"""Whose a bundle is: pins by the manifest's SHA-256, and signatures."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from export.cli.main import main as export
from runtime import Pipeline
from runtime.bundle import hash_file, load_bundle
from runtime.bundle.signature import SIGNATURE_NAME, check_signature, sign_bundle
from runtime.cli.main import main
from runtime.errors import BundleError, BundleIntegrityError, InputError
from tests.runtime.handmade import relist

pytest.importorskip("model_signing")
serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
ec = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ec")

OF_THIS_MACHINE = ("verdict.json", "hashes.record")


@pytest.fixture
def copy(golden_bundle: Path, tmp_path: Path) -> Path:
    return Path(
        shutil.copytree(golden_bundle, tmp_path / "copy", ignore=shutil.ignore_patterns(*OF_THIS_MACHINE))
    )


def key_pair(folder: Path, name: str, password: bytes | None = None) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    pem = serialization.Encoding.PEM
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, encryption))
    info = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(pem, info))
    return private, public


def test_a_pin_lets_one_bundle_through(copy: Path) -> None:
    digest = hash_file(copy / "manifest.json")
    assert load_bundle(copy, expected=digest).digest == digest
    with Pipeline.load(copy, expected=digest.upper(), warmup=False):
        pass
    (copy / "step.onnx").write_bytes((copy / "step.onnx").read_bytes() + b"\0")
    relist(copy, "step.onnx")
    load_bundle(copy)
    for load in (load_bundle, Pipeline.load):
        with pytest.raises(BundleIntegrityError, match=f"and {digest} is expected; this is another bundle"):
            load(copy, expected=digest)
    for wrong, verify in (("abc", True), ("", True), (digest, False)):
        with pytest.raises(InputError, match="64 hex digits"):
            Pipeline.load(copy, expected=wrong, verify=verify)


def test_verify_expects(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digest = hash_file(copy / "manifest.json")
    assert main(["verify", str(copy), "--expect", digest]) == 0
    assert digest in capsys.readouterr().err
    assert main(["verify", str(copy), "--expect", "0" * 64]) == 2
    assert "another bundle" in capsys.readouterr().err


def test_a_signature_is_of_all_files_and_of_one_key(copy: Path, tmp_path: Path) -> None:
    private, public = key_pair(tmp_path, "maker")
    assert sign_bundle(copy, private) == copy / SIGNATURE_NAME
    check_signature(copy, public)
    for name in OF_THIS_MACHINE:
        (copy / name).write_text("{}")  # as verification and loading leave them
    check_signature(copy, public)
    sign_bundle(copy, private)
    check_signature(copy, public)
    with pytest.raises(BundleIntegrityError, match=r"is not what other\.pub's owner signed"):
        check_signature(copy, key_pair(tmp_path, "other")[1])
    for name in sorted(
        path.name for path in copy.iterdir() if path.name not in (*OF_THIS_MACHINE, SIGNATURE_NAME)
    ):
        good = (copy / name).read_bytes()
        (copy / name).write_bytes(good + b"\0")
        with pytest.raises(BundleIntegrityError, match="is not what"):
            check_signature(copy, public)
        (copy / name).write_bytes(good)
    (copy / "added").touch()
    with pytest.raises(BundleIntegrityError, match="Extra files found"):
        check_signature(copy, public)
    (copy / "added").unlink()
    signature = tmp_path / "elsewhere.sig"
    (copy / SIGNATURE_NAME).rename(signature)
    check_signature(copy, public, signature)
    with pytest.raises(BundleError, match="has no signature"):
        check_signature(copy, public)
    for content in (b"", b"{}", signature.read_bytes()[:-20]):
        signature.write_bytes(content)
        with pytest.raises(BundleIntegrityError, match="is not what"):
            check_signature(copy, public, signature)


def test_a_signed_bundle_whose_hashes_were_redone_is_not_the_makers(copy: Path, tmp_path: Path) -> None:
    """What hashes alone do not find."""
    private, public = key_pair(tmp_path, "maker")
    sign_bundle(copy, private)
    (copy / "step.onnx").write_bytes((copy / "step.onnx").read_bytes() + b"\0")
    relist(copy, "step.onnx")
    load_bundle(copy)
    with pytest.raises(BundleIntegrityError, match="is not what"):
        check_signature(copy, public)


def test_keys_that_are_none_are_named(copy: Path, tmp_path: Path) -> None:
    private, public = key_pair(tmp_path, "maker", b"secret")
    assert sign_bundle(copy, private, "secret").is_file()
    check_signature(copy, public)
    before = (copy / SIGNATURE_NAME).read_bytes()
    (tmp_path / "none.pem").write_text("no key")
    for key, password in ((private, None), (private, "wrong"), (tmp_path / "none.pem", None), (public, None)):
        with pytest.raises(InputError, match="does not sign"):
            sign_bundle(copy, key, password)
    assert (copy / SIGNATURE_NAME).read_bytes() == before
    for key in (private, tmp_path / "none.pem"):
        with pytest.raises(InputError, match="checks no signature"):
            check_signature(copy, key)
    with pytest.raises(InputError, match="there is no public key"):
        check_signature(copy, tmp_path / "absent")


def test_signing_and_checking_by_command(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = key_pair(tmp_path, "maker", b"secret")
    assert export(["sign", str(copy), "--key", str(private)]) == 2
    monkeypatch.setenv("LIGHTFORCING_SIGNING_PASSWORD", "secret")
    assert export(["sign", str(copy), "--key", str(private)]) == 0
    assert hash_file(copy / "manifest.json") in capsys.readouterr().out
    assert main(["verify", str(copy), "--public-key", str(public)]) == 0
    assert "signed by the owner of" in capsys.readouterr().err
    assert main(["verify", str(copy), "--signature", str(copy / SIGNATURE_NAME)]) == 2
    assert "without --public-key" in capsys.readouterr().err
    # The format is the library's own: its command checks it.
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(copy), "--public_key", str(public)]
    result = subprocess.run(
        [*command, "--signature", str(copy / SIGNATURE_NAME)]
        + [part for name in OF_THIS_MACHINE for part in ("--ignore-paths", str(copy / name))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (copy / "step.onnx").write_bytes((copy / "step.onnx").read_bytes() + b"\0")
    relist(copy, "step.onnx")
    assert main(["verify", str(copy), "--public-key", str(public)]) == 2
    assert "is not what maker.pub's owner signed" in capsys.readouterr().err
