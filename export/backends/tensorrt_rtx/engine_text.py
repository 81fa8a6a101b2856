"""What a TensorRT-RTX engine ("plan", to its makers) says of itself: types, launches, fusions, memory. Needs no GPU.

An engine holds, in plain text, the program it will run: a header, one descriptor per tensor, and one line per step. The
text is a section of its own, `NLYM`, with its length in front; sections of fused kernels follow that of the program.
The format is undocumented. The reader therefore understands what it knows and refuses the rest: a step, a type or a
layout it has not seen raises `EngineFormatError`, and nothing is ever taken for granted.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from export.errors import BuildError
from runtime.bundle import ELEMENT_TYPES, AnyDtype, nbytes

__all__ = [
    "EngineFormatError",
    "EngineReport",
    "Launch",
    "Operand",
    "check_products",
    "parse_engine",
    "read_engine",
]

_ENGINE_MAGIC = b"vtrt"
_SIZE_AT = 16
"""Where an engine states its own size."""

_MAGIC = b"NLYM"
_SECTION_VERSION = 2022049
_PROGRAM, _FUSION = 5, 4
"""Versions of the text: of a program, and of a fused kernel within one."""

_TYPES: Mapping[str, AnyDtype] = {
    "float": "float32",
    "half": "float16",
    "bf16": "bfloat16",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e8m0": "uint8",  # scales of MXFP8: an exponent, in a byte
    "fp4_e2m1": "float4_e2m1",
    "int8": "int8",
    "uint8": "uint8",
    "int32": "int32",
    "int64": "int64",
    "bool": "bool",
}
"""Types as engines write them."""

Kind = Literal["gemm", "convolution", "attention", "kernel"]

_BACKBONES: dict[str, Kind] = {"fully_connected": "gemm", "corrltn": "convolution"}
_LAUNCHING = {*_BACKBONES, "function", "runtime_function", "runtime_fusion"}
_SYNCHRONISING = frozenset({"signal", "wait"})

_DESCRIPTOR = re.compile(
    r"^  (?:sub_)?tensor=\{ .*?\bdims=\{([ \d-]*)\}.*? name=\"([^\"]+)\" .*\btype=(\w+) \}$"
)
_FLAT = "_rows"
"""What `prepare_for_rtx` appends to the names of nodes on `[1, T, N]`, whose unit dimension it drops."""
_STEP = re.compile(r'^  (\w+)=\{ name="?([^\s"]+)"? ')
_LIST = re.compile(r'"([^"]*)"')


class EngineFormatError(BuildError):
    """An engine whose description is missing, cut off, or written in a way this reader does not know."""


@dataclass(frozen=True)
class Operand:
    """A tensor of a launch: its type and dimensions."""

    name: str
    type: AnyDtype
    dims: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """The type in short: "bf16", "fp8", ..."""
        return ELEMENT_TYPES[self.type].short

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return nbytes(self.type, self.dims)


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kind: what it computes; "kernel" for everything that is no matrix product, convolution or attention.
        compute: type in which the products are formed, that of the operands; None for other kernels.
        layers: the ONNX nodes it executes.
        fused: whether an epilogue or other operators are compiled into the product.
    """

    kind: Kind
    name: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    stream: int
    layers: tuple[str, ...]
    fused: bool = False
    compute: str | None = None


@dataclass(frozen=True)
class EngineReport:
    """An engine in figures.

    Attributes:
        architecture: what it was built for, e.g. "sm120".
        activation_bytes: device memory it needs besides inputs, outputs and constants.
        capturable: whether a CUDA graph can capture it.
        inputs, outputs: names of the program's own.
    """

    architecture: str
    launches: tuple[Launch, ...]
    streams: int
    activation_bytes: int
    constant_bytes: int
    capturable: bool
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    engine_bytes: int

    def count(self, kind: Kind) -> dict[str, int]:
        """Launches of one kind by the type they compute in."""
        return dict(Counter(launch.compute or "" for launch in self.launches if launch.kind == kind))

    @cached_property
    def gemms(self) -> dict[str, int]:
        """Matrix products by operand type; attention is counted apart."""
        return self.count("gemm")

    @property
    def moved_bytes(self) -> int:
        """Bytes of the launches that are no product, convolution or attention, every operand read or written once."""
        kernels = (launch for launch in self.launches if launch.kind == "kernel")
        return sum(operand.nbytes for launch in kernels for operand in (*launch.inputs, *launch.outputs))

    @cached_property
    def weight_transposes(self) -> tuple[str, ...]:
        """Launches that do nothing but transpose one of the program's inputs."""
        return tuple(
            launch.name
            for launch in self.launches
            if launch.name.startswith("__myl_Tran") and re.fullmatch(r"__myl_Tran(_0x\w+)?", launch.name)
            if {operand.name for operand in launch.inputs} <= set(self.inputs)
        )


def read_engine(path: Path) -> EngineReport:
    """Read the engine at `path`.

    Raises:
        EngineFormatError: see `parse_engine`; names the file.
    """
    try:
        return parse_engine(path.read_bytes())
    except EngineFormatError as error:
        raise EngineFormatError(f"{path.name}: {error}") from error


