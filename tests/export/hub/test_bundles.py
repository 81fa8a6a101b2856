"""Bundles that travel to a hub or a folder and back."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from export.errors import DownloadError, InputError
from export.hub.bundles import BundleReference, pull_bundle, push_bundle
from export.hub.download import Hub
from runtime import Pipeline
from runtime.bundle import load_bundle
from runtime.errors import BundleIntegrityError
from tests.export.hub.server import LocalHub
from tests.runtime import handmade

TO = BundleReference("org/bundles", "demo")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "bundle"
    handmade.build_bundle(folder)
    return folder


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uploads in the way that the server of the tests speaks."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


def first_frames(folder: Path) -> str:
    with Pipeline.load(folder) as pipe, pipe.session(prompt="a red fox", seed=3) as session:
        return hashlib.sha256(next(iter(session.stream(chunks=1))).frames.tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/repo", BundleReference("org/repo")),
        ("org/repo:a/b@v1", BundleReference("org/repo", "a/b", "v1")),
        ("org/repo@main", BundleReference("org/repo")),
        ("repo", None),
        ("a/b/c", None),
        ("org/repo:../x", None),
        ("./folder", None),
    ],
)
def test_references(text: str, expected: BundleReference | None) -> None:
    assert BundleReference.parse(text) == expected


def test_a_bundle_goes_to_a_hub_and_runs_from_its_cache(
    server: LocalHub, hub: Hub, bundle: Path, plain: None
) -> None:
    where = push_bundle(bundle, TO, hub)
    assert where == f"org/bundles:demo@{server.commit('org/bundles')}"
    assert {path for _, path in server.files} == {
        f"demo/{path.relative_to(bundle).as_posix()}" for path in bundle.rglob("*") if path.is_file()
    }
    found = pull_bundle(TO, hub)
    assert found.root.is_relative_to(hub.folder)
    assert all((found.root / entry.path).is_symlink() for entry in found.manifest.files)
    assert first_frames(found.root) == first_frames(bundle)
    pinned = BundleReference.parse(where)
    assert pinned is not None
    before = len(server.requests)
    assert pull_bundle(pinned, Hub("http://127.0.0.1:9", hub.folder)).root == found.root
    assert len(server.requests) == before


def test_what_arrived_otherwise_is_found(server: LocalHub, hub: Hub, bundle: Path, plain: None) -> None:
    server.served["upload"] = b"x" * 100
    with pytest.raises(DownloadError, match="did not arrive as it is here"):
        push_bundle(bundle, TO, hub)
    server.served.clear()
    push_bundle(bundle, TO, hub)
    name = load_bundle(bundle).manifest.files[0].path
    content = server.files["org/bundles", f"demo/{name}"]
    server.files["org/bundles", f"demo/{name}"] = content[:-1] + bytes([content[-1] ^ 1])
    with pytest.raises(DownloadError, match=f"demo/{name}.* expected"):
        pull_bundle(TO, Hub(server.endpoint, hub.folder / "other", hub.token))


def test_writing_needs_a_token(server: LocalHub, hub: Hub, bundle: Path, plain: None) -> None:
    with pytest.raises(DownloadError, match=r"needs a token that may write \('hf auth login', HF_TOKEN\)"):
        push_bundle(bundle, TO, Hub(server.endpoint, hub.folder, "hf_wrong"))


def test_a_repository_without_a_bundle(server: LocalHub, hub: Hub) -> None:
    server.files["org/bundles", "README.md"] = b"nothing"
    with pytest.raises(DownloadError, match=r"has no file 'demo/manifest\.json'"):
        pull_bundle(TO, hub)
    server.files["org/bundles", "demo/manifest.json"] = json.dumps({"schema_version": 1}).encode()
    with pytest.raises(DownloadError, match=r"its manifest\.json is none that this release reads"):
        pull_bundle(TO, hub)


def test_folders_work_as_hubs_do(hub: Hub, bundle: Path, tmp_path: Path) -> None:
    name = load_bundle(bundle).manifest.name
    where = push_bundle(bundle, tmp_path / "share", hub)
    assert where == str(tmp_path / "share" / name)
    found = pull_bundle(Path(where), hub, out=tmp_path / "here")
    assert found.root == tmp_path / "here" / name
    assert first_frames(found.root) == first_frames(bundle)
    with pytest.raises(InputError, match="exists; remove it, or choose another folder"):
        pull_bundle(Path(where), hub, out=tmp_path / "here")


def test_a_damaged_bundle_goes_nowhere(hub: Hub, bundle: Path, tmp_path: Path) -> None:
    import shutil

    damaged = tmp_path / "damaged"
    shutil.copytree(bundle, damaged)
    name = load_bundle(bundle).manifest.files[0].path
    content = (damaged / name).read_bytes()
    (damaged / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleIntegrityError):
        push_bundle(damaged, tmp_path / "share", hub)
    assert not (tmp_path / "share").exists()
