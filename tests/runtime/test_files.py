"""Where files are kept between runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from runtime.files import cache_folder, state_folder
from serving.settings import default_videos_folder


@pytest.mark.quick
@pytest.mark.skipif(sys.platform == "win32", reason="its folders are not named by these variables")
def test_folders_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert cache_folder("kernels", "a") == tmp_path / "cache/lightforcing/kernels/a"
    assert state_folder() == tmp_path / "state/lightforcing"
    assert default_videos_folder() == tmp_path / "state/lightforcing/videos"
    assert not any(tmp_path.iterdir())


@pytest.mark.quick
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system knows a user's home")
def test_a_user_without_a_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    def no_entry(_: int) -> None:
        raise KeyError  # as in a container that runs as a number of its own

    for name in ("HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    for folder in (cache_folder, state_folder):
        with pytest.raises(RuntimeError, match="home"):
            folder()
