"""The launch library through ctypes, and stand-ins for kernel images to build it from.

Planning, validation and everything around an engine need descriptions of kernels, not their code: the stand-ins are
described as the real images are, and hold a text that tells them apart (which tests/driver/stand_in_cuda.c reads).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from ctypes import (
    POINTER,
    Structure,
    c_char_p,
    c_double,
    c_float,
    c_int32,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from plugins.compile.embedding import ASSEMBLY_NAME, TABLE_NAME, write_embedded
from plugins.compile.libraries import LAUNCH_LIBRARY, find_tool
from plugins.kernels import specs
from runtime.bundle import images

MISSING_TOOLS = ", ".join(
    name
    for name, found in (("cmake", find_tool("cmake")), ("a C++ compiler (c++)", shutil.which("c++")))
    if found is None
)
needs_tools = pytest.mark.skipif(bool(MISSING_TOOLS), reason=f"not installed: {MISSING_TOOLS}")

WAN = {
    "dtype": "bfloat16",
    "heads": 12,
    "head_dim": 128,
    "frame_tokens": 1560,
    "chunk_frames": 3,
    "past_frames": 18,
    "block_q": 64,
    "block_k": 64,
}
"""The attention problem of the full-size model, as kernels see it: 832 x 480 pixels, the last chunk."""
ATTRIBUTES: dict[str, Any] = {
    "frame_tokens": 1560,
    "block_q": 64,
    "block_k": 64,
    "keep_frames": 6,
    "sink_frames": 1,
    "near_frames": 2,
    "scale": 0.125,
    "keep_q20": [1 << 20, 200_000],
}
"""Attributes of an attention operator at that size, with a table of two entries."""
needs_readelf = pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")

DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
OK, INVALID_ARGUMENT, NOT_SERVED, NO_DRIVER, CUDA_FAILURE, NOT_LOADED, INTERNAL = range(7)


class Shape(Structure):
    _fields_ = tuple(
        (name, c_int32) for name in ("dtype", "heads", "head_dim", "chunk_frames", "past_frames")
    )


class AttentionAttributes(Structure):
    _fields_ = (
        *(
            (name, c_int32)
            for name in ("frame_tokens", "block_q", "block_k", "keep_frames", "sink_frames", "near_frames")
        ),
        ("scale", c_float),
        ("keep_q20", POINTER(c_int32)),
        ("keep_q20_count", c_int32),
    )


class AttentionBuffers(Structure):
    _fields_ = tuple(
        (name, c_void_p)
        for name in (
            "q",
            "k",
            "v",
            "q_mean",
            "k_mean",
            "past_k",
            "past_v",
            "past_kmean",
            "frame_slots",
            "chunk",
            "out",
        )
    )


class PrepareAttributes(Structure):
    _fields_ = (
        *((name, c_int32) for name in ("heads", "frame_tokens", "block_q", "block_k")),
        ("eps", c_float),
    )


class PrepareBuffers(Structure):
    _fields_ = tuple(
        (name, c_void_p)
        for name in ("qkv", "bias", "norm_q", "norm_k", "cos", "sin", "q", "k", "v", "q_mean", "k_mean")
    )


class Problem(Structure):
    _fields_ = tuple(
        (name, c_int32)
        for name in (
            "dtype",
            "heads",
            "head_dim",
            "frame_tokens",
            "chunk_frames",
            "past_frames",
            "block_q",
            "block_k",
        )
    )


class Value(Structure):
    _fields_ = (("name", c_char_p), ("address", c_uint64), ("number", c_double))


class Plan(Structure):
    _fields_ = (
        ("image", c_char_p),
        ("cubin", c_void_p),
        ("cubin_bytes", c_size_t),
        ("grid", c_uint32 * 3),
        ("threads", c_uint32),
        ("shared_memory", c_uint32),
        ("argument_count", c_uint32),
        ("arguments", c_uint64 * 32),
    )


STRUCTURES: dict[str, type[Structure]] = {
    "lf_shape": Shape,
    "lf_attention_attributes": AttentionAttributes,
    "lf_attention_buffers": AttentionBuffers,
    "lf_prepare_attributes": PrepareAttributes,
    "lf_prepare_buffers": PrepareBuffers,
    "lf_problem": Problem,
    "lf_value": Value,
    "lf_plan": Plan,
}


def open_library(path: Path) -> ctypes.CDLL:
    """The library with the types of its functions."""
    library = ctypes.CDLL(str(path))
    library.lf_last_error.restype = c_char_p
    library.lf_architectures.restype = c_char_p
    for operator in ("attention", "prepare"):
        attributes, buffers = STRUCTURES[f"lf_{operator}_attributes"], STRUCTURES[f"lf_{operator}_buffers"]
        getattr(library, f"lf_{operator}_create").argtypes = [POINTER(attributes), POINTER(c_void_p)]
        getattr(library, f"lf_{operator}_load").argtypes = [c_void_p]
        getattr(library, f"lf_{operator}_destroy").argtypes = [c_void_p]
        getattr(library, f"lf_{operator}_destroy").restype = None
        workspace = [c_void_p, c_size_t] if operator == "attention" else []
        getattr(library, f"lf_{operator}_enqueue").argtypes = [
            c_void_p,
            POINTER(Shape),
            POINTER(buffers),
            *workspace,
            c_void_p,
        ]
    library.lf_attention_workspace.argtypes = [c_void_p, POINTER(Shape), POINTER(c_size_t)]
    library.lf_prepare_check.argtypes = [c_void_p, POINTER(Shape)]
    library.lf_make_plan.argtypes = [
        c_int32,
        c_char_p,
        POINTER(Problem),
        POINTER(Value),
        c_size_t,
        POINTER(Plan),
    ]
    return library


def attention_attributes(values: dict[str, Any]) -> AttentionAttributes:
    """From the operator's attributes by name; keeps the table alive."""
    table = values["keep_q20"]
    array = (c_int32 * len(table))(*table)
    scalars = {name: value for name, value in values.items() if name != "keep_q20"}
    attributes = AttentionAttributes(**scalars, keep_q20=array, keep_q20_count=len(table))
    attributes.table = array
    return attributes


