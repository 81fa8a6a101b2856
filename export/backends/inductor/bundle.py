"""The inductor backend: the reference model's parts, compiled by PyTorch ahead of time into packages.

Packages are compiled where they run: for the GPU of this machine, or, in float32, for its CPU. On a GPU the two
operators between segments are this project's kernels; on a CPU they are ONNX graphs with the operators' function
bodies, as in every segmented bundle.
"""

from __future__ import annotations

import gc
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import onnx_ir as ir
import torch
from torch import Tensor, nn

from export.errors import BuildError, InputError
from export.graph.components import TEXT_WEIGHTS, attention_form, component_of
from export.graph.modules import StepModule, merge_qkv
from export.graph.tensor_files import StoredTensor, store, write_tensors
from export.graph.tracing import attend, prepare, save_model, trace
from export.machine import find_gpus, importable
from export.parts.golden import write_vectors
from export.parts.graphs import tokenizer_part
from export.parts.kernels import FOLDER as KERNELS_FOLDER
from export.parts.kernels import kernel_arch, kernel_variants, write_kernels
from export.parts.run import Builder, Built, Run
from export.quantize.decision import refuse_without_quantization
from export.quantize.formats import choose_formats
from export.quantize.graph import KINDS
from export.quantize.numerics import fold_weight
from export.request.geometry import StepPlan
from export.request.graph_types import graph_types
from export.request.request import BuildRequest
from lightforcing_ref.checkpoint_spec import umt5_shapes
from lightforcing_ref.model import CausalWanModel
from runtime import bundle

from .components import OPERATORS, describe, operator_components
from .golden import golden_graphs
from .link import linkable_driver
from .modules import (
    Compiled,
    StepSegments,
    conditioner,
    dtype_name,
    step_segments,
    tensor_name,
    text_layer,
    vae_first,
    vae_next,
)

__all__ = ["BUILDER", "compile_package", "fp8_linears"]

WEIGHTS = "transformer.safetensors"

ValueT = TypeVar("ValueT")

_GOLDEN = "golden vectors"
_GOLDEN_SECTION = "golden.json"
"""The manifest's section on golden vectors, kept beside a build in progress."""

_CONDITIONER_KINDS = ("cross_attn.k", "cross_attn.v")
"""Linears that run once per prompt and stay in the graph's type."""


# ---- what can be built ----


def _device(request: BuildRequest) -> str:
    return "cpu" if request.target.compute_capability is None else "cuda"


def fp8_linears(request: BuildRequest, plan: StepPlan) -> frozenset[str]:
    """Kinds of the block linears that are in FP8.

    Raises:
        InputError: what is skipped differs between layers, which share one package; or it needs measured errors.
    """
    if request.precision != "fp8":
        return frozenset()
    skip = request.quantization.skip
    if "auto" in skip:
        raise InputError(
            "the inductor backend does not measure errors, so there is no --skip auto; name the linears, such as "
            "--skip '*.ffn.2'"
        )
    layers = range(plan.preset.dit.layers)
    kinds = [kind for kind in KINDS if kind not in _CONDITIONER_KINDS]
    chosen = choose_formats([f"blocks.{i}.{kind}" for i in layers for kind in kinds], "fp8", skip=skip)
    by_kind = {kind: {i for i in layers if f"blocks.{i}.{kind}" in chosen} for kind in kinds}
    uneven = [kind for kind, found in by_kind.items() if 0 < len(found) < len(layers)]
    if uneven:
        raise InputError(
            f"--skip leaves {uneven[0]} in FP8 in {len(by_kind[uneven[0]])} of {len(layers)} layers, but one package "
            f"serves them all; skip it in all (--skip '*.{uneven[0]}') or in none"
        )
    return frozenset(kind for kind, found in by_kind.items() if found)


