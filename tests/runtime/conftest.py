from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runtime import handmade

MakeBundle = Callable[..., Path]


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> MakeBundle:
    """Builds a hand-made bundle, once per set of options. Do not change its files."""
    made: dict[tuple[tuple[str, Any], ...], Path] = {}

    def make(**options: Any) -> Path:
        key = tuple(sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("bundle") / "handmade"
            handmade.build_bundle(made[key], **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def bundle(make_bundle: MakeBundle) -> Path:
    """A window of 8 frames with one window-relative sink. Do not change its files."""
    return make_bundle()


@pytest.fixture(scope="session")
def golden_bundle(make_bundle: MakeBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hand-made bundle with golden vectors. Do not change its files."""
    folder = tmp_path_factory.mktemp("golden") / "handmade"
    shutil.copytree(make_bundle(), folder)
    return handmade.add_golden(folder)