class Operator:
    """A handle of the launch library: `operator` is `attention` or `prepare`. Fails with the library's message."""

    def __init__(self, library: ctypes.CDLL, operator: str, attributes: Structure) -> None:
        self._library, self._operator = library, operator
        self.handle = c_void_p()
        self.require(self._call("create")(ctypes.byref(attributes), ctypes.byref(self.handle)))

    def _call(self, name: str) -> Any:
        return getattr(self._library, f"lf_{self._operator}_{name}")

    def require(self, status: int) -> None:
        if status != OK:
            raise LaunchError(status, self._library.lf_last_error().decode())

    def workspace(self, shape: Shape) -> int:
        size = c_size_t()
        self.require(self._call("workspace")(self.handle, ctypes.byref(shape), ctypes.byref(size)))
        return size.value

    def check(self, shape: Shape) -> None:
        self.require(self._call("check")(self.handle, ctypes.byref(shape)))

    def load(self) -> None:
        self.require(self._call("load")(self.handle))

    def enqueue(self, shape: Shape, buffers: Structure, *rest: int | None) -> None:
        """`rest`: workspace and its size (attention only), stream."""
        self.require(self._call("enqueue")(self.handle, ctypes.byref(shape), ctypes.byref(buffers), *rest))

    def close(self) -> None:
        self._call("destroy")(self.handle)
        self.handle = c_void_p()


class LaunchError(Exception):
    """A call that did not return LF_OK: `args` are the status and the message."""

    @property
    def status(self) -> int:
        return int(self.args[0])


