"""What the dry run holds an engine's run and a kernel's launch against."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from runtime.bundle import ELEMENT_TYPES, PERSIST, Component, Manifest, TensorSpec, nbytes
from runtime.bundle.images import Argument, Image, KernelProblem
from runtime.errors import EngineError
from runtime.program.kernels import KernelLibrary, LaunchPlan
from runtime.program.program import EngineRun, KernelLaunch, View

__all__ = ["Flaws", "LaunchChecker", "RunChecker"]

_GRID_LIMITS: Final = (2**31 - 1, 65_535, 65_535)
_REGISTERS_PER_BLOCK: Final = 65_536
_SHARED_MEMORY_KIB: Final = {
    (7, 5): 64,
    (8, 0): 163,
    (8, 6): 99,
    (8, 7): 163,
    (8, 9): 99,
    (9, 0): 227,
    (10, 0): 227,
    (10, 3): 227,
    (12, 0): 99,
    (12, 1): 99,
}
"""Largest dynamic shared memory of one thread block: CUDA C++ programming guide, table of compute capabilities."""

# Sizes of every buffer of every kernel (docs/kernels.md), as products of the problem's sizes; `_FREE` ones aside.
_SIZES: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    "prepare": {
        "qkv": ("tokens", "width", "three"),
        "bias": ("width", "three"),
        "norm_q": ("width",),
        "norm_k": ("width",),
        "cos": ("tokens", "half"),
        "sin": ("tokens", "half"),
        "q": ("tokens", "width"),
        "k": ("tokens", "width"),
        "v": ("tokens", "width"),
        "q_mean": ("chunk_frames", "q_blocks", "width"),
        "k_mean": ("chunk_frames", "k_blocks", "width"),
    },
    "score": {
        "scores": ("heads", "query_blocks", "key_blocks"),
        "q_mean": ("chunk_frames", "q_blocks", "width"),
        "k_mean": ("chunk_frames", "k_blocks", "width"),
        "past_kmean": ("slots", "k_blocks", "width"),
        "frame_slots": ("past_frames",),
        "chunk": (),
        "keep_q20": ("table_entries",),
    },
    "select": {
        "scores": ("heads", "query_blocks", "key_blocks"),
        "lists": ("heads", "query_blocks", "key_blocks"),
        "counts": ("heads", "query_blocks"),
        "frame_slots": ("past_frames",),
        "chunk": (),
        "keep_q20": ("table_entries",),
    },
    "attend": {
        "q": ("tokens", "width"),
        "k": ("tokens", "width"),
        "v": ("tokens", "width"),
        "out": ("tokens", "width"),
        "past_k": ("slots", "frame_elements"),
        "past_v": ("slots", "frame_elements"),
        "frame_slots": ("past_frames",),
        "lists": ("heads", "query_blocks", "key_blocks"),
        "counts": ("heads", "query_blocks"),
    },
    "expand": {
        "lists": ("heads", "query_blocks", "key_blocks"),
        "counts": ("heads", "query_blocks"),
        "frame_slots": ("past_frames",),
        "frame_map": ("presences", "map_heads", "chunk_frames", "frames"),
        "block_map": ("maps", "map_rows", "map_columns"),
        "columns": ("k_blocks",),
    },
    "commit": {
        "k": ("tokens", "width"),
        "v": ("tokens", "width"),
        "k_mean": ("chunk_frames", "k_blocks", "width"),
        "past_k": ("slots", "frame_elements"),
        "past_v": ("slots", "frame_elements"),
        "past_kmean": ("slots", "k_blocks", "width"),
        "commit_slots": ("chunk_frames",),
    },
    "weigh": {
        "importance": ("heads", "key_blocks"),
        "scores": ("heads", "query_blocks", "key_blocks"),
        "frame_slots": ("past_frames",),
    },
    "persist": {
        "importance": ("heads", "key_blocks"),
        "past_k": ("slots", "frame_elements"),
        "past_v": ("slots", "frame_elements"),
        "past_kmean": ("slots", "k_blocks", "width"),
        "frame_slots": ("past_frames",),
        "contest": ("two",),
    },
    "rope_sink": {
        "sink_k": ("sinks", "frame_elements"),
        "sink_kmean": ("sinks", "k_blocks", "width"),
        "past_k": ("slots", "frame_elements"),
        "past_kmean": ("slots", "k_blocks", "width"),
        "sink_slots": ("sinks",),
        "cos": ("sinks", "turned_pairs"),
        "sin": ("sinks", "turned_pairs"),
    },
}

_METHOD_SIZES: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    "mean_key": {
        "shift": ("width",),
        "k_mean": ("chunk_frames", "k_blocks", "width"),
        "past_kmean": ("slots", "k_blocks", "width"),
        "frame_slots": ("past_frames",),
    },
    "resemble": {
        "unlike_q": ("heads", "query_blocks"),
        "unlike_k": ("heads", "key_blocks"),
        "q": ("tokens", "width"),
        "k": ("tokens", "width"),
        "past_k": ("slots", "frame_elements"),
        "shift": ("width",),
        "frame_slots": ("past_frames",),
    },
    "select_sparge": {
        **_SIZES["select"],
        "unlike_q": ("heads", "query_blocks"),
        "unlike_k": ("heads", "key_blocks"),
    },
    "select_pinned": {**_SIZES["select"], "pinned": ()},
    "pool": {
        "q_pool": ("query_blocks", "width"),
        "k_pool": ("groups", "width"),
        "q": ("tokens", "width"),
        "k": ("tokens", "width"),
        "past_k": ("slots", "frame_elements"),
        "frame_slots": ("past_frames",),
        "q_order": ("q_blocks", "block_q"),
        "k_order": ("k_blocks", "block_k"),
        "patch_blocks": ("patch_ends",),
    },
    "score_groups": {
        "scores": ("heads", "query_blocks", "groups"),
        "q_pool": ("query_blocks", "width"),
        "k_pool": ("groups", "width"),
    },
    "choose": {
        "block_map": ("heads", "query_blocks", "groups"),
        "scores": ("heads", "query_blocks", "groups"),
        "frame_slots": ("past_frames",),
        "q_patches": ("q_blocks", "two"),
    },
    "sum_linear": {
        "frame_state": ("frames", "width", "head_dim"),
        "frame_features": ("frames", "width"),
        **{name: _SIZES["attend"][name] for name in ("k", "v", "past_k", "past_v", "frame_slots")},
    },
    "project_linear": {
        "linear_state": ("width", "head_dim"),
        "linear_features": ("width",),
        "frame_state": ("frames", "width", "head_dim"),
        "frame_features": ("frames", "width"),
        "linear_weight": ("head_dim", "head_dim"),
        "frame_slots": ("past_frames",),
    },
    "add_linear": {
        "out": ("tokens", "width"),
        "q": ("tokens", "width"),
        "linear_state": ("width", "head_dim"),
        "linear_features": ("width",),
        "linear_bias": ("head_dim",),
    },
    "attend_ordered": {
        **_SIZES["attend"],
        "q_order": ("q_blocks", "block_q"),
        "k_order": ("k_blocks", "block_k"),
    },
}
"""The same of the kernels of other methods."""

_CHUNK_SCALES: Final = dict.fromkeys(("k_scale", "v_scale"), ("chunk_frames", "k_blocks", "heads"))
_PAST_SCALES: Final = dict.fromkeys(("past_kscale", "past_vscale"), ("slots", "k_blocks", "heads"))
_VALUES: Final = ("chunk_frames", "value_elements")
_PAST_VALUES: Final = ("slots", "value_elements")
_ATTEND_FP8: Final = {
    **_SIZES["attend"],
    **_CHUNK_SCALES,
    **_PAST_SCALES,
    "v": _VALUES,
    "past_v": _PAST_VALUES,
    "k_mean": _SIZES["score"]["k_mean"],
    "past_kmean": _SIZES["score"]["past_kmean"],
}
_PREPARE_FP8: Final = {**_SIZES["prepare"], **_CHUNK_SCALES, "v": _VALUES}
_PROJECTION_SCALES: Final = {"token_scale": ("tokens",), "channel_scale": ("width", "three")}
_FP8_SIZES: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    "prepare_scaled": {**_SIZES["prepare"], **_PROJECTION_SCALES},
    "prepare_fp8": _PREPARE_FP8,
    "prepare_scaled_fp8": {**_PREPARE_FP8, **_PROJECTION_SCALES},
    "attend_fp8": _ATTEND_FP8,
    "attend_e4m3": _ATTEND_FP8,
    "commit_fp8": {
        **_SIZES["commit"],
        **_CHUNK_SCALES,
        **_PAST_SCALES,
        "v": _VALUES,
        "past_v": _PAST_VALUES,
    },
    "rope_sink_fp8": {
        **_SIZES["rope_sink"],
        "past_kscale": _PAST_SCALES["past_kscale"],
        "sink_kscale": ("sinks", "k_blocks", "heads"),
    },
}
"""The same of the kernels over codes: keys and values, or the projection."""

_ALL_SIZES: Final = {**_SIZES, **_METHOD_SIZES, **_FP8_SIZES}
_FREE: Final = ("slots", "maps")
"""Sizes that nothing but the buffer itself says: its elements are a multiple of the others'."""

