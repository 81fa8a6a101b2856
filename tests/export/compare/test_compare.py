"""Bundles against the reference: agreement of good ones, and that a bad one is found out."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys

import numpy as np
import onnx_ir as ir
import pytest
import torch

from export.cli.main import main
from export.compare.against_reference import _component_rows, against_reference
from export.compare.reference import Reference
from export.errors import ComparisonError
from export.request.weights import Weights
from lightforcing_ref.checkpoint.lora import MergedLoRA
from lightforcing_ref.config import PRESETS
from lightforcing_ref.decoders.vae import to_uint8
from lightforcing_ref.shipped import shipped
from runtime.bundle import Bundle, Checkpoint, MergedLora, file_entry, load_bundle, write_manifest
from runtime.pipeline import Pipeline


def compare(bundle, tmp_path, **settings) -> tuple[bool, dict[tuple[str, str], dict]]:
    report = tmp_path / "report.json"
    comparison = against_reference(bundle, **settings)
    comparison.write_json(report)
    document = json.loads(report.read_text())
    assert document["passed"] is comparison.passed
    return comparison.passed, {(row["scope"], row["name"]): row for row in document["rows"]}


def test_every_graph_of_a_short_bundle_agrees(tiny_bundle, tmp_path):
    passed, rows = compare(tiny_bundle, tmp_path, chunks=5, tolerance=1e-5)
    assert passed, rows
    assert rows["step", "step"]["runs"] == 20
    assert {("step", f"step_chunk{chunk}") for chunk in range(5)} <= set(rows)
    assert (
        rows["rollout", "5 chunks"]["largest"] <= 2
    )  # pixel levels, after 20 forwards on one another's results


def test_a_text_encoder_may_lie_in_half_precision(tiny_bundle, monkeypatch):
    """As the shipped model's does: its graph takes what the file holds in float32."""
    bundle, whole = load_bundle(tiny_bundle), Weights.text_weights
    monkeypatch.setattr(Weights, "text_weights", lambda self: {n: t.half() for n, t in whole(self).items()})
    row = next(_component_rows(bundle, Reference.of(bundle.manifest), 1e-4))
    assert (row.name, row.passed) == ("text_encoder", True)


def test_a_long_bundle_agrees_while_its_window_slides(tiny_long_bundle, tmp_path):
    passed, rows = compare(tiny_long_bundle, tmp_path, chunks=6, tolerance=1e-5)
    assert passed, rows


def tampered(bundle, tmp_path, name: str) -> Bundle:
    """A copy whose weight `name` is scaled, with a manifest that vouches for it."""
    copy = tmp_path / "tampered"
    shutil.copytree(bundle, copy)
    graph = ir.load(copy / "step.onnx").graph
    tensor = graph.initializers[name].const_value
    with (copy / "step.weights").open("r+b") as stream:
        stream.seek(tensor.offset)
        stream.write((tensor.numpy() * 1.01).astype(np.float32).tobytes())
    manifest = load_bundle(bundle).manifest
    files = tuple(file_entry(copy, entry.path) for entry in manifest.files)
    write_manifest(copy, manifest.model_copy(update={"files": files}))
    return copy