_SHOWN = 3
"""Products that a message names."""


def check_products(component: str, report: EngineReport, expected: Mapping[str, str]) -> None:
    """Check that every quantized product of a graph is one in the engine, in the type it should have.

    A weight or an input that TensorRT-RTX cannot use as it is quantized becomes a product in a wider type without any
    warning. Several products may have become one.

    Args:
        expected: as `export.quantize.graph.quantized_products` gives it, for the graph as it was exported.

    Raises:
        BuildError: a product computes in another type, or none is there; names the linears.
    """
    found: dict[str, str] = {}
    for launch in report.launches:
        if launch.kind == "gemm" and launch.compute is not None:
            found |= dict.fromkeys((node.removesuffix(_FLAT) for node in launch.layers), launch.compute)
    problems = [
        f"{node.removesuffix('.product')} is {f'a {found[node]} product' if node in found else 'no product'} and not "
        f"{wanted}"
        for node, wanted in expected.items()
        if found.get(node) != wanted
    ]
    if problems:
        more = len(problems) - _SHOWN
        raise BuildError(
            f"{component}: {len(problems)} of {len(expected)} quantized linears fell back: "
            f"{'; '.join(problems[:_SHOWN])}{f'; and {more} more' if more > 0 else ''}. Leave them in a wider format "
            "(--skip), or build with --precision bf16"
        )


def parse_engine(engine: bytes) -> EngineReport:
    """Read a serialized engine.

    Raises:
        EngineFormatError: it has no description, is cut off, or holds something this reader does not know.
    """
    sections = [_Section(text) for text in _sections(engine)]
    programs = [section for section in sections if section.is_program]
    if len(programs) != 1 or not sections[0].is_program:
        raise _unknown(
            f"{len(programs)} programs in {len(sections)} sections, and one at the start was expected"
        )
    program, fusions = programs[0], [s for s in sections[1:] if s.has_backbone]
    launches = tuple(
        _launch(program, step, fusions) for step in program.steps if step.kind not in _SYNCHRONISING
    )
    used = {step.index for step in program.steps if step.kind == "runtime_fusion"}
    if used != set(range(len(fusions))):
        raise _unknown(f"{len(fusions)} fused kernels are described and {sorted(used)} are launched")
    return EngineReport(
        architecture=program.only(r"^  accelerators=\{(sm\d+) \}$"),
        launches=launches,
        streams=int(program.only(r"^  n_streams = (\d+)$")),
        activation_bytes=int(program.only(r"^  region = \{ name=devmem size=(\d+) ")),
        constant_bytes=sum(map(int, program.all(r"^  region = \{ name=\S+-consts size=(\d+) "))),
        capturable=program.only(r"^  stream_capturable=([01])$") == "1",
        inputs=tuple(map(_plain, program.names("inputs"))),
        outputs=tuple(map(_plain, program.names("outputs"))),
        engine_bytes=len(engine),
    )


def _unknown(what: str) -> EngineFormatError:
    return EngineFormatError(
        f"the engine's description is not one this version can read: {what}; the build stops because it cannot show "
        "that the engine computes in the type it was built for (use the TensorRT-RTX version that the lock file pins)"
    )


def _plain(name: str) -> str:
    """A tensor's ONNX name: the engine appends a version to it."""
    return name.removesuffix(".1")


def _sections(engine: bytes) -> Iterator[str]:
    if not engine.startswith(_ENGINE_MAGIC) or len(engine) < _SIZE_AT + 8:
        raise _unknown("it is no engine")
    (size,) = struct.unpack_from("<Q", engine, _SIZE_AT)
    if size != len(engine):
        raise EngineFormatError(
            f"the engine has {len(engine)} bytes and says that it has {size}; build it again"
        )
    start = engine.find(_MAGIC)
    if start < 0:
        raise _unknown(f"it holds no {_MAGIC.decode()} section")
    while start >= 0:
        if engine[start + 16 : start + 24] == b"header {":  # else these bytes happen to be among the weights
            version, length = struct.unpack_from("<IQ", engine, start + 4)
            if version != _SECTION_VERSION:
                raise _unknown(f"section version {version}, and {_SECTION_VERSION} was expected")
            yield engine[start + 16 : start + 16 + length].decode("latin-1")
        start = engine.find(_MAGIC, start + 4)


@dataclass(frozen=True)
class _Step:
    kind: str
    name: str
    text: str

    def names(self, *keys: str) -> list[str]:
        for key in keys:
            if match := re.search(rf" {key}=\{{([^}}]*)\}}", self.text):
                return _LIST.findall(match[1])
        raise _unknown(f"the step {self.kind} {self.name!r} has none of {', '.join(keys)}")

    @property
    def stream(self) -> int:
        if match := re.search(r" stream=(\d+) ", self.text):
            return int(match[1])
        raise _unknown(f"the step {self.kind} {self.name!r} names no stream")

    @property
    def index(self) -> int:
        if match := re.search(r" binary ?= ?(\d+) ", self.text):
            return int(match[1])
        raise _unknown(f"the step {self.kind} {self.name!r} names no binary")

    @property
    def layers(self) -> tuple[str, ...]:
        match = re.search(r' layers="([^"]*)"', self.text)
        return tuple(re.findall(r"\[ONNX Layer: ([^\]]*)\]", match[1])) if match else ()


