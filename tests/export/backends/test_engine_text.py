"""Reading engines: what they say of themselves, and that nothing unknown is taken for granted."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from onnx import helper

from export.backends.tensorrt_rtx.engine import build_engine
from export.backends.tensorrt_rtx.engine_text import (
    EngineFormatError,
    EngineReport,
    Launch,
    parse_engine,
    read_engine,
)
from export.backends.tensorrt_rtx.expectations import (
    ActivationBound,
    Expectations,
    Structure,
    load_expectations,
)
from export.errors import BuildError, InputError
from tests.export.backends.rtx_graphs import OUT, ROWS, WIDTH, floats, quantized_linear, save, weight

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra tensorrt-rtx)")

NOTHING = Structure(0, 0, 0, 0, 0, 0, 0, 0)


def build(graph: Path) -> bytes:
    path = graph.with_suffix(".engine")
    build_engine(graph, path, component="small", compute_capability="12.0")
    return path.read_bytes()


@pytest.fixture(scope="module")
def fp8_plan(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return build(quantized_linear(tmp_path_factory.mktemp("fp8") / "fp8.onnx", quantize_input=True))


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> EngineReport:
    """gelu(x w + b), whose epilogue is compiled into the product, and the transposition of a batched weight."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"], name="product"),
        helper.make_node("Add", ["p", "b"], ["s"], name="biased"),
        helper.make_node("Gelu", ["s"], ["y"], approximate="tanh", name="activated"),
    ]
    graph = save(
        tmp_path_factory.mktemp("fused") / "fused.onnx",
        nodes,
        [floats("x", [64, 128])],
        [floats("y", [64, 256])],
        [weight("w", (128, 256)), weight("b", (256,))],
    )
    return parse_engine(build(graph))


def test_bytes_of_what_is_no_product(fused: EngineReport, fp8_plan: bytes) -> None:
    """The weight of the product is transposed, read and written once; in FP8, the input is quantized besides."""
    others = [launch for launch in fused.launches if launch.kind == "kernel"]
    assert fused.moved_bytes == sum(launch_bytes(launch) for launch in others)
    quantized = parse_engine(fp8_plan)
    (quantize,) = (launch for launch in quantized.launches if launch.kind == "kernel")
    assert quantized.moved_bytes == launch_bytes(quantize) > 0


def launch_bytes(launch: Launch) -> int:
    """By the types' widths."""
    widths = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
    operands = (*launch.inputs, *launch.outputs)
    return sum(widths[operand.dtype] * math.prod(operand.dims) for operand in operands)


def test_an_fp8_product_is_read_with_its_operands(fp8_plan):
    report = parse_engine(fp8_plan)
    assert report.gemms == {"fp8": 1}
    (product,) = (launch for launch in report.launches if launch.kind == "gemm")
    assert [operand.dtype for operand in product.inputs[:2]] == ["fp8", "fp8"]
    assert product.inputs[0].dims[-2:] == (ROWS, WIDTH)
    assert sorted(product.inputs[1].dims[-2:]) == sorted((OUT, WIDTH))
    assert product.outputs[0].dtype == "bf16"
    assert product.outputs[0].dims[-2:] == (ROWS, OUT)
    assert report.inputs == ("x", "w")
    assert report.outputs == ("y",)
    assert report.architecture == "sm120"
    assert report.capturable
    assert report.engine_bytes == len(fp8_plan)


def test_a_fused_product_is_found_inside_the_fusion(fused):
    (product,) = (launch for launch in fused.launches if launch.kind == "gemm")
    assert product.fused
    assert product.compute == "fp32"
    assert {"product", "biased", "activated"} == set(product.layers)
    assert fused.constant_bytes >= 128 * 256 * 4


def test_a_file_that_is_no_plan_is_refused(tmp_path):
    path = tmp_path / "some.engine"
    path.write_bytes(b"\0" * 4096)
    with pytest.raises(EngineFormatError, match=r"some\.engine.*it is no engine"):
        read_engine(path)


