"""Golden vectors of compiled bundles: the same modules, not compiled, in float32 on the CPU.

There are no ONNX graphs to run. Weights are the bundle's own, widened (FP8 ones as they are), so what is judged is what
was compiled, not what rounding the weights costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.graph.arrays import as_tensor
from export.graph.oracles import ORACLES
from export.parts.golden_persistent import PersistReference
from export.parts.golden_reference import GoldenGraph
from export.request.geometry import StepPlan
from export.request.graph_types import GraphTypes, graph_types
from export.request.request import BuildRequest
from lightforcing_ref.attention import hsa_attention
from lightforcing_ref.fp8_cache import e4m3_attention, oracles, with_fp8_cache
from lightforcing_ref.policies import SparseLinearAttention
from plugins import contract
from runtime import bundle
from runtime.bundle.golden import Arrays

from .decoder import vae_first, vae_next
from .encoder import VAE_ENCODERS
from .modules import Compiled, Fp8Linear, conditioner, step_segments, text_layer

__all__ = ["golden_graphs"]


class _TorchGraph:
    """A component as the golden vectors take it, computed by PyTorch.

    Args:
        component: whose inputs are given, in its types; floats but FP8 are widened here.
        compute: the inputs' tensors, by name -> the outputs' tensors, in order.
    """

    def __init__(
        self,
        name: str,
        component: bundle.Component,
        precision: str,
        compute: Callable[[Mapping[str, Tensor]], Sequence[Tensor]],
    ) -> None:
        self.path = Path(name)
        self.inputs, self.outputs = component.inputs, component.outputs
        self.precision, self.layers = precision, 0
        self._compute = compute

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        given = {spec.name: _widened(inputs[spec.name], spec) for spec in self.inputs}
        with torch.no_grad():
            results = self._compute(given)
        return {spec.name: result.numpy() for spec, result in zip(self.outputs, results, strict=True)}


def _widened(value: NDArray[Any], spec: bundle.TensorSpec) -> Tensor:
    return as_tensor(value.astype(np.float32) if spec.dtype in bundle.FLOATS else value)


def _precision(dtype: torch.dtype) -> str:
    return bundle.ELEMENT_TYPES[bundle.dtype_name(dtype)].precision


def _of(compiled: Compiled) -> Callable[[Mapping[str, Tensor]], Sequence[Tensor]]:
    def compute(given: Mapping[str, Tensor]) -> Sequence[Tensor]:
        outputs = compiled.examples("cpu")[len(compiled.inputs) :]
        compiled(*(given[spec.name] for spec in compiled.inputs), *outputs)
        return outputs

    return compute


def golden_graphs(
    plan: StepPlan,
    request: BuildRequest,
    components: Mapping[str, bundle.Component],
    linears: frozenset[str],
) -> dict[str, GoldenGraph]:
    """The reference of every component of a compiled bundle.

    Args:
        linears: kinds of the block linears that are in FP8.
    """
    types, wide = graph_types(request), GraphTypes()

    vae = request.weights.vae_config()
    compiled: dict[str, tuple[Compiled, torch.dtype]] = {
        **{name: (part, types.transformer) for name, part in _segments(plan, linears).items()},
        "conditioner": (conditioner(plan.preset.dit, wide.transformer), types.transformer),
        "text_encoder": (text_layer(plan, wide.text), types.text),
        "vae_first": (vae_first(vae, wide.decoder, plan), types.decoder),
        "vae_next": (vae_next(vae, wide.decoder, plan), types.decoder),
    }
    if (encoder := request.encoder) is not None:
        compiled |= {
            name: (make(encoder, wide.decoder, plan), types.decoder) for name, make in VAE_ENCODERS.items()
        }
    graphs: dict[str, GoldenGraph] = {}
    for name, (module, dtype) in compiled.items():
        is_fp8 = any(spec.dtype == "float8_e4m3fn" for spec in components[name].inputs)
        precision = "fp8" if is_fp8 else _precision(dtype)
        graphs[name] = _TorchGraph(name, components[name], precision, _of(module))
    precision = _precision(types.transformer)
    prepare_attributes: dict[str, Any] = {**plan.spec.prepare_attributes(), "eps": plan.preset.dit.eps}
    attend_attributes: dict[str, Any] = plan.spec.attend_attributes()
    qk_prepare, _ = oracles(plan.spec.kv)
    # Gathering keeps the memory of a full-size call small.
    gathering = partial(hsa_attention, form="gather")
    kernels: dict[str, Callable[..., Any]] = {
        **ORACLES,
        contract.HIERARCHICAL_SPARSE_ATTENTION: gathering,
        contract.SPARSE_LINEAR: SparseLinearAttention(form="gather"),
    }
    if plan.spec.products is not None:
        attention = with_fp8_cache(partial(gathering, attend=e4m3_attention), means_apart=True)
    else:
        attention = with_fp8_cache(gathering) if plan.spec.kv else plan.attends(kernels)[0]

    def prepare(given: Mapping[str, Tensor]) -> Sequence[Tensor]:
        return qk_prepare(*given.values(), **prepare_attributes)

    def attend(given: Mapping[str, Tensor]) -> Sequence[Tensor]:
        return [attention(*given.values(), **attend_attributes)]

    graphs["qk_prepare"] = _TorchGraph("qk_prepare", components["qk_prepare"], precision, prepare)
    graphs["attention"] = _TorchGraph("attention", components["attention"], precision, attend)
    if bundle.PERSIST in components:
        graphs[bundle.PERSIST] = PersistReference(components[bundle.PERSIST], plan)
    return graphs


def _segments(plan: StepPlan, linears: frozenset[str]) -> dict[str, Compiled]:
    parts = step_segments(plan, torch.float32, linears).by_name
    for part in parts.values():
        for module in part.modules():
            if isinstance(module, Fp8Linear):
                module.emulated = True
    return parts
