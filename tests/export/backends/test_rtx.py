"""TensorRT-RTX engines, really built, for GPUs that this machine need not have."""

from __future__ import annotations

import hashlib
import shutil
from math import prod
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from export.backends.tensorrt_rtx.engine import build_engine, check_request
from export.backends.tensorrt_rtx.expectations import Structure, load_expectations
from export.errors import BuildError, ExportError, InputError
from export.graph.rewrites import prepare_for_rtx
from export.request.capability import BACKENDS, known_capabilities
from export.request.geometry import StepPlan
from export.request.targets import load_variant
from lightforcing_ref.config import PRESETS
from runtime.host_memory import Memory
from tests.export.backends.rtx_graphs import (
    OUT,
    ROWS,
    WIDTH,
    floats,
    quantized_linear,
    save,
    weight,
    write_components,
    write_vae,
)

tensorrt_rtx = pytest.importorskip(
    "tensorrt_rtx", reason="TensorRT-RTX is not installed (extra tensorrt-rtx)"
)

TINY = Structure.of(
    StepPlan.of(PRESETS["tiny"], load_variant("short"), 128, 128, block_q=32, block_k=32),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("components")
    write_components(folder)
    return folder


def engine(graph: Path, component: str = "graph", gpu: str = "12.0", **options):
    return build_engine(
        graph, graph.with_suffix(".engine"), component=component, compute_capability=gpu, **options
    )


@pytest.mark.parametrize(
    ("component", "gpu"),
    [
        *((c, "12.0") for c in ("first", "layer", "last", "conditioner", "text_encoder", "vae_next")),
        ("layer", "8.9"),
        pytest.param("vae_first", "8.9", marks=pytest.mark.slow),
    ],
)
def test_every_component_builds_as_expected(tiny, component, gpu):
    if component.startswith("vae"):
        write_vae(tiny, component)
    expectations = load_expectations("bf16")
    info = engine(
        tiny / f"{component}.onnx",
        component,
        gpu,
        check=lambda report: expectations.check(component, report, TINY),
    )
    assert info.report.architecture == f"sm{gpu.replace('.', '')}"
    assert info.engine_bytes == info.path.stat().st_size == info.report.engine_bytes
    assert info.report.weight_transposes == ()
    declared = {value.name for value in ir.load(tiny / f"{component}.onnx").graph.inputs}
    assert {tensor.name for tensor in info.inputs} == declared
    assert not list(tiny.glob(".*"))


def test_the_layer_takes_its_weights_as_inputs_in_torch_layout(tiny):
    info = engine(tiny / "layer.onnx", "layer")
    shapes = [tensor.shape for tensor in info.inputs if tensor.dtype == "bfloat16"]
    assert (384, 128) in shapes  # merged QKV [3 dim, dim]
    assert (512, 128) in shapes  # ffn.0 [ffn, dim]
    assert (128, 512) in shapes
    assert info.report.constant_bytes < 1024


def test_the_same_graph_gives_the_same_file(tmp_path):
    graph = quantized_linear(tmp_path / "fp8.onnx", quantize_input=True)
    digests = {hashlib.sha256(engine(graph).path.read_bytes()).hexdigest() for _ in range(2)}
    assert len(digests) == 1


def test_engines_leave_their_memory_to_the_runtime(tmp_path):
    """Nothing but a byte or two of the plan tells that it was asked for."""
    graph = quantized_linear(tmp_path / "fp8.onnx", quantize_input=True)
    ours = engine(graph).path.read_bytes()
    model = ir.load(graph)
    prepare_for_rtx(model)
    logger = tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR)
    builder = tensorrt_rtx.Builder(logger)

    def built(*flags: object) -> bytes:
        network = builder.create_network(0)
        assert tensorrt_rtx.OnnxParser(network, logger).parse(ir.to_proto(model).SerializeToString())
        config = builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(tensorrt_rtx.ComputeCapability.SM120, 0)
        for flag in flags:
            config.set_flag(flag)
        return bytes(builder.build_serialized_network(network, config))

    assert ours == built(tensorrt_rtx.BuilderFlag.REQUIRE_USER_ALLOCATION)
    assert ours != built()


def test_progress_only_rises_and_ends_complete(tmp_path):
    """Phases inside of phases start over and over; they would throw the bar back."""
    seen: list[tuple[str, int, int]] = []
    engine(
        quantized_linear(tmp_path / "fp8.onnx", quantize_input=True),
        progress=lambda phase, done, total: seen.append((phase, done, total)),
    )
    shares = [done / total for _, done, total in seen]
    assert len(shares) > 2
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1


def test_an_fp8_linear_multiplies_in_fp8(tmp_path):
    info = engine(quantized_linear(tmp_path / "fp8.onnx", quantize_input=True), gpu="8.9")
    assert info.report.gemms == {"fp8": 1}
    assert [t.shape for t in info.inputs] == [(ROWS, WIDTH), (OUT, WIDTH)]
    assert [t.dtype for t in info.inputs] == ["bfloat16", "float8_e4m3fn"]