_OPERATORS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("prepare", "prepare_scaled", "prepare_fp8", "prepare_scaled_fp8"), "qk_prepare"),
    **dict.fromkeys(
        ("score", "select", "expand", "attend", *_METHOD_SIZES, "attend_fp8", "attend_e4m3"), "attention"
    ),
    "persist": PERSIST,
}
"""The component that each kernel executes, or a part of it."""


class Flaws:
    """Collects what is wrong, each flaw once."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, where: str, problem: str) -> None:
        """Note `problem` at `where`."""
        text = f"{where}: {problem}"
        if text not in self.found:
            self.found.append(text)


class RunChecker:
    """Engine runs against the manifest's components."""

    def __init__(self, manifest: Manifest, flaws: Flaws) -> None:
        self._components = manifest.components
        self._flaws = flaws
        self.count = 0

    def check(self, run: EngineRun, where: str) -> None:
        """Note what differs between `run` and its component."""
        self.count += 1
        component = self._components.get(run.component)
        if component is None:
            self._flaws.add(where, "the manifest has no such component")
            return
        if component.file is None:
            self._flaws.add(where, "the component has no file to execute")
        for specs, views, kind in (
            (component.inputs, run.inputs, "input"),
            (component.outputs, run.outputs, "output"),
        ):
            self._check_tensors(specs, views, f"{where}, {kind}")
        self._check_scratch(component, run, where)

    def check_operator(self, launch: KernelLaunch, where: str) -> None:
        """Note where the tensors of an operator that kernels execute are not what the manifest says of it."""
        component = self._components.get(_OPERATORS.get(launch.kernel, ""))
        for spec in () if component is None else (*component.inputs, *component.outputs):
            problem = _mismatch(spec, launch.buffers[spec.name]) if spec.name in launch.buffers else ""
            if problem:
                self._flaws.add(f"{where}, tensor {spec.name!r} of the operator", problem)

    def _check_tensors(self, specs: tuple[TensorSpec, ...], views: Mapping[str, View], where: str) -> None:
        named = {spec.name: spec for spec in specs}
        if len(named) != len(specs):
            self._flaws.add(where, "two tensors of the component have the same name")
        for name in sorted(named.keys() - views.keys()):
            self._flaws.add(f"{where} {name!r}", "the component takes it and nothing is bound to it")
        for name in sorted(views.keys() - named.keys()):
            self._flaws.add(f"{where} {name!r}", "the component has no such tensor")
        for name in sorted(views.keys() & named.keys()):
            problem = _mismatch(named[name], views[name])
            if problem:
                self._flaws.add(f"{where} {name!r}", problem)

    def _check_scratch(self, component: Component, run: EngineRun, where: str) -> None:
        needed = component.cost.activation_bytes if component.cost else 0
        given = run.scratch.nbytes if run.scratch else 0
        if given < needed:
            self._flaws.add(where, f"it needs {needed:,} bytes of activation memory and gets {given:,}")


