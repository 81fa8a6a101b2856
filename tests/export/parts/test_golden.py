"""Golden vectors of real components: rounding passes with room to spare, and no wrong engine passes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray

from export.errors import ExportError
from export.graph.segments import write_segments
from export.parts.golden import write_golden
from export.parts.golden_reference import ReferenceGraph
from export.quantize.emulation import emulate_fp4, unpack_fp4
from export.quantize.formats import choose_formats, linear_names, quantize
from export.quantize.numerics import fake_linear, fold_weight, pack_fp4
from export.tolerances import GOLDEN, GOLDEN_PIXELS
from lightforcing_ref.schedule import FlowSchedule
from runtime.bundle import Golden, Segments
from runtime.bundle.golden import METADATA_KEY, GoldenCase, GoldenCases, Stored, error_of, shaped
from runtime.bundle.weights_file import WeightsFile
from tests.export.parts.narrowed import save_rounded

Arrays = dict[str, NDArray[Any]]
Change = Callable[[Arrays], None]


class Parts:
    """Components of a bundle, and their golden vectors."""

    def __init__(self, folder: Path, parts: Mapping[str, Path], segments: Segments | None = None) -> None:
        self.folder, self.parts = folder, dict(parts)
        files, self.golden = write_golden(folder, self.parts, FlowSchedule.warped(), segments=segments)
        assert files == ["golden.safetensors"]
        self.samples = WeightsFile(folder / self.golden.file)
        self.cases = GoldenCases.model_validate_json(self.samples.metadata[METADATA_KEY]).cases
        stored = {r.file for case in self.cases for r in case.inputs.values() if isinstance(r, Stored)}
        self.files = {file: WeightsFile(folder / file) for file in stored}
        self._graphs: dict[str, ReferenceGraph] = {}

    def graph(self, component: str) -> ReferenceGraph:
        if component not in self._graphs:
            scratch = self.folder / f"scratch.{component}"
            scratch.mkdir(exist_ok=True)
            self._graphs[component] = ReferenceGraph(self.parts[component], scratch)
        return self._graphs[component]

    def inputs(self, case: GoldenCase) -> Arrays:
        specs = self.graph(case.component).inputs
        return {spec.name: shaped(case.inputs[spec.name], spec, case.slots, self.files) for spec in specs}

    def judge(self, case: GoldenCase, outputs: Mapping[str, NDArray[Any]]) -> float:
        return max(
            error_of(outputs[name], expected, self.samples[f"{case.name}/{name}"])
            for name, expected in case.outputs.items()
        )

    def error(
        self, component: str, change: Change = lambda inputs: None, graph: ReferenceGraph | None = None
    ) -> float:
        """The error of a component over its cases, if what goes in is changed, or if another graph runs."""
        packed = [spec.name for spec in self.graph(component).inputs if spec.dtype == "float4_e2m1"]
        errors = []
        for case in self.cases:
            if case.component == component:
                inputs = self.inputs(case)
                change(inputs)
                if graph is not None:  # four-bit inputs of a rounded graph are what they stand for
                    inputs |= {name: unpack_fp4(inputs[name]) for name in packed}
                errors.append(self.judge(case, (graph or self.graph(component)).run(inputs)))
        return max(errors)


@pytest.fixture(scope="module")
def parts(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """Segments, conditioner, text encoder and decoder of the tiny model, with weights that are exact in bfloat16."""
    folder = tmp_path_factory.mktemp("parts")
    for name in ("step", "conditioner", "vae_first", "vae_next"):
        save_rounded(tiny_bundle / f"{name}.onnx", folder / f"{name}.onnx", ml_dtypes.bfloat16, results=False)
    for file in tiny_bundle.glob("text_encoder*"):
        shutil.copy(file, folder)
    _, section = write_segments(folder, ir.load(folder / "step.onnx"), "dense")
    names = ("first", "layer", "last", "qk_prepare", "attention", "conditioner", "text_encoder")
    return Parts(
        folder, {name: folder / f"{name}.onnx" for name in (*names, "vae_first", "vae_next")}, section
    )


@pytest.fixture(scope="module")
def whole(parts: Parts) -> Parts:
    return Parts(parts.folder, {"step": parts.folder / "step.onnx"})


def rounded(parts: Parts, component: str, tmp_path: Path, kind: Any) -> ReferenceGraph:
    save_rounded(parts.parts[component], tmp_path / "rounded.onnx", kind, results=True)
    return ReferenceGraph(tmp_path / "rounded.onnx", tmp_path)


# ---- what must pass ----


@pytest.mark.parametrize("component", ["first", "layer", "last", "qk_prepare", "attention", "conditioner"])
def test_a_run_in_bfloat16_passes_with_room_to_spare(parts: Parts, component: str, tmp_path: Path) -> None:
    assert parts.error(component) == 0.0
    error = parts.error(component, graph=rounded(parts, component, tmp_path, ml_dtypes.bfloat16))
    assert 1e-4 < error < GOLDEN["bf16"] / 2


def test_the_decoder_in_float16_passes_with_room_to_spare(parts: Parts, tmp_path: Path) -> None:
    error = parts.error("vae_first", graph=rounded(parts, "vae_first", tmp_path, np.float16))
    assert 1e-4 < error < GOLDEN_PIXELS["fp16"] / 2


def test_a_whole_forward_in_bfloat16_passes(whole: Parts, tmp_path: Path) -> None:
    error = whole.error("step", graph=rounded(whole, "step", tmp_path, ml_dtypes.bfloat16))
    assert 1e-4 < error < GOLDEN["bf16"] / 1.5
    assert whole.golden.tolerances["step"] == pytest.approx(GOLDEN["fp32"] * 1.5**0.5, abs=1e-5)


@pytest.mark.parametrize("format", ["fp8", "nvfp4"])
def test_quantized_products_in_bfloat16_pass(parts: Parts, tmp_path: Path, format: str) -> None:
    """Values next to a rounding boundary fall to either side: more than in bfloat16, less than the format's error."""
    model = ir.load(parts.folder / "step.onnx")
    quantize(model, choose_formats(linear_names(model), format))
    _, section = write_segments(tmp_path, model, "dense")
    quantized = Parts(tmp_path, {"last": tmp_path / "last.onnx"}, section)
    assert quantized.golden.tolerances == {"last": GOLDEN[format]}
    scratch = tmp_path / "rounded"
    scratch.mkdir()
    error = quantized.error("last", graph=rounded(quantized, "last", scratch, ml_dtypes.bfloat16))
    assert 5e-3 < error < GOLDEN[format] / 1.4

    weight = next(spec for spec in quantized.graph("last").inputs if spec.dtype == "float8_e4m3fn")
    wrong = quantized.error(
        "last", lambda inputs: inputs.update({weight.name: inputs[weight.name][::-1].copy()})
    )
    assert wrong > GOLDEN[format]


