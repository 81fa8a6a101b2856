"""The tensorrt backend as far as it goes without TensorRT: graphs, inspector output, refusals, order of the work."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.backends.tensorrt import bundle as trt_bundle
from export.backends.tensorrt import engine as trt
from export.backends.tensorrt.bundle import judge
from export.backends.tensorrt.engine import TrtMachine, TrtPlugin, build_engine, failure, find_machine
from export.backends.tensorrt.engine_text import check_plugins, check_precision, read_inspection
from export.backends.tensorrt.graph import operators_of, prepare_for_trt
from export.errors import BuildError, ExportError, InputError
from export.graph.components import tensor_specs
from export.machine import Gpu, GpuReport, importable
from export.quantize.formats import choose_formats, linear_names, quantize
from export.quantize.graph import quantized_products
from export.request import capability

CARD = Gpu("NVIDIA GeForce RTX 5090", "12.0", 32 << 30)


@pytest.fixture
def machine(tmp_path: Path) -> TrtMachine:
    return TrtMachine(CARD, 0, "11.4.0.106", tmp_path / "cache")


@pytest.fixture
def step(tiny_bundle: Path, tmp_path: Path) -> Path:
    for file in ("step.onnx", "step.weights"):
        shutil.copy(tiny_bundle / file, tmp_path)
    return tmp_path / "step.onnx"


# ---- graphs ----


def test_a_prepared_step_has_fixed_sizes_and_still_computes_the_same(step: Path) -> None:
    model = ir.load(step)
    assert operators_of(model) == ["HierarchicalSparseAttention", "QKPrepare"]
    prepare_for_trt(model, {"slots": 18})
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert all(isinstance(dim, int) for dim in value.shape), value
    own = [node for node in model.graph if node.domain == "lightforcing"]
    assert len(own) == 12
    assert {node.attributes["plugin_namespace"].as_string() for node in own} == {"lightforcing"}
    prepared = step.with_name("prepared.onnx")
    ir.save(model, prepared)
    rng = np.random.default_rng(0)
    feed: dict[str, Any] = {}
    for value in model.graph.inputs:
        shape = tuple(value.shape.numpy())
        feed[value.name] = rng.standard_normal(shape, dtype=np.float32)
    feed |= {"step": np.array(1, np.int32), "chunk": np.array(6, np.int32)}
    feed["frame_slots"] = np.arange(18, dtype=np.int32)[::-1].copy()
    before, after = (
        ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feed)
        for path in (step, prepared)
    )
    for expected, found in zip(before, after, strict=True):
        assert np.array_equal(expected, found)


def test_a_dimension_left_open_is_refused(step: Path) -> None:
    with pytest.raises(ExportError, match=r"input 'past_k\.0' has the shape .*slots"):
        prepare_for_trt(ir.load(step), {"frames": 3})


@pytest.mark.parametrize("precision", ["fp8", "nvfp4"])
def test_every_quantized_product_is_expected_by_name(step: Path, precision: str) -> None:
    model = ir.load(step)
    assert quantized_products(model) == {}
    formats = choose_formats(linear_names(model), precision)
    quantize(model, formats)
    types = {"fp8": "fp8", "nvfp4": "fp4"}
    expected = {f"{linear}.product": types[format] for linear, format in formats.items()}
    assert quantized_products(model) == expected


# ---- the inspector ----


def document(*layers: dict[str, Any]) -> str:
    return json.dumps({"Layers": list(layers), "Bindings": ["x", "y"]})


def layer(name: str, *types: str, nodes: tuple[str, ...] = (), kind: str = "gemm") -> dict[str, Any]:
    return {
        "Name": name,
        "LayerType": kind,
        "Inputs": [
            {"Name": f"{name}.{i}", "Dimensions": [4, 8], "Format/Datatype": t} for i, t in enumerate(types)
        ],
        "Outputs": [{"Name": f"{name}.out", "Dimensions": [4, 8], "Format/Datatype": "BFloat16"}],
        "TacticName": "",
        "Metadata": "\u001e".join(f"[ONNX Layer: {node}]" for node in nodes),
    }


def inspected(path: Path, text: str) -> Any:
    path.write_text(text)
    return read_inspection(path)


def test_products_are_counted_by_what_they_read(tmp_path: Path) -> None:
    inspection = inspected(
        tmp_path / "i.json",
        document(
            layer("a", "FP8", "FP8", "Float"),
            layer("b", "Row major linear FP16 format"),
            layer("c", "BFloat16"),
            layer("d", "Float", kind="kgen"),
            layer("e", "FP4", "FP8", kind="CaskGemmMatrixMultiply"),
        ),
    )
    assert inspection.products() == {"bf16": 1, "fp16": 1, "fp4": 1, "fp8": 1}


def test_a_product_in_the_wrong_type_or_nowhere_fails(tmp_path: Path) -> None:
    inspection = inspected(
        tmp_path / "i.json",
        document(
            layer("merged", "FP8", "FP8", nodes=("a.product", "b.product")),
            layer("silent", "BFloat16", "BFloat16", nodes=("c.product",)),
        ),
    )
    check_precision("step", inspection, {"a.product": "fp8", "b.product": "fp8"})
    check_precision("step", inspection, {})
    with pytest.raises(
        BuildError, match=r"step: 1 of 2 quantized products .* c\.product reads bf16 and not fp8"
    ):
        check_precision("step", inspection, {"a.product": "fp8", "c.product": "fp8"})
    with pytest.raises(BuildError, match=r"d\.product is in none of the engine's layers"):
        check_precision("step", inspection, {"d.product": "fp8"})
    with pytest.raises(BuildError, match=r"a\.product reads fp8 and not fp4"):
        check_precision("step", inspection, {"a.product": "fp4"})


def test_an_operator_that_is_no_plugin_fails(tmp_path: Path) -> None:
    attention, prepare = {"a": "HierarchicalSparseAttention"}, {"p": "QKPrepare"}
    plugin = layer("x", "BFloat16", nodes=("a",), kind="PluginV3")
    inlined = layer("p", "BFloat16", nodes=("p",), kind="kgen")
    inspection = inspected(tmp_path / "i.json", document(plugin, inlined))
    check_plugins("step", inspection, attention)
    with pytest.raises(
        BuildError, match=r"1 of 2 operators are not plugins .* p \(QKPrepare\): TensorRT took its"
    ):
        check_plugins("step", inspection, attention | prepare)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"Layers": []}',
        '{"Layers": ["names", "only"]}',
        '{"Layers": [{"LayerType": "gemm"}]}',
        "\x00",
    ],
)
def test_inspector_output_that_is_not_understood_stops_the_build(tmp_path: Path, text: str) -> None:
    with pytest.raises(BuildError, match="inspector"):
        inspected(tmp_path / "i.json", text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(
            st.sampled_from(["Layers", "Name", "Inputs", "Metadata", "Format/Datatype"]), children, max_size=4
        )
    ),
    max_leaves=12,
)


@given(JSON, JSON)
def test_no_inspector_output_escapes_as_another_error(
    tmp_path_factory: pytest.TempPathFactory, one: Any, two: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    for content in (one, {"Layers": two}, {"Layers": [two]}):
        path.write_text(json.dumps(content))
        try:
            check_precision("step", read_inspection(path), {"a": "fp8"})
        except BuildError:
            continue
        raise AssertionError(content)


# ---- refusals, before any long work ----


def test_the_target_gpu_must_be_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt, "find_gpus", lambda: GpuReport(problem="no NVIDIA driver"))
    with pytest.raises(
        InputError, match=r"rtx5090 has .* 12\.0, and here there is no NVIDIA driver.*tensorrt-rtx builds"
    ):
        find_machine("rtx5090", "12.0", "fp8")
    other = GpuReport((Gpu("NVIDIA H200", "9.0", 1),))
    monkeypatch.setattr(trt, "find_gpus", lambda: other)
    with pytest.raises(InputError, match=r"here there is NVIDIA H200 \(9\.0\)"):
        find_machine("rtx5090", "12.0", "fp8")
    with pytest.raises(InputError, match="--backend onnxruntime"):
        find_machine("cpu", None, "fp32")
    with pytest.raises(InputError, match=r"8\.0 do not compute in fp8, which begins with 8\.9"):
        find_machine("a100", "8.0", "fp8")


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        (None, "TensorRT is not installed; pip install"),
        ("10.13.0.35", "TensorRT 10.13.0.35 is installed, which"),
    ],
)
def test_tensorrt_must_be_here_in_its_release(
    monkeypatch: pytest.MonkeyPatch, installed: str | None, message: str
) -> None:
    monkeypatch.setattr(trt, "find_gpus", lambda: GpuReport((CARD,), "13.0"))
    monkeypatch.setattr(capability, "installed_version", lambda name: installed)
    with pytest.raises(BuildError, match=message):
        find_machine("rtx5090", "12.0", "fp8")


def test_the_gpu_of_the_target_is_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trt, "find_gpus", lambda: GpuReport((Gpu("NVIDIA A100", "8.0", 1), CARD)))
    monkeypatch.setattr(
        capability, "installed_version", lambda name: "11.4.0.106" if name == "tensorrt-cu13" else None
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = find_machine("rtx5090", "12.0", "nvfp4")
    assert (found.gpu, found.ordinal, found.version) == (CARD, 1, "11.4.0.106")
    assert found.workspace_limit == 16 << 30
    assert found.environment()["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-7")
    assert found.environment()["CUDA_VISIBLE_DEVICES"] == "GPU-7"
    assert found.timing_cache == (
        tmp_path / "lightforcing" / "tensorrt" / "nvidia-geforce-rtx-5090-12.0-tensorrt-11.4.0.106.timings"
    )


# ---- processes ----


@pytest.mark.parametrize(
    ("stage", "code", "log", "message"),
    [
        ("build", 1, "[E] CUDA runtime error: out of memory", "step: the build ran out of the GPU's memory"),
        ("build", 1, "Requested amount of GPU memory (9 bytes) ... insufficient memory", "the GPU's memory"),
        ("build", 1, "std::bad_alloc", "the machine's memory"),
        ("build", -9, "", "the machine's memory; .* it gives no reason"),
        ("build", -11, "x", r"ended the process \(SIGSEGV\); it says: x"),
        ("parse", 1, "In node 3: No importer", "cannot read the graph: In node 3"),
        ("plugin", 1, "RuntimeError: no", "the plugin library does not load: RuntimeError: no"),
        ("start", 1, "No module named 'tensorrt'", "TensorRT does not start on this machine"),
    ],
)
def test_failures_are_named(stage: str, code: int, log: str, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        raise BuildError(failure("step", stage, code, log))


@pytest.mark.skipif(importable("tensorrt"), reason="TensorRT is installed")
def test_without_tensorrt_the_process_says_so_and_leaves_nothing(
    tiny_bundle: Path, tmp_path: Path, machine: TrtMachine
) -> None:
    for file in ("conditioner.onnx", "conditioner.weights"):
        shutil.copy(tiny_bundle / file, tmp_path)
    plugin = TrtPlugin(tmp_path / "plugin.so", "0" * 64)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(BuildError, match=r"conditioner: TensorRT does not start on this machine: .*tensorrt"):
        build_engine(
            tmp_path / "conditioner.onnx",
            tmp_path / "conditioner.engine",
            component="conditioner",
            machine=machine,
            plugin=plugin,
            dimensions={},
        )
    assert sorted(path.name for path in tmp_path.iterdir() if path != machine.cache) == before


def test_importing_the_backend_imports_no_library_of_a_vendor() -> None:
    code = (
        "import export.backends.tensorrt.engine, sys; "
        "sys.exit('tensorrt' in sys.modules or 'polygraphy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- the verdict on the GPU ----


def test_an_engine_that_computes_something_else_stops_the_build() -> None:
    assert judge("step", {"step@full/x0": 0.01, "step@full/k.0": 0.004}, 0.02) == 0.01
    with pytest.raises(BuildError, match=r"step: step@full/x0 is off by 3\.0e-02 .* 2e-02 is allowed"):
        judge("step", {"step@full/x0": 0.03, "step@full/k.0": 0.004}, 0.02)
    with pytest.raises(BuildError, match=r"k\.0 is not finite"):
        judge("step", {"step@full/x0": 0.03, "step@full/k.0": None}, 0.02)


class HostTensorRt:
    """Stands in for the processes: an engine is the ONNX file, inspected by its nodes and run in ONNX Runtime."""

    def __init__(self, disturb: str | None = None) -> None:
        self.requests: list[dict[str, Any]] = []
        self.disturb = disturb

    def __call__(
        self, request: dict[str, Any], component: str, machine: TrtMachine, progress: Any
    ) -> dict[str, Any]:
        self.requests.append(request)
        return self.build(request) if request["task"] == "build" else self.measure(request)

    def build(self, request: dict[str, Any]) -> dict[str, Any]:
        source, engine = Path(request["onnx"]), Path(request["engine"])
        shutil.copy(source, engine)
        model = ir.load(source)
        products = quantized_products(model)
        layers = [
            layer(node.name or "", products.get(node.name or "", "BFloat16"), nodes=(node.name or "",))
            for node in model.graph
            if node.op_type == "MatMul"
        ]
        layers += [
            layer(node.name or "", "BFloat16", nodes=(node.name or "",), kind="PluginV3")
            for node in model.graph
            if node.domain == "lightforcing"
        ]
        Path(request["inspector"]).write_text(document(*layers, layer("other", "Float", kind="kgen")))

        def table(values: Any) -> list[tuple[str, str, list[int]]]:
            return [(s.name, s.dtype, [int(dim) for dim in s.shape]) for s in tensor_specs(values)]

        return {
            "inputs": table(model.graph.inputs),
            "outputs": table(model.graph.outputs),
            "activation_bytes": 1,
            "layers": len(layers),
            "seconds": 1.0,
            "peak_bytes": 1,
            "version": "11.4.0.106",
        }

    def measure(self, request: dict[str, Any]) -> dict[str, Any]:
        from export.parts.golden_reference import ReferenceGraph
        from runtime.bundle import Component
        from runtime.bundle.golden import METADATA_KEY, GoldenCases, error_of, shaped
        from runtime.bundle.weights_file import WeightsFile

        folder, name = Path(request["folder"]), request["name"]
        samples = WeightsFile(folder / request["golden"])
        specs = Component.model_validate(request["component"]).inputs
        files = {path.name: WeightsFile(path) for path in folder.glob("text_encoder.safetensors")}
        engine = folder / f".{name}.measured.onnx"
        shutil.copy(request["engine"], engine)
        scratch = folder / f".scratch.{name}"
        scratch.mkdir(exist_ok=True)
        graph, errors = ReferenceGraph(engine, scratch), {}
        for case in GoldenCases.model_validate_json(samples.metadata[METADATA_KEY]).cases:
            if case.component == name:
                feed = {spec.name: shaped(case.inputs[spec.name], spec, case.slots, files) for spec in specs}
                for output, value in graph.run(feed).items():
                    wrong = value * np.float32(1.5) if self.disturb == name else value
                    key = f"{case.name}/{output}"
                    errors[key] = error_of(wrong, case.outputs[output], samples[key])
        shutil.rmtree(scratch)
        engine.unlink()
        return {"errors": errors}


@pytest.mark.slow
@pytest.mark.parametrize("disturb", [None, "conditioner"])
def test_a_bundle_is_complete_when_every_engine_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: TrtMachine, disturb: str | None
) -> None:
    from export import build
    from runtime.bundle import load_bundle
    from tests import conftest

    plugin = tmp_path / "libnvinfer_plugin_lightforcing.so"
    plugin.write_bytes(b"library")
    host = HostTensorRt(disturb)
    monkeypatch.setattr(trt, "_run_worker", host)
    monkeypatch.setattr(trt_bundle, "_machine", lambda request: machine)
    monkeypatch.setattr(trt_bundle, "find_plugin", lambda: plugin)
    monkeypatch.setitem(build._BUILDERS, "tensorrt", lambda: trt_bundle.BUILDER)
    from export.request.targets import load_target

    changes = {"target": load_target("rtx5090"), "backend": "tensorrt", "precision": "fp8"}
    if disturb:
        with pytest.raises(BuildError, match=r"conditioner: .* is off by 5\.\de-01"):
            conftest.build(tmp_path / "out", "short", **changes)
        assert not (tmp_path / "out" / "short").exists()
        return
    loaded = load_bundle(conftest.build(tmp_path / "out", "short", **changes))
    manifest = loaded.manifest
    assert set(manifest.components) == {
        "step",
        "clean",
        "conditioner",
        "text_encoder",
        "vae_first",
        "vae_next",
    }
    assert manifest.status == "built and verified on NVIDIA GeForce RTX 5090"
    assert manifest.golden is not None
    assert set(manifest.golden.measured) == set(manifest.components)
    assert max(manifest.golden.measured.values()) < 1e-4
    assert (loaded.root / plugin.name).read_bytes() == b"library"
    assert {entry.path for entry in manifest.files} >= {
        plugin.name,
        "step.inspector.json",
        "golden.safetensors",
    }
    assert manifest.components["step"].cost is not None
    assert manifest.components["step"].cost.gemms["fp8"] == 36
    assert not [path.name for path in loaded.root.iterdir() if path.suffix in (".onnx", ".weights")]
    with_plugin = [request for request in host.requests if request["plugin"] is not None]
    assert len(with_plugin) == 4  # step and clean, built and measured
    assert {request["plugin"]["sha256"] for request in with_plugin} == {
        next(entry.sha256 for entry in manifest.files if entry.path == plugin.name)
    }