def test_a_wrong_weight_is_found_and_located(tiny_bundle, tmp_path):
    bundle = tampered(tiny_bundle, tmp_path, "model.blocks.3.ffn.0.weight")
    command = [sys.executable, "-m", "export", "compare", str(bundle), "--chunks", "1", "--json"]
    command += [str(tmp_path / "r.json"), "--report", str(tmp_path / "r.html")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stderr
    assert "FAIL" in result.stdout
    rows = {row["name"]: row for row in json.loads((tmp_path / "r.json").read_text())["rows"]}
    assert not rows["step"]["passed"]
    assert rows["step"]["relative"] > 1e-4
    others = ("text_encoder", "conditioner", "vae_first", "vae_next", "vae_encode_first", "vae_encode_next")
    assert all(rows[name]["passed"] for name in others)
    page = (tmp_path / "r.html").read_text()
    assert "past their tolerance" in page
    assert page.count("<img ") == 3 * 4  # both rollouts and their difference


def test_a_bundle_from_a_checkpoint_needs_the_checkpoint(tiny_bundle):
    manifest = load_bundle(tiny_bundle).manifest
    origin = Checkpoint(source="short_video_gen.pt", sha256="0" * 64)
    provenance = manifest.provenance.model_copy(update={"checkpoint": origin})
    with pytest.raises(ComparisonError, match=r"come from short_video_gen\.pt .* pass the files"):
        Reference.of(manifest.model_copy(update={"provenance": provenance}))


@pytest.mark.parametrize("dense", [True, False])
def test_weights_that_come_with_the_package_are_found(tiny_bundle, dense):
    """Dense variants have weights of their own."""
    files = shipped("tiny")
    transformer = files.dense_transformer if dense else files.transformer
    digest = hashlib.sha256(transformer.read_bytes()).hexdigest()
    manifest = load_bundle(tiny_bundle).manifest

    def built_from(source: str, digest: str):
        provenance = manifest.provenance.model_copy(
            update={"checkpoint": Checkpoint(source=source, sha256=digest)}
        )
        sparsity = manifest.sparsity.model_copy(update={"target": 0.0 if dense else 0.88})
        return manifest.model_copy(update={"provenance": provenance, "sparsity": sparsity})

    assert Reference.of(built_from("shipped:tiny", digest)).weights.checkpoint == transformer
    with pytest.raises(ComparisonError, match="another release"):
        Reference.of(built_from("shipped:tiny", "b" * 64))
    with pytest.raises(ComparisonError, match="pass the files"):
        Reference.of(built_from("other.pt", digest))


def test_another_checkpoint_is_no_reference(tiny_bundle, capsys):
    files = shipped("tiny")
    flags = {
        "--checkpoint": files.transformer,
        "--vae": files.vae,
        "--text-encoder": files.text_encoder,
        "--tokenizer": files.tokenizer,
    }
    command = ["compare", str(tiny_bundle), *(str(word) for flag in flags.items() for word in flag)]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "short has random weights (seed 0), not those of" in error and error.count("\n") == 1

    manifest = load_bundle(tiny_bundle).manifest
    weights = Weights(PRESETS["tiny"], checkpoint=files.transformer)

    def built_from(digest: str):
        origin = Checkpoint(source="mine.pt", sha256=digest)
        provenance = manifest.provenance.model_copy(update={"checkpoint": origin})
        return manifest.model_copy(update={"provenance": provenance})

    digest = hashlib.sha256(files.transformer.read_bytes()).hexdigest()
    assert Reference.from_files(built_from(digest), weights).weights is weights
    with pytest.raises(
        ComparisonError, match=r"built from mine\.pt \(SHA-256 0{12}\.\.\.\), and .* another file"
    ):
        Reference.from_files(built_from("0" * 64), weights)


def test_the_lora_of_the_bundle_belongs_to_its_reference(tiny_bundle, tmp_path):
    files = shipped("tiny")
    digest = hashlib.sha256(files.transformer.read_bytes()).hexdigest()
    lora = tmp_path / "lora.safetensors"
    lora.write_bytes(b"merged into it")
    manifest = load_bundle(tiny_bundle).manifest

    def reference(built_with, given):
        merged = None
        if built_with is not None:
            merged = MergedLora(source=lora.name, sha256=hashlib.sha256(built_with).hexdigest(), strength=0.5)
        origin = Checkpoint(source="mine.pt", sha256=digest, lora=merged)
        provenance = manifest.provenance.model_copy(update={"checkpoint": origin})
        weights = Weights(PRESETS["tiny"], checkpoint=files.transformer, loras=given)
        return Reference.from_files(manifest.model_copy(update={"provenance": provenance}), weights)

    one, whole = (MergedLoRA(lora, 0.5),), (MergedLoRA(lora),)
    assert reference(b"merged into it", one).weights.loras == one
    assert reference(None, ()).weights.loras == ()
    for built_with, given in (
        (b"merged into it", ()),
        (b"merged into it", whole),
        (b"merged into it", one + one),
        (b"another", one),
        (None, one),
    ):
        with pytest.raises(ComparisonError, match=r"built from mine\.pt .* give --lora the same files"):
            reference(built_with, given)


@pytest.mark.parametrize("recache", ["window", "all", "none"])
@pytest.mark.parametrize("bundle_name", ["tiny_bundle", "tiny_long_bundle"])
def test_prompt_switches_agree_with_the_reference(request, bundle_name, recache):
    """Two prompts, five chunks, the switch after the third: in the long bundle the window slides by then."""
    path = request.getfixturevalue(bundle_name)
    manifest = load_bundle(path).manifest
    rng = np.random.default_rng(1)
    first, second = rng.standard_normal((2, manifest.text.text_len, manifest.text.dim), dtype=np.float32)
    with Pipeline.load(path, warmup=False) as pipeline, pipeline.session(embedding=first, seed=11) as session:
        assert session.set_prompt(embedding=second, recache=recache, at=4) == 4
        frames = np.concatenate([chunk.frames for chunk in session.stream(chunks=6)])
    reference = Reference.of(manifest)
    rollout = reference.rollout(manifest, torch.from_numpy(first), 11)
    latents = list(rollout.stream(4))
    assert rollout.set_prompt(torch.from_numpy(second), recache) == 4
    latents += rollout.stream(2)
    with torch.no_grad():
        video = to_uint8(reference.decoder.decode(torch.cat(latents, dim=1).transpose(0, 1))).numpy()
    assert np.abs(frames.astype(int) - video.astype(int)).max() <= 2


def test_the_switch_matters(tiny_bundle):
    """The comparison above would also pass if prompts did nothing."""
    manifest = load_bundle(tiny_bundle).manifest
    first, second = np.random.default_rng(1).standard_normal((2, 64, manifest.text.dim), dtype=np.float32)
    videos = []
    with Pipeline.load(tiny_bundle, warmup=False) as pipeline:
        for recache in ("window", "none", None):
            with pipeline.session(embedding=first, seed=11) as session:
                if recache:
                    session.set_prompt(embedding=second, recache=recache, at=1)
                videos.append([chunk.frames for chunk in session.stream(chunks=2)])
    switched, kept, plain = videos
    assert np.array_equal(switched[0], plain[0])
    assert not np.array_equal(switched[1], plain[1])
    assert not np.array_equal(switched[1], kept[1])
