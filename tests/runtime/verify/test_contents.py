"""The manifest against what the files hold: at load, and as far as a dry run can open them."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from runtime import Pipeline
from runtime.bundle import ELEMENT_TYPES, load_bundle
from runtime.bundle.weights_file import WeightsFile
from runtime.errors import BundleError
from runtime.verify.dry_run import DryRunError, dry_run
from tests.runtime import device_bundles
from tests.runtime.handmade import edit_manifest, relist

Raw = dict[str, Any]


@pytest.fixture
def copy(golden_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(golden_bundle, tmp_path / "copy"))


@pytest.fixture
def device(tmp_path: Path) -> Path:
    return device_bundles.build_device_bundle(tmp_path / "device")


def rewritten(folder: Path, name: str, change: Callable[[Raw], object], **options: Any) -> None:
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, **options)
    relist(folder, name)


def half(tensors: Raw, *names: str) -> None:
    tensors.update({name: tensors[name].astype(np.float16) for name in names or tuple(tensors)})


def more_channels(raw: Raw) -> None:
    raw["model"]["latent_channels"] = 3


def more_channels_everywhere(raw: Raw) -> None:
    """In the manifest alone nothing disagrees then; the graphs do."""
    more_channels(raw)
    for part in raw["components"].values():
        for spec in (*part["inputs"], *part["outputs"]):
            if spec["name"] in ("latent", "noise", "next_latent", "x0"):
                spec["shape"][0] = 3


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (more_channels, r"input 'latent': it is \[2, 3, 4, 4\], and the model makes it \[3, 3, 4, 4\]"),
        (more_channels_everywhere, r"tensor\(float\) \[3, 3, 4, 4\] in the manifest, tensor\(float\) \[2, 3, 4, 4\]"),
        (lambda raw: raw["text"].update(layers=1), r"'layers\.1\.fc1': an encoder of 1 layers has no such tensor"),
        (lambda raw: raw["text"].update(layers=3), r"'layers\.2\.norm1': it is missing"),
        (lambda raw: raw["text"].update(vocab=12), r"'token_embedding': it is \[11, 8\], expected \[12, 8\]"),
        (lambda raw: raw["text"].update(text_len=7), r"'cross_k\.0': it is .* and the model makes it \[7, 1, 8\]"),
        (lambda raw: raw["components"]["text_encoder"]["inputs"][2].update(shape=[4]), r"'layers\.0\.norm1': it is"),
        (lambda raw: raw["components"]["step"]["inputs"][-1].update(shape=[]), r"'step', input .*: it is \[\]"),
        (lambda raw: raw["components"]["vae_next"]["outputs"].pop(), r"component 'vae_next', output .*: it is missing"),
    ],
)  # fmt: skip
def test_a_manifest_that_is_not_of_its_files_does_not_load(
    copy: Path, edit: Callable[[Raw], object], message: str
) -> None:
    edit_manifest(copy, edit)
    with pytest.raises(BundleError, match=message):
        Pipeline.load(copy)
    if edit is not more_channels_everywhere:
        with pytest.raises(BundleError, match=message):
            dry_run(load_bundle(copy))


def test_weights_are_not_cast_where_that_loses_digits(copy: Path) -> None:
    name = "text_encoder.safetensors"
    before = Pipeline.load(copy, warmup=False).embed("a red fox")
    rewritten(copy, name, half)
    with Pipeline.load(copy, warmup=False) as pipe:
        assert np.allclose(pipe.embed("a red fox"), before, atol=0.05), "every float16 is a float32"
    for kind in (np.float64, np.int32):
        rewritten(copy, name, lambda t, kind=kind: t.update(norm=t["norm"].astype(kind)))
        with pytest.raises(
            BundleError, match=r"'norm': it is int32, which would lose digits|has the type 'F64'"
        ):
            Pipeline.load(copy)


def test_weights_of_a_float_type_are_not_cast_into_another(device: Path) -> None:
    def change(tensors: Raw) -> None:
        tensors["layers.0.q"] = tensors["layers.0.q"].astype(np.float32)

    path = device / "text.safetensors"
    with WeightsFile(path) as weights:
        tensors = {name: np.array(weights[name]) for name in weights}
    change(tensors)
    save_file(tensors, path)
    relist(device, path.name)
    with pytest.raises(DryRunError, match=r"'layers\.0\.q': it is float32, which would lose digits"):
        dry_run(load_bundle(device))


def test_a_dry_run_opens_engines(device: Path) -> None:
    dry_run(load_bundle(device))
    good = (device / "layer.engine").read_bytes()
    for content, message in (
        (b"", "it begins with b''"),
        (b"ftrt" + good[4:], "it begins with b'ftrt', and engines of tensorrt-rtx with b'vtrt'"),
        (good[:-1], "and has 35"),
        (good + b"x", "and has 37"),
    ):
        (device / "layer.engine").write_bytes(content)
        with pytest.raises(DryRunError, match=f"engine 'layer.engine': .*{message}"):
            dry_run(load_bundle(relist(device, "layer.engine")))


def test_a_dry_run_opens_packages_tokenizer_and_graphs(copy: Path, device: Path) -> None:
    with zipfile.ZipFile(device / "layer.pt2", "w") as archive:
        archive.writestr("data", b"abcdefgh" * 100)
    damaged = (device / "layer.pt2").read_bytes().replace(b"abcdefgh", b"abcdefgx", 1)
    for content, message in ((b"no archive", "not a zip file"), (damaged, "part 'data' is damaged")):
        (device / "layer.pt2").write_bytes(content)
        edit_manifest(device, lambda raw: raw["components"]["layer"].update(file="layer.pt2"))
        with pytest.raises(DryRunError, match=f"engine 'layer.pt2': .*{message}"):
            dry_run(load_bundle(relist(device, "layer.pt2")))
    for name, content, message in (
        ("tokenizer.json", b"[]", "tokenizer 'tokenizer.json': it is no tokenizer"),
        ("tokenizer.json", b'{"a":' * 100_000, "tokenizer 'tokenizer.json': it is nested too deeply"),
        ("vae_next.onnx", b"\x3a\xff", r"engine 'vae_next\.onnx': it ends in the middle"),
    ):
        before = (copy / name).read_bytes()
        (copy / name).write_bytes(content)
        with pytest.raises(DryRunError, match=message):
            dry_run(load_bundle(relist(copy, name)))
        (copy / name).write_bytes(before)
        relist(copy, name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("conditioner/cross_k.0"), r"no tensor 'conditioner/cross_k\.0'"),
        (lambda t: t.update({"conditioner/cross_k.0": np.zeros(1, np.float32)}), "has 1 samples of 48 elements"),
    ],
)  # fmt: skip
def test_a_dry_run_opens_golden_vectors(copy: Path, change: Callable[[Raw], object], message: str) -> None:
    name = load_bundle(copy).manifest.golden.file  # type: ignore[union-attr]
    with WeightsFile(copy / name) as file:
        metadata = file.metadata
    rewritten(copy, name, change, metadata=metadata)
    with pytest.raises(DryRunError, match=rf"golden vectors '{name}': .*{message}"):
        dry_run(load_bundle(copy))
    (copy / name).write_bytes(b"")
    with pytest.raises(DryRunError, match=r"golden vectors .* is not a weights file"):
        dry_run(load_bundle(relist(copy, name)))


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "float8_e4m3fn"])
def test_values_that_are_not_finite_are_named(tmp_path: Path, kind: str) -> None:
    assert kind in ELEMENT_TYPES
    dtype = np.dtype(getattr(ml_dtypes, kind, kind))
    good = np.array([0, -1, float(ml_dtypes.finfo(dtype).max), float(ml_dtypes.finfo(dtype).min)], dtype)
    bad = [float("nan")] if kind == "float8_e4m3fn" else [float("nan"), float("inf"), float("-inf")]
    tensors = {"good": good, "large": np.ones(300_000, dtype)}
    for at, value in enumerate(bad):
        tensors[f"bad{at}"] = np.concatenate([np.ones(300_000, dtype), np.array([value], dtype)])
    save_file(tensors, tmp_path / "w")
    with WeightsFile(tmp_path / "w") as weights:
        for name in ("good", "large"):
            weights.read_finite(name)
        for at in range(len(bad)):
            with pytest.raises(BundleError, match=f"tensor 'bad{at}' .* not finite"):
                weights.read_finite(f"bad{at}")


def test_a_dry_run_looks_at_weights(device: Path) -> None:
    path = device / "transformer.safetensors"
    with WeightsFile(path) as weights:
        tensors = {name: np.array(weights[name]) for name in weights}
    tensors["head_bias"][0] = np.inf
    save_file(tensors, path)
    with pytest.raises(DryRunError, match=r"tensor 'head_bias' .* not finite"):
        dry_run(load_bundle(relist(device, path.name)))
