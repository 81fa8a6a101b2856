"""Files are hashed once: what is read again, what is not, and what a record is worth."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import runtime.bundle.load as loading
from runtime import Pipeline
from runtime.bundle import HASHES_NAME, OpenFile, hash_file, load_bundle
from runtime.cli.main import main
from runtime.errors import BundleIntegrityError

SETTLED = 2.0
"""Seconds for which a file is young, as the documentation says."""


@pytest.fixture(scope="module")
def settled(golden_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose files were written a while ago. Do not change its files."""
    folder = tmp_path_factory.mktemp("settled")
    ignored = shutil.ignore_patterns("verdict.json", HASHES_NAME)
    for number in range(20):  # a copy for each test: a link to a file would make it a young one
        shutil.copytree(golden_bundle, folder / f"{number}", ignore=ignored)
    time.sleep(SETTLED + 0.1)
    return folder


@pytest.fixture
def live(settled: Path) -> Path:
    """A bundle of the test's own, with files that have settled."""
    folder = sorted(settled.iterdir())[0]
    taken = settled.with_name(f"{settled.name}-taken")
    taken.mkdir(exist_ok=True)
    return folder.rename(taken / folder.name)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lightforcing" / "hashes"


@contextmanager
def read() -> Iterator[list[str]]:
    """The names of the files that are hashed in the block, in alphabetical order."""
    names: list[str] = []
    digest = OpenFile.digest

    def noted(file: OpenFile, stopped: threading.Event | None = None) -> str:
        names.append(file.path.name)
        return digest(file, stopped)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpenFile, "digest", noted)
        yield names
    names.sort()


def names_of(folder: Path) -> list[str]:
    return sorted(
        Path(entry["path"]).name for entry in json.loads((folder / "manifest.json").read_text())["files"]
    )


def test_a_file_is_read_once(live: Path) -> None:
    with read() as first:
        load_bundle(live)
    with read() as second, Pipeline.load(live, warmup=False) as pipe:
        pipe.embed("a red fox")
    assert first == names_of(live)
    assert second == []
    assert (live / HASHES_NAME).is_file()


