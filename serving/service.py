"""What all requests share: the pipeline, its places, and the state of the server."""

from __future__ import annotations

import asyncio
import logging
import time
from importlib.util import find_spec
from typing import Any, Literal

from runtime import LightForcingError, Manifest, Pipeline

from .clips.maker import Clips
from .errors import RequestError, ServingError
from .live.encoder import VideoShape, h264_codec
from .live.session import LiveSession
from .metrics import Metrics
from .neighbours import Neighbours, keep_reporting
from .places import Places
from .security import Guard, RateLimit
from .settings import Settings
from .tracing import span

__all__ = ["Service", "State"]

State = Literal["starting", "ready", "draining", "failed"]
_log = logging.getLogger("serving")


class Service:
    """One bundle being served. Everything but `pipeline` belongs to the event loop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.guard = Guard(settings)
        limits = settings.limits
        self.requests = RateLimit(limits.requests_per_second, limits.request_burst, time.monotonic)
        self.places = Places(settings.sessions, queue=limits.queue, clock=time.monotonic)
        self.clips = Clips(settings.videos, limits, self.metrics)
        self.live: dict[str, LiveSession] = {}
        self.connections: dict[str, int] = {}
        """Open WebSockets by client address."""
        self.state: State = "starting"
        self.stage = "files"
        self.error: Exception | None = None
        self._pipeline: Pipeline | None = None
        self.neighbours: Neighbours | None = None
        """Servers that share this one's address, if there are any."""
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def pipeline(self) -> Pipeline:
        """The loaded pipeline.

        Raises:
            RequestError: (503) there is none, or none is given away.
        """
        if self.state == "draining":
            raise RequestError("draining", "the server is stopping; try another", status=503)
        if self._pipeline is None or self.state != "ready":
            raise RequestError("starting", f"the server is starting ({self.stage}); try again", status=503)
        return self._pipeline

    @property
    def manifest(self) -> Manifest:
        """What the bundle says about itself."""
        return self.pipeline.manifest

    @property
    def shape(self) -> VideoShape:
        """Size and rate of the video."""
        model = self.manifest.model
        return VideoShape(model.video_height, model.video_width, model.fps)

    async def start(self) -> None:
        """Load and verify the bundle, then serve. Errors go to `error`; the state is `failed` then."""
        settings = self.settings
        try:
            with span("load"):
                pipeline = await asyncio.to_thread(
                    Pipeline.load,
                    settings.bundle,
                    sessions=settings.sessions,
                    threads=settings.threads,
                    text_encoder="resident" if settings.resident_text_encoder else "auto",
                    verify=settings.verify,
                    golden=settings.golden,
                    expected=settings.expected,
                    progress=self._note_stage,
                )
                model = pipeline.manifest.model
                shape = VideoShape(model.video_height, model.video_width, model.fps)
                encoder, _ = await asyncio.to_thread(h264_codec, shape)
            self._pipeline = pipeline
            if self.state != "starting":
                return  # told to stop meanwhile
            await asyncio.to_thread(self.clips.open)
        except (LightForcingError, ServingError, OSError) as error:
            self.error = error
            self.state = "failed"
            return
        self.metrics.places.set(settings.sessions)
        self.metrics.device_memory.set(pipeline.memory.total_bytes)
        self.metrics.ready.set(1)
        self.state = "ready"
        self.keep(asyncio.create_task(self.clips.work(pipeline, self.places)))
        if self.neighbours is not None:
            self.keep(asyncio.create_task(keep_reporting(self.neighbours, self._free)))
        _log.info("ready", extra={"fields": {"bundle": pipeline.manifest.name, "encoder": encoder}})

    async def drain(self, seconds: float) -> None:
        """Take nothing new, let sessions end within `seconds`, then end them with a reason."""
        if self.state == "draining":
            return
        self.state = "draining"
        self.metrics.ready.set(0)
        _log.info("draining", extra={"fields": {"sessions": len(self.live), "seconds": seconds}})
        self.places.refuse_all(RequestError("draining", "the server is stopping; try another", status=503))
        deadline = time.monotonic() + seconds
        while (self.live or self.clips.busy) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        for session in list(self.live.values()):
            session.end("shutdown", "the server is stopping")
        while self.live:
            await asyncio.sleep(0.01)

    def keep(self, task: asyncio.Task[None]) -> None:
        """Let a task run until it ends, or the server does."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """End everything and free the pipeline."""
        await self.drain(0.0)
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._pipeline is not None:
            await asyncio.to_thread(self._pipeline.close)
            self._pipeline = None

    async def has_better_neighbour(self) -> bool:
        """Whether a client should go elsewhere: there is no place here, and another server has one."""
        return self.neighbours is not None and self._free() == 0 and await self.neighbours.have_room()

    def _free(self) -> int:
        return self.places.total - self.places.taken if self.state == "ready" else 0

    def exposition(self) -> bytes:
        """The metrics, with what is counted at the moment of asking."""
        metrics = self.metrics
        metrics.places_taken.set(self.places.taken)
        metrics.waiting.set(self.places.waiting)
        metrics.connections.set(sum(self.connections.values()))
        return metrics.text()

    def bundle(self) -> dict[str, Any]:
        """The manifest's summary for `/v1/bundle`."""
        manifest = self.manifest
        model, shape = manifest.model, self.shape
        return {
            "name": manifest.name,
            "backend": manifest.backend,
            "precision": manifest.precision,
            "target": manifest.target.name,
            "variant": manifest.variant,
            "preset": model.preset,
            "width": shape.width,
            "height": shape.height,
            "fps": shape.fps,
            "chunk_frames": model.chunk_frames * manifest.vae.temporal_factor,
            "denoise_steps": manifest.schedule.denoise_steps,
            "recache": manifest.cache.recache,
            "recache_modes": list(manifest.recache_modes),
            "examples": list(self.settings.examples),
            "places": self.places.total,
            "formats": ["h264", "jpeg"],
            "input_reference": self.pipeline.starts_from_frames,
            "webrtc": find_spec("aiortc") is not None,
            "ice_servers": list(self.settings.ice_servers),
            "h264_codec": h264_codec(shape)[1],
        }

    def _note_stage(self, stage: str) -> None:
        self.stage = stage
