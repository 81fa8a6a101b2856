"""OpenTelemetry spans where its API is installed; nothing where it is not. Exporters are the deployment's business."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from runtime import Chunk

__all__ = ["span", "trace_chunk"]


@cache
def _tracer() -> Any:
    try:
        from opentelemetry import trace
    except ImportError:
        return None
    return trace.get_tracer("lightforcing.serving")


@contextmanager
def span(name: str, **attributes: Any) -> Iterator[None]:
    """A span around a block."""
    tracer = _tracer()
    if tracer is None:
        yield
        return
    with tracer.start_as_current_span(name, attributes=attributes):
        yield


def trace_chunk(chunk: Chunk, session: str) -> None:
    """Spans of a chunk that has just been finished: denoising (with what comes before it), then decoding."""
    tracer = _tracer()
    if tracer is None:
        return
    end = time.time_ns()
    attributes = {"session": session, "chunk": chunk.index}
    begin = end - int(chunk.latency * 1e9)
    for name, first, last in (
        ("denoise", begin, begin + int(chunk.denoise * 1e9)),
        ("decode", end - int(chunk.decode * 1e9), end),
    ):
        tracer.start_span(name, start_time=first, attributes=attributes).end(end_time=last)
