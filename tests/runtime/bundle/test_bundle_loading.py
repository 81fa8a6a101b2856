from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime import Pipeline
from runtime.bundle import Manifest, file_entry, hash_file, load_bundle, write_manifest
from runtime.errors import BundleError, BundleIntegrityError, BundleSchemaError
from tests.runtime.handmade import edit_manifest


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def test_loads_what_was_written(bundle: Path) -> None:
    loaded = load_bundle(bundle)
    assert loaded.manifest.model.chunk_tokens == 12
    assert loaded.manifest.window_frames == 8
    assert loaded.manifest.key_blocks == 1
    assert loaded.manifest.schedule.denoise_steps == 4
    assert loaded.path(loaded.component("step").file).is_file()


def test_writing_round_trips(bundle: Path, tmp_path: Path) -> None:
    manifest = load_bundle(bundle).manifest
    path = write_manifest(tmp_path, manifest)
    assert Manifest.model_validate_json(path.read_text()) == manifest
    assert [item.name for item in tmp_path.iterdir()] == ["manifest.json"]


def test_file_entry_is_the_hash_and_size(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000  # more than one piece
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.bin").write_bytes(data)
    entry = file_entry(tmp_path, "sub/a.bin")
    assert (entry.path, entry.bytes) == ("sub/a.bin", 1_280_000)
    assert entry.sha256 == hashlib.sha256(data).hexdigest() == hash_file(tmp_path / "sub" / "a.bin")


def test_errors_of_loading_are_part_of_the_api() -> None:
    import runtime

    assert runtime.BundleSchemaError is BundleSchemaError
    assert runtime.BundleIntegrityError is BundleIntegrityError


def test_no_bundle_there(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no bundle at .*python -m export build"):
        load_bundle(tmp_path / "nothing")
    with pytest.raises(BundleError, match=r"has no manifest\.json.*interrupted"):
        load_bundle(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"text"', "\xff"])
def test_manifest_that_is_not_an_object(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BundleSchemaError):
        load_bundle(copy)


def test_newer_schema_says_so_before_anything_else(copy: Path) -> None:
    (copy / "manifest.json").write_text(json.dumps({"schema_version": 2, "something": "new"}))
    with pytest.raises(BundleSchemaError, match=r"schema_version 2, this runtime reads up to 1; upgrade"):
        load_bundle(copy)


@pytest.mark.parametrize("version", [None, "1", 0, True, 1.5])
def test_unusable_schema_version(copy: Path, version: Any) -> None:
    edit_manifest(copy, lambda raw: raw.update(schema_version=version))
    with pytest.raises(BundleSchemaError, match="schema_version"):
        load_bundle(copy)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda raw: raw.update(extra=1), r"extra: Extra inputs"),
        (lambda raw: raw.pop("model"), r"model: Field required"),
        (lambda raw: raw["model"].update(heads="two"), r"model\.heads"),
        (lambda raw: raw["model"].update(frame_tokens=5), r"frame_tokens is 5, but latent and patch give 4"),
        (lambda raw: raw["model"].update(dim=9), r"dim is 9, but heads \* head_dim is 8"),
        (lambda raw: raw["model"].update(latent_height=3), r"does not divide by the patch"),
        (lambda raw: raw["model"].update(video_height=31), r"video is 31x32"),
        (lambda raw: raw["model"]["rope"].update(dims_thw=[4, 2, 4]), r"must add up to head_dim"),
        (lambda raw: raw["model"]["rope"].update(dims_thw=[5, 2, 1]), r"must be even"),
        (lambda raw: raw["schedule"].update(sigmas=[1, 0]), r"5 timesteps but 2 sigmas"),
        (lambda raw: raw["schedule"].update(sigmas=[1, 1, 1, 1, 1]), r"must be 0"),
        (lambda raw: raw["attention"].update(keep_frames=1), r"keep_frames \(1\) is below"),
        (lambda raw: raw["sparsity"].update(values=[0.0]), r"1 sparsity values but 7"),
        (lambda raw: raw["sparsity"].update(base=1.0), r"sparsity\.base"),
        (lambda raw: raw["cache"].update(max_past_frames=6), r"max_past_frames is 6, but a window of 8"),
        (lambda raw: raw["cache"].update(sink_frames=6), r"does not fit into max_past_frames"),
        (lambda raw: raw["cache"].update(sink_positions="raw"), r"sink_positions"),
        (lambda raw: raw["files"].append(raw["files"][0]), r"is listed twice"),
        (lambda raw: raw["files"][0].update(sha256="abc"), r"files\.0\.sha256"),
        (lambda raw: raw["provenance"].update(checkpoint={"seed": 1}), r"provenance\.checkpoint"),
    ],
)
def test_manifest_off_the_schema(copy: Path, edit: Callable[[dict[str, Any]], Any], message: str) -> None:
    edit_manifest(copy, edit)
    with pytest.raises(BundleSchemaError, match=message):
        load_bundle(copy)


