"""The inductor backend on this machine's CPU: real packages, in a bundle, against the reference."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from export.backends.inductor import bundle as inductor
from export.backends.inductor.bundle import BUILDER
from export.backends.inductor.components import describe, step_components
from export.backends.inductor.golden import golden_graphs
from export.backends.inductor.modules import Compiled, step_segments
from export.backends.inductor.packages import compile_package, fp8_linears
from export.build import _manifest
from export.compare.reference import Reference, step_feeds
from export.errors import BuildError, InputError
from export.graph.components import TEXT_WEIGHTS, component_of
from export.graph.tensor_files import StoredTensor, store, write_tensors
from export.parts.golden import write_vectors
from export.parts.kernels import SELECTS
from export.parts.run import Built, Models
from export.quantize.numerics import relative_error
from export.request.geometry import StepPlan
from export.request.methods import operator_of
from export.request.request import BuildRequest, QuantizationRequest
from export.request.targets import Variant, load_target, load_variant
from export.request.weights import Weights
from lightforcing_ref.attention import hsa_attention, hsa_selection
from lightforcing_ref.cache import AttentionSpec
from lightforcing_ref.checkpoint.spec import umt5_shapes
from lightforcing_ref.config import PRESETS, Preset
from lightforcing_ref.rollout import Rollout
from lightforcing_ref.schedule import FlowSchedule
from lightforcing_ref.sparsity import kept_blocks
from runtime.bundle import Bundle, Kernels, Library, dtype_name, file_entry, load_bundle, write_manifest
from runtime.bundle.golden import GoldenVectors
from runtime.cuda.inductor import InductorLibrary
from runtime.errors import BundleError, EngineError
from runtime.host.inductor import InductorGraph
from runtime.host.runner import HostRunner
from runtime.pipeline import Pipeline
from runtime.verify.dry_run import dry_run
from tests.conftest import build
from tests.runtime.device_bundles import CACHE_KERNELS, write_kernels

# Compiling takes a minute on a quiet core, and much longer beside other work.
pytestmark = pytest.mark.timeout(1800)

TINY = PRESETS["tiny"]
EMBEDDING = np.random.default_rng(4).standard_normal((64, 64), dtype=np.float32)
ALL_LINEARS = frozenset({"self_attn.qkv", "self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2"})


def request_for(target: str = "cpu", preset: Preset = TINY, **changes: Any) -> BuildRequest:
    chosen = load_target(target)
    settings: dict[str, Any] = {
        "target": chosen,
        "variant": load_variant("short"),
        "weights": Weights(preset, seed=0),
        "height": preset.height,
        "width": preset.width,
        "backend": "inductor",
        "precision": "fp32" if target == "cpu" else "bf16",
        "out": Path("nowhere"),
        "name": "x",
    }
    return BuildRequest(**settings | changes)


@pytest.fixture(scope="module")
def plan() -> StepPlan:
    return request_for().plan


@pytest.fixture(scope="module")
def mixed_bundle(tiny_bundle: Path, plan: StepPlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The transformer as packages, everything else as in `tiny_bundle`: a fraction of what a whole build takes."""
    folder = tmp_path_factory.mktemp("inductor") / "mixed"
    folder.mkdir()
    manifest = load_bundle(tiny_bundle).manifest
    kept = [e.path for e in manifest.files if not e.path.startswith(("step", "clean"))]
    for name in kept:
        shutil.copyfile(tiny_bundle / name, folder / name)
    segments = step_segments(plan, torch.float32)
    # Looking for vector instructions takes longer than compiling without them.
    with torch._inductor.config.patch({"cpp.vec_isa_ok": False}):
        for name, part in segments.by_name.items():
            compile_package(part, folder / f"{name}.pt2", "cpu")
    files = [*kept, *(f"{name}.pt2" for name in segments.by_name)]
    files += inductor._write_operators(folder, plan)
    write_tensors(
        folder / inductor.WEIGHTS,
        weight_tensors(plan, frozenset()),
    )
    components = {name: c for name, c in manifest.components.items() if not name.startswith("step_chunk")}
    components |= step_components(plan, segments, torch.float32)
    components |= {name: part.component(f"{name}.pt2") for name, part in segments.by_name.items()}
    components |= {name: component_of(folder, f"{name}.onnx") for name in ("qk_prepare", "attention")}
    changes = {
        "backend": "inductor",
        "library": Library(name="torch", version=torch.__version__),
        "components": components,
        "segments": inductor._section(plan, TINY.vae, frozenset()).model_copy(update={"outside": {}}),
        "files": tuple(file_entry(folder, name) for name in [*files, inductor.WEIGHTS]),
    }
    write_manifest(folder, manifest.model_copy(update=changes))
    return folder


