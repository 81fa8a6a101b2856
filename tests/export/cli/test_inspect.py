"""What inspecting shows of real and device bundles, and that planned sizes are those of a real bundle."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest

from export.cli.main import main
from export.estimate.memory import plan_memory
from export.request.plan import PlanRequest
from export.request.targets import load_target, load_variant
from lightforcing_ref.config import preset
from runtime.bundle import (
    Calibration,
    Cost,
    Golden,
    Kernels,
    Library,
    Quantization,
    Target,
    file_entry,
    hash_file,
    load_bundle,
    write_manifest,
)
from runtime.bundle.images import Argument, Image, ImageSet
from runtime.program.buffers import plan_buffers
from runtime.verify import Verdict
from runtime.verify.verdict import ComponentVerdict, PlatformRecord
from tests.export.html_page import Page


def planned(variant: str) -> PlanRequest:
    tiny = preset("tiny")
    return PlanRequest(load_target("cpu"), load_variant(variant), tiny, tiny.height, tiny.width, "fp32")


@pytest.mark.parametrize("sessions", [1, 3])
@pytest.mark.parametrize(("bundle_name", "variant"), [("tiny_bundle", "short"), ("tiny_long_bundle", "long")])
def test_planned_buffers_are_those_of_the_runtime(request, bundle_name, variant, sessions):
    manifest = load_bundle(request.getfixturevalue(bundle_name), verify=False).manifest
    wanted = planned(variant)
    if "vae_encode_first" in manifest.components:
        wanted = replace(wanted, encoder=wanted.preset.vae)
    real, plan = plan_buffers(manifest, sessions), plan_memory(wanted, sessions)
    assert plan.group("cache") + plan.group("buffers") == real.total_bytes
    assert plan.per_session == real.session_bytes
    names = {item.name: item.bytes * sessions for item in plan.items if item.per_session}
    pool = names["keys and values of past frames"] + names["block means of the keys"]
    assert pool == sum(buffer.nbytes for buffer in real.pool)


def weight_bytes(path: Path) -> int:
    """Bytes of the model's own weights in a graph; `val_12` and the like are constants of the exporter."""
    graph = ir.load(path).graph
    return sum(
        value.const_value.nbytes
        for name, value in graph.initializers.items()
        if value.dtype == ir.DataType.FLOAT and not name.startswith(("val_", "scalar_"))
    )


def test_planned_weights_are_those_of_the_files(tiny_bundle):
    sizes = {item.name: item.bytes for item in plan_memory(planned("short")).items}
    step = sizes["transformer, block linears"] + sizes["transformer, everything else"]
    assert step == weight_bytes(tiny_bundle / "step.onnx")
    assert sizes["conditioner"] == weight_bytes(tiny_bundle / "conditioner.onnx")
    decoder = weight_bytes(tiny_bundle / "vae_first.onnx") + weight_bytes(tiny_bundle / "vae_next.onnx")
    assert sizes["video decoder, first and later frames"] == pytest.approx(decoder, rel=0.02)
    # Files: the same and a little padding.
    files = {entry.path: entry.bytes for entry in load_bundle(tiny_bundle, verify=False).manifest.files}
    assert step == pytest.approx(files["step.weights"], rel=0.05)
    text = plan_memory(planned("short")).host_bytes
    assert text == pytest.approx(files["text_encoder.safetensors"], rel=0.02)


# ---- inspect ----


