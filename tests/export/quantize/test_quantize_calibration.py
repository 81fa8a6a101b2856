"""Calibration files, and the prompts that calibration runs on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from export.errors import InputError
from export.progress import no_steps
from export.quantize.calibration import Calibration, load_calibration
from export.quantize.decision import QuantizationPlan, decide_formats
from export.quantize.trial import embed_prompts, read_prompts
from export.request.weights import Weights
from lightforcing_ref.config import PRESETS

CALIBRATION = Calibration(
    preset="tiny",
    weights={"checkpoint": "random:3"},
    prompts=2,
    chunks=3,
    steps=5,
    height=128,
    width=128,
    variant="short",
    modelopt="0.47.0",
    amax={"blocks.0.ffn.0": 4.5, "blocks.0.ffn.2": 2.25},
)

ERRORS = {"fp8": 0.03, "fp8_static": 0.03, "nvfp4": 0.13}


def test_file_survives_the_round_trip(tmp_path: Path) -> None:
    CALIBRATION.save(tmp_path / "ranges.json")
    assert load_calibration(tmp_path / "ranges.json") == CALIBRATION


def test_ranges_belong_to_one_model() -> None:
    path = Path("ranges.json")
    CALIBRATION.require("tiny", {"checkpoint": "random:3"}, path)
    with pytest.raises(InputError, match="made with checkpoint random:3, this build has random:4"):
        CALIBRATION.require("tiny", {"checkpoint": "random:4"}, path)
    with pytest.raises(InputError, match=r"ranges\.json was made with lora\.0 none, this build has abc"):
        CALIBRATION.require("tiny", {"checkpoint": "random:3", "lora.0": "abc"}, path)
    with pytest.raises(InputError, match=r"made with preset tiny, this build has wan-1.3b"):
        CALIBRATION.require("wan-1.3b", {"checkpoint": "random:3"}, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"amax": {"blocks.0.ffn.0": -1.0}}, r"amax.blocks.0.ffn.0: Input should be greater than 0"),
        ({"amax": {}}, "amax: Dictionary should have at least 1 item"),
        ({"extra": 1}, "extra: Extra inputs are not permitted"),
        ({"schema_version": 2}, "schema_version: Input should be 1"),
        (
            {"errors": {"blocks.0.ffn.0": ERRORS}},
            "errors has none of blocks.0.ffn.2 in fp8, fp8_static, nvfp4",
        ),
        (
            {"errors": {"blocks.0.ffn.0": ERRORS, "blocks.0.ffn.2": {"fp8": 0.03, "fp8_static": 0.03}}},
            "errors has none of blocks.0.ffn.2 in nvfp4",
        ),
    ],
)
def test_broken_files_are_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    path.write_text(json.dumps(CALIBRATION.model_dump() | change))
    with pytest.raises(InputError, match=message):
        load_calibration(path)
    path.write_text("not json")
    with pytest.raises(InputError, match=r"ranges.json is no calibration: the file: Invalid JSON"):
        load_calibration(path)
    with pytest.raises(InputError, match="cannot read the calibration"):
        load_calibration(tmp_path / "missing.json")


def test_what_is_left_out_automatically_is_known_with_its_error() -> None:
    names = ("blocks.0.ffn.0", "blocks.0.ffn.2")
    lossy = {"fp8": 0.03, "fp8_static": 0.5, "nvfp4": 0.6}
    calibration = CALIBRATION.model_copy(update={"errors": dict(zip(names, (ERRORS, lossy), strict=True))})
    plan = QuantizationPlan("nvfp4", names, None, calibration, "0" * 64, static=True, embedded=False)
    formats, errors = decide_formats(plan, (), no_steps)
    assert (formats, errors) == ({"blocks.0.ffn.0": "nvfp4"}, {"blocks.0.ffn.2": 0.5})
    formats, errors = decide_formats(replace(plan, static=False), (), no_steps)
    assert (formats, errors) == ({"blocks.0.ffn.0": "nvfp4", "blocks.0.ffn.2": "fp8"}, {})
    assert decide_formats(replace(plan, formats={}), (), no_steps) == (
        {},
        {},
    )  # left out by name, for no error


def test_prompts_come_from_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("# animals\na red fox\n\n  a heron takes off \n")
    assert read_prompts(path) == ["a red fox", "a heron takes off"]
    embeddings = embed_prompts(Weights(PRESETS["tiny"], seed=0), read_prompts(path))
    assert [tuple(embedding.shape) for embedding in embeddings] == [(64, 64)] * 2
    # One token per byte, and the end token.
    assert embeddings[0][10:].eq(0).all() and embeddings[0][:10].ne(0).any(1).all()
    path.write_text("# nothing\n")
    with pytest.raises(InputError, match="holds no prompt"):
        read_prompts(path)
    with pytest.raises(InputError, match="cannot read the prompts"):
        read_prompts(tmp_path / "missing.txt")