def weight_tensors(plan: StepPlan, linears: frozenset[str]) -> list[StoredTensor]:
    """What the weights file of the tiny model holds, in float32."""
    weights = Weights(TINY, 0)
    model, decoder = weights.dit(torch.float32), weights.vae_decoder()
    return list(inductor._weight_tensors(model, decoder, plan, linears))


def frames(bundle: Path, chunks: int = 2, **options: object) -> np.ndarray:
    with (
        Pipeline.load(bundle, warmup=False, threads=1) as pipeline,
        pipeline.session(embedding=EMBEDDING, seed=2, **options) as session,
    ):
        return np.concatenate([chunk.frames for chunk in session.stream(chunks=chunks)])


# ---- packages compute what the reference computes ----


def test_every_forward_agrees_with_the_reference(mixed_bundle: Path) -> None:
    """Each kind of forward of two chunks, on inputs of a reference rollout; unused slots are NaN."""
    bundle = load_bundle(mixed_bundle)
    manifest = bundle.manifest
    runner = HostRunner(bundle, threads=1)
    reference = Reference.of(manifest)
    module = reference.step_module(manifest)
    last = manifest.schedule.denoise_steps
    for chunk, index, feed in step_feeds(reference, manifest, chunks=2):
        if index not in (0, 3, last):
            continue
        wanted = run_reference(module, feed)
        name = "clean" if index == last else "step"
        outputs = runner.run(name, feed)
        assert set(outputs) == {spec.name for spec in manifest.components[name].outputs}
        for output, found in outputs.items():
            error = relative_error(torch.from_numpy(found), torch.from_numpy(wanted[output]))
            assert error < 1e-4, (chunk, index, output, error)