def written_over(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(path.read_bytes())


def replaced(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)


def written_over_keeping_times(path: Path) -> None:
    times = path.stat()
    written_over(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("change", [Path.touch, written_over, replaced, written_over_keeping_times])
def test_a_file_that_was_touched_is_read_again(live: Path, change: Callable[[Path], None]) -> None:
    load_bundle(live)
    change(live / "step.onnx")
    with read() as names:
        load_bundle(live)
    assert names == ["step.onnx"]
    content = bytearray((live / "step.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    times = (live / "step.onnx").stat()
    (live / "step.onnx").write_bytes(content)
    os.utime(live / "step.onnx", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(BundleIntegrityError, match=r"'step\.onnx' has SHA-256"):
        load_bundle(live)


def test_a_young_file_is_not_recorded(live: Path) -> None:
    replaced(live / "step.onnx")
    load_bundle(live)
    with read() as names:
        load_bundle(live)
    assert names == ["step.onnx"], "it was written within two seconds of being hashed"
    time.sleep(SETTLED + 0.1)
    load_bundle(live)
    with read() as names:
        load_bundle(live)
    assert names == []


def test_where_the_bundle_cannot_be_written_the_cache_is(live: Path, cache: Path) -> None:
    (live / HASHES_NAME).mkdir()  # as good as a folder that cannot be written, for root too
    load_bundle(live)
    (record,) = cache.iterdir()
    assert record.name == f"{hashlib.sha256(os.fsencode(live)).hexdigest()}.record"
    with read() as names:
        load_bundle(live)
    assert names == []


def test_where_nothing_can_be_written_all_is_read(
    live: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (live / HASHES_NAME).mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        with read() as names:
            load_bundle(live)
        assert names == names_of(live)


def cut(record: Path) -> None:
    os.truncate(record, record.stat().st_size // 2)


def changed(record: Path) -> None:
    """A digit of a recorded hash, without the record's own digest."""
    content = bytearray(record.read_bytes())
    at = content.rindex(b'"sha256": "') + 11
    content[at] = ord("1") if content[at] != ord("1") else ord("2")
    record.write_bytes(content)


def emptied(record: Path) -> None:
    record.write_bytes(b"")


def sealed_nonsense(record: Path) -> None:
    content = b'{"schema_version": 1, "files": [{"device": "1"}]}'
    record.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def piped(record: Path) -> None:
    record.unlink()
    os.mkfifo(record)


def linked_to_a_device(record: Path) -> None:
    record.unlink()
    record.symlink_to("/dev/zero")


@pytest.mark.parametrize("damage", [cut, changed, emptied, sealed_nonsense, piped, linked_to_a_device])
def test_a_damaged_record_is_none(live: Path, damage: Callable[[Path], None]) -> None:
    if damage is piped and not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    load_bundle(live)
    damage(live / HASHES_NAME)
    with read() as names:
        load_bundle(live)
    assert names == names_of(live)
    with read() as names:
        load_bundle(live)
    assert names == [], "the record was made again"


def forge(folder: Path, name: str) -> None:
    """Change a file and have the record say that it is what it was: what someone who may write to both can do."""
    load_bundle(folder)
    record = folder / HASHES_NAME
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    before = (folder / name).stat()
    (folder / name).write_bytes(content)
    after = (folder / name).stat()
    text = record.read_bytes().partition(b"\n")[2].decode()
    for old, new in ((before.st_mtime_ns, after.st_mtime_ns), (before.st_ctime_ns, after.st_ctime_ns)):
        text = text.replace(str(old), str(new))
    record.write_bytes(hashlib.sha256(text.encode()).hexdigest().encode() + b"\n" + text.encode())


def test_pins_and_verification_go_by_no_record(live: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forge(live, "step.onnx")
    load_bundle(live)  # as SECURITY.md says
    for options in ({"expected": hash_file(live / "manifest.json")}, {"reread": True}):
        with pytest.raises(BundleIntegrityError, match=r"'step\.onnx' has SHA-256"):
            load_bundle(live, **options)
    assert main(["verify", str(live)]) == 2
    assert "'step.onnx' has SHA-256" in capsys.readouterr().err


def test_several_files_are_read_at_once(live: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = threading.Barrier(2, timeout=20)
    digest = OpenFile.digest

    def met(file: OpenFile, stopped: threading.Event | None = None) -> str:
        if file.path.name in ("step.onnx", "clean.onnx"):
            meeting.wait()  # breaks if the other does not come
        return digest(file, stopped)

    monkeypatch.setattr(loading, "processors", lambda: 2)
    monkeypatch.setattr(OpenFile, "digest", met)
    load_bundle(live)


def test_the_others_are_stopped_when_one_is_damaged(live: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = OpenFile.digest
    stops: list[bool] = []

    def slow(file: OpenFile, stopped: threading.Event | None = None) -> str:
        assert stopped is not None
        if file.path.name == "step.onnx":
            return "0" * 64
        stops.append(stopped.wait(20))
        return digest(file, stopped)

    monkeypatch.setattr(loading, "processors", lambda: 2)
    monkeypatch.setattr(OpenFile, "digest", slow)
    with pytest.raises(BundleIntegrityError, match=r"'step\.onnx' has SHA-256 0000"):
        load_bundle(live)
    assert stops and all(stops)


def test_commands_pin_and_leave_hashes_out(
    live: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate = ["generate", "--prompt", "a red fox", "--seconds", "0.5", "--out", str(tmp_path / "clip.mp4")]
    bench = ["bench", "--chunks", "1", "--warmup-chunks", "0", "--json", str(tmp_path / "bench.json")]
    for command in (generate, bench):
        arguments = [*command, str(live)]
        assert main([*arguments, "--expect", hash_file(live / "manifest.json")]) == 0
        assert main([*arguments, "--expect", "0" * 64]) == 2
        assert "this is another bundle than the one that was pinned" in capsys.readouterr().err
        with pytest.raises(SystemExit, match="2"):
            main([*arguments, "--expect", "0" * 64, "--no-verify"])
    capsys.readouterr()
    golden = live / json.loads((live / "manifest.json").read_text())["golden"]["file"]
    content = bytearray(golden.read_bytes())
    content[-1] ^= 1
    golden.write_bytes(content)
    for command in (generate, bench):
        assert main([*command, str(live)]) == 2
        assert "has SHA-256" in capsys.readouterr().err
        assert main([*command, str(live), "--no-verify"]) == 0
