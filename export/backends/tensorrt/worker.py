"""The process that builds, inspects and runs one TensorRT engine; the one place that imports the library.

Its argument is a JSON object with `task`: "build" or "measure". It writes JSON objects to its standard output, one a
line: progress, then results, or the stage of a failure; what the library says goes to the standard error.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

from export.parts.worker import Send, peak_bytes, progress_monitor, serve

PLUGIN_NAMESPACE, PLUGIN_VERSION = "lightforcing", "1"


def _load_plugin(request: dict[str, Any], send: Send) -> None:
    """Load the plugin library, if the graph needs one, after checking that it is the one that was asked for."""
    import tensorrt as trt

    plugin = request["plugin"]
    if plugin is None:
        return
    send({"stage": "plugin"})
    found = hashlib.sha256(Path(plugin["path"]).read_bytes()).hexdigest()
    if found != plugin["sha256"]:
        raise RuntimeError(f"{plugin['path']} changed while the bundle was built (SHA-256 {found})")
    registry = trt.get_plugin_registry()
    if registry.load_library(plugin["path"]) is None:
        raise RuntimeError(f"TensorRT {trt.__version__} does not load {plugin['path']}")
    for name in plugin["operators"]:
        if registry.get_creator(name, PLUGIN_VERSION, PLUGIN_NAMESPACE) is None:
            raise RuntimeError(f"{plugin['path']} registers no plugin {PLUGIN_NAMESPACE}::{name}")
    send({"plugin": found})


def _build(request: dict[str, Any], send: Send) -> None:
    """Parse, build, save engine and inspector output."""
    import tensorrt as trt
    from polygraphy.backend.trt import (
        CreateConfig,
        EngineBytesFromNetwork,
        EngineFromBytes,
        NetworkFromOnnxPath,
    )

    started = time.monotonic()
    _load_plugin(request, send)
    send({"stage": "parse"})
    # The operators carry function bodies for other runtimes; the flag makes the parser prefer the plugin.
    parsed = NetworkFromOnnxPath(
        request["onnx"], flags=[trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE], strongly_typed=True
    )()
    send({"stage": "build"})
    cache = request["timing_cache"]
    limit = request["workspace_limit"]
    monitor = progress_monitor(trt, send)
    config = CreateConfig(
        memory_pool_limits=None if limit is None else {trt.MemoryPoolType.WORKSPACE: limit},
        profiling_verbosity=trt.ProfilingVerbosity.DETAILED,
        load_timing_cache=cache if Path(cache).exists() else None,
        progress_monitor=monitor,
    )
    plan = EngineBytesFromNetwork(parsed, config=config, save_timing_cache=cache)()
    _write(Path(request["engine"]), plan)
    send({"stage": "inspect"})
    engine = EngineFromBytes(plan)()
    inspector = engine.create_engine_inspector()
    described = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    _write(Path(request["inspector"]), described.encode())

    tensors: dict[str, list[tuple[str, str, list[int]]]] = {"inputs": [], "outputs": []}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        kind = "inputs" if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else "outputs"
        dtype = engine.get_tensor_dtype(name).name
        tensors[kind].append((name, dtype, list(engine.get_tensor_shape(name))))
    send(
        {
            **tensors,
            "activation_bytes": engine.device_memory_size_v2,
            "layers": engine.num_layers,
            "seconds": time.monotonic() - started,
            "peak_bytes": peak_bytes(),
            "version": trt.__version__,
        }
    )


def _write(path: Path, content: Any) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _measure(request: dict[str, Any], send: Send) -> None:
    """Run the golden cases of one component on its engine, and report the error of each."""
    from polygraphy.backend.common import BytesFromPath
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    from export.graph.arrays import as_tensor
    from runtime.bundle import Component
    from runtime.bundle.golden import METADATA_KEY, GoldenCases, Stored, error_of, shaped
    from runtime.bundle.weights_file import WeightsFile

    folder = Path(request["folder"])
    component = Component.model_validate(request["component"])
    samples = WeightsFile(folder / request["golden"])
    cases = GoldenCases.model_validate_json(samples.metadata[METADATA_KEY]).cases
    _load_plugin(request, send)
    send({"stage": "run"})
    errors: dict[str, float] = {}
    with TrtRunner(EngineFromBytes(BytesFromPath(request["engine"]))) as runner:
        for case in (case for case in cases if case.component == request["name"]):
            files = {
                recipe.file: WeightsFile(folder / recipe.file)
                for recipe in case.inputs.values()
                if isinstance(recipe, Stored)
            }
            feed = {
                spec.name: as_tensor(shaped(case.inputs[spec.name], spec, case.slots, files))
                for spec in component.inputs
            }
            outputs = runner.infer(feed)
            for spec in component.outputs:
                output, name = _array(outputs[spec.name]), f"{case.name}/{spec.name}"
                errors[name] = error_of(output, case.outputs[spec.name], samples.get_required(name))
    send({"errors": {name: None if error == float("inf") else error for name, error in errors.items()}})


def _array(output: Any) -> Any:
    """A numpy array of what a runner returned, widened where numpy has no such type."""
    import numpy as np
    import torch

    if not isinstance(output, torch.Tensor):
        return np.asarray(output)
    output = output.cpu()
    return (output.float() if output.dtype in (torch.bfloat16, torch.float8_e4m3fn) else output).numpy()


def _work(request: dict[str, Any], send: Send) -> None:
    (_build if request["task"] == "build" else _measure)(request, send)


if __name__ == "__main__":
    serve(_work)