def test_an_fp8_weight_whose_input_is_not_quantized_is_caught(tmp_path):
    """The library itself does not mind: the product is one in bf16."""
    graph = quantized_linear(tmp_path / "silent.onnx", quantize_input=False)
    message = r"^layer: 1 of 1 quantized linears fell back: product is a bf16 product and not fp8.*--skip"
    with pytest.raises(BuildError, match=message):
        engine(graph, "layer")
    assert not graph.with_suffix(".engine").exists()


@pytest.mark.parametrize("gpu", ["9.0", "10.0", "12"])
def test_other_gpus_are_refused_with_the_ones_it_builds_for(gpu):
    with pytest.raises(InputError, match=r"7\.5, 8\.0.*--backend"):
        check_request(gpu)


@pytest.mark.parametrize(
    ("gpu", "precision", "instead"),
    [
        ("8.0", "fp8", "use --precision bf16, or another --gpu"),
        ("8.6", "nvfp4", "use --precision bf16, or another --gpu"),
        ("8.9", "nvfp4", "use --precision bf16 or fp8, or another --gpu"),
        ("7.5", "bf16", "use another --gpu"),
    ],
)
def test_precisions_a_gpu_does_not_have_are_refused(gpu, precision, instead):
    with pytest.raises(InputError, match=f"do not compute in {precision}, which .*; {instead}$"):
        check_request(gpu, precision)


def test_precisions_a_gpu_has_are_accepted():
    assert known_capabilities(BACKENDS["tensorrt-rtx"])[-1] == "12.1"
    assert check_request("12.0", "bf16", "fp8", "nvfp4").startswith("1.7.")


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        (None, r"not installed; pip install 'tensorrt-rtx-cu13>=1\.7,<1\.8'"),
        ("1.8.0.2", r"1\.8\.0\.2 is installed, and this version builds with 1\.7; pip install"),
        ("1.17.0.1", r"1\.17\.0\.1 is installed"),
    ],
)
def test_another_release_is_refused_before_the_build(monkeypatch, installed, message):
    monkeypatch.setattr("export.request.capability.installed_version", lambda name: installed)
    with pytest.raises(BuildError, match=message):
        check_request("12.0", "bf16")


def big_product(folder):
    """A graph with 64 MiB of weights."""
    return save(
        folder / "big.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [floats("x", [8, 4096])],
        [floats("y", [8, 4096])],
        [weight("w", (4096, 4096))],
    )


def test_what_cannot_fit_is_refused_before_the_build(monkeypatch, tmp_path):
    """64 MiB of weights: three times that and 640 MiB of memory, 2.2 times and 64 MiB of disk."""
    graph = big_product(tmp_path)
    monkeypatch.setattr("export.backends.tensorrt_rtx.engine.run_worker", None)  # nothing is begun
    with monkeypatch.context() as patch:
        patch.setattr(
            "export.backends.tensorrt_rtx.engine.memory", lambda: Memory(total=1 << 34, available=800 << 20)
        )
        with pytest.raises(
            BuildError, match=r"last: .* takes about 832\.0 MiB of memory .* 800\.0 MiB are free"
        ):
            engine(graph, "last")
    usage = shutil.disk_usage(tmp_path)._replace(free=200 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(BuildError, match=r"last: .* up to 204\.8 MiB and .* has 200\.0 MiB free; make room"):
        engine(graph, "last")


def test_an_fp8_graph_for_a_gpu_without_fp8_is_refused_before_the_build(tmp_path):
    with pytest.raises(InputError, match=r"8\.6 do not compute in fp8"):
        engine(quantized_linear(tmp_path / "fp8.onnx", quantize_input=True), gpu="8.6")


def test_operators_of_this_project_must_be_cut_out_first(tiny):
    with pytest.raises(ExportError, match=r"QKPrepare.*cut the graph"):
        prepare_for_rtx(ir.load(tiny / "step.onnx"))


def test_a_graph_with_sizes_left_open_is_refused(tmp_path):
    graph = save(
        tmp_path / "open.onnx",
        [helper.make_node("Relu", ["x"], ["y"])],
        [floats("x", ["n", 4])],
        [floats("y", ["n", 4])],
    )
    with pytest.raises(BuildError, match=r"'x'.*fixed sizes"):
        engine(graph)


def test_what_the_parser_refuses_is_named(tmp_path):
    node = helper.make_node("NonZero", ["x"], ["y"], name="find_them")
    graph = save(
        tmp_path / "bad.onnx",
        [node],
        [floats("x", [4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, [2, None])],
    )
    with pytest.raises(BuildError, match=r"video decoder: .*cannot read the graph.*'find_them' \(NonZero\)"):
        engine(graph, "video decoder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.onnx"]


def test_dropping_the_batch_computes_the_same():
    nodes = [
        helper.make_node("LayerNormalization", ["x", "gamma"], ["n"], axis=2, name="norm"),
        helper.make_node("Mul", ["n", "gate"], ["m"], name="gated"),
        helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0], name="transpose"),
        helper.make_node("MatMul", ["m", "wt"], ["p"], name="product"),
        helper.make_node("Add", ["p", "bias"], ["b"], name="biased"),
        helper.make_node("Add", ["x", "b"], ["y"], name="residual"),
        helper.make_node("Softmax", ["b"], ["s"], axis=1, name="over_rows"),
    ]
    inputs = [floats("x", [1, 5, 8]), floats("w", [8, 8]), floats("bias", [8]), floats("gate", [1, 1, 8])]
    outputs = [floats("y", [1, 5, 8]), floats("s", [1, 5, 8])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [weight("gamma", (8,))])
    proto = onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    )
    model = ir.from_proto(proto)
    prepare_for_rtx(model)
    edited = ir.to_proto(model)
    onnx.checker.check_model(edited)
    rng = np.random.default_rng(1)
    feed = {
        i.name: rng.standard_normal([d.dim_value for d in i.type.tensor_type.shape.dim]).astype(np.float32)
        for i in inputs
    }
    expected = ort.InferenceSession(proto.SerializeToString()).run(None, feed)
    session = ort.InferenceSession(edited.SerializeToString())
    shapes = {value.name: value.shape for value in session.get_inputs()}
    assert shapes == {"x": [5, 8], "w": [8, 8], "bias": [1, 8], "gate": [1, 8]}
    actual = session.run(["y", "s"], {name: feed[name].reshape(shape) for name, shape in shapes.items()})
    for got, wanted in zip(actual, expected, strict=True):
        np.testing.assert_allclose(got.reshape(wanted.shape), wanted, rtol=1e-6, atol=1e-6)


