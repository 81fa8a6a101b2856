"""What is measured, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from runtime import Chunk

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """The metrics of one server, in a registry of their own. Times in seconds."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.places = self._gauge("places", "Sessions that the device holds at a time")
        self.places_taken = self._gauge("places_taken", "Places in use, by live sessions and clips")
        self.waiting = self._gauge("queue_length", "Clients that wait for a place")
        self.connections = self._gauge("connections", "Open WebSockets")
        self.ready = self._gauge("ready", "1 when requests are served")
        self.device_memory = self._gauge("buffer_bytes", "Bytes of all buffers of the pipeline")
        self.sessions = self._counter("sessions", "Live sessions that ended, by reason", "reason")
        self.refused = self._counter("refused", "Requests refused, by reason", "reason")
        self.chunks = self._counter("chunks", "Chunks computed for live sessions")
        self.sent_frames = self._counter("sent_frames", "Frames sent to clients")
        self.dropped_frames = self._counter(
            "dropped_frames", "Frames computed and not sent, by reason", "reason"
        )
        self.stalls = self._counter("stalls", "Times that a client had nothing to show")
        self.stall_seconds = self._counter("stall_seconds", "How long clients had nothing to show")
        self.stage_seconds = self._counter("stage_seconds", "Seconds by stage", "stage")
        self.first_chunk_seconds = self._histogram(
            "first_chunk_seconds", "From a place being free to the first chunk sent"
        )
        self.chunk_interval_seconds = self._histogram(
            "chunk_interval_seconds", "Between chunks sent to a client"
        )
        self.receipt_seconds = self._histogram("receipt_seconds", "From a control to its receipt")
        self.switch_seconds = self._histogram(
            "switch_seconds", "From a prompt switch to its first picture sent"
        )
        self.realtime_factor = self._gauge(
            "realtime_factor", "Rate of the last chunk's slowest stage, in units of real time"
        )
        self.videos = self._counter("videos", "Clips that ended, by status", "status")

    def computed(self, chunk: Chunk, seconds: float) -> None:
        """A chunk that lasts `seconds` has been computed."""
        self.chunks.inc()
        self.realtime_factor.set(seconds / max(chunk.denoise + chunk.other, chunk.decode, 1e-9))
        for stage in ("denoise", "decode", "other"):
            self.stage_seconds.labels(stage).inc(max(0.0, getattr(chunk, stage)))

    def sent(self, chunk: Chunk, encode: float, stall: float) -> None:
        """A chunk has been sent."""
        self.sent_frames.inc(len(chunk.frames))
        self.stage_seconds.labels("encode").inc(encode)
        if stall > 0:
            self.stalls.inc()
            self.stall_seconds.inc(stall)

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"lightforcing_{name}", text, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"lightforcing_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"lightforcing_{name}", text, registry=self.registry, buckets=_SECONDS)