def _check(request: BuildRequest, plan: StepPlan) -> None:
    if request.per_chunk:
        raise InputError("the inductor backend has no graph per chunk; leave --per-chunk out")
    if request.embedded:
        raise InputError(
            "the inductor backend has one package for all layers, whose weights are inputs; use --weights inputs"
        )
    if request.precision != "fp8":
        refuse_without_quantization(request)
    if request.quantization.static or request.quantization.calibration is not None:
        raise InputError(
            "the inductor backend scales activations per token; leave static activations and calibration out"
        )
    fp8_linears(request, plan)
    if plan.preset.dit.layers < 2:
        raise InputError("the model has one layer; the inductor backend needs two or more")
    if _device(request) == "cpu":
        compiler = torch._inductor.config.cpp.cxx
        names = [name for name in (compiler if isinstance(compiler, tuple) else (compiler,)) if name]
        if not any(shutil.which(name) for name in names):
            raise BuildError(
                f"PyTorch compiles for the CPU with {' or '.join(names)}, which is not installed"
            )
        return
    if request.precision == "fp32":
        raise InputError(
            f"attention on {request.target.name} is done by kernels in bf16; use --precision bf16 or fp8"
        )
    kernel_variants(request.target, plan)
    if not importable("triton"):
        raise BuildError("PyTorch compiles for a GPU with Triton, which is not installed; pip install triton")
    wanted = request.target.compute_capability
    found = ", ".join(f"{gpu.name} ({gpu.compute_capability})" for gpu in find_gpus().gpus) or "none"
    if not torch.cuda.is_available():
        raise BuildError(
            f"packages for {request.target.name} are compiled on such a GPU, but PyTorch {torch.__version__} sees none "
            f"(the driver shows: {found}); build on a machine with one, with a CUDA build of PyTorch"
        )
    major, minor = torch.cuda.get_device_capability()
    if f"{major}.{minor}" != wanted:
        raise BuildError(
            f"packages for {request.target.name} ({wanted}) are compiled on such a GPU, and this machine has "
            f"{torch.cuda.get_device_name()} ({major}.{minor}); build there, or choose --gpu for this one"
        )


# ---- compiling ----


def compile_package(module: Compiled, path: Path, device: str) -> None:
    """Compile `module`, whose compiled-in weights lie on `device`, to the package `path`.

    Raises:
        BuildError: PyTorch does not compile it.
    """
    # The wrapper only launches kernels: optimising it costs more than all kernels together and gains nothing.
    options: dict[str, Any] = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    if device == "cpu":
        options["cpp.dynamic_threads"] = True
    try:
        linking = linkable_driver() if device == "cuda" else nullcontext()
        with warnings.catch_warnings(), torch.no_grad(), linking:
            warnings.simplefilter("ignore")
            program = torch.export.export(module.eval(), module.examples(device), strict=False)
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(path), inductor_configs=options
            )
    except Exception as error:
        raise BuildError(
            f"PyTorch {torch.__version__} does not compile {path.stem!r} for {device}: {error}"
        ) from error
    finally:
        gc.collect()


def _write_packages(run: Run, modules: Mapping[str, Callable[[], Compiled]]) -> list[str]:
    folder, device = run.folder, _device(run.request)
    for done, (name, make) in enumerate(modules.items()):
        run.within(f"compiling {name}", done, len(modules))
        compile_package(make(), folder / f"{name}.pt2", device)
    return [f"{name}.pt2" for name in modules]


# ---- weights ----


def _weight_tensors(model: CausalWanModel, plan: StepPlan, linears: frozenset[str]) -> Iterable[StoredTensor]:
    """Everything that segments and operators read, under the names of `tensor_name`; the model is used up."""
    merge_qkv(model)
    state = StepModule(model, plan.spec, plan.schedule, prepare=prepare, attend=attend).state_dict()
    segments = step_segments(plan, model.dtype, linears)
    layers = plan.preset.dit.layers
    runs = [
        (segments.first, -1),
        (segments.last, layers - 1),
        *((segments.layer, i) for i in range(layers - 1)),
    ]
    names = {tensor_name(weight, layer, linears) for part, layer in runs for weight in part.weights.values()}
    names |= {tensor for binding in _operator_weights(layers) for tensor in binding.values()}

    @lru_cache(maxsize=1)  # the two tensors of a quantized weight are written one after the other
    def folded(name: str) -> tuple[Tensor, Tensor]:
        parts = fold_weight(state[name], "fp8")
        return parts.values, parts.post

    for name in sorted(names):
        stem, _, kind = name.rpartition(".")
        if kind in ("fp8", "post"):
            rows, columns = state[stem].shape
            shape = (rows, columns) if kind == "fp8" else (rows,)
            dtype = torch.float8_e4m3fn if kind == "fp8" else torch.float32
            yield store(name, shape, dtype, partial(_part, folded, stem, 0 if kind == "fp8" else 1))
        else:
            tensor = state[name]
            yield store(name, tuple(tensor.shape), tensor.dtype, partial(_same, tensor))


