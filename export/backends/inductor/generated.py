"""What the generated code of a package says about itself: launches, the tensors they read and write, and their bytes.

A package for a GPU holds the C++ that Inductor wrote for it, in which every tensor is declared with its shape and every
kernel launched with its tensors. The code has no documented format. The reader therefore understands what it knows and
refuses the rest: a launch with a tensor that it has not seen declared raises `GeneratedCodeError`.
"""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final

from export.errors import BuildError
from runtime.bundle import Component, Dtype, dtypes_by, nbytes

__all__ = [
    "Configuration",
    "GeneratedCodeError",
    "Launch",
    "Operand",
    "parse_configurations",
    "parse_wrapper",
    "read_package",
    "wrapper_code",
]

_WRAPPER: Final = ".wrapper.cpp"
_BODY: Final = "::run_impl("
_TYPES: Final = dtypes_by("triton")

_DEFINITION: Final = re.compile(
    r"static inline void (call_triton_\w+)\(\n(?:.(?!static inline void))*?'signature': \{([^}]*)\}",
    re.DOTALL,
)
_POINTER: Final = re.compile(r"'(\w+_ptr\d+)': '\*(\w+)'")
_CONSTANT: Final = re.compile(r'constants_info_\[\d+\]\.name = "(\w+)";')
_ARRAY: Final = re.compile(r"static constexpr int64_t (int_array_\d+)\[\] = \{([^}]*)\};")
_INPUT: Final = re.compile(r"auto (\w+) = std::move\(inputs\[(\d+)\]\);")
_EMPTY: Final = re.compile(r"aoti_torch_empty_strided\(\d+, (\w+), (\w+), .*&(\w+)_handle\)\)")
_VIEW: Final = re.compile(r"auto (\w+) = .*reinterpret_tensor_wrapper\((\w+), \d+, (\w+), (\w+),")
_CONVOLUTION: Final = re.compile(
    r"convolution\((?:(\w+)|wrap\w+\(reinterpret_tensor_wrapper\(\w+, \d+, \w+, (\w+), [^)]*\)\)), "
    r"(?:(\w+)|wrap\w+\(reinterpret_tensor_wrapper\(\w+, \d+, \w+, (\w+), [^)]*\)\)), "
)
"""A convolution with its image and its weight: each a tensor, or a view with the name of its strides."""
_LAUNCHER: Final = re.compile(
    r"static inline void call_(triton_\w+)\(\n(?:.(?!static inline void))*?"
    r"uint32_t grid_0 = ([^\n]*);\n(?:.(?!static inline void))*?"
    r"launchKernel\([^,]*, grid_0, grid_1, grid_2, (\d+), (\d+),",
    re.DOTALL,
)
_BLOCK: Final = re.compile(r"\((\d+) - 1\)")
_NUMEL: Final = re.compile(r"(\d+)L")
_MOVED: Final = re.compile(r"auto (\w+) = std::move\((\w+)\);")
_RESULT: Final = re.compile(r"RAIIAtenTensorHandle (\w+)\(\w+_handle\);")
_KERNEL: Final = re.compile(r"(call_triton_\w+)\((.*), stream, kernels, this->cubin_dir_\);")
_LIBRARY: Final = re.compile(r"aoti_torch_cuda_(\w+)\((.*)\)\);")


class GeneratedCodeError(BuildError):
    """A package without its code, or with code that this reader does not know."""


@dataclass(frozen=True)
class Operand:
    """What a launch reads or writes of a tensor: its name in the code, its type, and how many elements.

    A kernel touches no more elements than it has positions: of a tensor that is larger it takes a part.
    """

    name: str
    dtype: Dtype
    elements: int
    nbytes: int


@dataclass(frozen=True)
class Launch:
    """One call of a kernel that Inductor generated, or of a library.

    Attributes:
        name: the kernel's name, or the operator's.
        is_generated: whether it is Inductor's own; of a library's call the tensors are not told.
        copies_images: whether it is a convolution whose image or weight does not have its channels last, so that the
            library makes copies that have.
    """

    name: str
    is_generated: bool
    inputs: tuple[Operand, ...] = ()
    outputs: tuple[Operand, ...] = ()
    copies_images: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes that it moves if every element is read or written once."""
        return sum(operand.nbytes for operand in (*self.inputs, *self.outputs))


@dataclass(frozen=True)
class Configuration:
    """What was chosen for a kernel among what Triton could make of it.

    Attributes:
        block: elements of a block along the axis that the grid divides.
        shared: bytes of shared memory.
    """

    block: int
    warps: int
    shared: int


def read_package(path: Path, component: Component) -> tuple[Launch, ...]:
    """The launches of a package for a GPU, in order.

    Raises:
        GeneratedCodeError: see `parse_wrapper`; names the file.
    """
    code = wrapper_code(path)
    try:
        return parse_wrapper(code, component)
    except GeneratedCodeError as error:
        raise GeneratedCodeError(f"{path.name}: {error}") from error


def wrapper_code(path: Path) -> str:
    """The C++ that a package for a GPU was compiled from.

    Raises:
        GeneratedCodeError: it holds none.
    """
    with zipfile.ZipFile(path) as package:
        names = [name for name in package.namelist() if name.endswith(_WRAPPER)]
        if len(names) != 1:
            raise GeneratedCodeError(
                f"{path.name} holds {len(names)} wrappers; expected one, as packages for a GPU do"
            )
        return package.read(names[0]).decode()


def parse_configurations(code: str) -> dict[str, Configuration]:
    """What was chosen for each kernel of Inductor's, by name; a kernel without blocks along its grid has one of 1."""
    found = {}
    for name, grid, warps, shared in _LAUNCHER.findall(code):
        block = _BLOCK.search(grid)
        found[name] = Configuration(int(block[1]) if block else 1, int(warps), int(shared))
    return found


