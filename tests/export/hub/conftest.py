"""A hub on the loopback, and caches of its files that belong to one test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from export.hub.download import Hub
from tests.export.hub.server import LocalHub, local_hub


@pytest.fixture
def server() -> Iterator[LocalHub]:
    with local_hub() as running:
        yield running


@pytest.fixture
def hub(server: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return Hub(server.endpoint, tmp_path / "cache", server.token)
