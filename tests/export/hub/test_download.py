"""Files of a hub: what arrives, what is resumed, what is refused; against a server on the loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from export.errors import DownloadError
from export.hub.download import Hub
from export.hub.reference import HubReference
from tests.export.hub.server import LocalHub, etag

BIG = os.urandom(25_000_000)  # the library reads 10 MB at a time, and keeps whole pieces only
FILE = HubReference("org/repo", "checkpoints/big.pt")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/repo:file.pt", HubReference("org/repo", "file.pt")),
        ("org/re.po-1:a/b.pt@main", HubReference("org/re.po-1", "a/b.pt", "main")),
        ("org/repo:a/b.pt@refs/pr/1", HubReference("org/repo", "a/b.pt", "refs/pr/1")),
        ("org/repo:causal-forcing++/x.pt", HubReference("org/repo", "causal-forcing++/x.pt")),
        ("org/repo", None),
        ("repo:file.pt", None),
        ("a/b/c:file.pt", None),
        ("org/repo:../file.pt", None),
        ("org/repo:a//b.pt", None),
        ("org/repo:/etc/passwd", None),
        (r"C:\models\file.pt", None),
        ("org/repo:file.pt@", None),
        ("org/repo:file.pt:0.8", None),
        ("", None),
    ],
)
def test_references(text: str, expected: HubReference | None) -> None:
    found = HubReference.parse(text)
    assert found == expected
    if found is not None:
        assert HubReference.parse(str(found)) == found


def test_a_file_arrives_once(server: LocalHub, hub: Hub) -> None:
    server.files["org/repo", FILE.file] = BIG
    path = hub.fetch(FILE)
    assert path.read_bytes() == BIG
    assert path.name == "big.pt"
    assert path.parts[-3] == server.commit("org/repo")
    assert path.is_symlink()
    assert hub.fetch(FILE) == path
    assert server.gets() == [None]
    assert hub.cached(FILE) == path


def test_small_files_have_no_digest_and_arrive_too(server: LocalHub, hub: Hub) -> None:
    server.files["org/repo", "tokenizer.json"] = b"{}"
    assert hub.fetch(HubReference("org/repo", "tokenizer.json")).read_bytes() == b"{}"


def test_a_connection_that_breaks_is_resumed(server: LocalHub, hub: Hub) -> None:
    server.files["org/repo", FILE.file] = BIG
    server.cut_after = [12_000_000]
    assert hub.fetch(FILE).read_bytes() == BIG
    first, second = server.gets()
    assert first is None
    assert second == "bytes=10485760-"


def test_what_another_run_brought_is_resumed(server: LocalHub, hub: Hub) -> None:
    server.files["org/repo", FILE.file] = BIG
    blobs = hub.folder / "models--org--repo" / "blobs"
    blobs.mkdir(parents=True)
    partial = blobs / f"{etag(BIG)}.partial"
    partial.write_bytes(BIG[:7_000_001])
    assert hub.fetch(FILE).read_bytes() == BIG
    assert server.gets() == ["bytes=7000001-"]
    assert not partial.exists()


def test_a_process_that_is_killed_leaves_what_it_has(server: LocalHub, hub: Hub, tmp_path: Path) -> None:
    """The first answer stops in the middle for good: its process is ended, and another one goes on."""
    server.files["org/repo", FILE.file] = BIG
    server.stall_after = 21_000_000
    code = (
        "import sys; from pathlib import Path; from export.hub.download import Hub; "
        "from export.hub.reference import HubReference; "
        f"Hub({server.endpoint!r}, Path({str(hub.folder)!r})).fetch(HubReference('org/repo', {FILE.file!r}))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as process:
        assert server.stalled.wait(60)
        partial = hub.folder / "models--org--repo" / "blobs" / f"{etag(BIG)}.partial"
        until = time.monotonic() + 60
        while not (partial.exists() and partial.stat().st_size) and time.monotonic() < until:
            time.sleep(0.02)
        process.kill()
    kept = partial.stat().st_size
    assert 0 < kept < len(BIG)
    server.stall_after = None
    assert hub.fetch(FILE).read_bytes() == BIG
    assert server.gets()[-1] == f"bytes={kept}-"


def test_other_content_than_promised_is_refused_and_removed(server: LocalHub, hub: Hub) -> None:
    server.files["org/repo", FILE.file] = BIG
    server.served[FILE.file] = BIG[:-1] + bytes([BIG[-1] ^ 1])
    with pytest.raises(DownloadError, match="arrived with SHA-256"):
        hub.fetch(FILE)
    assert not list((hub.folder / "models--org--repo" / "blobs").glob("*.partial"))
    server.served.clear()
    assert hub.fetch(FILE).read_bytes() == BIG


def test_a_partial_file_of_something_else_does_no_harm(server: LocalHub, hub: Hub) -> None:
    server.files["org/repo", FILE.file] = BIG
    blobs = hub.folder / "models--org--repo" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{etag(BIG)}.partial").write_bytes(bytes(1_000_000))
    with pytest.raises(DownloadError, match="arrived with SHA-256"):
        hub.fetch(FILE)
    assert hub.fetch(FILE).read_bytes() == BIG


def test_a_published_hash_is_held_against_the_hub(server: LocalHub, hub: Hub) -> None:
    server.files["org/repo", FILE.file] = BIG
    with pytest.raises(DownloadError, match=f"expected {sha256(b'other')}"):
        hub.fetch(FILE, sha256=sha256(b"other"))
    assert hub.fetch(FILE, sha256=sha256(BIG)).read_bytes() == BIG


def test_a_cached_file_that_changed_is_found(server: LocalHub, hub: Hub) -> None:
    server.files["org/repo", FILE.file] = BIG
    path = hub.fetch(FILE)
    path.resolve().write_bytes(b"x" * len(BIG))
    with pytest.raises(DownloadError, match=r"has SHA-256 .* expected .* remove"):
        hub.fetch(FILE)


def test_a_commit_in_the_cache_needs_no_network(server: LocalHub, hub: Hub) -> None:
    server.files["org/repo", FILE.file] = BIG
    path = hub.fetch(FILE)
    pinned = HubReference("org/repo", FILE.file, server.commit("org/repo"))
    nowhere = Hub("http://127.0.0.1:9", hub.folder)
    assert nowhere.fetch(pinned) == path


def test_what_is_in_the_cache_is_taken_where_the_hub_cannot_be_reached(server: LocalHub, hub: Hub) -> None:
    server.files["org/repo", FILE.file] = BIG
    path = hub.fetch(FILE)
    assert Hub("http://127.0.0.1:9", hub.folder).fetch(FILE) == path


def test_errors_say_what_to_do(server: LocalHub, hub: Hub) -> None:
    server.files["org/repo", "here.pt"] = b"x"
    server.files["org/gated", "here.pt"] = b"x"
    server.gated.add("org/gated")
    cases = {
        HubReference("org/none", "here.pt"): "no repository org/none .* private; check its name",
        HubReference("org/repo", "gone.pt"): "org/repo has no file 'gone.pt' at main; see http://127",
        HubReference("org/repo", "here.pt", "v2"): "org/repo has no revision 'v2'; leave it out",
        HubReference("org/gated", "here.pt"): "asks for its terms to be accepted; accept them at http://127",
    }
    for reference, message in cases.items():
        with pytest.raises(DownloadError, match=message):
            hub.fetch(reference)
    with pytest.raises(DownloadError, match=r"cannot be reached .* check the network .* by its path"):
        Hub("http://127.0.0.1:9", hub.folder).fetch(HubReference("org/repo", "here.pt"))


def test_a_token_opens_private_repositories(server: LocalHub, hub: Hub) -> None:
    server.files["org/private", "here.pt"] = b"x"
    server.private.add("org/private")
    assert hub.fetch(HubReference("org/private", "here.pt")).read_bytes() == b"x"
    with pytest.raises(DownloadError, match="give a token"):
        Hub(server.endpoint, hub.folder / "other", "hf_wrong").fetch(HubReference("org/private", "here.pt"))


def test_no_room_is_said_before_anything_is_fetched(
    server: LocalHub, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["org/repo", FILE.file] = BIG
    usage = namedtuple("usage", "total used free")(1, 1, 1_000_000)
    monkeypatch.setattr("export.hub.download.shutil.disk_usage", lambda _: usage)
    with pytest.raises(DownloadError, match=r"has 23\.8 MiB, .* has 976\.6 KiB free; make room"):
        hub.fetch(FILE)
    assert server.gets() == []


def test_shards_come_with_their_index(server: LocalHub, hub: Hub) -> None:
    index = {
        "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}
    }
    server.files["org/repo", "m/model.safetensors.index.json"] = json.dumps(index).encode()
    server.files["org/repo", "m/model-1.safetensors"] = b"1" * 100
    server.files["org/repo", "m/model-2.safetensors"] = b"2" * 100
    path = hub.fetch(HubReference("org/repo", "m/model.safetensors.index.json"))
    assert (path.parent / "model-1.safetensors").read_bytes() == b"1" * 100
    assert (path.parent / "model-2.safetensors").read_bytes() == b"2" * 100
    index["weight_map"]["d"] = "../../../etc/passwd"
    server.files["org/repo", "m/model.safetensors.index.json"] = json.dumps(index).encode()
    with pytest.raises(DownloadError, match="shards in other folders"):
        hub.fetch(HubReference("org/repo", "m/model.safetensors.index.json"))


def test_settings_of_a_lora_come_along_where_there_are_any(server: LocalHub, hub: Hub) -> None:
    server.files["org/with", "l/lora.pt"] = b"x"
    server.files["org/with", "l/adapter_config.json"] = b"{}"
    server.files["org/without", "lora.pt"] = b"x"
    path = hub.fetch_lora(HubReference("org/with", "l/lora.pt"))
    assert (path.parent / "adapter_config.json").read_bytes() == b"{}"
    assert hub.fetch_lora(HubReference("org/without", "lora.pt")).exists()