def parse_wrapper(code: str, component: Component) -> tuple[Launch, ...]:
    """The launches of a wrapper's code.

    Raises:
        GeneratedCodeError: a launch takes what is not declared, or the code has another form.
    """
    _, found, body = code.partition(_BODY)
    if not found:
        raise GeneratedCodeError(
            f"the code has no function {_BODY.strip(':(')}; rebuild it with a PyTorch that is known"
        )
    kernels = {name: _POINTER.findall(signature) for name, signature in _DEFINITION.findall(code)}
    reader = _Reader(kernels, component, _CONSTANT.findall(code))
    for line in body.splitlines():
        reader.line(line)
    return tuple(reader.launches)


class _Reader:
    """Follows declarations and launches, line by line."""

    def __init__(
        self, kernels: dict[str, list[tuple[str, str]]], component: Component, constants: list[str]
    ) -> None:
        self._kernels = kernels
        self._specs = (*component.inputs, *component.outputs)
        self._arrays: dict[str, tuple[int, ...]] = {}
        self._sizes: dict[str, int | None] = dict.fromkeys(constants)
        """Elements of each tensor; None of constants and of what a library made, whose shapes the code does not say."""
        self._strides: dict[str, str] = {}
        """The array of each tensor's strides, where the code says it."""
        self.launches: list[Launch] = []

    def line(self, line: str) -> None:
        """One line of the function that runs the package."""
        if found := _ARRAY.search(line):
            self._arrays[found[1]] = tuple(int(dim.strip().rstrip("L")) for dim in found[2].split(","))
        elif found := _INPUT.search(line):
            self._sizes[found[1]] = prod(int(dim) for dim in self._specs[int(found[2])].shape)
        elif found := _EMPTY.search(line):
            self._sizes[found[3]] = self._elements(found[1])
            self._strides[found[3]] = found[2]
        elif found := _KERNEL.search(line):
            self._generated(found[1], [value.strip() for value in found[2].split(", ")])
        elif found := _LIBRARY.search(line):
            self.launches.append(Launch(found[1], is_generated=False, copies_images=self._copies(line)))
        elif found := _VIEW.search(line):
            self._sizes[found[1]] = self._elements(found[3])
            self._strides[found[1]] = found[4]
        elif (found := _MOVED.search(line)) and found[2] in self._sizes:
            self._sizes[found[1]] = self._sizes[found[2]]
            if found[2] in self._strides:
                self._strides[found[1]] = self._strides[found[2]]
        elif found := _RESULT.search(line):
            self._sizes.setdefault(found[1], None)

    def _copies(self, line: str) -> bool:
        """Whether a library's call is a convolution of tensors whose channels, the second axis, do not lie last."""
        if (found := _CONVOLUTION.search(line)) is None:
            return False
        image, of_image, weight, of_weight = found.groups()
        strides = [of_image or self._strides.get(image, ""), of_weight or self._strides.get(weight, "")]
        return any(self._arrays.get(name, (0, 0))[1] != 1 for name in strides)

    def _elements(self, array: str) -> int:
        if array not in self._arrays:
            raise GeneratedCodeError(f"{array!r} is used as a shape and not declared")
        return prod(self._arrays[array])

    def _generated(self, name: str, values: list[str]) -> None:
        pointers = self._kernels.get(name)
        numels = [int(found[1]) for value in values if (found := _NUMEL.fullmatch(value))]
        if pointers is None or len(values) < len(pointers) or not numels:
            raise GeneratedCodeError(
                f"the kernel {name!r} is launched with {', '.join(values)}, unlike its definition"
            )
        inputs, outputs = [], []
        for (pointer, dtype), value in zip(pointers, values, strict=False):
            if value not in self._sizes or dtype not in _TYPES:
                raise GeneratedCodeError(
                    f"the kernel {name!r} takes {value!r} of type {dtype!r}, which is not known"
                )
            size, positions = self._sizes[value], prod(numels)
            elements = positions if size is None else min(size, positions)
            kind = _TYPES[dtype]
            operand = Operand(value, kind, elements, nbytes(kind, (elements,)))
            if pointer.startswith("in_"):
                inputs.append(operand)
            if "out_" in pointer:
                outputs.append(operand)
        self.launches.append(Launch(name.removeprefix("call_"), True, tuple(inputs), tuple(outputs)))
