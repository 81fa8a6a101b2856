"""What the files of a bundle are, found by opening them as far as that goes without what executes them."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from typing import Final

from runtime.bundle import Bundle
from runtime.bundle.golden import GoldenVectors
from runtime.bundle.strict_json import parse_json
from runtime.bundle.weights_file import WeightsFile
from runtime.errors import LightForcingError
from runtime.host.inductor import SUFFIX as PACKAGE_SUFFIX
from runtime.host.onnx_file import external_tensors, read_external
from runtime.program.attention import map_sizes, read_tables, table_buffer

from .steps import Flaws

__all__ = ["check_contents"]

_PLANS: Final = {"tensorrt-rtx": b"vtrt", "tensorrt": b"ftrt"}
"""By backend, how its engines begin."""
_SIZE_AT: Final = 16
"""Where an engine of TensorRT-RTX states its own size, in eight bytes."""


def check_contents(bundle: Bundle, flaws: Flaws) -> None:
    """Open engines, graphs, packages, tokenizer, weights and golden vectors."""
    manifest = bundle.manifest
    for file in dict.fromkeys(part.file for part in manifest.components.values() if part.file is not None):
        _note(flaws, f"engine {file!r}", partial(_check_engine, bundle, file))
    _note(flaws, f"tokenizer {manifest.text.tokenizer!r}", partial(_check_tokenizer, bundle))
    if manifest.segments is not None:
        file = manifest.segments.weights
        _note(flaws, f"weights file {file!r}", partial(_check_values, bundle, file))
    if manifest.kernels is not None and manifest.kernels.tables is not None:
        _note(flaws, f"tables {manifest.kernels.tables!r}", partial(_check_tables, bundle))
    if manifest.golden is not None:
        _note(flaws, f"golden vectors {manifest.golden.file!r}", partial(_check_golden, bundle))


def _note(flaws: Flaws, where: str, check: Callable[[], None]) -> None:
    try:
        check()
    except (LightForcingError, ValueError) as error:
        flaws.add(where, str(error))


def _check_engine(bundle: Bundle, file: str) -> None:
    backend = bundle.manifest.backend
    with bundle.opened(file) as opened:
        content = opened.contents()
    if file.endswith(PACKAGE_SUFFIX):
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                damaged = archive.testzip()
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"it is no package: {error}") from error
        if damaged is not None:
            raise ValueError(f"its part {damaged!r} is damaged")
    elif backend in _PLANS:
        if not content.startswith(_PLANS[backend]):
            raise ValueError(
                f"it begins with {content[:4]!r}, and engines of {backend} with {_PLANS[backend]!r}"
            )
        stated = int.from_bytes(content[_SIZE_AT : _SIZE_AT + 8], "little")
        if backend == "tensorrt-rtx" and stated != len(content):
            raise ValueError(f"it says that it has {stated:,} bytes, and has {len(content):,}")
    else:
        read_external(bundle, external_tensors(content, file))


def _check_tokenizer(bundle: Bundle) -> None:
    with bundle.opened(bundle.manifest.text.tokenizer) as opened:
        if not isinstance(parse_json(opened.contents()), dict):
            raise ValueError("it is no tokenizer.json")


def _check_tables(bundle: Bundle) -> None:
    """What kernels read as an index lies inside of what it is an index of."""
    kernels = bundle.manifest.kernels
    tables = read_tables(bundle)
    assert kernels is not None
    for number, turn in enumerate(kernels.turns):
        own = {
            buffer: tables[table_buffer(tensor)]
            for buffer, tensor in turn.tensors.items()
            if table_buffer(tensor) in tables  # that one is missing is found where it is taken
        }
        sizes = dict.fromkeys(("q_order", "k_order"), bundle.manifest.model.frame_tokens)
        sizes |= map_sizes(bundle.manifest, number)
        if "patch_blocks" in own:
            sizes["patch_blocks"] = len(own["k_order"]) + 1
        for buffer in own.keys() & sizes.keys():
            least = -1 if buffer in ("frame_map", "q_order", "k_order") else 0
            if own[buffer].min() < least or own[buffer].max() >= sizes[buffer]:
                raise ValueError(
                    f"{turn.tensors[buffer]!r} has values from {own[buffer].min()} to {own[buffer].max()}, expected "
                    f"{least} to {sizes[buffer] - 1}"
                )


def _check_values(bundle: Bundle, file: str) -> None:
    with WeightsFile(bundle.opened(file)) as weights:
        for name in weights:
            weights.read_finite(name)


def _check_golden(bundle: Bundle) -> None:
    with GoldenVectors(bundle) as vectors:
        vectors.require_complete()
