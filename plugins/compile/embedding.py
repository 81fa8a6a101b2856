"""Write kernel images as sources of a shared library: a C++ table (`plugins/launch/images.h`) and the cubins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from plugins.errors import PluginError
from plugins.kernels.specs import DTYPES, KERNELS, KernelProblem
from runtime.bundle import images
from runtime.files import write_file

__all__ = ["ASSEMBLY_NAME", "EMBEDDED_KERNELS", "TABLE_NAME", "EmbeddingError", "write_embedded"]

TABLE_NAME: Final = "image_table.cpp"
ASSEMBLY_NAME: Final = "cubins.S"

EMBEDDED_KERNELS: Final = ("prepare", "score", "select", "attend")
"""Kernels of the two operators. The cache kernels belong to whoever owns the cache."""

# The vocabulary of the image format that plugins/launch/images.h spells out.
_BUFFERS: Final = frozenset(name for kernel in EMBEDDED_KERNELS for name in KERNELS[kernel][1])
_SIZES: Final = frozenset(KernelProblem("bfloat16", 1, 1, 1, 1, 0, 1, 1).sizes()) - {"sinks"}
_OPTIONS: Final = frozenset(name for kernel in EMBEDDED_KERNELS for name in KERNELS[kernel][2]) - _SIZES
_DTYPE_CODES: Final = {
    "float32": "LF_FLOAT32",
    **{name: f"LF_{name.upper()}" for name in DTYPES},
}
_MAX_ARGUMENTS: Final = 32


class EmbeddingError(PluginError):
    """Images that the launch library cannot launch, or that are not there."""


def write_embedded(archs: Sequence[int], kernels: Path, out: Path) -> list[str]:
    """Write the images of `archs` (e.g. 90) under `kernels` as sources to `out`.

    Cubins that several images share are embedded once.

    Returns:
        The targets, such as `["sm_80", "sm_90a"]`.

    Raises:
        EmbeddingError: an image uses a name that the launch library does not know.
        BundleError: a folder of images is missing, incomplete or damaged.
    """
    out.mkdir(parents=True, exist_ok=True)
    symbols: dict[str, str] = {}
    arrays = _Arrays()
    tables: list[str] = []
    entries: list[str] = []
    targets: list[str] = []
    assembly = ['    .section .note.GNU-stack, "", %progbits', "    .section .rodata"]
    for arch in archs:
        image_set, cubins = images.read_images(kernels / f"sm_{arch}")
        rows = []
        for image in image_set.images:
            if image.kernel not in EMBEDDED_KERNELS:
                continue
            _check(image)
            if image.sha256 not in symbols:
                symbol = f"lf_cubin_{len(symbols)}"
                symbols[image.sha256] = symbol
                (out / f"{image.sha256}.cubin").write_bytes(cubins[image.name])
                # A relative path, found through the include path: the library holds no path of this machine.
                assembly += [
                    f"    .hidden {symbol}",
                    f"    .global {symbol}",
                    "    .balign 64",
                    f"{symbol}:",
                    f'    .incbin "{image.sha256}.cubin"',
                ]
            rows.append(_image(image, symbols[image.sha256], arrays))
        name = f"kImages{arch}"
        tables.append(f"constexpr Image {name}[] = {{\n" + ",\n".join(rows) + ",\n};" if rows else "")
        exact = str(image_set.target != image_set.arch).lower()
        view = name if rows else "{}"
        entries.append(f'    {{"{image_set.target}", {arch}, {exact}, {view}}},')
        targets.append(image_set.target)
    _remove_stale(out, symbols)
    declarations = [f"extern const unsigned char {symbol}[];" for symbol in symbols.values()]
    source = [
        f"// Generated from kernel images of {', '.join(targets)}; python -m plugins build --tensorrt.",
        '#include "images.h"',
        '#include "lightforcing_launch.h"',
        "",
        'extern "C" {',
        *declarations,
        "}",
        "",
        "namespace lightforcing {",
        "namespace {",
        "",
        *arrays.definitions(),
        *tables,
        "",
        "constexpr Architecture kArchitectures[] = {",
        *entries,
        "};",
        "",
        "} // namespace",
        "",
        "View<Architecture> architectures() {",
        "    return kArchitectures;",
        "}",
        "",
        "} // namespace lightforcing",
    ]
    _write_if_changed(out / TABLE_NAME, "\n".join(source) + "\n")
    _write_if_changed(out / ASSEMBLY_NAME, "\n".join(assembly) + "\n")
    return targets


def _write_if_changed(path: Path, text: str) -> None:
    """An unchanged source keeps its date, so that nothing is compiled again for it."""
    if not path.exists() or path.read_text() != text:
        write_file(path, text)


def _remove_stale(out: Path, symbols: Mapping[str, str]) -> None:
    for cubin in out.glob("*.cubin"):
        if cubin.stem not in symbols:
            cubin.unlink()


class _Arrays:
    """Constant arrays of the table, each distinct content once."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, str], str] = {}

    def view(self, element: str, items: Iterable[str]) -> str:
        """The expression of a `View<element>` of `items`."""
        content = ", ".join(items)
        if not content:
            return "{}"
        return self._names.setdefault((element, content), f"kArray{len(self._names)}")

    def definitions(self) -> list[str]:
        return [
            f"constexpr {element} {name}[] = {{{content}}};"
            for (element, content), name in self._names.items()
        ]