def stand_in(variant: specs.Variant, arch: int) -> tuple[images.Image, bytes]:
    """The image of a specialisation, as the compiler would describe it, and a text in place of its code."""
    code = b"\x7fELF" + f"{variant.name} sm_{arch} arguments {len(variant.arguments) + 2}\n".encode()
    digest = hashlib.sha256(code).hexdigest()
    grid = [axis if isinstance(axis, int) else asdict(axis) for axis in variant.grid]
    scratch = [
        {"name": name, "type": "pointer", "source": "null"} for name in ("global_scratch", "profile_scratch")
    ]
    image = {
        "name": variant.name,
        "kernel": variant.kernel,
        "file": f"{variant.name}-{digest[:12]}.cubin",
        "sha256": digest,
        "bytes": len(code),
        "entry": variant.kernel,
        "threads": 32 * variant.num_warps,
        "shared_memory": 1024 * len(variant.name) * (3 if variant.kernel == "attend" else 1),
        "grid": [*grid, 1, 1][:3],
        "arguments": [*(asdict(argument) for argument in variant.arguments), *scratch],
        "serves": variant.serves,
        "limits": variant.limits,
        "registers": 32,
        "stack": 0,
        "spill_stores": 0,
        "spill_loads": 0,
        "source_sha256": "0" * 64,
    }
    return images.Image.model_validate(image), code


def write_stand_ins(out: Path, archs: Sequence[int] = specs.ARCHS) -> None:
    """Stand-ins of every specialisation, in folders as `python -m plugins build` writes them."""
    for arch in archs:
        made = [stand_in(variant, arch) for variant in specs.variants(arch)]
        target = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
        image_set = images.ImageSet(
            arch=f"sm_{arch}",
            target=target,
            driver=570,
            compiler={},
            images=tuple(image for image, _ in made),
        )
        images.write_images(out / f"sm_{arch}", image_set, {image.name: code for image, code in made})


def tensorrt_root() -> Path | None:
    """The folder whose `include` holds the headers of TensorRT: TENSORRT_ROOT, or the system's."""
    named = os.environ.get("TENSORRT_ROOT")
    for root in (
        [Path(named)] if named else [Path("/usr"), Path("/usr/local/tensorrt"), Path("/opt/tensorrt")]
    ):
        if (root / "include" / "NvInferRuntime.h").exists():
            return root
    return None


def compile_launch_library(archs: Sequence[int], kernels: Path, out: Path) -> Path:
    """The launch library by the compiler alone, as on machines without CMake."""
    write_embedded(archs, kernels, out)
    sources = Path(specs.__file__).parents[1] / "launch"
    command = [
        "c++",
        "-std=c++17",
        "-O1",
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",
        f"-I{sources}",
        f"-I{out}",
    ]
    command += [str(path) for path in (*sorted(sources.glob("*.cpp")), out / TABLE_NAME, out / ASSEMBLY_NAME)]
    subprocess.run([*command, "-ldl", "-o", str(out / LAUNCH_LIBRARY)], check=True)
    return out / LAUNCH_LIBRARY


def build_stand_in_driver(folder: Path) -> Path:
    """`libcuda.so.1` that writes down what it is asked: `folder` is then a folder for LD_LIBRARY_PATH."""
    source = Path(__file__).parents[2] / "driver" / "stand_in_cuda.c"
    command = [
        "cc",
        "-std=c11",
        "-shared",
        "-fPIC",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wl,-soname,libcuda.so.1",
    ]
    subprocess.run([*command, str(source), "-o", str(folder / "libcuda.so.1")], check=True)
    return folder


@dataclass(frozen=True)
class Linked:
    """What a shared library needs and exports, by readelf."""

    dynamic: str
    needed: list[str]
    exported: set[str]


def linked(path: Path) -> Linked:
    def readelf(option: str) -> str:
        return subprocess.check_output(["readelf", "--wide", option, str(path)], text=True)

    dynamic = readelf("--dynamic")
    symbols = [line.split() for line in readelf("--dyn-syms").splitlines()[3:] if line.strip()]
    exported = {fields[7].split("@")[0] for fields in symbols if len(fields) > 7 and fields[6] != "UND"}
    return Linked(dynamic, re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic), exported)