def _mismatch(spec: TensorSpec, view: View) -> str:
    """What differs between a tensor and the memory bound to it; empty if nothing does."""
    if view.pitch is not None:
        return "it must be contiguous"
    packed = spec.dtype == "float4_e2m1" and view.dtype == "uint8"
    if spec.dtype != view.dtype and not packed:
        return f"it is {spec.dtype} and bound to {view.dtype} in buffer {view.buffer!r}"
    unknown = [dim for dim in spec.shape if isinstance(dim, str) and dim != "slots"]
    if unknown:
        return f"the dimension {unknown[0]!r} has no size"
    shape = [view.shape[0] if isinstance(dim, str) and view.shape else int(dim) for dim in spec.shape]
    size = nbytes(spec.dtype, shape)
    # Leading and trailing dimensions of one do not move an element.
    if size != view.nbytes or (not packed and _squeezed(shape) != _squeezed(view.shape)):
        return (
            f"it is {list(spec.shape)}, {size:,} bytes, and bound to {list(view.shape)}, {view.nbytes:,} bytes, in "
            f"buffer {view.buffer!r}"
        )
    return ""


def _squeezed(shape: list[int] | tuple[int, ...]) -> list[int]:
    return [dim for dim in shape if dim != 1]


class LaunchChecker:
    """Kernel launches against the images that would serve them and what their architecture can do."""

    def __init__(self, library: KernelLibrary | None, flaws: Flaws) -> None:
        self._library = library
        self._flaws = flaws
        self.count = 0
        self.images: set[str] = set()

    def check(self, launch: KernelLaunch, where: str) -> None:
        """Note what differs between `launch` and the kernel's image."""
        self.count += 1
        sizes = _ALL_SIZES.get(launch.kernel)
        if sizes is None:
            self._flaws.add(where, "there is no such kernel")
            return
        facts = _facts(launch.problem, launch.options)
        for name, view in launch.buffers.items():
            problem = _wrong_size(sizes.get(name), view, facts)
            if problem:
                self._flaws.add(f"{where}, buffer {name!r}", problem)
        if self._library is None:
            return  # executed by other means
        try:
            plan = self._library.plan(
                launch.kernel, launch.problem, dict.fromkeys(launch.buffers, 1), launch.options
            )
        except EngineError as error:
            self._flaws.add(where, str(error))
            return
        self.images.add(plan.image.name)
        self._check_image(plan.image, f"{where}, image {plan.image.name!r}")
        self._check_plan(plan, launch, f"{where}, image {plan.image.name!r}")

    def _check_image(self, image: Image, where: str) -> None:
        assert self._library is not None
        capability = self._library.index.capability
        limit = _SHARED_MEMORY_KIB.get(capability, 99) * 1024
        if image.shared_memory > limit:
            self._flaws.add(
                where,
                f"it needs {image.shared_memory:,} bytes of shared memory, compute capability "
                f"{capability[0]}.{capability[1]} gives a thread block {limit:,}",
            )
        if image.threads * image.registers > _REGISTERS_PER_BLOCK:
            self._flaws.add(
                where,
                f"{image.threads} threads with {image.registers} registers each need more than the "
                f"{_REGISTERS_PER_BLOCK:,} of a multiprocessor",
            )
        names = [argument.name for argument in image.arguments]
        for name in sorted({name for name in names if names.count(name) > 1}):
            self._flaws.add(f"{where}, argument {name!r}", "it occurs twice")

    def _check_plan(self, plan: LaunchPlan, launch: KernelLaunch, where: str) -> None:
        for axis, (blocks, limit) in enumerate(zip(plan.grid, _GRID_LIMITS, strict=True)):
            if not 1 <= blocks <= limit:
                self._flaws.add(where, f"{blocks} thread blocks along {'xyz'[axis]}, expected 1 to {limit:,}")
        for argument in plan.image.arguments:
            problem = _wrong_argument(argument, launch)
            if problem:
                self._flaws.add(f"{where}, argument {argument.name!r}", problem)
        taken = {argument.name for argument in plan.image.arguments if argument.source == "buffer"}
        for name in sorted(launch.outputs.keys() - taken):
            self._flaws.add(
                f"{where}, buffer {name!r}", "the image does not take it, so nothing would write it"
            )