class _Section:
    """The text of one program or fused kernel."""

    def __init__(self, text: str) -> None:
        head, _, rest = text.partition("\ndescriptors {")
        descriptors, found, rest = rest.partition("\n}\nmain {")
        main, ended, _ = rest.partition("\n}")
        if not found or not ended:
            raise _unknown("header, descriptors and program do not follow one another")
        self._head = head
        self.version = int(self.only(r"^  version = (\d+)$"))
        if self.version not in (_PROGRAM, _FUSION):
            raise _unknown(f"text version {self.version}, and {_FUSION} or {_PROGRAM} was expected")
        self.tensors = dict(_tensors(descriptors))
        self.steps = tuple(_steps(main))

    @property
    def is_program(self) -> bool:
        return self.version == _PROGRAM

    @property
    def has_backbone(self) -> bool:
        return any(step.kind in _BACKBONES for step in self.steps)

    def all(self, pattern: str) -> list[str]:
        return re.findall(pattern, self._head, re.MULTILINE)

    def only(self, pattern: str) -> str:
        found = self.all(pattern)
        if len(found) != 1:
            raise _unknown(f"{len(found)} lines of its header match {pattern!r}, and one was expected")
        return str(found[0])

    def names(self, key: str) -> list[str]:
        return _LIST.findall(self.only(rf"^  {key}=\{{([^}}]*)\}}$"))

    def operands(self, names: list[str]) -> tuple[Operand, ...]:
        missing = [name for name in names if name not in self.tensors]
        if missing:
            raise _unknown(f"the tensor {missing[0]!r} is used and not described")
        return tuple(self.tensors[name] for name in names)


def _tensors(text: str) -> Iterator[tuple[str, Operand]]:
    for line in filter(str.strip, text.split("\n")):
        match = _DESCRIPTOR.match(line)
        if match is None or match[3] not in _TYPES:
            raise _unknown(f"the descriptor {line.strip()[:160]!r}")
        dims = tuple(int(dim) for dim in match[1].split())
        yield match[2], Operand(_plain(match[2]), _TYPES[match[3]], dims)


def _steps(text: str) -> Iterator[_Step]:
    for line in filter(str.strip, text.split("\n")):
        if re.fullmatch(r" label \w+: ?", line):
            continue
        match = _STEP.match(line)
        if match is None:
            raise _unknown(f"the step {line.strip()[:160]!r}")
        yield _Step(match[1], match[2], line + " ")


def _launch(program: _Section, step: _Step, fusions: list[_Section]) -> Launch:
    if step.kind not in _LAUNCHING:
        raise _unknown(f"a step of kind {step.kind!r} ({step.name})")
    inputs = program.operands(step.names("input_args", "input"))
    outputs = program.operands(step.names("output_args", "output"))
    kind: Kind = _BACKBONES.get(step.kind, "kernel")
    compute = _product_type(program, step) if kind != "kernel" else None
    if step.kind == "runtime_fusion":
        kind, compute = _fused_product(step, inputs, fusions)
    elif kind == "kernel" and not step.name.startswith("__myl_"):
        kind, compute = _library_kernel(step, inputs)
    return Launch(
        kind, step.name, inputs, outputs, step.stream, step.layers, step.kind == "runtime_fusion", compute
    )


def _product_type(section: _Section, step: _Step) -> str:
    """Type of the two factors of a product."""
    left, right = section.operands(step.names("input"))[:2]
    if left.dtype != right.dtype:
        raise _unknown(f"the product {step.name!r} of {left.dtype} and {right.dtype}")
    return left.dtype


def _fused_product(step: _Step, inputs: tuple[Operand, ...], fusions: list[_Section]) -> tuple[Kind, str]:
    """Kind and type of the product at the core of a fused kernel, from that kernel's own section."""
    if step.index >= len(fusions):
        raise _unknown(f"fused kernel {step.index} of {len(fusions)} is launched ({step.name})")
    section = fusions[step.index]
    within = section.operands(section.names("inputs"))
    if [operand.dtype for operand in within] != [operand.dtype for operand in inputs]:
        raise _unknown(f"the fused kernel {step.name!r} takes other types than it is launched with")
    cores = [inner for inner in section.steps if inner.kind in _BACKBONES]
    if len(cores) != 1:
        raise _unknown(f"the fused kernel {step.name!r} holds {len(cores)} products")
    return _BACKBONES[cores[0].kind], _product_type(section, cores[0])


def _library_kernel(step: _Step, inputs: tuple[Operand, ...]) -> tuple[Kind, str]:
    """Kind and type of a kernel that is not generated for the engine: fused attention is the only one known."""
    if not step.name.startswith("_gemm_mha"):
        raise _unknown(f"the kernel {step.name!r}")
    query, key = inputs[:2]
    if query.dtype != key.dtype:
        raise _unknown(f"attention of {query.dtype} and {key.dtype}")
    return "attention", query.dtype
