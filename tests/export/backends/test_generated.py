"""What packages for a GPU say of themselves, read from the code that Inductor wrote."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from export.backends.inductor.generated import GeneratedCodeError, Launch, parse_wrapper, read_package
from export.backends.inductor.modules import step_segments
from export.backends.inductor.packages import fp8_linears
from export.cli.main import main
from export.errors import InputError
from export.estimate.built import built_traffic
from export.estimate.layer import layer_launches
from export.estimate.roofline import Workload
from export.request.plan import PlanRequest
from export.request.request import BuildRequest
from export.request.targets import load_target, load_variant
from export.request.weights import Weights
from lightforcing_ref.config import PRESETS
from runtime.bundle import Bundle, Component, Target, load_bundle

torch = pytest.importorskip("torch")

CODE = Path(__file__).with_name("layer_wrapper.txt").read_text()
"""Of the segment `layer` of wan-1.3b at 512x768 in fp8, compiled for sm_90 by PyTorch 2.11 and Triton 3.6; what the
reader does not look at is cut out."""

STREAM = 3 * 1536 * 1536
FFN = 3 * 1536 * 8960
SCALES = 4 * 3 * 1536
SMALL = 300_000
"""Bytes of a kernel's parameters: rows of modulation tables, biases, norms."""


@pytest.fixture(scope="module")
def component() -> Component:
    preset = PRESETS["wan-1.3b"]
    request = BuildRequest(
        load_target("h200"), load_variant("hopper"), Weights(preset, seed=0), 512, 768, "inductor", "fp8",
        Path("nowhere"), "x",
    )  # fmt: skip
    return step_segments(request.plan, torch.bfloat16, fp8_linears(request, request.plan)).layer.component(
        "layer.pt2"
    )


def moved(launches: tuple[Launch, ...]) -> int:
    return sum(launch.nbytes for launch in launches if launch.is_generated)


def test_every_launch_of_a_layer_is_read_with_its_bytes(component: Component) -> None:
    """By hand, from the shapes: bf16 two bytes, fp8 one and a scale for each token; three float32 intermediates."""
    launches = parse_wrapper(CODE, component)
    assert [launch.name for launch in launches if not launch.is_generated] == [
        "_scaled_mm_out", "_scaled_mm_out", "_scaled_dot_product_cudnn_attention", *["_scaled_mm_out"] * 4,
    ]  # fmt: skip
    expected = [
        ("quantize attention", 2 * STREAM + STREAM + SCALES),
        ("residual, norm", 4 * STREAM + 2 * STREAM + 4 * STREAM + STREAM + SCALES),
        ("norm of cross q", 4 * STREAM),
        ("quantize cross-attention", 3 * STREAM + SCALES),
        ("residual, norm, modulation", 4 * STREAM + 4 * STREAM + STREAM + SCALES),
        ("GELU", 2 * FFN + FFN + SCALES),
        # Reads a second time what the pass before could have kept, and writes the stream twice.
        ("residual, norm, modulation", 6 * STREAM + 4 * STREAM + 4 * STREAM + STREAM + SCALES),
        ("copy of q, k, v", 12 * STREAM),
    ]
    generated = [launch for launch in launches if launch.is_generated]
    for launch, (name, nbytes) in zip(generated, expected, strict=True):
        assert 0 <= launch.nbytes - nbytes < SMALL, name
    wide = [operand.dtype for launch in generated for operand in launch.outputs if operand.elements == STREAM]
    assert wide.count("float32") == 3


def test_what_is_not_known_is_refused(component: Component) -> None:
    with pytest.raises(GeneratedCodeError, match="no function run_impl"):
        parse_wrapper("int main() {}", component)
    with pytest.raises(GeneratedCodeError, match="'buf1' of type 'fp8e4nv', which is not known"):
        parse_wrapper(
            CODE.replace("&buf1_handle", "&other_handle").replace("RAIIAtenTensorHandle buf1(", "("),
            component,
        )
    with pytest.raises(GeneratedCodeError, match="unlike its definition"):
        parse_wrapper(
            CODE.replace("static inline void call_triton_red", "static inline void call_other"), component
        )
    with pytest.raises(GeneratedCodeError, match="used as a shape and not declared"):
        parse_wrapper(CODE.replace("int_array_0[] =", "int_array_900[] ="), component)