def inspected(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["inspect", str(path)]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_a_cpu_bundle(tiny_bundle, capsys, monkeypatch):
    text = inspected(tiny_bundle, capsys, monkeypatch)
    for expected in (
        "onnxruntime in fp32",
        "random, seed 0",
        "the step as one graph",
        "past_k.0..5",
        "vae_next",
    ):
        assert expected in text
    for missing in ("Engines", "Kernels for", "Quantization", "this version and no other"):
        assert missing not in text


def test_the_json_has_what_the_tables_show(tiny_bundle, capsys):
    assert main(["inspect", str(tiny_bundle), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    real = plan_buffers(load_bundle(tiny_bundle).manifest, 1)
    memory = document["memory"]
    assert memory["peak"] == sum(memory["parts"].values())
    buffers = (
        "between engines",
        "buffers of a chunk",
        "keys and values of a session",
        "the rest of a session",
    )
    assert sum(memory["parts"][name] for name in buffers) == real.total_bytes
    assert document["sparsity_per_chunk"][6]["of"] == 42
    assert (document["launches_per_forward"], document["kernel_images"]) == (None, None)


def test_every_chunk_of_a_table_of_one_entry(tiny_bundle, tmp_path, capsys):
    """A bundle that keeps everything has one entry, and seven chunks in 21 planned frames."""
    copy = tmp_path / "dense"
    shutil.copytree(tiny_bundle, copy)
    manifest = load_bundle(copy).manifest
    dense = manifest.sparsity.model_copy(update={"target": 0.0, "values": (0.0,), "keep_q20": (1 << 20,)})
    write_manifest(copy, manifest.model_copy(update={"sparsity": dense}))
    assert main(["inspect", str(copy), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["sparsity_per_chunk"]
    assert [(row["chunk"], row["kept"], row["of"]) for row in rows] == [
        (chunk, 6 * (chunk + 1), 6 * (chunk + 1)) for chunk in range(7)
    ]


def image(folder: Path, name: str, kernel: str, *, spills: int = 0) -> Image:
    cubin = f"{name} compiled".encode()
    (folder / f"{name}.cubin").write_bytes(cubin)
    return Image(
        name=name,
        kernel=kernel,
        file=f"{name}.cubin",
        sha256=hashlib.sha256(cubin).hexdigest(),
        bytes=len(cubin),
        entry=kernel,
        threads=128,
        shared_memory=32768,
        grid=(1, 1, 1),
        arguments=(Argument(name="q", type="pointer", element="bfloat16", source="buffer"),),
        serves={},
        limits={},
        registers=193,
        stack=0,
        spill_stores=spills,
        spill_loads=0,
        source_sha256="0" * 64,
    )


@pytest.fixture(scope="module")
def device_bundle(tiny_bundle, tmp_path_factory) -> Path:
    """A copy of a CPU bundle whose manifest describes a quantized bundle for a GPU."""
    copy = tmp_path_factory.mktemp("device") / "bundle"
    shutil.copytree(tiny_bundle, copy)
    kernels = copy / "kernels" / "sm_120"
    kernels.mkdir(parents=True)
    images = (image(kernels, "attend-q64", "attend"), image(kernels, "select-b16", "select", spills=8))
    index = ImageSet(arch="sm_120", target="sm_120a", driver=570, compiler={"triton": "3.9.0"}, images=images)
    (kernels / "kernels.json").write_text(index.model_dump_json())
    (copy / "expected.safetensors").write_bytes(b"vectors")
    manifest = load_bundle(tiny_bundle, verify=False).manifest
    cost = Cost(
        launches=17,
        activation_bytes=142 << 20,
        gemms={"fp8": 6, "bf16": 1},
        seconds=0.7,
        peak_bytes=205 << 20,
    )
    beside = cost.model_copy(update={"activation_bytes": 423 << 20, "gemms": {}})
    components = dict(manifest.components)
    components["step"] = components["step"].model_copy(update={"cost": cost})
    components["vae_next"] = components["vae_next"].model_copy(update={"cost": beside})
    added = [f"kernels/sm_120/{file.name}" for file in sorted(kernels.iterdir())] + ["expected.safetensors"]
    formats = {f"blocks.{layer}.{kind}": "fp8" for layer in range(6) for kind in ("ffn.0", "self_attn.qkv")}
    write_manifest(
        copy,
        manifest.model_copy(
            update={
                "target": Target(name="rtx5090", compute_capability="12.0"),
                "backend": "tensorrt-rtx",
                "precision": "fp8",
                "status": "built, not executed",
                "library": Library(name="tensorrt-rtx", version="1.7.1.116"),
                "components": components,
                "kernels": Kernels(folder="kernels", arch="sm_120", driver=570),
                "quantization": Quantization(
                    activations="static",
                    calibration=Calibration(sha256="a" * 64, prompts=2, chunks=3),
                    formats=formats,
                    errors={name: 0.03 + 0.001 * index for index, name in enumerate(formats)},
                    skipped=("blocks.0.ffn.2",),
                ),
                "golden": Golden(file="expected.safetensors", tolerances={"layer": 0.02}),
                "files": (*manifest.files, *(file_entry(copy, name) for name in added)),
            }
        ),
    )
    return copy


def test_a_device_bundle(device_bundle, capsys, monkeypatch):
    text = inspected(device_bundle, capsys, monkeypatch)
    for expected in (
        "rtx5090 (12.0)",
        "tensorrt-rtx in fp8",
        "tensorrt-rtx 1.7.1.116, this version and no other",
        "built, not executed",
        "17 by engines and 0 by kernels",
        "6 fp8, 1 bf16",
        "Kernels for sm_120a",
        "attend-q64 attend 128 193 32.0 KiB none",
        "8 B",
        "ffn.0 fp8 6 0.030 - 0.040",
        "ffn.2 bf16, skipped 1 not measured",
        "activations static, calibrated on 2 prompts and 3 chunks (aaaaaaaaaaaa); left in bf16: blocks.0.ffn.2",
        "fits into the 32.00 GiB of rtx5090",
        "layer 0.02 -",
        "none recorded: run `python -m runtime verify`",
    ):
        assert expected in text


def test_a_device_bundle_as_json(device_bundle, capsys):
    assert main(["inspect", str(device_bundle), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["memory"]["parts"]["activations"] == (142 + 423) << 20
    assert document["memory"]["target"] == 32 << 30
    assert document["kernel_images"]["images"][1]["spill_stores"] == 8
    assert document["launches_per_forward"] == {"engines": 17, "kernels": 0}
    assert {row["kind"] for row in document["quantization_by_kind"]} == {"ffn.0", "self_attn.qkv", "ffn.2"}


def test_the_page_shows_what_the_terminal_does(device_bundle, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["inspect", str(device_bundle), "--html", str(tmp_path / "page.html")]) == 0
    page = Page(tmp_path / "page.html")
    shown = "".join(page.text.split())
    for word in capsys.readouterr().out.split():
        if not set(word) <= set("─━"):  # rules
            assert word in shown, word
    assert page.tags.count("table") == 9
    assert "Of the 32.00 GiB of rtx5090" in page.text


def test_the_page_of_a_hostile_name(tiny_bundle, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    manifest = load_bundle(copy).manifest
    name = "<script>alert(1)</script>[bold red]:fire:[/]"
    write_manifest(copy, manifest.model_copy(update={"name": name, "variant": name}))
    assert main(["inspect", str(copy), "--html", str(tmp_path / "page.html")]) == 0
    assert Page(tmp_path / "page.html").text.count(name) == 3  # title, heading, variant


def test_a_verdict_is_shown_while_it_belongs_to_the_manifest(device_bundle, tmp_path, capsys, monkeypatch):
    copy = tmp_path / "judged"
    shutil.copytree(device_bundle, copy)
    verdict = Verdict(
        created="2026-11-21T08:00:00+00:00",
        manifest=hash_file(copy / "manifest.json"),
        backend="tensorrt-rtx",
        platform=PlatformRecord(device="GeForce RTX 5090", driver="580.1", libraries={}),
        passed=False,
        components={
            "layer": ComponentVerdict(error=0.5, tolerance=0.02, passed=False, cases=1, worst="layer.0/x_out")
        },
    )
    (copy / "verdict.json").write_text(verdict.model_dump_json())
    text = inspected(copy, capsys, monkeypatch)
    assert "FAILED on GeForce RTX 5090, 2026-11-21T08:00:00+00:00: component 'layer': relative error" in text
    assert "layer 0.02 5.0e-01 FAIL" in text
    stale = verdict.model_copy(update={"manifest": "0" * 64})
    (copy / "verdict.json").write_text(stale.model_dump_json())
    assert "none recorded" in inspected(copy, capsys, monkeypatch)


@pytest.mark.parametrize(
    ("file", "message"),
    [("attend-q64.cubin", "SHA-256"), ("kernels.json", "SHA-256")],
)
def test_a_changed_kernel_is_refused(device_bundle, tmp_path, file, message, capsys):
    copy = tmp_path / "changed"
    shutil.copytree(device_bundle, copy)
    path = copy / "kernels" / "sm_120" / file
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert main(["inspect", str(copy)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
