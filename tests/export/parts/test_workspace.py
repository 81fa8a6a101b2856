"""Publishing a build: what is whole stays so whatever happens, and nothing is written through links."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from export.errors import BuildError
from export.parts import workspace as workspace_module
from export.parts.workspace import open_workspace
from runtime.files import exchange, write_file


def touch(*names: str, mode: int = 0o644) -> Callable[[Path], list[str]]:
    """Makes a component of small files, as a writer that leaves them with `mode`."""

    def write(folder: Path) -> list[str]:
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(name)
            (folder / name).chmod(mode)
        return list(names)

    return write


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at_once", [True, False])
def test_a_kill_at_any_step_of_publishing_loses_no_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    """Where two names can be exchanged, there is a whole bundle under the name at every moment."""
    real: dict[str, Callable[..., Any]] = {
        "replace": os.replace,
        "exchange": exchange,
        "rmtree": shutil.rmtree,
    }
    destination = tmp_path / "b"

    def publish(content: str) -> None:
        with open_workspace(tmp_path, "b", content, marker="m.txt") as workspace:
            files, _ = workspace.component("m", touch("m.txt"))
            (workspace.folder / "m.txt").write_text(content)
            steps.clear()
            workspace.publish(files)

    def step(name: str, *arguments: Any, **options: Any) -> Any:
        steps.append(name)
        if len(steps) == kill:
            raise Killed
        if name == "exchange" and not at_once:
            return False
        return real[name](*arguments, **options)

    steps: list[str] = []
    kill = 0
    monkeypatch.setattr(os, "replace", partial(step, "replace"))
    monkeypatch.setattr(workspace_module, "exchange", partial(step, "exchange"))
    monkeypatch.setattr(shutil, "rmtree", partial(step, "rmtree"))
    publish("old 0")
    publish("old")
    count = len(steps)
    assert count == (4 if at_once else 7)
    for killed_at in range(1, count + 1):
        kill = 0
        publish("old")
        kill = killed_at
        with pytest.raises(Killed):
            publish("new")
        kill = 0
        if at_once:
            assert (destination / "m.txt").read_text() in ("old", "new"), killed_at
        with open_workspace(tmp_path, "b", "next", marker="m.txt"):
            assert (destination / "m.txt").read_text() in ("old", "new"), killed_at
    publish("last")
    assert {path.name for path in tmp_path.iterdir()} == {"b", ".b.lock"}


def test_what_is_new_is_on_the_disk_before_the_old_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(workspace_module, "exchange", lambda *_: events.append("exchange") or True)
    for _ in range(2):
        events.clear()
        with open_workspace(tmp_path, "b", "key", marker="m.txt") as workspace:
            workspace.publish(workspace.component("m", touch("m.txt", "sub/n.txt"))[0])
    before = events[: events.index("exchange")]
    assert {"m.txt", "n.txt", "sub", ".b.partial"} <= set(before)
    assert before.index("n.txt") < before.index("sub") < len(before)
    assert events[-1] == tmp_path.name


@pytest.mark.parametrize("name", ["b", ".b.partial", ".b.lock", ".b.replaced"])
def test_links_are_not_written_through(tmp_path: Path, name: str) -> None:
    target = tmp_path / "elsewhere"
    target.mkdir()
    (target / "kept").write_text("kept")
    link = tmp_path / "out" / name
    link.parent.mkdir()
    link.symlink_to(target / "kept" if name == ".b.lock" else target)
    with pytest.raises(BuildError, match="is a link"), open_workspace(tmp_path / "out", "b", "key"):
        pass
    assert [path.name for path in target.iterdir()] == ["kept"]
    assert (target / "kept").read_text() == "kept"


def test_a_link_among_what_a_killed_build_left_is_not_written_through(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("kept")
    (tmp_path / ".b.partial").mkdir()
    (tmp_path / ".b.partial" / "m.txt").symlink_to(kept)
    with open_workspace(tmp_path, "b", "key") as workspace:
        workspace.component("m", touch("m.txt"))
    assert kept.read_text() == "kept"


def test_files_have_the_permissions_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with open_workspace(tmp_path, "b", "key", marker="m.txt") as workspace:
            files, _ = workspace.component("m", touch("m.txt", mode=0o600))
            workspace.publish(files)
    finally:
        os.umask(before)
    assert (tmp_path / "b" / "m.txt").stat().st_mode & 0o777 == 0o640


def test_two_names_are_exchanged_at_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").touch()
    (tmp_path / "b").write_text("b")
    assert exchange(tmp_path / "a", tmp_path / "b"), "the file system of the tests can"
    assert (tmp_path / "a").read_text() == "b"
    assert (tmp_path / "b" / "x").exists()
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "none")


def test_a_file_that_says_that_others_are_complete_is_on_the_disk_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    )
    write_file(tmp_path / "state", "x", sync=True)
    assert len(synced) == 2
    assert synced[0].startswith(f"{tmp_path}/.partial-")
    assert synced[1] == str(tmp_path)