def run_reference(module: nn.Module, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs of `StepModule` by name."""
    layers = module.model.config.layers
    single = [torch.from_numpy(feed[name]) for name in module.input_names[:7]]
    stems = ("cross_k", "cross_v", "past_k", "past_v", "past_kmean")
    grouped = [[torch.from_numpy(feed[f"{stem}.{i}"]) for i in range(layers)] for stem in stems]
    with torch.no_grad():
        following, x0, k, v, kmean = module(*single, *grouped)
    values = [following, x0, *k, *v, *kmean]
    return {name: value.numpy() for name, value in zip(module.output_names, values, strict=True)}


def test_the_rollout_equals_onnx_runtimes(mixed_bundle: Path, tiny_bundle: Path) -> None:
    found, wanted = frames(mixed_bundle), frames(tiny_bundle)
    assert found.shape == (21, 128, 128, 3)
    assert np.abs(found.astype(int) - wanted.astype(int)).max() <= 1
    assert np.array_equal(found, frames(mixed_bundle))  # the same seed, the same bits


def test_one_package_serves_all_layers_and_holds_no_weights(plan: StepPlan) -> None:
    segments = step_segments(plan, torch.float32)
    stored = {t.name: t.shape for t in weight_tensors(plan, frozenset())}
    section = inductor._section(plan, TINY.vae, frozenset())
    for part in segments.by_name.values():
        assert len(part.weights) == sum(1 for _ in part.body.parameters())
    bound = [section.first, *section.layers, section.last, *section.prepare, *section.outside.values()]
    assert {tensor for row in bound for tensor in row.values()} == set(stored)
    shapes = {spec.name: spec.shape for spec in segments.layer.inputs}
    for row in section.layers:
        assert {name: stored[tensor] for name, tensor in row.items()} == {name: shapes[name] for name in row}


# ---- what is asked for ----


def test_what_is_skipped_is_skipped_in_all_layers() -> None:
    def linears(*skip: str) -> frozenset[str]:
        request = request_for("h200", precision="fp8", quantization=QuantizationRequest(skip=skip))
        return fp8_linears(request, request.plan)

    assert linears() == ALL_LINEARS
    assert linears("*.ffn.2", "*.cross_attn.q") == ALL_LINEARS - {"ffn.2", "cross_attn.q"}
    with pytest.raises(InputError, match="one package serves them all"):
        linears("blocks.0.*")
    with pytest.raises(InputError, match="matches none"):
        linears("*.ffn.7")
    with pytest.raises(InputError, match="does not measure"):
        linears("auto")


# ---- what is refused ----


def test_packages_for_a_gpu_need_a_cuda_build_of_pytorch() -> None:
    request = request_for("h200")
    if torch.version.cuda is not None:
        BUILDER.check(request, request.plan)
        return
    with pytest.raises(BuildError, match="compiled by a CUDA build of PyTorch"):
        BUILDER.check(request, request.plan)


def test_kernels_decide_what_a_gpu_computes_in() -> None:
    request = request_for("h200", precision="fp32")
    with pytest.raises(InputError, match="--precision bf16 or fp8"):
        BUILDER.check(request, request.plan)


FP8 = {"target": "h200", "precision": "fp8"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"embedded": True}, "one package for all layers"),
        ({"per_chunk": True}, "no graph per chunk"),
        ({"quantization": QuantizationRequest(static=True)}, "static is for quantized linears"),
        ({"quantization": QuantizationRequest(calibration=Path("c.json"))}, "--calibration is for quantized"),
        (
            {"quantization": QuantizationRequest(skip=("*.ffn.2",))},
            "--skip is for quantized linears, and fp32",
        ),
        ({**FP8, "quantization": QuantizationRequest(static=True)}, "per token"),
        ({**FP8, "quantization": QuantizationRequest(calibration=Path("c.json"))}, "per token"),
        ({"preset": replace(TINY, dit=replace(TINY.dit, layers=1))}, "two or more"),
    ],
)
def test_requests_that_make_no_sense_are_refused(changes: dict[str, Any], reason: str) -> None:
    request = request_for(**changes)
    with pytest.raises(InputError, match=reason):
        BUILDER.check(request, request.plan)


def with_library(bundle: Bundle, library: Library | None) -> Bundle:
    return replace(bundle, manifest=bundle.manifest.model_copy(update={"library": library}))


def test_packages_of_another_pytorch_are_refused(mixed_bundle: Path) -> None:
    bundle = load_bundle(mixed_bundle, verify=False)
    other = with_library(bundle, Library(name="torch", version="2.3.1+cu121"))
    with pytest.raises(
        EngineError, match=r"compiled by PyTorch 2\.3\.1\+cu121.*" + torch.__version__.split("+")[0]
    ):
        InductorGraph(other, "layer", 1)
    for library in (None, Library(name="tensorrt", version="11.4")):
        with pytest.raises(BundleError, match="rebuild"):
            InductorGraph(with_library(bundle, library), "layer", 1)
    with pytest.raises(BundleError, match=r"ends in \.pt2"):
        InductorGraph(bundle, "attention", 1)


def test_arrays_of_another_shape_never_reach_compiled_code(mixed_bundle: Path) -> None:
    graph = InductorGraph(load_bundle(mixed_bundle, verify=False), "first", 1)
    inputs = {n: np.zeros([int(d) for d in s.shape], s.dtype) for n, s in graph.inputs.items()}
    outputs = {n: np.zeros([int(d) for d in s.shape], s.dtype) for n, s in graph.outputs.items()}
    graph.run(graph.bind(inputs, outputs))
    for bad in (
        np.zeros((16, 3, 16, 8), np.float32),
        np.zeros((16, 3, 16, 16)),
        np.zeros((16, 3, 16, 32), np.float32)[..., ::2],
    ):
        with pytest.raises(EngineError, match="'latent' as a contiguous float32"):
            graph.bind(inputs | {"latent": bad}, outputs)
    with pytest.raises(BundleError, match="does not know"):
        graph.bind(inputs, {})


def test_a_bundle_of_onnx_graphs_imports_no_pytorch(tiny_bundle: Path) -> None:
    code = (
        "import sys\nfrom runtime import Pipeline\n"
        f"with Pipeline.load({str(tiny_bundle)!r}, warmup=False, threads=1) as pipe, pipe.session('x') as session:\n"
        "    next(session.stream(chunks=1))\n"
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr


# ---- a bundle for a GPU, as far as it goes without one ----


def linear_variant() -> Variant:
    """SLA with its linear branch, whose projections are weights of attention."""
    document = load_variant("short").model_dump() | {"attention": {"policy": "sla", "linear": True}}
    return Variant.model_validate(document)


@pytest.mark.parametrize(
    ("precision", "variant"),
    [("bf16", load_variant("short")), ("fp8", load_variant("long")), ("bf16", linear_variant())],
    ids=("short", "long", "sla-linear"),
)
def test_a_gpu_bundle_can_be_executed_as_described(precision: str, variant: Variant, tmp_path: Path) -> None:
    """Every tensor of every forward has a place, the type, and the shape that package, weights and kernels want."""
    chosen = variant.model_copy(update={"block": TINY.block})
    request = request_for("rtx5090", precision=precision, variant=chosen, with_encoder=precision == "fp8")
    plan, linears, models = request.plan, fp8_linears(request, request.plan), Models(request.weights)
    components = describe(request, linears)
    assert components["qk_prepare"].file is None
    encoder = request.weights.vae_encoder(torch.float16) if request.with_encoder else None
    shapes = umt5_shapes(TINY.text)
    write_tensors(
        tmp_path / TEXT_WEIGHTS,
        [store(n, shapes[n], torch.bfloat16, make) for n, make in request.weights.text_tensors().items()],
    )
    (tmp_path / "tokenizer.json").write_text("{}")
    files = [TEXT_WEIGHTS, "tokenizer.json", inductor.WEIGHTS]
    for component in components.values():
        if component.file is not None:
            with zipfile.ZipFile(tmp_path / component.file, "w") as archive:
                archive.writestr("name", component.file)
            files.append(component.file)
    write_tensors(
        tmp_path / inductor.WEIGHTS,
        inductor._weight_tensors(
            models.take_dit(torch.bfloat16), models.decoder(torch.float16), plan, linears, encoder
        ),
    )
    selects = SELECTS[operator_of(plan.variant.attention)]
    files += write_kernels(tmp_path / "kernels", kernels=(*CACHE_KERNELS, *selects))
    section = inductor._section(plan, TINY.vae, linears, TINY.vae if request.with_encoder else None)
    graphs = golden_graphs(plan, request, components, linears)
    assert graphs["layer"].precision == precision
    quick = [(name, graph) for name, graph in graphs.items() if not name.startswith("vae")]
    written, golden = write_vectors(tmp_path, quick, FlowSchedule.warped(), section)
    files += written
    built = Built(
        components=components,
        files=[file_entry(tmp_path, name) for name in files],
        graphs={},
        segments=section,
        library=Library(name="torch", version=torch.__version__),
        kernels=Kernels(folder="kernels", arch="sm_120", driver=570),
        golden=golden,
    )
    run = SimpleNamespace(request=request, plan=plan, models=models)
    write_manifest(tmp_path, _manifest(run, built, {}))
    report = dry_run(load_bundle(tmp_path), sessions=2)
    assert report.checked_runs > 0
    assert not report.unbound
    # Golden vectors fit the components' inputs and outputs, in the types of a GPU.
    assert {case.component for case in GoldenVectors(load_bundle(tmp_path)).cases} == {n for n, _ in quick}


def test_without_a_gpu_the_library_says_so(mixed_bundle: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(EngineError, match="sees none"):
        InductorLibrary(load_bundle(mixed_bundle, verify=False), 0)


# ---- the work does not depend on the weights ----


def selected_counts(seed: int, chunks: int = 3) -> list[torch.Tensor]:
    """How many key blocks each query block of each attention call of a rollout sees."""
    plan = request_for().plan
    counts = []

    def attend(q, k, v, q_mean, k_mean, past_k, past_v, past_kmean, frame_slots, chunk, **attributes):
        slots = frame_slots[frame_slots >= 0].long()
        spec: AttentionSpec = plan.spec
        selected = hsa_selection(
            q_mean,
            torch.cat((past_kmean[slots], k_mean)),
            past_frames=slots.numel(),
            chunk=int(chunk),
            hsa=spec.hsa,
            keep_q20=spec.keep_q20,
        )
        counts.append(selected.sum(-1))
        return hsa_attention(
            q, k, v, q_mean, k_mean, past_k, past_v, past_kmean, frame_slots, chunk, **attributes
        )

    def noise(chunk: int, step: int) -> torch.Tensor:
        return torch.randn((16, 3, 16, 16), generator=torch.Generator().manual_seed(100 * chunk + step))

    text = torch.from_numpy(EMBEDDING) * (1 + 10 * seed)
    rollout = Rollout(Weights(TINY, seed).dit(torch.float32), plan.spec, text, noise, (8, 8), attend=attend)
    list(rollout.stream(chunks))
    return counts


def test_attention_statistics_do_not_change_the_work() -> None:
    """Whatever the weights, every query block of a chunk sees as many key blocks as the table says."""
    plan = request_for().plan
    found = [selected_counts(seed) for seed in (0, 1, 2)]
    assert len({len(counts) for counts in found}) == 1
    blocks = plan.geometry.k_blocks
    allowed = {3 * blocks, *(kept_blocks(plan.spec.keep_q20, c, (3 * c + 3) * blocks) for c in (1, 2))}
    for calls in zip(*found, strict=True):
        values = {int(value) for counts in calls for value in counts.unique()}
        assert len(values) == 1
        assert values <= allowed


# ---- a whole build ----


@pytest.fixture(scope="module")
def whole_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("inductor"), "short", backend="inductor", with_encoder=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_bundle_built_by_the_command_runs_by_itself(whole_bundle: Path, tiny_bundle: Path) -> None:
    manifest = load_bundle(whole_bundle).manifest
    assert (manifest.backend, manifest.library) == (
        "inductor",
        Library(name="torch", version=torch.__version__),
    )
    packaged = {"first", "layer", "last", "conditioner", "text_encoder", "vae_first", "vae_next"}
    packaged |= {"vae_encode_first", "vae_encode_next"}
    assert {name for name, c in manifest.components.items() if (c.file or "").endswith(".pt2")} == packaged
    assert manifest.components.keys() >= load_bundle(tiny_bundle).manifest.components.keys() & {
        "step",
        "clean",
    }
    assert np.abs(frames(whole_bundle).astype(int) - frames(tiny_bundle).astype(int)).max() <= 1
    start = np.random.default_rng(0).integers(0, 256, (9, 128, 128, 3)).astype(np.uint8)
    started = [frames(folder, start=start) for folder in (whole_bundle, tiny_bundle)]
    assert np.abs(started[0].astype(int) - started[1].astype(int)).max() <= 1
    with Pipeline.load(whole_bundle, threads=1) as found, Pipeline.load(tiny_bundle, threads=1) as wanted:
        a, b = (torch.from_numpy(pipe.embed("a red fox")) for pipe in (found, wanted))
    assert relative_error(a, b) < 1e-4


@pytest.mark.slow
def test_an_fp8_segment_compiles(plan: StepPlan, tmp_path: Path) -> None:
    part = step_segments(plan, torch.float32, ALL_LINEARS).layer
    compile_package(part, tmp_path / "layer.pt2", "cpu")
    loader = torch._inductor.aoti_load_package(str(tmp_path / "layer.pt2"), run_single_threaded=True).loader
    tensors = example_values(part)
    eager = [tensor.clone() for tensor in tensors]
    with torch.no_grad():
        part(*eager)
    loader.run(tensors)
    for found, wanted in zip(tensors[-2:], eager[-2:], strict=True):
        assert (
            relative_error(found, wanted) < 1e-2
        )  # values next to a rounding boundary may fall to either side


def example_values(part: Compiled) -> list[torch.Tensor]:
    torch.manual_seed(0)
    values = []
    for spec in (*part.inputs, *part.outputs):
        dtype = getattr(torch, spec.dtype)
        drawn = torch.randn(spec.shape) * (1 if spec.name in ("x", "attention_out") else 0.1)
        values.append((drawn.abs() if spec.name.endswith("post") else drawn).to(dtype))
    return values


def test_types_have_the_manifests_names() -> None:
    assert [dtype_name(t) for t in (torch.float32, torch.float8_e4m3fn, torch.bfloat16)] == [
        "float32",
        "float8_e4m3fn",
        "bfloat16",
    ]