_SIZE_OPTIONS: Final = ("table_entries", "turned_pairs", "map_heads", "map_rows", "map_columns")


def _facts(problem: KernelProblem, options: Mapping[str, int | float]) -> dict[str, int]:
    sizes, width = problem.sizes(), problem.heads * problem.head_dim
    return {
        **sizes,
        "tokens": problem.chunk_frames * problem.frame_tokens,
        "width": width,
        "value_elements": sizes["k_blocks"]
        * problem.block_k
        * width,  # of a frame; codes come in whole blocks
        "half": problem.head_dim // 2,
        "two": 2,
        "three": 3,
        "presences": problem.past_frames + 1,
        "patch_ends": int(options.get("patches", 0)) + 1,
        **{name: int(value) for name, value in options.items() if name in _SIZE_OPTIONS},
    }


def _wrong_size(size: tuple[str, ...] | None, view: View, facts: Mapping[str, int]) -> str:
    if size is None:
        return "the kernel has no such buffer"
    if view.pitch is not None:
        return "it must be contiguous"
    missing = [name for name in size if name not in _FREE and name not in facts]
    if missing:
        return f"its size depends on the option {missing[0]!r}, which is not given"
    expected = math.prod(facts[name] for name in size if name not in _FREE)
    found, free = math.prod(view.shape), any(name in size for name in _FREE)
    if found != expected and not (free and found and found % expected == 0):
        return f"it has {found:,} elements, expected {'a multiple of ' if free else ''}{expected:,}"
    return ""