def test_a_plan_without_a_description_is_refused(fp8_plan):
    with pytest.raises(EngineFormatError, match="holds no NLYM section"):
        parse_engine(fp8_plan.replace(b"NLYM", b"nlym"))


@pytest.mark.parametrize("part", [0.0001, 0.3, 0.9, 0.99])
def test_a_truncated_plan_is_refused(fp8_plan, part):
    with pytest.raises(EngineFormatError, match=r"says that it has|is no engine"):
        parse_engine(fp8_plan[: int(len(fp8_plan) * part)])


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        (b"NLYM\xa1\xda\x1e\x00", b"NLYM\xa2\xda\x1e\x00", "section version 2022050"),
        (b"header {\n  version = 5", b"header {\n  version = 6", "text version 6"),
        (b"fully_connected={", b"fully_konnected={", "fully_konnected"),
        (b"type=fp8_e4m3 }", b"type=fp9_e4m3 }", "fp9_e4m3"),
        (b"stream_capturable=", b"stream_kapturable=", "stream_capturable"),
        (b"name=devmem", b"name=devmen", "devmem"),
        (b"\nmain {", b"\nmien {", "do not follow one another"),
        (b" output_args={", b" output_arks={", "output_args"),
    ],
)
def test_what_is_not_known_is_refused(fp8_plan, old, new, names):
    assert old in fp8_plan
    with pytest.raises(EngineFormatError, match=names):
        parse_engine(fp8_plan.replace(old, new))


def expectation(**changes: object) -> Expectations:
    component = {
        "gemms": {"fp8": 1},
        "convolutions": {},
        "attentions": {},
        "launches": [1, 4],
        "activation_bytes": {"base": 16 << 20},
    }
    return Expectations.model_validate(
        {"schema_version": 1, "precision": "fp8", "components": {"small": component | changes}}
    )


def test_an_engine_as_expected_passes(fp8_plan):
    expectation().check("small", parse_engine(fp8_plan), NOTHING)
    expectation(gemms={"fp8|fp4": [1, 2]}).check("small", parse_engine(fp8_plan), NOTHING)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"gemms": {"fp8": 2}}, "found 1 fp8, expected 2 fp8"),
        ({"gemms": {"bf16": 1}}, "found 1 fp8, expected 1 bf16"),
        ({"attentions": {"bf16": 1}}, "attentions: found none, expected 1 bf16"),
        ({"launches": [20, 30]}, "launches: found .*, expected 20 to 30"),
        ({"activation_bytes": {"base": 1}}, "activation memory: found .*, expected at most 1"),
    ],
)
def test_an_engine_that_differs_fails_with_what_was_found(fp8_plan, changes, names):
    with pytest.raises(BuildError, match=f"^small: .*{names}.*--precision bf16"):
        expectation(**changes).check("small", parse_engine(fp8_plan), NOTHING)


def test_a_component_nothing_is_known_of_fails(fp8_plan):
    with pytest.raises(BuildError, match=r"other: no expectations for fp8; known are small"):
        expectation().check("other", parse_engine(fp8_plan), NOTHING)


def test_the_activation_bound_grows_with_the_model():
    structure = Structure(30, 10, 100, 1, 1, 1, 1, 1)
    assert ActivationBound(base=5, tokens=2, tokens_ffn=3).bytes(structure) == 5 + 2 * 10 + 3 * 100


@pytest.mark.parametrize("precision", ["bf16", "fp8", "nvfp4"])
def test_the_shipped_expectations_cover_every_component(precision):
    expectations = load_expectations(precision)
    assert expectations.precision == precision
    assert set(expectations.components) == {
        *("first", "layer", "last", "conditioner", "text_encoder", "vae_first", "vae_next"),
        *("tae_first", "tae_next", "vae_encode_first", "vae_encode_next"),
    }


def test_an_unknown_precision_has_no_expectations():
    with pytest.raises(InputError, match="'int4'"):
        load_expectations("int4")
