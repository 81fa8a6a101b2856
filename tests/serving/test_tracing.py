"""Spans, with OpenTelemetry's own collector in memory."""

from __future__ import annotations

import pytest

from tests.serving.client import StreamClient
from tests.serving.conftest import StartServer

pytest.importorskip("opentelemetry.sdk", reason="OpenTelemetry's SDK is not installed (extra test)")


def test_spans_of_a_session(start_server: StartServer) -> None:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    server = start_server()
    with StreamClient(server.url) as client:
        session = client.start("a", seconds=0.5)["session"]
        client.ask("set_prompt", prompt="snow", at=1)
        client.until("ended")
    chunks = client.of("chunk")
    spans = exporter.get_finished_spans()
    assert [span.name for span in spans].count("load") == 1
    own = [span for span in spans if span.attributes and span.attributes.get("session") == session]
    assert sum(span.name == "condition" for span in own) == 2  # the first prompt and the second
    for stage in ("denoise", "decode", "encode"):
        of_stage = [span for span in own if span.name == stage]
        assert [span.attributes["chunk"] for span in of_stage] == [chunk["chunk"] for chunk in chunks]
        for span, chunk in zip(of_stage, chunks, strict=True):
            assert (span.end_time - span.start_time) / 1e9 == pytest.approx(chunk[stage], abs=0.02)
    denoise, decode = (
        next(span for span in own if span.name == stage and span.attributes["chunk"] == 0)
        for stage in ("denoise", "decode")
    )
    assert denoise.start_time < denoise.end_time <= decode.end_time