def _wrong_argument(argument: Argument, launch: KernelLaunch) -> str:
    if argument.source in ("buffer", "null"):
        if argument.type != "pointer":
            return f"a {argument.source} is an address, the image declares {argument.type}"
        if argument.source == "null":
            return "" if argument.element is None else "a pointer that is zero has no element type"
        view = launch.buffers[argument.name]
        bits = (
            argument.element == "int16" and ELEMENT_TYPES[view.dtype].bits == 16
        )  # moved, not computed with
        if argument.element != view.dtype and not bits:
            return f"the image takes {argument.element}, buffer {view.buffer!r} holds {view.dtype}"
        return ""
    if argument.type == "pointer":
        return f"a {argument.source} is a number, the image declares a pointer"
    value = launch.problem.sizes().get(argument.name)
    if argument.source == "option":
        value_or_float = launch.options[argument.name]
        if argument.type == "int32" and not isinstance(value_or_float, int):
            return f"it is {value_or_float!r}, the image takes an int32"
        if argument.type == "float32" and isinstance(value_or_float, int):
            return f"it is the integer {value_or_float!r}, the image takes a float32"
        value = int(value_or_float)
    elif argument.type == "float32":
        return "a size is an integer, the image declares float32"
    if value is None or not -(2**31) <= value < 2**31:
        return f"its value {value} does not fit into an int32"
    return ""