def _normed_heads(order: list[int], *, kept: bool = False) -> onnx.ModelProto:
    """An RMS norm over two heads of 4, then transposed; `kept`: what is normed goes out as well."""
    nodes = [
        helper.make_node("RMSNormalization", ["x", "w"], ["n"], axis=-1, epsilon=0.25, name="norm"),
        helper.make_node("Reshape", ["n", "heads"], ["h"], name="split"),
        helper.make_node("Transpose", ["h"], ["y"], perm=order, name="heads_first"),
        helper.make_node("Neg", ["y"], ["z"], name="used"),
    ]
    turned = [[1, 5, 2, 4][axis] for axis in order]
    outputs = [floats("z", turned), *([floats("n", [1, 5, 8])] if kept else [])]
    heads = helper.make_tensor("heads", TensorProto.INT64, [4], [1, 5, 2, 4])
    graph = helper.make_graph(nodes, "g", [floats("x", [1, 5, 8])], outputs, [weight("w", (8,)), heads])
    return onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    )


def test_a_norm_over_heads_computes_the_same_where_they_are_transposed():
    model = ir.from_proto(_normed_heads([0, 2, 1, 3]))
    prepare_for_rtx(model)
    edited = ir.to_proto(model)
    onnx.checker.check_model(edited)
    assert "RMSNormalization" not in {node.op_type for node in model.graph}
    x = np.random.default_rng(1).standard_normal((5, 8))
    factor = onnx.numpy_helper.to_array(weight("w", (8,))).astype(np.float64)
    normed = x / np.sqrt((x * x).mean(1, keepdims=True) + 0.25) * factor
    (z,) = ort.InferenceSession(edited.SerializeToString()).run(["z"], {"x": x.astype(np.float32)})
    np.testing.assert_allclose(z, -normed.reshape(1, 5, 2, 4).transpose(0, 2, 1, 3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("order", "kept"), [([0, 2, 3, 1], False), ([0, 2, 1, 3], True)])
def test_a_norm_that_is_used_in_another_way_stays(order, kept):
    model = ir.from_proto(_normed_heads(order, kept=kept))
    prepare_for_rtx(model)
    assert "RMSNormalization" in {node.op_type for node in model.graph}


def test_no_float32_copy_of_the_queries_passes_between_launches(tiny):
    """The engine of a norm in front of a transposition writes one, when it is left as PyTorch exports it."""
    report = engine(tiny / "layer.onnx", "layer").report
    wide = [
        operand.name
        for launch in report.launches
        for operand in launch.outputs
        if operand.type == "float32" and prod(operand.dims) >= TINY.tokens
    ]
    assert wide == []


def test_pixels_become_bytes_last():
    nodes = [
        helper.make_node("Cast", ["x"], ["c"], to=TensorProto.UINT8, name="to_bytes"),
        helper.make_node("Transpose", ["c"], ["y"], perm=[0, 2, 1], name="channels_last"),
    ]
    out = helper.make_tensor_value_info("y", TensorProto.UINT8, [2, 4, 3])
    graph = helper.make_graph(nodes, "g", [floats("x", [2, 3, 4])], [out])
    proto = onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    )
    model = ir.from_proto(proto)
    prepare_for_rtx(model)
    assert [node.op_type for node in model.graph] == ["Transpose", "Cast"]
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    (y,) = ort.InferenceSession(ir.to_proto(model).SerializeToString()).run(["y"], {"x": x})
    np.testing.assert_array_equal(y, x.transpose(0, 2, 1).astype(np.uint8))
