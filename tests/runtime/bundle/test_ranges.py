"""Every number of a manifest has a range and a type, and no file of a bundle can be made to be waited for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.bundle import load_bundle
from runtime.bundle.strict_json import parse_json
from runtime.errors import BundleError, BundleSchemaError
from tests.runtime import device_bundles

Keys = tuple[str | int, ...]

NEVER_WHOLE = (-(2**63), 2**63, 10**30, 1.5, 1e300, float("nan"), float("inf"), "1", True, None, [], {})
NEVER_REAL = (-1e300, 1e300, float("nan"), float("-inf"), "1.0", True, [], {})


def numbers(value: Any, at: Keys = ()) -> Iterator[tuple[Keys, int | float]]:
    """Every number in it, with the keys that lead there."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers(part, (*at, key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield at, value


def replaced(raw: Any, keys: Keys, value: object) -> str:
    changed = json.loads(json.dumps(raw))
    part = changed
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    return json.dumps(changed)


@pytest.fixture(params=["host", "device"])
def copy(request: pytest.FixtureRequest, bundle: Path, tmp_path: Path) -> Path:
    """One with a golden file, the other with segments, kernels and costs."""
    if request.param == "device":
        return device_bundles.build_device_bundle(tmp_path / "copy")
    return Path(shutil.copytree(request.getfixturevalue("golden_bundle"), tmp_path / "copy"))


def test_no_number_can_be_anything(copy: Path) -> None:
    raw = json.loads((copy / "manifest.json").read_text())
    tried = set()
    for keys, number in numbers(raw):
        kind = tuple("*" if isinstance(key, int) else key for key in keys[-3:])
        if kind in tried:  # sizes of tensors look all alike
            continue
        tried.add(kind)
        for value in NEVER_WHOLE if isinstance(number, int) else NEVER_REAL:
            if value is None and kind[-1] == "window_frames":  # stands for all
                continue
            (copy / "manifest.json").write_text(replaced(raw, keys, value))
            with pytest.raises(BundleError):
                load_bundle(copy, verify=False)
    assert len(tried) > 45


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("model", "fps"), 10**9, r"model\.fps: Input should be less than or equal to 1000"),
        (("text", "text_len"), 10**9, r"text\.text_len"),
        (("model", "layers"), 2**63, r"model\.layers"),
        (("model", "layers"), 10**5, r"model\.layers"),
        (("schedule", "timesteps"), [1000.0] * 10**5 + [0.0], r"schedule\.timesteps: Tuple should have at most"),
        (("schedule", "sigmas", 1), float("nan"), "holds NaN, which is no number"),
        (("schedule", "sigmas", 1), float("inf"), "holds Infinity, which is no number"),
        (("schedule", "sigmas", 1), 1e999, "holds Infinity"),
        (("text", "pad_id"), 10**6, r"pad_id 1000000 and eos_id 1 must be below vocab 11"),
        (("components", "step", "inputs", 0, "shape"), [2**31] * 2, "more than 1,099,511,627,776 elements"),
        (("components", "step", "inputs", 0, "shape"), [1] * 9, "at most 8 items"),
        (("name",), "x" * 70_000, "at most 65536 characters"),
    ],
)  # fmt: skip
def test_what_no_model_has_is_refused_by_name(
    bundle: Path, tmp_path: Path, where: Keys, value: object, message: str
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    raw = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(replaced(raw, where, value))
    with pytest.raises(BundleSchemaError, match=message):
        load_bundle(copy)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"name": 1, "name": 2}', "the key 'name' twice"),
        (b'{"schema_version": 1e999}', "schema_version inf|Infinity"),
        (b'{"schema_version": ' + b"9" * 10_000 + b"}", "not readable JSON"),
        (b"\xff\xfe{}", "not readable JSON"),
        (b" " * ((16 << 20) + 1), "no manifest has more than"),
    ],
    ids=["brackets", "braces", "twice", "infinite", "digits", "encoding", "size"],
)
def test_json_that_is_none_or_too_much(bundle: Path, tmp_path: Path, content: bytes, message: str) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(BundleSchemaError, match=message):
        load_bundle(copy)


def test_json_that_is_all_right() -> None:
    value = {"a": [1, -2.5e3, "\u00e9\n", None, True, {}], "b": {"a": []}}
    assert parse_json(json.dumps(value).encode()) == value