def _check(image: images.Image) -> None:
    used = {"buffer": _BUFFERS, "option": _OPTIONS, "size": _SIZES}
    unknown = {
        argument.name
        for argument in image.arguments
        if argument.source in used and argument.name not in used[argument.source]
    }
    facts = {*image.serves, *image.limits}
    facts |= {axis.size for axis in image.grid if isinstance(axis, images.GridAxis)}
    unknown |= facts - _SIZES - {"dtype"}
    unknown |= {str(dtype) for dtype in image.serves.get("dtype", ()) if dtype not in _DTYPE_CODES}
    if unknown:
        raise EmbeddingError(
            f"image {image.name} uses {', '.join(sorted(unknown))}, which the launch library does not supply; "
            "docs/kernels.md lists the buffers, options and sizes of each kernel"
        )
    if len(image.arguments) > _MAX_ARGUMENTS:
        raise EmbeddingError(
            f"image {image.name} takes {len(image.arguments)} arguments; the launch library passes up to "
            f"{_MAX_ARGUMENTS}"
        )


def _text(value: str) -> str:
    """A C++ string literal."""
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _argument(argument: images.Argument) -> str:
    index = {
        "buffer": f"static_cast<std::uint8_t>(Buffer::{argument.name})",
        "option": f"static_cast<std::uint8_t>(Option::{argument.name})",
        "size": f"static_cast<std::uint8_t>(Size::{argument.name})",
        "null": "0",
    }[argument.source]
    return f"{{{_text(argument.name)}, ArgumentType::{argument.type}, Source::{argument.source}, {index}}}"


def _axis(axis: images.GridAxis | int) -> str:
    if isinstance(axis, int):
        return f"{{{axis}, Size::heads, 1}}"
    return f"{{0, Size::{axis.size}, {axis.tile}}}"


def _image(image: images.Image, symbol: str, arrays: _Arrays) -> str:
    """One row of the table."""
    serves = []
    for size, values in image.serves.items():
        codes = [_DTYPE_CODES[str(value)] if size == "dtype" else str(value) for value in values]
        serves.append(f"{{Size::{size}, {arrays.view('std::int32_t', codes)}}}")
    limits = [f"{{Size::{size}, {most}}}" for size, most in image.limits.items()]
    arguments = [_argument(argument) for argument in image.arguments]
    fields = [
        _text(image.name),
        f"Kernel::{image.kernel}",
        symbol,
        str(image.bytes),
        _text(image.entry),
        str(image.threads),
        str(image.shared_memory),
        "{" + ", ".join(_axis(axis) for axis in image.grid) + "}",
        arrays.view("Argument", arguments),
        arrays.view("Requirement", serves),
        arrays.view("Limit", limits),
    ]
    return "    {" + ", ".join(fields) + "}"