# ---- what must not ----


def changed(array: NDArray[Any]) -> NDArray[Any]:
    """A matrix read in the wrong order, a table or vector with its entries turned around."""
    if array.ndim == 2 and array.shape[0] > 1:
        return np.ascontiguousarray(array.T).reshape(array.shape)
    return np.ascontiguousarray(array[..., ::-1])


@pytest.mark.parametrize("component", ["first", "layer", "last", "qk_prepare", "text_encoder"])
def test_no_wrong_weight_passes(parts: Parts, component: str) -> None:
    case = next(case for case in parts.cases if case.component == component)
    weights = [name for name, recipe in case.inputs.items() if isinstance(recipe, Stored)]
    tried = 0
    for name in weights:
        array = parts.inputs(case)[name]
        if np.array_equal(changed(array), array):  # biases and gains of random weights are zeros and ones
            continue
        tried += 1
        error = parts.error(component, lambda inputs, name=name: inputs.update({name: changed(inputs[name])}))
        # A bias has little say beside a product of random weights; it shows, but among roundings only in float32.
        least = GOLDEN["bf16"] if array.ndim > 1 else 10 * GOLDEN["fp32"]
        assert error > least, f"{component}: {name} in another order has the error {error:.1e}"
    assert tried >= {"first": 3, "layer": 7, "last": 8, "qk_prepare": 0, "text_encoder": 8}[component]


