"""The inductor backend: the reference model's parts, compiled by PyTorch ahead of time into packages.

Packages are compiled where they run: for the GPU of this machine, or, in float32, for its CPU. On a GPU the two
operators between segments are this project's kernels; on a CPU they are ONNX graphs with the operators' function
bodies, as in every segmented bundle.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import onnx_ir as ir
import torch
from torch import Tensor, nn

import lightforcing_ref
import plugins
from export import graph
from export.errors import BuildError, InputError
from export.graph.components import TEXT_WEIGHTS, attention_form, component_of
from export.graph.modules import StepModule, merge_qkv
from export.graph.tensor_files import StoredTensor, store, write_tensors
from export.graph.tracing import OPERATORS as OPERATOR_OPS
from export.graph.tracing import operators as torch_operators
from export.graph.tracing import save_model, trace
from export.machine import importable
from export.parts.golden import write_vectors
from export.parts.graphs import tokenizer_part
from export.parts.kernels import kernel_arch, kernel_variants, kernels_part
from export.parts.keys import digest, files_digest, source_files
from export.parts.run import Builder, Built, Run
from export.quantize import numerics
from export.quantize.decision import refuse_without_quantization
from export.quantize.graph import KINDS
from export.quantize.numerics import fold_weight
from export.request.geometry import StepPlan
from export.request.graph_types import graph_types
from export.request.request import BuildRequest
from lightforcing_ref.checkpoint.spec import umt5_shapes
from lightforcing_ref.decoders.tae import VideoDecoder
from lightforcing_ref.decoders.vae_encoder import VAEEncoder
from lightforcing_ref.dimensions import DecoderConfig, VAEConfig
from lightforcing_ref.model import CausalWanModel
from runtime import bundle

from .components import OPERATORS, describe, operator_components
from .decoder import LATENT_STATISTICS, channels_last, vae_first, vae_next
from .encoder import VAE_ENCODERS
from .golden import golden_graphs
from .modules import Compiled, conditioner, step_segments, tensor_name
from .null_gpu import GPUS
from .packages import (
    EFFORT,
    compile_packages,
    device_of,
    fp8_linears,
    is_cross,
    needed_drivers,
    package_names,
)

__all__ = ["BUILDER"]

WEIGHTS = "weights.safetensors"

ValueT = TypeVar("ValueT")

_GOLDEN = "golden vectors"
"""The manifest's section on golden vectors, kept beside a build in progress."""

# ---- what can be built ----


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
    if device_of(request) == "cpu":
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
    if torch.version.cuda is None:
        raise BuildError(
            f"packages for {request.target.name} are compiled by a CUDA build of PyTorch, and this is "
            f"{torch.__version__}; install one (pip install 'lightforcing-deploy[inductor-cuda]')"
        )
    if is_cross(request) and request.target.name not in GPUS:
        raise InputError(
            f"packages for {request.target.name} are compiled on such a GPU; without one they can be for "
            f"{', '.join(GPUS)}"
        )


# ---- weights ----


def _weight_tensors(
    model: CausalWanModel,
    decoder: VideoDecoder,
    plan: StepPlan,
    linears: frozenset[str],
    encoder: VAEEncoder | None = None,
) -> Iterable[StoredTensor]:
    """Everything that packages and operators read, under the names of `tensor_name`; the transformer is used up."""
    merge_qkv(model)
    prepare, attend = torch_operators(plan.spec.kv, plan.spec.products)
    state = StepModule(model, plan.spec, plan.schedule, prepare=prepare, attend=attend).state_dict()
    for stem, network in (("decoder", decoder), ("encoder", encoder)):
        if network is not None:
            state |= {
                f"{stem}.{name}": channels_last(tensor) for name, tensor in network.state_dict().items()
            }
            state |= {f"{stem}.{name}": torch.tensor(values) for name, values in LATENT_STATISTICS.items()}
    section = _section(plan, decoder.config, linears, None if encoder is None else encoder.config)
    rows = (section.first, *section.layers, section.last)
    rows = (*rows, *section.prepare, *section.attention, *section.outside.values())
    names = {tensor for row in rows for tensor in row.values()}

    @lru_cache(maxsize=1)  # the two tensors of a quantized weight are written one after the other
    def folded(name: str) -> tuple[Tensor, Tensor]:
        parts = fold_weight(state[name], "fp8")
        return parts.values, parts.post

    for name in sorted(names):
        stem, _, kind = name.rpartition(".")
        if kind in ("fp8", "post"):
            size, columns = state[stem].shape
            shape = (size, columns) if kind == "fp8" else (size,)
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