def _part(folded: Callable[[str], tuple[Tensor, Tensor]], name: str, index: int) -> Tensor:
    return folded(name)[index]


def _same(value: ValueT) -> ValueT:
    return value


def _operator_weights(layers: int) -> list[dict[str, str]]:
    attention = [f"model.blocks.{layer}.self_attn" for layer in range(layers)]
    return [
        {"bias": f"{a}.qkv_bias", "norm_q": f"{a}.norm_q.weight", "norm_k": f"{a}.norm_k.weight"}
        for a in attention
    ]


def _section(segments: StepSegments, layers: int, linears: frozenset[str]) -> bundle.Segments:
    def binding(part: Compiled, layer: int) -> dict[str, str]:
        return {weight: tensor_name(weight, layer, linears) for weight in part.weights.values()}

    return bundle.Segments(
        weights=WEIGHTS,
        first=binding(segments.first, -1),
        layers=tuple(binding(segments.layer, layer) for layer in range(layers - 1)),
        last=binding(segments.last, layers - 1),
        prepare=tuple(_operator_weights(layers)),
    )


# ---- operators ----


class _Operator(nn.Module):
    """One of the two operators on its own."""

    def __init__(self, operator: Callable[..., Any], attributes: Mapping[str, Any]) -> None:
        super().__init__()
        self.operator, self.attributes = operator, attributes

    def forward(self, *tensors: Tensor) -> Any:
        return self.operator(*tensors, **self.attributes)


def _write_operators(folder: Path, plan: StepPlan) -> list[str]:
    """The operators as ONNX graphs, for hosts."""
    spec, eps = plan.spec, plan.preset.dit.eps
    operators: dict[str, tuple[Callable[..., Any], Mapping[str, Any]]] = {
        "qk_prepare": (prepare, {**spec.prepare_attributes(), "eps": eps}),
        "attention": (attend, spec.attend_attributes()),
    }
    files = []
    for name, component in operator_components(plan, torch.float32).items():
        slots = torch.export.Dim("slots", min=1)
        examples, dynamic = [], []
        for item in component.inputs:
            shape = [2 if dim == "slots" else int(dim) for dim in item.shape]
            examples.append(torch.zeros(shape, dtype=getattr(torch, item.dtype)))
            dynamic.append({0: slots} if "slots" in item.shape else None)
        graph = trace(
            _Operator(*operators[name]),
            tuple(examples),
            input_names=[item.name for item in component.inputs],
            output_names=[item.name for item in component.outputs],
            dynamic_shapes=(tuple(dynamic),) if name == "attention" else None,
            attention=attention_form(plan),
            metadata={"lightforcing.component": name},
        )
        for value in graph.graph.inputs:
            if value.shape is not None and value.shape.rank() and not isinstance(value.shape[0], int):
                value.shape[0] = ir.SymbolicDim("slots")
        save_model(graph, folder / f"{name}.onnx", f"{name}.constants")
        files += [f"{name}.onnx", *(c for c in (f"{name}.constants",) if (folder / c).exists())]
    return files


# ---- the build ----


def _parts(request: BuildRequest, plan: StepPlan) -> Mapping[str, float]:
    parts = {"tokenizer": 1.0, "text encoder": 60.0, "video decoder": 60.0, "conditioner": 20.0}
    parts |= {"transformer": 60.0, "weights": 60.0}
    parts |= {"operators": 10.0} if _device(request) == "cpu" else {"kernels": 30.0}
    return parts | {_GOLDEN: 60.0}


