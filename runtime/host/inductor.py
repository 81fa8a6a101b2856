"""AOTInductor packages: components that PyTorch compiled, run by PyTorch alone.

A package takes its inputs, then the buffers that receive its outputs, in the order of the manifest, and writes in
place. PyTorch is imported when the first package is loaded and not before.
"""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.bundle import Bundle, TensorSpec
from runtime.bundle.golden import Arrays
from runtime.errors import BundleError, EngineError
from runtime.files import temporary_folder

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SUFFIX", "InductorGraph", "load_package", "load_package_file", "require_torch"]

SUFFIX = ".pt2"
"""Files of this kind are packages."""

_VECTORS = ("DEFAULT", "AVX2", "AVX512", "AMX")
"""Vector instructions of x86, each with those before it, as PyTorch calls what a processor has and a package wants."""


def require_torch(bundle: Bundle) -> None:
    """Check that the PyTorch that compiled the bundle's packages is the one installed.

    Raises:
        EngineError: it is not installed, or in another version.
        BundleError: the manifest does not say which one it is.
    """
    library = bundle.manifest.library
    if library is None or library.name != "torch":
        raise BundleError(
            f"bundle {bundle.root} holds packages compiled by PyTorch, but its manifest names "
            f"{library.name if library else 'no library'}; rebuild the bundle"
        )
    try:
        import torch
    except ImportError as error:
        raise EngineError(
            f"bundle {bundle.manifest.name!r} runs on PyTorch {library.version}, which is not installed; install it, "
            f"or use a bundle of another backend"
        ) from error
    if torch.__version__ != library.version:
        raise EngineError(
            f"bundle {bundle.manifest.name!r} was compiled by PyTorch {library.version} and runs with no other, but "
            f"{torch.__version__} is installed; rebuild the bundle here, or install that version"
        )


def load_package(bundle: Bundle, name: str, *, device_index: int = -1) -> Any:
    """The package of component `name`, loaded; `device_index` is the CUDA device, -1 on the host.

    It is not to be run by two threads at once. Runs with `.run(tensors, stream)`.

    Raises:
        EngineError: it does not load.
        BundleError: the component has no package, or its file is another one than was verified.
    """
    with bundle.opened(_file(bundle, name)) as file:
        loader = load_package_file(file.path, name, device_index)
        file.check_name()
    if device_index < 0:
        _require_instructions(name, loader)
    return loader


def _require_instructions(name: str, loader: Any) -> None:
    """Refuse a package whose vector instructions this processor lacks: the first one it met would end the process."""
    import torch

    wanted = str(loader.get_metadata().get("AOTI_CPU_ISA", ""))
    known = torch.backends.cpu.get_cpu_capability()
    if known in _VECTORS and wanted.startswith(_VECTORS[_VECTORS.index(known) + 1 :]):
        raise EngineError(
            f"component {name!r} was compiled for a processor with {wanted}, and this one has {known}; rebuild the "
            f"bundle here, or run it where it was built"
        )


def load_package_file(path: Path, name: str, device_index: int) -> Any:
    """The package of component `name` in a file that may be of no bundle, loaded; see `load_package`.

    Raises:
        EngineError: it does not load.
    """
    import torch

    try:
        temporary_folder()  # a package is unpacked there
    except OSError as error:
        raise EngineError(f"component {name!r} ({path}) does not load: {error}") from error
    try:
        # Not `torch._inductor.aoti_load_package`: it compares this machine with the one that compiled the package, for
        # which it runs a C++ compiler on a program for each instruction set, most of a minute in every process.
        return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, device_index)
    except Exception as error:
        raise EngineError(
            f"component {name!r} ({path}) does not load in PyTorch {torch.__version__}: {error}; rebuild the bundle "
            f"on this machine"
        ) from error


def _file(bundle: Bundle, name: str) -> str:
    file = bundle.component(name).file
    if file is None or Path(file).suffix != SUFFIX:
        raise BundleError(
            f"component {name!r} of bundle {bundle.root} has the file {file}, expected one that ends in {SUFFIX}; "
            f"rebuild the bundle"
        )
    return file


class InductorGraph:
    """One component on the host, loaded. Runs bound to fixed addresses.

    `threads` holds for PyTorch as a whole.
    """

    def __init__(self, bundle: Bundle, name: str, threads: int) -> None:
        require_torch(bundle)
        import torch

        torch.set_num_threads(threads)
        component = bundle.component(name)
        self.name = name
        self.inputs = {spec.name: spec for spec in component.inputs}
        self.outputs = {spec.name: spec for spec in component.outputs}
        self._loader = load_package(bundle, name)

    def bind(self, inputs: Arrays, outputs: Arrays) -> list[Tensor]:
        """Bind the component's inputs and outputs to arrays, which must stay alive and in place."""
        return [
            _tensor(self.name, spec, arrays)
            for specs, arrays in ((self.inputs, inputs), (self.outputs, outputs))
            for spec in specs.values()
        ]

    def run(self, binding: list[Tensor]) -> float:
        """Run a binding; the seconds it took.

        Raises:
            EngineError: the component failed.
        """
        start = time.perf_counter()
        try:
            self._loader.run(binding)
        except Exception as error:
            raise EngineError(f"component {self.name!r} failed: {error}") from error
        return time.perf_counter() - start


def _tensor(component: str, spec: TensorSpec, arrays: Arrays) -> Tensor:
    """A tensor over the memory of an array. The compiled code checks nothing, so what it is given is checked here."""
    import torch

    if spec.name not in arrays:
        raise BundleError(
            f"component {component!r} has a tensor {spec.name!r} that this runtime does not know; rebuild the bundle "
            f"with the exporter of this version"
        )
    array = arrays[spec.name]
    found = (array.dtype.name, array.shape)
    if found != (spec.dtype, spec.shape) or not array.flags.c_contiguous:
        raise EngineError(
            f"component {component!r} takes {spec.name!r} as a contiguous {spec.dtype} {list(spec.shape)}, but was "
            f"given {found[0]} {list(found[1])}"
        )
    if not array.flags.writeable:  # a mapped weight, which PyTorch would warn about; nothing writes to inputs
        memory = (ctypes.c_uint8 * array.nbytes).from_address(array.ctypes.data)
        array = np.ctypeslib.as_array(memory).view(array.dtype).reshape(array.shape)
    return torch.from_numpy(array)
