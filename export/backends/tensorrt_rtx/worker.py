"""The process that builds one TensorRT-RTX engine; the one place that imports the library.

Its argument is a JSON object: `onnx` and `engine` (paths), `compute_capability`. It
writes JSON objects to its standard output, one a line: progress, then the result, or the stage and errors of a failure.
It needs nothing but the standard library and TensorRT-RTX, so that it starts fast.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from export.parts.worker import Send, peak_bytes, progress_monitor, serve


def _work(request: dict[str, Any], send: Send) -> None:
    """Build one engine; everything worth knowing goes through `send`."""
    import tensorrt_rtx as trt

    errors: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                errors.append(message)

    started = time.monotonic()
    # No plugin is ever registered here: the parser aborts the process where a node maps to one.
    logger = Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request["onnx"]):
        found = [parser.get_error(index) for index in range(parser.num_errors)]
        named = [f"node {e.node_name()!r} ({e.node_operator()}): {e.desc().strip()}" for e in found]
        send({"stage": "parse", "errors": named or errors})
        sys.exit(1)
    config = builder.create_builder_config()
    monitor = progress_monitor(trt, send)
    config.progress_monitor = monitor
    config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    config.num_compute_capabilities = 1
    capability = getattr(trt.ComputeCapability, "SM" + request["compute_capability"].replace(".", ""))
    config.set_compute_capability(capability, 0)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        send({"stage": "build", "errors": errors})
        sys.exit(1)
    with open(request["engine"], "wb") as file:
        file.write(plan)
        file.flush()
        os.fsync(file.fileno())

    def table(count: int, get: Callable[[int], Any]) -> list[tuple[str, str, list[int]]]:
        tensors = [get(index) for index in range(count)]
        return [(t.name, t.dtype.name, list(t.shape)) for t in tensors]

    send(
        {
            "inputs": table(network.num_inputs, network.get_input),
            "outputs": table(network.num_outputs, network.get_output),
            "seconds": time.monotonic() - started,
            "peak_bytes": peak_bytes(),
            "version": trt.__version__,
        }
    )


if __name__ == "__main__":
    serve(_work)