def _build(run: Run) -> Built:
    request, plan, models = run.request, run.plan, run.models
    device, types, linears = _device(request), graph_types(request), fp8_linears(request, plan)
    segments = step_segments(plan, types.transformer, linears)
    text = text_layer(plan, types.text)

    def write_text(folder: Path) -> list[str]:
        makers, shapes = models.weights.text_tensors(), umt5_shapes(plan.preset.text)
        tensors = [store(n, shapes[n], types.text, make) for n, make in makers.items()]
        write_tensors(folder / TEXT_WEIGHTS, tensors, run.within)
        return [*_write_packages(run, {"text_encoder": lambda: text.to(device)}), TEXT_WEIGHTS]

    def write_decoder(folder: Path) -> list[str]:
        decoder = models.decoder(types.decoder).to(device)
        try:
            return _write_packages(
                run,
                {"vae_first": lambda: vae_first(decoder, plan), "vae_next": lambda: vae_next(decoder, plan)},
            )
        finally:
            decoder.cpu()

    def write_conditioner(folder: Path) -> list[str]:
        model = models.dit(types.transformer).to(device)
        try:
            return _write_packages(run, {"conditioner": lambda: conditioner(model)})
        finally:
            model.cpu()

    def write_weights(folder: Path) -> list[str]:
        tensors = _weight_tensors(models.take_dit(types.transformer), plan, linears)
        write_tensors(folder / WEIGHTS, tensors, run.within)
        return [WEIGHTS]

    entries = [
        *tokenizer_part(run),
        *run.part("text encoder", write_text),
        *run.part("video decoder", write_decoder),
        *run.part("conditioner", write_conditioner),
        *run.part(
            "transformer",
            lambda folder: _write_packages(
                run, {name: partial(_same, part) for name, part in segments.by_name.items()}
            ),
        ),
        *run.part("weights", write_weights),
    ]
    kernels = None
    if device == "cpu":
        entries += run.part("operators", lambda folder: _write_operators(folder, plan))
    else:
        entries += run.part(
            "kernels", lambda folder: write_kernels(folder, request.target, plan, run.within)[0]
        )
        kernels = bundle.Kernels(folder=KERNELS_FOLDER, arch=f"sm_{kernel_arch(request.target)}")
    components = describe(request, models.decoder(types.decoder), linears)
    if device == "cpu":
        components |= {name: component_of(run.folder, f"{name}.onnx") for name in OPERATORS}
    section = _section(segments, plan.preset.dit.layers, linears)
    golden, written = _golden(run, components, section, linears)
    return Built(
        components=components,
        files=[*entries, *written],
        graphs={},
        vae_dtype=dtype_name(types.decoder),
        segments=section,
        library=bundle.Library(name="torch", version=torch.__version__),
        kernels=kernels,
        quantization=_quantization(plan, linears) if linears else None,
        golden=golden,
    )


def _golden(
    run: Run,
    components: Mapping[str, bundle.Component],
    section: bundle.Segments,
    linears: frozenset[str],
) -> tuple[bundle.Golden, list[bundle.FileEntry]]:
    def write(folder: Path) -> list[str]:
        graphs = golden_graphs(run.plan, run.request, run.models, components, linears)
        files, golden = write_vectors(folder, graphs.items(), section, progress=run.within, total=len(graphs))
        (folder / _GOLDEN_SECTION).write_text(golden.model_dump_json())
        return [*files, _GOLDEN_SECTION]

    entries = run.part(_GOLDEN, write)
    golden = bundle.Golden.model_validate_json((run.folder / _GOLDEN_SECTION).read_text())
    return golden, [entry for entry in entries if entry.path != _GOLDEN_SECTION]


def _quantization(plan: StepPlan, linears: frozenset[str]) -> bundle.Quantization:
    layers = range(plan.preset.dit.layers)
    return bundle.Quantization(
        activations="dynamic",
        formats={f"blocks.{i}.{kind}": "fp8" for i in layers for kind in KINDS if kind in linears},
        errors={},
        skipped=tuple(f"blocks.{i}.{kind}" for i in layers for kind in KINDS if kind not in linears),
    )


BUILDER = Builder(parts=_parts, build=_build, check=_check, golden=False)