def test_no_swapped_layer_passes(parts: Parts) -> None:
    layers = [case for case in parts.cases if case.component == "layer"]
    assert [case.name for case in layers] == ["layer@0", "layer@2", "layer@4"]
    other = parts.inputs(layers[1])

    def swap(inputs: Arrays) -> None:
        inputs.update({name: other[name] for name in inputs if name.startswith("weight.")})

    outputs = parts.graph("layer").run(
        {**parts.inputs(layers[0]), **{n: other[n] for n in other if "weight" in n}}
    )
    assert parts.judge(layers[0], outputs) > 5 * GOLDEN["nvfp4"]
    assert parts.error("layer", swap) > 5 * GOLDEN["nvfp4"]


ACTIVATIONS = {
    "layer": ["attention_out", "cross_k", "cross_v"],
    "last": ["attention_out", "cross_v"],
    "attention": ["q", "k", "v", "past_k", "past_v"],
    "qk_prepare": ["qkv"],
    "conditioner": ["text"],
    "text_encoder": ["hidden"],
}


@pytest.mark.parametrize(("component", "name"), [(c, n) for c, names in ACTIVATIONS.items() for n in names])
def test_no_wrong_scale_passes(parts: Parts, component: str, name: str) -> None:
    """An activation taken at twice its size, as by a scale that is applied once too often or not at all."""
    error = parts.error(component, lambda inputs: inputs.update({name: inputs[name] * np.float32(2)}))
    assert error > GOLDEN["fp8"]


@pytest.mark.parametrize("name", ["past_k", "past_v", "past_kmean", "q_mean", "k_mean"])
def test_no_stale_cache_passes(parts: Parts, name: str) -> None:
    error = parts.error("attention", lambda inputs: inputs.update({name: np.zeros_like(inputs[name])}))
    assert error > GOLDEN["bf16"]


def test_no_other_order_of_slots_passes(parts: Parts) -> None:
    def sort(inputs: Arrays) -> None:
        slots = inputs["frame_slots"]
        inputs["frame_slots"] = np.where(slots >= 0, np.arange(slots.size, dtype=np.int32), slots)

    assert parts.error("attention", sort) > GOLDEN["bf16"]


def test_no_other_step_or_chunk_passes(parts: Parts, whole: Parts) -> None:
    for component in ("first", "layer", "last"):
        error = parts.error(component, lambda inputs: inputs.update(step=np.asarray(inputs["step"] + 1)))
        assert error > GOLDEN["bf16"], component
    chunk = np.array(0, np.int32)
    assert parts.error("attention", lambda inputs: inputs.update(chunk=chunk)) > GOLDEN["bf16"]
    assert whole.error("step", lambda inputs: inputs.update(chunk=chunk)) > GOLDEN["bf16"]


@pytest.mark.parametrize("number", [0, 5, 31])
def test_no_stale_decoder_cache_passes(parts: Parts, number: int) -> None:
    name = f"cache.{number}"
    error = parts.error("vae_next", lambda inputs: inputs.update({name: np.zeros_like(inputs[name])}))
    assert error > 2e-2


