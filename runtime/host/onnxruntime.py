"""ONNX components on the host, run by ONNX Runtime."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from runtime.bundle import ELEMENT_TYPES, Bundle, TensorSpec
from runtime.errors import BundleError, EngineError, InputError
from runtime.host_memory import processors

from .onnx_file import external_tensors, read_external

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, IOBinding

__all__ = ["MAX_THREADS", "OnnxGraph", "check_threads", "default_threads"]

MAX_THREADS = 1024
"""Of one forward. Each takes memory, and the system has a limit on how many there may be."""

_ORT_ERRORS_ONLY = 3


def default_threads() -> int:
    """Threads per forward: `OMP_NUM_THREADS` if set, else the cores that this process may keep busy."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    if value.isdecimal() and int(value) > 0:
        return min(int(value), MAX_THREADS)
    return processors()


def check_threads(threads: int | None) -> None:
    """Hold a number of threads against what is possible; None stands for `default_threads`.

    Raises:
        InputError: it is no such number.
    """
    if threads is not None and (
        isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= MAX_THREADS
    ):
        raise InputError(f"threads is {threads!r}; expected a whole number, 1 to {MAX_THREADS}")


class OnnxGraph:
    """One component, loaded. Runs bound to fixed addresses, with weights that are in memory.

    Raises:
        BundleError: it is another graph than the manifest says, or its weights are in a file that is not listed.
        EngineError: ONNX Runtime does not load it.
    """

    def __init__(self, bundle: Bundle, name: str, threads: int) -> None:
        import onnxruntime as ort

        component = bundle.component(name)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _ORT_ERRORS_ONLY
        # Several graphs take turns on the same cores; a pool that spins while it waits would take them from the next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        segments = bundle.manifest.segments
        if segments is not None and segments.embedded and name in segments.components:
            # Packed, a matrix would give other bits than as an input, and lie in memory a second time.
            options.add_session_config_entry("session.disable_prepacking", "1")
        if component.file is None:
            raise BundleError(
                f"component {name!r} of bundle {bundle.root} is executed as segments and has no file"
            )
        with bundle.opened(component.file) as file:
            model = file.contents()
        # ONNX Runtime would map the files that it opens itself: what is written to them later would be computed with.
        try:
            tensors = external_tensors(model, component.file)
        except ValueError as error:
            raise _unloadable(name, component.file, error) from error
        values = read_external(bundle, tensors)
        try:
            self._weights = [
                ort.OrtValue.ortvalue_from_numpy_with_onnx_type(values[tensor.name], tensor.type)
                for tensor in tensors
            ]
            options.add_external_initializers(list(values), self._weights)
            self._session: InferenceSession = ort.InferenceSession(
                model, sess_options=options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise _unloadable(name, component.file, error) from error
        self.name = name
        self.inputs = {spec.name: spec for spec in component.inputs}
        self.outputs = {spec.name: spec for spec in component.outputs}
        self._check(self.inputs, self._session.get_inputs(), "input")
        self._check(self.outputs, self._session.get_outputs(), "output")

    def _check(self, specs: Mapping[str, TensorSpec], found: Sequence[Any], kind: str) -> None:
        graph = {arg.name: _describe(arg.type, arg.shape) for arg in found}
        manifest = {
            name: _describe(ELEMENT_TYPES[spec.dtype].onnxruntime, spec.shape) for name, spec in specs.items()
        }
        wrong = sorted(name for name in graph | manifest if graph.get(name) != manifest.get(name))
        if wrong:
            raise BundleError(
                f"component {self.name!r}: {len(wrong)} {kind}(s) differ between manifest and graph, the first is "
                f"{wrong[0]!r}: {manifest.get(wrong[0], 'absent')} in the manifest, "
                f"{graph.get(wrong[0], 'absent')} in the graph; rebuild the bundle"
            )

    def bind(self, inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]) -> IOBinding:
        """Bind the component's inputs and outputs to arrays, which must stay alive and in place.

        Raises:
            BundleError: the component has a tensor that this runtime does not know.
        """
        binding = self._session.io_binding()
        for specs, arrays, bind in (
            (self.inputs, inputs, binding.bind_input),
            (self.outputs, outputs, binding.bind_output),
        ):
            for name in specs:
                if name not in arrays:
                    raise BundleError(
                        f"component {self.name!r} has a tensor {name!r} that this runtime does not know; rebuild "
                        f"the bundle with the exporter of this version"
                    )
                array = arrays[name]
                bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        return binding

    def run(self, binding: IOBinding) -> float:
        """Run a binding; the seconds it took.

        Raises:
            EngineError: the component failed.
        """
        start = time.perf_counter()
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise EngineError(f"component {self.name!r} failed: {error}") from error
        return time.perf_counter() - start


def _unloadable(component: str, file: str, error: Exception) -> EngineError:
    import onnxruntime as ort

    return EngineError(
        f"component {component!r} ({file}) does not load in ONNX Runtime {ort.__version__}: {error}; rebuild the "
        f"bundle, or install the onnxruntime version its manifest names"
    )


def _describe(kind: str, shape: Sequence[int | str | None]) -> str:
    return f"{kind} {['?' if not isinstance(dim, int) else dim for dim in shape]}"