def package(path: Path, code: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{path.stem}/data/aotinductor/model/x.wrapper.cpp", code)
    return path


def test_a_package_without_its_code_is_refused(tmp_path: Path, component: Component) -> None:
    assert moved(read_package(package(tmp_path / "a.pt2", CODE), component)) == moved(
        parse_wrapper(CODE, component)
    )
    with zipfile.ZipFile(tmp_path / "b.pt2", "w") as archive:
        archive.writestr("b/nothing", "")
    with pytest.raises(GeneratedCodeError, match=r"b\.pt2 holds 0 wrappers"):
        read_package(tmp_path / "b.pt2", component)


def convolution(image_strides: str, weight_strides: str) -> str:
    """As PyTorch 2.11 writes it: the image in a buffer, the weight a view of an input."""
    view = (
        "wrap_with_raii_handle_if_needed(reinterpret_tensor_wrapper(arg0_1, 5, int_array_1, int_array_4, 0L))"
    )
    return f"""void AOTInductorModel::run_impl(
    static constexpr int64_t int_array_1[] = {{24L, 24L, 3L, 3L, 3L}};
    static constexpr int64_t int_array_2[] = {{1L, 24L, 6L, 512L, 768L}};
    static constexpr int64_t int_array_3[] = {{{image_strides}}};
    static constexpr int64_t int_array_4[] = {{{weight_strides}}};
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(5, int_array_2, int_array_3, cached_torch_dtype_float16, \
cached_torch_device_type_cuda, this->device_idx_, &buf1_handle));
    auto buf2 = std::move(buf1);  // reuse
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_convolution(buf2, {view}, nullptr, 0, &buf3_handle));
"""


LAST, SECOND = "56623104L, 1L, 9437184L, 18432L, 24L", "56623104L, 2359296L, 393216L, 768L, 1L"
WEIGHT_LAST, WEIGHT_SECOND = "648L, 1L, 216L, 72L, 24L", "648L, 27L, 9L, 3L, 1L"


@pytest.mark.parametrize(
    ("image", "weight", "copies"),
    [(LAST, WEIGHT_LAST, False), (SECOND, WEIGHT_LAST, True), (LAST, WEIGHT_SECOND, True)],
)
def test_a_convolution_tells_whether_the_library_copies_for_it(
    image: str, weight: str, copies: bool, component: Component
) -> None:
    (launch,) = parse_wrapper(convolution(image, weight), component)
    assert (launch.name, launch.is_generated, launch.copies_images) == ("convolution", False, copies)


def test_a_bundles_traffic_is_its_packages(tmp_path: Path, tiny_bundle: Path, component: Component) -> None:
    bundle = load_bundle(tiny_bundle, verify=False)
    changes = {
        "backend": "inductor",
        "target": Target(name="h200", compute_capability="9.0"),
        "components": {"layer": component, "qk_prepare": component.model_copy(update={"file": None})},
    }
    package(tmp_path / "layer.pt2", CODE)
    built = replace(bundle, root=tmp_path, manifest=bundle.manifest.model_copy(update=changes))
    assert isinstance(built, Bundle)
    assert built_traffic(built) == {"layer": moved(parse_wrapper(CODE, component))}
    with pytest.raises(InputError, match="backend onnxruntime on cpu, whose engines do not tell"):
        built_traffic(bundle)


def test_a_layer_of_packages_is_listed_launch_by_launch(
    tmp_path: Path, tiny_bundle: Path, component: Component
) -> None:
    """What a library's call moves is not told, and stands as it is planned."""
    bundle = load_bundle(tiny_bundle, verify=False)
    changes = {
        "backend": "inductor",
        "target": Target(name="h200", compute_capability="9.0"),
        "components": {"layer": component},
    }
    package(tmp_path / "layer.pt2", CODE)
    built = replace(bundle, root=tmp_path, manifest=bundle.manifest.model_copy(update=changes))
    preset = PRESETS["wan-1.3b"]
    workload = Workload(PlanRequest(load_target("h200"), load_variant("hopper"), preset, 512, 768, "fp8"))
    prepare, *others = layer_launches(built, workload, 6)
    assert prepare.name == "prepare"
    assert [launch.name for launch in others if launch.is_product] == [
        "attend", "self_attn.o", "cross_attn.q", "cross-attention", "cross_attn.o", "ffn.0", "ffn.2", "self_attn.qkv",
    ]  # fmt: skip
    passes = [launch for launch in others if launch.work is not None and not launch.is_product]
    assert [launch.before for launch in passes] == [
        "self_attn.o", "cross_attn.q", "cross-attention", "cross_attn.o", "ffn.0", "ffn.2", "self_attn.qkv", "prepare",
    ]  # fmt: skip
    assert sum(launch.work.bytes for launch in passes) == moved(parse_wrapper(CODE, component))
    assert all("triton_" not in launch.name for launch in passes)
    with pytest.raises(InputError, match="backend onnxruntime on cpu and no engine of a layer that tells"):
        layer_launches(bundle, workload, 6)


def test_plan_takes_bundles_of_what_is_planned_alone(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--gpu", "h200", "--preset", "wan-1.3b", "--bundle", str(tiny_bundle)]) == 2
    assert "is of tiny 128x128 in fp32, and wan-1.3b 512x768 in fp8 is planned" in capsys.readouterr().err
    assert main(["plan", "--preset", "tiny", "--bundle", str(tiny_bundle)]) == 2
    assert "leave --bundle out" in capsys.readouterr().err
    assert main(["plan", "--preset", "tiny", "--layer"]) == 2
    assert "name it with --bundle" in capsys.readouterr().err