def _linear_weights(plan: StepPlan) -> list[dict[str, str]]:
    """What attention reads: the projections of SLA's linear branch, if it runs."""
    stems = [f"model.blocks.{layer}.self_attn.proj_l" for layer in range(plan.preset.dit.layers)]
    rows = [{"linear_weight": f"{stem}.weight", "linear_bias": f"{stem}.bias"} for stem in stems]
    return rows if plan.spec.linear_branch else []


def _section(
    plan: StepPlan, vae: DecoderConfig, linears: frozenset[str], encoder: VAEConfig | None = None
) -> bundle.Segments:
    layers, segments = plan.preset.dit.layers, step_segments(plan, torch.float32, linears)
    outside = {
        "conditioner": conditioner(plan.preset.dit, torch.float32),
        "vae_first": vae_first(vae, torch.float32, plan),
        "vae_next": vae_next(vae, torch.float32, plan),
    }
    if encoder is not None:
        outside |= {name: make(encoder, torch.float32, plan) for name, make in VAE_ENCODERS.items()}

    def binding(part: Compiled, layer: int) -> dict[str, str]:
        return {weight: tensor_name(weight, layer, linears) for weight in part.weights.values()}

    return bundle.Segments(
        weights=WEIGHTS,
        first=binding(segments.first, -1),
        layers=tuple(binding(segments.layer, layer) for layer in range(layers - 1)),
        last=binding(segments.last, layers - 1),
        prepare=tuple(_operator_weights(layers)),
        attention=tuple(_linear_weights(plan)),
        outside={
            name: {weight: weight for weight in part.weights.values()} for name, part in outside.items()
        },
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
    prepare, attend = torch_operators(spec.kv, spec.products, plan.attends(OPERATOR_OPS)[0])
    operators: dict[str, tuple[Any, Mapping[str, Any]]] = {
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
    packages = sum(EFFORT[name] for name in package_names(request))
    parts = {"packages": packages, "tokenizer": 1.0, "text encoder": 60.0, "weights": 60.0}
    parts |= {"operators": 10.0} if device_of(request) == "cpu" else {"kernels": 30.0}
    return parts | {_GOLDEN: 60.0}


def _compile(run: Run) -> tuple[list[bundle.FileEntry], bundle.Kernels | None]:
    """The parts that hold no weights: packages, and on a GPU the attention kernels."""
    request, plan = run.request, run.plan
    key = _packages_key(request, plan)
    entries = run.part("packages", lambda folder: compile_packages(request, folder, key, run.within), key=key)
    if device_of(request) != "cuda":
        return entries, None
    images = digest(_triton(), files_digest(_code(plugins)), request.target.sm, plan.fingerprint())
    kernels, written = kernels_part(run, key=images)
    return [*entries, *written], kernels


def _packages_key(request: BuildRequest, plan: StepPlan) -> str:
    """What decides packages: no weights, of the libraries PyTorch and Triton alone, and the code that is compiled."""
    own = [
        Path(__file__).with_name(name)
        for name in ("decoder.py", "encoder.py", "lowering.py", "modules.py", "packages.py")
    ]
    code = [*_code(lightforcing_ref), *_code(graph), *own, Path(numerics.__file__)]
    preset = replace(plan.preset, vae=request.weights.vae_config())
    model = (preset, request.encoder, plan.height, plan.width, plan.fingerprint(), graph_types(request))
    linears = sorted(fp8_linears(request, plan))
    versions = (torch.__version__, _triton())
    return digest(versions, files_digest(code), model, linears, request.target.compute_capability)


def _code(package: ModuleType) -> list[Path]:
    return source_files(Path(package.__path__[0]))


def _triton() -> str | None:
    return version("triton") if importable("triton") else None


def _build(run: Run) -> Built:
    request, plan, models = run.request, run.plan, run.models
    device, types, linears = device_of(request), graph_types(request), fp8_linears(request, plan)

    def write_text(folder: Path) -> list[str]:
        makers, shapes = models.weights.text_tensors(), umt5_shapes(plan.preset.text)
        tensors = [store(n, shapes[n], types.text, make) for n, make in makers.items()]
        write_tensors(folder / TEXT_WEIGHTS, tensors, run.within)
        return [TEXT_WEIGHTS]

    def write_weights(folder: Path) -> list[str]:
        decoder = models.decoder(types.decoder)
        encoder = models.weights.vae_encoder(types.decoder) if request.with_encoder else None
        tensors = _weight_tensors(models.take_dit(types.transformer), decoder, plan, linears, encoder)
        write_tensors(folder / WEIGHTS, tensors, run.within)
        return [WEIGHTS]

    compiled, kernels = _compile(run)
    entries = [
        *compiled,
        *tokenizer_part(run),
        *run.part("text encoder", write_text),
        *run.part("weights", write_weights),
    ]
    if device == "cpu":
        entries += run.part("operators", lambda folder: _write_operators(folder, plan))
    components = describe(request, linears)
    if device == "cpu":
        components |= {name: component_of(run.folder, f"{name}.onnx") for name in OPERATORS}
    section = _section(plan, request.weights.vae_config(), linears, request.encoder)
    golden, written = _golden(run, components, section, linears)
    return Built(
        components=components,
        files=[*entries, *written],
        graphs={},
        status="built, not executed" if is_cross(request) else "built",
        segments=section,
        library=_library(run),
        kernels=kernels,
        quantization=_quantization(plan, linears) if linears else None,
        golden=golden,
    )


def _library(run: Run) -> bundle.Library:
    """PyTorch, and for a GPU what else its packages depend on."""
    torch_alone = bundle.Library(name="torch", version=torch.__version__)
    if device_of(run.request) == "cpu":
        return torch_alone
    arch = kernel_arch(run.request.target)
    driver = needed_drivers([run.folder / f"{name}.pt2" for name in package_names(run.request)], arch)
    return torch_alone.model_copy(update={"triton": _triton(), "driver": driver})


def _golden(
    run: Run,
    components: Mapping[str, bundle.Component],
    section: bundle.Segments,
    linears: frozenset[str],
) -> tuple[bundle.Golden, list[bundle.FileEntry]]:
    def write(folder: Path) -> tuple[list[str], bundle.Golden]:
        graphs = golden_graphs(run.plan, run.request, components, linears)
        return write_vectors(
            folder, graphs.items(), run.plan.schedule, section, progress=run.within, total=len(graphs)
        )

    return run.section(_GOLDEN, bundle.Golden, write)


def _quantization(plan: StepPlan, linears: frozenset[str]) -> bundle.Quantization:
    layers = range(plan.preset.dit.layers)
    return bundle.Quantization(
        activations="dynamic",
        formats={f"blocks.{i}.{kind}": "fp8" for i in layers for kind in KINDS if kind in linears},
        errors={},
        skipped=tuple(f"blocks.{i}.{kind}" for i in layers for kind in KINDS if kind not in linears),
    )


BUILDER = Builder(parts=_parts, build=_build, check=_check, golden=False, compile=_compile)
