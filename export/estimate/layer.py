"""What one layer of a built bundle launches and moves: its engine as that describes itself, and our kernels around it.

A layer is what stands between two projections to queries, keys and values: preparation, choice of blocks, attention,
then the engine, which ends with the next layer's projection.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from export.backends.inductor.generated import read_package
from export.backends.tensorrt_rtx.engine_text import read_engine
from export.errors import BuildError, InputError
from export.request.sizes import CONDITIONER_LINEARS, layer_linears
from runtime.bundle import Bundle
from runtime.program import attention_launches

from .roofline import Format, Work, Workload

__all__ = ["LayerLaunch", "layer_launches"]

_FORMATS: Mapping[str, Format] = {"bf16": "bf16", "fp16": "fp16", "fp8": "fp8", "fp4": "nvfp4"}
"""Types of products as engines tell them -> those of rates."""


@dataclass(frozen=True)
class LayerLaunch:
    """One launch.

    Attributes:
        name: the linear or the kernel that it is, or what the engine calls it.
        before: the product or attention that it is or that comes next.
        work: None where it is not told what it moves.
    """

    name: str
    before: str
    work: Work | None

    @property
    def is_product(self) -> bool:
        """Whether it multiplies matrices, attention included."""
        return self.work is not None and self.work.flops > 0


@dataclass(frozen=True)
class _Seen:
    """A launch of an engine: a linear's product, fused attention, or something that only moves bytes."""

    kind: str
    name: str
    format: Format | None = None
    nbytes: int | None = None


def layer_launches(bundle: Bundle, workload: Workload, chunk: int) -> tuple[LayerLaunch, ...]:
    """The launches of one layer in one forward of `chunk`, in order.

    Every operand of an engine's launch counts as read or written once. What our kernels move is worked out from sizes,
    as `export.estimate.roofline` does it; the kernels that choose blocks are not told.

    Raises:
        InputError: the engines of this backend do not tell what they launch.
        BuildError: they tell in a way that is not known, or the layer has other linears than expected.
    """
    seen = tuple(_engine(bundle))
    kinds = [linear.kind for linear in layer_linears(workload.dit) if linear.kind not in CONDITIONER_LINEARS]
    following = iter([*kinds[1:], kinds[0]])
    products = sum(one.kind == "linear" for one in seen)
    if products != len(kinds):
        raise BuildError(
            f"the layer of {bundle.root} has {products} products, and {len(kinds)} linears were expected: "
            f"{', '.join(kinds)}; rebuild the bundle with the exporter of this version"
        )
    found = [*_kernels(bundle, workload, chunk)]
    waiting: list[_Seen] = []
    for one in seen:
        if one.kind == "pass":
            waiting.append(one)
            continue
        if one.kind == "linear":
            kind = next(following)
            planned = workload.linear(kind)
        else:
            kind, planned = "cross-attention", workload.cross_attention
        found += (LayerLaunch(pass_.name, kind, _moved(workload, pass_)) for pass_ in waiting)
        waiting = []
        nbytes = planned.bytes if one.nbytes is None else one.nbytes
        found.append(
            LayerLaunch(kind, kind, Work(planned.kind, one.format or planned.format, planned.flops, nbytes))
        )
    found += (LayerLaunch(pass_.name, "prepare", _moved(workload, pass_)) for pass_ in waiting)
    return tuple(found)


def _moved(workload: Workload, seen: _Seen) -> Work | None:
    return None if seen.nbytes is None else Work("element-wise", workload.wide, 0, seen.nbytes)


def _kernels(bundle: Bundle, workload: Workload, chunk: int) -> Iterator[LayerLaunch]:
    (prepare,) = workload.moved((workload.passes.prepare(),))
    yield LayerLaunch("prepare", "prepare", prepare)
    *choosing, attend = (launch.kernel for launch in attention_launches(bundle.manifest, "bfloat16"))
    yield from (LayerLaunch(kernel, "self-attention", None) for kernel in choosing)
    yield LayerLaunch(attend, "self-attention", workload.attention(chunk))


def _engine(bundle: Bundle) -> Iterable[_Seen]:
    """The launches of the engine of a layer; of several, the first."""
    manifest = bundle.manifest
    layers = (
        (component, component.file)
        for name, component in manifest.components.items()
        if name.partition(".")[0] == "layer" and component.file is not None
    )
    found = next(layers, None)
    told = manifest.backend in ("inductor", "tensorrt-rtx") and manifest.target.compute_capability is not None
    if found is None or not told:
        raise InputError(
            f"bundle {bundle.root} has the backend {manifest.backend} on {manifest.target.name} and no engine of a "
            "layer that tells what it launches; name one of inductor or tensorrt-rtx for a GPU"
        )
    component, file = found
    path = bundle.path(file)
    if manifest.backend == "tensorrt-rtx":
        for launch in read_engine(path).launches:
            nbytes = sum(operand.nbytes for operand in (*launch.inputs, *launch.outputs))
            kind = {"gemm": "linear", "attention": "attention"}.get(launch.kind, "pass")
            name = launch.name.removeprefix("__myl_").partition("_0x")[0]
            yield _Seen(kind, name, _FORMATS.get(launch.compute or ""), nbytes)
        return
    for call in read_package(path, component):
        if call.is_generated:
            yield _Seen("pass", call.name.removeprefix("triton_"), nbytes=call.nbytes)
        else:
            kind = "attention" if "attention" in call.name else "linear"
            yield _Seen(kind, call.name)