def test_many_problems_are_summed_up(copy: Path) -> None:
    edit_manifest(copy, lambda raw: raw.update({f"extra{i}": i for i in range(8)}))
    with pytest.raises(BundleSchemaError, match="and 3 more"):
        load_bundle(copy)


def test_missing_component(copy: Path) -> None:
    edit_manifest(copy, lambda raw: raw["components"].pop("vae_next"))
    with pytest.raises(BundleError, match=r"lacks the component\(s\) vae_next"):
        load_bundle(copy)


def test_unknown_component_lists_the_known(bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"no component 'upscaler' .*clean, conditioner, step"):
        load_bundle(bundle).component("upscaler")


def test_missing_file(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(BundleIntegrityError, match=r"'tokenizer.json' is missing"):
        load_bundle(copy)


def test_truncated_file(copy: Path) -> None:
    data = (copy / "step.onnx").read_bytes()
    (copy / "step.onnx").write_bytes(data[:-1])
    with pytest.raises(
        BundleIntegrityError, match=f"has {len(data) - 1} bytes, the manifest says {len(data)}"
    ):
        load_bundle(copy, verify=False)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_is_found(copy: Path, data: st.DataObject) -> None:
    path = copy / data.draw(st.sampled_from(sorted(item.path for item in load_bundle(copy).manifest.files)))
    good = path.read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    flipped = good[at] ^ data.draw(st.integers(1, 255))
    path.write_bytes(good[:at] + bytes([flipped]) + good[at + 1 :])
    try:
        load_bundle(copy, verify=False)
        with pytest.raises(BundleIntegrityError, match=r"SHA-256 .* the file was changed"):
            load_bundle(copy)
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize(
    "path", ["../step.onnx", "/etc/hostname", "a/../../step.onnx", "..\\step.onnx", "C:step", "."]
)
def test_paths_stay_inside(copy: Path, path: str) -> None:
    (copy.parent / "step.onnx").write_bytes((copy / "step.onnx").read_bytes())
    edit_manifest(copy, lambda raw: raw["files"].append({"path": path, "sha256": "0" * 64, "bytes": 1}))
    with pytest.raises(BundleIntegrityError, match="leads out of the bundle"):
        load_bundle(copy)


def test_component_path_stays_inside(copy: Path) -> None:
    edit_manifest(copy, lambda raw: raw["components"]["step"].update(file="../step.onnx"))
    with pytest.raises(BundleIntegrityError, match="leads out of the bundle"):
        load_bundle(copy)


def test_a_bundle_in_a_hub_cache_loads(copy: Path) -> None:
    """Every file is a link to `../../blobs/HASH`, the manifest too; frames are the same."""
    with Pipeline.load(copy, threads=1) as pipe, pipe.session("a red", seed=7) as session:
        expected, frames = pipe.manifest, next(session.stream()).frames
    blobs, snapshot = copy.parent / "hub" / "blobs", copy.parent / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in list(copy.iterdir()):
        blob = path.rename(blobs / hash_file(path))
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    assert load_bundle(snapshot).manifest == expected
    with Pipeline.load(snapshot, threads=1) as linked, linked.session("a red", seed=7) as session:
        assert np.array_equal(next(session.stream()).frames, frames)
    blob = (snapshot / "step.onnx").resolve()
    blob.write_bytes(blob.read_bytes()[::-1])
    with pytest.raises(BundleIntegrityError, match="the file was changed"):
        load_bundle(snapshot)


def test_a_link_in_a_circle_or_to_no_file_is_named(copy: Path) -> None:
    for target in ("step.onnx", "nowhere", "/dev/zero", "."):
        (copy / "step.onnx").unlink()
        (copy / "step.onnx").symlink_to(target)
        with pytest.raises(BundleError, match=r"'step\.onnx' is missing|cannot read .*step\.onnx"):
            load_bundle(copy)


def test_unlisted_component_file_is_refused(copy: Path) -> None:
    edit_manifest(copy, lambda raw: raw["files"].pop(0))
    with pytest.raises(BundleIntegrityError, match=r"component 'step' uses 'step\.onnx', which is not among"):
        load_bundle(copy)


def test_failed_write_leaves_nothing(bundle: Path, tmp_path: Path) -> None:
    manifest = load_bundle(bundle).manifest
    (tmp_path / "manifest.json").mkdir()  # cannot be replaced by a file
    with pytest.raises(OSError):
        write_manifest(tmp_path, manifest)
    assert [item.name for item in tmp_path.iterdir()] == ["manifest.json"]
