"""PyTorch module -> ONNX model in memory, with the two operators kept as one node each."""

from __future__ import annotations

import ast
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import optimizer, rewriter
from onnxscript.rewriter import onnx_fusions
from torch import Tensor, nn

from export.progress import StepCallback, no_steps
from lightforcing_ref.attention import qk_prepare
from lightforcing_ref.cache import KVFormat, Products
from lightforcing_ref.fp8_cache import hsa_attention_e4m3, hsa_attention_fp8, qk_prepare_fp8
from plugins import contract
from plugins.nodes import functions, ops

from .oracles import ORACLES

__all__ = ["OPERATORS", "OPSET", "operators", "save_model", "trace"]

OPSET = 23
"""ONNX opset of every graph: the first with Attention, RMSNormalization and RotaryEmbedding."""

EXTERNAL_BYTES = 1024
"""Initializers of at least this size go into the weights file; smaller ones (shapes, scales) stay in the graph."""

ops.bind(
    "cpu",
    hsa=ORACLES[contract.HIERARCHICAL_SPARSE_ATTENTION],
    qk_prepare=qk_prepare,
    methods={name: ORACLES[name] for name in ORACLES if name != contract.HIERARCHICAL_SPARSE_ATTENTION},
    codes=(qk_prepare_fp8, hsa_attention_fp8, hsa_attention_e4m3),
)


_Attend = Callable[..., Tensor]


def operators(
    kv: KVFormat | None,
    products: Products | None = None,
    attend: _Attend | Sequence[_Attend] = torch.ops.lightforcing.hierarchical_sparse_attention,
) -> tuple[Callable[..., tuple[Tensor, ...]], _Attend | Sequence[_Attend]]:
    """Preparation and attention of a layer as PyTorch ops.

    Args:
        attend: the attention where keys and values are in the compute type.
    """
    ops_of = torch.ops.lightforcing
    if kv is None:
        return ops_of.qk_prepare, attend
    if products is None:
        return ops_of.qk_prepare_fp8, ops_of.hierarchical_sparse_attention_fp8
    return ops_of.qk_prepare_fp8, ops_of.hierarchical_sparse_attention_e4m3


OPERATORS: Mapping[str, Callable[..., Tensor]] = {
    operator: getattr(torch.ops.lightforcing, name) for operator, name in ops.OPS.items()
}
"""Attention operator -> the op that is traced for it."""


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter's progress and deprecation chatter; errors still raise."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _simplify(model: ir.Model) -> None:
    """Fold constants, fuse, and tidy up.

    The exporter's own optimisation would also merge initializers that happen to be equal; the graph must not depend
    on the values of the weights, or another checkpoint could not be swapped in. Nor are weights folded into others
    (transposed, say): they keep their names and their [out, in] layout.
    """
    weights = set(model.graph.initializers.values())

    def should_fold(node: ir.Node) -> bool | None:
        return False if any(value in weights for value in node.inputs) else None

    optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=should_fold)
    rewriter.rewrite(model)
    ir.passes.Sequential(
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
    )(model)
    onnx_fusions.fuse(model)
    passes.RemoveUnusedNodesPass()(model)
    _name_by_scope(model.graph)
    ir.passes.Sequential(passes.ClearMetadataAndDocStringPass(), passes.NameFixPass())(model)


_SCOPES = "pkg.torch.onnx.name_scopes"
"""Where the exporter writes which modules a node was traced in: a list of their paths, then the operation."""


def _name_by_scope(graph: ir.Graph) -> None:
    """Name nodes after the module that they come from, as weights are: `/blocks.3/self_attn/o/MatMul`.

    What a rewrite made without one is named after what feeds it. `NameFixPass` numbers equal names.
    """
    scopes: dict[ir.Node, str] = {}
    for node in graph:
        if _SCOPES in node.metadata_props:
            paths = ast.literal_eval(node.metadata_props[_SCOPES])[:-1]
            inner = (path.removeprefix(f"{outer}.") for outer, path in itertools.pairwise(paths))
            scopes[node] = "".join(f"/{path.removeprefix('model.')}" for path in inner)
        else:
            producers = (value.producer() for value in node.inputs if value is not None)
            scopes[node] = next((scopes[producer] for producer in producers if producer is not None), "")
        node.name = f"{scopes[node]}/{node.op_type}"


def trace(
    module: nn.Module,
    inputs: tuple[Any, ...],
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic_shapes: tuple[Any, ...] | None = None,
    attention: functions.AttentionForm | None = None,
    metadata: Mapping[str, str] | None = None,
) -> ir.Model:
    """Export `module` to an ONNX model whose weights still live in the module's tensors.

    Args:
        attention: attach the operators' function bodies, attention in this form; None for graphs without operators.
        metadata: written into the model's metadata.
    """
    with _quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            inputs,
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            custom_translation_table=functions.export_table(),
            input_names=list(input_names),
            output_names=list(output_names),
            dynamic_shapes=dynamic_shapes,
            optimize=False,
        )
    assert program is not None  # only with `f` given does the exporter return None
    model = program.model
    _simplify(model)
    if attention is not None:
        functions.attach(model, attention)
    model.producer_name = "lightforcing-deploy"
    model.metadata_props.update(metadata or {})
    return model


def save_model(
    model: ir.Model, path: Path, weights: str | None = None, progress: StepCallback = no_steps
) -> None:
    """Write `model` to `path`.

    Args:
        weights: name of a new file beside `path` for the initializers; None keeps references to the weights file
            that the model was loaded with (which must lie in the same folder) and writes no weights.
        progress: called before each initializer that is written.
    """
    if weights is None:
        ir.save(model, path)
        return
    written = itertools.count()

    def show(tensor: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        progress("writing", next(written), info.total)

    ir.save(model, path, external_data=weights, size_threshold_bytes=EXTERNAL_BYTES, callback=show)