@pytest.mark.parametrize("component", ["conditioner", "vae_first"])
def test_no_wrong_weight_inside_an_engine_passes(parts: Parts, component: str, tmp_path: Path) -> None:
    names = _matrices(parts.parts[component])
    for name in names[:: max(1, len(names) // 4)]:
        model = ir.load(parts.parts[component])
        value = model.graph.initializers[name]
        assert value.const_value is not None
        array = value.const_value.numpy()
        if np.array_equal(array, array[::-1]):
            continue
        value.const_value = ir.tensor(np.ascontiguousarray(array[::-1]), name=name)
        ir.save(model, tmp_path / "wrong.onnx", external_data="wrong.weights")
        error = parts.error(component, graph=ReferenceGraph(tmp_path / "wrong.onnx", tmp_path))
        assert error > 2e-2, f"{component}: {name} with its rows turned around has the error {error:.1e}"


def _matrices(path: Path) -> list[str]:
    found = []
    for name, value in ir.load(path).graph.initializers.items():
        shape = () if value.shape is None else tuple(int(dim) for dim in value.shape.numpy())
        if value.dtype == ir.DataType.FLOAT and len(shape) >= 2 and shape[0] > 1:
            found.append(name)
    return found


# ---- the rest ----


def test_case_names_tensors_and_tolerances_belong_together(parts: Parts) -> None:
    assert isinstance(parts.golden, Golden)
    assert {case.component for case in parts.cases} == set(parts.parts) == set(parts.golden.tolerances)
    assert {f"{case.name}/{output}" for case in parts.cases for output in case.outputs} == set(parts.samples)
    assert len({case.name for case in parts.cases}) == len(parts.cases)
    assert (parts.folder / "golden.safetensors").stat().st_size < 8 << 20
    assert not list(parts.folder.glob(".golden-*"))


def test_writing_twice_gives_the_same_bytes(parts: Parts) -> None:
    name = {"conditioner": parts.parts["conditioner"]}
    write_golden(parts.folder / "scratch.conditioner", name, FlowSchedule.warped())
    first = (parts.folder / "scratch.conditioner" / "golden.safetensors").read_bytes()
    write_golden(parts.folder / "scratch.conditioner", name, FlowSchedule.warped())
    assert (parts.folder / "scratch.conditioner" / "golden.safetensors").read_bytes() == first


def test_segments_without_their_section_are_refused(parts: Parts, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="need the manifest's section on segments"):
        write_golden(tmp_path, {"layer": parts.parts["layer"]}, FlowSchedule.warped())
    assert list(tmp_path.iterdir()) == []


def test_unpacking_is_the_inverse_of_packing() -> None:
    codes = torch.arange(16, dtype=torch.uint8).reshape(2, 8)
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert unpack_fp4(pack_fp4(codes).numpy()).tolist() == [values, [-value for value in values]]


@pytest.mark.parametrize("scale", [1.0, 1e-3, 300.0])
def test_emulated_fp4_is_what_the_format_says(tmp_path: Path, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 64, generator=generator) * scale
    x[3] = 0
    x[4, :16] = 0
    weight = torch.randn(32, 64, generator=generator)
    values = ir.Value(name="x", shape=ir.Shape(x.shape), type=ir.TensorType(ir.DataType.FLOAT))
    name = "model.blocks.0.ffn.0.weight"
    stored = ir.Value(
        name=name,
        shape=ir.Shape(weight.shape),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.tensor(weight.numpy(), name=name),
    )
    turned = ir.node("Transpose", [stored], {"perm": [1, 0]})
    product = ir.node("MatMul", [values, turned.outputs[0]])
    product.outputs[0].name = "y"
    product.outputs[0].shape, product.outputs[0].type = ir.Shape([24, 32]), values.type
    graph = ir.Graph(
        [values],
        product.outputs,
        nodes=[turned, product],
        initializers=[stored],
        opset_imports={"": 23},
        name="g",
    )
    model = ir.Model(graph, ir_version=11)
    quantize(model, {"blocks.0.ffn.0": "nvfp4"})
    emulate_fp4(model)
    ir.save(model, tmp_path / "g.onnx")
    (found,) = ReferenceGraph(tmp_path / "g.onnx", tmp_path).run({"x": x.numpy()}).values()
    expected = fake_linear(x, fold_weight(weight, "nvfp4"), "nvfp4").numpy()
    assert np.linalg.norm(found - expected) < 1e-6 * np.linalg.norm(expected)
